"""The Ray cluster that trials run on: one that was named, or a private one on this machine that ends with the run."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caltech_sweep import machine
from caltech_sweep.errors import UsageError
from caltech_sweep.files import locked_directory, remove_abandoned
from caltech_sweep.sweep.executors.processes import unstopped
from caltech_sweep.text import counted, one_line

try:
    import ray
    import ray._private.state
    import ray._private.worker
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise UsageError(
        "--executor ray: Ray is not installed here; install it with: pip install 'caltech-sweep[ray]'"
    ) from error

_FOLDER = "cs-ray-"  # of a private cluster; short, since the names of its sockets may have 107 characters
_STORE_BYTES = 256 << 20  # shared memory of a private cluster, for what travels
_ANSWER_SECONDS = 5.0  # that a cluster has to take a connection
_HEAD_ANSWER_SECONDS = 1.0  # that its head has, while a study runs
_PROBE_SECONDS = 90.0  # that a node has to start a process and answer
_VERSIONS = re.compile(r"Ray: (\S+)\s+Python: (\S+)")


@dataclass(frozen=True)
class Demand:
    """What each trial asks of its node, and how many may run at once; None: as many as the cluster has room for."""

    cpus: float
    gpus: float
    slots: int | None = None

    def fits(self, node: dict[str, float]) -> int:
        """Return how many trials a node with these resources has room for at once."""
        asked = (("CPU", self.cpus), ("GPU", self.gpus))
        return min((int(node.get(kind, 0.0) / each + 1e-9) for kind, each in asked if each), default=0)

    def room(self) -> tuple[int, str]:
        """Return how many trials the cluster has room for, and, where that is none, a sentence about what it has."""
        known = nodes()
        if room := sum(map(self.fits, known.values())):
            return room, ""
        sizes = Counter((int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in known.values())
        has = "; ".join(
            f"{counted(count, 'node')} with {counted(cpus, 'CPU')} and {counted(gpus, 'GPU')}"
            for (cpus, gpus), count in sorted(sizes.items())
        )
        return 0, (
            f"no node of the Ray cluster has the {self.cpus:g} CPUs and {self.gpus:g} GPUs of a trial; it has {has}"
        )


def leaving() -> set[str]:
    """Return the ids of the nodes that the cluster has notice of that they will be taken away."""
    return set(ray._private.state.state.get_draining_nodes())


def nodes() -> dict[str, dict[str, float]]:
    """Return the resources of every node that is alive and stays, by its id."""
    known = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    return {node: known[node] for node in known.keys() - leaving()}


@contextmanager
def connected(
    address: str | None = None,
    slots: int | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    threads: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[Demand, int]]:
    """Connect this process to the cluster at ``address``, or to a private one on this machine that is then ended.

    Yields what each trial asks of it, and torch's thread count there. A trial has a GPU where the cluster has any, and
    otherwise as many CPUs as threads, or a whole node. Raises UsageError where no cluster answers, where it is one of
    another version, or where no node has room for a trial.
    """
    with ExitStack() as stack:
        options: dict[str, Any] = {"address": address}
        if address is None:
            cpus = cpus or float(threads or machine.threads())
            options = _private(stack, cpus * (slots or 1))
        else:
            _check_answers(address)
        # What Ray prints of each worker and node that dies is told in our own words.
        ray._private.worker.print_worker_logs = lambda *arguments: None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        stack.callback(ray.shutdown)
        before = signal.getsignal(signal.SIGTERM)
        try:
            with unstopped():  # nor is a private cluster, by what stops a whole group of processes
                ray.init(**options, log_to_driver=False, logging_level=logging.CRITICAL)
        except Exception as error:  # of many kinds, most of them Ray's own
            raise refused(address, error) from error
        finally:
            signal.signal(signal.SIGTERM, before)  # Ray has one of its own
        if address is None:
            _end_whole(ray._private.worker._global_node)
        demand = _demand(slots, cpus, gpus, threads)
        room, lack = demand.room()
        if lack and (address is None or slots is None):
            hint = "" if address is None else "; if it grows on demand, name --slots, and trials wait for it"
            raise UsageError(f"--cpus-per-trial, --gpus-per-trial: {lack}{hint}")
        if lack:
            note(f"{lack}; trials wait until it has grown")
        elif slots is not None and room < slots:
            note(f"the Ray cluster has room for {room} of {slots} slots now; the others start when it grows")
        yield demand, threads or max(1, int(demand.cpus))


def _end_whole(node: Any) -> None:
    """Let a private node end with all its processes: they wait for no SIGTERM, and two outlive its raylet for minutes.

    These are agents that tell a head which is gone that their raylet is.
    """
    import psutil  # Ray's own, which can be imported once Ray is

    kill = node.kill_all_processes

    def end(**_: Any) -> None:
        own = [started.process.pid for kind in node.all_processes.values() for started in kind]
        below = [child for pid in own if psutil.pid_exists(pid) for child in psutil.Process(pid).children(True)]
        kill(check_alive=False)
        for child in below:
            with suppress(psutil.Error):
                child.kill()

    node.kill_all_processes = end


def head_answers() -> bool:
    """Return whether the head node of the cluster takes a connection."""
    try:
        _knock(ray.get_runtime_context().gcs_address, _HEAD_ANSWER_SECONDS)
    except OSError:
        return False
    return True


def _knock(address: str, seconds: float) -> None:
    """Raise OSError where nothing takes a connection at HOST:PORT within some seconds."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), seconds).close()


