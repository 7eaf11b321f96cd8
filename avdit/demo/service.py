"""What stands between the page and the generation function: one model, fair turns, files that go away."""

import contextlib
import queue
import shutil
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gradio.utils import get_upload_folder

from avdit.checkpoint import Checkpoint, weights_sha256
from avdit.demo.files import keep_newest
from avdit.demo.machine import on_gpu, zero_gpu
from avdit.demo.turns import Turns
from avdit.generate import (
    MAX_SEED,
    Request,
    Result,
    Stopped,
    generate,
    load_pipeline,
    resolved,
    stream,
    usable_device,
    whole,
)
from avdit.live import LiveEncoder
from avdit.machine import usable_cores, use_bfloat16
from avdit.media import MediaError, write_wav

if TYPE_CHECKING:
    from avdit.models.preview import Preview
    from avdit.pipeline import AVDiTPipeline

KEPT_SECONDS = 3600  # how long a visitor's files stay
CLEANED_EVERY = 60  # seconds
KEPT_BYTES = 4 * 2**30  # of what visitors made, and of what they uploaded and were sent; the newest
PREVIEWS = 4  # looks at the picture while a window is made
PREVIEW_FRAMES = 4  # frames in each of them
AHEAD_SECONDS = 8.0  # of a stream that are made before they are due
LONGEST_CHUNK = 4  # windows that a slow machine puts into one chunk, so that it plays for a while
STREAM_SECONDS = 1800.0  # after which a stream ends by itself: the browser's server keeps all of it in memory


@dataclass
class Progress:
    """Steps done, 0 while others have their turn; at times some frames (N, H, W, 3) in [0, 1], not yet finished."""

    step: int
    steps: int
    before: int = 0  # works that have their turn first, at the time of asking
    loading: bool = False  # the model, at that time
    preview: np.ndarray | None = None


@dataclass
class Finished:
    """The clip and its files."""

    result: Result
    video: Path
    audio: Path


@dataclass
class Chunk:
    """The next piece of a stream, and how the stream does."""

    video: Path  # a segment of MPEG-TS that continues the one before
    length: float  # seconds of it
    class_label: str  # of its last window
    steps: int  # of its last window
    windows: int  # made so far
    seconds: float  # of clip made so far
    speed: float  # seconds of clip a second, over the last windows, less what it waited because it was ahead
    first_picture_s: float  # from the click to the first window
    ahead_s: float  # of clip that are made and not yet played, by one who plays each piece as soon as it is there


Report = Progress | Finished | Chunk


