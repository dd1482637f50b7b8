"""Everything that is to be measured on a GPU, in one command, beside a bare torch loop.

    CALTECH101_ROOT=... python benchmarks/gpu.py [--device cuda] [--out gpu.md] [--tables loops twice]
    python benchmarks/gpu.py --device cpu --small        # some minutes: shows that all of it works

Four tables: the training loop of some networks beside a bare one (``benchmarks/training.py``); the rows of the table
"scratch" as they are shipped, in float32, and with two trials or as many as fit at a time on the device; how far two
runs of one row differ, which are the same bit for bit on a CPU only; and what saving a training state after every epoch
costs. ``--small`` takes few images and epochs. Without CALTECH101_ROOT the images are drawn.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from caltech_sweep.config import TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.data.images import LoadedData
from caltech_sweep.study.file import load_study
from caltech_sweep.training.device import pick_device
from caltech_sweep.training.keys import CacheOptions
from caltech_sweep.training.trial import TrialOutcome, run_trial

HERE = Path(__file__).resolve().parent
STUDY = HERE.parent / "sweeps" / "scratch.yaml"
LOOPS = (("alexnet", 64), ("alexnet", 256), ("mobilenet_v3_small", 64), ("resnet50", 64))
WAYS = {
    "shipped": [],
    "float32": ["--set", "precision=float32"],
    "two-at-a-time": ["--per-device", "2"],
    "as-many-as-fit": ["--per-device", "auto"],
}
SMALL = {"dataset.images_per_class": 8, "epochs": 2, "step_size": 1, "batch_size": 16}


def settings(options: argparse.Namespace) -> list[str]:
    """Return the arguments of ``--set`` with which all studies run."""
    values: dict[str, object] = {} if os.environ.get("CALTECH101_ROOT") else {"dataset.name": "shapes"}
    if options.small:
        values |= {**SMALL, "dataset.classes": 3}
    return [f"{name}={value}" for name, value in values.items()]


def command(arguments: Sequence[str], folder: Path) -> tuple[float, str]:
    """Run Python with some arguments in a folder; return its seconds and what it wrote, or end with that."""
    start = time.perf_counter()
    environment = {**os.environ, "CALTECH_SWEEP_DATA": str(folder / "data")}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start, done.stdout


def loops(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Yield the table of the training loop."""
    yield "| network | batch | side | images/s | of the bare loop's time | of the best bare one's |\n|" + " --- |" * 6
    for arch, batch in (("alexnet", 4), ("alexnet", 8)) if options.small else LOOPS:
        few = ["--images-per-class", "1", "--rounds", "2"]
        sizes = ["--arch", arch, "--batch-size", str(batch)]
        sizes += few if options.small else ["--images-per-class", "1000", "--rounds", "5"]
        said = command([str(HERE / "training.py"), "--device", options.device, *sizes], folder)[1]
        for line in said.splitlines():
            side, found, rest = line.rpartition(" images/s, ")
            if found:
                name, speed = side.rsplit(maxsplit=1)
                shares = [share.split()[0] for share in rest.split(", ")[:2]]
                yield f"| {' | '.join((arch, str(batch), name.strip(), speed, *shares))} |"


def studies(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Yield the table of whole runs of a study, and its report."""
    yield "| run of all rows of scratch | seconds | of the first |\n| --- | --- | --- |"
    first = 0.0
    own = [part for value in settings(options) for part in ("--set", value)]
    rows = ["--row", "First model", "--row", "Second model"] if options.small else []
    common = ["--trials", "5", "--no-reuse", "--device", options.device, *rows, *own]
    for name in options.ways:
        call = ["-m", "caltech_sweep", "run", str(STUDY), "--name", name, *common, *WAYS[name]]
        seconds, _ = command(call, folder)
        first = first or seconds
        yield f"| {name} | {seconds:.1f} | {seconds / first:.3f} |"
    yield "\n" + command(["-m", "caltech_sweep", "report", *options.ways], folder)[1]


def trained(config: TrialConfig, data: LoadedData, device: torch.device, use: CacheOptions | None) -> TrialOutcome:
    """Return what a trial ends with."""
    trial = run_trial(config, data, device, stages=use)
    while True:
        try:
            next(trial)
        except StopIteration as end:
            outcome: TrialOutcome = end.value
            return outcome


def twice(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Yield the table of two runs of one row, and that of its saved states."""
    definition = load_study(str(STUDY), settings(options))
    device, config = pick_device(options.device), definition.row_config(definition.rows[0])
    data = load_dataset(config.dataset)
    times, outcomes = [], []
    every = CacheOptions(folder / "states", 10**12, frozenset(range(1, config.epochs + 1)), math.inf)
    for use in (None, None, every):
        start = time.perf_counter()
        outcomes.append(trained(config, data, device, use))
        times.append(time.perf_counter() - start)
    one, other, _ = outcomes
    apart = max(
        float((one.weights[name].double() - value.double()).abs().max()) for name, value in other.weights.items()
    )
    scores = [f"{outcome.best.val.scores['accuracy']:.4f}" for outcome in outcomes]
    yield "| two runs of one row | |\n| --- | --- |"
    yield f"| largest difference of a weight | {apart:.3g} |\n| best validation accuracy | {scores[0]}, {scores[1]} |"
    held = outcomes[2].cache_seconds
    yield "\n| a state saved after every epoch | |\n| --- | --- |"
    yield f"| seconds with, without | {times[2]:.1f}, {times[1]:.1f} |\n| of these, held up by saving | {held:.2f} |"
    yield f"| share of the training | {held / times[2]:.4f}, to be below 0.02 |"


TABLES = {"loops": loops, "studies": studies, "twice": twice}


def machine(device: str) -> str:
    """Return the device and the versions that were measured."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{os.cpu_count()} cores"
    return (
        f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}, load average {os.getloadavg()[0]:.1f}\n"
    )


def main() -> None:
    """Measure and write the tables, each line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="few images and epochs")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="only these")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="only these, of studies")
    parser.add_argument("--out", type=Path, help="write to a file as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, lines = Path(name), [machine(options.device)]
        os.environ["CALTECH_SWEEP_DATA"] = str(folder / "data")
        print(lines[0])
        for table in options.tables:
            for line in itertools.chain(TABLES[table](options, folder), [""]):
                print(line, flush=True)
                lines.append(line)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
