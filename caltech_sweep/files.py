"""Files and folders that several processes share: locks, checksums, and folders that go with their process.

Locks lie on open files and folders; this is the only module that knows which systems have them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from caltech_sweep.errors import DatasetError

try:
    import fcntl
except ImportError:  # a system without them, such as Windows
    AVAILABLE = False
else:
    AVAILABLE = True

_YOUNG = 60.0  # seconds; folders without a lock that are younger may be about to take it


@contextlib.contextmanager
def locked_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder below ``parent``, locked; whatever is still there at the end is removed."""
    place = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    try:
        with opened(place) as descriptor:
            if descriptor is not None:
                try_lock(descriptor)  # no other process knows it yet
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the folders that ``locked_directory`` made below ``parent`` and whose process has died.

    What belongs to another user stays. Without locks it is not known whether a process has died, so everything stays.
    """
    for place in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if time.time() - place.stat().st_mtime < _YOUNG:
                continue
            with opened(place) as descriptor:
                if descriptor is not None and try_lock(descriptor):
                    shutil.rmtree(place, ignore_errors=True)


SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_BLOCK = 1 << 22  # bytes read at once


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits; raise OSError when it cannot be read."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            content.update(block)
    return content.hexdigest()


def write_sums(folder: Path) -> None:
    """Write the checksums of all files below a folder into it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = (f"{file_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(file: Path) -> dict[str, str]:
    """Return the checksums that a file lists, by path; none of a line that is not one, or of a file that is not there.

    Artifacts without a checksum, such as those that others have added to a run, are taken as they are.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {found[2]: found[1] for line in lines if (found := _LINE.fullmatch(line))}


def changed(root: Path) -> Iterator[str]:
    """Yield the path of every file below ``root`` that is not as it was written: lost, unreadable or changed."""
    for path, digest in read_sums(root / SUMS).items():
        try:
            if file_digest(root / path) == digest:
                continue
        except OSError:
            pass
        yield path


ELSEWHERE = "free some space, or name another folder with the environment variable CALTECH_SWEEP_DATA"
BLOCK = 1 << 18  # bytes read at once


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that fetch into it; they wait for their turn."""
    with contextlib.ExitStack() as stack:
        try:
            descriptor = stack.enter_context(opened(folder))
        except OSError as error:
            raise DatasetError(f"the folder {folder} cannot be read ({error.strerror}); {ELSEWHERE}") from error
        if descriptor is not None:
            wait_for_lock(descriptor)  # without locks, renames still keep every file whole
        yield


def write_all(file: io.FileIO, block: bytes) -> None:
    view = memoryview(block)  # an unbuffered write may take a part: on a full disk the next one raises
    while view:
        view = view[file.write(view) :]


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DatasetError(f"{target} cannot be written ({error.strerror}); {ELSEWHERE}") from error


def make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"the folder {folder} cannot be made ({error.strerror}); {ELSEWHERE}") from error
    return folder


def try_lock(descriptor: int, shared: bool = False) -> bool | None:
    """Lock an open file or folder until it is closed or its process dies.

    Returns False when another holds it, None on a file system or a system without
    """
    if not AVAILABLE:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def wait_for_lock(descriptor: int) -> None:
    """Lock an open file or folder as soon as no other process holds it; do nothing where there are no"""
    if AVAILABLE:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)


@contextmanager
def opened(folder: Path) -> Iterator[int | None]:
    """Open a folder to lock it; None on a system without locks, which may not open folders. Raises OSError."""
    if not AVAILABLE:
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
