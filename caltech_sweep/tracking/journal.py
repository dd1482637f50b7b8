"""Results that the tracking store does not take at the moment: kept in a local journal, replayed when it is back.

While the store answers, everything goes straight to it. The first write that it does not take, and all after that,
become entries of a small database, each on the disk before the study continues; artifacts are copied next to it. Every
entry is replayed in order and once: what it does is checked against what the store has, so a write that was cut short
half way, by either side, is not doubled. A run that is created meanwhile has a local id until then.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from caltech_sweep import paths
from caltech_sweep.errors import ForeignStudyError, LostStudyError, StoreError
from caltech_sweep.stores import Store, reason
from caltech_sweep.text import counted
from caltech_sweep.tracking.answers import Answer, advice, meaning
from caltech_sweep.tracking.background import Background
from caltech_sweep.tracking.records import STEP_METRIC, STRIKES, EpochLog, StudyRecord, Tracker, TrialRecord, epochs_of

T = TypeVar("T")
LOCAL = "local-"  # what the id of a run begins with that the store does not know yet
ID_TAG = "journal.id"  # on a run that was replayed: its local id, by which it is found again
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two attempts
PATIENCE = 5.0  # seconds that a write may take before it becomes an entry and training goes on
_OF_ITS_COURSE = ("resume_trial", "log_epochs", "finish_trial")  # what a trial that has ended needs no more
_TABLES = (
    "CREATE TABLE IF NOT EXISTS entries (n INTEGER PRIMARY KEY AUTOINCREMENT, operation TEXT NOT NULL, "
    "arguments TEXT NOT NULL, artifacts TEXT, rejected TEXT)",
    "CREATE TABLE IF NOT EXISTS runs (local TEXT PRIMARY KEY, run_id TEXT NOT NULL)",
)


class Entry(NamedTuple):
    """A write that waits: a tracker's method, its arguments, and the name of the folder with its artifacts, if any."""

    operation: str
    arguments: Mapping[str, Any]
    artifacts: str | None = None


