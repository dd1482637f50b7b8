"""A whole study with reuse on and off: the same report, the same weights, fewer epochs trained."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import caltech_sweep
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.places import invoke

STUDY = """\
title: Reuse
dataset: {name: shapes, resize: 36, crop: 32, classes: 3, images_per_class: 8}
trials: 4
fixed: {arch: resnet18, batch_size: 8, lr: 0.02, gamma: 0.5}
rows:
  - {name: Trunk, set: {step_size: 2, epochs: 4}}
  - {name: Branch, set: {step_size: 3, epochs: 4}}
  - {name: Views, set: {step_size: 2, epochs: 4, test_views: tencrop}}
  - {name: Frozen, set: {step_size: 2, epochs: 2, freeze: conv}}
"""


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The Markdown report of the study, run with and without reuse, without what names a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "reuse.yaml").write_text(STUDY, encoding="utf-8")
    texts = {}
    for switch in ("--reuse", "--no-reuse"):
        stores = ("--tracking-uri", f"{switch[2:]}/mlflow.db")
        options = ("--storage", f"{switch[2:]}/optuna.db", "--in-process", "--threads", "1")
        result = invoke("run", "reuse", switch, *stores, *options)
        assert result.exit_code == 0, result.output
        texts[switch] = re.sub(r"\b[0-9a-f]{8}\b", "RUN", invoke("report", "reuse", *stores).output)
    return texts


def tags_of(store: str) -> dict[str, tuple[str, str]]:
    tracker = MlflowTracker(f"{store}/mlflow.db")
    study = tracker.study("reuse")
    assert study is not None
    return {t.name: (t.tags["reuse.epochs_reused"], t.tags["reuse.epochs_trained"]) for t in tracker.trials(study)}


@pytest.mark.slow
def test_reuse_changes_no_figure_and_trains_less(reports: dict[str, str], tmp_path: Path) -> None:
    assert reports["--reuse"] == reports["--no-reuse"]
    assert "| Trunk " in reports["--reuse"]
    assert tags_of("reuse") == {"Trunk": ("0", "4"), "Branch": ("2", "2"), "Views": ("4", "0"), "Frozen": ("0", "2")}
    assert tags_of("no-reuse") == {
        "Trunk": ("0", "4"),
        "Branch": ("0", "4"),
        "Views": ("0", "4"),
        "Frozen": ("0", "2"),
    }
    shown = invoke("cache").output
    assert "stage-" in shown and "features-" in shown
    assert "freed" in invoke("cache", "--clear").output and "stage-" not in invoke("cache").output
    tracker = MlflowTracker("reuse/mlflow.db")
    study = tracker.study("reuse")
    assert study is not None
    for trial in tracker.trials(study):  # each trial shows its whole curve
        steps = [metric.step for metric in tracker.client.get_metric_history(trial.run_id, "val/accuracy")]
        assert steps == list(range(1, int(trial.params["epochs"]) + 1))


def test_more_epochs_of_a_finished_row_train_only_what_is_new(cli, place: Path) -> None:
    run = ("run", "tiny", "--row", "First", "--in-process", "--threads", "1")
    assert cli(*run).exit_code == 0
    study = place / "sweeps" / "tiny.yaml"
    study.write_text(study.read_text().replace("set: {lr: 0.05}", "set: {lr: 0.05, epochs: 4}"), encoding="utf-8")
    plan = cli("plan", "tiny", "--threads", "1").output
    assert re.search(r"First +4 +96 +724,035 +2 +to train", plan), plan
    assert cli(*run).exit_code == 0
    tracker = MlflowTracker()
    record = tracker.study("tiny")
    assert record is not None
    tags = [trial.tags for trial in tracker.trials(record)]
    assert [(t["reuse.epochs_reused"], t["reuse.epochs_trained"]) for t in tags] == [("0", "2"), ("2", "2")]


HEIR = """\
title: Heir
dataset: {name: shapes, resize: 32, crop: 32, classes: 3, images_per_class: 8}
trials: 1
fixed: {arch: squeezenet1_1, batch_size: 8, epochs: 2, weights: "study:tiny"}
rows:
  - {name: Heir, set: {lr: 0.01}}
"""


def test_plan_finds_the_weights_of_another_study_in_the_store_that_it_is_given(cli, place: Path) -> None:
    (place / "sweeps" / "heir.yaml").write_text(HEIR, encoding="utf-8")
    here = ("--tracking-uri", "other/mlflow.db")
    run = (*here, "--storage", "other/optuna.db", "--in-process", "--threads", "1")
    assert cli("run", "tiny", "--row", "First", *run).exit_code == 0
    assert cli("run", "heir", *run).exit_code == 0
    plan = ("plan", "heir", "--name", "again", "--threads", "1")  # what it would train is in the cache already
    assert "rows: 2 epochs requested, 0 to train" in cli(*plan, *here).output
    assert "rows: 2 epochs requested, 2 to train" in cli(*plan).output  # the default store has no study tiny


LATER = """\
    warmup: int = setting(0, integer(0))
    betas: tuple[float, ...] = setting((0.9, 0.999), Rule("two numbers", lambda v: len(v) == 2))
"""


@pytest.mark.slow
def test_a_version_with_new_settings_goes_on_with_the_study_of_this_one(copied: Path, tmp_path: Path) -> None:
    """Only the epochs that a row gets in addition are trained, in processes of a package with two more settings."""
    package = tmp_path / "later" / "caltech_sweep"
    shutil.copytree(Path(caltech_sweep.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    config = (package / "config.py").read_text(encoding="utf-8")
    last = "    seed: int = setting(0, integer(0, LARGEST_SEED))\n"
    assert config.count(last) == 1
    (package / "config.py").write_text(config.replace(last, last + LATER), encoding="utf-8")
    study = copied / "sweeps" / "tiny.yaml"
    study.write_text(study.read_text().replace("set: {lr: 0.05}", "set: {lr: 0.05, epochs: 4}"), encoding="utf-8")

    def later(*arguments: str) -> str:
        command = [sys.executable, "-m", "caltech_sweep", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(package.parent)}
        done = subprocess.run(command, env=environment, cwd=copied, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    plan = later("plan", "tiny", "--threads", "1")
    assert re.search(r"First .* 2 +to train\n", plan) and re.search(r"Views .* 0 +complete\n", plan), plan
    assert "1 complete" in later("run", "tiny", "--in-process", "--threads", "1")
    assert "0 found" in later("doctor") and "| Views " in later("report", "tiny")
    tracker = MlflowTracker()
    record = tracker.study("tiny")
    assert record is not None
    trained = [t for t in tracker.trials(record) if "warmup" in t.params]
    assert [(t.name, t.tags["reuse.epochs_reused"]) for t in trained] == [("First", "2")]
