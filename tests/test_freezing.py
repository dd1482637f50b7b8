"""Which layers are trained, and when: by name, by share, and head first, against plain torch and to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from caltech_sweep.config import TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.data.images import LoadedData
from caltech_sweep.errors import ModelError, StudyFileError
from caltech_sweep.seeds import derive_seed
from caltech_sweep.study.definition import Choices
from caltech_sweep.study.file import load_study, parse_override
from caltech_sweep.sweep.sharing import common_epochs, new_epochs
from caltech_sweep.training.features import split_model
from caltech_sweep.training.models import build_model, count_parameters, train_mode
from caltech_sweep.training.networks import source_of
from caltech_sweep.training.rehearsal import rehearse
from caltech_sweep.training.trial import run_trial
from helpers.marks import slow_but
from helpers.trials import CONFIG, CPU, SHAPES, run, use_of

MOBILE = replace(CONFIG, augment=(), epochs=3, precision="float32")
HEAD_FIRST = replace(MOBILE, freeze="conv", unfreeze_epoch=3)
KINDS = {
    "up_to": replace(MOBILE, freeze="up_to:features.8"),
    "first": replace(MOBILE, freeze="first:0.5", augment=("hflip",)),
    "head_first": HEAD_FIRST,
    "head_first_adam": replace(HEAD_FIRST, optimizer="adam", lr=1e-3, augment=("hflip",), unfreeze_epoch=2),
    "prefix_first": replace(MOBILE, freeze="first:0.5", unfreeze_epoch=2),
}


@pytest.fixture(scope="module")
def data() -> LoadedData:
    return load_dataset(SHAPES)


def trained(config: TrialConfig) -> list[str]:
    return [name for name, parameter in build_model(config, 3).named_parameters() if parameter.requires_grad]


def test_layers_are_frozen_up_to_one_of_them_in_the_network_s_own_order() -> None:
    config = TrialConfig(arch="resnet18", freeze="up_to:layer3")
    assert {name.split(".")[0] for name in trained(config)} == {"layer4", "fc"}
    assert {name.split(".")[0] for name in trained(replace(config, freeze="up_to:layer2.0"))} >= {"layer2", "layer3"}
    names = trained(replace(config, freeze="up_to:layer2.0"))
    assert not any(name.startswith("layer2.0") for name in names) and any(name.startswith("layer2.1") for name in names)
    assert trained(replace(config, freeze="up_to:layer4")) == trained(replace(config, freeze="conv"))


def test_a_share_of_the_layers_with_weights_is_frozen_from_the_beginning() -> None:
    config = TrialConfig(arch="alexnet")  # five convolutional layers and three linear ones
    assert trained(replace(config, freeze="first:0.5"))[0] == "features.10.weight"
    assert trained(replace(config, freeze="first:0.99")) == ["classifier.6.weight", "classifier.6.bias"]


def test_frozen_layers_drop_nothing_and_keep_their_statistics_until_they_are_trained() -> None:
    config = TrialConfig(arch="efficientnet_b0", freeze="up_to:features.4")
    model = build_model(config, 3)
    train_mode(model, config)
    for name, module in model.named_modules():
        if name.startswith("features.") and name.count(".") == 1:
            assert module.training is (int(name.split(".")[1]) > 4), name


def test_a_frozen_backbone_is_kept_as_features_however_it_is_named() -> None:
    for freeze, split in (("up_to:layer4", True), ("up_to:layer3", False), ("conv", True)):
        config = TrialConfig(arch="resnet18", freeze=freeze)
        model = build_model(config, 3)
        train_mode(model, config)
        assert (split_model(model, source_of(config.arch).tail(model)) is not None) is split


@pytest.mark.parametrize(
    ("freeze", "sentence"),
    [
        ("up_to:layer5", "freeze: this network has no layer 'layer5'; did you mean 'layer"),
        ("up_to:zzz", "no layer 'zzz'; its parts are conv1, bn1, relu, maxpool, layer1, .*, fc, and theirs follow"),
        ("up_to:relu", "freeze: layer 'relu' has no weights; name the one before it"),
        ("up_to:fc", "freeze: nothing is left to train after layer 'fc'; name one before it"),
        ("first:0.001", "freeze: first:0.001 freezes nothing here, that share of its 41 layers is less than one layer"),
    ],
)
def test_what_cannot_be_frozen_is_a_sentence(freeze: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        rehearse(TrialConfig(arch="resnet18", freeze=freeze), 3, [2])


def test_layers_that_are_trained_later_are_rehearsed_too() -> None:
    config = replace(TrialConfig(arch="resnet18", freeze="conv", batch_size=8), dataset=SHAPES)
    rehearse(config, 3, [1, 2])
    with pytest.raises(ModelError, match="batch_size: 8 leaves a batch of one image"):
        rehearse(replace(config, unfreeze_epoch=2), 3, [1, 2])
    assert count_parameters(config, 3)[0] == 512 * 3 + 3
    assert len(set(count_parameters(replace(config, unfreeze_epoch=2), 3))) == 1
    assert count_parameters(replace(config, unfreeze_epoch=31), 3) == count_parameters(config, 3)


# -- training ----------------------------------------------------------------------------------------------------------


def _reference(config: TrialConfig, data: LoadedData, thaw: int | None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train with plain torch: the last layer at first, everything from an epoch on; return the weights and losses."""
    model = build_model(replace(config, freeze="none"), 3)
    head = list(model.classifier.parameters())
    rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("classifier")]
    optimizer = torch.optim.SGD(head, config.lr, config.momentum, weight_decay=config.weight_decay)
    images, labels = (data.center_crops("train", 32).float() / 255 - 0.5) / 0.5, data.labels("train")
    losses = []
    for epoch in range(1, config.epochs + 1):
        model.train()
        if epoch == thaw:
            optimizer.add_param_group({"params": rest})
        if thaw is None or epoch < thaw:
            model.features.eval()
        for group in optimizer.param_groups:
            group["lr"] = config.lr * config.gamma ** ((epoch - 1) // config.step_size)
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "shuffle", epoch))
        total, seen = 0.0, 0
        for number, index in enumerate(torch.randperm(len(labels), generator=generator).split(config.batch_size), 1):
            if len(index) < config.batch_size:
                continue
            torch.manual_seed(derive_seed(config.seed, "dropout", epoch, number))
            loss = F.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad()
            model.zero_grad()
            loss.backward()
            optimizer.step()
            total, seen = total + loss.item() * len(index), seen + len(index)
        losses.append(total / seen)
    return model.state_dict(), losses


