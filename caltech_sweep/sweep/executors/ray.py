"""Trials on a Ray cluster: persistent actors, one a slot.

Ray places the slots and says which of them have died; it retries nothing. A slot that is given up is never listened to
again, so that whatever it still does, after a pause or a cut network, reaches no store. What a trial leaves comes home
in chunks, the next one asked for when the last one is written, and is checked before its :class:`Done` is told.
"""

from __future__ import annotations

import math
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from caltech_sweep.errors import ClusterError, UsageError
from caltech_sweep.sweep.executors.base import (
    HANG_SECONDS,
    Epoch,
    Event,
    Failed,
    Job,
    Runner,
    WorkerDied,
    failure_of,
)
from caltech_sweep.sweep.executors.cluster import Demand, head_answers, leaving, nodes, other_packages, packages
from caltech_sweep.sweep.executors.luggage import Files, Luggage
from caltech_sweep.sweep.executors.node import Incoming, Left, Place, Sent, Slot
from caltech_sweep.text import one_line
from caltech_sweep.tracking.background import Background
from caltech_sweep.tracking.records import CAME_HOME, not_a_number

IDLE_SECONDS = 30.0  # after which a slot without a job is given back to the cluster
_HEAD_SECONDS = 15.0  # without the head of the cluster, after which a study ends; Ray ends the process after 60
_OWN_NODE = "this machine's node of it has ended"
_LOOK_SECONDS = 2.0  # between two looks at which nodes there are
_SEND_SECONDS = 120.0  # at most, that a node may take to send artifacts by itself, and so may the check of them
_CHECK_SECONDS = 0.1  # between two looks at checks that go on
_THREADS = 4  # of a slot: one trains, one waits for what happens, others answer and hand files over


@dataclass(frozen=True)
class _Started:
    place: Place
    node: str  # Ray's id of it


class _Actor(Slot):
    """A slot that knows its node, and is told what trains its jobs with the first one."""

    def __init__(self, threads: int | None) -> None:
        super().__init__(None, threads)

    def arrive(self, wanted: Mapping[str, str]) -> _Started:
        """Start; raise UsageError where the packages are not those that are wanted: the node may have come later."""
        if problem := other_packages(wanted):
            raise UsageError(problem)
        return _Started(self.start(), ray.get_runtime_context().get_node_id())

    def train(self, job: Job, runner: list[Any]) -> None:
        """Train a job with what Ray keeps for all slots, which is fetched once."""
        try:
            self._runner = self._runner or ray.get(runner[0])
        except Exception as error:  # of the runner itself, such as a module that this node lacks
            why = f"its worker on {socket.gethostname()} could not start ({one_line(_last_line(error), 200)})"
            self._happened.put(WorkerDied(job.number, None, why=why))
            return
        self.run(job)


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


@dataclass(frozen=True)
class _Supply:
    """The coordinator's files, as a node asks for them."""

    actor: Any

    def images(self, first: int) -> list[bytes]:
        block: list[bytes] = ray.get(self.actor.images.remote(first))
        return block

    def weights(self, digest: str, start: int) -> bytes:
        part: bytes = ray.get(self.actor.weights.remote(digest, start))
        return part


