"""Augmentations against torchvision's functional ops, sample by sample; and what they draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy.stats import kstest
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as oracle

from caltech_sweep.config import TrialConfig
from caltech_sweep.training import augment
from caltech_sweep.training.augment import AUGMENTATIONS
from caltech_sweep.training.image_ops import AUTO_OPS, ERASED, boxes

SIDE, COUNT = 40, 64
CONFIG = TrialConfig(seed=3, augment_probability=0.6, blur_kernel=7, rand_augment_ops=3, rand_augment_magnitude=14)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth colours with hard edges, in steps of 1 / 255."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(COUNT, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, SIDE, mode="bilinear")
    smooth[:, :, 10:20, 12:30] *= 0.4
    return (smooth * 255).round() / 255


def crop(image: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    top, left, height, width = (int(v) for v in boxes(image[None], params[None]))
    return oracle.resized_crop(image, top, left, height, width, [SIDE, SIDE], antialias=False)


def erase(image: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    top, left, height, width = (int(v) for v in boxes(image[None], params[None]))
    return oracle.erase(image, top, left, height, width, torch.tensor(ERASED))


def jitter(image: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    brightness, contrast, saturation = params.tolist()
    image = oracle.adjust_contrast(oracle.adjust_brightness(image, brightness), contrast)
    return oracle.adjust_saturation(image, saturation)


def auto(side: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return torchvision's own dispatch of the ops of its classes, with magnitudes that we drew."""
    names = {"translate_x": "TranslateX", "translate_y": "TranslateY", "shear_x": "ShearX", "shear_y": "ShearY"}
    names |= {"autocontrast": "AutoContrast"}
    transform = v2.TrivialAugmentWide()

    def apply(image: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        for place, magnitude in params.view(-1, 2).tolist():
            name = AUTO_OPS[int(place)]
            moved = magnitude * side if name.startswith("translate") else magnitude
            image = transform._apply_image_or_video_transform(
                image, names.get(name, name.capitalize()), moved, v2.InterpolationMode.NEAREST, {}
            )
        return image

    return apply


ORACLES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "random_resized_crop": crop,
    "hflip": lambda image, params: oracle.horizontal_flip(image),
    "vflip": lambda image, params: oracle.vertical_flip(image),
    "trivial_augment": auto(1),
    "rand_augment": auto(SIDE),
    "color_jitter": jitter,
    "rotation": lambda image, params: oracle.rotate(image, float(params[0])),
    "gaussian_blur": lambda image, params: oracle.gaussian_blur(image, [int(params[1])] * 2, [float(params[0])] * 2),
    "random_erasing": erase,
}
# Of pixels that may differ: rotating and shearing may take the other of two that are equally near, and what follows
# looks at all of them.
LOOSE = {"rotation": 0.005, "trivial_augment": 0.01, "rand_augment": 0.03}


def test_every_augmentation_has_an_oracle() -> None:
    assert ORACLES.keys() == AUGMENTATIONS.keys()


@pytest.mark.parametrize("op", ORACLES)
def test_every_sample_is_what_torchvision_makes_of_it(op: str, images: torch.Tensor) -> None:
    before, differing = images.clone(), 0
    draws = augment.draw(replace(CONFIG, augment=(op,)), 2, COUNT)
    got = augment.apply(images, draws)
    chosen, params = draws.by_op[op]
    assert torch.equal(images, before) and got.dtype == images.dtype and chosen.any()
    for index in range(COUNT):
        want = ORACLES[op](images[index], params[index]) if chosen[index] else images[index]
        differing += int(((got[index] - want).abs() > 1e-4).sum())
    assert differing <= LOOSE.get(op, 0.0) * images.numel()


