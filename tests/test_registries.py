"""The places where the project grows: an entry of a registry is a setting's value everywhere, by being there."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltech_sweep.config import (
    DATASET_FIELDS,
    DATASET_RULES,
    TRIAL_FIELDS,
    TRIAL_RULES,
    DatasetConfig,
    TrialConfig,
)
from caltech_sweep.data import load_dataset
from caltech_sweep.errors import StudyFileError
from caltech_sweep.metrics import METRICS, Metric
from caltech_sweep.rules import FREEZE_CHOICES
from caltech_sweep.study.definition import StudyDefinition
from caltech_sweep.study.file import list_studies, load_study
from caltech_sweep.testing import MemoryTracker, Script, ScriptedExecutor, run_scripted
from caltech_sweep.training.augment import AUGMENTATIONS, Augmentation
from caltech_sweep.training.device import pick_device
from caltech_sweep.training.schedule import SCHEDULES, Schedule, learning_rates
from caltech_sweep.training.trial import TrialOutcome, run_trial

ROOT = Path(__file__).parents[1]
SHAPES = DatasetConfig(name="shapes", resize=32, crop=32, classes=3, images_per_class=4)
TINY = TrialConfig(dataset=SHAPES, arch="resnet18", epochs=2, batch_size=6)

STUDY = """\
title: Grown
dataset: {name: shapes, resize: 32, crop: 32, classes: 3, images_per_class: 4}
fixed: {arch: resnet18, epochs: 2, batch_size: 6}
"""


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(tmp_path: Path, text: str) -> StudyDefinition:
    (tmp_path / "grown.yaml").write_text(STUDY + text, encoding="utf-8")
    return load_study("grown", folder=tmp_path)


def train(config: TrialConfig) -> TrialOutcome:
    trial = run_trial(config, load_dataset(config.dataset), pick_device("cpu"))
    while True:
        try:
            next(trial)
        except StopIteration as end:
            return end.value


def test_an_added_schedule_can_be_set_sampled_trained_and_read_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, docs: ModuleType
) -> None:
    text = "space: {schedule: {choices: [step, halving]}}\ntrials: 2\n"
    with pytest.raises(StudyFileError, match=r"space.schedule.choices: must be one of step.*, got 'halving'"):
        load(tmp_path, text)
    monkeypatch.setitem(SCHEDULES, "halving", Schedule(lambda at, steps, lr: lr / 2**at))
    assert load(tmp_path, text).space
    config = load(tmp_path, "rows: [{name: One, set: {schedule: halving, lr: 0.5}}]\n").row_config
    one = config(load(tmp_path, "rows: [{name: One, set: {schedule: halving, lr: 0.5}}]\n").rows[0])
    assert learning_rates(one) == ((0.5,), (0.25,))
    assert train(replace(one, lr=0.01)).best.lr in (0.01, 0.005)
    assert "halving" in docs.settings()


def test_an_added_augmentation_can_be_set_sampled_trained_and_read_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, docs: ModuleType
) -> None:
    text = "space: {augment: {subset_of: [hflip, negative]}}\ntrials: 2\n"
    with pytest.raises(StudyFileError, match=r"subset_of: must be a list of .*hflip.*, got \['hflip', 'negative'\]"):
        load(tmp_path, text)
    everyone = Augmentation(
        lambda generator, n: (np.ones(n, bool), np.empty((n, 0))), lambda images, params: 1 - images
    )
    monkeypatch.setitem(AUGMENTATIONS, "negative", everyone)
    assert load(tmp_path, text).space
    plain, inverted = train(TINY), train(replace(TINY, augment=("negative",)))
    assert any((inverted.weights[name] != value).any() for name, value in plain.weights.items())
    assert "negative" in docs.settings()


def test_an_added_metric_is_logged_decides_and_is_read_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, docs: ModuleType
) -> None:
    text = "objective: val/first_class\nrows: [{name: One}]\n"
    with pytest.raises(StudyFileError, match=r"objective: must be one of val/accuracy.*, got 'val/first_class'"):
        load(tmp_path, text)
    share = Metric(lambda outputs: float((outputs.predictions == 0).mean()), higher=False)
    monkeypatch.setitem(METRICS, "first_class", share)
    study = load(tmp_path, text)
    assert study.objective.direction == "minimize" and study.objective.at_best == "best/val_first_class"
    outcome = train(study.row_config(study.rows[0]))
    found = outcome.metrics()
    assert found["best/val_first_class"] == float((outcome.best.val.predictions == 0).double().mean())
    assert "test/first_class" in found and "val/first_class" in outcome.best.metrics()
    assert "first_class" in docs.settings()


@pytest.mark.parametrize("where", ["fixed", "space", "rows"])
def test_the_objective_is_the_study_s_and_no_setting_that_varies(where: str, tmp_path: Path) -> None:
    texts = {
        "fixed": STUDY.replace("epochs: 2", "objective: val/loss"),
        "space": STUDY + "space: {objective: {choices: [val/loss, val/accuracy]}}\n",
        "rows": STUDY + "rows: [{name: One, set: {objective: val/loss}}]\n",
    }
    (tmp_path / "grown.yaml").write_text(texts[where], encoding="utf-8")
    with pytest.raises(StudyFileError, match="objective: is an unknown key"):
        load_study("grown", folder=tmp_path)


def test_the_usual_objective_changes_nothing_that_a_study_is_known_by(tmp_path: Path) -> None:
    plain, said = (
        load(tmp_path, "rows: [{name: One}]\n"),
        load(tmp_path, "objective: val/accuracy\nrows: [{name: One}]\n"),
    )
    assert plain == said and plain.identity() == said.identity()


# -- rules stand in fields ---------------------------------------------------------------------------------------------


def test_every_setting_has_a_rule_that_accepts_its_default() -> None:
    fields = {
        **{k: f for k, f in TRIAL_FIELDS.items() if k != "dataset"},
        **{f"d.{k}": f for k, f in DATASET_FIELDS.items()},
    }
    for name, field in fields.items():
        assert field.metadata["rule"].problem(field.default) is None, name
        assert field.metadata["rule"].ordered(field.default) == field.default, name


def test_names_are_known_without_torch() -> None:
    code = "import sys, caltech_sweep.study.file; print(sorted({'torch', 'optuna', 'mlflow'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# -- one value, one form -----------------------------------------------------------------------------------------------


def test_a_number_a_list_and_an_order_have_one_form_wherever_a_config_is_made() -> None:
    one = TrialConfig(gamma=1, lr=1, augment=["rotation", "hflip"], dataset=DatasetConfig(classes=["a", "b"]))  # type: ignore[arg-type]
    other = TrialConfig(gamma=1.0, lr=1.0, augment=("hflip", "rotation"), dataset=DatasetConfig(classes=("a", "b")))
    assert one == other and one.fingerprint() == other.fingerprint() and hash(one) == hash(other)
    assert one.to_params() == other.to_params()
    assert replace(other, gamma=1).fingerprint() == other.fingerprint()
    again = TrialConfig.from_dict(json.loads(json.dumps(one.to_dict())))
    assert again == one


def test_a_value_in_two_spellings_gives_no_trial_of_its_own(tmp_path: Path) -> None:
    text = "space: {lr: {low: 1, high: 2}}\nexpand: {gamma: [1, 0.5]}\ntrials: 4\n"
    study, executor = load(tmp_path, text), ScriptedExecutor(Script([0.5, 0.5]))
    run_scripted(study, executor, MemoryTracker())
    assert len(executor.jobs) == 4 and len({job.config.fingerprint() for job in executor.jobs}) == 4
    with pytest.raises(StudyFileError, match=r"space.gamma.choices: has a value twice"):
        load(tmp_path, "space: {gamma: {choices: [1, 1.0]}}\ntrials: 2\n")
    with pytest.raises(StudyFileError, match=r"space.augment.choices: has a value twice"):
        load(tmp_path, "space: {augment: {choices: [[hflip, rotation], [rotation, hflip]]}}\ntrials: 2\n")


def test_milestones_can_be_sampled_and_tried_for_each_sampled_setting(tmp_path: Path) -> None:
    fixed = STUDY.replace("epochs: 2", "epochs: 3, schedule: multistep")
    for text in (
        "space: {lr: {low: 1, high: 2}}\nexpand: {milestones: [[], [1], [1, 2]]}\ntrials: 3\n",
        "space: {milestones: {choices: [[], [1], [1, 2]]}}\nsampler: {name: grid}\ntrials: 3\n",
    ):
        (tmp_path / "grown.yaml").write_text(fixed + text, encoding="utf-8")
        executor = ScriptedExecutor()
        run_scripted(load_study("grown", folder=tmp_path), executor, MemoryTracker())
        assert {job.config.milestones for job in executor.jobs} == {(), (1,), (1, 2)} and len(executor.jobs) == 3


# -- back from the stores ----------------------------------------------------------------------------------------------


def values_of(name: str, field: object) -> st.SearchStrategy:
    special = {
        "weights": st.sampled_from(["none", "imagenet", "pretrained", "file:a+b.pt", "run:12", "study:none"]),
        "channels_last": st.one_of(st.none(), st.booleans()),
        "cuda_graphs": st.one_of(st.none(), st.booleans()),
        "augment": st.sets(st.sampled_from(list(AUGMENTATIONS))).map(tuple),
        "milestones": st.sampled_from([(), (3,), (1, 20)]),
        "arch": st.sampled_from(["alexnet", "1", "resnet18", "timm/hf-hub:a/b", "a.b:c"]),
        "freeze": st.sampled_from([*FREEZE_CHOICES, "up_to:layer3.1", "up_to:a+b", {"up_to": 3}, {"first": 0.5}]),
        "dataset.root": st.one_of(st.none(), st.sampled_from(["a+b", "/x y", "12", "[x"])),
        "dataset.classes": st.one_of(
            st.none(), st.integers(2, 99), st.sampled_from(["first_half", ("a", "b"), ("a+b", "c"), ("1", "2")])
        ),
        "dataset.background": st.sampled_from(["white", "#ff8800"]),
    }
    default, rule = field.default, field.metadata["rule"]  # type: ignore[attr-defined]
    if name in special:
        return special[name]
    if isinstance(default, bool):
        return st.booleans()
    if rule.kind == "integer":
        return st.one_of(st.just(default), st.integers(0, 99).filter(rule.accepts))
    if rule.kind == "number":
        return st.sampled_from([default, *filter(rule.accepts, (0.125, 0.1 + 0.2, 1e-7, 3.5))])
    return st.sampled_from(rule.words.removeprefix("one of ").split(", "))


trials = st.fixed_dictionaries({k: values_of(k, f) for k, f in TRIAL_FIELDS.items() if k != "dataset"})
datasets = st.fixed_dictionaries({k: values_of(f"dataset.{k}", f) for k, f in DATASET_FIELDS.items()})


@given(trials, datasets)
def test_a_config_comes_back_from_its_params(values: dict, dataset: dict) -> None:
    config = TrialConfig(dataset=DatasetConfig(**dataset), **values)
    assert all(rule.problem(getattr(config, name)) is None for name, rule in TRIAL_RULES.items())
    assert all(rule.problem(getattr(config.dataset, name)) is None for name, rule in DATASET_RULES.items())
    again = TrialConfig.from_params(json.loads(json.dumps(config.to_params())))
    assert again == config and again.fingerprint() == config.fingerprint()


def test_params_of_other_versions_are_left_at_their_defaults() -> None:
    params = {"lr": "0.5", "epochs": "many", "invented": "x", "optimizer": "lion"}
    assert TrialConfig.from_params(params) == TrialConfig(lr=0.5)


EVERY_KEY = """\
title: Everything
dataset: {name: shapes, resize: 32, crop: 32, classes: 3}
objective: val/loss
fixed: {arch: resnet18, weight_decay: 0}
space:
  lr: {low: 1, high: 2, log: true}
  momentum: {low: 0, high: 0.5, step: 0.25}
  batch_size: {choices: [8, 16]}
  augment: {subset_of: [rotation, hflip]}
