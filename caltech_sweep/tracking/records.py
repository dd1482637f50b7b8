"""What is recorded of studies and trials, and the interface of a tracker; knows no tracking library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from caltech_sweep.metrics import DEFAULT_OBJECTIVE, TRAIN_LOSS, Objective, is_share, objective
from caltech_sweep.study.definition import StudyDefinition
from caltech_sweep.text import parse_json

STRIKES = 3  # failures at one write, of a store that takes others, after which it is set aside
STORE_TAG = "study_store"  # of a study and its trials: the id of the study store that runs them
REPEAT_TAGS = ("replicate", "confirms", "fold_of")  # of a trial that has another one's settings, on a seed or fold
CAME_HOME = "artifacts.came_home"  # why what a node was to send by itself came home
TOGETHER = "trained_together"  # of a trial: with how many, at most, the steps of its classifier were one product
MISSING_TAG = "artifacts.missing"  # of a trial: as JSON, each artifact that was not made or taken, with the reason
FORMER_TAG = "study_store.former"  # of a study that was adopted: the ids before, joined by commas


def whole(value: object) -> int:
    """Return a whole number of a store, whose tags and metrics others may have changed; 0 where it holds none."""
    try:
        return int(float(str(value)))
    except (ValueError, OverflowError):
        return 0


@dataclass(frozen=True)
class Outcome:
    """How a trial ended, in the terms of both stores."""

    optuna: str
    mlflow: str


# Every way a trial can end, and nothing else maps one store's word to the other's.
OUTCOMES = {
    "complete": Outcome("COMPLETE", "FINISHED"),
    "pruned": Outcome("PRUNED", "KILLED"),
    "diverged": Outcome("FAIL", "FAILED"),
    "out_of_memory": Outcome("FAIL", "FAILED"),
    "data_error": Outcome("FAIL", "FAILED"),
    "crashed": Outcome("FAIL", "FAILED"),
    "interrupted": Outcome("WAITING", "KILLED"),
    "paused": Outcome("WAITING", "KILLED"),
}
RESULTS = ("complete", "pruned", "diverged")  # training such a trial again would only repeat it
UNFINISHED = ("interrupted", "paused")  # a trial that ended so may go on, in the same run
SUGGESTED_BY = "suggested_by"  # the tag of a sampled trial: "model" or "random", where its sampler has a model
PAUSED_AT = "paused_at"  # the tag of a paused trial's run: the epoch it is paused at
HOST = "host"  # the tag of a trial's run: the machine that trains it, as that calls itself
END_TAGS = ("outcome", "reason", PAUSED_AT)  # a run that goes on loses these


_LARGEST = 1e308  # MLflow's databases keep infinity as the largest number that they have


def not_a_number(metrics: Mapping[str, float]) -> str | None:
    """Return "NAME is VALUE" of the first of a trial's own metrics that is NaN, infinite or no share, or None."""
    for name, value in metrics.items():
        if not math.isfinite(value) or abs(value) > _LARGEST or (is_share(name) and not 0 <= value <= 1):
            return f"{name} is {value}"
    return None


def sound_outcome(outcome: str, metrics: Mapping[str, float]) -> str:
    """Return a recorded outcome; a complete trial whose results are not numbers, of an older version, diverged."""
    own = {name: value for name, value in metrics.items() if name.startswith(("best/", "test", "val/", "train/"))}
    return "diverged" if outcome == "complete" and not_a_number(own) else outcome


