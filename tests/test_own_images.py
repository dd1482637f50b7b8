"""Images as people have them: some that cannot be read, some twice; and a first study file that is written for them."""

from __future__ import annotations

import csv
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caltech_sweep.config import DatasetConfig
from caltech_sweep.data import inspect_dataset, load_dataset, load_split
from caltech_sweep.data.splits import SPLITS
from caltech_sweep.errors import DatasetError
from caltech_sweep.study.file import load_study
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.pictures import check_pictures
from helpers.places import Cli

STAMPS = Path("/usr/share/tuxpaint/stamps")


def paint(path: Path, seed: int, size: tuple[int, int] = (40, 44)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def images(place: Path) -> Path:
    for number in range(24):
        paint(place / "images" / ("ant", "bee")[number % 2] / f"{number:02d}.png", number)
    return place / "images"


CONFIG = DatasetConfig(name="folder", root="images", resize=36, crop=32)
SKIP = DatasetConfig(name="folder", root="images", resize=36, crop=32, on_bad_image="skip")


# -- images that cannot be read ----------------------------------------------------------------------------------------


def spoil(images: Path) -> dict[str, str]:
    """Damage some images; return what is said of each."""
    whole = (images / "bee" / "05.png").read_bytes()
    (images / "ant" / "04.png").write_bytes(b"")
    (images / "bee" / "05.png").write_bytes(whole[: len(whole) // 2])
    (images / "bee" / "07.png").write_text("<html>not found</html>")
    return {"ant/04.png": "it is empty", "bee/05.png": "is it complete?", "bee/07.png": "unknown image format"}


def test_by_default_an_image_that_cannot_be_read_stops_everything(images: Path) -> None:
    spoil(images)
    with pytest.raises(DatasetError, match="3 of 24 image files cannot be read"):
        load_dataset(CONFIG)


def test_skipped_images_leave_the_parts_of_all_others_as_they_are(images: Path) -> None:
    before = {item.path: part for part in SPLITS for item in load_split(CONFIG).part(part)}
    bad = spoil(images)
    data = load_dataset(SKIP)
    after = {item.path: part for part in SPLITS for item in data.split.part(part)}
    gone = {Path("images") / name for name in bad}
    assert after == {path: part for path, part in before.items() if path not in gone}
    assert {name: why for name, why in data.split.skipped if bad[name] in why}.keys() == bad.keys()
    assert data.split.notes[0].startswith("skipped 3 images that cannot be read: ")
    again = load_dataset(SKIP)
    assert again.split == data.split and again.fingerprint == data.fingerprint
    assert inspect_dataset(SKIP).fingerprint == data.fingerprint


def test_a_plan_finds_what_headers_tell_and_writes_nothing(images: Path, place: Path) -> None:
    spoil(images)
    assert {name for name, _ in inspect_dataset(SKIP).split.skipped} >= {"ant/04.png", "bee/07.png"}
    assert not (place / "data").exists()


def test_skipping_changes_nothing_where_every_image_can_be_read(images: Path) -> None:
    assert load_dataset(SKIP).fingerprint == load_dataset(CONFIG).fingerprint


def test_a_class_without_a_readable_training_image_is_named(images: Path) -> None:
    for path in (images / "bee").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DatasetError, match="no training image of class 'bee' can be read"):
        load_dataset(SKIP)


STUDY = """\
title: Own images
dataset: {name: folder, root: images, resize: 36, crop: 32, on_bad_image: skip}
fixed: {arch: resnet18, batch_size: 4, epochs: 1}
rows:
  - {name: Only, set: {lr: 0.01}}
"""


def test_skipped_images_are_listed_in_the_run(images: Path, place: Path, cli: Cli) -> None:
    bad = spoil(images)
    (place / "sweeps" / "own.yaml").write_text(STUDY)
    result = cli("run", "own", "--in-process", "--threads", "1")
    assert result.exit_code == 0 and "skipped 3 images that cannot be read" in result.output
    tracker = MlflowTracker(None)
    study = tracker.study("own")
    assert study is not None
    (run,) = tracker.trials(study)
    listed = list(csv.reader(io.StringIO(tracker.artifact(run.run_id, "skipped_images.csv").read_text())))
    assert listed[0] == ["image", "reason"] and {name for name, _ in listed[1:]} == bad.keys()
    assert "skipped 3 images" in run.tags["dataset.notes"]


# -- the same image twice ----------------------------------------------------------------------------------------------


def test_an_image_in_two_parts_is_found_by_its_content_under_any_name(images: Path) -> None:
    split = load_split(CONFIG)
    assert load_dataset(CONFIG).split.notes == ()
    shutil.copy(split.train[0].path, split.test[0].path)
    shutil.copy(split.train[1].path, split.train[2].path)  # both in one part, which is no leak
    note = "1 image of the same content in more than one part, such as "
    names = [split.part(part)[0].path.relative_to("images").as_posix() for part in ("train", "test")]
    expected = (f"{note}{names[0]} (train) and {names[1]} (test)",)
    assert load_dataset(CONFIG).split.notes == expected and inspect_dataset(CONFIG).split.notes == expected


# -- a study file for one's own images ---------------------------------------------------------------------------------


def test_a_new_study_file_says_what_was_found_and_plans_as_it_is(place: Path, cli: Cli) -> None:
    for number in range(60):
        paint(place / "my photos" / ("ant" if number % 10 else "bee: $x") / f"{number:02d}.png", number, (150, 170))
    result = cli("new", "mine", "--from", "my photos")
    assert result.exit_code == 0 and "wrote sweeps/mine.yaml" in result.output
    text = (place / "sweeps" / "mine.yaml").read_text()
    assert "# 60 images of 2 classes: train 27, val 13, test 20." in text
    assert "# The largest class, ant, has 54 images; the smallest, bee: $x, has 6." in text
    assert "# The shorter side has 150 pixels." in text
    dataset = load_study("mine").config({}).dataset
    assert (dataset.root, dataset.crop, dataset.resize) == ("my photos", 128, 146)
    planned = cli("plan", "mine")
    assert planned.exit_code == 0 and "Baseline" in planned.output
    assert "there is a study file sweeps/mine.yaml already" in cli("new", "mine", "--from", "my photos").output


@pytest.mark.parametrize("kind", ["parts", "csv"])
def test_a_new_study_file_knows_every_form_of_dataset(place: Path, cli: Cli, kind: str) -> None:
    lines = ["Filename;Species;Subset"]
    for number in range(48):
        part, name = ("train", "train", "valid", "test")[number // 12], ("ant", "bee")[number % 2]
        paint(place / "set" / part / name / f"{number}.png", number)
        lines.append(f"{part}/{name}/{number}.png;{name};{part}")
    (place / "set" / "list.csv").write_text("\n".join(lines))
    if kind == "parts":
        (place / "set" / "list.csv").unlink()
    result = cli("new", "mine", "--from", "set" if kind == "parts" else "set/list.csv")
    assert result.exit_code == 0 and "48 images of 2 classes: train 24, val 12, test 12." in result.output
    assert cli("plan", "mine").exit_code == 0
    config = load_study("mine").config({}).dataset
    assert (config.name, config.label_column) == (("folder", "label") if kind == "parts" else ("csv", "Species"))


def test_what_is_no_dataset_is_a_sentence(place: Path, cli: Cli) -> None:
    assert "there is no folder or file nowhere" in cli("new", "mine", "--from", "nowhere").output
    (place / "empty").mkdir()
    result = cli("new", "mine", "--from", "empty")
    assert result.exit_code == 2 and "at least two classes, each in a folder" in result.output
    result = cli("new", "../mine", "--from", "empty")
    assert result.exit_code == 2 and "leads out of the folder" in result.output
    assert not (place / "sweeps" / "mine.yaml").exists()


# -- somebody's folder, as it is ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not STAMPS.is_dir(), reason="Debian's tuxpaint-stamps-default is not installed")
def test_a_folder_of_stamps_ends_in_a_table_and_a_page_without_preparation(place: Path, cli: Cli) -> None:
    """Nested folders, sounds and texts between the images, alpha channels and palettes; a class of three."""
    assert cli("new", "stamps", "--from", str(STAMPS)).exit_code == 0
    quick = ("--set", "epochs=1", "--set", "dataset.resize=36", "--set", "dataset.crop=32", "--trials", "2")
    planned = cli("plan", "stamps", *quick)
    assert planned.exit_code == 0 and "passed over: 7,858 .ogg" in planned.output, planned.output
    ran = cli("run", "stamps", *quick, "--in-process", "--threads", str(os.cpu_count()))
    assert ran.exit_code == 0 and "study stamps: 2 complete" in ran.output and "passed over: 7,858 .ogg" in ran.output
    table = cli("report", "stamps").output
    assert "17 classes" in table and table.count("tied with the best") + table.count("best;") >= 1
    assert cli("report", "stamps", "--format", "html", "--out", "page.html").exit_code == 0
    page = (place / "page.html").read_text(encoding="utf-8")
    assert check_pictures(page, STAMPS) == 18 and "cannot be read in the dataset" not in page
