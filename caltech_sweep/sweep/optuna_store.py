"""The study store: Optuna's database."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.storages._rdb.models import TrialModel

from caltech_sweep.addresses import STUDIES
from caltech_sweep.config import TrialConfig, as_stored
from caltech_sweep.errors import StoreError, UsageError
from caltech_sweep.stores import PATIENCE, Address, Store, await_server, reason, study_store, tune_sqlite
from caltech_sweep.study.components import make_pruner
from caltech_sweep.study.definition import StudyDefinition, identity_difference
from caltech_sweep.study.file import weights_key
from caltech_sweep.sweep.owned_storage import OwnedStorage
from caltech_sweep.tracking.records import STORE_TAG, InitialWeights

MEMORY = Store("memory", STUDIES)  # ends with the process, for tests

SEARCH = ("sampler", "pruner", "early_stopping")  # parts of a study's identity that may change while it goes on
# Weights that older versions of this package trained from in another way than torchvision.
OTHER_BEFORE = ("imagenet googlenet", "imagenet inception_v3", "imagenet efficientnet_v2_l")

STORE_ERRORS = (optuna.exceptions.StorageInternalError, sa.exc.SQLAlchemyError)

optuna.logging.set_verbosity(optuna.logging.WARNING)


def _open_storage(store: Store) -> BaseStorage:
    if store is MEMORY:
        return InMemoryStorage()
    store.make_whole(lambda place: RDBStorage(place).engine.dispose())
    storage = store.make_tables(lambda: RDBStorage(store.uri, {"pool_pre_ping": not store.is_local}))
    if store.is_local:
        tune_sqlite(storage.engine, PATIENCE)
    return storage


def open_study(
    definition: StudyDefinition,
    storage: Address,
    identity: Mapping[str, Any],
    weights: Mapping[str, InitialWeights] | None = None,
    attributes: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> optuna.Study:
    """Create the Optuna study, or open it; a study has an id, which tells it from others of its name elsewhere.

    ``note`` is told what was not recorded of the initial ``weights``.

    ``attributes`` are set before that.
    Raises UsageError with the difference when its identity has changed, StoreError when the store cannot be used.
    """
    store = study_store(storage)
    with store.opening(), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        opened = _open_storage(store)
        study = optuna.create_study(
            storage=OwnedStorage(opened) if isinstance(opened, RDBStorage) else opened,
            study_name=definition.name,
            direction=definition.objective.direction,
            load_if_exists=True,
            pruner=make_pruner(definition.pruner),
        )
        check_readable(study, store)
    for key, value in (attributes or {}).items():
        study.set_user_attr(key, value)
    check_identity(study, definition.name, identity, weights, note)
    if STORE_TAG not in study.user_attrs:
        study.set_user_attr(STORE_TAG, uuid.uuid4().hex)
    return study


def check_readable(study: optuna.Study, store: Store) -> None:
    """Raise StoreError where what a store has of a study is not what was written there."""
    try:
        kept = [study.user_attrs.get("identity")]
        kept += [trial.user_attrs.get("config") for trial in study.get_trials(deepcopy=False)]
        problem = next(
            (f"{value!r:.50} in place of settings" for value in kept if not isinstance(value, dict | None)), ""
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # of Optuna's readers
        problem = reason(error)
    if problem:
        raise StoreError(
            f"study {study.study_name!r} in the {store.kind.name} {store.shown} is damaged ({problem}): put back a "
            "copy of that store, or name a new one with --storage and rebuild the study there with `run --adopt`"
        )


def engine_of(study: optuna.Study) -> sa.Engine | None:
    """Return the database that a study lies in, or None of one in memory."""
    storage = getattr(study._storage, "_backend", study._storage)  # Optuna wraps it in a cache
    return storage.engine if isinstance(storage, (RDBStorage, OwnedStorage)) else None


def await_outages(study: optuna.Study, note: Callable[[str], None]) -> None:
    """Let a study wait for its database server when that goes away, rather than end; ``note`` is told."""
    engine = engine_of(study)
    if engine is not None and engine.dialect.name != "sqlite":
        await_server(engine, PATIENCE, note)


def open_storage(storage: Address, create: bool = False) -> BaseStorage:
    """Open a store that is there, or create it; raise StoreError when it cannot be used."""
    store = study_store(storage)
    store.check(create)
    with store.opening():
        return _open_storage(store)


def stored_studies(storage: BaseStorage) -> dict[str, optuna.Study]:
    """Return every study of a store by its name."""
    names = [study.study_name for study in storage.get_all_studies()]
    return {name: optuna.load_study(study_name=name, storage=storage) for name in names}


def by_content(identity: Mapping[str, Any], weights: Mapping[str, InitialWeights]) -> dict[str, Any]:
    """Return an identity in which a file of fixed weights goes by its contents: its name and place do not count."""
    result = dict(identity)
    for part in ("fixed", "overrides"):
        name = as_stored(result.get(part, {}).get("weights"))
        if name == "imagenet":
            result[part] = {**result[part], "weights": name}
        if isinstance(name, str) and name.startswith("file:") and name in weights:
            result[part] = {**result[part], "weights": f"file with SHA-256 {weights[name].digest}"}
    return result


def _carried_over(stored: Mapping[str, Any], weights: Mapping[str, InitialWeights]) -> dict[str, Any]:
    """Return a stored identity with contents where an older version recorded names and runs."""
    known = dict(stored.get("initial_weights", {}))
    for name, source in weights.items():
        if name not in known or known[name] == source.run_id:
            known[name] = source.digest
    return {**by_content(stored, weights), "initial_weights": known}


def check_identity(
    study: optuna.Study,
    name: str,
    identity: Mapping[str, Any],
    weights: Mapping[str, InitialWeights] | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> None:
    """Record what a study is, or raise UsageError with the difference to what was recorded.

    ``weights`` are those that the trials start from. Contents that were not recorded are from now on; ``note`` is told
    when trials are there that may have started from others.
    """
    stored = study.user_attrs.get("identity")
    if stored is None:
        study.set_user_attr("identity", dict(identity))
        study.set_user_attr("optuna", optuna.__version__)
        return
    carried = compared(stored, name, identity, weights or {})
    if carried != stored:
        _say_what_is_new(study, stored, identity.get("initial_weights", {}), note)
        study.set_user_attr("identity", carried)


def compared(
    stored: Mapping[str, Any], name: str, identity: Mapping[str, Any], weights: Mapping[str, InitialWeights]
) -> dict[str, Any]:
    """Return an identity to record in place of the stored one; raise UsageError with their difference.

    The sampler and the pruner may change: they decide what is tried next, and nothing about what a trial means. So may
    early stopping, which every trial has among its own settings.
    """
    now = identity.get("initial_weights", {})
    known = _carried_over(stored, weights)
    known = {key: value for key, value in known.items() if key not in SEARCH}
    known.update({key: identity[key] for key in SEARCH if key in identity})
    then = known.pop("initial_weights")
    for source, digest in now.items():
        if then[source] != digest:
            kind = "run" if then[source] == stored["initial_weights"][source] and len(then[source]) == 32 else "SHA-256"
            is_now = weights[source].run_id if weights and kind == "run" else digest
            raise UsageError(
                f"study {name!r} has trials that started from other weights, and tables must not mix them: the {kind} "
                f"of {source} was {then[source]}, is {is_now}; put those back, or give this one a name of its own with "
                "--name"
            )
    difference = identity_difference(known, {k: v for k, v in identity.items() if k != "initial_weights"})
    if difference:
        raise other_identity(name, difference)
    return {**known, "initial_weights": {**then, **now}}


def _say_what_is_new(
    study: optuna.Study, stored: Mapping[str, Any], now: Mapping[str, str], note: Callable[[str], None]
) -> None:
    """Tell of weights that trials of an older version may have started from, whose contents were not recorded."""
    configs = [trial.user_attrs["config"] for trial in study.get_trials(deepcopy=False) if "config" in trial.user_attrs]
    used = {weights_key(TrialConfig.from_dict(config)) for config in configs}
    for source in sorted(used & now.keys()):
        if stored.get("initial_weights", {}).get(source) == now[source]:
            continue
        note(
            f"the contents of {source} were not recorded before; from now on they are those with SHA-256 {now[source]}"
        )
        if source in OTHER_BEFORE:
            note(
                f"trials that started from {source} before this version lack the input transform or the statistics of "
                "those weights; to compare with them, run the study again under another --name"
            )


def check_stored(
    name: str, store: Store, identity: Mapping[str, Any] | None, weights: Mapping[str, InitialWeights] | None
) -> None:
    """Raise the error that :func:`open_study` would, with nothing written.

    Without an ``identity``, which cannot be known while images or weights are missing, it is not compared.
    """
    study = _read_study(name, store)
    if study is not None:
        stored = study.user_attrs.get("identity")
        if stored is not None and identity is not None:
            compared(stored, name, identity, weights or {})


def check_resumable(name: str, store: Store, numbers: Sequence[int]) -> None:
    """Raise UsageError for a trial that is not there or has ended for good; nothing is written."""
    study = _read_study(name, store) if numbers else None
    trials = study.get_trials(deepcopy=False) if study is not None else []
    for number in numbers:
        if number >= len(trials):
            raise UsageError(f"--resume-trial: study {name!r} has {len(trials)} trials and no trial {number}")
        if trials[number].state.is_finished():
            outcome = trials[number].user_attrs.get("outcome") or trials[number].state.name.lower()
            raise UsageError(f"--resume-trial: trial {number} is {outcome}; only paused and interrupted ones can go on")


def _read_study(name: str, store: Store) -> optuna.Study | None:
    """Return a study of a store, or None where there is none; nothing is written."""
    if store.is_missing:
        return None
    with store.opening(), warnings.catch_warnings():
        if not sa.inspect(store.engine()).has_table(TrialModel.__tablename__):  # Optuna would make its tables
            return None
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = stored_studies(RDBStorage(store.uri, store.looking())).get(name)
        if study is not None:
            check_readable(study, store)
        return study


def other_identity(name: str, differences: Sequence[str]) -> UsageError:
    """Return the error of a study whose name others settings have; ``differences`` has a line for each."""
    lines = "\n".join(f"  {line}" for line in differences)
    return UsageError(
        f"study {name!r} has trials with other settings, and tables must not mix them:\n{lines}\n"
        "give this one a name of its own with --name"
    )