def missing_artifacts(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the artifacts that a trial has not made, or the store not taken, with the reasons."""
    try:
        found = parse_json(tags.get(MISSING_TAG, "{}"))
    except ValueError:
        return {}
    return {str(path): str(why) for path, why in found.items()} if isinstance(found, dict) else {}


@dataclass(frozen=True)
class DatasetInfo:
    """What the runs record about the data set: a digest of the images, how many each split has, their source."""

    digest: str
    splits: Mapping[str, int]
    source: str
    classes: int
    tags: Mapping[str, str] = field(default_factory=dict)  # of every run, about what the images needed


@dataclass(frozen=True)
class InitialWeights:
    """The file that trials start from: its SHA-256, and the run that it is of, if it is."""

    path: Path
    digest: str
    run_id: str | None = None


@dataclass(frozen=True)
class TrialRecord:
    """One trial's run as the store has it; what the trial is, and how it ended, is in its tags."""

    run_id: str
    study: str
    name: str
    status: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    start_time: int = 0  # milliseconds since 1970
    artifact_uri: str = ""

    @property
    def row(self) -> str | None:
        """The row of the study that it trains, or None of a sampled trial."""
        return self.tags.get("row")

    @property
    def number(self) -> int:
        """The trial's number, or -1 of a run that is no trial's."""
        number = self.tags.get("trial_number", "")
        return int(number) if number.isdecimal() else -1

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the trial's config."""
        return self.tags.get("fingerprint", "")

    @cached_property
    def outcome(self) -> str:
        """The end that the run has recorded, or "" before it.

        A run that is RUNNING may have one: it was killed between the last two calls of its end.
        """
        return sound_outcome(self.tags.get("outcome", ""), self.metrics)

    @property
    def state(self) -> str:
        """What people are told: "running" until the run has ended, then its outcome.

        A run that was stopped from outside has none, and was interrupted.
        """
        return "running" if self.status in ("RUNNING", "SCHEDULED") else self.outcome or "interrupted"

    @property
    def objective(self) -> Objective:
        """The measure that its study is about; runs of earlier versions do not name the default."""
        return objective(self.params.get("objective", DEFAULT_OBJECTIVE))

    @property
    def score(self) -> float | None:
        """What it reached of the objective, or None when that is missing or not finite."""
        return self.objective.score(self.metrics)

    @property
    def rank(self) -> float:
        """A number that is the smaller, the better its score is; infinite without one."""
        return math.inf if self.score is None else self.objective.loss(self.score)


@dataclass(frozen=True)
class StudyRecord:
    """One study's parent run: its document is ``StudyDefinition.to_dict()`` as last run."""

    name: str
    run_id: str
    experiment_id: str
    document: Mapping[str, Any]
    store: str | None = None  # the id of the study store that runs it; None in a study of an earlier version
    former: tuple[str, ...] = ()  # those of the study stores that ran it before

    @cached_property
    def definition(self) -> StudyDefinition | None:
        """The study as last run; None where its document is lost or is none."""
        try:
            return StudyDefinition.from_dict(self.document) if self.document else None
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    @property
    def images(self) -> Mapping[str, int]:
        """How many images each part has, and how many ``classes`` there are, as far as that is recorded."""
        return self.document.get("images") or {}

    @classmethod
    def from_tags(
        cls, name: str, run_id: str, experiment_id: str, document: Mapping[str, Any], tags: Mapping[str, str]
    ) -> StudyRecord:
        """Return the record of a study from its parent run's file and tags."""
        former = tuple(filter(None, tags.get(FORMER_TAG, "").split(",")))
        return cls(name, run_id, experiment_id, document, tags.get(STORE_TAG), former)

    def has(self, tags: Mapping[str, str]) -> bool:
        """Tell whether a trial's run is this study's, by its tags, rather than of another study of its name."""
        owner = tags.get(STORE_TAG)
        return owner is None or self.store is None or owner == self.store or owner in self.former


NETWORK_INPUT = "network.input"  # tag: what a network sees and what its weights were published for
GREY_BITS = "dataset.grey_bits"  # the tag of a run whose sixteen-bit grey images use fewer bits


def grey_bits(tags: Mapping[str, str]) -> int:
    """Return how many bits the sixteen-bit grey images of a run have; 16 where its tags do not say."""
    text = tags.get(GREY_BITS, "")
    return int(text) if text in ("8", "10", "12", "14") else 16


# Outcomes that no choice of settings causes: enough of these in a row stop a study.
FAILURES = ("out_of_memory", "data_error", "crashed")

EpochLog = tuple[int, Mapping[str, float], int]  # step, metrics by name, time in milliseconds since 1970
STEP_METRIC = TRAIN_LOSS  # what tells an epoch, whose step is its 1-based number, from what is logged between epochs


def epochs_of(logs: Iterable[EpochLog]) -> list[EpochLog]:
    """Return those of some logs that are epochs."""
    return [log for log in logs if STEP_METRIC in log[1]]


class Tracker(Protocol):
    """Keeps studies and their trials; the coordinator writes through nothing else."""

    def start_study(self, name: str, title: str, document: Mapping[str, Any]) -> str:
        """Create a study, or go on with it; return its run id."""

    def finish_study(self, name: str, complete: bool) -> None:
        """Close a study: complete when it has all its trials."""

    def describe_study(self, name: str, description: str) -> None:
        """Give a study a description in Markdown."""

    def start_trial(self, study: str, name: str, params: Mapping[str, str], tags: Mapping[str, str]) -> str:
        """Create a trial's run; return its id."""

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Record what a trial trains; those that are recorded already stay as they are."""

    def resume_trial(self, run_id: str, tags: Mapping[str, str]) -> int:
        """Open a trial's run again; return the last epoch whose metrics it has, or 0."""

    def last_epoch(self, run_id: str) -> int:
        """Return the last epoch whose metrics a run has, or 0."""

    def has_ended(self, run_id: str) -> bool:
        """Tell whether a trial's run has its final end."""

    def keep_up(self) -> None:
        """Called from time to time: bring to the store what waits for it, without blocking for long."""

    def log_dataset(self, run_id: str, name: str, digest: str, profile: Mapping[str, int], source: str) -> None:
        """Record which images a trial used."""

    def log_epochs(self, run_id: str, epochs: Sequence[EpochLog]) -> None:
        """Log the metrics of some epochs."""

    def finish_trial(
        self, run_id: str, outcome: str, metrics: Mapping[str, float], tags: Mapping[str, str], folder: Path | None
    ) -> Mapping[str, str]:
        """Keep a trial's artifacts, log what is known only at its end, and set its final status.

        Returns the artifacts that will never be taken, with the reasons.
        """

    def study(self, name: str) -> StudyRecord | None:
        """Return a study, or None."""

    def trials(self, study: StudyRecord) -> list[TrialRecord]:
        """Return the trials of a study, the oldest first."""


def records_by_trial(tracker: Tracker, name: str) -> dict[tuple[int, str], TrialRecord]:
    """Return the run of each trial of a study that counts, by the trial's number and fingerprint."""
    study = tracker.study(name)
    trials = tracker.trials(study) if study else []
    return {(record.number, record.fingerprint): record for record in sorted(trials, key=worth)}


def worth(run: TrialRecord, sound: Callable[[TrialRecord], bool] = lambda run: True) -> tuple[bool, bool, bool, int]:
    """Return what orders the runs of one trial, of which the last counts.

    It is one that has a result, complete and ``sound`` if there is such a one, and the newest of these.
    """
    complete = run.outcome == "complete"
    return run.outcome in RESULTS, complete, complete and sound(run), run.start_time
