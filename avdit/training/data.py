"""What the stages train on: the latents of rendered clips, or of a folder of mp4 files, made where they are missing.

Every process makes its share of the shards; all must see the same cache folder.
"""

import time
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from avdit.data.clips import label_of
from avdit.data.folders import FolderSettings, LatentCache, found_classes, split_files
from avdit.data.latents import RandomShards, Shards, render_latents, render_shards
from avdit.data.scenes import ALL_CLASSES, HELD_OUT, PACKS
from avdit.geometry import ClipGeometry
from avdit.models.audio_codec import AudioCodec
from avdit.models.video_codec import VideoCodec
from avdit.training.trainer import processes

CHECK_SEEDS = HELD_OUT + (1 << 19)  # of clips on which training is checked; others than those of the evaluation
CHECK_CLIPS = 4  # of each class


@dataclass
class TrainingData:
    shards: Shards | RandomShards
    video_codec: VideoCodec
    audio_codec: AudioCodec
    geometry: ClipGeometry
    classes: list[str]
    told: dict[str, Any]  # what a dry run says of it
    first_label: int = 0  # the label of the first class in the shards

    def labels(self, items: Tensor, dropped: Tensor) -> Tensor:
        """Class (n,) of each of ``items``; the unconditional one where ``dropped``."""
        labels = self.shards.get("label", items) - self.first_label
        return labels.masked_fill(dropped.to(labels.device, non_blocking=True), len(self.classes))

    def repeated(self, repeats: dict[str, int]) -> "TrainingData":
        """The same, of which the clips of a class in ``repeats`` are drawn so many times as often as the others.

        Raises:
            ValueError: for a class that the data do not have, or repeats that are not a whole number of 1 or more.
        """
        for name, times in repeats.items():
            if name not in self.classes:
                raise ValueError(f"class_repeats of {name!r}: choose from {', '.join(self.classes)}")
            if isinstance(times, bool) or not isinstance(times, int) or times < 1:
                raise ValueError(f"class_repeats of {name!r}, {times!r}, must be a whole number of 1 or more")
        if not repeats or isinstance(self.shards, RandomShards):
            return self
        every = torch.arange(len(self.shards))
        times = torch.tensor([repeats.get(name, 1) for name in self.classes])
        labels = self.labels(every, torch.zeros_like(every, dtype=torch.bool)).cpu()
        return replace(self, shards=self.shards.picked(every.repeat_interleave(times[labels])))


def clip_geometry(values: dict[str, Any]) -> ClipGeometry:
    """The geometry with the fields in ``values``; those of ``avdit-xs`` where they are left out.

    Raises:
        ValueError: for a field that does not exist, or sizes that do not divide.
    """
    known = [field.name for field in fields(ClipGeometry)]
    for name in values:
        if name not in known:
            raise ValueError(f"unknown geometry setting {name!r}: choose from {', '.join(known)}")
    return ClipGeometry(**values)


def my_share() -> tuple[slice, PartialState]:
    """Which items of a list this process works on: every so-manieth, from its own place on."""
    state = processes()
    return slice(state.process_index, None, state.num_processes), state


def load_codecs(folder: Path, geometry: ClipGeometry) -> tuple[VideoCodec, AudioCodec]:
    """``video_codec`` and ``audio_codec`` of a folder, on this process's device.

    Raises:
        ValueError: where they are missing or make latents of another size than ``geometry``'s.
    """
    for name in ("video_codec", "audio_codec"):
        if not (folder / name / "config.json").is_file():
            raise ValueError(f"{folder} has no {name}: give a folder of trained codecs or of a pipeline")
    device = processes().device
    video = VideoCodec.from_pretrained(folder / "video_codec").to(device).eval()
    audio = AudioCodec.from_pretrained(folder / "audio_codec").to(device).eval()
    for codec, channels in ((video, geometry.video_channels), (audio, geometry.audio_channels)):
        if codec.channels != channels:
            raise ValueError(f"{type(codec).__name__} of {folder} makes {codec.channels} channels, not {channels}")
    return video, audio


