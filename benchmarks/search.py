"""How well the search searches: the product compared with Optuna's own loop, on real learning curves.

A trial trains a small network on scikit-learn's handwritten digits (real 8 x 8 images) for at most EPOCHS epochs, in a
few tenths of a second. Six settings are sampled, three of them on log scales; momentum matters only to SGD (a
conditional one: for the other optimisers it changes nothing, which a sampler has to find out). Every method has, per
seed, the same data and initial weights:

    ours tpe         this package: queue, coordinator and TPE with its defaults
    stock tpe        study.ask and study.tell with TPESampler
    ours tpe+median  both with the median pruner
    stock tpe+median
    stock tpe+hyperband
    ours tpe+asha    trials pause at rungs and the best go on, from where they paused
    random           study.ask and study.tell with RandomSampler

    python benchmarks/search.py --seeds 10 --trials 40 [--only NAME ...] [--json FILE]

The figures of a run are the best validation accuracy that it found, the mean accuracy of its trials after the first
STARTUP (what the sampler proposes once it has a model; those of random are as good as any), and the epochs that it
trained. Differences are paired by seed, with a 95% t interval. Then the best accuracy so far against the epochs that
were trained, as means over seeds with their intervals, and the share of its epochs with which ``ours tpe+asha``
reaches the best of ``stock tpe+median``: the median over seeds, where a seed that never reaches it counts as infinity.
Epochs that a paused trial has behind it are not trained again, and not counted again. Since it spends few epochs a
trial, ``ours tpe+asha`` has three times as many trials.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import optuna
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn

from caltech_sweep.config import TrialConfig
from caltech_sweep.study.components import component_problems
from caltech_sweep.study.definition import Choices, Component, Range, StudyDefinition
from caltech_sweep.sweep.executors.base import Done, Epoch, Job
from caltech_sweep.sweep.executors.in_process import InProcessExecutor
from caltech_sweep.testing import MemoryTracker, epoch_metrics, scripted_coordinator

EPOCHS = 18
STARTUP = 10  # trials that TPE draws at random by default
TRAIN, VALIDATION = 300, 1200  # images; few to train on, so that the settings matter
MARKS = (50, 100, 200, 300, 400, 500, 700)  # epochs trained, at which searches are compared
SPACE = {
    "lr": Range(1e-4, 10.0, log=True),
    "weight_decay": Range(1e-7, 1e-1, log=True),
    "momentum": Range(0.0, 0.99),
    "batch_size": Range(8, 256, log=True, integer=True),
    "step_size": Range(2, 18, integer=True),
    "optimizer": Choices(("sgd", "adam", "adamw")),
}
Curve = Generator[float, None, None]


def digits(seed: int) -> tuple[torch.Tensor, ...]:
    """Return train images and labels, validation images and labels: (n, 64) floats in [0, 1] and (n,) classes."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))[: TRAIN + VALIDATION]
    images = torch.tensor(data.data[order] / 16.0, dtype=torch.float32)
    labels = torch.tensor(data.target[order])
    return images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]


def train(config: TrialConfig, data: Sequence[torch.Tensor], seed: int) -> Curve:
    """Yield the validation accuracy after each epoch."""
    images, labels, others, truth = data
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)  # of its own: a paused trial goes on among others
    network = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    sgd = {"momentum": config.momentum} if config.optimizer == "sgd" else {}
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer = kind(network.parameters(), config.lr, weight_decay=config.weight_decay, **sgd)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, config.step_size, config.gamma)
    for _ in range(config.epochs):
        for index in torch.randperm(len(images), generator=generator).split(config.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[index]), labels[index]).backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            accuracy = float((network(others).argmax(1) == truth).float().mean())
        yield accuracy


