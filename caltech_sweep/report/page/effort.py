"""What the epochs of a search were spent on: the best accuracy by epochs, and the rungs at which trials paused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from caltech_sweep.report.page import charts
from caltech_sweep.study.definition import Component
from caltech_sweep.study.pausing import Pausing, make_pausing
from caltech_sweep.text import counted
from caltech_sweep.tracking.history import Moment
from caltech_sweep.tracking.records import TrialRecord


@dataclass(frozen=True)
class Rung:
    """An epoch at which trials pause: how many reached it and went on from it, and the best accuracy there."""

    epoch: int
    reached: int
    went_on: int
    best: float


@dataclass(frozen=True)
class Effort:
    """The drawing, and the rungs as a table; there are none where the pruner does not pause."""

    svg: str
    rungs: tuple[Rung, ...]


def _rungs_of(trial: TrialRecord, pausing: Pausing | None) -> tuple[int, ...]:
    epochs = trial.params.get("epochs", "")
    return pausing.rungs(trial.number, int(epochs)) if pausing is not None and epochs.isdecimal() else ()


def effort_of(
    trials: Sequence[TrialRecord], moments: Sequence[Moment], pruner: Component | None, figure: str
) -> Effort | None:
    """Return the effort of the sampled trials; ``moments`` are their objectives by epoch. None without any."""
    by_run, pausing = {trial.run_id: trial for trial in trials}, make_pausing(pruner)
    in_order = sorted(
        (moment for moment in moments if moment.run_id in by_run),
        key=lambda moment: (moment.at, by_run[moment.run_id].number, moment.epoch),
    )
    last = {moment.run_id: 0 for moment in in_order}
    for moment in in_order:
        last[moment.run_id] = max(last[moment.run_id], moment.epoch)
    best: float | None = None
    line: list[tuple[int, float]] = []
    results: list[tuple[int, float, bool]] = []  # epochs spent, accuracy, whether it went on
    rungs: dict[int, list[tuple[float, bool]]] = {}
    for spent, moment in enumerate(in_order, 1):
        trial = by_run[moment.run_id]
        if trial.state == "complete" and (best is None or trial.objective.better(moment.value, best)):
            best = moment.value
        line += [] if best is None else [(spent, best)]
        if moment.epoch in _rungs_of(trial, pausing):
            went_on = moment.epoch < last[moment.run_id]
            results.append((spent, moment.value, went_on))
            rungs.setdefault(moment.epoch, []).append((moment.value, went_on))
    if best is None:
        return None
    objective = trials[0].objective
    table = tuple(
        Rung(epoch, len(found), sum(on for _, on in found), objective.best(value for value, _ in found) or 0.0)
        for epoch, found in sorted(rungs.items())
    )
    label = f"Best validation {objective.label} of the complete sampled trials by epochs spent: {best:.3f} after "
    label += f"{counted(len(in_order), 'epoch')} of {counted(len(last), 'trial')}."
    return Effort(charts.effort_svg(line, results, label, figure), table)
