"""One study's part of the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caltech_sweep.errors import CaltechSweepError
from caltech_sweep.metrics import Objective
from caltech_sweep.report.entries import metric, pick, row_entries, sampled_entries
from caltech_sweep.report.grid import one_line
from caltech_sweep.report.model import Importance, Table, TableRow
from caltech_sweep.report.page import charts, curves
from caltech_sweep.report.page.confusion import (
    Confusion,
    Pair,
    Wrong,
    confused_pairs,
    most_confidently_wrong,
    read_confusion,
)
from caltech_sweep.report.page.effort import Effort, effort_of
from caltech_sweep.report.page.thumbnails import datasets_of, find_thumbnails
from caltech_sweep.report.render import html_table
from caltech_sweep.report.statistics import ALPHA
from caltech_sweep.text import counted
from caltech_sweep.tracking.history import Histories, Moment
from caltech_sweep.tracking.reader import Reader, StoredStudy
from caltech_sweep.tracking.records import PAUSED_AT, SUGGESTED_BY, TrialRecord, whole

PAIRS = 15
THUMBNAILS = 18
MATRICES = 16
POINTS = 1000  # of the search's history


Importances = Callable[[Mapping[str, Any], Sequence[tuple[Mapping[str, str], float]]], Importance | None]


@dataclass(frozen=True)
class Options:
    """What a reader chose: sampled trials in the tables, two rows to compare, where the images are."""

    best: int = 3
    compare: tuple[str, str] | None = None
    data: str | None = None
    importances: Importances | None = None  # Optuna's; the report itself knows no Optuna
    everything: bool = False  # every trial in the tables


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
    importance_note: str = ""
    effort: Effort | None = None
    marks: frozenset[str] = frozenset()  # of the history: outcomes other than complete, and "random"


@dataclass(frozen=True)
class Named:
    """A complete row of a study, with its confusion matrix where that is not lost."""

    study: str
    name: str
    run: TrialRecord
    merit: float  # the larger, the better its score on validation
    confusion: Confusion | None
    seeds: int


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
    seeds: tuple[str, ...]  # rows of which one seed of several is shown
    wrong_of: str
    wrong: tuple[Thumb, ...]
    wrong_note: str


def _curves(
    drawn: Sequence[curves.Line], section: str, across: bool = False, left_out: int = 0, varied: Sequence[str] = ()
) -> Curves | None:
    if not drawn:
        return None
    groupings = curves.groupings(drawn, across, varied)
    drawings = tuple(
        (title, charts.curves_svg(drawn, groupings, key, title, f"{section}-{key}"))
        for key, title in curves.METRICS.items()
    )
    return Curves(f"{section}-curves", tuple(drawn), tuple(groupings), drawings, left_out)


def _history_points(study: StoredStudy) -> list[charts.SearchPoint]:
    """Return the sampled trials that have ended, or paused, with a score on validation."""
    points = []
    for trial in curves.sampled(study):
        value = trial.score if trial.state == "complete" else metric(trial, trial.objective.each_epoch)
        if value is not None and trial.state in ("complete", "pruned", "paused"):
            random = trial.tags.get(SUGGESTED_BY) == "random"
            points.append(charts.SearchPoint(trial.number, value, trial.state, random))
    return points


def _importance(
    study: StoredStudy, complete: Sequence[TrialRecord], weigh: Importances | None, figure: str, goal: Objective
) -> tuple[str, str]:
    """Return the drawing of what each setting explains, where that can be told from chance, and what to say of it."""
    definition = study.record.definition
    space = definition.dimensions if definition else {}
    scored = [(trial.params, score) for trial in complete if (score := trial.score) is not None]
    if not space:  # with the document
        return "", "Which settings were sampled is not in the store, so their importance cannot be estimated."
    found = weigh(space, scored) if weigh else None
    trials = counted(len(scored), "complete sampled trial")
    if found is None:
        return "", f"{trials}: not enough trials to tell which setting mattered."
    chance = f" Not told apart from chance: {', '.join(found.chance)}." if found.chance else ""
    if not found.shares:
        if not found.chance:
            return "", f"The settings of {trials} do not differ, so their importance cannot be estimated."
        return "", f"{trials}: not enough trials to tell which setting mattered.{chance}"
    note = (
        f"How much of what the settings explain of the differences in validation {goal.label} each one does, from "
        f"{trials}, with its 95% range over resampled trials. Shown are settings that explain more than they do when "
        f"the scores are shuffled (p below {ALPHA}, Holm-corrected).{chance}"
    )
    if len(found.shares) + len(found.chance) == 1:
        (only,) = found.shares
        return "", f"{trials} differ in {only} only, which explains more than chance does (p below {ALPHA})."
    return charts.importance_svg(found.shares, figure), note


def _search(
    study: StoredStudy,
    row_best: float | None,
    weigh: Importances | None,
    section: str,
    goal: Objective,
    moments: Sequence[Moment] = (),
) -> Search:
    points, trials, definition = _history_points(study), curves.sampled(study), study.record.definition
    complete = [trial for trial in trials if trial.state == "complete"]
    if not points:
        return Search("No sampled trial has ended yet, so there is no search to show.")
    drawn, earlier = points[-POINTS:], points[:-POINTS]
    counts = Counter(point.outcome for point in points)
    shown = ["complete", "pruned", *(["paused"] if counts["paused"] else [])]
    sentence = f"{counted(len(points), 'sampled trial')}: {', '.join(f'{counts[name]} {name}' for name in shown)}."
    label = f"Validation {goal.label} by trial number. {sentence}"
    label += f" The last {len(drawn):,} are drawn." if earlier else ""
    others = Counter(trial.state for trial in trials)
    others.subtract(counts)
    names = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in sorted(others.items()) if number)
    top = goal.best(point.value for point in points if point.outcome == "complete")
    label += f" The best sampled trial has {top:.3f}." if top is not None else ""
    label += f" The best row has {row_best:.3f}." if row_best is not None else ""
    before = goal.best(point.value for point in earlier if point.outcome == "complete")
    history = charts.history_svg(drawn, before, row_best, goal, label, f"{section}-history")
    importance, note = _importance(study, complete, weigh, f"{section}-importance", goal)
    return Search(
        sentence
        + _origins(trials)
        + _paused_places(trials)
        + (f" Without an accuracy to show: {names}." if names else ""),
        history,
        label,
        importance,
        note,
        effort_of(trials, moments, definition.pruner if definition else None, f"{section}-effort"),
        frozenset({*counts, *(["random"] if any(p.random and p.outcome == "complete" for p in drawn) else [])}),
    )


def _origins(trials: Sequence[TrialRecord]) -> str:
    """Say how many trials were sampled at random and how many proposed by the sampler's model, where that is known."""
    origins = Counter(trial.tags[SUGGESTED_BY] for trial in trials if SUGGESTED_BY in trial.tags)
    if not origins:
        return ""
    return f" {origins['random']} sampled at random, {origins['model']} proposed by the model of the sampler."


