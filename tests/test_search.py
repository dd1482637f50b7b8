"""The search against Optuna's own ask-and-tell loop: every sampler and pruner, stopped and gone on with."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import UsageError
from caltech_sweep.study.definition import Component, Row, StudyDefinition
from caltech_sweep.sweep.optuna_store import MEMORY, open_study
from caltech_sweep.testing import MemoryTracker, Script, ScriptedExecutor, run_scripted, scripted_coordinator
from helpers.marks import slow_but
from helpers.places import Cli
from helpers.searches import (
    COMBINATIONS,
    ENOUGH,
    EPOCHS,
    GRID,
    PRUNERS,
    SEARCH,
    STOCK,
    curve,
    run,
    searched,
    settings_of,
    stock,
)

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def outcome(definition: StudyDefinition, uri: str) -> list[tuple[TrialConfig, str, int]]:
    trials = open_study(definition, uri, definition.identity()).trials
    return [(TrialConfig.from_dict(t.user_attrs["config"]), t.state.name, t.last_step or EPOCHS) for t in trials]


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'optuna.db'}"


@pytest.mark.parametrize(
    ("name", "workers"),
    slow_but([("tpe", 4), *((name, 1) for name in STOCK)], [(name, workers) for name in STOCK for workers in (1, 4)]),
)
def test_every_sampler_suggests_what_it_suggests_in_optuna_s_own_loop(name: str, workers: int, uri: str) -> None:
    definition = searched(name, trials=ENOUGH.get(name, 24))
    run(definition, uri, MemoryTracker(), workers)
    assert outcome(definition, uri) == stock(name, None, definition.trials, workers)


@pytest.mark.parametrize("name", slow_but(["median", "hyperband"], PRUNERS))
def test_every_pruner_prunes_what_it_prunes_in_optuna_s_own_loop(name: str, uri: str) -> None:
    definition = searched("tpe", name)
    run(definition, uri, MemoryTracker())
    mine = outcome(definition, uri)
    assert mine == stock("tpe", name)
    assert {state for _, state, _ in mine} == {"COMPLETE", "PRUNED"}


@pytest.mark.parametrize(
    "parts", [(2, 3, 12, 18), pytest.param(range(2, 19), marks=pytest.mark.slow)], ids=["some", "each trial"]
)
@pytest.mark.parametrize(
    ("name", "pruner"),
    slow_but(
        [("tpe", None), ("random", None), ("tpe", "median")],
        [*((name, None) for name in STOCK), *(("tpe", name) for name in PRUNERS)],
    ),
)
def test_a_study_that_is_opened_anew_again_and_again_samples_what_one_run_does(
    name: str, pruner: str | None, parts: Sequence[int], uri: str
) -> None:
    definition, tracker, done = searched(name, pruner, ENOUGH.get(name, 18)), MemoryTracker(), 0
    for total in (part for part in parts if part <= definition.trials):
        executor = run(replace(definition, trials=total), uri, tracker)
        assert [job.number for job in executor.jobs] == list(range(done, total))
        done = total
    assert outcome(definition, uri) == stock(name, pruner, definition.trials)


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_four_workers_stopped_again_and_again_run_each_trial_once(name: str, uri: str, tmp_path: Path) -> None:
    definition, tracker = searched(name, trials=ENOUGH.get(name, 20)), MemoryTracker()
    stops = 0
    while True:
        executor = ScriptedExecutor(lambda config: Script(curve(config)), slots=4)
        study = open_study(definition, uri, definition.identity())
        coordinator = scripted_coordinator(definition, executor, tracker, tmp_path, study)
        with stopping_after(executor, coordinator, polls=EPOCHS + 3):
            if coordinator.run().complete:
                break
        stops += 1
    trials = study.trials
    assert stops >= 2 and [t.state for t in trials] == [TrialState.COMPLETE] * definition.trials
    assert len({t.user_attrs["fingerprint"] for t in trials}) == len(tracker.runs) == definition.trials
    assert all([epoch for epoch, _, _ in r.history] == list(range(1, EPOCHS + 1)) for r in tracker.runs.values())


@contextmanager
def stopping_after(executor: ScriptedExecutor, coordinator: Any, polls: int) -> Iterator[None]:
    original, count = executor.poll, itertools.count(1)

    def poll(timeout: float) -> list:
        if next(count) >= polls:
            coordinator.request_stop()
        return original(timeout)

    executor.poll = poll  # type: ignore[method-assign]
    yield


IN_A_NEW_PROCESS = """
import json, sys
sys.path.insert(0, {tests!r})
from helpers.searches import MemoryTracker, run, searched
definition = searched({name!r}, trials={trials})
print(json.dumps([job.config.lr for job in run(definition, {uri!r}, MemoryTracker()).jobs]))
"""


def rates_in_a_new_process(name: str, uri: str, trials: int) -> list[float]:
    code = IN_A_NEW_PROCESS.format(tests=str(Path(__file__).parent), name=name, uri=uri, trials=trials)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rates: list[float] = json.loads(result.stdout)
    return rates


def test_with_the_defaults_tpe_proposes_from_its_model_once_ten_trials_have_ended(tmp_path: Path) -> None:
    tpe = [rate for total in (14, 30) for rate in rates_in_a_new_process("tpe", f"sqlite:///{tmp_path}/tpe.db", total)]
    random = rates_in_a_new_process("random", f"sqlite:///{tmp_path}/random.db", 30)
    assert tpe[:10] == random[:10]
    assert all(one != other for one, other in zip(tpe[10:], random[10:], strict=True))
    assert tpe == [config.lr for config, _, _ in stock("tpe", trials=30)]


@pytest.mark.slow
def test_a_row_outside_the_space_does_not_blind_the_sampler(uri: str) -> None:
    outside = (Row("Far", {"lr": 5.0, "momentum": 0.9, "batch_size": 32, "freeze": "none"}),)
    definition = replace(searched("gp", trials=30), rows=outside)
    rates = [job.config.lr for job in run(definition, uri, MemoryTracker()).jobs]
    assert rates[0] == 5.0
    late = [abs(math.log10(rate) + 1.5) for rate in rates[-10:]]  # decades from the best one
    assert sorted(late)[5] < 0.5  # a blind sampler is 1.0 away in the median


@pytest.mark.parametrize("slots", slow_but([1], [1, 4]))
@pytest.mark.parametrize("name", ["grid", "brute_force"])
def test_an_exhaustive_sampler_tries_each_combination_once_and_says_that_it_ends(
    name: str, slots: int, uri: str, tmp_path: Path
) -> None:
    definition, tracker, said = replace(GRID, sampler=Component(name, {"seed": 1})), MemoryTracker(), []
    jobs = []
    for total in (10, 60, 60):
        part = replace(definition, trials=total)
        executor, study = ScriptedExecutor(slots=slots), open_study(part, uri, part.identity())
        coordinator = scripted_coordinator(part, executor, tracker, tmp_path, study, write=said.append)
        assert coordinator.run().complete
        jobs += executor.jobs
    sampled = [settings_of(job) for job in jobs if job.number > 0]
    if name == "brute_force":  # as in Optuna, a row's combination is not tried again
        sampled.append(settings_of(jobs[0]))
    assert len(sampled) == len(COMBINATIONS) and set(sampled) == COMBINATIONS
    assert said.count("the study ends here: all 36 combinations of its space were tried once") == 2


@pytest.mark.parametrize("name", slow_but(["grid"], ["grid", "brute_force"]))
def test_a_combination_that_failed_is_tried_again_by_the_next_run(name: str, uri: str) -> None:
    definition, tracker = replace(GRID, sampler=Component(name, {"seed": 1}), rows=()), MemoryTracker()

    def failing(config: TrialConfig) -> Script:
        return Script([0.5], failure="crashed" if config.lr == 0.2 and config.batch_size == 9 else None)

    run(definition, uri, tracker, script=failing)
    again = run(definition, uri, tracker)
    assert {settings_of(job) for job in again.jobs} == {c for c in COMBINATIONS if c[:2] == (0.2, 9)}
    assert run(definition, uri, tracker).jobs == []


EXHAUSTIVE_STUDY = """\
title: A grid
dataset: {name: shapes}
trials: 9
sampler: {name: NAME}
space:
  lr: {low: 0.1, high: 0.2}
