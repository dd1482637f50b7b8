"""Both stores in a real PostgreSQL server, which goes away in the middle of a study."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from caltech_sweep.errors import StoreError
from caltech_sweep.stores import study_store
from caltech_sweep.sweep.lease import Lease, fencing, holding
from caltech_sweep.sweep.optuna_store import engine_of, open_storage
from caltech_sweep.sweep.owned_storage import OwnedStorage
from caltech_sweep.tracking.writer import MlflowTracker
from helpers import chaos
from helpers.places import furnish, invoke
from helpers.servers import Postgres, free_port, postgres

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

EPOCHS = 30
LONG = 120  # of a study that is at work for longer than a command takes


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as server:
        for name in ("mlflow", "optuna"):
            server.create(name)
        yield server


@pytest.fixture
def stores(server: Postgres) -> tuple[str, ...]:
    return ("--tracking-uri", server.address("mlflow"), "--storage", server.address("optuna"))


def run(place: Path, stores: tuple[str, ...]) -> subprocess.Popen[bytes]:
    arguments = ["run", "tiny", "--workers", "1", "--threads", "1", "--set", f"epochs={EPOCHS}", *stores]
    with (place / "log.txt").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "caltech_sweep", *arguments], stdout=log, stderr=log, cwd=place)


def wait_for(place: Path, process: subprocess.Popen[bytes], text: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while text not in (place / "log.txt").read_text():
        assert time.monotonic() < end and process.poll() is None, (place / "log.txt").read_text()
        time.sleep(0.02)


def test_a_database_server_that_goes_away_does_not_stop_a_study(
    place: Path, server: Postgres, stores: tuple[str, ...]
) -> None:
    process = run(place, stores)
    try:
        wait_for(place, process, "Views: started")
        time.sleep(0.5)
        server.stop()
        wait_for(place, process, "the study store does not answer")
        server.start()
        assert process.wait(120) == 0, (place / "log.txt").read_text()
    finally:
        process.kill()
    said = (place / "log.txt").read_text()
    assert "study tiny: 3 complete" in said and "hunter2" not in said and "Traceback" not in said, said
    assert "the tracking store is unavailable" in said and "is back" in said
    assert "the study store does not answer" in said
    table = json.loads(invoke("report", "tiny", "--format", "json", *stores[:2]).output)[0]
    assert [row["state"] for row in table["rows"]][:2] == ["complete", "complete"]
    tracker = MlflowTracker(stores[1])
    study = tracker.study("tiny")
    assert study is not None
    for trial in tracker.trials(study):
        history = tracker.client.get_metric_history(trial.run_id, "train/loss")
        assert sorted(metric.step for metric in history) == list(range(1, EPOCHS + 1)), trial.name
    looked = invoke("doctor", *stores)
    assert looked.exit_code == 0, looked.output


def coordinate(
    place: Path, stores: tuple[str, ...], name: str, log: str, seconds: float = 6, epochs: int = EPOCHS
) -> subprocess.Popen[bytes]:
    """Start a coordinator whose lease is short, in a working folder of its own."""
    folder = place / log
    if not folder.exists():
        folder.mkdir()
        furnish(folder)
    arguments = ["run", "tiny", "--in-process", "--threads", "1", "--set", f"epochs={epochs}", *stores, "--name", name]
    with (folder / "log.txt").open("ab") as file:
        code = chaos.SHORT.format(seconds=seconds)
        return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=file, stderr=file, cwd=folder)


def check_study(stores: tuple[str, ...], name: str, epochs: int = EPOCHS) -> None:
    """Assert that a study has three complete trials, each once in both stores, with every epoch once."""
    tracker = MlflowTracker(stores[1])
    study = tracker.study(name)
    assert study is not None
    runs = tracker.trials(study)
    assert sorted(run.number for run in runs) == [0, 1, 2] and {run.status for run in runs} == {"FINISHED"}
    for run in runs:
        steps = sorted(metric.step for metric in tracker.client.get_metric_history(run.run_id, "train/loss"))
        assert steps == list(range(1, epochs + 1)), run.name
    trials = optuna.load_study(study_name=name, storage=stores[3]).get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    looked = invoke("doctor", name, *stores)
    assert looked.exit_code == 0 and "1 study examined: 0 found, 0 fixed" in looked.output, looked.output


def test_of_two_coordinators_started_together_exactly_one_runs(place: Path, stores: tuple[str, ...]) -> None:
    """Also of those that are the first ones on a new database."""
    for number in range(3):
        pair = [coordinate(place, stores, f"pair{number}", f"p{side}", epochs=4) for side in (0, 1)]
        codes = sorted(process.wait(180) for process in pair)
        said = [(place / f"p{side}" / "log.txt").read_text() for side in (0, 1)]
        assert codes == [0, 2], said
        assert sum(text.count(f"study 'pair{number}' is being run by process") for text in said) == 1, said
        check_study(stores, f"pair{number}", 4)


def test_who_was_stopped_past_its_lease_writes_nothing_more(place: Path, stores: tuple[str, ...]) -> None:
    first = coordinate(place, stores, "stopped", "first", 3)
    second = None
    try:
        wait_for(place / "first", first, "Views: started")
        time.sleep(0.3)
        first.send_signal(signal.SIGSTOP)
        time.sleep(4)
        second = coordinate(place, stores, "stopped", "second", 3)
        wait_for(place / "second", second, "Views: started")
        first.send_signal(signal.SIGCONT)
        assert first.wait(60) == 1
        assert second.wait(180) == 0, (place / "second" / "log.txt").read_text()
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
    said = (place / "first" / "log.txt").read_text()
    assert "Error: study 'stopped' was taken over by process" in said and said.count("Error:") == 1, said
    assert "it has written nothing more" in said and "Traceback" not in said
    check_study(stores, "stopped")


def test_who_is_blocked_in_a_write_for_longer_than_its_lease_keeps_its_study(
    place: Path, stores: tuple[str, ...]
) -> None:
    """A transaction of somebody else holds a table of the tracking store: every write of metrics waits."""
    first = coordinate(place, stores, "blocked", "first", 3)
    try:
        wait_for(place / "first", first, "Views: started")
        engine = sa.create_engine(stores[1])
        with engine.begin() as connection:
            connection.execute(sa.text("LOCK TABLE metrics, runs, tags IN ACCESS EXCLUSIVE MODE"))
            time.sleep(7)  # two leases and more
            assert first.poll() is None
            lease = Lease(sa.create_engine(stores[3], poolclass=sa.NullPool), "blocked")
            with pytest.raises(StoreError, match="is being run by process"):
                lease.acquire()
        engine.dispose()
        assert first.wait(180) == 0, (place / "first" / "log.txt").read_text()
    finally:
        first.kill()
    check_study(stores, "blocked")


def test_a_study_whose_process_died_is_free_once_its_lease_has_run_out(place: Path, stores: tuple[str, ...]) -> None:
    first = coordinate(place, stores, "died", "first", 8, LONG)
    try:
        wait_for(place / "first", first, "First: started")
        refused = coordinate(place, stores, "died", "second", 8, LONG)
        assert refused.wait(60) == 2
        looked = invoke("doctor", "died", "--fix", *stores)
        assert "died: skipped, since study 'died' is being run by process" in looked.output, looked.output
        first.send_signal(signal.SIGKILL)
        first.wait()
    finally:
        first.kill()
    assert "is being run by process" in (place / "second" / "log.txt").read_text()
    time.sleep(8)
    third = coordinate(place, stores, "died", "third", 8, LONG)
    assert third.wait(400) == 0, (place / "third" / "log.txt").read_text()
    check_study(stores, "died", LONG)


def test_a_server_that_is_not_there_is_a_sentence_at_once(place: Path) -> None:
    address = f"postgresql://tester:hunter2@127.0.0.1:{free_port()}/mlflow"
    begun = time.monotonic()
    for option in ("--tracking-uri", "--storage"):
        result = invoke("run", "tiny", "--in-process", "--threads", "1", option, address)
        assert result.exit_code == 2 and "cannot be opened" in result.output and "refused" in result.output
        assert "hunter2" not in result.output
    assert time.monotonic() - begun < 60


class Cut:
    """Ends an engine's connection once, at a moment of a transaction, as a server does that is stopped."""

    def __init__(self, engine: sa.Engine, server: Postgres, when: str) -> None:
        self._other = study_store(server.address("optuna")).engine()
        self.due, self.cuts, self._commit = False, 0, engine.dialect.do_commit
        engine.dialect.do_commit = self._commits
        self._when = when
        sa.event.listen(engine, "before_cursor_execute", self._before)

    def _before(self, connection: sa.Connection, cursor: object, statement: str, *_: object) -> None:
        if self._when == "statement" and statement.lstrip().startswith(("INSERT", "UPDATE")):
            self._cut(connection.connection)

    def _commits(self, pooled: Any) -> None:
        if self._when == "commit":
            self._cut(pooled)
        self._commit(pooled)
        if self._when == "answer" and self.due:
            self._cut(pooled)
            pooled.driver_connection.execute("SELECT 1")  # the answer to the commit is what is lost

    def _cut(self, pooled: Any) -> None:
        if self.due:
            self.due, pid = False, pooled.driver_connection.info.backend_pid
            self.cuts += 1
            with self._other.connect() as connection:
                connection.execute(sa.text(f"SELECT pg_terminate_backend({pid})"))
            time.sleep(0.1)


