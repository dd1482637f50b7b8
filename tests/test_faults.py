"""What goes wrong in trials, workers and files, and what becomes of the study: real faults wherever there are any."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from caltech_sweep.config import TrialConfig
from caltech_sweep.files import locked
from caltech_sweep.report.build import load_tables, render
from caltech_sweep.sweep.coordinator import Limits
from caltech_sweep.sweep.executors.base import Job
from caltech_sweep.testing import MemoryTracker, Script, ScriptedExecutor, run_scripted, scripted_coordinator
from helpers.places import invoke
from helpers.studies import DEFINITION, ROWS, new_study, records

ONE_ROW = replace(DEFINITION, trials=1, rows=ROWS[:1])
FOUR = [0.1, 0.2, 0.3, 0.4]


# -- failure classes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fails", "outcome"), [(1, "complete"), (2, "out_of_memory")])
def test_what_does_not_fit_is_tried_once_more_alone(fails: int, outcome: str) -> None:
    executor, tracker = ScriptedExecutor(Script(FOUR, failure="out_of_memory", fails=fails)), MemoryTracker()
    summary = run_scripted(ONE_ROW, executor, tracker)
    assert summary.outcomes == {outcome: 1} and [job.alone for job in executor.jobs] == [False, True]
    (run,) = tracker.runs.values()
    assert [epoch for epoch, _, _ in run.history] == [1, 2, 3, 4] and run.tags["attempt"] == "2"


@pytest.mark.parametrize(("hangs", "outcome"), [(2, "complete"), (3, "crashed")])
def test_a_trial_whose_worker_hangs_is_tried_again(hangs: int, outcome: str) -> None:
    executor, tracker = ScriptedExecutor(Script(FOUR, hangs=hangs)), MemoryTracker()
    summary = run_scripted(ONE_ROW, executor, tracker)
    assert summary.outcomes == {outcome: 1}
    if outcome == "crashed":
        (record,) = records(tracker)
        assert record.tags["reason"] == "its worker was unresponsive for 600 s and was killed 3 times"


def test_failures_in_a_row_stop_the_study_and_others_do_not(tmp_path: Path) -> None:
    ends = iter(["crashed", "data_error", None, "crashed", "data_error", "out_of_memory", None])

    def script(config: TrialConfig) -> Script:
        return Script([0.5], failure=failure) if (failure := next(ends)) else Script()

    tracker, study = MemoryTracker(), new_study()
    scripts: dict[TrialConfig, Script] = {}

    class Remembering(ScriptedExecutor):
        def submit(self, job: Job) -> None:
            scripts.setdefault(job.config, script(job.config))
            super().submit(job)

    executor = Remembering(lambda config: scripts[config])
    limits = Limits(failures_in_a_row=3)
    summary = scripted_coordinator(DEFINITION, executor, tracker, tmp_path, study, limits=limits).run()
    assert not summary.complete and len(study.trials) == 6 and summary.failures == 5
    assert summary.stopped == (
        "the study stopped after 3 consecutive failed trials, most recently trial-005 (scripted to be out_of_memory); "
        "fix the cause and run it again, or raise --max-failures"
    )
    assert tracker.statuses["s"] == "KILLED"


def test_trials_that_diverge_by_their_settings_never_stop_a_study() -> None:
    summary = run_scripted(DEFINITION, ScriptedExecutor(Script([0.5], failure="diverged")), MemoryTracker())
    assert summary.complete and summary.outcomes == {"diverged": 6} and summary.failures == 0


# -- disks -------------------------------------------------------------------------------------------------------------


def memory_in_use() -> int:
    """Return this process's address space in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def limited(place: Path, file_size: int | None, memory: int | None, arguments: tuple[str, ...]) -> None:
    """Run a command in this process.

    None of its files may grow beyond ``file_size`` bytes, a full disk for each, and it gets ``memory`` more bytes.
    """
    from caltech_sweep.cli import main

    os.chdir(place)
    with (place / "log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory_in_use() + memory,) * 2)
        main(list(arguments))


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def run_limited() -> Command:
    context = multiprocessing.get_context("forkserver")
    modules = ("sweep.session", "report.build", "training.results")  # all that a run in one process imports
    context.set_forkserver_preload([*(f"caltech_sweep.{name}" for name in modules), "matplotlib.figure"])

    def run(place: Path, file_size: int | None, memory: int | None = None, *more: str) -> tuple[int, str]:
        arguments = ("run", "tiny", "--in-process", "--threads", "1", *more)
        process = context.Process(target=limited, args=(place, file_size, memory, arguments))
        process.start()
        process.join(120)
        return process.exitcode or 0, (place / "log.txt").read_text()

    return run


def table(place: Path) -> list[tuple[object, ...]]:
    """Return what the report says of each trial's numbers, without the trials that stand below its table."""
    (read,) = load_tables(["tiny"], 9, str(place / "mlruns" / "mlflow.db"))
    rows = json.loads(render([read], "json"))[0]["rows"]
    return [(row["model"], row["state"], row["val_accuracy"], row["test_accuracy"], row["best_epoch"]) for row in rows]


@pytest.mark.slow
def test_a_full_disk_is_named_wherever_it_is_met_and_room_mends_it(
    place: Path, finished_place: Path, run_limited: Command
) -> None:
    code, said = run_limited(place, 400_000)  # the tables of the first store
    assert (
        code == 2 and "store" in said and "cannot be opened" in said and not (place / "mlruns" / "mlflow.db").exists()
    )
    code, said = run_limited(place, 2_500_000)  # the stages, then each checkpoint
    assert code == 1 and said.count("cannot be written") == 3 and "make room and run the study again" in said
    assert "study tiny: 3 crashed" in said
    assert "Traceback" not in said and {state for _, state, *_ in table(place)} == {"crashed"}
    code, said = run_limited(place, None)
    assert code == 0 and "study tiny: 3 complete" in said
    # The crashed sampled trial has a number of its own, so its successor samples other settings.
    assert [row for row in table(place) if "trial" not in str(row[0])] == [
        row for row in table(finished_place) if "trial" not in str(row[0])
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")
def test_a_batch_that_does_not_fit_is_tried_once_more_and_named(place: Path, run_limited: Command) -> None:
    size = [f"--set=dataset.{name}=64" for name in ("resize", "crop")]
    arguments = ["--set=arch=alexnet", *size, "--set=epochs=1", "--row", "First", "--no-reuse", "--device", "cpu"]
    code, said = run_limited(place, None, 500_000_000, *arguments)
    assert code == 1 and "Traceback" not in said, said
    assert "a batch of 8 images did not fit on cpu; retried with its device to itself" in said
    assert "study tiny: 1 out_of_memory" in said


@pytest.mark.slow
def test_artifacts_that_neither_store_nor_journal_takes_wait_for_the_next_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, small_disk: Path
) -> None:
    """The tracking store's whole disk is full: the study stops with a sentence, and goes on when there is room."""
    uri, storage = str(small_disk / "mlflow.db"), str(small_disk / "optuna.db")
    run = ("run", "tiny", "--in-process", "--threads", "1", "--tracking-uri", uri, "--storage", storage)
    run += ("--set", "arch=resnet18")
    result = invoke(*run)
    assert result.exit_code == 2 and "its journal" in result.output and "disk space" in result.output, result.output
    assert "Traceback" not in result.output
    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    result = invoke(*run)
    assert result.exit_code == 0 and "study tiny: 3 complete" in result.output, result.output
    looked = invoke("doctor", "--tracking-uri", uri, "--storage", storage)
    assert looked.exit_code == 0, looked.output


def test_what_a_killed_run_left_in_the_temporary_folder_goes_with_the_next(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, working, fresh = (tmp_path / f"caltech-sweep-run-{name}" for name in ("left", "working", "fresh"))
    for folder in (left, working, fresh):
        (folder / "3").mkdir(parents=True)
    for folder in (left, working):
        os.utime(folder, (0, 0))
    with locked(working) as held:
        assert held and invoke("run", "tiny", "--in-process", "--threads", "1").exit_code == 0
    assert sorted(tmp_path.glob("caltech-sweep-run-*")) == sorted([working, fresh])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    refused = invoke("run", "tiny", "--in-process", "--threads", "1")
    assert refused.exit_code == 2 and "temporary files cannot be written" in refused.output, refused.output


@pytest.mark.slow
def test_a_study_store_that_another_process_holds_is_waited_for(copied: Path) -> None:
    """MLflow's is in tests/test_journal.py: what it does not take goes to the journal."""
    run = ("run", "tiny", "--in-process", "--threads", "1")
    with closing(sqlite3.connect("mlruns/optuna.db", isolation_level=None, check_same_thread=False)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        timer, begun = threading.Timer(4, holder.rollback), time.monotonic()
        timer.start()
        result = invoke(*run, "--trials", "4")
        timer.join()
    assert result.exit_code == 0 and "study tiny: 1 complete" in result.output, result.output
    assert time.monotonic() - begun > 4


def test_a_store_that_can_only_be_read_still_has_its_tables(finished: Path, small_disk: Path) -> None:
    with closing(sqlite3.connect(finished / "mlruns" / "mlflow.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(finished / "mlruns" / "mlflow.db", small_disk / "mlflow.db")
    uri = ("--tracking-uri", str(small_disk / "mlflow.db"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    told = invoke("report", "tiny", *uri)
    assert told.exit_code == 0, told.output
    assert told.output == invoke("report", "tiny").output
    refused = invoke("predict", "x.png", *uri)
    assert refused.exit_code == 2 and f"its folder {small_disk} cannot be written" in refused.output, refused.output
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    (small_disk / "mlflow.db-wal").write_bytes(b"changes")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused = invoke("report", "tiny", *uri)
    assert refused.exit_code == 2 and "has changes in mlflow.db-wal" in refused.output, refused.output


def test_a_store_that_can_only_be_read_is_refused_before_anything_runs(place: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    uri = str(small_disk / "mlflow.db")
    for stores in (("--tracking-uri", uri), ("--storage", str(small_disk / "optuna.db"))):
        result = invoke("run", "tiny", "--in-process", "--threads", "1", *stores)
        assert result.exit_code == 2 and f"{small_disk} cannot be written" in result.output, result.output
