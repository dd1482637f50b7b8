"""A whole study with reuse on and off: the same report, the same weights, fewer epochs trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from caltech_sweep.tracking import MlflowTracker
from conftest import invoke

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
    assert re.search(r"First +4 +96 +11,178,051 +2 +to train", plan), plan
    assert cli(*run).exit_code == 0
    tracker = MlflowTracker()
    record = tracker.study("tiny")
    assert record is not None
    tags = [trial.tags for trial in tracker.trials(record)]
    assert [(t["reuse.epochs_reused"], t["reuse.epochs_trained"]) for t in tags] == [("0", "2"), ("2", "2")]
