"""A dataset that is an archive at an address which fsspec reads: s3://, gs://, https://. Each machine has its own copy.

The archive is unpacked once into the data folder, and kept under a name that its address decides.
"""

from __future__ import annotations

import hashlib
import lzma
import shutil
import tarfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from caltech_sweep import paths
from caltech_sweep.data.fetch.unpack import climbs
from caltech_sweep.errors import DatasetError
from caltech_sweep.files import BLOCK, alone, create_atomically, make_folder, writing
from caltech_sweep.heartbeat import beat
from caltech_sweep.text import one_line, quoted

_DAMAGES = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError)  # of an archive
Member = tuple[str, int, Callable[[], "IO[bytes] | None"]]  # its name, its bytes, and what opens it


def is_remote(root: str | None) -> bool:
    """Tell whether a dataset's folder is an address."""
    return root is not None and "://" in root


def _place(url: str) -> Path:
    """Return where an archive belongs; raise DatasetError for an address with a secret, which is not shown."""
    parts = urllib.parse.urlsplit(url)
    if parts.query or "@" in parts.netloc:
        raise DatasetError(
            "dataset.root: the address holds a user, a password or a key; leave it out, and set it in the environment, "
            "as the package of this kind of address reads it"
        )
    return paths.data_home() / "archives" / hashlib.sha256(url.encode()).hexdigest()[:16]


def fetched(url: str) -> Path:
    """Return the folder that an archive was unpacked into; raise DatasetError when it is not there yet.

    Where all of it lies in one folder, it is that one.
    """
    place = _place(url)
    if not place.is_dir():
        raise DatasetError(f"{url} is not on this machine yet; `caltech-sweep run` fetches it")
    while len(inside := [entry for entry in place.iterdir() if not entry.name.startswith(".")]) == 1:
        if not inside[0].is_dir():
            break
        place = inside[0]
    return place


def fetch_archive(url: str) -> None:
    """Fetch and unpack an archive that is not there yet; raise DatasetError when that fails, with nothing left."""
    place = _place(url)
    with alone(make_folder(place.parent)):
        if place.is_dir():
            return
        with create_atomically(place) as made, writing(made):
            archive = made.with_name("archive")
            _receive(url, archive)
            made.mkdir()
            _unpack(url, archive, made)
            archive.unlink()


def _receive(url: str, target: Path) -> None:
    from fsspec.callbacks import Callback
    from fsspec.core import url_to_fs

    class Beats(Callback):
        def call(self, hook_name: str | None = None, **named: Any) -> None:
            beat()

    try:
        remote, path = url_to_fs(url)
        remote.get_file(path, str(target), callback=Beats())
    except Exception as error:  # of any library, network or service
        why = one_line(str(error) or type(error).__name__)
        raise DatasetError(f"dataset.root: {url} cannot be fetched ({why})") from error


@contextmanager
def _members(archive: Path) -> Iterator[list[Member]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            infos = [info for info in zipped.infolist() if not info.is_dir()]
            yield [(info.filename, info.file_size, lambda info=info: zipped.open(info)) for info in infos]  # type: ignore[misc]
        return
    with tarfile.open(archive) as tar:
        found = [member for member in tar if not member.isdir()]
        for member in found:
            if not member.isreg():
                raise DatasetError(f"{quoted(member.name)} in it is a link or a special file; pack files only")
        yield [(member.name, member.size, lambda member=member: tar.extractfile(member)) for member in found]  # type: ignore[misc]


def _copy(source: IO[bytes], target: Path) -> None:
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.open("wb")
    with file:
        while block := source.read(BLOCK):
            with writing(target):
                file.write(block)
            beat()


def _unpack(url: str, archive: Path, folder: Path) -> None:
    """Unpack the files of a zip or a tar; none may lead out of the folder, or say that it has more than the disk."""
    try:
        with _members(archive) as members:
            if any(climbs(name) for name, _, _ in members):
                raise DatasetError("the name of a file in it leads out of its folder; do not trust it")
            if (size := sum(size for _, size, _ in members)) > shutil.disk_usage(folder).free:
                raise DatasetError(f"it needs {size / 1e9:.1f} GB of disk; name another place with CALTECH_SWEEP_DATA")
            for name, _, opened in members:
                source = opened()
                assert source is not None
                _copy(source, folder / name)
    except DatasetError as error:
        raise DatasetError(f"dataset.root: {url} was not unpacked: {error}") from error
    except (*_DAMAGES, ValueError, RuntimeError) as error:
        raise DatasetError(
            f"dataset.root: {url} is no zip or tar that can be unpacked ({one_line(str(error))})"
        ) from error
