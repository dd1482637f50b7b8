"""What this machine gives: processors, file systems and terminals, as they are and not as they usually are."""

from __future__ import annotations

import ctypes
import math
import os
import re
import sqlite3
import tempfile
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

# File systems of other machines: their shared memory, where they have it, is that of one machine only.
_REMOTE = re.compile(
    r"(nfs\d*|cifs|smb\w*|lustre|ceph|beegfs\w*|gpfs|panfs|afs|9p|ncpfs|coda|glusterfs|orangefs|pvfs2|vboxsf|prl_fs)$"
    r"|fuse$|fuse\.(?!fuse-overlayfs|lxcfs|portal)"
)


def cores() -> int:
    """Return how many processors this process may use: by its affinity and by the quotas of its cgroups."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *map(math.ceil, _quotas())]))


def threads() -> int:
    """Return how many threads a process computes with: ``OMP_NUM_THREADS``, or else one for each processor."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(given) if given.isdecimal() and int(given) > 0 else cores()


@cache
def keeps_freed_memory() -> bool:
    """Let this process keep the memory that it frees, where its C library can (glibc's mallopt); tell whether it does.

    Otherwise glibc gives each large tensor back to the kernel, which clears and maps its pages anew in the next step.
    Settings of the user's own, in the environment, are left as they are.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library, or system
        return False
    return sum(mallopt(option, value) for option, value in _MALLOC.values()) == len(_MALLOC)


_MALLOC = {  # the numbers of <malloc.h>
    "M_MMAP_MAX": (-4, 0),  # no block is mapped by itself
    "M_TRIM_THRESHOLD": (-1, -1),  # nothing is given back
    "M_TOP_PAD": (-2, 64 << 20),  # bytes that the heap grows by
}


def _quotas() -> list[float]:
    """Return the processors that each cgroup of this process may use, where it has a limit (Linux, version 1 and 2)."""
    found = []
    for folder, file in _cgroups():
        with suppress(OSError, ValueError):
            quota, _, period = (folder / file).read_text().strip().partition(" ")
            period = period or (folder / "cpu.cfs_period_us").read_text()
            if float(quota) > 0:  # "max" or -1: no limit
                found.append(float(quota) / float(period))
    return found


def _cgroups() -> list[tuple[Path, str]]:
    """Return the folders of this process's cgroups and those above, each with the name of its quota's file."""
    found = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if "cpu" in controllers.split(","):
                top, file = Path("/sys/fs/cgroup/cpu"), "cpu.cfs_quota_us"
            elif not controllers:
                top, file = Path("/sys/fs/cgroup"), "cpu.max"
            else:
                continue
            place = top / name.lstrip("/")
            found += [(folder, file) for folder in (place, *place.parents) if folder.is_relative_to(top)]
    return found


def file_system(folder: Path) -> str:
    """Return the kind of the file system that an absolute folder lies on, such as ext4; "" where it is not known."""
    kind, longest = "", -1
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
            mount = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ")[4])
            if len(mount) >= longest and folder.is_relative_to(mount):
                kind, longest = line.partition(" - ")[2].split(" ")[0], len(mount)
    return kind


@cache
def log_problem(folder: Path) -> str:
    """Return why SQLite can keep no write-ahead log in a folder, as the end of "which lies on"; "" where it can.

    Such a log needs memory that all processes share, so it is for one machine (SQLite, "Write-Ahead Logging"), and
    SQLite notices only some of the file systems that have none: it is tried on a database that is removed again.
    """
    kind = file_system(folder.resolve())
    if _REMOTE.match(kind):
        return f"a file system of several machines ({kind})"
    with suppress(OSError), tempfile.TemporaryDirectory(dir=folder, prefix=".new-log-") as place:
        try:
            with closing(sqlite3.connect(Path(place) / "try.db")) as database:
                (mode,) = database.execute("PRAGMA journal_mode=WAL").fetchone()
                database.execute("CREATE TABLE tried (n)")
        except sqlite3.Error:
            mode = ""
        if mode != "wal":
            return f"a file system without shared memory{f' ({kind})' if kind else ''}"
    return ""


class Lasting:
    """A stream to a terminal that may be closed: what it does not take any more is lost, and nothing ends for it."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError, ValueError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand it over to the system."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def rewrites_lines(stream: IO[str]) -> bool:
    """Tell whether a stream is a terminal on which a line can be written again."""
    try:
        return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    except ValueError:  # it is closed
        return False
