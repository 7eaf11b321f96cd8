"""Folders of mp4 files as latents, encoded once by any number of processes and checked by hash.

The files are taken in order, ``files_per_shard`` at a time; each such group becomes one shard of latents and a note
beside it (``clips-00000000.json``) with the group's fingerprint and the shard's SHA-256. A group whose note is there
is done, so an interrupted run goes on where it stopped, also with another number of processes.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from avdit.data.clips import ClipScan, label_of, mp4_files, report_skipped
from avdit.data.latents import write_shard
from avdit.geometry import ClipGeometry
from avdit.models.audio_codec import AudioCodec
from avdit.models.video_codec import VideoCodec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderSettings:
    """The ``data`` settings of a training stage.

    Raises:
        ValueError: for a number below one.
    """

    folder: Path
    train: Path | None = None  # file of names, one a line; all that ``test`` does not name where it is left out
    test: Path | None = None  # these files are never trained on
    classes: tuple[str, ...] | None = None  # all that are found where they are left out
    workers: int = 4  # groups that a process reads at once
    files_per_shard: int = 16

    def __post_init__(self) -> None:
        for name in ("workers", "files_per_shard"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"data {name} {value!r} must be a whole number of 1 or more")

    @classmethod
    def of(cls, values: Any) -> "FolderSettings":
        """From a configuration's object.

        Raises:
            ValueError: for a setting that does not exist, or where ``folder`` is missing.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or "folder" not in values:
            raise ValueError(f"data {values!r} must be an object with a folder")
        for name in values:
            if name not in known:
                raise ValueError(f"unknown data setting {name!r}: choose from {', '.join(known)}")
        classes = values.get("classes")
        if classes is not None and (not isinstance(classes, list) or not classes):
            raise ValueError(f"data classes {classes!r} must be a list of names")
        paths = {name: Path(values[name]) for name in ("folder", "train", "test") if values.get(name)}
        return cls(**{**values, **paths, "classes": None if classes is None else tuple(classes)})


def names_of(path: Path, folder: Path) -> list[str]:
    """Names under which a list may have a file: with its folders or without, and AIST++'s name for all cameras."""
    relative = path.relative_to(folder).with_suffix("").as_posix()
    return [relative, path.stem, re.sub(r"_c\d\d_", "_cAll_", path.stem)]


