"""Every torchvision classifier, from files in the style of the published ones, against torchvision's own builders."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.errors import ModelError
from caltech_sweep.training.device import pick_device
from caltech_sweep.training.models import build_model, read_weights, trained_model
from caltech_sweep.training.networks import NORMALIZE, normalization
from caltech_sweep.training.trial import run_trial

ARCHS = torchvision.models.list_models(module=torchvision.models)
QUICK = ("densenet121", "googlenet", "mnasnet0_5", "mobilenet_v3_small", "resnet18")
HUGE = ("regnet_y_128gf", "vit_h_14")  # gigabytes each

Publish = Callable[[str, OrderedDict[str, torch.Tensor]], None]


def first_weights(arch: str) -> torchvision.models.WeightsEnum:
    return next(iter(torchvision.models.get_model_weights(arch)))


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Put a state dict where this package and torchvision's own builders expect the published file."""
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def put(arch: str, state: OrderedDict[str, torch.Tensor]) -> None:
        published = first_weights(arch)
        monkeypatch.setattr(published.value, "url", f"http://localhost:9/{arch}.pth")  # no digits to check, no server
        (tmp_path / "torch/hub/checkpoints").mkdir(parents=True, exist_ok=True)
        torch.save(state, tmp_path / "torch/hub/checkpoints" / f"{arch}.pth")

    return put


