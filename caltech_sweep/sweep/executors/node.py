"""What a slot of a cluster does on its node: it trains one job after the other, and hands over what they leave.

Nothing here knows Ray: a slot is an object whose methods are called from outside, each in a thread of its own.
"""

from __future__ import annotations

import hashlib
import os
import queue
import shutil
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from caltech_sweep.files import file_digest, locked_directory, remove_abandoned
from caltech_sweep.heartbeat import beating, leaving
from caltech_sweep.sweep.executors.base import (
    Done,
    Epoch,
    Event,
    Job,
    Runner,
    Stopped,
    Trained,
    WorkerDied,
    _advance,
    failure_of,
)
from caltech_sweep.sweep.executors.worker import prepare
from caltech_sweep.tracking.direct import Destination

CHUNK = 8 << 20  # bytes that travel at once
_SCRATCH = "caltech-sweep-node-"  # the folder of what trials leave on a node, until the coordinator has it


@dataclass(frozen=True)
class Place:
    """Where a slot is: its machine, and its process there."""

    host: str
    pid: int


@dataclass(frozen=True)
class LeftFile:
    """A file that a job left: its path in the job's folder, its bytes, and its SHA-256."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Left:
    """A job that ran to its end on a node, whose files are still there."""

    done: Done
    files: tuple[LeftFile, ...]


@dataclass(frozen=True)
class Sent:
    """Which files of a job the tracking store took from its node, and why it is not all of them."""

    paths: tuple[str, ...]
    why: str


class Incoming:
    """The files of one job on their way home; raises OSError when they cannot be written."""

    def __init__(self, left: Left, folder: Path) -> None:
        self.done, self._folder = left.done, folder
        self._files = deque(left.files)
        self._open: BinaryIO | None = None
        self._sum = hashlib.sha256()

    def next(self) -> tuple[LeftFile, int] | None:
        """Return the file, and where in it, that the next chunk is of; None when all are here."""
        if not self._files:
            return None
        if self._open is None:
            target = self._folder / self._files[0].path
            target.parent.mkdir(parents=True, exist_ok=True)
            self._open, self._sum = target.open("wb"), hashlib.sha256()
        return self._files[0], self._open.tell()

    def take(self, chunk: bytes) -> str:
        """Write a chunk; return what is wrong with its file, if it is whole and is not the one that was left."""
        assert self._open is not None
        file = self._files[0]
        self._open.write(chunk)
        self._sum.update(chunk)
        if chunk and self._open.tell() < file.size:
            return ""
        self.close()
        self._files.popleft()
        return "" if self._sum.hexdigest() == file.digest else f"{file.path} did not arrive as it was sent"

    def close(self) -> None:
        """Write nothing more."""
        if self._open is not None:
            self._open.close()
            self._open = None


class Slot:
    """A place for one job at a time, in a process of its own on some node.

    ``threads`` is torch's thread count, which decides the last bit of a sum. ``run`` trains in the thread that calls
    it; meanwhile ``listen`` returns what has happened.
    """

    def __init__(self, runner: Runner | None, threads: int | None) -> None:
        self._runner, self._threads = runner, threads
        self._happened: queue.SimpleQueue[Event | Left | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._open = ExitStack()
        place = Path(tempfile.gettempdir())
        remove_abandoned(place, _SCRATCH)
        self._folder = self._open.enter_context(locked_directory(place, _SCRATCH))

    def start(self) -> Place:
        """Say where this is; what a training imports is imported meanwhile."""
        if self._threads is not None:
            prepare()
        return Place(socket.gethostname(), os.getpid())

    def run(self, job: Job) -> None:
        """Train a job; what happens is told by :meth:`listen`."""
        try:
            self._train(job)
        except Exception as error:  # of the slot itself, such as a full disk
            self._happened.put(failure_of(job.number, error))

    def _train(self, job: Job) -> None:
        if self._threads is not None:
            import torch

            torch.set_num_threads(self._threads)
        for place in self._folder.iterdir():  # of earlier jobs
            shutil.rmtree(place)
        folder = self._folder / str(job.number)
        folder.mkdir()
        assert self._runner is not None
        epochs = self._runner(replace(job, folder=folder))
        going_on, wanted = True, True
        while going_on:
            moving = leaving.is_set()  # before the epoch whose state is then saved
            with beating(lambda: self._happened.put(None)):
                event = _advance(job.number, epochs)
                if isinstance(event, Trained):
                    event = _advance(job.number, epochs)
                told = Left(event, tuple(_files(folder))) if isinstance(event, Done) else event
            self._happened.put(told)
            if going_on := isinstance(event, Epoch):
                wanted = not job.wait_each_epoch or self._answers.get()
                going_on = wanted and (event.last or not moving)
        if isinstance(event, Epoch):
            epochs.close()
            why = f"its node {socket.gethostname()} will be taken away"
            self._happened.put(WorkerDied(job.number, None, why=why, moved=True) if wanted else Stopped(job.number))

    def leave(self) -> None:
        """Let the job end with its next epoch, and save its state: this machine will be taken away."""
        leaving.set()

    def listen(self) -> list[Event | Left | None]:
        """Wait for something to happen, and return all that has; None is a heartbeat."""
        happened = [self._happened.get()]
        while not self._happened.empty():
            happened.append(self._happened.get())
        return happened

    def answer(self, go_on: bool) -> None:
        """Let a job that waits train its next epoch, or stop."""
        self._answers.put(go_on)

    def send(self, job: int, files: Sequence[LeftFile], to: Destination, seconds: float) -> Sent:
        """Send what a job left to the tracking store, for some seconds, or until it refuses a file."""
        folder, taken, problems = self._folder / str(job), list[str](), list[str]()

        def work() -> None:
            for file in files:
                if problem := to.take(folder / file.path, file.path, file.digest):
                    problems.append(problem)
                    return
                taken.append(file.path)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(seconds)
        slow = f"the tracking store did not take all within {seconds:g} s" if thread.is_alive() else ""
        return Sent(tuple(taken), slow or " ".join(problems))

    def chunk(self, job: int, path: str, start: int) -> bytes:
        """Return a part of a file that a job left."""
        with (self._folder / str(job) / path).open("rb") as file:
            file.seek(start)
            return file.read(CHUNK)


def _files(folder: Path) -> list[LeftFile]:
    return [
        LeftFile(path.relative_to(folder).as_posix(), path.stat().st_size, file_digest(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
