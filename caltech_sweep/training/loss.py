"""What a training step sees and minimises: drawn and mixed images, their targets, and the weight of each class."""

from __future__ import annotations

import math

import numpy as np
import torch

from caltech_sweep.config import TrialConfig
from caltech_sweep.seeds import derive_seed


def class_weights(config: TrialConfig, labels: torch.Tensor, outputs: int) -> torch.Tensor | None:
    """Return the weight of each output, (outputs,), in inverse proportion to its training images; None: all are alike.

    The weights of the classes are scikit-learn's "balanced" ones. An output without images keeps 1.
    """
    if config.class_weights == "none":
        return None
    counts = labels.bincount(minlength=outputs).double()
    there = counts > 0
    weights = torch.ones(outputs, dtype=torch.float64)
    weights[there] = len(labels) / (int(there.sum()) * counts[there])
    return weights.float()


def epoch_order(config: TrialConfig, labels: torch.Tensor, epoch: int) -> torch.Tensor:
    """Return the images of an epoch in their order, (N,): a shuffle, or N draws with each class equally probable.

    The draws are those of torch's WeightedRandomSampler with the weight 1 / (images of its class) for each image.
    """
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "shuffle", epoch))
    if config.sample_weights == "none":
        return torch.randperm(len(labels), generator=generator)
    weights = 1 / labels.bincount().double()[labels]
    return torch.multinomial(weights, len(labels), replacement=True, generator=generator)


def mixed(
    config: TrialConfig, epoch: int, step: int, images: torch.Tensor, labels: torch.Tensor, outputs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each of (n, 3, H, W) images with its neighbour, by mixup or by cutmix; where both are set, by either.

    Returns the images and their targets as shares of each output, (n, outputs). What is drawn depends on the seed, the
    epoch and the step only (Zhang et al., 1710.09412; Yun et al., 1905.04899; torchvision's MixUp and CutMix).
    """
    draws = np.random.default_rng(derive_seed(config.seed, "mix", epoch, step))
    cuts = config.cutmix > 0 and (config.mixup == 0 or draws.random() < 0.5)
    alpha = config.cutmix if cuts else config.mixup
    share = float(draws.beta(alpha, alpha))
    neighbours = images.roll(1, 0)
    if cuts:
        height, width = images.shape[-2:]
        half = 0.5 * math.sqrt(1 - share)
        (top, bottom), (left, right) = (
            (max(0, centre - int(half * side)), min(side, centre + int(half * side)))
            for side, centre in ((side, int(draws.integers(side))) for side in (height, width))
        )
        images = images.clone()
        images[..., top:bottom, left:right] = neighbours[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = images * share + neighbours * (1 - share)
    targets = images.new_zeros(len(labels), outputs).scatter_(1, labels[:, None], 1)  # one_hot waits for a GPU
    return images, targets * share + targets.roll(1, 0) * (1 - share)


def loss_share(targets: torch.Tensor, part: torch.Tensor, weights: torch.Tensor | None) -> float:
    """Return which share of a batch's mean loss the mean loss of a part of it is."""
    if weights is None or targets.is_floating_point():
        return len(part) / len(targets)
    return float(weights[part].sum() / weights[targets].sum())
