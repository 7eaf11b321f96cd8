"""What the sound of a clip may be, told from its picture alone, as a foley artist does it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avdit.geometry import ClipGeometry

CHANNELS = 32, 48, 64  # of the convolutions over a frame, each of which halves its sides
DILATIONS = 1, 2, 4, 8  # of the convolutions over time, which so see about thirty frames


class Foley(nn.Module):
    """How the sound of a clip differs from its class's mean, by what moves in the picture, however noisy that is.

    In the tokens of the frozen image transformer movement is hard to find: the joint attention and the exchange learn
    when an event is seen, but not the beat that a dancer keeps. Here frames are compared from the start, and what is
    found is put beside the noisy sound that it is about. (MMAudio, Cheng et al. 2024, arXiv 2412.15322, for the same
    reason gives its sound the features of a network for synchrony.)

    Args:
        width: Features of a frame.
        told: Width of the embedding of timestep and class.
    """

    def __init__(self, geometry: ClipGeometry, width: int, told: int) -> None:
        super().__init__()
        channels, *sides = geometry.video_latent_shape
        self.shape = geometry.audio_latent_shape
        layers: list[nn.Module] = []
        before = 2 * channels
        for after in CHANNELS:
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(4, after), nn.SiLU()]
            before = after
        cells = math.prod(-(-side // 2 ** len(CHANNELS)) for side in sides)
        self.body = nn.Sequential(*layers)
        self.project = nn.Linear(before * cells, width)
        layers = []
        for dilation in DILATIONS:
            layers += [nn.Conv1d(width, width, 3, 1, dilation, dilation), nn.GroupNorm(4, width), nn.SiLU()]
        self.over_time = nn.Sequential(*layers)
        self.modulation = nn.Linear(told, 3 * width)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, self.shape[0] * self.shape[2])

    def forward(self, video: Tensor, c: Tensor) -> Tensor:
        """Latents of the picture (B, F, C, h, w) to those of the sound (B, C, T, f).

        ``c`` (B, F, D) embeds timesteps and classes.
        """
        noise, shift, scale = self.modulation(c).chunk(3, dim=-1)  # (B, F, width)
        moving = video - video.mean(1, keepdim=True)
        change = F.pad(video.diff(dim=1), (0, 0) * 3 + (1, 0))  # since the frame before
        maps = self.body(torch.cat([moving, change], 2).flatten(0, 1))
        x = self.project(maps.flatten(1)).unflatten(0, video.shape[:2]) + noise
        x = self.over_time(x.transpose(1, 2)).transpose(1, 2)
        x = F.gelu(self.hidden(x) * (1 + scale) + shift, approximate="tanh")
        x = F.interpolate(x.transpose(1, 2), self.shape[1], mode="linear").transpose(1, 2)  # (B, T, width)
        return self.out(x).unflatten(-1, (self.shape[0], self.shape[2])).transpose(1, 2)
