"""Every file and folder name the system uses, in one place."""

from __future__ import annotations

import os
import re
from pathlib import Path

from caltech_sweep.errors import UsageError

STUDIES = Path("sweeps")
STORES = Path("mlruns")
MLFLOW_DB = STORES / "mlflow.db"
OPTUNA_DB = STORES / "optuna.db"
ARTIFACTS = STORES / "artifacts"
CALTECH_FOLDER = "101_ObjectCategories"


def file_name(study: str) -> str:
    """Return a study's name as the name of a file, which no other study's name gives."""
    return study.replace("%", "%25").replace("/", "%2F")


def study_name(file_name: str) -> str:
    """Return the study whose name gives a :func:`file_name`."""
    return file_name.replace("%2F", "/").replace("%25", "%")


def closest(folder: Path) -> Path:
    """Return a folder, or the closest place above it that is there: what must be written to make it."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def variable(path: str) -> str:
    """Return the variable that a path begins with and that no shell has replaced, such as ``$HOME``, or ""."""
    found = re.match(r"(\$\w+|\$\{\w+\}|%\w+%)(?=[/\\]|$)", path)
    return found[0] if found and not os.path.lexists(found[0]) else ""


def expanded(path: str) -> Path:
    """Return a path whose ``~`` or ``~user`` is the home folder.

    Raises UsageError for an unknown user, for a variable that no shell has replaced, and for no path at all.
    """
    found = os.path.expanduser(path)
    wrong = ""
    if not path:
        raise UsageError("a path is empty; is a variable not set that stands for it?")
    if found.startswith("~"):
        wrong = "names the home folder of a user that is not on this machine; write the whole path"
    elif name := variable(found):
        wrong = f"begins with a variable that no shell has replaced; write what {name} stands for"
    if wrong:
        raise UsageError(f"{path!r} {wrong}, or ./ in front of it if its name begins with a {found[0]}")
    return Path(found)


def data_home() -> Path:
    """Return where datasets and decoded caches live: ``CALTECH_SWEEP_DATA`` or ``./data``."""
    return expanded(os.environ.get("CALTECH_SWEEP_DATA") or "data")


def caltech_root() -> Path:
    """Return the Caltech-101 class-folder root: ``CALTECH101_ROOT`` or the downloaded copy."""
    named = os.environ.get("CALTECH101_ROOT")
    return expanded(named) if named else data_home() / CALTECH_FOLDER


def image_cache() -> Path:
    """Return the folder of decoded image caches."""
    return data_home() / "cache"


def cache_folder() -> Path:
    """Return the folder of training states and frozen features that trials share."""
    return data_home() / "reuse"
