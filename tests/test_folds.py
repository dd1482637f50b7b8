"""Every row and every sampled setting on each fold in turn, as one line of the table."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from caltech_sweep.config import TrialConfig
from caltech_sweep.study.definition import Component, in_fold
from caltech_sweep.study.file import load_study
from caltech_sweep.sweep.optuna_store import MEMORY, open_study
from caltech_sweep.sweep.queue import enqueue_confirmations
from caltech_sweep.testing import MemoryTracker, Script, ScriptedExecutor, run_scripted
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.places import Cli
from helpers.searches import EPOCHS, PRUNERS, ROWS, SEARCH, curve, seed_of, suggest

STUDY = """\
title: Folds
dataset: {name: shapes, resize: 32, crop: 32, classes: 3, images_per_class: 8, folds: 3}
trials: 2
sampler: {name: random, seed: 0}
fixed: {arch: squeezenet1_1, batch_size: 8, epochs: 1}
space:
  lr: {low: 1e-3, high: 1e-2, log: true}
rows:
  - {name: Row, set: {lr: 0.01}}
"""


@pytest.fixture
def study(place: Path) -> Path:
    (place / "sweeps" / "folds.yaml").write_text(STUDY)
    return place


def test_a_row_takes_each_fold_and_after_the_last_the_next_seed(study: Path) -> None:
    definition = load_study("folds", replicates=2)
    configs = [definition.row_config(definition.rows[0], number) for number in range(definition.trainings)]
    assert [(config.dataset.fold, config.seed) for config in configs] == [(f, s) for s in (0, 1) for f in (1, 2, 3)]
    one = load_study("folds", ["dataset.fold=2"])
    assert one.trainings == 1 and one.config({}).dataset.fold == 2
    whole = load_study("folds", ["dataset.folds=1"])
    assert whole.row_config(whole.rows[0]).dataset.fold is None


def test_rows_and_sampled_trials_are_trained_on_every_fold_and_shown_as_their_mean(study: Path, cli: Cli) -> None:
    planned = cli("plan", "folds")
    assert planned.exit_code == 0 and "rows: 3 epochs requested, 3 to train" in planned.output
    ran = cli("run", "folds", "--in-process", "--threads", "1")
    assert ran.exit_code == 0 and "study folds: 6 complete" in ran.output, ran.output
    assert cli("run", "folds", "--in-process").output.count("nothing to do") == 1
    tracker = MlflowTracker(None)
    record = tracker.study("folds")
    assert record is not None
    runs = tracker.trials(record)
    by_kind = {kind: [run for run in runs if (run.row is not None) == kind] for kind in (True, False)}
    for kind in (True, False):
        assert sorted(run.params["dataset.fold"] for run in by_kind[kind]) == ["1", "2", "3"]
        assert len({run.params["lr"] for run in by_kind[kind]}) == 1
    means = {kind: statistics.fmean(run.metrics["best/val_accuracy"] for run in by_kind[kind]) for kind in by_kind}
    best = tracker.best_trial("folds")  # of the setting with the best mean, whichever fold is the best of all
    assert means[best.row is not None] == max(means.values())
    rows = json.loads(cli("report", "folds", "--format", "json").output)[0]["rows"]
    for row, kind in zip(rows, (True, False), strict=True):
        scores = [run.metrics["best/val_accuracy"] for run in by_kind[kind]]
        assert row["seeds"] == 3 and row["val_accuracy"] == pytest.approx(statistics.fmean(scores), abs=1e-6)
        assert row["val_deviation"] == pytest.approx(statistics.stdev(scores), abs=1e-6)
    table = cli("report", "folds").output
    assert "Rows with n trainings on 3 folds of the training and validation images" in table and "(n = 3)" in table
    assert cli("doctor", "folds").exit_code == 0
    again = cli("plan", "folds")
    assert "0 to train" in again.output and "sampled trials: " not in again.output.split("0 to train")[0]


SEARCHED = replace(
    SEARCH,
    trials=16,
    dataset={"name": "shapes", "folds": 3},
    sampler=Component("tpe", {"seed": 3, "startup_trials": 5}),
)


def fold_curve(config: TrialConfig) -> list[float]:
    """Return a curve that other folds make better or worse, each setting in its own way."""
    fold = config.dataset.fold or 0
    return [value * (1 + 0.2 * math.sin(1000 * config.lr * fold)) for value in curve(config)]


@pytest.mark.parametrize("pruner", [None, "median"])
def test_the_sampler_learns_the_mean_over_folds_and_the_pruner_compares_first_folds(pruner: str | None) -> None:
    """Held against Optuna's own loop, whose objective is the mean."""
    definition = replace(SEARCHED, pruner=Component(pruner, PRUNERS[pruner][0]) if pruner else None)
    executor = ScriptedExecutor(lambda config: Script(fold_curve(config)))
    run_scripted(definition, executor, MemoryTracker())
    ours = [job.config for job in executor.jobs if job.config.dataset.fold == 1]
    study = optuna.create_study(direction="maximize", pruner=PRUNERS["median"][1]() if pruner else None)
    for row in ROWS:
        study.enqueue_trial(dict(row.settings))
    study.pruner = study.pruner if pruner else optuna.pruners.NopPruner()
    number, theirs, states = 0, [], set()
    for place in range(SEARCHED.trials):
        study.sampler = optuna.samplers.TPESampler(seed=seed_of(number), n_startup_trials=5)
        trial = study.ask()
        config = in_fold(replace(suggest(trial), dataset=definition.config({}).dataset), 1)
        pruned = False
        for epoch, value in enumerate(fold_curve(config), 1):
            trial.report(value, epoch)
            pruned = bool(pruner) and place >= len(ROWS) and epoch < EPOCHS and trial.should_prune()
            if pruned:
                break
        mean = statistics.fmean(max(fold_curve(in_fold(config, fold))) for fold in (1, 2, 3))
        state = TrialState.PRUNED if pruned else TrialState.COMPLETE
        study.tell(trial, None if pruned else mean, state=state)
        number = 3 * len(ROWS) if place == len(ROWS) - 1 else number + (1 if pruned or place < len(ROWS) else 3)
        theirs.append(config)
        states.add(state)
    assert ours == theirs and len(states) == (2 if pruner else 1)


