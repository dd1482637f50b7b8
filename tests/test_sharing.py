"""Shared epochs: how many are left to train, where to save, who goes first, and families."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltech_sweep.config import TrialConfig
from caltech_sweep.study.definition import Choices, Component, Range, Row, StudyDefinition
from caltech_sweep.study.file import load_study
from caltech_sweep.sweep.executors.base import Epoch, Event
from caltech_sweep.sweep.optuna_store import MEMORY, open_study
from caltech_sweep.sweep.sharing import branch_epochs, common_epochs, new_epochs, next_index
from caltech_sweep.testing import MemoryTracker, Script, ScriptedExecutor, run_scripted
from caltech_sweep.training.keys import checkpoint_keys
from caltech_sweep.training.schedule import learning_rates
from helpers.studies import Dying, Killed

schedules = st.builds(
    TrialConfig,
    lr=st.sampled_from([0.1, 0.01]),
    step_size=st.integers(1, 6),
    gamma=st.sampled_from([0.1, 0.5, 1.0]),
    epochs=st.integers(1, 8),
    freeze=st.sampled_from(["none", "conv"]),
)


def rows_of(name: str) -> list[TrialConfig]:
    study = load_study(name)
    return [study.row_config(row) for row in study.rows]


@pytest.mark.parametrize(
    ("name", "asked", "trained"),
    [("transfer", 130, 76), ("scratch", 150, 130), ("freeze", 60, 60), ("augment", 120, 120), ("resnet", 20, 20)],
)
def test_the_report_s_tables_share_what_they_can(name: str, asked: int, trained: int) -> None:
    configs = rows_of(name)
    assert sum(config.epochs for config in configs) == asked
    assert sum(new_epochs(configs)) == trained


def test_tencrop_trains_nothing_after_transfer_s_fourth_row() -> None:
    assert new_epochs([rows_of("transfer")[3], *rows_of("tencrop")]) == [30, 0]


def test_a_family_trains_each_edge_of_its_tree_once() -> None:
    grid = itertools.product((10, 20, 30), (0.1, 0.5), (20, 30, 40))
    family = [TrialConfig(lr=0.01, step_size=s, gamma=g, epochs=e) for s, g, e in grid]
    # The trunk of 30 epochs before step_size 30 drops; from it 2 x 10 to epoch 40. At 20: 2 x 20; at 10: 2 x 30.
    assert sum(config.epochs for config in family) == 540
    assert sum(new_epochs(family)) == 30 + 2 * 10 + 2 * 20 + 2 * 30


@given(st.lists(schedules, min_size=1, max_size=8))
def test_new_epochs_count_distinct_prefixes_and_order_does_not_matter(configs: list[TrialConfig]) -> None:
    distinct = {(config.freeze, learning_rates(config)[:k]) for config in configs for k in range(1, config.epochs + 1)}
    assert sum(new_epochs(configs)) == sum(new_epochs(configs[::-1])) == len(distinct)


@given(schedules, schedules)
def test_common_epochs_are_the_agreeing_start(one: TrialConfig, other: TrialConfig) -> None:
    common = common_epochs(one, other)
    assert common == common_epochs(other, one)
    if one.freeze != other.freeze:
        assert common == 0
    else:
        rates, others = learning_rates(one), learning_rates(other)
        assert rates[:common] == others[:common]
        assert common == min(len(rates), len(others)) or rates[common] != others[common]


def peak(call: Callable[[], object]) -> int:
    """Return the most bytes that a call has in use."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_shared_epochs_take_grows_with_the_epochs_and_not_with_their_square() -> None:
    def count(epochs: int) -> None:
        rows = [TrialConfig(epochs=epochs, schedule=name, lr=0.02) for name in ("constant", "step")]
        assert new_epochs(rows) == [epochs, epochs - 20] and common_epochs(*rows) == 20

    assert peak(lambda: count(4_000)) < 15 * peak(lambda: count(400))


def test_keys_of_many_epochs_are_made_one_after_the_other_and_hold_none_of_them() -> None:
    marks = itertools.repeat("0x1.47ae147ae147bp-7", 20_000)
    assert peak(lambda: sum(1 for _ in checkpoint_keys("base", marks))) < 50_000


def test_branch_epochs_are_where_rows_and_families_part() -> None:
    study = load_study("transfer")
    assert [sorted(branch_epochs(study, config)) for config in rows_of("transfer")] == [
        [24],
        [24],
        [10, 20],
        [10, 20],
        [10],
    ]
    again = replace(study, rows=(*study.rows, replace(study.rows[0], name="Again")))
    assert sorted(branch_epochs(again, rows_of("transfer")[0])) == [24, 30]
    family = replace(FAMILY, rows=())
    config = replace(family.config({}), lr=0.02, step_size=2, gamma=0.5, epochs=6)
    assert sorted(branch_epochs(family, config)) == [2, 4]


