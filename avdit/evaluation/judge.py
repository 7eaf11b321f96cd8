"""Judges: small networks that tell the class of a clip from its picture alone, and from its sound alone.

They learn from renders of seeds that nothing else is trained or tested on (``python -m avdit train judges``), and they
judge what the model makes. What they see on the way are the features of FVD and KVD (:class:`FrameStatistics`) and of
FAD (:meth:`SoundJudge.features`), so that every figure can be had without fetching a network.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from avdit.evaluation.beats import Beats, PictureBeat, SoundBeat
from avdit.evaluation.frechet import resized
from avdit.geometry import ClipGeometry
from avdit.models.features import ImageFeatures
from avdit.models.mel import LogMel

SIZE = 128  # pixels a side at which the picture is looked at
LEVELS = (2, 4, 10)  # blocks of EfficientNet-Lite0, strides 4, 8 and 16
STATISTICS = 3 * (24 + 40 + 112)  # three statistics of these blocks' channels
MOVING = 3 * (40 + 112)  # three more of the last two blocks, of what moves


class FrameStatistics(nn.Module):
    """What EfficientNet-Lite0 (ImageNet) sees in a clip's frames and how that changes in time.

    Of every channel of three feature maps, averaged over the picture: its mean over the frames, its deviation over
    the frames, and its mean change from frame to frame. The last two tell flicker and motion from a still scene.

    Args:
        moving: Tell three more after these, of what moves before a still background: how much the features of 16
            parts of the picture differ from what they mostly are, on the average and at most, and their deviation.
            Dancers in one room differ by these. The distances of sets of clips never stand on them.
    """

    name = f"efficientnet-lite0 blocks {', '.join(map(str, LEVELS))}: mean, deviation and change over the frames"
    size = SIZE

    def __init__(self, moving: bool = False) -> None:
        super().__init__()
        self.network, self.moving = ImageFeatures(LEVELS), moving

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """Frames (B, F, H, W, 3) in [0, 1] to statistics (B, STATISTICS [+ MOVING]); F must be 2 or more."""
        pictures = resized(frames, SIZE).flatten(0, 1).movedim(-1, 1) * 2 - 1  # (B F, 3, H, W)
        maps = self.network(pictures.contiguous(memory_format=torch.channels_last))
        seen = torch.cat([m.mean((2, 3)) for m in maps], 1).unflatten(0, frames.shape[:2])  # (B, F, channels)
        told = [seen.mean(1), seen.std(1), seen.diff(dim=1).abs().mean(1)]
        for m in maps[1:] if self.moving else ():
            parts = F.adaptive_avg_pool2d(m, 4).unflatten(0, frames.shape[:2])  # (B, F, C, 4, 4)
            away = (parts - parts.median(1, keepdim=True).values).abs()
            told += [away.mean((1, 3, 4)), parts.std(1).mean((2, 3)), away.amax((1, 3, 4))]
        return torch.cat(told, 1)


class PictureJudge(ModelMixin, ConfigMixin):
    """The class of a clip from the statistics of its frames.

    Args:
        classes: Their names, in the order of the outputs.
        width: Of the one hidden layer.
        accuracy: What the training measured on held-out renders; told, not used.
    """

    @register_to_config
    def __init__(self, classes: list[str], inputs: int = STATISTICS, width: int = 96, accuracy: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.layers = nn.Sequential(
            nn.Linear(inputs, width), nn.SiLU(), nn.Dropout(0.2), nn.Linear(width, len(classes))
        )

    def set_statistics(self, statistics: Tensor) -> None:
        """Take mean and scale of the inputs from those of the training clips (n, inputs)."""
        self.mean.copy_(statistics.mean(0))
        self.scale.copy_(statistics.std(0) + 1e-3)

    def forward(self, statistics: Tensor) -> Tensor:
        """Statistics (B, inputs) to logits (B, classes)."""
        return self.layers((statistics - self.mean) / self.scale)


class SoundJudge(ModelMixin, ConfigMixin):
    """The class of a clip from its log-mel spectrogram, by strided convolutions pooled over time.

    Args:
        classes: Their names, in the order of the outputs.
        channels: Of the convolutions, each of which halves time and frequency.
        width: Of the features.
        accuracy: What the training measured on held-out renders; told, not used.
    """

    name = "sound judge: the layer before its classes"

    @register_to_config
    def __init__(
        self,
        classes: list[str],
        channels: tuple[int, ...] = (16, 32, 64, 96),
        width: int = 128,
        sampling_rate: int = 16000,
        hop_length: int = 160,
        mel_bins: int = 64,
        accuracy: float = 0.0,
    ) -> None:
        super().__init__()
        self.log_mel = LogMel(sampling_rate, hop_length, mel_bins)
        layers, before = [], 1
        for after in channels:
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
            before = after
        self.body = nn.Sequential(*layers)
        self.project = nn.Linear(2 * before * (mel_bins >> len(channels)), width)
        self.head = nn.Linear(width, len(classes))

    def mel(self, audio: Tensor) -> Tensor:
        """Audio (B, samples) to the log-mel (B, T, mel_bins) that the other methods take."""
        return self.log_mel(audio.float())

    def features(self, mel: Tensor) -> Tensor:
        """Log-mel (B, T, mel_bins) to features (B, width)."""
        maps = self.body((mel.unsqueeze(1) + 5) / 2.5)  # (B, C, T / 16, bins / 16), of about unit scale
        pooled = torch.cat([maps.mean(2), maps.std(2)], 1)  # a sound's class does not hang on when it sounds
        return self.project(pooled.flatten(1))

    def forward(self, mel: Tensor) -> Tensor:
        """Log-mel (B, T, mel_bins) to logits (B, classes)."""
        return self.head(F.silu(self.features(mel)))


PARTS = {"picture_judge": PictureJudge, "sound_judge": SoundJudge}
BEATS = {"picture_beat": PictureBeat, "sound_beat": SoundBeat}


def load_part(folder: Path, name: str) -> ModelMixin:
    """One network of a folder of judges.

    Raises:
        ValueError: where it is missing or cannot be read.
    """
    if not (folder / name / "config.json").is_file():
        raise ValueError(f"{folder} has no {name}: make it with python -m avdit train judges --out {folder}")
    try:
        network = (PARTS | BEATS)[name].from_pretrained(folder / name, local_files_only=True)
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / name} cannot be loaded: {str(error).splitlines()[0]}") from error
    return network.float().eval()


def judges_of(folder: Path, classes: list[str]) -> Path | None:
    """Of the folders of judges in ``folder``, the one whose judges know all ``classes``; None where there is none."""
    for path in sorted(folder.glob("*/picture_judge/config.json")):
        if set(classes) <= set(json.loads(path.read_text())["classes"]):
            return path.parent.parent
    return None


def load_beats(folder: Path, clip: ClipGeometry) -> Beats | None:
    """What tells the beat, where ``folder`` has judges of dance; else None.

    Raises:
        ValueError: where one of its networks cannot be read.
    """
    if not any((folder / name).is_dir() for name in BEATS):
        return None
    return Beats(*(load_part(folder, name) for name in BEATS), clip)


@dataclass
class Judges:
    """Both judges and the network that the picture's stands on."""

    statistics: FrameStatistics
    picture: PictureJudge
    sound: SoundJudge

    @property
    def classes(self) -> list[str]:
        return list(self.picture.config.classes)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "Judges":
        """The judges of a folder.

        Raises:
            ValueError: where one is missing or cannot be read.
        """
        picture, sound = (load_part(folder, name).to(device) for name in PARTS)
        return cls(FrameStatistics(moving=picture.config.inputs > STATISTICS).to(device), picture, sound)

    def check(self, classes: list[str]) -> None:
        """Raise ``ValueError`` where the judges do not know one of ``classes``."""
        for name in classes:
            if name not in self.classes:
                raise ValueError(f"the judges do not know the class {name!r}: they know {', '.join(self.classes)}")

    @torch.no_grad()
    def named(self, judge: Callable[[Tensor], Tensor], x: Tensor, classes: list[str]) -> list[str]:
        """For each of ``x`` (B, ...) the likeliest of ``classes``, all of which the judges know."""
        columns = [self.classes.index(name) for name in classes]
        return [classes[i] for i in judge(x)[:, columns].argmax(1).tolist()]
