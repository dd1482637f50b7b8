"""A search over a function instead of trainings, with each sampler and pruner."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optuna

from caltech_sweep.config import TrialConfig
from caltech_sweep.study.definition import Choices, Component, Range, Row, StudyDefinition
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
