"""Augmentation of whole batches, each sample with parameters of its own.

torchvision draws one set of parameters a call, so a batch would share them; here they are drawn for every
(seed, epoch, sample), and each op is torchvision's functional op applied sample by sample, batched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from caltech_sweep.seeds import derive_seed

JITTER = 0.4  # brightness, contrast and saturation factors are uniform in 1 +- this


@dataclass(frozen=True)
class AugmentParams:
    """Parameters of N samples: flips (N,) bool, jitter (N, 3) factors, angles (N,) in degrees."""

    flip: torch.Tensor
    jitter: torch.Tensor
    angle: torch.Tensor

    def __getitem__(self, index: torch.Tensor) -> AugmentParams:
        return AugmentParams(self.flip[index], self.jitter[index], self.angle[index])


def draw_params(
    seed: int, epoch: int, count: int, ops: Sequence[str], probability: float, degrees: float
) -> AugmentParams:
    """Draw the parameters of every sample of one epoch; row i belongs to sample i whatever the batch order.

    Each op draws from a generator of its own, so that no op changes what another draws.
    """

    def draw(op: str, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which samples the op changes, (count,) bool, and ``width`` numbers of each, uniform in +-1."""
        draws = np.random.default_rng(derive_seed(seed, "augment", op, epoch)).random((count, 1 + width))
        return (draws[:, 0] < probability) & (op in ops), 2 * draws[:, 1:] - 1

    flips, _ = draw("hflip", 0)
    jitters, shifts = draw("color_jitter", 3)
    turns, angles = draw("rotation", 1)
    jitter = np.where(jitters[:, None], 1 + JITTER * shifts, 1.0)
    angle = np.where(turns, degrees * angles[:, 0], 0.0)
    as_float = [torch.from_numpy(array.astype(np.float32)) for array in (jitter, angle)]
    return AugmentParams(torch.from_numpy(flips), *as_float)


def _grey(images: torch.Tensor) -> torch.Tensor:
    weights = images.new_tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def color_jitter(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Adjust brightness, contrast and saturation, in that order; images (N, 3, H, W) float in [0, 1]."""
    brightness, contrast, saturation = (f.view(-1, 1, 1, 1) for f in factors.unbind(1))
    images = (images * brightness).clamp(0, 1)
    mean = _grey(images).mean((2, 3), keepdim=True)
    images = (images * contrast + mean * (1 - contrast)).clamp(0, 1)
    return (images * saturation + _grey(images) * (1 - saturation)).clamp(0, 1)


def rotate(images: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """Turn each image counter-clockwise about its centre, nearest pixel, black outside."""
    height, width = images.shape[-2:]
    radians = degrees.double() * (math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    ys = torch.arange(height, device=images.device, dtype=torch.float64) - (height - 1) / 2
    xs = torch.arange(width, device=images.device, dtype=torch.float64) - (width - 1) / 2
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    c, s = cos.view(-1, 1, 1), sin.view(-1, 1, 1)
    source_x = (x * c - y * s) / (width / 2)
    source_y = (x * s + y * c) / (height / 2)
    grid = torch.stack([source_x, source_y], dim=-1).to(images.dtype)
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def apply(images: torch.Tensor, params: AugmentParams) -> torch.Tensor:
    """Return augmented (N, 3, H, W) float images in [0, 1]; a sample without an op keeps its exact pixels."""
    flip, jitter, angle = (t.to(images.device) for t in (params.flip, params.jitter, params.angle))
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    jittered = (jitter != 1).any(1)
    if jittered.any():
        images[jittered] = color_jitter(images[jittered], jitter[jittered])
    turned = angle != 0
    if turned.any():
        images[turned] = rotate(images[turned], angle[turned])
    return images
