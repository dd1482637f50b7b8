"""Where trials run: one interface, in this process or in persistent worker processes.

An executor owns slots. The coordinator submits a :class:`Job` to a free slot and polls for events. A worker sees
jobs and sends events back, nothing else, so that both stores keep a single writer.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import CaltechSweepError, DatasetError, DivergedError, OutOfMemoryError
from caltech_sweep.training.pulse import beating
from caltech_sweep.training.reuse import StageUse


@dataclass(frozen=True)
class Job:
    """One trial to run."""

    number: int
    config: TrialConfig
    folder: Path  # where its artifacts are written
    weights_file: Path | None = None  # initial weights, for run: and study: alone
    device: str | None = None
    lockstep: bool = False  # wait for the coordinator's answer after every epoch, since it may prune
    stages: StageUse | None = None  # what may be reused and where the trial's own stages go
    alone: bool = False  # no other job shares its device, which is the one it had before


@dataclass(frozen=True)
class Epoch:
    """One finished epoch of a job: its 1-based number and its metrics by MLflow name."""

    job: int
    epoch: int
    metrics: Mapping[str, float]
    reused: bool = False  # not trained by this job


@dataclass(frozen=True)
class Alive:
    """A sign of life from within an epoch."""

    job: int


@dataclass(frozen=True)
class Done:
    """A job that ran to its end, with its final metrics; its artifacts are in the job's folder."""

    job: int
    metrics: Mapping[str, float]
    tags: Mapping[str, str] = field(default_factory=dict)


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
    """The worker process of a job ended without a word; the job may be tried again."""

    job: int
    exit_code: int | None


Event = Epoch | Alive | Done | Stopped | Failed | WorkerDied
Epochs = Generator[Epoch, None, Done]
Runner = Callable[[Job], Epochs]


class Executor(Protocol):
    """Slots that run jobs."""

    @property
    def slots(self) -> int:
        """How many jobs may run at once."""

    def has_room(self) -> bool:
        """Tell whether a job may be submitted now."""

    def submit(self, job: Job) -> None:
        """Start a job in a free slot."""

    def poll(self, timeout: float) -> Sequence[Event]:
        """Return what has happened, waiting at most ``timeout`` seconds for the first event."""

    def answer(self, job: int, go_on: bool) -> None:
        """Answer an epoch of a lockstep job: train the next one, or stop and reply with ``Stopped``."""

    def waits(self, job: int) -> bool:
        """Tell whether a submitted job has not begun, since it is to run alone."""

    def abandon(self, job: int) -> bool:
        """End the worker of a job that hangs, so that its death is an event; False where that cannot be done."""

    def close(self) -> None:
        """End every job and worker at once."""


_DISK = re.compile(r"No space left|File too large|Disk quota exceeded|Read-only file system")


def failure_of(job: int, error: Exception) -> Failed:
    """Name the outcome of an error that a job raised."""
    if isinstance(error, DivergedError):
        return Failed(job, "diverged", str(error))
    if isinstance(error, OutOfMemoryError):
        return Failed(job, "out_of_memory", str(error))
    if isinstance(error, DatasetError):
        return Failed(job, "data_error", str(error))
    if _DISK.search(str(error)):  # safetensors has errors of its own for what the disk does not take
        where = getattr(error, "filename", None) or "what the trial leaves"
        return Failed(job, "crashed", f"{where} cannot be written ({error}); make room and run the study again")
    trace = "" if isinstance(error, CaltechSweepError) else traceback.format_exc()
    return Failed(job, "crashed", str(error) or type(error).__name__, trace)


def _advance(job: int, epochs: Epochs) -> Event:
    try:
        return next(epochs)
    except StopIteration as end:
        done: Done = end.value
        return done
    except Exception as error:  # the boundary: whatever a trial raises becomes its outcome
        return failure_of(job, error)


