"""Networks of every source: timm's against timm itself, a user's own, and what is wrong with them in a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.errors import ModelError
from caltech_sweep.training.checkpoints import initial_weights
from caltech_sweep.training.features import agrees, split_model
from caltech_sweep.training.keys import CacheOptions, prefix_key
from caltech_sweep.training.models import build_model, count_parameters, train_mode
from caltech_sweep.training.networks import input_note, mean_and_std, normalization, normalization_name, source_of
from caltech_sweep.training.rehearsal import rehearse
from helpers.places import invoke
from helpers.trials import run

timm = pytest.importorskip("timm")
hub = pytest.importorskip("huggingface_hub")

SMALL = ("test_convnext", "test_efficientnet", "test_resnet", "test_vit")  # published for tests; each of another kind
SHAPES = DatasetConfig(name="shapes", resize=40, crop=32, classes=3, images_per_class=8)
TRIAL = TrialConfig(dataset=SHAPES, arch="timm/test_resnet", epochs=2, batch_size=8, lr=0.05, drop_last=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hugging Face hub, and a hub that nobody reaches."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    return folder


def publish(cache: Path, name: str, repository: str | None = None, seed: int = 1) -> dict[str, torch.Tensor]:
    """Put weights for a network where a download from the hub leaves them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name)
    repository = repository or model.pretrained_cfg["hf_hub_id"]
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    state = model.state_dict()
    save_file(state, snapshot / "model.safetensors")
    kept = {**model.pretrained_cfg, "mean": [0.1, 0.2, 0.3]}
    (snapshot / "config.json").write_text(
        json.dumps({"architecture": name, "num_classes": 1000, "pretrained_cfg": kept})
    )
    return state


@pytest.mark.parametrize("name", SMALL)
def test_timm_s_published_weights_give_timm_s_own_outputs(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(cache, name)
    ours = build_model(TrialConfig(arch=f"timm/{name}", weights="pretrained", outputs=1000), 5).eval()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    theirs = timm.create_model(name, pretrained=True).eval()
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
        other = build_model(TrialConfig(arch=f"timm/{name}", weights="pretrained"), 5).eval()
        assert torch.equal(other.forward_features(images), theirs.forward_features(images))
    assert other(images).shape == (1, 5)


def test_a_network_of_the_hub_is_built_from_its_own_configuration(cache: Path) -> None:
    state = publish(cache, "test_resnet", "someone/some-net")
    config = TrialConfig(arch="timm/hf-hub:someone/some-net", weights="pretrained")
    model = build_model(config, 5)
    assert all(
        torch.equal(value, state[name]) for name, value in model.state_dict().items() if not name.startswith("fc")
    )
    assert mean_and_std(normalization(config)) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))


def test_published_weights_count_by_their_contents(cache: Path, tmp_path: Path) -> None:
    config = replace(TRIAL, weights="pretrained")
    publish(cache, "test_resnet")
    first = initial_weights(config, None)
    assert first.startswith("file ") and initial_weights(replace(config, weights="imagenet"), None) == first
    publish(cache.parent / "other", "test_resnet", seed=2)
    (cache.parent / "hub").rename(tmp_path / "away")
    (cache.parent / "other").rename(cache)
    assert initial_weights(config, None) != first


@pytest.mark.parametrize("name", SMALL)
def test_frozen_layers_of_timm_s_networks_are_split_to_the_bit(name: str) -> None:
    config = TrialConfig(arch=f"timm/{name}", freeze="conv")
    model = build_model(config, 3)
    train_mode(model, config)
    split = split_model(model, source_of(config.arch).tail(model))
    assert split is not None
    images = torch.randn(2, 3, 160, 160)
    assert torch.equal(split.tail(split.frozen(images)), model(images)) and agrees(model, split, images)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        f"{source_of(config.arch).tail(model)[-1]}.{kind}" for kind in ("weight", "bias")
    }


def test_mean_and_deviation_of_every_published_network_are_timm_s() -> None:
    for name in timm.list_pretrained():
        published = timm.models.get_pretrained_cfg(name)
        found = mean_and_std(normalization(TrialConfig(arch=f"timm/{name}")))
        assert found == (tuple(published.mean), tuple(published.std)), name
    assert normalization_name((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)) == "half"
    assert normalization(TrialConfig(arch="timm/vit_base_patch16_clip_224.openai", normalize="half")) == "half"


