"""Trials in persistent worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
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
    Ready,
    Runner,
    Stopped,
    T,
    Trained,
    Work,
    WorkerDied,
    Write,
    _advance,
    _advance_or_wait,
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
    """The connection to the coordinator, on which two threads may speak; one listens."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._arrived: list[Job] = []  # while an answer was awaited
        self.hear = connection.recv

    def answer(self) -> bool:
        """Wait for whether a job goes on; jobs that arrive before are kept."""
        while True:
            said = self.hear()
            if isinstance(said, bool):
                return said
            self._arrived.append(said)

    def jobs(self) -> list[Job]:
        """Return the jobs that have arrived."""
        arrived, self._arrived = self._arrived, []
        while self._connection.poll():
            arrived.append(self.hear())
        return arrived

    def say(self, what: object) -> None:
        """Send an event, or None as a sign of life."""
        with self._lock:
            self._connection.send(what)


class _Artifacts:
    """Writes what trained jobs leave, one after the other, while others are trained; at most so many wait."""

    def __init__(self, line: _Line, most: int) -> None:
        self._line, self._most = line, most
        self._writer, self._written = ThreadPoolExecutor(1, "artifacts"), deque[Future[None]]()

    def write(self, job: int, rest: Epochs) -> None:
        """Let a job be finished, once there is room for it."""
        while len(self._written) >= self._most:
            self._written.popleft().result()
        self._line.say(Trained(job))
        self._written.append(self._writer.submit(self._finish, job, rest))

    def _finish(self, job: int, rest: Epochs) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            self._line.say(_advance(job, rest))


def _work(
    connection: Connection, runner: Runner, threads: int | None, prepare: Callable[[], None], together: int
) -> None:
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
    line = _Line(connection)
    artifacts = _Artifacts(line, together)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError), beating(lambda: line.say(None)):
        while True:
            asked = line.hear()
            if isinstance(asked, Job):
                _serve(line, asked, runner, artifacts)
            else:
                _answer(line, asked)


def _serve(line: _Line, first: Job, runner: Runner, artifacts: _Artifacts) -> None:
    """Train a job, and those that arrive meanwhile, until none is left."""
    running = {first.number: (first, runner(first))}
    while running:
        ready = []
        for job, epochs in list(running.values()):
            event = _advance_far(line, job, epochs)
            while isinstance(event, Ready) and event.training.head is None:  # to its end, before there is another
                event = _advance_far(line, job, epochs)
            if isinstance(event, Ready):
                ready.append(event.training)
                continue
            del running[job.number]
            if isinstance(event, Trained):
                artifacts.write(job.number, epochs)
        if len(ready) > 1:
            from caltech_sweep.training.together import train_together

            train_together(ready)
        running.update({job.number: (job, runner(job)) for job in line.jobs()})


def _advance_far(line: _Line, job: Job, epochs: Epochs) -> Event | Ready:
    """Let a job go on until it is ready for an epoch that it may train with others, or ends; its epochs are told."""
    while True:
        event = _advance_or_wait(job.number, epochs)
        if isinstance(event, (Ready, Trained)):
            return event
        line.say(event)
        if not isinstance(event, Epoch):
            return event
        if job.wait_each_epoch and not line.answer():
            epochs.close()
            line.say(Stopped(job.number))
            return Stopped(job.number)


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


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection
    device: str | None
    trains: dict[int, Job] = field(default_factory=dict)  # by number
    writes: dict[int, Job] = field(default_factory=dict)  # those before, whose artifacts it still writes
    alone: bool = False  # its job shares the device with no other
    last_seen: float = 0.0  # when it last sent something, by the executor's clock
    hung: bool = False  # it was killed because it sent nothing

    @property
    def jobs(self) -> list[int]:
        """The jobs that would end with it."""
        return [*self.writes, *self.trains]

    def room(self, at_once: int) -> int:
        """Return how many more jobs it may train, of those that train together ``at_once``."""
        if self.trains and not all(job.together for job in self.trains.values()):
            return 0
        return at_once - len(self.trains)


