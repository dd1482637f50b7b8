"""What a step minimises, against torch's, torchvision's and scikit-learn's own; and every setting's exact resume."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight, compute_sample_weight
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import WeightedRandomSampler
from torchvision.transforms import v2

from caltech_sweep.config import TRIAL_FIELDS, DatasetConfig, TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.data.images import LoadedData
from caltech_sweep.errors import ModelError
from caltech_sweep.rules import FREEZE_CHOICES
from caltech_sweep.seeds import derive_seed
from caltech_sweep.training.fit import EpochResult, Training
from caltech_sweep.training.keys import CacheOptions
from caltech_sweep.training.loss import class_weights, epoch_order, mixed
from caltech_sweep.training.models import build_model
from caltech_sweep.training.networks import SOURCES
from caltech_sweep.training.optimizer import rate_factors
from caltech_sweep.training.rehearsal import batch_kinds, rehearse
from caltech_sweep.training.trial import TrialOutcome, run_trial
from helpers.cases import ALL, NETWORKS, QUICK, named
from helpers.datasets import draw, fake_caltech
from helpers.marks import slow_but

CPU = torch.device("cpu")
SHAPES = DatasetConfig(name="shapes", resize=32, crop=32, classes=3, images_per_class=4)
CONFIG = TrialConfig(
    dataset=SHAPES,
    arch="squeezenet1_1",
    epochs=3,
    batch_size=5,
    drop_last=False,
    lr=0.02,
    weight_decay=0.0,
    step_size=2,
    precision="float32",
)  # which has no batch statistics


@pytest.fixture(scope="module")
def data() -> LoadedData:
    return load_dataset(SHAPES)


def trained(config: TrialConfig, data: LoadedData) -> tuple[Training, dict[str, torch.Tensor]]:
    """Train one epoch without dropout; return the training and the weights before."""
    model = build_model(config, 3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = Training(config, data, model, CPU)
    training.train_epoch()
    return training, before


def assert_near(one: nn.Module, other: nn.Module) -> None:
    for name, value in other.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def smoothed(logits: torch.Tensor, labels: torch.Tensor, amount: float) -> torch.Tensor:
    """Return the loss with smoothed targets by its definition (Szegedy et al., 1512.00567)."""
    logs = logits.log_softmax(1)
    right = -logs[torch.arange(len(labels)), labels]
    return ((1 - amount) * right - amount * logs.mean(1)).mean()


@pytest.mark.parametrize(
    "changes", [{"label_smoothing": 0.2}, {"class_weights": "balanced"}, {"clip_grad_norm": 0.05}, {"momentum": 0.0}]
)
def test_an_epoch_is_that_of_a_plain_loop(changes: dict[str, Any], data: LoadedData) -> None:
    config = replace(CONFIG, **changes)
    training, before = trained(config, data)
    model = build_model(config, 3)
    model.load_state_dict(before)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum)
    images, labels = (data.center_crops("train", 32).float() / 255 - 0.5) / 0.5, data.labels("train")
    weight = torch.tensor(compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())).float()
    model.train()
    for index in training._batches(1):
        logits, truth = model(images[index]), labels[index]
        loss = F.cross_entropy(logits, truth)
        if config.label_smoothing:
            loss = smoothed(logits, truth, config.label_smoothing)
        if config.class_weights == "balanced":
            each = F.cross_entropy(logits, truth, reduction="none")
            loss = (each * weight[truth]).sum() / weight[truth].sum()
        optimizer.zero_grad()
        loss.backward()
        if config.clip_grad_norm:
            norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()  # type: ignore[union-attr]
            for parameter in model.parameters():
                parameter.grad *= min(1.0, config.clip_grad_norm / float(norm))
            assert norm > config.clip_grad_norm
        optimizer.step()
    assert_near(training.model, model)


def test_what_is_evaluated_is_torch_s_average_of_the_weights(data: LoadedData) -> None:
    config = replace(CONFIG, arch="resnet18", ema_decay=0.6, epochs=1)
    averaged, plain = (Training(c, data, build_model(c, 3), CPU) for c in (config, replace(config, ema_decay=None)))
    oracle = AveragedModel(plain.model, multi_avg_fn=get_ema_multi_avg_fn(0.6), use_buffers=True)
    plain.optimizer.register_step_post_hook(lambda *_: oracle.update_parameters(plain.model))
    plain.train_epoch()
    result = averaged.run_epoch()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(averaged.model.state_dict()[name], value), name  # training goes on from its own weights
        if value.is_floating_point():
            torch.testing.assert_close(averaged.best_weights[name], oracle.module.state_dict()[name])
    plain.model.load_state_dict(averaged.best_weights)
    assert plain.evaluate("val").scores == result.val.scores


def test_class_weights_are_scikit_learn_s() -> None:
    labels = torch.tensor([0] * 7 + [1] * 2 + [3] * 9)
    got = class_weights(replace(CONFIG, class_weights="balanced"), labels, 6)
    want = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels.numpy())
    assert got is not None and got[[0, 1, 3]].tolist() == pytest.approx(want.tolist())
    assert got[[2, 4, 5]].tolist() == [1, 1, 1] and class_weights(CONFIG, labels, 6) is None


def test_balanced_draws_are_those_of_torch_s_weighted_sampler_and_keyed_by_seed_and_epoch() -> None:
    labels = torch.tensor([0] * 60 + [1] * 12 + [3] * 8)
    config = replace(CONFIG, sample_weights="balanced", seed=4)
    generator = torch.Generator().manual_seed(derive_seed(4, "shuffle", 2))
    weights = compute_sample_weight("balanced", labels.numpy())
    sampler = WeightedRandomSampler(torch.tensor(weights) / len(labels) * 3, len(labels), generator=generator)
    assert epoch_order(config, labels, 2).tolist() == list(sampler)
    counts = sum(labels[epoch_order(config, labels, epoch)].bincount(minlength=4) for epoch in range(1, 61))
    assert isinstance(counts, torch.Tensor) and counts[2] == 0
    assert (counts[[0, 1, 3]] - 1600).abs().max() < 5 * 1600**0.5
    assert sorted(epoch_order(CONFIG, labels, 2).tolist()) == list(range(80))
    orders = [epoch_order(replace(config, seed=seed), labels, epoch).tolist() for seed in (0, 1) for epoch in (1, 2)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))


def test_an_image_that_is_drawn_twice_is_augmented_in_two_ways(data: LoadedData) -> None:
    config = replace(CONFIG, sample_weights="balanced", augment=("color_jitter",), augment_probability=1.0)
    training = Training(config, data, build_model(config, 3), CPU)
    seen: list[torch.Tensor] = []
    training.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    training.train_epoch()
    order, images = epoch_order(config, data.labels("train"), 1), torch.cat(seen)
    assert len(images) == len(order) > len(set(order.tolist()))
    assert len({image.numpy().tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_and_targets_are_torchvision_s(kind: str) -> None:
    images, labels = torch.rand(6, 3, 20, 24), torch.arange(6)
    seen = set()
    for step in range(40):
        got, targets = mixed(replace(CONFIG, **{kind: 0.8}), 2, step, images, labels, 8)  # type: ignore[arg-type]
        share = float(targets[0, 0])
        seen.add(share)
        transform = v2.MixUp(num_classes=8) if kind == "mixup" else v2.CutMix(num_classes=8)
        params: dict[str, Any] = {"labels": labels, "batch_size": 6, "lam": share, "lam_adjusted": share}
        if kind == "cutmix":
            rows, columns = (got != images).any(1).any(0).nonzero().unbind(1)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else (0, 0, 0, 0)
            params["box"] = tuple(map(int, box))
            area = (params["box"][2] - params["box"][0]) * (params["box"][3] - params["box"][1])
            assert share == pytest.approx(1 - area / (20 * 24), abs=1e-6)
        torch.testing.assert_close(got, transform.transform(images, params))
        torch.testing.assert_close(targets, transform.transform(labels, params))
        again = mixed(replace(CONFIG, **{kind: 0.8}), 2, step, images, labels, 8)  # type: ignore[arg-type]
        assert torch.equal(again[0], got)
    assert len(seen) > 20
    both = [mixed(replace(CONFIG, mixup=0.8, cutmix=0.8), 1, step, images, labels, 8)[0] for step in range(60)]
    cut = sum(bool(((one == images) | (one == images.roll(1, 0))).all()) for one in both)
    assert 15 < cut < 45


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("changes", [{}, {"class_weights": "balanced", "label_smoothing": 0.1}, {"mixup": 1.0}])
def test_a_batch_in_parts_trains_what_the_whole_batch_trains(
    parts: int, changes: dict[str, Any], data: LoadedData
) -> None:
    config = replace(CONFIG, batch_size=12, **changes)
    whole, _ = trained(config, data)
    split, _ = trained(replace(config, accumulate=parts), data)
    assert_near(split.model, whole.model)


def test_a_part_of_one_image_is_rehearsed() -> None:
    config = replace(CONFIG, batch_size=5, accumulate=4)  # 2, 2 and 1 images
    assert batch_kinds(config, 10) == {1, 2} and batch_kinds(replace(config, accumulate=1), 10) == {2}
    with pytest.raises(ModelError, match=r"in 4 parts \(accumulate\) leaves a batch of one image.*; take fewer parts"):
        rehearse(replace(config, arch="resnet18"), 3, batch_kinds(config, 10))


def test_each_numbered_block_decays_from_the_one_behind() -> None:
    config = replace(CONFIG, arch="resnet18", layer_decay=0.5, head_lr_factor=3.0)
    factors = rate_factors(config, build_model(config, 3))
    blocks = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    for place, block in enumerate(blocks):
        those = {value for name, value in factors.items() if name.startswith(f"{block}.")}
        assert those == {0.5 ** (len(blocks) - place)}, block
    assert factors["bn1.weight"] == factors["conv1.weight"] and factors["fc.bias"] == 3.0
    config = replace(config, arch="vgg11_bn")
    factors = rate_factors(config, build_model(config, 3))
    assert (
        factors["features.0.weight"] == factors["features.1.bias"] == 0.5**8 and factors["classifier.0.weight"] == 3.0
    )


def test_a_factor_multiplies_the_step_of_its_layers(data: LoadedData) -> None:
    config = replace(CONFIG, batch_size=12, momentum=0.0)
    plain, before = trained(config, data)
    scaled, _ = trained(replace(config, layer_decay=0.5, head_lr_factor=3.0), data)
    for name, factor in rate_factors(replace(config, layer_decay=0.5, head_lr_factor=3.0), plain.model).items():
        moved, want = (t.model.state_dict()[name] - before[name] for t in (scaled, plain))
        torch.testing.assert_close(moved, factor * want, rtol=1e-3, atol=1e-7)


# -- resume ------------------------------------------------------------------------------------------------------------


OWN = """
from torch import nn


