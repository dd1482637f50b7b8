"""What a trial costs the coordinator: a trial of 30 epochs that computes nothing, and Optuna + MLflowCallback.

    python benchmarks/overhead.py [--trials 20]

Both sides run the same number of trials on SQLite stores in a temporary folder, one after the other in turn, and
log the same seven metrics an epoch. The peer logs them as its users do: ``mlflow.log_metrics`` once an epoch inside
``track_in_mlflow``. Ours runs the real coordinator with its real stores, artifacts and datasets; only the training
is scripted. Many slots, servers and memory: benchmarks/scale.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

from caltech_sweep.study.definition import Component
from caltech_sweep.sweep.optuna_store import open_study
from caltech_sweep.testing import ScriptedExecutor, cost_study, epoch_metrics, scripted_coordinator
from caltech_sweep.tracking.writer import MlflowTracker

EPOCHS = 30


def ours(folder: Path, trials: int, pruner: Component | None) -> float:
    """Return seconds a trial."""
    definition = cost_study(trials, EPOCHS, pruner)
    tracker = MlflowTracker(str(folder / "mlflow.db"), create=True)
    study = open_study(definition, f"sqlite:///{folder / 'optuna.db'}", definition.identity())
    coordinator = scripted_coordinator(definition, ScriptedExecutor(), tracker, folder, study)
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


def main() -> None:
    """Print the medians of three rounds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    options = parser.parse_args()
    trials = options.trials
    warnings.simplefilter("ignore")
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
