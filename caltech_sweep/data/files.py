"""Writing files so that nothing is half done: whole blocks, one process at a time, and reasons as words."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
from collections.abc import Iterator
from pathlib import Path

from caltech_sweep.errors import DatasetError

ELSEWHERE = "free some space, or name another folder with the environment variable CALTECH_SWEEP_DATA"
BLOCK = 1 << 18  # bytes read at once


def reason(error: Exception) -> str:
    return str(getattr(error, "reason", "") or error) or type(error).__name__


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that fetch into it; they wait for their turn."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DatasetError(f"the folder {folder} cannot be read ({error.strerror}); {ELSEWHERE}") from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks: renames still keep every file whole
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


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
