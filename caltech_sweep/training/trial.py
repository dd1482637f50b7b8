"""One trial from config to outcome: train, keep the best-on-val weights, then evaluate test once with them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from caltech_sweep.config import TrialConfig
from caltech_sweep.data.images import LoadedData
from caltech_sweep.errors import NotFiniteError, OutOfMemoryError
from caltech_sweep.metrics import BEST_EPOCH, all_logged, logged_at_best
from caltech_sweep.training.checkpoints import TrialCheckpoints
from caltech_sweep.training.device import is_out_of_memory
from caltech_sweep.training.evaluate import Evaluation
from caltech_sweep.training.fit import EpochResult, Training
from caltech_sweep.training.keys import CacheOptions
from caltech_sweep.training.mirror import store_of
from caltech_sweep.training.models import build_model, load_state, not_finite


@dataclass(frozen=True)
class TrialOutcome:
    """What a completed trial leaves: its best epoch, its test evaluations and the best-on-val weights.

    ``warnings`` are sentences for the user about what could not be reused or kept; ``cache_seconds`` is how long
    loading and saving stages took; ``transform_input`` is a property of GoogLeNet and Inception. With so many
    trials, at most, it trained ``together``.
    """

    best: EpochResult
    test: Evaluation | None  # None where the dataset has no test images
    test_tencrop: Evaluation | None
    weights: dict[str, torch.Tensor]
    epochs_reused: int = 0
    epochs_trained: int = 0
    cache_seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    transform_input: bool = False
    together: int = 1

    def metrics(self) -> dict[str, float]:
        """Return the once-a-trial metrics by their names in MLflow."""
        test = self.test.scores if self.test is not None else {}
        tencrop = self.test_tencrop.scores if self.test_tencrop is not None else {}
        return {
            **{logged_at_best(name): value for name, value in self.best.val.scores.items()},
            BEST_EPOCH: float(self.best.epoch),
            **all_logged("test", test),
            **all_logged("test_tencrop", tencrop),
        }


def _train(training: Training, stages: TrialCheckpoints | None) -> Iterator[EpochResult | Training]:
    """Yield every epoch of a trial: those that are stored first, then the others as they are trained and kept.

    The training itself is yielded before each that it trains. The model has the weights of the best epoch at the end.
    """
    if stages is not None:
        stages.resume()
    yield from tuple(training.history)
    while not training.ended:
        yield training
        result = training.run_epoch()
        yield result if stages is None else replace(result, saving=stages.after(result))
    if broken := not_finite(training.best_weights):
        raise NotFiniteError(f"the weights {broken[0]} became NaN or infinite; try a lower learning rate")
    load_state(training.model, training.best_weights, assign=True)  # its own may still be being saved


def run_trial(
    config: TrialConfig,
    data: LoadedData,
    device: torch.device,
    weights_file: Path | None = None,
    stages: CacheOptions | None = None,
    digest: str | None = None,
) -> Generator[EpochResult, None, TrialOutcome]:
    """Train one trial, yielding each epoch; the generator's value is its outcome.

    ``stages`` says where earlier work is found and this trial's is kept: what is there is not trained again, and the
    outcome is the same, on the CPU bit for bit. A test is always evaluated again. ``digest`` is the SHA-256 that the
    file of the initial weights must have.

    Raises DivergedError for a number that is NaN or infinite, OutOfMemoryError naming the batch size, or ModelError
    before the first epoch.
    """
    with closing(open_trial(config, data, device, weights_file, stages, digest)) as trial:
        while True:
            try:
                happened = next(trial)
            except StopIteration as end:
                outcome: TrialOutcome = end.value
                return outcome
            if isinstance(happened, EpochResult):
                yield happened


def open_trial(
    config: TrialConfig,
    data: LoadedData,
    device: torch.device,
    weights_file: Path | None = None,
    stages: CacheOptions | None = None,
    digest: str | None = None,
) -> Generator[EpochResult | Training, None, TrialOutcome]:
    """Train one trial as :func:`run_trial` does, and yield its training before each epoch that it trains.

    Who has several may train that epoch of them together, by :func:`~.together.train_together`.
    """
    store = store_of(stages) if stages else None
    kept = None
    try:
        model = build_model(config, len(data.split.classes), weights_file, digest)
        training = Training(config, data, model, device, store if stages and stages.features else None)
        kept = TrialCheckpoints(stages, training, weights_file, digest) if stages else None
        yield from _train(training, kept)
        assert training.best is not None
        tested = bool(data.split.test)
        test = training.evaluate("test") if tested else None
        tencrop = training.evaluate("test", "tencrop") if tested and config.test_views == "tencrop" else None
        if kept is not None:
            kept.settle()  # before its warnings are taken
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"a batch of {config.batch_size} images did not fit on {device}") from error
    finally:
        if kept is not None:
            kept.close()
    reused = sum(epoch.reused for epoch in training.history)
    warnings = (*training.warnings, *store.take_warnings()) if store else ()
    return TrialOutcome(
        training.best,
        test,
        tencrop,
        training.best_weights,
        reused,
        training.epoch - reused,
        kept.seconds if kept else 0.0,
        warnings,
        bool(getattr(training.model, "transform_input", False)),
        training.together,
    )
