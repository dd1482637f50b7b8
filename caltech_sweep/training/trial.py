"""One trial from config to outcome: train, keep the best-on-val weights, then evaluate test once with them."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from caltech_sweep.config import TrialConfig
from caltech_sweep.data.images import LoadedData
from caltech_sweep.errors import OutOfMemoryError, UsageError
from caltech_sweep.training.evaluate import Evaluation
from caltech_sweep.training.fit import EpochResult, Training, fit
from caltech_sweep.training.models import build_model
from caltech_sweep.training.reuse import StageUse
from caltech_sweep.training.stages import TrialStages
from caltech_sweep.training.store import open_store

_NO_MEMORY = re.compile(  # what torch, CUDA, cuDNN and oneDNN say
    r"out of memory|allocate memory|not enough memory|ALLOC_FAILED|could not create a (primitive|memory)"
)


@dataclass(frozen=True)
class TrialOutcome:
    """What a completed trial leaves: its best epoch, its test evaluations and the best-on-val weights.

    ``warnings`` are sentences for the user about what could not be reused or kept; ``stage_seconds`` is how long
    loading and saving stages took.
    """

    best: EpochResult
    test: Evaluation
    test_tencrop: Evaluation | None
    weights: dict[str, torch.Tensor]
    epochs_reused: int = 0
    epochs_trained: int = 0
    stage_seconds: float = 0.0
    warnings: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """Return the once-a-trial metrics by their names in MLflow."""
        metrics = {
            "best/val_accuracy": self.best.val.accuracy,
            "best/epoch": float(self.best.epoch),
            "test/accuracy": self.test.accuracy,
            "test/loss": self.test.loss,
        }
        if self.test_tencrop is not None:
            metrics["test_tencrop/accuracy"] = self.test_tencrop.accuracy
            metrics["test_tencrop/loss"] = self.test_tencrop.loss
        return metrics


def pick_device(name: str | None = None) -> torch.device:
    """Return the named device, or the first GPU, or the CPU; raise UsageError for one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device: {name!r} cannot be used on this machine; try cpu") from error
    return device


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that memory ran out; on the CPU torch has no type of its own for that."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def _train(training: Training, stages: TrialStages | None) -> Iterator[EpochResult]:
    """Yield every epoch of a trial: those that are stored first, then the others as they are trained and kept."""
    if stages is not None:
        stages.resume()
    yield from tuple(training.history)
    for result in fit(training):
        if stages is not None:
            stages.after(result)
        yield result


def run_trial(
    config: TrialConfig,
    data: LoadedData,
    device: torch.device,
    weights_file: Path | None = None,
    stages: StageUse | None = None,
) -> Generator[EpochResult, None, TrialOutcome]:
    """Train one trial, yielding each epoch; the generator's value is its outcome.

    ``stages`` says where earlier work is found and this trial's is kept: what is there is not trained again, and the
    outcome is the same, on the CPU bit for bit. A test is always evaluated anew.

    Raises DivergedError, OutOfMemoryError naming the batch size, or ModelError before the first epoch.
    """
    store = open_store(stages.folder, stages.budget) if stages else None
    try:
        model = build_model(config, len(data.split.classes), weights_file)
        training = Training(config, data, model, device, store if stages and stages.features else None)
        kept = TrialStages(stages, training, weights_file) if stages else None
        yield from _train(training, kept)
        assert training.best is not None
        training.model.load_state_dict(training.best_weights)
        test = training.evaluate("test")
        tencrop = training.evaluate("test", "tencrop") if config.test_views == "tencrop" else None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"a batch of {config.batch_size} images did not fit on {device}") from error
    reused = sum(epoch.reused for epoch in training.history)
    warnings = store.take_warnings() if store else ()
    return TrialOutcome(
        training.best,
        test,
        tencrop,
        training.best_weights,
        reused,
        training.epoch - reused,
        kept.seconds if kept else 0.0,
        warnings,
    )
