"""AudioCLIP's network of sounds (Guzhov et al. 2021, arXiv 2106.13043), with which the field's FAD is made.

The parameters are named as under ``audio.`` in ``AudioCLIP-Full-Training.pt`` (release v0.1 of AndreyGuzhov/AudioCLIP):
a ResNeXt-50 with attention beside each stage, on a spectrogram whose filters are learned (ESResNeXt-fbsp, 2104.11587).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import get_window
from torch import Tensor, nn

RATE = 44100  # Hz
WINDOW, HOP, FFT = 1654, 561, 2048  # samples
BANDS = 3  # the spectrogram's thirds, low to high, are the picture's channels
GROUPS = 32
FULL_SCALE = 32768  # the network was trained on 16-bit numbers
FLOOR = 1e-18  # of the power, where it is zero
SCALE = 100.0  # a Fréchet distance is a square: this makes it the 10,000-fold that the field prints


class Filters(nn.Module):
    """Frames (B, T, FFT) to their complex product with FFT / 2 + 1 frequency B-spline wavelets."""

    def __init__(self) -> None:
        super().__init__()
        count = FFT // 2 + 1
        self.m = nn.Parameter(torch.zeros(count))  # order
        self.fb = nn.Parameter(torch.ones(count))  # bandwidth
        self.fc = nn.Parameter(torch.arange(count).float())  # centre

    def forward(self, frames: Tensor) -> Tensor:
        m, fb, fc = (value.unsqueeze(1) for value in (self.m, self.fb, self.fc))
        t = math.pi * torch.linspace(-1, 1, FFT, device=frames.device) + 1e-8
        spline = torch.sinc(fb * t / (m + 1e-8) / math.pi).to(torch.complex64) ** m
        wavelets = fb.sqrt() * spline * torch.polar(torch.ones_like(t), -fc * t) / math.sqrt(FFT)  # (K, FFT)
        return frames.to(torch.complex64) @ wavelets.T  # (B, T, K)


class Bottleneck(nn.Module):
    """A block of ResNeXt-50, 32 groups of 4 times ``width`` / 64 channels."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        inner, after = width * 2, width * 4
        self.conv1, self.bn1 = nn.Conv2d(before, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=GROUPS, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, after, 1, bias=False), nn.BatchNorm2d(after)
        self.downsample = None
        if before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Attention(nn.Module):
    """Weights in [0, 1] of the ``size`` that a stage's output has, from that stage's input."""

    def __init__(self, before: int, after: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.conv_depth = nn.Conv2d(before, before, kernel, padding=padding, groups=before)
        self.conv_point = nn.Conv2d(before, after, 1)
        self.bn = nn.BatchNorm2d(after)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.bn(self.conv_point(self.conv_depth(F.adaptive_max_pool2d(x, size)))).sigmoid()


class AudioCLIP(nn.Module):
    """Sounds (B, samples) at ``rate`` Hz in [-1, 1] to 100 times AudioCLIP's embeddings (B, 1024).

    As MM-Diffusion's evaluation has it, from which the field's figures come: the sounds are given as they are to a
    network that takes 16-bit numbers, the embeddings are not normalised, and FAD is told x 10,000.
    """

    def __init__(self, rate: int = 16000) -> None:
        super().__init__()
        self.rate = rate
        self.fbsp = Filters()
        self.conv1, self.bn1 = nn.Conv2d(BANDS, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64)
        channels = 64
        for i, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
            stage = [Bottleneck(channels, width, 1 if i == 1 else 2)]
            stage += [Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{i}", nn.Sequential(*stage))
            setattr(self, f"att{i}", Attention(channels, 4 * width, (3, 1) if i % 2 else (1, 5)))
            channels = 4 * width
        self.att5 = Attention(channels, channels, (3, 5))
        self.fc = nn.Linear(channels, 1024)
        window = torch.from_numpy(get_window("blackmanharris", WINDOW).astype(np.float32))
        self.register_buffer("window", window, persistent=False)

    def spectrogram(self, audio: Tensor) -> Tensor:
        """Sounds (B, samples) at 44.1 kHz to decibels (B, 3, 341, T)."""
        audio = (audio + FULL_SCALE) * 2 / (2 * FULL_SCALE - 1) - 1
        missing = -(audio.shape[1] - WINDOW) % HOP if audio.shape[1] > WINDOW else WINDOW - audio.shape[1]
        audio = F.pad(audio, (missing // 2, missing - missing // 2))
        around = FFT - WINDOW
        frames = F.pad(audio.unfold(1, WINDOW, HOP) * self.window, (around // 2, around - around // 2))
        rows = (FFT // 2 + 1) // BANDS
        spectrum = self.fbsp(frames).transpose(1, 2)[:, : BANDS * rows]  # (B, 3 x 341, T)
        power = spectrum.real.square() + spectrum.imag.square()
        power = power.where(power > 0, torch.full_like(power, FLOOR))
        return 10 * torch.log10(power.unflatten(1, (BANDS, rows)))

    def forward(self, audio: Tensor) -> Tensor:
        x = self.spectrogram(resampled(audio, self.rate, RATE))
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, padding=1)
        for i in (1, 2, 3, 4):
            made = getattr(self, f"layer{i}")(x)
            x = made * getattr(self, f"att{i}")(x, made.shape[-2:])
        pooled = F.adaptive_avg_pool2d(x, 1)
        return SCALE * self.fc((pooled * self.att5(x, pooled.shape[-2:])).flatten(1))


def resampled(audio: Tensor, rate: int, new: int) -> Tensor:
    """Sounds (B, samples) at another rate, by their spectrum."""
    if rate == new:
        return audio
    samples = round(audio.shape[1] * new / rate)
    return torch.fft.irfft(torch.fft.rfft(audio), samples) * (samples / audio.shape[1])
