"""Whether the artifacts of a completed trial are whole: sizes, counts and checksums against what was recorded."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from caltech_sweep.files import changed
from caltech_sweep.metrics import BEST_ACCURACY, TENCROP_ACCURACY, logged
from caltech_sweep.tracking.records import TrialRecord, missing_artifacts

CHECKPOINT = "checkpoints/best.safetensors"
_ALWAYS = ("config.yaml", "environment.json", "per_class.csv")


def artifact_problems(record: TrialRecord, root: Path, images: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for every artifact of a completed trial that is missing or cut short.

    What the trial itself recorded as missing is no problem. ``images`` holds how many images each part has, and how
    many classes there are, as the study recorded them. The checksums, for which everything is read, come last: what is
    short has been found by then.
    """
    problems = list(_shortcomings(record, root, images))
    yield from problems
    if not problems:
        yield from (f"{path} is not what was written: its checksum differs" for path in changed(root))


def _shortcomings(record: TrialRecord, root: Path, images: Mapping[str, Any]) -> Iterator[str]:
    known = missing_artifacts(record.tags)
    if record.params.get("dataset.folds", "1") != "1":  # whose sizes differ by an image or so
        images = {name: number for name, number in images.items() if name != "val"}
    tests = ["test", *(["test_tencrop"] if TENCROP_ACCURACY in record.metrics else [])]
    if images.get("test") == 0:  # the dataset has no test images
        tests = []
    for name in ("val", *tests):
        part = "val" if name == "val" else "test"
        accuracy = record.metrics.get(BEST_ACCURACY if name == "val" else logged(name, "accuracy"))
        if f"predictions/{name}.csv" not in known:
            yield from _predictions(root / "predictions" / f"{name}.csv", images.get(part), accuracy)
        if f"confusion_matrix/{name}.csv" not in known:
            yield from _table(root / "confusion_matrix" / f"{name}.csv", images.get("classes"))
    for path in _ALWAYS:
        if path not in known and not _size(root / path):
            yield f"{path} is missing or empty"
    if CHECKPOINT not in known:
        yield from safetensors_problems(root / CHECKPOINT)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path) -> list[list[str]] | str:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))[1:]
    except FileNotFoundError:
        return "is missing"
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"


def _table(path: Path, rows: int | None) -> Iterator[str]:
    found, name = _read(path), f"{path.parent.name}/{path.name}"
    if isinstance(found, str):
        yield f"{name} {found}"
    elif rows is not None and len(found) != rows:
        yield f"{name} has {len(found)} rows instead of {rows}"


def _predictions(path: Path, images: int | None, accuracy: float | None) -> Iterator[str]:
    """A list of predictions must have a line for each image, and give the accuracy that was recorded."""
    found = _read(path)
    problems = list(_table(path, images))
    yield from problems
    if problems or isinstance(found, str) or accuracy is None or not found:
        return
    right = sum(len(line) > 2 and line[1] == line[2] for line in found)
    if not math.isclose(right / len(found), accuracy, abs_tol=1e-6):
        yield f"predictions/{path.name} gives an accuracy of {right / len(found):.4f} instead of {accuracy:.4f}"


def safetensors_problems(path: Path) -> Iterator[str]:
    """Yield what is wrong with a file of weights, from its header and its size."""
    name = f"{path.parent.name}/{path.name}"
    try:
        with safe_open(path, framework="numpy"):
            pass
    except FileNotFoundError:
        yield f"{name} is missing"
    except (OSError, SafetensorError) as error:
        yield f"{name} is damaged ({getattr(error, 'strerror', None) or error})"