class Search:
    """What one search trained: each epoch in the order in which it was, as its trial and its validation accuracy."""

    def __init__(self) -> None:
        self.epochs: list[tuple[int, float]] = []

    def trained(self, trial: int, accuracy: float) -> None:
        """Take an epoch that was trained."""
        self.epochs.append((trial, accuracy))

    @property
    def best_so_far(self) -> list[float]:
        """The best accuracy after each epoch."""
        return list(itertools.accumulate((accuracy for _, accuracy in self.epochs), max))

    @property
    def scores(self) -> list[float]:
        """The best accuracy of each trial, in the order in which they began."""
        scores: dict[int, float] = {}
        for trial, accuracy in self.epochs:
            scores[trial] = max(accuracy, scores.get(trial, 0.0))
        return [scores[trial] for trial in sorted(scores)]

    def epochs_to(self, accuracy: float) -> float:
        """Return how many epochs were trained until an accuracy was reached; infinity if it never was."""
        return next((n for n, best in enumerate(self.best_so_far, 1) if best >= accuracy), math.inf)


def ours(seed: int, trials: int, pruner: Component | None) -> Search:
    """Search with this package. A trial that is handed out again goes on from the epoch that it had reached."""
    data, search = digits(seed), Search()
    curves: dict[int, Curve] = {}
    known: dict[int, list[float]] = {}

    def runner(job: Job) -> Generator[Epoch, None, Done]:
        curve, seen = curves.setdefault(job.number, train(job.config, data, seed)), known.setdefault(job.number, [])
        for epoch in range(1, EPOCHS + 1):
            reused = epoch <= len(seen)
            if not reused:
                seen.append(next(curve))
                search.trained(job.number, seen[-1])
            yield Epoch(job.number, epoch, epoch_metrics(seen[epoch - 1]), reused)
        return Done(job.number, {"best/val_accuracy": max(seen), "test/accuracy": 0.0, "best/epoch": 1.0})

    definition = StudyDefinition(
        f"search-{seed}", "Search", trials, {"name": "shapes"}, {"epochs": EPOCHS}, SPACE, (),
        sampler=Component("tpe", {"seed": seed}), pruner=pruner,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        scripted_coordinator(definition, InProcessExecutor(runner), MemoryTracker(), Path(folder)).run()
    return search


def stock(
    seed: int, trials: int, sampler: optuna.samplers.BaseSampler, pruner: optuna.pruners.BasePruner | None
) -> Search:
    """Search with Optuna's own ask-and-tell loop."""
    data, search = digits(seed), Search()
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner or optuna.pruners.NopPruner())
    for _ in range(trials):
        trial = study.ask()
        config = TrialConfig(
            epochs=EPOCHS,
            lr=trial.suggest_float("lr", 1e-4, 10.0, log=True),
            weight_decay=trial.suggest_float("weight_decay", 1e-7, 1e-1, log=True),
            momentum=trial.suggest_float("momentum", 0.0, 0.99),
            batch_size=trial.suggest_int("batch_size", 8, 256, log=True),
            step_size=trial.suggest_int("step_size", 2, 18),
            optimizer=trial.suggest_categorical("optimizer", ["sgd", "adam", "adamw"]),
        )
        best, pruned = 0.0, False
        for epoch, accuracy in enumerate(train(config, data, seed), 1):
            best = max(best, accuracy)
            search.trained(trial.number, accuracy)
            trial.report(accuracy, epoch)
            if pruner is not None and epoch < EPOCHS and trial.should_prune():
                pruned = True
                break
        study.tell(trial, None if pruned else best, optuna.trial.TrialState.PRUNED if pruned else None)
    return search


