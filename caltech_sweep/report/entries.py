"""From a study's runs to the entries of its table: which runs count, and which trial is shown in what state."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from caltech_sweep.config import TRIAL_RULES, TrialConfig, unread_settings
from caltech_sweep.metrics import finite
from caltech_sweep.report.model import Kind
from caltech_sweep.study.definition import Row, StudyDefinition
from caltech_sweep.tracking.reader import StoredStudy
from caltech_sweep.tracking.records import TrialRecord


@dataclass(frozen=True)
class Entry:
    """What one row of a table is made of. ``runs`` are complete, one a seed, the settings' own seed first."""

    kind: Kind
    name: str
    settings: Mapping[str, Any]
    state: str
    reason: str = ""
    runs: tuple[TrialRecord, ...] = ()
    shown: TrialRecord | None = None  # the run that the row points to
    trained: tuple[TrialRecord, ...] = ()  # all runs that it is about, complete or not
    unfinished: int = 0  # further seeds or folds without a complete run
    remark: str = ""
    selected_at: float | None = None  # score on validation that a repeated sampled trial was chosen for
    reference: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float | None = None


def metric(run: TrialRecord, name: str) -> float | None:
    """Return a metric of a run, or None when it is missing or not finite."""
    return finite(run.metrics, name)


@lru_cache(maxsize=1 << 16)
def _value(name: str, text: str) -> tuple[Any, ...]:
    """Return the value of a param, or nothing where another version wrote what is none here."""
    try:
        return (TRIAL_RULES[name].ordered(TRIAL_RULES[name].parse(text)),)
    except (KeyError, ValueError):
        return ()


def _settings(run: TrialRecord) -> dict[str, Any]:
    """Return those settings of a run that it recorded and that its training read."""
    return _read({name: value for name, text in run.params.items() for value in _value(name, text)})


def _read(settings: Mapping[str, Any]) -> dict[str, Any]:
    unread = unread_settings(settings)
    return {name: value for name, value in settings.items() if name not in unread}


def pick(runs: Iterable[TrialRecord]) -> TrialRecord:
    """Return the run that speaks for one trial: a complete one, else a running one, else the latest."""
    rank = {"complete": 2, "running": 1}
    return max(runs, key=lambda run: (rank.get(run.state, 0), run.start_time))


Training = tuple[int, int]  # the seed and the fold, 0 where there is none


def _training(config: TrialConfig) -> Training:
    return config.seed, config.dataset.fold or 0


def _seeds(
    row: Row, config: TrialConfig | None, runs: Sequence[TrialRecord]
) -> Callable[[TrialRecord], Training | None]:
    """Return what tells the seed and fold of a row's run; None: it is of an older version of the row.

    Another seed or fold is a repeat where the run says so; else it is what the row had in an older version.
    """
    if config is None:
        return lambda run: (0, 0)
    known: dict[str, Training] = {}
    for run in runs:
        seed, fold = _training(TrialConfig.from_params(run.params))
        repeat = replace(config, seed=seed, dataset=replace(config.dataset, fold=fold or None))
        known[repeat.fingerprint()] = seed, fold
    own = row.fingerprint or config.fingerprint()
    known[own] = _training(config)
    return lambda run: known.get(run.fingerprint) if run.fingerprint == own or "replicate" in run.tags else None


def _row_entry(row: Row, runs: Sequence[TrialRecord], definition: StudyDefinition | None) -> Entry:
    config = definition.row_config(row) if definition else None
    first = _training(config) if config else (0, 0)
    seed_of, by_seed = _seeds(row, config, runs), defaultdict[Training, list[TrialRecord]](list)
    for run in runs:
        if (seed := seed_of(run)) is not None:
            by_seed[seed].append(run)
    # The row's own seed first: ties are tested on its predictions.
    picked = [pick(by_seed[seed]) for seed in sorted(by_seed, key=lambda seed: (seed != first, seed))]
    complete = tuple(run for run in picked if run.state == "complete")
    entry = Entry(
        "row",
        row.name,
        _read(config.to_dict()) if config else _settings(picked[0]),
        "missing",
        reason="an older version of this row is not shown" if runs and not picked else "",
        reference=row.reference,
        tolerance=definition.tolerance if definition and row.tolerance is None else row.tolerance,
    )
    if not picked:
        return entry
    shown = complete[0] if complete else picked[0]
    reason = "" if complete else shown.tags.get("reason", "")
    wanted = max(definition.trainings if definition else 1, len(picked))
    unfinished = wanted - len(complete) if complete else 0
    return replace(
        entry,
        state=shown.state,
        reason=reason,
        runs=complete,
        shown=shown,
        trained=tuple(picked),
        unfinished=unfinished,
    )


