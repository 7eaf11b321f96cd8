"""A ready clip of each class, which the page plays before anything is made."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from avdit.demo.looks import ASSETS
from avdit.generate import Result
from avdit.geometry import ClipGeometry
from avdit.media import read_audio, read_recipe, read_video

FOLDER = ASSETS / "examples"


@dataclass(frozen=True)
class Example:
    """A clip that the shipped model made, and its recipe, which the file carries."""

    video: Path
    recipe: dict[str, Any]

    def line(self, weights: str | None) -> str:
        """What it is, in a line; ``weights`` is the hash of those at work, which may be others."""
        text = f"Example: {self.recipe['class']}, seed {self.recipe['seed']}, {self.recipe['steps']} steps"
        other = weights is not None and weights != self.recipe.get("weights_sha256")
        text += ", made with other weights than those at work here" if other else ""
        return f"{text} · Generate makes your own"

    def result(self, clip: ClipGeometry) -> Result:
        """The clip's picture and sound, for the plot."""
        size = {"height": clip.height, "width": clip.width, "max_frames": clip.frames}
        frames = read_video(self.video, fps=clip.fps, **size)
        audio = read_audio(self.video, sampling_rate=clip.sampling_rate, max_samples=clip.samples)
        return Result(frames, audio, clip.fps, clip.sampling_rate, self.recipe, 0.0)


def example_path(label: str) -> Path:
    """Where the clip of a class is kept."""
    return FOLDER / f"{label.replace(' ', '-')}.mp4"


@cache
def example_of(label: str) -> Example | None:
    """The ready clip of a class; None where there is none."""
    path = example_path(label)
    recipe = read_recipe(path) if path.is_file() else {}
    return Example(path, recipe) if {"class", "seed", "steps"} <= recipe.keys() else None