def with_supply(luggage: Luggage, weights: Mapping[str, Path]) -> Luggage:
    """Return what slots are told, with what hands out the files of this machine: ``weights`` by their SHA-256."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Files).options(num_cpus=0, max_concurrency=_THREADS, scheduling_strategy=here)
    return replace(luggage, supply=_Supply(actor.remote(luggage, weights)))


@dataclass(eq=False)
class _Slot:
    actor: Any
    awaited: Any  # what it answers next: its start, what has happened, or a chunk
    node: str = ""  # empty until it has started
    place: Place | None = None
    job: Job | None = None
    incoming: Incoming | None = None
    left: Left | None = None  # what its node sends to the tracking store by itself
    checking: Future[set[str]] | None = None  # which of that is there
    checked_from: float = 0.0
    alone: bool = False  # it is for one job, which shares its device with no other
    leaving: bool = False  # its node will be taken away
    last_seen: float = 0.0
    idle_since: float = 0.0


class RayExecutor:
    """Slots on the nodes of the Ray cluster that this process is connected to; ``runner`` may be named later.

    A slot is made when a job needs it, and given back when it was idle for ``IDLE_SECONDS``. Jobs wait here until a
    slot has started: the first one that is ready takes the first job. A slot whose node or process dies is dropped. One
    that sends nothing for ``hang_seconds`` is killed; only time in which this executor is polled counts.
    """

    def __init__(
        self,
        runner: Runner | None,
        demand: Demand,
        threads: int | None = None,
        device: str | None = None,
        hang_seconds: float = HANG_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._demand, self._threads, self._device = demand, threads, device
        self._runner: list[Any] = []  # where Ray keeps it
        self._hang_seconds, self._clock = hang_seconds, clock
        self._polled, self._packages = clock(), packages()
        self._slots: list[_Slot] = []
        self._waiting: deque[Job] = deque()
        self._node_of: dict[int, str] = {}  # of every job, where it ran last
        self._checks = Background("artifacts")
        self._nodes: tuple[float, dict[str, dict[str, float]]] = (-math.inf, {})
        self._headless_from: float | None = None  # when the head of the cluster did not answer any more
        if runner is not None:
            self.name_runner(runner)

    def name_runner(self, runner: Runner) -> None:
        """Say what trains jobs, before the first one is submitted."""
        self._runner = [ray.put(runner)]

    def warm(self) -> None:
        """Start the first slot, which imports what a training needs, before there is a job for it."""
        self._slots.append(self._start())

    # -- how many, and where -----------------------------------------------------------------------------------------

    def _alive(self) -> dict[str, dict[str, float]]:
        looked, found = self._nodes
        if self._clock() - looked > _LOOK_SECONDS:
            if self._has_head():
                found = nodes()
                self._leave(leaving())
            self._nodes = (self._clock(), found)
        return found

    def _has_head(self) -> bool:
        """Return whether the cluster's head answers; raise ClusterError once it has not for ``_HEAD_SECONDS``."""
        if head_answers():
            self._headless_from = None
            return True
        if self._headless_from is None:
            self._headless_from = self._clock()
        elif self._clock() - self._headless_from > _HEAD_SECONDS:
            raise self._gone(f"its head node has not answered for {_HEAD_SECONDS:g} s")
        return False

    def _gone(self, why: str) -> ClusterError:
        self._slots.clear()  # which end by themselves; no cluster is there to be asked
        return ClusterError(
            f"the Ray cluster is lost ({why}); start Ray again, then run the same command: it goes on with what is "
            "missing"
        )

    def _leave(self, going: set[str]) -> None:
        """Give up the slots on nodes that will be taken away; their jobs stop with their next epoch."""
        for slot in [slot for slot in self._slots if slot.node in going and not slot.leaving]:
            slot.leaving = True
            if slot.job is None:
                self._drop(slot)
            else:
                slot.actor.leave.remote()

    def _most(self) -> int:
        if self._demand.slots is not None:
            return self._demand.slots
        return max(1, sum(map(self._demand.fits, self._alive().values())))

    def _reserved(self) -> set[str]:
        """Return the nodes that a job has, or awaits, for itself."""
        having = {slot.node for slot in self._slots if slot.alone}
        return having | {self._node_of.get(job.number, "") for job in self._waiting if job.alone}

    def free(self) -> int:
        """Return how many more jobs may run; while one needs its device to itself, only slots elsewhere are free."""
        if reserved := self._reserved():
            elsewhere = sum(slot.job is None and slot.node not in reserved | {""} for slot in self._slots)
            return max(0, elsewhere - sum(not job.alone for job in self._waiting))
        return max(0, self._most() - len(self._waiting) - sum(slot.job is not None for slot in self._slots))

    def free_soon(self) -> int:
        """Return 0: what a job leaves comes home before its slot takes another one."""
        return 0

    def submit(self, job: Job) -> None:
        """Run a job in the first slot that is ready; one to run alone waits until the others on its node have ended."""
        self._waiting.append(replace(job, device=job.device or self._device))
        self._place()

    def _place(self) -> None:
        """Give the jobs that wait to the slots that are ready, and make slots for the others."""
        for job in [job for job in self._waiting if job.alone]:
            self._place_alone(job)
        reserved = self._reserved()
        jobs = [job for job in self._waiting if not job.alone]
        ready = [s for s in self._slots if s.place is not None and s.job is None and not (s.alone or s.leaving)]
        for job, slot in zip(jobs, (slot for slot in ready if slot.node not in reserved), strict=False):
            self._waiting.remove(job)
            self._run(slot, job)
        starting = [slot for slot in self._slots if slot.place is None and not slot.alone]
        missing = sum(not job.alone for job in self._waiting) - len(starting)
        for slot in starting[: max(0, -missing)]:  # others were free first
            self._drop(slot)
        for _ in range(0 if reserved else max(0, min(missing, self._most() - len(self._slots)))):
            self._slots.append(self._start())

    def _place_alone(self, job: Job) -> None:
        """Make a slot for a job on the node that it ran on, once no other one is there: a new process on whole GPUs."""
        node = self._node_of.get(job.number, "")
        mine = [slot for slot in self._slots if slot.alone and slot.job is None and slot.node in ("", node)]
        if mine and mine[0].place is not None:
            self._waiting.remove(job)
            self._run(mine[0], job)
        elif not mine and all(slot.job is None for slot in self._slots if slot.node in ("", node)):
            for slot in [slot for slot in self._slots if slot.node in ("", node)]:
                self._drop(slot)
            self._slots.append(self._start(node, alone=True))

    def _start(self, node: str = "", alone: bool = False) -> _Slot:
        gpus = math.ceil(self._demand.gpus) if alone else self._demand.gpus
        there = NodeAffinitySchedulingStrategy(node, soft=False) if node in self._alive() else None
        actor: Any = (
            ray.remote(_Actor)
            .options(
                num_cpus=self._demand.cpus,
                num_gpus=gpus,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=_THREADS,
                scheduling_strategy=there,
            )
            .remote(self._threads)
        )
        return _Slot(actor, actor.arrive.remote(self._packages), alone=alone)

    def _run(self, slot: _Slot, job: Job) -> None:
        slot.job, slot.last_seen = job, self._clock()
        self._node_of[job.number] = slot.node
        slot.actor.train.remote(job, self._runner)

    def _drop(self, slot: _Slot) -> None:
        """Give a slot up: nothing that it sends is heard any more."""
        self._slots.remove(slot)
        if slot.incoming is not None:
            slot.incoming.close()
        with suppress(RayError):
            ray.kill(slot.actor)

    # -- what happens ------------------------------------------------------------------------------------------------

    def poll(self, timeout: float) -> list[Event]:
        """Return the events that have arrived; slots that hang are killed, those that are idle for long given back."""
        self._alive()
        self._place()
        now = self._clock()
        for slot in self._slots:  # no poll listened since the last one
            slot.last_seen = min(now, slot.last_seen + (now - self._polled))
        events = [event for slot in self._answered(timeout) for event in self._receive(slot)]
        events += [event for slot in list(self._slots) if slot.checking is not None for event in self._checked(slot)]
        self._polled = self._clock()
        for slot in list(self._slots):
            if slot.job is not None and self._polled - slot.last_seen > self._hang_seconds:
                events.append(WorkerDied(slot.job.number, None, self._hang_seconds))
                self._drop(slot)
            elif slot.job is None and slot.place is not None and self._polled - slot.idle_since > IDLE_SECONDS:
                self._drop(slot)
        self._place()
        return events

    def _answered(self, timeout: float) -> list[_Slot]:
        awaited = {slot.awaited: slot for slot in self._slots if slot.checking is None}
        if len(awaited) < len(self._slots):
            timeout = min(timeout, _CHECK_SECONDS)
        if not awaited:
            time.sleep(min(timeout, 0.1))
            return []
        try:
            ready, _ = ray.wait(list(awaited), timeout=timeout)
            if ready:
                ready, _ = ray.wait(list(awaited), num_returns=len(awaited), timeout=0)
        except OSError as error:  # a broken pipe to this machine's own node
            raise self._gone(_OWN_NODE) from error
        return [awaited[each] for each in ready]

    def _receive(self, slot: _Slot) -> list[Event]:
        """Take what a slot has answered."""
        if slot not in self._slots:
            return []
        try:
            answer = ray.get(slot.awaited)
        except RayError as error:
            return self._lost(slot, error)
        except OSError as error:
            raise self._gone(_OWN_NODE) from error
        slot.last_seen = slot.idle_since = self._clock()
        if isinstance(answer, _Started):
            slot.place, slot.node = answer.place, answer.node
            return self._listen(slot)
        if isinstance(answer, Sent):
            return self._sent(slot, answer)
        if isinstance(answer, bytes):
            return self._arrived(slot, answer)
        events: list[Event] = []
        for event in answer:
            if isinstance(event, Left):
                return events + self._begin(slot, event)
            if isinstance(event, Epoch) and slot.place is not None:
                events.append(replace(event, host=slot.place.host))
            elif event is not None:
                events.append(event)
                self._end(slot)
        return events + self._listen(slot)

    def _listen(self, slot: _Slot) -> list[Event]:
        """Wait for what a slot says next; also of an idle one, which may die."""
        slot.awaited = slot.actor.listen.remote()
        return []

    def _end(self, slot: _Slot) -> None:
        if slot.incoming is not None:
            slot.incoming.close()
        slot.job, slot.incoming, slot.left, slot.checking = None, None, None, None
        if slot.alone or slot.leaving:
            self._drop(slot)

    def _begin(self, slot: _Slot, left: Left) -> list[Event]:
        assert slot.job is not None
        if slot.job.upload is None or not_a_number(left.done.metrics):  # no checkpoint of what is no number
            return self._bring(slot, left)
        slot.left = left
        slot.awaited = slot.actor.send.remote(slot.job.number, left.files, slot.job.upload, self._patience)
        return []

    @property
    def _patience(self) -> float:
        return min(_SEND_SECONDS, self._hang_seconds / 2)

    def _sent(self, slot: _Slot, sent: Sent) -> list[Event]:
        """Look whether what a node has sent to the tracking store is there, while other slots go on."""
        assert slot.job is not None and slot.job.upload is not None and slot.left is not None
        if sent.why:
            done = slot.left.done
            slot.left = replace(slot.left, done=replace(done, tags={**done.tags, CAME_HOME: sent.why}))
        files = {file.path: (file.size, file.digest) for file in slot.left.files if file.path in sent.paths}
        if not files:
            return self._bring(slot, slot.left)
        slot.checking, slot.checked_from = self._checks.submit(partial(slot.job.upload.confirmed, files)), self._clock()
        return []

    def _checked(self, slot: _Slot) -> list[Event]:
        """Bring home what was not found at the tracking store."""
        assert slot.checking is not None and slot.left is not None
        slot.last_seen = self._clock()
        if not slot.checking.done() and self._clock() - slot.checked_from < self._patience:
            return []
        there: set[str] = set()
        if slot.checking.done() and slot.checking.exception() is None:
            there = slot.checking.result()
        slot.checking = None
        return self._bring(slot, replace(slot.left, files=tuple(f for f in slot.left.files if f.path not in there)))

    def _bring(self, slot: _Slot, left: Left) -> list[Event]:
        """Bring home what a job left."""
        assert slot.job is not None
        slot.incoming = Incoming(left, slot.job.folder)
        return self._fetch(slot)

    def _fetch(self, slot: _Slot) -> list[Event]:
        """Ask for the next chunk of what a job left, or end the job."""
        assert slot.job is not None and slot.incoming is not None
        try:
            wanted = slot.incoming.next()
        except OSError as error:
            return self._spoilt(slot, failure_of(slot.job.number, error))
        if wanted is None:
            done = slot.incoming.done
            self._end(slot)
            return [done, *self._listen(slot)]
        slot.awaited = slot.actor.chunk.remote(slot.job.number, wanted[0].path, wanted[1])
        return []

    def _arrived(self, slot: _Slot, chunk: bytes) -> list[Event]:
        assert slot.job is not None and slot.incoming is not None
        try:
            problem = slot.incoming.take(chunk)
        except OSError as error:
            return self._spoilt(slot, failure_of(slot.job.number, error))
        if problem:
            return self._spoilt(slot, WorkerDied(slot.job.number, None, why=problem))
        return self._fetch(slot)

    def _spoilt(self, slot: _Slot, event: Event) -> list[Event]:
        self._end(slot)
        return [event, *self._listen(slot)]

    def _lost(self, slot: _Slot, error: RayError) -> list[Event]:
        """Drop a slot that answers with an error; one that has never started counts against a job that waits."""
        self._drop(slot)
        job = slot.job
        if job is None and slot.place is None:
            job = next((each for each in self._waiting if each.alone == slot.alone), None)
            if job is not None:
                self._waiting.remove(job)
        if job is None:
            return []
        host = slot.place.host if slot.place is not None else ""
        if isinstance(error, OutOfMemoryError):
            why = f"Ray ended its worker since {host or 'its node'} ran low on memory"
            fix = "lower batch_size, or raise --cpus-per-trial"
            return [Failed(job.number, "out_of_memory", f"{why}; {fix}")]
        return [WorkerDied(job.number, None, why=self._cause(slot, host, error))]

    def _cause(self, slot: _Slot, host: str, error: RayError) -> str:
        node, on = f"its node {host}".strip(), f" on {host}" if host else ""
        if isinstance(error, RayTaskError) or slot.place is None and "creation task" in str(error):
            return f"its worker{on} could not start ({one_line(_last_line(error), 200)})"
        if isinstance(error, RayActorError) and error.preempted:
            return f"{node} was taken back"
        if isinstance(error, ActorUnavailableError):
            return f"{node} does not answer"
        gone = "its node has died" in str(error) or (slot.node and head_answers() and slot.node not in nodes())
        return f"{node} left the cluster" if gone else f"its worker process{on} ended"

    def answer(self, job: int, go_on: bool) -> None:
        """Let the slot that waits go on or stop."""
        for slot in self._slots:
            if slot.job is not None and slot.job.number == job:
                slot.actor.answer.remote(go_on)

    @property
    def places(self) -> dict[int, Place]:
        """Where each running job is."""
        return {slot.job.number: slot.place for slot in self._slots if slot.job is not None and slot.place is not None}

    def close(self) -> None:
        """End every slot at once."""
        self._waiting.clear()
        for slot in list(self._slots):
            self._drop(slot)
