"""One evaluation for val, test and TenCrop: class probabilities averaged over an image's views, then the argmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from caltech_sweep.errors import NotFiniteError
from caltech_sweep.heartbeat import beat
from caltech_sweep.metrics import METRICS, Outputs

Views = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Of N images: what was measured, by the names of METRICS, predictions and confidences (N,).

    Raises NotFiniteError for numbers that are none, wherever they come from.
    """

    scores: Mapping[str, float]
    predictions: torch.Tensor
    confidences: torch.Tensor

    @property
    def loss(self) -> float:
        """The mean negative log-likelihood."""
        return self.scores["loss"]

    @property
    def accuracy(self) -> float:
        """The share of right predictions."""
        return self.scores["accuracy"]

    def __post_init__(self) -> None:
        for name, value in self.scores.items():
            if not math.isfinite(value):
                raise NotFiniteError(f"the evaluation's {name} is {value}; try a lower learning rate")
        if not self.confidences.isfinite().all():
            raise NotFiniteError("the evaluation's confidences are not all finite; try a lower learning rate")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    labels: torch.Tensor,
    batch_size: int,
    views: Views,
    forward: Callable[[torch.Tensor], torch.Tensor],
) -> Evaluation:
    """Evaluate ``model``, put into eval mode, on every image.

    ``views`` maps an index (n,) to V inputs of each image, (n, V, ...); ``forward`` maps (n, ...) inputs to logits.
    Raises NotFiniteError when any logit is NaN or infinite. What is found stays on the device until the end, since
    reading it waits for a GPU.
    """
    model.eval()
    predictions, confidences, losses, ranks, finite = [], [], [], [], []
    for index in torch.arange(len(labels)).split(batch_size):
        beat()
        batch = views(index)
        count, number = batch.shape[:2]
        logits = forward(batch.flatten(0, 1)).float().view(count, number, -1)
        finite.append(logits.isfinite().all())
        log_probabilities = logits.log_softmax(-1)
        mean = log_probabilities[:, 0]
        if number > 1:
            mean = log_probabilities.exp().mean(1).clamp_min(1e-38).log()
        target = labels[index].to(mean.device, non_blocking=True)
        losses.append(F.nll_loss(mean, target, reduction="sum").double())
        own = mean.gather(1, target[:, None])
        ranks.append((mean > own).sum(1))
        confidence, prediction = mean.exp().max(-1)
        predictions.append(prediction)
        confidences.append(confidence)
    if not torch.stack(finite).all():
        raise NotFiniteError("the network's outputs became NaN or infinite; try a lower learning rate")
    predicted = torch.cat(predictions).cpu()
    loss = sum(torch.stack(losses).tolist()) / len(labels)
    outputs = Outputs(labels.numpy(), predicted.numpy(), loss, torch.cat(ranks).cpu().numpy())
    scores = {name: metric.compute(outputs) for name, metric in METRICS.items()}
    return Evaluation(scores, predicted, torch.cat(confidences).cpu())
