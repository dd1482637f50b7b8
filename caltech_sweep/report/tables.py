"""From entries to a table: scores with intervals, the published figures, ties with the best row, remarks."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from caltech_sweep.artifacts import Predictions, read_predictions
from caltech_sweep.config import TRIAL_RULES
from caltech_sweep.errors import StoreError
from caltech_sweep.metrics import (
    BEST_ACCURACY,
    BEST_EPOCH,
    DEFAULT_OBJECTIVE,
    METRICS,
    SPENT_EPOCHS,
    SPENT_SECONDS,
    TEST_ACCURACY,
    Objective,
    Outputs,
    logged,
    logged_at_best,
    objective,
)
from caltech_sweep.report.entries import Entry, metric, other_entries, pick, row_entries, sampled_entries
from caltech_sweep.report.grid import heading, one_line, setting_text
from caltech_sweep.report.model import TEST, VAL, Reference, Score, Table, TableRow
from caltech_sweep.report.statistics import (
    ALPHA,
    SHUFFLES,
    holm,
    mcnemar_exact,
    mean_interval,
    paired_permutation,
    wilson_interval,
)
from caltech_sweep.rules import as_text
from caltech_sweep.study.definition import Choices, Dimension, Range, StudyDefinition
from caltech_sweep.text import counted, first_of, listed
from caltech_sweep.tracking.reader import StoredStudy
from caltech_sweep.tracking.records import NETWORK_INPUT, PAUSED_AT, StudyRecord, TrialRecord, whole

REPORT = ("scratch", "transfer", "freeze", "augment", "tencrop", "resnet")  # the published tables, in their order
ESSENTIAL = ("arch", "weights", "optimizer", "lr", "epochs", "batch_size")  # that are said where they do not vary, too
DEVICES = {"cpu": "processors", "cuda": "GPUs"}
_MAJORITY = "majority class"  # ends the remark of a row that is held against it

ReadText = Callable[[TrialRecord, str], str]
Link = Callable[[str], str | None]  # from a run id to an address that shows the run


def _is_tencrop(entry: Entry) -> bool:
    return entry.settings.get("test_views") == "tencrop"


def _reported_part(entry: Entry) -> str:
    return "test_tencrop" if _is_tencrop(entry) else "test"


def _varied(definition: StudyDefinition | None, entries: Sequence[Entry]) -> tuple[str, ...]:
    """Return the settings of which rows, sampled trials or the space have different values.

    Early stopping sets all sampled trials apart from all rows; it is no column.
    """
    space = definition.dimensions if definition else {}
    apart = definition.early_stopping if definition else {}
    values: dict[str, set[Any]] = {
        key: set(map(TRIAL_RULES[key].ordered, _ends(dimension))) for key, dimension in space.items()
    }
    for entry in entries:
        for key, value in entry.settings.items():
            if key in TRIAL_RULES and not (key in apart and entry.kind == "sampled"):
                values.setdefault(key, set()).add(TRIAL_RULES[key].ordered(value))
    return tuple(key for key in TRIAL_RULES if len(values.get(key, ())) > 1)


def _ends(dimension: Dimension) -> tuple[Any, ...]:
    """Return values of a dimension, as many as tell whether it varies."""
    if isinstance(dimension, Range):
        return dimension.low, dimension.high
    return dimension.values if isinstance(dimension, Choices) else ((), dimension.values)


def _constant(
    definition: StudyDefinition | None, entries: Sequence[Entry], varied: Sequence[str], tested: bool
) -> dict[str, Any]:
    """Return the settings that all rows have in common and that the study, or its reader, cares for."""
    if not entries:
        return {}
    named = set(ESSENTIAL)
    if definition is not None:
        rows = (row.settings for row in definition.rows)
        named = named.union(definition.fixed, definition.space, definition.expand, *rows) - definition.overrides.keys()
    named -= {"objective", *varied, *(() if tested else ("test_views", "test_batch_size"))}
    settings = entries[0].settings
    return {key: settings[key] for key in TRIAL_RULES if key in named and key in settings}


def _measures(definition: StudyDefinition | None, goal: Objective, tested: bool) -> tuple[str, ...]:
    """Return the measures that have a column: those that the study names, else accuracy and its objective."""
    named = [name for name in definition.columns if name not in TRIAL_RULES] if definition else []
    usual = [logged(part, name) for name in ("accuracy", goal.name) for part in ("val", "test")]
    there = [[name for name in names if tested or not name.startswith("test/")] for names in (named, usual)]
    return tuple(dict.fromkeys(there[0] or there[1]))


def _score(runs: Sequence[TrialRecord], name: str, images: int | None, share: bool = True) -> Score | None:
    values = [value for run in runs if (value := metric(run, name)) is not None]
    if not values:
        return None
    if len(values) > 1:
        deviation, low, high = mean_interval(values, share)
        return Score(statistics.fmean(values), low, high, deviation, len(values))
    if not images:
        return Score(values[0], trainings=1)
    return Score(values[0], *wilson_interval(values[0], images), trainings=1)


def _reference(value: float | None, ours: Score | None) -> Reference | None:
    if value is None:
        return None
    if ours is None:
        return Reference(value)
    # Published figures have three decimals, so an interval's ends are compared at as many.
    inside = None if ours.low is None or ours.high is None else round(ours.low, 3) <= value <= round(ours.high, 3)
    return Reference(value, ours.value - value, inside)


def _remarks(entry: Entry, table: Table) -> tuple[str, ...]:
    """Return what there is to say of an entry: of a sampled one, also the settings that have no column."""
    hidden = [key for key in table.varied if key not in table.columns and entry.kind == "sampled"]
    remarks = [", ".join(f"{key} {setting_text(entry.settings[key])}" for key in hidden if key in entry.settings)]
    remarks += [entry.remark]
    if entry.state == "paused" and entry.shown is not None and PAUSED_AT in entry.shown.tags:
        remarks.append(f"at epoch {entry.shown.tags[PAUSED_AT]}")
    if entry.selected_at is not None:
        seeds = "fresh seeds" if len(entry.runs) > 1 else "a fresh seed"
        remarks.append(f"repeated on {seeds}; selected at {entry.selected_at:.3f}")
    word = "fold" if any(run.params.get("dataset.fold", "none") != "none" for run in entry.trained) else "seed"
    if entry.unfinished:
        remarks.append(f"{entry.unfinished} more {word if entry.unfinished == 1 else f'{word}s'} not complete")
    early = [run.tags["stopped_early"] for run in entry.runs if "stopped_early" in run.tags]
    if early:
        which = "" if len(entry.runs) == 1 else f" in {len(early)} of {len(entry.runs)} {word}s"
        remarks.append(f"stopped early at {early[0]}" if not which else f"stopped early{which}")
    if entry.runs and _is_tencrop(entry):
        centre = _score(entry.runs, TEST_ACCURACY, None)
        remarks += [f"{centre.value:.3f} on the centre crop"] if centre else []
    return tuple(filter(None, remarks))


def _scores(entry: Entry, measures: Iterable[str], images: Mapping[str, int]) -> dict[str, Score]:
    """Return what an entry reached of some measures; those of the test are over the views that its settings say."""
    scores = {}
    for measure in measures:
        part, _, name = measure.partition("/")
        recorded = logged_at_best(name) if part == "val" else logged(_reported_part(entry), name)
        share = METRICS[name].share
        score = _score(entry.runs, recorded, images.get(part) if name == "accuracy" else None, share)
        if score is not None:
            scores[measure] = score
    return scores


def _sum(entry: Entry, name: str) -> float | None:
    """Return the sum of a metric over the runs of an entry that have it."""
    found = [value for run in entry.trained if (value := metric(run, name)) is not None]
    return math.fsum(found) if found else None


def _row(entry: Entry, table: Table, link: Link) -> TableRow:
    scores = _scores(entry, {VAL, TEST, table.objective.each_epoch, *table.measures}, table.images)
    epochs = [epoch for run in entry.runs if (epoch := metric(run, BEST_EPOCH)) is not None]
    spent = _sum(entry, SPENT_EPOCHS)
    return TableRow(
        kind=entry.kind,
        name=entry.name,
        settings={key: value for key, value in entry.settings.items() if key in TRIAL_RULES},
        state=entry.state,
        reason=entry.reason,
        remarks=_remarks(entry, table),
        seeds=len(entry.runs),
        scores=scores,
        best_epoch=statistics.fmean(epochs) if epochs else None,
        epochs=None if spent is None else int(spent),
        seconds=_sum(entry, SPENT_SECONDS),
        val_reference=_reference(entry.reference.get("val_accuracy"), scores.get(VAL)),
        test_reference=_reference(entry.reference.get("test_accuracy"), scores.get(TEST)),
        best_epoch_reference=entry.reference.get("best_epoch"),
        tolerance=entry.tolerance,
        run_id=entry.shown.run_id if entry.shown else None,
        url=link(entry.shown.run_id) if entry.shown else None,
    )


def reported_part(run: TrialRecord) -> str:
    """Return the part whose files hold a run's reported predictions: val where the dataset has no test images."""
    if TEST_ACCURACY not in run.metrics:
        return "val"
    return "test_tencrop" if run.params.get("test_views") == "tencrop" else "test"


