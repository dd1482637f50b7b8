"""One trial from config to outcome: train, keep the best-on-val weights, then evaluate test once with them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch

from caltech_sweep.config import TrialConfig
from caltech_sweep.data.images import LoadedData
from caltech_sweep.errors import OutOfMemoryError, UsageError
from caltech_sweep.training.evaluate import Evaluation
from caltech_sweep.training.fit import EpochResult, Training, fit
from caltech_sweep.training.models import build_model


@dataclass(frozen=True)
class TrialOutcome:
    """What a completed trial leaves: its best epoch, its test evaluations and the best-on-val weights."""

    best: EpochResult
    test: Evaluation
    test_tencrop: Evaluation | None
    weights: dict[str, torch.Tensor]

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


def run_trial(
    config: TrialConfig, data: LoadedData, device: torch.device, weights_file: Path | None = None
) -> Generator[EpochResult, None, TrialOutcome]:
    """Train one trial, yielding each epoch; the generator's value is its outcome.

    Raises DivergedError, OutOfMemoryError naming the batch size, or ModelError before the first epoch.
    """
    try:
        training = Training(config, data, build_model(config, len(data.split.classes), weights_file), device)
        yield from fit(training)
        assert training.best is not None
        training.model.load_state_dict(training.best_weights)
        test = training.evaluate("test")
        tencrop = training.evaluate("test", "tencrop") if config.test_views == "tencrop" else None
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemoryError(f"a batch of {config.batch_size} images did not fit on {device}") from error
    return TrialOutcome(training.best, test, tencrop, training.best_weights)
