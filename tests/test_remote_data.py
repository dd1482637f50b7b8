"""A dataset that is an archive at an address: every machine takes its own copy, which must have the same images."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from caltech_sweep.config import DatasetConfig
from caltech_sweep.data import dataset_root, inspect_dataset, load_dataset
from caltech_sweep.errors import DatasetError
from caltech_sweep.sweep.executors.luggage import Files, Trainer, luggage_of
from helpers.places import invoke
from helpers.servers import FileServer, serve

CONFIG = DatasetConfig(name="folder", resize=16, crop=16)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for number in range(16):
        file = tmp_path / "photos" / "ab"[number % 2] / f"{number} é.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (20, 20, 3), np.uint8)).save(file)
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def server() -> Iterator[FileServer]:
    with serve() as found:
        yield found


def packed(folder: Path, kind: str, top: str = ".") -> bytes:
    """Return a folder as an archive in which it is called ``top``."""
    within = folder.parent / f"packed-{kind}" / top
    shutil.copytree(folder, within, dirs_exist_ok=True)
    root = folder.parent / f"packed-{kind}"
    return Path(shutil.make_archive(str(root), kind, root)).read_bytes()


@pytest.mark.parametrize("protocol", ["http", "file", "memory"])
@pytest.mark.parametrize(("kind", "top"), [("zip", "."), ("gztar", "deep/photos"), ("tar", "photos")])
def test_the_images_of_an_archive_are_those_of_its_folder_and_are_fetched_once(
    photos: Path, server: FileServer, protocol: str, kind: str, top: str
) -> None:
    content = packed(photos, kind, top)
    url = {"http": server.url("p"), "file": (photos.parent / "p").as_uri(), "memory": "memory://p"}[protocol]
    server.files["p"] = content
    with fsspec.open(url, "wb") if protocol != "http" else io.BytesIO() as file:
        file.write(content)
    server.asked.clear()
    config = replace(CONFIG, root=url)
    with pytest.raises(DatasetError, match="is not on this machine yet"):
        inspect_dataset(config)
    there, here = load_dataset(config), load_dataset(replace(CONFIG, root=str(photos)))
    assert there.fingerprint == here.fingerprint
    assert load_dataset(config).fingerprint == here.fingerprint
    assert inspect_dataset(config).fingerprint == here.fingerprint
    assert len(server.asked) == (protocol == "http")
    assert there.paths("test") == here.paths("test")


def test_a_node_takes_the_archive_itself_unless_that_has_other_images_by_now(
    photos: Path, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["photos.zip"] = packed(photos, "zip")
    config = replace(CONFIG, root=server.url("photos.zip"))
    known = luggage_of(config, load_dataset(config), dataset_root(config), tmp_path / "data" / "mark")
    assert known.dataset.root == config.root
    files = Files(known, {})
    server.asked.clear()
    for node in ("one", "two"):
        monkeypatch.setenv("CALTECH_SWEEP_DATA", str(tmp_path / node))
        assert Trainer(known)._data(config).fingerprint == known.fingerprint
        assert not (tmp_path / node / "received").exists()
    assert len(server.asked) == 2
    Image.new("RGB", (20, 20), "red").save(next((tmp_path / "packed-zip").rglob("*.png")))
    server.files["photos.zip"] = packed(tmp_path / "packed-zip", "tar")
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(tmp_path / "three"))
    assert Trainer(replace(known, supply=files))._data(config).fingerprint == known.fingerprint
    assert len(list((tmp_path / "three" / "received").rglob("*.png"))) == 16


def a_tar(member: tarfile.TarInfo) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.addfile(member)
    return content.getvalue()


def a_zip(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as zipped:
        zipped.writestr(name, b"x")
    return content.getvalue()


def a_link() -> bytes:
    link = tarfile.TarInfo("a/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return a_tar(link)


def half_a_tar() -> bytes:
    content, member = io.BytesIO(), tarfile.TarInfo("a/large.png")
    member.size = 100_000
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        tar.addfile(member, io.BytesIO(np.random.default_rng(0).bytes(member.size)))
    return content.getvalue()[:50_000]


REFUSED = {
    "climbs.zip": (a_zip("../evil.png"), "leads out of its folder"),
    "climbs.tar": (a_tar(tarfile.TarInfo("/evil.png")), "leads out of its folder"),
    "link.tar": (a_link(), "is a link or a special file"),
    "text.zip": (b"no archive", "is no zip or tar"),
    "cut.zip": (a_zip("a/b.png")[:-30], "is no zip or tar"),
    "cut.tar.gz": (half_a_tar(), "is no zip or tar"),
    "gone.zip": (None, "cannot be fetched"),
    "photos.zip?token=hunter2": (None, "holds a user, a password or a key"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_archive_that_cannot_be_used_is_a_sentence_and_leaves_nothing(
    photos: Path, server: FileServer, name: str
) -> None:
    content, told = REFUSED[name]
    if content is not None:
        server.files[name] = content
    with pytest.raises(DatasetError, match=told) as caught:
        load_dataset(replace(CONFIG, root=server.url(name)))
    with pytest.raises(DatasetError) as planned:
        inspect_dataset(replace(CONFIG, root=server.url(name)))
    assert "hunter2" not in f"{caught.value} {planned.value}"
    assert not [path for path in (photos.parent / "data").rglob("*") if path.is_file() and "lock" not in path.name]
    assert not (photos.parent / "evil.png").exists()


def test_the_command_line_takes_an_address_as_it_is(photos: Path, server: FileServer) -> None:
    url = server.url("cli.zip")
    result = invoke("data", "list", "--split", "test", "--data", url)
    assert result.exit_code == 2 and f"{url} is not on this machine yet" in result.output
    server.files["cli.zip"] = packed(photos, "zip")
    load_dataset(replace(CONFIG, root=url))
    here = invoke("data", "list", "--split", "test", "--data", "photos").output
    assert invoke("data", "list", "--split", "test", "--data", url).output == here != ""
