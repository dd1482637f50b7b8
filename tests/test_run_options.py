"""Every option of ``run`` through the command line: one test for each, by its name in click's own list of options."""

from __future__ import annotations

import multiprocessing.process
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from PIL import Image

from caltech_sweep.cli import main
from caltech_sweep.tracking.records import TrialRecord
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.datasets import draw
from helpers.marks import slow_but
from helpers.places import RUN, invoke

FIRST = (*RUN, "--row", "First", "--set", "epochs=1")
OPTIONS = {str(p.name): p for p in main.commands["run"].params if isinstance(p, click.Option)}


def trials(study: str = "tiny", store: str | None = None) -> list[TrialRecord]:
    tracker = MlflowTracker(store)
    found = tracker.study(study)
    assert found is not None
    return tracker.trials(found)


def run(*arguments: str, says: str = "1 complete") -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0 and says in result.output, result.output
    return result.output


def overrides(place: Path) -> None:
    run(*RUN, "--row", "First", "--set", "epochs=1", "--set", "momentum=0.5")
    assert [(t.params["epochs"], t.params["momentum"]) for t in trials()] == [("1", "0.5")]


def trials_in_total(place: Path) -> None:
    run(*RUN, "--trials", "2", "--set", "epochs=1", says="2 complete")
    assert [t.row for t in trials()] == ["First", "Views"]  # and none that was sampled
    assert invoke(*RUN, "--trials", "0").exit_code == 2


def data(place: Path) -> None:
    for name in ("cat", "dog"):
        (place / "own" / name).mkdir(parents=True)
        for index in range(12):
            Image.new("RGB", (40, 40), (index * 20, 0, 0)).save(place / "own" / name / f"{index}.png")
    run(*FIRST, "--set", "dataset.name=folder", "--set", "dataset.classes=null", "--data", "own")
    (trial,) = trials()
    assert "cat/" in MlflowTracker().artifact(trial.run_id, "predictions/test.csv").read_text()


def name(place: Path) -> None:
    run(*FIRST, "--name", "other")
    assert MlflowTracker().study("tiny") is None and len(trials("other")) == 1


def namespace(place: Path) -> None:
    run(*FIRST, "--namespace", "ana")
    assert MlflowTracker().study("tiny") is None and len(trials("ana/tiny")) == 1


def budget(place: Path) -> None:
    run(*RUN, "--set", "epochs=1", "--budget", "epochs=2", says="the study ends within its budget, with 2 of 2 epochs")
    assert [t.row for t in trials()] == ["First", "Views"]


def tracking_uri(place: Path) -> None:
    run(*FIRST, "--tracking-uri", "else/mlflow.db")
    assert len(trials(store="else/mlflow.db")) == 1
    assert (place / "mlruns" / "optuna.db").exists() and not (place / "mlruns" / "mlflow.db").exists()


def storage(place: Path) -> None:
    run(*FIRST, "--storage", "else/optuna.db")
    assert (place / "else" / "optuna.db").exists() and not (place / "mlruns" / "optuna.db").exists()


def adopt(place: Path) -> None:
    run(*FIRST)
    (place / "mlruns" / "optuna.db").unlink()
    refused = invoke(*FIRST)
    assert refused.exit_code == 2 and "--adopt" in refused.output
    run(*FIRST, "--adopt", says="nothing to do")
    assert len(trials()) == 1


def _two_at_a_time(*options: str) -> None:
    said = run("run", "tiny", "--threads", "1", "--trials", "2", *options, says="2 complete")
    order = re.findall(r"(First|Views): (started|.*complete)", said)
    assert {name for name, _ in order[:2]} == {"First", "Views"}, said


def workers(place: Path) -> None:
    _two_at_a_time("--workers", "2")


def per_device(place: Path) -> None:
    _two_at_a_time("--per-device", "2", "--device", "cpu")


def together(place: Path) -> None:
    heads = ("--set", "freeze=conv", "--set", "augment=[]", "--set", "arch=resnet18", "--set", "epochs=2")
    _two_at_a_time("--together", "2", *heads)
    assert [t.tags["trained_together"] for t in trials()] == ["2", "2"]
    plan = ("plan", "tiny", "--threads", "1", "--trials", "2", *heads, "--name", "other")
    assert "epochs requested, 0 to train" in invoke(*plan, "--together", "2").output
    assert "epochs requested, 0 to train" not in invoke(*plan).output  # the states of one are not the other's
    for executor in (("--in-process",), ("--executor", "ray")):
        refused = invoke(*FIRST[:2], *executor, "--together", "2")
        assert refused.exit_code == 2 and "--together: is for worker processes of this machine" in refused.output


