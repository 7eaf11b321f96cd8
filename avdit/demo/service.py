"""What stands between the page and the generation function: one model, one clip at a time, files that go away."""

import queue
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from avdit.generate import Request, Result, Stopped, generate, load_pipeline, whole
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
        self.folder = Path(tempfile.mkdtemp(prefix="avdit-clips-"))
        self.lock = threading.Lock()

    @property
    def classes(self) -> list[str]:
        return list(self.pipe.classes)

    def run(self, request: Request, stop: threading.Event | None = None) -> Iterator[Progress | Finished]:
        """Yield progress, then the finished clip; closing the iterator stops the work at its next step.

        Raises:
            ValueError: for a request that cannot be served, with a sentence for the user.
        """
        request.validate(self.classes)
        self.remove_old_files()
        stop = stop or threading.Event()
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

    def store(self, result: Result) -> Finished:
        """Write a result's files into a folder of its own."""
        try:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            name = f"{result.recipe['class'].replace(' ', '-')}-{result.recipe['seed']}"
            video = result.save(folder / f"{name}.mp4")
            return Finished(result, video, write_wav(folder / f"{name}.wav", result.audio, result.sampling_rate))
        except OSError as error:
            raise MediaError(f"the clip could not be stored: {error.strerror or error}") from error

    def remove_old_files(self) -> None:
        """Remove what visitors made more than an hour ago."""
        for file in self.folder.rglob("*.*"):
            if time.time() - file.stat().st_mtime > KEPT_SECONDS:
                file.unlink(missing_ok=True)


def parse_seed(text: str | int | float) -> int:
    """A seed as the page or the API gives it.

    Raises:
        ValueError: where it is no whole number in range.
    """
    try:
        seed = int(str(text).strip())
    except ValueError:
        raise ValueError(f"seed {text!r} must be a whole number, 0 or more") from None
    whole(seed, "seed", 0, 2**63 - 1)
    return seed
