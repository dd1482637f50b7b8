"""Whose a study in the tracking store is, decided before anything is written, and its adoption by this study store.

A study store has an id for each of its studies, and the study's parent run in the tracking store carries the id of the
study store that runs it: several people may share a tracking store without training into each other's runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, cast

import optuna
import sqlalchemy as sa
from optuna.storages._rdb.models import StudyModel, StudyUserAttributeModel, TrialModel, TrialUserAttributeModel
from optuna.trial import FixedTrial, TrialState

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import ForeignStudyError, StoreError, UsageError
from caltech_sweep.stores import Store
from caltech_sweep.study.definition import StudyDefinition
from caltech_sweep.study.grid import encode, reachable
from caltech_sweep.sweep.optuna_store import compared, open_storage, open_study, stored_studies
from caltech_sweep.sweep.optuna_trials import RUNG
from caltech_sweep.sweep.space import enqueue_params, own_branch, sample
from caltech_sweep.text import counted
from caltech_sweep.tracking.journal import journals
from caltech_sweep.tracking.records import (
    OUTCOMES,
    REPEAT_TAGS,
    STORE_TAG,
    SUGGESTED_BY,
    InitialWeights,
    StudyRecord,
    TrialRecord,
    whole,
    worth,
)
from caltech_sweep.tracking.writer import MlflowTracker

_ADOPTING = "adopting"  # of a study whose trials are not all here yet
_OF_A_RUN = ("images", "initial_weights")  # parts of an identity that only a run finds out
_EITHER = "name that one with --storage, or take the study over with `caltech-sweep run --adopt`"
_LOST = "lost"  # the outcome of a trial that left no run


@dataclass(frozen=True)
class Known:
    """What a study store has of a study, read without writing anything."""

    store: str | None
    identity: Mapping[str, Any]
    trials: frozenset[tuple[int, str]]  # number and fingerprint
    ended: frozenset[tuple[int, str]]  # those that are complete or pruned
    adopting: bool


def find_known(store: Store, name: str) -> Known | None:
    """Return what a study store has of a study, or None; raise StoreError when the store cannot be read."""
    if store.is_missing:
        return None
    store.check()
    with store.opening(), store.engine().connect() as connection:
        return _read_known(connection, name) if sa.inspect(connection).has_table(StudyModel.__tablename__) else None


def _read_known(connection: sa.Connection, name: str) -> Known | None:
    study, trial = StudyModel.__table__.c, TrialModel.__table__.c
    of_study, of_trial = StudyUserAttributeModel.__table__.c, TrialUserAttributeModel.__table__.c
    number = connection.scalar(sa.select(study.study_id).where(study.study_name == name))
    if number is None:
        return None
    own = connection.execute(sa.select(of_study.key, of_study.value_json).where(of_study.study_id == number))
    attributes = {key: json.loads(value) for key, value in own}
    trained: Any = (
        sa.select(trial.number, trial.state, of_trial.value_json)
        .join_from(TrialModel.__table__, TrialUserAttributeModel.__table__, trial.trial_id == of_trial.trial_id)
        .where(trial.study_id == number, of_trial.key == "fingerprint")
    )
    trials = {(found, json.loads(value)): state for found, state, value in connection.execute(trained)}
    ended = frozenset(key for key, state in trials.items() if state in (TrialState.COMPLETE, TrialState.PRUNED))
    adopting = bool(attributes.get(_ADOPTING))
    return Known(attributes.get(STORE_TAG), attributes.get("identity") or {}, frozenset(trials), ended, adopting)


def is_own(record: StudyRecord, known: Known | None, trials: Callable[[], list[TrialRecord]]) -> bool:
    """Tell whether a study in the tracking store is this study store's.

    One that carries no id yet is, if the study store has every trial that is complete there.
    """
    if known is not None and known.adopting:
        return False
    if record.store is not None:
        return known is not None and known.store == record.store
    runs = trials()
    complete = {(run.number, run.fingerprint) for run in runs if run.outcome == "complete"}
    return not runs or (known is not None and bool(known.trials) and complete <= known.trials)


def check_own(name: str, tracker: MlflowTracker, storage: Store) -> StudyRecord | None:
    """Return the tracking store's study of a name, or None; raise ForeignStudyError when another study store has it."""
    record = tracker.study(name)
    if record is not None:
        check_record(record, partial(tracker.trials, record), tracker.store, storage)
    return record