def test_the_best_mean_is_confirmed_on_every_fold() -> None:
    study = open_study(SEARCHED, MEMORY, SEARCHED.identity())
    executor = ScriptedExecutor(lambda config: Script(fold_curve(config)))
    run_scripted(SEARCHED, executor, MemoryTracker(), study)
    enqueue_confirmations(study, SEARCHED, 1, 2)
    waiting = [t.user_attrs["config"] for t in study.get_trials(states=(TrialState.WAITING,))]
    assert [(c["seed"], c["dataset"]["fold"]) for c in waiting] == [(s, f) for s in (1, 2) for f in (1, 2, 3)]
    sampled = {job.config.lr for job in executor.jobs[3 * len(ROWS) :]}
    means = {
        lr: statistics.fmean(max(fold_curve(job.config)) for job in executor.jobs if job.config.lr == lr)
        for lr in sampled
    }
    assert {config["lr"] for config in waiting} == {max(means, key=lambda lr: means[lr])}


@pytest.mark.slow
def test_a_study_that_stopped_trains_the_folds_that_are_missing(study: Path, cli: Cli) -> None:
    assert (
        cli("run", "folds", "--in-process", "--threads", "1", "--set", "dataset.fold=1", "--name", "x").exit_code == 0
    )
    assert cli("run", "folds", "--in-process", "--threads", "1", "--trials", "1").exit_code == 0
    ran = cli("run", "folds", "--in-process", "--threads", "1")
    assert "study folds: 3 complete" in ran.output
