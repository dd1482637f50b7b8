"""Stores that go away while a study runs: nothing is lost, nothing doubled, and no secret of an address is told."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path

import pytest

from caltech_sweep import stores
from caltech_sweep.errors import StoreError
from caltech_sweep.testing import MemoryTracker, Script, ScriptedExecutor, scripted_coordinator
from caltech_sweep.tracking import client as tracking
from caltech_sweep.tracking.journal import Journal, JournalingTracker
from caltech_sweep.tracking.records import TrialRecord
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.places import invoke
from helpers.servers import answering, free_port
from helpers.studies import DEFINITION, Unreliable, new_study, told

THREE = replace(DEFINITION, trials=3)


def run(tracker: MemoryTracker, folder: Path) -> list[str]:
    """Run a study of three trials, one of which loses its worker; every result is complete at its end."""
    notes: list[str] = []
    journaling = JournalingTracker(tracker, Journal(folder / "journal"), notes.append)
    executor = ScriptedExecutor(lambda config: Script([0.1, 0.3, 0.2], deaths=config.lr == 0.1))
    (folder / "scratch").mkdir(parents=True)
    coordinator = scripted_coordinator(THREE, executor, journaling, folder / "scratch", new_study())
    assert coordinator.run().complete
    for _ in range(100):
        if journaling.replay():
            break
    assert not journaling.waiting and not (folder / "journal").exists()
    return notes


@pytest.mark.parametrize("after", [False, True], ids=["away", "answers-lost"])
@pytest.mark.parametrize("count", [1, 30])
def test_whenever_the_store_goes_away_it_ends_with_every_result_once(tmp_path: Path, count: int, after: bool) -> None:
    steady = Unreliable()
    assert run(steady, tmp_path / "steady") == []
    for first in range(1, steady.calls + 1, 2 if count == 1 else 5):
        tracker = Unreliable(first, count, after)
        notes = run(tracker, tmp_path / f"{first}")
        assert told(tracker) == told(steady), first
        assert "training continues" in notes[0] and "is back" in notes[-1]


def test_a_journal_survives_its_writer_and_a_change_that_was_cut_short(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    tracker.start_study("s", "A study", {})
    away = Unreliable(1, 10**9)
    away.documents, away.runs, away.datasets = tracker.documents, tracker.runs, tracker.datasets
    first = JournalingTracker(away, Journal(tmp_path / "j"), lambda text: None)
    local = first.start_trial("s", "One", {"lr": "1"}, {"trial_number": "0"})
    assert first.resume_trial(local, {}) == 0
    first.log_epochs(local, [(1, {"train/loss": 1.0}, 5)])
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file.txt").write_text("kept")
    first.finish_trial(local, "complete", {"best/val_accuracy": float("nan")}, {}, tmp_path / "made")
    (tmp_path / "made" / "file.txt").unlink()
    killed = subprocess.run([sys.executable, "-c", CUT, str(tmp_path / "j" / "journal.db")])
    assert killed.returncode == -signal.SIGKILL and (tmp_path / "j" / "journal.db-journal").exists()
    second = JournalingTracker(tracker, Journal(tmp_path / "j"), lambda text: None)
    assert second.waiting == 4 and second.replay() and not (tmp_path / "j").exists()
    (made,) = tracker.runs.values()
    assert made.artifacts == {"file.txt": b"kept"} and len(made.history) == 1 and made.status == "FINISHED"


CUT = """
import os, signal, sqlite3, sys
database = sqlite3.connect(sys.argv[1])
database.execute("PRAGMA cache_size = 1")  # pages go to the file before the transaction ends
for _ in range(500):
    database.execute("INSERT INTO entries (operation, arguments) VALUES ('log_epochs', hex(zeroblob(2000)))")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_write_that_the_store_will_never_take_is_set_aside(tmp_path: Path) -> None:
    tracker, notes = MlflowTracker(str(tmp_path / "mlflow.db"), create=True), []
    tracker.start_study("s", "A study", {})
    journal = Journal(tmp_path / "j")
    journal.add("log_params", {"run_id": "no such run", "params": {"lr": "1"}})
    journal.add("finish_study", {"name": "s", "complete": True})
    assert JournalingTracker(tracker, journal, notes.append).replay()
    assert "refuses a write (log_params:" in notes[0] and str(tmp_path / "j" / "journal.db") in notes[0]
    with closing(sqlite3.connect(tmp_path / "j" / "journal.db")) as database:
        ((arguments, why),) = database.execute("SELECT arguments, rejected FROM entries")
    assert "no such run" in arguments and why in notes[0]
    again = JournalingTracker(tracker, Journal(tmp_path / "j"), notes.append)
    assert not again.waiting and again.replay() and (tmp_path / "j" / "journal.db").exists()