@pytest.mark.parametrize(
    ("arch", "sentence"),
    [
        ("timm/levit_128", "timm's LevitDistilled has more or less than one classifier"),
        ("timm/resnet5O", "arch: timm has no network 'resnet5O'; did you mean 'timm/resnet50'?"),
        ("timm/test_vit.nope", "arch: timm has no weights 'test_vit.nope'; of test_vit it has r160_in1k"),
        (
            "timm/hf-hub:someone/nothing",
            "arch: timm/hf-hub:someone/nothing cannot be downloaded from the Hugging Face hub",
        ),
        (
            "timm/test_vit",
            "weights: the published weights of timm/test_vit cannot be downloaded .* hf download timm/test_v",
        ),
        (
            "timm/vit_base_patch16_18x2_224",
            "weights: timm has no published weights for 'timm/vit_base_patch16_18x2_224'",
        ),
    ],
)
def test_what_cannot_be_had_from_timm_is_a_sentence(arch: str, sentence: str, cache: Path) -> None:
    with pytest.raises(ModelError, match=sentence):
        build_model(TrialConfig(arch=arch, weights="none" if "levit" in arch else "pretrained", freeze="conv"), 3)


def test_a_crop_that_a_fixed_network_cannot_take_is_refused() -> None:
    with pytest.raises(ModelError, match="it takes exactly 224: set dataset.crop to 224"):
        rehearse(replace(TRIAL, arch="timm/vit_tiny_patch16_224"), 3, [2])
    rehearse(replace(TRIAL, arch="timm/test_resnet"), 3, [2])


def test_what_a_network_sees_is_that_of_its_own_configuration_and_is_said() -> None:
    note = input_note(TrialConfig(arch="timm/vit_base_patch16_clip_224.openai", weights="file:x"))
    assert note == (
        "timm/vit_base_patch16_clip_224.openai sees mean 0.481, 0.458, 0.408 and standard deviation 0.269, 0.261, "
        "0.276, resized to 256 and cropped to 224 pixels, bilinear; its weights are published for 224 pixels, bicubic"
    )
    for name in ("inception_v3", "efficientnet_v2_l", "vit_b_16"):
        transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        said = input_note(TrialConfig(arch=name, weights="pretrained"))
        assert said is not None and said.endswith(f"{transform.crop_size[0]} pixels, {transform.interpolation.value}")
    assert input_note(TrialConfig(arch="resnet18")) is None and input_note(TrialConfig(arch="some:thing")) is None


def test_pretrained_is_the_newer_word_for_imagenet(place: Path) -> None:
    old, new = (TrialConfig(arch="resnet18", weights=word) for word in ("imagenet", "pretrained"))
    assert old.fingerprint() == new.fingerprint() and prefix_key(old) == prefix_key(new)
    assert normalization(old) == normalization(new) == "imagenet"


# -- whole studies -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_of_a_timm_network_runs_and_its_best_trial_predicts(place: Path, cache: Path) -> None:
    publish(cache, "test_resnet")
    options = ("--set=arch=timm/test_resnet", "--set=weights=pretrained", "--set=epochs=1", "--row", "First")
    result = invoke("run", "tiny", "--in-process", "--threads", "1", *options)
    assert result.exit_code == 0 and "study tiny: 1 complete" in result.output, result.output
    again = invoke(
        "run", "tiny", "--in-process", "--threads", "1", *options[:1], "--set=weights=imagenet", *options[2:]
    )
    assert again.exit_code == 0 and "nothing to do" in again.output, again.output
    promoted = invoke("promote", "tiny")
    assert promoted.exit_code == 0, promoted.output