def device(place: Path) -> None:
    refused = invoke(*FIRST, "--device", "cuda:99")
    assert refused.exit_code == 2 and "'cuda:99' cannot be used" in refused.output
    run(*FIRST, "--device", "cpu")
    assert trials()[0].tags["environment.device"] == "cpu"


def threads(place: Path) -> None:
    few = ("--set", "epochs=1", "--set", "dataset.images_per_class=2", "--set", "batch_size=6")
    run("run", "tiny", "--in-process", "--row", "First", *few, "--threads", "2")
    assert trials()[0].tags["environment.threads"] == "2"


def rows(place: Path) -> None:
    run(*RUN, "--set", "epochs=1", "--row", "Views")
    assert [t.row for t in trials()] == ["Views"]
    run(*RUN, "--set", "epochs=1", "--row", "Views", "--row", "First")
    assert {t.row for t in trials()} == {"First", "Views"}


def replicates(place: Path) -> None:
    run(*FIRST, "--replicates", "2", says="2 complete")
    assert [t.row for t in trials()] == ["First", "First"] and len({t.params["seed"] for t in trials()}) == 2


def confirm(place: Path) -> None:
    run(*RUN, "--set", "epochs=1", "--confirm", "1", says="6 complete")
    repeated = [t for t in trials() if "confirms" in t.tags]
    assert {t.tags["confirms"] for t in repeated} == {"2"} and len({t.params["seed"] for t in repeated}) == 3


def reuse(place: Path) -> None:
    for name, option, reused in (("a", "--reuse", "0"), ("b", "--reuse", "1"), ("c", "--no-reuse", "0")):
        run(*FIRST, "--name", name, option)
        assert trials(name)[0].tags["reuse.epochs_reused"] == reused


def cache_size(place: Path) -> None:
    run(*FIRST, "--cache-size", "0")
    assert not list(place.rglob("stage-*"))
    run(*FIRST, "--name", "other", "--cache-size", "0.1")
    assert list(place.rglob("stage-*"))


def local_stores(place: Path) -> None:
    run(*FIRST, "--local-stores", "disk")
    assert list((place / "disk").glob("mlflow-*/mlflow.db")) and list((place / "disk").glob("optuna-*/optuna.db"))
    assert [trial.outcome for trial in trials()] == ["complete"]  # where the stores usually are


def hang_timeout(place: Path) -> None:
    """A worker that was stopped is killed half a minute later, and its trial gets another one."""
    refused = invoke(*FIRST, "--hang-timeout", "5")
    assert refused.exit_code == 2 and "x>=30" in refused.output
    options = ("--hang-timeout", "30", "--workers", "1", "--threads", "1", "--row", "First", "--set", "epochs=100")
    command = [sys.executable, "-m", "caltech_sweep", "run", "tiny", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=place) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "/100, train loss" in line)
        found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True)
        (worker,) = map(int, found.stdout.split())
        os.kill(worker, signal.SIGSTOP)
        stopped = time.monotonic()
        said = process.stderr.read()
    assert process.returncode == 0 and time.monotonic() - stopped >= 30, said
    assert "its worker was unresponsive for 30 s and was killed" in said and "1 complete" in said, said


