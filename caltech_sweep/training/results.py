"""The files a completed trial leaves: confusion matrices, per-class numbers, predictions, weights, its config."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file

from caltech_sweep.config import TrialConfig
from caltech_sweep.data.images import LoadedData
from caltech_sweep.files import write_sums
from caltech_sweep.training.device import environment
from caltech_sweep.training.evaluate import Evaluation
from caltech_sweep.training.networks import normalization
from caltech_sweep.training.trial import TrialOutcome

CHECKPOINT = "checkpoints/best.safetensors"


def confusion_matrix(labels: torch.Tensor, predictions: torch.Tensor, classes: int) -> np.ndarray:
    """Return (classes, classes) int64 counts: row = true class, column = predicted class.

    Predictions at or above ``classes`` (a last layer with more outputs) are counted nowhere.
    """
    inside = predictions < classes
    cells = labels[inside] * classes + predictions[inside]
    return torch.bincount(cells, minlength=classes * classes).view(classes, classes).numpy()


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def draw_confusion_matrix(matrix: np.ndarray, classes: Sequence[str], title: str, path: Path) -> None:
    """Draw a matrix as shares of each true class; readable at 101 classes, when zoomed into."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = max(5.0, 0.16 * len(classes) + 2.5)
    figure = Figure(figsize=(side, side), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    size = 9 if len(classes) <= 20 else 6
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=size)
    axes.set_yticks(range(len(classes)), classes, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title)
    if len(classes) <= 20:
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=size)
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the true class")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _write_evaluation(folder: Path, name: str, part: str, data: LoadedData, result: Evaluation) -> np.ndarray:
    classes, labels = data.split.classes, data.labels(part)
    extra = [f"output {n}" for n in range(len(classes), int(result.predictions.max()) + 1)]
    names = [*classes, *extra]
    rows = zip(
        data.paths(part),
        (classes[label] for label in labels.tolist()),
        (names[prediction] for prediction in result.predictions.tolist()),
        (f"{confidence:.6f}" for confidence in result.confidences.tolist()),
        strict=True,
    )
    _write_csv(folder / "predictions" / f"{name}.csv", ["image", "label", "prediction", "confidence"], rows)
    matrix = confusion_matrix(labels, result.predictions, len(classes))
    table = ([class_name, *row] for class_name, row in zip(classes, matrix.tolist(), strict=True))
    _write_csv(folder / "confusion_matrix" / f"{name}.csv", ["true class", *classes], table)
    title = f"{name}: accuracy {result.accuracy:.3f} of {len(labels):,} images"
    draw_confusion_matrix(matrix, classes, title, folder / "confusion_matrix" / f"{name}.png")
    return matrix


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.4f}" if whole else ""


def write_artifacts(
    folder: Path, config: TrialConfig, data: LoadedData, outcome: TrialOutcome, device: torch.device
) -> None:
    """Write every artifact of a completed trial below ``folder``."""
    evaluations = {"val": ("val", outcome.best.val), "test": ("test", outcome.test)}
    if outcome.test_tencrop is not None:
        evaluations["test_tencrop"] = ("test", outcome.test_tencrop)
    matrices = {
        name: _write_evaluation(folder, name, part, data, result) for name, (part, result) in evaluations.items()
    }
    val, test = matrices["val"], matrices["test"]
    rows = [
        [
            name,
            val[i].sum(),
            _ratio(val[i, i], val[i].sum()),
            test[i].sum(),
            _ratio(test[i, i], test[i].sum()),
            _ratio(test[i, i], test[:, i].sum()),
        ]
        for i, name in enumerate(data.split.classes)
    ]
    header = ["class", "val_images", "val_recall", "test_images", "test_recall", "test_precision"]
    _write_csv(folder / "per_class.csv", header, rows)
    checkpoint = folder / CHECKPOINT
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    weights = {key: value.cpu().contiguous() for key, value in outcome.weights.items()}
    metadata = {
        "arch": config.arch,
        "classes": json.dumps(data.split.classes),
        "fingerprint": config.fingerprint(),
        "normalize": normalization(config),
        "transform_input": json.dumps(outcome.transform_input),
    }
    save_file(weights, checkpoint, metadata)
    with (folder / "config.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(json.loads(json.dumps(config.to_dict())), file)
    (folder / "environment.json").write_text(json.dumps(environment(device), indent=2) + "\n")
    write_sums(folder)
