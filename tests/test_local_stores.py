"""Stores that are kept on the local disk and copied to a mount: what the mount has at any moment, and who goes on."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from caltech_sweep.errors import StoreError, UsageError
from caltech_sweep.stores import study_store, tracking_store
from caltech_sweep.sweep.local_stores import LocalStores
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.kernel import mounted_without_shared_memory
from helpers.places import RUN, invoke

LOCAL = ("--local-stores", "local")


def rows(file: Path) -> list[int]:
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return [row[0] for row in database.execute("SELECT n FROM t ORDER BY n")]


def add(file: Path, *numbers: int) -> None:
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE IF NOT EXISTS t (n)")
        database.executemany("INSERT INTO t VALUES (?)", [(number,) for number in numbers])


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    (tmp_path / "mount").mkdir()
    return tmp_path / "mount"


def local_stores(mount: Path, folder: Path) -> LocalStores:
    return LocalStores(tracking_store(f"{mount}/mlflow.db"), study_store(f"{mount}/optuna.db"), folder)


def file_of(local: LocalStores) -> Path:
    assert local.storage.file is not None
    return local.storage.file


def test_a_snapshot_is_whole_in_one_file_while_others_have_the_store_open(mount: Path, tmp_path: Path) -> None:
    local = local_stores(mount, tmp_path / "disk")
    local.restore(print)
    file = file_of(local)
    add(file, 1, 2)
    with closing(sqlite3.connect(file, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO t VALUES (3)")
        local.save(print)  # what is not committed is not in it
    assert [path.name for path in mount.iterdir()] == ["optuna.db"] and rows(mount / "optuna.db") == [1, 2]
    written = (mount / "optuna.db").stat()
    local.save(print)
    assert (mount / "optuna.db").stat() == written  # nothing is new


def test_the_next_machine_starts_from_the_mount_and_the_same_one_from_what_it_has(mount: Path, tmp_path: Path) -> None:
    told: list[str] = []
    first = local_stores(mount, tmp_path / "first")
    first.restore(told.append)
    file = file_of(first)
    add(file, 1)
    first.save(told.append)
    add(file, 2)  # and the process is killed
    local_stores(mount, tmp_path / "first").restore(told.append)
    assert rows(file) == [1, 2] and not told
    second = local_stores(mount, tmp_path / "second")
    second.restore(told.append)
    other = file_of(second)
    assert rows(other) == [1]
    add(other, 3)
    second.save(told.append)
    assert rows(mount / "optuna.db") == [1, 3] and not told
    with pytest.raises(StoreError, match=r"optuna.db was changed by another process while .* results are in .*first"):
        first.save(told.append)
    assert rows(mount / "optuna.db") == [1, 3]
    local_stores(mount, tmp_path / "first").restore(told.append)
    assert rows(file) == [1, 3] and len(told) == 1
    (aside,) = (tmp_path / "first").glob("optuna-*.1")
    assert str(aside) in told[0] and rows(aside / "optuna.db") == [1, 2]


KILLED = """
import os, signal, sys
from pathlib import Path
from caltech_sweep.stores import study_store, tracking_store
from caltech_sweep.sweep.local_stores import LocalStores
mount = Path(sys.argv[1])
local = LocalStores(tracking_store(f"{mount}/mlflow.db"), study_store(f"{mount}/optuna.db"), Path(sys.argv[2]))
calls = int(sys.argv[3])
def count(event, arguments):
    global calls
    if event in ("open", "os.rename", "os.link") and (str(mount) in str(arguments) or "base" in str(arguments)):
        calls -= 1
        if calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
