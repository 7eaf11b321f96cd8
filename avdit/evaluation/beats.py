"""Where the beat lies in a clip's picture, and where in its sound: synchrony of dance.

Onsets do not tell it: music strikes between the beats too, and a body moves all the time, so at 10 frames a second a
random sound has an onset near every movement. What can be compared is the *phase*, how far a moment lies between the
beat before and the beat after it. Two small networks, trained on renders (``python -m avdit train judges``), tell it
for every frame, one from pixels alone and one from samples alone; neither knows the other's modality.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from avdit.geometry import ClipGeometry
from avdit.models.mel import LogMel

SIZE = 32  # pixels a side at which the picture is looked at
SHORTEST, LONGEST = 0.4, 0.85  # seconds of a beat: 150 to 70 a minute


def over_time(width: int) -> list[nn.Module]:
    """Dilated convolutions over (B, width, steps) that see about 30 steps."""
    layers: list[nn.Module] = []
    for dilation in (1, 2, 4, 8):
        layers += [nn.Conv1d(width, width, 3, 1, dilation, dilation), nn.GroupNorm(4, width), nn.SiLU()]
    return layers


class SoundBeat(ModelMixin, ConfigMixin):
    """The phase of the beat at every frame, from the log-mel spectrogram.

    Args:
        frames: Of the clip over whose whole length the spectrogram reaches.
        accuracy: Share of held-out renders whose beat it finds within 50 ms; told, not used.
    """

    @register_to_config
    def __init__(self, frames: int = 16, width: int = 48, mel_bins: int = 64, accuracy: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before in (mel_bins, width):
            layers += [nn.Conv1d(before, width, 5, 2, 2), nn.GroupNorm(4, width), nn.SiLU()]
        self.body = nn.Sequential(*layers, *over_time(width), nn.Conv1d(width, 2, 1))

    def forward(self, mel: Tensor) -> Tensor:
        """Log-mel (B, T, mel_bins) to phases (B, F, 2): cosine and sine, shorter where they are uncertain."""
        phase = self.body((mel.transpose(1, 2) + 5) / 2.5)  # (B, 2, T / 4)
        return F.interpolate(phase, self.config.frames, mode="linear").transpose(1, 2)


class PictureBeat(ModelMixin, ConfigMixin):
    """The phase of the beat at every frame, from how small frames differ from the still part of the picture.

    Args:
        accuracy: Share of held-out renders whose beat it finds within 50 ms; told, not used.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = (16, 32, 48), width: int = 64, accuracy: float = 0.0) -> None:
        super().__init__()
        layers, before = [], 6
        for after in channels:
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(4, after), nn.SiLU()]
            before = after
        self.body = nn.Sequential(*layers)
        cells = (SIZE >> len(channels)) ** 2
        self.project = nn.Linear(before * cells, width)
        self.head = nn.Sequential(*over_time(width), nn.Conv1d(width, 2, 1))

    def forward(self, small: Tensor) -> Tensor:
        """Frames (B, F, 3, SIZE, SIZE) in [0, 1] to phases (B, F, 2): cosine and sine, shorter where uncertain."""
        moving = small - small.median(1, keepdim=True).values
        change = F.pad(small.diff(dim=1), (0, 0) * 3 + (1, 0))  # since the frame before
        maps = self.body(5 * torch.cat([moving, change], 2).flatten(0, 1))  # (B F, C, h, w)
        rows = self.project(maps.flatten(1)).unflatten(0, small.shape[:2])
        return self.head(rows.transpose(1, 2)).transpose(1, 2)


def small_frames(frames: Tensor) -> Tensor:
    """Frames (B, F, H, W, 3) to what :class:`PictureBeat` takes (B, F, 3, SIZE, SIZE)."""
    flat = frames.flatten(0, 1).movedim(-1, 1)
    return F.adaptive_avg_pool2d(flat, SIZE).unflatten(0, frames.shape[:2])


def true_phase(start: Tensor, beat: Tensor, times: Tensor) -> Tensor:
    """Phases (n, F, 2) at ``times`` (F,) of beats that come every ``beat`` (n,) seconds from ``start`` (n,) on."""
    angle = 2 * math.pi * (times - start.unsqueeze(1)) / beat.unsqueeze(1)
    return torch.stack([angle.cos(), angle.sin()], -1)


def apart(seen: Tensor, heard: Tensor, fps: int) -> Tensor:
    """Seconds (n,) by which the beats of ``heard`` come after those of ``seen``, both phases (n, F, 2).

    It lies within half a beat; the length of a beat is told from how ``heard`` advances.
    """
    seen, heard = (torch.view_as_complex(x.float().contiguous()) for x in (seen, heard))
    advance = (heard[:, 1:] * heard[:, :-1].conj()).sum(1).angle()  # of a frame
    beat = (2 * math.pi / fps / advance.clamp(min=1e-3)).clamp(SHORTEST, LONGEST)
    return (seen * heard.conj()).sum(1).angle() / (2 * math.pi) * beat


class Beats:
    """The timing of music and dance: phases of the beat (see :class:`avdit.evaluation.sync.Timing`).

    Of what is given they are told, too: the beat goes on.
    """

    name = "phase of the beat"

    def __init__(self, picture: PictureBeat, sound: SoundBeat, clip: ClipGeometry) -> None:
        self.picture, self.sound, self.clip = picture.eval(), sound.eval(), clip
        self.log_mel = LogMel(clip.sampling_rate, clip.hop_length, clip.mel_bins)

    @torch.no_grad()
    def seen(self, frames: np.ndarray, given: int = 0) -> np.ndarray:
        return self.picture(small_frames(torch.from_numpy(frames)[None]))[0].numpy()

    @torch.no_grad()
    def heard(self, audio: np.ndarray, given: int = 0) -> np.ndarray:
        return self.sound(self.log_mel(torch.from_numpy(audio)[None]))[0].numpy()

    def apart(self, seen: list[np.ndarray], heard: list[np.ndarray]) -> np.ndarray:
        return apart(*(torch.from_numpy(np.stack(rows)) for rows in (seen, heard)), self.clip.fps).numpy()
