"""When a training ends: after all its epochs, or early."""

from __future__ import annotations

import math
from collections.abc import Sequence

from caltech_sweep.config import TrialConfig
from caltech_sweep.metrics import objective


def last_epoch(config: TrialConfig, scores: Sequence[float]) -> int | None:
    """Return the epoch after which a training ends, or None where it goes on.

    ``scores`` are those of the objective on validation, from epoch 1 on. With a ``patience`` of n a training ends
    early once n epochs in a row were none of them better than the best before by more than ``min_delta`` (Prechelt,
    "Early stopping - but when?", 1998; as Lightning and Keras count).
    """
    goal, best, since = objective(config.objective), math.inf, 0
    for epoch, score in enumerate(scores[: config.epochs], 1):
        loss = goal.loss(score)
        best, since = (loss, 0) if loss + config.min_delta < best else (best, since + 1)
        if epoch == config.epochs or since == config.patience:
            return epoch
    return None
