"""Stores on this machine's own disk, for a study whose stores lie where databases are slow or unsafe.

Network mounts share no memory between machines and lock badly, so SQLite is at its worst there. The study then works
on copies on the local disk. After every trial a consistent snapshot (sqlite3's backup) of each copy replaces the store
on the mount in one step: the tracking store first, as each trial's end is written to it first. A machine that is lost
loses the trials that were running; the next one starts from the mount.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from caltech_sweep.errors import StoreError, UsageError
from caltech_sweep.files import create_atomically, file_digest, locked
from caltech_sweep.stores import Store, study_store, tracking_store

_NONE = "none"  # in the place of a digest: there was no store yet


@dataclass(frozen=True)
class _Copy:
    """A store on the mount, its copy in a folder of its own, and what of the mount this copy comes from."""

    home: Path
    folder: Path

    @property
    def local(self) -> Path:
        return self.folder / self.home.name

    @property
    def _base(self) -> Path:
        """The file with the digests that the store on the mount has, or had until this process died in a step."""
        return self.folder / "base"

    def _there(self) -> str:
        return file_digest(self.home) if self.home.exists() else _NONE

    def _is_current(self) -> bool:
        return self._base.exists() and self._there() in self._base.read_text(encoding="utf-8").split()

    def restore(self, write: Callable[[str], None]) -> None:
        """Make the copy, unless it is there and comes from what is on the mount; one that does not is kept aside."""
        if self.local.exists() and self._is_current():
            return
        if self.local.exists():
            number = next(n for n in range(1, 10**6) if not self.folder.with_name(f"{self.folder.name}.{n}").exists())
            aside = self.folder.with_name(f"{self.folder.name}.{number}")
            self.folder.rename(aside)
            write(
                f"the store {self.home} was changed by another process since this machine's copy of it was made; it is "
                f"taken as it is now, and the copy is kept in {aside}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.home.exists():
            with create_atomically(self.local) as made:
                _snapshot(self.home, made)
                self._base.write_text(self._there(), encoding="utf-8")
        else:
            self._base.write_text(_NONE, encoding="utf-8")

    def save(self) -> None:
        """Let a snapshot of the copy replace the store on the mount, if anything has changed."""
        if not self.local.exists():
            return
        with create_atomically(self.folder / "snapshot") as snapshot:
            _snapshot(self.local, snapshot)
            digest = file_digest(snapshot)
            before = self._there()
            if not self._is_current():
                raise StoreError(
                    f"the store {self.home} was changed by another process while this one worked on a copy of it; this "
                    f"run's results are in {self.local}: run the study again to go on from the store as it is now"
                )
            if digest == before:
                return
            self._base.write_text(f"{before}\n{digest}", encoding="utf-8")
            with create_atomically(self.home) as made:
                shutil.copyfile(snapshot, made)
            self._base.write_text(digest, encoding="utf-8")


def _snapshot(source: Path, target: Path) -> None:
    """Copy a database as it is between two transactions, to a file that needs no other."""
    with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target)) as other:
        one.backup(other)
        other.execute("PRAGMA journal_mode=DELETE").fetchone()


class LocalStores:
    """The copies in a folder of those of a study's two stores that are files; addresses of servers stay."""

    def __init__(self, tracking: Store, storage: Store, folder: Path) -> None:
        self._folder = folder.absolute()
        self._copies: list[_Copy] = []
        self._told = False
        self.artifacts = tracking.folder / "artifacts" if tracking.is_local else None  # stay on the mount
        self.tracking = self._copied(tracking, tracking_store)
        self.storage = self._copied(storage, study_store)
        if not self._copies:
            raise UsageError("--local-stores: both stores are on servers, so there is no file to copy; leave it out")

    def _copied(self, store: Store, parse: Callable[[str], Store]) -> Store:
        if (home := store.file) is None:
            return store
        digest = hashlib.sha256(str(home).encode("utf-8", "surrogateescape")).hexdigest()[:8]
        copy = _Copy(home, self._folder / f"{home.stem}-{digest}")
        self._copies.append(copy)
        return parse(str(copy.local))

    def restore(self, write: Callable[[str], None]) -> None:
        """Make the copies that are missing; ``write`` is told of one that is not what the mount has."""
        with self._alone():
            for copy in self._copies:
                copy.restore(write)

    def save(self, note: Callable[[str], None]) -> None:
        """Bring what is new to the mount; ``note`` is told once when it takes nothing, and it is tried again later.

        Raises StoreError when another process has changed a store there.
        """
        try:
            with self._alone():
                for copy in self._copies:
                    copy.save()
            self._told = False
        except (OSError, sqlite3.Error) as error:
            if not self._told:
                reason = getattr(error, "strerror", None) or error
                note(
                    f"the stores could not be copied to {self._copies[0].home.parent} ({reason}): what is new is in "
                    f"{self._folder} only; training continues, and it is tried again after the next trial"
                )
            self._told = True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self._folder, math.inf))
            except OSError as error:
                raise StoreError(f"--local-stores: {self._folder} cannot be written ({error.strerror})") from error
            yield