def training_data(
    config: dict, out: Path, geometry: ClipGeometry, classes: list[str] | None = None, dry_run: bool = False
) -> TrainingData:
    """The latents that ``config`` asks for.

    Args:
        config: ``codecs`` (folder), ``cache`` (folder; ``out`` by default), and ``data`` (see
            :class:`FolderSettings`) or ``clips``, the number of clips to be rendered of each class, and ``pack``, of
            which alone they are (of all packs where it is left out).
        classes: Those of the model, where it has some already.
        dry_run: Write nothing: noise takes the place of the latents, and ``told`` says what there is to encode.

    Raises:
        ValueError: for data or codecs that cannot be used, in one sentence.
    """
    settings = FolderSettings.of(config["data"]) if config.get("data") else None
    cache = Path(config.get("cache", out))
    if settings is None:
        video, audio = load_codecs(Path(config["codecs"]), geometry)
        packs = rendered_packs(config.get("pack"))
        wanted = [name for pack in packs for name in PACKS[pack]]
        if classes and classes != wanted:
            raise ValueError(f"the model has other classes than {', '.join(packs)}: {', '.join(classes)}")
        first = ALL_CLASSES.index(wanted[0])
        if dry_run:
            told = {"rendered_clips": config["clips"] * len(wanted)}
            return TrainingData(
                RandomShards(geometry, len(wanted), device=processes().device), video, audio, geometry, wanted, told
            )
        shards = rendered(cache, config["clips"], video, audio, packs)
        return TrainingData(shards, video, audio, geometry, wanted, {}, first)

    train, test = split_files(settings)
    if (config.get("train") or {}).get("check_every") and not test:
        raise ValueError("check_every measures the error on held-out files: name some in data's test")
    found = found_classes(settings, train)
    classes = classes or found
    for name in settings.classes or ():
        if name not in classes:
            raise ValueError(f"class {name!r} is none of the model's: {', '.join(classes)}")
    train = [path for path in train if label_of(path) in set(classes) & set(found)]
    if not train:
        raise ValueError(
            f"no file in {settings.folder} is of the model's classes {', '.join(classes)}: found {', '.join(found)}"
        )
    video, audio = load_codecs(Path(config["codecs"]), geometry)
    counts = Counter(label_of(path) for path in train)
    told = {"files": len(train), "test_files": len(test), "files_by_class": dict(sorted(counts.items()))}
    if dry_run:
        told["encode_seconds_per_clip"] = encode_seconds(video, audio, geometry)
        return TrainingData(
            RandomShards(geometry, len(classes), device=processes().device), video, audio, geometry, classes, told
        )
    shards, told["clips"] = encoded(cache / "latents", settings, train, classes, geometry, (video, audio))
    return TrainingData(shards, video, audio, geometry, classes, told)


def held_out_data(config: dict, out: Path, data: TrainingData, check_every: int) -> TrainingData | None:
    """The latents on which training is checked: of held-out clips, or of the files on the test list.

    None where it is not checked.

    Raises:
        ValueError: where no file on the test list gives a clip.
    """
    if not check_every or isinstance(data.shards, RandomShards):
        return data if check_every else None
    cache = Path(config.get("cache", out)) / "held-out"
    codecs = data.video_codec, data.audio_codec
    if not config.get("data"):
        shards = rendered(cache, CHECK_CLIPS, *codecs, rendered_packs(config.get("pack")), CHECK_SEEDS)
        return replace(data, shards=shards)
    settings = FolderSettings.of(config["data"])
    test = [path for path in split_files(settings)[1] if label_of(path) in data.classes]
    return replace(data, shards=encoded(cache / "latents", settings, test, data.classes, data.geometry, codecs)[0])


def encoded(
    out: Path,
    settings: FolderSettings,
    files: list[Path],
    classes: list[str],
    geometry: ClipGeometry,
    codecs: tuple[VideoCodec, AudioCodec],
) -> tuple[Shards, int]:
    """The latents of ``files``, encoded in ``out`` where they are missing, and the number of clips."""
    share, state = my_share()
    latents = LatentCache(out, settings.folder, files, classes, geometry, codecs, settings.files_per_shard)
    latents.build(share, settings.workers)
    state.wait_for_everyone()
    clips = latents.finish()
    return near(Shards(out)), clips


def rendered_packs(pack: str | None) -> list[str]:
    """The packs of procedural scenes that are asked for: one, or all.

    Raises:
        ValueError: for a pack that does not exist.
    """
    if pack is not None and pack not in PACKS:
        raise ValueError(f"unknown pack {pack!r}: choose one of {', '.join(PACKS)}")
    return [pack] if pack else list(PACKS)


def rendered_clips(cache: Path, clips: int, packs: list[str], first_seed: int = 0) -> Path:
    """The folder of the procedural clips of ``packs``, where ``clips`` of each class are rendered first."""
    share, state = my_share()
    for pack in packs:
        render_shards(cache / "clips" / pack, clips, first_seed, share=share, classes=PACKS[pack])
    state.wait_for_everyone()
    return cache / "clips"


def rendered(
    cache: Path, clips: int, video: VideoCodec, audio: AudioCodec, packs: list[str], first_seed: int = 0
) -> Shards:
    """The latents of ``clips`` procedural clips of each class of ``packs``, made where they are missing."""
    share, state = my_share()
    for pack in packs:
        render_latents(cache / "latents" / pack, clips, video, audio, first_seed, share, PACKS[pack])
    state.wait_for_everyone()
    return near(Shards(cache / "latents" / packs[0] if len(packs) == 1 else cache / "latents"))


def near(shards: Shards) -> Shards:
    """``shards`` in the memory of this process's GPU, where half of what is free there holds them."""
    device = processes().device
    if device.type != "cuda" or 2 * shards.nbytes > torch.cuda.mem_get_info(device)[0]:
        return shards
    return shards.resident(device)


@torch.no_grad()
def encode_seconds(video: VideoCodec, audio: AudioCodec, geometry: ClipGeometry) -> float:
    """Seconds in which both codecs encode one clip of noise, measured once after a run that does not count."""
    frames = torch.rand(1, geometry.frames, 3, geometry.height, geometry.width).to(video.device, video.dtype)
    sound = torch.rand(1, geometry.samples).to(audio.device) - 0.5
    for _ in range(2):
        start = time.perf_counter()
        video.encode(frames * 2 - 1).cpu()
        audio.encode(sound).cpu()
    return round(time.perf_counter() - start, 3)
