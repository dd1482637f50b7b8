"""What is kept of images: nothing is read twice, damage is found, every kind of cache gives the same pixels."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import PIL
import pytest
import torch
import torchvision
from PIL import Image

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data import inspect_dataset, load_dataset
from caltech_sweep.data.cache import inspect_store, open_store
from caltech_sweep.data.digests import Files
from caltech_sweep.data.images import LoadedData
from caltech_sweep.errors import DatasetError
from helpers.datasets import draw
from helpers.places import Cli

LONG_AGO = 1_600_000_000


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of 18 drawn images that have not changed for long."""
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(tmp_path / "data"))
    for file in draw(tmp_path / "photos").rglob("*.png"):
        os.utime(file, (LONG_AGO, LONG_AGO))
    return tmp_path / "photos"


def config(photos: Path, **changes: object) -> DatasetConfig:
    return DatasetConfig(name="folder", root=str(photos), resize=20, crop=16, **changes)  # type: ignore[arg-type]


def spoil(file: Path) -> None:
    """Change a byte in the middle of a file, and nothing that the file system tells of it."""
    status = file.stat()
    with file.open("rb+") as opened:
        opened.seek(status.st_size // 2)
        byte = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def pixels(data: LoadedData) -> torch.Tensor:
    return torch.cat([data.center_crops(part, 16) for part in ("train", "val", "test")])


def test_the_digest_is_that_of_contents_names_and_labels(photos: Path) -> None:
    data = load_dataset(config(photos))
    parts = {part: data.split.part(part) for part in ("train", "val", "test")}
    files = b"".join(hashlib.sha256(item.path.read_bytes()).digest() for items in parts.values() for item in items)
    content = hashlib.sha256(files).hexdigest()
    key = hashlib.sha256(f"1|{PIL.__version__}|{torchvision.__version__}|20|{content}".encode()).hexdigest()[:16]
    listing = [
        (part, item.class_name, item.label, item.path.relative_to(photos).as_posix())
        for part, items in parts.items()
        for item in items
    ]
    assert data.fingerprint == hashlib.sha256(json.dumps([key, listing]).encode()).hexdigest()[:16]


def test_a_start_reads_no_file_that_is_as_it_was_and_verifying_reads_all(photos: Path) -> None:
    first = load_dataset(config(photos))
    spoiled = photos / "class 1" / "3.png"
    spoil(spoiled)
    for again in (load_dataset(config(photos)), inspect_dataset(config(photos))):
        assert again.fingerprint == first.fingerprint
    for verified in (load_dataset, inspect_dataset):
        with pytest.raises(DatasetError, match="1 image file changed without a new time of change.*class 1/3.png; put"):
            verified(config(photos), verify=True)
    spoiled.touch()
    with pytest.raises(DatasetError, match="3.png"):  # read now, and found to be no whole PNG any more
        load_dataset(config(photos))


@pytest.mark.parametrize("kind", ["resized", "crop", "jpeg"])
def test_a_first_start_reads_a_jpeg_file_for_its_digest_and_for_its_pixels_and_no_third_time(
    kind: str, photos: Path, tmp_path: Path
) -> None:
    for file in photos.rglob("*.png"):
        with Image.open(file) as image:
            image.resize((48, 20 + 2 * int(file.stem))).convert("RGB").save(file.with_suffix(".jpg"))
        os.utime(file.with_suffix(".jpg"), (LONG_AGO, LONG_AGO))
    reads: Counter[Path] = Counter()

    def read(path: Path) -> bytes:
        reads[path] += 1
        return path.read_bytes()

    given, cache = config(photos, cache=kind), tmp_path / "other"
    for files in (sorted(photos.rglob("*.jpg")), sorted(photos.rglob("*.*"))):
        planned = inspect_store(Files(files, read), given, cache)
        assert {reads[file] for file in files if file.suffix == ".jpg"} == {1}
        reads.clear()
        opened = open_store(Files(files, read), given, cache)
        assert all(reads[file] == 2 for file in files if len(files) == 18)
        assert planned.key == opened.key
        if kind != "jpeg":
            made = max(cache.glob("images-*.bin"), key=lambda file: file.stat().st_mtime_ns)
            assert planned.to_build == made.stat().st_size
        reads.clear()
        open_store(Files(files, read), given, cache)
        assert not reads


def test_a_file_that_has_only_just_changed_is_read_again(photos: Path) -> None:
    file, other = photos / "class 1" / "3.png", (photos / "class 1" / "4.png").read_bytes()
    file.write_bytes(file.read_bytes().ljust(len(other), b"\0"))
    first, status = load_dataset(config(photos)), file.stat()
    file.write_bytes(other.ljust(status.st_size, b"\0"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load_dataset(config(photos)).fingerprint != first.fingerprint


def test_memory_that_is_not_whole_and_headers_of_earlier_versions_do_no_harm(photos: Path, tmp_path: Path) -> None:
    first, cache = load_dataset(config(photos)), tmp_path / "data" / "cache"
    spoil(cache / "digests.bin")
    header = next(cache.glob("images-*.json"))
    known = {key: value for key, value in json.loads(header.read_text()).items() if key in ("bytes", "crc32", "shapes")}
    header.write_text(json.dumps(known))
    again = load_dataset(config(photos), lambda *_: pytest.fail("decoded again"))
    assert again.fingerprint == first.fingerprint and torch.equal(pixels(again), pixels(first))
    (cache / "digests.bin").write_bytes(b"")
    assert load_dataset(config(photos)).fingerprint == first.fingerprint


def settle(cache: Path) -> Path:
    """Let the pixels of a cache be old and known to be whole, as they are by the second run; return their file."""
    pixel_file = next(cache.glob("*.bin"), cache)
    pixel_file = next(file for file in cache.glob("images-*.bin"))
    os.utime(pixel_file, (LONG_AGO, LONG_AGO))
    return pixel_file


def test_a_flipped_bit_of_the_cache_is_found_by_verifying_and_by_the_doctor(
    photos: Path, tmp_path: Path, finished_place: Path, cli: Cli
) -> None:
    first, cache = pixels(load_dataset(config(photos))), tmp_path / "data" / "cache"
    kept = settle(cache)
    assert torch.equal(pixels(load_dataset(config(photos))), first)  # checked, and known to be whole from now on
    whole = kept.read_bytes()
    spoil(kept)
    assert inspect_dataset(config(photos)).to_build == 0
    assert inspect_dataset(config(photos), verify=True).to_build == len(whole)
    assert torch.equal(pixels(load_dataset(config(photos), verify=True)), first) and kept.read_bytes() == whole
    load_dataset(config(photos))
    spoil(settle(cache))
    stores = ("--tracking-uri", f"{finished_place}/mlruns/mlflow.db", "--storage", f"{finished_place}/mlruns/optuna.db")
    found = cli("doctor", *stores)
    assert f"image cache: would fix: {kept} is damaged" in found.output and found.exit_code == 1
    assert cli("doctor", "--fix", *stores).exit_code == 0 and not kept.exists()
    assert torch.equal(pixels(load_dataset(config(photos))), first)


@pytest.mark.parametrize("kind", ["crop", "jpeg"])
def test_each_kind_of_cache_gives_the_same_pixels_under_the_same_digest(
    kind: str, photos: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    data = load_dataset(config(photos, cache=kind), say=told.append)
    sizes = [file.stat().st_size for file in (tmp_path / "data" / "cache").glob("images-*.bin")]
    assert sizes == ([18 * 16 * 16 * 3] if kind == "crop" else [])
    assert ["cache of 13.8 kB" in line for line in told] == [True] * len(sizes)
    again = load_dataset(config(photos, cache=kind), lambda *_: pytest.fail("decoded again"))
    whole = load_dataset(config(photos))
    assert data.fingerprint == again.fingerprint == whole.fingerprint
    for one in (data, again):
        assert torch.equal(pixels(one), pixels(whole))
        assert torch.equal(one.center_crops("val", 16, [1]), whole.center_crops("val", 16, [1]))
    if kind == "jpeg":
        assert torch.equal(data.ten_crops("test", 1, 16), whole.ten_crops("test", 1, 16))
        boxes = [lambda height, width: (1, 2, height - 3, width - 5)] * 2
        same = (each.resized_crops("train", 16, [0, 3], boxes) for each in (data, whole))
        assert torch.equal(*same)
    else:
        with pytest.raises(DatasetError, match="dataset.cache: crop keeps centre crops only"):
            data.ten_crops("test", 1, 16)


def test_what_is_kept_of_images_is_no_part_of_what_a_trial_is(photos: Path) -> None:
    trials = [TrialConfig(dataset=config(photos, cache=kind)) for kind in ("resized", "crop", "jpeg")]
    assert len({trial.fingerprint() for trial in trials}) == 1 and "cache" not in trials[1].counted()["dataset"]


def test_a_file_that_changes_while_it_is_decoded_in_every_epoch_is_said(photos: Path) -> None:
    data = load_dataset(config(photos, cache="jpeg"))
    (photos / "class 1" / "3.png").write_bytes((photos / "class 1" / "4.png").read_bytes())
    (photos / "class 2" / "0.png").unlink()
    with pytest.raises(DatasetError, match="cannot be read: (it has changed since the study was started|No such file)"):
        pixels(data)


def test_every_kind_of_cache_names_all_images_that_cannot_be_decoded(photos: Path) -> None:
    for name in ("3.png", "4.png"):
        (photos / "class 1" / name).write_bytes((photos / "class 1" / name).read_bytes()[:90])
    for kind in ("resized", "crop", "jpeg"):
        with pytest.raises(DatasetError, match="2 of 18 image files cannot be read.*3.png.*4.png"):
            load_dataset(config(photos, cache=kind))


def test_a_cache_that_does_not_fit_is_said_with_its_size_before_it_is_built(
    photos: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(small_disk))
    large = DatasetConfig(name="folder", root=str(photos), resize=1200, crop=64)  # square: 18 * 1200 * 1200 * 3 bytes
    for start in (inspect_dataset, load_dataset):
        with pytest.raises(
            DatasetError, match=r"needs 77.8 MB, and .* free some.*crop, which takes 221.2 kB, or to jpeg"
        ):
            start(large)
    assert not list(small_disk.rglob("images-*"))
    for kind in ("crop", "jpeg"):
        chosen = DatasetConfig(name="folder", root=str(photos), resize=1200, crop=64, cache=kind)
        assert len(load_dataset(chosen).split.train) == 8


def test_plan_tells_the_size_and_refuses_crops_where_whole_images_are_needed(photos: Path, cli: Cli) -> None:
    own = ("--set", "dataset.name=folder", "--set", "dataset.classes=null", "--set", "dataset.images_per_class=null")
    plan = ("plan", "tiny", *own, "--data", str(photos))
    assert "they are decoded once into a cache of" in cli(*plan).output
    boxes = ("--set", "test_views=center", "--set", "augment=[random_resized_crop]")
    for what, setting in (("TenCrop", ("--set", "test_views=tencrop")), ("random_resized_crop", boxes)):
        refused = cli(*plan, "--set", "dataset.cache=crop", *setting)
        assert refused.exit_code == 2
        assert f"dataset.cache: crop keeps centre crops only, and {what} needs" in refused.output