def build(num_classes):
    body = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(body, nn.Dropout(0.5), nn.Linear(4, num_classes))
"""


def test_every_setting_and_every_entry_is_among_the_cases() -> None:
    told = {name for changes in ALL for name in changes}
    assert TRIAL_FIELDS.keys() - told == {"weights", "epochs"}  # what it starts from, and how long it goes on
    assert NETWORKS.keys() == SOURCES.keys()
    assert {freeze.partition(":")[0] for changes in ALL if (freeze := changes.get("freeze"))} == {
        *FREEZE_CHOICES, "up_to", "first",
    } - {"none"}  # fmt: skip
    usual = [changes for changes in ALL if "dataset" not in changes and replace(CONFIG, **changes) == CONFIG]
    assert usual == [{"objective": "val/accuracy"}]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with somebody's own network, and the files of a dataset of each kind."""
    folder = tmp_path_factory.mktemp("brought")
    (folder / "brought_along.py").write_text(OWN)
    draw(folder / "photos", images=9)
    lines = [f"photos/{path.parent.name}/{path.name},{path.parent.name}" for path in folder.glob("photos/*/*.png")]
    (folder / "list.csv").write_text("\n".join(["path,label", *sorted(lines)]))
    return folder


@pytest.fixture
def brought(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let what is in that folder be imported, and images be kept there."""
    monkeypatch.syspath_prepend(files)
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(files / "data"))
    return files


def dataset(name: str, brought: Path) -> DatasetConfig:
    """Return a small dataset of a kind."""
    if name == "caltech101" and not (brought / "caltech").exists():
        fake_caltech(brought / "caltech")
        for label in range(3):
            for path in (brought / "caltech" / f"class_{label:03d}").iterdir():
                path.write_bytes(
                    (brought / "photos" / f"class {label}" / f"{int(path.stem[-4:]) % 9}.png").read_bytes()
                )
    small: dict[str, Any] = {
        "caltech101": {"root": str(brought / "caltech"), "images_per_class": 5, "classes": 3},
        "csv": {"root": str(brought / "list.csv")},
        "torchvision": {"source": "FakeData"},
        "folder": {"root": str(brought / "photos"), "folds": 3, "fold": 2},
        "shapes": {"classes": 3, "images_per_class": 5},
    }
    return DatasetConfig(name=name, resize=32, crop=32, **small[name])


def with_data(
    changes: dict[str, Any], data: LoadedData, brought: Path, **others: Any
) -> tuple[TrialConfig, LoadedData]:
    """Return the config that a case is, and its images."""
    if changes.get("arch", "").startswith("timm/"):
        pytest.importorskip("timm")
    if name := changes.get("dataset"):
        config = replace(CONFIG, **others, dataset=dataset(name, brought))
        return config, load_dataset(config.dataset)
    return replace(CONFIG, **{**others, **changes}), data


def run(
    config: TrialConfig, data: LoadedData, stages: CacheOptions | None = None, stop: int | None = None
) -> tuple[list[EpochResult], TrialOutcome | None]:
    trial, epochs = run_trial(config, data, CPU, stages=stages), list[EpochResult]()
    while len(epochs) != stop:
        try:
            epochs.append(next(trial))
        except StopIteration as end:
            return epochs, end.value
    trial.close()
    return epochs, None


def assert_same(one: TrialOutcome | None, other: TrialOutcome | None) -> None:
    assert one is not None and other is not None and one.metrics() == other.metrics()
    assert all(torch.equal(one.weights[name], value) for name, value in other.weights.items())


@pytest.mark.parametrize("changes", slow_but(QUICK, ALL), ids=named)
def test_a_trial_that_was_stopped_ends_as_if_it_had_not_been(
    changes: dict[str, Any], data: LoadedData, brought: Path, tmp_path: Path
) -> None:
    config, data = with_data(changes, data, brought)
    epochs, want = run(config, data)
    stages = CacheOptions(tmp_path, 10**9, hold_at=frozenset({2}))  # kept whatever that takes
    run(config, data, stages, stop=2)
    again, got = run(config, data, stages)
    assert_same(got, want)
    assert got is not None and got.epochs_reused == 2
    assert [epoch.train_loss for epoch in again] == [epoch.train_loss for epoch in epochs]


@pytest.mark.slow
@pytest.mark.parametrize("changes", ALL, ids=named)
def test_shared_epochs_and_kept_outputs_change_no_bit(
    changes: dict[str, Any], data: LoadedData, brought: Path, tmp_path: Path
) -> None:
    network = {"arch": "resnet18"} if changes.get("arch") == CONFIG.arch else {}
    config, data = with_data({**changes, **network}, data, brought, arch="resnet18", freeze="conv")
    run(config, data, CacheOptions(tmp_path, 10**9, frozenset({1, 2})))
    longer = replace(config, epochs=4)
    _, got = run(longer, data, CacheOptions(tmp_path, 10**9))
    assert_same(got, run(longer, data)[1])
    reused = 3 if config.freeze == "conv" else 1  # a large state is saved only where it spares more than it costs
    assert got is not None
    assert got.epochs_reused >= reused or config.schedule in ("cosine", "linear", "one_cycle", "wsd")
    kept = (
        config.freeze == "conv"
        and not (config.mixup or config.cutmix)
        and {"hflip", "vflip"}.issuperset(config.augment)
    )
    assert bool(list(tmp_path.rglob("features-*"))) == kept


def test_schedules_share_the_epochs_whose_rates_agree(data: LoadedData, tmp_path: Path) -> None:
    stages = CacheOptions(tmp_path, 10**9, frozenset({1, 2}))
    wsd = replace(CONFIG, schedule="wsd", cooldown_epochs=1)
    run(wsd, data, stages)
    for config, reused in (
        (replace(wsd, epochs=4), 2),
        (replace(wsd, schedule="step"), 2),
        (replace(wsd, schedule="constant"), 2),
        (replace(wsd, schedule="cosine"), 0),
        (replace(wsd, warmup_steps=2), 0),
        (replace(wsd, mixup=0.5), 0),
        (replace(wsd, sample_weights="balanced"), 0),
        (replace(wsd, objective="val/loss"), 0),
    ):
        _, got = run(config, data, CacheOptions(tmp_path, 10**9))
        assert got is not None and got.epochs_reused == reused, config
        assert_same(got, run(config, data)[1])
