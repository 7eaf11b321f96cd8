"""Whether sound and picture of an event fall together, measured from samples and pixels alone."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from avdit.geometry import ClipGeometry

EVENT_CLASSES = ("explosion", "splashing water", "thunder")  # whose clips hold events that are seen and heard
TOLERANCE = 0.1  # seconds: one frame
SHUFFLES = 16  # ways in which sounds are exchanged for the ceiling


def sound_onset(audio: np.ndarray, sampling_rate: int, share: float = 0.4) -> float:
    """Seconds of the first rise of ``audio`` (samples,) that reaches ``share`` of its largest rise.

    The level of 30 ms after a moment is compared with that of 30 ms before it.
    """
    window = sampling_rate // 100
    blocks = torch.from_numpy(np.ascontiguousarray(audio, np.float32))[: len(audio) // window * window]
    level = blocks.view(-1, window).square().mean(1).sqrt()
    padded = F.pad(level[None], (3, 3), mode="replicate")[0].unfold(0, 3, 1).mean(-1)
    rise = padded[3 : 3 + len(level)] - padded[: len(level)]
    first = int((rise >= share * rise.max()).nonzero()[0])
    return (first + int(rise[first : first + 8].argmax())) * window / sampling_rate


def picture_onset(frames: np.ndarray, fps: int, block: int = 16, share: float = 0.5) -> float:
    """Seconds of the first of ``frames`` (F, H, W, 3) in which a block changes by ``share`` of the largest change.

    Blocks of ``block`` pixels, because ripples that spread from a splash change more pixels in all than the splash.
    """
    light = F.avg_pool2d(torch.from_numpy(np.ascontiguousarray(frames, np.float32)).mean(-1).unsqueeze(1), block)
    change = light.flatten(1).diff(dim=0).abs().amax(1)
    return (int((change >= share * change.max()).nonzero()[0]) + 1) / fps


def loudness(audio: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Level of ``audio`` (samples,) in dB over each tenth of a second, (n,); what is below -60 dB counts as that."""
    window = sampling_rate // 10
    blocks = np.asarray(audio, np.float64)[: len(audio) // window * window].reshape(-1, window)
    return 10 * np.log10(np.maximum((blocks**2).mean(1), 1e-6))


def rises_alike(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of two courses of loudness (n,) over time, from -1 to 1; 0 where one of them does not change."""
    first, second = first - first.mean(), second - second.mean()
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale > 1e-6 else 0.0


class Timing(Protocol):
    """Tells when things happen in a picture alone and in a sound alone, and how far two such answers lie apart.

    The first ``given`` frames and their sound may be those of the clip before, from which this one was made.
    """

    name: str

    def seen(self, frames: np.ndarray, given: int = 0) -> np.ndarray:
        """Of a picture, frames (F, H, W, 3) in [0, 1]."""

    def heard(self, audio: np.ndarray, given: int = 0) -> np.ndarray:
        """Of a sound (samples,)."""

    def apart(self, seen: list[np.ndarray], heard: list[np.ndarray]) -> np.ndarray:
        """Seconds (n,) by which what is heard comes after what is seen."""


@dataclass(frozen=True)
class Onsets:
    """The timing of scenes in which one event stands out: its onset in seconds.

    An event in what is given counts for neither, or the end of the last splash would pass for the next one's beginning;
    the last frame that is given is looked at, for something may begin right after it.
    """

    clip: ClipGeometry
    name = "onset of the strongest event"

    def seen(self, frames: np.ndarray, given: int = 0) -> np.ndarray:
        before = max(0, given - 1)
        return np.array(picture_onset(frames[before:], self.clip.fps) + before / self.clip.fps)

    def heard(self, audio: np.ndarray, given: int = 0) -> np.ndarray:
        before = self.clip.samples_of(max(0, given - 1))
        return np.array(sound_onset(audio[before:], self.clip.sampling_rate) + before / self.clip.sampling_rate)

    def apart(self, seen: list[np.ndarray], heard: list[np.ndarray]) -> np.ndarray:
        return np.array(heard) - np.array(seen)


def within(timing: Timing, seen: list[np.ndarray], heard: list[np.ndarray], tolerance: float = TOLERANCE) -> float:
    """Share of clips in which what happens is heard within ``tolerance`` seconds of being seen."""
    return float(np.mean(np.abs(timing.apart(seen, heard)) <= tolerance + 1e-6))


def sync_scores(timing: Timing, seen: list[np.ndarray], heard: list[np.ndarray]) -> dict[str, float]:
    """Scores of clips: with their own sound, and as a ceiling the mean over those with another clip's sound.

    Raises:
        ValueError: for fewer than two clips, which cannot be shuffled.
    """
    count = len(seen)
    if count < 2:
        raise ValueError("synchrony is measured on two clips or more")
    shuffled = [within(timing, seen, heard[-k:] + heard[:-k]) for k in range(1, min(count, SHUFFLES + 1))]
    return {"within_100ms": within(timing, seen, heard), "shuffled": round(float(np.mean(shuffled)), 4)}
