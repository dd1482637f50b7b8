"""Where trials run: one interface, in this process or in persistent worker processes.

An executor owns slots. The coordinator submits a :class:`Job` to a free slot and polls for events. A worker sees
jobs and sends events back, nothing else, so that both stores keep a single writer. Whether a worker hangs is for its
executor to find out: it kills it and says :class:`WorkerDied`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import CaltechSweepError, DatasetError, DivergedError, OutOfMemoryError
from caltech_sweep.files import is_disk_full
from caltech_sweep.tracking.direct import Destination
from caltech_sweep.training.keys import CacheOptions

if TYPE_CHECKING:
    from caltech_sweep.training.fit import Training

HANG_SECONDS = 600.0  # of silence after which a worker is killed; every step of a training gives a sign
MAX_FAILURES = 5  # failed trials in a row that stop a study, unless it is told otherwise


@dataclass(frozen=True)
class Job:
    """One trial to run."""

    number: int
    config: TrialConfig
    folder: Path  # where its artifacts are written
    weights_file: Path | None = None  # initial weights, unless they are none
    device: str | None = None
    wait_each_epoch: bool = False  # wait for the coordinator's answer after every epoch, since it may prune
    stages: CacheOptions | None = None  # what may be reused and where the trial's own stages go
    alone: bool = False  # no other job shares its device, which is the one it had before
    weights_digest: str | None = None  # the SHA-256 that the file of the initial weights must have
    together: bool = False  # other jobs of its process may train their epochs with its own
    upload: Destination | None = None  # where the machine that has trained it may send its artifacts by itself


@dataclass(frozen=True)
class Epoch:
    """One finished epoch of a job: its 1-based number and its metrics by MLflow name."""

    job: int
    epoch: int
    metrics: Mapping[str, float]
    reused: bool = False  # not trained by this job
    last: bool = False  # the job trains no more: all epochs are done, or it stops early
    saving: int = 0  # of how many epochs, this one and those before, nobody can use the states yet
    memory: tuple[int, int] | None = None  # bytes of its GPU that the worker has held at most, and that are free
    host: str = ""  # the machine that has trained it, where that may be another one than the coordinator's


@dataclass(frozen=True)
class Done:
    """A job that ran to its end, with its final metrics; its artifacts are in the job's folder."""

    job: int
    metrics: Mapping[str, float]
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """A job whose training and test are done; its artifacts are yet to be written, which the next need not wait for."""

    job: int


@dataclass(frozen=True)
class Ready:
    """A job that may train ``together`` with others, and is about to train an epoch; never leaves its process."""

    job: int
    training: Training


@dataclass(frozen=True)
class Stopped:
    """A job that stopped because it was asked to."""

    job: int


@dataclass(frozen=True)
class Failed:
    """A job that failed: ``outcome`` is diverged, out_of_memory, data_error or crashed."""

    job: int
    outcome: str
    message: str
    trace: str = ""


@dataclass(frozen=True)
class WorkerDied:
    """The worker process of a job ended unexpectedly; the job may be tried again.

    ``hung`` is the number of seconds that it was silent for, where it was killed because of that. ``why`` says what
    happened, where an executor knows it better than by an exit code. ``moved`` is true of a job that stopped, its state
    saved, since its machine will be taken away: that does not count as a death.
    """

    job: int
    exit_code: int | None
    hung: float | None = None
    why: str = ""
    moved: bool = False


T = TypeVar("T")
Write = Callable[[str], None]
Work = Callable[[Write], T]  # something to do besides jobs; it is given what tells the user a line
Event = Epoch | Trained | Done | Stopped | Failed | WorkerDied
Epochs = Generator[Epoch | Trained | Ready, None, Done]
Runner = Callable[[Job], Epochs]


class Executor(Protocol):
    """Slots that run jobs."""

    def free(self) -> int:
        """Return how many jobs may be submitted now."""

    def free_soon(self) -> int:
        """Return how many more may be, to train while the artifacts of others are written."""

    def submit(self, job: Job) -> None:
        """Start a job in a free slot."""

    def poll(self, timeout: float) -> Sequence[Event]:
        """Return what has happened, waiting at most ``timeout`` seconds for the first event."""

    def answer(self, job: int, go_on: bool) -> None:
        """Answer an epoch of a lockstep job: train the next one, or stop and reply with ``Stopped``."""

    def close(self) -> None:
        """End every job and worker at once."""


def ending(exit_code: int | None) -> str:
    """Return how a process ended, as a part of a sentence."""
    code = exit_code or 0
    return f"ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"


def _storable(text: str) -> str:
    """Return a text as every store takes it: no bytes of a file's name, which no encoding has, and no NUL."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def failure_of(job: int, error: Exception) -> Failed:
    """Name the outcome of an error that a job raised."""
    said = _storable(str(error)) or type(error).__name__
    if isinstance(error, DivergedError):
        return Failed(job, "diverged", said)
    if isinstance(error, OutOfMemoryError):
        return Failed(job, "out_of_memory", said)
    if isinstance(error, DatasetError):
        return Failed(job, "data_error", said)
    if is_disk_full(error):
        where = getattr(error, "filename", None) or "what the trial leaves"
        return Failed(job, "crashed", f"{where} cannot be written ({said}); make room and run the study again")
    trace = "" if isinstance(error, CaltechSweepError) else _storable(traceback.format_exc())
    return Failed(job, "crashed", said, trace)


def _advance(job: int, epochs: Epochs) -> Event:
    """Return what happens next to a job; one that might train with others goes on by itself."""
    while isinstance(event := _advance_or_wait(job, epochs), Ready):
        pass
    return event


def _advance_or_wait(job: int, epochs: Epochs) -> Event | Ready:
    try:
        return next(epochs)
    except StopIteration as end:
        done: Done = end.value
        return done
    except Exception as error:  # the boundary: whatever a trial raises becomes its outcome
        return failure_of(job, error)
