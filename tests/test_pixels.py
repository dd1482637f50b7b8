"""What a file's pixels are, held against Pillow's and torchvision's own functions; the same wherever a file is read."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.data.images import decode
from caltech_sweep.data.pixels import PixelRules, formats, read_rgb, suffixes
from caltech_sweep.errors import DatasetError
from caltech_sweep.report.page.thumbnails import SIDE, datasets_of, find_thumbnails, open_thumbnails
from caltech_sweep.serving.promote import promote
from caltech_sweep.serving.registry import open_model
from caltech_sweep.serving.runs import model_spec
from caltech_sweep.serving.served_model import Classifier
from caltech_sweep.tracking.writer import MlflowTracker
from caltech_sweep.training.models import build_model
from helpers.places import Cli

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")

WHITE = PixelRules()
GREEN = PixelRules("#20c040")


def noise(*shape: int, seed: int = 1, high: int = 256, kind: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(kind)


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(samples: np.ndarray, depth: int, *, key: tuple[int, ...] = (), after: bytes = b"") -> bytes:
    """Write (H, W) grey or (H, W, 3) colour samples of any depth as a PNG, with a transparent ``key``."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = samples.shape[:2]
    bits = np.unpackbits(samples.reshape(height, -1, 1).astype(">u2").view(np.uint8), axis=2)[..., 16 - depth :]
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits.reshape(height, -1))
    header = struct.pack(">IIBBBBB", width, height, depth, 2 if samples.ndim == 3 else 0, 0, 0, 0)
    transparent = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    body = chunk(b"IHDR", header) + transparent + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + (chunk(b"eXIf", after) if after else b"") + chunk(b"IEND", b"")


def blended(rgba: np.ndarray, background: tuple[int, ...]) -> np.ndarray:
    """Return (H, W, 3) of (H, W, 4) over a colour, computed as the formula says it."""
    alpha = rgba[..., 3:].astype(np.float64) / 255
    return rgba[..., :3] * alpha + np.array(background) * (1 - alpha)


def pixels(content: bytes, rules: PixelRules = WHITE) -> np.ndarray:
    image = read_rgb(content, rules)
    assert image.mode == "RGB"
    return np.asarray(image)


# -- transparency ------------------------------------------------------------------------------------------------------

KINDS = ("RGBA", "LA", "PA", "P bytes", "P index", "RGB key", "L key", "1 key", "GIF", "WEBP", "TGA", "ICO", "TIFF")


def transparent(kind: str, width: int, height: int, seed: int) -> bytes:
    """Return a file with transparency of some kind; in the hidden pixels there is noise."""
    rgba = Image.fromarray(noise(height, width, 4, seed=seed))
    palette = rgba.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    alphas = noise(16, seed=seed).tobytes()
    made = {
        "RGBA": lambda: file_of(rgba, "PNG"),
        "LA": lambda: file_of(rgba.convert("LA"), "PNG"),
        "PA": lambda: file_of(rgba.convert("PA"), "TIFF"),
        "P bytes": lambda: file_of(palette, "PNG", transparency=alphas),
        "P index": lambda: file_of(palette, "PNG", transparency=3),
        "RGB key": lambda: png(np.asarray(rgba)[..., :3] // 100, 8, key=(1, 0, 2)),
        "L key": lambda: png(np.asarray(rgba)[..., 0] // 50, 8, key=(3,)),
        "1 key": lambda: png(np.asarray(rgba)[..., 0] // 128, 1, key=(0,)),
        "GIF": lambda: file_of(palette, "GIF", transparency=2),
        "WEBP": lambda: file_of(rgba, "WEBP", lossless=True, exact=True),
        "TGA": lambda: file_of(rgba, "TGA"),
        "ICO": lambda: file_of(rgba, "ICO", sizes=[(width, height)]),
        "TIFF": lambda: file_of(rgba, "TIFF"),
    }
    return made[kind]()


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.sampled_from([WHITE, GREEN])
)
def test_what_is_transparent_shows_the_background(
    kind: str, width: int, height: int, seed: int, rules: PixelRules
) -> None:
    content = transparent(kind, width, height, seed)
    with Image.open(io.BytesIO(content)) as image:
        rgba = image.convert("RGBA")
    composed = Image.alpha_composite(Image.new("RGBA", rgba.size, rules.background), rgba).convert("RGB")
    got = pixels(content, rules)
    assert np.array_equal(got, np.asarray(composed))
    assert np.abs(got - blended(np.asarray(rgba), rules.rgb)).max() <= 1


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 3), (16, 3)]), st.integers(1, 20), st.integers(0, 99)
)
def test_the_transparent_colour_of_a_png_is_found_at_every_depth(
    layout: tuple[int, int], width: int, seed: int
) -> None:
    depth, bands = layout
    few = noise(7, width, bands, seed=seed, high=2, kind=np.uint16) * ((1 << depth) - 1)  # so that the key is met
    samples = few if bands == 3 else few[..., 0]
    key = tuple(int(v) for v in few[3, 0])
    content = png(samples, depth, key=key)
    hidden = (samples.reshape(7, width, bands) == key).all(axis=2)
    shown = np.broadcast_to(samples.reshape(7, width, bands) * (255 / ((1 << depth) - 1)), (7, width, 3))
    assert hidden.any()
    got = pixels(content, GREEN)
    assert np.array_equal(got, np.where(hidden[..., None], GREEN.rgb, shown.round()))


