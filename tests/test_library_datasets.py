"""torchvision's datasets by name: its own parts, labels and pixels."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from caltech_sweep.config import DatasetConfig
from caltech_sweep.data import load_dataset, load_split
from caltech_sweep.data.library import SOURCES
from caltech_sweep.data.splits import SPLITS
from caltech_sweep.errors import DatasetError
from helpers.places import Cli

STUDY = """\
title: By name
dataset: {name: torchvision, source: FakeData, resize: 32, crop: 32}
fixed: {arch: resnet18, batch_size: 8, epochs: 1}
rows:
  - {name: Only, set: {lr: 0.01}}
"""


def paint(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (44, 50, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=95)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "torchvision"


def pets(home: Path) -> None:
    """Make the files of OxfordIIITPet, of three breeds."""
    base = home / "oxford-iiit-pet"
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for number in range(27):
        breed, part = number % 3, "test" if number >= 18 else "trainval"
        name = f"{('Abyssinian', 'beagle', 'great_pyrenees')[breed]}_{number}"
        paint(base / "images" / f"{name}.jpg", number)
        lines[part].append(f"{name} {breed + 1} 1 1")
    (base / "annotations").mkdir()
    for part, each in lines.items():
        (base / "annotations" / f"{part}.txt").write_text("\n".join(each) + "\n")


def config(source: str) -> DatasetConfig:
    return DatasetConfig(name="torchvision", source=source, resize=40, crop=32)


def test_parts_labels_and_pixels_are_those_of_torchvision(home: Path) -> None:
    pets(home)
    data = load_dataset(config("OxfordIIITPet"))
    assert data.split.classes == ("Abyssinian", "Beagle", "Great Pyrenees")
    assert [len(data.split.part(part)) for part in SPLITS] == [12, 6, 9]
    own = {
        part: datasets.OxfordIIITPet(str(home), split=word) for part, word in (("train", "trainval"), ("test", "test"))
    }
    seen = set()
    for part in SPLITS:
        crops = data.center_crops(part, 32)
        for crop, name, label in zip(crops, data.paths(part), data.labels(part).tolist(), strict=True):
            folder, index = name.split("/")
            image, expected = own[folder][int(index)]
            assert label == expected and (folder == "test") == (part == "test")
            assert (v2.functional.pil_to_tensor(v2.CenterCrop(32)(v2.Resize(40)(image))) == crop).all()
            seen.add(name)
    assert len(seen) == 27


def test_a_dataset_without_parts_is_cut_as_a_folder_is(home: Path) -> None:
    for number in range(18):
        paint(home / "eurosat" / "2750" / ("Forest", "River")[number % 2] / f"{number}.jpg", number)
    split = load_split(config("EuroSAT"))
    assert split.classes == ("Forest", "River") and [len(split.part(part)) for part in SPLITS] == [8, 4, 6]


def test_images_that_are_no_files_are_read_as_well(home: Path) -> None:
    data, fake = load_dataset(config("FakeData")), datasets.FakeData(30, (3, 48, 48), 3, random_offset=60)
    for index in range(30):
        image, label = fake[index]
        assert data.labels("test")[index] == label
        crop = v2.functional.pil_to_tensor(v2.CenterCrop(32)(v2.Resize(40)(image)))
        assert (data.center_crops("test", 32, [index])[0] == crop).all()


def test_a_study_of_a_dataset_by_name_ends_in_a_table_and_a_page_with_pictures(place: Path, cli: Cli) -> None:
    (place / "sweeps" / "fake.yaml").write_text(STUDY)
    planned = cli("plan", "fake")
    assert planned.exit_code == 0 and "3 classes, train 40, val 20, test 30 images" in planned.output
    assert cli("run", "fake", "--in-process", "--threads", "1").exit_code == 0
    page = cli("report", "fake", "--format", "html").output
    assert "data:image/webp" in page and "cannot be read" not in page


def test_a_dataset_that_is_not_here_is_not_downloaded_by_a_plan_and_said(place: Path, cli: Cli) -> None:
    (place / "sweeps" / "pets.yaml").write_text(STUDY.replace("FakeData", "OxfordIIITPet"))
    result = cli("plan", "pets")
    assert result.exit_code == 2 and "OxfordIIITPet is not in data/torchvision" in result.output
    assert not (place / "data").exists()


@pytest.mark.slow  # it waits for a network that is not there
def test_offline_is_a_sentence(place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (place / "sweeps" / "pets.yaml").write_text(STUDY.replace("FakeData", "OxfordIIITPet"))
    result = cli("run", "pets", "--in-process")
    assert result.exit_code == 2 and "OxfordIIITPet cannot be downloaded to data/torchvision" in result.output
    assert "connect to the network" in result.output


def test_an_unknown_name_is_told_with_one_that_is_near(cli: Cli) -> None:
    with pytest.raises(DatasetError, match="'CIFAR' is none of the datasets of torchvision .*; did you mean 'CIFAR10'"):
        load_split(config("CIFAR"))
    with pytest.raises(DatasetError, match="name the dataset of torchvision, such as CIFAR10"):
        load_split(DatasetConfig(name="torchvision"))


@pytest.mark.parametrize("source", SOURCES)
def test_torchvision_takes_the_arguments_of_every_part(source: str) -> None:
    kind = getattr(datasets, source)
    for arguments in SOURCES[source].values():
        inspect.signature(kind).bind(root="x", **arguments) if source != "FakeData" else kind(**arguments)
