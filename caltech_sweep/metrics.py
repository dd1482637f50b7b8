"""What is measured of a model, under which names it is logged, and which measure decides: the objective.

To add a measure, add an entry to METRICS. This module knows no torch and no numpy until something is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

DEFAULT_OBJECTIVE = "val/accuracy"

# The names of what is logged besides the measures: of every epoch, and once a trial.
LEARNING_RATE, EPOCH_SECONDS, SPEED = "lr", "epoch_seconds", "images_per_second"
BEST_EPOCH = "best/epoch"
SPENT_EPOCHS, SPENT_SECONDS = "spent/epochs", "spent/seconds"  # for a trial: epochs that were trained, time


@dataclass(frozen=True)
class Outputs:
    """What a measure is made of: labels and predictions of N images, (N,) int, their mean loss, and their ranks.

    A rank, (N,) int, is how many classes were held to be more probable than the label.
    """

    labels: np.ndarray
    predictions: np.ndarray
    loss: float = math.nan
    ranks: np.ndarray | None = None


@dataclass(frozen=True)
class Metric:
    """A measure: its function of outputs, what people call it, and whether more of it is better.

    ``by_class`` says that labels and predictions are all that it needs, so that it can be computed again from a list
    of predictions. A ``share`` lies between 0 and 1.
    """

    compute: Callable[[Outputs], float]
    label: str = ""
    higher: bool = True
    by_class: bool = False
    share: bool = True


def _counts(outputs: Outputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how many images have each class, how many were taken for it, and how many of these rightly: (C,) each."""
    import numpy as np

    classes = int(max(outputs.labels.max(), outputs.predictions.max())) + 1
    right = outputs.labels[outputs.labels == outputs.predictions]
    images, taken, found = (
        np.bincount(values, minlength=classes) for values in (outputs.labels, outputs.predictions, right)
    )
    return images, taken, found


def _macro_accuracy(outputs: Outputs) -> float:
    """Return the mean over the classes of the share of their images that were recognised."""
    images, _, found = _counts(outputs)
    return float((found[images > 0] / images[images > 0]).mean())


def _macro_f1(outputs: Outputs) -> float:
    """Return the mean over the classes of the harmonic mean of precision and recall."""
    images, taken, found = _counts(outputs)
    there = (images + taken) > 0
    return float((2 * found[there] / (images + taken)[there]).mean())


def _top5(outputs: Outputs) -> float:
    assert outputs.ranks is not None
    return float((outputs.ranks < 5).mean())


METRICS: dict[str, Metric] = {
    "accuracy": Metric(lambda outputs: float((outputs.labels == outputs.predictions).mean()), by_class=True),
    "macro_accuracy": Metric(_macro_accuracy, by_class=True),
    "macro_f1": Metric(_macro_f1, "macro F1", by_class=True),
    "top5_accuracy": Metric(_top5, "top-5 accuracy"),
    "loss": Metric(lambda outputs: outputs.loss, higher=False, share=False),
}


def logged(part: str, name: str) -> str:
    """Return the name under which a measure of "train", "val", "test" or "test_tencrop" is logged."""
    return f"{part}/{name}"


def logged_at_best(name: str) -> str:
    """Return the name under which a measure of the validation images in the best epoch is logged."""
    return f"best/val_{name}"


def measure_names() -> list[str]:
    """Return what may have a column in a table: every measure of the validation and of the test images."""
    return [logged(part, name) for part in ("val", "test") for name in METRICS]


def all_logged(part: str, scores: Mapping[str, float]) -> dict[str, float]:
    """Return the measures of a part by the names under which they are logged."""
    return {logged(part, name): value for name, value in scores.items()}


TRAIN_LOSS, TRAIN_ACCURACY = logged("train", "loss"), logged("train", "accuracy")
VAL_LOSS, VAL_ACCURACY = logged("val", "loss"), logged("val", "accuracy")
TEST_ACCURACY, TENCROP_ACCURACY = logged("test", "accuracy"), logged("test_tencrop", "accuracy")
BEST_ACCURACY = logged_at_best("accuracy")


def label_of(name: str) -> str:
    """Return what people call a measure, such as "macro accuracy"."""
    return METRICS[name].label or name.replace("_", " ")


def is_share(name: str) -> bool:
    """Tell whether a metric, by the name under which it is logged, lies between 0 and 1."""
    metric = METRICS.get(name.rpartition("/")[2].removeprefix("val_"))
    return metric is not None and metric.share


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
    def metric(self) -> Metric:
        """The measure itself."""
        return METRICS[self.name]

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """The objective's direction in Optuna's words."""
        return "maximize" if self.higher else "minimize"

    @property
    def each_epoch(self) -> str:
        """The name of the logged metric of every epoch."""
        return logged("val", self.name)

    @property
    def at_best(self) -> str:
        """The name of the logged metric of the best epoch."""
        return logged_at_best(self.name)

    @property
    def label(self) -> str:
        """What people call it, such as "macro accuracy"."""
        return label_of(self.name)

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
