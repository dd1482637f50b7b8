"""Kill a real study at random instants until it is complete, and compare what it reports with an undisturbed one.

    PYTHONPATH=tests python -m helpers.chaos --kills 100 --seed 0

Every kill is a SIGKILL: of the coordinator, of a worker, or of the whole process group. The same command then goes
on. Now and then the whole group is stopped for a moment and wakes, or a second user runs the same study from another
study store into the same tracking store: they must be refused, and get a study of their own under another name. A
round ends when its study is complete or has met its share of the kills; it is then finished undisturbed and its report
compared. Rounds follow each other until there were enough kills. Six studies take turns: one worker with a sampler and
a pruner that learn from history, two workers with settings that do not depend on who is faster, and both with trials
that pause and are promoted. Which trials pause does depend on who is faster, so with two workers that study is held
against no other; each trial has to be there once. The fifth has a tracking server that refuses for a while, again and
again, or never answers. The sixth has both stores in PostgreSQL, where it is installed: its coordinator is stopped for
longer than its lease, and wakes while another one runs the study.
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
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import sqlalchemy as sa

from helpers.servers import HANG, HANG_UP, Gate, Postgres, gated_mlflow, installed_postgres, postgres

STUDY = """\
title: A study that nothing stops
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
LEASE = 4.0  # seconds that the lease of a study lasts, in a database
SHORT = (
    "from caltech_sweep.sweep import lease; lease.LEASE_SECONDS = {seconds}\nfrom caltech_sweep.cli import main; main()"
)
# What a server answers that is away, full, or lets nobody in: all of it passes, so no result may be set aside.
REFUSALS = (401, 403, 407, 429, 500, 502, 503, 507, HANG, HANG_UP)


@dataclass(frozen=True)
class Kind:
    """A study to kill: its file and how many workers run it."""

    name: str
    search: str
    workers: int
    alike: bool = True  # every run of it gives the same report
    stores: str = "files"  # or a tracking "server", or "database" for both


@dataclass(frozen=True)
class Place:
    """A working folder with the study ``killed``, and the addresses of its stores, where they are not files in it."""

    folder: Path
    tracking: str = ""
    storage: str = ""

    @property
    def log(self) -> Path:
        """What its commands have said."""
        return self.folder / "log.txt"

    def run(self, *options: str) -> list[str]:
        """Return the arguments that run the study here."""
        return ["run", "killed", "--threads", "1", *options, *(["--storage", self.storage] if self.storage else [])]

    def environment(self) -> dict[str, str]:
        """Return the environment of its commands."""
        hidden = ("MLFLOW_TRACKING_URI", "CALTECH101_ROOT", "CALTECH_SWEEP_DATA")
        kept = {name: value for name, value in os.environ.items() if name not in hidden}
        own = {"OMP_NUM_THREADS": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
        return {**kept, **own, **({"MLFLOW_TRACKING_URI": self.tracking} if self.tracking else {})}

    def rows(self, store: str, query: str) -> list[tuple[object, ...]]:
        """Ask the database of a store, ``mlflow`` or ``optuna``, also of one behind a server."""
        address = {"mlflow": self.tracking, "optuna": self.storage}[store]
        if not address.startswith("postgresql"):
            address = f"sqlite:///file:{self.folder}/mlruns/{store}.db?mode=ro&uri=true"
        engine = sa.create_engine(address.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(query))]

    def beside(self) -> Place:
        """Return another folder with the study and the same tracking store, made when it is missing."""
        other = replace(self, folder=self.folder.with_name(f"{self.folder.name}-other"))
        if not other.folder.exists():
            shutil.copytree(self.folder / "sweeps", other.folder / "sweeps")
        return other if self.tracking else replace(other, tracking=f"sqlite:///{self.folder / 'mlruns' / 'mlflow.db'}")


KINDS = (
    Kind("serial", LEARNING, 1),
    Kind("parallel", INDEPENDENT, 2),
    Kind("pausing", PAUSING, 1),
    Kind("pausing-parallel", PAUSING, 2, alike=False),
    Kind("refused", LEARNING, 1, stores="server"),
    Kind("taken-over", LEARNING, 1, stores="database"),
)


