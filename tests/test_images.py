"""The decoded cache: torchvision's pixels exactly, damage noticed, bad files named."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from caltech_sweep.config import DatasetConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.data.images import decode
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


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_equal_torchvision_bit_for_bit(interpolation: str, root: Path) -> None:
    data = load_dataset(DatasetConfig(root=str(root), interpolation=interpolation, **CONFIG))
    assert (data.fingerprint == load_dataset(DatasetConfig(root=str(root), **CONFIG)).fingerprint) is (
        interpolation == "bilinear"
    )
    for part in ("train", "val", "test"):
        crops = data.center_crops(part, 32)
        for index, item in enumerate(data.split.part(part)):
            resized = v2.Resize(40, v2.InterpolationMode(interpolation))(Image.open(item.path).convert("RGB"))
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
    assert "3.png (it is empty)" in str(caught.value) and "4.png" in str(caught.value)
    assert not list((tmp_path / "data").glob("cache/*"))


def picture(mode: str = "RGB", seed: int = 3) -> Image.Image:
    """Return a noisy picture of 48 x 40 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image as the content of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """Return a small file with very many pixels, the left half white and the right one black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    length = -(-width // 8)
    row = b"\0" + b"\xff" * (length // 2) + bytes(length - length // 2)
    rows = zlib.compress(row * min(height, 8000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def from_the_real_world() -> Iterator[tuple[str, bytes, str]]:
    """Yield a file's name, its content, and what is said of it; nothing is said of what loads right."""
    jpeg, png = file_of(picture(), "JPEG"), file_of(picture(), "PNG")
    yield "a png called.jpg", png, ""
    yield "a jpeg called.png", jpeg, ""
    yield "printed.jpg", file_of(picture("CMYK"), "JPEG"), ""
    yield "bilevel.png", file_of(picture("1"), "PNG"), ""
    yield "with opaque alpha.png", file_of(picture("RGBA"), "PNG"), ""
    yield "grey with opaque alpha.png", file_of(picture("LA"), "PNG"), ""
    yield "palette.gif", file_of(picture("P"), "GIF"), ""
    yield "animated.gif", file_of(picture("P"), "GIF", save_all=True, append_images=[picture("P", 4)]), ""
    yield "broken exif.jpg", file_of(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), ""
    yield "large.png", huge_png(12_000, 8_000), ""
    yield "empty.jpg", b"", "it is empty"
    yield "truncated.jpg", jpeg[: len(jpeg) // 2], "is it complete?"
    yield "truncated.png", png[: len(png) // 2], "is it complete?"
    yield "an answer of a server.jpg", b"<html>404 Not Found</html>", "unknown image format"
    yield "bomb.png", huge_png(60_000, 60_000), "could be decompression bomb"
    yield "ribbon.png", huge_png(2, 4_000_000), "too extreme an aspect ratio to resize to 40"
    floats, wide = np.linspace(0, 1, 1600, dtype=np.float32), np.arange(0, 1600 * 100, 100, dtype=np.int32)
    yield "floats.tif", file_of(Image.fromarray(floats.reshape(40, 40)), "TIFF"), "its pixels are floats"
    yield "32 bits.tif", file_of(Image.fromarray(wide.reshape(40, 40)), "TIFF"), "more than 16 bits"


REAL_WORLD = list(from_the_real_world())


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize(("content", "said"), [case[1:] for case in REAL_WORLD], ids=[case[0] for case in REAL_WORLD])
def test_images_as_the_world_has_them_load_right_or_are_refused(content: bytes, said: str) -> None:
    if said:
        with pytest.raises(DatasetError, match=said):
            decode(content, 40)
        return
    by_hand = v2.Resize(40)(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(decode(content, 40), np.asarray(by_hand)) and np.asarray(by_hand).std() > 20


@pytest.mark.slow  # for the process
def test_pillow_s_warnings_are_not_for_the_user(tmp_path: Path) -> None:
    """In a process of its own, since pytest has filters of its own."""
    for number, (_, content, _) in enumerate(REAL_WORLD):
        (tmp_path / f"{number}.bin").write_bytes(content)
    script = """
import contextlib, pathlib, sys
from caltech_sweep.data.images import decode
for file in pathlib.Path(sys.argv[1]).iterdir():
    with contextlib.suppress(Exception):
        decode(file.read_bytes(), 40)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.filterwarnings("ignore:::PIL")
def test_all_of_them_in_one_dataset_are_named_at_once(root: Path) -> None:
    for name, content, _ in REAL_WORLD:
        (root / "cat" / name).write_bytes(content)
    bad = [name for name, _, said in REAL_WORLD if said]
    with pytest.raises(DatasetError) as caught:
        load_dataset(DatasetConfig(root=str(root), **CONFIG))
    assert f"{len(bad)} of {12 + len(REAL_WORLD)} image files cannot be read" in str(caught.value)
    for name in bad:
        (root / "cat" / name).unlink()
    assert len(load_dataset(DatasetConfig(root=str(root), **CONFIG)).split.train) > 0


FILES = [file_of(picture(), kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP")] + [file_of(picture("P"), "GIF")]


@pytest.mark.filterwarnings("ignore:::PIL")
@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FILES), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8), st.floats(0, 1))
def test_damaged_files_are_pixels_or_a_reason_never_anything_else(
    content: bytes, changes: list[tuple[float, int]], kept: float
) -> None:
    damaged = bytearray(content)
    for place, value in changes:
        damaged[int(place * (len(damaged) - 1))] = value
    try:
        pixels = decode(bytes(damaged[: int(kept * len(damaged))]), 16)
    except DatasetError as error:
        assert str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and min(pixels.shape[:2]) == 16


def test_a_full_disk_under_the_cache_is_a_sentence_and_leaves_nothing(
    root: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(small_disk))
    config = DatasetConfig(name="folder", root=str(root), resize=1000, crop=32)  # 3 MB an image and more
    with pytest.raises(DatasetError, match=r"cache needs 7\d.\d MB, and .* has 3\d.\d MB free; free some"):
        load_dataset(config)
    assert not [file for file in small_disk.rglob("*") if file.is_file()]
    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    assert len(load_dataset(config).split.train) == 6


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
