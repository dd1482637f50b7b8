"""Locks between processes, and a system that has none."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from caltech_sweep.files import create_atomically, locked, remove_abandoned

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
here = Path.cwd()
with files.locked(here) as held:
    assert held is None
with stores.study_lock(stores.study_store(f"{here}/x.db"), "study"), files.alone(here), Cache(here, 0).lock("entry"):
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
    for name in ("work-old", "mine"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    remove_abandoned(tmp_path / "mine", "work-")
    assert (tmp_path / "work-old").is_dir()
    remove_abandoned(tmp_path, "work-")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_nothing_outside_and_nothing_that_is_worked_in_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    for folder in (home / "work-here" / "below", home / "[work]", outside / "work-kept"):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (home / "work-link").symlink_to(outside)
    (home / "work-file").touch()
    for place in (*home.iterdir(), outside, outside / "work-kept"):
        os.utime(place, (0, 0))
    monkeypatch.chdir(home / "work-here" / "below")
    before = sorted(tmp_path.rglob("*"))
    for prefix in ("work-", "", "[a-z]", "../outside/work-", "*"):
        remove_abandoned(home, prefix)
        remove_abandoned(home / "nowhere", prefix)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lock_keeps_another_holder_out_and_goes_when_its_process_is_killed(tmp_path: Path) -> None:
    code = "import sys; from caltech_sweep.files import locked\n"
    code += "with locked(__import__('pathlib').Path(sys.argv[1])) as held: print(held, flush=True); sys.stdin.read()"
    for place in (tmp_path / "file.lock", tmp_path):
        command = [sys.executable, "-c", code, str(place)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None and holder.stdout.readline() == "True\n"
            with locked(place, 0.2) as held:
                assert held is False
            holder.kill()
        with locked(place) as held:
            assert held is True


HALF = """
import os, signal, sys
from pathlib import Path
from caltech_sweep.files import create_atomically
with create_atomically(Path(sys.argv[1])) as made:
    made.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_file_that_is_made_is_absent_old_or_new_and_what_a_kill_leaves_goes(tmp_path: Path) -> None:
    target = tmp_path / "below" / "file[1]"
    for content in (None, "old"):
        if content:
            with create_atomically(target) as made:
                made.write_text(content)
        assert subprocess.run([sys.executable, "-c", HALF, str(target)]).returncode < 0
        assert target.exists() is bool(content) and (not content or target.read_text() == content)
    left = [place for place in target.parent.iterdir() if place != target]
    assert len(left) == 2
    for place in left:
        os.utime(place, (0, 0))
    with pytest.raises(RuntimeError), create_atomically(target) as made:
        made.write_text("failed")
        raise RuntimeError
    assert target.read_text() == "old" and list(target.parent.iterdir()) == [target]


def test_of_several_that_make_a_file_or_folder_at_once_one_is_kept_whole(tmp_path: Path) -> None:
    def file(number: int) -> None:
        with create_atomically(tmp_path / "file", replace=False) as made:
            made.write_text(f"{number}" * 1000)

    def folder(number: int) -> None:
        with create_atomically(tmp_path / "folder") as made:
            made.mkdir()
            (made / "content").write_text(f"{number}" * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(file, range(8)))
        first = (tmp_path / "file").read_text()
        list(pool.map(folder, range(8)))
    file(9)
    folder(9)
    assert (tmp_path / "file").read_text() == first == first[0] * 1000
    kept = (tmp_path / "folder" / "content").read_text()
    assert kept == kept[0] * 1000 and kept[0] != "9"
    assert sorted(place.name for place in tmp_path.iterdir()) == ["file", "folder"]
