"""Kill nodes, workers and the coordinator of a study on a Ray cluster; its report stays that of one machine.

    python tests/helpers/chaos_cluster.py --events 60 --seed 0

The cluster is three raylets on this machine, each with a data folder of its own; training states go to a folder that
all see. Each launch of the command meets up to two of these: a node that is killed without grace and replaced, a worker
that gets SIGKILL, one that is stopped for a moment or past the time-out of a hang, and wakes. Then the coordinator gets
SIGKILL, and the same command goes on. A study is finished undisturbed, its stores checked and its report compared.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import chaos
from helpers.clusters import add_node, cluster_of

KINDS = ("node", "worker", "moment", "hang")
HANG = 30  # seconds of silence, the least that --hang-timeout takes
A_ROUND = 20  # events that one study meets at most


class Nodes:
    """The nodes of a cluster, which are replaced when they are killed."""

    def __init__(self, cluster: Any, folder: Path) -> None:
        self.cluster, self.folder, self.made = cluster, folder, 0

    def workers(self) -> list[int]:
        """Return the ids of the processes that train."""
        raylets = [str(node.all_processes["raylet"][0].process.pid) for node in self.cluster.worker_nodes]
        found = subprocess.run(["pgrep", "-P", ",".join(raylets), "-f", "^ray::_Actor"], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def kill_one(self, chance: random.Random) -> None:
        """Kill a node as a power cut does, and add another one."""
        node = chance.choice(sorted(self.cluster.worker_nodes, key=lambda each: each.node_id))
        self.cluster.remove_node(node, allow_graceful=False)
        self.made += 1
        add_node(self.cluster, self.folder / f"replacement-{self.made}")


def disturb(kind: str, nodes: Nodes, chance: random.Random) -> bool:
    """Do one thing to the cluster; return whether there was anything to do it to."""
    if kind == "node":
        nodes.kill_one(chance)
        return True
    workers = nodes.workers()
    if not workers:
        return False
    pid = chance.choice(sorted(workers))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL if kind == "worker" else signal.SIGSTOP)
        if kind != "worker":
            time.sleep(chance.uniform(0.1, 2) if kind == "moment" else HANG + 10)
            os.kill(pid, signal.SIGCONT)
    return True


def launch(place: chaos.Place, address: str) -> subprocess.Popen[bytes]:
    """Start the command in a process group of its own."""
    states = str(place.folder / "states")
    more = ("--executor", "ray", "--address", address, "--hang-timeout", str(HANG), "--cache", states)
    with place.log.open("ab") as out:
        return subprocess.Popen(
            chaos.command(*place.run(*more)),
            cwd=place.folder,
            env=place.environment(),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def wait(process: subprocess.Popen[bytes], seconds: float, log: Path | None = None, word: str = "") -> None:
    """Wait until the process has ended, or has said a word since it began."""
    start = log.stat().st_size if log else 0
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if log and word in log.read_bytes()[start:].decode(errors="replace"):
            return
        time.sleep(0.05)


def one_round(
    place: chaos.Place, nodes: Nodes, chance: random.Random, most: int, kinds: tuple[str, ...]
) -> Counter[str]:
    """Disturb a study until it is complete or has met so many events, then finish it; return the events."""
    events: Counter[str] = Counter()
    log = place.log
    log.touch()
    while sum(events.values()) < most:
        process = launch(place, nodes.cluster.address)
        wait(process, 300, log, "started")
        # A trial whose worker dies a third time in one run has failed.
        for kind in chance.sample(kinds, k=min(2, len(kinds), most - sum(events.values()))):
            wait(process, chance.uniform(1, 12))
            if process.poll() is None and disturb(kind, nodes, chance):
                events[kind] += 1
        wait(process, chance.uniform(1, 20))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        events["coordinator"] += 1
    process = launch(place, nodes.cluster.address)
    wait(process, 600)
    if process.poll() != 0:
        raise SystemExit(f"the undisturbed command ended with {process.poll()}: {log.read_text()[-3000:]}")
    return events


def problems_of(place: chaos.Place, trials: int, reference: str) -> list[str]:
    """Return a sentence for everything that is not as on one machine."""
    found = chaos.check_stores(place, trials)
    if chaos.read_reports(place) != reference:
        found.append("the report differs from that of one machine")
    if "Traceback" in place.log.read_text():
        found.append(f"a traceback in {place.log}")
    return found


def on_one_machine(folder: Path, trials: int, epochs: int) -> str:
    """Return the report of the study when it is run by this machine's own processes."""
    place = chaos.furnish(folder, chaos.INDEPENDENT, trials, epochs)
    with chaos.launched(place, 1) as (process, said):
        wait(process, 600)
        if process.poll() != 0:
            raise SystemExit(f"the command on one machine ended with {process.poll()}: {said()}")
    return chaos.read_reports(place)


def main() -> int:
    """Disturb until there were enough events; print what happened; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, total, problems = random.Random(options.seed), Counter[str](), list[str]()
    folder, start, rounds = Path(tempfile.mkdtemp(prefix="caltech-sweep-chaos-")), time.monotonic(), 0
    reference = on_one_machine(folder / "reference", 12, 4)
    with cluster_of(folder / "nodes", 3) as cluster:
        nodes = Nodes(cluster, folder / "nodes")
        while sum(total.values()) < options.events and not problems:
            rounds += 1
            place = chaos.furnish(folder / f"round-{rounds}", chaos.INDEPENDENT, 12, 4)
            total += one_round(place, nodes, chance, min(A_ROUND, options.events - sum(total.values())), KINDS)
            problems += problems_of(place, 12, reference)
            print(f"round {rounds}: {sum(total.values())} events so far", file=sys.stderr, flush=True)
    minutes = (time.monotonic() - start) / 60
    print(f"{sum(total.values())} events (seed {options.seed}) in {rounds} studies, {minutes:.1f} minutes")
    print(", ".join(f"{kind} {count}" for kind, count in total.most_common()))
    print("\n".join(problems) or "every report equals that of one machine")
    if problems:
        print(f"everything is kept in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
