"""The official split and the decoded cache on the real Caltech-101, where it is at hand."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from caltech_sweep.config import DatasetConfig
from caltech_sweep.data import dataset_root, load_dataset, load_split
from helpers.pictures import check_pictures
from helpers.places import invoke

ROOT = os.environ.get("CALTECH101_ROOT")
pytestmark = pytest.mark.skipif(ROOT is None, reason="CALTECH101_ROOT does not name a folder with Caltech-101")

# SHA-256 of each part's lines "path,class": a change here changes every recorded result.
GOLDEN = {
    "train": (3856, "99c44072873c24871db1340352885245"),
    "val": (1928, "8bba12be67be85b98ea25c62ceb8e800"),
    "test": (2893, "e98020f1ee6a6704fdd0960c64ee4a9d"),
}


@pytest.mark.parametrize("part", sorted(GOLDEN))
def test_the_official_split_is_what_it_was(part: str) -> None:
    out = invoke("data", "list", "--split", part, "--format", "csv", "--data", str(ROOT)).output
    lines = list(csv.reader(io.StringIO(out)))
    count, digest = GOLDEN[part]
    assert len(lines) == count
    assert hashlib.sha256("\n".join(f"{path},{name}" for path, name in lines).encode()).hexdigest()[:32] == digest


def test_the_majority_class_is_the_report_s_first_row() -> None:
    split = load_split(DatasetConfig(root=ROOT))
    airplanes = sum(item.class_name == "airplanes" for item in split.test)
    assert round(airplanes / len(split.test), 4) == 0.0919


def test_pixels_are_torchvision_s_on_grey_small_and_tall_images(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(tmp_path))
    config = DatasetConfig(root=ROOT, classes=("car_side", "inline_skate", "Leopards"), images_per_class=5)
    data, root = load_dataset(config), dataset_root(config)
    crops = data.center_crops("test", 224)
    for index, name in enumerate(data.paths("test")):
        with Image.open(root / name) as image:
            resized = v2.Resize(256)(image.convert("RGB"))
        assert torch.equal(crops[index], v2.functional.pil_to_tensor(v2.CenterCrop(224)(resized)))
        views = torch.stack([v2.functional.pil_to_tensor(view) for view in v2.TenCrop(224)(resized)])
        assert torch.equal(data.ten_crops("test", index, 224), views)


STUDY = """\
title: All classes
dataset: {name: caltech101, resize: 64, crop: 56}
trials: 1
sampler: {name: random, seed: 0}
fixed: {arch: squeezenet1_1, batch_size: 64, epochs: 1}
space: {}
rows: [{name: Row, set: {lr: 0.001}}]
"""


@pytest.mark.slow
def test_all_classes_pass_a_plan_a_short_study_and_the_page_whose_pictures_are_the_pictures(place: Path) -> None:
    (place / "sweeps" / "all.yaml").write_text(STUDY)
    data = ("--data", str(ROOT))
    planned = invoke("plan", "all", *data)
    assert planned.exit_code == 0 and "train 3,856, val 1,928, test 2,893 images" in planned.output, planned.output
    few = ("--set", "dataset.images_per_class=6", *data, "--in-process", "--threads", "1")
    ran = invoke("run", "all", *few)
    assert ran.exit_code == 0 and "study all: 1 complete" in ran.output, ran.output
    assert invoke("report", "all", "--format", "html", "--out", "page.html", *data).exit_code == 0
    page = (place / "page.html").read_text(encoding="utf-8")
    root = dataset_root(DatasetConfig(root=ROOT))
    assert root is not None and check_pictures(page, root) == 18
    assert "101 classes" in page and "cannot be read in the dataset" not in page
