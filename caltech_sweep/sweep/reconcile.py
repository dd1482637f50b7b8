"""What a coordinator that died left behind, found by comparing the two stores, and how each thing is fixed.

The rule that makes this decidable: a trial's end is written to MLflow first and to Optuna second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import optuna
from optuna.trial import FrozenTrial, TrialState

from caltech_sweep.sweep.optuna_trials import (
    RUNG,
    drop_waiting,
    end_trial,
    invalidate_trial,
    is_paused,
    mark_waiting,
    requeue,
)
from caltech_sweep.text import first_of
from caltech_sweep.tracking.records import OUTCOMES, PAUSED_AT, UNFINISHED, Tracker, TrialRecord


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong between the stores: a sentence, and what puts it right, if it can be put right."""

    text: str
    fix: Callable[[], object] | None


def key_of(trial: FrozenTrial) -> tuple[int, str]:
    """Return what a trial and its run have in common: number and fingerprint."""
    return trial.number, trial.user_attrs.get("fingerprint", "")


def _running_trial(
    study: optuna.Study, trial: FrozenTrial, record: TrialRecord | None, current: bool
) -> tuple[str, Callable[[], None]]:
    """Return what becomes of a trial that Optuna takes for running although no process is running it."""
    name = f"trial {trial.number}"
    ended = record is not None and record.outcome in OUTCOMES and record.outcome != "interrupted"
    if record is not None and ended:
        outcome = record.outcome
        return (
            f"{name} ended as {outcome} in the tracking store, but the study store takes it for running: copied",
            partial(end_trial, study, trial.number, outcome, record.score if outcome == "complete" else None),
        )
    if current:
        return f"{name} was left running: it waits again", partial(requeue, study, trial.number)
    return (
        f"{name} was left running with settings that its row no longer has: it failed",
        partial(end_trial, study, trial.number, "crashed", None),
    )


def survey(
    study: optuna.Study,
    tracker: Tracker,
    records: Mapping[tuple[int, str], TrialRecord],
    is_current: Callable[[FrozenTrial], bool],
    ended: bool = True,
) -> Iterator[Finding]:
    """Yield what is wrong in the two stores of a study that no process is running; nothing is changed.

    Trials that have ``ended`` in the study store, or are paused in it, are compared with their runs, too.
    """
    trials = study.get_trials(deepcopy=False)
    yield from _outdated(study, [t for t in trials if t.state == TrialState.WAITING and not is_current(t)])
    paused = {key_of(trial): trial.user_attrs[RUNG] for trial in trials if is_paused(trial)}
    for trial in trials:
        if trial.state == TrialState.RUNNING:
            yield Finding(*_running_trial(study, trial, records.get(key_of(trial)), is_current(trial)))
        elif ended and is_paused(trial):
            yield from _compare_paused(tracker, study, trial, records.get(key_of(trial)))
        elif ended:
            yield from _compare(tracker, study, trial, records.get(key_of(trial)))
    for key, record in records.items():
        if record.status == "RUNNING":
            # Killed between its last two calls, a run has its outcome but not yet the status that goes with it.
            outcome = "paused" if key in paused else record.outcome if record.outcome in OUTCOMES else "interrupted"
            tags = {PAUSED_AT: str(paused[key])} if key in paused else {}
            yield Finding(
                f"run {record.name} is shown as running, but no process is running it: {outcome}",
                partial(tracker.finish_trial, record.run_id, outcome, {}, tags, None),
            )


def _outdated(study: optuna.Study, trials: Sequence[FrozenTrial]) -> Iterator[Finding]:
    """Yield what becomes of trials that wait for a row which has changed: one finding for all of them."""

    def drop() -> None:
        for trial in trials:
            drop_waiting(study, trial)

    if len(trials) == 1:
        yield Finding(f"trial {trials[0].number} waits with settings that its row no longer has: it failed", drop)
    elif trials:
        numbers = first_of([trial.number for trial in trials])
        yield Finding(f"trials {numbers} wait with settings that their rows no longer have: they failed", drop)


def _compare(tracker: Tracker, study: optuna.Study, trial: FrozenTrial, run: TrialRecord | None) -> Iterator[Finding]:
    """Yield what is wrong between a trial that ended in the study store and its run."""
    name, counts = f"trial {trial.number}", trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    if not trial.state.is_finished() or (run is None and not counts):
        return
    if run is None:
        yield Finding(
            f"{name} ended but has no run in the tracking store: the next run trains it again",
            partial(invalidate_trial, study, trial._trial_id),
        )
        return
    ended = _ended(trial)
    if run.status == "RUNNING" and run.outcome in ("", ended):
        return  # it is shown as running, which is a finding of its own
    if run.outcome != ended and counts:
        yield Finding(
            f"{name} is {ended} in the study store, but its run {run.name} is {run.state}: the next run trains it "
            "again",
            partial(give_up, tracker, study, trial, run, "the stores disagreed about its end"),
        )
    elif run.status != OUTCOMES[ended].mlflow or run.outcome != ended:
        yield Finding(
            f"run {run.name} is {run.state} and {run.status}, but its trial is {ended}: copied",
            partial(tracker.finish_trial, run.run_id, ended, {}, {}, None),
        )


def _compare_paused(
    tracker: Tracker, study: optuna.Study, trial: FrozenTrial, run: TrialRecord | None
) -> Iterator[Finding]:
    """Yield what is wrong between a trial that is paused in the study store and its run."""
    name, again = f"trial {trial.number} is paused", "the next run goes on with it"
    go_on = partial(mark_waiting, study, trial, RUNG, 0)
    if run is None:
        yield Finding(f"{name} but has no run in the tracking store: {again}", go_on)
    elif run.status == "RUNNING":
        return  # it is shown as running, which is a finding of its own
    elif run.state not in UNFINISHED:
        yield Finding(f"{name} in the study store, but its run {run.name} is {run.state}: {again}", go_on)
    elif run.outcome != "paused" or run.status != OUTCOMES["paused"].mlflow:
        tags = {PAUSED_AT: str(trial.user_attrs[RUNG])}
        fix = partial(tracker.finish_trial, run.run_id, "paused", {}, tags, None)
        yield Finding(f"run {run.name} is {run.state} and {run.status}, but its trial is paused: copied", fix)


def _ended(trial: FrozenTrial) -> str:
    """Return the outcome of a trial that ended."""
    names = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}
    return names.get(trial.state) or str(trial.user_attrs.get("outcome", "crashed"))


def give_up(tracker: Tracker, study: optuna.Study, trial: FrozenTrial, run: TrialRecord, reason: str) -> None:
    """Let a trial count for nothing in both stores."""
    tracker.finish_trial(run.run_id, "crashed", {}, {"reason": reason}, None)
    invalidate_trial(study, trial._trial_id)
