"""Predictions of a registered model for image files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch

from caltech_sweep.data.listing import PassedOver
from caltech_sweep.data.listing import find_images as images_below
from caltech_sweep.data.pixels import read_file
from caltech_sweep.errors import DatasetError, UsageError
from caltech_sweep.serving.served_model import Classifier, Ranking


def find_images(named: Iterable[Path]) -> Iterator[Path]:
    """Yield the named files, and for a folder the image files in and below it, by name; hidden ones are left out."""
    for path in named:
        if not path.is_dir():
            yield path
            continue
        passed = PassedOver()
        inside = sorted(images_below(path, passed, set()))
        if not inside:
            others = str(passed)
            raise UsageError(f"the folder {path} has no image files{f'; passed over: {others}' if others else ''}")
        yield from inside


def predict_files(
    classifier: Classifier,
    files: Sequence[Path],
    top: int,
    batch_size: int,
    complain: Callable[[str], None],
) -> Iterator[tuple[Path, Ranking]]:
    """Yield each file with its ``top`` classes, in order; a broken file is a complaint, and the others go on."""

    def read(path: Path) -> torch.Tensor | str:
        try:
            return classifier.prepare(read_file(path))
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        except DatasetError as error:
            return f"{path} {error}"

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), batch_size):
            part = files[start : start + batch_size]
            crops = []
            for path, result in zip(part, pool.map(read, part), strict=True):
                if isinstance(result, str):
                    complain(result)
                else:
                    crops.append((path, result))
            if crops:
                rankings = classifier.rank([crop for _, crop in crops], top)
                yield from ((path, ranking) for (path, _), ranking in zip(crops, rankings, strict=True))


def format_predictions(kind: str, predictions: Iterable[tuple[Path, Ranking]], files: Sequence[Path]) -> Iterator[str]:
    """Yield lines of a "table", "csv" (a line a class) or "json" (a list of images), each as soon as it is known."""
    shown = ((click.format_filename(path), ranking) for path, ranking in predictions)
    if kind == "csv":
        yield _csv_line(["image", "rank", "class", "probability"])
        for image, ranking in shown:
            for rank, (name, probability) in enumerate(ranking, start=1):
                yield _csv_line([image, rank, name, f"{probability:.6f}"])
    elif kind == "json":
        before = "["
        for image, ranking in shown:
            classes = [{"class": name, "probability": probability} for name, probability in ranking]
            yield before + json.dumps({"image": image, "predictions": classes}, allow_nan=False)
            before = ","
        yield "]" if before == "," else "[]"
    else:
        width = max((len(click.format_filename(path)) for path in files), default=0)
        for image, ranking in shown:
            cells = (f"{name} {probability:.4f}" for name, probability in ranking)
            yield f"{image:{width}}  {'  '.join(cells)}"


def _csv_line(cells: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()