def furnish(folder: Path, search: str, trials: int = 12, epochs: int = 4) -> Place:
    """Put the study ``killed`` into a new folder."""
    (folder / "sweeps").mkdir(parents=True)
    text = STUDY.format(search=search, trials=trials, epochs=epochs)
    (folder / "sweeps" / "killed.yaml").write_text(text, encoding="utf-8")
    return Place(folder)


def command(*arguments: str) -> list[str]:
    """Return a ``caltech-sweep`` command line; its leases are short."""
    return [sys.executable, "-c", SHORT.format(seconds=LEASE), *arguments]


def report_by_command(place: Place, study: str, kind: str) -> str:
    """Return what ``caltech-sweep report`` prints."""
    done = subprocess.run(
        command("report", study, "--format", kind, "--best", "100"),
        cwd=place.folder,
        env=place.environment(),
        capture_output=True,
        text=True,
    )
    return done.stdout if done.returncode == 0 else f"no report: {done.stderr}"


def report_in_process(place: Place, study: str, kind: str) -> str:
    """Return the same, without the seconds that a new process takes."""
    from caltech_sweep.report.build import build_report

    return build_report([study], kind, 100, place.tracking or str(place.folder / "mlruns" / "mlflow.db"))


def read_reports(
    place: Place, report: Callable[[Place, str, str], str] = report_by_command, study: str = "killed"
) -> str:
    """Return a study's report as JSON and Markdown, without its name and the ids and addresses of its runs.

    They are left to chance, and so is how wide a column with them is. What a trial has cost depends on the kills.
    """
    text = re.sub(r'"(seconds|epochs_trained)": [^,\n]+', r'"\1": some', report(place, study, "json"))
    with contextlib.suppress(ValueError):
        for table in json.loads(text.replace(": some", ": 0")):
            for row in table["rows"]:
                text = text.replace(f'"url": {json.dumps(row["url"])}', "its address")
                text = text.replace(f'"{row["run_id"]}"', "a run")
    markdown = re.sub(r"([ -])\1+", r"\1", report(place, study, "markdown"))
    markdown = re.sub(r"\|[^|]*\|$", "| a run |", markdown, flags=re.M)
    return f"{text}\n{markdown}".replace(study, "a study")


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


def check_stores(place: Place, trials: int = 12) -> list[str]:
    """Return a sentence for everything that is not as an undisturbed study leaves it."""
    problems = []
    for store, checks in (("mlflow", MLFLOW_CHECKS), ("optuna", OPTUNA_CHECKS)):
        for what, query in checks.items():
            rows = place.rows(store, query)
            if rows:
                problems.append(f"{store}: {what}: {rows[:5]}")
    ended = place.rows("mlflow", PAUSED_RUNS)
    waiting = place.rows("optuna", PAUSED_TRIALS)
    if sorted(ended) != sorted((number, int(str(epoch))) for number, epoch in waiting):
        problems.append(f"paused trials: {ended} in mlflow, {waiting} in optuna")
    numbers = [n for (n,) in place.rows("optuna", "SELECT number FROM trials ORDER BY number")]
    if numbers != list(range(trials)):
        problems.append(f"optuna: the trials are {numbers}, not 0 to {trials - 1}")
    return problems


