"""Every row and every sampled setting on each fold in turn, as one line of the table."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from caltech_sweep.study.file import load_study
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.places import Cli

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


@pytest.mark.slow
def test_a_study_that_stopped_trains_the_folds_that_are_missing(study: Path, cli: Cli) -> None:
    assert (
        cli("run", "folds", "--in-process", "--threads", "1", "--set", "dataset.fold=1", "--name", "x").exit_code == 0
    )
    assert cli("run", "folds", "--in-process", "--threads", "1", "--trials", "1").exit_code == 0
    ran = cli("run", "folds", "--in-process", "--threads", "1")
    assert "study folds: 3 complete" in ran.output
