"""Where the seconds before the first step go: a study of one short trial on drawn images, by the lines that it prints.

    python benchmarks/start.py [PYTHON ...] [--rounds 3] [--ray]

Each PYTHON is one that has caltech-sweep installed, such as those of two versions; without any it is this one. A round
runs the study in a new folder, where tables, images and caches are made, and then for one more trial. With --ray it
runs on a warm cluster of one node with one processor, and so does the same trial by hand with Optuna, MLflow and Ray.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

STUDY = """\
title: One short trial
dataset: {name: shapes, resize: 32, crop: 32, classes: 3, images_per_class: 8}
trials: 1
sampler: {name: random, seed: 0}
fixed: {arch: mobilenet_v3_small, epochs: 1, batch_size: 8}
space: {lr: {low: 1e-3, high: 1e-1, log: true}}
"""
BY_HAND = """\
import sys

import mlflow
import optuna
import ray

ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")


@ray.remote(num_cpus=1)
class Slot:
    def train(self, lr):
        import torch
        import torchvision

        torch.set_num_threads(1)
        model = torchvision.models.mobilenet_v3_small(num_classes=8)
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
        total = 0.0
        for batch, target in zip(torch.rand(40, 3, 32, 32).split(8), torch.randint(8, (40,)).split(8)):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(batch), target)
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total / 5


slot = Slot.remote()
study = optuna.create_study(storage="sqlite:///study.db", study_name="start", load_if_exists=True)
mlflow.set_tracking_uri("sqlite:///runs.db")
mlflow.set_experiment("start")
trial = study.ask()
with mlflow.start_run():
    lr = trial.suggest_float("lr", 1e-3, 1e-1, log=True)
    mlflow.log_param("lr", lr)
    print("[0]: started", flush=True)
    loss = ray.get(slot.train.remote(lr))
    mlflow.log_metric("loss", loss)
    print("[0]: epoch 1/1", flush=True)
study.tell(trial, loss)
"""
SIGNS = {"is handed out": ": started", "first epoch": "epoch 1/1"}  # what the last line of each holds


def seconds(command: Sequence[str], folder: Path) -> dict[str, float]:
    """Return the seconds from the start of a command to each sign, and to its end."""
    found, start, said = {}, time.perf_counter(), ""
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            found.update({name: time.perf_counter() - start for name, sign in SIGNS.items() if sign in line})
    found["end"] = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}:\n{said}")
    return found


@contextmanager
def cluster() -> Iterator[str]:
    """Start a Ray cluster of one processor on this machine, whose address this is until it is ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--num-cpus=1",
    ]
    quiet = ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats"]
    os.environ["RAY_AUTH_MODE"] = "disabled"  # of all that take part, whether this machine has a token or not
    with subprocess.Popen([*start, *quiet], stdout=subprocess.PIPE, text=True, start_new_session=True) as head:
        assert head.stdout is not None
        try:
            if not any("Ray runtime started" in line for line in head.stdout):
                raise SystemExit(f"{' '.join(start)} ended with exit code {head.wait()}")
            yield f"127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)


def measure(ways: dict[str, tuple[list[str], list[str]]], rounds: int) -> None:
    """Print the medians of some rounds of each way: its command in a new folder, and its command after that."""
    measured: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for way, commands in ways.items():
            with tempfile.TemporaryDirectory() as place:
                (Path(place) / "sweeps").mkdir()
                (Path(place) / "sweeps" / "start.yaml").write_text(STUDY, encoding="utf-8")
                for command, which in zip(commands, ("in a new folder", "one more trial"), strict=True):
                    for name, value in seconds(command, Path(place)).items():
                        measured[way, which, name].append(value)
    for (way, which, name), values in measured.items():
        print(f"{way}: {which}, {name}: {statistics.median(values):.2f} s")
    print(f"other work on the machine: load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def main() -> None:
    """Measure each interpreter's caltech-sweep, and with --ray the work by hand as well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="*", default=[sys.executable])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="on a warm cluster, beside the same trial by hand")
    options = parser.parse_args()

    def ours(python: str, *extra: str) -> tuple[list[str], list[str]]:
        command = [python, "-m", "caltech_sweep", "run", "start", "--threads", "1", *extra]
        return [*command, "--trials", "1"], [*command, "--trials", "2"]

    if not options.ray:
        measure({python: ours(python) for python in options.pythons}, options.rounds)
        return
    with cluster() as address:
        by_hand = [sys.executable, "-c", BY_HAND, address]
        extra = ("--executor", "ray", "--address", address)
        ways = {python: ours(python, *extra) for python in options.pythons}
        measure({"by hand": (by_hand, by_hand), **ways}, options.rounds)


if __name__ == "__main__":
    main()
