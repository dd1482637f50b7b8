"""Every file and folder name the system uses, in one place."""

from __future__ import annotations

import os
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


def expanded(path: str) -> Path:
    """Return a path whose ``~`` or ``~user`` is the home folder; raise UsageError for an unknown user."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise UsageError(
            f"{path!r} names the home folder of a user that is not on this machine; write the whole path, or ./ in "
            "front of it if its name begins with a ~"
        )
    return Path(found)


def data_home() -> Path:
    """Return where datasets and decoded caches live: ``CALTECH_SWEEP_DATA`` or ``./data``."""
    return expanded(os.environ.get("CALTECH_SWEEP_DATA", "data"))


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
