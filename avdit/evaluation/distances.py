"""The field's table: FVD, KVD and FAD of a folder of made clips against a folder of real ones.

    python -m avdit distances --real landscape --made samples --sizes 64 256 --video-features i3d_torchscript.pt \\
        --audio-features vggish-10086976.pth

Each folder holds mp4 files, or the shards of ``python -m avdit samples``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from avdit.data.clips import mp4_files, scan_clips
from avdit.data.folders import listed
from avdit.data.latents import Shards
from avdit.evaluation.extractors import Features, audio_features, video_features
from avdit.evaluation.frechet import CLIPS, audio_distance, resized, rows_of, video_distances
from avdit.evaluation.judge import Judges
from avdit.evaluation.report import DEFAULT_JUDGES
from avdit.evaluation.samples import read_note
from avdit.generate import whole
from avdit.geometry import ClipGeometry

BATCH = 8  # clips that are looked at together
Clip = tuple[np.ndarray, np.ndarray]  # frames (F, H, W, 3) in [0, 1] and samples (n,)


@dataclass(frozen=True)
class ClipSet:
    """Clips of a folder in an order that is shuffled once and for all, so that the first of them are a fair sample."""

    folder: Path
    names: Path | None = None  # file of names, one a line: these mp4 files alone

    def note(self) -> dict[str, Any] | None:
        """What ``samples.json`` tells where the folder holds shards."""
        return read_note(self.folder)

    def source(self) -> list[Path] | Shards:
        """The mp4 files or the shards.

        Raises:
            ValueError: where there are none, or some of the shards' clips were not made yet.
        """
        if (note := self.note()) is not None:
            shards = Shards(self.folder)
            if len(shards) != note["clips"]:
                raise ValueError(f"{self.folder} holds {len(shards)} of {note['clips']} clips: run samples again")
            return shards
        files = mp4_files(self.folder)
        return listed(files, self.folder, self.names) if self.names else files

    def clips(self, geometry: ClipGeometry) -> Iterator[Clip]:
        """All clips, one after another."""
        source = self.source()
        if not isinstance(source, Shards):
            yield from (
                (frames, audio) for _, frames, audio in scan_clips(self.folder, geometry, files=source).drawn(0)
            )
            return
        for i in np.random.default_rng(0).permutation(len(source)):
            item = torch.tensor([int(i)])
            yield source.get("frames", item)[0].float().div(255).numpy(), source.get("audio", item)[0].numpy()


@dataclass(frozen=True)
class Tools:
    """What clips are looked at with, and the sizes to which their pictures are brought first."""

    video: Features
    audio: Features
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, video: Path | None, audio: Path | None, sizes: tuple[int, ...], device: torch.device) -> "Tools":
        """Networks of the files given, and our own where there are none.

        Raises:
            ValueError: for files that cannot be used.
        """
        own = None if video and audio else Judges.load(DEFAULT_JUDGES, device)
        if video:
            seen = video_features(video, device)
        else:
            statistics = own.statistics
            seen = Features(statistics.name, lambda x: statistics(x.to(device)), {"size": statistics.size})
        if audio:
            heard = audio_features(audio, device)
        else:
            judge = own.sound
            heard = Features(judge.name, lambda x: judge.features(judge.mel(x.to(device))), {})
        return cls(seen, heard, sizes)


@torch.no_grad()
def features(clips: Iterator[Clip], tools: Tools, text: str) -> tuple[int, dict[int, np.ndarray], np.ndarray]:
    """How many clips there are; the features of their pictures (n, d) at each size, and of their sounds (m, d).

    Raises:
        ValueError: where there are fewer than two clips.
    """
    pictures: dict[int, list[torch.Tensor]] = {size: [] for size in tools.sizes}
    sounds: list[torch.Tensor] = []
    count = 0
    with tqdm(desc=text, mininterval=10) as bar:
        while some := list(islice(clips, BATCH)):
            frames, audio = (torch.from_numpy(np.stack(part)).float() for part in zip(*some, strict=True))
            for size, rows in pictures.items():
                rows.append(rows_of(tools.video.extract(resized(frames, size)), len(some)))
            sounds.append(rows_of(tools.audio.extract(audio), len(some)))
            count += len(some)
            bar.update(len(some))
    if count < 2:
        raise ValueError(f"{text} are fewer than two clips: distances need more")
    return count, {size: torch.cat(rows).numpy() for size, rows in pictures.items()}, torch.cat(sounds).numpy()


def geometry_of(*sets: ClipSet) -> ClipGeometry:
    """That of the sets which hold shards, else 16 frames of 256 x 256 at 10 a second.

    Raises:
        ValueError: where there are two that differ.
    """
    found = [
        ClipGeometry(**{k: v for k, v in note["geometry"].items() if k != "samples"})
        for s in sets
        if (note := s.note())
    ]
    shapes = {(g.frames, g.fps, g.height, g.width, g.sampling_rate) for g in found}
    if len(shapes) > 1:
        raise ValueError(f"{' and '.join(str(s.folder) for s in sets)} hold clips of different sizes or rates")
    return found[0] if found else ClipGeometry()


def distances(real: ClipSet, made: ClipSet, tools: Tools, clips: int | None = None) -> dict[str, Any]:
    """FVD and KVD at every size, and FAD.

    Args:
        clips: At most so many of each set; all where it is left out.

    Returns:
        ``clips`` of both sets, ``fvd`` and ``kvd`` by size, ``fad``, the ``features`` they were made with, ``protocol``
        (whether there were 2,048 clips in each set), and what the made clips are, where their folder tells.

    Raises:
        ValueError: for folders or features that cannot be used.
    """
    if clips is not None:
        whole(clips, "--clips", 2, 10_000_000)
    for size in tools.sizes:
        whole(size, "--sizes", 16, 4096)
    for source in (real, made):
        source.source()  # what cannot be read is said before hours of work
    geometry = geometry_of(real, made)
    rows = {}
    for name, source in (("real", real), ("made", made)):
        rows[name] = features(islice(source.clips(geometry), clips), tools, f"{name} clips")
    (real_clips, real_pictures, real_sounds), (made_clips, made_pictures, made_sounds) = rows["real"], rows["made"]
    report: dict[str, Any] = {
        "real": str(real.folder),
        "made": str(made.folder),
        "clips": {"real": real_clips, "made": made_clips},
        "protocol": real_clips == made_clips == CLIPS,
        "features": {"video": tools.video.name, "audio": tools.audio.name},
        "fvd": {},
        "kvd": {},
        **audio_distance(real_sounds, made_sounds),
    }
    for size in tools.sizes:
        for name, value in video_distances(real_pictures[size], made_pictures[size]).items():
            report[name][str(size)] = value
    if note := made.note():
        report["sampling"] = {k: v for k, v in note.items() if k not in ("geometry", "classes")}
    return report


def table(report: dict[str, Any]) -> str:
    """The report for a reader."""
    counts = report["clips"]
    lines = [f"{counts['made']} clips of {report['made']} against {counts['real']} of {report['real']}"]
    if not report["protocol"]:
        lines[0] += f" (the field takes {CLIPS} of each)"
    lines.append(f"{'pixels':>8}{'FVD':>12}{'KVD':>12}")
    lines += [f"{size:>8}{report['fvd'][size]:12.4g}{report['kvd'][size]:12.4g}" for size in report["fvd"]]
    lines.append(f"{'FAD':>8}{report['fad']:12.4g}")
    lines += [f"{kind}: {name}" for kind, name in report["features"].items()]
    return "\n".join(lines)
