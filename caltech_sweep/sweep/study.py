"""The Optuna study behind a study file: opened once, counted, and its trials moved between states."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.storages._rdb.models import TrialHeartbeatModel, TrialModel
from optuna.trial import FrozenTrial, TrialState

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import StoreError, UsageError
from caltech_sweep.records import OUTCOMES
from caltech_sweep.stores import await_server, cannot_open, check_file, make_whole, sqlite_file, tune_sqlite
from caltech_sweep.sweep.space import all_branches, enqueue_params, make_pruner, make_sampler
from caltech_sweep.sweep.study_file import Row, StudyDefinition, identity_difference

HEARTBEAT_SECONDS = 60
PATIENCE = 600  # seconds that a write waits for a database that is held or away; workers train on meanwhile
MEMORY = "memory"  # the address of a store that ends with the process, for tests

STORE_ERRORS = (optuna.exceptions.StorageInternalError, sa.exc.SQLAlchemyError)

optuna.logging.set_verbosity(optuna.logging.WARNING)


def _open_storage(uri: str) -> BaseStorage:
    if uri == MEMORY:
        return InMemoryStorage()
    make_whole(uri, lambda place: RDBStorage(place).engine.dispose())
    local = sqlite_file(uri) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = RDBStorage(uri, {"pool_pre_ping": not local}, heartbeat_interval=HEARTBEAT_SECONDS)
    if local:
        tune_sqlite(storage.engine, PATIENCE)
    return storage


def open_study(definition: StudyDefinition, uri: str, identity: Mapping[str, Any]) -> optuna.Study:
    """Create the Optuna study, or open it.

    Raises UsageError with the difference when its identity has changed, StoreError when the store cannot be used.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                storage=_open_storage(uri),
                study_name=definition.name,
                direction="maximize",
                load_if_exists=True,
                sampler=make_sampler(definition.sampler, 0),
                pruner=make_pruner(definition.pruner),
            )
    except Exception as error:  # SQLAlchemy's and Optuna's errors have no common base
        raise cannot_open("study store", uri, error) from None  # the cause may hold secrets
    check_identity(study, definition.name, identity)
    return study


def _database(study: optuna.Study) -> RDBStorage | None:
    storage = getattr(study._storage, "_backend", study._storage)  # Optuna wraps it in a cache
    return storage if isinstance(storage, RDBStorage) else None


def await_outages(study: optuna.Study, note: Callable[[str], None]) -> None:
    """Let a study wait for its database server when that goes away, rather than end; ``note`` is told."""
    storage = _database(study)
    if storage is not None and sqlite_file(str(storage.url)) is None:
        await_server(storage.engine, PATIENCE, note)


def open_storage(uri: str) -> BaseStorage:
    """Open a store that is there; raise StoreError when it cannot be used."""
    check_file(uri, "study store", create=False)
    try:
        return _open_storage(uri)
    except Exception as error:  # SQLAlchemy's and Optuna's errors have no common base
        raise cannot_open("study store", uri, error) from None


def stored_studies(storage: BaseStorage) -> dict[str, optuna.Study]:
    """Return every study of a store by its name."""
    names = [study.study_name for study in storage.get_all_studies()]
    return {name: optuna.load_study(study_name=name, storage=storage) for name in names}


def disown(study: optuna.Study, trial_id: int) -> None:
    """Let a trial that ended count for nothing, so that the next run trains its settings again.

    Optuna lets nobody change a trial that ended, so its row is changed beside it.
    """
    storage = _database(study)
    if storage is not None:
        with storage.engine.begin() as connection:
            table = TrialModel.__table__
            connection.execute(sa.update(table).where(table.c.trial_id == trial_id).values(state=TrialState.FAIL))
    else:
        study._storage._get_trial(trial_id).state = TrialState.FAIL  # type: ignore[attr-defined]


