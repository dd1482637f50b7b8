"""A search over a function instead of trainings, with each sampler and pruner."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import TrialState

from caltech_sweep.config import TrialConfig
from caltech_sweep.seeds import derive_seed
from caltech_sweep.study.definition import Choices, Component, Range, Row, StudyDefinition, SubsetOf
from caltech_sweep.sweep.executors.base import Job
from caltech_sweep.sweep.optuna_store import open_study
from caltech_sweep.testing import MemoryTracker, Script, ScriptedExecutor, run_scripted

EPOCHS = 6
SPACE = {
    "lr": Range(1e-4, 1.0, log=True),
    "momentum": Range(0.0, 0.95),
    "batch_size": Range(8, 64, integer=True),
    "freeze": Choices(("none", "conv")),
}
ROWS = (
    Row("One", {"lr": 0.1, "momentum": 0.9, "batch_size": 32, "freeze": "none"}),
    Row("Two", {"lr": 0.001, "momentum": 0.5, "batch_size": 16, "freeze": "conv"}),
)
SEARCH = StudyDefinition("s", "A search", 24, {"name": "shapes"}, {"epochs": EPOCHS}, SPACE, ROWS)


def curve(config: TrialConfig) -> list[float]:
    """Return a validation accuracy an epoch with one best learning rate, and settings that matter more and less."""
    peak = math.exp(-((math.log10(config.lr) + 1.5) ** 2)) * (0.5 + 0.5 * config.momentum)
    peak *= (1.0 if config.freeze == "none" else 0.8) - abs(config.batch_size - 30) / 200
    return [peak * (1 - 0.5**epoch) for epoch in range(1, EPOCHS + 1)]


ARGUMENTS = {"nsgaii": {"population_size": 8}}
PRUNERS: dict[str, tuple[dict[str, Any], Callable[[], optuna.pruners.BasePruner]]] = {
    "median": ({"startup_trials": 3, "warmup_epochs": 1}, lambda: optuna.pruners.MedianPruner(3, 2)),
    "percentile": (
        {"percentile": 70, "startup_trials": 3},
        lambda: optuna.pruners.PercentilePruner(70, n_startup_trials=3),
    ),
    "halving": ({}, optuna.pruners.SuccessiveHalvingPruner),
    "hyperband": ({"max_resource": EPOCHS}, lambda: optuna.pruners.HyperbandPruner(max_resource=EPOCHS)),
    "threshold": ({"lower": 0.2}, lambda: optuna.pruners.ThresholdPruner(lower=0.2)),
}


def searched(name: str, pruner: str | None = None, trials: int = 24) -> StudyDefinition:
    sampler = Component(name, {"seed": 3, **ARGUMENTS.get(name, {})})
    return replace(
        SEARCH, trials=trials, sampler=sampler, pruner=Component(pruner, PRUNERS[pruner][0]) if pruner else None
    )


def run(
    definition: StudyDefinition, uri: str, tracker: MemoryTracker, slots: int = 1, script: Any = None
) -> ScriptedExecutor:
    """Run the coordinator on a study that is opened anew."""
    executor = ScriptedExecutor(script or (lambda config: Script(curve(config))), slots)
    run_scripted(definition, executor, tracker, open_study(definition, uri, definition.identity()))
    return executor


GRID = replace(
    SEARCH,
    space={
        "lr": Range(0.1, 0.3, step=0.1),
        "batch_size": Range(8, 10, integer=True),
        "augment": SubsetOf(("hflip", "rotation")),
    },
    rows=(Row("Row", {"lr": 0.3, "batch_size": 9, "augment": ["hflip"]}),),
    trials=60,
)
COMBINATIONS = set(
    itertools.product((0.1, 0.2, 0.3), (8, 9, 10), ((), ("hflip",), ("rotation",), ("hflip", "rotation")))
)


def seed_of(number: int) -> int:
    return derive_seed(3, "sampler", number) % 2**32


STOCK: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda number: optuna.samplers.TPESampler(seed=seed_of(number)),
    "random": lambda number: optuna.samplers.RandomSampler(seed=seed_of(number)),
    "gp": lambda number: optuna.samplers.GPSampler(seed=seed_of(number)),
    "qmc": lambda number: optuna.samplers.QMCSampler(seed=3),
    "cmaes": lambda number: optuna.samplers.CmaEsSampler(seed=seed_of(number)),
    "nsgaii": lambda number: optuna.samplers.NSGAIISampler(seed=seed_of(number), population_size=8),
}
ENOUGH = {"gp": 12}  # trials, two of them from the model: each takes it a tenth of a second


def suggest(trial: optuna.Trial) -> TrialConfig:
    return TrialConfig(
        dataset=SEARCH.config({}).dataset,
        epochs=EPOCHS,
        lr=trial.suggest_float("lr", 1e-4, 1.0, log=True),
        momentum=trial.suggest_float("momentum", 0.0, 0.95),
        batch_size=trial.suggest_int("batch_size", 8, 64),
        freeze=trial.suggest_categorical("freeze", ["none", "conv"]),
    )


def stock(
    name: str, pruner: str | None = None, trials: int = 24, workers: int = 1
) -> list[tuple[TrialConfig, str, int]]:
    """Run Optuna's own loop; return each trial's config, state and number of epochs."""
    study = optuna.create_study(direction="maximize", pruner=PRUNERS[pruner][1]() if pruner else None, study_name="s")
    for row in ROWS:
        study.enqueue_trial(dict(row.settings))
    if pruner is None:
        study.pruner = optuna.pruners.NopPruner()
    done: list[tuple[TrialConfig, str, int]] = []
    for start in range(0, trials, workers):
        asked = []
        for number in range(start, start + workers):
            study.sampler = STOCK[name](number)
            trial = study.ask()
            asked.append((trial, suggest(trial)))
        for trial, config in asked:
            values, epoch = curve(config), 0
            pruned = False
            for epoch, value in enumerate(values, 1):
                if pruner is not None:
                    trial.report(value, epoch)
                    pruned = trial.number >= len(ROWS) and epoch < EPOCHS and trial.should_prune()
                if pruned:
                    break
            study.tell(
                trial, None if pruned else max(values), state=TrialState.PRUNED if pruned else TrialState.COMPLETE
            )
            done.append((config, "PRUNED" if pruned else "COMPLETE", epoch))
    return done


def settings_of(job: Job) -> tuple[float, int, tuple[str, ...]]:
    return job.config.lr, job.config.batch_size, job.config.augment
