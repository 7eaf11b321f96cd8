"""The clips that are measured: rendered ones, the same through the codecs, and those that a model makes for a task."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from avdit.data.scenes import render_clip
from avdit.generate import Request, resolved, settings_of
from avdit.pipeline import AVDiTPipeline
from avdit.streaming import OVERLAP, Window, windows

TASKS = {
    "joint": "picture and sound from the class",
    "v2a": "the sound of a held-out picture",
    "a2v": "the picture of a held-out sound",
    "image": "both from the first frame of a held-out clip",
    "continuation": f"window after window, each from the last {OVERLAP} frames and their sound",
}
GIVEN = {"v2a": "video", "a2v": "audio"}  # what a task is given whole, and so is not measured


@dataclass(frozen=True)
class Sample:
    """A clip to be measured.

    Where it is the last window of a stream, ``first`` is that stream's first one, and the first ``given`` frames with
    their sound are the window's before.
    """

    label: str
    frames: np.ndarray  # (F, H, W, 3) in [0, 1]
    audio: np.ndarray  # (samples,)
    first: Window | None = None
    given: int = 0


@dataclass(frozen=True)
class Sampling:
    """How a model's clips are made."""

    task: str = "joint"
    steps: int = 12
    guidance: float = Request.guidance
    joint_guidance: float = Request.joint_guidance
    sampler: str = "ddim"
    windows: int = 2  # of a continuation
    batch: int = 4  # clips at a time

    def resolved(self, pipe: AVDiTPipeline, label: str) -> "Sampling":
        """With the steps and the guidance that turbo adapters want, where they are asked for."""
        request = resolved(pipe, self.request(label))
        return replace(self, steps=request.steps, guidance=request.guidance, joint_guidance=request.joint_guidance)

    def request(self, label: str) -> Request:
        """What a user would ask for to get such a clip of a class."""
        return Request(
            label,
            steps=self.steps,
            guidance=self.guidance,
            joint_guidance=self.joint_guidance,
            sampler=self.sampler,
        )


def rendered(classes: list[str], seeds: range, pipe: AVDiTPipeline) -> Iterator[Sample]:
    """The clips ``seeds`` of every class as they are rendered."""
    for name in classes:
        for seed in seeds:
            clip = render_clip(name, seed, pipe.geometry)
            yield Sample(name, clip.frames.numpy(), clip.audio.numpy())


@torch.no_grad()
def through_codecs(pipe: AVDiTPipeline, sample: Sample, precision: torch.autocast) -> Sample:
    """``sample`` encoded and decoded: the best that a model in these latents can do."""
    frames = torch.from_numpy(sample.frames).permute(0, 3, 1, 2).unsqueeze(0) * 2 - 1
    with precision:
        latents = pipe.video_codec.encode(frames.to(pipe.device, pipe.dtype))
        sound = pipe.audio_codec.encode(torch.from_numpy(sample.audio)[None].to(pipe.device, pipe.dtype))
        rebuilt, audio = pipe.decode(latents, sound)
    return replace(sample, frames=rebuilt[0], audio=audio[0])


def made(
    pipe: AVDiTPipeline,
    sampling: Sampling,
    classes: list[str],
    clips: int,
    conditions: int,
    precision: torch.autocast,
) -> Iterator[Sample]:
    """``clips`` clips of each of ``classes``, all of one pack, made by ``pipe`` with the seeds 0, 1, ….

    Args:
        conditions: The first seed of the rendered clips whose picture, sound or first frame a task is given.
        precision: Entered for the pipeline's work alone, never for what measures it.
    """
    order = [(name, seed) for name in classes for seed in range(clips)]
    if sampling.task == "continuation":
        for name, seed in order:
            yield streamed(pipe, sampling, name, seed, precision)
        return
    asked = settings_of(sampling.request(classes[0]))
    pipe.set_sampler(asked.pop("sampler"))
    del asked["class_labels"]
    for start in range(0, len(order), sampling.batch):
        some = order[start : start + sampling.batch]
        given: dict[str, Any] = {}
        if sampling.task != "joint":
            known = [render_clip(name, conditions + seed, pipe.geometry) for name, seed in some]
            if sampling.task == "v2a":
                given = {"video": torch.stack([clip.frames for clip in known])}
            elif sampling.task == "a2v":
                given = {"audio": torch.stack([clip.audio for clip in known])}
            else:
                given = {"image": torch.stack([clip.frames[0] for clip in known])}
        with precision:
            out = pipe(
                [name for name, _ in some],
                generator=[torch.Generator().manual_seed(seed) for _, seed in some],
                **asked,
                **given,
            )
        # What was given is shown as it is, not as the codec keeps it.
        frames = given["video"].numpy() if "video" in given else out.frames
        audio = given["audio"].numpy() if "audio" in given else out.audio
        for (name, _), picture, sound in zip(some, frames, audio, strict=True):
            yield Sample(name, picture, sound)


def streamed(
    pipe: AVDiTPipeline, sampling: Sampling, name: str, seed: int, precision: contextlib.AbstractContextManager
) -> Sample:
    """The last window of a stream of one class, with its first one."""

    clip = pipe.geometry
    parts: list[Window] = []
    generator = torch.Generator().manual_seed(seed)
    asked = partial(settings_of, sampling.request(name))
    for part in windows(pipe, asked, generator, sampling.windows, turn=lambda: precision):
        parts.append(part)
        if len(parts) > 4:  # the first window lies in the first two parts, the last one is whole
            del parts[2]
    frames, audio = (np.concatenate([part[k] for part in parts[:2]]) for k in (0, 1))
    first = frames[: clip.frames], audio[: clip.samples]
    return Sample(name, *parts[-1], first, OVERLAP)
