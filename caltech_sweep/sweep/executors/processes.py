"""Trials in persistent worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from caltech_sweep.errors import CaltechSweepError
from caltech_sweep.heartbeat import beating
from caltech_sweep.sweep.executors.base import (
    HANG_SECONDS,
    Epoch,
    Epochs,
    Event,
    Job,
    Runner,
    Stopped,
    T,
    Trained,
    Work,
    WorkerDied,
    Write,
    _advance,
    ending,
)

ROOM = 0.9  # of a GPU's free memory that more workers may take

# What stops a run. A terminal, a shell or a batch system sends it to the whole group; only the coordinator decides.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def change_mask(how: str, numbers: Iterable[int]) -> Iterable[int]:
    """Change which signals wait for this thread; return those that did. Windows has no such thing."""
    if sys.platform == "win32":
        return ()
    return signal.pthread_sigmask(getattr(signal, how), numbers)


@contextmanager
def unstopped() -> Iterator[None]:
    """Let a process that is started meanwhile not be stopped before it has decided what stops it."""
    if sys.platform != "win32":
        resource_tracker.ensure_running()  # its start would take the signals up again
    before = change_mask("SIG_BLOCK", STOPPING)
    try:
        yield
    finally:
        change_mask("SIG_SETMASK", before)


class _Line:
    """The connection to the coordinator, on which two threads may speak."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self.hear = connection.recv

    def say(self, what: object) -> None:
        """Send an event, or None as a sign of life."""
        with self._lock:
            self._connection.send(what)


