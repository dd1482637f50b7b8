"""A real study whose trials pause: weights, both stores, the cache, the commands, and what a kill leaves."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial
from safetensors.torch import load_file

from caltech_sweep.config import TrialConfig
from caltech_sweep.sweep.optuna_store import open_storage, stored_studies
from caltech_sweep.sweep.optuna_trials import RUNG, is_paused
from caltech_sweep.tracking.records import TrialRecord
from caltech_sweep.tracking.writer import MlflowTracker
from caltech_sweep.training.cache import Cache
from helpers.places import Cli, clone, invoke, ran

STUDY = """\
title: A study that pauses
dataset: {name: shapes, resize: 32, crop: 32, classes: 3, images_per_class: 12}
trials: 8
sampler: {name: random, seed: 0}
pruner: {name: asha, min_epochs: 1, factor: 2}
fixed: {arch: resnet18, batch_size: 8, epochs: 3}
space:
  lr: {low: 1e-3, high: 1e-1, log: true}
rows:
  - name: First
    set: {lr: 1.0e-6}
"""
pytestmark = pytest.mark.slow
RUN = ("run", "pausing", "--in-process", "--threads", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder whose study has run; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("pausing")
    (folder / "sweeps").mkdir()
    (folder / "sweeps" / "pausing.yaml").write_text(STUDY, encoding="utf-8")
    (folder / "said.txt").write_text(ran(folder, *RUN))
    return folder


@pytest.fixture
def there(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def copied(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, which a test may change."""
    clone(made, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def study() -> optuna.Study:
    return stored_studies(open_storage("sqlite:///mlruns/optuna.db"))["pausing"]


def paused() -> list[FrozenTrial]:
    return [trial for trial in study().trials if is_paused(trial)]


def runs() -> dict[int, TrialRecord]:
    tracker = MlflowTracker("sqlite:///mlruns/mlflow.db")
    record = tracker.study("pausing")
    assert record is not None
    found = tracker.trials(record)
    assert len({run.number for run in found}) == len(found)
    return {run.number: run for run in found}


def weights(run: TrialRecord) -> dict[str, torch.Tensor]:
    return load_file(Path(run.artifact_uri.removeprefix("file://")) / "checkpoints" / "best.safetensors")


def uninterrupted(number: int) -> dict[str, torch.Tensor]:
    """Train a trial in one go, without a cache."""
    from caltech_sweep.data import load_dataset
    from caltech_sweep.training.trial import run_trial

    config = TrialConfig.from_dict(study().trials[number].user_attrs["config"])
    epochs = run_trial(config, load_dataset(config.dataset), torch.device("cpu"))
    while True:
        try:
            next(epochs)
        except StopIteration as end:
            return end.value.weights


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def promoted(text: str) -> list[int]:
    return [int(line[1 : line.index("]")]) for line in text.splitlines() if "promoted, goes on from epoch" in line]


def test_a_promoted_trial_ends_with_the_weights_of_one_that_never_paused(there: Path) -> None:
    said = (there / "said.txt").read_text()
    resumed = [number for number in promoted(said) if runs()[number].outcome == "complete"]
    assert resumed
    for number in resumed:
        assert_same(weights(runs()[number]), uninterrupted(number))
        assert runs()[number].tags["reuse.epochs_reused"] != "0"


def test_paused_is_an_outcome_of_its_own_in_both_stores_and_the_doctor_agrees(there: Path, cli_there: Cli) -> None:
    waiting = {trial.number: trial.user_attrs[RUNG] for trial in paused()}
    stopped = {number: int(run.tags["paused_at"]) for number, run in runs().items() if run.outcome == "paused"}
    assert waiting == stopped and 1 <= len(waiting) <= 6 and set(waiting.values()) <= {1, 2}
    assert all(run.status == "KILLED" for run in runs().values() if run.outcome == "paused")
    result = cli_there("doctor")
    assert result.exit_code == 0 and "1 study examined: 0 found" in result.output


@pytest.fixture
def cli_there(there: Path) -> Cli:
    return invoke


@pytest.mark.parametrize("lost", [False, True])
def test_a_paused_trial_is_run_to_its_end_by_its_number_even_if_its_state_is_lost(copied: Path, lost: bool) -> None:
    trial = paused()[0]
    cache = Cache(copied / "data" / "reuse", 0)
    if lost:
        cache.clear()
    else:
        assert sum(entry.held for entry in cache.entries()) == len(paused())
    others = [other.number for other in paused()[1:]]
    result = invoke(*RUN, "--resume-trial", str(trial.number))
    assert result.exit_code == 0 and "study pausing: 1 complete" in result.output
    rung = trial.user_attrs[RUNG]
    said = (
        f"trial-{trial.number:03d}: its state at epoch {rung} is not in the cache, so it is trained again up to there"
    )
    assert (said in result.output) == lost
    run = runs()[trial.number]
    assert run.outcome == "complete" and "paused_at" not in run.tags
    assert run.tags["reuse.epochs_reused"] == str(0 if lost else rung)
    assert_same(weights(run), uninterrupted(trial.number))
    assert [other.number for other in paused()] == others
    assert lost or sum(entry.held for entry in cache.entries()) == len(others)


def test_what_cannot_be_resumed_is_refused_and_nothing_is_written(there: Path, cli_there: Cli, tmp_path: Path) -> None:
    complete = next(number for number, run in runs().items() if run.outcome == "complete")
    for arguments, sentence in (
        (("--resume-trial", "9"), "--resume-trial: study 'pausing' has 8 trials and no trial 9"),
        (("--resume-trial", str(complete)), f"--resume-trial: trial {complete} is complete; only paused and"),
        (("--resume-trial", "9", "--name", "new"), "--resume-trial: study 'new' has 0 trials and no trial 9"),
        (("--resume-trial", "9", "--row", "First"), "--resume-trial: runs nothing but the trials it names"),
    ):
        result = cli_there(*RUN, *arguments)
        assert result.exit_code == 2 and sentence in result.output, result.output
    assert list(stored_studies(open_storage("sqlite:///mlruns/optuna.db"))) == ["pausing"]


def test_the_doctor_brings_paused_trials_and_their_runs_together(copied: Path) -> None:
    one, other = paused()[:2] if len(paused()) > 1 else (paused()[0], paused()[0])
    tracker = MlflowTracker("sqlite:///mlruns/mlflow.db")
    tracker.finish_trial(runs()[one.number].run_id, "interrupted", {}, {}, None)
    result = invoke("doctor", "--fix")
    assert f"run trial-{one.number:03d} is interrupted and KILLED, but its trial is paused: copied" in result.output
    assert runs()[one.number].outcome == "paused" and invoke("doctor").exit_code == 0
    tracker.discard(runs()[other.number].run_id)
    result = invoke("doctor", "--fix")
    assert f"trial {other.number} is paused but has no run in the tracking store: the next run goes on" in result.output
    assert invoke(*RUN).exit_code == 0
    assert runs()[other.number].outcome == "paused" and invoke("doctor").exit_code == 0


def test_a_study_whose_study_store_was_lost_is_adopted_with_its_paused_trials(copied: Path) -> None:
    before = [(t.number, t.state, t.params, is_paused(t), t.intermediate_values) for t in study().trials]
    (copied / "mlruns" / "optuna.db").unlink()
    result = invoke(*RUN, "--adopt")
    assert result.exit_code == 0 and "nothing to do" in result.output
    assert [(t.number, t.state, t.params, is_paused(t), t.intermediate_values) for t in study().trials] == before