def listed(files: Sequence[Path], folder: Path, names: Path) -> list[Path]:
    """Those of ``files`` that the text file ``names`` has, with or without folder and ``.mp4``.

    Raises:
        ValueError: where the list cannot be read or names none of them.
    """
    try:
        lines = [line.strip().removesuffix(".mp4") for line in names.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{names} is not a list of names that can be read") from None
    wanted, known = set(lines), set()
    chosen = []
    for path in files:
        if found := wanted.intersection(names_of(path, folder)):
            known |= found
            chosen.append(path)
    if not chosen:
        first = f", the first being {lines[0]!r}" if lines else ""
        raise ValueError(f"{names} names none of the {len(files)} files in {folder}{first}")
    if missing := sorted(wanted - known):
        logger.warning("%s: %d of %d names are in no file, as %s", names, len(missing), len(wanted), missing[0])
    return chosen


def split_files(settings: FolderSettings) -> tuple[list[Path], list[Path]]:
    """The files to train on and those to test on.

    Raises:
        ValueError: where there are none, or one is in both lists.
    """
    files = mp4_files(settings.folder)
    test = listed(files, settings.folder, settings.test) if settings.test else []
    held_out = set(test)
    if settings.train:
        train = listed(files, settings.folder, settings.train)
        for path in train:
            if path in held_out:
                raise ValueError(f"{path} is in both lists, {settings.train} and {settings.test}")
    else:
        train = [path for path in files if path not in held_out]
    if not train:
        raise ValueError(f"{settings.test} names every file in {settings.folder}: none is left to train on")
    return train, test


def found_classes(settings: FolderSettings, files: Sequence[Path]) -> list[str]:
    """The classes that are asked for, or every label of ``files``, sorted.

    Raises:
        ValueError: where no file is of a class that is asked for.
    """
    found = sorted({label_of(path) for path in files})
    if settings.classes is None:
        return found
    for name in settings.classes:
        if name not in found:
            raise ValueError(f"no file in {settings.folder} is of class {name!r}: found {', '.join(found)}")
    return list(settings.classes)


def digest(module: nn.Module) -> str:
    """A hash of a codec: its settings and its weights."""
    total = hashlib.sha256(json.dumps({k: v for k, v in module.config.items() if k[0] != "_"}, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class LatentCache:
    """The latents of some files in ``out``.

    Args:
        files: In this order; the cache knows them by their path in ``folder`` and their size.
        classes: A clip's label is its class's place here; files of other classes give no clip.
    """

    def __init__(
        self,
        out: Path,
        folder: Path,
        files: Sequence[Path],
        classes: Sequence[str],
        geometry: ClipGeometry,
        codecs: tuple[VideoCodec, AudioCodec],
        files_per_shard: int = 16,
    ) -> None:
        self.out, self.folder, self.classes, self.geometry, self.codecs = out, folder, list(classes), geometry, codecs
        self.groups = [list(files[i : i + files_per_shard]) for i in range(0, len(files), files_per_shard)]
        self.source = {
            "geometry": geometry.as_dict(),
            "classes": self.classes,
            "codecs": [digest(codec) for codec in codecs],
        }

    def shard(self, group: int) -> Path:
        return self.out / f"clips-{group:08d}.safetensors"

    def fingerprint(self, group: int) -> str:
        """A hash of all that the latents of a group follow from."""
        files = [(path.relative_to(self.folder).as_posix(), path.stat().st_size) for path in self.groups[group]]
        return hashlib.sha256(json.dumps([self.source, files]).encode()).hexdigest()

    def note(self, group: int) -> dict[str, Any] | None:
        """What was written beside a group's shard; None where it is not done."""
        path = self.shard(group).with_suffix(".json")
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError:
            raise ValueError(f"{path} is damaged: delete it and run again") from None

    def build(self, share: slice = slice(None), workers: int = 1) -> None:
        """Encode the groups of ``share`` that are not done; several are read at once, since ffmpeg works apart.

        Raises:
            ValueError: where a shard that is there was made from something else, or is not what was written.
        """
        own = {self.shard(group).name for group in range(len(self.groups))}
        for path in sorted(self.out.glob("clips-*.safetensors")):
            # Training reads whatever lies in the folder, also what is on the test list by now.
            if path.name not in own:
                raise ValueError(f"{path} was made from other files, classes or codecs: give another cache folder")
        mine = range(len(self.groups))[share]
        missing = [group for group in mine if not self.check(group)]
        with ThreadPoolExecutor(workers) as pool:
            bar = tqdm(total=len(missing), desc="encoding files", mininterval=10, disable=not missing)
            for _ in pool.map(self.encode, missing):
                bar.update()
            bar.close()

    def check(self, group: int) -> bool:
        """Whether a group is done and its shard is what was written."""
        note, path = self.note(group), self.shard(group)
        if note is None:
            return False
        if note["fingerprint"] != self.fingerprint(group):
            raise ValueError(f"{path} was made from other files, classes or codecs: give another cache folder")
        if note["clips"] and (not path.is_file() or file_sha256(path) != note["sha256"]):
            note_path = path.with_suffix(".json")
            raise ValueError(f"{path} is damaged, its hash is not that in {note_path.name}: delete both and run again")
        return True

    @torch.no_grad()
    def encode(self, group: int) -> None:
        """Write a group's shard, then its note."""
        scan = ClipScan(self.folder, self.geometry, self.classes, self.groups[group])
        tensors: dict[str, list[Tensor]] = {"video": [], "audio": [], "label": []}
        for label, video, audio in self.latents(scan):
            tensors["video"].append(video)
            tensors["audio"].append(audio)
            tensors["label"].append(torch.tensor([self.classes.index(label)]))
        clips, path = len(tensors["label"]), self.shard(group)
        if clips:
            write_shard(path, {name: torch.cat(parts) for name, parts in tensors.items()})
        note = {
            "fingerprint": self.fingerprint(group),
            "clips": clips,
            "sha256": file_sha256(path) if clips else None,
            "files": [str(file.relative_to(self.folder)) for file in self.groups[group]],
            "skipped": {str(file.relative_to(self.folder)): reason for file, reason in scan.skipped},
        }
        self.out.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".json.part")
        part.write_text(json.dumps(note, indent=1))
        os.replace(part, path.with_suffix(".json"))

    def latents(self, scan: ClipScan) -> Iterator[tuple[str, Tensor, Tensor]]:
        video, audio = self.codecs
        for label, frames, sound in scan.clips():
            pixels = torch.from_numpy(frames).to(video.device, video.dtype).permute(0, 3, 1, 2).unsqueeze(0) * 2 - 1
            samples = torch.from_numpy(sound).to(audio.device).unsqueeze(0)
            yield label, video.encode(pixels).half().cpu(), audio.encode(samples).half().cpu()

    def finish(self) -> int:
        """Once every process has built its share: say what was skipped; returns the number of clips.

        Raises:
            ValueError: where no file gave a clip.
        """
        notes = [self.note(group) or {"clips": 0, "skipped": {}} for group in range(len(self.groups))]
        skipped = [(Path(name), reason) for note in notes for name, reason in note["skipped"].items()]
        report_skipped(skipped, sum(map(len, self.groups)))
        if not (clips := sum(note["clips"] for note in notes)):
            raise ValueError(f"no file in {self.folder} gave a clip: {skipped[0][0]}: {skipped[0][1]}")
        return clips
