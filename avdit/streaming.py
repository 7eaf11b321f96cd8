"""Clips longer than the model's: window after window, each continuing the last."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from avdit.pipeline import AVDiTPipeline

OVERLAP = 4  # frames of the last window that the next one is given
FADE_SECONDS = 0.01  # of sound over which two windows are blended

Window = tuple[np.ndarray, np.ndarray]  # frames (F, H, W, 3) in [0, 1], their sound (samples,)


def windows(
    pipe: "AVDiTPipeline",
    settings: Callable[[], dict[str, Any]],
    generator: torch.Generator,
    count: int | None = None,
    given: dict[str, np.ndarray] | None = None,
    turn: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[Window]:
    """``count`` windows, or endless ones, of new frames and exactly the sound that lasts as long as they do.

    The first is a whole clip. While the class stays, every other one is made from the last ``OVERLAP`` frames and
    their sound. Where the class changes, a new scene begins, and the old one dissolves into it over those frames.
    Each window but the last keeps back these frames with their sound, for the next one to join them; so each
    comes out ``frames - OVERLAP`` long, and picture and sound never drift apart.

    Args:
        settings: Asked before each window for the arguments of the pipeline's call (``class_labels`` at least) and
            its ``sampler``, so that all of them can change while the stream runs.
        given: What the first window starts from: ``video``, ``audio`` or ``image``, as the pipeline takes it.
        turn: Entered for the work of each window; several streams share one model by taking turns.
    """
    clip = pipe.geometry
    overlap, fade = clip.samples_of(OVERLAP), round(FADE_SECONDS * clip.sampling_rate)
    held: Window | None = None
    label = None
    for number in itertools.count(1):
        with turn():
            now = settings()
            pipe.set_sampler(now.pop("sampler", "ddim"))
            condition: dict[str, Any] = given or {} if held is None else {}
            continues = held is not None and now["class_labels"] == label
            if continues:
                condition = {"video": held[0], "audio": held[1], "given_frames": OVERLAP}
            made = pipe(**now, generator=generator, **condition, output_type="latent")
            # Of a continuation the first frames are there already.
            frames, audio = pipe.decode(made.frames[:, OVERLAP if continues else 0 :], made.audio)
        label = now["class_labels"]
        window = frames[0], audio[0]
        if held is not None:
            window = continued(held, window, fade) if continues else dissolved(held, window)
        frames, audio = window
        if number == count:
            yield window
            return
        held = frames[-OVERLAP:], audio[-overlap:]
        yield frames[:-OVERLAP], audio[:-overlap]


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


class CleanEstimate:
    """What a sampler's steps say of the finished picture, from the latents before and after each.

    Every sampler here moves along ``x = a x0 + s n`` with one ``x0`` and one ``n`` a step (``a² + s² = 1``): two
    equations, from which ``x0`` follows whatever the model predicts. It shows a picture long before the noise is gone.
    """

    def __init__(self) -> None:
        self._before: torch.Tensor | None = None

    def update(self, pipe: "AVDiTPipeline", index: int, latents: torch.Tensor) -> torch.Tensor:
        """The estimate (B, F, C, h, w) after step ``index``; of the first step, whose start is not known, the latents.

        Args:
            latents: Those of the picture after the step.
        """
        before, self._before = self._before, latents
        if index == 0 or before is None:
            return latents
        scheduler = pipe.scheduler
        times, alphas = scheduler.timesteps, scheduler.alphas_cumprod
        a_old = alphas[times[index]].item()
        a_new = alphas[times[index + 1]].item() if index + 1 < len(times) else 1.0
        s_old, s_new = (1 - a_old) ** 0.5, (1 - a_new) ** 0.5
        a_old, a_new = a_old**0.5, a_new**0.5
        return (latents * s_old - before * s_new) / (a_new * s_old - a_old * s_new)
