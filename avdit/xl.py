"""``avdit-xl``, the paper's scale: published DiT-XL/2, Stable Diffusion and AudioLDM weights with fresh adapters.

    python -m avdit assemble-xl --out avdit-xl --accept-licences

Each part is a hub name or a path. The adapters' sizes are ours, since the paper's are not public: with nine
classes 94,968,224 of 770,097,856 parameters train, 12.3 %.
"""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from transformers import SpeechT5HifiGan

from avdit.data.scenes import CLASSES, GENRES
from avdit.geometry import ClipGeometry
from avdit.models.audio_codec import AudioCodec
from avdit.models.avdit import AVDiT
from avdit.models.convert import load_dit
from avdit.models.dit import DiT
from avdit.models.published import load_checked, locate, quiet
from avdit.models.schedule import xl_scheduler
from avdit.models.video_codec import VideoCodec
from avdit.pipeline import AVDiTPipeline

SOURCES = {
    "dit": "facebook/DiT-XL-2-256",
    "vae": "stabilityai/sd-vae-ft-ema",
    "audio_vae": "cvssp/audioldm-s-full-v2",
    "vocoder": "cvssp/audioldm-s-full-v2",
}
PARTS = {"dit": "transformer", "vae": "vae", "audio_vae": "vae", "vocoder": "vocoder"}
XL_ADAPTERS = {
    "temporal_width": 384,
    "lora_rank": 64,
    "interaction_rank": 64,
    "interaction_every": 2,
    "interaction_pool": 1,  # the joint attention sees every token, as in the paper
    "exchange_features": 0,
    "anchor_rank": 0,
    "neighbour_rank": 0,
    "temporal_rank": 0,
    "image_rank": 0,
    "shared_noise": 0.0,  # the paper names none; avdit-xs learns faster with 0.5
}
MAY_BE_NONE = "exchange_features", "anchor_rank", "neighbour_rank", "temporal_rank", "image_rank", "shared_noise"
LARGEST_SHARE = 0.2  # of all parameters, that may train
CLASS_SETS = {"landscape": list(CLASSES), "dance": list(GENRES)}
CARD = """---
license: other
library_name: diffusers
---
# avdit-xl, assembled

Frozen weights of others and fresh adapters, which have learned nothing yet. Their licences hold for this folder and
for what is made from it: as published, DiT is CC BY-NC 4.0 and AudioLDM CC BY-NC-SA 4.0, so no commercial use.

| part | from |
|---|---|
"""


def class_names(text: str) -> list[str]:
    """``landscape``, ``dance``, or names with commas between.

    Raises:
        ValueError: where a name is empty or comes twice.
    """
    names = CLASS_SETS.get(text) or [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) != len(names):
        raise ValueError(f"classes {text!r} must be landscape, dance, or different names with commas between")
    return names


def expect(source: str | Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ``ValueError`` naming the first setting of a published part that does not fit the geometry."""
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(f"{source} cannot be used: its {name} is {found[name]}, not {value}")


def vae_shape(vae: AutoencoderKL) -> dict[str, int]:
    c = vae.config
    factor = 2 ** (len(c.block_out_channels) - 1)
    return {"in_channels": c.in_channels, "latent_channels": c.latent_channels, "factor": factor}


def joint_model(dit: DiT, geometry: ClipGeometry, classes: Sequence[str], adapters: dict[str, float]) -> AVDiT:
    """Fresh adapters round a published image transformer; every class starts as its unconditional one.

    Raises:
        ValueError: where the transformer is of another latent size, or too much would train.
    """
    channels, side, _ = geometry.video_latent_shape
    wanted = {"input_size": side, "in_channels": channels, "patch_size": geometry.video_patch}
    expect("the DiT", dict(dit.config), wanted)
    for name, value in adapters.items():
        least = 0 if name in MAY_BE_NONE else 1
        if value < least:
            raise ValueError(f"{name} {value} must be {least} or more")
    unconditional = [dit.config.num_classes] * len(classes)
    model = AVDiT.from_backbone(dit, geometry, unconditional, num_classes=len(classes), **adapters)
    if model.trainable_share > LARGEST_SHARE:
        raise ValueError(
            f"{model.trainable_share:.1%} of the parameters would train with {adapters}: choose ranks and widths "
            f"with at most {LARGEST_SHARE:.0%}"
        )
    return model


def assemble(
    out: Path,
    sources: dict[str, str] | None = None,
    classes: Sequence[str] = CLASSES,
    accept_licences: bool = False,
    dtype: torch.dtype = torch.float32,
    adapters: dict[str, float] | None = None,
) -> AVDiT:
    """Save a pipeline folder of published parts and fresh adapters; returns its joint model.

    Args:
        out: A folder that is not there yet; it is written whole or not at all.
        sources: Hub name or path of ``dit``, ``vae``, ``audio_vae`` and ``vocoder``, where not :data:`SOURCES`.
        accept_licences: Whether what is not on this machine may be downloaded.
        adapters: Widths and ranks that differ from :data:`XL_ADAPTERS`.

    Raises:
        ValueError: for a part that is missing or does not fit, naming it and the first wrong key or size.
    """
    out, geometry, sources = Path(out), ClipGeometry.xl(), {**SOURCES, **(sources or {})}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: give a new folder")
    places = dict(zip(SOURCES, locate([(sources[p], PARTS[p]) for p in SOURCES], accept_licences), strict=True))

    vae = load_checked(AutoencoderKL, places["vae"])
    expect(
        sources["vae"],
        vae_shape(vae),
        {"in_channels": 3, "latent_channels": geometry.video_channels, "factor": geometry.video_factor},
    )
    audio_vae = load_checked(AutoencoderKL, places["audio_vae"])
    expect(
        sources["audio_vae"],
        vae_shape(audio_vae),
        {"in_channels": 1, "latent_channels": geometry.audio_channels, "factor": geometry.audio_factor},
    )
    vocoder = load_checked(SpeechT5HifiGan, places["vocoder"])
    voice = {"hop_length": math.prod(vocoder.config.upsample_rates), **vocoder.config.to_dict()}
    expect(
        sources["vocoder"],
        voice,
        {
            "model_in_dim": geometry.mel_bins,
            "hop_length": geometry.hop_length,
            "sampling_rate": geometry.sampling_rate,
        },
    )
    model = joint_model(load_dit(places["dit"]), geometry, classes, {**XL_ADAPTERS, **(adapters or {})})

    scheduler: DDIMScheduler = xl_scheduler()
    codecs = VideoCodec.from_vae(vae), AudioCodec.from_parts(audio_vae, vocoder)
    pack = next((name for name, known in CLASS_SETS.items() if known == list(classes)), "own")
    pipe = AVDiTPipeline(model, *codecs, scheduler, classes=list(classes), pack=pack)
    with quiet():  # diffusers warns of parts that should stay in 32-bit floats and names none
        pipe.to(dtype)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        pipe.save_pretrained(part, max_shard_size="5GB")
        (part / "README.md").write_text(CARD + "".join(f"| {p} | {sources[p]} |\n" for p in SOURCES))
        if out.is_dir():
            out.rmdir()
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return model
