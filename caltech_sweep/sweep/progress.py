"""What a person sees of a running study: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Protocol, cast

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from caltech_sweep.machine import Lasting, rewrites_lines
from caltech_sweep.metrics import TRAIN_LOSS, Objective
from caltech_sweep.text import duration

ACCURACY = Objective("accuracy")


class Progress(Protocol):
    """Told by the coordinator what happens; has no say in it."""

    def study_started(self, name: str, done: int, total: int, goal: Objective = ACCURACY) -> None:
        """A study begins with ``done`` of ``total`` trials behind it; ``goal`` is what is shown of each epoch."""

    def trial_started(self, number: int, name: str, epochs: int) -> None:
        """A trial got its slot."""

    def trial_promoted(self, number: int, name: str, epoch: int) -> None:
        """A trial that was paused at an epoch goes on; :meth:`trial_started` follows."""

    def epoch(self, number: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """A trial finished an epoch."""

    def trial_ended(self, number: int, name: str, outcome: str, text: str) -> None:
        """A trial ended."""

    def note(self, text: str) -> None:
        """Something a person should know."""


@dataclass
class _Trial:
    name: str
    epochs: int
    epoch: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    heard: float = 0.0  # when the last epoch ended

    def ended(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Take an epoch that has just ended."""
        self.epoch, self.metrics, self.heard = epoch, metrics, time.monotonic()

    def left(self) -> str:
        """Return how long the trial still takes; by its last epoch, since the first ones may have been reused."""
        seconds = self.metrics.get("epoch_seconds")
        if seconds is None:
            return ""
        return duration(max(0.0, seconds * (self.epochs - self.epoch) - (time.monotonic() - self.heard)))


class PlainProgress(Progress):
    """One line an event; for logs and pipes."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._trials: dict[int, _Trial] = {}
        self._goal = ACCURACY

    def study_started(self, name: str, done: int, total: int, goal: Objective = ACCURACY) -> None:
        self._goal = goal
        self._write(f"study {name}: {done} of {total} trials done")

    def trial_started(self, number: int, name: str, epochs: int) -> None:
        self._trials[number] = _Trial(name, epochs)
        self._write(f"[{number}] {name}: started, {epochs} epochs")

    def trial_promoted(self, number: int, name: str, epoch: int) -> None:
        self._write(f"[{number}] {name}: promoted, goes on from epoch {epoch}")

    def epoch(self, number: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Say how an epoch went, at most ten times a trial."""
        trial = self._trials[number]
        trial.ended(epoch, metrics)
        every = max(1, trial.epochs // 10)
        if epoch % every and epoch != trial.epochs:
            return
        left = trial.left()
        self._write(
            f"[{number}] {trial.name}: epoch {epoch}/{trial.epochs}, train loss {metrics.get(TRAIN_LOSS, 0):.3f}, "
            f"val {self._goal.label} {metrics.get(self._goal.each_epoch, 0):.3f}{f', {left} left' if left else ''}"
        )

    def trial_ended(self, number: int, name: str, outcome: str, text: str) -> None:
        self._trials.pop(number, None)
        self._write(f"[{number}] {name}: {outcome}{', ' + text if text else ''}")

    def note(self, text: str) -> None:
        self._write(text)


class LiveProgress(Progress):
    """A table of the running trials below the lines of those that ended; a context manager."""

    def __init__(self, console: Console) -> None:
        self._trials: dict[int, _Trial] = {}
        self._study, self._done, self._total, self._ended = "", 0, 0, 0
        self._goal = ACCURACY
        self._started = time.monotonic()
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self._table)  # draws at once
        self._lines = PlainProgress(lambda line: self._live.console.print(line, markup=False, highlight=False))

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def _table(self) -> Table:
        now, left = time.monotonic(), ""
        if self._ended and self._total > self._done:
            left = f", about {duration((now - self._started) / self._ended * (self._total - self._done))} left"
        # Text, since a bracket in a plain string would be read as markup.
        title = Text(f"{self._study}: {self._done} of {self._total} trials{left}")
        table = Table(title=title, title_justify="left")
        for column in ("trial", "epoch", "train loss", f"val {self._goal.label}", "time left"):
            table.add_column(column)
        for trial in list(self._trials.values()):
            loss, reached = (trial.metrics.get(key) for key in (TRAIN_LOSS, self._goal.each_epoch))
            table.add_row(
                Text(trial.name),
                f"{trial.epoch}/{trial.epochs}",
                "" if loss is None else f"{loss:.3f}",
                "" if reached is None else f"{reached:.3f}",
                trial.left(),
            )
        return table

    def study_started(self, name: str, done: int, total: int, goal: Objective = ACCURACY) -> None:
        self._study, self._done, self._total, self._goal = name, done, total, goal

    def trial_started(self, number: int, name: str, epochs: int) -> None:
        self._trials[number] = _Trial(name, epochs)

    def trial_promoted(self, number: int, name: str, epoch: int) -> None:
        """Count a trial as done no more, and say so."""
        self._done -= 1
        self._lines.trial_promoted(number, name, epoch)

    def epoch(self, number: int, epoch: int, metrics: Mapping[str, float]) -> None:
        self._trials[number].ended(epoch, metrics)

    def trial_ended(self, number: int, name: str, outcome: str, text: str) -> None:
        """Move a line from the table to the log above it."""
        self._trials.pop(number, None)
        if outcome != "interrupted":
            self._done, self._ended = self._done + 1, self._ended + 1
        self._lines.trial_ended(number, name, outcome, text)

    def note(self, text: str) -> None:
        self._lines.note(text)


@contextmanager
def showing(write: Callable[[str], None]) -> Iterator[Progress]:
    """Yield a live table on a terminal that can rewrite its lines, and plain lines elsewhere."""
    if not rewrites_lines(sys.stderr):
        yield PlainProgress(write)
        return
    with LiveProgress(Console(file=cast(IO[str], Lasting(sys.stderr)))) as progress:
        yield progress
