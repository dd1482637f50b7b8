"""What CONTRIBUTING.md shows works: its entries are added to the registries, and used as a study would."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from caltech_sweep.config import TrialConfig
from caltech_sweep.data.registry import DATASETS
from caltech_sweep.errors import ModelError
from caltech_sweep.metrics import METRICS
from caltech_sweep.study import components
from caltech_sweep.study.definition import Component
from caltech_sweep.sweep.executors.base import Done, Epoch, Epochs, Job
from caltech_sweep.tracking.records import TrialRecord
from caltech_sweep.tracking.writer import MlflowTracker
from caltech_sweep.training import augment, networks
from caltech_sweep.training.augment import AUGMENTATIONS
from caltech_sweep.training.models import build_model
from caltech_sweep.training.schedule import SCHEDULES
from helpers.places import RUN, invoke

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^### (.*?)\n.*?^```python\n(.*?)^```", PAGE.replace("### A setting", "## "), re.M | re.S))


@pytest.fixture(autouse=True)
def as_they_were() -> Iterator[None]:
    """Take out again what a block adds."""
    registries: tuple[dict[str, Any], ...] = (
        *(networks.SOURCES, components.SAMPLERS, components.PRUNERS),  # type: ignore[assignment]
        *(SCHEDULES, AUGMENTATIONS, METRICS, DATASETS),
    )
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


def run_first(*settings: str) -> TrialRecord:
    """Run one row of the tiny study with settings, and return its run."""
    options = [word for setting in settings for word in ("--set", setting)]
    result = invoke(*RUN, "--row", "First", *options)
    assert result.exit_code == 0 and "1 complete" in result.output, result.output
    tracker = MlflowTracker()
    study = tracker.study("tiny")
    assert study is not None
    return tracker.trials(study)[0]


def a_schedule(made: dict[str, Any], place: Path) -> None:
    run = run_first("schedule=halving", "lr=0.02")
    rates = MlflowTracker().client.get_metric_history(run.run_id, "lr")
    assert [metric.value for metric in rates] == [0.02, 0.01]


def an_augmentation(made: dict[str, Any], place: Path) -> None:
    assert "negative" in run_first("epochs=1", "augment=[negative]").params["augment"]
    images, config = torch.rand(8, 3, 4, 4), TrialConfig(augment=("negative",))
    changed = augment.apply(images, augment.draw(config, 1, 8))
    pairs = list(zip(images, changed, strict=True))
    assert all(torch.equal(other, one) or torch.equal(other, 1 - one) for one, other in pairs)
    assert {torch.equal(one, other) for one, other in pairs} == {True, False}


def a_metric(made: dict[str, Any], place: Path) -> None:
    study = place / "sweeps" / "tiny.yaml"
    study.write_text(study.read_text() + "objective: val/error\n")
    metrics = run_first().metrics
    assert metrics["test/error"] == pytest.approx(1 - metrics["test/accuracy"])
    assert metrics["best/val_error"] == pytest.approx(1 - metrics["best/val_accuracy"])


def a_dataset(made: dict[str, Any], place: Path) -> None:
    assert run_first("epochs=1", "dataset.name=drawings").params["dataset.name"] == "drawings"


def a_network(made: dict[str, Any], place: Path) -> None:
    config = TrialConfig(arch="mine/squeezenet1_1")
    assert sum(parameter.numel() for parameter in build_model(config, 3).parameters()) == 724_035
    assert build_model(config, 3)(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    with pytest.raises(ModelError, match="squeezenet1_1"):
        networks.source_of("mine/squeezenet1_2").check("mine/squeezenet1_2")
    assert run_first("epochs=1", "arch=mine/squeezenet1_1").params["arch"] == "mine/squeezenet1_1"


def a_pruner(made: dict[str, Any], place: Path) -> None:
    assert isinstance(components.make_pruner(Component("patient", {})), optuna.pruners.NopPruner)
    study = place / "sweeps" / "tiny.yaml"
    study.write_text(study.read_text() + "pruner: {name: patient}\n")
    assert invoke("plan", "tiny").exit_code == 0
    study.write_text(study.read_text().replace("patient", "patent"))
    refused = invoke("plan", "tiny")
    assert refused.exit_code == 2 and "did you mean 'patient'?" in refused.output


def an_executor(made: dict[str, Any], place: Path) -> None:
    def epochs(job: Job) -> Epochs:
        yield Epoch(job.number, 1, {"val/accuracy": 0.5})
        return Done(job.number, {"best/val_accuracy": 0.5})

    executor = made["Counting"](epochs, "cpu")
    assert executor.free() == 1
    executor.submit(Job(0, TrialConfig(epochs=1), place))
    events = [*executor.poll(0), *executor.poll(0)]
    assert [type(event) for event in events] == [Epoch, Done] and executor.submitted == 1 == executor.free()


CHECKS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "A learning-rate schedule": a_schedule,
    "An augmentation": an_augmentation,
    "A metric": a_metric,
    "A dataset": a_dataset,
    "A source of networks": a_network,
    "A sampler or a pruner": a_pruner,
    "An executor": an_executor,
}


def test_every_entry_that_is_shown_is_tried_here() -> None:
    assert BLOCKS.keys() == CHECKS.keys()


@pytest.mark.parametrize("heading", CHECKS)
def test_an_entry_is_added_as_it_is_written_and_used(heading: str, place: Path) -> None:
    made: dict[str, Any] = {}
    exec(BLOCKS[heading], made)
    CHECKS[heading](made, place)


def test_every_file_target_and_test_that_is_named_exists() -> None:
    named = set(re.findall(r"(?:tests|caltech_sweep|docs)/[\w/]+\.\w+(?:::\w+)?", PAGE))
    for name in named:
        file, _, test = name.partition("::")
        assert (ROOT / file).is_file() and (not test or f"def {test}(" in (ROOT / file).read_text()), name
    rooms = re.findall(r"^\| (`.*`) \|", PAGE, re.M)
    for room in re.findall(r"`([\w./]+)`", " ".join(rooms)):
        assert (ROOT / "caltech_sweep" / room).exists(), room
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"`make ([a-z-]+)", PAGE)) <= targets
