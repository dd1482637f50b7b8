"""Ray clusters on this machine: a head without processors, and nodes that each have a data folder of their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers import chaos

TESTS = Path(__file__).resolve().parent.parent


@contextmanager
def cluster_of(folder: Path, nodes: int, **system: Any) -> Iterator[Any]:
    """Yield a ``ray.cluster_utils.Cluster`` with so many nodes of one CPU; ``folder`` holds what they keep.

    Their processes can import the tests. ``system`` are settings of Ray itself.
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
        head = {"num_cpus": 0, "include_dashboard": False, **({"_system_config": system} if system else {})}
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
    return cluster.add_node(env_vars={"CALTECH_SWEEP_DATA": str(data)}, **{"num_cpus": 1, **resources})


def reports(study: str) -> str:
    """Return a study's report in the current folder as JSON and Markdown, without its name and the ids of runs."""
    return chaos.read_reports(chaos.Place(Path.cwd()), chaos.report_in_process, study)
