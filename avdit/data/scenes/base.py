"""What the scene families share: the clip and event types, seeds, noise and sound building blocks."""

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
    """One rendered clip: ``frames`` (F, H, W, 3) float in [0, 1], ``audio`` (samples,) in [-1, 1]."""

    frames: Tensor
    audio: Tensor
    events: list[Event] = field(default_factory=list)


class Dice:
    """Random draws of one clip, from its seed alone and on the CPU, so that a seed is a clip everywhere."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = torch.device(device)

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


def sample_times(geometry: ClipGeometry, device: torch.device | str = "cpu") -> Tensor:
    """(samples,) seconds."""
    return torch.arange(geometry.samples, device=device) / geometry.sampling_rate


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
        layer = F.interpolate(dice.rand(1, 1, n + 1, n + 1), (height, width), mode="bicubic", align_corners=True)
        total += weight * layer[0, 0]
        norm += weight
        weight *= gain
    return (total / norm).clamp(0, 1)


def colour(rgb: tuple[float, float, float], device: torch.device | str = "cpu") -> Tensor:
    """(3,) tensor of a colour in [0, 1]."""
    return torch.tensor(rgb, dtype=torch.float32, device=device)


def mix(a: Tensor, b: Tensor, amount: Tensor) -> Tensor:
    """Blend the pictures or colours ``a`` and ``b`` (..., 3) by ``amount`` (...) in [0, 1]."""
    amount = amount.unsqueeze(-1)
    return a * (1 - amount) + b * amount


def stamp(
    canvas: Tensor, frame: Tensor, cx: Tensor, cy: Tensor, reach: int, shape: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Draw n small shapes into ``canvas`` (F, H, W) in place, all at once; where they meet the brightest wins.

    Args:
        frame: Frame of each shape, (n,).
        cx, cy: Its middle in pixels, (n,).
        reach: Pixels from the middle to the edge of what is drawn.
        shape: Brightness (n, p, p) at the distances (n, 1, p) and (n, p, 1) in pixels from the middle.
    """
    _, height, width = canvas.shape
    offsets = torch.arange(-reach, reach + 1, device=canvas.device)
    columns = cx.floor().long().view(-1, 1, 1) + offsets
    rows = cy.floor().long().view(-1, 1, 1) + offsets.unsqueeze(1)
    values = shape(columns + 0.5 - cx.view(-1, 1, 1), rows + 0.5 - cy.view(-1, 1, 1))
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    cell = (frame.view(-1, 1, 1) * height + rows) * width + columns
    canvas.view(-1).scatter_reduce_(0, cell[inside], values[inside], "amax")


def discs(canvas: Tensor, frame: Tensor, cx: Tensor, cy: Tensor, radius: Tensor) -> None:
    """Draw soft white discs into ``canvas`` (F, H, W); places and radii (n,) as shares of the picture's width."""
    if len(frame):
        r = (radius * canvas.shape[2]).view(-1, 1, 1)
        size = (cx * canvas.shape[2], cy * canvas.shape[1])
        reach = math.ceil(r.max().item()) + 1
        stamp(canvas, frame, *size, reach, lambda dx, dy: (r - (dx.square() + dy.square()).sqrt() + 0.5).clamp(0, 1))


def filtered_noise(dice: Dice, geometry: ClipGeometry, response: Callable[[Tensor], Tensor]) -> Tensor:
    """White noise (samples,) of unit RMS after ``response``, a gain for each frequency in Hz."""
    spectrum = torch.fft.rfft(dice.randn(geometry.samples))
    hertz = torch.fft.rfftfreq(geometry.samples, 1 / geometry.sampling_rate, device=dice.device)
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


def decay(seconds: float, length: float, sampling_rate: int, device: torch.device | str = "cpu") -> Tensor:
    """exp(-t / seconds) over ``length`` seconds, (n,)."""
    t = torch.arange(int(length * sampling_rate), device=device) / sampling_rate
    return torch.exp(-t / seconds)


def minnaert_hertz(radius: float) -> float:
    """Pitch of a bubble of ``radius`` metres: f = 3.26 m/s / radius (Minnaert 1933)."""
    return 3.26 / radius


def tone(hertz: Tensor, sampling_rate: int) -> Tensor:
    """A sine of the instantaneous frequency ``hertz`` (n,)."""
    return torch.sin(2 * math.pi * torch.cumsum(hertz, 0) / sampling_rate)
