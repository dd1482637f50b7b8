"""Where the two stores lie: absolute addresses, early checks, one run of a study at a time."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from caltech_sweep import addresses, paths
from caltech_sweep.addresses import SQLITE
from caltech_sweep.addresses import hide_secrets as hide_secrets
from caltech_sweep.addresses import sqlite_file as sqlite_file
from caltech_sweep.errors import StoreError
from caltech_sweep.files import create_atomically, locked
from caltech_sweep.machine import log_problem

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

T = TypeVar("T")
_VARIABLE = "MLFLOW_TRACKING_URI"
_RETRY_SECONDS = 1.0
_ATTEMPTS = 30  # to open a database whose tables another process is creating
_MADE_TWICE = re.compile("duplicate key|duplicate entry|already exists", re.I)
_GLANCE = 0.5  # seconds that a study's lock is waited for: another process may only look whether it is free


def tracking_uri(named: str | None = None) -> str:
    """Return the MLflow store: the named one, ``MLFLOW_TRACKING_URI``, or ``mlruns/mlflow.db``.

    Raises UsageError for an address that is not understood.
    """
    given = os.environ.get(_VARIABLE) if named is None else ""
    return addresses.read(given, addresses.TRACKING, _VARIABLE) if given else _named(named, addresses.TRACKING)


def storage_uri(named: str | None = None) -> str:
    """Return the Optuna store: the named one, or ``mlruns/optuna.db``; raise UsageError as for the other store."""
    return _named(named, addresses.STUDIES)


def _named(named: str | None, kind: addresses.Kind) -> str:
    return addresses.read(str(kind.file) if named is None else named, kind)


def reason(error: BaseException, address: str = "") -> str:
    """Return the first line of the original error in a sentence's form, without secrets, those of ``address`` too."""
    cause = error.__cause__ if type(error).__name__ == "StorageInternalError" else None  # Optuna's own says nothing
    error = cause or error
    text = str(getattr(error, "orig", None) or getattr(error, "reason", None) or error) or type(error).__name__
    driver = re.search(r"^\(\w+\.\w+\) (.+)$", text, re.M)  # what the database itself said, in a longer story
    return hide_secrets(driver[1] if driver else text.splitlines()[0], address)


def failure(error: Exception) -> StoreError | None:
    """Return the sentence about what a store's library raised while it was used; None for any other error."""
    origins = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if not origins & {"mlflow", "optuna", "requests", "sqlalchemy", "urllib3"}:
        return None
    return StoreError(
        f"a store does not do what it is asked ({reason(error)}); look into its log, or choose another one with "
        "--tracking-uri or --storage"
    )


def cannot_open(what: str, uri: str, error: BaseException) -> StoreError:
    """Return the error of a store that cannot be opened; one of another version names the command that helps."""
    text, shown = str(error), hide_secrets(uri)
    if "mlflow db upgrade" in text:
        how = f"back it up, then run `mlflow db upgrade {shown}`, or update MLflow if the store is the newer one"
    elif "optuna storage upgrade" in text:
        how = f"back it up, then run `optuna storage upgrade --storage {shown}`"
    elif "pip install -U optuna" in text:
        how = "update Optuna, which is older than the store"
    else:
        return StoreError(f"the {what} {shown} cannot be opened: {reason(error, uri)}{_why(uri)}")
    return StoreError(f"the {what} {shown} was made by another version of its library; {how}")


def _why(uri: str) -> str:
    file = sqlite_file(uri)
    if file is None or os.access(file.parent, os.W_OK):
        return ""
    return f"; its folder {file.parent} cannot be written, and must be for this: copy it to another place"


def connect_read_only(uri: str) -> Callable[[], sqlite3.Connection] | None:
    """Return what connects to an SQLite store in a folder that cannot be written; None for any other store.

    A store with a write-ahead log is opened by writing next to it, unless SQLite is told that nothing changes it
    (SQLite, "Write-Ahead Logging", on read-only databases). Raises StoreError when its log still holds changes.
    """
    file = sqlite_file(uri)
    if file is None or os.access(file.parent, os.W_OK):
        return None
    log = file.with_name(f"{file.name}-wal")
    if log.exists() and log.stat().st_size:
        raise StoreError(
            f"the store {file} has changes in {log.name} that its folder, which cannot be written, keeps SQLite from "
            "reading; copy the folder to another place"
        )
    return partial(sqlite3.connect, f"file:{quote(str(file))}?mode=ro&immutable=1", uri=True)


def journal_root(storage: str) -> Path:
    """Return the folder below which results wait for an unavailable tracking store: next to the study store."""
    file = sqlite_file(storage)
    return file.parent if file is not None else paths.STORES.resolve()


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
    if create:
        check_writable(uri, what)
    elif not os.access(file, os.R_OK):
        raise StoreError(f"the {what} {file} cannot be read; check its permissions")


def is_missing(uri: str) -> bool:
    """Tell whether a store is an SQLite file that is yet to be made, or that is empty."""
    file = sqlite_file(uri)
    return file is not None and not (file.exists() and file.stat().st_size)


def check_writable(uri: str, what: str) -> None:
    """Raise StoreError when an SQLite store could not be written, or made where it is missing; nothing is made."""
    file = sqlite_file(uri)
    if file is None:
        return
    place = paths.closest(file.parent)
    if not place.is_dir():
        raise StoreError(f"the folder {file.parent} cannot be created: {place} is a file")
    if not os.access(place, os.W_OK):
        raise StoreError(f"the folder {place} cannot be written; choose another place for the {what}")
    if file.exists() and not os.access(file, os.R_OK | os.W_OK):
        raise StoreError(f"the {what} {file} cannot be written; check its permissions")


