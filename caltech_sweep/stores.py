"""The two stores: an address is parsed once, where it enters, and the :class:`Store` is handed on."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from caltech_sweep import addresses, paths
from caltech_sweep.addresses import SQLITE
from caltech_sweep.addresses import hide_secrets as hide_secrets
from caltech_sweep.errors import HeldStudyError, StoreError
from caltech_sweep.files import create_atomically, locked
from caltech_sweep.machine import log_problem

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

T = TypeVar("T")
VARIABLE = "MLFLOW_TRACKING_URI"
PATIENCE = 900  # seconds that a running study waits for its database: ten minutes without one are survived
_RETRY_SECONDS = 1.0
# What a database or a system itself said, in a longer story.
_SAID = re.compile(
    r"^\(\w+\.\w+\) (.+)$|failed with exception .*?(?:\[Errno -?\d+\] ([^'\")]+)|(certificate verify failed[^'\")]*|"
    r"(?:read |connect )?timed out)|SSLError\(\w+\(\d+, '([^']+))",
    re.M,
)
_ATTEMPTS = 30  # to open a database whose tables another process is creating
_MADE_TWICE = re.compile("duplicate key|duplicate entry|already exists", re.I)
_GLANCE = 0.5  # seconds that a study's lock is waited for: another process may only look whether it is free
_UPGRADES = {  # what a library says of a store of another version, and what helps
    "mlflow db upgrade": "back it up, then run `mlflow db upgrade {0}`, or update MLflow if the store is the newer one",
    "optuna storage upgrade": "back it up, then run `optuna storage upgrade --storage {0}`",
    "pip install -U optuna": "update Optuna, which is older than the store",
}


@dataclass(frozen=True, repr=False)
class Store:
    """One of the two stores. ``uri`` is its absolute address, secrets included: show ``shown`` in its place."""

    uri: str
    kind: addresses.Kind

    def __repr__(self) -> str:
        return f"Store({self.shown!r})"

    @cached_property
    def shown(self) -> str:
        """The address without users, passwords, tokens and keys."""
        return hide_secrets(self.uri)

    @cached_property
    def file(self) -> Path | None:
        """The file of an SQLite store, or None for another kind."""
        return Path(self.uri.removeprefix(SQLITE)) if self.uri.startswith(SQLITE) else None

    @property
    def is_local(self) -> bool:
        """Whether the store is a file."""
        return self.file is not None

    @property
    def is_web(self) -> bool:
        """Whether the store is a tracking server, rather than a database."""
        return addresses.is_web(self.uri)

    @property
    def folder(self) -> Path:
        """The folder of what lies next to the store: its own, or for a server the usual one of this folder."""
        return self.file.parent if self.file is not None else paths.STORES.resolve()

    @property
    def page(self) -> str | None:
        """The address of a tracking server's pages, which holds no user; None of a database."""
        return self.shown.replace("***@", "").rstrip("/") if self.is_web else None

    @cached_property
    def identity(self) -> str:
        """What is the same for all the addresses of one store: no driver, user or secret, one name of a host."""
        return addresses.identity(self.uri)

    def is_same(self, other: Store) -> bool:
        """Tell whether two addresses name one database: by another path, user, driver, or name of this machine."""
        if self.file is not None and other.file is not None and self.file.exists() and other.file.exists():
            return self.file.samefile(other.file)
        return self.identity == other.identity

    # -- what is said of it ----------------------------------------------------------------------------------------

    def reason(self, error: BaseException) -> str:
        """Return :func:`reason` without the secrets of this store's address."""
        return reason(error, self.uri)

    def cannot_open(self, error: BaseException) -> StoreError:
        """Return the error of a store that cannot be opened; one of another version names the command that helps."""
        if self._stuck_log:
            return self._without_its_log()
        for said, how in _UPGRADES.items():
            if said in str(error):
                how = how.format(self.shown)
                return StoreError(
                    f"the {self.kind.name} {self.shown} was made by another version of its library; {how}"
                )
        how, folder = "", self._read_only_folder
        if isinstance(error, ImportError):
            how = "; correct its address, or install the database's driver"
        elif folder is not None:
            how = f"; its folder {folder} cannot be written, and must be for this: copy it to another place"
        return StoreError(f"the {self.kind.name} {self.shown} cannot be opened: {self.reason(error)}{how}")

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Turn what a library raises while it opens this store into a sentence; its cause may hold secrets."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # SQLAlchemy's, Optuna's, MLflow's and drivers' errors have no common base
            raise self.cannot_open(error) from None

    def unreadable(self, error: BaseException) -> StoreError:
        """Return the error of a database that is there and does not hold what it should, or cannot be read there."""
        if self._stuck_log:
            return self._without_its_log()
        return StoreError(
            f"the {self.kind.name} {self.shown} cannot be read ({self.reason(error)}); name one that MLflow made, and "
            "bring an older one up to date with `mlflow db upgrade`"
        )

    @property
    def _stuck_log(self) -> str:
        """The reason of :func:`machine.log_problem` where an SQLite store has a write-ahead log all the same, or ""."""
        problem = log_problem(self.file.parent) if self.file is not None and self.file.exists() else ""
        return problem if problem and self.file is not None and _head(self.file)[18:] == b"\2\2" else ""

    def _without_its_log(self) -> StoreError:
        return StoreError(
            f"the {self.kind.name} {self.file} has a write-ahead log and lies on {self._stuck_log}, where SQLite can "
            "read none; run a study with it there, which turns the log off, or copy the store, with the file that ends "
            "in -wal, to this machine's own disk"
        )

    # -- whether it can be used ------------------------------------------------------------------------------------

    @property
    def _read_only_folder(self) -> Path | None:
        file = self.file
        return None if file is None or os.access(file.parent, os.W_OK) else file.parent

    @property
    def is_missing(self) -> bool:
        """Whether the store is an SQLite file that is yet to be made, or that is empty."""
        return self.file is not None and not (self.file.exists() and self.file.stat().st_size)

    def check(self, create: bool = False) -> None:
        """Raise StoreError when an SQLite store cannot be used; ``create`` makes the folder of a missing one."""
        file, what = self.file, self.kind.name
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
            self.check_writable()
        elif not os.access(file, os.R_OK):
            raise StoreError(f"the {what} {file} cannot be read; check its permissions")

    def check_writable(self) -> None:
        """Raise StoreError when an SQLite store could not be written, or made where it is missing; nothing is made."""
        file, what = self.file, self.kind.name
        if file is None:
            return
        place = paths.closest(file.parent)
        if not place.is_dir():
            raise StoreError(f"the folder {file.parent} cannot be created: {place} is a file")
        if not os.access(place, os.W_OK):
            raise StoreError(f"the folder {place} cannot be written; choose another place for the {what}")
        if file.exists() and not os.access(file, os.R_OK | os.W_OK):
            raise StoreError(f"the {what} {file} cannot be written; check its permissions")

    # -- its database ----------------------------------------------------------------------------------------------

    def engine(self) -> Engine:
        """Return SQLAlchemy's engine of a database, for a look at it: it keeps no connection and makes no table.

        A file in a folder that cannot be written, or where its log cannot be used, is opened read only. Raises
        StoreError when it still has changes in its log.
        """
        import sqlalchemy as sa

        return sa.create_engine(self.uri, **self.looking())

    def looking(self) -> dict[str, Any]:
        """Return SQLAlchemy's options of :meth:`engine`."""
        import sqlalchemy as sa

        connect = self._connect_read_only()
        return {"poolclass": sa.NullPool, **({} if connect is None else {"creator": connect})}

    def _connect_read_only(self) -> Callable[[], sqlite3.Connection] | None:
        """Return what connects to an SQLite store that cannot be written as it is; None for any other store.

        A store with a write-ahead log is opened by writing next to it, unless SQLite is told that nothing changes it
        (SQLite, "Write-Ahead Logging", on read-only databases).
        """
        file = self.file
        if file is None or not (self._read_only_folder or self._stuck_log):
            return None
        log = file.with_name(f"{file.name}-wal")
        if log.exists() and log.stat().st_size:
            if self._stuck_log:
                raise self._without_its_log()
            raise StoreError(
                f"the store {file} has changes in {log.name} that its folder, which cannot be written, keeps SQLite "
                "from reading; copy the folder to another place"
            )
        return partial(sqlite3.connect, f"file:{quote(str(file))}?mode=ro&immutable=1", uri=True)

    def make_whole(self, make: Callable[[str], None]) -> None:
        """Let ``make`` create a missing SQLite store under an address of its own, then put it in its place in one step.

        A process that is killed while it creates tables would leave a store that cannot be opened. Where another
        process was faster, its store is as good. One that is there is made usable where it lies, see
        :meth:`leave_log`.
        """
        if self.file is None:
            return
        if self.file.exists():
            self.leave_log()
            return
        with create_atomically(self.file, replace=False) as made, _unsynced(made):
            make(f"{SQLITE}{made}")

    def leave_log(self) -> None:
        """Turn a store with a write-ahead log into one without, where its file system can have none.

        Only a connection that keeps the file for itself can do that there, since it shares no memory.
        """
        if self.file is None or not self._stuck_log:
            return
        try:
            with contextlib.closing(sqlite3.connect(self.file)) as database:
                for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=DELETE"):
                    database.execute(f"PRAGMA {pragma}").fetchone()
        except sqlite3.Error as error:
            raise StoreError(
                f"the {self.kind.name} {self.file} has a write-ahead log that cannot be turned off ({error}); end what "
                "else uses the store, or copy it to this machine's own disk"
            ) from error

    def make_tables(self, make: Callable[[], T]) -> T:
        """Return what ``make`` does, which creates a server's tables when they are missing.

        It is done again when another process creates them at the same moment, for libraries let the slower one fail.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return make()
            except Exception as error:  # SQLAlchemy's, or MLflow's about it
                if self.is_local or attempt + 1 == _ATTEMPTS or not _MADE_TWICE.search(str(error)):
                    raise
                time.sleep(_RETRY_SECONDS)
        raise AssertionError


_HEADS: dict[tuple[int, int], IO[bytes]] = {}  # files by device and number


def _head(file: Path) -> bytes:
    """Return the first 20 bytes of an SQLite store, or what is there of them.

    The file stays open: to close it would drop the locks that SQLite has on it in this process (SQLite, "How To Corrupt
    An SQLite Database File"), and the next process to close the store would take its log away.
    """
    with contextlib.suppress(OSError):
        found = file.stat()
        opened = _HEADS.get((found.st_dev, found.st_ino))
        if opened is None:
            opened = _HEADS[found.st_dev, found.st_ino] = file.open("rb", buffering=0)
        opened.seek(0)
        return opened.read(20)
    return b""


Address = str | Store | None  # of a store, as a public function takes it: as text, parsed already, or the usual one


def tracking_store(named: Address = None) -> Store:
    """Return the MLflow store: the named one, that of ``MLFLOW_TRACKING_URI``, or ``mlruns/mlflow.db``.

    Raises UsageError for an address that is not understood.
    """
    given = os.environ.get(VARIABLE) if named is None else ""
    return _store(given or named, addresses.TRACKING, VARIABLE if given else "")


def study_store(named: Address = None) -> Store:
    """Return the Optuna store: the named one, or ``mlruns/optuna.db``; raise UsageError as for the other store."""
    return _store(named, addresses.STUDIES)


def _store(named: Address, kind: addresses.Kind, source: str = "") -> Store:
    if isinstance(named, Store):
        return named
    return Store(addresses.read(str(kind.file) if named is None else named, kind, source), kind)


def reason(error: BaseException, address: str = "") -> str:
    """Return the first line of the original error in a sentence's form, without secrets, those of ``address`` too."""
    cause = error.__cause__ if type(error).__name__ == "StorageInternalError" else None  # Optuna's own says nothing
    error = cause or error
    text = str(getattr(error, "orig", None) or getattr(error, "reason", None) or error) or type(error).__name__
    said = _SAID.search(text)
    return hide_secrets(said[said.lastindex or 0] if said else text.splitlines()[0], address)


def failure(error: Exception) -> StoreError | None:
    """Return the sentence about what a store's library raised while it was used; None for any other error."""
    origins = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if not origins & {"mlflow", "optuna", "requests", "sqlalchemy", "urllib3"}:
        return None
    return StoreError(
        f"a store failed ({reason(error)}); look into its log, or choose another one with --tracking-uri or --storage"
    )


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
    atexit.register(_close, weakref.ref(engine))


def _close(engine: weakref.ref[Engine]) -> None:
    """Close what an engine has open, at the end of a process: the last one of a store takes its log away."""
    if (kept := engine()) is not None:
        kept.dispose()


@contextlib.contextmanager
def _unsynced(file: Path) -> Iterator[None]:
    """Let no commit to an SQLite store that is being made wait for the disk: it is not in its place before it is there.

    MLflow's migrations are hundreds of commits.
    """
    from sqlalchemy import Pool, event

    def configure(connection: Any, record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            opened = connection.execute("PRAGMA database_list").fetchone()[2]
            if Path(opened).resolve() == file.resolve():
                connection.execute("PRAGMA synchronous=OFF")
                connection.execute("PRAGMA journal_mode=MEMORY")

    event.listen(Pool, "connect", configure)
    try:
        yield
    finally:
        event.remove(Pool, "connect", configure)


def without_log(*stores: Store) -> str:
    """Return the sentence about stores that can have no write-ahead log: what is lost, and what helps; or ""."""
    for store in stores:
        file = store.file
        if file is not None and (problem := log_problem(file.parent)):
            return (
                f"the store {file} lies on {problem}, where SQLite can keep no write-ahead log: a write waits while "
                "another process reads, each commit waits for the disk, and two machines must not use it at once; "
                "faster and safer: --local-stores FOLDER, with a folder on this machine's own disk"
            )
    return ""


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
            raise HeldStudyError(f"study {study!r} is being run by {owner}; wait for it, stop it, or choose --name")
        yield


def check_free(store: Store, study: str) -> None:
    """Raise the HeldStudyError of :func:`study_lock` while another process runs a study; nothing is written."""
    file = store.file
    if file is not None and _lock_file(file, study).is_file():
        with contextlib.suppress(PermissionError), _taken(_lock_file(file, study), study):
            pass


@contextlib.contextmanager
def study_lock(store: Store, study: str) -> Iterator[None]:
    """Hold the lock of a study in a local store while it runs; the lock of a process that died is free.

    Raises HeldStudyError while another process runs the study.
    """
    file = store.file
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
