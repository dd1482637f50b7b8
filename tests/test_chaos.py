"""A study that is killed again and again ends as if nothing had happened; ``make chaos`` is the long form."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from helpers import chaos
from helpers.places import ran, sql
from helpers.servers import gated_mlflow, postgres

pytestmark = pytest.mark.slow
TRIALS, EPOCHS = 5, 2


Start = Callable[..., BaseProcess]  # from a place and options of the command


def run_here(place: chaos.Place, arguments: list[str]) -> None:
    """Run a command in this process, which is about to be killed."""
    from caltech_sweep.cli import main
    from caltech_sweep.sweep import lease

    lease.LEASE_SECONDS = chaos.LEASE
    os.setsid()
    os.chdir(place.folder)
    os.environ.update(place.environment())
    with place.log.open("a") as log:
        os.dup2(log.fileno(), 2)
        main(arguments)


@pytest.fixture
def start() -> Start:
    """Start processes that have imported everything already: kills then meet work, not imports."""
    context = multiprocessing.get_context("forkserver")
    modules = ("sweep.session", "report.build", "training.results")  # all that a run in one process imports
    context.set_forkserver_preload([*(f"caltech_sweep.{name}" for name in modules), "matplotlib.figure"])
    context.Process(target=os.getpid).start()

    def run(place: chaos.Place, *options: str) -> BaseProcess:
        process = context.Process(target=run_here, args=(place, place.run("--in-process", *options)))
        process.start()
        return process

    return run


def size(place: chaos.Place) -> int:
    return place.log.stat().st_size if place.log.exists() else 0


def wait_for(process: BaseProcess, place: chaos.Place, text: str = "\n", before: int = 0) -> None:
    """Wait until a process has said something in its log, after what was there before."""
    while process.is_alive() and text not in (place.log.read_text()[before:] if place.log.exists() else ""):
        time.sleep(0.01)


def ended(process: BaseProcess, place: chaos.Place, code: int = 0) -> str:
    """Wait for the end of a process; return the log, in which there is no traceback."""
    process.join(120)
    said = place.log.read_text()
    assert process.exitcode == code and "Traceback" not in said, said
    return said


def report(place: chaos.Place, study: str = "killed") -> str:
    return chaos.read_reports(place, chaos.report_in_process, study)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a study to which nothing happens."""
    place = chaos.furnish(tmp_path_factory.mktemp("undisturbed") / "place", chaos.LEARNING, TRIALS, EPOCHS)
    ran(place.folder, *place.run("--in-process"))
    whole = report(place)
    assert "trial-004" in whole and chaos.check_stores(place, TRIALS) == []
    return whole


def damage(place: chaos.Place) -> None:
    """Do to the stores what each check looks for."""
    columns = "key, value, run_uuid, step, is_nan, timestamp"
    sql(
        place.folder,
        "mlflow.db",
        "UPDATE runs SET status = 'RUNNING'",
        "UPDATE tags SET value = 0 WHERE key = 'trial_number'",
        f"INSERT INTO metrics ({columns}) SELECT {columns} + 1 FROM metrics",
        "DELETE FROM params",
        "DELETE FROM inputs",
    )
    sql(
        place.folder,
        "optuna.db",
        "UPDATE trials SET state = 'WAITING', number = number + 1",
        "UPDATE trial_user_attributes SET value_json = 1",
    )


@pytest.mark.parametrize("search", [chaos.LEARNING, chaos.PAUSING], ids=["pruning", "pausing"])
def test_a_study_killed_at_random_instants_reports_what_an_undisturbed_one_does(
    search: str, start: Start, tmp_path: Path
) -> None:
    chance, kills = random.Random(5), 0
    trials, epochs = (9, 4) if search == chaos.PAUSING else (TRIALS, EPOCHS)
    whole, killed = (chaos.furnish(tmp_path / name, search, trials, epochs) for name in ("whole", "killed"))
    process = start(whole)
    wait_for(process, whole)
    begun = time.monotonic()
    ended(process, whole)
    took = time.monotonic() - begun
    for number in range(5):
        before = size(killed)
        process = start(killed)
        if number:  # the first kill meets the stores as they are made
            wait_for(process, killed, before=before)
        process.join(chance.uniform(0.1, 0.4) * took)
        if process.exitcode == 0:
            break
        process.kill()
        process.join()
        kills += 1
    log = ended(start(killed), killed)
    assert kills >= 3 and "it waits again" in log
    assert chaos.check_stores(killed, trials) == []
    assert report(killed) == report(whole)
    if search == chaos.PAUSING:
        assert "Paused: " in report(whole)
    else:
        assert "trial-004" in report(whole)
    damage(killed)
    found = "\n".join(chaos.check_stores(killed, trials))
    assert all(what in found for what in (*chaos.MLFLOW_CHECKS, *chaos.OPTUNA_CHECKS, f"not 0 to {trials - 1}")), found