@pytest.mark.parametrize("missing", ["timm", "hub"])
def test_what_is_missing_is_said_before_anything_is_written(
    missing: str, place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "timm":
        monkeypatch.setitem(sys.modules, "timm", None)
    result = invoke("run", "tiny", "--in-process", "--set=arch=timm/test_resnet", "--set=weights=pretrained")
    assert result.exit_code == 2 and "started" not in result.output
    said = (
        "pip install 'caltech-sweep[timm]'" if missing == "timm" else "cannot be downloaded from the Hugging Face hub"
    )
    assert said in result.output and "Traceback" not in result.output
    assert not (place / "mlruns").exists()


# -- a user's own network ----------------------------------------------------------------------------------------------

OWN = """
import torch
from torch import nn
from {helper} import width

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        if images.shape[-1] > 64:
            raise ValueError("too large for me")
        return self.head(self.body(images).flatten(1))

def build(num_classes):
    return Net(num_classes)

def peeks(num_classes):
    net = Net(num_classes)
    assert net.head.weight.sum().item() < 1e9
    return net

def raises(num_classes):
    raise KeyError("no such layer")

def none(num_classes):
    return None

def two(num_classes, depth):
    return Net(num_classes)

def leaves(num_classes):
    raise SystemExit(3)

def wide(num_classes):
    return Net(num_classes + 4)

class Pair(Net):
    def forward(self, images):
        return super().forward(images), images

def pair(num_classes):
    return Pair(num_classes)

constant = 3
"""


@pytest.fixture
def own(place: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working folder, with one that it imports; named after the test, since a process keeps modules."""
    name = f"own_{abs(hash(request.node.nodeid)):x}"
    (place / f"{name}.py").write_text(OWN.format(helper=f"{name}_width"))
    (place / f"{name}_width.py").write_text("width = 4\n")
    (place / f"{name}_parses.py").write_text("import sys\nsys.exit(2)\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


@pytest.mark.parametrize("factory", ["build", "peeks"])
def test_an_own_network_trains_resumes_and_keeps_its_features(factory: str, own: str, tmp_path: Path) -> None:
    config = replace(TRIAL, arch=f"{own}:{factory}", freeze="conv")
    data = load_dataset(SHAPES)
    rehearse(config, 3, [1, 2])
    assert count_parameters(config, 3) == (15, 3 * 4 * 9 + 4 + 2 * 4 + 15)
    want = run(config, data)
    use = CacheOptions(tmp_path / "cache", 10**8, every_seconds=0)
    for reused in (0, 2):
        got = run(config, data, use)
        assert got[1].epochs_reused == reused and got[1].metrics() == want[1].metrics()
        assert all(torch.equal(got[1].weights[name], value) for name, value in want[1].weights.items())
    assert any(path.name.startswith("features-") for path in use.folder.iterdir())


def digest_of(place: Path, own: str) -> str:
    code = (
        f"from caltech_sweep.training.networks import *; print(source_of('{own}:build').version('{own}:build')[SOURCE])"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.slow
def test_the_source_of_an_own_network_and_of_what_it_imports_is_in_the_key(own: str, place: Path) -> None:
    first = digest_of(place, own)
    (place / "unrelated.py").write_text("x = 1\n")
    assert len(first) == 64 and digest_of(place, own) == first
    (place / f"{own}_width.py").write_text("width = 8\n")
    assert digest_of(place, own) != first


@pytest.mark.slow
def test_a_study_of_an_own_network_is_not_gone_on_with_after_its_code_changed(own: str, place: Path) -> None:
    command = [sys.executable, "-m", "caltech_sweep", "run", "tiny", "--in-process", "--row", "First"]
    command += [f"--set=arch={own}:build", "--set=epochs=1", "--threads=1"]
    first = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr + first.stdout
    from caltech_sweep.tracking.writer import MlflowTracker

    tracker = MlflowTracker()
    study = tracker.study("tiny")
    assert study is not None
    [trial] = tracker.trials(study)
    assert trial.tags["environment.network_source"] == digest_of(place, own)
    (place / f"{own}_width.py").write_text("width = 8\n")
    second = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert second.returncode == 2 and f"networks.{own}:build: was" in second.stderr, second.stderr + second.stdout


@pytest.mark.parametrize(
    ("arch", "sentence"),
    [
        ("{own}:raises", r"arch: {own}:raises\(3\) raised KeyError: 'no such layer'"),
        ("{own}:leaves", r"arch: {own}:leaves\(3\) raised SystemExit: 3"),
        ("{own}:wide", r"{own}:wide gives outputs of \(2, 7\) for 2 images where a tensor of \(2, 3\) is needed"),
        ("{own}:pair", r"{own}:pair gives a tuple for 2 images .*; let its last layer have as many outputs as it is"),
        ("{own}:none", "arch: {own}:none returned NoneType where a torch.nn.Module is needed"),
        ("{own}:two", "arch: {own}:two has to take one argument, the number of classes: missing .*'depth'"),
        ("{own}:constant", "arch: {own}:constant is not a function, but int"),
        ("{own}:nothing", "arch: the module {own} has no 'nothing'"),
        ("{own}_parses:build", r"module {own}_parses cannot be imported: SystemExit: 2"),
        ("nowhere_at_all:build", "arch: the module nowhere_at_all of .* cannot be imported: neither installed nor in"),
    ],
)
def test_what_is_wrong_with_a_factory_is_a_sentence(arch: str, sentence: str, own: str) -> None:
    with pytest.raises(ModelError, match=sentence.format(own=own)):
        rehearse(replace(TRIAL, arch=arch.format(own=own)), 3, [2])


def test_an_own_network_that_cannot_take_the_crop_is_a_sentence(own: str) -> None:
    wide = replace(TRIAL, arch=f"{own}:build", dataset=replace(SHAPES, resize=80, crop=80))
    with pytest.raises(
        ModelError, match=r"cannot be trained on crops of 80 pixels \(too large for me\); set dataset.crop"
    ):
        rehearse(wide, 3, [2])
    with pytest.raises(ModelError, match="has no published weights; have the factory load them"):
        rehearse(replace(TRIAL, arch=f"{own}:build", weights="pretrained"), 3, [2])
