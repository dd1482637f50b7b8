"""Where the two stores lie: absolute addresses, early checks, one run of a study at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from caltech_sweep import paths
from caltech_sweep.errors import StoreError

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

_SQLITE = "sqlite:///"


def absolute(uri: str) -> str:
    """Return a store's address with an absolute path, since MLflow and SQLAlchemy resolve relative ones anew."""
    if "://" not in uri:
        uri = f"{_SQLITE}{uri}"
    return f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).resolve()}" if uri.startswith(_SQLITE) else uri


def tracking_uri(named: str | None = None) -> str:
    """Return the MLflow store: the named one, ``MLFLOW_TRACKING_URI``, or ``mlruns/mlflow.db``."""
    return absolute(named or os.environ.get("MLFLOW_TRACKING_URI") or str(paths.MLFLOW_DB))


def storage_uri(named: str | None = None) -> str:
    """Return the Optuna store: the named one, or ``mlruns/optuna.db``."""
    return absolute(named or str(paths.OPTUNA_DB))


def hide_secrets(uri: str) -> str:
    """Return an address without its user and password."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2]))


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite store, or None for another kind."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def check_file(uri: str, what: str, create: bool) -> None:
    """Raise StoreError when an SQLite store cannot be used; ``create`` makes the folder of a missing one."""
    file = sqlite_file(uri)
    if file is None:
        return
    if not file.exists() and not create:
        raise StoreError(f"there is no {what} {file} yet; run a study first, such as `make sweep STUDY=demo`")
    try:
        if create:
            file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the folder {file.parent} cannot be created: {error.strerror}") from error
    if create and not os.access(file.parent, os.W_OK):
        raise StoreError(f"the folder {file.parent} cannot be written; choose another place for the {what}")
    if file.exists() and not os.access(file, os.R_OK | (os.W_OK if create else 0)):
        raise StoreError(f"the {what} {file} cannot be {'written' if create else 'read'}; check its permissions")


def tune_sqlite(engine: Engine) -> None:
    """Let an SQLite store be read while it is written, and commit without waiting for the disk each time.

    A write-ahead log survives the death of any process; a power cut may lose the last moments, never the file
    (SQLite, "Write-Ahead Logging").
    """
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=60000"):
            connection.execute(f"PRAGMA {pragma}")

    engine.dispose()  # connections that are open already lack the settings


@contextlib.contextmanager
def only_one(uri: str, study: str) -> Iterator[None]:
    """Hold the lock of a study in a local store while it runs; the lock of a process that died is free.

    Raises StoreError while another process runs the study.
    """
    file = sqlite_file(uri)
    if file is None or os.name != "posix":
        yield
        return
    import fcntl

    folder = file.parent / "locks"
    folder.mkdir(exist_ok=True)
    with (folder / f"{study.replace('/', '_')}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise StoreError(
                f"study {study!r} is being run by {owner}; wait for it, stop it, or choose --name"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
        yield
