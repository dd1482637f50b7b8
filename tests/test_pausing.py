"""Pausing and promoting: the decisions against the paper's pseudo code, what samplers see, stops, stores, states."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from caltech_sweep.config import TrialConfig
from caltech_sweep.study.components import component_problems
from caltech_sweep.study.definition import Component
from caltech_sweep.study.pausing import Pausing, make_pausing
from caltech_sweep.sweep.executors.base import Done, Event, Job
from caltech_sweep.sweep.optuna_store import MEMORY, open_study
from caltech_sweep.sweep.optuna_trials import is_paused, seen_trials
from caltech_sweep.sweep.queue import sampler_for
from caltech_sweep.testing import MemoryTracker, run_scripted, scripted_coordinator
from caltech_sweep.tracking.journal import Journal, JournalingTracker
from helpers.pausing import ASHA, STOPPED, Step, Watched, asha, noisy, search
from helpers.searches import COMBINATIONS, ENOUGH, GRID, ROWS, STOCK, settings_of, stock
from helpers.studies import Killed, Unreliable, told

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def first_times(steps: list[Step]) -> list[Step]:
    return list(dict.fromkeys(steps))


def config_of(trial: FrozenTrial) -> TrialConfig:
    return TrialConfig.from_dict(trial.user_attrs["config"])


# -- the paper's pseudo code -------------------------------------------------------------------------------------------


def reference_steps(curves: list[list[float]], rows: int, r: int, eta: int) -> list[Step]:
    """ASHA with one worker, after algorithm 2 of Li et al., MLSys 2020; rows run to their ends before everything."""
    R = len(curves[0])
    K = next(k for k in range(99) if r * eta**k >= R)  # the rungs 0 to K - 1 lie before the end
    reached: list[list[int]] = [[] for _ in range(K)]  # trials with a result, by rung
    promoted: list[set[int]] = [set() for _ in range(K)]
    steps, asked = [], rows
    for row in range(rows):
        steps += [(row, epoch) for epoch in range(1, R + 1)]
        for k in range(K):
            reached[k].append(row)
            promoted[k].add(row)

    def get_job() -> tuple[int, int] | None:
        nonlocal asked
        for k in reversed(range(K)):
            ranked = sorted(reached[k], key=lambda t: (-curves[t][r * eta**k - 1], t))
            promotable = [t for t in ranked[: len(reached[k]) // eta] if t not in promoted[k]]
            if promotable:
                promoted[k].add(promotable[0])
                return promotable[0], k + 1
        if asked == len(curves):
            return None
        asked += 1
        return asked - 1, 0

    while (job := get_job()) is not None:
        trial, k = job
        start, end = (r * eta ** (k - 1) if k else 0), (r * eta**k if k < K else R)
        steps += [(trial, epoch) for epoch in range(start + 1, end + 1)]
        if k < K:
            reached[k].append(trial)
    return steps


@settings(deadline=None)
@given(
    st.integers(3, 30), st.integers(1, 30), st.integers(1, 5), st.integers(2, 4), st.integers(1, 6), st.integers(0, 2)
)
def test_trials_pause_and_are_promoted_as_in_the_paper_s_pseudo_code(
    trials: int, epochs: int, least: int, factor: int, levels: int, rows: int
) -> None:
    pruner = Component("asha", {"min_epochs": least, "factor": factor})
    definition = replace(asha(trials, epochs, pruner=pruner), rows=ROWS[:rows])
    steps, found = search(definition, noisy(levels))
    curves = [noisy(levels)(config_of(trial)) for trial in found]
    assert first_times(steps) == steps == reference_steps(curves, rows, least, factor)
    for trial in found:
        last = max(epoch for number, epoch in steps if number == trial.number)
        assert is_paused(trial) == (last < epochs) and (trial.state == TrialState.COMPLETE) == (last == epochs)


class WithLoss(Watched):
    """Says the best loss at the end, too; it is scripted to be 1 - accuracy."""

    def poll(self, timeout: float) -> list[Event]:
        return [
            replace(event, metrics={**event.metrics, "best/val_loss": 1 - event.metrics["best/val_accuracy"]})
            if isinstance(event, Done)
            else event
            for event in super().poll(timeout)
        ]


def test_where_less_is_better_the_lowest_go_on() -> None:
    definition = replace(asha(20), fixed={"epochs": 9, "objective": "val/loss"})
    executor, study = WithLoss(noisy(60)), open_study(definition, MEMORY, definition.identity())
    assert run_scripted(definition, executor, MemoryTracker(), study).complete
    curves = [noisy(60)(config_of(trial)) for trial in study.trials]
    assert executor.steps == reference_steps(curves, len(ROWS), 1, 2)


def test_hyperband_runs_asha_in_each_of_its_brackets() -> None:
    """Each bracket starts at a higher rung, has Hyperband's share of the trials, and compares its own trials only."""
    pruner = Component("hyperband", {"min_epochs": 1, "factor": 3})
    definition = replace(asha(36, 9, pruner=pruner), rows=())
    pausing = make_pausing(pruner)
    assert pausing is not None and [pausing.bracket(n, 9) for n in range(17)].count(0) == 9
    assert [[pausing.bracket(n, 9) for n in range(17)].count(b) for b in (1, 2)] == [5, 3]
    assert {pausing.rungs(n, 9) for n in range(17)} == {(1, 3), (3,), ()}
    steps, found = search(definition, noisy(50))
    curves = [noisy(50)(config_of(trial)) for trial in found]
    for bracket, least in ((0, 1), (1, 3)):
        members = [n for n in range(36) if pausing.bracket(n, 9) == bracket]
        trained = {n: max(epoch for number, epoch in steps if number == n) for n in members}
        for rung in pausing.rungs(members[0], 9):
            reached = [n for n in members if trained[n] >= rung]
            best = sorted(reached, key=lambda n: (-curves[n][rung - 1], n))[: len(reached) // 3]
            assert all(trained[n] > rung for n in best), (bracket, rung)
        assert min(trained.values()) == least
    assert all((n, 9) in steps for n in range(36) if pausing.bracket(n, 9) == 2)


# -- samplers ----------------------------------------------------------------------------------------------------------


class Photographing(Watched):
    """Keeps the trials of the study as they are when a new one starts, which is when its sampler saw them."""

    def __init__(self, study: optuna.Study) -> None:
        super().__init__(noisy(60))
        self.study = study
        self.photographs: dict[int, list[FrozenTrial]] = {}

    def submit(self, job: Job) -> None:
        self.photographs.setdefault(job.number, self.study.get_trials(deepcopy=True)[: job.number])
        super().submit(job)


@pytest.mark.parametrize("name", ["random", "qmc"])
def test_a_sampler_that_does_not_learn_suggests_what_it_does_without_pausing(name: str) -> None:
    _, trials = search(asha(name=name, epochs=6), noisy(60))
    assert [config_of(trial) for trial in trials] == [config for config, _, _ in stock(name, trials=14)]


@pytest.mark.parametrize("name", sorted(STOCK.keys() - {"random", "qmc"}))
def test_every_sampler_that_learns_does_so_from_paused_trials_as_from_pruned_ones(name: str) -> None:
    """Optuna's own sampler is asked with the same trials, the paused ones as ``Study.tell`` leaves pruned ones."""
    definition = asha(ENOUGH.get(name, 24), name=name)
    study = open_study(definition, MEMORY, definition.identity())
    executor = Photographing(study)
    run_scripted(definition, executor, MemoryTracker(), study)
    paused = 0
    for number in range(len(ROWS), definition.trials):
        other = optuna.create_study(direction="maximize", study_name="s", sampler=STOCK[name](number))
        for seen in executor.photographs[number]:
            shown = copy.deepcopy(seen)
            if is_paused(seen):
                paused += 1
                shown.state, shown.value = TrialState.PRUNED, seen.intermediate_values[seen.last_step]
                shown.datetime_complete = seen.datetime_start
            other.add_trial(shown)
        trial = other.ask()
        sampled = {key: trial._suggest(key, value) for key, value in study.trials[number].distributions.items()}
        assert sampled == study.trials[number].params
    assert paused > 20


@pytest.mark.parametrize("name", ["grid", "brute_force"])
def test_an_exhaustive_sampler_tries_no_combination_of_a_paused_trial_again(name: str) -> None:
    definition = replace(GRID, sampler=Component(name, {"seed": 1}), rows=(), pruner=ASHA, fixed={"epochs": 4})
    executor, study = Watched(noisy(20)), open_study(definition, MEMORY, definition.identity())
    assert run_scripted(definition, executor, MemoryTracker(), study).complete
    assert {settings_of(job) for job in executor.jobs} == COMBINATIONS and len(study.trials) == len(COMBINATIONS)
    assert sum(map(is_paused, study.trials)) > 10


# -- stopped and gone on with ------------------------------------------------------------------------------------------


def ends(trials: list[FrozenTrial]) -> list[tuple[Any, ...]]:
    return [(t.number, t.state, t.value, t.params, t.intermediate_values, is_paused(t)) for t in trials]


@pytest.mark.parametrize("name", ["tpe", *(pytest.param(n, marks=pytest.mark.slow) for n in STOPPED if n != "tpe")])
def test_a_study_that_is_stopped_again_and_again_decides_and_samples_as_an_undisturbed_one(
    name: str, tmp_path: Path
) -> None:
    definition = STOPPED[name]
    steps, undisturbed = search(definition, noisy(60))
    uri, tracker, parts, chance = f"sqlite:///{tmp_path}/optuna.db", MemoryTracker(), [], random.Random(1)
    while True:
        executor = Watched(noisy(60), stop_after=chance.randrange(3, 20))
        study = open_study(definition, uri, definition.identity())
        coordinator = scripted_coordinator(definition, executor, tracker, tmp_path, study)
        executor.stop = coordinator.request_stop
        summary = coordinator.run()
        parts += executor.steps
        if summary.complete:
            break
    assert first_times(parts) == steps and ends(study.trials) == ends(undisturbed)
    outcomes = [record.tags["outcome"] for record in tracker.runs.values()]
    assert outcomes == ["paused" if is_paused(t) else "complete" for t in study.trials]


def test_a_raised_total_goes_on_as_one_study_would_have(tmp_path: Path) -> None:
    steps, whole = search(asha(16, name="tpe"), noisy(60))
    uri, tracker, parts = f"sqlite:///{tmp_path}/optuna.db", MemoryTracker(), []
    for total in (4, 9, 16):
        part, trials = search(asha(total, name="tpe"), noisy(60), uri, tracker)
        parts += part
    assert first_times(parts) == steps and ends(trials) == ends(whole)


IN_A_NEW_PROCESS = """
import sys
sys.path.insert(0, {tests!r})
import pickle
from dataclasses import replace
from pathlib import Path
from caltech_sweep.testing import MemoryTracker
from helpers.pausing import STOPPED, noisy, search
tracker = Path("tracker.pickle")
memory = pickle.loads(tracker.read_bytes()) if tracker.exists() else MemoryTracker()
search(replace(STOPPED["tpe"], trials={total}), noisy(60), "sqlite:///optuna.db", memory)
tracker.write_bytes(pickle.dumps(memory))
"""


@pytest.mark.slow
def test_processes_that_follow_each_other_decide_and_sample_as_one_does(tmp_path: Path) -> None:
    for total in (7, 12, 16):
        code = IN_A_NEW_PROCESS.format(tests=str(Path(__file__).parent), total=total)
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    _, undisturbed = search(STOPPED["tpe"], noisy(60))
    trials = open_study(STOPPED["tpe"], f"sqlite:///{tmp_path}/optuna.db", STOPPED["tpe"].identity()).trials
    assert ends(trials) == ends(undisturbed)


def test_paused_trials_stay_visible_to_the_sampler_and_are_left_alone_when_the_pruner_changes(tmp_path: Path) -> None:
    uri, tracker = f"sqlite:///{tmp_path}/optuna.db", MemoryTracker()
    _, before = search(asha(8, name="tpe"), noisy(60), uri, tracker)
    assert sum(map(is_paused, before)) >= 4
    executor = Photographing(open_study(asha(8, name="tpe"), uri, asha(8, name="tpe").identity()))
    run_scripted(replace(asha(12, name="tpe"), pruner=None), executor, tracker, executor.study)
    assert [job.number for job in executor.jobs] == [8, 9, 10, 11]
    assert ends(executor.study.trials)[:8] == ends(before)
    sampler = sampler_for(replace(asha(12, name="tpe"), pruner=None), 12)
    states = [trial.state for trial in seen_trials(executor.study, sampler)]
    assert states[:8] == [TrialState.PRUNED if is_paused(trial) else TrialState.COMPLETE for trial in before]


@pytest.mark.parametrize("slots", [2, 5])
def test_several_workers_train_each_epoch_of_each_trial_once(slots: int) -> None:
    tracker = MemoryTracker()
    steps, trials = search(asha(30), noisy(60), tracker=tracker, slots=slots)
    assert len(trials) == len(tracker.runs) == 30
    for trial, run in zip(trials, tracker.runs.values(), strict=True):
        last = max(trial.intermediate_values)
        assert [epoch for number, epoch in first_times(steps) if number == trial.number] == list(range(1, last + 1))
        assert [epoch for epoch, _, _ in run.history] == list(range(1, last + 1))
        assert (last in (1, 2, 4, 8)) if is_paused(trial) else last == 9
    assert 5 < sum(map(is_paused, trials)) < 28


# -- kills and outages -------------------------------------------------------------------------------------------------

SHORT = replace(asha(8, epochs=4), rows=ROWS[:1])
STORAGE_WRITES = (
    "create_new_trial",
    "set_trial_param",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_state_values",
)
TRACKER_WRITES = ("start_trial", "resume_trial", "log_dataset", "log_epochs", "finish_trial", "finish_study")


class Doomed:
    """Counts the writes to both stores, and kills the coordinator before one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.writes = at, 0

    def doom(self, owner: Any, names: tuple[str, ...]) -> None:
        for name in names:
            setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.writes += 1
            if self.writes >= self.at:
                raise Killed
            return method(*arguments, **named)

        return call


def killed_and_run_again(at: int) -> tuple[int, list[Any], Any]:
    """Kill the coordinator before write ``at``, run the study again; return the writes so far, and both stores."""
    storage, tracker, doomed = InMemoryStorage(), MemoryTracker(), Doomed(at)
    optuna.create_study(storage=storage, study_name="s", direction="maximize", pruner=optuna.pruners.NopPruner())
    kept = dict(vars(storage)), dict(vars(tracker))
    doomed.doom(storage, STORAGE_WRITES)
    doomed.doom(tracker, TRACKER_WRITES)
    with suppress(Killed):
        study = optuna.load_study(study_name="s", storage=storage, pruner=optuna.pruners.NopPruner())
        run_scripted(SHORT, Watched(noisy(60)), tracker, study)
    for owner, names in ((storage, STORAGE_WRITES), (tracker, TRACKER_WRITES)):
        for name in names:
            delattr(owner, name)
    assert (vars(storage).keys(), vars(tracker).keys()) == (kept[0].keys(), kept[1].keys())
    study = optuna.load_study(study_name="s", storage=storage, pruner=optuna.pruners.NopPruner())
    assert run_scripted(SHORT, Watched(noisy(60)), tracker, study).complete
    attributes = [{k: v for k, v in t.user_attrs.items() if k != "config"} for t in study.trials]
    return doomed.writes, [ends(study.trials), attributes], told(tracker)


UNDISTURBED = killed_and_run_again(10**6)
WRITES = UNDISTURBED[0]
SOME = range(1, WRITES + 1, 7)


@pytest.mark.parametrize("at", [pytest.param(n, marks=() if n in SOME else pytest.mark.slow) for n in range(1, WRITES)])
def test_a_kill_between_any_two_writes_leaves_no_trace(at: int) -> None:
    assert killed_and_run_again(at)[1:] == UNDISTURBED[1:]


@pytest.mark.slow
def test_an_outage_while_trials_pause_and_go_on_ends_with_every_result_once(tmp_path: Path) -> None:
    def run(tracker: Unreliable, folder: Path) -> Any:
        journaling = JournalingTracker(tracker, Journal(folder / "journal"), lambda line: None)
        (folder / "scratch").mkdir(parents=True)
        study = open_study(SHORT, MEMORY, SHORT.identity())
        assert scripted_coordinator(SHORT, Watched(noisy(60)), journaling, folder / "scratch", study).run().complete
        for _ in range(100):
            if journaling.replay():
                break
        return told(tracker)

    steady = Unreliable()
    expected = run(steady, tmp_path / "steady")
    assert {"paused", "complete"} == {run.tags["outcome"] for run in steady.runs.values()}
    for first in range(1, steady.calls + 1, 6):
        for after in (False, True):
            assert run(Unreliable(first, 9, after), tmp_path / f"{first}-{after}") == expected, (first, after)


# -- the file and the command ------------------------------------------------------------------------------------------


def test_what_makes_no_rungs_is_refused() -> None:
    def problems(name: str, **arguments: Any) -> list[tuple[str, str]]:
        return list(component_problems("pruner", Component(name, arguments)))

    assert problems("asha") == problems("asha", min_epochs=3, factor=3) == problems("hyperband", factor=4) == []
    assert problems("hyperband", max_resource=9) == []  # Optuna's
    assert problems("asha", min_epochs=0) == [("min_epochs", "must be an integer >= 1, got 0")]
    assert problems("asha", factor=1.5) == [("factor", "must be an integer >= 2, got 1.5")]
    assert problems("asha", min_epoch=3) == [
        ("min_epoch", "is not an argument of asha with min_epochs and factor; did you mean 'min_epochs'?")
    ]
    assert problems("ashe")[0][1].startswith("there is no pruner 'ashe'")
    assert Pausing(3, 3).rungs(0, 30) == (3, 9, 27) and Pausing(3, 3).rungs(0, 27) == (3, 9)