@pytest.mark.parametrize("place", range(len(AUTO_OPS)))
def test_every_op_of_the_automatic_augmentations_is_torchvision_s(place: int, images: torch.Tensor) -> None:
    magnitudes = {
        "posterize": [2.0, 5.0, 8.0, 3.0],
        "solarize": [0.0, 0.3, 0.7, 1.0],
        "rotate": [90.0, -30.0, 3.0, 77.0],
    }
    moved = {"translate_x": [3.0, -7.9, 0.0, 32.0], "translate_y": [3.0, -7.9, 0.0, 32.0]}
    values = {**magnitudes, **moved}.get(AUTO_OPS[place], [0.5, -0.5, 0.0, 0.9])
    params = torch.tensor([[place, value] for value in values])
    got = AUGMENTATIONS["trivial_augment"].apply(images[:4], params)
    want = torch.stack([auto(1)(image, one) for image, one in zip(images[:4], params, strict=True)])
    assert ((got - want).abs() > 1e-4).float().mean() <= (
        0.006 if AUTO_OPS[place] in ("rotate", "shear_x", "shear_y") else 0
    )


@pytest.mark.parametrize("op", ORACLES)
def test_a_sample_alone_becomes_what_it_becomes_in_a_batch(op: str, images: torch.Tensor) -> None:
    draws = augment.draw(replace(CONFIG, augment=(op,)), 1, COUNT)
    together = augment.apply(images, draws)
    for index in (0, 7, 31):
        one = torch.tensor([index])
        torch.testing.assert_close(augment.apply(images[one], draws[one]), together[one], rtol=0, atol=1e-6)


def test_what_each_op_draws_depends_on_no_other_and_on_the_epoch() -> None:
    together = augment.draw(replace(CONFIG, augment=tuple(AUGMENTATIONS)), 4, 50).by_op
    assert tuple(together) == tuple(AUGMENTATIONS)
    for op, (chosen, params) in together.items():
        alone = augment.draw(replace(CONFIG, augment=(op,)), 4, 50).by_op[op]
        later = augment.draw(replace(CONFIG, augment=(op,)), 5, 50).by_op[op]
        assert torch.equal(alone[0], chosen) and torch.equal(alone[1], params)
        assert not (torch.equal(later[0], chosen) and torch.equal(later[1], params)), op


def test_crops_and_erased_boxes_are_as_large_and_as_long_as_torchvision_s() -> None:
    count, square = 20_000, torch.zeros(1, 3, 200, 200)
    config = replace(CONFIG, augment=("random_resized_crop", "random_erasing"), augment_probability=1.0)
    drawn = augment.draw(config, 1, count).by_op
    cropping, erasing = v2.RandomResizedCrop(200), v2.RandomErasing(p=1.0)
    torch.manual_seed(0)
    for op, make, keys in (
        ("random_resized_crop", lambda: cropping.make_params([square]), ("height", "width", "top", "left")),
        ("random_erasing", lambda: erasing.make_params([square]), ("h", "w", "i", "j")),
    ):
        ours = torch.stack(boxes(square, drawn[op][1]), 1)[drawn[op][0]].double()
        theirs = torch.tensor([[float(made[key]) for key in keys] for made in (make() for _ in range(1500))]).double()
        height, width, top, left = theirs.unbind(1)
        for mine, other in (
            (ours[:, 2] * ours[:, 3], height * width),
            (ours[:, 2] / ours[:, 3], height / width),
            (ours[:, 0] / (201 - ours[:, 2]), top / (201 - height)),
            (ours[:, 1] / (201 - ours[:, 3]), left / (201 - width)),
        ):
            assert kstest(mine.numpy(), other.numpy()).pvalue > 1e-3, op


def test_automatic_augmentations_draw_every_op_and_level_equally_often() -> None:
    config = replace(CONFIG, augment=("trivial_augment", "rand_augment"))
    trivial = augment.draw(config, 1, 28_000).by_op["trivial_augment"][1]
    counts = trivial[:, 0].long().bincount(minlength=14)
    assert (counts - 2000).abs().max() < 5 * math.sqrt(2000)
    turned = trivial[trivial[:, 0] == AUTO_OPS.index("rotate"), 1]
    assert turned.abs().max() == 135 and 0.44 < (turned > 0).double().mean() < 0.54  # 0 of 31 levels has no sign
    shear = augment.draw(config, 1, 100).by_op["rand_augment"][1].view(-1, 2)
    assert shear[shear[:, 0] == AUTO_OPS.index("shear_x"), 1].abs().unique().tolist() == pytest.approx([0.3 * 14 / 30])
