"""Turns at the one model: first come, first served, one window at a time."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from avdit.generate import Stopped

POLL_SECONDS = 0.1  # between two looks at whether the one who waits has gone


class Turns:
    """A fair lock whose waiting can be called off; a long clip and an endless stream go window by window in turn."""

    def __init__(self) -> None:
        self._waiting: deque[object] = deque()  # the first one has its turn
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """How many have their turn or wait for it."""
        return len(self._waiting)

    @contextlib.contextmanager
    def turn(self, should_stop: Callable[[], bool]) -> Iterator[None]:
        """Wait for a turn, hold it for the block, hand it on.

        Raises:
            Stopped: where ``should_stop`` said so before the turn came.
        """
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
        try:
            with self._changed:
                while self._waiting[0] is not ticket:
                    if should_stop():
                        raise Stopped
                    self._changed.wait(POLL_SECONDS)
            yield
        finally:
            with self._changed:
                self._waiting.remove(ticket)
                self._changed.notify_all()