class Service:
    """Generates clips for any number of visitors with one model in memory, which need not be there yet.

    The first work that needs the model loads it, and others wait for that; :meth:`load` does so beforehand.

    Args:
        bfloat16: Compute in bfloat16; None measures once whether this machine is faster so.

    Raises:
        ValueError: for a checkpoint or a device that cannot be used, as far as that is seen without loading.
    """

    def __init__(self, checkpoint: Path, device: str = "cpu", bfloat16: bool | None = None) -> None:
        self._lent = zero_gpu()
        self.device = usable_device(device)
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
        self.bfloat16 = bfloat16
        self.checkpoint = Checkpoint.read(checkpoint)
        self._loading = threading.Lock()
        self._model: tuple[AVDiTPipeline, Preview] | None = None
        self._outputs = tempfile.TemporaryDirectory(prefix="avdit-clips-", ignore_cleanup_errors=True)
        self.folder = Path(self._outputs.name)
        self.kept_seconds = KEPT_SECONDS
        threading.Thread(target=_clean_up, args=(weakref.ref(self),), daemon=True).start()
        self.turns = Turns()
        self.running: dict[str, set[threading.Event]] = {}  # what stops the works of a visitor's session
        self.live: dict[str, dict[str, Any]] = {}  # what a visitor has changed while the stream plays
        if self._lent:  # its processes are copies of this one
            self.load()
        self._in_process = on_gpu(self._reports) if self._lent else self._reports

    def load(self) -> tuple["AVDiTPipeline", "Preview"]:
        """The model, and what looks at its pictures; who comes before they are there waits for them.

        Raises:
            ValueError: where the checkpoint cannot be loaded.
        """
        with self._loading:
            if self._model is None:
                if self.bfloat16 is None:
                    self.bfloat16 = use_bfloat16(self.device)
                dtype = torch.bfloat16 if self.bfloat16 else torch.float32
                pipe = load_pipeline(self.checkpoint.folder, str(self.device), dtype=dtype)
                self._model = pipe, fit_preview(self.checkpoint, pipe)
            return self._model

    @property
    def loaded(self) -> bool:
        """Whether the model is there."""
        return self._model is not None

    @property
    def pipe(self) -> "AVDiTPipeline":
        """The model."""
        return self.load()[0]

    @property
    def classes(self) -> list[str]:
        return self.checkpoint.classes

    @property
    def packs(self) -> dict[str, list[str]]:
        """The classes of each pack by its name, the default pack first."""
        return self.checkpoint.packs

    @property
    def weights(self) -> str:
        """The hash of the weights at work."""
        return weights_sha256(self.checkpoint.folder)

    def stop(self, session: str) -> None:
        """End a session's work at its next step; nothing where none is under way."""
        for event in list(self.running.get(session, ())):
            event.set()

    def change(self, session: str, **values: Any) -> None:
        """From a session's next window on, its stream has these values of ``Request``; nothing where none runs."""
        if session in self.live:
            self.live[session] = values

    def run(self, request: Request, session: str = "", endless: bool = False) -> Iterator[Report]:
        """Yield progress, then the finished clip; or, ``endless``, a stream's chunks.

        Ends early where ``stop`` is called or the iterator is closed. A chunk's file is gone after the next step of
        the iterator.

        Raises:
            ValueError: for a request that cannot be served, with a sentence for the user.
        """
        request.validate(self.classes)
        self.remove_old_files()
        stop = threading.Event()
        self.running.setdefault(session, set()).add(stop)
        if endless:
            self.live[session] = {}
        # A lent GPU works in another process: there Stop is noticed at the next report, and live changes are not.
        reports = self._in_process(request, endless, session, None if self._lent else stop)
        try:
            for report in reports:
                if stop.is_set():
                    return
                yield report
                if isinstance(report, Chunk):
                    report.video.unlink(missing_ok=True)
        finally:
            stop.set()
            reports.close()
            if works := self.running.get(session):
                works.discard(stop)
            if not works:
                self.running.pop(session, None)
                self.live.pop(session, None)

    def _reports(self, request: Request, endless: bool, session: str, stop: threading.Event | None) -> Iterator[Report]:
        """Do the work in a thread of its own and hand on what it reports."""
        stop = stop or threading.Event()
        reports: queue.Queue[Report | Exception | None] = queue.Queue()
        reports.put(Progress(0, request.steps, before=len(self.turns), loading=not self.loaded))

        def work() -> None:
            try:
                produce = self._stream if endless else self._clip
                produce(request, reports.put, stop, session)
                reports.put(None)
            except Stopped:
                reports.put(None)
            except Exception as error:  # handed to the visitor's own thread, which raises it
                reports.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while (report := reports.get()) is not None:
                if isinstance(report, Exception):
                    raise report
                yield report
        finally:
            stop.set()

    @contextlib.contextmanager
    def _turn(self, stop: threading.Event) -> Iterator[None]:
        with self.turns.turn(stop.is_set), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            yield

    def _clip(self, request: Request, put: Callable, stop: threading.Event, _session: str) -> None:
        on_step = partial(self._on_step, put)
        put(self.store(generate(self.pipe, request, on_step, stop.is_set, partial(self._turn, stop))))

    def _on_step(self, put: Callable, step: int, steps: int, estimate: torch.Tensor) -> None:
        """Report a step, and a few times a clip what its picture will be."""
        preview = None
        if step < steps and step % max(1, round(min(steps, 12) / PREVIEWS)) == 0:
            frames = np.linspace(0, estimate.shape[1] - 1, PREVIEW_FRAMES).round().astype(int)
            _, look = self.load()
            preview = (look(estimate[0, frames.tolist()].cpu()).permute(0, 2, 3, 1) / 2 + 0.5).numpy()
        put(Progress(step, steps, preview=preview))

    def _stream(self, request: Request, put: Callable, stop: threading.Event, session: str) -> None:
        """Make windows until stopped, not more than ``AHEAD_SECONDS`` before they are due."""
        clip = self.checkpoint.geometry
        encoder = LiveEncoder(fps=clip.fps, height=clip.height, width=clip.width, sampling_rate=clip.sampling_rate)
        with _storing():
            folder = Path(tempfile.mkdtemp(dir=self.folder))
        begun = mark = time.monotonic()
        first = dry = waited = 0.0  # seconds to the first picture; when all that is made will have been played
        made = number = 0
        pace: deque[tuple[float, float]] = deque(maxlen=4)  # (seconds of clip, of work)
        pending: list[tuple[np.ndarray, np.ndarray]] = []
        asked: deque[Request] = deque([request])  # that of the last window made, then those of the ones under way

        def live() -> Request:
            now = replace(request, **self.live.get(session, {}))
            try:
                now.validate(self.classes)
                now = resolved(self.pipe, now)
            except ValueError:  # a class without turbo adapters; the old one goes on
                now = asked[-1]
            asked.append(now)
            return now

        def speed() -> float:
            return sum(s for s, _ in pace) / max(sum(w for _, w in pace), 1e-6)

        @contextlib.contextmanager
        def turn() -> Iterator[None]:
            nonlocal waited
            since = time.monotonic()
            while dry - time.monotonic() > AHEAD_SECONDS:
                if stop.wait(0.1):
                    raise Stopped
            waited += time.monotonic() - max(since, mark)
            with self._turn(stop):
                yield

        windows = stream(self.pipe, request, None, partial(self._on_step, put), stop.is_set, live, turn)
        try:
            for frames, audio in windows:
                asked.popleft()
                number += 1
                made += len(frames)
                pending.append((frames, audio))
                seconds = made / clip.fps
                # A slow machine cannot fill every moment: it then plays longer pieces, with fewer pauses.
                if not pace or len(pending) >= min(LONGEST_CHUNK, int(np.ceil(1 / speed()))):
                    path = folder / f"{number:06}.ts"
                    joined = [np.concatenate(parts) for parts in zip(*pending, strict=True)]
                    length = len(joined[0]) / clip.fps
                    with _storing():
                        path.write_bytes(encoder.segment(*joined, last=seconds >= STREAM_SECONDS))
                    pending.clear()
                    now = time.monotonic()
                    first, dry = first or now - begun, max(dry, now) + length
                now = time.monotonic()
                pace.append((len(frames) / clip.fps, now - mark - waited))
                mark, waited = now, 0.0
                if not pending:
                    label, steps = asked[0].class_label, asked[0].steps
                    put(Chunk(path, length, label, steps, number, seconds, speed(), first, dry - now))
                if seconds >= STREAM_SECONDS:
                    return
        except ValueError:
            shutil.rmtree(folder, ignore_errors=True)  # of a stream that ends in an error nothing stays
            raise
        finally:
            windows.close()
            if stop.is_set():
                shutil.rmtree(folder, ignore_errors=True)

    def store(self, result: Result) -> Finished:
        """Write a result's files into a folder of its own.

        Raises:
            MediaError: where they cannot be written.
        """
        name = f"{result.recipe['class'].replace(' ', '-')}-{result.recipe['seed']}"
        with _storing():
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            try:
                video = result.save(folder / f"{name}.mp4")
                return Finished(result, video, write_wav(folder / f"{name}.wav", result.audio, result.sampling_rate))
            except MediaError:
                shutil.rmtree(folder, ignore_errors=True)
                raise

    def remove_old_files(self) -> None:
        """Remove what visitors made or uploaded long ago, and the oldest of what is more than is kept."""
        for folder in (self.folder, Path(get_upload_folder())):
            keep_newest(folder, self.kept_seconds, KEPT_BYTES)


