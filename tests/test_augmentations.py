"""Augmentations against torchvision's functional ops, sample by sample; and what they draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as oracle

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.data.images import store_of
from caltech_sweep.training import augment
from caltech_sweep.training.augment import AUGMENTATIONS
from caltech_sweep.training.fit import Training
from caltech_sweep.training.image_ops import AUTO_OPS, ERASED, boxes
from caltech_sweep.training.models import build_model

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


CROP = "random_resized_crop"  # which cuts boxes out of whole images
ORACLES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
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
    assert ORACLES.keys() == {op for op, augmentation in AUGMENTATIONS.items() if augmentation.apply is not None}
    assert {op for op, augmentation in AUGMENTATIONS.items() if augmentation.cuts is not None} == {CROP}


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


SHAPES = ((48, 96), (90, 40), (40, 40), (12, 300))  # of whole images; the last one has no room for most boxes


def whole_images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES]


def test_crops_are_torchvision_s_of_whole_images_and_reach_beyond_their_centres() -> None:
    pictures = whole_images()
    store, count = store_of(pictures).images, 200
    cuts = augment.cuts(augment.draw(replace(CONFIG, augment=("hflip", CROP)), 2, count))
    assert cuts is not None and augment.cuts(augment.draw(replace(CONFIG, augment=("hflip",)), 2, count)) is None
    numbers = [index % len(SHAPES) for index in range(count)]
    got, beyond = store.resized_crops(numbers, SIDE, cuts), 0
    for index, number in enumerate(numbers):
        image = torch.from_numpy(pictures[number]).permute(2, 0, 1)
        top, left, height, width = cuts[index](*image.shape[1:])
        want = oracle.resized_crop(image, top, left, height, width, [SIDE, SIDE], antialias=True)
        assert torch.equal(got[index], want)
        beyond += number == 0 and (left < 20 or left + width > 76)
    assert beyond > count // 8
    alone = store.resized_crops(numbers[7:8], SIDE, cuts[7:8])
    assert torch.equal(alone[0], got[7])


@pytest.mark.parametrize("shape", SHAPES)
def test_crops_are_as_large_as_long_and_where_torchvision_s_are(shape: tuple[int, int]) -> None:
    image, transform = torch.zeros(1, 3, *shape), v2.RandomResizedCrop(SIDE)
    cuts = augment.cuts(augment.draw(replace(CONFIG, augment=(CROP,)), 1, 4000))
    assert cuts is not None
    torch.manual_seed(0)
    made = [transform.make_params([image]) for _ in range(1500)]
    theirs = np.array([[each[key] for key in ("top", "left", "height", "width")] for each in made], dtype=float)
    ours = np.array([cut(*shape) for cut in cuts], dtype=float)
    for values in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 2] / box[:, 3],
        lambda box: box[:, 0] / (shape[0] + 1 - box[:, 2]),
        lambda box: box[:, 1] / (shape[1] + 1 - box[:, 3]),
    ):
        assert kstest(values(ours), values(theirs)).pvalue > 1e-3
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= shape).all()


def test_what_is_trained_is_cut_out_of_the_whole_image() -> None:
    """The images of a training against torchvision's op on the data, with the boxes of the draws."""
    dataset = DatasetConfig(name="shapes", resize=40, crop=32, classes=2, images_per_class=3)
    config = TrialConfig(dataset=dataset, arch="squeezenet1_1", augment=(CROP,), batch_size=4)
    data = load_dataset(dataset)
    training = Training(config, data, build_model(config, 2), torch.device("cpu"))
    draws = augment.draw(config, 1, 6)
    index, cuts = torch.tensor([3, 0]), augment.cuts(draws)
    assert cuts is not None
    got = training._images("train", index, draws[index])
    whole = data.center_crops("train", 40)  # drawn shapes are squares
    for place, number in enumerate(index.tolist()):
        want = oracle.resized_crop(whole[number], *cuts[number](40, 40), [32, 32], antialias=True)
        torch.testing.assert_close(got[place], (want.float() / 255 - 0.5) / 0.5)


def test_erased_boxes_are_as_large_and_as_long_as_torchvision_s() -> None:
    count, square = 20_000, torch.zeros(1, 3, 200, 200)
    config = replace(CONFIG, augment=("random_erasing",), augment_probability=1.0)
    chosen, params = augment.draw(config, 1, count).by_op["random_erasing"]
    erasing = v2.RandomErasing(p=1.0)
    torch.manual_seed(0)
    ours = torch.stack(boxes(square, params), 1)[chosen].double()
    made = [erasing.make_params([square]) for _ in range(1500)]
    theirs = torch.tensor([[float(each[key]) for key in ("h", "w", "i", "j")] for each in made]).double()
    height, width, top, left = theirs.unbind(1)
    for mine, other in (
        (ours[:, 2] * ours[:, 3], height * width),
        (ours[:, 2] / ours[:, 3], height / width),
        (ours[:, 0] / (201 - ours[:, 2]), top / (201 - height)),
        (ours[:, 1] / (201 - ours[:, 3]), left / (201 - width)),
    ):
        assert kstest(mine.numpy(), other.numpy()).pvalue > 1e-3


def test_automatic_augmentations_draw_every_op_and_level_equally_often() -> None:
    config = replace(CONFIG, augment=("trivial_augment", "rand_augment"))
    trivial = augment.draw(config, 1, 28_000).by_op["trivial_augment"][1]
    counts = trivial[:, 0].long().bincount(minlength=14)
    assert (counts - 2000).abs().max() < 5 * math.sqrt(2000)
    turned = trivial[trivial[:, 0] == AUTO_OPS.index("rotate"), 1]
    assert turned.abs().max() == 135 and 0.44 < (turned > 0).double().mean() < 0.54  # 0 of 31 levels has no sign
    shear = augment.draw(config, 1, 100).by_op["rand_augment"][1].view(-1, 2)
    assert shear[shear[:, 0] == AUTO_OPS.index("shear_x"), 1].abs().unique().tolist() == pytest.approx([0.3 * 14 / 30])
