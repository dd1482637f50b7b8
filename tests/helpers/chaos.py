"""Kill a real study at random instants until it is complete, and compare what it reports with an undisturbed one.

    python tests/helpers/chaos.py --kills 100 --seed 0

Every kill is a SIGKILL: of the coordinator, of a worker, or of the whole process group. The same command then goes
on. Now and then the whole group is stopped for a moment and wakes, or a second user runs the same study from another
study store into the same tracking store, and must be refused. A round ends when its study is complete or has met its
share of the kills; it is then finished undisturbed and its report compared. Rounds follow each other until there were
enough kills. Four studies take turns: one worker with a sampler and a pruner that learn from history, two workers with
settings that do not depend on who is faster, and both with trials that pause and are promoted. Which trials pause does
depend on who is faster, so with two workers that study is held against no other; each trial has to be there once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

STUDY = """\
title: A study that is killed
dataset: {{name: shapes, resize: 32, crop: 32, classes: 3, images_per_class: 12}}
trials: {trials}
{search}
fixed: {{arch: resnet18, batch_size: 12, epochs: {epochs}}}
space:
  lr: {{low: 1e-3, high: 1e-1, log: true}}
  augment: {{subset_of: [hflip]}}
rows:
  - name: First
    set: {{lr: 0.05}}
    reference: {{val_accuracy: 0.5, test_accuracy: 0.5, best_epoch: 2}}
  - name: Views
    set: {{lr: 0.01, test_views: tencrop, augment: [hflip]}}
  - name: Diverging
    set: {{lr: 1.0e+6}}
  - name: Frozen
    set: {{lr: 0.01, freeze: conv}}
"""
LEARNING = "sampler: {name: tpe, seed: 0, startup_trials: 2}\npruner: {name: median, startup_trials: 3}"
INDEPENDENT = "sampler: {name: random, seed: 0}"
PAUSING = "sampler: {name: tpe, seed: 0, startup_trials: 2}\npruner: {name: asha, min_epochs: 1, factor: 2}"
VICTIMS = ("coordinator", "worker", "both")
A_ROUND = 25  # kills that one study meets at most
LAST_CHANCE = 600  # seconds that an undisturbed run may take


@dataclass(frozen=True)
class Kind:
    """A study to kill: its file and how many workers run it."""

    name: str
    search: str
    workers: int
    alike: bool = True  # every run of it gives the same report


KINDS = (
    Kind("serial", LEARNING, 1),
    Kind("parallel", INDEPENDENT, 2),
    Kind("pausing", PAUSING, 1),
    Kind("pausing-parallel", PAUSING, 2, alike=False),
)


def furnish(folder: Path, search: str, trials: int = 12, epochs: int = 4) -> Path:
    """Put the study ``killed`` into a new folder."""
    (folder / "sweeps").mkdir(parents=True)
    text = STUDY.format(search=search, trials=trials, epochs=epochs)
    (folder / "sweeps" / "killed.yaml").write_text(text, encoding="utf-8")
    return folder


def _environment() -> dict[str, str]:
    hidden = ("MLFLOW_TRACKING_URI", "CALTECH101_ROOT", "CALTECH_SWEEP_DATA")
    return {**{k: v for k, v in os.environ.items() if k not in hidden}, "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    """Return a ``caltech-sweep`` command line."""
    return [sys.executable, "-m", "caltech_sweep", *arguments]


def report_by_command(place: Path, kind: str) -> str:
    """Return what ``caltech-sweep report`` prints."""
    done = subprocess.run(
        command("report", "killed", "--format", kind, "--best", "100"),
        cwd=place,
        env=_environment(),
        capture_output=True,
        text=True,
    )
    return done.stdout if done.returncode == 0 else f"no report: {done.stderr}"


def report_in_process(place: Path, kind: str) -> str:
    """Return the same, without the seconds that a new process takes."""
    from caltech_sweep.report.build import build_report

    return build_report(["killed"], kind, 100, str(place / "mlruns" / "mlflow.db"))


def read_reports(place: Path, report: Callable[[Path, str], str] = report_by_command) -> str:
    """Return a study's report as JSON and Markdown, with the ids of runs, the only thing left to chance, taken out."""
    text = report(place, "json")
    with contextlib.suppress(ValueError):
        for table in json.loads(text):
            for row in table["rows"]:
                text = text.replace(f'"{row["run_id"]}"', "a run")
    markdown = re.sub(r"\b[0-9a-f]{8}( *)\|$", r"a run   \1|", report(place, "markdown"), flags=re.M)
    return f"{text}\n{markdown}"


