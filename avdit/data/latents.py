"""Shards of rendered clips and of their latents, written once and mapped; loaded whole where a GPU has the memory."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from avdit.data.scenes import ALL_CLASSES, CLASSES, render_clip
from avdit.geometry import ClipGeometry
from avdit.models.audio_codec import AudioCodec
from avdit.models.video_codec import VideoCodec

SHARD = 9  # rounds over the classes a shard


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one shard whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)  # codecs work channels last
    os.replace(part, path)


def render_shards(
    out: Path,
    clips: int,
    first_seed: int = 0,
    geometry: ClipGeometry | None = None,
    share: slice = slice(None),
    classes: Sequence[str] = CLASSES,
) -> None:
    """Render ``clips`` clips of every class into shards of ``frames`` (n, F, H, W, 3) uint8, ``audio``, ``label``.

    Labels are the places of the classes in ``ALL_CLASSES``. Shards that are there already are kept, so that an
    interrupted run goes on where it stopped. ``share`` picks the shards that this process makes.
    """
    labels = [ALL_CLASSES.index(name) for name in classes]
    starts = range(first_seed, first_seed + clips, SHARD)[share]
    for start in tqdm(starts, desc="rendering shards", mininterval=10):
        path = Path(out) / f"clips-{start:08d}.safetensors"
        if path.exists():
            continue
        seeds = range(start, min(start + SHARD, first_seed + clips))
        rendered = [(label, render_clip(label, seed, geometry)) for seed in seeds for label in labels]
        frames = torch.stack([(clip.frames * 255).round().to(torch.uint8) for _, clip in rendered])
        audio = torch.stack([clip.audio for _, clip in rendered]).float()
        write_shard(path, {"frames": frames, "audio": audio, "label": torch.tensor([i for i, _ in rendered])})


@torch.no_grad()
def render_latents(
    out: Path,
    clips: int,
    video: VideoCodec,
    audio: AudioCodec,
    first_seed: int = 0,
    share: slice = slice(None),
    classes: Sequence[str] = CLASSES,
    device: torch.device | str | None = None,
) -> None:
    """Render clips as :func:`render_shards` does and keep only their latents, as :func:`encode_shards` makes them.

    Frames take twenty times the room of their latents. Shards that are there already are kept.

    Args:
        device: Where the pictures are drawn; where the video codec is by default.
    """
    labels = [ALL_CLASSES.index(name) for name in classes]
    starts = range(first_seed, first_seed + clips, SHARD)[share]
    for start in tqdm(starts, desc="rendering latents", mininterval=10):
        path = Path(out) / f"clips-{start:08d}.safetensors"
        if path.exists():
            continue
        rows: dict[str, list[Tensor]] = {"video": [], "audio": []}
        seeds = range(start, min(start + SHARD, first_seed + clips))
        for seed in seeds:
            for label in labels:
                clip = render_clip(label, seed, device=device or video.device)
                frames = (clip.frames.to(video.device) * 255).round() / 127.5 - 1  # as 8 bits have them
                rows["video"].append(video.encode(frames.movedim(-1, 1)[None])[0].float().cpu())
                rows["audio"].append(audio.encode(clip.audio[None].to(audio.device))[0].float().cpu())
        tensors = {name: torch.stack(values).half() for name, values in rows.items()}
        write_shard(path, {**tensors, "label": torch.tensor(labels * len(seeds))})


def encode_shards(source: Path, out: Path, video: VideoCodec, audio: AudioCodec, share: slice = slice(None)) -> None:
    """Encode every shard of ``source`` into ``video`` (n, F, C, h, w) and ``audio`` (n, C, T, f) float16 latents."""
    paths = sorted(Path(source).glob("clips-*.safetensors"))[share]
    for path in tqdm(paths, desc="encoding shards", mininterval=10):
        target = Path(out) / path.name
        if target.exists():
            continue
        with safe_open(path, "pt") as file, torch.no_grad():
            pictures, latents = file.get_slice("frames"), []
            for i in range(pictures.get_shape()[0]):
                frames = pictures[i : i + 1].to(video.device).permute(0, 1, 4, 2, 3) / 127.5 - 1
                # Halved once all are joined: on a CPU autocast joins no 16-bit floats of this kind.
                latents.append(video.encode(frames).float().cpu())
            sound = audio.encode(file.get_tensor("audio").to(audio.device)).half().cpu()
            label = file.get_tensor("label")
        write_shard(target, {"video": torch.cat(latents).half(), "audio": sound, "label": label})


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
        self, clip: ClipGeometry, classes: int, latents: bool = True, device: torch.device | str = "cpu"
    ) -> None:
        self.classes, self.device = classes, device
        self.shapes = {
            "video": (clip.frames, *clip.video_latent_shape),
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