def test_a_second_user_of_the_tracking_store_is_refused_or_has_a_study_of_their_own(
    start: Start, undisturbed: str, tmp_path: Path
) -> None:
    mine = chaos.furnish(tmp_path / "mine", chaos.LEARNING, TRIALS, EPOCHS)
    first = start(mine)
    wait_for(first, mine, "started")
    theirs = mine.beside()
    assert first.is_alive()
    said = ended(start(theirs), theirs, code=2)
    assert said.count("belongs to another study store") == 1 and "--name" in said
    assert not (theirs.folder / "mlruns").exists()
    own = start(theirs, "--name", "theirs")
    wait_for(own, theirs, "started")
    first.kill()  # if it is still at work
    first.join()
    again = start(mine)
    ended(own, theirs)
    ended(again, mine)
    assert report(mine) == undisturbed and report(theirs, "theirs") == undisturbed
    for place in (mine, theirs):
        said = ran(place.folder, "doctor", *(("--tracking-uri", place.tracking) if place.tracking else ()))
        assert "0 found, 0 fixed" in said


def test_a_tracking_server_that_refuses_for_a_while_again_and_again_changes_no_report(
    start: Start, undisturbed: str, tmp_path: Path
) -> None:
    chance, tally = random.Random(0), chaos.Tally()
    place = chaos.furnish(tmp_path / "place", chaos.LEARNING, TRIALS, EPOCHS)
    (place.folder / "mlruns").mkdir()
    with gated_mlflow(place.folder / "mlruns") as gate:
        place = replace(place, tracking=gate.address)
        for _ in range(4):
            before = size(place)
            process = start(place)
            wait_for(process, place, "started", before)
            for _ in range(2):
                if process.is_alive():
                    chaos.refuse_for_a_while(gate, chance, tally)
                    process.join(chance.uniform(0, 0.5))
            if process.exitcode == 0:
                break
            process.kill()
            process.join()
        ended(start(place), place)
        assert report(place) == undisturbed
    assert tally.closed and chaos.check_stores(place, TRIALS) == []
    assert not list((place.folder / "mlruns").glob("journal/*"))


def test_a_process_that_wakes_after_another_took_its_study_over_changes_no_report(
    start: Start, undisturbed: str, tmp_path: Path
) -> None:
    chance = random.Random(0)
    with postgres() as server:
        stores = {"tracking": server.create("mlflow"), "storage": server.create("optuna")}
        place = replace(chaos.furnish(tmp_path / "place", chaos.LEARNING, TRIALS, EPOCHS), **stores)
        sites, last = [place, place.beside()], place
        stopped = start(place)
        wait_for(stopped, place, "started")
        for turn in (1, 2, 3):
            here, there = sites[(turn - 1) % 2], sites[turn % 2]
            stopped.join(chance.uniform(0, 0.5))
            if not stopped.is_alive():
                break
            os.kill(stopped.pid or 0, signal.SIGSTOP)
            time.sleep(chaos.LEASE + 0.5)
            before = size(there)
            other = start(there)
            wait_for(other, there, "started", before)
            os.kill(stopped.pid or 0, signal.SIGCONT)
            said = ended(stopped, here, code=1)
            assert "was taken over by process" in "".join(said.splitlines()[-3:]), said
            stopped, last = other, there
        assert turn > 1
        ended(stopped, last)
        assert chaos.check_stores(place, TRIALS) == [] and report(place) == undisturbed
