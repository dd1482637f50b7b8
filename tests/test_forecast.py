"""What ``plan`` says of a search, held against what runs then do."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from caltech_sweep.config import TrialConfig
from caltech_sweep.study.components import pruning_start, startup_trials
from caltech_sweep.study.definition import Choices, Component, Range, Row, StudyDefinition
from caltech_sweep.study.file import load_study
from caltech_sweep.sweep.forecast import expected_epochs, first_proposal, outlook
from caltech_sweep.sweep.optuna_store import MEMORY, open_study
from caltech_sweep.testing import MemoryTracker, Script, ScriptedExecutor, run_scripted
from caltech_sweep.tracking.records import TrialRecord
from helpers.places import Cli

INSIDE = Row("Inside", {"lr": 0.1, "momentum": 0.5})
OUTSIDE = Row("Outside", {"lr": 7.0, "momentum": 0.5})
DEFINITION = StudyDefinition(
    name="s",
    title="A study",
    trials=14,
    dataset={"name": "shapes"},
    fixed={"epochs": 2},
    space={"lr": Range(1e-3, 1.0, log=True), "momentum": Range(0.0, 0.9)},
    rows=(INSIDE,),
)


def sampled(definition: StudyDefinition) -> list[dict]:
    """Return the settings of all trials of a study, by number."""
    study = open_study(definition, MEMORY, definition.identity())

    def script(config: TrialConfig) -> Script:
        return Script([0.1, max(0.0, 0.9 - abs(config.lr - 0.1) - abs(config.momentum - 0.3))])

    run_scripted(definition, ScriptedExecutor(script), MemoryTracker(), study)
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize(
    "changes, number",
    [
        ({"sampler": Component("tpe", {"seed": 1})}, 10),
        ({"sampler": Component("tpe", {"seed": 1, "startup_trials": 4})}, 4),
        ({"sampler": Component("tpe", {"seed": 1, "n_startup_trials": 4}), "rows": (INSIDE, OUTSIDE)}, 5),
        ({"sampler": Component("tpe", {"seed": 1, "startup_trials": 4}), "rows": ()}, 4),
        ({"sampler": Component("tpe", {"seed": 1, "startup_trials": 4}), "replicates": 3}, 4),
        ({"sampler": Component("tpe", {"seed": 1, "startup_trials": 1}), "rows": (INSIDE, OUTSIDE)}, 2),
        ({"sampler": Component("cmaes", {"seed": 1, "startup_trials": 3})}, 3),
        ({"sampler": Component("nsgaii", {"seed": 1, "population_size": 5, "mutation_prob": 0.0})}, 6),
    ],
)
def test_the_model_proposes_from_the_trial_on_that_the_plan_names(changes: dict, number: int) -> None:
    definition = replace(DEFINITION, **changes)
    assert first_proposal(definition) == number
    proposed = sampled(definition)
    at_random = sampled(replace(definition, sampler=Component("random", {"seed": 1})))
    same = [one == other for one, other in zip(proposed, at_random, strict=True)]
    assert all(same[:number]) and not any(same[number:])


def test_a_family_is_proposed_as_a_whole() -> None:
    definition = replace(DEFINITION, trials=13, expand={"step_size": (1, 2, 3)}, sampler=Component("tpe", {"seed": 1}))
    assert first_proposal(definition) == 10
    later = replace(definition, sampler=Component("tpe", {"seed": 1, "startup_trials": 6}))
    assert first_proposal(later) == 7  # one row, and families of trials 1 to 3 and 4 to 6


@pytest.mark.parametrize("name", ["random", "grid", "brute_force"])
def test_samplers_without_a_model_have_no_first_proposal(name: str) -> None:
    assert (
        startup_trials(Component(name)) is None and first_proposal(replace(DEFINITION, sampler=Component(name))) is None
    )


@pytest.mark.parametrize(
    "arguments",
    [{}, {"warmup_epochs": 3}, {"n_warmup_steps": 3}, {"startup_trials": 2, "warmup_epochs": 1}],
)
@pytest.mark.parametrize("name", ["median", "percentile"])
def test_a_pruner_ends_trials_from_the_epoch_on_that_the_plan_names(name: str, arguments: dict) -> None:
    own = {**arguments, **({"percentile": 50.0} if name == "percentile" else {})}
    pruner = Component(name, own)
    start = pruning_start(pruner)
    assert start is not None
    definition = replace(
        DEFINITION, fixed={"epochs": 6}, rows=(), pruner=pruner, sampler=Component("random", {"seed": 0})
    )
    good, study = iter([True] * start[1] + [False] * 20), open_study(definition, MEMORY, definition.identity())
    executor = ScriptedExecutor(lambda config: Script([0.9] * 6 if next(good) else [0.1] * 6))
    run_scripted(definition, executor, MemoryTracker(), study)
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE] * start[1] + [TrialState.PRUNED] * (14 - start[1])
    assert {len(trial.intermediate_values) for trial in study.trials[start[1] :]} == {start[0]}


def test_the_epochs_that_halving_is_expected_to_train_are_those_of_optunas_pruner_at_its_rate() -> None:
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=3, reduction_factor=3)
    sampler, trained = optuna.samplers.RandomSampler(0), 0
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    for _ in range(243):
        trial = study.ask()
        quality = trial.suggest_float("quality", 0, 1)
        for epoch in range(1, 31):
            trained += 1
            trial.report(quality, epoch)
            if trial.should_prune():
                break
        study.tell(trial, quality)
    expected = expected_epochs(Component("halving", {"min_resource": 3, "reduction_factor": 3}), 30)
    assert expected == pytest.approx(3 + 6 / 3 + 18 / 9 + 3 / 27)
    assert trained / 243 == pytest.approx(expected, rel=0.1)
    assert expected_epochs(Component("asha", {"min_epochs": 3, "factor": 3}), 30) == pytest.approx(expected)
    assert expected_epochs(Component("asha", {"min_epochs": 30, "factor": 3}), 30) == 30
    assert expected_epochs(Component("median"), 30) is None


def record(epochs: float, seconds: float, row: str | None = None) -> TrialRecord:
    metrics = {"spent/epochs": epochs, "spent/seconds": seconds, "epoch_seconds": 36.0}
    tags = {"outcome": "complete", "trial_number": "0", **({} if row is None else {"row": row})}
    return TrialRecord("r", "s", "n", "FINISHED", {}, metrics, tags)


@pytest.mark.parametrize(
    "budget, records, rows_left, sentence",
    [
        ({"epochs": 100}, [], 2, "budget: 100 epochs, 0 spent; that is enough for all trials"),
        (
            {"epochs": 1},
            [],
            2,
            "budget: 1 epochs, 0 spent; that is not enough for the rows, which have 2 epochs to train",
        ),
        (
            {"epochs": 9},
            [],
            2,
            "budget: 9 epochs, 0 spent; that is enough for the rows and at least 3 of 13 sampled trials",
        ),
        (
            {"epochs": 20},
            [record(2, 72, "Inside"), record(5, 180)],
            0,
            "budget: 20 epochs, 7 spent; that is enough for the rows and at least 6 of 12 sampled trials",
        ),
        (
            {"hours": 2},
            [],
            2,
            "budget: 2 hours, 0.00 spent; how far they go is unknown until one epoch of this study has",
        ),
        (
            {"hours": 0.2},
            [record(5, 360.0)],
            2,
            "budget: 0.2 hours, 0.10 spent; the rest is about 10 epochs on one worker; that is enough for the rows and "
            "at least 4 of 12 sampled trials",
        ),
    ],
)
def test_a_plan_says_what_the_budget_is_enough_for(
    budget: dict, records: list[TrialRecord], rows_left: int, sentence: str
) -> None:
    (line,) = [line for line in outlook(replace(DEFINITION, budget=budget), records, rows_left) if "budget" in line]
    assert line.startswith(sentence)


def test_a_plan_says_who_proposes_what_is_saved_and_when_trials_end(cli: Cli, place: Path) -> None:
    text = (place / "sweeps" / "tiny.yaml").read_text(encoding="utf-8")
    text = text.replace("trials: 3", "trials: 12").replace("{name: random, seed: 0}", "{name: tpe, startup_trials: 5}")
    text += (
        "pruner: {name: median, startup_trials: 4, warmup_epochs: 1}\nearly_stopping: {patience: 2, min_delta: 0.01}\n"
    )
    (place / "sweeps" / "tiny.yaml").write_text(text.replace("epochs: 2", "epochs: 10"), encoding="utf-8")
    lines = cli("plan", "tiny", "--budget", "epochs=50").output.splitlines()
    assert "sampler: tpe proposes from its model from trial-005 on, after 2 rows and 3 sampled at random" in lines
    assert (
        "pruner: median stops sampled trials from epoch 2 on, once 4 trials are complete: it saves at most 64 of 100 "
        "epochs" in lines
    )
    assert (
        "early stopping: a sampled trial ends after 2 epochs without a validation accuracy that is better by more than "
        "0.01" in lines
    )
    assert "budget: 50 epochs, 0 spent; that is enough for the rows and at least 3 of 10 sampled trials" in lines
    assert "sampled: 100 epochs requested, up to 100 to train" in lines


def test_a_sampler_that_never_gets_to_its_model_is_said() -> None:
    assert "no trial is proposed by the model of tpe" in outlook(replace(DEFINITION, trials=9), [], 2)[0]
    choices = {"lr": Choices((0.1, 0.2)), "momentum": Choices((0.0, 0.5, 0.9))}
    grid = replace(DEFINITION, space=choices, sampler=Component("grid"))
    assert outlook(grid, [], 2) == ["sampler: grid tries each of 6 combinations once"]


SHIPPED = sorted(Path(__file__).parent.parent.glob("sweeps/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_each_shipped_study_says_what_its_startup_trials_and_its_pruner_do(path: Path) -> None:
    definition, text = load_study(str(path)), path.read_text(encoding="utf-8")
    sampled = definition.trials - len(definition.rows)
    rows = len(definition.rows) * definition.replicates
    total = rows + sampled
    if not sampled:
        assert "nothing is sampled or pruned" in text
        return
    first = first_proposal(definition)
    assert first is not None and rows <= first < total
    said = re.search(r"# (\d+) rows? and (\d+) settings at random before TPE's model proposes the other (\d+)", text)
    if first > rows:
        assert said and tuple(map(int, said.groups())) == (rows, first - rows, total - first)
    if definition.pruner is None:
        assert "# No pruner:" in text
        return
    start = pruning_start(definition.pruner)
    assert start is not None and start[1] < definition.trials and start[0] < 30
    held = max(0, start[1] - rows)
    others = f" and the first {'' if held == 1 else f'{held} '}sampled trial{'s' * (held > 1)}" if held else ""
    row = f"the {rows} rows" if rows > 1 else "the row"
    if path.stem != "demo":
        assert f"# Sampled trials are held against {row}{others}." in text and f"before epoch {start[0]}," in text