def test_opaque_files_are_pillow_s_own_conversion() -> None:
    rgb = Image.fromarray(noise(30, 40, 3))
    lab = ImageCms.profileToProfile(
        rgb, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    files = [
        *(file_of(rgb.convert(mode), "PNG") for mode in ("1", "L", "P", "RGB")),
        *(file_of(rgb.convert(mode), "JPEG") for mode in ("L", "RGB", "CMYK")),
        *(file_of(image, "TIFF") for image in (rgb.convert("CMYK"), rgb.convert("YCbCr"), lab)),
        file_of(rgb, "PPM"),
        file_of(rgb.convert("L"), "PPM"),
        file_of(rgb, "AVIF"),
        file_of(rgb.convert("P"), "GIF", save_all=True, append_images=[Image.new("P", rgb.size)]),
        png(noise(30, 40, 3, high=1 << 16, kind=np.uint16), 16),
    ]
    for content in files:
        with Image.open(io.BytesIO(content)) as image:
            assert np.array_equal(pixels(content, GREEN), np.asarray(image.convert("RGB"))), image


# -- EXIF orientation --------------------------------------------------------------------------------------------------


def turned(kind: str, orientation: int) -> bytes:
    image = Image.fromarray(noise(23, 31, 3))
    exif = image.getexif()
    exif[0x0112] = orientation
    compression = {"compression": "tiff_lzw"} if kind == "TIFF lzw" else {}
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return file_of(image, kind.split()[0], exif=exif, **compression, **lossless)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF lzw", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_exif_data_says(kind: str, orientation: int) -> None:
    content = turned(kind, orientation)
    with Image.open(io.BytesIO(content)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(pixels(content), upright)
    assert upright.shape[:2] == ((31, 23) if orientation > 4 else (23, 31))
    with Image.open(io.BytesIO(content)) as image:  # as torchvision's ImageFolder loads it
        assert np.array_equal(pixels(content, PixelRules(exif="ignore")), np.asarray(image.convert("RGB")))
    if kind in ("JPEG", "PNG"):
        stream = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        theirs = decode_image(stream, ImageReadMode.RGB, apply_exif_orientation=True).permute(1, 2, 0).numpy()
        assert np.abs(pixels(content).astype(int) - theirs).max() <= (2 if kind == "JPEG" else 0)


def test_an_orientation_after_the_pixels_of_a_png_counts_and_so_does_one_of_a_transparent_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    samples = noise(5, 9, 3)
    content = png(samples, 8, after=exif.tobytes().removeprefix(b"Exif\0\0"))
    assert np.array_equal(pixels(content), np.rot90(samples, -1))
    rgba = Image.fromarray(noise(5, 9, 4))
    flat = pixels(file_of(rgba, "PNG"))
    assert np.array_equal(pixels(file_of(rgba, "PNG", exif=exif)), np.rot90(flat, -1))


@pytest.mark.filterwarnings("ignore:::PIL")
@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.data())
def test_malformed_exif_data_turns_nothing_and_breaks_nothing(kind: str, data: st.DataObject) -> None:
    image = Image.fromarray(noise(8, 8, 3))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    block = bytearray(exif.tobytes())
    for place, value in data.draw(st.lists(st.tuples(st.integers(6, len(block) - 1), st.integers(0, 255)), max_size=6)):
        block[place] = value
    whole = data.draw(st.one_of(st.just(bytes(block)), st.binary(max_size=60).map(lambda tail: b"Exif\0\0" + tail)))
    try:
        content = file_of(image, kind, exif=whole)
    except Exception:  # Pillow's writer asks more than its reader
        return
    plain, got = pixels(file_of(image, kind)), pixels(content)
    turns = [plain, *(np.asarray(Image.fromarray(plain).transpose(turn)) for turn in Image.Transpose)]
    assert any(np.array_equal(got, turn) for turn in turns)


# -- depth of grey -----------------------------------------------------------------------------------------------------


def folder(root: Path, files: dict[str, bytes]) -> DatasetConfig:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return DatasetConfig(name="folder", root=str(root), resize=32, crop=32)


def greys(bits: int, stored: str = "PNG") -> dict[str, bytes]:
    made = {}
    for name, number in itertools.product("ab", range(6)):
        values = noise(32, 32, seed=number, high=1 << bits, kind=np.uint16)
        values[0, 0] = (1 << bits) - 1
        made[f"{name}/{number}.{stored.lower()}"] = file_of(Image.fromarray(values), stored)
    return made


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("stored", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_in_sixteen_bits_is_scaled_by_the_bits_that_the_dataset_uses(home: Path, bits: int, stored: str) -> None:
    files = greys(bits, stored)
    dark = noise(32, 32, seed=77, high=1 << (bits - 3), kind=np.uint16)
    files[f"a/0.{stored.lower()}"] = file_of(Image.fromarray(dark), stored)  # scaled as the others are
    config = folder(home / "images", files)
    data = load_dataset(config)
    assert data.grey_bits == bits
    for part in ("train", "val", "test"):
        for item, crop in zip(data.split.part(part), data.center_crops(part, 32), strict=True):
            with Image.open(item.path) as image:
                want = np.asarray(image).astype(np.float64) * 256 / (1 << bits)
            assert np.array_equal(crop[0].numpy(), np.floor(want)) and torch.equal(crop[0], crop[2])
    again = load_dataset(config, lambda done, total: pytest.fail("decoded again"))
    assert again.grey_bits == bits and again.fingerprint == data.fingerprint


def test_files_that_tell_their_range_are_scaled_by_it_whatever_lies_in_the_dataset_with_them(home: Path) -> None:
    values = noise(32, 32, high=1 << 10, kind=np.uint16)
    netpbm = b"P5 32 32 1023\n" + values.astype(">u2").tobytes()
    data = load_dataset(folder(home / "images", {**greys(12), "a/0.png": netpbm}))
    assert data.grey_bits == 12
    everything = torch.cat([data.center_crops(part, 32) for part in ("train", "val", "test")])
    differences = (everything[:, 0].int() - torch.from_numpy(values >> 2).int()).abs().amax((1, 2))
    assert (differences <= 1).sum() == 1  # Pillow rounds 10 bits to 16


def test_a_value_beyond_the_dataset_s_bits_is_a_sentence() -> None:
    content = file_of(Image.fromarray(np.full((9, 9), 5000, np.uint16)), "PNG")
    with pytest.raises(DatasetError, match="its grey values reach 5,000, and the images of its dataset have 12 bits"):
        read_rgb(content, PixelRules(grey_bits=12))


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_sixteen_bit_colour_that_uses_fewer_bits_is_refused_with_the_reason(home: Path, bits: int) -> None:
    files = {
        f"{name}/{i}.png": png(noise(32, 32, 3, seed=i, high=1 << bits, kind=np.uint16), 16)
        for name in "ab"
        for i in range(6)
    }
    config = folder(home / "images", files)
    with pytest.raises(DatasetError, match="use 14 bits at most and would be nearly black; scale their values"):
        load_dataset(config)
    (home / "images" / "a" / "0.png").write_bytes(png(noise(32, 32, 3, high=1 << 16, kind=np.uint16), 16))
    assert len(load_dataset(config).split.train) == 6


# -- formats -----------------------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_file_starts_a_program_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    marker = tmp_path / "started"
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {marker}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(OSError), Image.open(io.BytesIO(EPS)) as image:
        image.load()
    assert marker.exists()  # so it is Pillow's way to start it
    marker.unlink()
    wrapped = b"\x1c\x03\x3c\x00\x02\x01\x01" + b"\x1c\x08\x0a" + struct.pack(">H", len(EPS)) + EPS
    for content in (EPS, b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(EPS)) + bytes(18) + EPS, wrapped):
        with pytest.raises(DatasetError, match="unknown image format"):
            read_rgb(content, WHITE)
    assert not marker.exists()


def test_all_that_pillow_decodes_without_a_program_is_an_image() -> None:
    assert {"JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO"} <= set(formats())
    assert not {"EPS", "WMF", "PDF", "MPEG", "HDF5", "GRIB", "BUFR", "IPTC"} & set(formats())
    wanted = {".jfif", ".ppm", ".pgm", ".pbm", ".avif", ".apng", ".jp2", ".tga", ".jpg", ".tiff", ".mpo"}
    assert wanted <= suffixes()
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".wmf", ".txt", ".svg"} & suffixes()


