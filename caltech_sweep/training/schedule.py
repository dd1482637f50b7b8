"""Learning-rate schedules, and how many epochs two of them have in common.

To add one, add an entry to SCHEDULES; a setting that it reads and that no other does is a new field of TrialConfig.
This module knows no torch, and no config but by the names of its settings.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
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

    @cached_property
    def settings(self) -> tuple[str, ...]:
        """The settings that the schedule reads."""
        return tuple(inspect.signature(self.rate).parameters)[2:]


class Scheduled(Protocol):
    """What is known here of a trial's config; it has the settings of its schedule, too."""

    @property
    def schedule(self) -> str: ...

    @property
    def epochs(self) -> int: ...

    @property
    def warmup_epochs(self) -> int: ...

    @property
    def warmup_steps(self) -> int: ...


def _constant(at: int, steps: int, lr: float) -> float:
    return lr


def _step(at: int, steps: int, lr: float, step_size: int, gamma: float) -> float:
    """Return the rate of torch's StepLR: multiplied by ``gamma`` after every ``step_size`` epochs."""
    return lr * gamma ** (at // (step_size * steps))


def _multistep(at: int, steps: int, lr: float, milestones: tuple[int, ...], gamma: float) -> float:
    """Return the rate of torch's MultiStepLR: multiplied by ``gamma`` after each of some numbers of epochs."""
    return lr * gamma ** sum(at >= milestone * steps for milestone in milestones)


def _linear(at: int, steps: int, lr: float, min_lr: float, epochs: int) -> float:
    """Return the rate of torch's LinearLR, from ``lr`` to ``min_lr``."""
    return lr + (min_lr - lr) * at / (epochs * steps)


def _cosine(at: int, steps: int, lr: float, min_lr: float, epochs: int) -> float:
    """Return the rate of torch's CosineAnnealingLR, from ``lr`` to ``min_lr``."""
    return _annealed(lr, min_lr, at / (epochs * steps))


def _annealed(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def _one_cycle(
    at: int, steps: int, lr: float, pct_start: float, div_factor: float, final_div_factor: float, epochs: int
) -> float:
    """Return the rate of torch's OneCycleLR with cosines, up to ``lr`` and down again."""
    first, last = lr / div_factor, epochs * steps - 1
    peak = pct_start * (last + 1) - 1
    if at <= peak:
        return _annealed(first, lr, at / peak if peak else 1.0)
    return _annealed(lr, first / final_div_factor, (at - peak) / (last - peak) if last > peak else 0.0)


def _wsd(at: int, steps: int, lr: float, min_lr: float, cooldown_epochs: int, epochs: int) -> float:
    """Return a constant rate that falls linearly to ``min_lr`` in the last epochs (Hägele et al., 2405.18392)."""
    start = max(0, epochs - cooldown_epochs) * steps
    return lr if at < start else _linear(at - start, steps, lr, min_lr, min(epochs, cooldown_epochs))


SCHEDULES: dict[str, Schedule] = {
    "step": Schedule(_step),
    "multistep": Schedule(_multistep),
    "cosine": Schedule(_cosine, per_step=True),
    "linear": Schedule(_linear, per_step=True),
    "constant": Schedule(_constant),
    "one_cycle": Schedule(_one_cycle, per_step=True),
    "wsd": Schedule(_wsd, per_step=True),
}
_ALWAYS = frozenset({"schedule", "epochs", "warmup_epochs", "warmup_steps"})


def schedule_settings() -> frozenset[str]:
    """Return the settings that decide the weights only by the learning rates that they give."""
    return _ALWAYS.union(*(schedule.settings for schedule in SCHEDULES.values()))


def not_scheduling(schedule: str) -> set[str]:
    """Return the settings of schedules that this one does not read."""
    return set(schedule_settings() - _ALWAYS - {"lr", *SCHEDULES[schedule].settings})


def epoch_rates(config: Scheduled, epoch: int, steps: int = NOMINAL_STEPS) -> EpochRates:
    """Return the learning rates of a 1-based epoch of so many steps; one rate where it does not change within it.

    Step i of a warm-up of n steps has (i + 1) / (n + 1) of its rate, as in torch's LinearLR from 1 / (n + 1).
    """
    schedule, first = SCHEDULES[config.schedule], (epoch - 1) * steps
    settings: dict[str, Any] = {name: getattr(config, name) for name in schedule.settings}
    warmup = config.warmup_epochs * steps + config.warmup_steps
    if not schedule.per_step and first >= warmup:
        return (schedule.rate(epoch - 1, 1, **settings),)
    places = range(first, first + steps)
    rates = [schedule.rate(*((at, steps) if schedule.per_step else (epoch - 1, 1)), **settings) for at in places]
    rates = [rate * (at + 1) / (warmup + 1) if at < warmup else rate for at, rate in zip(places, rates, strict=True)]
    return tuple(rates) if len(set(rates)) > 1 else tuple(rates[:1])


def learning_rates(config: Scheduled, steps: int = NOMINAL_STEPS) -> tuple[EpochRates, ...]:
    """Return the learning rates of every epoch: all that a schedule means to the weights."""
    return tuple(epoch_rates(config, epoch, steps) for epoch in range(1, config.epochs + 1))


def shared_epochs(rates: Sequence[object], others: Sequence[object]) -> int:
    """Return in how many epochs from the start two lists agree: of learning rates, or of keys."""
    pairs = enumerate(zip(rates, others, strict=False))
    return next((epoch for epoch, (rate, other) in pairs if rate != other), min(len(rates), len(others)))