class ProcessExecutor:
    """Persistent worker processes, one slot each; a worker that dies is replaced.

    Workers are spawned, never forked: torch's thread pools and CUDA do not survive a fork. Each worker belongs to
    one of ``devices``, in turn. ``threads`` is torch's thread count in every worker: it is part of what decides the
    last bit of a weight on the CPU, so it must not depend on how many workers there are. A worker that sends nothing
    for ``hang_seconds`` is killed; only time in which this executor is polled counts. ``prepare`` is what each does
    before its first job. After the first epoch on a GPU its workers become as many as its memory has room for, by
    what that epoch took, but no more than ``at_most``. A worker is one slot, or so many for jobs that may train
    ``together``.
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
        together: int = 1,
    ) -> None:
        self._runner, self._threads, self._prepare = runner, threads, prepare
        self._hang_seconds, self._clock = hang_seconds, clock
        self._polled, self._at_most, self._together = clock(), at_most, together
        self._context = multiprocessing.get_context("spawn")
        chosen: list[str | None] = list(devices) if devices else [None]
        self._workers = [self._start(chosen[i % len(chosen)]) for i in range(workers)]
        self._measured: set[str | None] = set()  # devices whose memory is divided
        self._device_of: dict[int, str | None] = {}  # of every job, where it ran last
        self._held: list[Job] = []  # jobs to run alone, until the others on their device have ended
        self._waiting: list[Job] = []  # for a worker: two that died with one do

    def _start(self, device: str | None) -> _Worker:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, self._runner, self._threads, self._prepare, self._together)
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

    def _open(self) -> list[_Worker]:
        """Return the workers whose device no job has or awaits for itself: those with the fewest jobs first."""
        reserved = {worker.device for worker in self._workers if worker.trains and worker.alone}
        reserved.update(self._device_of[job.number] for job in self._held)
        return sorted((w for w in self._workers if w.device not in reserved), key=lambda w: len(w.jobs))

    def free(self) -> int:
        """Return how many more jobs may run, those included whose artifacts are written; none while one waits."""
        return 0 if self._waiting else sum(max(0, w.room(self._together) - len(w.writes)) for w in self._open())

    def free_soon(self) -> int:
        """Return how many more may be trained while the artifacts of others are written."""
        return 0 if self._waiting else sum(w.room(self._together) for w in self._open()) - self.free()

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
            there = [worker for worker in self._workers if worker.device == device]
            if not any(worker.jobs for worker in there):
                self._held.remove(job)
                # A new process: what the old ones keep on the device for themselves is given back.
                for worker in there:
                    worker.process.kill()
                    worker.process.join()
                self._send(job, there[0])
        while self._waiting:
            job = self._waiting[0]
            places = [w for w in self._open() if w.room(self._together) > 0 and (job.together or not w.trains)]
            if not places:
                break
            self._send(self._waiting.pop(0), places[0])

    def _send(self, job: Job, worker: _Worker) -> None:
        if not worker.jobs and not worker.process.is_alive():  # it died while idle
            worker = self._replace(worker)
        worker.trains[job.number] = job
        worker.alone, worker.last_seen = job.alone, self._clock()
        self._device_of[job.number] = worker.device
        with suppress(BrokenPipeError):  # it dies at this moment: the next poll says so
            worker.connection.send(replace(job, device=job.device or worker.device))

    def poll(self, timeout: float) -> list[Event]:
        """Return the events that have arrived, and kill the workers that hang: their deaths are among the next."""
        self._release()
        now = self._clock()
        for worker in self._workers:  # no poll listened since the last one
            worker.last_seen = min(now, worker.last_seen + (now - self._polled))
        by_connection = {worker.connection: worker for worker in self._workers if worker.jobs}
        ready = wait(list(by_connection), timeout)
        events = [event for each in ready for event in self._receive(by_connection[each])]  # type: ignore[index]
        self._polled = self._clock()
        for worker in self._workers:
            if worker.jobs and self._polled - worker.last_seen > self._hang_seconds:
                worker.hung = True
                worker.process.kill()
        return events

    def _receive(self, worker: _Worker) -> list[Event]:
        """Return what a worker sent, or the deaths of its jobs; nothing for a heartbeat."""
        worker.last_seen = self._clock()
        try:
            event: Event | None = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            hung = self._hang_seconds if worker.hung else None
            self._replace(worker)
            return [WorkerDied(job, worker.process.exitcode, hung) for job in worker.jobs]
        if event is None:
            return []
        if isinstance(event, Epoch):
            self._divide(worker.device, event.memory)
        elif isinstance(event, Trained):
            worker.writes[event.job] = worker.trains.pop(event.job)
        else:
            (worker.trains if event.job in worker.trains else worker.writes).pop(event.job)
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
        place = self._workers.index(worker)
        self._workers[place] = self._start(worker.device)
        return self._workers[place]

    def answer(self, job: int, go_on: bool) -> None:
        """Let the worker that waits go on or stop."""
        for worker in self._workers:
            if job in worker.trains:
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
