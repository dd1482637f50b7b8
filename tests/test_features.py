"""Frozen layers apart: the same network to its user; their outputs, kept, are bit for bit what they would be."""

import re
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models import list_models
from torchvision.ops import StochasticDepth

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.data.images import LoadedData
from caltech_sweep.seeds import derive_seed
from caltech_sweep.training import augment
from caltech_sweep.training.cache import Cache
from caltech_sweep.training.features import CHUNK, SplitModel, agrees, split_model
from caltech_sweep.training.fit import EpochResult, Training
from caltech_sweep.training.keys import CacheOptions
from caltech_sweep.training.models import build_model, train_mode
from caltech_sweep.training.networks import source_of
from caltech_sweep.training.trial import TrialOutcome
from helpers.trials import run as run_trial_to_its_end

CPU = torch.device("cpu")
SHAPES = DatasetConfig(name="shapes", resize=40, crop=32, classes=3, images_per_class=12)
CONFIG = TrialConfig(
    dataset=SHAPES,
    arch="resnet18",
    freeze="conv",
    epochs=2,
    batch_size=10,
    lr=0.1,
    drop_last=False,
    precision="float32",
)
# Dropout, and weights behind the frozen ones that are large: their stages do not fit into the budget of these tests.
ALEXNET = replace(CONFIG, arch="alexnet", dataset=replace(SHAPES, resize=64, crop=64), epochs=1, batch_size=36)
BUDGET = 50 * 10**6


@pytest.fixture(scope="module")
def data() -> LoadedData:
    return load_dataset(SHAPES)


def run(
    config: TrialConfig, data: LoadedData, folder: Path | None = None, features: bool = True
) -> tuple[list[EpochResult], TrialOutcome]:
    return run_trial_to_its_end(config, data, CacheOptions(folder, BUDGET, features=features) if folder else None)


def kept(folder: Path) -> list[str]:
    return sorted(entry.name for entry in Cache(folder, 0).entries() if entry.kind == "features")


def assert_same(got: tuple[list[EpochResult], TrialOutcome], want: tuple[list[EpochResult], TrialOutcome]) -> None:
    for epoch, other in zip(got[0], want[0], strict=True):
        assert (epoch.train_loss, epoch.train_accuracy) == (other.train_loss, other.train_accuracy)
        assert torch.equal(epoch.val.confidences, other.val.confidences)
    assert got[1].metrics() == want[1].metrics()
    assert all(torch.equal(got[1].weights[name], value) for name, value in want[1].weights.items())


# The smallest network of each of torchvision's families, and the side of the images that it is tried on.
FAMILIES = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "googlenet": 32,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "swin_t": 32,
}
LARGE = {
    "efficientnet_v2_s": 32,
    "inception_v3": 75,
    "maxvit_t": 224,
    "swin_v2_t": 64,
    "vgg11_bn": 32,
    "vit_b_16": 224,
}


def parts(config: TrialConfig) -> tuple[torch.nn.Module, SplitModel | None]:
    model = build_model(config, 3)
    train_mode(model, config)
    return model, split_model(model, source_of(config.arch).tail(model))


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("arch", [*FAMILIES, *(pytest.param(arch, marks=pytest.mark.slow) for arch in LARGE)])
def test_frozen_layers_and_classifier_give_every_bit_of_the_network(arch: str) -> None:
    config = replace(CONFIG, arch=arch)
    model, split = parts(config)
    assert split is not None
    assert not any(parameter.requires_grad for parameter in split.frozen.parameters())
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in split.tail.parameters()}
    side = {**FAMILIES, **LARGE}[arch]
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    features = split.frozen(images)
    assert features[0].numel() < 30_000 and torch.equal(features, split.frozen(images))
    torch.manual_seed(0)
    halves = split.tail(features)
    torch.manual_seed(0)  # of the dropout in the classifier
    assert torch.equal(halves, model(images))
    assert agrees(model, split, images)
    assert torch.equal(split.tail(split.frozen(images)), model(images))


def test_every_family_of_torchvision_is_here() -> None:
    covered = {re.split(r"[_\d]", arch)[0] for arch in (*FAMILIES, *LARGE, "resnext", "wide_resnet", "squeezenet")}
    assert {re.split(r"[_\d]", arch)[0] for arch in list_models(module=torchvision.models)} == covered