def _private(stack: ExitStack, cpus: float) -> dict[str, Any]:
    place = Path("/tmp" if os.name == "posix" else tempfile.gettempdir())
    remove_abandoned(place, _FOLDER)
    return {
        "address": "local",
        "num_cpus": max(machine.cores(), math.ceil(cpus)),
        "object_store_memory": _STORE_BYTES,
        "include_dashboard": False,
        "_system_config": {"worker_niceness": 0},  # trials are no background work
        "_temp_dir": str(stack.enter_context(locked_directory(place, _FOLDER))),
    }


def _demand(slots: int | None, cpus: float | None, gpus: float | None, threads: int | None) -> Demand:
    known = nodes().values()
    if gpus is None:
        gpus = float(any(node.get("GPU") for node in known))
    if cpus is None:
        whole = min((node["CPU"] for node in known if node.get("CPU")), default=1.0)
        cpus = float(threads or (1 if gpus else whole))
    return Demand(cpus, gpus, slots)


PACKAGES = ("caltech-sweep", "torch", "torchvision", "pillow", "numpy")  # that decide the bits of a result


def packages() -> dict[str, str]:
    """Return the versions of what decides the bits of a result here."""
    from importlib.metadata import version

    return {name: version(name) for name in PACKAGES}


def other_packages(wanted: Mapping[str, str]) -> str:
    """Return a sentence where this machine has other versions than are wanted."""
    for name, version in packages().items():
        if version != wanted[name]:
            return (
                f"the node {socket.gethostname()} has {name} {version}, and the coordinator {wanted[name]}; install "
                "the same version on every machine"
            )
    return ""


def check_packages() -> None:
    """Raise UsageError for a node with other packages than this machine: its results might be others."""
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    asked, ours = {}, packages()
    for node, resources in nodes().items():
        if resources.get("CPU"):
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            task = ray.remote(other_packages).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked[node] = task.remote(ours)
    for node, answer in asked.items():
        try:
            problem: str = ray.get(answer, timeout=_PROBE_SECONDS)
        except RayTaskError as error:
            last = str(error).strip().splitlines()[-1]
            raise UsageError(
                f"--executor ray: the node {hosts[node]} cannot run trials ({one_line(last, 200)}); install "
                f"caltech-sweep {ours['caltech-sweep']} on it as it is here"
            ) from error
        except RayError:  # the node has died, or is dying: nothing will start there
            continue
        if problem:
            raise UsageError(f"--executor ray: {problem}")


def _check_answers(address: str) -> None:
    """Raise UsageError where nothing takes a connection: Ray would try for a minute, with pages of output."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise UsageError(
            f"--address: {address!r} is not the HOST:PORT of a Ray head node; this machine has to be a node of its "
            "cluster, too: ray start --address=HOST:PORT --num-cpus=0"
        )
    try:
        _knock(address, _ANSWER_SECONDS)
    except OSError as error:
        raise UsageError(
            f"--address: no Ray cluster answers at {address} ({error.strerror or error}); start its head node with "
            "ray start --head, or name another address"
        ) from error


def refused(address: str | None, error: Exception) -> UsageError:
    where = "a private Ray cluster could not be started" if address is None else f"--address: the Ray cluster {address}"
    versions = _VERSIONS.findall(str(error))
    if len(versions) == 2:
        (theirs, their_python), (ours, our_python) = versions
        return UsageError(
            f"{where} runs Ray {theirs} on Python {their_python}, and this is Ray {ours} on Python {our_python}; "
            "install the same versions on every machine"
        )
    why = one_line(str(error), 200)
    if address is None:
        return UsageError(f"--executor ray: {where} ({why})")
    return UsageError(
        f"{where} cannot be joined ({why}); this machine has to be one of its nodes: "
        f"ray start --address={address} --num-cpus=0"
    )
