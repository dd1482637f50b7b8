"""Small input that would take very much memory or time: it is read within bounds, or refused in a short sentence."""

from __future__ import annotations

import gzip
import io
import os
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caltech_sweep.config import DATASET_FIELDS, TRIAL_FIELDS, TRIAL_RULES
from caltech_sweep.data.fetch.unpack import unpack
from caltech_sweep.data.images import decode
from caltech_sweep.data.pixels import DEFAULT_RULES, PixelRules, read_file, read_rgb
from caltech_sweep.data.registry import dataset_rules
from caltech_sweep.errors import DatasetError, StudyFileError, UsageError
from caltech_sweep.study.file import load_study, parse_override
from caltech_sweep.text import is_overgrown, quoted
from helpers.places import Cli, invoke, sql

# -- images ------------------------------------------------------------------------------------------------------------


def png(width: int, height: int, colour: int, bits: int) -> bytes:
    """Return a PNG of one colour, the smallest file with so many pixels: colour 0 is grey, 2 RGB and 6 RGBA."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + b"\x55" * (width * bits * {0: 1, 2: 3, 6: 4}[colour] // 8)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


MEASURED = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from caltech_sweep.data.images import decode
from caltech_sweep.data.pixels import examine
files = [Path(name).read_bytes() for name in sys.argv[1:]] * 3
with ThreadPoolExecutor(6) as pool:
    list(pool.map(examine, files))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shapes = {image.shape for image in pool.map(lambda content: decode(content, 40), files)}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000, shapes)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("colour", "bits"), [(0, 1), (6, 8), (0, 16)])
def test_six_images_of_kilobytes_are_never_in_memory_together(tmp_path: Path, colour: int, bits: int) -> None:
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for file in files:
        file.write_bytes(png(13_000, 13_000, colour, bits))
    command = [sys.executable, "-c", MEASURED, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    megabytes, shape = done.stdout.split(maxsplit=1)
    assert shape.strip() == "{(40, 40, 3)}" and int(megabytes) < 2400  # one with alpha, its strips, and torch itself


def test_a_large_image_in_strips_has_the_pixels_of_the_whole() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2100, 2200, 4)).astype(np.uint8)
    whole = Image.fromarray(pixels)
    content = io.BytesIO()
    whole.save(content, "PNG", compress_level=0)
    background = Image.new("RGBA", whole.size, (0, 0, 128))
    expected = Image.alpha_composite(background, whole).convert("RGB")
    assert read_rgb(content.getvalue(), PixelRules(background="navy")).tobytes() == expected.tobytes()


def test_large_images_are_decoded_by_many_threads_without_waiting_for_each_other_for_ever() -> None:
    content = png(6000, 6000, 0, 1)
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda _: decode(content, 16, DEFAULT_RULES), range(16)))
    assert {image.shape for image in images} == {(16, 16, 3)}


@pytest.mark.slow
def test_a_file_without_an_end_is_refused(tmp_path: Path) -> None:
    sparse = tmp_path / "large.png"
    with sparse.open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(DatasetError, match="has more than 1024 MB"):
        read_file(sparse)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(b"image"))
    writer.start()
    assert read_file(tmp_path / "pipe") == b"image"  # as a shell's <(command) gives
    writer.join()


# -- archives ----------------------------------------------------------------------------------------------------------


def pax(size: int) -> bytes:
    """Return a tar whose first member has an extended header of ``size`` bytes."""
    body = b"x" * size
    record = b"%d comment=%s\n" % (size, body[: size - len(b"%d comment=\n" % size)])
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    return info.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % 512) + member("a.txt", b"a")


def long_name(size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    return info.tobuf(tarfile.GNU_FORMAT) + b"n" * size + bytes(-size % 512) + member("a.txt", b"a")


def sparse_map(size: int) -> bytes:
    """Return a tar whose member starts with a map of very many holes."""
    body = b"%d\n" % size + b"0\n" * size
    info = tarfile.TarInfo("holes")
    info.size = len(body)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "holes"}
    return info.tobuf(tarfile.PAX_FORMAT) + body + bytes(-len(body) % 512) + bytes(1024)


def member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf() + content + bytes(-len(content) % 512)


@pytest.mark.parametrize("make", [pax, long_name, sparse_map])
def test_a_header_of_many_megabytes_is_refused_before_it_is_read(tmp_path: Path, make: object) -> None:
    content = gzip.compress(make(3_000_000), 1)  # type: ignore[operator]
    (tmp_path / "a.tar.gz").write_bytes(content)
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    try:
        with pytest.raises(DatasetError, match="the header of a member takes more than 512 KB"):
            unpack(tmp_path / "a.tar.gz", tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert not list((tmp_path / "out").iterdir())


def test_headers_of_a_usual_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(pax(100_000) + long_name(200) + bytes(1024))
    (tmp_path / "out").mkdir()
    unpack(tmp_path / "a.tar", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.txt", "n" * 200]


# -- study files -------------------------------------------------------------------------------------------------------

LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "more than 100,000 values"),
        ("title: &a [*a]", "x.yaml:1: "),
        ("space: &a {lr: *a}", "x.yaml:1: "),
        ("title: " + "[" * 200_000, "nested more than 100 deep"),
        ("title: " + "[{" * 60, "nested more than 100 deep"),
        ("- " * 100_000, "not valid YAML"),
        ("epochs: " + "9" * 10_000, "not valid YAML"),
        ("title: [" + "x, " * 10 + "]", "title: must be text"),
        ("title: " + "x" * (1 << 18), "more than 256 KB"),
    ],
)
def test_a_study_file_that_would_grow_is_a_short_sentence_at_once(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(StudyFileError) as caught:
        load_study(str(tmp_path / "x.yaml"))
    assert said in str(caught.value) and len(str(caught.value)) < 400
    assert time.process_time() - started < 5


def test_an_override_is_held_to_the_same_bounds() -> None:
    nested = (
        "[&a [x,x,x,x,x,x,x,x], "
        + ", ".join(f"&{chr(98 + i)} [{'*' + chr(97 + i) + ' ,'} *{chr(97 + i)}]" for i in range(24))
        + "]"
    )
    with pytest.raises(UsageError) as caught:
        parse_override(f"augment={nested}")
    assert len(str(caught.value)) < 400


def test_usual_aliases_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "rows:\n  - {name: A, set: &one {lr: 0.1}}\n  - {name: B, set: {<<: *one, seed: 1}}\n"
    )
    rows = load_study(str(tmp_path / "x.yaml")).rows
    assert [dict(row.settings) for row in rows] == [{"lr": 0.1}, {"lr": 0.1, "seed": 1}]


def test_shared_parts_count_as_often_as_they_are_named() -> None:
    leaf = list("abcdefgh")
    assert not is_overgrown([leaf] * 100, most=1000) and is_overgrown([leaf] * 200, most=1000)


# -- numbers -----------------------------------------------------------------------------------------------------------

RULES = {**TRIAL_RULES, **{f"dataset.{name}": rule for name, rule in dataset_rules().items()}}
NUMBERS = [name for name, rule in RULES.items() if rule.kind != "other"]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_an_upper_bound_and_says_it(name: str) -> None:
    for value in (10**20, 10**400, 1e300, float("inf"), float("nan")):
        said = RULES[name].problem(value)
        assert said is not None and len(said) < 200
    default = {**TRIAL_FIELDS, **{f"dataset.{key}": field for key, field in DATASET_FIELDS.items()}}[name].default
    assert RULES[name].problem(default) is None


@pytest.mark.parametrize(
    "options",
    [
        ("--set", "dataset.resize=99999999999"),
        ("--set", "epochs=1e20"),
        ("--set", "epochs=100000000000000000000"),
        ("--set", "lr=1e999"),
        ("--set", "seed=" + "9" * 300),
        ("--set", "dataset.crop=4097"),
        ("--trials", "1000000000000"),
        ("--replicates", "1000000000000"),
        ("--threads", "1000000000000"),
    ],
)
def test_a_number_that_no_machine_takes_is_a_sentence(cli: Cli, options: tuple[str, ...]) -> None:
    result = cli("plan", "tiny", *options)
    assert result.exit_code == 2 and "Traceback" not in result.output and len(result.output) < 600


def test_options_and_arguments_that_are_no_usable_number_are_sentences(cli: Cli, place: Path) -> None:
    for option in ("--cache-size", "--hang-timeout"):
        for value in ("nan", "inf"):
            result = cli("run", "tiny", option, value)
            assert result.exit_code == 2 and "is not a finite number" in result.output
    study = place / "sweeps" / "tiny.yaml"
    text = study.read_text()
    for argument in ("seed: 100000000000000000000", "n_ei_candidates: 1000000000000"):
        study.write_text(text.replace("{name: random, seed: 0}", f"{{name: tpe, {argument}}}"))
        result = cli("plan", "tiny")
        assert result.exit_code == 2 and "is too large a number: 1" in result.output


def test_drawn_shapes_that_no_memory_holds_are_a_sentence(cli: Cli) -> None:
    result = cli("plan", "tiny", "--set", "dataset.resize=4096", "--set", "dataset.images_per_class=24")
    assert result.exit_code == 2 and "shapes of 4096 pixels take" in result.output


def test_what_is_quoted_is_cut() -> None:
    assert quoted("a" * 1000) == "'" + "a" * 78 + "…" and len(quoted([1] * 1000)) == 80
    assert quoted(10**10_000) == "a very long int"


def test_what_others_nest_too_deep_in_a_store_is_taken_for_damaged(copied: Path) -> None:
    deep = "[" * 100_000
    (document,) = (copied / "mlruns" / "artifacts" / "tiny").glob("*/artifacts/study.json")
    document.write_text(deep)
    sql(copied, "mlflow.db", f"UPDATE params SET value = '{deep[:6000]}' WHERE key = 'augment'")
    sql(copied, "mlflow.db", f"INSERT INTO tags SELECT 'artifacts.missing', '{deep[:7000]}', run_uuid FROM runs")
    for kind in ("markdown", "html"):
        done = invoke("report", "tiny", "--format", kind)
        assert done.exit_code == 0 and "trial-002" in done.output
    assert invoke("doctor").exit_code == 0
