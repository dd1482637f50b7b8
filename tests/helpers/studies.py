"""A study for the coordinator over scripted trials, and what goes wrong around it."""

from __future__ import annotations

from typing import Any

import optuna

from caltech_sweep.errors import StoreError
from caltech_sweep.study.definition import Choices, Component, Range, Row, StudyDefinition
from caltech_sweep.sweep.optuna_store import MEMORY, open_study
from caltech_sweep.testing import MemoryTracker, ScriptedExecutor

ROWS = (Row("One", {"lr": 0.1, "step_size": 5}), Row("Two", {"lr": 9.0, "step_size": 3}))
DEFINITION = StudyDefinition(
    name="s",
    title="A study",
    trials=6,
    dataset={"name": "shapes"},
    fixed={"epochs": 4},
    space={"lr": Range(1e-3, 1.0, log=True), "step_size": Choices((3, 5))},
    rows=ROWS,
    sampler=Component("random", {"seed": 3}),
)


def new_study(definition: StudyDefinition = DEFINITION) -> optuna.Study:
    return open_study(definition, MEMORY, definition.identity())


class Killed(BaseException):
    """Ends a coordinator on the spot, as SIGKILL does."""


class Dying(ScriptedExecutor):
    """Kills its coordinator at the third job."""

    def poll(self, timeout: float) -> list:
        if len(self.jobs) == 3:
            raise Killed
        return super().poll(timeout)


def records(tracker: MemoryTracker, name: str = "s") -> list:
    study = tracker.study(name)
    assert study is not None
    return tracker.trials(study)


class Unreliable(MemoryTracker):
    """Takes no write from number ``first`` on, ``count`` times; with ``after``, it does, but the answer is lost."""

    def __init__(self, first: int = 10**9, count: int = 0, after: bool = False) -> None:
        super().__init__()
        self.first, self.count, self.after, self.calls = first, count, after, 0

    def _call(self, method: str, /, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        fails = self.first <= self.calls < self.first + self.count
        if fails and not self.after:
            raise StoreError("the server is away")
        answer = getattr(MemoryTracker, method)(self, *arguments, **named)
        if fails:
            raise StoreError("the answer was lost")
        return answer


def _unreliable(name: str) -> Any:
    return lambda self, *arguments, **named: self._call(name, *arguments, **named)


for _name in ("start_trial", "resume_trial", "log_dataset", "log_epochs", "finish_trial", "finish_study"):
    setattr(Unreliable, _name, _unreliable(_name))


def told(tracker: MemoryTracker) -> Any:
    """Return all that a tracker was told, without ids, times, and what was spent: a kill may cost an epoch."""
    return [
        (
            run.name,
            run.params,
            {k: v for k, v in run.tags.items() if k != "journal.id"},
            run.status,
            [(epoch, dict(metrics)) for epoch, metrics, _ in run.history],
            {k: v for k, v in run.metrics.items() if not k.startswith("spent/")},
            run.artifacts,
            tracker.datasets[run_id],
        )
        for run_id, run in tracker.runs.items()
    ] + [tracker.statuses]
