"""What a worker does with a job: load the images once, train, write the artifacts, report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from caltech_sweep.config import DatasetConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.machine import free_memory, keeps_freed_memory
from caltech_sweep.metrics import objective
from caltech_sweep.sweep.executors.base import Done, Epoch, Epochs, Job, Ready, Trained
from caltech_sweep.tracking.records import MISSING_TAG, NETWORK_INPUT, TOGETHER
from caltech_sweep.training.stopping import last_epoch

if TYPE_CHECKING:
    from caltech_sweep.data.cache import Progress
    from caltech_sweep.data.images import LoadedData

_ROOM = 8  # times the weights of a network: what a training of AlexNet with a batch of 64 takes in all
_loaded: list[tuple[DatasetConfig, LoadedData]] = []  # the last data set that this process has loaded


def load_images(
    config: DatasetConfig,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    verify: bool = False,
) -> LoadedData:
    """Load a data set for all trials that this process trains from now on."""
    _loaded[:] = [(config, load_dataset(config, progress, say, verify))]
    return _loaded[0][1]


def images_of(config: DatasetConfig) -> LoadedData:
    """Return a data set; the last one of this process is loaded already."""
    return _loaded[0][1] if _loaded and _loaded[0][0] == config else load_images(config)


def prepare() -> None:
    """Import what the first job needs."""
    from caltech_sweep.training import device, networks, results, trial  # noqa: F401


def train(job: Job, load: Callable[[DatasetConfig], LoadedData] = images_of) -> Epochs:
    """Run one job, yielding an event an epoch, and one before its artifacts are written where the next job need not
    wait for that; ``load`` returns its images. One that trains ``together`` with others says before each epoch that it
    is ready."""
    from caltech_sweep.training.device import environment, gpu_memory, pick_device
    from caltech_sweep.training.fit import Training
    from caltech_sweep.training.networks import input_note
    from caltech_sweep.training.results import write_artifacts
    from caltech_sweep.training.trial import open_trial

    keeps_freed_memory()
    device = pick_device(job.device)
    data = load(job.config.dataset)
    epochs = open_trial(job.config, data, device, job.weights_file, job.stages, job.weights_digest)
    scores: list[float] = []
    while True:
        try:
            result = next(epochs)
        except StopIteration as end:
            outcome = end.value
            break
        if isinstance(result, Training):
            if job.together:
                yield Ready(job.number, result)
            continue
        scores.append(result.val.scores[objective(job.config.objective).name])
        last = last_epoch(job.config, scores) is not None
        memory = None if result.reused else gpu_memory(device)
        yield Epoch(job.number, result.epoch, result.metrics(), result.reused, last, result.saving, memory)
    outcome = replace(outcome, weights={name: value.cpu() for name, value in outcome.weights.items()})
    free = free_memory()
    if free is None or free > _ROOM * sum(value.nbytes for value in outcome.weights.values()):
        yield Trained(job.number)
    missing = write_artifacts(job.folder, job.config, data, outcome, device)
    known = environment(device, job.config)
    tags = {f"environment.{key}": str(value) for key, value in known.items() if value is not None}
    if (note := input_note(job.config)) is not None:
        tags[NETWORK_INPUT] = note
    tags["reuse.epochs_reused"] = str(outcome.epochs_reused)
    tags["reuse.epochs_trained"] = str(outcome.epochs_trained)
    if len(scores) < job.config.epochs:
        tags["stopped_early"] = f"epoch {len(scores)} of {job.config.epochs}"
    if outcome.together > 1:
        tags[TOGETHER] = str(outcome.together)
    if outcome.warnings:
        tags["reuse.warnings"] = " ".join(f"{sentence}." for sentence in outcome.warnings)
    if missing:
        tags[MISSING_TAG] = json.dumps(missing, ensure_ascii=False)
    return Done(job.number, outcome.metrics(), tags)
