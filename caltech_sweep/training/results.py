"""The files a completed trial leaves: confusion matrices, per-class numbers, predictions, weights, its config."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file

from caltech_sweep.artifacts import CHECKPOINT, CONFIG, ENVIRONMENT, PER_CLASS, confusion_path, predictions_path
from caltech_sweep.config import TrialConfig
from caltech_sweep.data.images import LoadedData
from caltech_sweep.errors import CaltechSweepError
from caltech_sweep.files import is_disk_full, write_sums
from caltech_sweep.text import one_line
from caltech_sweep.training.device import environment
from caltech_sweep.training.evaluate import Evaluation
from caltech_sweep.training.figure import draw_confusion_matrix
from caltech_sweep.training.networks import normalization
from caltech_sweep.training.trial import TrialOutcome

SKIPPED = "skipped_images.csv"  # images that could not be read, where the dataset is told to skip them
MOST_CLASSES = 3000  # of a confusion matrix: 9 million cells, 20 MB as text


class _NotMadeError(CaltechSweepError):
    """An artifact that is not made."""


def confusion_matrix(labels: torch.Tensor, predictions: torch.Tensor, classes: int) -> np.ndarray:
    """Return (classes, classes) int64 counts: row = true class, column = predicted class.

    Predictions at or above ``classes`` (a last layer with more outputs) are counted nowhere.
    """
    inside = predictions < classes
    cells = labels[inside] * classes + predictions[inside]
    return torch.bincount(cells, minlength=classes * classes).view(classes, classes).numpy()


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


@dataclass(frozen=True)
class _Part:
    """One evaluation: the name of its files, the true labels, and what was predicted."""

    name: str
    images: Sequence[str]
    labels: torch.Tensor
    result: Evaluation
    classes: Sequence[str]

    def write_predictions(self, path: Path) -> None:
        names = [*self.classes]
        names += [f"output {n}" for n in range(len(names), int(self.result.predictions.max()) + 1)]
        rows = zip(
            self.images,
            (names[label] for label in self.labels.tolist()),
            (names[prediction] for prediction in self.result.predictions.tolist()),
            (f"{confidence:.6f}" for confidence in self.result.confidences.tolist()),
            strict=True,
        )
        _write_csv(path, ["image", "label", "prediction", "confidence"], rows)

    def matrix(self) -> np.ndarray:
        if len(self.classes) > MOST_CLASSES:
            raise _NotMadeError(
                f"confusion matrices are made for {MOST_CLASSES:,} classes at most, not for {len(self.classes):,}; "
                "the predictions list every image"
            )
        return confusion_matrix(self.labels, self.result.predictions, len(self.classes))

    def write_matrix(self, path: Path) -> None:
        table = ([name, *row.tolist()] for name, row in zip(self.classes, self.matrix(), strict=True))
        _write_csv(path, ["true class", *self.classes], table)

    def draw_matrix(self, path: Path) -> None:
        title = f"{self.name}: accuracy {self.result.accuracy:.3f} of {len(self.labels):,} images"
        draw_confusion_matrix(self.matrix(), self.classes, title, path)

    def counts(self) -> tuple[list[int], list[int], list[int]]:
        """Return of each class how many images it has, how many of them were right, and how often it was predicted."""
        classes, predictions = len(self.classes), self.result.predictions
        inside = predictions < classes
        right = self.labels[predictions == self.labels]
        every = (self.labels[inside], right, predictions[inside])
        images, found, predicted = (torch.bincount(labels, minlength=classes).tolist() for labels in every)
        return images, found, predicted


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.4f}" if whole else ""


def _write_classes(path: Path, val: _Part, test: _Part | None) -> None:
    header = ["class", "val_images", "val_recall"]
    images, right, _ = val.counts()
    columns: list[Sequence[object]] = [val.classes, images, list(map(_ratio, right, images))]
    if test is not None:
        header += ["test_images", "test_recall", "test_precision"]
        images, right, predicted = test.counts()
        columns += [images, list(map(_ratio, right, images)), list(map(_ratio, right, predicted))]
    _write_csv(path, header, zip(*columns, strict=True))


def _write_checkpoint(path: Path, config: TrialConfig, classes: Sequence[str], outcome: TrialOutcome) -> None:
    weights = {key: value.cpu().contiguous() for key, value in outcome.weights.items()}
    metadata = {
        "arch": config.arch,
        "classes": json.dumps(classes),
        "fingerprint": config.fingerprint(),
        "normalize": normalization(config),
        "transform_input": json.dumps(outcome.transform_input),
    }
    save_file(weights, path, metadata)


def _write_config(path: Path, config: TrialConfig) -> None:
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(json.loads(json.dumps(config.to_dict())), file)


def _artifacts(
    config: TrialConfig, data: LoadedData, outcome: TrialOutcome, device: torch.device
) -> dict[str, Callable[[Path], object]]:
    """Return what writes each artifact of a completed trial, by its path."""
    evaluations = {"val": ("val", outcome.best.val)}
    if outcome.test is not None:
        evaluations["test"] = ("test", outcome.test)
    if outcome.test_tencrop is not None:
        evaluations["test_tencrop"] = ("test", outcome.test_tencrop)
    parts = {
        name: _Part(name, data.paths(part), data.labels(part), result, data.split.classes)
        for name, (part, result) in evaluations.items()
    }
    found: dict[str, Callable[[Path], object]] = {
        CHECKPOINT: lambda path: _write_checkpoint(path, config, data.split.classes, outcome),
        CONFIG: lambda path: _write_config(path, config),
        ENVIRONMENT: lambda path: path.write_text(json.dumps(environment(device, config), indent=2) + "\n"),
        PER_CLASS: lambda path: _write_classes(path, parts["val"], parts.get("test")),
    }
    if data.split.skipped:
        found[SKIPPED] = lambda path: _write_csv(path, ["image", "reason"], data.split.skipped)
    for name, part in parts.items():
        found[predictions_path(name)] = part.write_predictions
        found[confusion_path(name)] = part.write_matrix
        found[confusion_path(name, "png")] = part.draw_matrix
    return found


def write_artifacts(
    folder: Path, config: TrialConfig, data: LoadedData, outcome: TrialOutcome, device: torch.device
) -> dict[str, str]:
    """Write every artifact of a completed trial below ``folder``; return the reason for each that cannot be made.

    No artifact is worth a result. A full disk is an error all the same: it is told at once, and the trial goes on
    from its last epoch when there is room.
    """
    missing: dict[str, str] = {}
    for name, write in _artifacts(config, data, outcome, device).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(path)
        except Exception as error:
            if is_disk_full(error):
                raise
            path.unlink(missing_ok=True)
            missing[name] = one_line(str(error) or type(error).__name__, 300)
    write_sums(folder)
    return missing