expand:
  gamma: [0.1, 0.5]
rows:
  - name: Row
    set: {lr: 0.1}
"""


def test_an_endless_space_and_a_row_outside_are_refused_with_their_lines(cli: Cli) -> None:
    path = Path("sweeps/all.yaml")
    path.write_text(EXHAUSTIVE_STUDY.replace("NAME", "grid"))
    result = cli("run", "all")
    assert result.exit_code == 2 and not Path("mlruns").exists()
    assert (
        "all.yaml:6: space.lr: has no end of values, and sampler grid tries all of them; give it a step"
        in result.output
    )
    assert (
        "all.yaml:7: expand: sampler grid tries every combination anyway; move these settings to space" in result.output
    )
    path.write_text(
        "dataset: {name: shapes}\ntrials: 3\nsampler: {name: brute_force}\nspace: {lr: {choices: [0.1, 0.2]}}\n"
        "rows:\n  - {name: Far, set: {lr: 5}}\n"
    )
    result = cli("run", "all")
    assert "all.yaml:6: rows[0]: 'Far' lies outside the space (lr); sampler grid allows that" in result.output


@pytest.mark.parametrize(("name", "package"), [("cmaes", "cmaes"), ("gp", "scipy"), ("qmc", "scipy")])
def test_a_sampler_without_its_package_is_refused_with_the_command_that_installs_it(
    name: str, package: str, place: Path
) -> None:
    study = place / "sweeps" / "tiny.yaml"
    study.write_text(study.read_text().replace("name: random", f"name: {name}"))
    code = f"import sys; sys.modules[{package!r}] = None; from caltech_sweep.cli import main; main(['run', 'tiny'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"sampler {name} needs the package {package}, which is not installed: " in result.stderr
    assert "pip install 'caltech-sweep[samplers]'" in result.stderr
    assert not (place / "mlruns").exists()


def test_a_sampler_that_cannot_suggest_ends_the_study_with_a_sentence(uri: str) -> None:
    definition = replace(SEARCH, sampler=Component("tpe", {"seed": 0, "n_ei_candidates": -3, "startup_trials": 2}))
    with pytest.raises(UsageError, match=r"^sampler tpe cannot suggest settings for this study: "):
        run(definition, uri, MemoryTracker())


def test_a_study_in_memory_learns_too() -> None:
    definition = searched("tpe")
    executor = ScriptedExecutor(lambda config: Script(curve(config)))
    run_scripted(definition, executor, MemoryTracker(), open_study(definition, MEMORY, definition.identity()))
    assert [job.config for job in executor.jobs] == [config for config, _, _ in stock("tpe")]