def _paused_places(trials: Sequence[TrialRecord]) -> str:
    """Say where trials are paused."""
    places = Counter(
        (whole(trial.tags.get(PAUSED_AT, 0)), trial.params.get("epochs", "?"))
        for trial in trials
        if trial.state == "paused"
    )
    texts = [f"{number} at epoch {epoch} of {epochs}" for (epoch, epochs), number in sorted(places.items())]
    return f" Paused: {', '.join(texts)}." if texts else ""


def _named(study: StoredStudy, best: int, reader: Reader) -> list[Named]:
    """Return a study's complete rows and best sampled trials, in the table's order."""
    found = []
    for entry in [*row_entries(study), *sampled_entries(study, best)]:
        if entry.runs:
            run = entry.runs[0]
            confusion = read_confusion(reader.text, run)
            found.append(Named(study.record.name, one_line(entry.name), run, -run.rank, confusion, len(entry.runs)))
    return found


def _best(named: Sequence[Named]) -> Named:
    return max(named, key=lambda row: row.merit)


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
        thumbnail = find_thumbnails(datasets_of(study.record.definition, top.run, data), top.run)
    except (CaltechSweepError, TypeError) as error:
        return top.name, tuple(Thumb(item, None) for item in wrong), f"The images are not shown: {error}."
    thumbs = tuple(Thumb(item, thumbnail(item.image)) for item in wrong)
    missing = sum(thumb.picture is None for thumb in thumbs)
    note = f"{missing} of these images cannot be read in the dataset's folder." if missing else ""
    return top.name, thumbs, note


def _counts(study: StoredStudy) -> str:
    """Return how many trials there are by outcome; the attempts of one trial count once, as the one that speaks."""
    trials: dict[tuple[int, str], list[TrialRecord]] = {}
    for run in study.trials:
        trials.setdefault((run.number, run.fingerprint), []).append(run)
    counts = Counter(pick(attempts).state.replace("_", " ") for attempts in trials.values())
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "none yet"


def _section(
    index: int,
    study: StoredStudy,
    table: Table,
    anchor: str,
    named: Sequence[Named],
    histories: Histories,
    moments: Sequence[Moment],
    reader: Reader,
    o: Options,
) -> Section:
    name = f"s{index}"
    best, goal = table.best, table.objective
    row_best = goal.best(score.value for row in table.rows if row.kind == "row" and (score := table.goal(row)))
    wrong_of, wrong, wrong_note = _thumbnails(study, named, reader, o.data)
    left_out = curves.left_out(study)
    return Section(
        id=name,
        table=table,
        # The box of a wide table can be scrolled with the keyboard, and says what it holds.
        table_html=html_table(table, anchor, o.everything).replace(
            '<div class="scroll">', '<div class="scroll" tabindex="0">', 1
        ),
        counts=_counts(study),
        best=best,
        curves=_curves(curves.lines(study, histories), name, left_out=left_out, varied=table.varied),
        search=_search(study, row_best, o.importances, name, goal, moments),
        confusions=_confusions(named, name),
        lost=tuple(row.name for row in named if row.confusion is None),
        seeds=tuple(row.name for row in named if row.seeds > 1),
        wrong_of=wrong_of,
        wrong=wrong,
        wrong_note=wrong_note,
    )


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