def check_runs(
    name: str,
    runs: Iterable[TrialRecord],
    tracking: Store,
    storage: Store,
    studies: Callable[[], Iterable[StudyRecord]],
) -> None:
    """Raise UsageError where a study store has trials that ended and the tracking store has no run of any of them.

    A few that lack their run are trained again; where all do, it is another tracking store, or the experiment has
    another name now. ``studies`` tells those of the tracking store.
    """
    known = find_known(storage, name)
    waits = any(study == name for study, _ in journals(storage.folder, tracking, lambda: [s.name for s in studies()]))
    if known is None or known.adopting or not known.ended or waits:
        return
    if not known.ended.isdisjoint((run.number, run.fingerprint) for run in runs):
        return
    now = next((study.name for study in studies() if study.store == known.store and study.name != name), None)
    how = f"rename its experiment, which is {now!r} now, back" if now else "name the one that has them (--tracking-uri)"
    raise UsageError(
        f"{counted(len(known.ended), 'trial')} of study {name!r} ended and left no run in the tracking store "
        f"{tracking.shown}, so its report would lack them; {how}, or train them again under another --name"
    )


def check_record(record: StudyRecord, trials: Callable[[], list[TrialRecord]], tracking: Store, storage: Store) -> None:
    """Raise ForeignStudyError for a study in the tracking store that another study store has; nothing is written."""
    if not is_own(record, find_known(storage, record.name), trials):
        raise ForeignStudyError(record.name, tracking.shown)


def foreign_studies(
    tracker: MlflowTracker, storage: Store, tracked: Mapping[str, StudyRecord]
) -> Iterator[tuple[str, str]]:
    """Yield every study of the tracking store that another study store runs, and what follows from that."""
    for name, record in tracked.items():
        known = find_known(storage, name)
        if known is None and record.store is not None:
            yield name, f"is only in the tracking store, and belongs to another study store: skipped; {_EITHER}"
        elif known is not None and not is_own(record, known, partial(tracker.trials, record)):
            yield name, f"skipped, since in the tracking store it belongs to another study store; {_EITHER}"


# -- adoption ----------------------------------------------------------------------------------------------------------


def check_adoptable(
    definition: StudyDefinition,
    identity: Mapping[str, Any],
    weights: Mapping[str, InitialWeights],
    tracker: MlflowTracker,
    storage: Store,
) -> StudyRecord | None:
    """Return the study to adopt, or None when it is this study store's already; nothing is written.

    Raises UsageError when there is none, when its settings differ, or when the study store has one of its name.
    """
    name, where = definition.name, tracker.store.shown
    record, known = tracker.study(name), find_known(storage, name)
    if record is None:
        raise UsageError(f"--adopt: there is no study {name!r} in {where}; leave the option out")
    compared(_recorded(record, tracker, identity), name, identity, weights)
    if known is None or known.adopting:
        return record
    if record.store is not None and known.store == record.store:
        return None
    if known.trials:
        raise UsageError(
            f"--adopt: {storage.shown} has a study {name!r} of its own with "
            f"{counted(len(known.trials), 'trial')}; name another study store with --storage, or remove that study "
            f"with `optuna delete-study --study-name {name} --storage {storage.shown}`"
        )
    return record


