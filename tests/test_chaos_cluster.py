"""A study on a Ray cluster whose nodes, servers and coordinator fail; ``make chaos-cluster`` is the long form."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from helpers import chaos_cluster


@pytest.mark.slow
def test_a_study_whose_nodes_servers_and_coordinator_fail_reports_what_one_machine_does(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    reference = chaos_cluster.on_one_machine(tmp_path / "one", 8, 30)
    with chaos_cluster.world(tmp_path, 2) as made:
        place = made.study("short", 8, 30)
        events = chaos_cluster.one_round(made, place, random.Random(1), 4, ("cut", "worker", "database"))
        assert sum(events.values()) >= 2, place.log.read_text()
        assert chaos_cluster.problems_of(made, place, 8, reference) == [], place.log.read_text()
