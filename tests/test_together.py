"""Classifiers on kept features that train as one product: each ends where it does by itself, within rounding."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.data.images import LoadedData
from caltech_sweep.errors import DivergedError, OutOfMemoryError
from caltech_sweep.training.checkpoints import stored_epochs
from caltech_sweep.training.fit import EpochResult, Training
from caltech_sweep.training.keys import CacheOptions, may_train_together
from caltech_sweep.training.loss import epoch_order
from caltech_sweep.training.models import build_model
from caltech_sweep.training.together import train_together
from caltech_sweep.training.trial import TrialOutcome, open_trial
from helpers.places import furnish
from helpers.trials import CPU, run

DATA = DatasetConfig(name="shapes", resize=32, crop=32, classes=3, images_per_class=14)
HEAD = TrialConfig(
    dataset=DATA,
    arch="resnet18",
    freeze="conv",
    epochs=3,
    step_size=2,
    batch_size=8,
    lr=0.05,
    augment=(),
    precision="float32",
)


@pytest.fixture(scope="module")
def data() -> LoadedData:
    return load_dataset(DATA)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> CacheOptions:
    """Where the outputs of frozen layers are kept, and no states."""
    return CacheOptions(tmp_path_factory.mktemp("features"), 10**9, every_seconds=1e9)


def all_at_once(
    configs: list[TrialConfig], data: LoadedData, use: CacheOptions | None = None
) -> list[tuple[list[EpochResult], TrialOutcome | Exception]]:
    """Run trials to their ends as a worker process does; return the epochs and the outcome of each."""
    if use is not None:
        forget(use)
    trials = [open_trial(config, data, CPU, stages=use) for config in configs]
    epochs: list[list[EpochResult]] = [[] for _ in trials]
    outcomes: list[Any] = [None] * len(trials)
    while not all(outcomes):
        ready = []
        for place, trial in enumerate(trials):
            while outcomes[place] is None:
                try:
                    happened = next(trial)
                except StopIteration as end:
                    outcomes[place] = end.value
                except DivergedError as error:
                    outcomes[place] = error
                else:
                    if isinstance(happened, Training):
                        ready.append(happened)
                        break
                    epochs[place].append(happened)
        train_together(ready)
    return list(zip(epochs, outcomes, strict=True))


def by_itself(config: TrialConfig, data: LoadedData, kept: CacheOptions) -> tuple[list[EpochResult], TrialOutcome]:
    forget(kept)
    return run(config, data, kept)


def forget(kept: CacheOptions) -> None:
    """Drop the states, but not the outputs of frozen layers."""
    for state in kept.folder.glob("stage-*"):
        shutil.rmtree(state)


def assert_close(got: tuple[list[EpochResult], Any], want: tuple[list[EpochResult], TrialOutcome]) -> None:
    assert [e.epoch for e in got[0]] == [e.epoch for e in want[0]]
    assert [e.lr for e in got[0]] == [e.lr for e in want[0]]
    for mine, theirs in zip(got[0], want[0], strict=True):
        assert mine.train_loss == pytest.approx(theirs.train_loss, rel=1e-4)
        assert mine.val.loss == pytest.approx(theirs.val.loss, rel=1e-4)
    if got[1].best.epoch == want[1].best.epoch:  # two epochs may tie but for rounding
        for name, value in want[1].weights.items():
            torch.testing.assert_close(got[1].weights[name], value, rtol=1e-3, atol=1e-5)


TRIALS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 100),
        "lr": st.floats(1e-3, 0.05),
        "weight_decay": st.sampled_from([0.0, 1e-2]),
        "optimizer": st.sampled_from(["sgd", "adam", "adamw"]),
        "epochs": st.integers(1, 3),
        "clip_grad_norm": st.sampled_from([None, 0.5]),
        "ema_decay": st.sampled_from([None, 0.5]),
        "sample_weights": st.sampled_from(["none", "balanced"]),
        "augment": st.sampled_from([(), ("hflip",)]),
    }
)
SHARED = st.fixed_dictionaries(
    {
        "batch_size": st.sampled_from([5, 8, 64]),
        "drop_last": st.booleans(),
        "label_smoothing": st.sampled_from([0.0, 0.2]),
        "class_weights": st.sampled_from(["none", "balanced"]),
        "outputs": st.sampled_from([None, 7]),
    }
)


@settings(max_examples=4)
@given(SHARED, st.lists(TRIALS, min_size=2, max_size=3))
def test_each_has_the_result_that_it_has_by_itself(
    data: LoadedData, kept: CacheOptions, shared: dict[str, Any], trials: list[dict[str, Any]]
) -> None:
    images = len(data.split.train)
    shared["drop_last"] &= shared["batch_size"] <= images
    configs = [replace(HEAD, **shared, **trial) for trial in trials]
    for config, got in zip(configs, all_at_once(configs, data, kept), strict=True):
        assert isinstance(got[1], TrialOutcome) and got[1].together >= 2
        assert_close(got, by_itself(config, data, kept))


@pytest.mark.parametrize("arch", ["efficientnet_b0", "googlenet"])
def test_networks_that_drop_out_before_their_classifier_draw_what_they_draw_alone(
    arch: str, data: LoadedData, kept: CacheOptions
) -> None:
    configs = [replace(HEAD, arch=arch, seed=seed, epochs=2) for seed in (0, 1)]
    for config, got in zip(configs, all_at_once(configs, data, kept), strict=True):
        assert isinstance(got[1], TrialOutcome) and got[1].together == 2
        assert_close(got, by_itself(config, data, kept))


def test_a_product_is_what_torch_s_own_layers_and_optimisers_do(data: LoadedData, kept: CacheOptions) -> None:
    """An outside implementation: a torch loop over a linear layer each, on what torchvision's backbone returns."""
    configs = [
        replace(HEAD, seed=seed, lr=lr, epochs=2, gamma=1.0, drop_last=False) for seed, lr in ((0, 0.05), (1, 0.01))
    ]
    found = all_at_once(configs, data, kept)
    for config, (epochs, outcome) in zip(configs, found, strict=True):
        assert isinstance(outcome, TrialOutcome)
        model = build_model(config, 3)
        head, labels = torch.nn.Linear(512, 3), data.labels("train")
        head.load_state_dict(model.fc.state_dict())
        model.fc = torch.nn.Identity()
        model.eval()
        with torch.no_grad():
            features = model((data.center_crops("train", 32).float() / 255 - 0.5) / 0.5)
        optimizer = torch.optim.SGD(head.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
        for epoch in epochs:
            losses = []
            for index in epoch_order(config, labels, epoch.epoch).split(config.batch_size):
                optimizer.zero_grad()
                loss = F.cross_entropy(head(features[index]), labels[index])
                loss.backward()
                optimizer.step()
                losses.append(loss.item() * len(index))
            assert epoch.train_loss == pytest.approx(np.sum(losses) / len(labels), rel=1e-4)


def test_one_that_diverges_changes_no_other(data: LoadedData, kept: CacheOptions) -> None:
    wild = replace(HEAD, seed=1, lr=1e30, momentum=0.0)
    calm, broken = all_at_once([HEAD, wild], data, kept)
    assert isinstance(broken[1], DivergedError)
    with pytest.raises(DivergedError) as alone:
        by_itself(wild, data, kept)
    assert str(broken[1]) == str(alone.value)
    assert_close(calm, by_itself(HEAD, data, kept))


@pytest.mark.parametrize(
    ("changes", "may"),
    [
        ({"freeze": "none"}, False),
        ({"unfreeze_epoch": 2}, False),
        ({"accumulate": 2}, False),
        ({"augment": ("rotation",)}, False),
        ({"mixup": 0.2}, False),
        ({"arch": "alexnet"}, True),  # its classifier has three layers
        ({"batch_size": 4}, True),  # other batches than the other's
        ({"label_smoothing": 0.1}, True),
    ],
)
def test_those_that_do_not_fit_train_by_themselves(changes: dict[str, Any], may: bool, data: LoadedData) -> None:
    config = replace(HEAD, dataset=replace(DATA, crop=64, resize=64), **changes)
    assert may_train_together(config) == may
    images = load_dataset(config.dataset)
    plain = replace(HEAD, dataset=config.dataset)
    pair = [Training(each, images, build_model(each, 3), CPU) for each in (config, plain)]
    train_together(pair)
    assert [each.ahead for each in pair] == [None, None]


def test_an_error_of_all_is_told_to_each(data: LoadedData, kept: CacheOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch, "baddbmm", short)
    with pytest.raises(OutOfMemoryError, match="a batch of 8 images did not fit"):
        all_at_once([HEAD, replace(HEAD, seed=1)], data, kept)


def test_states_are_kept_under_other_keys(data: LoadedData, tmp_path: Path) -> None:
    """One that was trained by itself is exact to the last bit; whoever asks for that gets no other."""
    use = CacheOptions(tmp_path, 10**9, frozenset({1, 2, 3}), together=True)
    other = replace(HEAD, freeze="none")
    first = all_at_once([HEAD, replace(HEAD, seed=1)], data, use)[0][0]
    assert stored_epochs(HEAD, data, CPU, None, use) == 3
    assert stored_epochs(HEAD, data, CPU, None, replace(use, together=False)) == 0
    again, _ = run(HEAD, data, use)
    assert all(epoch.reused for epoch in again)
    assert [e.val.loss for e in again] == [e.val.loss for e in first]
    run(other, data, replace(use, together=False))
    assert stored_epochs(other, data, CPU, None, use) == 3  # it never trains with others


STUDY = """\
title: Classifiers
dataset: {name: shapes, resize: 32, crop: 32, classes: 3, images_per_class: 14}
trials: 6
sampler: {name: random, seed: 0}
pruner: {name: median, startup_trials: 2, warmup_epochs: 1}
fixed: {arch: resnet18, freeze: conv, epochs: 4, batch_size: 8, precision: float32}
space: {lr: {low: 1e-3, high: 1e-1, log: true}}
rows:
  - {name: First, set: {lr: 0.05}}
  - {name: All layers, set: {lr: 0.01, freeze: none, epochs: 1}}
"""


@pytest.mark.slow
def test_a_study_ends_as_it_does_one_trial_at_a_time(tmp_path: Path) -> None:
    """By the command line, in fresh processes; MLflow's own client reads what they left."""
    import mlflow

    found = {}
    for most in ("1", "4"):
        place = tmp_path / most
        place.mkdir()
        furnish(place)
        (place / "sweeps" / "heads.yaml").write_text(STUDY, encoding="utf-8")
        command = [sys.executable, "-m", "caltech_sweep", "run", "heads", "--together", most]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        client = mlflow.MlflowClient(f"sqlite:///{place / 'mlruns' / 'mlflow.db'}")
        (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
        runs = client.search_runs([experiment.experiment_id])
        trials = {run.data.params["lr"]: run for run in runs if "lr" in run.data.params}
        assert len(trials) == 6
        found[most] = trials
    assert found["1"].keys() == found["4"].keys()
    joined = [run for run in found["4"].values() if "trained_together" in run.data.tags]
    assert len(joined) >= 2 and not any("trained_together" in run.data.tags for run in found["1"].values())
    for rate, one in found["1"].items():
        other = found["4"][rate]
        assert one.data.params == other.data.params
        if one.data.tags["outcome"] == other.data.tags["outcome"] == "complete":
            for name in ("test/loss", "best/val_loss"):
                assert other.data.metrics[name] == pytest.approx(one.data.metrics[name], rel=1e-4)
