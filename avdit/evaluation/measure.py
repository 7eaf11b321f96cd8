"""What is kept of a set of clips: features, judged classes, onsets, peaks and thumbnails; never the clips."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from avdit.evaluation.align import picture_peaks, sound_peaks
from avdit.evaluation.extractors import Features
from avdit.evaluation.frechet import features_of
from avdit.evaluation.judge import STATISTICS, Judges
from avdit.evaluation.sync import EVENT_CLASSES, Timing, loudness
from avdit.evaluation.tasks import Sample
from avdit.geometry import ClipGeometry
from avdit.models.mel import LogMel

THUMBNAIL = 16  # pixels a side
THUMBNAIL_FRAMES = 4
THUMBNAIL_MEL = (40, 16)  # times and frequencies


@dataclass
class Instruments:
    """What clips are looked at with; what no figure needs is left out."""

    geometry: ClipGeometry
    classes: list[str]
    device: torch.device
    judges: Judges | None = None
    video: Features | None = None
    audio: Features | None = None
    timing: Timing | None = None
    thumbnails: bool = False

    def __post_init__(self) -> None:
        self.log_mel = LogMel(self.geometry.sampling_rate, self.geometry.hop_length, self.geometry.mel_bins)


@dataclass
class Measured:
    """One row a clip in every list; those from ``events`` to ``onsets`` are of the clips with events alone."""

    labels: list[str] = field(default_factory=list)
    seen_as: list[str] = field(default_factory=list)  # the class that the picture's judge names
    heard_as: list[str] = field(default_factory=list)
    picture: list[np.ndarray] = field(default_factory=list)  # features (d,)
    sound: list[np.ndarray] = field(default_factory=list)
    events: list[str] = field(default_factory=list)  # labels
    seen: list[np.ndarray] = field(default_factory=list)  # when things happen in the picture, as the timing tells it
    heard: list[np.ndarray] = field(default_factory=list)
    motion: list[list[float]] = field(default_factory=list)  # seconds of the peaks
    onsets: list[list[float]] = field(default_factory=list)
    loudness: list[np.ndarray] = field(default_factory=list)  # dB over time
    thumbnails: list[np.ndarray] = field(default_factory=list)
    sound_thumbnails: list[np.ndarray] = field(default_factory=list)

    def accuracy(self, kind: str) -> float:
        """Share of the clips that are named as what they should be; ``kind`` is ``video`` or ``audio``."""
        named = self.seen_as if kind == "video" else self.heard_as
        return float(np.mean([a == b for a, b in zip(named, self.labels, strict=True)]))

    def features(self, kind: str, labels: set[str] | None = None) -> np.ndarray:
        """The features (n, d) of one modality, of the clips of ``labels`` alone where they are given."""
        rows = self.picture if kind == "video" else self.sound
        chosen = [some for some, name in zip(rows, self.labels, strict=True) if not labels or name in labels]
        return np.concatenate(chosen)


def event_classes(classes: list[str]) -> list[str]:
    """Those whose clips hold events that are seen and heard; all where none is known to."""
    return [name for name in classes if name in EVENT_CLASSES] or list(classes)


def picture_thumbnail(frames: np.ndarray) -> np.ndarray:
    """A few small frames of a clip (F, H, W, 3) in one vector of values in [0, 1]."""
    some = np.linspace(0, len(frames) - 1, THUMBNAIL_FRAMES).round().astype(int)
    pictures = torch.from_numpy(np.ascontiguousarray(frames[some], np.float32)).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(pictures, THUMBNAIL).flatten().numpy()


def sound_thumbnail(mel: torch.Tensor) -> np.ndarray:
    """A coarse log-mel spectrogram of a clip's (T, bins) in one vector."""
    return F.adaptive_avg_pool2d(mel[None, None], THUMBNAIL_MEL).flatten().numpy()


@torch.no_grad()
def look(sample: Sample, tools: Instruments, out: Measured) -> None:
    """Add what there is to see and hear in ``sample`` to ``out``."""
    clip, judges = tools.geometry, tools.judges
    out.labels.append(sample.label)
    frames, audio = (np.ascontiguousarray(x, np.float32) for x in (sample.frames, sample.audio))
    mel = tools.log_mel(torch.from_numpy(audio)[None])
    if judges is not None:
        statistics = judges.statistics(torch.from_numpy(frames)[None].to(tools.device))
        spectrum = mel.to(tools.device)
        out.seen_as += judges.named(judges.picture, statistics, tools.classes)
        out.heard_as += judges.named(judges.sound, spectrum, tools.classes)
        own = statistics[:, :STATISTICS].cpu().numpy(), judges.sound.features(spectrum).cpu().numpy()
        out.picture.append(own[0] if tools.video is None else features_of([frames], tools.video.extract))
        out.sound.append(own[1] if tools.audio is None else features_of([audio], tools.audio.extract))
    out.loudness.append(loudness(audio, clip.sampling_rate))
    if tools.timing is not None and sample.label in event_classes(tools.classes):
        out.events.append(sample.label)
        out.seen.append(tools.timing.seen(frames, sample.given))
        out.heard.append(tools.timing.heard(audio, sample.given))
        out.motion.append(picture_peaks(frames, clip.fps))
        out.onsets.append(sound_peaks(audio, clip.sampling_rate))
    if tools.thumbnails:
        out.thumbnails.append(picture_thumbnail(frames))
        out.sound_thumbnails.append(sound_thumbnail(mel[0]))


def measure(clips: Iterable[Sample], tools: Instruments, text: str, total: int) -> Measured:
    """Look at ``clips`` one after another; ``text`` and ``total`` are for the progress on stderr."""
    out = Measured()
    for sample in tqdm(clips, desc=text, total=total, mininterval=10, ncols=100):
        look(sample, tools, out)
    return out