# The number of each paused trial, and the epoch it is paused at, which is the last that it has.
PAUSED_RUNS = (
    "SELECT CAST(number.value AS INT), MAX(metrics.step) FROM tags AS outcome JOIN tags AS number USING (run_uuid) "
    "JOIN metrics USING (run_uuid) WHERE outcome.key = 'outcome' AND outcome.value = 'paused' "
    "AND number.key = 'trial_number' AND metrics.key = 'val/accuracy' GROUP BY run_uuid, number.value"
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
    closed: Counter[int] = field(default_factory=Counter)  # how often a server has answered so for a while
    taken: int = 0  # studies that were taken over from a process that was stopped, and woke
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
def launched(place: Place, workers: int) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """Run the study in a process group of its own; yields it and a function that reads what it has said."""
    start = place.log.stat().st_size if place.log.exists() else 0
    with place.log.open("ab") as out:
        process = subprocess.Popen(
            command(*place.run("--workers", str(workers))),
            cwd=place.folder,
            env=place.environment(),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )

    def said() -> str:
        with place.log.open("rb") as file:
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


def intrude(place: Place, whole: str, tally: Tally) -> None:
    """Run the study of another study store into the same tracking store, which refuses it but for another name.

    ``whole`` is the report of the undisturbed study, which that of the other name must equal, if it is known.
    """
    other = place.beside()
    fresh = not (other.folder / "mlruns").exists()
    for arguments in (other.run("--in-process"), ["plan", "killed"]):
        done = subprocess.run(
            command(*arguments), cwd=other.folder, env=other.environment(), capture_output=True, text=True
        )
        if done.returncode != 2 or "belongs to another study store" not in done.stderr:
            tally.problems.append(f"a second user's {arguments[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
        tally.refused += 1
    if not fresh:
        return
    if (other.folder / "mlruns").exists():
        tally.problems.append("a second user who was refused has a study store")
    done = subprocess.run(
        command(*other.run("--in-process", "--name", "theirs")),
        cwd=other.folder,
        env=other.environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode or (whole and read_reports(other, study="theirs") != whole):
        tally.problems.append(f"a second user's own study ended with {done.returncode}: {done.stderr[-2000:]}")


def refuse_for_a_while(gate: Gate, chance: random.Random, tally: Tally) -> None:
    """Let a tracking server refuse everything, or only artifacts or only the rest, and then take it again."""
    status = chance.choice(REFUSALS)
    about = chance.choice(("/", "/mlflow-artifacts/", "/api/2.0/mlflow/"))
    gate.rule = lambda method, path, length: status if about in path else None
    time.sleep(chance.uniform(0.1, 4))
    gate.open()
    tally.closed[status] += 1


def take_over(place: Place, process: subprocess.Popen[bytes], chance: random.Random, tally: Tally) -> None:
    """Stop a process group for longer than its lease, let another run its study, and wake it: it must notice."""
    other = place.beside()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGSTOP)
    if process.poll() is not None:
        return
    time.sleep(LEASE + 1)
    with launched(other, 1) as (second, said):
        _wait(second, 120, lambda: "started" in said())
        _wait(second, chance.uniform(0, 3))
        os.killpg(process.pid, signal.SIGCONT)
        _wait(process, 120)
        if process.poll() != 1 or "was taken over by process" not in place.log.read_text().splitlines()[-1]:
            tally.problems.append(f"who was taken over ended with {process.poll()}: {place.log.read_text()[-2000:]}")
        _wait(second, chance.uniform(0, 3))
        if second.poll() not in (None, 0):
            tally.problems.append(f"who took over ended with {second.poll()}: {said()[-2000:]}")
    tally.taken += 1
    time.sleep(LEASE + 1)


@dataclass(frozen=True)
class Round:
    """A study that is killed: where, how it is disturbed, and its undisturbed report and the seconds that took."""

    place: Place
    kind: Kind
    gate: Gate | None = None
    whole: str = ""
    took: float = 0

    def disturb(self, chance: random.Random, tally: Tally) -> bool:
        """Run the command once and kill at random instants; return whether it got through first.

        Kills come within about two trials of each other.
        """
        tally.launches += 1
        with launched(self.place, self.kind.workers) as (process, said):
            reach = self.took / 3
            if chance.random() < 0.8:  # most kills meet trials at work, the others the start
                _wait(process, 120, lambda: "started" in said())
                reach = self.took / 6
                if "started" in said():
                    self._vex(process, chance, tally)
            # A trial whose worker dies a third time in one run has failed, so workers are killed twice at most.
            victims = ["worker"] * chance.choice((0, 0, 1, 2)) + [chance.choice(("coordinator", "both"))]
            for victim in victims:
                _wait(process, chance.uniform(0, reach))
                if kill(process, victim, chance):
                    tally.kills[victim] += 1
            _wait(process, LAST_CHANCE)
            tally.fixed.update(FIXED.findall(said()))
            taken_over = process.returncode == 1 and "was taken over by process" in said()
            if process.returncode not in (0, -signal.SIGKILL) and not taken_over:
                tally.problems.append(f"the command ended with {process.returncode}: {said()[-2000:]}")
        if self.place.storage:
            time.sleep(LEASE + 1)  # of who was killed
        return process.returncode == 0

    def _vex(self, process: subprocess.Popen[bytes], chance: random.Random, tally: Tally) -> None:
        """Do something else than killing to a study whose trials are at work."""
        if self.gate is not None:
            for _ in range(chance.choice((1, 2))):
                _wait(process, chance.uniform(0, self.took / 6))
                refuse_for_a_while(self.gate, chance, tally)
        elif self.place.storage:
            _wait(process, chance.uniform(0, self.took / 6))
            take_over(self.place, process, chance, tally)
        elif chance.random() < 0.2:
            intrude(self.place, self.whole if self.kind.alike else "", tally)
        if chance.random() < 0.3 and process.poll() is None:
            stop_for_a_moment(process, chance, tally)

    def finish(self) -> str:
        """Run the command undisturbed; return what it said if it failed."""
        with launched(self.place, self.kind.workers) as (process, said):
            _wait(process, LAST_CHANCE)
            return "" if process.poll() == 0 else f"the undisturbed command ended with {process.returncode}: {said()}"

    def play(self, chance: random.Random, tally: Tally, kills: int) -> None:
        """Kill the study until it is complete or there were ``kills`` kills in all, finish it, and compare."""
        tally.rounds += 1
        enough = min(kills, tally.count + A_ROUND)
        while tally.count < enough and not tally.problems:
            if self.disturb(chance, tally):
                break
        failed = self.finish()
        problems = [failed] if failed else check_stores(self.place)
        if self.kind.alike and read_reports(self.place) != self.whole:
            problems.append(f"({self.kind.name}): the report differs from the undisturbed one")
        tally.problems += [f"round {tally.rounds}: {problem}" for problem in problems]


FIXED = re.compile(r"it waits again|copied|but no process is running it: \w+|it is tried again|sampled again")


@contextlib.contextmanager
def prepared(folder: Path, kind: Kind, server: Postgres | None) -> Iterator[Round]:
    """Yield a new study of a kind, with its stores."""
    place = furnish(folder, kind.search)
    if kind.stores == "server":
        (folder / "mlruns").mkdir()
        with gated_mlflow(folder / "mlruns") as gate:
            yield Round(replace(place, tracking=gate.address), kind, gate)
    elif kind.stores == "database" and server is not None:
        names = [f"{store}-{folder.name}" for store in ("mlflow", "optuna")]
        yield Round(replace(place, **dict(zip(("tracking", "storage"), map(server.create, names), strict=True))), kind)
    else:
        yield Round(place, kind)


def undisturbed(folder: Path, kinds: Sequence[Kind], tally: Tally) -> dict[str, tuple[str, float]]:
    """Return the report of each study when nothing happens to it, and the seconds that it takes.

    Where its stores are changes nothing about it.
    """
    found: dict[str, tuple[str, float]] = {}
    for kind in kinds:
        alike = f"{kind.workers} {kind.search}"
        if alike not in found:
            game = Round(furnish(folder / f"reference-{kind.name}", kind.search), kind)
            begun = time.monotonic()
            tally.problems += [text for text in [game.finish()] if text] + check_stores(game.place)
            found[alike] = read_reports(game.place), time.monotonic() - begun
        found[kind.name] = found[alike]
    return found


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
    kinds = [kind for kind in KINDS if options.only in (None, kind.name)]
    with contextlib.ExitStack() as stack:
        server = None
        if any(kind.stores == "database" for kind in kinds):
            if installed_postgres() is None:
                print("left out, since PostgreSQL is not installed: taken-over", file=sys.stderr)
                kinds = [kind for kind in kinds if kind.stores != "database"]
            else:
                server = stack.enter_context(postgres())
        whole = undisturbed(folder, kinds, tally)
        while tally.count < options.kills and not tally.problems:
            kind = kinds[tally.rounds % len(kinds)]
            with prepared(folder / f"round-{tally.rounds + 1}", kind, server) as game:
                report, took = whole[kind.name]
                replace(game, whole=report, took=took).play(chance, tally, options.kills)
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
        f"stopped for a moment: {tally.stops}; runs of a second user refused: {tally.refused}; "
        f"taken over while stopped: {tally.taken}",
        "a server refused for a while: " + (", ".join(f"{s} {n}" for s, n in sorted(tally.closed.items())) or "never"),
        *tally.problems,
        "every report equals the undisturbed one" if not tally.problems else "FAILED",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