local.save(print)
"""


def test_a_process_may_be_killed_at_any_moment_of_a_copy(mount: Path, tmp_path: Path) -> None:
    local = local_stores(mount, tmp_path / "disk")
    local.restore(print)
    file = file_of(local)
    add(file, 0)
    local.save(print)
    for step in range(1, 100):
        add(file, step)
        arguments = [sys.executable, "-c", KILLED, str(mount), str(tmp_path / "disk"), str(step - 1)]
        killed = subprocess.run(arguments).returncode == -signal.SIGKILL
        assert rows(mount / "optuna.db") in ([*range(step)], [*range(step + 1)])
        again, told = local_stores(mount, tmp_path / "disk"), []
        again.restore(told.append)
        assert not told and rows(file) == [*range(step + 1)]
        again.save(print)
        assert rows(mount / "optuna.db") == [*range(step + 1)]
        if not killed:
            break
    assert step > 4 and not killed


def test_a_mount_that_takes_nothing_is_said_once_and_caught_up_with(small_disk: Path, tmp_path: Path) -> None:
    local, told = local_stores(small_disk, tmp_path / "own"), []
    local.restore(told.append)
    file = file_of(local)
    add(file, 1)
    local.save(told.append)
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(1 << 20)) == 1 << 20:
            pass
    add(file, *range(2, 20_000))
    local.save(told.append)
    local.save(told.append)
    assert len(told) == 1 and "could not be copied to" in told[0] and "No space left" in told[0]
    assert rows(small_disk / "optuna.db") == [1]
    (small_disk / "filler").unlink()
    local.save(told.append)
    assert len(told) == 1 and len(rows(small_disk / "optuna.db")) == 19_999


def test_stores_on_servers_have_no_file_to_copy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="both stores are on servers"):
        LocalStores(tracking_store("http://localhost:5000"), study_store("postgresql+psycopg://localhost/x"), tmp_path)


@pytest.mark.slow
def test_a_study_on_local_stores_is_on_the_mount_and_goes_on_from_it_elsewhere(place: Path) -> None:
    assert invoke(*RUN, *LOCAL, "--row", "First").exit_code == 0
    left = sorted(path.name for path in (place / "mlruns").iterdir())
    assert left == ["artifacts", "locks", "mlflow.db", "optuna.db"]
    result = invoke(*RUN, "--local-stores", "disk of another machine")
    assert result.exit_code == 0 and "study tiny: 2 complete" in result.output, result.output
    assert "nothing to do" in invoke(*RUN).output  # also without local stores
    assert invoke("doctor").output == "1 study examined: 0 found, 0 fixed\n"
    tracker = MlflowTracker()
    study = tracker.study("tiny")
    assert study is not None and tracker.status(study.run_id) == "FINISHED"
    for trial in tracker.trials(study):
        assert tracker.checked_artifact(trial.run_id, "config.yaml").is_relative_to(place / "mlruns")
    assert "0.5" in invoke("report", "tiny").output


def examined(*stores: str) -> str:
    """Return what the doctor says in a new process: this one has had files open that were replaced since."""
    command = [sys.executable, "-m", "caltech_sweep", "doctor", *stores]
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_a_study_that_is_killed_with_its_disk_goes_on_from_the_last_snapshot(place: Path) -> None:
    command = [sys.executable, "-m", "caltech_sweep", "run", "tiny", "--threads", "1", "--set", "epochs=40", *LOCAL]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=place, start_new_session=True) as process:
        assert process.stderr is not None
        # The second trial may begin before the first has ended; what is said after that end comes after the snapshot.
        for said in ("[0] First: complete", "[1] Views: epoch"):
            next(line for line in process.stderr if said in line)
        os.killpg(process.pid, signal.SIGKILL)
    shutil.rmtree(place / "local")
    tracker = MlflowTracker()
    study = tracker.study("tiny")
    assert study is not None and [t.outcome for t in tracker.trials(study) if t.name == "First"] == ["complete"]
    result = invoke(*RUN, "--set", "epochs=40", *LOCAL)
    assert result.exit_code == 0 and "study tiny: 2 complete" in result.output, result.output
    assert examined() == "1 study examined: 0 found, 0 fixed\n"


@pytest.mark.slow
def test_a_study_on_a_mount_without_shared_memory(place: Path) -> None:
    with mounted_without_shared_memory(place) as mount:
        paths = ("--tracking-uri", str(mount / "mlflow.db"), "--storage", str(mount / "optuna.db"))
        plain = invoke(*RUN, *paths, "--row", "First")
        assert plain.exit_code == 0 and "no write-ahead log" in plain.output
        local = invoke(*RUN, *paths, *LOCAL)
        assert local.exit_code == 0 and "no write-ahead log" not in local.output and "2 complete" in local.output
        assert examined(*paths) == "1 study examined: 0 found, 0 fixed\n"
