"""From log-mel spectrograms to sound: Griffin-Lim alone, or led by a network that knows the fine spectrum."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from avdit.models.mel import FLOOR, LogMel

EDGE = 4  # frames more at each end, so that every sample lies under several windows
LEAST, LOUDEST = 1e-4, 8.0  # magnitude below which is silence; log-magnitude that nothing reaches
# Of the magnitude of white noise, whose square is distributed exponentially: the median of its logarithm, and the mean
# distance from that median.
NOISE_MEDIAN, NOISE_SPREAD = 0.5 * math.log(math.log(2)), 0.4839


def extended(x: Tensor) -> Tensor:
    """``x`` (..., T) with ``EDGE`` frames more at each end."""
    return F.pad(x, (EDGE, EDGE), mode="replicate")


def griffin_lim(
    mel: LogMel, start: Tensor, magnitude: Callable[[Tensor], Tensor], iterations: int, momentum: float
) -> Tensor:
    """Sound by fast Griffin-Lim iterations (Perraudin et al. 2013).

    Args:
        start: Complex spectrum (B, n_fft / 2 + 1, T + 2 · EDGE), framed as :class:`LogMel` does it.
        magnitude: Maps the magnitude of the spectrum that a sound really has to the wanted one.

    Returns:
        Audio (B, T x hop).
    """
    length = (start.shape[-1] - 1) * mel.hop_length
    transform = {"n_fft": mel.n_fft, "hop_length": mel.hop_length, "window": mel.window}
    spectrum, previous = start, torch.zeros_like(start)
    for _ in range(iterations):
        rebuilt = torch.stft(torch.istft(spectrum, **transform, length=length), **transform, return_complex=True)
        ahead = rebuilt + momentum * (rebuilt - previous)
        spectrum = magnitude(rebuilt.abs()) * ahead / ahead.abs().clamp(min=1e-12)
        previous = rebuilt
    first = EDGE * mel.hop_length - mel.hop_length // 2  # a mel frame is centred half a hop into its samples
    samples = (start.shape[-1] - 2 * EDGE) * mel.hop_length
    return torch.istft(spectrum, **transform, length=length)[:, first : first + samples]


class GriffinLim(nn.Module):
    """Vocoder without weights: least-squares magnitudes, phases by Griffin-Lim.

    The starting phases are drawn from a fixed seed, so that a spectrogram always sounds the same.
    """

    def __init__(self, log_mel: LogMel, iterations: int = 32, momentum: float = 0.99) -> None:
        super().__init__()
        self.log_mel, self.iterations, self.momentum = log_mel, iterations, momentum

    def forward(self, log_mel: Tensor) -> Tensor:
        """Log-mel (B, T, mel_bins) to audio (B, T x hop)."""
        magnitude = extended(self.log_mel.magnitude(log_mel.float()))
        draw = torch.rand(magnitude.shape[1:], generator=torch.Generator().manual_seed(0)).to(magnitude.device)
        start = torch.polar(magnitude, (2 * torch.pi * draw).expand(magnitude.shape))
        return griffin_lim(self.log_mel, start, lambda _: magnitude, self.iterations, self.momentum)


class ConvNeXt(nn.Module):
    """ConvNeXt block along time (Liu et al. 2022, arXiv 2201.03545)."""

    def __init__(self, width: int, kernel: int, scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 3 * width)
        self.reduce = nn.Linear(3 * width, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x.transpose(1, 2)).transpose(1, 2)  # (B, T, width)
        return x + self.scale * self.reduce(F.gelu(self.expand(self.norm(y))))


class FineSpectrum(nn.Module):
    """What a log-mel spectrogram says of every cell of the magnitude spectrum: ConvNeXt blocks at the mel's rate.

    Args:
        width: Channels.
        depth: ConvNeXt blocks.
        kernel: Their frames.
    """

    def __init__(self, log_mel: LogMel, width: int, depth: int, kernel: int) -> None:
        super().__init__()
        self.log_mel = log_mel
        mel_bins, bins = log_mel.filters.shape
        self.stem = nn.Conv1d(mel_bins, width, kernel, padding=kernel // 2)
        self.blocks = nn.ModuleList(ConvNeXt(width, kernel, 1 / depth) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2 * bins)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def level(self, log_mel: Tensor) -> Tensor:
        """Log-magnitude (B, T, n_fft / 2 + 1) interpolated between the mel bins, where the network starts from."""
        filters = self.log_mel.filters
        share = filters / filters.sum(0).clamp(min=1e-12)  # every frequency's mel bins
        with torch.autocast(log_mel.device.type, enabled=False):
            return (log_mel - filters.sum(1).log()) @ share

    def forward(self, log_mel: Tensor) -> tuple[Tensor, Tensor]:
        """Median log-magnitude and mean distance from it, each (B, n_fft / 2 + 1, T), of log-mel (B, T, mel_bins)."""
        log_mel = log_mel.float()
        x = ((log_mel + 5) / 2.5).to(self.head.weight.dtype)
        x = self.stem(x.transpose(1, 2)).transpose(1, 2)  # (B, T, width)
        for block in self.blocks:
            x = block(x)
        median, spread = self.head(self.norm(x)).float().chunk(2, -1)
        median = (self.level(log_mel) + median).clamp(math.log(LEAST), LOUDEST)
        return median.transpose(1, 2), F.softplus(spread - 0.5).transpose(1, 2) + 0.01


class SpectralVocoder(nn.Module):
    """A network tells the fine spectrum, a fixed noise lends it life, and Griffin-Lim finds the phases.

    As in Vocos (Siuzdak 2023, arXiv 2306.00814), ConvNeXt blocks work at the rate of the mel frames and an inverse
    transform makes the samples. In place of a phase, which takes long to learn, the network tells of every cell of the
    spectrum its median log-magnitude and how far it may lie off. The sound starts as a fixed white noise in that shape,
    so that the same mel always sounds the same. Every iteration of Griffin-Lim then draws a cell to its median, the
    more the surer the network is, and scales all cells so that their mel spectrum is the given one (bi-level
    consistency: Masuyama et al. 2023, arXiv 2307.12232). So tones become clear, and what is noise stays that noise,
    filtered.

    Args:
        width, depth, kernel: Of :class:`FineSpectrum`.
        iterations, momentum: Of Griffin-Lim.
        correction: Power of the scales that bring the mel spectrum in line; above 1, it is there sooner.
    """

    def __init__(
        self,
        log_mel: LogMel,
        width: int = 224,
        depth: int = 5,
        kernel: int = 7,
        iterations: int = 16,
        momentum: float = 0.9,
        correction: float = 1.5,
    ) -> None:
        super().__init__()
        self.log_mel, self.iterations, self.momentum, self.correction = log_mel, iterations, momentum, correction
        self.network = FineSpectrum(log_mel, width, depth, kernel)

    def noise(self, frames: int) -> Tensor:
        """Spectrum (n_fft / 2 + 1, frames) of the fixed noise; its cells have a mean square of 1."""
        mel = self.log_mel
        draw = torch.randn(frames * mel.hop_length, generator=torch.Generator().manual_seed(0))
        return mel.spectrum(draw.to(mel.window.device)[None])[0] / mel.window.square().sum().sqrt()

    @staticmethod
    def alive(median: Tensor, spread: Tensor, noise: Tensor) -> Tensor:
        """Magnitude (B, n_fft / 2 + 1, T) that fluctuates as ``noise`` (n_fft / 2 + 1, T) within the spread."""
        fluctuation = noise.abs().clamp(min=1e-3).log() - NOISE_MEDIAN
        return (median + (spread / NOISE_SPREAD).clamp(max=1) * fluctuation).exp()

    def forward(self, log_mel: Tensor) -> Tensor:
        """Log-mel (B, T, mel_bins) to audio (B, T x hop)."""
        with torch.autocast(log_mel.device.type, enabled=False):
            median, spread = map(extended, self.network(log_mel))
            wanted = extended(log_mel.float().exp().transpose(1, 2)) + FLOOR
            filters = self.log_mel.filters
            share = (filters / filters.sum(0).clamp(min=1e-12)).T  # of every frequency, by mel bin
            sure = (1 - spread / NOISE_SPREAD).clamp(min=0)

            def in_line(magnitude: Tensor) -> Tensor:
                scale = (wanted / (filters @ magnitude + FLOOR)).clamp(0.05, 20)
                return magnitude * (share @ scale**self.correction)

            def believed(magnitude: Tensor) -> Tensor:
                magnitude = magnitude.clamp(min=LEAST)
                return in_line(magnitude * (sure * (median - magnitude.log())).exp())

            noise = self.noise(median.shape[-1])
            start = in_line(self.alive(median, spread, noise)) * noise / noise.abs().clamp(min=1e-12)
            return griffin_lim(self.log_mel, start, believed, self.iterations, self.momentum)


def build_vocoder(config: dict[str, Any] | None, log_mel: LogMel) -> nn.Module:
    """The vocoder that ``config`` describes.

    Args:
        config: ``{"kind": "spectral", ...}`` with arguments of :class:`SpectralVocoder`; without ``kind`` that of a
            published ``SpeechT5HifiGan``; None for :class:`GriffinLim`.

    Raises:
        ValueError: for a kind that does not exist.
    """
    if config is None:
        return GriffinLim(log_mel)
    if "kind" not in config:
        return SpeechT5HifiGan(SpeechT5HifiGanConfig(**config))
    settings = dict(config)
    if (kind := settings.pop("kind")) != "spectral":
        raise ValueError(f"unknown vocoder {kind!r}: expected 'spectral', or the configuration of a SpeechT5HifiGan")
    return SpectralVocoder(log_mel, **settings)
