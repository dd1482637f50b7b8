"""What many slots cost the one coordinator: its time, what it writes, and its memory; and where that ends.

    python benchmarks/scale.py [--slots 200] [--trials 400] [--epochs 30] [--epoch-seconds 3] [--servers]
    python benchmarks/scale.py --ray 4
    python benchmarks/scale.py --simulate [--epoch-ms 2] [--trial-ms 45] [--megabytes 10]

The coordinator is the real one, with SQLite stores in a temporary folder, or with PostgreSQL and an MLflow server that
are started for it. The slots are scripted: they answer at once, so that the coordinator never waits, or after so many
seconds an epoch. With --ray they are actors of a private cluster, which train nothing. The simulation has as many slots
as no machine here could script, at the costs that were measured, and one network link that results come home by.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import urllib3

from caltech_sweep.stores import Store, study_store, tracking_store
from caltech_sweep.sweep.executors.base import Done, Epoch, Epochs, Event, Job
from caltech_sweep.sweep.lease import fencing, holding
from caltech_sweep.sweep.optuna_store import engine_of, open_study
from caltech_sweep.testing import ScriptedExecutor, cost_study, epoch_metrics, resident_bytes, scripted_coordinator
from caltech_sweep.tracking.journal import Journal, JournalingTracker
from caltech_sweep.tracking.writer import MlflowTracker

Loads = Callable[[], dict[str, float]]  # what servers have done so far
TICK = 0.05  # seconds that a poll of paced slots waits


class Watched(ScriptedExecutor):
    """Scripted slots that drop the jobs they have seen, and note the memory of the process now and then.

    An epoch takes ``seconds``; the slots begin at different times.
    """

    def __init__(self, slots: int, seconds: float) -> None:
        super().__init__(slots=slots)
        self.submitted, self.epochs, self.memory, self.slept = 0, 0, list[tuple[int, int]](), 0.0
        self._seconds, self._draw, self._due = seconds, random.Random(0), dict[int, float]()

    def submit(self, job: Job) -> None:
        super().submit(job)
        self.jobs.clear()
        self._due[job.number] = time.monotonic() + self._seconds * self._draw.uniform(0.5, 1.5)
        self.submitted += 1
        if self.submitted % 100 == 0:
            self.memory.append((self.submitted, resident_bytes()))

    def poll(self, timeout: float) -> list[Event]:
        """Return what is due; wait for it as a real executor does."""
        now = time.monotonic()
        early = {number for number, due in self._due.items() if due > now and number not in self._waits}
        self._waits |= early
        happened = super().poll(timeout)
        self._waits -= early
        for event in happened:
            self._due[event.job] = now + self._seconds
            self.epochs += isinstance(event, Epoch)
        if not happened:
            time.sleep(TICK)
            self.slept += TICK
        return happened


@contextmanager
def servers(folder: Path) -> Iterator[tuple[Store, Store, Loads]]:
    """Start PostgreSQL, and MLflow's server on it with proxied artifacts; yield both stores and what they have done."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from helpers.servers import answering, postgres

    command = [sys.executable, "-m", "mlflow", "server", "--workers", "2", "--artifacts-destination", str(folder / "a")]
    with postgres() as database:
        runs, trials = (database.create(name) for name in ("runs", "trials"))
        with answering([*command, "--backend-store-uri", runs], folder / "mlflow.log") as address:
            postmaster = (database.folder / "data" / "postmaster.pid").read_text().split()[0]
            watch = sa.create_engine(study_store(trials).uri, poolclass=sa.NullPool)

            def loads() -> dict[str, float]:
                time.sleep(1.5)  # PostgreSQL counts a second late
                rows = sa.text(
                    "SELECT datname, xact_commit, tup_inserted + tup_updated + tup_deleted FROM pg_stat_database "
                    "WHERE datname IN ('runs', 'trials')"
                )
                with watch.connect() as connection:
                    found = {name: numbers for name, *numbers in connection.execute(rows)}
                own = {
                    f"{what} of {name}": n[i] for name, n in found.items() for i, what in enumerate(("commits", "rows"))
                }
                return {
                    **own,
                    **{"s of MLflow": family_seconds(os.getpid()), "s of PostgreSQL": family_seconds(int(postmaster))},
                }

            yield tracking_store(address), study_store(trials), loads