def test_a_trial_waits_for_its_prefix_while_there_is_other_work() -> None:
    first, second, third, fourth, fifth = rows_of("transfer")
    assert next_index([first, second, third], {}, False) == 0
    assert next_index([second, third], {first: 3}, False) == 1
    assert next_index([second], {first: 3}, True) is None
    assert next_index([second], {first: 3}, False) == 0
    assert next_index([second, third], {first: 24}, False) == 0
    assert next_index([first, third, fourth, fifth], {}, False) == 1  # 20 epochs in common before 24 with none
    assert next_index([], {}, False) is None


FAMILY = StudyDefinition(
    name="f",
    title="A family",
    trials=9,
    dataset={"name": "shapes"},
    fixed={"arch": "resnet18"},
    space={"lr": Range(1e-3, 1.0, log=True), "freeze": Choices(("none", "conv"))},
    rows=(Row("One", {"lr": 0.1, "step_size": 2, "gamma": 0.5, "epochs": 4}),),
    sampler=Component("tpe", {"seed": 3}),
    expand={"step_size": (2, 4), "epochs": (4, 6)},
)


class Saving(ScriptedExecutor):
    """Its disk is so slow that no state is kept before its trial ends."""

    def poll(self, timeout: float) -> list[Event]:
        events = super().poll(timeout)
        return [replace(event, saving=event.epoch) if isinstance(event, Epoch) else event for event in events]


@pytest.mark.parametrize(("executor", "before"), [(ScriptedExecutor, 1), (Saving, 4)])
def test_a_sibling_waits_for_the_state_that_it_goes_on_from(executor: type[ScriptedExecutor], before: int) -> None:
    rows = [Row(str(step), {"lr": 0.1, "freeze": "none", "step_size": step, "epochs": 6}) for step in (2, 4)]
    space = {"lr": Range(1e-3, 1.0, log=True), "step_size": Choices((1, 2)), "epochs": Choices((1,))}
    study = replace(FAMILY, rows=tuple(rows), space=space, expand={}, trials=8)
    ran = executor(slots=2)
    run_scripted(study, ran, MemoryTracker(), open_study(study, MEMORY, study.identity()))
    order = [job.config.step_size for job in ran.jobs if job.config.epochs == 6]
    assert order == [2, 4]
    second = next(place for place, job in enumerate(ran.jobs) if (job.config.epochs, job.config.step_size) == (6, 4))
    assert second == 1 + before  # sampled trials of one epoch run until the first row has what the second needs


def test_every_sampled_setting_becomes_a_family_of_real_trials() -> None:
    tracker, executor = MemoryTracker(), ScriptedExecutor()
    study = open_study(FAMILY, MEMORY, FAMILY.identity())
    assert run_scripted(FAMILY, executor, tracker, study).outcomes == {"complete": 9}
    families: dict[tuple[float, str], set[tuple[int, int]]] = {}
    for job in executor.jobs[1:]:
        families.setdefault((job.config.lr, job.config.freeze), set()).add((job.config.step_size, job.config.epochs))
    assert len(families) == 2
    assert all(family == {(2, 4), (2, 6), (4, 4), (4, 6)} for family in families.values())
    assert all(set(trial.params) == {"lr", "freeze", "step_size", "epochs"} for trial in study.trials[1:])
    assert len(tracker.runs) == 9


def test_an_interrupted_family_is_completed() -> None:
    study = open_study(FAMILY, MEMORY, FAMILY.identity())
    tracker, executor = MemoryTracker(), ScriptedExecutor(Script())

    with pytest.raises(Killed):
        run_scripted(FAMILY, Dying(), tracker, study)
    assert run_scripted(FAMILY, executor, tracker, study).complete
    assert len(study.trials) == 9 and len(tracker.runs) == 9
    assert len({(t.params["lr"], t.params["step_size"], t.params["epochs"]) for t in study.trials[1:]}) == 8


def test_expand_is_checked_in_the_file(tmp_path) -> None:
    from caltech_sweep.errors import StudyFileError

    (tmp_path / "x.yaml").write_text(
        "title: x\ntrials: 5\nspace: {lr: {low: 0.1, high: 1}}\nexpand: {step_size: [2, 4], epochs: [1, 2]}\n"
        "rows: [{name: a}, {name: b}]\n"
    )
    with pytest.raises(StudyFileError, match="gives 4 trials, so it needs 2 rows and a multiple of 4"):
        load_study("x", folder=tmp_path)
    (tmp_path / "x.yaml").write_text(
        "title: x\ntrials: 4\nspace: {lr: {choices: [1]}}\nexpand: {lr: [1], gamma: [2]}\n"
    )
    with pytest.raises(StudyFileError) as caught:
        load_study("x", folder=tmp_path)
    assert len(caught.value.problems) == 2
