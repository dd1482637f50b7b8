"""Learning-rate schedules, and how many epochs two of them have in common.

To add one, add an entry to SCHEDULES; a setting that it reads and that no other does is a new field of TrialConfig.
This module knows no torch, and no config but by the names of its settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

NOMINAL_STEPS = 8  # of an epoch, where two schedules are compared and the number of images is not known

EpochRates = tuple[float, ...]  # the learning rate of each step of an epoch, or one that holds throughout


@dataclass(frozen=True)
class Schedule:
    """A schedule: ``rate(at, steps, ...)`` is the learning rate at a place that is counted from 0.

    Places are epochs, and ``steps`` is 1; where ``per_step`` is set they are steps, and ``steps`` is how many an epoch
    has. The function's further parameters are the settings that the schedule reads.
    """

    rate: Callable[..., float]
    per_step: bool = False

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that the schedule reads."""
        return tuple(inspect.signature(self.rate).parameters)[2:]


class Scheduled(Protocol):
    """What is known here of a trial's config; it has the settings of its schedule, too."""

    @property
    def schedule(self) -> str: ...

    @property
    def epochs(self) -> int: ...


def _step(at: int, steps: int, lr: float, step_size: int, gamma: float) -> float:
    """Return the rate of torch's StepLR: multiplied by ``gamma`` after every ``step_size`` epochs."""
    return lr * gamma ** (at // (step_size * steps))


SCHEDULES: dict[str, Schedule] = {
    "step": Schedule(_step),
}


def schedule_settings() -> frozenset[str]:
    """Return the settings that decide the weights only by the learning rates that they give."""
    return frozenset({"schedule", "epochs"}).union(*(schedule.settings for schedule in SCHEDULES.values()))


def epoch_rates(config: Scheduled, epoch: int, steps: int = NOMINAL_STEPS) -> EpochRates:
    """Return the learning rates of a 1-based epoch of so many steps; one rate where it does not change within it."""
    schedule = SCHEDULES[config.schedule]
    settings: dict[str, Any] = {name: getattr(config, name) for name in schedule.settings}
    if not schedule.per_step:
        return (schedule.rate(epoch - 1, 1, **settings),)
    rates = tuple(schedule.rate(at, steps, **settings) for at in range((epoch - 1) * steps, epoch * steps))
    return rates if len(set(rates)) > 1 else rates[:1]


def learning_rates(config: Scheduled, steps: int = NOMINAL_STEPS) -> tuple[EpochRates, ...]:
    """Return the learning rates of every epoch: all that a schedule means to the weights."""
    return tuple(epoch_rates(config, epoch, steps) for epoch in range(1, config.epochs + 1))


def shared_epochs(rates: Sequence[object], others: Sequence[object]) -> int:
    """Return in how many epochs from the start two lists agree: of learning rates, or of more about each epoch."""
    pairs = enumerate(zip(rates, others, strict=False))
    return next((epoch for epoch, (rate, other) in pairs if rate != other), min(len(rates), len(others)))
