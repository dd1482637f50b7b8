"""What the coordinator knows of its trials is what Optuna reads from the database, whatever was done before."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import optuna
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from caltech_sweep.sweep.owned_storage import OwnedStorage

DISTRIBUTIONS = {
    "lr": FloatDistribution(1e-3, 1.0, log=True),
    "step_size": IntDistribution(1, 9),
    "augment": CategoricalDistribution(["[]", "[hflip]", None]),
}
VALUES = st.one_of(st.floats(allow_nan=False), st.text(max_size=3), st.lists(st.integers(), max_size=2), st.none())
NUMBERS = st.floats(allow_nan=False).map(lambda number: number + 0.0)  # SQLite knows no -0.0
OPERATION = st.one_of(
    st.tuples(st.just("new"), st.booleans()),
    st.tuples(st.just("param"), st.sampled_from(sorted(DISTRIBUTIONS)), st.integers(1, 2)),
    st.tuples(st.just("state"), st.sampled_from(list(TrialState)), NUMBERS),
    st.tuples(st.just("epoch"), st.integers(0, 3), NUMBERS | st.just(math.nan)),
    st.tuples(st.just("epochs"), st.integers(10, 10_000), NUMBERS | st.just(math.nan)),
    st.tuples(st.just("user"), st.sampled_from("ab"), VALUES),
    st.tuples(st.just("system"), st.sampled_from("ab"), VALUES),
    st.tuples(st.just("other"), st.just(0)),
)

REFUSED = (RuntimeError, ValueError, sa.exc.IntegrityError, optuna.exceptions.UpdateFinishedTrialError)  # by Optuna


def new_study(folder: Path) -> tuple[OwnedStorage, RDBStorage, int]:
    """Return the storage that is tested, one that reads the same database each time, and a study's id."""
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    address = f"sqlite:///{folder / 'optuna.db'}"
    owned = OwnedStorage(RDBStorage(address))
    return owned, RDBStorage(address), owned.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "study")


def told(trials: Sequence[FrozenTrial]) -> list[str]:
    """Return all that trials hold as text, for NaN is not itself; times without what passes between two clocks."""
    return [
        repr(
            (
                (trial.number, trial._trial_id, trial.state, trial.values, list(trial.params.items())),
                (trial.distributions, sorted(trial.user_attrs.items()), sorted(trial.system_attrs.items())),
                (
                    sorted(trial.intermediate_values.items()),
                    trial.datetime_start is None,
                    trial.datetime_complete is None,
                ),
            )
        )
        for trial in trials
    ]


def apply(storage: OwnedStorage, study: int, trial: int, operation: tuple[object, ...]) -> None:
    match operation:
        case ("new", True):
            storage.create_new_trial(study, create_trial(state=TrialState.WAITING, user_attrs={"row": ["a"]}))
        case ("new", _):
            storage.create_new_trial(study)
        case ("param", str(name), int(value)):
            storage.set_trial_param(trial, name, value, DISTRIBUTIONS[name])
        case ("state", TrialState() as state, float(value)):
            storage.set_trial_state_values(trial, state, [value] if state == TrialState.COMPLETE else None)
        case ("epoch", int(step), float(value)):
            storage.set_trial_intermediate_value(trial, step, value)
        case ("epochs", int(step), float(value)):
            storage.add_intermediate_values([(trial, step, value), (trial, step + 1, value)])
        case ("user", str(key), value):
            storage.set_trial_user_attr(trial, key, value)
        case ("system", str(key), value):
            storage.set_trial_system_attr(trial, key, value)  # type: ignore[arg-type]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), OPERATION), max_size=14))
def test_what_is_known_is_what_the_database_has(operations: list[tuple[int, tuple[object, ...]]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        owned, database, study = new_study(Path(name))
        owned.create_new_trial(study)
        handed_out: list[tuple[list[FrozenTrial], list[str]]] = []
        for which, operation in operations:
            ids = [trial._trial_id for trial in database.get_all_trials(study)]
            if operation[0] == "other":  # somebody else adds a trial, which is not seen before a further one is created
                database.create_new_trial(study)
                owned.create_new_trial(study)
            else:
                with suppress(*REFUSED):  # the next question reads what there is
                    apply(owned, study, ids[which % len(ids)], operation)
            known = owned.get_all_trials(study, deepcopy=False)
            assert told(known) == told(database.get_all_trials(study))
            assert told([owned.get_trial(trial._trial_id) for trial in known]) == told(known)
            handed_out.append((known, told(known)))
        assert all(told(trials) == before for trials, before in handed_out)
        for trial in owned.get_all_trials(study, deepcopy=False):
            own = owned.get_trial(trial._trial_id)
            own.params["lr"] = own.intermediate_values[0] = own.user_attrs["a"] = 0.25
        assert told(owned.get_all_trials(study)) == told(database.get_all_trials(study))


def test_what_is_known_is_not_read_again(tmp_path: Path) -> None:
    owned, _, study = new_study(tmp_path)
    trials = [owned.create_new_trial(study) for _ in range(20)]
    statements: list[str] = []
    sa.event.listen(owned.engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    for trial in trials:
        assert len(owned.get_all_trials(study)) == 20 and owned.get_trial(trial).state == TrialState.RUNNING
    assert not statements
    owned.set_trial_state_values(trials[0], TrialState.COMPLETE, [0.5])
    assert owned.get_best_trial(study).value == 0.5
    owned.forget()
    assert len(owned.get_all_trials(study)) == 20 and statements