def old_style(arch: str) -> OrderedDict[str, torch.Tensor]:
    """Return a state dict as the older published files are: with auxiliary classifiers, old names, without counters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        size = {"image_size": first_weights(arch).meta["min_size"][0]} if arch.startswith("vit") else {}
        extra = {"init_weights": False} if arch in ("googlenet", "inception_v3") else {}
        state = torchvision.models.get_model(arch, weights=None, **size, **extra).state_dict()
    metadata = state._metadata
    if arch.startswith("vit"):  # whose last layer starts as zeros, which would make all outputs alike
        torch.nn.init.normal_(state["heads.head.weight"], generator=torch.Generator().manual_seed(1))
    renamed = OrderedDict()
    for key, value in state.items():
        if key.endswith("num_batches_tracked") and arch.startswith(("densenet", "vgg")):
            continue
        key = re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key)
        renamed[
            re.sub(r"mlp\.(0|3)\.", lambda m: f"mlp.linear_{1 if m[1] == '0' else 2}.", key)
            if arch.startswith("vit")
            else key
        ] = value
    if not arch.startswith(("densenet", "vgg", "vit")):
        renamed._metadata = metadata
    return renamed


def assert_as_torchvision(arch: str, publish: Publish) -> None:
    publish(arch, old_style(arch))
    theirs = torchvision.models.get_model(arch, weights=first_weights(arch)).eval()
    ours = build_model(TrialConfig(arch=arch, weights="imagenet", outputs=1000), 5).eval()
    side = max(first_weights(arch).meta["min_size"][0], 64)
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 4 - 2
    with torch.no_grad():
        want, got = theirs(images), ours(images)
    assert want.isfinite().all() and want.std() > 0
    assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:auxiliary heads", "ignore::FutureWarning")
@pytest.mark.parametrize("arch", QUICK)
def test_published_weights_give_torchvision_s_own_outputs(arch: str, publish: Publish) -> None:
    assert_as_torchvision(arch, publish)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:auxiliary heads", "ignore::FutureWarning")
@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch not in QUICK])
def test_published_weights_of_every_network_give_torchvision_s_own_outputs(arch: str, publish: Publish) -> None:
    if arch in HUGE and not _has_memory(24):
        pytest.skip("needs 24 GB of memory")
    assert_as_torchvision(arch, publish)


def _has_memory(gigabytes: int) -> bool:
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    return found is not None and int(found[1]) > gigabytes * 1e6


def test_auto_normalisation_is_that_of_every_published_file() -> None:
    for arch in ARCHS:
        transform = first_weights(arch).transforms()
        mean, std = NORMALIZE[normalization(TrialConfig(arch=arch, weights="imagenet"))]
        assert (list(transform.mean), list(transform.std)) == (list(mean), list(std)), arch


SHAPES = DatasetConfig(name="shapes", resize=36, crop=32, classes=3, images_per_class=4)


def test_a_trained_googlenet_is_the_same_network_when_it_is_opened_again(publish: Publish, tmp_path: Path) -> None:
    """Its input transform is recorded in its checkpoint; one of an older version, which had none, loads as it was."""
    from safetensors import safe_open

    from caltech_sweep.artifacts import CHECKPOINT
    from caltech_sweep.serving.runs import model_spec
    from caltech_sweep.serving.served_model import Classifier
    from caltech_sweep.training.results import write_artifacts

    publish("googlenet", old_style("googlenet"))
    config = TrialConfig(dataset=SHAPES, arch="googlenet", weights="imagenet", epochs=1, batch_size=4, lr=1e-4)
    data, device = load_dataset(SHAPES), pick_device("cpu")
    trial = run_trial(config, data, device)
    with pytest.raises(StopIteration) as end:
        while True:
            next(trial)
    outcome = end.value.value
    assert outcome.transform_input
    write_artifacts(tmp_path / "run", config, data, outcome, device)
    checkpoint = tmp_path / "run" / CHECKPOINT
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
    spec = model_spec(config, data.split.classes, metadata)
    assert spec["transform_input"] and spec["mean"] == NORMALIZE["imagenet"][0]
    crops = list(data.center_crops("test", 32))
    images = data.paths("test")
    ranking = Classifier(spec, outcome.weights, device).rank(crops, top=1)
    lines = (tmp_path / "run" / "predictions" / "test.csv").read_text().splitlines()[1:]
    assert len(images) == len(lines) == len(ranking)
    for line, [(name, confidence)] in zip(lines, ranking, strict=True):
        assert line.split(",")[2] == name and float(line.split(",")[3]) == pytest.approx(confidence, abs=1e-4)
    further = build_model(replace(config, weights="run:x"), 3, checkpoint)
    assert further.transform_input
    older = model_spec(config, data.split.classes, {"classes": "[]"})
    assert not older["transform_input"]
    assert not trained_model("googlenet", 3, outcome.weights).transform_input
    Classifier({k: v for k, v in older.items() if k != "transform_input"}, outcome.weights, device).rank(crops)


def test_mnasnet_trains_to_its_end_and_resumes(tmp_path: Path) -> None:
    """Its checkpoints carry no versions, which it asks for when it loads them."""
    from caltech_sweep.training.keys import CacheOptions

    config = TrialConfig(dataset=SHAPES, arch="mnasnet0_5", epochs=1, batch_size=4)
    data, device = load_dataset(SHAPES), pick_device("cpu")
    for _ in range(2):  # the second restores the first's stage
        *_, epoch = run_trial(config, data, device, stages=CacheOptions(tmp_path, 10**9))
        assert epoch.epoch == 1


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    state = torchvision.models.squeezenet1_1().state_dict()
    state["features.0.bias"][3] = float("inf")
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(
        ModelError, match="hold NaN or infinity, for example in features.0.bias; take another checkpoint"
    ):
        build_model(TrialConfig(arch="squeezenet1_1", weights=f"file:{tmp_path / 'broken.pt'}"), 5)


def test_a_file_that_is_not_what_it_was_is_never_trained_from(tmp_path: Path) -> None:
    from caltech_sweep.files import file_digest

    path = tmp_path / "w.pt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    digest = file_digest(path)
    assert set(read_weights(path, digest).state) == {"weight", "bias"}
    torch.save(nn.Linear(2, 2).state_dict(), path)
    sentence = f"changed while the study ran: its SHA-256 was {digest} .* is {file_digest(path)} now"
    with pytest.raises(ModelError, match=sentence):
        read_weights(path, digest)


@pytest.mark.slow
def test_the_swag_vision_transformer_has_the_image_size_of_its_weights(publish: Publish) -> None:
    """As for vit_h_14, whose first published weights are for 518 pixels: the file decides, here at a small size."""
    small = torchvision.models.vit_b_32(image_size=96).state_dict()
    publish("vit_b_32", small)
    model = build_model(TrialConfig(arch="vit_b_32", weights="imagenet"), 5)
    assert model.image_size == 96
    assert trained_model("vit_b_32", 5, model.state_dict()).image_size == 96
