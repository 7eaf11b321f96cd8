"""What stands between the page and the generation function: one model, one clip at a time, files that go away."""

import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from avdit.generate import MAX_SEED, Request, Result, Stopped, generate, load_pipeline, whole
from avdit.media import MediaError, write_wav
from avdit.pipeline import AVDiTPipeline

KEPT_SECONDS = 3600  # how long a visitor's files stay


@dataclass
class Progress:
    """So many steps of the clip are done."""

    step: int
    steps: int


@dataclass
class Finished:
    """The clip and its files."""

    result: Result
    video: Path
    audio: Path


class Service:
    """Generates clips for any number of visitors with one model in memory."""

    def __init__(self, checkpoint: Path, device: str = "cpu") -> None:
        self.pipe: AVDiTPipeline = load_pipeline(checkpoint, device)
        self._outputs = tempfile.TemporaryDirectory(prefix="avdit-clips-", ignore_cleanup_errors=True)
        self.folder = Path(self._outputs.name)
        self.lock = threading.Lock()
        self.running: dict[str, threading.Event] = {}  # what stops the work of a visitor's session

    @property
    def classes(self) -> list[str]:
        return list(self.pipe.classes)

    def stop(self, session: str) -> None:
        """End a session's work at its next step; nothing where none is under way."""
        if event := self.running.get(session):
            event.set()

    def run(self, request: Request, session: str = "") -> Iterator[Progress | Finished]:
        """Yield progress, then the finished clip; ends early where ``stop`` is called or the iterator is closed.

        Raises:
            ValueError: for a request that cannot be served, with a sentence for the user.
        """
        request.validate(self.classes)
        self.remove_old_files()
        stop = self.running[session] = threading.Event()
        reports: queue.Queue[Progress | Finished | Exception | None] = queue.Queue()

        def work() -> None:
            try:
                with self.lock:
                    result = generate(
                        self.pipe,
                        request,
                        on_step=lambda step, steps, _: reports.put(Progress(step, steps)),
                        should_stop=stop.is_set,
                    )
                reports.put(self.store(result))
            except Stopped:
                reports.put(None)
            except Exception as error:  # handed to the visitor's own thread, which raises it
                reports.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while True:
                report = reports.get()
                if report is None:
                    return
                if isinstance(report, Exception):
                    raise report
                yield report
                if isinstance(report, Finished):
                    return
        finally:
            stop.set()
            if self.running.get(session) is stop:
                del self.running[session]

    def store(self, result: Result) -> Finished:
        """Write a result's files into a folder of its own.

        Raises:
            MediaError: where they cannot be written.
        """
        try:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            name = f"{result.recipe['class'].replace(' ', '-')}-{result.recipe['seed']}"
            video = result.save(folder / f"{name}.mp4")
            return Finished(result, video, write_wav(folder / f"{name}.wav", result.audio, result.sampling_rate))
        except OSError as error:
            raise MediaError(f"the clip could not be stored: {error.strerror or error}; try again later") from error

    def remove_old_files(self) -> None:
        """Remove what visitors made more than an hour ago."""
        for folder in self.folder.iterdir():
            try:
                old = time.time() - folder.stat().st_mtime > KEPT_SECONDS
            except FileNotFoundError:  # another request has just removed it
                continue
            if old:
                shutil.rmtree(folder, ignore_errors=True)


def whole_or_as_is(value: float) -> float | int:
    """A slider's 12.0 as 12; anything else as it is, for ``Request.validate`` to name."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def parse_seed(text: str | int | float) -> int:
    """A seed as the page or the API gives it.

    Raises:
        ValueError: where it is no whole number in range.
    """
    try:
        seed = int(str(text).strip())
    except ValueError:
        raise ValueError(f"seed {str(text)[:80]!r} must be a whole number from 0 to {MAX_SEED}") from None
    whole(seed, "seed", 0, MAX_SEED)
    return seed
