"""The one generation function, behind the page, the API and the command line."""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from avdit import media
from avdit.checkpoint import DEFAULT_CHECKPOINT, weight_files, weights_sha256
from avdit.streaming import OVERLAP, Window, windows

if TYPE_CHECKING:
    from avdit.pipeline import AVDiTPipeline

SAMPLERS = "ddim", "dpm++", "unipc"  # the pipeline's, whose import takes seconds
TURBO = "turbo"  # in place of a sampler's name: few steps by adapters that were distilled for them
MAX_SEED = 2**63 - 1
OnStep = Callable[[int, int, torch.Tensor], None]


class Stopped(Exception):
    """The user asked for the generation to stop."""


@dataclass(frozen=True)
class Request:
    """What a user asks for; ``video``, ``audio`` and ``image`` are paths of files that are given.

    Of a video or a sound, as much is used as a clip is long, from ``start`` seconds on.
    """

    class_label: str
    seed: int = 0
    steps: int = 12
    guidance: float = 2.0
    audio_guidance: float | None = None
    joint_guidance: float = 5.0
    sampler: str = "ddim"
    seconds: float = 1.6
    video: str | None = None
    audio: str | None = None
    image: str | None = None
    start: float | None = None

    def validate(self, classes: list[str]) -> None:
        """Raise ``ValueError`` with one sentence that names the value and what would be right."""
        if self.class_label not in classes:
            raise ValueError(f"unknown class {self.class_label!r}: choose one of {', '.join(classes)}")
        whole(self.seed, "seed", 0, MAX_SEED)
        whole(self.steps, "steps", 1, 100)
        between(self.guidance, "guidance", 1, 10)
        if self.audio_guidance is not None:
            between(self.audio_guidance, "audio guidance", 1, 10)
        between(self.joint_guidance, "joint guidance", 1, 10)
        between(self.seconds, "seconds", 0.1, 60)
        if self.start is not None:
            between(self.start, "start", 0, 86400)
        if self.sampler not in (TURBO, *SAMPLERS):
            raise ValueError(f"unknown sampler {self.sampler!r}: choose one of {', '.join((TURBO, *SAMPLERS))}")
        if sum(part is not None for part in (self.video, self.audio, self.image)) > 1:
            raise ValueError("give one of a video, a sound and a picture, not several")


def whole(value: Any, name: str, low: int, high: int) -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} {value!r} must be a whole number from {low} to {high}")


def between(value: Any, name: str, low: float, high: float) -> None:
    """Raise ``ValueError`` unless ``value`` is a number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} {value!r} must be a number from {low} to {high}")


@dataclass
class Result:
    """A finished clip: ``frames`` (F, H, W, 3) in [0, 1], ``audio`` (samples,), and how it was made."""

    frames: np.ndarray
    audio: np.ndarray
    fps: int
    sampling_rate: int
    recipe: dict[str, Any]
    wall_s: float

    def save(self, path: Path | str) -> Path:
        """Write the clip with its recipe as mp4."""
        return media.write_clip(
            path, self.frames, self.audio, fps=self.fps, sampling_rate=self.sampling_rate, metadata=self.recipe
        )


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: where it cannot be used here.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {name!r} cannot be used here: choose cpu, or cuda where there is a GPU") from None
    return device


@functools.lru_cache(maxsize=1)
def load_pipeline(
    checkpoint: Path = DEFAULT_CHECKPOINT,
    device: str = "cpu",
    offload: bool = False,
    dtype: torch.dtype = torch.float32,
) -> "AVDiTPipeline":
    """The pipeline of a checkpoint folder, loaded once and kept.

    Args:
        offload: Keep the model and each codec in the CPU's memory but while it works on ``device``.

    Raises:
        ValueError: for a checkpoint or a device that cannot be used.
    """
    target = usable_device(device)
    if offload and target.type == "cpu":
        raise ValueError("--offload is for a GPU: give --device cuda, or leave it out")
    weight_files(checkpoint)
    # Late, for diffusers takes seconds to import: a page stands before it is needed.
    from diffusers.utils.logging import disable_progress_bar

    from avdit.pipeline import AVDiTPipeline

    disable_progress_bar()  # of the loading, which takes less than a second
    try:
        pipe = AVDiTPipeline.from_pretrained(checkpoint, dtype=dtype, local_files_only=True)
    except (RuntimeError, KeyError, TypeError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be loaded: {str(error).splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    if offload:
        pipe.enable_model_cpu_offload(device=target)
        return pipe
    return pipe.to(target)


def conditions(pipe: "AVDiTPipeline", request: Request) -> dict[str, np.ndarray]:
    """The files that are given, read at the model's size and rates."""
    clip, start = pipe.geometry, request.start or 0.0
    size = {"height": clip.height, "width": clip.width}
    if request.image is not None:
        return {"image": media.read_image(request.image, **size)}
    if request.video is not None:
        frames = media.read_video(request.video, fps=clip.fps, max_frames=clip.frames, start=start, **size)
        if len(frames) < clip.frames:
            raise ValueError(f"{request.video} is too short: {clip.seconds} s of picture are needed{_after(start)}")
        return {"video": frames}
    if request.audio is not None:
        sound = media.read_audio(request.audio, sampling_rate=clip.sampling_rate, max_samples=clip.samples, start=start)
        if len(sound) < clip.samples:
            sound = np.pad(sound, (0, clip.samples - len(sound)))
        return {"audio": sound}
    return {}