@pytest.mark.parametrize("thaw", slow_but([2], [None, 2, 3]))
def test_head_first_is_what_plain_torch_trains(thaw: int | None, data: LoadedData) -> None:
    config = replace(HEAD_FIRST, unfreeze_epoch=thaw, lr=0.01)
    epochs, outcome = run(config, data)
    _, losses = _reference(config, data, thaw)
    assert [epoch.train_loss for epoch in epochs] == pytest.approx(losses, rel=1e-4)
    weights, _ = _reference(replace(config, epochs=outcome.best.epoch), data, thaw)
    for name, value in weights.items():
        torch.testing.assert_close(outcome.weights[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", slow_but(["head_first", "up_to"], KINDS))
def test_a_trial_that_is_killed_ends_with_the_same_bits(kind: str, data: LoadedData, tmp_path: Path) -> None:
    config, use = KINDS[kind], use_of(tmp_path)  # of three epochs, two are done: before the change, and after it
    want = run(config, data)
    killed = run_trial(config, data, CPU, stages=use)
    next(killed)
    next(killed)
    killed.close()
    got = run(config, data, use)
    assert (got[1].epochs_reused, got[1].epochs_trained) == (2, 1)
    assert [epoch.train_loss for epoch in got[0]] == [epoch.train_loss for epoch in want[0]]
    assert got[1].metrics() == want[1].metrics()
    assert all(torch.equal(got[1].weights[name], value) for name, value in want[1].weights.items())


def test_the_frozen_epochs_are_shared_and_use_kept_features(data: LoadedData, tmp_path: Path) -> None:
    use = use_of(tmp_path)
    frozen = replace(HEAD_FIRST, unfreeze_epoch=None)
    run(frozen, data, use)
    features = {path.name for path in tmp_path.iterdir() if path.name.startswith("features-")}
    assert features
    want = run(HEAD_FIRST, data)
    got = run(HEAD_FIRST, data, use)
    assert (got[1].epochs_reused, got[1].epochs_trained) == (2, 1)
    assert all(torch.equal(got[1].weights[name], value) for name, value in want[1].weights.items())
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("features-")} == features
    assert common_epochs(frozen, HEAD_FIRST) == 2 and new_epochs([frozen, HEAD_FIRST]) == [3, 1]
    assert common_epochs(replace(HEAD_FIRST, unfreeze_epoch=2), HEAD_FIRST) == 1
    assert common_epochs(replace(HEAD_FIRST, unfreeze_epoch=9), frozen) == 3
    assert common_epochs(replace(MOBILE, unfreeze_epoch=2), MOBILE) == 3  # nothing is frozen, so nothing changes


def test_a_trial_that_ends_while_frozen_is_the_same_from_a_later_state(data: LoadedData, tmp_path: Path) -> None:
    """Its patience ends it after two epochs; another trial has trained on, all layers, and left only its last state."""
    patient = replace(HEAD_FIRST, patience=1, min_delta=0.9)
    want = run(patient, data)
    assert len(want[0]) == 2
    run(HEAD_FIRST, data, use_of(tmp_path, save_at=frozenset()))
    got = run(patient, data, use_of(tmp_path))
    assert (got[1].epochs_reused, got[1].epochs_trained) == (2, 0)
    assert got[1].metrics() == want[1].metrics()
    assert all(torch.equal(got[1].weights[name], value) for name, value in want[1].weights.items())


# -- how it is written -------------------------------------------------------------------------------------------------


def test_every_way_to_write_it_is_one_setting(place: Path) -> None:
    study = place / "sweeps" / "tiny.yaml"
    text = study.read_text(encoding="utf-8")
    text = text.replace("set: {lr: 0.05}", "set: {lr: 0.05, freeze: {up_to: layer3}, unfreeze_epoch: 2}")
    text = text.replace("\nrows:", "\n  freeze: {choices: [none, {first: 0.5}, {up_to: layer3}]}\nrows:")
    study.write_text(text.replace("set: {lr: 0.01,", "set: {lr: 0.01, freeze: conv,"), encoding="utf-8")
    definition = load_study("tiny")
    config = definition.row_config(definition.rows[0])
    assert (config.freeze, config.unfreeze_epoch) == ("up_to:layer3", 2)
    assert definition.space["freeze"] == Choices(("none", "first:0.5", "up_to:layer3"))
    assert parse_override("freeze={up_to: layer3}") == ("freeze", "up_to:layer3")
    assert TrialConfig.from_params(config.to_params()) == TrialConfig.from_dict(config.to_dict()) == config
    assert TrialConfig(freeze="up_to:3") == TrialConfig(freeze={"up_to": 3})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["{up_to: }", "{first: 1}", "{first: x}", "{last: 2}", "all", "{}", "[conv]"])
def test_every_other_way_is_refused_with_line_and_reason(value: str, place: Path) -> None:
    study = place / "sweeps" / "tiny.yaml"
    text = study.read_text(encoding="utf-8").replace("set: {lr: 0.05}", f"set: {{lr: 0.05, freeze: {value}}}")
    study.write_text(text, encoding="utf-8")
    said = r"tiny.yaml:10: rows\[0\].set.freeze: must be one of none, .*{up_to: LAYER}"
    with pytest.raises(StudyFileError, match=said):
        load_study("tiny")
