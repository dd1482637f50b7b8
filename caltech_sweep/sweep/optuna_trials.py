"""What Optuna's ``Study.ask`` and ``Study.tell`` cannot do, and nothing else.

They cannot start a new trial while others wait, start one certain waiting trial, let a running trial wait again, or
invalidate a trial that ended. Optuna has no paused trials, and none that ended can go on. A paused one therefore waits,
with the rung that it has reached among its attributes, and samplers see it as pruned there (:class:`ViewSampler`).
Optuna's samplers see the list of trials that ``ask`` and ``tell`` last cleared from a
cache of the thread, so everything here that changes a trial without them clears it as well (:func:`_refresh`).
"""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Container, Iterable, Sequence
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.storages._rdb.models import TrialModel
from optuna.trial import FrozenTrial, TrialState

from caltech_sweep.sweep.optuna_store import engine_of
from caltech_sweep.sweep.owned_storage import OwnedStorage
from caltech_sweep.tracking.records import OUTCOMES

# Attributes of a trial, both epochs: the last rung that it has reached, and the last one that it was let through.
RUNG, PROMOTED = "rung", "promoted"


class SettledSampler(optuna.samplers.BaseSampler):
    """The sampler of a trial that has all its settings: it draws nothing and leaves no mark in the store."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, distribution: Any) -> Any:
        raise AssertionError(f"trial {trial.number} has no {param_name}")


def is_paused(trial: FrozenTrial) -> bool:
    """Tell whether a trial waits at a rung to be promoted, rather than to be run at once."""
    rung, promoted = (trial.user_attrs.get(key, 0) for key in (RUNG, PROMOTED))
    return trial.state == TrialState.WAITING and rung > promoted


def _as_pruned(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial as its sampler should see it: pruned at the last rung that it has reached, until it has ended."""
    rung = trial.user_attrs.get(RUNG, 0)
    if not rung or trial.state.is_finished():
        return trial
    shown = copy.copy(trial)
    shown.state, shown.value = TrialState.PRUNED, trial.intermediate_values[rung]
    shown.intermediate_values = {step: value for step, value in trial.intermediate_values.items() if step <= rung}
    return shown


def seen_trials(study: optuna.Study, sampler: optuna.samplers.BaseSampler) -> list[FrozenTrial]:
    """Return the trials of a study as its sampler sees them."""
    seen = sampler.view(study) if isinstance(sampler, ViewSampler) else study
    return list(seen._get_trials(deepcopy=False, use_cache=True))


def setting_of(trial: FrozenTrial) -> object:
    """Return what tells a setting from others, whatever the fold: the number of a sampled trial, or a row's config."""
    attributes = trial.user_attrs
    if "row" not in attributes and "confirms" not in attributes:
        return attributes.get("fold_of", trial.number)
    config = attributes["config"]
    whole = {**config, "dataset": {**config["dataset"], "fold": None}}
    return attributes.get("row"), attributes.get("confirms"), json.dumps(whole, sort_keys=True)


def over_folds(trials: Iterable[FrozenTrial], folds: int) -> list[FrozenTrial]:
    """Return trials with those of one setting on several folds as one: the first, with their mean as its value.

    It is running until each fold is complete, and failed once one of them has failed.
    """
    if folds == 1:
        return list(trials)
    settings: dict[object, list[FrozenTrial]] = {}
    for trial in trials:
        key = trial.number if is_unsampled(trial) else setting_of(trial)
        settings.setdefault(key, []).append(trial)
    return [_as_one(own, folds) for own in settings.values()]


def _as_one(own: Sequence[FrozenTrial], folds: int) -> FrozenTrial:
    first, values = own[0], [trial.value for trial in own if trial.state == TrialState.COMPLETE]
    if first.state != TrialState.COMPLETE:
        return first
    shown = copy.copy(first)
    shown.values = None
    if len(values) >= folds:
        shown.value = statistics.fmean(value for value in values if value is not None)
    else:
        shown.state = TrialState.FAIL if any(t.state == TrialState.FAIL for t in own) else TrialState.RUNNING
    return shown


