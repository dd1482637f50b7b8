"""One evaluation for val, test and TenCrop: class probabilities averaged over an image's views, then the argmax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from caltech_sweep.training.pulse import beat

Views = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Of N images: mean negative log-likelihood, accuracy as a fraction, predictions and confidences (N,)."""

    loss: float
    accuracy: float
    predictions: torch.Tensor
    confidences: torch.Tensor


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
    """
    model.eval()
    predictions, confidences, losses = [], [], []
    for index in torch.arange(len(labels)).split(batch_size):
        beat()
        batch = views(index)
        count, number = batch.shape[:2]
        logits = forward(batch.flatten(0, 1)).float().view(count, number, -1)
        log_probabilities = logits.log_softmax(-1)
        mean = log_probabilities[:, 0]
        if number > 1:
            mean = log_probabilities.exp().mean(1).clamp_min(1e-38).log()
        target = labels[index].to(mean.device)
        losses.append(F.nll_loss(mean, target, reduction="sum").double().cpu())
        confidence, prediction = mean.exp().max(-1)
        predictions.append(prediction.cpu())
        confidences.append(confidence.cpu())
    predicted = torch.cat(predictions)
    accuracy = (predicted == labels).double().mean().item()
    return Evaluation(float(sum(losses)) / len(labels), accuracy, predicted, torch.cat(confidences))
