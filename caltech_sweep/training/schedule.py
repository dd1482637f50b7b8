"""Learning-rate schedules: the learning rate of each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from caltech_sweep.config import TrialConfig

if TYPE_CHECKING:
    pass


_SCHEDULE = ("lr", "step_size", "gamma", "epochs")  # known by the learning rates that they give


def learning_rate(config: TrialConfig, epoch: int) -> float:
    """Return StepLR's learning rate of a 1-based epoch."""
    return config.lr * config.gamma ** ((epoch - 1) // config.step_size)


def learning_rates(config: TrialConfig) -> tuple[float, ...]:
    """Return the learning rate of every epoch: all that a schedule means to the weights."""
    return tuple(learning_rate(config, epoch) for epoch in range(1, config.epochs + 1))


def shared_epochs(rates: Sequence[float], others: Sequence[float]) -> int:
    """Return in how many epochs from the start two lists of learning rates agree."""
    pairs = enumerate(zip(rates, others, strict=False))
    return next((epoch for epoch, (rate, other) in pairs if rate != other), min(len(rates), len(others)))