def _after(start: float) -> str:
    return f" after {start:g} s" if start else ""


def resolved(pipe: "AVDiTPipeline", request: Request) -> Request:
    """``request`` as the turbo adapters of its class need it, where it asks for them: their steps and no guidance.

    Raises:
        ValueError: where there are none.
    """
    if request.sampler != TURBO:
        return request
    steps = pipe.turbo_steps(request.class_label)
    if steps is None:
        raise ValueError(f"there are no turbo adapters for {request.class_label!r}: choose the sampler ddim")
    return replace(request, steps=steps, guidance=1.0, audio_guidance=None, joint_guidance=1.0)


def settings_of(request: Request) -> dict[str, Any]:
    """The pipeline's arguments for one window of ``request``."""
    turbo = request.sampler == TURBO
    return {
        "class_labels": request.class_label,
        "num_inference_steps": request.steps,
        "guidance_scale": float(request.guidance),
        "audio_guidance_scale": request.audio_guidance,
        "joint_guidance_scale": float(request.joint_guidance),
        "sampler": "ddim" if turbo else request.sampler,
        "turbo": turbo,
    }


def stream(
    pipe: "AVDiTPipeline",
    request: Request,
    count: int | None = None,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] | None = None,
    live: Callable[[], Request] | None = None,
    turn: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[Window]:
    """Make ``count`` windows, or endless ones; everything that is generated is generated here.

    Args:
        on_step: Called with the steps done, the steps of all windows (of this one where they are endless), and an
            estimate (1, F, C, h, w) of the picture's finished latents.
        should_stop: Asked after every step.
        live: Asked before each window for the request whose class, steps, guidance and sampler hold for it.
        turn: Entered for the work of each window, so that several requests share one model.

    Raises:
        ValueError: for a request or a file that cannot be used.
        Stopped: where ``should_stop`` said so.
    """
    request.validate(pipe.classes)
    given = conditions(pipe, request)
    done = 0

    def settings() -> dict[str, Any]:
        nonlocal done
        now = resolved(pipe, live() if live is not None else request)
        done = 0 if count is None else done

        def step_end(pipe: "AVDiTPipeline", _index: int, _timestep: int, tensors: dict) -> dict:
            nonlocal done
            done += 1
            if on_step is not None:
                on_step(done, pipe.num_timesteps * (count or 1), tensors["video_estimate"])
            if should_stop is not None and should_stop():
                raise Stopped
            return {}

        asked = {"callback_on_step_end": step_end, "callback_on_step_end_tensor_inputs": ["video_estimate"]}
        return settings_of(now) | asked

    generator = torch.Generator().manual_seed(fold_seed(request.seed))
    yield from windows(pipe, settings, generator, count, given, turn)


def fold_seed(seed: int) -> int:
    """``seed`` as torch's CPU generator can tell it apart: it heeds the lowest 32 bits alone, so more are mixed in."""
    return seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1)[0])


def recipe_of(pipe: "AVDiTPipeline", request: Request) -> dict[str, Any]:
    """What makes the clip again, as JSON knows it; files by their names."""
    recipe = {k: v for k, v in asdict(request).items() if v is not None}
    for name in ("video", "audio", "image"):
        if name in recipe:
            recipe[name] = Path(recipe[name]).name
    recipe["class"] = recipe.pop("class_label")
    if pipe.name_or_path:  # None where it was built in memory
        recipe["weights_sha256"] = weights_sha256(Path(pipe.name_or_path))
    return recipe


def generate(
    pipe: "AVDiTPipeline",
    request: Request,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] | None = None,
    turn: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Result:
    """Make the clip that ``request`` describes; the arguments are those of :func:`stream`.

    Raises:
        ValueError: for a request or a file that cannot be used.
        Stopped: where ``should_stop`` said so.
    """
    request.validate(pipe.classes)
    request = resolved(pipe, request)
    start = time.monotonic()
    clip = pipe.geometry
    wanted = clip.frames_of(request.seconds)
    if (request.video or request.audio) and wanted > clip.frames:
        raise ValueError(f"seconds {request.seconds} must be at most {clip.seconds} where a file is given")
    count = 1 + max(0, -(-(wanted - clip.frames) // (clip.frames - OVERLAP)))
    parts = list(stream(pipe, request, count, on_step, should_stop, turn=turn))
    return Result(
        np.concatenate([frames for frames, _ in parts])[:wanted],
        np.concatenate([audio for _, audio in parts])[: clip.samples_of(wanted)],
        clip.fps,
        clip.sampling_rate,
        recipe_of(pipe, request),
        time.monotonic() - start,
    )
