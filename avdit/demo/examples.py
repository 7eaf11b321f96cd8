"""A ready clip of each class, which the page plays before anything is made."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from avdit.demo.controls import SURPRISE, Packs
from avdit.demo.links import link_html
from avdit.demo.looks import ASSETS, status
from avdit.generate import Result
from avdit.geometry import ClipGeometry
from avdit.media import read_audio, read_video

FOLDER = ASSETS / "examples"
SHOW_PLOT = (
    """plot => document.documentElement.dataset.own ? undefined : {__type__: "update", value: plot, visible: true}"""
)


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


def _recipe_in(film: bytes) -> dict[str, Any]:
    """The recipe in an mp4's comment, as ``avdit.media.read_recipe`` finds it, which starts a program for it."""
    begin = film.find(b"\xa9cmt") + 4  # of the atom "data": its length, its name, 8 bytes of type, the text
    text = film[begin + 16 : begin + int.from_bytes(film[begin : begin + 4], "big")]
    return json.loads(text) if begin >= 4 else {}


@cache
def example_of(label: str) -> Example | None:
    """The ready clip of a class; None where there is none."""
    path = example_path(label)
    recipe = _recipe_in(path.read_bytes()) if path.is_file() else {}
    return Example(path, recipe) if {"class", "seed", "steps"} <= recipe.keys() else None


def shown_examples(packs: Packs, weights: str) -> dict[str, dict[str, Any]]:
    """What the page shows of the ready clips, by pack and class; ``weights`` is the hash of those at work."""
    ready = {name: {label: example_of(label) for label in classes} for name, classes in packs.items()}
    return {
        name: {
            label: {
                "video": str(example.video),
                "recipe": example.recipe,
                "line": status(example.line(weights)),
                "link": link_html(example.recipe, "generate"),
            }
            for label, example in examples.items()
            if example
        }
        for name, examples in ready.items()
    }


def show_example(asked: bool, plays: bool) -> str:
    """What shows the ready clip of the chosen class in the browser.

    It gives values for the player, the stream's, the line, the recipe, its link and both downloads.

    Args:
        asked: Show it in the place of a clip of the visitor's own, too; otherwise in that of another example only.
        plays: Play it at once; otherwise it is what the page opens with, unless a class has been chosen by then.
    """
    return f"""(ready, label, pack) => {{
      const page = document.documentElement.dataset;
      if ({json.dumps(asked)}) page.own = "";
      const labels = Object.keys(ready[pack]);
      const example = ready[pack][
        label === {json.dumps(SURPRISE)} ? labels[Math.floor(Math.random() * labels.length)] : label
      ];
      if (!example || page.own || ({json.dumps(not plays)} && page.chosen)) return [];
      page.chosen = "yes";
      const update = (values) => ({{ __type__: "update", ...values }});
      const url = new URL("gradio_api/file=" + encodeURI(example.video), location.href).href;
      const orig_name = url.split("/").pop();
      const value = {{ path: example.video, url, orig_name, meta: {{ _type: "gradio.FileData" }} }};
      return [
        update({{ value, autoplay: {json.dumps(plays)}, visible: true }}),
        update({{ visible: false }}),
        example.line,
        example.recipe,
        example.link,
        update({{ value, interactive: true }}),
        update({{ interactive: false }}),
      ];
    }}"""
