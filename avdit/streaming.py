"""Clips longer than the model's: window after window, each continuing the last."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from avdit.machine import own_threads, precision_here, threads
from avdit.models.noise import draw_common, draw_noise

if TYPE_CHECKING:
    from avdit.pipeline import AVDiTPipeline

OVERLAP = 4  # frames of the last window that the next one is given
CONTEXT_NOISE = 0.1  # in which it sees them, as a share of the schedule: else it would take over their faults
CONTRAST_STEP = 0.3  # most of a window's contrast that is taken from it for coming out stronger than what it continues
CONTRAST_RETURN = 0.2  # of the way, in logarithms, back to the contrast of the scene's first window
FADE_SECONDS = 0.01  # of sound over which two windows are blended

Window = tuple[np.ndarray, np.ndarray]  # frames (F, H, W, 3) in [0, 1], their sound (samples,)


@dataclass
class Denoised:
    """A window that is not decoded yet."""

    video: Tensor  # (1, F, C, h, w)
    audio: Tensor  # (1, C, T, f)
    continues: bool  # the scene of the window before
    precision: torch.autocast  # in which it was computed


def windows(
    pipe: "AVDiTPipeline",
    settings: Callable[[], dict[str, Any]],
    generator: torch.Generator,
    count: int | None = None,
    given: dict[str, np.ndarray] | None = None,
    turn: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[Window]:
    """``count`` windows, or endless ones, of new frames and exactly the sound that lasts as long as they do.

    The first is a whole clip. While the class stays, every other one is made from the latents of the last ``OVERLAP``
    frames, the first of which gives way to the scene's own first one (see :func:`context_of`), and of their sound, and
    from noise that has the same part in common, so that the scene stays too. Where the class changes, a new scene
    begins, and the old one dissolves into it over those frames. Each window but the last keeps back these frames with
    their sound, for the next one to join them; so each comes out ``frames - OVERLAP`` long, and picture and sound never
    drift apart.

    On a CPU one half of the threads denoises the next window while the other half decodes the last one: neither waits
    at every operation for a thread that something else on the machine, such as a browser, keeps from its core.

    Args:
        settings: Asked before each window for the arguments of the pipeline's call (``class_labels`` at least) and
            its ``sampler``, so that all of them can change while the stream runs.
        given: What the first window starts from: ``video``, ``audio`` or ``image``, as the pipeline takes it. Video or
            sound of a single window come back as they were given; the model has only seen what its codec keeps of it.
        turn: Entered for the denoising of each window; several streams share one model by taking turns.
    """
    clip, all_threads = pipe.geometry, own_threads()
    overlap, fade = clip.samples_of(OVERLAP), round(FADE_SECONDS * clip.sampling_rate)
    held: Window | None = None
    whole = given if given and count == 1 else {}
    halves = pipe._execution_device.type == "cpu" and all_threads > 1
    made = denoised(pipe, settings, generator, count, given, turn, all_threads - all_threads // 2 if halves else None)
    for number, window in enumerate(one_ahead(made) if halves else made, 1):
        alone = not halves or number in (1, count)  # nothing is denoised beside it
        with threads(all_threads if alone else all_threads // 2), window.precision:
            # Of a continuation the first frames are there already.
            video = None if "video" in whole else window.video[:, OVERLAP if window.continues else 0 :]
            frames, audio = pipe.decode(video, None if "audio" in whole else window.audio)
        part = whole["video"] if frames is None else frames[0], whole["audio"] if audio is None else audio[0]
        if held is not None:
            part = continued(held, part, fade) if window.continues else dissolved(held, part)
        frames, audio = part
        if number == count:
            yield part
            return
        held = frames[-OVERLAP:], audio[-overlap:]
        yield frames[:-OVERLAP], audio[:-overlap]


def denoised(
    pipe: "AVDiTPipeline",
    settings: Callable[[], dict[str, Any]],
    generator: torch.Generator,
    count: int | None,
    given: dict[str, np.ndarray] | None,
    turn: Callable[[], contextlib.AbstractContextManager],
    beside: int | None,
) -> Generator[Denoised, None, None]:
    """The windows of ``windows`` before they are decoded; all but the first with ``beside`` threads, or with all."""
    condition: dict[str, Any] = given or {}
    sound_steps = pipe.geometry.audio_latent_shape[1] * OVERLAP // pipe.geometry.frames
    shared, common = pipe.transformer.config.shared_noise, None
    label, number, outer = None, 0, precision_here(pipe._execution_device)
    while count is None or number < count:
        with outer, turn(), threads(own_threads() if number == 0 or beside is None else beside):
            now = settings()
            pipe.set_sampler(now.pop("sampler", "ddim"))
            continues = number > 0 and now["class_labels"] == label
            if shared and not continues:
                common = draw_common(pipe.geometry, generator)
            noise = draw_noise(pipe.geometry, shared, generator, common)
            made = pipe(
                **now,
                generator=generator,
                latents=(noise[0].unsqueeze(0), noise[1].unsqueeze(0)),
                context_noise=CONTEXT_NOISE,
                **(condition if continues or number == 0 else {}),
                output_type="latent",
            )
            precision = precision_here(pipe._execution_device)
        label, number = now["class_labels"], number + 1
        if not continues:
            contrast, first = made.frames.std(), made.frames[:, :1]
        video = led_back(made.frames, contrast) if continues else made.frames
        condition = {"given_latents": (context_of(video, first), made.audio[:, :, -sound_steps:])}
        yield Denoised(video, made.audio, continues, precision)


def context_of(video: Tensor, first: Tensor) -> Tensor:
    """What the window after ``video`` (1, F, C, h, w) is given: its last frames, and ``first`` (1, 1, C, h, w) before.

    Every frame attends to the first one of its window, whatever comes between. Were that one of the last window's, each
    window would take over its faults: sparks that fill a night sky, smoke that stays. The scene's own first frame in
    its place keeps the looks, and the frames after it the motion (as a stream of text keeps its first tokens in view:
    Xiao et al. 2023, arXiv 2309.17453).
    """
    return torch.cat([first, video[:, 1 - OVERLAP :]], 1)


def led_back(video: Tensor, contrast: Tensor) -> Tensor:
    """The latents (1, F, C, h, w) of a continuation, whose new frames begin with the contrast of those it was given.

    Left alone they come out a seventh to a quarter stronger, and are the next window's example: a picture that pulses
    with the windows, and after twenty of them little but black and white. What changes later in a window stays as it
    is.

    Args:
        contrast: That of the scene's first window, to which the stream is slowly led back.
    """
    shown, fresh = video[:, :OVERLAP], video[:, OVERLAP:]
    wanted = torch.lerp(shown.std().log(), contrast.log(), CONTRAST_RETURN).exp()
    gain = (wanted / fresh[:, :OVERLAP].std()).clamp(1 - CONTRAST_STEP, 1)
    return torch.cat([shown, gain * fresh], 1)


def one_ahead(items: Generator[Denoised, None, None]) -> Iterator[Denoised]:
    """The same items; from the second one on, each is made in a thread of its own while the last one is used."""
    try:
        if (item := next(items, None)) is None:
            return
        yield item  # at once: nobody who waits for the first one shares the machine with the second
        with ThreadPoolExecutor(1, "avdit-denoiser") as worker:
            coming = worker.submit(next, items, None)
            while (item := coming.result()) is not None:
                coming = worker.submit(next, items, None)
                yield item
    finally:
        items.close()


def continued(held: Window, window: Window, fade: int) -> Window:
    """``held`` and the new frames of ``window``, whose sound blends in over the last ``fade`` samples of ``held``."""
    (old_frames, old_audio), (frames, audio) = held, window
    ramp = np.sin(np.linspace(0, np.pi / 2, fade, dtype=np.float32)) ** 2
    start = len(old_audio) - fade
    blend = old_audio[start:] * (1 - ramp) + audio[start : len(old_audio)] * ramp
    sound = np.concatenate([old_audio[:start], blend, audio[len(old_audio) :]])
    return np.concatenate([old_frames, frames]), sound


def dissolved(held: Window, window: Window) -> Window:
    """``window`` whose first frames and their sound are blended from ``held``: a scene that gives way to another."""
    (old_frames, old_audio), (frames, audio) = held, window
    count = len(old_frames)
    weight = (np.arange(1, count + 1, dtype=np.float32) / (count + 1))[:, None, None, None]
    angle = np.linspace(0, np.pi / 2, len(old_audio), dtype=np.float32)  # equal power: the two sounds are unrelated
    picture = old_frames * (1 - weight) + frames[:count] * weight
    sound = old_audio * np.cos(angle) + audio[: len(old_audio)] * np.sin(angle)
    return np.concatenate([picture, frames[count:]]), np.concatenate([sound, audio[len(old_audio) :]])
