"""What many slots cost the one coordinator: its seconds of processor, its writes and its memory.

    python benchmarks/scale.py [--slots 200] [--trials 400] [--epochs 30]

The coordinator is the real one with SQLite stores in a temporary folder; the slots are scripted and answer at once, so
that it never waits. What it could serve follows from the seconds of processor that an epoch and a trial take it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from caltech_sweep.study.definition import Component, Range, StudyDefinition
from caltech_sweep.sweep.executors.base import Event, Job
from caltech_sweep.sweep.optuna_store import open_study
from caltech_sweep.testing import ScriptedExecutor, scripted_coordinator
from caltech_sweep.tracking.writer import MlflowTracker

DEFINITION = StudyDefinition(
    name="scale",
    title="Scale",
    trials=1,
    dataset={"name": "shapes"},
    fixed={},
    space={"lr": Range(1e-3, 1e-1, log=True)},
    rows=(),
    sampler=Component("random", {"seed": 0}),
)


def resident_bytes() -> int:
    """Return the memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watched(ScriptedExecutor):
    """Scripted slots that drop the jobs they have seen, and note the memory of the process now and then."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots=slots)
        self.submitted, self.events, self.memory = 0, 0, list[tuple[int, int]]()

    def submit(self, job: Job) -> None:
        super().submit(job)
        self.jobs.clear()
        self.submitted += 1
        if self.submitted % 100 == 0:
            self.memory.append((self.submitted, resident_bytes()))

    def poll(self, timeout: float) -> list[Event]:
        happened = super().poll(timeout)
        self.events += len(happened)
        return happened


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("slots", 200), ("trials", 400), ("epochs", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    writes: Counter[str] = Counter()

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        word = statement.lstrip().partition(" ")[0].upper()
        if word in ("INSERT", "UPDATE", "DELETE"):
            writes[word] += 1

    definition = replace(DEFINITION, trials=options.trials, fixed={"epochs": options.epochs})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tracker = MlflowTracker(str(folder / "mlflow.db"), create=True)
        study = open_study(definition, f"sqlite:///{folder / 'optuna.db'}", definition.identity())
        slots = Watched(options.slots)
        sa.event.listen(sa.engine.Engine, "before_cursor_execute", note)
        wall, cpu = time.perf_counter(), time.process_time()
        scripted_coordinator(definition, slots, tracker, folder / "scratch", study).run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        size = sum((folder / file).stat().st_size for file in ("mlflow.db", "optuna.db"))
    trials = options.trials
    print(f"{trials} trials of {options.epochs} epochs on {options.slots} scripted slots: {wall:.1f} s")
    print(
        f"{1000 * cpu / trials:.1f} ms of processor a trial, {1000 * cpu / slots.events:.2f} ms an event, all included"
    )
    print(f"{slots.events / wall:.0f} events/s; {sum(writes.values()) / trials:.1f} writes a trial {dict(writes)}")
    print(f"{size / trials / 1000:.1f} kB of both databases a trial")
    print("memory: " + ", ".join(f"{held / 1e6:.0f} MB at {at}" for at, held in slots.memory))
    print(f"other work on the machine: load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
