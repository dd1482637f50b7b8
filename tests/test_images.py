"""The decoded cache: torchvision's pixels exactly, damage noticed, bad files named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from caltech_sweep.config import DatasetConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.errors import DatasetError

CONFIG = {"name": "folder", "resize": 40, "crop": 32}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(tmp_path / "data"))
    rng = np.random.default_rng(0)
    for name in ("cat", "dog & fox"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(6):
            height, width = rng.integers(20, 90, 2)
            pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
            image = Image.fromarray(pixels)
            image = image.convert({0: "L", 1: "P", 2: "CMYK"}.get(index, "RGB"))
            image.save(tmp_path / "images" / name / f"{index}.{'tif' if index == 2 else 'png'}")
    return tmp_path / "images"


def test_crops_equal_torchvision_bit_for_bit(root: Path) -> None:
    data = load_dataset(DatasetConfig(root=str(root), **CONFIG))
    for part in ("train", "val", "test"):
        crops = data.center_crops(part, 32)
        for index, item in enumerate(data.split.part(part)):
            resized = v2.Resize(40)(Image.open(item.path).convert("RGB"))
            assert torch.equal(crops[index], v2.functional.pil_to_tensor(v2.CenterCrop(32)(resized)))
            views = torch.stack([v2.functional.pil_to_tensor(view) for view in v2.TenCrop(32)(resized)])
            assert torch.equal(data.ten_crops(part, index, 32), views)


def test_the_cache_is_reused_and_damage_is_rebuilt(root: Path, tmp_path: Path) -> None:
    config = DatasetConfig(root=str(root), **CONFIG)
    first, calls = load_dataset(config), []
    again = load_dataset(config, lambda done, total: calls.append(done))
    assert not calls and again.fingerprint == first.fingerprint
    store = next((tmp_path / "data" / "cache").glob("*.bin"))
    content = bytearray(store.read_bytes())
    for damaged in (bytes(content[:-7]), bytes([content[0] ^ 1, *content[1:]])):
        store.write_bytes(damaged)
        assert torch.equal(load_dataset(config).center_crops("val", 32), first.center_crops("val", 32))
        assert store.read_bytes() == content


def test_bad_images_are_all_named_and_nothing_is_kept(root: Path, tmp_path: Path) -> None:
    (root / "cat" / "3.png").write_bytes(b"")
    (root / "cat" / "4.png").write_bytes((root / "cat" / "5.png").read_bytes()[:60])
    with pytest.raises(DatasetError) as caught:
        load_dataset(DatasetConfig(root=str(root), **CONFIG))
    assert "2 of 12 image files" in str(caught.value)
    assert "3.png (the file is empty)" in str(caught.value) and "4.png" in str(caught.value)
    assert not list((tmp_path / "data").glob("cache/*"))


def test_sixteen_bit_greyscale_is_scaled_not_clipped(root: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(root / "cat" / "0.png")
    data = load_dataset(DatasetConfig(root=str(root), **CONFIG))
    part, index = next(
        (part, i)
        for part in ("train", "val", "test")
        for i, item in enumerate(data.split.part(part))
        if item.path == root / "cat" / "0.png"
    )
    assert 110 < data.center_crops(part, 32)[index].float().mean() < 145


def test_the_drawn_dataset_is_the_same_every_time() -> None:
    config = DatasetConfig(name="shapes", resize=32, crop=32)
    data = load_dataset(config)
    assert torch.equal(data.center_crops("val", 32), load_dataset(config).center_crops("val", 32))
    assert [len(data.split.part(p)) for p in ("train", "val", "test")] == [480, 192, 192]
    some = load_dataset(DatasetConfig(name="shapes", resize=32, crop=32, classes=3, images_per_class=5))
    assert torch.equal(some.center_crops("train", 32)[5], data.center_crops("train", 32)[60])
