"""Calls that may take long, done in turn by one thread, so that training does not wait for a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_Task = tuple["Future[Any]", Callable[[], Any]]


class Background:
    """One thread that does calls in their order. It ends with the process, whatever it waits for then."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: SimpleQueue[_Task] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: Future[Any] | None = None

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Do a call after those before it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._last = future
        self._tasks.put((future, call))
        return future

    @property
    def is_busy(self) -> bool:
        """Whether a call has not ended."""
        return self._last is not None and not self._last.done()

    def _work(self) -> None:
        while True:
            future, call = self._tasks.get()
            try:
                future.set_result(call())
            except BaseException as error:  # raised again for the one who asks for the result
                future.set_exception(error)
