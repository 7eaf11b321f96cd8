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
        geometry = self.geometry
        sound = read_audio(path, sampling_rate=geometry.sampling_rate)
        # Many files start their picture later than their sound; sample 0 here sounds with the first frame.
        delay = round((_start(path, "audio") - _start(path, "video")) * geometry.sampling_rate)  # samples
        sound = np.pad(sound, (delay, 0)) if delay > 0 else sound[-delay:]
        size = {"fps": geometry.fps, "height": geometry.height, "width": geometry.width}
        # Codecs round the end of the sound: less than a frame that is missing there is filled with silence.
        for i in range((len(sound) + geometry.samples_of(1) - 1) // geometry.samples):
            try:
                frames = read_video(path, start=i * geometry.seconds, max_frames=geometry.frames, **size)
            except MediaError:
                if i == 0:
                    raise
                return  # the picture ends with the clip before
            if len(frames) < geometry.frames:
                return
            audio = sound[i * geometry.samples : (i + 1) * geometry.samples]
            yield frames, np.pad(audio, (0, geometry.samples - len(audio)))


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


def _start(path: Path, kind: str) -> float:
    """Seconds at which the file's first stream of a kind starts."""
    streams = (stream for stream in probe(path)["streams"] if stream["codec_type"] == kind)
    return float(next(streams, {}).get("start_time", 0))


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