def test_the_content_of_a_file_tells_its_format() -> None:
    picture = Image.fromarray(noise(20, 20, 3))
    for kind in ("PNG", "BMP", "PPM", "TIFF", "TGA"):
        assert np.array_equal(pixels(file_of(picture, kind)), np.asarray(picture))


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_settings_and_a_new_version_make_another_cache_only_where_an_image_depends_on_them(home: Path) -> None:
    plain = {f"{c}/{i}.png": file_of(Image.fromarray(noise(40, 40, 3, seed=i)), "PNG") for c in "ab" for i in range(6)}
    opaque = np.dstack([noise(40, 40, 3), np.full((40, 40), 255, np.uint8)])
    plain["a/0.png"] = file_of(Image.fromarray(opaque), "PNG")
    config = folder(home / "plain", plain)
    data = load_dataset(config)
    other = replace(config, background="black", exif="ignore")
    assert load_dataset(other, lambda *_: pytest.fail("decoded again")).fingerprint == data.fingerprint
    (header,) = (home / "home" / "cache").glob("*.json")
    old = {key: value for key, value in json.loads(header.read_text()).items() if key != "plain"}
    header.write_text(json.dumps(old))  # as versions wrote it that had one way with all images
    assert load_dataset(config, lambda *_: pytest.fail("decoded again")).fingerprint == data.fingerprint

    special = folder(home / "special", {**plain, "a/1.png": file_of(Image.fromarray(noise(40, 40, 4)), "PNG")})
    first = load_dataset(special)
    assert load_dataset(special, lambda *_: pytest.fail("decoded again")).fingerprint == first.fingerprint
    for changed in (replace(special, background="black"), replace(special, exif="ignore")):
        assert load_dataset(changed).fingerprint != first.fingerprint
    spelled = replace(special, background="#ffffff")
    assert load_dataset(spelled, lambda *_: pytest.fail("decoded again")).fingerprint == first.fingerprint


