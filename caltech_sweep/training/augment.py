"""Augmentation of whole batches, each sample with parameters of its own.

torchvision draws one set of parameters a call, so a batch would share them; here they are drawn for every
(seed, epoch, sample), and each op is torchvision's functional op applied sample by sample, batched.

To add one, add an entry to AUGMENTATIONS; a setting that it reads and that no other does is a new field of TrialConfig.
torch is imported by the functions that compute, so that the names are known without it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from caltech_sweep.seeds import derive_seed

if TYPE_CHECKING:
    import numpy as np
    import torch

JITTER = 0.4  # brightness, contrast and saturation factors are uniform in 1 +- this


@dataclass(frozen=True)
class Augmentation:
    """An op on images.

    ``draw(generator, n, ...)`` returns which of n samples it changes, (n,) bool, and parameters of each, (n, k); its
    further arguments are the settings that it reads. ``apply(images, params)`` returns changed (m, 3, H, W) float
    images in [0, 1] of those samples that are changed, whose parameters are (m, k) float32. A ``fixed`` op has no
    parameters: what frozen layers make of the images that it gives can be kept.
    """

    draw: Callable[..., tuple[np.ndarray, np.ndarray]]
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    fixed: bool = False

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that it reads."""
        return tuple(inspect.signature(self.draw).parameters)[2:]


class Augmented(Protocol):
    """What is known here of a trial's config; it has the settings of its augmentations, too."""

    @property
    def seed(self) -> int: ...

    @property
    def augment(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Draws:
    """What an epoch draws for N samples, by op: which of them are changed, (N,) bool, and the parameters, (N, k)."""

    by_op: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    def __getitem__(self, index: torch.Tensor) -> Draws:
        return Draws({op: (chosen[index], params[index]) for op, (chosen, params) in self.by_op.items()})


def draw(config: Augmented, epoch: int, count: int) -> Draws:
    """Draw the parameters of every sample of one epoch; row i belongs to sample i whatever the batch order.

    Each op draws from a generator of its own, so that no op changes what another draws.
    """
    import numpy as np
    import torch

    drawn = {}
    for op in config.augment:
        generator = np.random.default_rng(derive_seed(config.seed, "augment", op, epoch))
        settings: dict[str, Any] = {name: getattr(config, name) for name in AUGMENTATIONS[op].settings}
        chosen, params = AUGMENTATIONS[op].draw(generator, count, **settings)
        drawn[op] = torch.from_numpy(chosen), torch.from_numpy(params.astype(np.float32))
    return Draws(drawn)


def apply(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Return augmented (N, 3, H, W) float images in [0, 1]; a sample without an op keeps its exact pixels."""
    images = images.clone()
    for op, (chosen, params) in draws.by_op.items():
        if chosen.any():
            here, values = chosen.to(images.device), params[chosen].to(images.device)
            images[here] = AUGMENTATIONS[op].apply(images[here], values)
    return images


# -- the ops -----------------------------------------------------------------------------------------------------------


def _uniform(
    generator: np.random.Generator, count: int, width: int, probability: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return which samples are changed, (count,) bool, and ``width`` numbers of each, uniform in +-1."""
    draws = generator.random((count, 1 + width))
    return draws[:, 0] < probability, 2 * draws[:, 1:] - 1


def _draw_flip(generator: np.random.Generator, n: int, augment_probability: float) -> tuple[np.ndarray, np.ndarray]:
    return _uniform(generator, n, 0, augment_probability)


def _draw_jitter(generator: np.random.Generator, n: int, augment_probability: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw factors of brightness, contrast and saturation: (n, 3)."""
    chosen, shifts = _uniform(generator, n, 3, augment_probability)
    return chosen, 1 + JITTER * shifts


def _draw_rotation(
    generator: np.random.Generator, n: int, augment_probability: float, rotation_degrees: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw angles in degrees: (n, 1)."""
    chosen, angles = _uniform(generator, n, 1, augment_probability)
    angles = rotation_degrees * angles
    return chosen & (angles[:, 0] != 0), angles


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
    """Turn each image counter-clockwise about its centre by (N, 1) degrees, nearest pixel, black outside."""
    import torch
    import torch.nn.functional as F

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


# In the order in which they are applied.
AUGMENTATIONS: dict[str, Augmentation] = {
    "hflip": Augmentation(_draw_flip, lambda images, params: images.flip(-1), fixed=True),
    "color_jitter": Augmentation(_draw_jitter, color_jitter),
    "rotation": Augmentation(_draw_rotation, rotate),
}


def idle_settings(config: Augmented) -> set[str]:
    """Return the settings of augmentations that none of a trial's own reads."""
    known = {name for op in AUGMENTATIONS.values() for name in op.settings}
    return known.difference(*(AUGMENTATIONS[op].settings for op in config.augment))
