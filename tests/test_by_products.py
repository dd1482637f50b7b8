"""What a trial leaves, apart from its numbers: its cost is bounded, names are text, and no failure loses a result."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from caltech_sweep.artifacts import artifact_problems
from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data.images import ImageStore, LoadedData, OpenedStore
from caltech_sweep.data.splits import Sample, Split
from caltech_sweep.errors import ArtifactError
from caltech_sweep.tracking.records import MISSING_TAG, missing_artifacts
from caltech_sweep.tracking.writer import MlflowTracker
from caltech_sweep.training.evaluate import Evaluation
from caltech_sweep.training.figure import draw_confusion_matrix, fonts_for
from caltech_sweep.training.fit import EpochResult
from caltech_sweep.training.results import CHECKPOINT, MOST_CLASSES, write_artifacts
from caltech_sweep.training.trial import TrialOutcome
from helpers.places import Cli

NAMES = [
    "price_$5_to_$10",
    r"$\frac{1}{0",
    "a_{b}^c",
    "水彩画",
    "x" * 250,
    "two\nlines",
    "<b>bold</b>",
    "عربى",
    "\x1b[31mred",
]


def test_names_are_drawn_as_text_whatever_they_look_like(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of a letter that no font has
        draw_confusion_matrix(np.eye(len(NAMES), dtype=np.int64), NAMES, "test $x$", tmp_path / "matrix.png")
    with Image.open(tmp_path / "matrix.png") as picture:
        assert max(picture.size) < 1500


DRAW = """
import sys
from pathlib import Path
import numpy as np
from caltech_sweep.training.figure import draw_confusion_matrix
for number in map(int, sys.argv[2:]):
    for classes in (5, 40):
        counts = np.random.default_rng(number).integers(0, 9, (classes, classes))
        path = Path(sys.argv[1], str(number), f"{classes}.png")
        draw_confusion_matrix(counts, [f"class {i}" for i in range(classes)], f"trial {number}", path)
