"""The registry of datasets: an entry is all that a new dataset needs, wherever a dataset is used."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caltech_sweep.config import DatasetConfig
from caltech_sweep.data.registry import DATASETS, Dataset
from caltech_sweep.data.splits import Sample, Split
from helpers.places import Cli

STUDY = """\
title: A dataset of somebody's own
dataset: {name: waves, resize: 32, crop: 32}
fixed: {arch: resnet18, batch_size: 4, epochs: 1}
rows:
  - {name: Only, set: {lr: 0.01}}
"""


def wave_file(path: Path) -> bytes:
    """Draw a few waves along one side: the class decides which."""
    number = int(path.name.removeprefix("wave"))
    waves = np.sin(np.arange(40) / (2 + number % 5)) * 120 + 128
    pixels = np.tile(waves.astype(np.uint8), (40, 1))
    content = io.BytesIO()
    Image.fromarray(pixels if path.parent.name == "across" else pixels.T).save(content, "PNG")
    return content.getvalue()


def wave_split(config: DatasetConfig) -> Split:
    classes = ("across", "down")

    def part(*numbers: int) -> tuple[Sample, ...]:
        return tuple(Sample(Path(name) / f"wave{n}", i, name) for i, name in enumerate(classes) for n in numbers)

    return Split(classes, part(0, 1, 2, 3), part(4, 5), part(6, 7))


@pytest.fixture
def waves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "waves", Dataset("waves", wave_split, read=lambda config: wave_file))


def test_an_entry_is_all_that_a_new_dataset_needs(place: Path, cli: Cli, waves: None) -> None:
    (place / "sweeps" / "waves.yaml").write_text(STUDY)
    listed = cli("data", "list", "waves", "--split", "val")
    assert listed.stdout.splitlines() == [
        "across/wave4,across",
        "across/wave5,across",
        "down/wave4,down",
        "down/wave5,down",
    ]
    planned = cli("plan", "waves")
    assert planned.exit_code == 0 and "waves: 2 classes, train 8, val 4, test 4 images" in planned.output
    assert cli("run", "waves", "--in-process", "--threads", "1").exit_code == 0
    page = cli("report", "waves", "--format", "html").output
    predictions = next((place / "mlruns").rglob("predictions/test.csv")).read_text().splitlines()[1:]
    wrong = [line for line in predictions if line.split(",")[1] != line.split(",")[2]]
    assert page.count("data:image/webp") == len(wrong) and "cannot be read" not in page


def test_a_name_that_has_no_entry_is_told_with_all_that_have_one(cli: Cli, waves: None) -> None:
    result = cli("plan", "tiny", "--set", "dataset.name=wave")
    assert result.exit_code == 2
    known = ", ".join([*DATASETS, "waves"] if "waves" not in DATASETS else DATASETS)
    assert f"dataset.name must be one of {known}, got 'wave'" in result.output
