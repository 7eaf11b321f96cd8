"""The one generation function, behind the page, the API and the command line."""

import functools
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from avdit import media
from avdit.pipeline import SAMPLERS, AVDiTPipeline
from avdit.streaming import OVERLAP, windows

DEFAULT_CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "avdit-xs"
MAX_SEED = 2**63 - 1
OnStep = Callable[[int, int, torch.Tensor], None]


class Stopped(Exception):
    """The user asked for the generation to stop."""


@dataclass(frozen=True)
class Request:
    """What a user asks for; ``video``, ``audio`` and ``image`` are paths of files that are given."""

    class_label: str
    seed: int = 0
    steps: int = 12
    guidance: float = 2.0
    audio_guidance: float | None = None
    sampler: str = "ddim"
    seconds: float = 1.6
    video: str | None = None
    audio: str | None = None
    image: str | None = None

    def validate(self, classes: list[str]) -> None:
        """Raise ``ValueError`` with one sentence that names the value and what would be right."""
        if self.class_label not in classes:
            raise ValueError(f"unknown class {self.class_label!r}: choose one of {', '.join(classes)}")
        whole(self.seed, "seed", 0, MAX_SEED)
        whole(self.steps, "steps", 1, 100)
        between(self.guidance, "guidance", 1, 10)
        if self.audio_guidance is not None:
            between(self.audio_guidance, "audio guidance", 1, 10)
        between(self.seconds, "seconds", 0.1, 60)
        if self.sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {self.sampler!r}: choose one of {', '.join(SAMPLERS)}")
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


def weight_files(checkpoint: Path) -> list[Path]:
    """The checkpoint's weights.

    Raises:
        ValueError: where the checkpoint is missing, holds no safetensors, or one that is cut short.
    """
    if not (checkpoint / "model_index.json").is_file():
        raise ValueError(f"checkpoint {checkpoint} is not a pipeline folder: it has no model_index.json")
    files = sorted(checkpoint.rglob("*.safetensors"))
    for folder in ("transformer", "video_codec", "audio_codec"):
        if not any(file.parent.name == folder for file in files):
            raise ValueError(f"checkpoint {checkpoint} has no safetensors weights in {folder}; pickles are not read")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            raise ValueError(f"{file} is damaged or cut short: fetch it again") from None
    return files


@functools.cache
def weights_sha256(checkpoint: Path) -> str:
    """One hash over the checkpoint's weights."""
    digest = hashlib.sha256()
    for file in weight_files(checkpoint):
        digest.update(str(file.relative_to(checkpoint)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def load_pipeline(checkpoint: Path = DEFAULT_CHECKPOINT, device: str = "cpu") -> AVDiTPipeline:
    """The pipeline of a checkpoint folder, loaded once and kept.

    Raises:
        ValueError: for a checkpoint or a device that cannot be used.
    """
    weight_files(checkpoint)
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {device!r} cannot be used here: choose cpu, or cuda where there is a GPU") from None
    try:
        pipe = AVDiTPipeline.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    except (RuntimeError, KeyError, TypeError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be loaded: {str(error).splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(target)


def conditions(pipe: AVDiTPipeline, request: Request) -> dict[str, np.ndarray]:
    """The files that are given, read at the model's size and rates."""
    clip = pipe.geometry
    size = {"height": clip.height, "width": clip.width}
    if request.image is not None:
        return {"image": media.read_image(request.image, **size)}
    if request.video is not None:
        frames = media.read_video(request.video, fps=clip.fps, max_frames=clip.frames, **size)
        if len(frames) < clip.frames:
            raise ValueError(f"{request.video} is too short: {clip.seconds} s of picture are needed")
        return {"video": frames}
    if request.audio is not None:
        sound = media.read_audio(request.audio, sampling_rate=clip.sampling_rate, max_samples=clip.samples)
        if len(sound) < clip.samples:
            sound = np.pad(sound, (0, clip.samples - len(sound)))
        return {"audio": sound}
    return {}


def generate(
    pipe: AVDiTPipeline,
    request: Request,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Result:
    """Make the clip that ``request`` describes.

    Args:
        on_step: Called with the step, the number of steps in all windows, and the latents of the picture.
        should_stop: Asked after every step.

    Raises:
        ValueError: for a request or a file that cannot be used.
        Stopped: where ``should_stop`` said so.
    """
    request.validate(pipe.classes)
    start = time.monotonic()
    clip = pipe.geometry
    given = conditions(pipe, request)
    wanted = clip.frames_of(request.seconds)
    if given and wanted > clip.frames:
        raise ValueError(f"seconds {request.seconds} must be at most {clip.seconds} where a file is given")
    pipe.set_sampler(request.sampler)
    count = 1 + max(0, -(-(wanted - clip.frames) // (clip.frames - OVERLAP)))
    done = 0

    def step_end(_pipe, _index: int, _timestep: int, tensors: dict) -> dict:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, count * request.steps, tensors["video_latents"])
        if should_stop is not None and should_stop():
            raise Stopped
        return {}

    settings = {
        "num_inference_steps": request.steps,
        "guidance_scale": float(request.guidance),
        "audio_guidance_scale": request.audio_guidance,
        "callback_on_step_end": step_end,
    }
    generator = torch.Generator().manual_seed(request.seed)
    if count == 1:
        out = pipe(request.class_label, generator=generator, **given, **settings)
        frames, audio = out.frames[0], out.audio[0]
    else:
        parts = list(windows(pipe, lambda: request.class_label, generator, count, **settings))
        frames, audio = np.concatenate([f for f, _ in parts]), np.concatenate([a for _, a in parts])
    recipe = {k: v for k, v in asdict(request).items() if v is not None}
    for name in ("video", "audio", "image"):
        if name in recipe:
            recipe[name] = Path(recipe[name]).name
    recipe["class"] = recipe.pop("class_label")
    if pipe.name_or_path:  # None where it was built in memory
        recipe["weights_sha256"] = weights_sha256(Path(pipe.name_or_path))
    return Result(
        frames[:wanted],
        audio[: clip.samples_of(wanted)],
        clip.fps,
        clip.sampling_rate,
        recipe,
        time.monotonic() - start,
    )