"""


def test_a_drawing_is_the_same_whatever_was_drawn_before(tmp_path: Path) -> None:
    for folder, numbers in {"one by one": "12", "second alone": "2"}.items():
        subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / folder), *numbers], check=True)
    drawn = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.png")}
    for name in ("5.png", "40.png"):
        first, second = (drawn[Path("one by one", number, name)] for number in "12")
        assert second == drawn[Path("second alone", "2", name)] != first


def test_a_drawing_has_the_pixels_of_one_that_matplotlib_draws_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, begin = list[Figure](), Figure.__init__

    def noted(self: Figure, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        figures.append(self)

    monkeypatch.setattr(Figure, "__init__", noted)
    counts, names = np.random.default_rng(0).integers(0, 9, (40, 40)), [f"only here {i}" for i in range(40)]
    draw_confusion_matrix(counts, names, "test", tmp_path / "ours.png")
    [figure] = figures
    for artist in figure.findobj():
        artist.set_animated(False)
    figure.savefig(tmp_path / "whole.png", dpi=figure.dpi)
    ours, whole = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("ours", "whole"))
    assert np.array_equal(ours, whole) and len(np.unique(ours)) > 9


def test_fonts_are_found_for_letters_that_a_font_has_and_the_others_are_told() -> None:
    families, missing = fonts_for("aé")
    assert families == ["DejaVu Sans"] and not missing
    assert "\U0010fffe" in fonts_for("a\U0010fffe")[1]


@pytest.mark.slow
@pytest.mark.parametrize("classes", [121, 1000])
def test_the_drawing_of_many_classes_is_no_larger_than_that_of_few(tmp_path: Path, classes: int) -> None:
    matrix = np.zeros((classes, classes), np.int64)
    matrix[:, -1] = 1  # every image is taken for the last class
    draw_confusion_matrix(matrix, [f"n{i}" for i in range(classes)], "test", tmp_path / "matrix.png")
    with Image.open(tmp_path / "matrix.png") as picture:
        assert max(picture.size) < 3000
        dark = np.asarray(picture.convert("L"))[600, 300:2200] < 60
    assert dark[-200:].any() and not dark[:1000].any()  # the last column only


def outcome_of(classes: int, tmp_path: Path) -> tuple[TrialConfig, LoadedData, TrialOutcome]:
    """Return a trial that was right about every image, one of each class."""
    names = tuple(f"c{i}" for i in range(classes))
    part = tuple(Sample(Path(name) / "a.png", i, name) for i, name in enumerate(names))
    store = OpenedStore(ImageStore(np.zeros(0, np.uint8), []), "key")
    data = LoadedData(Split(names, part, part, part), store, None)
    result = Evaluation({"loss": 0.1, "accuracy": 1.0}, torch.arange(classes), torch.ones(classes))
    epoch = EpochResult(1, 0.1, 0.1, 1.0, result, 1.0, 5)
    return (
        TrialConfig(dataset=DatasetConfig(name="shapes")),
        data,
        TrialOutcome(epoch, result, None, {"w": torch.ones(2)}),
    )


def test_an_artifact_that_cannot_be_made_is_recorded_with_its_reason_and_the_others_are_there(tmp_path: Path) -> None:
    classes = MOST_CLASSES + 1
    config, data, outcome = outcome_of(classes, tmp_path)
    missing = write_artifacts(tmp_path / "run", config, data, outcome, torch.device("cpu"))
    tables = [f"confusion_matrix/{part}.{kind}" for part in ("val", "test") for kind in ("csv", "png")]
    assert sorted(missing) == sorted(tables)
    assert "for 3,000 classes at most, not for 3,001" in missing["confusion_matrix/test.png"]
    rows = list(csv.reader((tmp_path / "run" / "per_class.csv").read_text().splitlines()))
    assert len(rows) == classes + 1 and rows[5] == ["c4", "1", "1.0000", "1", "1.0000", "1.0000"]
    assert (tmp_path / "run" / CHECKPOINT).stat().st_size > 0

    def find(path: str) -> Path:
        file = tmp_path / "run" / path
        if not file.exists():
            raise ArtifactError(path, "is missing")
        return file

    def problems() -> list[str]:
        known = missing_artifacts({MISSING_TAG: json.dumps(missing)})
        return list(artifact_problems(outcome.metrics(), lambda path: find(path).read_text(), find, images, known))

    images = {"val": classes, "test": classes, "classes": classes}
    assert not problems()
    (tmp_path / "run" / "per_class.csv").unlink()
    assert problems() == ["per_class.csv is missing"]


STUDY = """\
title: Names
dataset: {name: folder, root: images, resize: 32, crop: 32}
fixed: {arch: resnet18, batch_size: 4, epochs: 1}
rows:
  - {name: Only, set: {lr: 0.01}}
"""


def test_a_study_of_odd_class_and_image_names_leaves_every_artifact(place: Path, cli: Cli) -> None:
    for number, name in enumerate((b"price_$5_to_$10", "水彩".encode(), b"caf\xe9")):
        folder = os.path.join(os.fsencode(place / "images"), name)
        os.makedirs(folder)
        for index in range(6):
            pixels = np.full((40, 40, 3), 40 * number + index, np.uint8)
            Image.fromarray(pixels).save(os.fsdecode(os.path.join(folder, b"\xe9\xff%d.png" % index)))
    (place / "sweeps" / "names.yaml").write_text(STUDY)
    result = cli("run", "names", "--in-process", "--threads", "1")
    assert result.exit_code == 0 and "is missing" not in result.output
    tracker = MlflowTracker(None)
    study = tracker.study("names")
    assert study is not None
    (run,) = tracker.trials(study)
    assert MISSING_TAG not in run.tags
    listed = tracker.artifact(run.run_id, "predictions/test.csv").read_text(encoding="utf-8")
    assert "price_$5_to_$10/\\xe9\\xff" in listed and "水彩/" in listed and "caf\\xe9/" in listed
    assert cli("doctor", "names").exit_code == 0
