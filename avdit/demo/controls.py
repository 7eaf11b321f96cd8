"""What is chosen on the page: the pack, its classes as pictures, and samples with which a tab is tried."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from avdit.demo.looks import ASSETS, thumbnail
from avdit.generate import SAMPLERS, TURBO

SURPRISE = "surprise me"
SAMPLES = ASSETS / "samples"  # made by assets/samples.py
SUFFIXES = {"video": ".mp4", "sound": ".wav", "picture": ".jpg"}

Packs = Mapping[str, Sequence[str]]  # the classes of each pack, the default pack first


def pack_of(packs: Packs, label: str) -> str:
    """The pack that a class belongs to; the default one for what is no class."""
    return next((name for name, classes in packs.items() if label in classes), next(iter(packs)))


def one_of(packs: Packs, pack: str | None, label: str) -> str:
    """``label``; where it is ``SURPRISE``, a class of ``pack``, or of any pack where none is named."""
    if label != SURPRISE:
        return label
    return random.choice(packs[pack] if pack in packs else [name for classes in packs.values() for name in classes])


def class_gallery(packs: Packs) -> tuple[gr.Radio, gr.Radio]:
    """The choices of pack, seen where there are several, and of class."""
    first = next(iter(packs))
    pack = gr.Radio(list(packs), value=first, label="Pack", elem_id="packs", visible=len(packs) > 1)
    return pack, gr.Radio([*packs[first], SURPRISE], value=packs[first][0], label="Class", elem_id="classes")


def chosen(packs: Packs, label: str) -> tuple[str, dict[str, Any]]:
    """Values for both choices that show the pack of ``label`` with this class chosen."""
    pack = pack_of(packs, label)
    return pack, gr.update(choices=[*packs[pack], SURPRISE], value=label)


def sampler_choice(turbo_steps: int | None) -> gr.Radio:
    """The choice of sampler; turbo first where there are adapters for it."""
    names = _samplers(turbo_steps)
    return gr.Radio(names, value=names[0], label="Sampler", info=_about(turbo_steps), elem_id="sampler")


def fitting_sampler(turbo_steps: int | None, now: str) -> dict[str, Any]:
    """An update of that choice for the classes of another pack; ``now`` stays chosen where it can."""
    names = _samplers(turbo_steps)
    return gr.update(choices=names, value=now if now in names else names[0], info=_about(turbo_steps))


def _samplers(turbo_steps: int | None) -> list[str]:
    return [*([TURBO] if turbo_steps else []), *SAMPLERS]


def _about(turbo_steps: int | None) -> str:
    others = "take steps and guidance as set below"
    told = f"turbo takes {turbo_steps} steps without guidance; the others {others}" if turbo_steps else f"all {others}"
    return f"{told}. Sound may follow its picture in a few more"


def samples_of(noun: str, classes: Sequence[str]) -> dict[str, Path]:
    """The sample files of a ``video``, ``sound`` or ``picture`` by their classes, as far as these are known."""
    files = {label: SAMPLES / f"{label.replace(' ', '-')}{SUFFIXES[noun]}" for label in classes}
    return {label: file for label, file in files.items() if file.is_file()}


def sample_buttons(noun: str, classes: Sequence[str]) -> dict[gr.Button, tuple[str, Path]]:
    """A button for each sample; with the class and the file that it stands for."""
    samples = samples_of(noun, classes)
    if not samples:
        return {}
    with gr.Row(elem_classes="samples"):
        gr.Markdown(f"No {noun} at hand? Try one of these:")
        return {
            gr.Button(label, icon=thumbnail(label), size="sm", min_width=0, elem_id=f"{noun}-{k}"): (label, file)
            for k, (label, file) in enumerate(samples.items())
        }