class Journal:
    """Entries that wait in ``journal.db``, which is gone when none is left. Each change is one transaction.

    What the store will never take stays in its table ``entries``, with the reason in the column ``rejected``.
    """

    def __init__(self, folder: Path) -> None:
        """Read a folder's journal, if there is one; nothing is written. Raises StoreError when it cannot be read."""
        self.folder, self.file = folder, folder / "journal.db"
        self._former = folder / "entries.jsonl"  # of earlier versions; the first change takes it over
        self._guard = threading.RLock()  # one thread writes results while another brings them to the store
        self.pending: dict[int, Entry] = {}
        self.runs: dict[str, str] = {}  # run ids by local id
        try:
            for line in self._former.read_bytes().split(b"\n") if self._former.exists() else ():
                with suppress(ValueError):  # empty, or cut short by a kill before anyone relied on it
                    self._take(**json.loads(line))
            if self.file.exists():
                with self._database() as database:
                    rows = database.execute("SELECT * FROM entries WHERE rejected IS NULL ORDER BY n")
                    self.pending.update({n: Entry(name, json.loads(text), kept) for n, name, text, kept, _ in rows})
                    self.runs.update(database.execute("SELECT * FROM runs"))
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the journal {self.file} cannot be read: {_reason(error)}") from error

    def _take(self, n: int = 0, op: str = "", args: Any = None, artifacts: bool = False, **mark: Any) -> None:
        if op:
            self.pending[n] = Entry(op, args, str(n) if artifacts else None)
        self.pending.pop(mark.get("done", 0), None)
        self.runs.update(mark.get("runs", {}))

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.file)) as database, database:
            for table in _TABLES:
                database.execute(table)
            yield database

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """Make a change in one transaction, which is on the disk at its end. Raises OSError or sqlite3.Error."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._database() as database:
            if self._former.exists():
                rows = [(n, name, json.dumps(given), kept) for n, (name, given, kept) in self.pending.items()]
                database.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?, NULL)", rows)
                database.executemany("INSERT OR IGNORE INTO runs VALUES (?, ?)", self.runs.items())
            yield database
        self._former.unlink(missing_ok=True)

    def artifacts(self, entry: Entry) -> Path | None:
        """Return the folder with the artifacts of an entry, or None where it has none."""
        return self.folder / "artifacts" / entry.artifacts if entry.artifacts else None

    def add(
        self, operation: str, arguments: Mapping[str, Any], folder: Path | None = None, rejected: str | None = None
    ) -> None:
        """Add an entry, and a copy of the artifacts in ``folder``; it is on the disk when this returns.

        One that was ``rejected``, for which this is the reason, does not wait for the store.
        """
        text, has_some = json.dumps(dict(arguments)), folder is not None and folder.is_dir()
        entry = Entry(operation, json.loads(text), uuid.uuid4().hex if has_some else None)
        with self._guard:
            try:
                if folder is not None and (target := self.artifacts(entry)):
                    shutil.copytree(folder, target)
                with self._change() as database:
                    columns = "INSERT INTO entries (operation, arguments, artifacts, rejected) VALUES (?, ?, ?, ?)"
                    number = database.execute(columns, (operation, text, entry.artifacts, rejected)).lastrowid
            except (OSError, sqlite3.Error) as error:
                raise StoreError(
                    f"the tracking store takes no results, and its journal {self.file} cannot be written "
                    f"({_reason(error)}); free some disk space and run the study again"
                ) from error
            if rejected is None:
                self.pending[number or 0] = entry

    def done(self, number: int, runs: Mapping[str, str]) -> None:
        """Remove an entry that is in the store; ``runs`` holds the run ids that it gave to local ids."""
        with self._guard:
            with self._change() as database:
                database.execute("DELETE FROM entries WHERE n = ?", (number,))
                database.executemany("INSERT OR REPLACE INTO runs VALUES (?, ?)", runs.items())
                left = database.execute("SELECT 1 FROM entries").fetchone()
            self.runs.update(runs)
            if folder := self.artifacts(self.pending.pop(number)):
                shutil.rmtree(folder, ignore_errors=True)
            if not left:
                self.file.unlink()
                if not (self.folder / "rejected.jsonl").exists():  # what an earlier version has set aside
                    shutil.rmtree(self.folder, ignore_errors=True)

    def reject(self, number: int, why: str) -> None:
        """Set an entry aside, with its artifacts and the reason, that the store will never take."""
        with self._guard, self._change() as database:
            database.execute("UPDATE entries SET rejected = ? WHERE n = ?", (why, number))
        del self.pending[number]


def _reason(error: Exception) -> str:
    number = re.search(r"\[Errno \d+\] ([^:]+)", str(error))  # of many files, what the first met
    return number[1] if number else str(error)


def journal_folder(root: Path, study: str, store: Store) -> Path:
    """Return the folder of a study's journal for one tracking store, however the store's address is written."""
    return root / "journal" / f"{paths.file_name(study)}-{_digest(store.identity, 16)}"


def own_folder(root: Path, study: str, store: Store, names: Callable[[], Iterable[str]]) -> Path:
    """Return :func:`journal_folder`, to which the study's journal of an earlier version is moved, if there is one.

    ``names`` tells the names of the studies in the tracking store.
    """
    place = journal_folder(root, study, store)
    for folder in _former(root, store.uri):
        if not place.exists() and _study_of(folder, names()) == study:
            try:
                folder.rename(place)
            except OSError as error:
                raise StoreError(f"the journal {folder} cannot be moved to {place.name}: {error.strerror}") from error
    return place


def journals(root: Path, store: Store, names: Callable[[], Iterable[str]]) -> list[tuple[str, Path]]:
    """Return the studies and folders of the journals below ``root`` whose writes are for a tracking store."""
    ending = f"-{_digest(store.identity, 16)}"
    found = [
        (paths.study_name(folder.name.removesuffix(ending)), folder)
        for folder in sorted((root / "journal").glob(f"*{ending}"))
    ]
    return found + [(_study_of(folder, names()), folder) for folder in _former(root, store.uri)]


def _digest(text: str, length: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _former(root: Path, uri: str) -> list[Path]:
    """Return the journals for a tracking store of earlier versions, which went by the words of its address."""
    written = {uri, *(re.sub(r"^postgresql(\+\w+)?:", f"postgresql{driver}:", uri) for driver in ("", "+psycopg2"))}
    endings = sorted(_digest(text, 8) for text in written)
    return [folder for ending in endings for folder in sorted((root / "journal").glob(f"*-{ending}"))]


def _study_of(folder: Path, names: Iterable[str]) -> str:
    """Return whose journal of an earlier version this is, in whose name / and _ are the same."""
    for entry in Journal(folder).pending.values():
        if "study" in entry.arguments or entry.operation == "finish_study":
            return str(entry.arguments.get("study", entry.arguments.get("name")))
    written = folder.name[: -len("-") - 8]
    alike = [name for name in names if name.replace("/", "_") == written]
    return written if written in alike or not alike else alike[0]


class _NoRoomError(Exception):
    """The journal cannot say what has become of an entry."""


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise _NoRoomError from error


def _runs_of(entry: Entry) -> set[str]:
    """Return the runs that an entry is about."""
    return {str(entry.arguments.get("run_id") or entry.arguments.get("tags", {}).get(ID_TAG, ""))} - {""}


def _check_run(arguments: Mapping[str, Any]) -> None:
    if str(arguments.get("run_id", "")).startswith(LOCAL):
        raise LookupError("the run of its trial was not taken either")


class JournalingTracker(Tracker):
    """A tracker that never loses a write, and never waits long for one: see the module.

    ``fence`` raises LostStudyError once another process has the study: nothing goes to the store or the journal then.
    """

    def __init__(
        self,
        inner: Tracker,
        journal: Journal,
        note: Callable[[str], None],
        fence: Callable[[], None] = lambda: None,
        patience: float = PATIENCE,
    ) -> None:
        self.inner, self.journal, self._fence = inner, journal, fence
        self._note, self._patience = note, patience
        self._wait, self._next = FIRST_WAIT, 0.0
        self._last_epoch: dict[str, int] = {}
        self._failures: Counter[int] = Counter()  # of entries at which the store failed while it took others
        self._said: Answer | None = None  # why it takes nothing, which people know by now
        self._thread = Background("tracking store")
        self._replaying: Future[bool] | None = None

    @property
    def waiting(self) -> int:
        """How many writes the store does not have yet."""
        return len(self.journal.pending)

    # -- bringing it to the store ----------------------------------------------------------------------------------

    def keep_up(self) -> None:
        """Begin to bring what waits to the store, if there is any and it is time to try again; wait for nothing."""
        self._fence()
        if self._thread.is_busy:
            return
        if self._replaying is not None:
            ended, self._replaying = self._replaying, None
            ended.result()  # raises what says that another process has the study
        if self.waiting and time.monotonic() >= self._next:
            self._replaying = self._thread.submit(self._replay)

    def replay(self) -> bool:
        """Bring what waits to the store, in order; return whether all of it is there, or set aside for good."""
        self._replaying = None
        for attempt in range(STRIKES):
            complete = self._thread.submit(self._replay).result()
            if complete or not self._failures:
                return complete
            if attempt + 1 < STRIKES:
                time.sleep(self._wait)
        return complete

    def _replay(self) -> bool:
        try:
            return self._bring_all()
        except _NoRoomError:  # what is done is done again, to no effect
            return self._later()

    def _bring_all(self) -> bool:
        failed: dict[int, Exception] = {}
        again = True
        while again:  # what belongs to a run that was set aside is seen in the next pass
            taken, failed, away = self._pass()
            if away:
                return self._later()
            again = self._strike(failed, taken)
            if taken and not self.waiting:
                self._note(f"the tracking store is back: {counted(taken, 'write')} replayed")
        if failed and not taken:
            self._say(Answer.UNSURE, next(iter(failed.values())))
            return self._later()
        self._said = None
        if failed:
            return self._later()
        self._wait = FIRST_WAIT
        return not self.waiting

    def _pass(self) -> tuple[int, dict[int, Exception], bool]:
        """Bring each entry once; return how many the store took, at which it failed, and whether it takes none now."""
        taken, failed = 0, dict[int, Exception]()
        blocked: set[str] = set()  # runs that miss a write, so that those after it have to wait
        for number, entry in list(self.journal.pending.items()):
            self._fence()
            if blocked & _runs_of(entry):
                continue
            try:
                self.inner.keep_up()
                self._bring(number, entry)
                taken += 1
            except (LostStudyError, ForeignStudyError, _NoRoomError):
                raise
            except Exception as error:
                answer = meaning(error)
                if answer is Answer.NEVER:
                    self._set_aside(number, error)
                elif answer is Answer.UNSURE:
                    failed[number] = error
                    blocked |= _runs_of(entry)
                else:
                    self._say(answer, error)
                    return taken, failed, True
        return taken, failed, False

    def _strike(self, failed: Mapping[int, Exception], taken: int) -> bool:
        """Count a failure against each write that failed while the store took others; return whether any was too much.

        Once it has taken others, it is known that it is there, and any further failure counts.
        """
        before = self.waiting
        for number, error in failed.items():
            if taken or self._failures[number]:
                self._failures[number] += 1
            if self._failures[number] >= STRIKES:
                self._set_aside(number, error)
        return self.waiting < before

    def _bring(self, number: int, entry: Entry) -> None:
        runs = self._apply(entry)
        with _room():
            self.journal.done(number, runs)

    def _set_aside(self, number: int, error: Exception) -> None:
        entry, why = self.journal.pending[number], reason(error)
        self._failures.pop(number, None)
        with _room():
            self.journal.reject(number, why)
        self._note(self._refused(entry.operation, why))

    def _refused(self, operation: str, why: str) -> str:
        return (
            f"the tracking store refuses a write ({operation}: {why}); it is kept in {self.journal.file}, in the table "
            "entries, and the rest goes on"
        )

    def _say(self, answer: Answer, error: Exception) -> None:
        """Say why the store takes nothing, and what to do, unless that has been said."""
        if answer is self._said:
            return
        self._said = answer
        text = f"the tracking store {answer.value} ({reason(error)}): results are buffered in {self.journal.folder}"
        if answer is Answer.OURS:
            self._note(f"{text}; training continues; {advice(error)}, then run: caltech-sweep replay")
        else:
            self._note(f"{text} until it is back; training continues")

    def _later(self) -> bool:
        self._next = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)
        return False

    def _apply(self, entry: Entry) -> dict[str, str]:
        """Do what an entry says, as far as the store does not have it; return the run ids given to local ids.

        A trial that has ended meanwhile stays as it is: a process that took the study over has trained it.
        """
        arguments, operation = dict(entry.arguments), entry.operation
        if "run_id" in arguments:
            arguments["run_id"] = self._real(arguments["run_id"])
            _check_run(arguments)
            if operation in _OF_ITS_COURSE and self.inner.has_ended(arguments["run_id"]):
                return {}
        if operation == "start_trial":
            local = arguments["tags"][ID_TAG]
            known = self._find(arguments["study"], arguments["tags"])
            if known is None:
                known = self.inner.start_trial(**arguments)
            else:
                self.inner.log_params(known, arguments["params"])
            return {local: known}
        if operation == "log_epochs":
            last = self.inner.last_epoch(arguments["run_id"])
            arguments["epochs"] = [e for e in arguments["epochs"] if e[0] > last or STEP_METRIC not in e[1]]
        if operation == "finish_trial":
            folder = self.journal.artifacts(entry)
            if refused := self.inner.finish_trial(**arguments, folder=folder):
                assert folder is not None
                self._keep_refused(arguments["run_id"], folder, refused)
            return {}
        getattr(self.inner, operation)(**arguments)
        return {}

    def _find(self, study: str, tags: Mapping[str, str]) -> str | None:
        """Return the run that a lost answer left, or that another process has made for the same trial."""
        record = self.inner.study(study)
        trials = self.inner.trials(record) if record else []
        same = {"trial_number", "fingerprint"} & tags.keys()
        for trial in trials:
            if trial.tags.get(ID_TAG) == tags[ID_TAG] or (same and all(trial.tags.get(k) == tags[k] for k in same)):
                return trial.run_id
        return None

    def _real(self, run_id: str) -> str:
        return self.journal.runs.get(run_id, run_id)

    # -- writing ---------------------------------------------------------------------------------------------------

    def _write(self, operation: str, **arguments: Any) -> Any:
        """Write to the store, or else to the journal; return what the store answered, None of the journal."""
        self._fence()
        own = {**arguments, "run_id": self._real(arguments["run_id"])} if "run_id" in arguments else arguments
        rejected = None
        if not self.waiting and not self._thread.is_busy:
            try:
                return self._directly(operation, own)
            except (LostStudyError, ForeignStudyError):
                raise
            except Exception as error:
                self._fence()
                answer = meaning(error)
                if answer is Answer.NEVER:
                    rejected = reason(error)
                    self._note(self._refused(operation, rejected))
                else:
                    self._next = time.monotonic() + self._wait
                    self._say(answer, error)
        self.journal.add(operation, {k: v for k, v in arguments.items() if k != "folder"}, own.get("folder"), rejected)
        return None

    def _directly(self, operation: str, arguments: Mapping[str, Any]) -> Any:
        """Return what the store answers within the patience that training has; raises what it raises."""
        _check_run(arguments)
        future = self._thread.submit(partial(getattr(self.inner, operation), **arguments))
        try:
            answer = future.result(self._patience)
        except FutureTimeoutError as error:
            if future.done():  # the store's own
                raise
            # What still happens to this call does not matter: its entry does what it has not done.
            raise StoreError(f"no answer within {self._patience:g} s") from error
        if operation == "finish_trial" and answer:
            self._keep_refused(arguments["run_id"], arguments["folder"], answer)
        return answer

    def _keep_refused(self, run_id: str, folder: Path, refused: Mapping[str, str]) -> None:
        """Keep the artifacts that the store will never take."""
        with tempfile.TemporaryDirectory(prefix="caltech-sweep-") as temporary:
            for path, why in refused.items():
                (Path(temporary) / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / path, Path(temporary) / path)
                self._note(self._refused(f"the artifact {path} of run {run_id}", why))
            self.journal.add("log_artifacts", {"run_id": run_id}, Path(temporary), "; ".join(refused.values()))

    def start_study(self, name: str, title: str, document: Mapping[str, Any]) -> str:
        """Bring what an earlier run left to the store, then create the study there, or go on with it."""
        if not self.replay():
            how = "start it, then run the study again" if self._said is Answer.LATER else "see above, then run it again"
            raise StoreError(
                f"the tracking store does not take the {self.waiting} results that wait in {self.journal.folder}; {how}"
            )
        return self.inner.start_study(name, title, document)

    def finish_study(self, name: str, complete: bool) -> None:
        self._write("finish_study", name=name, complete=complete)

    def describe_study(self, name: str, description: str) -> None:
        """Give a study a description, unless the store is unavailable: the next one says more."""
        if not self.waiting:
            self._write("describe_study", name=name, description=description)

    def start_trial(self, study: str, name: str, params: Mapping[str, str], tags: Mapping[str, str]) -> str:
        """Create a trial's run; return its id, a local one when the store is unavailable."""
        local = f"{LOCAL}{uuid.uuid4().hex}"
        tags = {**tags, ID_TAG: local}  # by which an answer that got lost is found again
        return self._write("start_trial", study=study, name=name, params=dict(params), tags=tags) or local

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        self._write("log_params", run_id=run_id, params=dict(params))

    def resume_trial(self, run_id: str, tags: Mapping[str, str]) -> int:
        """Open a trial's run again; return the last epoch whose metrics it has, or will have when all is replayed."""
        last = self._write("resume_trial", run_id=run_id, tags=dict(tags))
        self._last_epoch[run_id] = max(last or 0, self._last_epoch.get(run_id, 0))
        return self._last_epoch[run_id]

    def last_epoch(self, run_id: str) -> int:
        return self.inner.last_epoch(self._real(run_id))

    def has_ended(self, run_id: str) -> bool:
        return self.inner.has_ended(self._real(run_id))

    def log_dataset(self, run_id: str, name: str, digest: str, profile: Mapping[str, int], source: str) -> None:
        self._write("log_dataset", run_id=run_id, name=name, digest=digest, profile=dict(profile), source=source)

    def log_epochs(self, run_id: str, epochs: Sequence[EpochLog]) -> None:
        self._write("log_epochs", run_id=run_id, epochs=[list(epoch) for epoch in epochs])
        self._last_epoch[run_id] = max([self._last_epoch.get(run_id, 0), *(epoch for epoch, _, _ in epochs_of(epochs))])

    def finish_trial(
        self, run_id: str, outcome: str, metrics: Mapping[str, float], tags: Mapping[str, str], folder: Path | None
    ) -> Mapping[str, str]:
        end = {"outcome": outcome, "metrics": dict(metrics), "tags": dict(tags)}
        return self._write("finish_trial", run_id=run_id, **end, folder=folder) or {}

    def ask(self, of: Callable[[str], T], run_id: str) -> T | None:
        """Return what ``of`` says of a run; None while the store is away."""
        real = self._real(run_id)
        if self.waiting or self._thread.is_busy or real.startswith(LOCAL):
            return None
        with suppress(Exception):  # the next write finds out what is wrong, and says it
            return self._thread.submit(partial(of, real)).result(self._patience)
        return None

    def study(self, name: str) -> StudyRecord | None:
        return self.inner.study(name)

    def trials(self, study: StudyRecord) -> list[TrialRecord]:
        return self.inner.trials(study)

    def say_what_waits(self, study: str, write: Callable[[str], None]) -> None:
        """Try once more, then say what the store does not have and how it gets there."""
        if self.waiting and not self.replay():
            write(
                f"{counted(self.waiting, 'write')} of study {study} not in the tracking store yet, but in "
                f"{self.journal.folder}; bring them there with: caltech-sweep replay"
            )
