"""Working folders with a study that trains in a second, and commands run in them."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

TINY = """\
title: A tiny study
dataset: {name: shapes, resize: 32, crop: 32, classes: 3, images_per_class: 8}
trials: 3
sampler: {name: random, seed: 0}
fixed: {arch: squeezenet1_1, batch_size: 8, epochs: 2}
space:
  lr: {low: 1e-3, high: 1e-1, log: true}
rows:
  - name: First
    set: {lr: 0.05}
    reference: {val_accuracy: 0.5, test_accuracy: 0.5, best_epoch: 2}
  - name: Views
    set: {lr: 0.01, test_views: tencrop, augment: [hflip]}
"""
Cli = Callable[..., Result]


def furnish(folder: Path) -> Path:
    """Put ``sweeps/tiny.yaml`` into a folder."""
    (folder / "sweeps").mkdir()
    (folder / "sweeps" / "tiny.yaml").write_text(TINY, encoding="utf-8")
    return folder


def ran(folder: Path, *arguments: str) -> str:
    """Run a command in a folder, with no other place in the environment, for a fixture; return what it said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MLFLOW_TRACKING_URI", "CALTECH101_ROOT", "CALTECH_SWEEP_DATA"):
            patch.delenv(name, raising=False)
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
    return result.output


def invoke(*arguments: str) -> Result:
    """Run a ``caltech-sweep`` command in this process; a traceback fails the test."""
    from caltech_sweep.cli import main

    result = CliRunner().invoke(main, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def clone(source: Path, target: Path) -> None:
    """Copy a working folder; the stages, large and never changed in place, are linked."""

    def copy(one: str, other: str) -> None:
        (os.link if one.endswith("data") else shutil.copy2)(one, other)

    shutil.copytree(source, target, copy_function=copy)
    from caltech_sweep.tracking.writer import MlflowTracker

    tracker = MlflowTracker(str(target / "mlruns" / "mlflow.db"))
    for record in tracker.studies():
        old = tracker.client.get_experiment(record.experiment_id).artifact_location
        tracker.move_artifacts(record.experiment_id, old, (target / "mlruns" / "artifacts" / record.name).as_uri())


RUN = ("run", "tiny", "--in-process", "--threads", "1")


def sql(place: Path, file: str, *statements: str) -> None:
    with closing(sqlite3.connect(place / "mlruns" / file)) as connection, connection:
        for statement in statements:
            connection.execute(statement)