expand: {epochs: [2, 3], milestones: [[], [1]], schedule: [multistep, constant]}
trials: 17
sampler: {name: random, seed: 3}
pruner: {name: median, warmup_epochs: 2}
early_stopping: {patience: 2, min_delta: 0.01}
budget: {epochs: 90}
columns: [momentum, test/macro_accuracy]
tolerance: 0.02
replicates: 2
rows: [{name: One, set: {augment: [rotation, hflip]}, reference: {val_accuracy: 0.5, best_epoch: 3}, tolerance: 0.5}]
"""


def test_a_study_with_every_key_comes_back_from_its_document(tmp_path: Path) -> None:
    (tmp_path / "every.yaml").write_text(EVERY_KEY, encoding="utf-8")
    study = load_study("every", ["epochs=2"], folder=tmp_path)
    for one in (study, load_study("every", folder=tmp_path)):
        again = StudyDefinition.from_dict(json.loads(json.dumps(one.to_dict())))
        assert again == one and again.identity() == one.identity() and again.to_dict() == one.to_dict()
    known = {field.name for field in fields(StudyDefinition)}
    assert all(getattr(study, name) for name in known - {"expand"}), "a key of studies that this test does not set"


@pytest.mark.parametrize("name", list_studies())
def test_a_study_comes_back_from_its_document(name: str) -> None:
    study = load_study(name)
    again = StudyDefinition.from_dict(json.loads(json.dumps(study.to_dict())))
    assert again == study and again.identity() == study.identity()
    assert [row.fingerprint for row in again.rows] == [study.row_config(row).fingerprint() for row in study.rows]
