"""Which trials pause, and which paused one goes on: asynchronous successive halving, with or without brackets.

Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020, algorithm 2; the brackets are those of
Hyperband (Li et al., JMLR 18). Knows neither Optuna nor how a trial is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from caltech_sweep.study.definition import Component

# Pruners of this package: they pause trials where Optuna's end them. With Optuna's arguments ``hyperband`` is Optuna's.
PAUSING = ("asha", "hyperband")
PAUSING_ARGUMENTS = ("min_epochs", "factor")


@dataclass(frozen=True)
class Contender:
    """A trial as the others are compared with it: its results by epoch, more being better, and where it is paused.

    ``bracket`` is None for a row, which is in all of them.
    """

    number: int
    results: Mapping[int, float]
    paused: int = 0  # the epoch that it is paused at; 0: it is not paused
    bracket: int | None = 0


@dataclass(frozen=True)
class Pausing:
    """Rungs at ``min_epochs``, and ``factor`` times the one before; of each rung the best 1 / ``factor`` go on.

    Raises ValueError with a sentence for arguments that make no rungs.
    """

    min_epochs: int = 1
    factor: int = 3
    brackets: bool = False  # later ones start at higher rungs, as in Hyperband

    def __post_init__(self) -> None:
        for name, least in (("min_epochs", 1), ("factor", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")

    def _all_rungs(self, epochs: int) -> list[int]:
        rungs, rung = [], self.min_epochs
        while rung < epochs:
            rungs.append(rung)
            rung *= self.factor
        return rungs

    def bracket(self, number: int, epochs: int) -> int:
        """Return the bracket of trial ``number`` that trains so many epochs: how many rungs it leaves out."""
        if not self.brackets:
            return 0
        order = _order(len(self._all_rungs(epochs + 1)), self.factor)  # the last bracket never pauses or hardly does
        return order[number % len(order)]

    def rungs(self, number: int, epochs: int) -> tuple[int, ...]:
        """Return the epochs after which a trial may pause; the last epoch is none of them."""
        return tuple(self._all_rungs(epochs)[self.bracket(number, epochs) :])

    def promoted(self, contenders: Sequence[Contender]) -> int | None:
        """Return the number of the paused trial that goes on next, or None when none has earned it.

        It is the best paused one of the highest rung that has one among its best 1 / ``factor``; equals go by number.
        """
        for rung in sorted({trial.paused for trial in contenders if trial.paused}, reverse=True):
            paused = {trial.bracket for trial in contenders if trial.paused == rung}
            earned = [trial for bracket in paused for trial in self._best(contenders, rung, bracket)]
            waiting = [trial for trial in earned if trial.paused == rung]
            if waiting:
                return min(waiting, key=lambda trial: (-trial.results[rung], trial.number)).number
        return None

    def _best(self, contenders: Iterable[Contender], rung: int, bracket: int | None) -> list[Contender]:
        reached = [t for t in contenders if rung in t.results and t.bracket in (None, bracket)]
        reached.sort(key=lambda trial: (-trial.results[rung], trial.number))
        return reached[: len(reached) // self.factor]


@lru_cache(maxsize=64)
def _order(brackets: int, factor: int) -> tuple[int, ...]:
    """Return the brackets of as many trials in a row as have each bracket in Hyperband's share, spread evenly."""
    if brackets < 2:
        return (0,)
    shares = [math.ceil(brackets * factor ** (brackets - 1 - b) / (brackets - b)) for b in range(brackets)]
    owed, order = [0] * brackets, []
    for _ in range(sum(shares)):
        owed = [have + share for have, share in zip(owed, shares, strict=True)]
        chosen = owed.index(max(owed))
        owed[chosen] -= sum(shares)
        order.append(chosen)
    return tuple(order)


def pauses(pruner: Component) -> bool:
    """Tell whether a pruner pauses trials."""
    return pruner.name == "asha" or (pruner.name in PAUSING and bool(pruner.arguments.keys() & {*PAUSING_ARGUMENTS}))


def make_pausing(pruner: Component | None) -> Pausing | None:
    """Return the rungs at which a study's trials pause, or None where its pruner ends trials, or there is none."""
    if pruner is None or not pauses(pruner):
        return None
    return Pausing(**pruner.arguments, brackets=pruner.name == "hyperband")
