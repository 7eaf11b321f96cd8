"""What the scene families share: the clip and event types, seeds, noise and sound building blocks."""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from avdit.geometry import ClipGeometry

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """Something that is seen and heard: ``time`` in seconds, ``x``/``y`` in [0, 1] from the top left."""

    time: float
    kind: str
    x: float = 0.5
    y: float = 0.5


@dataclass
class Clip:
    """One rendered clip: ``frames`` (F, H, W, 3) float in [0, 1], ``audio`` (samples,) in [-1, 1] on the CPU."""

    frames: Tensor
    audio: Tensor
    events: list[Event] = field(default_factory=list)


class Dice:
    """Random draws of one clip, from its seed alone and on the CPU, so that a seed is a clip everywhere."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = torch.device(device)

    @property
    def sound(self) -> "Dice":
        """The same dice for sound, which is made on the CPU: its many short parts would keep a GPU waiting."""
        dice = copy.copy(self)
        dice.device = torch.device("cpu")
        return dice

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator).to(self.device)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)


Renderer = Callable[[Dice, ClipGeometry], Clip]


def pixel_grid(geometry: ClipGeometry, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(x, y), each (H, W), in [0, 1] from the top left."""
    y = (torch.arange(geometry.height, device=device) + 0.5) / geometry.height
    x = (torch.arange(geometry.width, device=device) + 0.5) / geometry.width
    y, x = torch.meshgrid(y, x, indexing="ij")
    return x, y


def frame_times(geometry: ClipGeometry, device: torch.device | str = "cpu") -> Tensor:
    """(F,) seconds at which the frames are shown."""
    return torch.arange(geometry.frames, device=device) / geometry.fps


def sample_times(geometry: ClipGeometry) -> Tensor:
    """(samples,) seconds."""
    return torch.arange(geometry.samples) / geometry.sampling_rate


@functools.lru_cache(256)
def bicubic_weights(cells: int, size: int, device: torch.device) -> Tensor:
    """(size, cells + 1): the weights with which bicubic interpolation makes ``size`` values of ``cells`` + 1."""
    unit = torch.eye(cells + 1, device=device).view(1, cells + 1, cells + 1, 1)
    return F.interpolate(unit, (size, 1), mode="bicubic", align_corners=True)[0, :, :, 0].T.contiguous()


def fractal_noise(
    dice: Dice, height: int, width: int, *, cells: int = 4, octaves: int = 4, gain: float = 0.5
) -> Tensor:
    """Smooth noise (height, width) in about [0, 1]: octaves of bicubic value noise."""
    total = torch.zeros(height, width, device=dice.device)
    weight, norm = 1.0, 0.0
    for octave in range(octaves):
        n = cells * 2**octave
        if n > min(height, width):
            break
        # Two small products of matrices are several times as fast as F.interpolate on the same values.
        down, across = bicubic_weights(n, height, dice.device), bicubic_weights(n, width, dice.device)
        total += weight * (down @ dice.rand(n + 1, n + 1) @ across.T)
        norm += weight
        weight *= gain
    return (total / norm).clamp(0, 1)


def colour(rgb: tuple[float, float, float], device: torch.device | str = "cpu") -> Tensor:
    """(3, 1, 1, 1) tensor of a colour in [0, 1].

    Scenes are drawn as pictures (3, F, H, W), of stills F = 1: masks (F, H, W) or (H, W) then broadcast over whole
    planes, ten times as fast as over colours that lie side by side.
    """
    return torch.tensor(rgb, dtype=torch.float32, device=device).view(3, 1, 1, 1)


def shown(picture: Tensor) -> Tensor:
    """A picture (3, F, H, W), in place, as the frames (F, H, W, 3) in [0, 1] of a clip."""
    return picture.clamp_(0, 1).movedim(0, -1)


def window(low: float, high: float, size: int) -> slice:
    """The pixels of ``size`` that lie between ``low`` and ``high``, as shares of the picture, and one more each way."""
    return slice(max(int(low * size) - 1, 0), min(max(int(high * size) + 2, 0), size))