def test_a_journal_of_an_earlier_version_is_taken_over_by_the_first_change_and_replayed_once(tmp_path: Path) -> None:
    steady, tracker, folder = MemoryTracker(), MemoryTracker(), tmp_path / "j"
    (folder / "artifacts" / "5").mkdir(parents=True)
    (folder / "artifacts" / "5" / "file.txt").write_text("kept")
    tags = {"trial_number": "0", "journal.id": "local-1"}
    lines = [
        {"n": 1, "op": "start_study", "args": {"name": "s", "title": "Done", "document": {}}},
        {"n": 2, "op": "start_trial", "args": {"study": "s", "name": "One", "params": {"lr": "1"}, "tags": tags}},
        {"done": 1, "runs": {"local-0": "run-0"}},
        {"n": 3, "op": "log_epochs", "args": {"run_id": "local-1", "epochs": [[1, {"train/loss": 1.0}, 5]]}},
        {"n": 5, "op": "finish_trial", "artifacts": True}
        | {"args": {"run_id": "local-1", "outcome": "complete", "metrics": {"best/val_accuracy": 0.5}, "tags": {}}},
    ]
    former = folder / "entries.jsonl"
    former.write_text("".join(f"\n{json.dumps(line)}\n" for line in lines) + '{"n": 6, "op": "log_ep')
    for one in (steady, tracker):
        one.start_study("s", "A study", {})
        one.datasets["run-0"] = "digest"
    looked = Journal(folder)
    assert list(looked.pending) == [2, 3, 5] and looked.runs == {"local-0": "run-0"}
    assert former.exists() and not looked.file.exists()  # who only looks changes nothing
    looked.add("log_params", {"run_id": "local-1", "params": {"momentum": "0.9"}})
    assert not former.exists()
    former.write_text("".join(f"{json.dumps(line)}\n" for line in lines))  # as a kill before its removal leaves it
    journal = Journal(folder)
    assert list(journal.pending) == [2, 3, 5, 6] and journal.runs == {"local-0": "run-0"}
    assert JournalingTracker(tracker, journal, lambda text: None).replay() and not folder.exists()
    run_id = steady.start_trial("s", "One", {"lr": "1"}, tags)
    steady.log_epochs(run_id, [(1, {"train/loss": 1.0}, 5)])
    (tmp_path / "file.txt").write_text("kept")
    steady.finish_trial(run_id, "complete", {"best/val_accuracy": 0.5}, {}, tmp_path)
    steady.log_params(run_id, {"momentum": "0.9"})
    assert told(tracker) == told(steady)


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match=r"the journal .*journal.db cannot be read: file is not a database"):
        Journal(tmp_path)


