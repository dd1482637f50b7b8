"""Locks between processes, and a system that has none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = """
import importlib, os, pkgutil, sys
sys.modules["fcntl"] = None  # an import of it fails, as on Windows
import caltech_sweep
for module in pkgutil.walk_packages(caltech_sweep.__path__, "caltech_sweep."):
    if module.name != "caltech_sweep.__main__":
        importlib.import_module(module.name)
from pathlib import Path
from caltech_sweep import files, stores
from caltech_sweep.training.cache import Cache
assert not files.AVAILABLE
here = Path.cwd()
with stores.study_lock(f"sqlite:///{here}/x.db", "study"), files.alone(here), Cache(here, 0).lock("entry"):
    with files.locked_directory(here, "work-") as place:
        os.utime(place, (0, 0))
        files.remove_abandoned(here, "work-")
        assert place.is_dir()  # nobody can tell that its process has died
    assert not place.exists()
print("done")
"""


@pytest.mark.slow
def test_without_fcntl_every_module_imports_and_what_needs_a_lock_goes_on(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.endswith("done\n"), result.stderr


HOLD = """
import sys
from pathlib import Path
from caltech_sweep.files import locked_directory
with locked_directory(Path.cwd(), "work-") as place:
    print(place, flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_abandoned_when_its_process_was_killed_and_not_before(tmp_path: Path) -> None:
    from caltech_sweep.files import remove_abandoned

    with subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        place = Path(holder.stdout.readline().strip())
        assert place.parent == tmp_path
        os.utime(place, (0, 0))
        remove_abandoned(tmp_path, "work-")
        assert place.is_dir()
        holder.kill()
    remove_abandoned(tmp_path, "work-")
    assert not place.exists()


def test_only_what_has_the_prefix_and_lies_in_the_folder_goes(tmp_path: Path) -> None:
    from caltech_sweep.files import remove_abandoned

    for name in ("work-old", "mine"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    remove_abandoned(tmp_path / "mine", "work-")
    assert (tmp_path / "work-old").is_dir()
    remove_abandoned(tmp_path, "work-")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
