"""How well the search searches: the product beside Optuna's own loop, on real learning curves.

A trial trains a small network on scikit-learn's handwritten digits (real 8 x 8 images) for at most EPOCHS epochs, in a
few hundredths of a second. Six settings are sampled, three of them on log scales; momentum matters only to SGD. Every
method has the same number of trials and, per seed, the same data and initial weights:

    ours tpe         this package: queue, coordinator and TPE with its defaults
    stock tpe        study.ask and study.tell with TPESampler
    ours tpe+median  both with the median pruner
    stock tpe+median
    stock tpe+hyperband
    random           study.ask and study.tell with RandomSampler

    python benchmarks/search.py --seeds 10 --trials 40 [--json FILE]

The figures of a run are the best validation accuracy that it found, the mean accuracy of its trials after the first
STARTUP (what the sampler proposes once it has a model; those of random are as good as any), and the epochs that it
trained. Differences are paired by seed, with a 95% t interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np
import optuna
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn

from caltech_sweep.config import TrialConfig
from caltech_sweep.study.definition import Choices, Component, Range, StudyDefinition
from caltech_sweep.sweep.executors.base import Done, Epoch, Job
from caltech_sweep.sweep.executors.in_process import InProcessExecutor
from caltech_sweep.testing import MemoryTracker, epoch_metrics, scripted_coordinator

EPOCHS = 18
STARTUP = 10  # trials that TPE draws at random by default
TRAIN, VALIDATION = 300, 1200  # images; few to train on, so that the settings matter
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
    network = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    sgd = {"momentum": config.momentum} if config.optimizer == "sgd" else {}
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer = kind(network.parameters(), config.lr, weight_decay=config.weight_decay, **sgd)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, config.step_size, config.gamma)
    for _ in range(config.epochs):
        for index in torch.randperm(len(images)).split(config.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[index]), labels[index]).backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            yield float((network(others).argmax(1) == truth).float().mean())


def ours(seed: int, trials: int, pruner: str | None) -> tuple[list[float], list[int]]:
    """Search with this package; return each trial's best accuracy and its number of epochs."""
    data, epochs, scores = digits(seed), [0] * trials, [0.0] * trials

    def runner(job: Job) -> Generator[Epoch, None, Done]:
        for epoch, accuracy in enumerate(train(job.config, data, seed), 1):
            epochs[job.number], scores[job.number] = epoch, max(scores[job.number], accuracy)
            yield Epoch(job.number, epoch, epoch_metrics(accuracy))
        return Done(job.number, {"best/val_accuracy": scores[job.number], "test/accuracy": 0.0, "best/epoch": 1.0})

    definition = StudyDefinition(
        f"search-{seed}", "Search", trials, {"name": "shapes"}, {"epochs": EPOCHS}, SPACE, (),
        sampler=Component("tpe", {"seed": seed}), pruner=Component(pruner) if pruner else None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        scripted_coordinator(definition, InProcessExecutor(runner), MemoryTracker(), Path(folder)).run()
    return scores, epochs


def stock(
    seed: int, trials: int, sampler: optuna.samplers.BaseSampler, pruner: optuna.pruners.BasePruner | None
) -> tuple[list[float], list[int]]:
    """Search with Optuna's own ask-and-tell loop."""
    data, epochs, scores = digits(seed), [], []
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
        best, pruned, epoch = 0.0, False, 0
        for epoch, accuracy in enumerate(train(config, data, seed), 1):
            best = max(best, accuracy)
            trial.report(accuracy, epoch)
            if pruner is not None and epoch < EPOCHS and trial.should_prune():
                pruned = True
                break
        study.tell(trial, None if pruned else best, optuna.trial.TrialState.PRUNED if pruned else None)
        scores.append(best)
        epochs.append(epoch)
    return scores, epochs


METHODS: dict[str, Callable[[int, int], tuple[list[float], list[int]]]] = {
    "ours tpe": lambda seed, trials: ours(seed, trials, None),
    "stock tpe": lambda seed, trials: stock(seed, trials, optuna.samplers.TPESampler(seed=seed), None),
    "ours tpe+median": lambda seed, trials: ours(seed, trials, "median"),
    "stock tpe+median": lambda seed, trials: stock(
        seed, trials, optuna.samplers.TPESampler(seed=seed), optuna.pruners.MedianPruner()
    ),
    "stock tpe+hyperband": lambda seed, trials: stock(
        seed, trials, optuna.samplers.TPESampler(seed=seed), optuna.pruners.HyperbandPruner(max_resource=EPOCHS)
    ),
    "random": lambda seed, trials: stock(seed, trials, optuna.samplers.RandomSampler(seed=seed), None),
}
PAIRS = (("ours tpe", "stock tpe"), ("ours tpe", "random"), ("ours tpe+median", "stock tpe+median"))


def interval(values: Sequence[float]) -> str:
    """Return the mean of some values with its 95% t interval."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return f"{mean:+.4f} [{mean - reach:+.4f}, {mean + reach:+.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = {
        name: [method(seed, arguments.trials) for seed in range(arguments.seeds)] for name, method in METHODS.items()
    }
    figures = {name: [statistics.fmean(scores[STARTUP:]) for scores, _ in runs] for name, runs in found.items()}
    print(f"{arguments.seeds} seeds, {arguments.trials} trials of at most {EPOCHS} epochs\n")
    for name, runs in found.items():
        best = statistics.fmean(max(scores) for scores, _ in runs)
        epochs = statistics.fmean(sum(epochs) for _, epochs in runs)
        print(f"{name:20} best {best:.4f}, after start-up {statistics.fmean(figures[name]):.4f}, {epochs:.0f} epochs")
    print()
    for one, other in PAIRS:
        differences = [a - b for a, b in zip(figures[one], figures[other], strict=True)]
        bests = [max(a) - max(b) for (a, _), (b, _) in zip(found[one], found[other], strict=True)]
        print(f"{one} - {other}: after start-up {interval(differences)}, best {interval(bests)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