def max_failures(place: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, old[1]))  # no checkpoint can be written
    try:
        result = invoke(*RUN, "--set", "epochs=1", "--max-failures", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert result.exit_code == 1 and "raise --max-failures" in result.output, result.output
    assert len(trials()) == 2


def resume_trials(place: Path) -> None:
    study = place / "sweeps" / "tiny.yaml"
    study.write_text(study.read_text() + "pruner: {name: asha, min_epochs: 1, factor: 4}\n")
    run(*RUN, says="2 complete, 1 paused")
    run(*RUN, "--resume-trial", "2", says="study tiny: 1 complete")
    assert len(trials()) == 3


def in_process(place: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing.process.BaseProcess, "start", lambda self: pytest.fail("a process was started"))
        run(*FIRST)


def cache(place: Path) -> None:
    run(*FIRST, "--cache", "kept")
    assert list((place / "kept").glob("stage-*")) and not list((place / "data").rglob("stage-*"))
    run(*FIRST, "--name", "other", "--cache", (place / "bucket").as_uri())
    assert list((place / "data").rglob("stage-*"))  # and at the address, when it has been sent


def executor(place: Path) -> None:
    """What it does, and the options that go with it, is tested in test_ray.py."""
    refused = invoke(*FIRST, "--executor", "ray")
    assert refused.exit_code == 2 and "leave --in-process out" in refused.output
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALTECH_SWEEP_EXECUTOR", "ray")
        assert invoke(*FIRST).output == refused.output


def _of_a_cluster(option: str, value: str, wrong: str) -> None:
    refused = invoke(*FIRST, option, value)
    assert refused.exit_code == 2 and f"{option}: is for --executor ray" in refused.output
    assert invoke(*FIRST, option, wrong).exit_code == 2


def address(place: Path) -> None:
    _of_a_cluster("--address", "head:6379", "head")


def slots(place: Path) -> None:
    _of_a_cluster("--slots", "max", "0")
    assert "neither max nor a number" in invoke(*FIRST, "--slots", "many").output


def cpus_per_trial(place: Path) -> None:
    _of_a_cluster("--cpus-per-trial", "2", "0")


def gpus_per_trial(place: Path) -> None:
    _of_a_cluster("--gpus-per-trial", "0.5", "-1")


def upload_from_workers(place: Path) -> None:
    assert "--upload-from-workers: is for --executor ray" in invoke(*FIRST, "--upload-from-workers").output
    refused = invoke("run", "tiny", "--executor", "ray", "--upload-from-workers")
    assert refused.exit_code == 2 and "are kept on this machine" in refused.output


def verify(place: Path) -> None:
    """A file has changed and only its content tells: a start takes it as it was, and is refused once it is to look."""
    file = draw(place / "own", images=12) / "class 1" / "3.png"
    os.utime(file, (1_600_000_000, 1_600_000_000))
    own = (*FIRST, "--set", "dataset.name=folder", "--set", "dataset.classes=null", "--data", "own")
    run(*own)
    file.write_bytes(bytes(file.stat().st_size))
    os.utime(file, (1_600_000_000, 1_600_000_000))
    run(*own, says="nothing to do")
    refused = invoke(*own, "--verify")
    assert refused.exit_code == 2 and "changed without a new time of change" in refused.output


TESTS: dict[str, Callable[[Path], None]] = {
    **{"trials": trials_in_total},
    **{
        f.__name__: f
        for f in (overrides, data, name, namespace, tracking_uri, storage, adopt, workers, per_device, together, device)
    },
    **{f.__name__: f for f in (threads, rows, replicates, confirm, reuse, cache_size, hang_timeout, max_failures)},
    **{
        "in_process": in_process,
        "resume_trials": resume_trials,
        "local_stores": local_stores,
        "budget": budget,
        "verify": verify,
    },
    **{f.__name__: f for f in (cache, executor, address, slots, cpus_per_trial, gpus_per_trial, upload_from_workers)},
}
# These start workers, or train much.
SLOW = {
    "workers",
    "per_device",
    "together",
    "hang_timeout",
    "resume_trials",
    "threads",
    "confirm",
    "reuse",
    "rows",
    "cache_size",
}


def test_every_option_of_run_has_a_test_here() -> None:
    assert TESTS.keys() == OPTIONS.keys()


@pytest.mark.parametrize("option", slow_but(TESTS.keys() - SLOW, TESTS))
def test_an_option_of_run_does_what_it_says(option: str, place: Path) -> None:
    TESTS[option](place)


def test_a_plan_looks_into_the_stores_that_it_is_given(finished_place: Path, place: Path) -> None:
    theirs = finished_place / "mlruns"
    stores = ("--tracking-uri", str(theirs / "mlflow.db"), "--storage", str(theirs / "optuna.db"))
    there, here = invoke("plan", "tiny", *stores), invoke("plan", "tiny")
    assert there.exit_code == here.exit_code == 0
    assert "nothing to train" in there.output and "nothing to train" not in here.output
    assert re.search(r"First .*complete", there.output) and re.search(r"First .*to train", here.output)
    assert not (place / "mlruns").exists()
