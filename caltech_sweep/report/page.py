"""The report as one page that opens offline: tables, curves, the search, confusions, classes, wrong images.

Nothing is fetched: style, script, drawings and thumbnails are inside, and the page's own policy forbids the rest.
"""

from __future__ import annotations

import base64
import hashlib
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from caltech_sweep import stores
from caltech_sweep.errors import CaltechSweepError, UsageError
from caltech_sweep.records import TrialRecord
from caltech_sweep.report import charts, curves
from caltech_sweep.report.build import choose
from caltech_sweep.report.confusion import (
    Confusion,
    Pair,
    Wrong,
    confused_pairs,
    most_confidently_wrong,
    read_confusion,
)
from caltech_sweep.report.entries import metric, row_entries, sampled_entries
from caltech_sweep.report.grid import one_line
from caltech_sweep.report.model import Table, TableRow
from caltech_sweep.report.render import html_table
from caltech_sweep.report.tables import build_table
from caltech_sweep.report.thumbnails import datasets_of, find_thumbnails
from caltech_sweep.tracking_history import Histories, read_histories
from caltech_sweep.tracking_read import Reader, StoredStudy, open_reader

LOCAL_UI = "http://127.0.0.1:5000"  # where `caltech-sweep ui` serves a local store
PAIRS = 15
THUMBNAILS = 18
MATRICES = 16
HANDFUL = 5  # complete sampled trials, without which importances say nothing
POINTS = 1000  # of the search's history

_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # what neither HTML nor a file can hold

Importances = Callable[[Mapping[str, Any], Sequence[tuple[Mapping[str, str], float]]], Mapping[str, float]]


@dataclass(frozen=True)
class Options:
    """What a reader chose: sampled trials in the tables, two rows to compare, where the images are."""

    best: int = 3
    compare: tuple[str, str] | None = None
    data: str | None = None
    importances: Importances | None = None  # Optuna's; the report itself knows no Optuna


@dataclass(frozen=True)
class Page:
    """A page, and the tables in it."""

    html: str
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Curves:
    """Drawings of curves, and the same as a table."""

    id: str
    lines: tuple[curves.Line, ...]
    groupings: tuple[curves.Grouping, ...]
    drawings: tuple[tuple[str, str], ...]  # title, svg
    left_out: int = 0


@dataclass(frozen=True)
class Search:
    """What the sampled trials show."""

    sentence: str
    history: str = ""  # svg
    history_label: str = ""
    importance: str = ""  # svg
    shares: Mapping[str, float] = field(default_factory=dict)
    importance_note: str = ""


@dataclass(frozen=True)
class Named:
    """A complete row of a study, with its confusion matrix where that is not lost."""

    study: str
    name: str
    run: TrialRecord
    val: float
    confusion: Confusion | None


@dataclass(frozen=True)
class Confusions:
    """The matrices of a study, over one another, and the most confused pairs of each."""

    id: str
    svg: str
    names: tuple[str, ...]
    shown: int
    pairs: tuple[tuple[Pair, ...], ...]
    classes: tuple[str, ...]
    cells: tuple[tuple[tuple[int, int, int], ...], ...]


@dataclass(frozen=True)
class Thumb:
    """A wrong image and its picture, which may be missing."""

    wrong: Wrong
    picture: str | None


@dataclass(frozen=True)
class Section:
    """All of one study."""

    id: str
    table: Table
    table_html: str
    counts: str
    best: TableRow | None
    curves: Curves | None
    search: Search
    confusions: Confusions | None
    lost: tuple[str, ...]  # rows whose files are lost
    wrong_of: str
    wrong: tuple[Thumb, ...]
    wrong_note: str


# -- one study ---------------------------------------------------------------------------------------------------------


def _curves(drawn: Sequence[curves.Line], section: str, across: bool = False, left_out: int = 0) -> Curves | None:
    if not drawn:
        return None
    groupings = curves.groupings(drawn, across)
    drawings = tuple(
        (title, charts.curves_svg(drawn, groupings, key, title, f"{section}-{key}"))
        for key, title in curves.METRICS.items()
    )
    return Curves(f"{section}-curves", tuple(drawn), tuple(groupings), drawings, left_out)


