"""What is measured of a model, under which names it is logged, and which measure decides: the objective.

To add a measure, add an entry to METRICS. This module knows no torch and no numpy until something is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

# The names of what is logged besides the measures: of every epoch, and once a trial.
LEARNING_RATE, EPOCH_SECONDS, SPEED = "lr", "epoch_seconds", "images_per_second"
BEST_EPOCH = "best/epoch"


class Outputs(Protocol):
    """What a measure is made of: the labels and predictions of N images, (N,) int, and their mean loss."""

    @property
    def label_array(self) -> np.ndarray: ...

    @property
    def prediction_array(self) -> np.ndarray: ...

    @property
    def loss(self) -> float: ...


@dataclass(frozen=True)
class Metric:
    """A measure: a function of outputs, and whether more of it is better. ``share`` says that it lies in 0 to 1."""

    compute: Callable[[Any], float]
    higher: bool = True
    share: bool = True


def _accuracy(outputs: Outputs) -> float:
    return float((outputs.label_array == outputs.prediction_array).mean())


METRICS: dict[str, Metric] = {
    "accuracy": Metric(_accuracy),
    "loss": Metric(lambda outputs: outputs.loss, higher=False, share=False),
}


def logged(part: str, name: str) -> str:
    """Return the name under which a measure of "train", "val", "test" or "test_tencrop" is logged."""
    return f"{part}/{name}"


TRAIN_LOSS, TRAIN_ACCURACY = logged("train", "loss"), logged("train", "accuracy")
VAL_LOSS, VAL_ACCURACY = logged("val", "loss"), logged("val", "accuracy")
TEST_ACCURACY = logged("test", "accuracy")


def finite(metrics: Mapping[str, float], name: str) -> float | None:
    """Return a metric, or None when it is missing or not finite."""
    value = metrics.get(name)
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Objective:
    """The measure on validation that decides: the best epoch, pruning, what Optuna learns, and the best trial."""

    name: str  # of METRICS

    @property
    def higher(self) -> bool:
        """Whether more is better."""
        return METRICS[self.name].higher

    @property
    def direction(self) -> str:
        """The objective's direction in Optuna's words."""
        return "maximize" if self.higher else "minimize"

    @property
    def each_epoch(self) -> str:
        """The name of the logged metric of every epoch."""
        return logged("val", self.name)

    @property
    def at_best(self) -> str:
        """The name of the logged metric of the best epoch."""
        return f"best/val_{self.name}"

    @property
    def label(self) -> str:
        """What people call it."""
        return f"validation {self.name.replace('_', ' ')}"

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """Return what a trial reached, or None when that is missing or not finite."""
        return finite(metrics, self.at_best)

    def loss(self, value: float) -> float:
        """Return a number that is the smaller, the better a score is: what to sort by."""
        return -value if self.higher else value

    def better(self, value: float, other: float) -> bool:
        """Tell whether a score is better than another; of equals, none is."""
        return self.loss(value) < self.loss(other)

    def best(self, values: Iterable[float]) -> float | None:
        """Return the best of some scores, or None of none."""
        return min(values, key=self.loss, default=None)


def objective_names() -> list[str]:
    """Return what may be an objective, as it is written: a measure of the validation images."""
    return [logged("val", name) for name in METRICS]


def objective(name: str) -> Objective:
    """Return an objective by the name of its logged metric, such as ``val/accuracy``."""
    return Objective(name.removeprefix("val/"))
