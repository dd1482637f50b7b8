"""Signs of life from deep inside a trial, which tell a long epoch from a worker that hangs, and a notice to it.

The loops that take long call :func:`beat` each time round; who runs the trial says with :func:`beating` where
the signs go.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 10.0  # seconds between two signs; seldom, since a pipe holds few until they are read
leaving = threading.Event()  # this process ends soon: the state after the epoch under way is saved, whatever it costs

_sign: Callable[[], None] | None = None  # of this process, which runs one trial at a time
_last = 0.0


def beat() -> None:
    """Give a sign, unless the last one is only just past, or no receiver was named."""
    global _last
    if _sign is not None and time.monotonic() - _last >= EVERY:
        _last = time.monotonic()
        _sign()


@contextmanager
def beating(sign: Callable[[], None]) -> Iterator[None]:
    """Send the signs that are given meanwhile to ``sign``."""
    global _sign
    before, _sign = _sign, sign
    try:
        yield
    finally:
        _sign = before
