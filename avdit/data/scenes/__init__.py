"""Procedural clips with known truth: one event timeline, drawn from a seed, drives picture and sound."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from avdit.data.scenes import dance, fire, sky, water
from avdit.data.scenes.base import Clip, Dice, Event, Renderer
from avdit.data.scenes.genres import GENRES
from avdit.geometry import ClipGeometry

LANDSCAPE: dict[str, Renderer] = {
    "explosion": fire.explosion,
    "fire crackling": fire.fire_crackling,
    "raining": sky.raining,
    "splashing water": water.splashing_water,
    "squishing water": water.squishing_water,
    "thunder": sky.thunder,
    "underwater bubbling": water.underwater_bubbling,
    "waterfall burbling": water.waterfall_burbling,
    "wind noise": sky.wind_noise,
}
RENDERERS: dict[str, Renderer] = LANDSCAPE | {genre: partial(dance.dance, genre=genre) for genre in GENRES}
CLASSES = tuple(LANDSCAPE)
PACKS = {"landscape": CLASSES, "dance": GENRES}
ALL_CLASSES = tuple(RENDERERS)
# PyTorch's CPU generator heeds the lowest 32 bits of a seed alone, so all ranges lie within them (clip_seed).
JUDGES = 1 << 26  # seeds from here to HELD_OUT teach the judges of the evaluation, and nothing else
HELD_OUT = 1 << 27  # seeds from here on are never trained on
SEEDS = (1 << 32) // len(ALL_CLASSES)  # from here on clips would repeat

__all__ = [
    "ALL_CLASSES",
    "CLASSES",
    "GENRES",
    "HELD_OUT",
    "JUDGES",
    "PACKS",
    "SEEDS",
    "Clip",
    "Dice",
    "Event",
    "clip_seed",
    "render",
    "render_clip",
]


def clip_seed(label: int, seed: int) -> int:
    """The generator's seed for clip ``seed`` of class ``label``: classes never share a stream."""
    return seed * len(ALL_CLASSES) + label


def render_clip(
    label: str | int, seed: int, geometry: ClipGeometry | None = None, device: torch.device | str = "cpu"
) -> Clip:
    """Render one clip of class ``label``.

    Args:
        label: A name of :data:`ALL_CLASSES` or its index.
        seed: 0 or more and below :data:`SEEDS`; below :data:`JUDGES` for training.
        geometry: Frames, size and rates; that of ``avdit-xs`` by default.
        device: Where the pixels are computed. Draws are made on the CPU, so layouts agree everywhere.

    Raises:
        ValueError: for a class that does not exist, or a seed that is negative or :data:`SEEDS` or more.
    """
    if label not in RENDERERS and not (isinstance(label, int) and 0 <= label < len(ALL_CLASSES)):
        raise ValueError(f"unknown class {label!r}: choose one of {', '.join(ALL_CLASSES)}")
    if seed < 0:
        raise ValueError(f"seed {seed} must be 0 or more")
    if seed >= SEEDS:
        raise ValueError(f"seed {seed} must be below {SEEDS}: from there on clips repeat")
    index = label if isinstance(label, int) else ALL_CLASSES.index(label)
    with torch.no_grad():
        return RENDERERS[ALL_CLASSES[index]](Dice(clip_seed(index, seed), device), geometry or ClipGeometry())


def render(
    labels: Sequence[str | int],
    seeds: Sequence[int],
    geometry: ClipGeometry | None = None,
    device: torch.device | str = "cpu",
    return_events: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, list[list[Event]]]:
    """Render a batch: frames (B, F, H, W, 3) in [0, 1], audio (B, samples), and the events where asked."""
    clips = [render_clip(label, seed, geometry, device) for label, seed in zip(labels, seeds, strict=True)]
    frames, audio = torch.stack([c.frames for c in clips]), torch.stack([c.audio for c in clips])
    return (frames, audio, [c.events for c in clips]) if return_events else (frames, audio)
