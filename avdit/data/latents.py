"""Shards of rendered clips and of their latents, written once and mapped, never loaded whole."""

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
        self.files = [safe_open(path, "pt") for path in sorted(Path(folder).rglob("clips-*.safetensors"))]
        if not self.files:
            raise ValueError(f"{folder} holds no shards (clips-*.safetensors)")
        self.index = [(file, i) for file in self.files for i in range(file.get_slice("label").get_shape()[0])]

    def __len__(self) -> int:
        return len(self.index)

    def picked(self, items: Tensor) -> "Shards":
        """The same files with ``items`` (n,) in place of all items; one may be there several times."""
        some = copy.copy(self)
        some.index = [self.index[item] for item in items.tolist()]
        return some

    def get(self, key: str, items: Tensor, part: Tensor | None = None) -> Tensor:
        """``key`` of the ``items`` (n,), stacked; ``part`` (n,) picks one entry of each along its first axis."""
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

    def __init__(self, clip: ClipGeometry, classes: int, latents: bool = True) -> None:
        self.classes = classes
        self.shapes = {
            "video": (clip.frames, *clip.video_latent_shape),
            "audio": clip.audio_latent_shape if latents else (clip.samples,),
            "frames": (clip.frames, clip.height, clip.width, 3),
        }

    def __len__(self) -> int:
        return 1024

    def get(self, key: str, items: Tensor, part: Tensor | None = None) -> Tensor:
        if key == "label":
            return items % self.classes
        shape = (len(items), *self.shapes[key][0 if part is None else 1 :])
        return torch.randint(256, shape, dtype=torch.uint8) if key == "frames" else torch.randn(shape)