def family_seconds(parent: int) -> float:
    """Return the processor time of the descendants of a process, those that have ended included."""
    fields = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            rest = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        fields[int(file.parent.name)] = (int(rest[1]), sum(map(int, rest[11:15])))
    family, ticks = {parent}, 0
    while found := {pid for pid, (above, _) in fields.items() if above in family} - family:
        family |= found
        ticks += sum(fields[pid][1] for pid in found)
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def counted_requests() -> Iterator[Counter[str]]:
    """Count the requests of this process by method."""
    counts: Counter[str] = Counter()
    real = urllib3.HTTPConnectionPool.urlopen

    def count(pool: Any, method: str, *rest: Any, **named: Any) -> Any:
        counts[method] += 1
        return real(pool, method, *rest, **named)

    urllib3.HTTPConnectionPool.urlopen = count  # type: ignore[method-assign, assignment]
    try:
        yield counts
    finally:
        urllib3.HTTPConnectionPool.urlopen = real  # type: ignore[method-assign]


def measure(options: argparse.Namespace) -> None:
    """Run a study as a session does, and print what it took."""
    trials, writes = options.trials, Counter[str]()

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        word = statement.lstrip().partition(" ")[0].upper()
        if word in ("INSERT", "UPDATE", "DELETE"):
            writes[word] += 1

    definition = cost_study(trials, options.epochs)
    slots = Watched(options.slots, options.epoch_seconds)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, loads = Path(name), dict
        tracking, storage = tracking_store(str(folder / "mlflow.db")), study_store(str(folder / "optuna.db"))
        if options.servers:
            tracking, storage, loads = stack.enter_context(servers(folder))
        tracker = MlflowTracker(tracking, create=True)
        held = stack.enter_context(holding(storage, definition.name))
        study = open_study(definition, storage, definition.identity())
        tracker.guard(held.check)
        engine = engine_of(study)
        assert engine is not None
        if options.servers:
            stack.enter_context(fencing(engine, held))
        journaling = JournalingTracker(tracker, Journal(folder / "journal"), print, held.check)
        coordinator = scripted_coordinator(definition, slots, journaling, folder / "scratch", study)
        sa.event.listen(sa.engine.Engine, "before_cursor_execute", note)
        requests, before = stack.enter_context(counted_requests()), loads()
        wall, cpu = time.perf_counter(), time.process_time()
        coordinator.run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        done = {what: value - before[what] for what, value in loads().items()}
        local = [file for file in (tracking.file, storage.file) if file is not None]
        size = sum(file.stat().st_size for file in local)
    print(
        f"{trials} trials of {options.epochs} epochs on {options.slots} slots: {wall:.1f} s, {cpu:.1f} s of processor"
    )
    print(f"a trial: {1000 * cpu / trials:.1f} ms of processor, {1000 * (wall - slots.slept) / trials:.1f} ms of time")
    print(f"a second: {slots.epochs / wall:.0f} epochs, {trials / wall:.1f} trials; {cpu / wall:.2f} of a core")
    print(f"statements of this process that write: {sum(writes.values()) / trials:.1f} a trial {dict(writes)}")
    print(f"requests: {sum(requests.values()) / trials:.1f} a trial {dict(requests)}")
    print("; ".join(f"{value / trials:.3g} {what}" for what, value in done.items()) + " a trial" if done else "")
    print(f"both databases: {size / trials / 1000:.1f} kB a trial" if local else "")
    print(
        "memory: " + ", ".join(f"{held / 1e6:.0f} MB at {at}" for at, held in slots.memory[:: max(1, trials // 1000)])
    )


def nothing(job: Job) -> Epochs:
    """Train nothing, and leave one file."""
    for epoch in range(1, job.config.epochs + 1):
        yield Epoch(job.number, epoch, epoch_metrics(0.5))
    (job.folder / "config.yaml").write_bytes(b"#" * job.config.batch_size * 1_000_000)
    return Done(job.number, {"best/val_accuracy": 0.5})


def measure_ray(options: argparse.Namespace) -> None:
    """Let actors of a private cluster answer at once, with and without files; print what that takes this process."""
    from dataclasses import replace

    from caltech_sweep.config import TrialConfig
    from caltech_sweep.sweep.executors.cluster import Demand, connected
    from caltech_sweep.sweep.executors.ray import RayExecutor

    with tempfile.TemporaryDirectory() as name, connected(None, options.ray, cpus=0.01, gpus=0):
        executor = RayExecutor(nothing, Demand(0.01, 0, options.ray))

        def run(jobs: int, epochs: int, megabytes: int) -> tuple[float, float]:
            config, ended, number = TrialConfig(epochs=epochs, batch_size=megabytes), 0, 0
            wall, cpu = time.perf_counter(), time.process_time()
            while ended < jobs:
                while number < jobs and executor.free():
                    folder = Path(name) / str(number)
                    folder.mkdir(exist_ok=True)
                    executor.submit(replace(Job(number, config, folder)))
                    number += 1
                events = executor.poll(0.5)
                if other := [event for event in events if not isinstance(event, (Done, Epoch))]:
                    raise SystemExit(f"a slot did not train: {other[0]}")
                ended += sum(isinstance(event, Done) for event in events)
            return time.perf_counter() - wall, time.process_time() - cpu

        run(options.ray, 1, 1)  # starts the slots
        (_, few), (_, many) = run(200, 1, 1), run(200, 1001, 1)
        wall, cpu = run(20, 1, 200)
        executor.close()
    print(f"an epoch event from Ray, many at once: {(many - few) / 200:.3f} ms of processor")
    print(f"a job of one epoch and 1 MB: {few / 200 * 1000:.1f} ms of processor")
    print(f"files home: {20 * 200 / wall:.0f} MB/s, {cpu / 4 * 1000:.0f} ms of processor for 1,000 MB")


@dataclass(frozen=True)
class Costs:
    """What things take, in seconds; ``link`` is the bytes that the coordinator's network takes a second."""

    epoch: float
    trial: float
    size: float
    link: float


def simulate(slots: int, epochs: int, seconds: float, costs: Costs, draw: random.Random) -> tuple[float, float, float]:
    """Return the shares of time that the coordinator is busy, its link is, and a slot waits, over 5 trials a slot.

    A slot whose trial ends sends its files, by a link that serves one after the other, and waits until the coordinator,
    which does one thing after the other, has recorded the trial and handed out the next one. Epochs wait for nobody.
    """
    events = [(draw.uniform(0, epochs * seconds), slot, epochs) for slot in range(slots)]
    heapq.heapify(events)
    free = link = busy = sent = waited = 0.0
    for _ in range(5 * slots * (epochs + 1)):
        now, slot, left = heapq.heappop(events)
        if left:
            took = costs.epoch
            following = (now + seconds * draw.uniform(0.9, 1.1), slot, left - 1)
        else:
            link = max(link, now) + costs.size / costs.link
            sent += costs.size / costs.link
            took = costs.trial
        busy += took
        free = max(free, now if left else link) + took
        if not left:
            waited += free - now
            following = (free, slot, epochs)
        heapq.heappush(events, following)
    return busy / free, sent / free, waited / (slots * free)


def print_simulation(options: argparse.Namespace) -> None:
    """Print a table by how many slots there are and how long an epoch takes."""
    costs = Costs(options.epoch_ms / 1000, options.trial_ms / 1000, options.megabytes * 1e6, options.gigabits / 8 * 1e9)
    print("| slots | seconds an epoch | coordinator busy | link busy | a slot waits |\n| --- | --- | --- | --- | --- |")
    for seconds in (3.0, 30.0, 300.0):
        for slots in (10, 100, 1_000, 10_000):
            shares = simulate(slots, options.epochs, seconds, costs, random.Random(0))
            print(f"| {slots:,} | {seconds:g} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")


def main() -> None:
    """Print what was measured, or simulated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("slots", 200), ("trials", 400), ("epochs", 30), ("ray", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, number in (("epoch-seconds", 0.0), ("epoch-ms", 2.0), ("trial-ms", 45.0), ("megabytes", 10.0)):
        parser.add_argument(f"--{name}", type=float, default=number)
    parser.add_argument("--gigabits", type=float, default=10.0, help="a second, of the coordinator's network")
    parser.add_argument("--servers", action="store_true", help="start PostgreSQL and an MLflow server, and use them")
    parser.add_argument("--simulate", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.simulate:
        print_simulation(options)
    elif options.ray:
        measure_ray(options)
    else:
        measure(options)
    print(f"other work on the machine: load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