@pytest.mark.parametrize("when", ["statement", "commit", "answer"])
def test_a_server_that_ends_connections_in_a_transaction_loses_and_doubles_nothing(
    server: Postgres, stores: tuple[str, ...], when: str
) -> None:
    """Each thing that a study writes; Optuna's own storage reads what is there."""
    name, store = f"cut {when}", study_store(stores[3])
    study = optuna.create_study(storage=OwnedStorage(open_storage(stores[3], create=True)), study_name=name)
    storage, number = study._storage, study._study_id
    trials, wanted = list[int](), 0
    writes: list[Callable[[], Any]] = [
        lambda: trials.append(storage.create_new_trial(number)),
        lambda: trials.append(storage.create_new_trial(number, create_trial(state=TrialState.WAITING))),
        lambda: storage.set_trial_state_values(trials[1], TrialState.RUNNING),
        lambda: storage.set_trial_param(trials[0], "lr", 0.5, FloatDistribution(0, 1)),
        lambda: storage.set_trial_intermediate_value(trials[0], 1, 0.25),
        lambda: storage.add_intermediate_values([(trials[0], 2, 0.5), (trials[1], 1, 0.75)]),
        lambda: storage.set_trial_user_attr(trials[0], "a", [1]),
        lambda: storage.set_trial_system_attr(trials[0], "b", 2),
        lambda: storage.set_study_user_attr(number, "c", 3),
        lambda: storage.set_trial_state_values(trials[0], TrialState.COMPLETE, [0.5]),
    ]
    engine = engine_of(study)
    assert engine is not None
    with holding(store, name) as held, fencing(engine, held):
        cut = Cut(engine, server, when)
        for place, write in enumerate(writes):
            # Optuna makes a trial again by itself, and then there are two, where only the answer to the first was lost.
            cut.due = place > 1 or when != "answer"
            wanted += cut.due
            write()
            assert not cut.due
        known = storage.get_all_trials(number)
    assert cut.cuts == wanted
    first, second = optuna.load_study(study_name=name, storage=RDBStorage(store.uri)).trials
    assert (first.state, first.values, first.params) == (TrialState.COMPLETE, [0.5], {"lr": 0.5})
    assert first.intermediate_values == {1: 0.25, 2: 0.5} and (first.user_attrs, first.system_attrs) == (
        {"a": [1]},
        {"b": 2},
    )
    assert second.state == TrialState.RUNNING and second.intermediate_values == {1: 0.75}
    assert [trial.intermediate_values for trial in known] == [{1: 0.25, 2: 0.5}, {1: 0.75}]
    assert study.user_attrs == {"c": 3}
