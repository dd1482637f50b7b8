"""A study that is killed again and again ends as if nothing had happened; ``make chaos`` is the long form."""

from __future__ import annotations

import multiprocessing
import os
import random
import sqlite3
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from helpers import chaos

TRIALS = 5


def run_here(place: Path) -> None:
    """Run the study in this process, which is about to be killed."""
    from caltech_sweep.cli import main

    os.setsid()
    os.chdir(place)
    with (place / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 2)
        main(["run", "killed", "--in-process", "--threads", "1"])


@pytest.fixture
def start() -> Callable[[Path], BaseProcess]:
    """Start processes that have imported everything already: kills then meet work, not imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["caltech_sweep.sweep.session", "caltech_sweep.report.build", "matplotlib.figure"])
    context.Process(target=os.getpid).start()

    def run(place: Path) -> BaseProcess:
        process = context.Process(target=run_here, args=(place,))
        process.start()
        return process

    return run


def wait_for_a_line(process: BaseProcess, place: Path) -> None:
    log = place / "log.txt"
    before = log.stat().st_size if log.exists() else 0
    while process.is_alive() and not (log.exists() and log.stat().st_size > before):
        time.sleep(0.01)


def damage(place: Path) -> None:
    """Do to the stores what each check looks for."""
    with sqlite3.connect(place / "mlruns" / "mlflow.db") as mlflow:
        mlflow.execute("UPDATE runs SET status = 'RUNNING'")
        mlflow.execute("UPDATE tags SET value = 0 WHERE key = 'trial_number'")
        columns = "key, value, run_uuid, step, is_nan, timestamp"
        mlflow.execute(f"INSERT INTO metrics ({columns}) SELECT {columns} + 1 FROM metrics")
        mlflow.execute("DELETE FROM params")
        mlflow.execute("DELETE FROM inputs")
    with sqlite3.connect(place / "mlruns" / "optuna.db") as optuna:
        optuna.execute("UPDATE trials SET state = 'WAITING', number = number + 1")
        optuna.execute("UPDATE trial_user_attributes SET value_json = 1")


@pytest.mark.slow
@pytest.mark.parametrize("search", [chaos.LEARNING, chaos.PAUSING], ids=["pruning", "pausing"])
def test_a_study_killed_at_random_instants_reports_what_an_undisturbed_one_does(
    search: str, start: Callable[[Path], BaseProcess], tmp_path: Path
) -> None:
    chance, kills = random.Random(5), 0
    trials, epochs = (9, 4) if search == chaos.PAUSING else (TRIALS, 2)
    whole, killed = (chaos.furnish(tmp_path / name, search, trials, epochs) for name in ("whole", "killed"))
    process = start(whole)
    wait_for_a_line(process, whole)
    begun = time.monotonic()
    process.join(120)
    took = time.monotonic() - begun
    assert process.exitcode == 0, (whole / "log.txt").read_text()
    for number in range(5):
        process = start(killed)
        if number:  # the first kill meets the stores as they are made
            wait_for_a_line(process, killed)
        process.join(chance.uniform(0.1, 0.4) * took)
        if process.exitcode == 0:
            break
        process.kill()
        process.join()
        kills += 1
    process = start(killed)
    process.join(120)
    log = (killed / "log.txt").read_text()
    assert process.exitcode == 0 and kills >= 3 and "Traceback" not in log, log
    assert "it waits again" in log
    assert chaos.check_stores(killed, trials) == []
    reports = [chaos.read_reports(place, chaos.report_in_process) for place in (whole, killed)]
    assert reports[1] == reports[0]
    if search == chaos.PAUSING:
        assert "Paused: " in reports[0]
    else:
        assert "trial-004" in reports[0]
    damage(killed)
    found = "\n".join(chaos.check_stores(killed, trials))
    assert all(what in found for what in (*chaos.MLFLOW_CHECKS, *chaos.OPTUNA_CHECKS, f"not 0 to {trials - 1}")), found
