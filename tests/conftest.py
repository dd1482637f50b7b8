"""What many tests need: a study that trains in a second, and a place of its own for every store."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from caltech_sweep.sweep.executors.processes import STOPPING, change_mask
from helpers.migrations import migrate_once
from helpers.places import Cli, clone, furnish, invoke, ran

ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
# One thread a process: the suite's tiny models gain nothing from more, and it shares the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A signal that a shell has the suite ignore, as nohup and "&" do, would be ignored by every process that it starts; one
# that has a handler is not.
for number in STOPPING:
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)
# Few examples by default, since each run draws others; HYPOTHESIS_PROFILE=thorough draws many.
settings.register_profile("quick", max_examples=25, deadline=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first new store of each kind is copied to, for all later ones."""
    return tmp_path_factory.mktemp("templates")


@pytest.fixture(autouse=True)
def no_other_place(monkeypatch: pytest.MonkeyPatch, templates: Path) -> None:
    """Let no store or dataset outside a test's own folder be seen."""
    migrate_once(templates)
    for name in (*ADDRESSES, "CALTECH101_ROOT", "CALTECH_SWEEP_DATA", "CALTECH_SWEEP_NAMESPACE", "TORCH_HOME"):
        monkeypatch.setenv(name, "")  # or what a test leaves there would stay
        monkeypatch.delenv(name)


def signals() -> tuple[object, ...]:
    """Return what this process does with the signals that stop a run: processes that it starts inherit a part of it."""
    return change_mask("SIG_BLOCK", ()), *map(signal.getsignal, STOPPING)


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """Let a test leave no signal blocked, ignored or handled otherwise: later ones send them to what they start."""
    before = signals()
    yield
    assert signals() == before


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
    output = ran(folder, "run", "tiny", "--in-process", "--threads", "1")
    assert "study tiny: 3 complete" in output, output
    return folder


@pytest.fixture
def finished(finished_place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in the folder of the finished study."""
    monkeypatch.chdir(finished_place)
    return finished_place


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
