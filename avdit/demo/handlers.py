"""What the page's buttons and the API do: everything goes through ``clip`` or ``stream``."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from avdit.demo.controls import one_of
from avdit.demo.service import Report, Service, parse_seed, whole_or_as_is
from avdit.generate import Request
from avdit.media import MediaError, has_stream, probe, read_image


@dataclass(frozen=True)
class Mode:
    """A tab: what it is called, its endpoint, and the file that it starts from."""

    title: str
    endpoint: str
    noun: str | None = None  # of the file
    field: str | None = None  # of ``Request``


MODES = {
    "generate": Mode("Generate", "generate"),
    "stream": Mode("Endless stream", "stream"),
    "video": Mode("Video → sound", "video_to_audio", "video", "video"),
    "sound": Mode("Sound → video", "audio_to_video", "sound", "audio"),
    "picture": Mode("Picture → clip", "animate", "picture", "image"),
}


CLIPS_AT_ONCE = 2  # they take turns at the model; more would only hold more memory
STREAMS_AT_ONCE = 3


def lane(streams: bool) -> dict[str, Any]:
    """Options that keep works waiting; of every event, for it is the first of a lane to be called that makes it."""
    return {
        "concurrency_id": "stream" if streams else "clip",
        "concurrency_limit": STREAMS_AT_ONCE if streams else CLIPS_AT_ONCE,
    }


@contextmanager
def readable(*files: str | None) -> Iterator[None]:
    """Errors as a sentence for the visitor, who knows a file by its name, not by where the server keeps it."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error)
        for file in filter(None, files):
            text = text.replace(file, Path(file).name)
        raise gr.Error(text, title="That did not work", print_exception=False) from error
    except gr.Error:
        raise
    except Exception as error:  # of which the log gets the trace, and the visitor a sentence
        raise gr.Error("The server failed at this; try again, or with other settings", title="Our fault") from error


class Handlers:
    """The work behind every button and endpoint, on one service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def request(
        self,
        mode: Mode,
        class_label: str,
        steps: float,
        guidance: float,
        audio_guidance: float | None,
        seed: str,
        randomize: bool,
        sampler: str,
        seconds: float,
        file: str | None = None,
        start: float | None = None,
        pack: str | None = None,
    ) -> Request:
        """The request that the page's or the API's values make; ``ValueError`` with a sentence where they make none."""
        if mode.field and not file:
            raise ValueError(f"{mode.title} needs a {mode.noun}: upload one")
        number = random.randrange(2**31) if randomize or not str(seed).strip() else parse_seed(seed)
        return Request(
            class_label=one_of(self.service.packs, pack, class_label),
            seed=number,
            steps=whole_or_as_is(steps),
            guidance=guidance,
            audio_guidance=audio_guidance,
            sampler=sampler,
            seconds=seconds,
            start=start or None,
            **({mode.field: file} if mode.field else {}),
        )

    def reports(self, mode: Mode, visitor: gr.Request, *values: Any) -> Iterator[tuple[Request, Report]]:
        """Do what ``values`` (those of ``request``) ask for: its request beside each report of the service."""
        file = values[8] if len(values) > 8 else None
        with readable(file):
            request = self.request(mode, *values)
            for report in self.service.run(request, visitor.session_hash or "", endless=mode is MODES["stream"]):
                yield request, report

    def stop(self, visitor: gr.Request) -> None:
        """End the visitor's work."""
        self.service.stop(visitor.session_hash or "")

    def change(
        self,
        visitor: gr.Request,
        class_label: str,
        steps: float,
        guidance: float,
        audio_guidance: float,
        sampler: str,
        pack: str,
    ) -> None:
        """Give the visitor's stream other settings from its next window on."""
        self.service.change(
            visitor.session_hash or "",
            class_label=one_of(self.service.packs, pack, class_label),
            steps=whole_or_as_is(steps),
            guidance=guidance,
            audio_guidance=audio_guidance,
            sampler=sampler,
        )

    def used_part(self, file: str | None, start: float, noun: str) -> str:
        """Which part of an upload will be used, or why it cannot be."""
        if not file:
            return ""
        clip, name = self.service.checkpoint.geometry, Path(file).name
        try:
            if noun == "picture":
                read_image(file, height=clip.height, width=clip.width)
                return f"The middle of {name}, scaled to {clip.width} × {clip.height}, becomes the first frame."
            info = probe(file)
        except MediaError:
            return f"{name} is not a {noun} that can be read: choose another file."
        if not has_stream(info, "video" if noun == "video" else "audio"):
            return f"{name} has no {'picture' if noun == 'video' else 'sound'}: choose another file."
        length = float(info["format"].get("duration", 0) or 0)
        if not start >= 0:
            return "Choose a start of 0 s or more."
        if start >= length > 0:
            return f"{name} is {length:.1f} s long: choose an earlier start."
        if noun == "video" and 0 < length - start < clip.seconds - 0.05:
            return f"{name} is {length:.1f} s long, and {clip.seconds} s from the start on are needed."
        end = min(start + clip.seconds, length or start + clip.seconds)
        silence = ", then silence" if length and end - start < clip.seconds - 0.05 else ""
        return f"Used: {start:.1f} s to {end:.1f} s of the {length:.1f} s of {name}{silence}."