def _history_points(study: StoredStudy) -> list[tuple[int, float, bool]]:
    """Return (number, validation accuracy, whether complete) of the sampled trials that have one."""
    points = []
    for trial in curves.sampled(study):
        complete = trial.outcome == "complete"
        value = metric(trial, "best/val_accuracy" if complete else "val/accuracy")
        if value is not None and trial.outcome in ("complete", "pruned"):
            points.append((trial.number, value, complete))
    return points[-POINTS:]


def _search(study: StoredStudy, row_best: float | None, importances: Importances | None, section: str) -> Search:
    points = _history_points(study)
    complete = [trial for trial in curves.sampled(study) if trial.outcome == "complete"]
    scored = [(trial.params, score) for trial in complete if (score := metric(trial, "best/val_accuracy")) is not None]
    if not points:
        return Search("No sampled trial has ended yet, so there is no search to show.")
    pruned = sum(not done for _, _, done in points)
    sentence = f"{len(points)} sampled trials: {len(points) - pruned} complete, {pruned} pruned."
    label = f"Validation accuracy by trial number. {sentence}"
    if scored:
        best = max(scored, key=lambda item: item[1])[1]
        label += f" The best sampled trial has {best:.3f}."
    if row_best is not None:
        label += f" The best row has {row_best:.3f}."
    history = charts.history_svg(points, row_best, label, f"{section}-history")
    if len(scored) < HANDFUL:
        note = f"Importances need at least {HANDFUL} complete sampled trials; this study has {len(scored)}."
        return Search(sentence, history, label, importance_note=note)
    shares = importances(study.record.document.get("space") or {}, scored) if importances else {}
    if not shares:
        return Search(sentence, history, label, importance_note="The sampled trials do not differ enough to tell.")
    note = f"The share of the differences in validation accuracy that each setting explains, from {len(scored)} trials."
    return Search(sentence, history, label, charts.importance_svg(shares, f"{section}-importance"), shares, note)


def _named(study: StoredStudy, best: int, reader: Reader) -> list[Named]:
    """Return a study's complete rows and best sampled trials, in the table's order."""
    found = []
    for entry in [*row_entries(study), *sampled_entries(study, best, ())]:
        if entry.runs:
            run = entry.runs[0]
            val = metric(run, "best/val_accuracy") or 0.0
            found.append(Named(study.record.name, one_line(entry.name), run, val, read_confusion(reader.text, run)))
    return found


def _best(named: Sequence[Named]) -> Named:
    return max(named, key=lambda row: row.val)


def _confusions(named: Sequence[Named], section: str) -> Confusions | None:
    kept = [row for row in named if row.confusion is not None]
    if not kept:
        return None
    top = _best(kept)
    assert top.confusion is not None
    classes = top.confusion.classes
    kept = [row for row in kept if row.confusion is not None and row.confusion.classes == classes][:MATRICES]
    kept = kept if top in kept else [top, *kept[1:]]
    matrices = [row.confusion for row in kept if row.confusion is not None]
    shown, name = kept.index(top), f"{section}-matrix"
    return Confusions(
        name,
        charts.matrix_svg(matrices, shown, name),
        tuple(row.name for row in kept),
        shown,
        tuple(tuple(confused_pairs(matrix, PAIRS)) for matrix in matrices),
        classes,
        tuple(matrix.cells for matrix in matrices),
    )


def _thumbnails(
    study: StoredStudy, named: Sequence[Named], reader: Reader, data: str | None
) -> tuple[str, tuple[Thumb, ...], str]:
    """Return whose wrong images are shown, the images, and what is to be said instead of them or besides."""
    if not named:
        return "", (), "No trial is complete yet."
    top = _best(named)
    wrong = most_confidently_wrong(reader.text, top.run, THUMBNAILS)
    if wrong is None:
        return top.name, (), f"The predictions of {top.name} are lost or damaged."
    try:
        thumbnail = find_thumbnails(datasets_of(study.record.document, top.run, data))
    except (CaltechSweepError, TypeError) as error:
        return top.name, tuple(Thumb(item, None) for item in wrong), f"The images are not shown: {error}."
    thumbs = tuple(Thumb(item, thumbnail(item.image)) for item in wrong)
    missing = sum(thumb.picture is None for thumb in thumbs)
    note = f"{missing} of these images cannot be read in the dataset's folder." if missing else ""
    return top.name, thumbs, note


def _counts(study: StoredStudy) -> str:
    counts = Counter(trial.outcome.replace("_", " ") for trial in study.trials)
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "none yet"