def run_predictions(read: ReadText, run: TrialRecord) -> Predictions | None:
    """Return a run's reported predictions; None when it has none, or they are not what it recorded."""
    part = reported_part(run)
    accuracy = metric(run, BEST_ACCURACY if part == "val" else logged(part, "accuracy"))
    try:
        return read_predictions(partial(read, run), part, accuracy) if accuracy is not None else None
    except StoreError:
        return None


def _test_predictions(entry: Entry, read: ReadText) -> Predictions | None:
    run = entry.runs[0] if entry.runs else None
    return run_predictions(read, run) if run is not None and TEST_ACCURACY in run.metrics else None


def _with_what_is_lost(row: TableRow, own: Predictions | None) -> TableRow:
    """Say of a row that has scores why it was compared with no other."""
    if row.test is None or own is not None:
        return row
    return _remark(row, "not compared: its predictions are lost or damaged")


def _numbers(*lists: Sequence[str]) -> list[np.ndarray]:
    """Return lists of class names as (N,) numbers of one count."""
    place = {name: number for number, name in enumerate(sorted(set().union(*lists)))}
    return [np.array([place[name] for name in names]) for names in lists]


def _is_better(goal: Objective, one: Predictions, other: Predictions) -> bool:
    """Tell whether a model reaches more than another on the images of their predictions."""

    def reached(found: Predictions) -> float:
        labels, predictions = _numbers(found.labels, found.predictions)
        return goal.metric.compute(Outputs(labels, predictions))

    return goal.better(reached(one), reached(other))


