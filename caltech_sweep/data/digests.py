"""The content of image files as digests: each is read once, and remembered by its path, size, time and inode.

A file of the cache folder holds what is remembered. A file that is as it was when it was read is not read again; one
whose time is only just past is, since it may change again within what its file system can tell apart.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from caltech_sweep.data.pixels import read_file
from caltech_sweep.errors import DatasetError
from caltech_sweep.files import create_atomically
from caltech_sweep.heartbeat import beat
from caltech_sweep.machine import cores
from caltech_sweep.text import counted, readable

Read = Callable[[Path], bytes]  # from a sample's path to the content of an image file
Signature = tuple[int, int, int]  # size in bytes, time of change in ns, inode
_FILE = "digests.bin"
_ENTRY = np.dtype([("key", "S16"), ("digest", "u1", 32)])
_MOST = 1 << 23  # entries that are kept; beyond them those of other datasets are forgotten
_PART, _WAVE = 32, 32  # files that a thread reads at once, and parts of so many that are read ahead
_TICK = 2 * 10**9  # ns: the coarsest time of a file system (FAT)


@dataclass(frozen=True)
class Files:
    """Images in their order, what reads one, and what tells the file that it lies in, None where it has none."""

    paths: Sequence[Path]
    read: Read = read_file
    place: Callable[[Path], Path | None] = lambda path: path


def signature(file: Path) -> Signature:
    """Return what tells that a file has not changed; raise OSError when it is not there."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns, status.st_ino


def is_settled(known: Signature) -> bool:
    """Tell whether a change from now on would give a file another signature."""
    return time.time_ns() - known[1] > _TICK


def why_unreadable(error: Exception) -> str:
    """Return the reason that a file cannot be read as the end of a sentence."""
    return str(getattr(error, "strerror", None) or error)


def digests(files: Files, cache: Path, *, verify: bool = False, write: bool = True, strict: bool = True) -> np.ndarray:
    """Return (N, 32) uint8: the SHA-256 of the content of each file.

    With ``verify`` all are read, and one that is not what is remembered of it raises DatasetError. So does one that
    cannot be read, unless not ``strict``: then its digest is zeros. Without ``write`` nothing is remembered.
    """
    keys, settled = _keys(files)
    remembered = _load(cache)
    known, place = _find(remembered, keys)
    found = np.zeros((len(keys), 32), np.uint8)
    found[known] = remembered["digest"][place[known]]
    wanted = np.arange(len(keys)) if verify else np.flatnonzero(~known)
    read = _read(files, wanted, strict)
    if verify:
        _check_same(files, known & (found != read).any(axis=1))
    found[wanted] = read
    new = ~known & settled() & found.any(axis=1)
    if write and new.any():
        entries = np.empty(len(keys), _ENTRY)
        entries["key"], entries["digest"] = keys, found
        _save(cache, entries[new | known] if len(remembered) > _MOST else np.concatenate([remembered, entries[new]]))
    return found


def _keys(files: Files) -> tuple[np.ndarray, Callable[[], np.ndarray]]:
    """Return what each file is remembered by, b"" for none; and what tells later which of them are settled."""
    keys, times, here = bytearray(), np.zeros(len(files.paths), np.int64), os.getcwd()
    for index, path in enumerate(files.paths):
        beat()
        try:
            file = files.place(path)
            if file is None:
                raise FileNotFoundError(path)
            size, times[index], inode = signature(file)
        except OSError:
            keys += bytes(16)
            continue
        text = f"{os.path.join(here, file)}|{size}|{times[index]}|{inode}"
        keys += hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return np.frombuffer(bytes(keys), "S16"), lambda: time.time_ns() - times > _TICK


def _find(remembered: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each key whether it is remembered, and where."""
    known = np.ascontiguousarray(remembered["key"])
    place = np.searchsorted(known, keys)
    place[place == len(known)] = 0
    return (known[place] == keys) & (keys != b"") if len(known) else np.zeros(len(keys), bool), place


def _read(files: Files, wanted: np.ndarray, strict: bool) -> np.ndarray:
    def attempt(indices: Sequence[int]) -> list[bytes | Exception]:
        found: list[bytes | Exception] = []
        for index in indices:
            try:
                found.append(hashlib.sha256(files.read(files.paths[index])).digest())
            except (OSError, DatasetError) as error:
                found.append(error)
        return found

    out = bytearray()
    parts = [wanted[start : start + _PART].tolist() for start in range(0, len(wanted), _PART)]
    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(parts), _WAVE):
            wave = parts[start : start + _WAVE]
            for index, done in zip(chain(*wave), chain.from_iterable(pool.map(attempt, wave)), strict=True):
                beat()
                if isinstance(done, Exception) and strict:
                    name = readable(str(files.paths[index]))
                    raise DatasetError(f"{name} cannot be read: {why_unreadable(done)}") from done
                out += bytes(32) if isinstance(done, Exception) else done
    return np.frombuffer(bytes(out), np.uint8).reshape(-1, 32)


def _check_same(files: Files, changed: np.ndarray) -> None:
    if changed.any():
        names = [readable(str(files.paths[index])) for index in np.flatnonzero(changed)[:10]]
        more = ", ..." if changed.sum() > len(names) else ""
        raise DatasetError(
            f"{counted(int(changed.sum()), 'image file')} changed without a new time of change, as on a failing disk: "
            f"{', '.join(names)}{more}; put copies that are whole in their place, or `touch` them to use what they are"
        )


def _load(cache: Path) -> np.ndarray:
    """Return what is remembered, sorted by key; nothing where the file is not there or not whole."""
    try:
        content = (cache / _FILE).read_bytes() if (cache / _FILE).is_file() else b""
        entries = np.frombuffer(content[4:], _ENTRY)
    except (OSError, ValueError):
        return np.empty(0, _ENTRY)
    return entries if zlib.crc32(content[4:]) == int.from_bytes(content[:4], "little") else np.empty(0, _ENTRY)


def _save(cache: Path, entries: np.ndarray) -> None:
    entries = entries[np.argsort(entries["key"], kind="stable")]
    content = entries[np.append(entries["key"][1:] != entries["key"][:-1], True)].tobytes()
    try:
        with create_atomically(cache / _FILE) as made:
            made.write_bytes(zlib.crc32(content).to_bytes(4, "little") + content)
    except OSError:  # the files are read again next time; a cache that cannot be written is told by its builder
        return