class InProcessExecutor:
    """One slot in this very process: each poll trains one epoch. For debugging."""

    slots = 1

    def __init__(self, runner: Runner, device: str | None = None) -> None:
        self._runner, self._device = runner, device
        self._running: tuple[int, Epochs] | None = None
        self._stop = False

    def has_room(self) -> bool:
        """Tell whether no job runs."""
        return self._running is None

    def submit(self, job: Job) -> None:
        """Start a job; it advances at each poll."""
        self._running = (job.number, self._runner(replace(job, device=job.device or self._device)))
        self._stop = False

    def poll(self, timeout: float) -> list[Event]:
        """Run the job to its next event and return that."""
        if self._running is None:
            return []
        number, epochs = self._running
        if self._stop:
            epochs.close()
            event: Event = Stopped(number)
        else:
            event = _advance(number, epochs)
        if not isinstance(event, Epoch):
            self._running = None
        return [event]

    def answer(self, job: int, go_on: bool) -> None:
        """Go on, or stop, at the next poll."""
        self._stop = not go_on

    def waits(self, job: int) -> bool:
        """Say no: one slot is always alone."""
        return False

    def abandon(self, job: int) -> bool:
        """Say no: what hangs is this very process."""
        return False

    def close(self) -> None:
        """Drop the running job."""
        if self._running is not None:
            self._running[1].close()
            self._running = None


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work(connection: Connection, runner: Runner, threads: int | None) -> None:
    """Serve jobs until the coordinator closes the connection or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the coordinator decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            _serve(connection, connection.recv(), runner)


def _serve(connection: Connection, job: Job, runner: Runner) -> None:
    epochs = runner(job)
    while True:
        with beating(lambda: connection.send(Alive(job.number))):
            event = _advance(job.number, epochs)
        connection.send(event)
        if not isinstance(event, Epoch):
            return
        if job.lockstep and not connection.recv():
            epochs.close()
            connection.send(Stopped(job.number))
            return


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    device: str | None
    job: int | None = None
    alone: bool = False  # its job shares the device with no other


class ProcessExecutor:
    """Persistent worker processes, one slot each; a worker that dies is replaced.

    Workers are spawned, never forked: torch's thread pools and CUDA do not survive a fork. Each worker belongs to
    one of ``devices``, in turn. ``threads`` is torch's thread count in every worker: it is part of what decides the
    last bit of a weight on the CPU, so it must not depend on how many workers there are.
    """

    def __init__(
        self, runner: Runner, workers: int, devices: Sequence[str] | None = None, threads: int | None = None
    ) -> None:
        self.slots = workers
        self._runner, self._threads = runner, threads
        self._context = multiprocessing.get_context("spawn")
        chosen: list[str | None] = list(devices) if devices else [None]
        self._workers = [self._start(chosen[i % len(chosen)]) for i in range(workers)]
        self._device_of: dict[int, str | None] = {}  # of every job, where it ran last
        self._held: list[Job] = []  # jobs to run alone, until the others on their device have ended

    def _start(self, device: str | None) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._runner, self._threads), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, device)

    def _free(self) -> list[int]:
        """Return the workers that may take a job: idle, on a device that no job has or awaits for itself."""
        reserved = {worker.device for worker in self._workers if worker.job is not None and worker.alone}
        reserved.update(self._device_of[job.number] for job in self._held)
        return [i for i, w in enumerate(self._workers) if w.job is None and w.device not in reserved]

    def has_room(self) -> bool:
        """Tell whether a worker is free whose device is not reserved for a job alone."""
        return bool(self._free())

    def submit(self, job: Job) -> None:
        """Send a job to a free worker; one to run alone waits until the others on its device have ended."""
        if job.alone and job.number in self._device_of:
            self._held.append(job)
            self._release()
        else:
            self._send(job, self._free()[0])

    def _release(self) -> None:
        """Start the jobs whose device they now have for themselves."""
        for job in list(self._held):
            device = self._device_of[job.number]
            there = [i for i, worker in enumerate(self._workers) if worker.device == device]
            if all(self._workers[i].job is None for i in there):
                self._held.remove(job)
                # A new process: what the old ones keep on the device for themselves is given back.
                for i in there:
                    self._workers[i].process.kill()
                    self._workers[i].process.join()
                self._send(job, there[0])

    def _send(self, job: Job, index: int) -> None:
        worker = self._workers[index]
        if not worker.process.is_alive():  # it died while idle
            self._workers[index] = worker = self._replace(worker)
        worker.job, worker.alone = job.number, job.alone
        self._device_of[job.number] = worker.device
        with suppress(BrokenPipeError):  # it dies at this moment: the next poll says so
            worker.connection.send(replace(job, device=job.device or worker.device))

    def poll(self, timeout: float) -> list[Event]:
        """Return the events that have arrived."""
        self._release()
        by_connection = {w.connection: i for i, w in enumerate(self._workers) if w.job is not None}
        return [self._receive(by_connection[ready]) for ready in wait(list(by_connection), timeout)]  # type: ignore[index]

    def _receive(self, index: int) -> Event:
        worker = self._workers[index]
        assert worker.job is not None
        try:
            event: Event = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            event = WorkerDied(worker.job, worker.process.exitcode)
            self._workers[index] = self._replace(worker)
            return event
        if not isinstance(event, (Epoch, Alive)):
            worker.job = None
        return event

    def _replace(self, worker: _Worker) -> _Worker:
        worker.connection.close()
        return self._start(worker.device)

    def answer(self, job: int, go_on: bool) -> None:
        """Let the worker that waits go on or stop."""
        for worker in self._workers:
            if worker.job == job:
                with suppress(BrokenPipeError):
                    worker.connection.send(go_on)

    def waits(self, job: int) -> bool:
        """Tell whether a job to run alone still waits for its device."""
        return any(held.number == job for held in self._held)

    def abandon(self, job: int) -> bool:
        """Kill the worker of a job; its death is among the next events."""
        found = [worker for worker in self._workers if worker.job == job]
        for worker in found:
            worker.process.kill()
        return bool(found)

    @property
    def pids(self) -> list[int]:
        """The worker processes' ids."""
        return [worker.process.pid for worker in self._workers if worker.process.pid is not None]

    def close(self) -> None:
        """End every worker at once."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
        self._workers = []
