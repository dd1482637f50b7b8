"""Optuna's storage for the one process that may write to it: what is known is not read again.

Optuna's own cache keeps trials that have ended and reads all others at each question, since other processes may change
them. A study's coordinator is the only one that changes it (:mod:`caltech_sweep.sweep.lease`), and with 200 trials that
run these reads would be most of what it does.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.storages._rdb.models import TrialIntermediateValueModel
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

T = TypeVar("T")


class OwnedStorage(BaseStorage):
    """A database of Optuna's, with its trials in memory as this process has read or written them.

    What other processes write meanwhile is not seen. After an error everything is read again; a transaction that a
    server has ended is done again.
    """

    def __init__(self, database: RDBStorage) -> None:
        self.engine, self._database = database.engine, database
        self._cached = get_storage(database)  # with what Optuna itself keeps
        self._trials: dict[int, dict[int, FrozenTrial]] = {}  # by the study's id, by their own, in order of number
        self._study_of: dict[int, int] = {}  # the study's id by the trial's

    def forget(self) -> None:
        """Read everything again, after the database was changed in another way."""
        self._trials.clear()
        self._study_of.clear()
        self._cached = get_storage(self._database)

    def _surely(self, ask: Callable[[], T], done: Callable[[], T | None] = lambda: None) -> T:
        """Return what the database answers; after an error, everything is read again.

        Where its server has ended the connection in the middle, whose next one waits for it, it is asked again, unless
        ``done`` finds that it did what was asked: it returns the answer then, None otherwise. By itself, asking twice
        must do no more than asking once.
        """
        studies, again = list(self._trials), False
        while True:
            try:
                for study_id in studies if again else ():
                    self._known(study_id)  # Optuna's cache takes no trial's id that it has not read
                answer = done() if again else None
                return ask() if answer is None else answer
            except BaseException as error:  # nobody knows what of it was written
                self.forget()
                if not _was_cut(error):
                    raise
            again = True

    def _known(self, study_id: int) -> dict[int, FrozenTrial]:
        if study_id not in self._trials:
            trials = self._surely(lambda: self._cached.get_all_trials(study_id, deepcopy=False))
            self._trials[study_id] = {trial._trial_id: trial for trial in trials}
            self._study_of.update((trial._trial_id, study_id) for trial in trials)
        return self._trials[study_id]

    def _changed(self, trial_id: int) -> FrozenTrial | None:
        """Return what is known of a trial, to be changed; what was handed out of it before stays as it is."""
        study_id = self._study_of.get(trial_id)
        if study_id is None:
            return None
        trial = copy.copy(self._trials[study_id][trial_id])
        self._trials[study_id][trial_id] = trial
        return trial

    def _add(self, trial_id: int, field: str, more: Mapping[Any, Any]) -> None:
        """Add to a mapping of a trial that is known."""
        trial = self._changed(trial_id)
        if trial is not None:
            setattr(trial, field, {**getattr(trial, field), **more})

    # -- trials --

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        before = len(self._known(study_id))

        def made() -> int | None:
            return next(iter(list(self._known(study_id))[before:]), None)

        trial_id = self._surely(lambda: self._cached.create_new_trial(study_id, template_trial), made)
        trial = self._surely(lambda: self._cached.get_trial(trial_id))
        known = self._known(study_id)
        if trial.number == len(known):
            known[trial_id], self._study_of[trial_id] = trial, study_id
        elif trial_id not in known:  # somebody else has added some
            self.forget()
            self._known(study_id)
        return trial_id

    def get_trial(self, trial_id: int) -> FrozenTrial:
        study_id = self._study_of.get(trial_id)
        if study_id is None:
            return self._surely(lambda: self._cached.get_trial(trial_id))
        trial = copy.copy(self._trials[study_id][trial_id])
        for name in ("params", "distributions", "user_attrs", "system_attrs", "intermediate_values"):
            setattr(trial, name, dict(getattr(trial, name)))  # ``optuna.Trial`` changes these of its own
        return trial

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = [trial for trial in self._known(study_id).values() if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        return self._surely(lambda: self._cached.get_trial_id_from_study_id_trial_number(study_id, trial_number))

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        self._surely(lambda: self._cached.set_trial_param(trial_id, param_name, param_value_internal, distribution))
        trial = self._changed(trial_id)
        if trial is not None and param_name not in trial.params:  # else Optuna keeps what it was
            value = distribution.to_external_repr(float(param_value_internal))
            trial.params = {**trial.params, param_name: value}
            trial.distributions = {**trial.distributions, param_name: distribution}

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        before = self.get_trial(trial_id).state

        def changed() -> bool | None:
            return self._cached.get_trial(trial_id).state == state != before or None

        done = self._surely(lambda: self._cached.set_trial_state_values(trial_id, state, values), changed)
        trial = self._changed(trial_id) if done else None
        if trial is not None:
            trial.state = state
            if values is not None:
                trial.values = [float(value) for value in values]
            if state == TrialState.RUNNING:
                trial.datetime_start = datetime.now()
            if state.is_finished():
                trial.datetime_complete = datetime.now()
        return done

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self._surely(lambda: self._cached.set_trial_intermediate_value(trial_id, step, intermediate_value))
        self._add(trial_id, "intermediate_values", {step: float(intermediate_value)})

    def add_intermediate_values(self, values: Iterable[tuple[int, int, float]]) -> None:
        """Add values of (trial's id, step, value), none of which is there yet, in one transaction."""
        model = TrialIntermediateValueModel
        rows: list[dict[str, Any]] = []
        added = defaultdict[int, dict[int, float]](dict)
        for trial_id, step, value in values:
            added[trial_id][step] = float(value)
            stored, kind = model.intermediate_value_to_stored_repr(value)
            own = {"intermediate_value": stored, "intermediate_value_type": kind}
            rows.append({"trial_id": trial_id, "step": step, **own})

        def write() -> bool:
            with self.engine.begin() as connection:
                connection.execute(sa.insert(model.__table__), rows)
            return True

        def has_first() -> bool | None:
            first = rows[0]
            return first["step"] in self._cached.get_trial(first["trial_id"]).intermediate_values or None

        self._surely(write, has_first)
        for trial_id, more in added.items():
            self._add(trial_id, "intermediate_values", more)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._surely(lambda: self._cached.set_trial_user_attr(trial_id, key, value))
        self._add(trial_id, "user_attrs", {key: _as_stored(value)})

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._surely(lambda: self._cached.set_trial_system_attr(trial_id, key, value))
        self._add(trial_id, "system_attrs", {key: _as_stored(value)})

    # -- studies, of which nothing is kept --

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        return self._cached.create_new_study(directions, study_name)

    def delete_study(self, study_id: int) -> None:
        self._cached.delete_study(study_id)
        self.forget()

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._surely(lambda: self._cached.set_study_user_attr(study_id, key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._surely(lambda: self._cached.set_study_system_attr(study_id, key, value))

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._surely(lambda: self._cached.get_study_id_from_name(study_name))

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._surely(lambda: self._cached.get_study_name_from_id(study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._surely(lambda: self._cached.get_study_directions(study_id))

    def get_study_user_attrs(self, study_id: int) -> Mapping[str, Any]:  # type: ignore[override]
        return self._surely(lambda: self._cached.get_study_user_attrs(study_id))

    def get_study_system_attrs(self, study_id: int) -> Mapping[str, Any]:  # type: ignore[override]
        return self._surely(lambda: self._cached.get_study_system_attrs(study_id))

    def get_all_studies(self) -> list[Any]:
        return self._surely(lambda: self._cached.get_all_studies())


def _was_cut(error: BaseException | None) -> bool:
    """Tell whether an error is that of a connection which its server has ended."""
    if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
        return True
    return error is not None and _was_cut(error.__cause__)


def _as_stored(value: Any) -> Any:
    """Return a value as it is read back: of a tuple a list."""
    return json.loads(json.dumps(value))
