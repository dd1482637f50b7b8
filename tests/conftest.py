"""What many tests need: a study that trains in a second, and a place of its own for every store."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

# One thread a process: the suite's tiny models gain nothing from more, and it shares the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = """\
title: A tiny study
dataset: {name: shapes, resize: 32, crop: 32, classes: 3, images_per_class: 8}
trials: 3
sampler: {name: random, seed: 0}
fixed: {arch: resnet18, batch_size: 8, epochs: 2}
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


@pytest.fixture(autouse=True)
def no_other_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no store or dataset outside a test's own folder be seen."""
    for name in ("MLFLOW_TRACKING_URI", "CALTECH101_ROOT", "CALTECH_SWEEP_DATA", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)


def furnish(folder: Path) -> Path:
    """Put ``sweeps/tiny.yaml`` into a folder."""
    (folder / "sweeps").mkdir()
    (folder / "sweeps" / "tiny.yaml").write_text(TINY, encoding="utf-8")
    return folder


def invoke(*arguments: str) -> Result:
    """Run a ``caltech-sweep`` command in this process; a traceback fails the test."""
    from caltech_sweep.cli import main

    result = CliRunner().invoke(main, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``sweeps/tiny.yaml`` and nothing else."""
    monkeypatch.chdir(tmp_path)
    return furnish(tmp_path)


@pytest.fixture
def cli(place: Path) -> Cli:
    """Run commands in a new working folder."""
    return invoke


@pytest.fixture(scope="session")
def finished_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder whose study ``tiny`` has run; made once, so tests leave its study as it is."""
    folder = furnish(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MLFLOW_TRACKING_URI", "CALTECH101_ROOT", "CALTECH_SWEEP_DATA"):
            patch.delenv(name, raising=False)
        result = invoke("run", "tiny", "--in-process", "--threads", "1")
        assert result.exit_code == 0 and "study tiny: 3 complete" in result.output, result.output
    return folder


@pytest.fixture
def finished(finished_place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in the folder of the finished study."""
    monkeypatch.chdir(finished_place)
    return finished_place


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


@pytest.fixture
def copied(finished_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a copy of the finished study's folder, which a test may change."""
    clone(finished_place, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 30 MB; a test that asks for it is skipped where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
