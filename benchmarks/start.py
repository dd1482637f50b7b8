"""Where the seconds before the first step go: a study of one short trial on drawn images, by the lines that it prints.

    python benchmarks/start.py [PYTHON ...] [--rounds 3]

Each PYTHON is one that has caltech-sweep installed, such as those of two versions; without any it is this one. A round
runs the study in a new folder, where tables, images and caches are made, and then for one more trial.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

STUDY = """\
title: One short trial
dataset: {name: shapes, resize: 32, crop: 32, classes: 3, images_per_class: 8}
trials: 1
sampler: {name: random, seed: 0}
fixed: {arch: mobilenet_v3_small, epochs: 1, batch_size: 8}
space: {lr: {low: 1e-3, high: 1e-1, log: true}}
"""
SIGNS = {"is handed out": ": started", "first epoch": "epoch 1/1", "end": ""}  # what the last line of each holds


def seconds(python: str, folder: Path, trials: int) -> dict[str, float]:
    """Return the seconds from the start of a run to each sign, of which the last is its end."""
    command = [python, "-m", "caltech_sweep", "run", "start", "--trials", str(trials), "--threads", "1"]
    found, start = {}, time.perf_counter()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found.update({name: time.perf_counter() - start for name, sign in SIGNS.items() if sign in line})
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return found


def main() -> None:
    """Print the medians of some rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="*", default=[sys.executable])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    measured: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for python in options.pythons:
            with tempfile.TemporaryDirectory() as place:
                (Path(place) / "sweeps").mkdir()
                (Path(place) / "sweeps" / "start.yaml").write_text(STUDY, encoding="utf-8")
                for trials, which in ((1, "in a new folder"), (2, "one more trial")):
                    for name, value in seconds(python, Path(place), trials).items():
                        measured[python, which, name].append(value)
    for (python, which, name), values in measured.items():
        print(f"{python}: {which}, {name}: {statistics.median(values):.2f} s")
    print(f"other work on the machine: load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
