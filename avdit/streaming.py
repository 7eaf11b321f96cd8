"""Clips longer than the model's: window after window, each continuing the last."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from avdit.pipeline import AVDiTPipeline

OVERLAP = 4  # frames of the last window that the next one is given
FADE_SECONDS = 0.01  # of sound over which two windows are blended


def windows(
    pipe: AVDiTPipeline,
    class_label: Callable[[], str | int],
    generator: torch.Generator,
    count: int | None = None,
    **settings: Any,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``count`` windows, or endless ones, of new frames (F, H, W, 3) and their samples (n,).

    The first is a whole clip; every other one is made from the last ``OVERLAP`` frames and their sound, and what
    it was given is not repeated. Each keeps back the last ``FADE_SECONDS`` of its sound to blend them with the next
    one's; the last window keeps nothing.

    Args:
        class_label: Asked before each window, so that the class can change while the stream runs.
        settings: Passed to the pipeline.
    """
    clip = pipe.geometry
    given_samples, fade = clip.samples_of(OVERLAP), round(FADE_SECONDS * clip.sampling_rate)
    ramp = np.sin(np.linspace(0, np.pi / 2, fade, dtype=np.float32)) ** 2
    condition: dict[str, np.ndarray | int] = {}
    held: np.ndarray | None = None  # the last window's end, kept back to be blended with the next one's start
    for number in itertools.count(1):
        out = pipe(class_label(), generator=generator, **condition, **settings)
        frames, audio = out.frames[0], out.audio[0]
        if held is None:
            new_frames, sound = frames, audio
        else:
            new_frames, sound = frames[OVERLAP:], audio[given_samples - fade :].copy()
            sound[:fade] = held * (1 - ramp) + sound[:fade] * ramp
        if number == count:
            yield new_frames, sound
            return
        held = audio[-fade:]
        yield new_frames, sound[:-fade]
        condition = {"video": frames[-OVERLAP:], "audio": audio[-given_samples:], "given_frames": OVERLAP}
