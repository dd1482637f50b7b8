"""What a site sets once for everybody: a namespace for the names of studies, and a file of options.

A namespace is what a study's name begins with, up to its last slash: ``ana/transfer``. A name that ends with a slash
stands for all studies below it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from caltech_sweep.errors import UsageError
from caltech_sweep.text import suggestion

VARIABLE = "CALTECH_SWEEP_SETTINGS"
FILE = Path("/etc/caltech-sweep.yaml")  # unless the variable names another one
OPTIONS = (
    "executor",
    "address",
    "slots",
    "cpus-per-trial",
    "gpus-per-trial",
    "upload-from-workers",
    "cache",
    "cache-size",
    "namespace",
    "tracking-uri",
    "storage",
)


def within(namespace: str | None, study: str | None) -> str | None:
    """Return a study's whole name: one with a slash is whole; all of a namespace where none is named, None for all."""
    if not namespace or (study and "/" in study):
        return study
    return f"{namespace}/{study or ''}"


def select(study: str | None, names: Iterable[str]) -> list[str]:
    """Return the names that one stands for: all where there is none."""
    if study is None or study.endswith("/"):
        return [name for name in names if name.startswith(study or "")]
    return [study]


def settings() -> Mapping[str, Any]:
    """Return the options that the site's file sets, by their names with underscores.

    Raises UsageError for a file that is named and not there, or for an option that it cannot set, StudyFileError for
    one that is no YAML.
    """
    named = os.environ.get(VARIABLE)
    file = Path(named) if named else FILE
    if not named and not file.is_file():
        return {}
    from caltech_sweep.study.file import read_mapping  # most sites have no file, and need no YAML for one

    values = read_mapping(file)
    for key, value in values.items():
        if key not in OPTIONS:
            raise UsageError(f"{file}: cannot set {key!r}{suggestion(str(key), OPTIONS)}")
        if not isinstance(value, str | int | float):
            raise UsageError(f"{file}: {key} must be one value, such as {key}: {'ray' if key == 'executor' else '...'}")
    return {key.replace("-", "_"): value for key, value in values.items()}
