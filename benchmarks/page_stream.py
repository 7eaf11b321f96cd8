"""How fast a long stream is made beside its browser, and whether its picture and its sound stay together.

``python -m benchmarks.page_stream --minutes 10``, with ``--flat-out`` for the speed: the stream then never waits
because it is far ahead, and seconds of stream a second are what the machine can do while the page plays it.
Starts the page round the shipped model, plays its endless stream in Debian's chromium while class, steps and guidance
are changed, and measures on the segments that the browser fetched. So that the measurement is exact, every window of
the stream gets a white corner in one frame and a beep that begins with this frame. At a low ``--steps`` a slow machine
is done sooner; what is measured does not depend on it.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
from playwright.sync_api import Page, Response, sync_playwright

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it when it is imported
from avdit.demo.looks import style_sheet, theme
from avdit.demo.service import AHEAD_SECONDS, Service
from avdit.demo.ui import create_demo
from avdit.generate import DEFAULT_CHECKPOINT, stream
from avdit.media import ensure_ffmpeg, read_audio
from avdit.streaming import Window

FLAGS = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
RATE = 16000
MARKED = 6  # frame of a window
SIDE = 48  # pixels of the corner
BEEP = 0.9 * np.sin(2 * np.pi * 3000 / RATE * np.arange(160, dtype=np.float32))
COUNT_WAITS = """() => { window.waits = 0;
    document.querySelector('#live video').addEventListener('waiting', () => { window.waits += 1; }); }"""


@dataclass
class Joints:
    """What the segments hold. Times are in milliseconds where the name says so."""

    segments: int
    seconds: float  # of picture
    marks: int  # windows whose mark is seen and heard
    lost: int  # marks seen but not heard, or heard but not seen
    offset_ms_most: float  # between a mark in the sound and the same mark in the picture, as absolute value
    offset_ms_median: float
    picture_gap_ms: float  # the largest difference of a frame's distance to the next from its length
    sound_gap_ms: float  # the same of the sound's packets
    spacing_ms: float  # the largest difference of two marks' distance in the sound from that in the picture


def marked(windows: Iterator[Window]) -> Iterator[Window]:
    """The same windows with a white corner in frame ``MARKED`` and, in a softer sound, a beep that begins with it."""
    for frames, audio in windows:
        frames, audio = frames.copy(), 0.05 * audio
        frames[:, :SIDE, :SIDE] = 0
        frames[MARKED, :SIDE, :SIDE] = 1
        at = MARKED * len(audio) // len(frames)
        audio[at : at + len(BEEP)] += BEEP
        yield frames, audio


def marked_stream(*arguments, **options) -> Iterator[Window]:
    """``avdit.generate.stream`` with marks."""
    return marked(stream(*arguments, **options))


class Made:
    """``marked_stream`` that notes when each window came."""

    def __init__(self) -> None:
        self.windows: list[tuple[float, int]] = []  # when, and of how many frames

    def __call__(self, *arguments, **options) -> Iterator[Window]:
        for frames, audio in marked_stream(*arguments, **options):
            self.windows.append((time.monotonic(), len(frames)))
            yield frames, audio

    def speed(self, fps: int) -> float:
        """Seconds of stream a second, from the first window on."""
        (begun, _), *rest = self.windows
        return sum(count for _, count in rest) / fps / (rest[-1][0] - begun)


def measure(segments: list[bytes]) -> Joints:
    """Read the marks and the times of a stream's segments in their order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole.ts"
        path.write_bytes(b"".join(segments))
        picture, sound = _packets(path, "v"), _packets(path, "a")
        crop = ["-vf", f"crop={SIDE}:{SIDE}:0:0,scale=1:1:flags=area", "-fps_mode", "passthrough", "-pix_fmt", "gray"]
        command = ["ffmpeg", "-v", "error", "-nostdin", "-i", str(path), *crop, "-f", "rawvideo", "-"]
        corner = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
        audio = read_audio(path, sampling_rate=RATE)
    seen = picture[: len(corner), 0][corner > 128]
    # The sound's packets follow on each other (``sound_gap_ms`` says how well), so its samples can be counted.
    loud = np.flatnonzero(np.abs(audio) > 0.35)
    begins = loud[np.diff(loud, prepend=-RATE) > RATE // 4]
    heard = sound[0, 0] + begins / RATE
    nearest = np.abs(seen[:, None] - heard[None]).argmin(1)
    pairs = [(s, heard[k]) for s, k in zip(seen, nearest, strict=True) if abs(s - heard[k]) < 0.5]
    offsets = np.array([h - s for s, h in pairs])
    return Joints(
        segments=len(segments),
        seconds=round(float(picture[-1].sum() - picture[0, 0]), 2),
        marks=len(pairs),
        lost=len(seen) + len(heard) - 2 * len(pairs),
        offset_ms_most=_ms(np.abs(offsets).max()),
        offset_ms_median=_ms(np.median(offsets)),
        picture_gap_ms=_ms(np.abs(np.diff(picture[:, 0]) - picture[:-1, 1]).max()),
        sound_gap_ms=_ms(np.abs(np.diff(sound[:, 0]) - sound[:-1, 1]).max()),
        spacing_ms=_ms(np.abs(np.diff(offsets)).max()),
    )


def _ms(seconds: float) -> float:
    return round(1000 * float(seconds), 2)


def _packets(path: Path, kind: str) -> np.ndarray:
    """Time and length (n, 2) in seconds of a file's packets of ``kind`` ``v`` or ``a``, by time."""
    asked = ["ffprobe", "-v", "error", "-select_streams", kind, "-show_entries", "packet=pts_time,duration_time"]
    rows = subprocess.run([*asked, "-of", "csv=p=0", path], capture_output=True, text=True, check=True).stdout
    return np.array(sorted(tuple(map(float, row.split(",")[:2])) for row in rows.split() if "N/A" not in row))


class Fetched:
    """The segments that a page's player fetches."""

    def __init__(self, page: Page) -> None:
        self.segments: list[bytes] = []
        self._new: list[Response] = []
        page.on("response", self._note)

    def _note(self, response: Response) -> None:
        if response.url.split("?")[0].endswith(".ts") and response.ok:
            self._new.append(response)

    def collect(self) -> None:
        """Keep what has come; now and then, for the browser does not hold it for ever."""
        while self._new:
            self.segments.append(self._new.pop(0).body())


def play(
    page: Page, fetched: Fetched, seconds: float, change: Callable[[], None], every: float, limit: float
) -> dict[str, Any]:
    """Start the stream of the open page, play ``seconds`` of it and stop it.

    After ``limit`` seconds of work it is stopped in any case.

    Returns:
        ``waits``: how often the player had to wait; ``memory_mb``: what this process holds, four times while it plays.
    """
    memory: list[int] = []
    page.set_default_timeout(1000 * limit)
    page.get_by_role("tab", name="Endless stream").first.click()
    page.get_by_role("button", name="Start the stream").click()
    page.wait_for_function("document.querySelector('#live video')?.currentTime > 0.1")
    page.evaluate(COUNT_WAITS)
    changed, told, last = 0.0, time.monotonic(), time.monotonic() + limit
    while (at := page.locator("#live video").evaluate("v => v.currentTime")) < seconds and time.monotonic() < last:
        page.wait_for_timeout(500)
        fetched.collect()
        if at > (len(memory) + 0.5) * seconds / 4:
            memory.append(round(psutil.Process().memory_info().rss / 2**20))
        if at - changed > every:
            change()
            changed = at
        if time.monotonic() - told > 60:
            print(f"{at:.0f} s played · {page.locator('#status').inner_text()}", flush=True)
            told = time.monotonic()
    page.get_by_role("button", name="Stop", exact=True).click()
    fetched.collect()
    return {"waits": page.evaluate("window.waits"), "memory_mb": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--limit", type=float, default=60, help="minutes of work after which to stop in any case")
    parser.add_argument("--steps", type=int, help="with guidance that changes, too; the page's own choice without")
    parser.add_argument("--change", type=float, default=20, help="seconds of stream between changes of class")
    parser.add_argument("--flat-out", action="store_true", help="make as much as the machine can, however far ahead")
    parser.add_argument("--keep", type=Path, help="file for what was fetched")
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    args = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.exit(2, "chromium is not installed: apt-get install chromium\n")
    ensure_ffmpeg()
    service = Service(args.checkpoint)
    demo = create_demo(service)
    _, url, _ = demo.launch(
        prevent_thread_lock=True,
        quiet=True,
        server_name="127.0.0.1",
        theme=theme(),
        css=style_sheet(service.classes),
    )
    made = Made()
    ahead = float("inf") if args.flat_out else AHEAD_SECONDS
    patches = patch.multiple("avdit.demo.service", stream=made, AHEAD_SECONDS=ahead)
    with patches, sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium, args=FLAGS).new_page()
        page.set_default_timeout(300_000)  # ms, until it is open
        fetched = Fetched(page)
        page.goto(url)
        page.locator("#classes").wait_for()
        page.wait_for_function("document.querySelector('#status')?.innerText.includes('Example')")

        def number(label: str, value: float) -> None:
            box = page.get_by_label(f"number input for {label}")
            box.fill(str(value))
            box.press("Tab")

        turns = itertools.cycle(service.classes[1:] + service.classes[:1])
        guidance = itertools.cycle([1.5, 3, 2])

        def change() -> None:
            choose(page, service, next(turns))
            if args.steps:
                number("Picture guidance", next(guidance))

        if args.steps:
            number("Steps", args.steps)
        begun = time.monotonic()
        played = play(page, fetched, 60 * args.minutes, change, args.change, 60 * args.limit)
        wall = time.monotonic() - begun
    demo.close()
    if args.keep:
        args.keep.write_bytes(b"".join(fetched.segments))
    speed = round(made.speed(service.checkpoint.geometry.fps), 2)
    print(json.dumps(asdict(measure(fetched.segments)) | played | {"wall_s": round(wall, 1), "speed": speed}))


def choose(page: Page, service: Service, label: str) -> None:
    """Choose a class on the page, and before it the pack where there are several."""
    for pack, classes in service.packs.items():
        if len(service.packs) > 1 and label in classes:
            page.get_by_role("radio", name=pack, exact=True).check()
    page.get_by_role("radio", name=label, exact=True).check()


if __name__ == "__main__":
    main()
