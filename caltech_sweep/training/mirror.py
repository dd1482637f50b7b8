"""A cache with a copy of its entries at an address that other machines read, too, by fsspec: s3://, gs://, file://.

An entry is sent there by a thread of its own once it is kept here, its header last, so that others see it whole or not
at all. What is not here is fetched from there, and is then checked as any other entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from caltech_sweep.addresses import hide_secrets
from caltech_sweep.errors import UsageError
from caltech_sweep.files import create_atomically
from caltech_sweep.text import one_line
from caltech_sweep.training.cache import DATA, HEADER, Cache, open_store
from caltech_sweep.training.keys import CacheOptions


class MirroredCache(Cache):
    """The kept results of one folder, and of the address ``url``, which is never cleared from here.

    Whatever goes wrong with the address is a warning; training goes on with the folder.
    """

    def __init__(self, folder: Path, budget: int, url: str) -> None:
        super().__init__(folder, budget)
        self._shown = hide_secrets(url)
        self._remote, self._root = url_to_fs(url, use_listings_cache=False)
        self._sender = ThreadPoolExecutor(1, "mirror")
        self._failed = False

    def _try(self, what: Callable[[], bool]) -> bool:
        """Return whether something at the address worked; the first time that it does not is a warning."""
        try:
            return what()
        except FileNotFoundError:  # dropped by another machine just now
            return False
        except Exception as error:  # of any library, network or service
            if not self._failed:
                why = one_line(str(error) or type(error).__name__)
                self._warnings.append(f"{self._shown} cannot be used for training states now ({why})")
            self._failed = True
            return False

    def has(self, name: str) -> bool:
        """Return whether an entry is here or there."""
        return self._here(name) or self._try(lambda: bool(self._remote.exists(f"{self._root}/{name}/{HEADER}")))

    def open(self, name: str) -> tuple[dict[str, Any], Path] | None:
        """Return the header and the data file of an entry, which is fetched where it is not here."""
        if not self._here(name):
            self._try(lambda: self._fetch(name))
        return super().open(name)

    def _fetch(self, name: str) -> bool:
        there = f"{self._root}/{name}"
        self._make_room(int(self._remote.size(f"{there}/{DATA}") or 0))
        with create_atomically(self.folder / name) as place:
            place.mkdir()
            for file in (DATA, HEADER):
                self._remote.get_file(f"{there}/{file}", str(place / file))
        return True

    def write(self, name: str, header: Mapping[str, Any], size: int, fill: Callable[[Path], None]) -> bool:
        """Keep an entry here, and send it there."""
        kept = super().write(name, header, size, fill)
        if kept:
            self._sender.submit(self._try, lambda: self._send(name))
        return kept

    def _send(self, name: str) -> bool:
        there = f"{self._root}/{name}"
        self._remote.makedirs(there, exist_ok=True)
        for file in (DATA, HEADER):
            self._remote.put_file(str(self.folder / name / file), f"{there}/{file}")
        return True

    def discard(self, name: str) -> None:
        """Drop an entry that a later one has replaced, here and there."""
        super().discard(name)
        self._sender.submit(self._try, lambda: self._remove(name))

    def _remove(self, name: str) -> bool:
        self._remote.rm(f"{self._root}/{name}", recursive=True)
        return True

    def flush(self) -> None:
        """Wait until all that was kept is there."""
        self._sender.submit(lambda: None).result()


@cache
def _open_mirrored(folder: Path, budget: int, url: str) -> MirroredCache:
    return MirroredCache(folder, budget, url)


def store_of(use: CacheOptions) -> Cache:
    """Return this process's store of what a trial may reuse: of a folder, and of an address where there is one."""
    return _open_mirrored(use.folder, use.budget, use.url) if use.url else open_store(use.folder, use.budget)


def wait_until_sent(use: CacheOptions) -> None:
    """Wait until all that this process has kept is at the address, where there is one."""
    store = store_of(use)
    if isinstance(store, MirroredCache):
        store.flush()


def check_address(url: str) -> None:
    """Raise UsageError for an address that cannot be read."""
    try:
        remote, root = url_to_fs(url, use_listings_cache=False)
        remote.exists(root)
    except Exception as error:  # of any library, network or service
        why = one_line(str(error) or type(error).__name__)
        raise UsageError(f"--cache: {hide_secrets(url)} cannot be used ({why})") from error
