"""Whether rows are within their tolerance of the published figures."""

from __future__ import annotations

from collections.abc import Sequence

from caltech_sweep.errors import UsageError
from caltech_sweep.report.grid import note
from caltech_sweep.report.model import Reference, Table, TableRow


def outside(tables: Sequence[Table], explicit: bool) -> list[str]:
    """Return a sentence for each row outside its tolerance; a row without figures is outside.

    A study that gives no tolerance is not checked. Raises UsageError when that leaves nothing to check, or when it was
    asked for by name (``explicit``): a check that cannot fail must not look like one that passed.
    """
    unchecked = [table.study for table in tables if not _checkable(table)]
    if unchecked and (explicit or len(unchecked) == len(tables)):
        raise UsageError(
            f"--check: no row of {', '.join(map(repr, unchecked))} has a tolerance; "
            "add tolerance: 0.02 to the rows of the study file, and run the study again"
        )
    return [
        f"{table.study}: {row.name}: {sentence}"
        for table in tables
        if _checkable(table)
        for row in table.rows
        if row.kind == "row"
        for sentence in _problems(row)
    ]


def _checkable(table: Table) -> bool:
    return any(row.kind == "row" and row.tolerance is not None for row in table.rows)


def _problems(row: TableRow) -> list[str]:
    if row.state != "complete":
        return [f"{note(row)}, so there is nothing to hold against its reference"]
    checked = (("validation", row.val_reference), ("test", row.test_reference))
    return [text for part, reference in checked if (text := _problem(part, reference, row.tolerance))]


def _problem(part: str, reference: Reference | None, tolerance: float | None) -> str:
    if reference is None or tolerance is None:
        return ""
    if reference.difference is None:
        return f"it has no {part} accuracy to hold against its reference"
    distance = abs(reference.difference)
    if distance <= tolerance + 1e-9:  # 0.872 - 0.852 is no exact 0.02
        return ""
    side = "above" if reference.difference > 0 else "below"
    ours = reference.value + reference.difference
    return (
        f"{part} accuracy {ours:.3f} is {distance:.3f} {side} the reference {reference.value:.3f}, "
        f"more than its tolerance of {tolerance:g}"
    )
