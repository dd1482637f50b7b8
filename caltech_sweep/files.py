"""Files and folders that several processes share: locks, atomic writes, checksums, locked temporary directories.

A lock lies on an open file or folder and goes when its process dies (filelock); where a file system or a system has
none, nothing waits, and renames still keep every file whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import lock_descriptor

from caltech_sweep.errors import DatasetError
from caltech_sweep.heartbeat import beat

NEW = ".new-"  # what the name of a folder begins with in which something is made that then moves to its place
_LOOK_AGAIN = 0.05  # seconds between two attempts to take a lock
_YOUNG = 60.0  # seconds; folders without a lock that are younger may be about to take it


@contextlib.contextmanager
def locked(place: Path, patience: float = 0.0) -> Iterator[bool | None]:
    """Hold the lock of a folder, or of a file, which is made where it is missing.

    Yields False when another holds it for ``patience`` seconds, and None where there are no locks. A wait gives
    heartbeats. Raises OSError when the place cannot be opened.
    """
    descriptor = _open(place)
    try:
        end = time.monotonic() + patience
        while (held := _try_lock(descriptor)) is False and time.monotonic() < end:
            beat()
            time.sleep(_LOOK_AGAIN)
        yield held
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open(place: Path) -> int | None:
    """Open what is to be locked; None for a folder on a system that does not open them."""
    if place.is_dir():
        return os.open(place, os.O_RDONLY) if os.name == "posix" else None
    at_once = getattr(os, "O_NONBLOCK", 0)  # a pipe of this name has no other end to wait for
    try:
        return os.open(place, os.O_RDWR | os.O_CREAT | at_once, 0o666)
    except PermissionError:
        return os.open(place, os.O_RDONLY | at_once)  # of another user: enough for a lock on a local disk


def _try_lock(descriptor: int | None) -> bool | None:
    try:
        return None if descriptor is None else lock_descriptor(descriptor, blocking=False)
    except OSError:
        return None


@contextlib.contextmanager
def locked_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder below ``parent``, locked; whatever is still there at the end is removed."""
    place = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    try:
        with locked(place):  # no other process knows it yet
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the folders that ``locked_directory`` made below ``parent`` and whose process has died.

    What belongs to another user stays, and what this process works in. Without locks it is not known whether a process
    has died, so everything stays.
    """
    for place in parent.iterdir() if prefix and parent.is_dir() else ():
        with contextlib.suppress(OSError):
            mine = place.name.startswith(prefix) and not place.is_symlink() and place.is_dir()
            if not mine or time.time() - place.stat().st_mtime < _YOUNG or Path.cwd().is_relative_to(place.resolve()):
                continue
            with locked(place) as held:
                if held:
                    shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def create_atomically(target: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a path next to ``target``; the file or folder that is made there becomes ``target`` in one step.

    Whatever dies meanwhile, ``target`` is absent, the old one or the new one, whole; a file is on the disk by then.
    Without ``replace``, and for folders, what another process has put there first stays. Raises OSError.
    """
    prefix = f"{NEW}{target.name}-"
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent, prefix)
    with locked_directory(target.parent, prefix) as folder:
        made = folder / target.name
        yield made
        if made.is_dir():
            _move_folder(made, target)
            return
        with made.open("rb+") as file:
            os.fsync(file.fileno())
        if replace:
            made.replace(target)
        else:
            _move_once(made, target)


def _move_folder(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError as error:
        # By its number, not by looking: the other one may have been removed since.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _move_once(made: Path, target: Path) -> None:
    """Move a file to where none may be replaced: by a link, which is one step, or else as well as can be."""
    try:
        os.link(made, target)
    except FileExistsError:
        pass
    except OSError:  # of many numbers: a file system without hard links
        if not target.exists():
            made.replace(target)


_FULL = re.compile(r"No space left|File too large|Disk quota exceeded|Read-only file system")


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error says that the disk takes no more; libraries such as safetensors raise their own kinds."""
    return _FULL.search(str(error)) is not None


SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_BLOCK = 1 << 22  # bytes read at once


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits; raise OSError when it cannot be read."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            beat()
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


ELSEWHERE = "free some space, or name another folder with the environment variable CALTECH_SWEEP_DATA"
BLOCK = 1 << 18  # bytes read at once


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that fetch into it; they wait for their turn."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, math.inf))
        except OSError as error:
            raise DatasetError(f"the folder {folder} cannot be read ({error.strerror}); {ELSEWHERE}") from error
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
