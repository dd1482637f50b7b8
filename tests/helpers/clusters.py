"""Ray clusters on this machine: a head without processors, and nodes that each have a data folder of their own.

A node is one of this process, or as of another machine: in a network name space, whose link can be cut.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers import chaos

TESTS = Path(__file__).resolve().parent.parent
# A node is dead after about five seconds without an answer.
QUICK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}


@contextmanager
def cluster_of(folder: Path, nodes: int, address: str | None = None, **system: Any) -> Iterator[Any]:
    """Yield a ``ray.cluster_utils.Cluster`` with so many nodes of one CPU; ``folder`` holds what they keep.

    Its head is at ``address``. Their processes can import the tests. ``system`` are settings of Ray itself.
    """
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    short = Path(tempfile.mkdtemp(dir="/tmp", prefix="cs-test-"))  # the names of sockets have 107 characters at most
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(short))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # or workers starve next to other tests
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.delenv("RAY_ADDRESS", raising=False)
        head: dict[str, Any] = {"num_cpus": 0, "include_dashboard": False}
        head |= {"node_ip_address": address} if address else {}
        head |= {"_system_config": system} if system else {}
        with same_handler():
            cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for number in range(nodes):
                add_node(cluster, folder / f"node-{number}")
            yield cluster
        finally:
            cluster.shutdown()
            shutil.rmtree(short, ignore_errors=True)


def add_node(cluster: Any, data: Path, **resources: Any) -> Any:
    """Add a node whose data folder is ``data``."""
    data.mkdir(parents=True, exist_ok=True)
    with same_handler():
        return cluster.add_node(env_vars={"CALTECH_SWEEP_DATA": str(data)}, **{"num_cpus": 1, **resources})


@contextmanager
def same_handler() -> Iterator[None]:
    """Let Ray take no signal of the tests' process."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def reports(study: str) -> str:
    """Return a study's report in the current folder as JSON and Markdown, without its name and the ids of runs."""
    return chaos.read_reports(chaos.Place(Path.cwd()), chaos.report_in_process, study)


@dataclass
class FarNode:
    """A node with a network of its own, as ``ray start`` makes it on another machine; all of it is one session."""

    cluster: Any
    address: str
    link: str  # to the head
    process: subprocess.Popen[bytes]

    @property
    def alive(self) -> bool:
        """Whether the cluster says so."""
        table = self.cluster.global_state.node_table()
        return any(node["Alive"] for node in table if node["NodeManagerAddress"] == self.address)

    def pids(self, pattern: str = ".") -> list[int]:
        """Return the processes of it that are left."""
        found = subprocess.run(["pgrep", "-s", str(self.process.pid), "-f", pattern], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every process of it, as to all of a machine."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self) -> None:
        """End it as a power cut does."""
        while self.process.poll() is None or self.pids():
            self.send(signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)

    def cut(self, healed: bool = False) -> None:
        """Cut its network, or heal it."""
        ip("link", "set", self.link, "up" if healed else "down")

    def wait(self, alive: bool, seconds: float = 120) -> None:
        """Wait until the cluster says that it is alive, or that it is not."""
        end = time.monotonic() + seconds
        while self.alive != alive:
            assert time.monotonic() < end, f"node {self.address} is not {'alive' if alive else 'dead'}"
            time.sleep(0.2)


def ip(*arguments: str) -> None:
    """Change the network of this machine."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Network:
    """A bridge of this machine; each node that joins has a link to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # of what its nodes keep
        self.name, self.prefix = f"cs{os.getpid()}", f"10.231.{os.getpid() % 256}"
        self.nodes: list[FarNode] = []

    @property
    def address(self) -> str:
        """Where this process is in it."""
        return f"{self.prefix}.1"

    def join(self, cluster: Any) -> FarNode:
        """Start a node with one CPU and a data folder of its own; it is not waited for."""
        number = len(self.nodes) + 2
        data = self.folder / f"node-{number}"
        link, address = f"{self.name}-{number}", f"{self.prefix}.{number}"
        ip("netns", "add", link)
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", link)
        ip("link", "set", link, "master", self.name, "up")
        ip("-n", link, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", link, "link", "set", "eth0", "up")
        ip("-n", link, "link", "set", "lo", "up")
        data.mkdir(parents=True, exist_ok=True)
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={cluster.address}"]
        start += [f"--node-ip-address={address}", "--num-cpus=1", "--object-store-memory=100000000"]
        with (data / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", link, *start],
                env={**os.environ, "CALTECH_SWEEP_DATA": str(data)},
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",  # which stays
            )
        self.nodes.append(FarNode(cluster, address, link, process))
        return self.nodes[-1]


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    """Yield a network that ends, with the nodes in it, when the block does; skips where none can be made."""
    made = Network(folder)
    try:
        ip("link", "add", made.name, "type", "bridge")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network can be made here")
    try:
        ip("addr", "add", f"{made.address}/24", "dev", made.name)
        ip("link", "set", made.name, "up")
        yield made
    finally:
        for node in made.nodes:
            node.end()
            ip("netns", "del", node.link)
        ip("link", "del", made.name)
