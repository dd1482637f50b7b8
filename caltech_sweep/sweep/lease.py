"""Who may write to a study: one process at a time, which notices before it writes that it no longer is the one.

A local study store has a file lock, which a stopped process keeps and a dead one gives back. A database server has a
lease instead: a row that is taken in one statement, that a thread of its own renews, and that runs out by the clock of
the database. A process that was away for too long (stopped, asleep, cut off) finds another holder in the row:

    held.check()       before a write to the tracking store: free while the lease cannot have run out by any clock here
    fencing(engine)    in every transaction of the study store that writes: the row is read once more before its commit
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from caltech_sweep import stores
from caltech_sweep.errors import HeldStudyError, LostStudyError, StoreError
from caltech_sweep.stores import Store, reason, study_lock

LEASE_SECONDS = 120.0  # after which a study whose process gives no sign may be run by another
_MARGIN = 0.25  # of the lease, kept for a write that is on its way
_RETRY_SECONDS = 1.0
_LOCK_SECONDS = 10  # that taking a lease waits for a transaction of its holder

LEASES = sa.Table(
    "caltech_sweep_lease",
    sa.MetaData(),
    sa.Column("study", sa.String(512), primary_key=True),
    sa.Column("holder", sa.String(32), nullable=False),  # another one each time that it is taken
    sa.Column("who", sa.String(512), nullable=False),
    sa.Column("since", sa.Double, nullable=False),  # seconds since 1970, as the database counts them
    sa.Column("expires", sa.Double, nullable=False),
)
_NOW = {
    "postgresql": "extract(epoch from clock_timestamp())",
    "mysql": "unix_timestamp(sysdate(6))",
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
    "mssql": "datediff_big(millisecond, '1970-01-01', sysutcdatetime()) / 1000.0",
}
_OUTAGES = (sa.exc.OperationalError, sa.exc.InterfaceError)


class Held(Protocol):
    """A study that this process may write to."""

    def check(self) -> None:
        """Raise LostStudyError when another process has the study."""

    def confirm(self, connection: Connection) -> None:
        """Do so by what the database says in a transaction, and let no process take the study before its end."""


class _Lock:
    """A study in a local store: its lock cannot be lost."""

    def check(self) -> None:
        pass

    def confirm(self, connection: Connection) -> None:
        pass


def _clocks() -> tuple[float, float]:
    """Return the seconds of two clocks: one counts a machine's sleep where it can, the other is the calendar's."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return (time.monotonic() if boot is None else time.clock_gettime(boot)), time.time()


