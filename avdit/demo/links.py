"""A recipe as a link that opens the page with its settings, and back."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from avdit.demo.service import parse_seed, whole_or_as_is
from avdit.generate import Request

KEYS = ("class", "seed", "steps", "guidance", "audio_guidance", "sampler", "seconds")


@dataclass(frozen=True)
class Settings:
    """What a link asks for: the mode's tab and a request without files."""

    mode: str
    request: Request


def link_of(recipe: Mapping[str, Any], mode: str) -> str:
    """The query of the page's own address that reopens it with ``recipe``."""
    return "?" + urlencode({"mode": mode} | {key: recipe[key] for key in KEYS if key in recipe})


def link_html(recipe: Mapping[str, Any], mode: str) -> str:
    """The same as something to click on."""
    return f'<a href="{html.escape(link_of(recipe, mode))}">Link to this recipe</a>'


def read_link(query: Mapping[str, str], classes: list[str], modes: list[str]) -> Settings | None:
    """What a link asks for; None where it names no class.

    Raises:
        ValueError: with a sentence that names what in it cannot be used.
    """
    if "class" not in query:
        return None
    values: dict[str, Any] = {"class_label": query["class"]}
    for key in ("steps", "guidance", "audio_guidance", "seconds"):
        if key in query:
            try:
                values[key] = whole_or_as_is(float(query[key]))
            except ValueError:
                raise ValueError(f"{key} {query[key][:80]!r} in the link is no number") from None
    if "seed" in query:
        values["seed"] = parse_seed(query["seed"])
    if "sampler" in query:
        values["sampler"] = query["sampler"]
    mode = query.get("mode", modes[0])
    if mode not in modes:
        raise ValueError(f"mode {mode[:80]!r} in the link must be one of {', '.join(modes)}")
    request = Request(**values)
    request.validate(classes)
    return Settings(mode, request)
