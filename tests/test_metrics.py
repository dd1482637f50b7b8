"""Measures against scikit-learn, and an objective that decides everywhere: epoch, search, tables and champion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import sklearn.metrics as oracle
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import permutation_test

from caltech_sweep.config import TrialConfig
from caltech_sweep.metrics import DEFAULT_OBJECTIVE, METRICS, Outputs, objective, objective_names
from caltech_sweep.report.statistics import mcnemar_exact, paired_permutation
from caltech_sweep.study.definition import Choices, Component, StudyDefinition
from caltech_sweep.testing import MemoryTracker, Script, ScriptedExecutor, run_scripted
from caltech_sweep.training.evaluate import evaluate

ORACLES = {
    "accuracy": lambda labels, scores: oracle.accuracy_score(labels, scores.argmax(1)),
    "macro_accuracy": lambda labels, scores: oracle.balanced_accuracy_score(labels, scores.argmax(1)),
    "macro_f1": lambda labels, scores: oracle.f1_score(labels, scores.argmax(1), average="macro"),
    "top5_accuracy": lambda labels, scores: oracle.top_k_accuracy_score(
        labels, scores, k=5, labels=range(scores.shape[1])
    ),
    "loss": lambda labels, scores: oracle.log_loss(labels, scores, labels=range(scores.shape[1])),
}


def test_every_metric_has_an_oracle() -> None:
    assert ORACLES.keys() == METRICS.keys()


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(1, 40))
def test_an_evaluation_measures_what_scikit_learn_measures(name: str, seed: int, classes: int, images: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, classes, generator=generator)
    labels = torch.randint(max(1, classes - 1), (images,), generator=generator)  # the last class has no image
    found = evaluate(torch.nn.Identity(), labels, 16, lambda index: logits[index][:, None], lambda batch: batch)
    scores = logits.double().softmax(1).numpy()
    if name == "top5_accuracy" and classes <= 5:
        assert found.scores[name] == 1.0
    else:
        assert found.scores[name] == pytest.approx(ORACLES[name](labels.numpy(), scores), abs=1e-6)


@pytest.mark.parametrize("name", [name for name in METRICS if METRICS[name].by_class])
def test_a_measure_by_class_needs_labels_and_predictions_only(name: str) -> None:
    labels, said = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0])
    assert METRICS[name].compute(Outputs(labels, said)) == METRICS[name].compute(Outputs(labels, said, 1.0, said))


def test_the_paired_permutation_test_is_scipy_s() -> None:
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 4, 60)
    first = np.where(generator.random(60) < 0.8, labels, generator.integers(0, 4, 60))
    second = np.where(generator.random(60) < 0.55, labels, generator.integers(0, 4, 60))

    def measure(truth: np.ndarray, said: np.ndarray) -> float:
        return float(METRICS["macro_f1"].compute(Outputs(truth, said)))

    found = paired_permutation(labels, first, second, measure)
    want = permutation_test(
        (first, second),
        lambda one, other: abs(measure(labels, one) - measure(labels, other)),
        permutation_type="samples",
        n_resamples=2000,
        alternative="greater",
        rng=np.random.default_rng(0),
    ).pvalue
    assert found == pytest.approx(want, abs=0.02) and 0.05 < found < 0.3
    accuracy = paired_permutation(labels, first, second, lambda truth, said: float((truth == said).mean()))
    exact = mcnemar_exact((labels == first).tolist(), (labels == second).tolist())
    assert accuracy == pytest.approx(exact, abs=0.02)
    assert paired_permutation(labels, first, first, measure) == 1.0


@pytest.mark.parametrize("name", objective_names())
def test_an_objective_knows_which_way_is_better(name: str) -> None:
    goal = objective(name)
    assert (goal.direction == "minimize") == (name == "val/loss") and goal.each_epoch == name
    low, high = (0.2, 0.7) if goal.higher else (0.7, 0.2)
    assert goal.better(high, low) and not goal.better(low, high) and not goal.better(low, low)
    assert goal.best([low, high, low]) == high and goal.best([]) is None
    assert goal.score({goal.at_best: 0.5}) == 0.5 and goal.score({goal.at_best: float("nan")}) is None
    counted = TrialConfig(objective=name).fingerprint() != TrialConfig().fingerprint()
    assert counted == (name != DEFAULT_OBJECTIVE)


def test_a_mocked_study_is_searched_and_pruned_by_its_objective(tmp_path: Path) -> None:
    study = StudyDefinition(
        "mocked", "Mocked", 3, {}, {"epochs": 2, "objective": "val/loss"}, {"lr": Choices((0.1, 0.2, 0.3))}, ()
    )
    by_rate = {0.1: 0.2, 0.2: 0.9, 0.3: 0.4}
    executor = ScriptedExecutor(lambda config: Script([0.1, by_rate[config.lr]]))
    own = optuna.create_study(direction=study.objective.direction)
    run_scripted(replace(study, sampler=Component("grid", {"seed": 0})), executor, MemoryTracker(), own)
    assert own.best_trial.params == {"lr": 0.2} and own.best_value == pytest.approx(0.1)


OBJECTIVE_STUDY = """\
title: By another measure
objective: val/%s
dataset: {name: shapes, resize: 32, crop: 32, classes: 3, images_per_class: 6}
fixed: {arch: resnet18, epochs: 3, batch_size: 6, weights: none}
space: {lr: {low: 1e-3, high: 1e-1, log: true}}
trials: 4
pruner: {name: threshold, upper: 50.0}
rows:
  - {name: Low, set: {lr: 0.001}}
  - {name: High, set: {lr: 0.05}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["macro_f1", "loss"])
