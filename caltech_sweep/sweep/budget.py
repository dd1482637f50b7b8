"""What a study has spent over all its runs, and whether another trial fits into what is left of its budget.

Epochs count when they are trained: not those that a trial shares with an earlier one or had before it was interrupted.
Hours count while trials run, by the clock on the wall however many workers train; trials that run at the same time
have equal shares of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from caltech_sweep.config import TrialConfig
from caltech_sweep.metrics import SPENT_EPOCHS, SPENT_SECONDS
from caltech_sweep.sweep.executors.base import Epoch
from caltech_sweep.text import counted
from caltech_sweep.tracking.records import TrialRecord, whole


@dataclass
class Spent:
    """What a trial or a study has spent: epochs that were trained, seconds in which it ran."""

    epochs: int = 0
    seconds: float = 0.0

    def metrics(self) -> dict[str, float]:
        """Return these by their names in the tracking store."""
        return {SPENT_EPOCHS: float(self.epochs), SPENT_SECONDS: self.seconds}


def spent_by(records: Iterable[TrialRecord]) -> Spent:
    """Return what some runs have spent; a complete one of a version that did not record it, by its other records."""
    total = Spent()
    for record in records:
        total.epochs += whole(record.metrics.get(SPENT_EPOCHS, record.tags.get("reuse.epochs_trained", 0)))
        total.seconds += record.metrics.get(SPENT_SECONDS, 0.0)
    return total


class Ledger:
    """Keeps what each trial has spent, and admits a trial only where it fits into the budget.

    ``budget`` is that of the study, ``kept`` how many epochs of a trial are stored already. A trial fits when those
    that it has to train, with those that running trials have left, are no more than the epochs that are left, and when
    they take no more than the hours that are left, by the median of the epochs that were measured.
    """

    def __init__(
        self,
        budget: Mapping[str, float],
        kept: Callable[[TrialConfig], int] = lambda config: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget, self._kept, self._clock = dict(budget), kept, clock
        self._trials: dict[int, Spent] = {}
        self._reserved: dict[int, int] = {}  # epochs that each running trial has left
        self._until: dict[int, int] = {}  # the epoch after which each running trial ends
        self._measured: list[float] = []  # seconds of epochs
        self._at = clock()
        self.over = False  # whether running trials have to stop

    def start(self, records: Collection[TrialRecord]) -> None:
        """Take over what earlier runs of the study have spent."""
        by_number: dict[int, list[TrialRecord]] = {}
        for record in records:
            by_number.setdefault(record.number, []).append(record)
        self._trials = {number: spent_by(some) for number, some in by_number.items()}
        self._measured = [r.metrics["epoch_seconds"] for r in records if "epoch_seconds" in r.metrics]
        self._at = self._clock()

    def of(self, number: int) -> Spent:
        """Return what a trial has spent, which grows as it runs."""
        return self._trials.setdefault(number, Spent())

    @property
    def total(self) -> Spent:
        """What the study has spent."""
        trials = self._trials.values()
        return Spent(sum(spent.epochs for spent in trials), sum(spent.seconds for spent in trials))

    def need(self, config: TrialConfig, until: int | None = None) -> int:
        """Return the most epochs that a trial has to train up to epoch ``until``, or to its end."""
        return max(0, (until or config.epochs) - self._kept(config))

    def admit(self, number: int, config: TrialConfig, until: int) -> bool:
        """Tell whether a trial fits that goes on up to epoch ``until``, and if so keep its epochs for it."""
        if not self.budget:  # nothing to look up
            return True
        need, total = self.need(config, until), self.total
        epochs, hours = self.budget.get("epochs"), self.budget.get("hours")
        if epochs is not None and need and total.epochs + sum(self._reserved.values()) + need > epochs:
            return False
        if hours is not None and total.seconds + max(need * self.epoch_seconds, 1e-9) > hours * 3600:
            return False
        self._reserved[number], self._until[number] = need, until
        return True

    def extend(self, number: int, until: int) -> None:
        """Keep the epochs of a running trial that goes on past the one up to which it was admitted, to ``until``."""
        if (more := until - self._until.get(number, until)) > 0:
            self._reserved[number], self._until[number] = self._reserved.get(number, 0) + more, until

    def release(self, number: int) -> None:
        """Take back what was kept for a trial: it has ended, or waits."""
        self._reserved.pop(number, None)

    @property
    def epoch_seconds(self) -> float:
        """How long an epoch takes, by the median; 0 while none was measured."""
        return statistics.median(self._measured) if self._measured else 0.0

    def epoch(self, event: Epoch) -> None:
        """Count an epoch of a running trial, unless it was trained before."""
        if event.reused:
            return
        self.of(event.job).epochs += 1
        self._reserved[event.job] = max(0, self._reserved.get(event.job, 0) - 1)
        self._measured.append(event.metrics.get("epoch_seconds", 0.0))
        ends = event.last or event.epoch >= self._until.get(event.job, 0)
        # Only where more had to be trained than was kept: a worker died, or the cache dropped a checkpoint.
        self.over = self.over or (not ends and self.total.epochs >= self.budget.get("epochs", float("inf")))

    def pass_time(self, running: Collection[int]) -> None:
        """Share the time since the last call among the trials that run."""
        now = self._clock()
        for number in running:
            self.of(number).seconds += (now - self._at) / len(running)
        self._at = now
        self.over = self.over or self.total.seconds > self.budget.get("hours", float("inf")) * 3600

    def sentence(self, waiting: Sequence[TrialConfig], sampled: int, most: int) -> str:
        """Return what the budget was spent on, and what the study would do with more.

        ``waiting`` trials and ``sampled`` ones of at most ``most`` epochs are left.
        """
        total = self.total
        more = sum(map(self.need, waiting)) + sampled * most
        kinds = [(len(waiting), "trial that waits", "trials that wait"), (sampled, "sampled trial", "sampled trials")]
        left = " and ".join(counted(*kind) for kind in kinds if kind[0])
        spent = [f"{total.epochs:,} of {self.budget['epochs']:,} epochs"] if "epochs" in self.budget else []
        goal = [f"epochs={total.epochs + more}"] if "epochs" in self.budget else []
        if "hours" in self.budget:
            spent.append(f"{total.seconds / 3600:.2f} of {self.budget['hours']:g} hours")
            goal.append(f"hours={(total.seconds + more * self.epoch_seconds) / 3600 + 0.01:.2f}")
        return (
            f"the study ends within its budget, with {' and '.join(spent)} spent; with more it would train {left}, "
            f"at most {more:,} epochs: run it again with --budget {' --budget '.join(goal)}"
        )