def _clean_up(service: "weakref.ref[Service]") -> None:
    """Remove old files again and again as long as the service is there, whether or not anyone comes."""
    while (alive := service()) is not None:
        alive.remove_old_files()
        del alive
        time.sleep(CLEANED_EVERY)


def fit_preview(checkpoint: Checkpoint, pipe: "AVDiTPipeline") -> "Preview":
    """Looks at pictures, fitted on some scenes; a GPU may be lent by the call, so it is done on the CPU."""
    from avdit.data.scenes import CLASSES, render_clip
    from avdit.models.preview import Preview
    from avdit.models.video_codec import VideoCodec

    on_cpu = pipe.device.type == "cpu"
    codec = pipe.video_codec if on_cpu else VideoCodec.from_pretrained(checkpoint.folder / "video_codec")
    short = replace(checkpoint.geometry, frames=4)
    scenes = [render_clip(name, 0, short).frames[::3] for name in CLASSES]
    return Preview.fit(codec, torch.cat(scenes).permute(0, 3, 1, 2) * 2 - 1)


@contextlib.contextmanager
def _storing() -> Iterator[None]:
    """A failure's own words would tell where the server keeps its files."""
    try:
        yield
    except (OSError, MediaError) as error:
        raise MediaError("the clip could not be stored; the server's disk may be full: try again later") from error


def whole_or_as_is(value: float) -> float | int:
    """A slider's 12.0 as 12; anything else as it is, for ``Request.validate`` to name."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def parse_seed(text: str | int | float) -> int:
    """A seed as the page or the API gives it.

    Raises:
        ValueError: where it is no whole number in range.
    """
    digits = str(text).strip()
    if not digits.removeprefix("-").isdecimal() or len(digits) > 40:
        raise ValueError(f"seed {digits[:40]!r} must be a whole number from 0 to {MAX_SEED}")
    whole(int(digits), "seed", 0, MAX_SEED)
    return int(digits)