def test_one_measure_decides_in_every_place(name: str, cli, place: Path) -> None:  # type: ignore[no-untyped-def]
    from caltech_sweep.report.build import load_tables
    from caltech_sweep.sweep.optuna_store import open_storage, stored_studies
    from caltech_sweep.tracking.writer import MlflowTracker

    (place / "sweeps" / "other.yaml").write_text(OBJECTIVE_STUDY % name)
    assert cli("run", "other", "--in-process", "--threads", "1").exit_code == 0
    tracker, goal = MlflowTracker("mlruns/mlflow.db"), objective(f"val/{name}")
    trials = tracker.trials(tracker.study("other"))  # type: ignore[arg-type]
    (study,) = stored_studies(open_storage("sqlite:///mlruns/optuna.db")).values()
    assert study.direction.name.lower() == goal.direction
    assert {trial.outcome for trial in trials} <= {"complete", "pruned"}
    for trial in [trial for trial in trials if trial.outcome == "complete"]:
        epochs = [metric.value for metric in tracker.history(trial.run_id, goal.each_epoch)]
        assert trial.score == goal.best(epochs) == study.trials[trial.number].value
        assert trial.metrics["best/epoch"] == 1 + epochs.index(trial.score)
        assert {f"test/{other}" for other in METRICS} <= trial.metrics.keys()
    best = min(trials, key=lambda trial: trial.rank)
    assert study.best_trial.number == best.number == tracker.best_trial("other").number
    (table,) = load_tables(["other"], 4, "mlruns/mlflow.db")
    assert table.best is not None and table.best.run_id == best.run_id and table.best.standing == "best"
    assert any(("lowest" if name == "loss" else "highest") in note and goal.label in note for note in table.footnotes)
    shown = cli("report", "other").output
    assert f"{goal.label[0].upper()}{goal.label[1:]} on Validation Set" in shown
    assert cli("promote", "other").exit_code == 0
    (version,) = tracker.client.search_model_versions("name = 'other'")
    assert f"by its {goal.label} of {best.score:.4f}" in version.description
    assert cli("report", "other", "--format", "html", "--out", "page.html").exit_code == 0
