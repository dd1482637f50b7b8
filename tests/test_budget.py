"""Budgets: a study ends within its epochs or hours, over all its runs, and goes on where it stopped with more."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from caltech_sweep.config import TrialConfig
from caltech_sweep.study.definition import Choices, Component, Range, Row, StudyDefinition
from caltech_sweep.sweep.executors.base import Epoch
from caltech_sweep.sweep.optuna_store import MEMORY, open_study
from caltech_sweep.testing import MemoryTracker, Script, ScriptedExecutor, scripted_coordinator
from caltech_sweep.tracking.reader import open_reader
from helpers.places import Cli

DEFINITION = StudyDefinition(
    name="s",
    title="A study",
    trials=8,
    dataset={"name": "shapes"},
    fixed={"epochs": 4},
    space={"lr": Range(1e-3, 1.0, log=True)},
    rows=(Row("One", {"lr": 0.1}), Row("Two", {"lr": 0.2})),
    sampler=Component("tpe", {"seed": 1, "startup_trials": 3}),
)


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(ScriptedExecutor):
    """A scripted executor in which each poll, an epoch of every running trial, takes ``seconds``."""

    def __init__(self, clock: Clock, seconds: float, slots: int = 1) -> None:
        super().__init__(slots=slots)
        self.clock, self.seconds = clock, seconds

    def poll(self, timeout: float) -> list:
        events = super().poll(timeout)
        trained = any(isinstance(event, Epoch) for event in events)
        self.clock.now += self.seconds * trained
        return [
            replace(e, metrics={**e.metrics, "epoch_seconds": self.seconds}) if isinstance(e, Epoch) else e
            for e in events
        ]


class Stores:
    """A study store and a tracking store in memory, which several runs of a study use one after the other."""

    def __init__(self, folder: Path) -> None:
        self.tracker, self.folder, self.lines = MemoryTracker(), folder, list[str]()
        self.study: optuna.Study | None = None

    def run(self, definition: StudyDefinition, executor: ScriptedExecutor, clock: Clock | None = None):
        self.study = self.study or open_study(definition, MEMORY, definition.identity())
        self.lines.clear()
        options = {"clock": clock} if clock else {}
        return scripted_coordinator(
            definition, executor, self.tracker, self.folder, self.study, write=self.lines.append, **options
        ).run()

    @property
    def trained(self) -> int:
        """How many epochs the tracking store has; scripted trials share none."""
        return sum(len(run.history) for run in self.tracker.runs.values())

    def spent(self, what: str) -> float:
        return sum(run.metrics[f"spent/{what}"] for run in self.tracker.runs.values())

    def settings(self) -> list[object]:
        assert self.study is not None
        return [trial.user_attrs["config"] for trial in self.study.trials if "config" in trial.user_attrs]


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("epochs, trials", [(7, 1), (8, 2), (21, 5), (31, 7), (32, 8), (99, 8)])
def test_a_trial_starts_only_where_its_epochs_fit(tmp_path: Path, epochs: int, trials: int, slots: int) -> None:
    stores = Stores(tmp_path)
    summary = stores.run(replace(DEFINITION, budget={"epochs": epochs}), ScriptedExecutor(slots=slots))
    assert summary.outcomes == {"complete": trials} and summary.complete
    assert stores.trained == stores.spent("epochs") == 4 * trials
    assert [run.name for run in stores.tracker.runs.values()][:2] == ["One", "Two"][:trials]
    assert any(line.startswith("the study ends within its budget") for line in stores.lines) == (trials < 8)
    assert not any(trial.state == TrialState.RUNNING for trial in stores.study.trials)  # type: ignore[union-attr]


def test_it_says_what_it_would_do_with_more_and_does_that_with_the_budget_that_it_names(tmp_path: Path) -> None:
    stores = Stores(tmp_path)
    stores.run(replace(DEFINITION, budget={"epochs": 6}), ScriptedExecutor())
    assert stores.lines[-1] == (
        "the study ends within its budget, with 4 of 6 epochs spent; with more it would train 1 trial that waits and "
        "6 sampled trials, at most 28 epochs: run it again with --budget epochs=32"
    )
    assert stores.run(replace(DEFINITION, budget={"epochs": 31}), ScriptedExecutor()).outcomes == {"complete": 6}
    assert stores.run(replace(DEFINITION, budget={"epochs": 32}), ScriptedExecutor()).outcomes == {"complete": 1}
    assert "budget" not in stores.lines[-1] and stores.trained == 32


def test_a_study_that_goes_on_with_more_samples_what_it_would_have_sampled(tmp_path: Path) -> None:
    def script(config: TrialConfig) -> Script:
        return Script([0.2, 0.3, 0.4, 0.9 - abs(config.lr - 0.05)])

    whole, parts = Stores(tmp_path / "whole"), Stores(tmp_path / "parts")
    whole.run(DEFINITION, ScriptedExecutor(script))
    for epochs in (3, 10, 17, 18, 29, 32):
        parts.run(replace(DEFINITION, budget={"epochs": epochs}), ScriptedExecutor(script))
        assert parts.trained <= epochs
    assert parts.settings() == whole.settings() and len(whole.settings()) == 8
    assert [t.value for t in parts.study.trials] == [t.value for t in whole.study.trials]  # type: ignore[union-attr]


def test_epochs_that_a_pruner_or_early_stopping_saves_are_spent_on_other_trials(tmp_path: Path) -> None:
    definition = replace(
        DEFINITION,
        early_stopping={"patience": 1},
        budget={"epochs": 22},  # the last one has to fit with all its four epochs
    )
    stores = Stores(tmp_path)  # each epoch gives 0.5: sampled trials end after the second one
    assert stores.run(definition, ScriptedExecutor()).outcomes == {"complete": 8}
    assert stores.spent("epochs") == 2 * 4 + 6 * 2


def test_what_a_failed_or_repeated_training_took_is_spent(tmp_path: Path) -> None:
    stores = Stores(tmp_path)
    rows = replace(DEFINITION, trials=1, rows=DEFINITION.rows[:1], budget={"epochs": 11})
    executor = ScriptedExecutor(Script(deaths=2))
    assert stores.run(rows, executor).outcomes == {"interrupted": 1}  # it was trained twice, and a third time in part
    assert stores.spent("epochs") == 11
    assert stores.run(replace(rows, budget={"epochs": 14}), ScriptedExecutor()).outcomes == {}
    assert stores.run(replace(rows, budget={"epochs": 15}), ScriptedExecutor()).outcomes == {"complete": 1}
    assert stores.spent("epochs") == 15


@pytest.mark.parametrize("slots", [1, 2])
def test_hours_count_the_clock_on_the_wall_of_all_runs(tmp_path: Path, slots: int) -> None:
    clock, stores = Clock(), Stores(tmp_path)
    for hours, complete in ((1.0, 3 * slots), (1.5, 1 * slots), (1.5, 0)):  # each trial takes 20 minutes
        definition = replace(DEFINITION, trials=20, budget={"hours": hours})
        executor = Timed(clock, 300.0, slots)
        assert stores.run(definition, executor, clock).outcomes == ({"complete": complete} if complete else {})
        clock.now += 7200  # between the runs
        assert stores.spent("seconds") <= hours * 3600 + 1e-6
    assert stores.spent("seconds") == pytest.approx(1200 * 4)
    assert stores.lines[-1].startswith("the study ends within its budget, with 1.33 of 1.5 hours spent")


def test_a_trial_that_takes_longer_than_was_measured_is_interrupted_and_goes_on(tmp_path: Path) -> None:
    clock, stores = Clock(), Stores(tmp_path)
    definition = replace(DEFINITION, budget={"hours": 1})
    summary = stores.run(definition, Timed(clock, 1000.0), clock)
    assert summary.outcomes == {"interrupted": 1} and summary.complete  # nothing was measured before the first trial
    (run,) = stores.tracker.runs.values()
    assert (run.status, run.tags["outcome"]) == ("KILLED", "interrupted")
    assert stores.run(replace(definition, budget={"hours": 3}), Timed(clock, 1000.0), clock).outcomes["complete"] >= 1
    assert run.tags["outcome"] == "complete"


def test_both_limits_hold_at_once(tmp_path: Path) -> None:
    clock, stores = Clock(), Stores(tmp_path)
    budget: dict[str, float] = {"epochs": 12, "hours": 100}
    assert stores.run(replace(DEFINITION, budget=budget), Timed(clock, 1.0), clock).outcomes == {"complete": 3}
    budget = {"epochs": 100, "hours": 17 / 3600}
    assert stores.run(replace(DEFINITION, budget=budget), Timed(clock, 1.0), clock).outcomes == {"complete": 1}


def test_confirmations_count(tmp_path: Path) -> None:
    stores = Stores(tmp_path)
    definition = replace(DEFINITION, trials=3, budget={"epochs": 18})
    study = open_study(definition, MEMORY, definition.identity())
    coordinator = scripted_coordinator(definition, ScriptedExecutor(), stores.tracker, tmp_path, study)
    assert coordinator.run(confirm=1).outcomes == {"complete": 4}  # three trials, and one of three repeats
    assert stores.trained == 16


def _names(trials: Sequence[optuna.trial.FrozenTrial]) -> list[str]:
    return [trial.user_attrs.get("row", "sampled") for trial in trials]


def test_rows_come_first_even_where_only_a_sampled_trial_would_fit(tmp_path: Path) -> None:
    rows = (Row("Long", {"lr": 0.1, "epochs": 30}), Row("Short", {"lr": 0.1, "epochs": 2}))
    definition = replace(
        DEFINITION, rows=rows, fixed={}, space={**DEFINITION.space, "epochs": Choices((2, 4))}, budget={"epochs": 29}
    )
    stores = Stores(tmp_path)
    assert stores.run(definition, ScriptedExecutor()).outcomes == {}
    assert _names(stores.study.trials) == ["Long", "Short"]  # type: ignore[union-attr]
    assert "2 trials that wait and 6 sampled trials, at most 56 epochs" in stores.lines[-1]


SHARING = """\
title: Epochs that trials share
dataset: {name: shapes, resize: 32, crop: 32, classes: 3, images_per_class: 8}
trials: 4
sampler: {name: random, seed: 0}
fixed: {arch: squeezenet1_1, batch_size: 8, step_size: 9, epochs: 2}
space: {lr: {low: 1e-3, high: 1e-1, log: true}}
budget: {epochs: 3}
rows:
  - {name: Short, set: {lr: 0.01, epochs: 2}}
  - {name: Long, set: {lr: 0.01, epochs: 3}}
  - {name: Views, set: {lr: 0.01, epochs: 3, test_views: tencrop}}
