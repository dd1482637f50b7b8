"""Early stopping: when a training ends, what it leaves, and what it shares with trainings that do not stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.data.images import LoadedData
from caltech_sweep.errors import StudyFileError, UsageError
from caltech_sweep.study.definition import Component, Range, Row, StudyDefinition
from caltech_sweep.study.file import load_study
from caltech_sweep.sweep.executors.base import Job, Trained
from caltech_sweep.sweep.executors.worker import train
from caltech_sweep.sweep.optuna_store import MEMORY, open_study
from caltech_sweep.testing import MemoryTracker, Script, ScriptedExecutor, run_scripted
from caltech_sweep.tracking.reader import open_reader
from caltech_sweep.training.keys import CacheOptions, prefix_key
from caltech_sweep.training.stopping import last_epoch
from caltech_sweep.training.trial import TrialOutcome, run_trial
from helpers.places import Cli

CPU = torch.device("cpu")
SHAPES = DatasetConfig(name="shapes", resize=32, crop=32, classes=3, images_per_class=8)
EPOCHS = 7
CONFIG = TrialConfig(
    dataset=SHAPES, arch="squeezenet1_1", optimizer="adam", lr=3e-4, epochs=EPOCHS, step_size=4, batch_size=8
)


def reference(accuracies: list[float], patience: int, min_delta: float) -> int:
    """Return the epoch that a training ends after, from the definition: no running state.

    A record is an accuracy above the last record by more than ``min_delta``; the training ends with the first epoch
    that lies ``patience`` epochs after the last record.
    """
    for epoch in range(1, len(accuracies) + 1):
        record = 0
        for earlier in range(1, epoch):
            if accuracies[earlier] - min_delta > accuracies[record]:
                record = earlier
        if epoch - (record + 1) >= patience:
            return epoch
    return len(accuracies)


ACCURACIES = st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=1, max_size=30)


@given(ACCURACIES, st.integers(1, 8), st.sampled_from([0.0, 0.01, 0.05, 0.2]))
def test_a_training_ends_where_the_definition_says(accuracies: list[float], patience: int, min_delta: float) -> None:
    config = TrialConfig(epochs=len(accuracies), patience=patience, min_delta=min_delta)
    want = reference(accuracies, patience, min_delta)
    assert last_epoch(config, accuracies) == want
    assert all(last_epoch(config, accuracies[:epoch]) is None for epoch in range(want))
    assert last_epoch(replace(config, patience=None), accuracies) == len(accuracies)
    falling = replace(config, objective="val/loss")  # less of it is better
    assert last_epoch(falling, [-accuracy for accuracy in accuracies]) == want


Result = tuple[list[tuple], TrialOutcome]


def facts(config: TrialConfig, data: LoadedData, folder: Path | None = None, kill: int | None = None) -> Result:
    """Train a trial; return all of its epochs but how long they took, and its outcome."""
    use = CacheOptions(folder, 10**9, every_seconds=0 if kill else 1e9) if folder else None
    trial, epochs = run_trial(config, data, CPU, stages=use), []
    while True:
        try:
            epoch = next(trial)
        except StopIteration as end:
            return epochs, end.value
        epochs.append((epoch.epoch, epoch.lr, epoch.train_loss, epoch.val.accuracy, epoch.val.confidences.tolist()))


@pytest.fixture(scope="module")
def data() -> LoadedData:
    return load_dataset(SHAPES)


@pytest.fixture(scope="module")
def whole(data: LoadedData) -> Result:
    return facts(CONFIG, data)


def stopping(whole: Result) -> tuple[int, int]:
    """Return a patience with which the training ends early, and the epoch after which it does."""
    accuracies = [epoch[3] for epoch in whole[0]]
    ends = {patience: reference(accuracies, patience, 0.0) for patience in (1, 2, 3)}
    return next((patience, end) for patience, end in ends.items() if 2 <= end < EPOCHS)


def assert_stopped(got: Result, whole: Result, end: int) -> None:
    assert got[0] == whole[0][:end]
    accuracies = [epoch[3] for epoch in got[0]]
    assert got[1].best.epoch == accuracies.index(max(accuracies)) + 1


def same_weights(one: TrialOutcome, other: TrialOutcome) -> bool:
    return all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())


def test_a_stopped_training_is_the_start_of_the_whole_one(data: LoadedData, whole: Result) -> None:
    patience, end = stopping(whole)
    got = facts(replace(CONFIG, patience=patience), data)
    assert_stopped(got, whole, end)
    shorter = facts(replace(CONFIG, epochs=end), data)
    assert same_weights(got[1], shorter[1]) and got[1].metrics() == shorter[1].metrics()


def test_it_shares_its_epochs_with_the_whole_one_in_both_directions(
    data: LoadedData, whole: Result, tmp_path: Path
) -> None:
    patience, end = stopping(whole)
    stops = replace(CONFIG, patience=patience)
    assert prefix_key(stops) == prefix_key(CONFIG)
    first = facts(stops, data, tmp_path / "one")
    again = facts(stops, data, tmp_path / "one")
    assert first[0] == again[0] == whole[0][:end] and same_weights(again[1], first[1])
    assert (first[1].epochs_trained, again[1].epochs_trained) == (end, 0)  # its last state was kept
    extended = facts(CONFIG, data, tmp_path / "one")
    assert extended[0] == whole[0] and same_weights(extended[1], whole[1])
    assert (extended[1].epochs_reused, extended[1].epochs_trained) == (end, EPOCHS - end)


def test_a_state_from_after_its_end_never_leaks_into_it(data: LoadedData, whole: Result, tmp_path: Path) -> None:
    facts(CONFIG, data, tmp_path)  # keeps the state after the last epoch, with the best weights until then
    accuracies = [epoch[3] for epoch in whole[0]]
    for patience, end in {(patience, reference(accuracies, patience, 0.0)) for patience in (1, 2, 3)}:
        got = facts(replace(CONFIG, patience=patience), data, tmp_path)
        alone = facts(replace(CONFIG, epochs=end), data)
        assert_stopped(got, whole, end)
        assert same_weights(got[1], alone[1]) and got[1].metrics() == alone[1].metrics()
        assert got[1].epochs_trained == (end if whole[1].best.epoch > end else 0)


def test_the_runner_says_that_a_trial_stopped_early(data: LoadedData, whole: Result, tmp_path: Path) -> None:
    patience, end = stopping(whole)
    epochs = train(Job(7, replace(CONFIG, patience=patience), tmp_path, device="cpu"))
    assert [next(epochs).last for _ in range(end)] == [False] * (end - 1) + [True]
    assert next(epochs) == Trained(7)
    with pytest.raises(StopIteration) as stop:
        next(epochs)
    assert stop.value.value.tags["stopped_early"] == f"epoch {end} of {EPOCHS}"


# -- studies -----------------------------------------------------------------------------------------------------------

DEFINITION = StudyDefinition(
    name="s",
    title="A study",
    trials=5,
    dataset={"name": "shapes"},
    fixed={"epochs": 6},
    space={"lr": Range(1e-3, 1.0, log=True)},
    rows=(Row("Whole", {"lr": 0.1}), Row("Stops", {"lr": 0.1, "patience": 1})),
    sampler=Component("random", {"seed": 3}),
    early_stopping={"patience": 2, "min_delta": 0.1},
)
CURVE = Script([0.2, 0.5, 0.55, 0.6, 0.61, 0.9])


def test_sampled_trials_stop_and_rows_only_where_they_say_so() -> None:
    tracker = MemoryTracker()
    study = open_study(DEFINITION, MEMORY, DEFINITION.identity())
    run_scripted(DEFINITION, ScriptedExecutor(CURVE), tracker, study)
    ends = [(run.tags.get("stopped_early"), len(run.history)) for run in tracker.runs.values()]
    assert ends == [(None, 6), (None, 6), *[("epoch 4 of 6", 4)] * 3]
    assert all(run.tags["outcome"] == "complete" for run in tracker.runs.values())
    assert [trial.value for trial in study.trials] == [0.9, 0.9, 0.6, 0.6, 0.6]  # the best epoch, whatever min_delta


def test_the_last_epoch_of_a_stopped_trial_is_not_pruned() -> None:
    definition = replace(DEFINITION, pruner=Component("threshold", {"lower": 0.55, "warmup_epochs": 3}))
    for curve, state in (([0.5] * 6, TrialState.COMPLETE), ([0.1, 0.3, 0.5, 0.52, 0.5, 0.5], TrialState.PRUNED)):
        study = open_study(definition, MEMORY, definition.identity())
        own = replace(definition, early_stopping={"patience": 3})
        run_scripted(own, ScriptedExecutor(Script(curve)), MemoryTracker(), study)
        assert {trial.state for trial in study.trials[2:]} == {state}


def test_only_a_study_that_stops_early_has_it_in_its_identity_and_keys() -> None:
    plain = replace(DEFINITION, early_stopping={}, rows=DEFINITION.rows[:1])
    assert "early_stopping" not in plain.identity() and "budget" not in plain.to_dict()
    assert (
        plain.sampled_config({"lr": 0.1})
        == plain.config({"lr": 0.1})
        == TrialConfig.from_dict({"dataset": {"name": "shapes"}, "epochs": 6, "lr": 0.1})
    )
    assert {"patience", "min_delta"}.isdisjoint(plain.config({}).counted())
    config = DEFINITION.sampled_config({"lr": 0.1})
    assert (config.patience, config.min_delta) == (2, 0.1)
    assert config.fingerprint() != plain.config({"lr": 0.1}).fingerprint()
    assert TrialConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_it_may_change_while_a_study_goes_on() -> None:
    tracker, study = MemoryTracker(), optuna.create_study(study_name="s", direction="maximize")
    from caltech_sweep.sweep.optuna_store import check_identity

    for early_stopping in ({}, {"patience": 2}, {"patience": 1, "min_delta": 0.2}, {}):
        definition = replace(DEFINITION, early_stopping=early_stopping)
        identity = {**definition.identity(), "images": "", "initial_weights": {}}
        check_identity(study, "s", identity)
        assert study.user_attrs["identity"] == identity
    run_scripted(replace(DEFINITION, trials=3), ScriptedExecutor(CURVE), tracker)
    assert len(tracker.runs) == 3


FILE = """\
dataset: {name: shapes, resize: 32, crop: 32, classes: 3, images_per_class: 8}
trials: 2
sampler: {name: random, seed: 0}
fixed: {arch: squeezenet1_1, batch_size: 8, epochs: 5}
space: {lr: {low: 1e-12, high: 1e-11, log: true}}
early_stopping: {patience: 2}
rows: [{name: Row, set: {lr: 1e-12}}]
"""


def test_a_study_file_stops_its_sampled_trials_and_the_table_says_where(cli: Cli, place: Path) -> None:
    (place / "sweeps" / "early.yaml").write_text(FILE, encoding="utf-8")
    done = cli("run", "early", "--in-process", "--threads", "1", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "stopped early at epoch 3 of 5" in done.output  # such a learning rate changes nothing
    reader = open_reader(None)
    assert reader.names() == ["early"]
    row, sampled = reader.studies(["early"])[0].trials
    assert "stopped_early" not in row.tags and sampled.tags["stopped_early"] == "epoch 3 of 5"
    assert (sampled.params["patience"], row.params["patience"]) == ("2", "none")
    assert (sampled.outcome, sampled.metrics["best/epoch"]) == ("complete", 1.0)
    lines = cli("report", "early").output.splitlines()
    assert [("stopped early at epoch 3 of 5" in line) for line in lines if line.startswith(("| Row", "| trial"))] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ("early_stopping: {patience: 0}", "early_stopping.patience: must be an integer >= 1"),
        ("early_stopping: {patience: 2, min_delta: -1}", "early_stopping.min_delta: must be a number of at least 0"),
        ("early_stopping: {min_delta: 0.1}", "early_stopping.patience: is missing"),
        ("early_stopping: {patience: 2, delta: 1}", "early_stopping.delta: is an unknown key"),
        ("early_stopping: 5", "early_stopping: must be a mapping"),
        (
            "early_stopping: {patience: 2}\nfixed: {patience: 3}",
            "early_stopping.patience: is also under fixed or space",
        ),
        ("budget: {epochs: 0}", "budget.epochs: must be an integer >= 1"),
        ("budget: {hours: -2}", "budget.hours: must be a number above 0"),
        ("budget: {days: 2}", "budget.days: is an unknown key"),
    ],
)
def test_wrong_keys_are_named_with_their_line(tmp_path: Path, wrong: str, sentence: str) -> None:
    head = "trials: 2\nspace: {lr: {low: 1e-3, high: 1e-1}}\n"
    (tmp_path / "wrong.yaml").write_text(head + wrong + "\n", encoding="utf-8")
    with pytest.raises(StudyFileError) as error:
        load_study("wrong", folder=tmp_path)
    assert any("wrong.yaml:3: " + sentence in problem for problem in error.value.problems)


def test_rows_need_no_space_to_say_that_they_stop_early(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("early_stopping: {patience: 2}\nrows: [{name: A}]\n", encoding="utf-8")
    with pytest.raises(StudyFileError, match="is for sampled trials, and there is no space"):
        load_study("wrong", folder=tmp_path)


@pytest.mark.parametrize("text", ["epochs", "epochs=", "epochs=1.5", "epochs=-1", "hours=nan", "days=2", "epochs=none"])
def test_wrong_budgets_of_the_command_line_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text("trials: 2\nspace: {lr: {low: 1e-3, high: 1e-1}}\n", encoding="utf-8")
    with pytest.raises(UsageError, match="--budget "):
        load_study("s", folder=tmp_path, budget=[text])


def test_a_setting_of_the_command_line_replaces_early_stopping_and_budget(tmp_path: Path) -> None:
    text = "trials: 2\nspace: {lr: {low: 1e-3, high: 1e-1}}\nearly_stopping: {patience: 2}\nbudget: {epochs: 9}\n"
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    plain = load_study("s", folder=tmp_path)
    assert (
        plain.sampled_config({}).patience == 2 and plain.config({}).patience is None and plain.budget == {"epochs": 9}
    )
    never = load_study("s", ["patience=null"], folder=tmp_path, budget=["hours=0.5"])
    assert never.sampled_config({}).patience is None and never.budget == {"hours": 0.5}
    assert load_study("s", ["patience=7"], folder=tmp_path, budget=["none"]).sampled_config({}).patience == 7
    assert load_study("s", folder=tmp_path, budget=["none"]).budget == {}
