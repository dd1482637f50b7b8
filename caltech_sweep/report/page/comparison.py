"""Two studies' trials held against each other, class by class."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from caltech_sweep.errors import UsageError
from caltech_sweep.report.page.section import Named


@dataclass(frozen=True)
class Change:
    """One class in two rows: images classified right, of how many."""

    name: str
    index: int  # in the page's list of classes
    right: tuple[int, int]
    total: tuple[int, int]

    @property
    def rates(self) -> tuple[float, float]:
        """Return the share classified right in each row."""
        return self.right[0] / self.total[0], self.right[1] / self.total[1]

    @property
    def difference(self) -> float:
        """Return the second row's share minus the first's."""
        first, second = self.rates
        return second - first


@dataclass(frozen=True)
class Comparison:
    """Every row that can be compared, and the two that are when the page opens."""

    rows: tuple[Named, ...]
    first: int
    second: int
    classes: tuple[str, ...]
    changes: tuple[Change, ...]  # of the pair shown, the greatest loss first

    @property
    def by_study(self) -> dict[str, list[tuple[int, str]]]:
        """Return (index, name) of the rows of each study."""
        found: dict[str, list[tuple[int, str]]] = {}
        for index, row in enumerate(self.rows):
            found.setdefault(row.study, []).append((index, row.name))
        return found

    def heading(self, index: int) -> str:
        """Return the name of one of the two rows, with its study's where they are of two studies."""
        row = self.rows[index]
        return row.name if self.rows[self.first].study == self.rows[self.second].study else f"{row.study}: {row.name}"

    @property
    def images(self) -> int:
        """Return the median number of test images of a class."""
        return int(statistics.median(change.total[0] for change in self.changes)) if self.changes else 0

    def counts(self) -> list[dict[str, list[int]]]:
        """Return what the page's script compares: for each row, images right and in all, by the page's classes."""
        places = {name: index for index, name in enumerate(self.classes)}
        found = []
        for row in self.rows:
            assert row.confusion is not None
            right, total = [0] * len(places), [0] * len(places)
            for name, hits, images in zip(
                row.confusion.classes, row.confusion.right, row.confusion.totals, strict=True
            ):
                right[places[name]], total[places[name]] = hits, images
            found.append({"right": right, "total": total})
        return found


def _chosen(name: str, rows: Sequence[Named]) -> int:
    """Return the row that ``--compare`` names; raise UsageError when there is none, or more than one."""
    places = [index for index, row in enumerate(rows) if name in (row.name, f"{row.study}:{row.name}")]
    if len(places) == 1:
        return places[0]
    if places:
        options = " or ".join(repr(f"{rows[index].study}:{rows[index].name}") for index in places)
        raise UsageError(f"--compare: several studies have a row {name!r}; write {options}")
    known = ", ".join(repr(row.name) for row in rows) or "none"
    raise UsageError(f"--compare: there is no row {name!r} with a confusion matrix; there are: {known}")


def _comparison(named: Sequence[Named], pair: tuple[str, str] | None) -> Comparison | None:
    """Return the comparison of two rows: the named ones, or the best and the worst on validation."""
    rows = [row for row in named if row.confusion is not None]
    if pair is not None:
        first, second = (_chosen(name, rows) for name in pair)
    elif len(rows) > 1:
        first, second = (pick(range(len(rows)), key=lambda i: (rows[i].merit, -i)) for pick in (max, min))
    else:
        return None
    classes = tuple(dict.fromkeys(name for row in rows if row.confusion for name in row.confusion.classes))
    plain = Comparison(tuple(rows), first, second, classes, ())
    one, other = (plain.counts()[index] for index in (first, second))
    changes = [
        Change(name, i, (one["right"][i], other["right"][i]), (one["total"][i], other["total"][i]))
        for i, name in enumerate(classes)
        if one["total"][i] and other["total"][i]
    ]
    changes.sort(key=lambda change: (round(change.difference, 9), change.index))
    return Comparison(tuple(rows), first, second, classes, tuple(changes))
