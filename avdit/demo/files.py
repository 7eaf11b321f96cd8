"""Files of visitors: gone after a while, and never more than the disk is meant to hold."""

import contextlib
import shutil
import time
from pathlib import Path


def keep_newest(folder: Path, seconds: float, most_bytes: int) -> None:
    """Remove the entries of ``folder`` that are older than ``seconds``, and of the others the oldest beyond the limit.

    Args:
        folder: Its entries are files, or folders that go as a whole; it may be missing.
        most_bytes: What the newest entries may hold together; the very newest stays even where it holds more.
    """
    entries = []
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):  # another request has just removed it
            entries.append((path.stat().st_mtime, path, _size(path)))
    held = 0
    for rank, (changed, path, size) in enumerate(sorted(entries, reverse=True)):
        held += size
        if time.time() - changed > seconds or (rank and held > most_bytes):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