def _work(connection: Connection, runner: Runner, threads: int | None, prepare: Callable[[], None]) -> None:
    """Serve jobs until the coordinator closes the connection or dies."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    change_mask("SIG_UNBLOCK", STOPPING)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    with suppress(Exception):  # the first job says so again
        prepare()
    line, writer = _Line(connection), ThreadPoolExecutor(1, "artifacts")
    written: Future[None] | None = None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError), beating(lambda: line.say(None)):
        while True:
            asked = line.hear()
            if not isinstance(asked, Job):
                _answer(line, asked)
            elif (rest := _serve(line, asked, runner)) is not None:
                if written is not None:
                    written.result()  # the artifacts of one job are written at a time
                line.say(Trained(asked.number))
                written = writer.submit(_finish, line, asked.number, rest)


def _serve(line: _Line, job: Job, runner: Runner) -> Epochs | None:
    """Train a job; return what is left to do where the next one need not wait for that."""
    epochs = runner(job)
    while True:
        event = _advance(job.number, epochs)
        if isinstance(event, Trained):
            return epochs
        line.say(event)
        if not isinstance(event, Epoch):
            return None
        if job.wait_each_epoch and not line.hear():
            epochs.close()
            line.say(Stopped(job.number))
            return None


def _finish(line: _Line, job: int, rest: Epochs) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):
        line.say(_advance(job, rest))


@dataclass(frozen=True)
class _Answer:
    """What came of something that is no job: what it returned, or the error that it raised and its traceback."""

    value: Any = None
    error: Exception | None = None
    trace: str = ""


def _answer(line: _Line, work: Work[Any]) -> None:
    try:
        answer = _Answer(work(line.say))
    except Exception as error:
        answer = _Answer(None, error, traceback.format_exc())
    line.say(answer)


def _nothing() -> None:
    pass


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    device: str | None
    job: int | None = None  # that it trains
    writes: int | None = None  # the job before that, whose artifacts it still writes
    alone: bool = False  # its job shares the device with no other
    last_seen: float = 0.0  # when it last sent something, by the executor's clock
    hung: bool = False  # it was killed because it sent nothing

    @property
    def jobs(self) -> list[int]:
        """The jobs that would end with it."""
        return [job for job in (self.writes, self.job) if job is not None]


class ProcessExecutor:
    """Persistent worker processes, one slot each; a worker that dies is replaced.

    Workers are spawned, never forked: torch's thread pools and CUDA do not survive a fork. Each worker belongs to
    one of ``devices``, in turn. ``threads`` is torch's thread count in every worker: it is part of what decides the
    last bit of a weight on the CPU, so it must not depend on how many workers there are. A worker that sends nothing
    for ``hang_seconds`` is killed; only time in which this executor is polled counts. ``prepare`` is what each does
    before its first job. After the first epoch on a GPU its workers become as many as its memory has room for, by
    what that epoch took, but no more than ``at_most``.
    """

    def __init__(
        self,
        runner: Runner,
        workers: int,
        devices: Sequence[str] | None = None,
        threads: int | None = None,
        hang_seconds: float = HANG_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        prepare: Callable[[], None] = _nothing,
        at_most: int = 1,
    ) -> None:
        self._runner, self._threads, self._prepare = runner, threads, prepare
        self._hang_seconds, self._clock = hang_seconds, clock
        self._polled, self._at_most = clock(), at_most
        self._context = multiprocessing.get_context("spawn")
        chosen: list[str | None] = list(devices) if devices else [None]
        self._workers = [self._start(chosen[i % len(chosen)]) for i in range(workers)]
        self._measured: set[str | None] = set()  # devices whose memory is divided
        self._device_of: dict[int, str | None] = {}  # of every job, where it ran last
        self._held: list[Job] = []  # jobs to run alone, until the others on their device have ended
        self._waiting: list[Job] = []  # for a worker: two that died with one do

    def _start(self, device: str | None) -> _Worker:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, self._runner, self._threads, self._prepare)
        process = self._context.Process(target=_work, args=arguments, daemon=True)
        with unstopped():
            process.start()
        theirs.close()
        return _Worker(process, ours, device)

    def ask(self, work: Work[T], write: Write) -> Callable[[], T]:
        """Let the first worker do something before any job; return what waits for it and returns what it returned.

        What it tells the user is written meanwhile. An error that it raises is raised here.
        """
        worker = self._workers[0]
        with suppress(BrokenPipeError):  # it has died: the wait says so
            worker.connection.send(work)

        def wait_for_it() -> T:
            said: object = None
            while not isinstance(said, _Answer):
                if isinstance(said, str):
                    write(said)
                try:
                    said = worker.connection.recv()
                except (EOFError, ConnectionResetError) as error:
                    worker.process.join()
                    raise CaltechSweepError(
                        f"the worker process that makes the images ready {ending(worker.process.exitcode)}; run the "
                        "command again, with fewer workers if memory is short"
                    ) from error
            if said.error is not None:
                raise said.error from RuntimeError(said.trace)
            value: T = said.value
            return value

        return wait_for_it

    def _idle(self) -> list[int]:
        """Return the workers that may take a job, on a device that no job has or awaits for itself: idle ones first."""
        reserved = {worker.device for worker in self._workers if worker.job is not None and worker.alone}
        reserved.update(self._device_of[job.number] for job in self._held)
        free = [i for i, w in enumerate(self._workers) if w.job is None and w.device not in reserved]
        return sorted(free, key=lambda i: self._workers[i].writes is not None)

    def free(self) -> int:
        """Return how many workers are idle whose device is not reserved for one job."""
        return max(0, sum(self._workers[i].writes is None for i in self._idle()) - len(self._waiting))

    def free_soon(self) -> int:
        """Return how many workers still write the artifacts of a job, and may train the next one meanwhile."""
        return max(0, len(self._idle()) - len(self._waiting)) - self.free()

    def submit(self, job: Job) -> None:
        """Send a job to a free worker; one to run alone waits until the others on its device have ended."""
        if job.alone and job.number in self._device_of:
            self._held.append(job)
        else:
            self._waiting.append(job)
        self._release()

    def _release(self) -> None:
        """Start the jobs that wait and have a worker now, or their device for themselves."""
        for job in list(self._held):
            device = self._device_of[job.number]
            there = [i for i, worker in enumerate(self._workers) if worker.device == device]
            if not any(self._workers[i].jobs for i in there):
                self._held.remove(job)
                # A new process: what the old ones keep on the device for themselves is given back.
                for i in there:
                    self._workers[i].process.kill()
                    self._workers[i].process.join()
                self._send(job, there[0])
        while self._waiting and (idle := self._idle()):
            self._send(self._waiting.pop(0), idle[0])

    def _send(self, job: Job, index: int) -> None:
        worker = self._workers[index]
        if not worker.process.is_alive():  # it died while idle
            self._workers[index] = worker = self._replace(worker)
        worker.job, worker.alone, worker.last_seen = job.number, job.alone, self._clock()
        self._device_of[job.number] = worker.device
        with suppress(BrokenPipeError):  # it dies at this moment: the next poll says so
            worker.connection.send(replace(job, device=job.device or worker.device))

    def poll(self, timeout: float) -> list[Event]:
        """Return the events that have arrived, and kill the workers that hang: their deaths are among the next."""
        self._release()
        now = self._clock()
        for worker in self._workers:  # no poll listened since the last one
            worker.last_seen = min(now, worker.last_seen + (now - self._polled))
        by_connection = {w.connection: i for i, w in enumerate(self._workers) if w.jobs}
        ready = wait(list(by_connection), timeout)
        events = [event for each in ready for event in self._receive(by_connection[each])]  # type: ignore[index]
        self._polled = self._clock()
        for worker in self._workers:
            if worker.jobs and self._polled - worker.last_seen > self._hang_seconds:
                worker.hung = True
                worker.process.kill()
        return events

    def _receive(self, index: int) -> list[Event]:
        """Return what a worker sent, or the deaths of its jobs; nothing for a heartbeat."""
        worker = self._workers[index]
        worker.last_seen = self._clock()
        try:
            event: Event | None = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            hung = self._hang_seconds if worker.hung else None
            self._workers[index] = self._replace(worker)
            return [WorkerDied(job, worker.process.exitcode, hung) for job in worker.jobs]
        if event is None:
            return []
        if isinstance(event, Epoch):
            self._divide(worker.device, event.memory)
        elif isinstance(event, Trained):
            worker.job, worker.writes = None, event.job
        elif event.job == worker.writes:
            worker.writes = None
        else:
            worker.job = None
        return [event]

    def _divide(self, device: str | None, memory: tuple[int, int] | None) -> None:
        """Start as many more workers on a device as its free memory has room for."""
        if memory is None or device in self._measured:
            return
        self._measured.add(device)
        held, free = memory
        there = sum(worker.device == device for worker in self._workers)
        for _ in range(min(int(free * ROOM) // held, self._at_most - there)):
            self._workers.append(self._start(device))

    def _replace(self, worker: _Worker) -> _Worker:
        worker.connection.close()
        return self._start(worker.device)

    def answer(self, job: int, go_on: bool) -> None:
        """Let the worker that waits go on or stop."""
        for worker in self._workers:
            if worker.job == job:
                with suppress(BrokenPipeError):
                    worker.connection.send(go_on)

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
