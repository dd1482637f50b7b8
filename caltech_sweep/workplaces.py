"""Folders that a process works in and removes; those that it left when it was killed go with the next one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_YOUNG = 60.0  # seconds; folders without a lock that are younger may be about to take it


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder until it is closed or its process dies.

    Returns False when another holds it, None on a file system without locks, and True on a system without them.
    """
    if os.name != "posix":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def workplace(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder below ``parent``, locked; whatever is still there at the end is removed."""
    place = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    descriptor = os.open(place, os.O_RDONLY)
    try:
        try_lock(descriptor)  # nobody else knows it yet
        yield place
    finally:
        os.close(descriptor)
        shutil.rmtree(place, ignore_errors=True)


def remove_abandoned(places: Iterable[Path]) -> None:
    """Remove those of these folders whose process has died; what belongs to another user stays."""
    for place in places:
        with contextlib.suppress(OSError):
            if time.time() - place.stat().st_mtime < _YOUNG:
                continue
            descriptor = os.open(place, os.O_RDONLY)
            try:
                if try_lock(descriptor):
                    shutil.rmtree(place, ignore_errors=True)
            finally:
                os.close(descriptor)
