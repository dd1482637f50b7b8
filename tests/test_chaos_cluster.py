"""A study on a Ray cluster whose nodes, workers and coordinator are killed; ``make chaos-cluster`` is the long form."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from helpers import chaos, chaos_cluster
from helpers.clusters import cluster_of


@pytest.mark.slow
def test_a_study_whose_node_worker_and_coordinator_are_killed_reports_what_one_machine_does(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    reference = chaos_cluster.on_one_machine(tmp_path / "one", 5, 3)
    with cluster_of(tmp_path / "nodes", 2) as cluster:
        nodes = chaos_cluster.Nodes(cluster, tmp_path / "nodes")
        place = chaos.furnish(tmp_path / "many", chaos.INDEPENDENT, 5, 3)
        events = chaos_cluster.one_round(place, nodes, random.Random(1), 2, ("node", "worker"))
        assert events["node"] + events["worker"] >= 1, place.log.read_text()
        assert chaos_cluster.problems_of(place, 5, reference) == [], place.log.read_text()
