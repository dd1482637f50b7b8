"""What a trial costs the coordinator and its worker, counted in statements and bytes rather than in seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa

from caltech_sweep.study.definition import Component
from caltech_sweep.sweep import queue, recorder
from caltech_sweep.sweep.executors.base import Event, Job
from caltech_sweep.sweep.optuna_store import open_study
from caltech_sweep.testing import MemoryTracker, ScriptedExecutor, cost_study, scripted_coordinator
from caltech_sweep.tracking.writer import MlflowTracker

MEDIAN = Component("median", {"startup_trials": 1, "warmup_epochs": 1})


def statements(folder: Path, epochs: int, pruner: Component | None) -> int:
    """Return how many statements a study of three trials takes in both stores."""
    definition = cost_study(3, epochs, pruner)
    folder.mkdir()
    tracker = MlflowTracker(str(folder / "mlflow.db"), create=True)
    study = open_study(definition, f"sqlite:///{folder / 'optuna.db'}", definition.identity())
    coordinator = scripted_coordinator(definition, ScriptedExecutor(), tracker, folder, study)
    seen: list[str] = []

    def note(connection: object, cursor: object, statement: str, *more: object) -> None:
        seen.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        assert coordinator.run().outcomes == {"complete": 3}
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    assert [len(trial.intermediate_values) for trial in study.trials] == [epochs if pruner else 0] * 3
    return len(seen)


@pytest.mark.parametrize("pruner", [None, MEDIAN], ids=["no pruner", "median"])
def test_fast_epochs_cost_no_statements_of_their_own(
    tmp_path: Path, pruner: Component | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "REPORT_SECONDS", 60.0)  # all of a trial's epochs, however slow the machine
    monkeypatch.setattr(recorder, "FLUSH_SECONDS", 60.0)
    few, many = (statements(tmp_path / str(epochs), epochs, pruner) for epochs in (4, 60))
    assert few == many


@pytest.mark.parametrize("seconds", [-1.0, 60.0])
def test_the_study_store_hears_of_an_epoch_within_the_seconds_that_it_may_wait(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "REPORT_SECONDS", seconds)
    definition = cost_study(1, 3, MEDIAN)
    address = f"sqlite:///{tmp_path / 'optuna.db'}"
    study = open_study(definition, address, definition.identity())
    stored = optuna.load_study(study_name=definition.name, storage=address)
    seen: list[dict[int, float]] = []

    class Watching(ScriptedExecutor):
        def submit(self, job: Job) -> None:
            seen.append(stored.trials[0].intermediate_values)
            super().submit(job)

        def answer(self, job: int, go_on: bool) -> None:
            seen.append(stored.trials[0].intermediate_values)
            super().answer(job, go_on)

    scripted_coordinator(
        definition, Watching(), MlflowTracker(str(tmp_path / "mlflow.db"), create=True), tmp_path, study
    ).run()
    assert [len(values) for values in seen] == ([0, 1, 2, 3] if seconds < 0 else [0, 0, 0, 0])
    assert stored.trials[0].intermediate_values == {1: 0.5, 2: 0.5, 3: 0.5}


@pytest.mark.parametrize(("slots", "most"), [(1, 0.03), (50, 0.15)])
def test_logging_the_epochs_of_many_slots_leaves_the_coordinator_most_of_its_time(
    slots: int, most: float, tmp_path: Path
) -> None:
    now = logging = 0.0

    class Slow(MemoryTracker):
        def log_epochs(self, *arguments: Any) -> None:
            nonlocal now, logging
            now, logging = now + 0.1, logging + 0.1
            super().log_epochs(*arguments)

    class EpochsOfASecond(ScriptedExecutor):
        def poll(self, timeout: float) -> list[Event]:
            nonlocal now
            now += 1.0
            return super().poll(timeout)

    tracker, definition = Slow(), cost_study(slots, 200)
    scripted_coordinator(definition, EpochsOfASecond(slots=slots), tracker, tmp_path, clock=lambda: now).run()
    assert 0 < logging / now < most
    record = tracker.study("cost")
    assert record is not None and len(tracker.trials(record)) == slots


TRIALS = """
import shutil
from dataclasses import replace
from pathlib import Path
from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.sweep.executors.base import Epoch, Job
from caltech_sweep.sweep.executors.worker import train
from caltech_sweep.testing import resident_bytes
from caltech_sweep.training.keys import CacheOptions

shapes = DatasetConfig(name="shapes", resize=32, crop=32, classes=3, images_per_class=4)
config = TrialConfig(dataset=shapes, arch="mobilenet_v3_small", epochs=1, batch_size=4, augment=("hflip", "rotation"))
for number in range({trials}):
    if number == 20:
        print(resident_bytes() / 1e6)
    folder = Path("trial")
    folder.mkdir()
    job = Job(number, replace(config, seed=number), folder, stages=CacheOptions(Path("cache").resolve(), 10**8))
    assert sum(isinstance(event, Epoch) for event in train(job)) == 1 and any(folder.iterdir())
    shutil.rmtree(folder)
print(resident_bytes() / 1e6)
"""


@pytest.mark.slow
def test_the_memory_of_a_worker_does_not_grow_with_its_trials(tmp_path: Path) -> None:
    run = [sys.executable, "-c", TRIALS.replace("{trials}", "80")]
    warm, last = map(float, subprocess.run(run, cwd=tmp_path, check=True, stdout=subprocess.PIPE).stdout.split())
    assert last - warm < 15, (warm, last)  # MB: one copy of the weights a trial would be 370