def _p_value(goal: Objective, one: Predictions, other: Predictions) -> float:
    """Return the p-value of the test that two models, asked about the same images, reach the same."""
    if goal.name == "accuracy":
        return mcnemar_exact(one.correct, other.correct)
    labels, first, second = _numbers(one.labels, one.predictions, other.predictions)
    return paired_permutation(labels, first, second, lambda truth, said: goal.metric.compute(Outputs(truth, said)))


def _compare(rows: list[TableRow], predictions: Sequence[Predictions | None], table: Table) -> tuple[int, int]:
    """Mark the best row and how each other one stands against it, in place.

    Returns the number of comparisons, and of the images that they are made on.

    The best row has the best score on validation, so that the test set, on which rows are compared, takes no part
    in choosing it. Without test images, and by a measure that predictions do not tell, nothing is compared.
    """
    goal = table.objective
    scored = [index for index, row in enumerate(rows) if table.goal(row) is not None]
    best = min(scored, key=lambda index: goal.loss(table.goal(rows[index]).value), default=None)  # type: ignore[union-attr]
    if best is not None and (not goal.metric.by_class or (not table.tested and len(scored) > 1)):
        rows[best] = replace(rows[best], standing="best")
        return 0, 0
    top = predictions[best] if best is not None else None
    if best is None or top is None:
        return 0, 0
    others = {i: other for i in scored if i != best and (other := predictions[i]) and other.images == top.images}
    for index in scored:
        if index != best and index not in others and predictions[index]:
            rows[index] = _remark(rows[index], "not compared: its test images are others")
    corrected = holm([_p_value(goal, other, top) for other in others.values()])
    if others:
        rows[best] = replace(rows[best], standing="best")
    for (index, other), p_value in zip(others.items(), corrected, strict=True):
        better = _is_better(goal, other, top)
        standing = "tied" if p_value >= ALPHA else "better" if better else "worse"
        rows[index] = replace(rows[index], standing=standing, p_value=p_value)  # type: ignore[arg-type]
    return len(others), len(top.images)


def _remark(row: TableRow, text: str) -> TableRow:
    return replace(row, remarks=(*row.remarks, text))


def _against_majority(row: TableRow, own: Predictions | None) -> TableRow:
    """Say whether a row is right more often than the most frequent class of its test images."""
    if own is None or row.test is None or _floor(row.test) > own.majority[1]:
        return row
    if row.test.value <= own.majority[1]:
        return replace(row, majority=True)
    return _remark(row, f"not told apart from the {_MAJORITY}")


