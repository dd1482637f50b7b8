"""The report: tables of chosen studies, rendered, and checked against the published figures."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from caltech_sweep.errors import StoreError, UsageError
from caltech_sweep.report.check import outside
from caltech_sweep.report.model import Table
from caltech_sweep.report.render import RENDERERS
from caltech_sweep.report.tables import REPORT, Link, build_table, told_apart
from caltech_sweep.stores import Address, Store
from caltech_sweep.study.site import select
from caltech_sweep.tracking.reader import Reader, open_reader


def _ordered(names: Sequence[str]) -> list[str]:
    """Return the report's studies in its own order, then the others as they are."""
    known = [name for name in REPORT if name in names]
    return known + [name for name in names if name not in REPORT]


def choose(asked: Sequence[str], stored: Sequence[str], store: Store) -> list[str]:
    """Return the studies to show; raise StoreError or UsageError when there is none, or one is not in the store."""
    if not stored:
        raise StoreError(
            f"the tracking store {store.shown} has no study yet; run one first, such as `make sweep STUDY=demo`"
        )
    asked = [name for each in asked for name in select(each, stored) or [each]]
    for name in asked:
        if name not in stored:
            near = difflib.get_close_matches(name, stored, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(_ordered(stored))}"
            raise UsageError(f"there is no study {name!r} in the tracking store {store.shown}; {hint}")
    return list(dict.fromkeys(asked)) or _ordered(stored)


def _link(reader: Reader, experiment_id: str) -> Link:
    """Return how to link to a run: only a server has addresses that show one."""
    base = reader.store.page
    return lambda run_id: f"{base}/#/experiments/{experiment_id}/runs/{run_id}" if base else None


def load_tables(studies: Sequence[str], best: int, tracking_uri: Address, everything: bool = False) -> list[Table]:
    """Read the tables of some studies, or of all, from the tracking store only; with ``everything``, every trial.

    Raises UsageError for a study that is not in the store, StoreError for a store that cannot be read or is empty.
    """
    reader = open_reader(tracking_uri)
    names = choose(studies, reader.names(), reader.store)
    return told_apart(
        [
            build_table(study, best, reader.text, _link(reader, study.record.experiment_id), everything)
            for study in reader.studies(names)
        ]
    )


def lists_all(kind: str | None) -> bool:
    """Tell whether a format is for programs, which get every trial."""
    return kind in ("csv", "json")


def render(tables: Sequence[Table], kind: str, everything: bool = False, width: int | None = None) -> str:
    """Return tables as markdown, html, latex, csv or json; with ``everything``, all their trials in each format.

    With a ``width`` they are for a terminal that has so many columns.
    """
    if width is not None:
        from caltech_sweep.report.terminal import terminal_table

        return "\n".join(terminal_table(table, width, everything) for table in tables)
    return RENDERERS[kind](tables, everything)


def build_report(studies: Sequence[str], kind: str, best: int, tracking_uri: Address, everything: bool = False) -> str:
    """Return the tables of some studies, or of all, as markdown, html, latex, csv or json."""
    return render(load_tables(studies, best, tracking_uri, everything or lists_all(kind)), kind, everything)


def check_report(studies: Sequence[str], tracking_uri: Address) -> list[str]:
    """Return a sentence for each row of some studies, or of all, that is outside its tolerance of the reference."""
    return outside(load_tables(studies, 0, tracking_uri), explicit=bool(studies))
