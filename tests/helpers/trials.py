"""A trial that trains in a second, run to its end."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data.images import LoadedData
from caltech_sweep.training.fit import EpochResult
from caltech_sweep.training.keys import CacheOptions
from caltech_sweep.training.trial import TrialOutcome, run_trial

CPU = torch.device("cpu")
SHAPES = DatasetConfig(name="shapes", resize=32, crop=32, classes=3, images_per_class=8)
CONFIG = TrialConfig(
    dataset=SHAPES, arch="mobilenet_v3_small", epochs=4, step_size=2, batch_size=8, lr=0.05, augment=("hflip",)
)


def use_of(folder: Path, save_at: frozenset[int] = frozenset(range(1, 5)), budget: int = 10**9) -> CacheOptions:
    return CacheOptions(folder, budget, save_at, every_seconds=math.inf)


def run(
    config: TrialConfig, data: LoadedData, use: CacheOptions | None = None
) -> tuple[list[EpochResult], TrialOutcome]:
    trial, epochs = run_trial(config, data, CPU, stages=use), []
    while True:
        try:
            epochs.append(next(trial))
        except StopIteration as end:
            return epochs, end.value