def _differs(entry: Entry, key: str, value: Any) -> bool:
    """Tell whether the run that a row shows has another value of a setting than the study's override."""
    text = entry.shown.params.get(key) if entry.shown else None
    if text is None or text == as_text(value):
        return False
    try:
        return float(text) != float(value)
    except (TypeError, ValueError):
        return True


def _override(key: str, value: Any, entries: Sequence[Entry]) -> str:
    others = [entry.name for entry in entries if _differs(entry, key, value)]
    return f"{key} = {setting_text(value)}" + (f" (not so in {listed(others)})" if others else "")


def _notes(record: StudyRecord, entries: Sequence[Entry], constant: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a reader must know before the figures: how many images, which subset, what was overridden."""
    definition, images, notes = record.definition, record.images, []
    if definition is None:
        return ("The study's document is missing from the store, so rows and settings are those of its runs.",)
    if images:
        counts = ", ".join(
            f"{images[part]:,} {name}"
            for part, name in (("train", "train"), ("val", "validation"), ("test", "test"))
            if images.get(part)
        )
        notes.append(f"Images: {counts}" + (f"; {images['classes']} classes." if "classes" in images else "."))
    dataset, overrides = definition.dataset, definition.overrides
    subset = []
    if (classes := dataset.get("classes")) not in (None, "all"):
        subset.append(_classes(classes))
    if (most := dataset.get("images_per_class")) is not None:
        subset.append(f"at most {most} images of each class in each part")
    if subset:
        # A file that asks for a subset gives the figures of that subset.
        asked = {"dataset.classes", "dataset.images_per_class"} & overrides.keys()
        published = asked and any(row.reference for row in definition.rows)
        warning = " The published figures are of the whole of it." if published else ""
        notes.append(f"A subset of the dataset: {'; '.join(subset)}.{warning}")
    if overrides:
        notes.append("Overridden settings: " + ", ".join(_override(k, v, entries) for k, v in overrides.items()) + ".")
    if constant:
        same = ", ".join(f"{key} = {setting_text(value)}" for key, value in constant.items())
        notes.append(f"The same in all rows: {same}.")
    if early := definition.early_stopping:
        notes.append("Sampled trials only: " + ", ".join(f"{k} = {setting_text(v)}" for k, v in early.items()) + ".")
    inputs = dict.fromkeys(run.tags.get(NETWORK_INPUT, "") for entry in entries for run in entry.runs)
    return (*notes, *(f"{note}." for note in inputs if note))


def _classes(classes: Any) -> str:
    if isinstance(classes, int):
        return f"its first {classes} classes"
    if isinstance(classes, tuple):
        return f"its classes {', '.join(map(str, classes))}"
    return f"the {str(classes).replace('_', ' ')} of its classes"


def _views(rows: Sequence[TableRow], entries: Sequence[Entry]) -> list[str]:
    """Say of which rows the test accuracy is over ten views."""
    ten: list[str] = []
    one: list[str] = []
    for row, entry in zip(rows, entries, strict=True):
        if row.test is not None:
            (ten if _is_tencrop(entry) else one).append(row.name)
    if not ten:
        return []
    if not one:
        return ["Test accuracy is over ten views of each image (TenCrop)."]
    views = "is over ten views of each image (TenCrop), of the others over the centre crop"
    return [f"The test accuracy of {listed(ten)} {views}."]


def _computed_in(run: TrialRecord) -> str | None:
    """Return the number format and the kind of device of a run, or None where it does not tell."""
    device, asked = run.tags.get("environment.device"), run.params.get("precision", "auto")
    before = "float32" if device == "cpu" else None  # what auto was in versions that did not record it
    used = run.tags.get("environment.precision") or (before if asked == "auto" else asked)
    return f"{used} on {DEVICES.get(device, device)}" if device and used else None


def _computed(entries: Sequence[Entry], table: Table) -> list[str]:
    """Say so where rows that do not differ in it by their settings were computed in several number formats."""
    kinds: dict[str, dict[str, None]] = {}
    for entry in entries:
        for kind in filter(None, map(_computed_in, entry.runs)):
            kinds.setdefault(kind, {})[entry.name] = None
    if len(kinds) < 2 or "precision" in table.varied:
        return []
    said = "; ".join(f"{listed(list(names))} in {kind}" for kind, names in kinds.items())
    return [f"Not all trainings were computed alike, which may matter as much as a seed does: {said}."]


def _epochs(rows: Sequence[TableRow], table: Table) -> list[str]:
    """Say what epochs and best epochs are, and of which rows they are a mean."""
    found = [row for row in rows if row.best_epoch is not None]
    if not found:
        return []
    most = "highest" if table.objective.higher else "lowest"
    text = f"{heading('epochs')}: how many a row trains at most. " if "epochs" in table.columns else ""
    text += f"{table.best_epoch_heading}: the epoch with the {most} validation {table.objective.label}"
    text += ", whose weights are tested" if table.tested else ", whose weights are kept"
    several = [row.name for row in found if row.seeds > 1]
    mean = f"; the mean over the trainings{_of(several, found)}" if several else ""
    return [f"{text}{mean}."]


def _of(names: Sequence[str], rows: Sequence[TableRow]) -> str:
    """Return " of NAMES" where these are not all rows."""
    return f" of {first_of(names)}" if len(names) < len(rows) else ""


def _brackets(rows: Sequence[TableRow], table: Table, folds: int) -> list[str]:
    """Say what the brackets of the scores that are shown are: an interval over images, or over seeds and folds."""
    words = {"val": "validation", "test": "test"}
    parts_of = {measure: measure.partition("/")[0] for measure in table.measures}
    scores = {row.name: [(p, row.scores[name]) for name, p in parts_of.items() if name in row.scores] for row in rows}
    single = {n: [p for p, s in own if s.deviation is None and s.low is not None] for n, own in scores.items()}
    one = [name for name, parts in single.items() if parts]
    many = [name for name, own in scores.items() if any(score.deviation is not None for _, score in own)]
    scored = [row for row in rows if scores[row.name]]
    notes = []
    if one:
        parts = [part for part in words if any(part in own for own in single.values())]
        counts = " and ".join(f"{table.images[part]:,} {words[part]}" for part in parts)
        notes.append(f"Brackets{_of(one, scored)}: 95% Wilson interval, n = {counts} images.")
    if many:
        which = "seeds" if folds == 1 else f"trainings on {folds} folds of the training and validation images"
        those = f"{first_of(many)}," if len(many) < len(scored) else "Rows"
        notes.append(f"{those} with n {which}: mean ± standard deviation, brackets the 95% t interval of the mean.")
    return notes


def _comparisons(rows: Sequence[TableRow], comparisons: int, images: int, table: Table) -> list[str]:
    """Say what best and tied mean, when rows were compared."""
    goal, top = table.objective, next((row for row in rows if row.standing == "best"), None)
    reached = table.goal(top) if top else None
    if reached is None:
        return []
    equals = sum((score := table.goal(row)) is not None and score.value == reached.value for row in rows) > 1
    best = f"Best: the {'highest' if goal.higher else 'lowest'} validation {goal.label}"
    best += ", the first of equals" if equals else ""
    if not table.tested:
        return [f"{best}."]
    if not comparisons:
        return [f"{best}. Rows are not compared by it on the test set, since predictions do not tell it."]
    test = "exact McNemar test"
    if goal.name != "accuracy":
        test = f"paired permutation test of the {goal.label} ({SHUFFLES:,} shuffles)"
    times = f" over {comparisons} comparisons" if comparisons > 1 else ""
    seeds = "; of rows with several seeds, the first one" if any(row.seeds > 1 for row in rows) else ""
    return [
        f"{best}. Tied: not told apart from it on the test set by the {test} on the same {images:,} images "
        f"(p at least {ALPHA}, Holm-corrected{times}{seeds})."
    ]


def _majorities(rows: Sequence[TableRow], predictions: Sequence[Predictions | None]) -> list[str]:
    """Say what the majority class is of the rows that are held against it."""
    found: dict[tuple[str, float], list[str]] = {}
    for row, own in zip(rows, predictions, strict=True):
        if own and (row.majority or any(remark.endswith(_MAJORITY) for remark in row.remarks)):
            found.setdefault(own.majority, []).append(row.name)
    return [
        f"Majority class{f' of {listed(names)}' if len(found) > 1 else ''}: always answering {name!r} is right for "
        f"{share:.3f} of the test images."
        for (name, share), names in found.items()
    ]


def _paused(study: StoredStudy) -> list[str]:
    """Say which sampled trials are paused and where; they are in no row, since they have no results."""
    trials: dict[tuple[int, str], list[TrialRecord]] = defaultdict(list)
    for run in study.trials:
        trials[run.number, run.fingerprint].append(run)
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for (number, _), attempts in sorted(trials.items()):
        run = pick(attempts)
        if run.state == "paused":
            places[whole(run.tags.get(PAUSED_AT, 0)), whole(run.params.get("epochs", 0))].append(number)
    if not places:
        return []
    count = sum(map(len, places.values()))
    groups = [
        f"{counted(len(numbers), 'trial')} at epoch {epoch} of {epochs} ({first_of(numbers)})"
        for (epoch, epochs), numbers in sorted(places.items())
    ]
    return [
        f"Paused: {listed(groups)}. {'It has' if count == 1 else 'They have'} no results yet; caltech-sweep run "
        f"{study.record.name} --resume-trial N runs trial N to its end."
    ]


def _references(row: TableRow) -> tuple[Reference | None, Reference | None]:
    return row.val_reference, row.test_reference


def _floor(score: Score | None) -> float:
    """Return the lowest accuracy that a score still allows."""
    if score is None:
        return float("inf")
    return score.value if score.low is None else score.low


def build_table(study: StoredStudy, best: int, read: ReadText, link: Link, everything: bool = False) -> Table:
    """Build one study's table: its rows, then the ``best`` sampled trials with the highest scores on validation.

    With ``everything``, all further trials are in the table as well; they are not compared with the others.
    """
    definition, images, name = study.record.definition, study.record.images, study.record.name
    entries = [*row_entries(study), *sampled_entries(study, best)]
    goal = definition.objective if definition else objective(DEFAULT_OBJECTIVE)
    varied, tested = _varied(definition, entries), images.get("test") != 0
    columns = tuple(key for key in definition.columns if key in TRIAL_RULES) if definition else ()
    constant = _constant(definition, entries, varied, tested)
    table = Table(
        name,
        definition.title if definition else name,
        columns or varied,
        (),
        _notes(study.record, entries, {key: value for key, value in constant.items() if key not in columns}),
        images=images,
        overrides=definition.overrides if definition else {},
        objective=goal,
        measures=_measures(definition, goal, tested),
        varied=varied,
        constant=constant,
    )
    table = _filled(table, study, entries, read, link)
    if not everything:
        return table
    ranked = sampled_entries(study, None)[best:]
    others = [*ranked, *other_entries(study, [*entries, *ranked])]
    spent = "Epochs Trained: those that were trained for it, not those that it shares with an earlier trial. "
    spent += "Time: while it ran, shared among the trials that ran at the same time."
    more = f" {counted(len(others), 'trial')} at the end {'is' if len(others) == 1 else 'are'} compared with no other."
    return replace(
        table,
        others=tuple(_row(entry, table, link) for entry in others),
        footnotes=(*table.footnotes, spent + (more if others else "")),
    )


def _filled(table: Table, study: StoredStudy, entries: Sequence[Entry], read: ReadText, link: Link) -> Table:
    """Return a table with the rows of some entries, compared with each other, and with what is to be said of them."""
    definition = study.record.definition
    rows = [_row(entry, table, link) for entry in entries]
    predictions = [_test_predictions(entry, read) for entry in entries]
    comparisons, compared = _compare(rows, predictions, table)
    if any(predictions):  # mocked trials have none
        rows = [_with_what_is_lost(row, own) for row, own in zip(rows, predictions, strict=True)]
    rows = [_against_majority(row, own) for row, own in zip(rows, predictions, strict=True)]
    table = replace(table, rows=tuple(rows))
    footnotes = [*_epochs(rows, table), *_views(rows, entries), *_computed(entries, table)]
    footnotes += _brackets(rows, table, definition.folds if definition else 1)
    if any(reference and reference.difference is not None for row in rows for reference in _references(row)):
        footnotes.append("Reference: the published figure; ours minus it, and whether it lies inside our interval.")
    footnotes += [*_comparisons(rows, comparisons, compared, table), *_majorities(rows, predictions), *_paused(study)]
    return replace(table, footnotes=tuple(footnotes))


def told_apart(tables: Sequence[Table]) -> list[Table]:
    """Return tables of which no two have one title: those that had are named after their studies, too."""

    def named(those: Callable[[Table], bool]) -> list[Table]:
        return [replace(t, title=f"{t.title} ({t.study})") if those(t) else t for t in tables]

    titles = Counter(one_line(table.title) for table in tables)
    found = named(lambda table: titles[one_line(table.title)] > 1)
    alike = len({one_line(table.title) for table in found}) < len(found)  # with the title of yet another study
    return named(lambda table: True) if alike else found