def stamp(
    canvas: Tensor, frame: Tensor, cx: Tensor, cy: Tensor, reach: int, shape: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Draw n small shapes into ``canvas`` (F, H, W) in place, all at once; where they meet the brightest wins.

    Args:
        frame: Frame of each shape, (n,).
        cx, cy: Its middle in pixels, (n,).
        reach: Pixels from the middle to the edge of what is drawn.
        shape: Brightness (n, p, p), 0 or more, at the distances (n, 1, p) and (n, p, 1) in pixels from the middle.
    """
    _, height, width = canvas.shape
    offsets = torch.arange(-reach, reach + 1, device=canvas.device)
    columns = cx.floor().long().view(-1, 1, 1) + offsets
    rows = cy.floor().long().view(-1, 1, 1) + offsets.unsqueeze(1)
    values = shape(columns + 0.5 - cx.view(-1, 1, 1), rows + 0.5 - cy.view(-1, 1, 1))
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    cell = (frame.view(-1, 1, 1) * height + rows.clamp(0, height - 1)) * width + columns.clamp(0, width - 1)
    canvas.view(-1).scatter_reduce_(0, cell.flatten(), (values * inside).flatten(), "amax")


def discs(canvas: Tensor, frame: Tensor, cx: Tensor, cy: Tensor, radius: Tensor) -> None:
    """Draw soft white discs into ``canvas`` (F, H, W); places and radii (n,) as shares of the picture's width."""
    if len(frame):
        r = (radius * canvas.shape[2]).view(-1, 1, 1)
        size = (cx * canvas.shape[2], cy * canvas.shape[1])
        reach = math.ceil(r.max().item()) + 1
        stamp(canvas, frame, *size, reach, lambda dx, dy: (r - (dx.square() + dy.square()).sqrt() + 0.5).clamp(0, 1))


def filtered_noise(dice: Dice, geometry: ClipGeometry, response: Callable[[Tensor], Tensor]) -> Tensor:
    """White noise (samples,) of unit RMS after ``response``, a gain for each frequency in Hz."""
    spectrum = torch.fft.rfft(dice.sound.randn(geometry.samples))
    hertz = torch.fft.rfftfreq(geometry.samples, 1 / geometry.sampling_rate)
    noise = torch.fft.irfft(spectrum * response(hertz), n=geometry.samples)
    return noise / noise.square().mean().sqrt().clamp(min=1e-8)


def band(low: float, high: float) -> Callable[[Tensor], Tensor]:
    """A gentle band-pass response between ``low`` and ``high`` Hz for :func:`filtered_noise`."""

    def response(hertz: Tensor) -> Tensor:
        return 1 / (1 + (low / hertz.clamp(min=1)) ** 4) / (1 + (hertz / high) ** 4)

    return response


def add_at(audio: Tensor, sound: Tensor, start: int) -> None:
    """Add ``sound`` (n,) into ``audio`` (samples,) from sample ``start`` on, in place, cut where it ends."""
    begin, end = max(start, 0), min(start + len(sound), len(audio))
    if end > begin:
        audio[begin:end] += sound[begin - start : end - start]


def limit(audio: Tensor, peak: float = 0.9) -> Tensor:
    """Soft-clip to ``peak`` so that no sample reaches full scale."""
    return peak * torch.tanh(audio / peak)


def decay(seconds: float, length: float, sampling_rate: int) -> Tensor:
    """exp(-t / seconds) over ``length`` seconds, (n,)."""
    t = torch.arange(int(length * sampling_rate)) / sampling_rate
    return torch.exp(-t / seconds)


def minnaert_hertz(radius: float) -> float:
    """Pitch of a bubble of ``radius`` metres: f = 3.26 m/s / radius (Minnaert 1933)."""
    return 3.26 / radius


def tone(hertz: Tensor, sampling_rate: int) -> Tensor:
    """A sine of the instantaneous frequency ``hertz`` (n,)."""
    return torch.sin(2 * math.pi * torch.cumsum(hertz, 0) / sampling_rate)
