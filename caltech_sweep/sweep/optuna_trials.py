"""What Optuna's ``Study.ask`` and ``Study.tell`` cannot do, and nothing else.

They cannot start a new trial while others wait, start one certain waiting trial, let a running trial wait again, or
invalidate a trial that ended. Optuna's samplers see the list of trials that ``ask`` and ``tell`` last cleared from a
cache of the thread, so everything here that changes a trial without them clears it as well (:func:`_refresh`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.storages._rdb.models import TrialModel
from optuna.trial import FrozenTrial, TrialState

from caltech_sweep.sweep.optuna_store import engine_of
from caltech_sweep.tracking.records import OUTCOMES


class SettledSampler(optuna.samplers.BaseSampler):
    """The sampler of a trial that has all its settings: it draws nothing and leaves no mark in the store."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """Return nothing to draw."""
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        """Draw nothing."""
        return {}

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, distribution: Any) -> Any:
        """Refuse to draw."""
        raise AssertionError(f"trial {trial.number} has no {param_name}")


class _InSpace:
    """A study as its sampler should see it: without the trials that lack settings of the space."""

    def __init__(self, study: optuna.Study, names: frozenset[str]) -> None:
        self._study, self._names = study, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, *arguments: Any, **options: Any) -> list[FrozenTrial]:
        """Return what ``Study.get_trials`` does, without the trials that lack settings."""
        return [t for t in self._study.get_trials(*arguments, **options) if self._names <= t.distributions.keys()]

    def _get_trials(self, *arguments: Any, **options: Any) -> list[FrozenTrial]:
        return [t for t in self._study._get_trials(*arguments, **options) if self._names <= t.distributions.keys()]


class InSpaceSampler(optuna.samplers.BaseSampler):
    """A sampler that does not see rows outside its space.

    Optuna models only settings that every trial has. One row with a learning rate outside the space would take the
    learning rate out of the model for good.
    """

    def __init__(self, sampler: optuna.samplers.BaseSampler, names: Iterable[str]) -> None:
        self._sampler, self._names = sampler, frozenset(names)

    def _view(self, study: optuna.Study) -> Any:
        return _InSpace(study, self._names)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Pass the call on."""
        self._sampler.before_trial(self._view(study), trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """Return the space that trials with all settings have in common."""
        return self._sampler.infer_relative_search_space(self._view(study), trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        """Suggest some settings together."""
        return self._sampler.sample_relative(self._view(study), trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, distribution: Any) -> Any:
        """Suggest one setting."""
        return self._sampler.sample_independent(self._view(study), trial, param_name, distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        """Pass the call on."""
        self._sampler.after_trial(self._view(study), trial, state, values)


def _refresh(study: optuna.Study) -> None:
    """Let the sampler see all trials as they are now; Optuna does so in ``Study.ask`` and ``Study.tell`` only."""
    study._thread_local.cached_all_trials = None


def start_sampled(study: optuna.Study, sampler: optuna.samplers.BaseSampler) -> optuna.Trial:
    """Start a new trial whose settings ``sampler`` suggests."""
    study.sampler = sampler
    if study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):  # ``Study.ask`` would start the first of these
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


def requeue(study: optuna.Study, number: int) -> None:
    """Let a running trial wait again, which Optuna has no call for."""
    trial = study.get_trials(deepcopy=False)[number]
    study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    _refresh(study)


def drop_waiting(study: optuna.Study, waiting: FrozenTrial) -> None:
    """Let a trial that waits fail instead."""
    end_trial(study, start_waiting(study, waiting, SettledSampler()).number, "crashed", None)


def end_trial(study: optuna.Study, number: int, outcome: str, value: float | None) -> None:
    """Give a running trial the final state of its outcome; ``value`` is only for complete trials.

    Optuna is never told a value that is no number: such a trial diverged.
    """
    if value is not None and not math.isfinite(value):
        outcome, value = "diverged", None
    state = TrialState[OUTCOMES[outcome].optuna]
    if state == TrialState.FAIL:
        trial = study.get_trials(deepcopy=False)[number]
        study._storage.set_trial_user_attr(trial._trial_id, "outcome", outcome)
    if isinstance(
        study.sampler, (optuna.samplers.GridSampler, optuna.samplers.BruteForceSampler)
    ):  # they would end Optuna's own loop, in which this is not
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
    getattr(study._storage, "_studies", {}).pop(study._study_id, None)  # what Optuna keeps of trials that ended
    _refresh(study)