def check_identity(study: optuna.Study, name: str, identity: Mapping[str, Any]) -> None:
    """Record what a study is, or raise UsageError with the difference to what was recorded."""
    stored = study.user_attrs.get("identity")
    if stored is None:
        study.set_user_attr("identity", dict(identity))
        study.set_user_attr("optuna", optuna.__version__)
    elif stored != identity:
        lines = "\n".join(f"  {line}" for line in identity_difference(stored, identity))
        raise UsageError(
            f"study {name!r} has trials with other settings, and tables must not mix them:\n{lines}\n"
            "give this one a name of its own with --name"
        )


def check_alone(study: optuna.Study) -> None:
    """Raise StoreError while another coordinator shows signs of life in a store that has no lock of ours."""
    storage = _database(study)
    if storage is None or sqlite_file(str(storage.url)) is not None:
        return
    stale = set(storage._get_stale_trial_ids(study._study_id))
    with storage.engine.connect() as connection:
        signed = set(connection.scalars(sa.select(TrialHeartbeatModel.trial_id)))
    patience = timedelta(seconds=2 * HEARTBEAT_SECONDS)

    def alive(trial: FrozenTrial) -> bool:
        if trial._trial_id in signed:
            return trial._trial_id not in stale
        # Whoever started it died before its first sign, unless that is only just now.
        return trial.datetime_start is not None and datetime.now() - trial.datetime_start < patience

    if any(map(alive, study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))):
        raise StoreError(
            f"study {study.study_name!r} is being run by another process, or was {2 * HEARTBEAT_SECONDS} seconds ago; "
            "wait for it, stop it, or choose --name"
        )


def record_heartbeats(study: optuna.Study, trials: Sequence[optuna.Trial]) -> None:
    """Sign in a database server that this process still runs some trials; a local store has a lock for that."""
    storage = _database(study)
    if storage is not None and sqlite_file(str(storage.url)) is None:
        for trial in trials:
            storage.record_heartbeat(trial._trial_id)


def is_finished(trial: FrozenTrial) -> bool:
    """Tell whether a trial counts towards the study's total and is not to be run again."""
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
        return True
    return trial.state == TrialState.FAIL and trial.user_attrs.get("outcome") == "diverged"


def wanted_rows(definition: StudyDefinition) -> Iterator[tuple[Row, int, TrialConfig]]:
    """Yield every row with each of its replicates: all first seeds, then all second ones, and so on."""
    for replicate in range(definition.replicates):
        for row in definition.rows:
            yield row, replicate, definition.row_config(row, replicate)


def is_extra(trial: FrozenTrial) -> bool:
    """Tell whether a trial repeats another on a further seed; ``trials`` does not count these."""
    return bool({"replicate", "confirms"} & trial.user_attrs.keys())


def is_current(trial: FrozenTrial, definition: StudyDefinition) -> bool:
    """Tell whether a trial is a sampled one, or trains its row with settings that the row has now.

    A replicate stays current when fewer are asked for later: it was trained, and the table shows it.
    """
    name = trial.user_attrs.get("row")
    if name is None:
        return True
    replicate = trial.user_attrs.get("replicate", 0)
    rows = [row for row in definition.rows if row.name == name]
    return any(definition.row_config(row, replicate).fingerprint() == trial.user_attrs["fingerprint"] for row in rows)


def enqueue_missing_rows(study: optuna.Study, definition: StudyDefinition, only: Sequence[str] = ()) -> None:
    """Let every row wait that no trial has trained, or waits to train, with the settings that it has now.

    What a row trains is stored with its trial, since Optuna resamples what its space lacks.
    """
    known = {
        (trial.user_attrs.get("row"), trial.user_attrs.get("fingerprint"))
        for trial in study.get_trials(deepcopy=False)
        if is_finished(trial) or trial.state == TrialState.WAITING
    }
    for row, replicate, config in wanted_rows(definition):
        if (row.name, config.fingerprint()) in known or (only and row.name not in only):
            continue
        attributes = {"row": row.name, **({"replicate": replicate} if replicate else {})}
        _enqueue(study, enqueue_params(definition.space, config.to_dict()), config, attributes)


