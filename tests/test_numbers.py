"""Every number is asked whether it is one before it is recorded, promoted, predicted or reported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.errors import DivergedError, ModelError
from caltech_sweep.serving.runs import model_spec
from caltech_sweep.serving.served_model import Classifier
from caltech_sweep.study.definition import Component, Range, Row, StudyDefinition
from caltech_sweep.sweep.optuna_store import MEMORY, open_study
from caltech_sweep.testing import MemoryTracker, Script, ScriptedExecutor, run_scripted
from caltech_sweep.tracking.writer import MlflowTracker
from caltech_sweep.training.device import pick_device
from caltech_sweep.training.evaluate import Evaluation, evaluate
from caltech_sweep.training.models import build_model
from caltech_sweep.training.trial import run_trial
from helpers.places import Cli

NAN, INF = math.nan, math.inf
SHAPES = DatasetConfig(name="shapes", resize=32, crop=32, classes=3, images_per_class=8)


def test_a_last_step_that_explodes_is_a_divergence() -> None:
    """One step an epoch: the loss of its batch is fine, and what is left of the weights is not."""
    config = TrialConfig(dataset=SHAPES, arch="resnet18", epochs=1, batch_size=24, lr=1e38)
    with pytest.raises(DivergedError, match=r"epoch 1, val images: the network's outputs became NaN or infinite"):
        list(run_trial(config, load_dataset(SHAPES), pick_device("cpu")))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("views", [1, 10])
def test_an_output_of_any_image_or_view_that_is_no_number_is_a_divergence(value: float, views: int) -> None:
    logits = torch.zeros(6, views, 4)
    logits[4, -1, 2] = value
    with pytest.raises(DivergedError, match="outputs became NaN or infinite"):
        evaluate(nn.Identity(), torch.zeros(6, dtype=torch.long), 2, lambda index: logits[index], lambda batch: batch)


def test_an_evaluation_holds_numbers_alone() -> None:
    one = torch.ones(1)
    for numbers in ((NAN, 0.5, one), (INF, 0.5, one), (0.1, NAN, one), (0.1, 0.5, one * NAN)):
        with pytest.raises(DivergedError, match="the evaluation's (loss|accuracy|confidences)"):
            Evaluation({"loss": numbers[0], "accuracy": numbers[1]}, one.long(), numbers[2])
    assert Evaluation({"loss": 0.1, "accuracy": 0.5}, one.long(), one).loss == 0.1


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(
    "script",
    [
        Script([0.2, NAN, 0.4, 0.5]),
        Script([NAN, NAN, NAN, NAN]),
        Script([0.2, 0.3, 0.4, INF]),
        Script([0.2, 0.3, 0.4, 0.5], test_accuracy=NAN),
    ],
)
def test_no_store_is_told_a_number_that_is_none(script: Script, pruned: bool) -> None:
    definition = StudyDefinition(
        "s",
        "A study",
        trials=2,
        dataset={"name": "shapes"},
        fixed={"epochs": 4},
        space={"lr": Range(1e-3, 1.0)},
        rows=(Row("One", {"lr": 0.1}),),
        sampler=Component("random", {"seed": 3}),
        pruner=Component("median", {}) if pruned else None,
    )
    tracker, study = MemoryTracker(), open_study(definition, MEMORY, definition.identity())
    summary = run_scripted(definition, ScriptedExecutor(script), tracker, study)
    assert summary.outcomes == {"diverged": 2}
    for trial in study.get_trials():
        assert trial.state == optuna.trial.TrialState.FAIL and trial.values is None
        assert all(map(math.isfinite, trial.intermediate_values.values()))
    for run in tracker.runs.values():
        told = [value for _, metrics, _ in run.history for value in metrics.values()]
        assert all(map(math.isfinite, [*told, *run.metrics.values()])) and run.status == "FAILED"
        assert "nan" in run.tags["reason"] or "inf" in run.tags["reason"]


def strictly(text: str) -> Any:
    """Read JSON as other programs do, which know no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_a_study_whose_only_row_explodes_has_nothing_to_promote(cli: Cli, place: Path) -> None:
    options = ("--in-process", "--threads", "1", "--row", "First", "--set", "epochs=1", "--set", "batch_size=24")
    study = place / "sweeps" / "tiny.yaml"
    study.write_text(study.read_text().replace("lr: 0.05", "lr: 1e6"))
    result = cli("run", "tiny", *options)
    assert "First: diverged" in result.output and "val images" in result.output, result.output
    assert "no complete trial" in cli("promote", "tiny").output
    row = strictly(cli("report", "tiny", "--format", "json").output)[0]["rows"][0]
    assert row["state"] == "diverged", row


def test_what_an_older_version_took_for_complete_is_neither_shown_nor_promoted(cli: Cli, copied: Path) -> None:
    tracker = MlflowTracker()
    record = tracker.study("tiny")
    assert record is not None
    for trial, value in zip(tracker.trials(record), (NAN, INF, NAN), strict=True):
        tracker.client.log_metric(trial.run_id, "test/loss", value, step=1)
    assert {trial.outcome for trial in tracker.trials(record)} == {"diverged"}
    assert "no complete trial" in cli("promote", "tiny").output
    rows = strictly(cli("report", "tiny", "--format", "json").output)[0]["rows"]
    assert [row["state"] for row in rows[:2]] == ["diverged", "diverged"]
    result = cli("doctor", "tiny", "--fix")
    assert (
        "is complete in the study store, but its run First is diverged: the next run trains it again" in result.output
    )


def test_a_model_whose_weights_or_outputs_are_no_numbers_predicts_nothing() -> None:
    config = TrialConfig(dataset=SHAPES, arch="squeezenet1_1")
    spec, device = model_spec(config, ["a", "b", "c"]), torch.device("cpu")
    state = build_model(config, 3).state_dict()
    crops = [torch.full((3, 32, 32), 200, dtype=torch.uint8)]
    assert len(Classifier(spec, state, device).rank(crops)[0]) == 3
    with pytest.raises(ModelError, match="hold NaN or infinity, so it can predict nothing"):
        Classifier(spec, {**state, "features.0.bias": state["features.0.bias"] * NAN}, device)
    huge = Classifier(
        spec,
        {
            **state,
            "classifier.1.bias": torch.full((3,), 3e38),
            "classifier.1.weight": state["classifier.1.weight"].abs() * 1e38,
        },
        device,
    )
    with pytest.raises(ModelError, match="give outputs that are NaN or infinite"):
        huge.rank(crops)
