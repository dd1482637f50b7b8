"""A folder of results worth keeping, by key: written atomically, checked when read, the longest unused dropped first.

What paused trials go on from is held: it is dropped after everything else, as long as it takes half the room at most.

An entry is a folder of two files, a small header and its data. It is written next to its place and then renamed, so
that whatever dies meanwhile, it is either absent or whole; any number of processes may share the folder. Nothing waits
for the disk: what a power cut tears is found by its checksum like any other damage, and can be computed again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import stat
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from caltech_sweep.files import NEW, create_atomically, locked, remove_abandoned

FORMAT = 1
KINDS = ("stage", "features")
DEFAULT_BUDGET = 20 * 10**9  # bytes
HEADER, DATA = "header.json", "data"  # the files of an entry, the header written last
_HELD = "held-"
_DROPPED = ".dropped-"
_BLOCK = 1 << 22  # bytes read at once for a checksum
_FIRST_RATE = 500e6  # bytes written in a second, taken for granted until it was measured
_TELLING = 1 << 25  # bytes of an entry whose writing tells how fast the disk is


@dataclass(frozen=True)
class Entry:
    """One kept result: ``used`` is when it was last written or read, in seconds since 1970.

    ``held`` says whether a trial is to go on from it.
    """

    name: str
    kind: str
    bytes: int
    used: float
    held: bool = False


def default_budget(folder: Path) -> int:
    """Return 20 GB, or a tenth of the disk that is free or held by the folder, if that is less; bytes."""
    place = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.is_dir())
    available = shutil.disk_usage(place).free + Cache(folder, 0).size()
    return min(DEFAULT_BUDGET, available // 10)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


class Cache:
    """The kept results of one folder, at most ``budget`` bytes of them.

    Nothing that goes wrong here fails a trial: a damaged entry is dropped, and the first entry that cannot be
    written is the last that is tried. What the user should know of it waits in :meth:`take_warnings`.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self._full = self._refused = False
        self._warnings: list[str] = []
        self._written, self._writing = 0, 0.0  # bytes that this process has written, and the seconds that it took

    def seconds_to_write(self, size: int) -> float:
        """Return about how long it takes to write so many bytes, by what this process has written."""
        return size * self._writing / self._written if self._written else size / _FIRST_RATE

    def take_warnings(self) -> tuple[str, ...]:
        """Return the sentences that have come up since the last call."""
        taken, self._warnings = tuple(self._warnings), []
        return taken

    def has(self, name: str) -> bool:
        """Return whether an entry is there; whether it is sound shows when it is opened."""
        return self._here(name)

    def _here(self, name: str) -> bool:
        return os.path.isfile(self.folder / name / HEADER)  # False of one that only its owner may read

    def open(self, name: str) -> tuple[dict[str, Any], Path] | None:
        """Return the header and the data file of an entry, or None; a damaged one is dropped with a warning."""
        place = self.folder / name
        try:
            header = self._verified(place)
        except (FileNotFoundError, NotADirectoryError):  # not there, or just dropped by another process
            return None
        except OSError as error:
            self._warnings.append(f"{place} cannot be read ({error.strerror}); what it holds is computed again")
            return None
        if header is None:
            self._warnings.append(f"{place} is damaged; it is dropped and what it held is computed again")
            self.drop(name)
            return None
        with contextlib.suppress(OSError):
            os.utime(place)
        return header, place / DATA

    def _verified(self, place: Path) -> dict[str, Any] | None:
        """Return the header of an entry, or None where a checksum is wrong."""
        if not stat.S_ISREG((place / HEADER).stat().st_mode):  # asked once: it may be dropped at any moment
            return None  # a pipe or the like, which would never end
        checksum, _, text = (place / HEADER).read_bytes().partition(b"\n")
        if checksum != b"%08x" % zlib.crc32(text):
            return None
        document: dict[str, Any] = json.loads(text)
        data = place / DATA
        if document.get("format") != FORMAT or data.stat().st_size != document["bytes"]:
            return None
        if _checksum(data) != document["crc32"]:
            return None
        header: dict[str, Any] = document["header"]
        return header

    def write(self, name: str, header: Mapping[str, Any], size: int, fill: Callable[[Path], None]) -> bool:
        """Keep an entry whose data, about ``size`` bytes, ``fill`` writes into the path it is given.

        Returns False, with one warning for this store's lifetime, when it cannot be kept: the disk is full or cannot
        be written (``fill`` raises OSError), after which nothing is tried any more, or the budget is smaller than it.
        """
        if self._full:
            return False
        if size > self.budget:
            if not self._refused:
                mega = f"{size / 1e6:,.0f} MB is more than the whole budget of {self.budget / 1e6:,.0f} MB"
                self._warnings.append(f"what is too large is not kept for reuse in {self.folder}: {mega}")
            self._refused = True
            return False
        start = time.monotonic()
        try:
            self._make_room(size)
            with create_atomically(self.folder / name) as place:
                place.mkdir()
                fill(place / DATA)
                self._write_header(place, header)
                if not self._here(name):
                    self.drop(name)  # the remains of an entry that somebody has half removed
            self._make_room(0)
        except OSError as error:
            return self._stop(error.strerror or str(error))
        if size >= _TELLING:
            self._written += size
            self._writing += time.monotonic() - start
        return True

    def _stop(self, reason: str) -> bool:
        self._full = True
        self._warnings.append(f"nothing more is cached in {self.folder}: {reason}; training continues")
        return False

    @staticmethod
    def _write_header(place: Path, header: Mapping[str, Any]) -> None:
        data = place / DATA
        document = {"format": FORMAT, "bytes": data.stat().st_size, "crc32": _checksum(data), "header": dict(header)}
        text = json.dumps(document).encode()
        (place / HEADER).write_bytes(b"%08x\n" % zlib.crc32(text) + text)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Let one process at a time compute an entry; the others wait and then find it."""
        place = self.folder / "locks"
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # where nothing can be written, there is nothing to wait for
                place.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(place / name, math.inf))  # computing it may take long
            yield

    def entries(self) -> list[Entry]:
        """Return what is kept, the longest unused first."""
        found = []
        for place in self.folder.glob("*-*"):
            kind = place.name.partition("-")[0]
            if kind not in KINDS:
                continue
            with contextlib.suppress(OSError):  # just dropped, or another user's own
                files = list(place.iterdir())
                size = sum(file.stat().st_size for file in files)
                held = any(file.name.startswith(_HELD) for file in files)
                found.append(Entry(place.name, kind, size, place.stat().st_mtime_ns / 1e9, held))
        return sorted(found, key=lambda entry: (entry.used, entry.name))

    def size(self) -> int:
        """Return the bytes of all entries."""
        return sum(entry.bytes for entry in self.entries())

    def clear(self) -> int:
        """Drop every entry that is not being written; return the bytes that were freed."""
        entries = self.entries()
        for entry in entries:
            self.drop(entry.name)
        self._sweep()
        return sum(entry.bytes for entry in entries)

    def drop(self, name: str) -> None:
        """Remove an entry, if it is there, in one step; a process that has it open keeps its copy."""
        aside = self.folder / f"{_DROPPED}{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):  # not there, or another process was faster
            (self.folder / name).rename(aside)
            if not aside.is_dir():
                aside.unlink()  # rmtree would wait for the other end of a pipe
        shutil.rmtree(aside, ignore_errors=True)

    def discard(self, name: str) -> None:
        """Remove an entry that nobody needs any more."""
        self.drop(name)

    def hold(self, name: str, holder: str) -> None:
        """Let an entry be dropped last while ``holder``, which is part of a file's name, may go on from it."""
        with contextlib.suppress(OSError):  # not there, or nothing can be written
            (self.folder / name / f"{_HELD}{holder}").touch()

    def release(self, name: str, holder: str) -> None:
        """Let an entry be dropped like any other, as far as ``holder`` is concerned."""
        with contextlib.suppress(OSError):
            used = (self.folder / name).stat()
            (self.folder / name / f"{_HELD}{holder}").unlink()
            os.utime(self.folder / name, ns=(used.st_atime_ns, used.st_mtime_ns))  # this was no use of it

    def _make_room(self, size: int) -> None:
        self._sweep()
        entries = self.entries()
        total, held = (sum(entry.bytes for entry in entries if entry.held or not only) for only in (False, True))
        while entries and total + size > self.budget:
            # Held ones go last, but the states of studies that nobody goes on with must not fill the folder.
            spared = held <= self.budget // 2 and not all(entry.held for entry in entries)
            dropped = next(entry for entry in entries if not (spared and entry.held))
            entries.remove(dropped)
            self.drop(dropped.name)
            total -= dropped.bytes
            held -= dropped.bytes if dropped.held else 0

    def _sweep(self) -> None:
        """Remove what processes that died have left half written."""
        for prefix in (NEW, _DROPPED, ".writing-"):  # the last is of earlier versions
            remove_abandoned(self.folder, prefix)


@cache
def open_store(folder: Path, budget: int) -> Cache:
    """Return this process's store of a folder: the same for every trial, so that it warns once."""
    return Cache(folder, budget)