# -- one file, wherever it is read -------------------------------------------------------------------------------------

STUDY = """\
title: Odd pixels
dataset: {name: folder, root: images, resize: 40, crop: 32, background: '#20c040'}
fixed: {arch: resnet18, batch_size: 4, epochs: 1, drop_last: false}
rows:
  - {name: Only, set: {lr: 0.01}}
"""


def odd_files() -> dict[str, bytes]:
    made: dict[str, bytes] = {}
    for number, name in itertools.product(range(3), "ab"):
        made[f"{name}/alpha{number}.png"] = file_of(Image.fromarray(noise(50, 44, 4, seed=number)), "PNG")
        made[f"{name}/turned{number}.jpg"] = turned("JPEG", 3 + number)
        values = noise(40, 60, seed=number, high=4096, kind=np.uint16)
        made[f"{name}/deep{number}.png"] = file_of(Image.fromarray(values), "PNG")
        made[f"{name}/key{number}.gif"] = transparent("GIF", 41, 47, number)
    return made


def check_thumbnail(address: str | None, content: bytes, rules: PixelRules) -> None:
    assert address is not None
    shown = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    whole = read_rgb(content, rules)
    resampling = Image.Resampling.LANCZOS if max(whole.size) > SIDE else Image.Resampling.NEAREST
    expected = file_of(whole.resize(shown.size, resampling), "WEBP", quality=72, method=4)
    assert shown.tobytes() == Image.open(io.BytesIO(expected)).tobytes()


