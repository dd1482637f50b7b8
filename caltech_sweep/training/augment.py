"""Augmentation of whole batches, each sample with parameters of its own.

torchvision draws one set of parameters a call, so a batch would share them; here they are drawn for every
(seed, epoch, sample), and each op is torchvision's functional op applied sample by sample, batched.

To add one, add an entry to AUGMENTATIONS; a setting that it reads and that no other does is a new field of TrialConfig.
torch is imported by the functions that compute, so that the names are known without it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

from caltech_sweep.seeds import derive_seed

if TYPE_CHECKING:
    import numpy as np
    import torch

    Drawn = tuple[np.ndarray, np.ndarray]

Box = tuple[int, int, int, int]  # top, left, height and width in pixels
JITTER = 0.4  # brightness, contrast and saturation factors are uniform in 1 +- this


@dataclass(frozen=True)
class Augmentation:
    """An op on images.

    ``draw(generator, n, ...)`` returns which of n samples it changes, (n,) bool, and parameters of each, (n, k); its
    further arguments are the settings that it reads. ``apply(images, params)`` returns changed (m, 3, H, W) float
    images in [0, 1] of those samples that are changed, whose parameters are (m, k) float32. A ``fixed`` op has no
    parameters: what frozen layers make of the images that it gives can be kept. An op that ``cuts`` has no ``apply``:
    in place of the centre crop it takes a box out of the whole image, whose height and width it gets after the
    sample's parameters. The ``version`` is raised where the op changes what it gives.
    """

    draw: Callable[..., Drawn]
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    fixed: bool = False
    cuts: Callable[[Sequence[float], int, int], Box] | None = None
    version: int = 0

    @cached_property
    def settings(self) -> tuple[str, ...]:
        """The settings that it reads."""
        return tuple(inspect.signature(self.draw).parameters)[2:]


class Augmented(Protocol):
    """What is known here of a trial's config; it has the settings of its augmentations, too."""

    @property
    def seed(self) -> int: ...
    @property
    def mixup(self) -> float: ...
    @property
    def cutmix(self) -> float: ...

    @property
    def augment(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Draws:
    """What an epoch draws for N samples, by op: which of them are changed, (N,) bool, and the parameters, (N, k)."""

    by_op: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    def __getitem__(self, index: torch.Tensor) -> Draws:
        return Draws({op: (chosen[index], params[index]) for op, (chosen, params) in self.by_op.items()})


def mixes(config: Augmented) -> bool:
    """Tell whether the images of a batch are mixed, so that what a network sees depends on its neighbours."""
    return config.mixup > 0 or config.cutmix > 0


def all_fixed(config: Augmented) -> bool:
    """Tell whether a network sees no image that could not be kept: none is mixed, or changed by what is drawn."""
    return not mixes(config) and all(AUGMENTATIONS[op].fixed for op in config.augment)


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
    """Return augmented (N, 3, H, W) float images in [0, 1]; a sample without an op keeps its exact pixels.

    What is drawn stays on the processor, and which samples it is about is decided there: a GPU need not be waited for.
    """
    images = images.clone()
    for op, (chosen, params) in draws.by_op.items():
        change = AUGMENTATIONS[op].apply
        if change is not None and chosen.any():
            here = chosen.nonzero().squeeze(1).to(images.device, non_blocking=True)
            images.index_copy_(0, here, change(images.index_select(0, here), params[chosen]))
    return images


def cuts(draws: Draws) -> list[Callable[[int, int], Box]] | None:
    """Return what gives each sample's box by the height and width of its image; None: all have the centre crop."""
    for op, (_, params) in draws.by_op.items():
        if (cut := AUGMENTATIONS[op].cuts) is not None:
            return [partial(cut, row) for row in params.tolist()]
    return None


def versions(ops: Sequence[str]) -> dict[str, int]:
    """Return the versions of those ops that are not in their first."""
    return {op: AUGMENTATIONS[op].version for op in ops if AUGMENTATIONS[op].version}


# -- what they draw ----------------------------------------------------------------------------------------------------

_ATTEMPTS = 10  # to find a box that fits, as torchvision has it
_LEVELS = 30  # of a magnitude, above none


def _uniform(generator: np.random.Generator, count: int, width: int, probability: float) -> Drawn:
    """Return which samples are changed, (count,) bool, and ``width`` numbers of each, uniform in +-1."""
    draws = generator.random((count, 1 + width))
    return draws[:, 0] < probability, 2 * draws[:, 1:] - 1


def _flip(generator: np.random.Generator, n: int, augment_probability: float) -> Drawn:
    return _uniform(generator, n, 0, augment_probability)


def _jitter(generator: np.random.Generator, n: int, augment_probability: float) -> Drawn:
    """Draw factors of brightness, contrast and saturation: (n, 3)."""
    chosen, shifts = _uniform(generator, n, 3, augment_probability)
    return chosen, 1 + JITTER * shifts


def _rotation(generator: np.random.Generator, n: int, augment_probability: float, rotation_degrees: float) -> Drawn:
    """Draw angles in degrees: (n, 1)."""
    chosen, angles = _uniform(generator, n, 1, augment_probability)
    angles = rotation_degrees * angles
    return chosen & (angles[:, 0] != 0), angles


def _attempts(
    generator: np.random.Generator, n: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw boxes whose area, as a share, and ratio of width to height lie between two numbers each.

    Returns areas and ratios of some attempts, (n, attempts) each, and where the box lies, (n, 2) in [0, 1).
    """
    import numpy as np

    area = generator.uniform(*scale, (n, _ATTEMPTS))
    aspect = np.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1]), (n, _ATTEMPTS)))
    return area, aspect, generator.random((n, 2))


def _resized_crop(
    generator: np.random.Generator, n: int, resized_crop_scale: float, resized_crop_ratio: float
) -> Drawn:
    """Draw attempts at a box of every sample, where it lies, and the largest ratio: (n, 2 * attempts + 3)."""
    import numpy as np

    ratio = (1 / resized_crop_ratio, resized_crop_ratio)
    drawn = _attempts(generator, n, (resized_crop_scale, 1.0), ratio)
    return np.ones(n, dtype=bool), np.hstack([*drawn, np.full((n, 1), resized_crop_ratio)])


def _box(params: Sequence[float], height: int, width: int) -> Box:
    """Return the first box that fits; if none does, the largest one at the centre, as torchvision has it."""
    *attempts, down, right, ratio = params
    for area, aspect in zip(attempts[:_ATTEMPTS], attempts[_ATTEMPTS:], strict=True):
        pixels = area * height * width
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            return min(int(down * (height - h + 1)), height - h), min(int(right * (width - w + 1)), width - w), h, w
    w, h = min(width, round(height * ratio)), min(height, round(width * ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def _erasing(generator: np.random.Generator, n: int, augment_probability: float, erasing_scale: float) -> Drawn:
    """Draw a box of some samples: height, width, and where it lies: (n, 4)."""
    import numpy as np

    chosen = generator.random(n) < augment_probability
    area, aspect, places = _attempts(generator, n, (min(0.02, erasing_scale), erasing_scale), (0.3, 3.3))
    sides: np.ndarray = np.sqrt(np.stack([area * aspect, area / aspect], axis=-1))
    fits = np.asarray((sides <= 1).all(-1))
    return chosen & fits.any(1), np.hstack([sides[np.arange(n), fits.argmax(1)], places])


def _blur(
    generator: np.random.Generator, n: int, augment_probability: float, blur_kernel: int, blur_sigma: float
) -> Drawn:
    """Draw standard deviations in pixels; the kernel's width is the same for all: (n, 2)."""
    import numpy as np

    chosen = generator.random(n) < augment_probability
    return chosen, np.stack([generator.uniform(0.1, blur_sigma, n), np.full(n, blur_kernel)], axis=1)


# How far each op of image_ops.AUTO_OPS goes at most; of those that follow, solarize goes from 1 to 0.
_TRIVIAL = (0.0, 0.99, 0.99, 32.0, 32.0, 135.0, 0.99, 0.99, 0.99, 0.99, 6.0)
_RANDOM = (0.0, 0.3, 0.3, 150 / 331, 150 / 331, 30.0, 0.9, 0.9, 0.9, 0.9, 4.0)
_SIGNED, _POSTERIZE, _SOLARIZE, _AUTO_OPS = range(1, 10), 10, 11, 14


def _magnitudes(ops: np.ndarray, levels: np.ndarray, signs: np.ndarray, largest: tuple[float, ...]) -> np.ndarray:
    """Return the magnitudes of some ops at some levels of 0 to 1, with a sign for those that have one."""
    import numpy as np

    reach = np.array([*largest, *[0.0] * (_AUTO_OPS - len(largest))])[ops] * levels
    found = np.where(np.isin(ops, _SIGNED), reach * signs, reach)
    found = np.where(ops == _POSTERIZE, np.round(8 - reach), found)
    return np.where(ops == _SOLARIZE, 1 - levels, found)


def _trivial_augment(generator: np.random.Generator, n: int) -> Drawn:
    """Draw an op and its magnitude: (n, 2)."""
    import numpy as np

    ops, levels = generator.integers(_AUTO_OPS, size=n), generator.integers(_LEVELS + 1, size=n) / _LEVELS
    signs = np.where(generator.random(n) < 0.5, -1.0, 1.0)
    return ops != 0, np.stack([ops, _magnitudes(ops, levels, signs, _TRIVIAL)], axis=1)


def _rand_augment(generator: np.random.Generator, n: int, rand_augment_ops: int, rand_augment_magnitude: int) -> Drawn:
    """Draw some ops after another, each with its magnitude: (n, 2 * ops)."""
    import numpy as np

    ops = generator.integers(_AUTO_OPS, size=(n, rand_augment_ops))
    signs = np.where(generator.random(ops.shape) < 0.5, -1.0, 1.0)
    levels = np.full(ops.shape, rand_augment_magnitude / _LEVELS)
    found = np.stack([ops, _magnitudes(ops, levels, signs, _RANDOM)], axis=-1)
    return (ops != 0).any(1), found.reshape(n, -1)


# -- the registry ------------------------------------------------------------------------------------------------------


def _batched(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def change(images: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        import caltech_sweep.training.image_ops as image_ops

        changed: torch.Tensor = getattr(image_ops, name)(images, params)
        return changed

    return change


# In the order in which they are applied.
AUGMENTATIONS: dict[str, Augmentation] = {
    "random_resized_crop": Augmentation(_resized_crop, cuts=_box, version=2),
    "hflip": Augmentation(_flip, _batched("hflip"), fixed=True),
    "vflip": Augmentation(_flip, _batched("vflip"), fixed=True),
    "trivial_augment": Augmentation(_trivial_augment, _batched("trivial_augment")),
    "rand_augment": Augmentation(_rand_augment, _batched("rand_augment")),
    "color_jitter": Augmentation(_jitter, _batched("color_jitter")),
    "rotation": Augmentation(_rotation, _batched("rotate")),
    "gaussian_blur": Augmentation(_blur, _batched("gaussian_blur")),
    "random_erasing": Augmentation(_erasing, _batched("erase")),
}


def not_augmenting(augment: Iterable[str]) -> set[str]:
    """Return the settings of augmentations that none of these reads."""
    known = {name for op in AUGMENTATIONS.values() for name in op.settings}
    return known.difference(*(AUGMENTATIONS[op].settings for op in augment))
