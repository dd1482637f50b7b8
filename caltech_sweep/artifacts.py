"""The files that a trial leaves in its run: their names, one reader of each, and what must be true of them.

A reader gets the function that returns the text of a file by its path, and raises ArtifactError for a file that is
missing, damaged, or not what was recorded.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from safetensors import SafetensorError, safe_open

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import ArtifactError
from caltech_sweep.files import SUMS, file_digest, read_sums
from caltech_sweep.metrics import BEST_ACCURACY, TENCROP_ACCURACY, logged
from caltech_sweep.text import is_overgrown

CHECKPOINT = "checkpoints/best.safetensors"
CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
PER_CLASS = "per_class.csv"

Read = Callable[[str], str]  # from a path below a run's artifacts to the text of the file


def predictions_path(name: str) -> str:
    """Return where the predictions of "val", "test" or "test_tencrop" are."""
    return f"predictions/{name}.csv"


def confusion_path(name: str, ending: str = "csv") -> str:
    """Return where the confusion matrix of "val", "test" or "test_tencrop" is, as a table or a picture."""
    return f"confusion_matrix/{name}.{ending}"


@dataclass(frozen=True)
class Predictions:
    """What a network took each image for; without confidences in a table that has none."""

    images: tuple[str, ...]  # paths below the dataset's root
    labels: tuple[str, ...]
    predictions: tuple[str, ...]
    confidences: tuple[float, ...]

    @property
    def correct(self) -> tuple[bool, ...]:
        """Whether each image was classified right."""
        return tuple(label == found for label, found in zip(self.labels, self.predictions, strict=True))

    @property
    def majority(self) -> tuple[str, float]:
        """The most frequent class and its share of the images."""
        ((name, count),) = Counter(self.labels).most_common(1)
        return name, count / len(self.labels)


def _lines(read: Read, path: str) -> list[list[str]]:
    try:
        return [line for line in csv.reader(io.StringIO(read(path), newline="")) if line]
    except csv.Error as error:
        raise ArtifactError(path, f"cannot be read ({error})") from error


def _check_rows(path: str, found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise ArtifactError(path, f"has {found} rows instead of {expected}")


def read_predictions(read: Read, name: str, accuracy: float | None, images: int | None = None) -> Predictions:
    """Return predictions, which must give the recorded accuracy and be of so many images, where these are known."""
    path = predictions_path(name)
    header, *lines = _lines(read, path) or [[]]
    _check_rows(path, len(lines), images)
    try:
        image, label, prediction = ([line[header.index(n)] for line in lines] for n in ("image", "label", "prediction"))
        confidences = [float(line[header.index("confidence")]) for line in lines] if "confidence" in header else []
    except (IndexError, ValueError) as error:
        raise ArtifactError(path, "is not a table of predictions") from error
    found = Predictions(tuple(image), tuple(label), tuple(prediction), tuple(confidences))
    if not lines:
        raise ArtifactError(path, "names no images")
    share = sum(found.correct) / len(lines)
    if accuracy is not None and not math.isclose(share, accuracy, abs_tol=1e-6):
        raise ArtifactError(path, f"gives an accuracy of {share:.4f} instead of {accuracy:.4f}")
    return found


def read_confusion(read: Read, name: str, classes: int | None = None) -> tuple[tuple[str, ...], list[list[int]]]:
    """Return the classes and the (true class, predicted class) counts of a confusion matrix, which must be square."""
    path = confusion_path(name)
    header, *lines = _lines(read, path) or [[]]
    _check_rows(path, len(lines), classes)
    try:
        counts = [[int(number) for number in line[1:]] for line in lines]
    except ValueError as error:
        raise ArtifactError(path, "is not a confusion matrix") from error
    if not lines or {len(row) for row in counts} != {len(counts)} or len(header) != len(counts) + 1:
        raise ArtifactError(path, "is not a confusion matrix")
    return tuple(header[1:]), counts


def read_config(read: Read) -> TrialConfig:
    """Return the config that a trial was trained with."""
    try:
        loaded = YAML(typ="safe", pure=True).load(read(CONFIG))
        if is_overgrown(loaded):
            raise ValueError("it has too many values")
        return TrialConfig.from_dict(loaded)
    except (RecursionError, YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(CONFIG, "cannot be read as a trial's config; was it damaged?") from error


def read_classes(read: Read) -> list[str]:
    """Return the classes of a trial, in the order of its network's outputs."""
    header, *lines = _lines(read, PER_CLASS) or [[]]
    if "class" not in header or not all(len(line) == len(header) for line in lines) or not lines:
        raise ArtifactError(PER_CLASS, "cannot be read as a run's table of classes; was it damaged?")
    return [line[header.index("class")] for line in lines]


def check_checkpoint(file: Path) -> None:
    """Raise ArtifactError for a file of weights whose header or size is wrong."""
    try:
        with safe_open(file, framework="numpy"):
            pass
    except FileNotFoundError as error:
        raise ArtifactError(CHECKPOINT, "is missing") from error
    except (OSError, SafetensorError) as error:
        raise ArtifactError(CHECKPOINT, f"is damaged ({getattr(error, 'strerror', None) or error})") from error


def artifact_problems(
    metrics: Mapping[str, float],
    read: Read,
    find: Callable[[str], Path],
    images: Mapping[str, Any],
    missing: Collection[str] = (),
) -> Iterator[str]:
    """Yield a sentence for every artifact of a completed trial that is missing or cut short.

    What the trial itself recorded as ``missing`` is no problem. ``find`` returns the file of a path, and ``images``
    holds how many images each part has, and how many classes there are, as the study recorded them. The checksums, for
    which everything is read, come last: what is cut short has been found by then.
    """
    found = False
    for path, check in _checks(metrics, read, find, images):
        try:
            if path not in missing:
                check()
        except ArtifactError as error:
            found = True
            yield error.problem
    if not found:
        yield from _changed(find, missing)


def _checks(
    metrics: Mapping[str, float], read: Read, find: Callable[[str], Path], images: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what must hold of each file, by its path."""
    tests = ["test", *(["test_tencrop"] if TENCROP_ACCURACY in metrics else [])]
    for name in ("val", *(tests if images.get("test") != 0 else [])):  # the dataset may have no test images
        accuracy = metrics.get(BEST_ACCURACY if name == "val" else logged(name, "accuracy"))
        count = images.get("val" if name == "val" else "test")
        yield predictions_path(name), partial(read_predictions, read, name, accuracy, count)
        yield confusion_path(name), partial(read_confusion, read, name, images.get("classes"))
    for path in (CONFIG, ENVIRONMENT, PER_CLASS):  # whatever version has written them
        yield path, partial(_check_not_empty, read, path)
    yield CHECKPOINT, lambda: check_checkpoint(find(CHECKPOINT))


def _check_not_empty(read: Read, path: str) -> None:
    if not read(path):
        raise ArtifactError(path, "is empty")


def _changed(find: Callable[[str], Path], missing: Collection[str]) -> Iterator[str]:
    """Yield what is wrong with every file whose checksum was recorded and is another one now."""
    try:
        sums = read_sums(find(SUMS))
    except ArtifactError:  # of an earlier version
        return
    for path, digest in sums.items():
        try:
            if path in missing or file_digest(find(path)) == digest:
                continue
        except (OSError, ArtifactError):
            pass
        yield f"{path} is not what was written: its checksum differs"
