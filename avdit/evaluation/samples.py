"""Many clips of a model for the field's distances, made by any number of processes and kept in shards.

    python -m avdit samples --checkpoint DIR --clips 2048 --out samples
    torchrun --standalone --nproc_per_node 8 -m avdit samples --checkpoint DIR --clips 2048 --out samples

A clip's class and seed follow from its number alone, so the clips are the same however many processes made them. A
shard that is there is done, so an interrupted run goes on where it stopped; ``samples.json`` tells what the clips are.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from avdit.data.latents import write_shard
from avdit.evaluation.tasks import Sampling
from avdit.generate import weights_sha256, whole
from avdit.pipeline import AVDiTPipeline

NOTE = "samples.json"


@dataclass(frozen=True)
class Shard:
    """Clips of one class, made in one call of the pipeline."""

    number: int
    label: int  # in the classes that were asked for
    seeds: range  # the clips' numbers


def shards_of(clips: int, classes: int, batch: int) -> list[Shard]:
    """``clips`` clips spread evenly over ``classes`` classes, one class after another, at most ``batch`` a shard."""
    found: list[Shard] = []
    first = 0
    for label in range(classes):
        end = first + clips // classes + (label < clips % classes)
        for start in range(first, end, batch):
            found.append(Shard(len(found), label, range(start, min(start + batch, end))))
        first = end
    return found


def shard_path(out: Path, shard: Shard) -> Path:
    return out / f"clips-{shard.number:08d}.safetensors"


def settings_of(pipe: AVDiTPipeline, clips: int, sampling: Sampling, classes: Sequence[str]) -> dict[str, Any]:
    """What makes the clips again, as JSON knows it.

    Raises:
        ValueError: for a setting that cannot be, or a class that the model does not have.
    """
    whole(clips, "--clips", 1, 10_000_000)
    whole(sampling.batch, "--batch", 1, 1024)
    for name in classes:
        sampling.request(name).validate(pipe.classes)
    return {
        "clips": clips,
        "classes": list(classes),
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "joint_guidance": sampling.joint_guidance,
        "sampler": sampling.sampler,
        "batch": sampling.batch,
        "geometry": pipe.geometry.as_dict(),
        "weights_sha256": weights_sha256(Path(pipe.name_or_path)) if pipe.name_or_path else None,
    }


def read_note(folder: Path) -> dict[str, Any] | None:
    """What ``samples.json`` of a folder says; None where it has none.

    Raises:
        ValueError: where it is damaged.
    """
    path = folder / NOTE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError:
        raise ValueError(f"{path} is damaged: give another folder") from None


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Write ``samples.json``, or see that the one that is there says the same.

    Raises:
        ValueError: where ``out`` holds clips of other settings, naming the first that differs.
    """
    known = read_note(out)
    if known is None:
        if out.exists() and (not out.is_dir() or any(out.glob("clips-*"))):
            raise ValueError(f"{out} holds something else: give a new folder")
        out.mkdir(parents=True, exist_ok=True)
        # Several processes may write it at once, and all write the same.
        part = out / f"{NOTE}.{os.getpid()}.part"
        part.write_text(json.dumps(settings, indent=1))
        os.replace(part, out / NOTE)
        return
    for name, value in settings.items():
        if known.get(name) != value:
            raise ValueError(f"{out} holds clips of other settings: {name} is {known.get(name)}, not {value}")


@torch.no_grad()
def write_samples(
    pipe: AVDiTPipeline,
    out: Path,
    clips: int,
    sampling: Sampling,
    classes: Sequence[str] | None = None,
    share: slice = slice(None),
) -> dict[str, int]:
    """Make the shards of ``share`` that are missing in ``out``.

    Each holds ``frames`` (n, F, H, W, 3) uint8, ``audio`` (n, samples) float32 and ``label`` (n,).

    Returns:
        ``clips`` and ``shards`` in all, and ``made``, the shards that this call made.

    Raises:
        ValueError: for settings that cannot be, or that are not those of the clips in ``out``.
    """
    names = list(classes or pipe.classes)
    claim(out, settings_of(pipe, clips, sampling, names))
    pipe.set_sampler(sampling.sampler)
    shards = shards_of(clips, len(names), sampling.batch)
    missing = [shard for shard in shards[share] if not shard_path(out, shard).exists()]
    for shard in tqdm(missing, desc="making clips, shards", mininterval=10, disable=not missing):
        made = pipe(
            [names[shard.label]] * len(shard.seeds),
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            joint_guidance_scale=sampling.joint_guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in shard.seeds],
            output_type="pt",
        )
        tensors = {
            "frames": (made.frames.float().cpu() * 255).round().to(torch.uint8).contiguous(),
            "audio": made.audio.float().cpu().contiguous(),
            "label": torch.full((len(shard.seeds),), shard.label),
        }
        write_shard(shard_path(out, shard), tensors)
    return {"clips": clips, "shards": len(shards), "made": len(missing)}