def make_whole(uri: str, make: Callable[[str], None]) -> None:
    """Let ``make`` create a missing SQLite store under a name of its own, then put it in its place in one step.

    A process that is killed while it creates tables would leave a store that cannot be opened. Where another process
    was faster, its store is as good. One that is there is made usable where it lies, see :func:`without_log`.
    """
    file = sqlite_file(uri)
    if file is None:
        return
    if file.exists():
        leave_log(file)
        return
    with create_atomically(file, replace=False) as made:
        make(f"{SQLITE}{made}")


def make_tables(uri: str, make: Callable[[], T]) -> T:
    """Return what ``make`` does, which creates a server's tables when they are missing.

    It is done again when another process creates them at the same moment, for libraries let the slower one fail.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return make()
        except Exception as error:  # SQLAlchemy's, or MLflow's about it
            if sqlite_file(uri) is not None or attempt + 1 == _ATTEMPTS or not _MADE_TWICE.search(str(error)):
                raise
            time.sleep(_RETRY_SECONDS)
    raise AssertionError


def tune_sqlite(engine: Engine, patience: int) -> None:
    """Let an SQLite store be read while it is written, and commit without waiting for the disk each time.

    A write waits ``patience`` seconds for a database that another process holds.

    A write-ahead log survives the death of any process; a power cut may lose the last moments, never the file
    (SQLite, "Write-Ahead Logging"). Where there can be none, see :func:`without_log`, each commit waits for the disk.
    """
    from sqlalchemy import event

    logged = not log_problem(Path(str(engine.url.database)).parent)

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        connection.execute(f"PRAGMA busy_timeout={patience * 1000}")
        (mode,) = connection.execute(f"PRAGMA journal_mode={'WAL' if logged else 'DELETE'}").fetchone()
        connection.execute(f"PRAGMA synchronous={'NORMAL' if mode == 'wal' else 'FULL'}")

    engine.dispose()  # connections that are open already lack the settings


def without_log(*uris: str) -> str:
    """Return the sentence about stores that can have no write-ahead log: what is lost, and what helps; or ""."""
    files = [file for uri in uris if (file := sqlite_file(uri)) is not None]
    for file in files:
        if problem := log_problem(file.parent):
            return (
                f"the store {file} lies on {problem}, where SQLite can keep no write-ahead log: a write waits while "
                "another process reads, each commit waits for the disk, and two machines must not use it at once; "
                "faster and safer: --local-stores FOLDER, with a folder on this machine's own disk"
            )
    return ""


def leave_log(file: Path) -> None:
    """Turn a store with a write-ahead log into one without, where its file system can have none.

    Only a connection that keeps the file for itself can do that there, since it shares no memory.
    """
    with file.open("rb") as opened:
        if opened.read(20)[18:] != b"\2\2" or not log_problem(file.parent):
            return
    with contextlib.closing(sqlite3.connect(file)) as database:
        for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=DELETE"):
            database.execute(f"PRAGMA {pragma}").fetchone()


def await_server(engine: Engine, patience: float, note: Callable[[str], None]) -> None:
    """Let a new connection to a database server wait ``patience`` seconds for one that is away.

    With ``pool_pre_ping`` every use of a connection that died needs a new one.
    """
    from sqlalchemy import event

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
        end, told = time.monotonic() + patience, False
        while True:
            try:
                return dialect.connect(*arguments, **options)
            except dialect.loaded_dbapi.OperationalError as error:
                if time.monotonic() > end:
                    raise
                if not told:
                    note(f"the study store does not answer ({reason(error)}): waiting for it; training continues")
                told = True
            time.sleep(_RETRY_SECONDS)


def _lock_file(file: Path, study: str) -> Path:
    return file.parent / "locks" / f"{paths.file_name(study)}.lock"


@contextlib.contextmanager
def _taken(lock: Path, study: str) -> Iterator[None]:
    with locked(lock, _GLANCE) as held:
        if held is False:
            owner = lock.read_text(encoding="utf-8").strip() or "another process"
            raise StoreError(f"study {study!r} is being run by {owner}; wait for it, stop it, or choose --name")
        yield


def check_free(uri: str, study: str) -> None:
    """Raise the StoreError of :func:`study_lock` while another process runs a study; nothing is written."""
    file = sqlite_file(uri)
    if file is not None and _lock_file(file, study).is_file():
        with contextlib.suppress(PermissionError), _taken(_lock_file(file, study), study):
            pass


@contextlib.contextmanager
def study_lock(uri: str, study: str) -> Iterator[None]:
    """Hold the lock of a study in a local store while it runs; the lock of a process that died is free.

    Raises StoreError while another process runs the study.
    """
    file = sqlite_file(uri)
    with contextlib.ExitStack() as stack:
        if file is not None:
            lock = _lock_file(file, study)
            try:
                lock.parent.mkdir(exist_ok=True)
                stack.enter_context(_taken(lock, study))
            except OSError as error:
                raise StoreError(
                    f"the folder {lock.parent} cannot be written: {error.strerror}; check its permissions"
                ) from error
            with contextlib.suppress(OSError):  # another user's file, which can be locked all the same
                lock.write_text(f"process {os.getpid()}", encoding="utf-8")
        yield
