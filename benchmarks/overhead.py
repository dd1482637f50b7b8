"""What a trial costs the coordinator: a trial of 30 epochs that computes nothing, and Optuna + MLflowCallback.

    python benchmarks/overhead.py [--trials 20]
    python benchmarks/overhead.py --memory 2000

Both sides run the same number of trials on SQLite stores in a temporary folder, one after the other in turn, and
log the same seven metrics an epoch. The peer logs them as its users do: ``mlflow.log_metrics`` once an epoch inside
``track_in_mlflow``. Ours runs the real coordinator with its real stores, artifacts and datasets; only the training
is scripted. With --memory it runs so many of our trials, and says what the coordinator has in memory meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from caltech_sweep.study.definition import Component, Range, StudyDefinition
from caltech_sweep.sweep.coordinator import Coordinator
from caltech_sweep.sweep.executors.base import Job
from caltech_sweep.sweep.optuna_store import open_study
from caltech_sweep.sweep.progress import PlainProgress
from caltech_sweep.sweep.queue import QueuedTrial, TrialQueue
from caltech_sweep.sweep.recorder import DatasetInfo, Recorder
from caltech_sweep.testing import ScriptedExecutor, epoch_metrics
from caltech_sweep.tracking.writer import MlflowTracker

EPOCHS = 30
DEFINITION = StudyDefinition(
    name="overhead",
    title="Overhead",
    trials=1,
    dataset={"name": "shapes"},
    fixed={"epochs": EPOCHS},
    space={"lr": Range(1e-3, 1e-1, log=True), "step_size": Range(5, 30, integer=True)},
    rows=(),
    sampler=Component("random", {"seed": 0}),
)


def ours(folder: Path, trials: int, pruner: Component | None, ended: Callable[[], None] = lambda: None) -> float:
    """Return seconds a trial; ``ended`` is called after each."""
    definition = replace(DEFINITION, trials=trials, pruner=pruner)
    tracker = MlflowTracker(str(folder / "mlflow.db"), create=True)
    study = open_study(definition, f"sqlite:///{folder / 'optuna.db'}", definition.identity())
    progress = PlainProgress(lambda line: None)
    images = DatasetInfo("digest", {"train": 3856, "val": 1928, "test": 2893}, "benchmark", 101)

    def make_job(queued: QueuedTrial) -> Job:
        return Job(queued.number, queued.config, folder / str(queued.number), wait_each_epoch=queued.prunable)

    queue, recorder = TrialQueue(definition, study), Recorder(tracker, definition, images, progress.note)
    coordinator = Coordinator(queue, recorder, ScriptedExecutor(), progress, make_job, ended=ended)
    start = time.perf_counter()
    coordinator.run()
    return (time.perf_counter() - start) / trials


def peer(folder: Path, trials: int) -> float:
    """Return seconds a trial of Optuna with its MLflow callback."""
    import mlflow
    import optuna
    from optuna_integration.mlflow import MLflowCallback

    callback = MLflowCallback(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", metric_name="val/accuracy")
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'optuna.db'}", study_name="overhead", sampler=optuna.samplers.RandomSampler(0)
    )

    @callback.track_in_mlflow()
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("lr", 1e-3, 1e-1, log=True)
        trial.suggest_int("step_size", 5, 30)
        for epoch in range(1, EPOCHS + 1):
            mlflow.log_metrics(epoch_metrics(0.5), step=epoch)
        return 0.5

    study.optimize(objective, n_trials=1, callbacks=[callback])  # creates the stores, which is not counted
    start = time.perf_counter()
    study.optimize(objective, n_trials=trials, callbacks=[callback])
    return (time.perf_counter() - start) / trials


def resident() -> float:
    """Return the megabytes that this process has in memory, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory(trials: int) -> None:
    """Print what the coordinator has in memory after every tenth of some trials."""
    counts = itertools.count(1)

    def ended() -> None:
        number = next(counts)
        if number % (trials // 10) == 0:
            print(f"after {number:,} trials: {resident():.0f} MB", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        ours(Path(folder), trials, None, ended)


def main() -> None:
    """Print the medians of three rounds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--memory", type=int, metavar="TRIALS")
    options = parser.parse_args()
    trials = options.trials
    warnings.simplefilter("ignore")
    if options.memory:
        memory(options.memory)
        return
    median = Component("median", {"startup_trials": 1, "warmup_epochs": 15})
    sides = {
        "caltech-sweep": lambda folder: ours(folder, trials, None),
        "caltech-sweep, median pruner": lambda folder: ours(folder, trials, median),
        "Optuna + MLflowCallback": lambda folder: peer(folder, trials),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(3):
        for name, side in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds[name].append(side(Path(folder)))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        ratio = value / medians["Optuna + MLflowCallback"]
        print(f"{name:30} {value:.3f} s a trial, {ratio:.2f} of Optuna + MLflowCallback")
    print(f"other work on the machine: load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