"""


def spent(place: Path) -> dict[str, tuple[float, str, float]]:
    """Return the epochs that each trial has spent, its outcome, and the seconds that it ran."""
    reader = open_reader(f"sqlite:///{place / 'mlruns' / 'mlflow.db'}")
    assert reader.names() == ["sharing"]
    trials = reader.studies(["sharing"])[0].trials
    return {t.name: (t.metrics["spent/epochs"], t.outcome, t.metrics["spent/seconds"]) for t in trials}


@pytest.mark.slow
def test_epochs_that_are_shared_are_not_spent_in_real_stores(cli: Cli, place: Path) -> None:
    (place / "sweeps" / "sharing.yaml").write_text(SHARING, encoding="utf-8")
    options = ("--in-process", "--threads", "1", "--device", "cpu")
    first = cli("run", "sharing", *options)
    assert first.exit_code == 0, first.output
    assert {name: trial[:2] for name, trial in spent(place).items()} == {
        "Long": (3, "complete"),  # first, since most of it is shared
        "Short": (0, "complete"),
        "Views": (0, "complete"),
    }  # eight epochs were requested, and three are spent
    assert (
        "the study ends within its budget, with 3 of 3 epochs spent; with more it would train 1 trial that waits, at "
        "most 2 epochs: run it again with --budget epochs=5" in first.output
    )
    assert (
        "budget: 5 epochs, 3 spent; that is enough for all trials"
        in cli("plan", "sharing", "--threads", "1", "--device", "cpu", "--budget", "epochs=5").output
    )
    assert cli("run", "sharing", *options, "--budget", "epochs=4").exit_code == 0
    assert len(spent(place)) == 3
    assert cli("run", "sharing", *options, "--budget", "epochs=5").exit_code == 0
    assert spent(place)["trial-003"][:2] == (2, "complete")
    assert cli("doctor", "sharing").exit_code == 0


@pytest.mark.slow
def test_a_killed_process_has_spent_what_it_trained(place: Path) -> None:
    """A study is killed in its first trial; a new process has a second more than was spent, too little for the rest."""
    text = SHARING.replace("epochs: 2}}", "epochs: 1500}}").replace("epochs: 3}}", "epochs: 2000}}")
    (place / "sweeps" / "sharing.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "caltech_sweep", "run", "sharing", "--threads", "1", "--device", "cpu", "--budget"]
    process = subprocess.Popen([*command, "hours=1"], cwd=place)
    for _ in range(1800):
        time.sleep(0.1)
        if (place / "mlruns" / "mlflow.db").is_file():
            with closing(sqlite3.connect(place / "mlruns" / "mlflow.db")) as store, suppress(sqlite3.OperationalError):
                if store.execute("SELECT COUNT(*) FROM latest_metrics WHERE key = 'spent/seconds'").fetchone()[0]:
                    break
    process.kill()
    process.wait()
    ((epochs, _, seconds),) = spent(place).values()
    assert epochs >= 1 and seconds > 1
    done = subprocess.run([*command, f"hours={(seconds + 1) / 3600}"], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0 and "the study ends within its budget" in done.stderr
    assert f"with {seconds / 3600:.2f} of" in done.stderr and "started" not in done.stderr  # by the epoch measured
    assert [trial[0::2] for trial in spent(place).values()] == [(epochs, seconds)]
