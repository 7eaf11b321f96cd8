"""Folders of mp4 files as training clips: Landscape (a folder a class) and AIST++ (the genre in the file name)."""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from avdit.geometry import ClipGeometry
from avdit.media import MediaError, probe, read_audio, read_video

logger = logging.getLogger(__name__)

GENRES = {  # AIST++: gBR_sBM_c01_d04_mBR0_ch01.mp4 is a break
    "gBR": "break",
    "gPO": "pop",
    "gLO": "lock",
    "gWA": "waack",
    "gMH": "middle hip-hop",
    "gLH": "LA-style hip-hop",
    "gHO": "house",
    "gKR": "krump",
    "gJS": "street jazz",
    "gJB": "ballet jazz",
}


def label_of(path: Path) -> str:
    """The class of a file: its AIST++ genre code where the name has one, else the name of its folder."""
    code = re.match(r"g[A-Z]{2}(?=_)", path.name)
    if code and code.group() in GENRES:
        return GENRES[code.group()]
    return path.absolute().parent.name.replace("_", " ")


class ClipScan:
    """The clips of a folder of mp4 files, one after another; no file is ever held whole.

    Iterating yields ``(label, frames, audio)``: the class name, (F, H, W, 3) float32 in [0, 1] and (S,) float32.
    ``skipped`` then lists ``(path, reason)`` for every file that gave no clip.
    """

    def __init__(
        self,
        folder: str | Path,
        geometry: ClipGeometry,
        classes: Sequence[str] | None = None,
        files: Sequence[Path] | None = None,
    ) -> None:
        self.folder, self.geometry, self.classes = Path(folder), geometry, classes
        self.files = mp4_files(self.folder) if files is None else list(files)
        self.skipped: list[tuple[Path, str]] = []

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        yield from self.clips()
        report_skipped(self.skipped, len(self.files))

    def clips(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """The same without a word on what was skipped."""
        self.skipped = []
        for path in self.files:
            yield from self._clips_of(path)

    def _clips_of(self, path: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        label = label_of(path)
        if self.classes is not None and label not in self.classes:
            self.skipped.append((path, f"{label!r} is none of the classes"))
            return
        count = 0
        try:
            for frames, audio in self._cut(path):
                yield label, frames, audio
                count += 1
        except MediaError as error:
            self.skipped.append((path, str(error)))
        else:
            if not count:
                self.skipped.append((path, f"shorter than one clip of {self.geometry.seconds:g} s"))

    def _cut(self, path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The file's whole clips: as long as both the picture and the sound last."""
        sound = self._sound(path)
        # Codecs round the end of the sound: less than a frame that is missing there is filled with silence.
        for number in range((len(sound) + self.geometry.samples_of(1) - 1) // self.geometry.samples):
            if (clip := self._clip(path, number, sound)) is None:
                return
            yield clip

    def _sound(self, path: Path) -> np.ndarray:
        """The file's sound; many start their picture later, but sample 0 here sounds with the first frame."""
        sound = read_audio(path, sampling_rate=self.geometry.sampling_rate)
        delay = round(_delay(path) * self.geometry.sampling_rate)  # samples
        return np.pad(sound, (delay, 0)) if delay > 0 else sound[-delay:]

    def _clip(self, path: Path, number: int, sound: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The clip of this number in a file; None where the picture ends before it."""
        geometry = self.geometry
        size = {"fps": geometry.fps, "height": geometry.height, "width": geometry.width}
        try:
            frames = read_video(path, start=number * geometry.seconds, max_frames=geometry.frames, **size)
        except MediaError:
            if number == 0:
                raise
            return None
        if len(frames) < geometry.frames:
            return None
        audio = sound[number * geometry.samples : (number + 1) * geometry.samples]
        return frames, np.pad(audio, (0, geometry.samples - len(audio)))

    def drawn(self, seed: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """The same clips in an order that is drawn over all of them, so that the first ones are a fair sample."""
        places, broken = [], {}
        for path in self.files:
            try:
                # The end may be rounded: a clip too many is found out when it is read.
                count = int((_lasts(path) + 1 / self.geometry.fps) / self.geometry.seconds)
            except MediaError as error:
                broken[path] = str(error)
                continue
            if not count:
                broken[path] = f"shorter than one clip of {self.geometry.seconds:g} s"
            places += [(path, number) for number in range(count)]
        for k in np.random.default_rng(seed).permutation(len(places)):
            path, number = places[k]
            try:
                clip = self._clip(path, number, self._sound(path))
            except MediaError as error:
                broken[path] = str(error)
                continue
            if clip is not None:
                yield label_of(path), *clip
        self.skipped = list(broken.items())
        report_skipped(self.skipped, len(self.files))


def mp4_files(folder: Path) -> list[Path]:
    """Every mp4 under ``folder``, sorted.

    Raises:
        ValueError: where the folder does not exist or holds none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".mp4")
    if not files:
        raise ValueError(f"{folder} holds no mp4 files")
    return files


def report_skipped(skipped: Sequence[tuple[Path, str]], count: int) -> None:
    """Say once which of ``count`` files gave no clip, the first five with their reason."""
    if skipped:
        told = "; ".join(f"{path.name}: {reason}" for path, reason in skipped[:5])
        more = "; ..." if len(skipped) > 5 else ""
        logger.warning("%d of %d files gave no clip (%s%s)", len(skipped), count, told, more)


def _delay(path: Path) -> float:
    """Seconds by which a file's first sound starts later than its first picture."""
    starts = {"audio": 0.0, "video": 0.0}
    for stream in reversed(probe(path)["streams"]):
        if stream["codec_type"] in starts:
            starts[stream["codec_type"]] = float(stream.get("start_time", 0))
    return starts["audio"] - starts["video"]


def _lasts(path: Path) -> float:
    """Seconds for which a file has both a picture and sound.

    Raises:
        MediaError: where the file cannot be read or has none of one kind.
    """
    told = probe(path)
    lengths = []
    for kind, text in (("video", "picture"), ("audio", "sound")):
        stream = next((stream for stream in told["streams"] if stream["codec_type"] == kind), None)
        if stream is None:
            raise MediaError(f"{path} has no {text}")
        lengths.append(float(stream.get("duration", told["format"].get("duration", 0))))
    return min(lengths)


def scan_clips(
    folder: str | Path,
    geometry: ClipGeometry,
    classes: Sequence[str] | None = None,
    files: Sequence[Path] | None = None,
) -> ClipScan:
    """Cut every mp4 under ``folder`` into clips of ``geometry``, resized and resampled.

    Args:
        folder: Searched with its subfolders.
        geometry: Length, size and rates of a clip.
        classes: Where given, files of other classes are skipped.
        files: These alone, in place of every mp4 in the folder.

    Returns:
        An iterable of ``(label, frames, audio)`` with a list ``skipped``; see :class:`ClipScan`.

    Raises:
        ValueError: where the folder does not exist or holds no mp4.
    """
    return ClipScan(folder, geometry, classes, files)
