"""From a study's runs to the entries of its table: which runs count, and which trial is shown in what state."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from caltech_sweep.config import TrialConfig
from caltech_sweep.report.model import Kind
from caltech_sweep.tracking.reader import StoredStudy
from caltech_sweep.tracking.records import TrialRecord

# Settings that the tables show and that runs know as text.
_NUMBERS = ("lr", "batch_size", "test_batch_size", "step_size", "epochs", "seed")


@dataclass(frozen=True)
class Entry:
    """What one row of a table is made of. ``runs`` are complete, one a seed, the settings' own seed first."""

    kind: Kind
    name: str
    settings: Mapping[str, Any]
    state: str
    reason: str = ""
    detail: str = ""
    runs: tuple[TrialRecord, ...] = ()
    shown: TrialRecord | None = None  # the run that the row points to
    unfinished: int = 0  # further seeds without a complete run
    selected_at: float | None = None  # validation accuracy that a repeated sampled trial was chosen for
    reference: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float | None = None


def metric(run: TrialRecord, name: str) -> float | None:
    """Return a metric of a run, or None when it is missing or not finite."""
    value = run.metrics.get(name)
    return value if value is not None and math.isfinite(value) else None


def _settings(run: TrialRecord) -> dict[str, Any]:
    """Return a run's settings as numbers where they are, from its params."""
    settings: dict[str, Any] = dict(run.params)
    for key in _NUMBERS:
        try:
            number = float(settings[key])
        except (KeyError, ValueError):
            settings.pop(key, None)
        else:
            settings[key] = int(number) if number.is_integer() and key != "lr" else number
    return settings


def pick(runs: Iterable[TrialRecord]) -> TrialRecord:
    """Return the run that speaks for one trial: a complete one, else a running one, else the latest."""
    rank = {"complete": 2, "running": 1}
    return max(runs, key=lambda run: (rank.get(run.outcome, 0), run.start_time))


def _fingerprints(config: Mapping[str, Any], seeds: Iterable[Any]) -> dict[str, Any]:
    """Return the seeds by the fingerprint that a config has with each of them."""
    try:
        return {TrialConfig.from_dict({**config, "seed": seed}).fingerprint(): seed for seed in seeds}
    except TypeError:  # a study of another version, whose settings are not ours
        return {}


def _row_entry(row: Mapping[str, Any], runs: Sequence[TrialRecord], document: Mapping[str, Any]) -> Entry:
    config, own = row.get("config", {}), row.get("fingerprint")
    seeds = {seed for run in runs if isinstance(seed := _settings(run).get("seed"), int)}
    known: dict[Any, Any] = {**_fingerprints(config, seeds), own: config.get("seed", 0)}
    by_seed: dict[Any, list[TrialRecord]] = defaultdict(list)
    for run in runs:
        # Another seed is a repeat where the run says so; else it is what the row had in an older version.
        if own is None or run.fingerprint == own or ("replicate" in run.tags and run.fingerprint in known):
            by_seed[known.get(run.fingerprint, 0)].append(run)
    # The row's own seed first: ties are tested on its predictions.
    order = sorted(by_seed, key=lambda seed: (seed != config.get("seed", 0), seed))
    picked = [pick(by_seed[seed]) for seed in order]
    complete = tuple(run for run in picked if run.outcome == "complete")
    entry = Entry(
        "row",
        str(row["name"]),
        config or (_settings(picked[0]) if picked else {}),
        "missing",
        reason="an older version of this row is not shown" if runs and not picked else "",
        reference=row.get("reference") or {},
        tolerance=document.get("tolerance") if row.get("tolerance") is None else row["tolerance"],
    )
    if not picked:
        return entry
    shown = complete[0] if complete else picked[0]
    reason = "" if complete else shown.tags.get("reason", "")
    unfinished = max(document.get("replicates") or 1, len(picked)) - len(complete) if complete else 0
    return replace(entry, state=shown.outcome, reason=reason, runs=complete, shown=shown, unfinished=unfinished)


def row_entries(study: StoredStudy) -> list[Entry]:
    """Return an entry for each row of the study's document, in its order, whatever state it is in."""
    document = study.record.document
    by_row: dict[str, list[TrialRecord]] = defaultdict(list)
    for trial in study.trials:
        if trial.row is not None:
            by_row[trial.row].append(trial)
    rows = document.get("rows", ()) if document else [{"name": name} for name in by_row]
    return [_row_entry(row, by_row[row["name"]], document) for row in rows]


def _detail(study: StoredStudy, run: TrialRecord, columns: Sequence[str]) -> str:
    document = study.record.document
    varied = [*document.get("space", {}), *document.get("expand", {})]
    return ", ".join(f"{key} {run.params[key]}" for key in varied if key not in columns and key in run.params)


def sampled_entries(study: StoredStudy, best: int, columns: Sequence[str]) -> list[Entry]:
    """Return the complete sampled trials with the highest validation accuracy, the earlier of equals first.

    A run tagged ``confirms`` repeats the sampled trial of that number on a fresh seed: the repeats are what an entry
    reports, since the score that won the selection is too good by that selection.
    """
    trials: dict[tuple[int, str], list[TrialRecord]] = defaultdict(list)
    repeats: dict[str, list[TrialRecord]] = defaultdict(list)
    for trial in study.trials:
        if trial.row is not None or trial.outcome != "complete" or metric(trial, "best/val_accuracy") is None:
            continue
        if "confirms" in trial.tags:
            repeats[trial.tags["confirms"]].append(trial)
        else:
            trials[trial.number, trial.fingerprint].append(trial)
    runs = [pick(attempts) for attempts in trials.values()]
    runs.sort(key=lambda run: (-run.metrics["best/val_accuracy"], run.number))
    entries = []
    for run in runs[:best]:
        confirmed = {repeat.fingerprint: repeat for repeat in repeats[str(run.number)]}
        entries.append(
            Entry(
                "sampled",
                run.name,
                _settings(run),
                "complete",
                detail=_detail(study, run, columns),
                runs=tuple(confirmed.values()) or (run,),
                shown=run,
                selected_at=run.metrics["best/val_accuracy"] if confirmed else None,
            )
        )
    return entries