def _section(
    index: int,
    study: StoredStudy,
    table: Table,
    named: Sequence[Named],
    histories: Histories,
    reader: Reader,
    o: Options,
) -> Section:
    name = f"s{index}"
    scored = [row for row in table.rows if row.val is not None]
    best = max(scored, key=lambda row: row.val.value, default=None)  # type: ignore[union-attr]
    row_scores = [row.val.value for row in scored if row.kind == "row" and row.val is not None]
    wrong_of, wrong, wrong_note = _thumbnails(study, named, reader, o.data)
    left_out = max(0, len({trial.number for trial in study.trials}) - curves.MOST)
    return Section(
        id=name,
        table=table,
        # The box of a wide table can be scrolled with the keyboard, and says what it holds.
        table_html=html_table(table).replace('<div class="scroll">', '<div class="scroll" tabindex="0">', 1),
        counts=_counts(study),
        best=best,
        curves=_curves(curves.lines(study, histories), name, left_out=left_out),
        search=_search(study, max(row_scores, default=None), o.importances, name),
        confusions=_confusions(named, name),
        lost=tuple(row.name for row in named if row.confusion is None),
        wrong_of=wrong_of,
        wrong=wrong,
        wrong_note=wrong_note,
    )


# -- all studies -------------------------------------------------------------------------------------------------------


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
        first, second = (pick(range(len(rows)), key=lambda i: (rows[i].val, -i)) for pick in (max, min))
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


def _across(sections: Sequence[Section]) -> Curves | None:
    """Return the best row of each study in one drawing."""
    drawn = []
    for section in sections:
        if section.curves and section.best:
            for line in section.curves.lines:
                if line.name == one_line(section.best.name):
                    title = f"{section.table.study}: {line.name}"
                    drawn.append(curves.Line(title, "row", line.study, line.outcome, line.settings, line.metrics))
                    break
    return _curves(drawn, "across", across=True) if len(drawn) > 1 else None


def _link(uri: str, experiment_id: str) -> Callable[[str], str]:
    served = uri.startswith(("http://", "https://"))
    base = stores.hide_secrets(uri).replace("***@", "").rstrip("/") if served else LOCAL_UI
    return lambda run_id: f"{base}/#/experiments/{experiment_id}/runs/{run_id}"


def build_page(studies: Sequence[str], options: Options, tracking_uri: str | None) -> Page:
    """Return the page of some studies, or of all, from the tracking store and, for thumbnails, the dataset's folder.

    Raises UsageError for a study or a row that is not there, StoreError for a store that cannot be read or is empty.
    """
    reader = open_reader(tracking_uri)
    stored = reader.studies(choose(studies, reader.names(), reader.uri))
    runs = [run.run_id for study in stored for _, _, run in curves.drawn(study)]
    histories = read_histories(reader.uri, runs, list(curves.METRICS))
    sections, everything = [], []
    for index, study in enumerate(stored):
        link = _link(reader.uri, study.record.experiment_id)
        table = build_table(study, options.best, reader.text, link)
        named = _named(study, options.best, reader)
        sections.append(_section(index, study, table, named, histories, reader, options))
        everything += named
    html = _render(sections, _comparison(everything, options.compare), _across(sections), reader.uri)
    return Page(html, tuple(section.table for section in sections))


def _data(sections: Sequence[Section], comparison: Comparison | None) -> dict[str, Any]:
    """Return what the page's script needs."""
    views = [section.confusions for section in sections if section.confusions]
    return {
        "matrices": {view.id: {"classes": view.classes, "cells": view.cells} for view in views},
        "rows": comparison.counts() if comparison else [],
    }


def _render(sections: Sequence[Section], comparison: Comparison | None, across: Curves | None, uri: str) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("caltech_sweep.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def source(name: str) -> Markup:
        assert environment.loader is not None
        return Markup(environment.loader.get_source(environment, name)[0])

    script = source("page.js")
    # The browser runs the script with this digest and no other, whatever a study's title may hold.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = sections[0].table.title if len(sections) == 1 else f"{len(sections)} studies"
    html: str = environment.get_template("page.html").render(
        title=one_line(title),
        sections=sections,
        comparison=comparison,
        across=across,
        styles=range(curves.STYLES),
        local_ui=None if uri.startswith("http") else LOCAL_UI,
        style=source("page.css"),
        script=script,
        digest=digest,
        data=_data(sections, comparison),
        svg=Markup,
    )
    return _NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", html)