class Lease:
    """The lease of one study in a database; ``seconds`` is how long it lasts without a renewal, by ``clocks`` here."""

    def __init__(
        self,
        engine: Engine,
        study: str,
        seconds: float | None = None,
        clocks: Callable[[], tuple[float, float]] = _clocks,
    ) -> None:
        self.engine, self.study, self._clocks = engine, study, clocks
        self.seconds = LEASE_SECONDS if seconds is None else seconds
        self.holder = uuid.uuid4().hex
        self._now: Any = sa.literal_column(_NOW[engine.dialect.name], sa.Double)
        self._mine = (LEASES.c.study == study) & (LEASES.c.holder == self.holder)
        self._renewed = (float("-inf"), float("-inf"))
        self._lost: str = ""
        self._guard = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_the_end, name="lease", daemon=True)

    def acquire(self) -> None:
        """Take the lease in one statement and renew it from now on; raise StoreError while another process has it."""
        self._make_table()
        before = self._clocks()
        values = {"holder": self.holder, "who": _who(), "since": self._now, "expires": self._now + self.seconds}
        free = (LEASES.c.study == self.study) & (LEASES.c.expires < self._now)
        taken = sa.update(LEASES).where(free).values(**values)
        try:
            with self.engine.begin() as connection:
                if self.engine.dialect.name == "postgresql":
                    connection.execute(sa.text(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'"))
                if connection.execute(taken).rowcount != 1:
                    connection.execute(sa.insert(LEASES).values(study=self.study, **values))
        except (sa.exc.IntegrityError, *_OUTAGES) as error:
            holder = self._row()  # raises again when the database is unavailable
            if holder is None:
                raise
            raise self._taken(holder) from error
        self._renewed = before
        self._thread.start()

    def _taken(self, holder: Any) -> HeldStudyError:
        return HeldStudyError(
            f"study {self.study!r} is being run by {holder.who}, or was less than {self.seconds:g} seconds ago; "
            "wait for it, stop it, or choose --name"
        )

    def check_free(self) -> None:
        """Raise HeldStudyError while another process has the study; nothing is written."""
        if sa.inspect(self.engine).has_table(LEASES.name):
            held = sa.select(LEASES).where(LEASES.c.study == self.study, LEASES.c.expires >= self._now)
            with self.engine.connect() as connection:
                holder = connection.execute(held).first()
            if holder is not None:
                raise self._taken(holder)

    def _make_table(self) -> None:
        if not sa.inspect(self.engine).has_table(LEASES.name):
            with suppress(sa.exc.IntegrityError, sa.exc.ProgrammingError, sa.exc.OperationalError):
                LEASES.create(self.engine, checkfirst=True)  # another process may make it at this very moment

    def _row(self) -> Any:
        with self.engine.connect() as connection:
            return connection.execute(sa.select(LEASES).where(LEASES.c.study == self.study)).first()

    def _renew_until_the_end(self) -> None:
        while not self._end.wait(self.seconds / 4):
            try:
                self.renew()
            except LostStudyError:
                return
            except sa.exc.SQLAlchemyError:  # it is unavailable: the lease holds until another process takes it
                continue

    def renew(self) -> None:
        """Let the lease begin again; raise LostStudyError when another process has it, even if it has ended since."""
        with self._guard:
            if self._lost:
                raise LostStudyError(self._lost)
            before = self._clocks()
            with self.engine.begin() as connection:
                renewed = sa.update(LEASES).where(self._mine).values(expires=self._now + self.seconds)
                kept = connection.execute(renewed).rowcount == 1
            if not kept:
                self._lose(self._row())
            self._renewed = before

    def _lose(self, row: Any) -> None:
        other = "another process" if row is None else f"{row.who} at {datetime.fromtimestamp(row.since):%F %T}"
        self._lost = (
            f"study {self.study!r} was taken over by {other}, since this process was silent for more than "
            f"{self.seconds:g} seconds; it has written nothing more, and the other one continues the study"
        )
        raise LostStudyError(self._lost)

    def check(self) -> None:
        """Raise LostStudyError when another process has the study; asks the database when the lease may have ended.

        Raises StoreError when the database does not answer for a quarter of an hour.
        """
        if self._lost:
            raise LostStudyError(self._lost)
        give_up = time.monotonic() + stores.PATIENCE
        sure = self.seconds * (1 - _MARGIN)
        while max(now - then for now, then in zip(self._clocks(), self._renewed, strict=True)) > sure:
            try:
                self.renew()
            except _OUTAGES as error:
                if time.monotonic() > give_up:
                    raise StoreError(
                        f"the study store does not say who runs study {self.study!r} ({reason(error)}); start it, then "
                        "run the study again: it resumes where it stopped"
                    ) from None
                time.sleep(min(_RETRY_SECONDS, self.seconds / 4))

    def confirm(self, connection: Connection) -> None:
        """Raise LostStudyError in a transaction when another process has the study; none can take it until its end."""
        holder = sa.select(LEASES).where(LEASES.c.study == self.study).with_for_update(read=True)
        row = connection.execute(holder).first()
        if row is None or row.holder != self.holder:
            self._lose(row)

    def release(self) -> None:
        """Give the study back, if it is still this process's."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(sa.exc.SQLAlchemyError), self.engine.begin() as connection:
            connection.execute(sa.update(LEASES).where(self._mine).values(expires=0.0))
        self.engine.dispose()


def _who() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"[:512]


def check_free(store: Store, study: str) -> None:
    """Raise the HeldStudyError of :func:`holding` while another process has a study; nothing is written."""
    if store.is_local:
        stores.check_free(store, study)
        return
    with store.opening():
        Lease(store.engine(), study).check_free()


@contextmanager
def holding(store: Store, study: str) -> Iterator[Held]:
    """Hold a study for one process while it runs; raise HeldStudyError while another one has it."""
    if store.is_local:
        with study_lock(store, study):
            yield _Lock()
        return
    with store.opening():
        lease = Lease(store.engine(), study)
        lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


@contextmanager
def fencing(engine: Engine, held: Held) -> Iterator[None]:
    """Let no transaction of an engine that has written something be committed once the study is another process's."""

    def note(connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if context is not None and (context.isinsert or context.isupdate or context.isdelete):
            connection.info["writes"] = True

    def confirm(connection: Connection) -> None:
        if connection.info.pop("writes", False):
            held.confirm(connection)

    def forget(connection: Connection) -> None:
        if not connection.invalidated:  # what is known of one that its server has ended is gone with it
            connection.info.pop("writes", None)

    hooks = (("before_cursor_execute", note), ("commit", confirm), ("rollback", forget))
    for name, hook in hooks:
        sa.event.listen(engine, name, hook)
    try:
        yield
    finally:
        for name, hook in hooks:
            sa.event.remove(engine, name, hook)