ASHA = Component("asha", {"min_epochs": 2, "factor": 3})
METHODS: dict[str, Callable[[int, int], Search]] = {
    "ours tpe": lambda seed, trials: ours(seed, trials, None),
    "stock tpe": lambda seed, trials: stock(seed, trials, optuna.samplers.TPESampler(seed=seed), None),
    "ours tpe+median": lambda seed, trials: ours(seed, trials, Component("median")),
    "stock tpe+median": lambda seed, trials: stock(
        seed, trials, optuna.samplers.TPESampler(seed=seed), optuna.pruners.MedianPruner()
    ),
    "stock tpe+hyperband": lambda seed, trials: stock(
        seed, trials, optuna.samplers.TPESampler(seed=seed), optuna.pruners.HyperbandPruner(max_resource=EPOCHS)
    ),
    "random": lambda seed, trials: stock(seed, trials, optuna.samplers.RandomSampler(seed=seed), None),
}
PAIRS = (("ours tpe", "stock tpe"), ("ours tpe", "random"), ("ours tpe+median", "stock tpe+median"))
if not list(component_problems("pruner", ASHA)):
    METHODS["ours tpe+asha"] = lambda seed, trials: ours(seed, 3 * trials, ASHA)


def _search(name: str, seed: int, trials: int) -> Search:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return METHODS[name](seed, trials)


def interval(values: Sequence[float]) -> str:
    """Return the mean of some values with its 95% t interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.4f} [one seed]"
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.4f} [{mean - reach:+.4f}, {mean + reach:+.4f}]"


def summary(found: Mapping[str, Sequence[Search]]) -> Iterator[str]:
    """Yield the lines about each method, and about the differences of some."""
    later = {
        name: [statistics.fmean(run.scores[STARTUP:] or run.scores) for run in runs] for name, runs in found.items()
    }
    best = {name: [max(run.scores) for run in runs] for name, runs in found.items()}
    for name, runs in found.items():
        epochs = statistics.fmean(len(run.epochs) for run in runs)
        yield f"{name:20} best {interval(best[name])}, after start-up {interval(later[name])}, {epochs:.0f} epochs"
    yield ""
    for one, other in PAIRS:
        if {one, other} <= found.keys():
            differences = ([a - b for a, b in zip(of[one], of[other], strict=True)] for of in (later, best))
            yield f"{one} - {other}: after start-up {interval(next(differences))}, best {interval(next(differences))}"


def progress(found: Mapping[str, Sequence[Search]]) -> Iterator[str]:
    """Yield a table of the best accuracy so far after some numbers of epochs; a search that has ended keeps its own."""
    yield f"{'epochs trained':20} " + " ".join(f"{n:>25}" for n in MARKS)
    for name, runs in found.items():
        columns = ([(run.best_so_far[:mark] or [0.0])[-1] for run in runs] for mark in MARKS)
        yield f"{name:20} " + " ".join(f"{interval(column):>25}" for column in columns)


def share(found: Mapping[str, Sequence[Search]], one: str, other: str) -> str:
    """Return with which share of another method's epochs one reaches what that found: the median over seeds."""
    shares = [a.epochs_to(max(b.scores)) / len(b.epochs) for a, b in zip(found[one], found[other], strict=True)]
    each = ", ".join(f"{value:.2f}" for value in shares)
    return f"{one} reaches the best of {other} with {statistics.median(shares):.2f} of its epochs (seeds: {each})"


def main() -> None:
    """Search with every method and seed, and print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, list[Search]] = {}
    start, context = time.perf_counter(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        for name in arguments.only:
            each = [pool.submit(_search, name, seed, arguments.trials) for seed in range(arguments.seeds)]
            found[name] = [search.result() for search in each]
            print(f"{name}: after {time.perf_counter() - start:.0f} s", flush=True)
    print(f"\n{arguments.seeds} seeds, {arguments.trials} trials of at most {EPOCHS} epochs\n")
    print("\n".join([*summary(found), "", *progress(found), ""]))
    for one in ("ours tpe+asha", "ours tpe+median", "stock tpe+hyperband", "ours tpe"):
        if {one, "stock tpe+median"} <= found.keys():
            print(share(found, one, "stock tpe+median"))
    if arguments.json:
        arguments.json.write_text(json.dumps({name: [run.epochs for run in runs] for name, runs in found.items()}))


if __name__ == "__main__":
    main()
