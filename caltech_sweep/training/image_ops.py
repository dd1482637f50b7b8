"""torchvision's functional image ops on whole batches, with parameters of each sample.

Images are (m, 3, H, W) float in [0, 1], parameters (m, k) float; every op returns a new tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as library

ERASED = 0.5  # the grey of what was erased: about the mean of any normalisation

# TrivialAugment's and RandAugment's ops, by the places that their draws name.
AUTO_OPS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip


def _each(values: torch.Tensor) -> torch.Tensor:
    """Return one number a sample, (m,) or (m, 1), as (m, 1, 1, 1)."""
    return values.reshape(-1, 1, 1, 1)


def _near(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return values where the images are; a GPU is not waited for."""
    return values.to(images.device, non_blocking=True)


def hflip(images: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """Mirror left and right."""
    return images.flip(-1)


def vflip(images: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """Mirror top and bottom."""
    return images.flip(-2)


def _grey(images: torch.Tensor) -> torch.Tensor:
    weights = _near(torch.tensor([0.2989, 0.587, 0.114], dtype=images.dtype), images)
    return (images * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)


def brightness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Multiply images by (m,) factors."""
    return (images * _each(factors)).clamp(0, 1)


def contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Move pixels from the mean grey of their image by (m,) factors."""
    mean, factor = _grey(images).mean((2, 3), keepdim=True), _each(factors)
    return (images * factor + mean * (1 - factor)).clamp(0, 1)


def saturation(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Move pixels from their grey by (m,) factors."""
    factor = _each(factors)
    return (images * factor + _grey(images) * (1 - factor)).clamp(0, 1)


def color_jitter(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Adjust brightness, contrast and saturation, in that order, by (m, 3) factors."""
    for adjust, factor in zip((brightness, contrast, saturation), _near(factors, images).unbind(1), strict=True):
        images = adjust(images, factor)
    return images


def sharpness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Blend images with their smoothed selves: 0 is smooth, 1 changes nothing."""
    factor = _each(factors)
    return (images * factor + library.adjust_sharpness(images, 0.0) * (1 - factor)).clamp(0, 1)


def posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Keep (m,) bits of each pixel."""
    levels = _each(2.0**bits)
    return torch.minimum((images * levels).floor(), levels - 1) / levels


def solarize(images: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Invert what is at least as bright as (m,) thresholds."""
    return torch.where(images >= _each(thresholds), 1 - images, images)


def _centred(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns' and rows' distances from the centre in pixels, (H, W) each."""
    height, width = images.shape[-2:]
    ys = torch.arange(height, device=images.device, dtype=torch.float64) - (height - 1) / 2
    xs = torch.arange(width, device=images.device, dtype=torch.float64) - (width - 1) / 2
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    return x, y


def _taken_from(images: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return images whose pixels come from (m, H, W) places, in pixels from the centre: the nearest, black outside."""
    height, width = images.shape[-2:]
    x, y = torch.broadcast_tensors(x / (width / 2), y / (height / 2))
    grid = torch.stack([x, y], dim=-1).to(images.dtype).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def rotate(images: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """Turn each image counter-clockwise about its centre by (m,) or (m, 1) degrees, nearest pixel, black outside."""
    radians = _near(degrees, images).double() * (math.pi / 180)
    c, s = radians.cos().view(-1, 1, 1), radians.sin().view(-1, 1, 1)
    x, y = _centred(images)
    return _taken_from(images, x * c - y * s, x * s + y * c)


def _moved(horizontally: bool, sheared: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return an op that shears images from their upper left corner, or moves them by whole pixels, by (m,) amounts."""

    def apply(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
        x, y = _centred(images)
        amount = amounts.double().view(-1, 1, 1)
        across = (y + images.shape[-2] / 2) if horizontally else (x + images.shape[-1] / 2)
        shift = amount * across if sheared else -amount.trunc()
        return _taken_from(images, *((x + shift, y) if horizontally else (x, y + shift)))

    return apply


_AUTO: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "identity": lambda images, magnitudes: images,
    "shear_x": _moved(horizontally=True, sheared=True),
    "shear_y": _moved(horizontally=False, sheared=True),
    "translate_x": _moved(horizontally=True, sheared=False),
    "translate_y": _moved(horizontally=False, sheared=False),
    "rotate": rotate,
    "brightness": lambda images, magnitudes: brightness(images, 1 + magnitudes),
    "color": lambda images, magnitudes: saturation(images, 1 + magnitudes),
    "contrast": lambda images, magnitudes: contrast(images, 1 + magnitudes),
    "sharpness": lambda images, magnitudes: sharpness(images, 1 + magnitudes),
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": lambda images, magnitudes: library.autocontrast(images),
    "equalize": lambda images, magnitudes: library.equalize(images),
}


def trivial_augment(images: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """Apply one of AUTO_OPS after the other: (m, 2 * ops) places in AUTO_OPS and magnitudes, in turn."""
    images = images.clone()
    for step in params.unflatten(1, (-1, 2)).unbind(1):
        for place in step[:, 0].unique().int().tolist():
            chosen = step[:, 0] == place
            here = _near(chosen.nonzero().squeeze(1), images)
            changed = _AUTO[AUTO_OPS[place]](images.index_select(0, here), _near(step[chosen, 1], images))
            images.index_copy_(0, here, changed)
    return images


def rand_augment(images: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """Do as :func:`trivial_augment`, with translations as shares of a side."""
    steps = params.unflatten(1, (-1, 2)).clone()
    for place, side in ((AUTO_OPS.index("translate_x"), -1), (AUTO_OPS.index("translate_y"), -2)):
        steps[..., 1] *= torch.where(steps[..., 0] == place, images.shape[side], 1)
    return trivial_augment(images, steps.flatten(1))


def boxes(images: torch.Tensor, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return top, left, height and width in pixels, (m,) int64 each, of boxes that (m, 4) params describe.

    The params are height and width as shares of the image, and where the box lies between the ends, in [0, 1).
    """
    sides = torch.tensor(images.shape[-2:], device=params.device, dtype=torch.float64)
    sizes = (params[:, :2].double() * sides).round().clamp(min=1)
    starts = (params[:, 2:].double() * (sides - sizes + 1)).floor()
    (top, left), (height, width) = starts.long().unbind(1), sizes.long().unbind(1)
    return top, left, height, width


def erase(images: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """Let a box of each image be grey."""

    def inside(start: torch.Tensor, size: torch.Tensor, length: int) -> torch.Tensor:
        place = torch.arange(length, device=images.device) - start[:, None]
        return (place >= 0) & (place < size[:, None])

    top, left, height, width = (_near(values, images) for values in boxes(images, params))
    rows, columns = inside(top, height, images.shape[-2]), inside(left, width, images.shape[-1])
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], ERASED)


def gaussian_blur(images: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """Blur each image by a Gaussian of its own: (m, 2) standard deviations in pixels, and the kernel's width."""
    count, channels = images.shape[:2]
    width = int(params[0, 1])
    reach = (width - 1) / (2 * math.sqrt(2))
    places = torch.linspace(-reach, reach, width, dtype=images.dtype, device=images.device)
    kernels = (-((places / _near(params[:, :1], images)) ** 2)).softmax(1).repeat_interleave(channels, 0)
    planes = F.pad(images, [width // 2] * 4, mode="reflect").flatten(0, 1)[None]
    planes = F.conv2d(planes, kernels.view(-1, 1, width, 1), groups=count * channels)
    planes = F.conv2d(planes, kernels.view(-1, 1, 1, width), groups=count * channels)
    return planes[0].unflatten(0, (count, channels))
