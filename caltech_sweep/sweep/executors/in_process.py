"""Trials in this process, for debugging."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from caltech_sweep.sweep.executors.base import (
    Epoch,
    Epochs,
    Event,
    Job,
    Runner,
    Stopped,
    T,
    Trained,
    Work,
    Write,
    _advance,
)


class InProcessExecutor:
    """One slot in this very process: each poll trains one epoch. For debugging."""

    def __init__(self, runner: Runner, device: str | None = None) -> None:
        self._runner, self._device = runner, device
        self._running: tuple[int, Epochs] | None = None
        self._stop = False

    def ask(self, work: Work[T], write: Write) -> Callable[[], T]:
        """Return what does something here, once it is called."""
        return partial(work, write)

    def free(self) -> int:
        """Return 1 while no job runs."""
        return int(self._running is None)

    def free_soon(self) -> int:
        """Return 0: a job is done before the next one begins."""
        return 0

    def submit(self, job: Job) -> None:
        """Start a job; it advances at each poll."""
        self._running = (job.number, self._runner(replace(job, device=job.device or self._device)))
        self._stop = False

    def poll(self, timeout: float) -> list[Event]:
        """Run the job to its next event and return that."""
        if self._running is None:
            return []
        number, epochs = self._running
        if self._stop:
            epochs.close()
            event: Event = Stopped(number)
        else:
            event = _advance(number, epochs)
        if not isinstance(event, (Epoch, Trained)):
            self._running = None
        return [event]

    def answer(self, job: int, go_on: bool) -> None:
        """Go on, or stop, at the next poll."""
        self._stop = not go_on

    def close(self) -> None:
        """Drop the running job."""
        if self._running is not None:
            self._running[1].close()
            self._running = None
