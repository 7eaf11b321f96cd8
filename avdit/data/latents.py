"""Shards of rendered clips and of their latents, written once and mapped; loaded whole where a GPU has the memory."""

import contextlib
import copy
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from avdit.data.scenes import ALL_CLASSES, CLASSES, render_clip
from avdit.geometry import ClipGeometry
from avdit.machine import usable_cores
from avdit.models.audio_codec import AudioCodec
from avdit.models.video_codec import VideoCodec

SHARD = 9  # rounds over the classes a shard
POOLED = 256  # clips from which on the start of further processes pays off

Rendered = tuple[np.ndarray, np.ndarray]  # frames (F, H, W, 3) in 8 bits, and sound (samples,)


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one shard whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)  # codecs work channels last
    os.replace(part, path)


def render_task(task: tuple[int, int], geometry: ClipGeometry | None) -> Rendered:
    """One clip, of (label, seed), as a shard keeps it."""
    clip = render_clip(*task, geometry)
    return (clip.frames * 255).round().to(torch.uint8).numpy(), clip.audio.numpy()


@contextlib.contextmanager
def renderers(clips: int, geometry: ClipGeometry | None = None, share: int = 1) -> Iterator[Callable[..., Iterator]]:
    """What renders a list of (label, seed) in order, in processes of its own where ``clips`` in all are many.

    Scenes are many small operations, which fill the cores of a machine sooner than its GPU.

    Args:
        share: As many processes as this share the machine's cores.
    """
    task, count = functools.partial(render_task, geometry=geometry), usable_cores() // share
    if count < 2 or clips < POOLED:
        yield lambda tasks: map(task, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(count, torch.set_num_threads, (1,)) as pool:
        yield lambda tasks: pool.imap(task, tasks)


def missing_shards(
    out: Path, clips: int, first_seed: int, share: slice, classes: Sequence[str]
) -> list[tuple[Path, list[tuple[int, int]]]]:
    """Of the shards that are this process's ``share``, those that are not there yet, with (label, seed) of their clips.

    Labels are the places of the classes in ``ALL_CLASSES``.
    """
    labels, found = [ALL_CLASSES.index(name) for name in classes], []
    for start in range(first_seed, first_seed + clips, SHARD)[share]:
        path = Path(out) / f"clips-{start:08d}.safetensors"
        if not path.exists():
            seeds = range(start, min(start + SHARD, first_seed + clips))
            found.append((path, [(label, seed) for seed in seeds for label in labels]))
    return found


def render_shards(
    out: Path,
    clips: int,
    first_seed: int = 0,
    geometry: ClipGeometry | None = None,
    share: slice = slice(None),
    classes: Sequence[str] = CLASSES,
) -> None:
    """Render ``clips`` clips of every class into shards of ``frames`` (n, F, H, W, 3) uint8, ``audio``, ``label``.

    Shards that are there already are kept, so that an interrupted run goes on where it stopped. ``share`` picks the
    shards that this process makes.
    """
    shards = missing_shards(out, clips, first_seed, share, classes)
    with renderers(sum(len(tasks) for _, tasks in shards), geometry, share.step or 1) as render:
        for path, tasks in tqdm(shards, desc="rendering shards", mininterval=10):
            frames, audio = (torch.from_numpy(np.stack(part)) for part in zip(*render(tasks), strict=True))
            write_shard(path, {"frames": frames, "audio": audio, "label": torch.tensor([label for label, _ in tasks])})


def render_latents(
    out: Path,
    clips: int,
    video: VideoCodec,
    audio: AudioCodec,
    first_seed: int = 0,
    share: slice = slice(None),
    classes: Sequence[str] = CLASSES,
) -> None:
    """Render clips as :func:`render_shards` does and keep only their latents, as :func:`encode_shards` makes them.

    Frames take twenty times the room of their latents.
    """
    shards = missing_shards(out, clips, first_seed, share, classes)
    with renderers(sum(len(tasks) for _, tasks in shards), share=share.step or 1) as render:
        for path, tasks in tqdm(shards, desc="rendering latents", mininterval=10):
            write_latents(path, render(tasks), torch.tensor([label for label, _ in tasks]), video, audio)


@torch.no_grad()
def write_latents(path: Path, clips: Iterable[Rendered], labels: Tensor, video: VideoCodec, audio: AudioCodec) -> None:
    """Encode ``clips`` into a shard of ``video`` (n, F, C, h, w) and ``audio`` (n, C, T, f) float16 latents."""
    pictures, sounds = [], []
    for frames, sound in clips:
        x = torch.from_numpy(frames).to(video.device).permute(0, 3, 1, 2)[None] / 127.5 - 1
        # Halved once all are joined: on a CPU autocast joins no 16-bit floats of this kind.
        pictures.append(video.encode(x).float().cpu())
        sounds.append(audio.encode(torch.from_numpy(sound).to(audio.device)[None]).float().cpu())
    write_shard(path, {"video": torch.cat(pictures).half(), "audio": torch.cat(sounds).half(), "label": labels})


def encode_shards(source: Path, out: Path, video: VideoCodec, audio: AudioCodec, share: slice = slice(None)) -> None:
    """Encode every shard of ``source``, as :func:`write_latents` does."""
    for path in tqdm(sorted(Path(source).glob("clips-*.safetensors"))[share], desc="encoding shards", mininterval=10):
        if (Path(out) / path.name).exists():
            continue
        with safe_open(path, "pt") as file:
            pictures, sounds, labels = file.get_slice("frames"), file.get_tensor("audio"), file.get_tensor("label")
            clips = ((pictures[i : i + 1][0].numpy(), sound.numpy()) for i, sound in enumerate(sounds))
            write_latents(Path(out) / path.name, clips, labels, video, audio)


class Shards:
    """Items of all shards in a folder by index, read from the mapped files when they are asked for.

    Raises:
        ValueError: where the folder holds no shard.
    """

    def __init__(self, folder: Path) -> None:
        paths = sorted(Path(folder).rglob("clips-*.safetensors"))
        self.files = [safe_open(path, "pt") for path in paths]
        if not self.files:
            raise ValueError(f"{folder} holds no shards (clips-*.safetensors)")
        self.index = [(file, i) for file in self.files for i in range(file.get_slice("label").get_shape()[0])]
        self.nbytes = sum(path.stat().st_size for path in paths)
        self.whole: dict[str, Tensor] = {}  # where they are resident: all items of all files, one after the other
        self.places = torch.empty(0, dtype=torch.long)  # there, of each item

    def __len__(self) -> int:
        return len(self.index)

    def picked(self, items: Tensor) -> "Shards":
        """The same files with ``items`` (n,) in place of all items; one may be there several times."""
        some = copy.copy(self)
        some.index = [self.index[item] for item in items.tolist()]
        some.places = self.places[items.to(self.places.device)] if self.whole else self.places
        return some

    def resident(self, device: torch.device | str) -> "Shards":
        """The same with all of it in the memory of ``device``, where :meth:`get` gives it from then on."""
        some, start, first = copy.copy(self), 0, {}
        for file in self.files:
            first[file] = start
            start += file.get_slice("label").get_shape()[0]
        keys = list(self.files[0].keys())
        some.whole = {key: torch.cat([file.get_tensor(key) for file in self.files]).to(device) for key in keys}
        some.places = torch.tensor([first[file] + i for file, i in self.index], device=device)
        return some

    def get(self, key: str, items: Tensor, part: Tensor | None = None) -> Tensor:
        """``key`` of the ``items`` (n,), stacked; ``part`` (n,) picks one entry of each along its first axis."""
        if self.whole:
            items, part = (x if x is None else x.to(self.places.device, non_blocking=True) for x in (items, part))
            at, values = self.places[items], self.whole[key]
            return values[at] if part is None else values[at, part]
        rows = []
        for k, item in enumerate(items.tolist()):
            file, i = self.index[item]
            view = file.get_slice(key)
            if part is None:
                rows.append(view[i])
            else:
                rows.append(view[i, int(part[k])])
        return torch.stack(rows)


class RandomShards:
    """Stands in for :class:`Shards` where only time and memory are measured: noise of the same shapes."""

    def __init__(
        self,
        clip: ClipGeometry,
        classes: int,
        latents: bool = True,
        device: torch.device | str = "cpu",
        remade: int = 0,
        made: int = 0,
    ) -> None:
        self.classes, self.device = classes, device
        self.shapes = {
            "video": (clip.frames, *clip.video_latent_shape),
            "remade": (remade, clip.frames, *clip.video_latent_shape),
            "made": (made, clip.frames, *clip.video_latent_shape),
            "audio": clip.audio_latent_shape if latents else (clip.samples,),
            "frames": (clip.frames, clip.height, clip.width, 3),
        }

    def __len__(self) -> int:
        return 1024

    def get(self, key: str, items: Tensor, part: Tensor | None = None) -> Tensor:
        if key == "label":
            return (items % self.classes).to(self.device)
        shape = (len(items), *self.shapes[key][0 if part is None else 1 :])
        if key == "frames":
            return torch.randint(256, shape, dtype=torch.uint8, device=self.device)
        return torch.randn(shape, device=self.device)
