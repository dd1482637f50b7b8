"""One contract for every tracker: the one in memory, and MLflow over real SQLite."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from caltech_sweep.errors import StoreError, UsageError
from caltech_sweep.testing import MemoryTracker, ScriptedExecutor, scripted_coordinator
from caltech_sweep.tracking.journal import Journal, JournalingTracker
from caltech_sweep.tracking.records import OUTCOMES, Tracker
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.studies import DEFINITION

TAGS = {"trial_number": "0", "fingerprint": "abc", "row": "First"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("odd place & more") / "mlflow.db"


@pytest.fixture(params=["memory", "mlflow", "journaling"])
def tracker(request: pytest.FixtureRequest) -> Tracker:
    if request.param == "memory":
        return MemoryTracker()
    tracker = MlflowTracker(str(request.getfixturevalue("store")), create=True)
    if request.param == "mlflow":
        return tracker
    journal = Journal(request.getfixturevalue("tmp_path_factory").mktemp("journal"))
    return JournalingTracker(tracker, journal, lambda line: None)


@pytest.fixture
def study(request: pytest.FixtureRequest) -> str:
    return request.node.name.replace("[", "-").replace("]", "")


def start(tracker: Tracker, study: str) -> str:
    tracker.start_study(study, "A title", {"rows": [], "title": "A title"})
    return tracker.start_trial(study, "First", {"lr": "0.1"}, TAGS)


def only_trial(tracker: Tracker, study: str):
    record = tracker.study(study)
    assert record is not None
    (trial,) = tracker.trials(record)
    return trial


def test_a_trial_s_life(tracker: Tracker, study: str, tmp_path: Path) -> None:
    run = start(tracker, study)
    assert only_trial(tracker, study).state == "running"
    tracker.log_dataset(run, "shapes", "digest", {"train": 3}, "drawn")
    tracker.log_epochs(run, [(1, {"val/accuracy": 0.5, "train/loss": 1.0}, 1000)])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file.txt").write_text("kept")
    tracker.finish_trial(run, "complete", {"best/val_accuracy": 0.5}, {"extra": "tag"}, tmp_path)
    tracker.finish_study(study, True)
    trial = only_trial(tracker, study)
    assert (trial.run_id, trial.name, trial.row, trial.number) == (run, "First", "First", 0)
    assert (trial.outcome, trial.status, trial.fingerprint) == ("complete", "FINISHED", "abc")
    assert trial.metrics["best/val_accuracy"] == 0.5 and trial.metrics["val/accuracy"] == 0.5
    assert trial.params["lr"] == "0.1" and trial.tags["extra"] == "tag"


@pytest.mark.parametrize("outcome", sorted(OUTCOMES))
def test_every_outcome_has_its_status(tracker: Tracker, study: str, outcome: str) -> None:
    run = start(tracker, study)
    tracker.finish_trial(run, outcome, {}, {}, None)
    trial = only_trial(tracker, study)
    assert (trial.outcome, trial.status) == (outcome, OUTCOMES[outcome].mlflow)


@pytest.mark.parametrize("outcome", sorted(OUTCOMES))
def test_a_run_has_ended_unless_its_trial_may_go_on(tracker: Tracker, study: str, outcome: str) -> None:
    run = start(tracker, study)
    assert not tracker.has_ended(run)
    tracker.finish_trial(run, outcome, {}, {}, None)
    assert tracker.has_ended(run) == (outcome not in ("interrupted", "paused"))


def test_a_trial_goes_on_after_its_last_epoch(tracker: Tracker, study: str) -> None:
    run = start(tracker, study)
    assert tracker.resume_trial(run, {}) == 0
    tracker.log_epochs(run, [(n, {"train/loss": 1.0 / n}, n) for n in (1, 2, 3)])
    tracker.finish_trial(run, "interrupted", {}, {"reason": "stopped", "paused_at": "3"}, None)
    assert tracker.resume_trial(run, {"attempt": "2"}) == 3
    trial = only_trial(tracker, study)
    assert (trial.status, trial.state, trial.tags["attempt"]) == ("RUNNING", "running", "2")
    assert not {"reason", "paused_at"} & trial.tags.keys()


def test_a_study_goes_on_with_its_new_document(tracker: Tracker, study: str) -> None:
    first = tracker.start_study(study, "A title", {"trials": 1})
    assert tracker.start_study(study, "A title", {"trials": 2}) == first
    record = tracker.study(study)
    assert record is not None and record.document == {"trials": 2}
    assert tracker.study("no such study") is None


def test_a_description_longer_than_a_tag_is_cut_at_a_line(store: Path, study: str) -> None:
    tracker = MlflowTracker(str(store), create=True)
    parent = tracker.start_study(study, "A title", {})
    tracker.describe_study(study, "| a row |\n" * 2000)
    note = tracker.client.get_run(parent).data.tags["mlflow.note.content"]
    assert len(note) < 8000 and note.endswith(f"| a row |\n\nThe rest is in `caltech-sweep report {study}`.")


def test_a_long_history_is_within_mlflow_s_limits(store: Path, study: str) -> None:
    tracker = MlflowTracker(str(store), create=True)
    run = start(tracker, study)
    tracker.log_epochs(
        run, [(n, {f"metric{k}": 0.0 for k in range(9)} | {"train/loss": 0.0}, n) for n in range(1, 151)]
    )
    assert tracker.resume_trial(run, {}) == 150


def test_what_a_trial_spent_is_logged_as_it_runs_and_no_step_comes_twice(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caltech_sweep.sweep.recorder.FLUSH_SECONDS", 0.0)  # every epoch, as where one takes long
    definition = replace(DEFINITION, name="spent")
    tracker = MlflowTracker(str(store), create=True)
    scripted_coordinator(definition, ScriptedExecutor(), tracker, tmp_path).run()
    with contextlib.closing(sqlite3.connect(store)) as database:
        steps = database.execute("SELECT run_uuid, step, value FROM metrics WHERE key = 'spent/seconds'").fetchall()
    assert len(steps) > 2 * DEFINITION.trials and len({(run, step) for run, step, _ in steps}) == len(steps)
    written = tracker.study("spent")
    assert written is not None
    for record in tracker.trials(written):
        assert record.metrics["spent/seconds"] == max(value for run, _, value in steps if run == record.run_id)


def test_the_parent_run_holds_the_children(store: Path, study: str) -> None:
    tracker = MlflowTracker(str(store), create=True)
    run = start(tracker, study)
    parent = tracker.client.get_run(run).data.tags["mlflow.parentRunId"]
    assert tracker.client.get_run(parent).data.tags["kind"] == "study"
    assert tracker.client.get_run(parent).info.run_name == "A title"
    experiment = tracker.client.get_experiment_by_name(study)
    assert experiment.artifact_location.startswith((store.parent / "artifacts").as_uri())


def test_stores_that_cannot_be_used_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="run a study first"):
        MlflowTracker(str(tmp_path / "none.db"))
    (tmp_path / "text.db").write_text("this is no database, but it is long enough to be looked at" * 9)
    with pytest.raises(StoreError, match="cannot be opened"):
        MlflowTracker(str(tmp_path / "text.db"))
    with pytest.raises(StoreError, match=r"http://127.0.0.1:9 does not answer"):
        MlflowTracker("http://user:secret@127.0.0.1:9".replace("user:secret@", ""))
    with pytest.raises(StoreError) as caught:
        MlflowTracker("http://user:secret@127.0.0.1:9")
    assert "secret" not in str(caught.value)
    for name in ("q?mark", "per%20cent"):
        with pytest.raises(UsageError, match="special characters in a database URL"):
            MlflowTracker(str(tmp_path / name / "none.db"), create=True)
    assert not list(tmp_path.glob("none*")) and len(list(tmp_path.iterdir())) == 1