def _rows(database: Path, query: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


MLFLOW_CHECKS = {
    "runs that are RUNNING": "SELECT name FROM runs WHERE status NOT IN ('FINISHED', 'FAILED', 'KILLED')",
    "trials with two runs": (
        "SELECT value, count(*) FROM tags WHERE key = 'trial_number' GROUP BY value HAVING count(*) > 1"
    ),
    "metric steps logged twice": (
        "SELECT run_uuid, key, step, count(*) FROM metrics GROUP BY run_uuid, key, step HAVING count(*) > 1"
    ),
    "runs without params": (
        "SELECT name FROM runs WHERE run_uuid IN (SELECT run_uuid FROM tags WHERE key = 'trial_number') "
        "AND (SELECT count(*) FROM params WHERE params.run_uuid = runs.run_uuid) < 20"
    ),
    "runs without a dataset": (
        "SELECT name FROM runs WHERE run_uuid IN (SELECT run_uuid FROM tags WHERE key = 'trial_number') "
        "AND run_uuid NOT IN (SELECT destination_id FROM inputs)"
    ),
}
OPTUNA_CHECKS = {
    "trials that run or wait": (
        "SELECT number, state FROM trials WHERE state = 'RUNNING' OR state = 'WAITING' AND trial_id NOT IN (SELECT "
        "rung.trial_id FROM trial_user_attributes AS rung LEFT JOIN trial_user_attributes AS promoted ON "
        "promoted.trial_id = rung.trial_id AND promoted.key = 'promoted' WHERE rung.key = 'rung' AND "
        "CAST(rung.value_json AS INT) > COALESCE(CAST(promoted.value_json AS INT), 0))"
    ),
    "settings that were trained twice": (
        "SELECT value_json, count(*) FROM trial_user_attributes WHERE key = 'fingerprint' "
        "GROUP BY value_json HAVING count(*) > 1"
    ),
}


def check_stores(place: Path, trials: int = 12) -> list[str]:
    """Return a sentence for everything that is not as an undisturbed study leaves it."""
    problems = []
    for file, checks in (("mlflow.db", MLFLOW_CHECKS), ("optuna.db", OPTUNA_CHECKS)):
        for what, query in checks.items():
            rows = _rows(place / "mlruns" / file, query)
            if rows:
                problems.append(f"{file}: {what}: {rows[:5]}")
    ended = _rows(place / "mlruns" / "mlflow.db", PAUSED_RUNS)
    waiting = _rows(place / "mlruns" / "optuna.db", PAUSED_TRIALS)
    if sorted(ended) != sorted((number, int(str(epoch))) for number, epoch in waiting):
        problems.append(f"paused trials: {ended} in mlflow.db, {waiting} in optuna.db")
    numbers = [n for (n,) in _rows(place / "mlruns" / "optuna.db", "SELECT number FROM trials ORDER BY number")]
    if numbers != list(range(trials)):
        problems.append(f"optuna.db: the trials are {numbers}, not 0 to {trials - 1}")
    return problems


# The number of each paused trial, and the epoch it is paused at, which is the last that it has.
PAUSED_RUNS = (
    "SELECT CAST(number.value AS INT), MAX(metrics.step) FROM tags AS outcome JOIN tags AS number USING (run_uuid) "
    "JOIN metrics USING (run_uuid) WHERE outcome.key = 'outcome' AND outcome.value = 'paused' "
    "AND number.key = 'trial_number' AND metrics.key = 'val/accuracy' GROUP BY run_uuid"
)
PAUSED_TRIALS = (
    "SELECT number, value_json FROM trials JOIN trial_user_attributes USING (trial_id) "
    "WHERE state = 'WAITING' AND key = 'rung'"
)


@dataclass
class Tally:
    """What has happened so far."""

    kills: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    rounds: int = 0
    fixed: Counter[str] = field(default_factory=Counter)
    stops: int = 0
    refused: int = 0  # runs of the second user
    problems: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(self.kills.values())


def _workers(parent: int) -> list[int]:
    """Return the ids of a process's worker processes."""
    children = subprocess.run(["pgrep", "-P", str(parent), "-f", "spawn_main"], capture_output=True, text=True).stdout
    return [int(pid) for pid in children.split()]


def kill(process: subprocess.Popen[bytes], victim: str, chance: random.Random) -> bool:
    """Kill a process, one of its workers, or its whole group; return whether there was anything to kill."""
    if process.poll() is not None:
        return False
    workers = _workers(process.pid)
    if victim == "worker" and not workers:
        return False
    with contextlib.suppress(ProcessLookupError):
        if victim == "both":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(chance.choice(workers) if victim == "worker" else process.pid, signal.SIGKILL)
    return True


@contextlib.contextmanager
def launched(place: Path, workers: int) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """Run the study in a process group of its own; yields it and a function that reads what it has said."""
    log = place / "log.txt"
    start = log.stat().st_size if log.exists() else 0
    arguments = command("run", "killed", "--threads", "1", "--workers", str(workers))
    with log.open("ab") as out:
        process = subprocess.Popen(
            arguments, cwd=place, env=_environment(), stdout=out, stderr=out, start_new_session=True
        )

    def said() -> str:
        with log.open("rb") as file:
            file.seek(start)
            return file.read().decode()

    try:
        yield process, said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], seconds: float, until: Callable[[], bool] = lambda: False) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not until():
        time.sleep(0.01)


