"""What ``python -m avdit evaluate`` measures, on held-out seeds."""

from typing import Any

import numpy as np
import torch

from avdit.data.scenes import HELD_OUT, render_clip
from avdit.evaluation.codecs import evaluate_codecs
from avdit.evaluation.sync import EVENT_CLASSES, sync_scores
from avdit.generate import Request, generate
from avdit.pipeline import AVDiTPipeline

PARTS = ("codecs", "sync")


def evaluate(pipe: AVDiTPipeline, clips: int, parts: tuple[str, ...] = PARTS, steps: int = 12) -> dict[str, Any]:
    """Measure ``parts`` of a pipeline over ``clips`` clips of every class.

    Raises:
        ValueError: for a number of clips below one, or below two where synchrony is measured.
    """
    if clips < 1:
        raise ValueError(f"--clips {clips} must be 1 or more")
    report: dict[str, Any] = {"clips": clips}
    report["settings"] = {
        "steps": steps,
        "guidance": 2.0,
        "sampler": "ddim",
        "first_seed": 0,
        "held_out_from": HELD_OUT,
    }
    report["settings"]["threads"] = torch.get_num_threads()
    if "codecs" in parts:
        held_out = [render_clip(name, HELD_OUT + k) for name in pipe.classes for k in range(clips)]
        report |= evaluate_codecs(pipe, held_out)
    if "sync" in parts:
        report["sync"] = evaluate_sync(pipe, clips, steps)
    return report


def evaluate_sync(pipe: AVDiTPipeline, clips: int, steps: int) -> dict[str, float]:
    """Synchrony of generated clips of the event classes; beside it that of rendered clips through the codecs."""
    names = [name for name in EVENT_CLASSES if name in pipe.classes]
    rates = {"fps": pipe.geometry.fps, "sampling_rate": pipe.geometry.sampling_rate}
    made, real = [], []
    for name in names:
        for seed in range(clips):
            result = generate(pipe, Request(name, seed=seed, steps=steps))
            made.append((result.frames, result.audio))
            real.append(through_codecs(pipe, name, HELD_OUT + seed))
    return {
        **sync_scores(made, **rates),
        "codec_floor": sync_scores(real, **rates)["within_100ms"],
        "samples": len(made),
    }


@torch.no_grad()
def through_codecs(pipe: AVDiTPipeline, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A rendered clip, encoded and decoded: frames (F, H, W, 3) and audio (samples,)."""
    clip = render_clip(name, seed)
    frames = clip.frames.permute(0, 3, 1, 2).unsqueeze(0) * 2 - 1
    latents = pipe.video_codec.encode(frames.to(pipe.device, pipe.dtype))
    sound = pipe.audio_codec.encode(clip.audio[None].to(pipe.device, pipe.dtype))
    rebuilt, audio = pipe.decode(latents, sound)
    return rebuilt[0], audio[0]