def row_entries(study: StoredStudy) -> list[Entry]:
    """Return an entry for each row of the study, in its order, whatever state it is in."""
    definition = study.record.definition
    by_row: dict[str, list[TrialRecord]] = defaultdict(list)
    for trial in study.trials:
        if trial.row is not None:
            by_row[trial.row].append(trial)
    rows = definition.rows if definition else [Row(name) for name in by_row]
    return [_row_entry(row, by_row[row.name], definition) for row in rows]


def sampled_entries(study: StoredStudy, best: int | None) -> list[Entry]:
    """Return the complete sampled trials with the best score on validation, the earlier of equals first; None: all.

    A run tagged ``confirms`` repeats the sampled trial of that number on a fresh seed: the repeats are what an entry
    reports, since the score that won the selection is too good by that selection.
    """
    trials: dict[tuple[int, str], list[TrialRecord]] = defaultdict(list)
    repeats: dict[str, list[TrialRecord]] = defaultdict(list)
    folds: dict[str, list[TrialRecord]] = defaultdict(list)
    for trial in study.trials:
        if trial.row is not None or trial.state != "complete" or trial.score is None:
            continue
        if "confirms" in trial.tags:
            repeats[trial.tags["confirms"]].append(trial)
        elif "fold_of" in trial.tags:
            folds[trial.tags["fold_of"]].append(trial)
        else:
            trials[trial.number, trial.fingerprint].append(trial)
    runs = [pick(attempts) for attempts in trials.values()]
    wanted = study.record.definition.folds if study.record.definition else 1

    def every_fold(run: TrialRecord) -> tuple[TrialRecord, ...]:
        return (run, *{other.fingerprint: other for other in folds[str(run.number)]}.values())

    # A trial on more folds comes first: of one that still misses some, the mean says less.
    runs.sort(
        key=lambda run: (-len(every_fold(run)), statistics.fmean(each.rank for each in every_fold(run)), run.number)
    )
    entries = []
    for run in runs[:best]:
        confirmed = {repeat.fingerprint: repeat for repeat in repeats[str(run.number)]}
        repeated = tuple(confirmed.values())
        entries.append(
            Entry(
                "sampled",
                run.name,
                _settings(run),
                "complete",
                runs=repeated or every_fold(run),
                shown=run,
                trained=(*every_fold(run), *repeated),
                unfinished=0 if repeated else max(0, wanted - len(every_fold(run))),
                selected_at=statistics.fmean(each.score or 0.0 for each in every_fold(run)) if confirmed else None,
            )
        )
    return entries


def other_entries(study: StoredStudy, known: Iterable[Entry]) -> list[Entry]:
    """Return an entry for each trial that is in none of some entries, whatever its state, in the order of numbers."""
    covered = {(run.number, run.fingerprint) for entry in known for run in entry.trained}
    definition = study.record.definition
    rows = definition.rows if definition else ()
    current = {
        (row.name, definition.row_config(row, number).fingerprint())
        for row in rows
        if definition
        for number in range(definition.trainings)
    }
    left: dict[tuple[int, str], list[TrialRecord]] = defaultdict(list)
    for run in study.trials:
        if (run.number, run.fingerprint) not in covered:
            left[run.number, run.fingerprint].append(run)
    entries = []
    for _, attempts in sorted(left.items()):
        run = pick(attempts)
        older = run.row is not None and bool(rows) and (run.row, run.fingerprint) not in current
        entries.append(
            Entry(
                "sampled" if run.row is None else "row",
                run.name,
                _settings(run),
                run.state,
                reason=run.tags.get("reason", ""),
                runs=(run,) if run.state == "complete" else (),
                shown=run,
                trained=(run,),
                remark="an older version of this row" if older else "",
            )
        )
    return entries