def stop_for_a_moment(process: subprocess.Popen[bytes], chance: random.Random, tally: Tally) -> None:
    """Stop a process group, and let it wake."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(chance.uniform(0.1, 2))
        os.killpg(process.pid, signal.SIGCONT)
        tally.stops += 1


def intrude(place: Path, tally: Tally) -> None:
    """Run the study of another study store into the same tracking store, which must refuse it."""
    other = place.with_name(f"{place.name}-other")
    if not other.exists():
        shutil.copytree(place / "sweeps", other / "sweeps")
    environment = {**_environment(), "MLFLOW_TRACKING_URI": f"sqlite:///{place / 'mlruns' / 'mlflow.db'}"}
    for arguments in (("run", "killed", "--threads", "1", "--in-process"), ("plan", "killed")):
        done = subprocess.run(command(*arguments), cwd=other, env=environment, capture_output=True, text=True)
        if done.returncode != 2 or "belongs to another study store" not in done.stderr:
            tally.problems.append(f"a second user's {arguments[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
        tally.refused += 1
    if (other / "mlruns").exists():
        tally.problems.append("a second user who was refused has a study store")


def disturb(place: Path, workers: int, took: float, chance: random.Random, tally: Tally) -> bool:
    """Run the command once and kill at random instants; return whether it got through first.

    ``took`` is how many seconds the undisturbed study took: kills come within about two trials of each other.
    """
    tally.launches += 1
    with launched(place, workers) as (process, said):
        if chance.random() < 0.8:  # most kills meet trials at work, the others the start
            _wait(process, 120, lambda: "started" in said())
            reach = took / 6
            if "started" in said() and chance.random() < 0.2:
                intrude(place, tally)
            if chance.random() < 0.3 and process.poll() is None:
                stop_for_a_moment(process, chance, tally)
        else:
            reach = took / 3
        # A trial whose worker dies a third time in one run has failed, so workers are killed twice at most.
        victims = ["worker"] * chance.choice((0, 0, 1, 2)) + [chance.choice(("coordinator", "both"))]
        for victim in victims:
            _wait(process, chance.uniform(0, reach))
            if kill(process, victim, chance):
                tally.kills[victim] += 1
        _wait(process, LAST_CHANCE)
        for line in said().splitlines():
            fixed = re.search(
                r"(it waits again|copied|but no process is running it: \w+|it is tried again|sampled again)", line
            )
            if fixed:
                tally.fixed[fixed[1]] += 1
        if process.returncode not in (0, -signal.SIGKILL):
            tally.problems.append(f"the command ended with {process.returncode}: {said()[-2000:]}")
        return process.returncode == 0


def finish(place: Path, workers: int) -> str:
    """Run the command undisturbed; return what it said if it failed."""
    with launched(place, workers) as (process, said):
        _wait(process, LAST_CHANCE)
        return "" if process.poll() == 0 else f"the undisturbed command ended with {process.returncode}: {said()}"


def one_round(
    folder: Path, kind: Kind, reference: tuple[str, float], chance: random.Random, tally: Tally, kills: int
) -> None:
    """Kill a new study until it is complete or there were ``kills`` kills in all, finish it, and compare."""
    place = furnish(folder, kind.search)
    tally.rounds += 1
    enough = min(kills, tally.count + A_ROUND)
    while tally.count < enough and not tally.problems:
        if disturb(place, kind.workers, reference[1], chance, tally):
            break
    failed = finish(place, kind.workers)
    tally.problems += [f"round {tally.rounds}: {problem}" for problem in ([failed] if failed else check_stores(place))]
    if kind.alike and read_reports(place) != reference[0]:
        tally.problems.append(f"round {tally.rounds} ({kind.name}): the report differs from the undisturbed one")


def main() -> int:
    """Kill until there were enough kills; print a report; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[kind.name for kind in KINDS], help="kill only this study")
    parser.add_argument("--folder", type=Path, help="work here and keep everything; default a temporary folder")
    options = parser.parse_args()
    chance, tally, start = random.Random(options.seed), Tally(), time.monotonic()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="caltech-sweep-chaos-"))
    references = {}
    kinds = [kind for kind in KINDS if options.only in (None, kind.name)]
    for kind in kinds:
        place = furnish(folder / f"reference-{kind.name}", kind.search)
        begun = time.monotonic()
        tally.problems += [text for text in [finish(place, kind.workers)] if text] + check_stores(place)
        took = time.monotonic() - begun
        references[kind.name] = read_reports(place), took
    while tally.count < options.kills and not tally.problems:
        kind = kinds[tally.rounds % len(kinds)]
        one_round(folder / f"round-{tally.rounds + 1}", kind, references[kind.name], chance, tally, options.kills)
        print(f"round {tally.rounds} ({kind.name}): {tally.count} kills so far", file=sys.stderr, flush=True)
    print(summary(tally, options.seed, time.monotonic() - start))
    if tally.problems:
        print(f"everything is kept in {folder}")
    elif options.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if tally.problems else 0


def summary(tally: Tally, seed: int, seconds: float) -> str:
    """Return what happened, as a person reads it."""
    lines = [
        f"{tally.count} kills (seed {seed}) in {tally.launches} starts and {tally.rounds} studies, "
        f"{seconds / 60:.1f} minutes",
        "killed: " + ", ".join(f"{victim} {tally.kills[victim]}" for victim in VICTIMS),
        "fixed: " + (", ".join(f"{what} {count}" for what, count in tally.fixed.most_common()) or "nothing"),
        f"stopped for a moment: {tally.stops}; runs of a second user refused: {tally.refused}",
        *tally.problems,
        "every report equals the undisturbed one" if not tally.problems else "FAILED",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
