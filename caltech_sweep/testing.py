"""For your own tests: a trial that trains nothing, and a tracker that keeps everything in memory.

Example:
    executor = ScriptedExecutor(Script([0.2, 0.5, 0.4]))
    tracker = MemoryTracker()
    summary = run_scripted(definition, executor, tracker)

The coordinator behind it is the real one, in milliseconds a study.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from caltech_sweep.config import TrialConfig
from caltech_sweep.metrics import (
    BEST_EPOCH,
    EPOCH_SECONDS,
    LEARNING_RATE,
    METRICS,
    SPEED,
    TRAIN_ACCURACY,
    TRAIN_LOSS,
    all_logged,
    logged_at_best,
    objective,
)
from caltech_sweep.sweep.executors.base import HANG_SECONDS, Done, Epoch, Event, Failed, Job, Stopped, WorkerDied
from caltech_sweep.tracking.records import (
    END_TAGS,
    OUTCOMES,
    UNFINISHED,
    DatasetInfo,
    EpochLog,
    StudyRecord,
    Tracker,
    TrialRecord,
    epochs_of,
)
from caltech_sweep.training.stopping import last_epoch

if TYPE_CHECKING:
    import optuna

    from caltech_sweep.study.definition import Component, StudyDefinition
    from caltech_sweep.sweep.coordinator import Coordinator, Limits, Summary
    from caltech_sweep.sweep.executors.base import Executor


@dataclass(frozen=True)
class Script:
    """What a mocked trial does: a validation accuracy an epoch, then its end.

    Without ``accuracies`` every epoch of the config gives 0.5. ``failure`` is "diverged", "out_of_memory" or
    "crashed"; ``deaths`` is how often the worker dies after the last scripted epoch before the trial gets through,
    and ``hangs`` how often it falls silent there.
    """

    accuracies: Sequence[float] | None = None
    failure: str | None = None
    deaths: int = 0
    hangs: int = 0
    fails: int | None = None  # how often ``failure`` is met before the trial gets through; None: always
    test_accuracy: float = 0.5


class ScriptedExecutor:
    """An executor whose trials follow scripts, by a function of the config or by one for all."""

    def __init__(self, script: Script | Callable[[TrialConfig], Script] | None = None, slots: int = 1) -> None:
        self._slots = slots
        self.jobs: list[Job] = []  # every job handed out, in order
        self._script = script or Script()
        self._events: dict[int, list[Event]] = {}
        self._lockstep: dict[int, bool] = {}
        self._waits: set[int] = set()
        self._tries: dict[int, int] = {}
        self._trained: dict[int, int] = {}  # epochs of each trial that an earlier job of it has finished

    def free(self) -> int:
        """Return how many slots are free; a job that needs its device to itself is treated like any other."""
        return self._slots - len(self._events)

    def free_soon(self) -> int:
        """Return 0: no artifacts are written."""
        return 0

    def submit(self, job: Job) -> None:
        """Lay out the events of a job."""
        script = self._script if isinstance(self._script, Script) else self._script(job.config)
        accuracies = script.accuracies if script.accuracies is not None else [0.5] * job.config.epochs
        goal = objective(job.config.objective).each_epoch
        end = last_epoch(job.config, [epoch_metrics(value)[goal] for value in accuracies])
        accuracies, trained = accuracies[:end], self._trained.get(job.number, 0)
        events: list[Event] = [
            Epoch(job.number, n, epoch_metrics(value), reused=n <= trained, last=n == end)
            for n, value in enumerate(accuracies, 1)
        ]
        tries = self._tries[job.number] = self._tries.get(job.number, 0) + 1
        if tries <= script.deaths:
            events.append(WorkerDied(job.number, -9))
        elif tries <= script.hangs:
            events.append(WorkerDied(job.number, -9, HANG_SECONDS))
        elif script.failure and (script.fails is None or tries <= script.fails):
            events.append(Failed(job.number, script.failure, f"scripted to be {script.failure}", "scripted"))
        else:
            (job.folder / "config.yaml").write_text("scripted: true\n")
            best = max(accuracies)
            final = {
                **{logged_at_best(name): value for name, value in _scores(best).items()},
                BEST_EPOCH: float(list(accuracies).index(best) + 1),
                **all_logged("test", {**_scores(script.test_accuracy), "loss": 1.0}),
            }
            early = end is not None and end < job.config.epochs
            tags = {"stopped_early": f"epoch {end} of {job.config.epochs}"} if early else {}
            events.append(Done(job.number, final, tags))
        self.jobs.append(job)
        self._events[job.number], self._lockstep[job.number] = events, job.wait_each_epoch

    def poll(self, timeout: float) -> list[Event]:
        """Return the next event of every running job that does not wait for an answer."""
        happened = []
        for number in [number for number in self._events if number not in self._waits]:
            event = self._events[number].pop(0)
            happened.append(event)
            if isinstance(event, WorkerDied):  # which had kept no checkpoint
                self._trained.pop(number, None)
            if not isinstance(event, Epoch):
                del self._events[number]
                continue
            self._trained[number] = max(event.epoch, self._trained.get(number, 0))
            if self._lockstep[number]:
                self._waits.add(number)
        return happened

    def answer(self, job: int, go_on: bool) -> None:
        """Go on with a lockstep job, or let it stop."""
        self._waits.discard(job)
        if not go_on:
            self._events[job] = [Stopped(job)]

    def close(self) -> None:
        """Drop every job."""
        self._events.clear()


def _scores(accuracy: float) -> dict[str, float]:
    """Return all measures, made up: each as good as the accuracy."""
    return {name: accuracy if metric.higher else 1.0 - accuracy for name, metric in METRICS.items()}


def epoch_metrics(accuracy: float) -> dict[str, float]:
    """Return the metrics of an epoch, made up."""
    return {
        TRAIN_LOSS: 1.0 - accuracy,
        TRAIN_ACCURACY: accuracy,
        **all_logged("val", _scores(accuracy)),
        LEARNING_RATE: 0.01,
        EPOCH_SECONDS: 1.0,
        SPEED: 100.0,
    }


@dataclass
class _Run:
    study: str
    name: str
    params: Mapping[str, str]
    tags: dict[str, str]
    number: int
    status: str = "RUNNING"
    history: list[EpochLog] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, bytes] = field(default_factory=dict)


class MemoryTracker(Tracker):
    """A tracker in memory; passes the same contract tests as the MLflow one."""

    def __init__(self) -> None:
        self.documents: dict[str, Mapping[str, Any]] = {}
        self.statuses: dict[str, str] = {}  # of studies
        self.descriptions: dict[str, str] = {}
        self.runs: dict[str, _Run] = {}
        self.datasets: dict[str, str] = {}  # run id -> digest

    def start_study(self, name: str, title: str, document: Mapping[str, Any]) -> str:
        self.documents[name], self.statuses[name] = dict(document), "RUNNING"
        return f"study-{name}"

    def finish_study(self, name: str, complete: bool) -> None:
        self.statuses[name] = "FINISHED" if complete else "KILLED"

    def describe_study(self, name: str, description: str) -> None:
        self.descriptions[name] = description

    def start_trial(self, study: str, name: str, params: Mapping[str, str], tags: Mapping[str, str]) -> str:
        run_id = f"run-{len(self.runs)}"
        self.runs[run_id] = _Run(study, name, dict(params), dict(tags), len(self.runs))
        return run_id

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        self.runs[run_id].params = {**params, **self.runs[run_id].params}

    def resume_trial(self, run_id: str, tags: Mapping[str, str]) -> int:
        run = self.runs[run_id]
        run.status = "RUNNING"
        run.tags = {**{k: v for k, v in run.tags.items() if k not in END_TAGS}, **tags}
        return self.last_epoch(run_id)

    def last_epoch(self, run_id: str) -> int:
        return max((epoch for epoch, _, _ in self.runs[run_id].history), default=0)

    def has_ended(self, run_id: str) -> bool:
        run = self.runs[run_id]
        return run.status != "RUNNING" and run.tags.get("outcome") not in (None, *UNFINISHED)

    def keep_up(self) -> None:
        """Nothing waits."""

    def log_dataset(self, run_id: str, name: str, digest: str, profile: Mapping[str, int], source: str) -> None:
        self.datasets[run_id] = digest

    def log_epochs(self, run_id: str, epochs: Sequence[EpochLog]) -> None:
        self.runs[run_id].history += epochs_of(epochs)
        for _, metrics, _ in epochs:
            self.runs[run_id].metrics.update(metrics)

    def finish_trial(
        self, run_id: str, outcome: str, metrics: Mapping[str, float], tags: Mapping[str, str], folder: Path | None
    ) -> Mapping[str, str]:
        run = self.runs[run_id]
        for path in sorted(folder.rglob("*")) if folder else []:
            if path.is_file():
                run.artifacts[path.relative_to(folder or path).as_posix()] = path.read_bytes()
        run.metrics.update(metrics)
        run.tags.update({**tags, "outcome": outcome})
        run.status = OUTCOMES[outcome].mlflow
        return {}

    def study(self, name: str) -> StudyRecord | None:
        return StudyRecord(name, f"study-{name}", name, self.documents[name]) if name in self.documents else None

    def trials(self, study: StudyRecord) -> list[TrialRecord]:
        return [
            TrialRecord(
                run_id, run.study, run.name, run.status, run.params, dict(run.metrics), dict(run.tags), run.number
            )
            for run_id, run in self.runs.items()
            if run.study == study.name
        ]


def cost_study(trials: int, epochs: int, pruner: Component | None = None) -> StudyDefinition:
    """Return a study with nothing to it but its trials: what one of them costs the coordinator is measured with it."""
    from caltech_sweep.study.definition import Component, Range, StudyDefinition

    space = {"lr": Range(1e-3, 1e-1, log=True), "step_size": Range(5, 30, integer=True)}
    random = Component("random", {"seed": 0})
    data = {"name": "shapes"}
    return StudyDefinition("cost", "Cost", trials, data, {"epochs": epochs}, space, (), sampler=random, pruner=pruner)


def resident_bytes() -> int:
    """Return the memory that this process holds now, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def scripted_coordinator(
    definition: StudyDefinition,
    executor: Executor,
    tracker: Tracker,
    scratch: Path,
    study: optuna.Study | None = None,
    only: tuple[str, ...] = (),
    limits: Limits | None = None,
    write: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> Coordinator:
    """Return the real coordinator over scripts, an Optuna study in memory and a memory tracker.

    ``clock`` returns seconds, by which a budget of hours is counted, and how long epochs wait to be logged.
    """
    from caltech_sweep.sweep.budget import Ledger
    from caltech_sweep.sweep.coordinator import Coordinator, Limits
    from caltech_sweep.sweep.optuna_store import MEMORY, open_study
    from caltech_sweep.sweep.progress import PlainProgress
    from caltech_sweep.sweep.queue import QueuedTrial, TrialQueue
    from caltech_sweep.sweep.recorder import Recorder

    def make_job(queued: QueuedTrial) -> Job:
        return Job(queued.number, queued.config, scratch / str(queued.number), wait_each_epoch=queued.prunable)

    study = study or open_study(definition, MEMORY, definition.identity())
    data = DatasetInfo("scripted", {"train": 8, "val": 4, "test": 4}, "scripted", 2)
    progress = PlainProgress(write)
    recorder = Recorder(tracker, definition, data, progress.note, clock=clock)
    queue = TrialQueue(definition, study, only)
    ledger = Ledger(definition.budget, clock=clock)
    return Coordinator(queue, recorder, executor, progress, make_job, limits or Limits(), ledger)


def run_scripted(
    definition: StudyDefinition, executor: Executor, tracker: Tracker, study: optuna.Study | None = None
) -> Summary:
    """Run a study with scripted trials to its end."""
    with TemporaryDirectory(prefix="caltech-sweep-") as folder:
        return scripted_coordinator(definition, executor, tracker, Path(folder), study).run()