def enqueue_confirmations(study: optuna.Study, count: int, seeds: int) -> None:
    """Let the best sampled trials be repeated on fresh seeds, none of which took part in choosing them."""
    trials = study.get_trials(deepcopy=False)
    sampled = [t for t in trials if t.state == TrialState.COMPLETE and "row" not in t.user_attrs and not is_extra(t)]
    known = {(t.user_attrs["confirms"], t.user_attrs["fingerprint"]) for t in trials if "confirms" in t.user_attrs}
    for trial in sorted(sampled, key=lambda t: (-(t.value or 0), t.number))[:count]:
        config = TrialConfig.from_dict(trial.user_attrs["config"])
        for further in range(1, seeds + 1):
            repeat = replace(config, seed=config.seed + further)
            if (trial.number, repeat.fingerprint()) not in known:
                _enqueue(study, trial.params, repeat, {"confirms": trial.number})


def _enqueue(
    study: optuna.Study, params: Mapping[str, Any], config: TrialConfig, attributes: Mapping[str, Any]
) -> None:
    stored = {**attributes, "config": config.to_dict(), "fingerprint": config.fingerprint()}
    study.enqueue_trial(dict(params), json.loads(json.dumps(stored)))


def complete_family(study: optuna.Study, definition: StudyDefinition, base: FrozenTrial) -> None:
    """Let every schedule of a sampled trial's family wait, that is not there yet, to be trained."""
    config = TrialConfig.from_dict(base.user_attrs["config"])
    family = [t for t in study.get_trials(deepcopy=False) if base.number in (t.number, t.user_attrs.get("family"))]
    known = {trial.user_attrs["fingerprint"] for trial in family}
    for settings in all_branches(definition.expand):
        branch = replace(config, **settings)
        if branch.fingerprint() not in known:
            _enqueue(study, {**base.params, **settings}, branch, {"family": base.number})


def is_family_base(trial: FrozenTrial) -> bool:
    """Tell whether a trial was sampled, rather than being a row or a further schedule of a sampled one."""
    return "config" in trial.user_attrs and not {"row", "family", "confirms"} & trial.user_attrs.keys()


def ask(study: optuna.Study) -> optuna.Trial:
    """Start a new trial; ``study.ask`` would take one that waits, if there is any."""
    return optuna.Trial(study, study._storage.create_new_trial(study._study_id))


def is_unsampled(trial: FrozenTrial) -> bool:
    """Tell whether a trial has no settings yet: its coordinator died while they were sampled."""
    return "config" not in trial.user_attrs


def take_unsampled(study: optuna.Study, waiting: FrozenTrial) -> optuna.Trial:
    """Start a waiting trial that has no settings yet, or the first of them.

    What it has was drawn from the sampler one after the other, so the sampler draws it again before it goes on.
    """
    trial = take(study, waiting)
    relative = trial.relative_params
    for name, distribution in waiting.distributions.items():
        if name not in relative and not distribution.single():
            study.sampler.sample_independent(study, waiting, name, distribution)
    return trial


def take(study: optuna.Study, waiting: FrozenTrial) -> optuna.Trial:
    """Start one certain waiting trial, which ``study.ask`` cannot choose."""
    study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
    return optuna.Trial(study, waiting._trial_id)


def set_config(trial: optuna.Trial, config: TrialConfig) -> None:
    """Store what a sampled trial trains."""
    trial.set_user_attr("fingerprint", config.fingerprint())
    trial.set_user_attr("config", json.loads(json.dumps(config.to_dict())))


def put_back(study: optuna.Study, trial_id: int) -> None:
    """Let a running trial wait again."""
    study._storage.set_trial_state_values(trial_id, TrialState.WAITING)


def end_trial(study: optuna.Study, trial_id: int, outcome: str, value: float | None) -> None:
    """Give a running trial the final state of its outcome; ``value`` is for complete trials alone."""
    state = TrialState[OUTCOMES[outcome].optuna]
    if state == TrialState.FAIL:
        study._storage.set_trial_user_attr(trial_id, "outcome", outcome)
    if state == TrialState.PRUNED:  # Optuna keeps the last value that a pruned trial reported
        values = study._storage.get_trial(trial_id).intermediate_values
        value = values[max(values)] if values else None
    study._storage.set_trial_state_values(trial_id, state, None if value is None else [value])
