"""Disturb a study on a Ray cluster, with its stores on servers; its report stays that of one machine.

    python tests/helpers/chaos_cluster.py --events 60 --seed 0 [--outage 605]

The cluster is a head without processors and three nodes, each in a network name space of its own with its own data
folder; training states go to a folder that all see. Optuna's study is in PostgreSQL, as is what an MLflow server keeps.
Each launch of the command meets some of these: a node or a worker gets SIGKILL; a worker is stopped for a moment, or
past the time-out of a hang, and wakes; a node is stopped, or its network cut, until the cluster takes it for dead, and
comes back; a node has notice that it will be taken away; the database or the tracking server is stopped for some
seconds. Then the coordinator gets SIGKILL, and the same command goes on. A study is finished undisturbed, its stores
checked and its report compared.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import chaos
from helpers.clusters import QUICK, FarNode, Network, cluster_of, network
from helpers.servers import Postgres, answering, free_port, postgres

# A trial whose worker dies a third time in one run has failed, so each launch meets at most two that end a worker.
DEADLY = ("node", "worker", "hang", "frozen", "cut")
OTHERS = ("moment", "notice", "database", "tracking")
HANG = 30  # seconds of silence, the least that --hang-timeout takes
A_ROUND = 20  # events that one study meets at most
HEALED = 90  # seconds after which a node that was taken for dead has ended its processes


@dataclass
class World:
    """A cluster and servers, and what happens to them."""

    cluster: Any
    network: Network
    database: Postgres
    folder: Path
    nodes: list[FarNode] = field(default_factory=list)
    gone: list[FarNode] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _server: ExitStack = field(default_factory=ExitStack)
    _serve: Callable[[], None] = lambda: None

    def add_node(self) -> FarNode:
        """Start one more node."""
        self.nodes.append(self.network.join(self.cluster))
        return self.nodes[-1]

    def study(self, name: str, trials: int, epochs: int) -> chaos.Place:
        """Return a new working folder whose stores are new databases, one of them behind a server."""
        place = chaos.furnish(self.folder / name, chaos.INDEPENDENT, trials, epochs)
        port, known, storage = (
            free_port(),
            self.database.create(f"mlflow_{name}"),
            self.database.create(f"optuna_{name}"),
        )
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--backend-store-uri"]
        command += [known.replace("postgresql:", "postgresql+psycopg:"), "--artifacts-destination"]
        command += [str(place.folder / "artifacts")]

        def serve() -> None:
            self._server.enter_context(answering(command, place.folder / "server.txt", port, cwd=place.folder))

        self._server.close()
        self._serve = serve
        serve()
        return replace(place, tracking=f"http://127.0.0.1:{port}", storage=storage)

    def disturb(self, kind: str, chance: random.Random) -> bool:
        """Do one thing; return whether there was anything to do it to."""
        return bool(getattr(self, f"_{kind}")(chance))

    def _node(self, chance: random.Random) -> bool:
        self._lose(chance, FarNode.end)
        return True

    def _frozen(self, chance: random.Random) -> bool:
        def stop(node: FarNode) -> None:
            node.send(signal.SIGSTOP)
            node.wait(alive=False)
            node.send(signal.SIGCONT)

        self._lose(chance, stop)
        return True

    def _cut(self, chance: random.Random) -> bool:
        def cut(node: FarNode) -> None:
            node.cut()
            node.wait(alive=False)
            node.cut(healed=True)

        self._lose(chance, cut)
        return True

    def _notice(self, chance: random.Random) -> bool:
        self._lose(chance, lambda node: node.process.send_signal(signal.SIGTERM))
        return True

    def _lose(self, chance: random.Random, how: Callable[[FarNode], None]) -> None:
        """Let a node that has joined go, which ends its processes by itself, and add another one."""
        node = self.nodes.pop(chance.randrange(len(self.nodes)))
        node.wait(alive=True)  # one that joins once its network is back would stay, as it should
        self.add_node()
        how(node)
        self.gone.append(node)

    def bury(self) -> None:
        """Wait until the processes of all nodes that have gone have ended."""
        while self.gone:
            node = self.gone.pop()
            try:
                node.process.wait(HEALED)
            except subprocess.TimeoutExpired:
                self.problems.append(f"node {node.address} goes on although the cluster takes it for dead")
            node.end()

    def _workers(self) -> list[int]:
        return sorted(pid for node in self.nodes for pid in node.pids("^ray::_Actor"))

    def _worker(self, chance: random.Random, wakes_after: float | None = None) -> bool:
        workers = self._workers()
        if not workers:
            return False
        pid = chance.choice(workers)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if wakes_after is None else signal.SIGSTOP)
            if wakes_after is not None:
                time.sleep(wakes_after)
                os.kill(pid, signal.SIGCONT)
        return True

    def _moment(self, chance: random.Random) -> bool:
        return self._worker(chance, chance.uniform(0.1, 2))

    def _hang(self, chance: random.Random) -> bool:
        return self._worker(chance, HANG + 5)

    def _database(self, chance: random.Random) -> bool:
        self.database.stop()
        time.sleep(chance.uniform(0.1, 6))
        self.database.start()
        return True

    def _tracking(self, chance: random.Random) -> bool:
        self._server.close()
        time.sleep(chance.uniform(0.1, 3))
        self._serve()
        return True

    def without_both(self, do: Callable[[], None]) -> None:
        """Do something while the database and the tracking server are stopped."""
        self._server.close()
        self.database.stop()
        do()
        self.database.start()
        self._serve()

    def close(self) -> None:
        """Stop the tracking server."""
        self._server.close()


@contextmanager
def world(folder: Path, nodes: int) -> Iterator[World]:
    """Yield a cluster with so many nodes, and servers; skips where a part of it is not to be had."""
    with (
        network(folder) as net,
        postgres() as database,
        cluster_of(folder / "head", 0, net.address, **QUICK) as cluster,
    ):
        made = World(cluster, net, database, folder)
        try:
            for _ in range(nodes):
                made.add_node().wait(alive=True)  # one after the other: two at once may choose one name for a socket
            yield made
        finally:
            made.close()
            for node in net.nodes:  # before the head, whose end they would wait for
                node.end()


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


def next_events(chance: random.Random, kinds: Sequence[str], most: int) -> list[str]:
    """Draw what one launch meets."""
    deadly, others = ([kind for kind in kinds if kind in group] for group in (DEADLY, OTHERS))
    drawn = chance.sample(deadly, min(2, len(deadly))) + chance.sample(others, min(2, len(others)))
    return chance.sample(drawn, min(len(drawn), most))


def one_round(made: World, place: chaos.Place, chance: random.Random, most: int, kinds: Sequence[str]) -> Counter[str]:
    """Disturb a study until it is complete or has met so many events, then finish it; return the events."""
    events: Counter[str] = Counter()
    log = place.log
    log.touch()
    while sum(events.values()) < most:
        process = launch(place, made.cluster.address)
        wait(process, 300, log, "started")
        for kind in next_events(chance, kinds, most - sum(events.values())):
            wait(process, chance.uniform(0.5, 4))
            if process.poll() is None and made.disturb(kind, chance):
                events[kind] += 1
        wait(process, chance.uniform(0.5, 4))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        events["coordinator"] += 1
    if process.poll() != 0:
        process = launch(place, made.cluster.address)
        wait(process, 600)
    end(made, place, process)
    return events


def end(made: World, place: chaos.Place, process: subprocess.Popen[bytes]) -> None:
    """Note a command that has not ended well; do what it says where the tracking server was away at its end."""
    said = place.log.read_text()
    if process.poll() != 0:
        os.killpg(process.pid, signal.SIGKILL)
        made.problems.append(f"the command ended with {process.poll()}: {said[-3000:]}")
    elif "bring them there with: caltech-sweep replay" in "".join(said.splitlines()[-5:]):
        with place.log.open("ab") as out:
            words = chaos.command("replay", "--storage", str(place.storage))
            subprocess.run(words, cwd=place.folder, env=place.environment(), stdout=out, stderr=out, check=False)


def without_servers(made: World, place: chaos.Place, seconds: float) -> None:
    """Run a study whose database and tracking server are both stopped for so long once its first trial has ended."""
    place.log.touch()
    process = launch(place, made.cluster.address)
    wait(process, 300, place.log, ": complete")
    made.without_both(lambda: wait(process, seconds))
    wait(process, 600)
    end(made, place, process)


def problems_of(made: World, place: chaos.Place, trials: int, reference: str) -> list[str]:
    """Return a sentence for everything that is not as on one machine."""
    made.bury()
    database = made.database.address(f"mlflow_{place.folder.name}")
    found = [*made.problems, *chaos.check_stores(replace(place, tracking=database), trials)]
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
    parser.add_argument("--outage", type=float, default=0, help="seconds without servers in a study before all others")
    options = parser.parse_args()
    chance, total, problems = random.Random(options.seed), Counter[str](), list[str]()
    folder, start, rounds = Path(tempfile.mkdtemp(prefix="caltech-sweep-chaos-")), time.monotonic(), 0
    reference = on_one_machine(folder / "reference", 12, 8)
    with world(folder, 3) as made:
        if options.outage:
            place = made.study("outage", 12, 8)
            without_servers(made, place, options.outage)
            problems += problems_of(made, place, 12, reference)
        while sum(total.values()) < options.events and not problems:
            rounds += 1
            place = made.study(f"round_{rounds}", 12, 8)
            events = one_round(made, place, chance, min(A_ROUND, options.events - sum(total.values())), DEADLY + OTHERS)
            total += events
            problems += problems_of(made, place, 12, reference)
            print(f"round {rounds}: {dict(events)}, {sum(total.values())} so far", file=sys.stderr, flush=True)
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