def _recorded(record: StudyRecord, tracker: MlflowTracker, identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a study's identity as the tracking store has it; of an earlier version, as far as it is known."""
    document = record.document
    if "identity" in document:
        found: Mapping[str, Any] = document["identity"]
        return found
    if not document:
        raise StoreError(
            f"the file study.json of study {record.name!r} (run {record.run_id}) cannot be read, so it is not known "
            "whether its settings are these; put it back, or choose --name"
        )
    parts = {key: document[key] for key in (*identity, "expand") if key in document and key not in _OF_A_RUN}
    digests = {run.tags["dataset.digest"] for run in tracker.trials(record) if "dataset.digest" in run.tags}
    other = digests - {identity["images"]}
    return {**identity, **parts, **({"images": ", ".join(sorted(other))} if other else {})}


def adopt(
    definition: StudyDefinition,
    identity: Mapping[str, Any],
    tracker: MlflowTracker,
    record: StudyRecord,
    storage: Store,
) -> str:
    """Make a study of the tracking store this study store's: rebuild it from its runs; return a sentence about it.

    The study is claimed first, so that its runs do not change any more. What is cut short is done again by the next
    ``--adopt``, and refused until then.
    """
    backend = open_storage(storage, create=True)
    if definition.name in stored_studies(backend):
        optuna.delete_study(study_name=definition.name, storage=backend)
    study = open_study(definition, storage, identity, attributes={_ADOPTING: True})
    tracker.adopt(record, study.user_attrs[STORE_TAG])
    runs: dict[int, TrialRecord] = {}
    for run in sorted(tracker.trials(record), key=worth):
        if run.number >= 0:
            runs[run.number] = run
    for number in range(max(runs, default=-1) + 1):
        study.add_trial(_rebuilt(definition, runs[number], tracker) if number in runs else _gap())
    study.set_user_attr(_ADOPTING, False)
    return f"study {definition.name!r} was rebuilt from {counted(len(runs), 'run')} and belongs to this study store now"


def _gap() -> optuna.trial.FrozenTrial:
    """Return a trial in the place of one that left no run, so that the others keep their numbers."""
    return optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"outcome": _LOST})


def _rebuilt(definition: StudyDefinition, run: TrialRecord, tracker: MlflowTracker) -> optuna.trial.FrozenTrial:
    """Return the trial that a run belongs to, as the study store that was lost had it."""
    config = _config_of(definition, run.params)
    attributes: dict[str, Any] = {key: whole(run.tags[key]) for key in (*REPEAT_TAGS, "family") if key in run.tags}
    attributes.update({SUGGESTED_BY: run.tags[SUGGESTED_BY]} if SUGGESTED_BY in run.tags else {})
    attributes.update({"row": run.row} if run.row is not None else {})
    attributes.update(fingerprint=run.fingerprint, config=json.loads(json.dumps(config.to_dict())))
    outcome = run.outcome if run.outcome in OUTCOMES else "interrupted"
    value = run.score if outcome == "complete" else None
    if outcome == "complete" and value is None:
        outcome, value = "crashed", None
    state = TrialState[OUTCOMES[outcome].optuna]
    seen = {}
    if definition.pruner is not None or outcome == "paused":
        seen = {metric.step: metric.value for metric in tracker.history(run.run_id, run.objective.each_epoch)}
    if state == TrialState.PRUNED:
        value = seen[max(seen)] if seen else None
    if state == TrialState.FAIL:
        attributes["outcome"] = outcome
    if outcome == "paused":
        attributes[RUNG] = max(seen, default=0)
    params = _params_of(definition, run, config)
    trial = optuna.trial.create_trial(
        state=state,
        value=value,
        params=params.params,
        distributions=params.distributions,
        user_attrs=attributes,
        intermediate_values=seen,
    )
    if trial.datetime_start is not None and run.start_time:
        trial.datetime_start = datetime.fromtimestamp(run.start_time / 1000)
    return trial


def _params_of(definition: StudyDefinition, run: TrialRecord, config: TrialConfig) -> FixedTrial:
    """Let a trial's settings be suggested once more, which tells the distributions that they come from."""
    settings = config.to_dict()
    sampled = run.row is None and not set(REPEAT_TAGS) & run.tags.keys()
    params = enqueue_params(definition.space, settings)
    branch = definition.expand if run.row is None else {}
    fixed = FixedTrial({**params, **{key: encode(settings[key]) for key in branch}})
    trial = cast(optuna.Trial, fixed)
    sample(trial, definition.space if sampled else reachable(definition.space, settings))
    own_branch(trial, branch)
    return fixed


def _config_of(definition: StudyDefinition, params: Mapping[str, str]) -> TrialConfig:
    """Return the config that a run's params say; its dataset is the study's."""
    return replace(TrialConfig.from_params(params), dataset=definition.config({}).dataset)
