"""The lease of a study: taken in one step, renewed, lost, and noticed before anything is written."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from caltech_sweep.errors import LostStudyError, StoreError
from caltech_sweep.sweep.executors.base import Epoch
from caltech_sweep.sweep.lease import LEASES, Lease, fencing
from caltech_sweep.sweep.optuna_store import engine_of, open_study
from caltech_sweep.testing import ScriptedExecutor, epoch_metrics, scripted_coordinator
from caltech_sweep.tracking.journal import Journal, JournalingTracker
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.studies import DEFINITION, Unreliable

SECONDS = 60.0


class Clock:
    """The clocks of this machine, which a test may set forward, and with them the leases of a database."""

    ahead = 0.0

    def __call__(self) -> tuple[float, float]:
        return time.monotonic() + self.ahead, time.time() + self.ahead

    def go_on(self, uri: str, seconds: float) -> None:
        self.ahead += seconds
        with sa.create_engine(uri, poolclass=sa.NullPool).begin() as connection:
            connection.execute(sa.update(LEASES).values(expires=LEASES.c.expires - seconds))


CLOCK = Clock()


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'optuna.db'}"


def lease(uri: str, seconds: float = SECONDS) -> Lease:
    return Lease(sa.create_engine(uri, poolclass=sa.NullPool), "s", seconds, CLOCK)


def stop(held: Lease) -> None:
    """Do to a lease what stopping its process does: it is renewed no more, and its clocks go on."""
    held._end.set()
    held._thread.join()


def test_of_many_that_take_a_study_together_one_gets_it(uri: str) -> None:
    for _ in range(5):
        leases, got, refused = [lease(uri) for _ in range(6)], [], []
        start = threading.Barrier(len(leases))

        def take(one: Lease, start: threading.Barrier = start, got: list = got, refused: list = refused) -> None:
            start.wait()
            try:
                one.acquire()
                got.append(one)
            except StoreError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=take, args=(one,)) for one in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1 and len(refused) == 5
        assert all("is being run by process" in text for text in refused)
        got[0].release()


@pytest.mark.slow
def test_a_lease_is_kept_for_as_long_as_its_thread_beats_whatever_its_process_waits_for(uri: str) -> None:
    first, second = lease(uri, 1), lease(uri, 1)
    first.acquire()
    time.sleep(3)  # as in a write that does not end
    with pytest.raises(StoreError, match="is being run by process"):
        second.acquire()
    first.check()
    first.release()
    second.acquire()
    second.release()


def test_who_was_away_too_long_is_told_even_when_the_other_has_ended(uri: str) -> None:
    first, second = lease(uri), lease(uri)
    first.acquire()
    stop(first)
    first.check()
    CLOCK.go_on(uri, 1.2 * SECONDS)
    second.acquire()
    second.release()
    for _ in range(2):
        with pytest.raises(LostStudyError, match=r"study 's' was taken over by process \d+ on \S+ at \d{4}-"):
            first.check()
    first.release()
    third = lease(uri)
    third.acquire()
    third.release()


def test_a_lease_that_ran_out_and_that_nobody_took_goes_on(uri: str) -> None:
    first, second = lease(uri), lease(uri)
    first.acquire()
    stop(first)
    CLOCK.go_on(uri, 1.2 * SECONDS)
    first.check()
    with pytest.raises(StoreError, match="is being run"):
        second.acquire()
    first.release()


def test_a_check_asks_nobody_while_the_lease_cannot_have_ended(uri: str) -> None:
    held, asked = lease(uri, 60), []
    held.acquire()
    sa.event.listen(held.engine, "connect", lambda *_: asked.append(1))
    for _ in range(1000):
        held.check()
    assert not asked
    held.release()


def study_in(uri: str) -> optuna.Study:
    return open_study(DEFINITION, uri, DEFINITION.identity())


def test_no_transaction_that_writes_to_the_study_store_is_committed_once_the_study_is_lost(uri: str) -> None:
    study = study_in(uri)
    engine = engine_of(study)
    assert engine is not None
    first, second = lease(uri), lease(uri)
    first.acquire()
    writes: list[Callable[[], object]] = [
        lambda: study.set_user_attr("key", 1),
        lambda: study.enqueue_trial({"lr": 0.5}),
        lambda: study._storage.create_new_trial(study._study_id),
        lambda: study._storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0]),
        lambda: trial.report(0.5, 1),
        lambda: trial.suggest_float("lr", 0.1, 1.0),
        lambda: trial.set_user_attr("key", 1),
    ]
    with fencing(engine, first):
        trial = optuna.Trial(study, study._storage.create_new_trial(study._study_id))
        stop(first)
        with engine.begin() as connection:  # only by the database: this process's clocks say nothing yet
            connection.execute(sa.update(LEASES).values(expires=0.0))
        second.acquire()
        for write in writes:
            with pytest.raises(LostStudyError, match="was taken over by"):
                write()
    (kept,) = study_in(uri).get_trials()
    assert kept.state == TrialState.RUNNING and not kept.params and not kept.user_attrs and not kept.intermediate_values
    assert "key" not in study_in(uri).user_attrs
    first.release()
    second.release()
    study.set_user_attr("key", 2)
    assert study_in(uri).user_attrs["key"] == 2


class Taken(ScriptedExecutor):
    """Lets another process take the study over while trial 1 is at epoch 2."""

    def __init__(self, take: Callable[[], None]) -> None:
        super().__init__()
        self._take = take

    def poll(self, timeout: float) -> list:
        events = super().poll(timeout)
        if any(isinstance(event, Epoch) and (event.job, event.epoch) == (1, 2) for event in events):
            self._take()
        return events


def test_a_coordinator_that_has_lost_its_study_writes_nothing_and_another_ends_it(uri: str, tmp_path: Path) -> None:
    second = lease(uri)
    inner = MlflowTracker(str(tmp_path / "mlflow.db"), create=True)

    def coordinator(held: Lease, executor: ScriptedExecutor) -> tuple:
        study, tracker = study_in(uri), MlflowTracker(inner.uri)
        tracker.guard(held.check)
        engine = engine_of(study)
        assert engine is not None
        journal = Journal(tmp_path / "journal")
        journaling = JournalingTracker(tracker, journal, lambda text: None, held.check)
        made = scripted_coordinator(DEFINITION, executor, journaling, tmp_path / "scratch", study)  # type: ignore[arg-type]
        return made, fencing(engine, held)

    def take() -> None:
        stop(first)
        CLOCK.go_on(uri, 1.2 * SECONDS)
        second.acquire()
        before.append(everything(uri))

    first, before = lease(uri), []
    first.acquire()
    (tmp_path / "scratch").mkdir()
    loser, fence = coordinator(first, Taken(take))
    with fence, pytest.raises(LostStudyError, match="it has written nothing more"):
        loser.run()
    assert everything(uri) == before[0]
    record = inner.study("s")
    assert record is not None
    assert [inner.last_epoch(run.run_id) for run in inner.trials(record)][:1] == [4]
    winner, fence = coordinator(second, ScriptedExecutor())
    with fence:
        assert winner.run().complete
    runs = inner.trials(record)
    assert sorted(run.number for run in runs) == list(range(6)) and {run.status for run in runs} == {"FINISHED"}
    for run in runs:
        assert [metric.step for metric in inner.history(run.run_id, "train/loss")] == [1, 2, 3, 4]
    assert {trial.state for trial in study_in(uri).get_trials()} == {TrialState.COMPLETE}
    first.release()
    second.release()


def everything(uri: str) -> list:
    """Return all that the study store holds of trials."""
    engine = sa.create_engine(uri, poolclass=sa.NullPool)
    tables = ("trials", "trial_user_attributes", "trial_values", "trial_intermediate_values", "trial_params")
    with engine.connect() as connection:
        return [list(connection.execute(sa.text(f"SELECT * FROM {table}"))) for table in tables]


def test_a_journal_takes_nothing_from_who_has_lost_the_study(uri: str, tmp_path: Path) -> None:
    first, second = lease(uri), lease(uri)
    first.acquire()
    journaling = JournalingTracker(Unreliable(1, 10**9), Journal(tmp_path / "journal"), lambda text: None, first.check)
    journaling.finish_study("s", True)
    kept = (tmp_path / "journal" / "journal.db").read_bytes()
    stop(first)
    CLOCK.go_on(uri, 1.2 * SECONDS)
    second.acquire()
    for write in (lambda: journaling.finish_study("s", False), journaling.keep_up, journaling.replay):
        with pytest.raises(LostStudyError):
            write()
    assert (tmp_path / "journal" / "journal.db").read_bytes() == kept
    first.release()
    second.release()


def test_a_journal_of_who_lost_the_study_changes_no_trial_that_another_has_ended(tmp_path: Path) -> None:
    inner = MlflowTracker(str(tmp_path / "mlflow.db"), create=True)
    inner.start_study("s", "A study", {})
    tags = {"trial_number": "0", "fingerprint": "f"}
    journal = Journal(tmp_path / "journal")
    local = "local-1"
    journal.add("start_trial", {"study": "s", "name": "One", "params": {}, "tags": {**tags, "journal.id": local}})
    run = {"run_id": local}
    journal.add("log_epochs", {**run, "epochs": [[1, epoch_metrics(0.1), 5], [2, epoch_metrics(0.1), 6]]})
    journal.add("resume_trial", {**run, "tags": {"attempt": "2"}})
    journal.add("finish_trial", {**run, "outcome": "crashed", "metrics": {"best/val_accuracy": 0.1}, "tags": {}})
    other = inner.start_trial("s", "One", {}, tags)
    inner.log_epochs(other, [(1, epoch_metrics(0.5), 1)])
    inner.finish_trial(other, "complete", {"best/val_accuracy": 0.5}, {}, None)
    assert JournalingTracker(inner, Journal(tmp_path / "journal"), lambda text: None).replay()
    record = inner.study("s")
    assert record is not None
    (kept,) = inner.trials(record)
    assert (kept.outcome, kept.status, kept.metrics["best/val_accuracy"]) == ("complete", "FINISHED", 0.5)
    assert inner.last_epoch(other) == 1 and "attempt" not in kept.tags
    with suppress(FileNotFoundError):
        assert not list((tmp_path / "journal").iterdir())
