"""Caltech-101 on this machine: downloaded, checked and unpacked, or copied from what the user already has.

Nothing is half done: a download grows in a ``.part`` file that later calls go on with, an archive is checked member
by member before anything is written, and the folder is unpacked next to its place and renamed into it once complete.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from caltech_sweep import paths
from caltech_sweep.config import DatasetConfig
from caltech_sweep.data.fetch.download import Progress, download, shown
from caltech_sweep.data.fetch.unpack import ARCHIVES, unpack
from caltech_sweep.data.listing import is_hidden
from caltech_sweep.data.registry import caltech_root
from caltech_sweep.data.splits import BACKGROUND, caltech_split
from caltech_sweep.errors import DatasetError, UsageError
from caltech_sweep.files import ELSEWHERE, alone, locked_directory, make_folder, remove_abandoned

URL = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"  # DOI 10.22002/D1.20086, CC BY 4.0
CHECKSUMS = ("md5:3138e1922a9193bfa496528edbbc45d0", "md5:b224c7392d521a49829488ab0f1120d9")  # the zip; its tar.gz
_ZIP = "caltech-101.zip"
_UNPACKING = ".unpack-"


# What `caltech-sweep data` does


def fetch(source: Path | None, url: str | None, progress: Progress) -> Path:
    """Return the complete class-folder root that later commands find without a flag, fetching it where needed.

    Without a ``source``, the archive at ``url`` (default: the public one) is downloaded, unless the folder is there
    already. A ``source`` (a folder, a tar, a tar.gz or the official zip) is copied or unpacked and itself left as it
    is: a copy, so that moving or changing the original later changes no result. A folder that was there before and
    differs is kept next to the new one as ``101_ObjectCategories.old``.

    Raises UsageError when both are given, and DatasetError for everything else that can go wrong.
    """
    if source is not None and url is not None:
        raise UsageError("--from and --url both say where the dataset comes from; give one of them")
    if source is None and url is None and os.environ.get("CALTECH101_ROOT"):
        return _named_root()
    home = make_folder(paths.data_home())
    root = home / paths.CALTECH_FOLDER
    if source is not None:
        return _install(home, _existing(source))
    address, checksums = _address(url or URL)
    fix = f"or download {shown(address)} elsewhere and give the file: caltech-sweep data --from FILE"
    if not _is_complete(root):
        download(address, home / _ZIP, checksums, progress, fix=fix)
        _install(home, home / _ZIP)
    return root


def _named_root() -> Path:
    """Return the folder that CALTECH101_ROOT names, since every command reads it and no download."""
    try:
        root = caltech_root(DatasetConfig())
        _verify(root, root)
    except DatasetError as error:
        raise DatasetError(
            f"the environment variable CALTECH101_ROOT names the dataset, so nothing was fetched, but {error}; "
            "correct the variable, or unset it and run again"
        ) from error
    return root


def _address(url: str) -> tuple[str, tuple[str, ...]]:
    """Cut the checksum, ``#md5=...`` or ``#sha256=...``, off a URL; without one the public archive is expected."""
    address, _, fragment = url.partition("#")
    if not fragment:
        return address, CHECKSUMS
    match = re.fullmatch(r"(md5=[0-9a-f]{32}|sha256=[0-9a-f]{64})", fragment.lower())
    if match is None:
        raise DatasetError("--url: what follows the # must be md5=... or sha256=... with the archive's whole checksum")
    return address, (match[1].replace("=", ":"),)


def _existing(source: Path) -> Path:
    """Return a source's class folders, or its archive, which an unzipped official zip holds in a folder."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise DatasetError(f"--from: there is no folder or file {source}; check the path")
    root = _class_root(source)
    packed = [source / name for name in (*ARCHIVES, _ZIP) if (source / name).is_file()]
    return packed[0] if packed and root == source and not (source / BACKGROUND).is_dir() else root


def _class_root(folder: Path) -> Path:
    """Return the folder of class folders that ``folder`` is or holds; when there is none, ``folder`` itself."""
    name = paths.CALTECH_FOLDER
    with contextlib.suppress(OSError):
        for pattern in (BACKGROUND, f"{name}/*", f"*/{BACKGROUND}", f"*/{name}/*"):
            for found in sorted(folder.glob(pattern)):
                if found.is_dir():
                    return found.parent
    return folder


def _verify(root: Path, named: Path) -> None:
    """Raise DatasetError, speaking of ``named``, unless the folder is complete."""
    try:
        caltech_split(root)
    except DatasetError as error:
        raise DatasetError(str(error).replace(str(root), str(named))) from error
    except OSError as error:
        raise DatasetError(f"{error.filename} cannot be read: {error.strerror}") from error


def _is_complete(root: Path) -> bool:
    try:
        _verify(root, root)
    except DatasetError:
        return False
    return True


def _install(home: Path, source: Path) -> Path:
    """Copy or unpack ``source`` next to the dataset's place, verify it, and only then rename it into place."""
    root = home / paths.CALTECH_FOLDER
    with alone(home):
        if root.is_dir() and source.is_dir() and root.samefile(source):
            _verify(root, root)
            return root
        try:
            remove_abandoned(home, _UNPACKING)
            with locked_directory(home, _UNPACKING) as fresh:
                inner = fresh / paths.CALTECH_FOLDER  # the folder around it is closed to other users
                inner.mkdir()
                if source.is_dir():
                    _copy_classes(source, inner)
                else:
                    unpack(source, inner)
                found = _class_root(inner)
                _verify(found, source)
                _put_in_place(found, root)
        except OSError as error:
            raise DatasetError(f"{root} cannot be written ({error.strerror}); {ELSEWHERE}") from error
    return root


def _copy_classes(source: Path, folder: Path) -> None:
    """Copy exactly the files that the split counts."""
    _verify(source, source)  # before a large folder that is something else is copied
    for old in sorted(path for path in source.iterdir() if path.is_dir() and not is_hidden(path.name)):
        new = folder / old.name
        new.mkdir()
        for file in old.iterdir():
            if file.is_file() and not is_hidden(file.name):
                try:
                    shutil.copyfile(file, new / file.name)
                except OSError as error:
                    raise DatasetError(
                        f"{file} cannot be copied to {folder} ({error.strerror}); {ELSEWHERE}"
                    ) from error


def _same(one: Path, other: Path) -> bool:
    names = [sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file()) for root in (one, other)]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


def _put_in_place(found: Path, root: Path) -> None:
    if root.is_dir() and _same(found, root):
        return
    if os.path.lexists(root):  # also a dangling link: whatever it is, it is the user's and is kept
        old, number = root.with_name(f"{root.name}.old"), 1
        while os.path.lexists(old):
            number += 1
            old = root.with_name(f"{root.name}.old-{number}")
        root.rename(old)
    found.rename(root)
