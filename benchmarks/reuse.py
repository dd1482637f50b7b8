"""Time what reuse saves, each a pair in one run on real images at 224 px: shared prefixes, and kept frozen features.

    CALTECH101_ROOT=... python benchmarks/reuse.py [--classes 10] [--images 26] [--scale 3] [--threads 2]

Epochs and steps of the shipped rows are divided by ``--scale``; weights are random, which costs the same. Both halves
of a pair must end in the same weights, bit for bit, or the run fails. A ratio "without I/O" leaves out the time that
loading and saving stages took.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.data.images import LoadedData
from caltech_sweep.training.cache import Cache
from caltech_sweep.training.keys import CacheOptions
from caltech_sweep.training.schedule import learning_rates, shared_epochs
from caltech_sweep.training.trial import TrialOutcome, run_trial

TRANSFER = ((0.03, 24, 30), (0.03, 27, 30), (0.01, 10, 20), (0.01, 10, 30), (0.01, 15, 20))  # lr, step size, epochs
BUDGET = 20 * 10**9  # bytes
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Timed:
    """Trials that ran one after the other: seconds in all, seconds of stage I/O, and their outcomes."""

    seconds: float
    io: float
    outcomes: Sequence[TrialOutcome]


def run_all(configs: Sequence[TrialConfig], data: LoadedData, folder: Path | None) -> Timed:
    """Run the trials, saving where another of them branches; without a folder nothing is reused."""
    outcomes = []
    start = time.perf_counter()
    for config in configs:
        rates = learning_rates(config)
        branches = frozenset(shared_epochs(rates, learning_rates(other)) for other in configs) - {0}
        use = CacheOptions(folder, BUDGET, branches, every_seconds=math.inf) if folder else None
        trial = run_trial(config, data, CPU, stages=use)
        while True:
            try:
                next(trial)
            except StopIteration as end:
                outcomes.append(end.value)
                break
    return Timed(time.perf_counter() - start, sum(outcome.cache_seconds for outcome in outcomes), outcomes)


def compare(title: str, on: Timed, off: Timed) -> None:
    """Print the ratio of a pair; raise SystemExit when reuse has changed a bit."""
    for one, other in zip(on.outcomes, off.outcomes, strict=True):
        same = all(torch.equal(one.weights[name], value) for name, value in other.weights.items())
        if not same or one.metrics() != other.metrics():
            raise SystemExit(f"{title}: reuse changed the result")
    trained, asked = (sum(outcome.epochs_trained for outcome in timed.outcomes) for timed in (on, off))
    ratio, without = on.seconds / off.seconds, (on.seconds - on.io) / off.seconds
    print(
        f"{title}: {on.seconds:.1f} s with reuse, {off.seconds:.1f} s without: ratio {ratio:.3f}, "
        f"{without:.3f} without I/O; {trained} of {asked} epochs trained; results bit-identical",
        flush=True,
    )


def main() -> None:
    """Run both pairs and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=26, help="at most so many of each class in each part")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--scale", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=["transfer", "frozen"], help="one of the two pairs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dataset = DatasetConfig(classes=options.classes, images_per_class=options.images)
    data = load_dataset(dataset)
    sizes = ", ".join(f"{len(data.split.part(part))} {part}" for part in ("train", "val", "test"))
    print(
        f"AlexNet at {dataset.crop} px, {sizes} images, {options.threads} threads, epochs and steps / {options.scale}"
    )

    def config(lr: float, step_size: int, epochs: int, **changes: str) -> TrialConfig:
        scaled = [max(1, round(value / options.scale)) for value in (step_size, epochs)]
        base = TrialConfig(dataset=dataset, lr=lr, step_size=scaled[0], epochs=scaled[1], drop_last=False)
        return replace(base, batch_size=options.batch, **changes)  # type: ignore[arg-type]

    with tempfile.TemporaryDirectory() as name:
        rows, place = [config(*row) for row in TRANSFER], Path(name)
        if options.only != "frozen":
            compare("transfer table", run_all(rows, data, place), run_all(rows, data, None))
            Cache(place, 0).clear()
        for title, lr in (("frozen conv, first trial", 0.01), ("frozen conv, second trial", 0.012)):
            if options.only == "transfer":
                break
            trial = [config(lr, 10, 30, freeze="conv")]
            compare(title, run_all(trial, data, place), run_all(trial, data, None))


if __name__ == "__main__":
    main()
