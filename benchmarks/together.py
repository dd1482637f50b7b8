"""Trials that train a classifier on kept features: one after the other, and several as one product a step.

    python benchmarks/together.py [--arch resnet18] [--trials 24] [--epochs 30] [--together 8] [--rounds 2]

Whole commands on drawn images, each with new stores and no states, whose image cache and features are there. Seconds
are from the first trial's start to the end of the last, by the lines that are printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

STUDY = """\
title: Classifiers
dataset: {{name: shapes, resize: 64, crop: 64, classes: 8, images_per_class: {images}}}
trials: {trials}
sampler: {{name: random, seed: 0}}
fixed: {{arch: {arch}, freeze: conv, batch_size: {batch_size}, epochs: {epochs}, outputs: 101, augment: []}}
space:
  lr: {{low: 1e-3, high: 1e-1, log: true}}
  weight_decay: {{low: 1e-6, high: 1e-2, log: true}}
"""


def seconds(folder: Path, most: int) -> float:
    """Return how long the trials of the study take in a folder, so many at once."""
    shutil.rmtree(folder / "mlruns", ignore_errors=True)
    for state in folder.glob("data/reuse/stage-*"):
        shutil.rmtree(state)
    command = [sys.executable, "-m", "caltech_sweep", "run", "heads", "--together", str(most)]
    began = ended = 0.0
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            began = began or (time.perf_counter() if ": started" in line else 0.0)
            ended = time.perf_counter() if ": complete" in line else ended
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return ended - began


def main() -> None:
    """Print the median of some rounds for each number of trials at once, and the ratio to one at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--images", type=int, default=500, help="of a class in each split")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--together", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    found: dict[int, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "sweeps").mkdir()
        (Path(place) / "sweeps" / "heads.yaml").write_text(STUDY.format(**vars(options)), encoding="utf-8")
        seconds(Path(place), options.trials)  # caches and features
        for _ in range(options.rounds):
            for most in (1, *(options.together or (8, 24))):
                found[most].append(seconds(Path(place), most))
    base = statistics.median(found[1])
    for most, values in found.items():
        mine = statistics.median(values)
        print(f"{most} at once: {mine:.1f} s, {base / mine:.2f} times as fast as one after the other")
    print(f"other work on the machine: load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
