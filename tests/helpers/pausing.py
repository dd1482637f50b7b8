"""Searches that pause and promote, over curves that are made from a trial's settings."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from optuna.trial import FrozenTrial

from caltech_sweep.config import TrialConfig
from caltech_sweep.study.definition import Component, StudyDefinition
from caltech_sweep.sweep.executors.base import Epoch, Event
from caltech_sweep.sweep.optuna_store import MEMORY, open_study
from caltech_sweep.testing import MemoryTracker, Script, ScriptedExecutor, run_scripted
from helpers.searches import ENOUGH, searched

ASHA = Component("asha", {"min_epochs": 1, "factor": 2})
Step = tuple[int, int]  # a trial's number and an epoch that it trained


def asha(trials: int = 14, epochs: int = 9, name: str = "random", pruner: Component = ASHA) -> StudyDefinition:
    return replace(searched(name, trials=trials), fixed={"epochs": epochs}, pruner=pruner)


def noisy(levels: int) -> Callable[[TrialConfig], list[float]]:
    """Return curves that cross each other and have equals, made from the settings of a trial."""

    def curve(config: TrialConfig) -> list[float]:
        chance = random.Random(repr((config.lr, config.momentum, config.batch_size, config.freeze, config.gamma)))
        return [chance.randrange(levels) / levels for _ in range(config.epochs)]

    return curve


class Watched(ScriptedExecutor):
    """Notes every epoch that is trained, not reused, in the order of time, and stops its coordinator if asked to."""

    def __init__(
        self, curve: Callable[[TrialConfig], list[float]], slots: int = 1, stop_after: float = math.inf
    ) -> None:
        super().__init__(lambda config: Script(curve(config)), slots)
        self.steps: list[Step] = []
        self.stop_after, self.stop = stop_after, lambda: None

    def poll(self, timeout: float) -> list[Event]:
        events = super().poll(timeout)
        self.steps += [(event.job, event.epoch) for event in events if isinstance(event, Epoch) and not event.reused]
        self.stop_after -= 1
        if self.stop_after == 0:
            self.stop()
        return events


def search(
    definition: StudyDefinition,
    curve: Callable[[TrialConfig], list[float]],
    uri: str = MEMORY,
    tracker: MemoryTracker | None = None,
    **options: Any,
) -> tuple[list[Step], list[FrozenTrial]]:
    """Run a study to its end; return its steps and its trials."""
    executor, study = Watched(curve, **options), open_study(definition, uri, definition.identity())
    assert run_scripted(definition, executor, tracker or MemoryTracker(), study).complete
    return executor.steps, study.trials


FAMILIES = replace(asha(14, name="tpe"), expand={"gamma": (0.1, 0.5)})
STOPPED = {
    "tpe": asha(16, name="tpe"),
    "gp": asha(ENOUGH["gp"], name="gp"),
    "brackets": asha(16, name="tpe", pruner=Component("hyperband", {"min_epochs": 1, "factor": 2})),
    "families": FAMILIES,
}
