"""AV-Align (Yariv et al. 2023, arXiv 2309.16429): how many peaks of motion and of sound fall together.

Its published form takes onsets as librosa finds them and dense flow as OpenCV's Farnebäck method finds it, at their
default settings. Both are written out here, so that the figure needs neither of these packages.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import resample_poly
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

RATE, HOP, WINDOW, BANDS = 22050, 512, 2048, 128  # librosa's own
LEVELS, ITERATIONS, BOX, REACH, SIGMA = 3, 3, 15, 5, 1.2  # of the flow, as the published metric sets them


def onset_strength(audio: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Mean rise in dB over 128 mel bands of ``audio`` (samples,), one value every 512 samples at 22,050 Hz."""
    common = math.gcd(RATE, sampling_rate)
    samples = torch.from_numpy(resample_poly(audio.astype(np.float64), RATE // common, sampling_rate // common)).float()
    window = torch.hann_window(WINDOW)
    power = torch.stft(samples, WINDOW, HOP, window=window, pad_mode="constant", return_complex=True).abs().square()
    bank = mel_filter_bank(WINDOW // 2 + 1, BANDS, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    level = 10 * torch.log10((torch.from_numpy(bank.T).float() @ power).clamp(min=1e-10))
    level = level.clamp(min=level.max() - 80)
    rise = level.diff(dim=1).clamp(min=0).mean(0)
    # A frame's window is centred on it; the rise is told where the window begins to hold the new sound.
    lag = 1 + WINDOW // (2 * HOP)
    return F.pad(rise, (lag, 0))[: level.shape[1]].numpy()


def sound_peaks(audio: np.ndarray, sampling_rate: int) -> list[float]:
    """Seconds of the onsets in ``audio`` (samples,): local maxima of the onset strength that stand out by 0.07."""
    strength = onset_strength(audio, sampling_rate)
    strength = strength - strength.min()
    if not strength.max() > 0:
        return []
    strength = strength / strength.max()
    near, around, wait = int(0.03 * RATE / HOP), int(0.10 * RATE / HOP), int(0.03 * RATE / HOP)
    peaks: list[int] = []
    for n, value in enumerate(strength):
        highest = strength[max(0, n - near) : n + 1].max()
        mean = strength[max(0, n - around) : n + around + 1].mean()
        if value == highest and value >= mean + 0.07 and (not peaks or n > peaks[-1] + wait):
            peaks.append(n)
    return [n * HOP / RATE for n in peaks]


def _along(x: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """Correlate the maps ``x`` (N, C, H, W) with ``kernel`` along their columns (axis 2) or rows (axis 3)."""
    reach = len(kernel) // 2
    pad, shape = ((0, 0, reach, reach), (1, 1, -1, 1)) if axis == 2 else ((reach, reach, 0, 0), (1, 1, 1, -1))
    weight = kernel.to(x).view(shape).expand(x.shape[1], -1, -1, -1)
    return F.conv2d(F.pad(x, pad, mode="replicate"), weight, groups=x.shape[1])


def _gaussian(reach: int, sigma: float) -> tuple[Tensor, Tensor]:
    """Offsets -reach to reach and the normalised Gaussian at them."""
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    return offsets, weights / weights.sum()


def _polynomials(grey: Tensor) -> Tensor:
    """Around every pixel of (N, 1, H, W), the quadratic that fits it best: (N, 5, H, W) of x, y, x², y², xy."""
    x, g = _gaussian(REACH, SIGMA)
    sums = {}
    for i in range(3):
        rows = _along(grey, g * x**i, 2)
        for j in range(3 - i):
            sums[j, i] = _along(rows, g * x**j, 3)  # sum of weight · x^j · y^i · grey
    second, fourth = float((g * x**2).sum()), float((g * x**4).sum())
    # The moments of an even weight leave only 1, x², y² coupled; their 3 x 3 system has this closed form.
    spread = fourth - second**2
    square_x, square_y = ((sums[k] - second * sums[0, 0]) / spread for k in ((2, 0), (0, 2)))
    return torch.cat([sums[1, 0] / second, sums[0, 1] / second, square_x, square_y, sums[1, 1] / second**2], 1).float()


def _refined(first: Tensor, second: Tensor, flow: Tensor) -> Tensor:
    """One iteration: the flow (N, 2, H, W) in pixels that best carries polynomials ``first`` onto ``second``."""
    n, _, height, width = flow.shape
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at = torch.stack([xs, ys]).float() + flow  # (N, 2, H, W)
    size = torch.tensor([width - 1, height - 1]).view(1, 2, 1, 1)
    moved = F.grid_sample(second, (2 * at / size - 1).permute(0, 2, 3, 1), align_corners=True, padding_mode="border")
    inside = ((at >= 0) & (at <= size)).all(1, keepdim=True)
    quadratic = torch.where(inside, (first[:, 2:] + moved[:, 2:]) / 2, first[:, 2:])
    linear = torch.where(inside, (first[:, :2] - moved[:, :2]) / 2, first[:, :2] / 2)
    # A = [[xx, xy], [xy, yy]] of the quadratics and b with A flow = b, each pixel with its neighbours.
    xx, yy, xy = quadratic[:, 0], quadratic[:, 1], quadratic[:, 2] / 2
    bx = linear[:, 0] + xx * flow[:, 0] + xy * flow[:, 1]
    by = linear[:, 1] + xy * flow[:, 0] + yy * flow[:, 1]
    terms = torch.stack([xx**2 + xy**2, (xx + yy) * xy, yy**2 + xy**2, xx * bx + xy * by, xy * bx + yy * by], 1)
    edge = torch.tensor([0.14, 0.14, 0.4472, 0.4472, 0.4472])  # fits at the border rest on pixels that are not there
    weights = [F.pad(torch.ones(side - 10), (5, 5)) for side in (height, width)]
    for weight in weights:
        weight[:5], weight[-5:] = edge, edge.flip(0)
    terms = terms * (weights[0][:, None] * weights[1]).square()
    box = torch.full((BOX,), 1 / BOX)
    g11, g12, g22, h1, h2 = _along(_along(terms, box, 2), box, 3).unbind(1)
    scale = 1 / (g11 * g22 - g12**2 + 1e-3)
    return torch.stack([(g22 * h1 - g12 * h2) * scale, (g11 * h2 - g12 * h1) * scale], 1)


@torch.no_grad()
def optical_flow(before: Tensor, after: Tensor) -> Tensor:
    """Dense flow (N, 2, H, W) in pixels, x then y, of grey pictures (N, 1, H, W) in [0, 255] (Farnebäck 2003).

    Raises:
        ValueError: for pictures of less than 32 pixels a side.
    """
    height, width = before.shape[2:]
    if min(height, width) < 32:
        raise ValueError(f"pictures of {height} x {width} are too small for optical flow: 32 pixels a side are needed")
    levels = min(LEVELS, int(math.log2(min(height, width) / 32)))
    flow = None
    for level in range(levels, -1, -1):
        factor, size = 2**level, (round(height / 2**level), round(width / 2**level))
        sigma = (factor - 1) / 2
        fits = []
        for picture in (before, after):
            if level:
                _, kernel = _gaussian(max(round(sigma * 5) | 1, 3) // 2, sigma)
                picture = _along(_along(picture, kernel, 2), kernel, 3)
                picture = F.interpolate(picture, size, mode="bilinear", align_corners=False)
            fits.append(_polynomials(picture))
        if flow is None:
            flow = torch.zeros(len(before), 2, *size)
        else:
            flow = 2 * F.interpolate(flow, size, mode="bilinear", align_corners=False)
        for _ in range(ITERATIONS):
            flow = _refined(*fits, flow)
    return flow


def picture_peaks(frames: np.ndarray, fps: int) -> list[float]:
    """Seconds of the local maxima of motion, the mean length of the flow, in ``frames`` (F, H, W, 3) in [0, 1]."""
    weights = torch.tensor([0.299, 0.587, 0.114])
    grey = (torch.from_numpy(np.ascontiguousarray(frames, np.float32)) @ weights * 255).round().unsqueeze(1)
    motion = optical_flow(grey[:-1], grey[1:]).square().sum(1).sqrt().mean((1, 2)).tolist()
    motion = motion[:1] + motion  # the first frame takes the first motion, so that entry i belongs to frame i
    return [i / fps for i in range(1, len(motion) - 1) if motion[i - 1] < motion[i] > motion[i + 1]]


def av_align(sound: list[float], picture: list[float], fps: int) -> float:
    """Intersection over union of the peaks (seconds) of one clip; two meet where they are less than a frame apart."""
    met = sum(any(abs(heard - seen) < 1 / fps - 1e-9 for seen in picture) for heard in sound)
    return met / max(1, len(sound) + len(picture) - met)
