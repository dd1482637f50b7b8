"""Every network of a study takes a step before anything is written: in agreement with real steps, and in sentences."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.errors import ModelError
from caltech_sweep.training.models import build_model, train_mode
from caltech_sweep.training.rehearsal import batch_kinds, rehearse
from helpers.places import Cli

ARCHS = torchvision.models.list_models(module=torchvision.models)
QUICK = ("resnet18", "squeezenet1_1")
HUGE = ("efficientnet_b7", "regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32")


def config(arch: str, crop: int, **settings: object) -> TrialConfig:
    return TrialConfig(dataset=DatasetConfig(name="shapes", resize=crop, crop=crop), arch=arch, **settings)  # type: ignore[arg-type]


def rehearsed(trial: TrialConfig, size: int) -> bool:
    try:
        rehearse(trial, 3, [size])
    except ModelError:
        return False
    return True


def really(model: nn.Module, trial: TrialConfig, size: int) -> bool:
    """Train and evaluate a batch on the CPU, with numbers."""
    images = torch.rand(size, 3, trial.dataset.crop, trial.dataset.crop)
    try:
        train_mode(model, trial)
        F.cross_entropy(model(images), torch.zeros(size, dtype=torch.long)).backward()
        model.eval()
        model(images)
    except (RuntimeError, ValueError, AssertionError, IndexError):
        return False
    return True


def assert_agrees(arch: str, crops: tuple[int, ...]) -> None:
    for freeze, sizes in (("none", (2, 1)), ("conv", (1,))):
        model = build_model(config(arch, crops[0], freeze=freeze), 3)
        for crop, size in itertools.product(crops, sizes):
            trial = config(arch, crop, freeze=freeze)
            assert rehearsed(trial, size) == really(model, trial, size), (arch, crop, size, freeze)


@pytest.mark.parametrize("arch", QUICK)
def test_a_rehearsal_says_what_a_real_step_says(arch: str) -> None:
    assert_agrees(arch, (15, 28))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch not in (*HUGE, *QUICK)])
def test_a_rehearsal_says_what_a_real_step_says_of_every_network(arch: str) -> None:
    assert_agrees(arch, (14, 33, 64))


@pytest.mark.parametrize(
    ("trial", "sizes", "sentence"),
    [
        (
            config("alexnet", 28),
            [2],
            r"arch: alexnet cannot be trained on crops of 28 pixels \(.*too small\); set "
            "dataset.crop to 63 or more, and dataset.resize to at least that, or choose another arch",
        ),
        (
            config("vit_b_16", 28),
            [2],
            r"arch: vit_b_16 .* 28 pixels \(Wrong image height!.*\); it takes exactly 224: set "
            "dataset.crop to 224",
        ),
        (
            config("resnet18", 32, batch_size=8),
            [2, 1],
            r"batch_size: 8 leaves a batch of one image, which resnet18 "
            r"cannot train at a crop of 32 pixels \(Expected more than 1 value .*\); set drop_last to true",
        ),
    ],
)
def test_what_a_network_cannot_do_is_a_sentence(trial: TrialConfig, sizes: list[int], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        rehearse(trial, 3, sizes)


def test_what_can_be_trained_is_not_refused() -> None:
    rehearse(config("alexnet", 63), 3, [1, 2])
    rehearse(config("resnet18", 64, batch_size=8), 3, [1, 2])  # two by two pixels are left: enough for one image
    rehearse(config("resnet18", 32, freeze="conv"), 3, [1, 2])  # frozen batch normalisation keeps its statistics


def test_the_batches_of_an_epoch() -> None:
    def kinds(batch_size: int, drop_last: bool, images: int = 33) -> frozenset[int]:
        return batch_kinds(TrialConfig(batch_size=batch_size, drop_last=drop_last), images)

    assert kinds(8, True) == {2} and kinds(8, False) == {1, 2} and kinds(11, False) == {2}
    assert kinds(1, True) == {1} and kinds(64, False) == {2} and kinds(64, False, images=1) == {1}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("arch: squeezenet1_1", "arch: alexnet"), "arch: alexnet cannot be trained on crops of 32 pixels"),
        (
            (
                "arch: squeezenet1_1, batch_size: 8, epochs: 2}\nspace:",
                "batch_size: 8}\nspace:\n  arch: {choices: [resnet18, vit_b_32]}",
            ),
            "arch: vit_b_32 ",
        ),
        (
            ("arch: squeezenet1_1, batch_size: 8, ", "arch: resnet18, batch_size: 23, drop_last: false, "),
            "batch_size: 23 leaves a batch of one image",
        ),
        (
            (
                "{arch: squeezenet1_1, batch_size: 8, epochs: 2}\nspace:",
                "{arch: resnet18, epochs: 2, drop_last: false}\nspace:\n  batch_size: {low: 21, high: 23}",
            ),
            "batch_size: 23 leaves a batch of one image",
        ),
    ],
)
def test_a_study_that_cannot_be_trained_is_refused_before_anything_is_written(
    cli: Cli, place: Path, change: tuple[str, str], sentence: str
) -> None:
    study = place / "sweeps" / "tiny.yaml"
    text = study.read_text(encoding="utf-8")
    assert change[0] in text
    changed = text.replace(*change)
    study.write_text(changed.replace("{lr: 0", "{arch: resnet18, lr: 0") if "choices" in change[1] else changed)
    result = cli("run", "tiny", "--in-process", "--threads", "1")
    assert result.exit_code == 2 and sentence in result.output, result.output
    assert not (place / "mlruns").exists() and "started" not in result.output