def test_a_classifier_and_the_page_see_the_pixels_of_the_cache(home: Path) -> None:
    config = folder(home / "images", odd_files())
    config = replace(config, resize=40, background="navy", exif="ignore")
    data = load_dataset(config)
    trial = TrialConfig(dataset=config, arch="resnet18")
    spec = json.loads(json.dumps(model_spec(trial, ["a", "b"], grey_bits=data.grey_bits)))
    classifier = Classifier(spec, build_model(trial, 2).state_dict(), torch.device("cpu"))
    thumbnail = open_thumbnails(config, data.grey_bits)
    for part in ("train", "val", "test"):
        for name, crop in zip(data.paths(part), data.center_crops(part, 32), strict=True):
            content = (home / "images" / name).read_bytes()
            assert torch.equal(classifier.prepare(content), crop), name
            check_thumbnail(thumbnail(name), content, PixelRules("navy", "ignore", 12))


@pytest.mark.slow
def test_training_predict_the_served_model_and_the_page_see_the_same_pixels(place: Path, cli: Cli) -> None:
    folder(place / "images", odd_files())
    (place / "sweeps" / "odd.yaml").write_text(STUDY)
    assert cli("run", "odd", "--in-process", "--threads", "1").exit_code == 0
    tracker = MlflowTracker(None)
    study = tracker.study("odd")
    assert study is not None
    (run,) = tracker.trials(study)
    assert run.tags["dataset.grey_bits"] == "12"
    asked = open_model(run.run_id, device="cpu")
    promoted = promote("odd")
    asked_by_name = open_model(f"{promoted.name}@{promoted.alias}", device="cpu")
    import mlflow.pyfunc  # after caltech_sweep.champion, which sets it up

    address = f"sqlite:///{place / 'mlruns' / 'mlflow.db'}"
    mlflow.set_tracking_uri(address)
    mlflow.set_registry_uri(address)  # or that of an earlier test stays
    served = mlflow.pyfunc.load_model(f"models:/{promoted.name}/{promoted.version}").unwrap_python_model()
    config = datasets_of(study.definition, run, None)[0]
    thumbnail = find_thumbnails([config], run)
    rules = PixelRules("#20c040", "apply", 12)
    data = load_dataset(config)
    for part in ("train", "val", "test"):
        for name, crop in zip(data.paths(part), data.center_crops(part, 32), strict=True):
            content = (place / "images" / name).read_bytes()
            for classifier in (asked, asked_by_name, served._classifier):
                assert torch.equal(classifier.prepare(content), crop), name
            cut = v2.CenterCrop(32)(Image.fromarray(decode(content, 40, rules)))
            assert torch.equal(v2.functional.pil_to_tensor(cut), crop)
            check_thumbnail(thumbnail(name), content, rules)


def test_a_background_that_is_no_colour_is_a_sentence(cli: Cli) -> None:
    for wrong in ("whitee", "'#12'", "'#ff000080'", "3", "null"):
        result = cli("plan", "tiny", "--set", f"dataset.background={wrong}")
        assert result.exit_code == 2
        assert "dataset.background must be an opaque colour such as white or '#ff8800', in quotes" in result.output
    assert "dataset.exif must be one of apply, ignore" in cli("plan", "tiny", "--set", "dataset.exif=no").output
