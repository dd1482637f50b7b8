"""What this machine gives: processors, file systems and terminals, as they are and not as they usually are."""

from __future__ import annotations

import ctypes
import math
import os
import re
import sqlite3
import sys
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


def affinity() -> int:
    """Return how many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota() -> float | None:
    """Return the time on processors that the cgroups of this process allow it, in processors; None: all of it."""
    return min(_quotas(), default=None)


def cores() -> int:
    """Return how many processors this process may use: by its affinity and by the quotas of its cgroups."""
    return max(1, min(affinity(), math.ceil(quota() or affinity())))


def threads() -> int:
    """Return how many threads a process computes with: ``OMP_NUM_THREADS``, or else one for each processor."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(given) if given.isdecimal() and int(given) > 0 else cores()


def threads_each(workers: int, on_gpus: bool) -> int:
    """Return how many threads each of some workers computes with.

    Those that train on processors have all, however many they are, since that decides the last bit of a weight; on
    GPUs it does not, and they share the processors.
    """
    return max(1, threads() // workers) if on_gpus else threads()


# What Linux calls the devices of GPUs that torch can use: NVIDIA's, those of its small boards, WSL's and AMD's.
_GPUS = ("nvidia*", "nvhost*", "nvgpu*", "nvmap", "dxg", "kfd")


def may_have_gpus() -> bool:
    """Tell whether torch may find a GPU here; where it cannot, it need not be imported, which takes a second."""
    return not sys.platform.startswith("linux") or any(any(Path("/dev").glob(name)) for name in _GPUS)


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


@cache
def processor_flags() -> frozenset[str]:
    """Return the instruction sets of the processor, by Linux's names; none on another system."""
    with suppress(OSError):
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        return frozenset(found[1].split()) if found else frozenset()
    return frozenset()


def memory() -> int | None:
    """Return the bytes of memory that this process may use: the machine's, or the least of its cgroups' limits."""
    limits = [limit for limit, _ in _memory_groups()]
    return min([*_meminfo("MemTotal"), *limits], default=None)


def free_memory() -> int | None:
    """Return the bytes that can be taken without swapping or reaching a limit of a cgroup; None: not known."""
    left = [limit - used for limit, used in _memory_groups()]
    return min([*_meminfo("MemAvailable"), *left], default=None)


def _meminfo(name: str) -> list[int]:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return [int(line.split()[1]) << 10]
    return []


def _memory_groups() -> list[tuple[int, int]]:
    """Return the limit of each cgroup of this process that has one, and what is used of it, in bytes."""
    found = []
    for folder in _cgroups("memory"):
        for limit, used, files in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError):
                most = int((folder / limit).read_text())  # "max": no limit
                cached = re.search(rf"^{files} (\d+)$", (folder / "memory.stat").read_text(), re.M)
                found.append((most, int((folder / used).read_text()) - (int(cached[1]) if cached else 0)))
    return found


def _quotas() -> list[float]:
    """Return the processors that each cgroup of this process may use, where it has a limit (Linux, version 1 and 2)."""
    found = []
    for folder in _cgroups("cpu"):
        for file in ("cpu.max", "cpu.cfs_quota_us"):
            with suppress(OSError, ValueError):
                quota, _, period = (folder / file).read_text().strip().partition(" ")
                period = period or (folder / "cpu.cfs_period_us").read_text()
                if float(quota) > 0:  # "max" or -1: no limit
                    found.append(float(quota) / float(period))
    return found


def _cgroups(controller: str) -> list[Path]:
    """Return the folders of this process's cgroups, and those above, that a controller such as cpu works in."""
    found: list[Path] = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = Path("/sys/fs/cgroup", controller if controllers else "")
            place = top / name.lstrip("/")
            found += [folder for folder in (place, *place.parents) if folder.is_relative_to(top)]
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


def is_remote(kind: str) -> bool:
    """Tell whether a file system of this kind lies on another machine."""
    return _REMOTE.match(kind) is not None


@cache
def log_problem(folder: Path) -> str:
    """Return why SQLite can keep no write-ahead log in a folder, as the end of "which lies on"; "" where it can.

    Such a log needs memory that all processes share, so it is for one machine (SQLite, "Write-Ahead Logging"), and
    SQLite notices only some of the file systems that have none: it is tried on a database that is removed again.
    """
    kind = file_system(folder.resolve())
    if is_remote(kind):
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
