"""What a trial got wrong: its confusion matrix, confused pairs, classes and images, from the files that it left."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

from caltech_sweep import artifacts
from caltech_sweep.errors import StoreError
from caltech_sweep.metrics import BEST_ACCURACY, logged
from caltech_sweep.report.tables import ReadText, reported_part, run_predictions
from caltech_sweep.tracking.records import TrialRecord


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix; ``cells`` are (true class, predicted class, images) of those that hold any."""

    classes: tuple[str, ...]
    cells: tuple[tuple[int, int, int], ...]
    totals: tuple[int, ...]  # images of each true class that were taken for one of the classes

    @property
    def right(self) -> tuple[int, ...]:
        """Return how many images of each class were classified right."""
        found = dict.fromkeys(range(len(self.classes)), 0)
        found.update({true: number for true, predicted, number in self.cells if true == predicted})
        return tuple(found.values())

    @property
    def correct(self) -> int:
        """Return how many images were classified right."""
        return sum(self.right)


@dataclass(frozen=True)
class Pair:
    """Images of one class that were taken for another."""

    true: str
    predicted: str
    number: int
    total: int  # images of the true class


@dataclass(frozen=True)
class Wrong:
    """A wrongly classified image, by its path below the dataset's root."""

    image: str
    label: str
    prediction: str
    confidence: float


def read_confusion(read: ReadText, run: TrialRecord) -> Confusion | None:
    """Return a run's confusion matrix of the test images, or None when it is lost or damaged."""
    try:
        classes, counts = artifacts.read_confusion(partial(read, run), reported_part(run))
    except StoreError:
        return None
    right, images = sum(row[i] for i, row in enumerate(counts)), sum(map(sum, counts))
    part = reported_part(run)
    recorded = run.metrics.get(BEST_ACCURACY if part == "val" else logged(part, "accuracy"))
    if not images or (recorded is not None and abs(right / images - recorded) > 1e-6):
        return None
    cells = tuple((i, j, n) for i, row in enumerate(counts) for j, n in enumerate(row) if n > 0)
    return Confusion(classes, cells, tuple(map(sum, counts))) if cells else None


def confused_pairs(matrix: Confusion, most: int) -> list[Pair]:
    """Return the pairs of classes that were confused most often, the more frequent, then the larger share first."""
    pairs = [
        Pair(matrix.classes[true], matrix.classes[predicted], number, matrix.totals[true])
        for true, predicted, number in matrix.cells
        if true != predicted
    ]
    return sorted(pairs, key=lambda pair: (-pair.number, -pair.number / pair.total, pair.true, pair.predicted))[:most]


def most_confidently_wrong(read: ReadText, run: TrialRecord, most: int) -> list[Wrong] | None:
    """Return the wrongly classified test images, the most confident first; None when the predictions are lost."""
    found = run_predictions(read, run)
    if found is None or not found.confidences:
        return None
    images = zip(found.images, found.labels, found.predictions, found.confidences, strict=True)
    wrong = [item for item in itertools.starmap(Wrong, images) if item.label != item.prediction]
    return sorted(wrong, key=lambda item: (-item.confidence, item.image))[:most]
