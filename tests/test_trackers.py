"""One contract for every tracker: the one in memory, and MLflow over real SQLite."""

from __future__ import annotations

import contextlib
import getpass
import math
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.default_context import DefaultRunContext

from caltech_sweep.errors import StoreError, UsageError
from caltech_sweep.testing import MemoryTracker, ScriptedExecutor, scripted_coordinator
from caltech_sweep.tracking import client
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
    tracker.log_epochs(run, [(4321, {"spent/seconds": 4.321}, 4)])
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


def test_who_ran_a_study_and_its_trials_and_by_what_is_recorded_as_mlflow_does(finished: Path) -> None:
    tracker = MlflowTracker()
    record = tracker.study("tiny")
    assert record is not None
    recorded = [tracker.client.get_run(run.run_id).data.tags for run in tracker.trials(record)]
    recorded.append(tracker.client.get_run(record.run_id).data.tags)
    own = DefaultRunContext().tags()
    assert len(recorded) == 4 and own["mlflow.user"] == getpass.getuser()
    for tags in recorded:
        assert tags["mlflow.user"] == own["mlflow.user"] and tags["mlflow.source.type"] == own["mlflow.source.type"]
        assert tags["mlflow.source.name"] == Path(own["mlflow.source.name"]).name


def test_a_user_who_has_no_name_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    tracker = MlflowTracker(str(tmp_path / "mlflow.db"), create=True)
    for who in ("ada", ""):
        monkeypatch.setenv("LOGNAME", who)
        monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # whom the machine does not know
        run_id = tracker.start_study(f"by {who}", "A title", {})
        assert tracker.client.get_run(run_id).data.tags.get("mlflow.user", "") == who


# What is written in bulk, beside MLflow's own client in the same database

BATCHES: dict[str, list[dict[str, list[Any]]]] = {
    "epochs": [
        {"metrics": [Metric(key, 0.1 * step, 1000 + step, step) for step in range(1, 9) for key in ("a", "b/c")]}
    ],
    "an older epoch after a newer one": [{"metrics": [Metric("a", 1.0, 9, 3)]}, {"metrics": [Metric("a", 2.0, 10, 2)]}],
    "one step again, later": [{"metrics": [Metric("a", 1.0, 9, 3)]}, {"metrics": [Metric("a", 0.5, 10, 3)]}],
    "one step again, at the same time": [{"metrics": [Metric("a", v, 9, 3)]} for v in (0.5, 1.0, 0.7)],
    "the same twice in one": [{"metrics": [Metric("a", 1.0, 9, 3), Metric("b", 1.0, 9, 3), Metric("a", 1.0, 9, 3)]}],
    "the same once more": [{"metrics": [Metric("a", 1.0, 9, 3)]}, {"metrics": [Metric(k, 1.0, 9, 3) for k in "ab"]}],
    "no numbers": [{"metrics": [Metric("a", v, 9, s) for s, v in enumerate((math.nan, math.inf, -math.inf, 1.0))]}],
    "params": [{"params": [Param("lr", "0.1"), Param("note", "n" * 7000)]}, {"params": [Param("seed", "1")]}],
    "the same params": [{"params": [Param("lr", "0.1")]}, {"params": [Param("lr", "0.1"), Param("seed", "1")]}],
    "another value of a param": [{"params": [Param("lr", "0.1")]}, {"params": [Param("lr", "0.2")]}],
    "tags": [{"tags": [RunTag("a", "1"), RunTag("b", "2")]}, {"tags": [RunTag("b", "3"), RunTag("c", "x" * 9000)]}],
    "a tag twice": [{"tags": [RunTag("a", "1"), RunTag("a", "2")]}],
    "another name": [{"tags": [RunTag("mlflow.runName", "other"), RunTag("a", "1")]}],
    "a bad name": [{"metrics": [Metric("a?", 1.0, 9, 3)]}, {"tags": [RunTag("../a", "1")]}],
    "all at once": [{"metrics": [Metric("a", 1.0, 9, 3)], "params": [Param("lr", "1")], "tags": [RunTag("a", "1")]}],
    "nothing": [{}],
}


def written(tracker: MlflowTracker, run_id: str) -> list[Any]:
    """Return all rows of a run, and its name and status."""
    tables = (client.METRICS, client.LATEST_METRICS, client.PARAMS, client.TAGS)
    with tracker.client._tracking_client.store.engine.connect() as connection:
        rows = [
            sorted(
                tuple(value for key, value in row._mapping.items() if key != "run_uuid")
                for row in connection.execute(sa.select(table).where(table.c.run_uuid == run_id))
            )
            for table in tables
        ]
    info = tracker.client.get_run(run_id).info
    return [*rows, info.run_name, info.status, info.lifecycle_stage]


@pytest.fixture(scope="module")
def local(store: Path) -> MlflowTracker:
    return MlflowTracker(str(store), create=True)


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("active", [True, False], ids=["", "deleted"])
def test_bulk_writes_leave_what_mlflow_s_client_leaves(local: MlflowTracker, case: str, active: bool) -> None:
    assert type(local.client) is client.LocalClient
    stock, found = MlflowClient(local.uri, local.uri), []
    for writer in (local.client, stock):
        run_id = stock.create_run("0", run_name="one", tags={"a": "0"}).info.run_id
        if not active:
            stock.delete_run(run_id)
        errors = []
        for batch in BATCHES[case]:
            try:
                writer.log_batch(run_id, **batch)
            except MlflowException as error:
                errors.append(error.error_code)
        with contextlib.suppress(MlflowException):
            writer.set_terminated(run_id, "FAILED", 17)
        found.append((errors, written(local, run_id)))
    assert found[0] == found[1]
    assert bool(found[0][0]) == (
        case in ("another value of a param", "a bad name") or (not active and case != "nothing")
    )


def test_what_is_written_for_a_run_that_is_not_there_is_refused_as_by_mlflow(
    local: MlflowTracker, tmp_path: Path
) -> None:
    missing = "0" * 32
    for write in (
        lambda: local.client.log_batch(missing, tags=[RunTag("a", "1")]),
        lambda: local.client.set_terminated(missing),
        lambda: local.client.log_artifacts(missing, str(tmp_path)),
    ):
        with pytest.raises(MlflowException, match="not found"):
            write()