def test_a_journal_on_a_full_disk_says_so_and_keeps_what_it_has(small_disk: Path) -> None:
    journal = Journal(small_disk / "j")
    journal.add("finish_study", {"name": "s", "complete": True})
    with (small_disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(StoreError, match=r"cannot be written \(.*full.*\); free some disk space"):
        journal.add("log_params", {"run_id": "r", "params": {"lr": "1" * 100_000}})
    assert len(journal.pending) == len(Journal(small_disk / "j").pending) == 1


def trial(tracker: MlflowTracker, number: int) -> TrialRecord:
    study = tracker.study("s")
    assert study is not None
    (found,) = [record for record in tracker.trials(study) if record.number == number]
    return found


def outage(tracker: JournalingTracker, folder: Path, run_id: str) -> str:
    """Write while the store is away: the end of one trial, and all of another."""
    (folder / "made").mkdir(exist_ok=True)
    (folder / "made" / "file.txt").write_text("kept")
    tracker.log_epochs(run_id, [(2, {"train/loss": 0.5}, 2)])
    tracker.finish_trial(run_id, "complete", {"best/val_accuracy": 0.5}, {"a": "tag"}, folder / "made")
    other = tracker.start_trial("s", "Other", {"lr": "1"}, {"trial_number": "1", "fingerprint": "f"})
    tracker.log_dataset(other, "shapes", "digest", {"train": 3}, "drawn")
    tracker.log_epochs(other, [(1, {"train/loss": 1.0}, 1)])
    return other


def check(tracker: MlflowTracker) -> None:
    one, other = trial(tracker, 0), trial(tracker, 1)
    assert (one.outcome, one.status, one.metrics["best/val_accuracy"], one.tags["a"]) == (
        *("complete", "FINISHED"),
        *(0.5, "tag"),
    )
    assert tracker.artifact(one.run_id, "file.txt").read_text() == "kept"
    steps = [metric.step for metric in tracker.client.get_metric_history(one.run_id, "train/loss")]
    assert steps == [1, 2] and other.params["lr"] == "1" and tracker.last_epoch(other.run_id) == 1


@pytest.mark.slow  # MLflow waits 20 s for the lock at every write
def test_a_database_that_another_process_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_LOCK_SECONDS", 0)
    inner = MlflowTracker(str(tmp_path / "mlflow.db"), create=True)
    notes: list[str] = []
    tracker = JournalingTracker(inner, Journal(tmp_path / "j"), notes.append, patience=60)
    tracker.start_study("s", "A study", {})
    run_id = tracker.start_trial("s", "One", {}, {"trial_number": "0"})
    tracker.log_epochs(run_id, [(1, {"train/loss": 1.0}, 1)])
    with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        other = outage(tracker, tmp_path, run_id)
        assert other.startswith("local-") and "database is locked" in notes[0] and tracker.waiting == 5
        assert not tracker.replay()
    assert tracker.replay() and "is back" in notes[-1]
    check(inner)
    tracker.log_epochs(other, [(2, {"train/loss": 0.5}, 2)])
    assert inner.last_epoch(trial(inner, 1).run_id) == 2


def server(folder: Path, port: int) -> AbstractContextManager[str]:
    """A real MLflow server with stores of its own; killed at the end."""
    arguments = [
        "server",
        "--host",
        "127.0.0.1",
        "--workers",
        "1",
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
    ]
    arguments += ["--artifacts-destination", str(folder / "a")]
    return answering([sys.executable, "-m", "mlflow", *arguments], folder / "server.log", port, end=signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_server_that_goes_away_and_comes_back(tmp_path: Path) -> None:
    port = free_port()
    notes: list[str] = []
    with server(tmp_path, port) as address:
        inner = MlflowTracker(address)
        tracker = JournalingTracker(inner, Journal(tmp_path / "j"), notes.append)
        tracker.start_study("s", "A study", {"rows": []})
        run_id = tracker.start_trial("s", "One", {}, {"trial_number": "0"})
        tracker.log_epochs(run_id, [(1, {"train/loss": 1.0}, 1)])
    begun = time.monotonic()
    outage(tracker, tmp_path, run_id)
    assert time.monotonic() - begun < 20 and tracker.waiting == 5 and not tracker.replay()
    said: list[str] = []
    tracker.say_what_waits("s", said.append)
    assert said == [
        f"5 writes of study s not in the tracking store yet, but in {tmp_path / 'j'}; "
        "bring them there with: caltech-sweep replay"
    ]
    with server(tmp_path, port) as address:
        again = JournalingTracker(MlflowTracker(address), Journal(tmp_path / "j"), notes.append)
        assert again.replay() and "is back" in notes[-1]
        check(MlflowTracker(address))


def test_replay_and_doctor_bring_what_waits(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from caltech_sweep.tracking.journal import journal_folder

    assert "there is no" not in invoke("replay").output
    assert invoke("run", "tiny", "--in-process", "--threads", "1", "--row", "First").exit_code == 0
    root, uri = place.resolve() / "mlruns", stores.tracking_store()
    run_id = None
    for command in (("replay",), ("doctor", "--fix")):
        tracker = MlflowTracker()
        study = tracker.study("tiny")
        assert study is not None
        run_id = tracker.trials(study)[0].run_id
        Journal(journal_folder(root, "tiny", uri)).add("log_params", {"run_id": run_id, "params": {command[0]: "1"}})
        looked = invoke("doctor")
        assert looked.exit_code == 1 and "would fix: 1 write in" in looked.output
        assert invoke(*command).exit_code == 0
        assert tracker.client.get_run(run_id).data.params[command[0]] == "1"
    assert "nothing waits" in invoke("replay").output and invoke("doctor").exit_code == 0