@pytest.mark.parametrize("freeze", ["none", "fc", "fc_but_last"])
def test_networks_whose_backbone_is_trained_are_left_whole(freeze: str) -> None:
    _, split = parts(replace(CONFIG, arch="alexnet", freeze=freeze))
    assert split is None


def test_a_network_that_goes_on_after_its_classifier_is_left_whole_with_the_reason(tmp_path: Path) -> None:
    config = replace(CONFIG, arch="squeezenet1_1", epochs=1)
    model, split = parts(config)
    assert split is not None and not agrees(model, split, torch.randn(2, 3, 32, 32))
    data = load_dataset(SHAPES)
    got = run(config, data, tmp_path)
    assert got[1].warnings == (
        "squeezenet1_1 computes more between its backbone and its classifier, so the outputs of its frozen layers "
        "cannot be kept: they are computed in every epoch",
    )
    assert kept(tmp_path) == [] and run(config, data)[1].warnings == ()


def test_a_network_that_runs_its_layers_another_way_is_left_whole() -> None:
    class Twisted(torch.nn.Module):
        def __init__(self, turn: bool) -> None:
            super().__init__()
            self.features, self.pool = torch.nn.Conv2d(3, 2, 3).requires_grad_(False), torch.nn.AdaptiveAvgPool2d(1)
            self.classifier, self.turn = torch.nn.Linear(2, 3), turn

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found = self.classifier(self.pool(self.features(images)).flatten(1))
            return found.flip(1) if self.turn else found

    for turn in (False, True):
        model = Twisted(turn)
        split = split_model(model, ["classifier"])
        assert split is not None and agrees(model, split, torch.randn(2, 3, 8, 8)) is not turn
        split = split_model(model, ["pool", "classifier"])  # without the flattening between them
        assert split is not None and not agrees(model, split, torch.randn(2, 3, 8, 8))


def test_a_frozen_backbone_drops_nothing_at_random_and_other_layers_do() -> None:
    config = replace(CONFIG, arch="convnext_tiny")
    for freeze, rests in (("conv", True), ("none", False)):
        model, _ = parts(replace(config, freeze=freeze))  # type: ignore[arg-type]
        drops = [module for module in model.modules() if isinstance(module, StochasticDepth)]
        assert drops and all(module.training is not rests for module in drops)
    model, _ = parts(replace(config, arch="alexnet", freeze="fc"))  # as in the reference report
    assert all(module.training for module in model.modules() if isinstance(module, torch.nn.Dropout))


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        pytest.param(replace(CONFIG, augment=("hflip",), channels_last=True), marks=pytest.mark.slow),
        pytest.param(
            replace(CONFIG, augment=("hflip",), precision="bfloat16", test_views="tencrop"), marks=pytest.mark.slow
        ),
        replace(CONFIG, arch="shufflenet_v2_x0_5", epochs=1),
        pytest.param(ALEXNET, marks=pytest.mark.slow),
    ],
    ids=["plain", "hflip", "bfloat16", "shufflenet", "alexnet"],
)
def test_keeping_features_changes_no_bit(config: TrialConfig, tmp_path: Path) -> None:
    data = load_dataset(config.dataset)
    want = run(config, data)
    assert_same(run(config, data, tmp_path), want)
    files = kept(tmp_path)
    assert len(files) == (4 if config.augment else 3)  # train, val, test, and train mirrored
    assert_same(run(config, data, tmp_path / "off", features=False), want)
    assert kept(tmp_path / "off") == []
    written = [(tmp_path / name / "data").stat().st_mtime_ns for name in files]
    other = replace(config, lr=0.01, seed=0)
    assert_same(run(other, data, tmp_path), run(other, data))
    assert [(tmp_path / name / "data").stat().st_mtime_ns for name in kept(tmp_path)] == written  # used again