class _View:
    """A study, or its storage, as samplers and pruners should see it.

    Paused trials are pruned, trials without the settings ``names`` hidden, and those of several folds one.
    """

    def __init__(self, seen: Any, names: frozenset[str], folds: int) -> None:
        self._seen, self._names, self._folds = seen, names, folds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seen, name)

    def _show(self, trials: Iterable[FrozenTrial], states: Container[TrialState] | None) -> list[FrozenTrial]:
        seen = over_folds(trials, self._folds)
        shown = [_as_pruned(t) for t in seen if self._names <= t.distributions.keys()]
        return [trial for trial in shown if states is None or trial.state in states]

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        return self._show(self._seen.get_trials(deepcopy), states)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return self._show(self._seen._get_trials(deepcopy, use_cache=use_cache), states)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return self._show(self._seen.get_all_trials(study_id, deepcopy), states)

    @property
    def _storage(self) -> _View:
        """The storage, which samplers that try every combination ask for themselves."""
        return _View(self._seen._storage, self._names, self._folds)


class ViewSampler(optuna.samplers.BaseSampler):
    """A sampler that sees paused trials as pruned ones, and no trial that lacks one of the settings ``names``.

    Optuna models only settings that every trial has. One row with a learning rate outside the space would take the
    learning rate out of the model for good. Of a setting that is trained on several folds it sees the mean.
    """

    def __init__(self, sampler: optuna.samplers.BaseSampler, names: Iterable[str], folds: int = 1) -> None:
        self.sampler, self._names, self._folds = sampler, frozenset(names), folds

    def view(self, study: optuna.Study) -> Any:
        """Return the study as the sampler sees it."""
        return _View(study, self._names, self._folds)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.sampler.before_trial(self.view(study), trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return self.sampler.infer_relative_search_space(self.view(study), trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return self.sampler.sample_relative(self.view(study), trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, distribution: Any) -> Any:
        return self.sampler.sample_independent(self.view(study), trial, param_name, distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self.sampler.after_trial(self.view(study), trial, state, values)


class ViewPruner(optuna.pruners.BasePruner):
    """A pruner that sees each setting once: as it was on the first fold, where trials are pruned."""

    def __init__(self, pruner: optuna.pruners.BasePruner, folds: int) -> None:
        self.pruner, self._folds = pruner, folds

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Tell whether a trial should stop."""
        return self.pruner.prune(_View(study, frozenset(), self._folds), trial)  # type: ignore[arg-type]


def _refresh(study: optuna.Study) -> None:
    """Let the sampler see all trials as they are now; Optuna does so in ``Study.ask`` and ``Study.tell`` only."""
    study._thread_local.cached_all_trials = None


def start_sampled(study: optuna.Study, sampler: optuna.samplers.BaseSampler, others_wait: bool = True) -> optuna.Trial:
    """Start a new trial whose settings ``sampler`` suggests."""
    study.sampler = sampler
    if others_wait:  # ``Study.ask`` would start the first of these
        _refresh(study)
        return optuna.Trial(study, study._storage.create_new_trial(study._study_id))
    return study.ask()


def start_waiting(study: optuna.Study, waiting: FrozenTrial, sampler: optuna.samplers.BaseSampler) -> optuna.Trial:
    """Start one certain waiting trial, which ``Study.ask`` cannot choose.

    ``sampler`` learns of a trial that starts for the first time. One that was started before keeps what it got then.
    """
    study.sampler = SettledSampler() if waiting.params and not is_unsampled(waiting) else sampler
    study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
    _refresh(study)
    return optuna.Trial(study, waiting._trial_id)


def is_unsampled(trial: FrozenTrial) -> bool:
    """Tell whether a trial has no settings yet: its coordinator died while they were sampled."""
    return "config" not in trial.user_attrs


def start_unsampled(study: optuna.Study, waiting: FrozenTrial, sampler: optuna.samplers.BaseSampler) -> optuna.Trial:
    """Start a waiting trial that has no settings yet, or only the first of them.

    What it has was drawn from the sampler one after the other, so the sampler draws it again before it goes on.
    """
    trial = start_waiting(study, waiting, sampler)
    relative = trial.relative_params
    for name, distribution in waiting.distributions.items():
        if name not in relative and not distribution.single():
            study.sampler.sample_independent(study, waiting, name, distribution)
    return trial


def note_epoch(trial: optuna.Trial, epoch: int, value: float) -> None:
    """Let the pruner know of an epoch of a running trial; :func:`report` tells the store."""
    trial._cached_frozen_trial.intermediate_values[epoch] = value


def report(study: optuna.Study, epochs: Iterable[tuple[optuna.Trial, int, float]]) -> None:
    """Tell the store of epochs that it has not heard of, all in one transaction."""
    values = [(trial._trial_id, epoch, value) for trial, epoch, value in epochs]
    if isinstance(study._storage, OwnedStorage):
        study._storage.add_intermediate_values(values)
        return
    for trial_id, epoch, value in values:
        study._storage.set_trial_intermediate_value(trial_id, epoch, value)


class _Known:
    """A study whose complete trials are known, for pruners that ask for these at every epoch."""

    def __init__(self, study: optuna.Study, complete: Sequence[FrozenTrial]) -> None:
        self._study, self._complete = study, complete

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """Return what ``Study.get_trials`` does."""
        if states == (TrialState.COMPLETE,):
            return list(self._complete)
        return self._study.get_trials(deepcopy, states)


def is_pruned(study: optuna.Study, trial: optuna.Trial, complete: Sequence[FrozenTrial]) -> bool:
    """Return what ``Trial.should_prune`` does; ``complete`` trials are known, so that no epoch reads them again."""
    if isinstance(study.pruner, (optuna.pruners.PercentilePruner, optuna.pruners.ThresholdPruner)):
        known: Any = _Known(study, complete)
        return study.pruner.prune(known, trial._get_latest_trial())
    return trial.should_prune()


def requeue(study: optuna.Study, number: int) -> None:
    """Let a running trial wait again, which Optuna has no call for."""
    trial = study.get_trials(deepcopy=False)[number]
    study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    _refresh(study)


def pause(study: optuna.Study, number: int) -> None:
    """Let a running trial wait at the rung that it has reached: the last epoch that was reported."""
    trial = study.get_trials(deepcopy=False)[number]
    mark_waiting(study, trial, RUNG, max(trial.intermediate_values, default=0))
    requeue(study, number)


def mark_waiting(study: optuna.Study, trial: FrozenTrial, key: str, epoch: int) -> None:
    """Set the attribute RUNG or PROMOTED of a trial that has not ended; one that waits has no ``Trial`` to do it."""
    study._storage.set_trial_user_attr(trial._trial_id, key, epoch)
    _refresh(study)


def drop_waiting(study: optuna.Study, waiting: FrozenTrial) -> None:
    """Let a trial that waits fail instead."""
    end_trial(study, start_waiting(study, waiting, SettledSampler()).number, "crashed", None)


def end_trial(study: optuna.Study, number: int, outcome: str, value: float | None) -> None:
    """Give a running trial the state of its outcome; ``value`` is only for complete trials.

    Optuna is never told a value that is no number: such a trial diverged.
    """
    if value is not None and not math.isfinite(value):
        outcome, value = "diverged", None
    state = TrialState[OUTCOMES[outcome].optuna]
    if state == TrialState.WAITING:
        (pause if outcome == "paused" else requeue)(study, number)
        return
    if state == TrialState.FAIL:
        trial = study.get_trials(deepcopy=False)[number]
        study._storage.set_trial_user_attr(trial._trial_id, "outcome", outcome)
    sampler = study.sampler.sampler if isinstance(study.sampler, ViewSampler) else study.sampler
    if isinstance(
        sampler, (optuna.samplers.GridSampler, optuna.samplers.BruteForceSampler)
    ):  # they would end Optuna's own loop
        study.sampler = SettledSampler()
    study.tell(number, value if state == TrialState.COMPLETE else None, state=state)


def invalidate_trial(study: optuna.Study, trial_id: int) -> None:
    """Let a trial that ended count for nothing, so that the next run trains its settings again.

    Optuna does not change a trial that ended, so its row is changed directly.
    """
    engine = engine_of(study)
    if engine is not None:
        with engine.begin() as connection:
            table = TrialModel.__table__
            connection.execute(sa.update(table).where(table.c.trial_id == trial_id).values(state=TrialState.FAIL))
    else:
        study._storage._get_trial(trial_id).state = TrialState.FAIL  # type: ignore[attr-defined]
    if isinstance(study._storage, OwnedStorage):
        study._storage.forget()
    getattr(study._storage, "_studies", {}).pop(study._study_id, None)  # what Optuna keeps of trials that ended
    _refresh(study)