def _reference(config: TrialConfig, data: LoadedData) -> tuple[torch.nn.Module, list[float]]:
    """Train the whole network with plain torch; return it and its mean losses."""
    model = build_model(config, len(data.split.classes))
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], config.lr, config.momentum, weight_decay=config.weight_decay
    )
    images, labels = data.center_crops("train", config.dataset.crop).float() / 255, data.labels("train")
    losses = []
    for epoch in range(1, config.epochs + 1):
        train_mode(model, config)
        seen = (augment.apply(images, augment.draw(config, epoch, len(labels))) - 0.5) / 0.5
        order = torch.randperm(
            len(labels), generator=torch.Generator().manual_seed(derive_seed(config.seed, "shuffle", epoch))
        )
        total = 0.0
        for number, index in enumerate(order.split(config.batch_size), start=1):
            torch.manual_seed(derive_seed(config.seed, "dropout", epoch, number))
            loss = F.cross_entropy(model(seen[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index)
        losses.append(total / len(labels))
    return model.eval(), losses


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, augment=("hflip",)),
        pytest.param(replace(ALEXNET, epochs=2, lr=0.01), marks=pytest.mark.slow),
    ],
)
def test_the_result_is_that_of_the_full_network(config: TrialConfig, tmp_path: Path) -> None:
    data = load_dataset(config.dataset)
    epochs, outcome = run(config, data, tmp_path)
    model, losses = _reference(replace(config, epochs=outcome.best.epoch), data)
    assert [epoch.train_loss for epoch in epochs][: len(losses)] == pytest.approx(losses, rel=1e-4)
    assert outcome.weights.keys() == model.state_dict().keys()  # a checkpoint holds the whole network
    for name, value in model.state_dict().items():
        torch.testing.assert_close(outcome.weights[name], value, rtol=1e-3, atol=1e-5)
    images = (data.center_crops("test", config.dataset.crop).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        logits = model(images)
    assert torch.equal(outcome.test.predictions, logits.argmax(1))
    assert outcome.test.loss == pytest.approx(F.cross_entropy(logits, data.labels("test")).item(), rel=1e-3)


def test_what_an_image_gives_does_not_depend_on_its_neighbours(data: LoadedData) -> None:
    training = Training(CONFIG, data, build_model(CONFIG, 3), CPU)
    assert training._features is not None
    index = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    flip = torch.arange(36) % 2 == 0
    draws = augment.Draws({"hflip": (flip, torch.empty(36, 0))})
    together = training._features.rows("train", index, draws)
    assert together.shape == (36, 512) and CHUNK < 36
    for place in (0, 5, 35):
        assert torch.equal(
            training._features.rows("train", index[place : place + 1], draws[torch.tensor([place])])[0], together[place]
        )


def test_no_step_pays_for_a_traceback(data: LoadedData, monkeypatch: pytest.MonkeyPatch) -> None:
    def formatted(*args: object) -> list[str]:
        raise AssertionError("torch.manual_seed formats one for each kind of GPU that is not in use")

    training = Training(CONFIG, data, build_model(CONFIG, 3), CPU)
    monkeypatch.setattr(traceback, "format_stack", formatted)
    training.train_epoch()


def test_trials_share_features_and_damage_is_computed_again(data: LoadedData, tmp_path: Path) -> None:
    want = run(CONFIG, data, tmp_path)
    before = kept(tmp_path)
    run(replace(CONFIG, lr=0.2, batch_size=7, optimizer="adam", test_batch_size=9), data, tmp_path)
    assert kept(tmp_path) == before
    run(replace(CONFIG, seed=1), data, tmp_path)  # other frozen weights: this network began from random ones
    assert len(kept(tmp_path)) == 2 * len(before)
    for name in before:
        content = bytearray((tmp_path / name / "data").read_bytes())
        content[100] ^= 1
        (tmp_path / name / "data").write_bytes(content)
    other = replace(CONFIG, lr=0.3)
    got = run(other, data, tmp_path)
    assert len(got[1].warnings) == len(before) and all("damaged" in warning for warning in got[1].warnings)
    assert_same(got, run(other, data))
    assert run(replace(CONFIG, lr=0.4), data, tmp_path)[1].warnings == ()
    assert_same(run(CONFIG, data, tmp_path), want)


@pytest.mark.parametrize("changes", [{"augment": ("color_jitter",)}, {"freeze": "none"}])
def test_other_trials_keep_none(changes: dict, data: LoadedData, tmp_path: Path) -> None:
    run(replace(CONFIG, epochs=1, **changes), data, tmp_path)
    assert kept(tmp_path) == []


def test_a_store_that_cannot_keep_them_changes_nothing(data: LoadedData, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    got = run(CONFIG, data, tmp_path / "file" / "store")
    assert_same(got, run(CONFIG, data))
    assert len(got[1].warnings) == 1
