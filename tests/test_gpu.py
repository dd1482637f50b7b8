"""What is only true of a GPU: steps that are replayed, images that stay there, and nothing that waits for it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from caltech_sweep.config import TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.data.images import LoadedData
from caltech_sweep.errors import OutOfMemoryError
from caltech_sweep.training import resident
from caltech_sweep.training.device import gpu_memory
from caltech_sweep.training.fit import Training
from caltech_sweep.training.models import build_model
from caltech_sweep.training.together import train_together
from caltech_sweep.training.trial import run_trial
from helpers.cases import QUICK, RARE, named
from helpers.trials import CONFIG, SHAPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

GPU = torch.device("cuda", 0)
CASES = [*QUICK, *({name: RARE[name]} for name in ("precision", "channels_last", "drop_last", "layer_decay"))]
CASES += [{"arch": arch} for arch in ("alexnet", "resnet18", "timm/test_resnet", "vit_b_16", "densenet121")]
CASES += [{"freeze": "conv", "arch": "resnet18", "unfreeze_epoch": 2}]
OWN = """
import random
import torch
from torch import nn


class Draws(nn.Module):
    def forward(self, images):
        return images * {draw}


def build(num_classes):
    body = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Draws())
    return nn.Sequential(body, nn.Linear(4, num_classes))
"""


@pytest.fixture(scope="module")
def data() -> LoadedData:
    return load_dataset(SHAPES)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Let kernels that add up in any order be others, where there are others."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one with every step that is replayed."""
    made, replay = [], torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        made.append(1)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return made


def trained(config: TrialConfig, data: LoadedData) -> dict[str, torch.Tensor]:
    """Return the weights after all epochs, and the loss of each."""
    training = Training(config, data, build_model(config, len(data.split.classes)), GPU)
    losses = []
    while not training.ended:
        losses.append(training.run_epoch().train_loss)
    return {"losses": torch.tensor(losses), **{k: v.detach().cpu() for k, v in training.model.state_dict().items()}}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.mark.parametrize("changes", CASES, ids=named)
def test_replayed_steps_are_those_that_are_not(changes: dict[str, Any], data: LoadedData, replays: list[int]) -> None:
    if changes.get("arch", "").startswith("timm/"):
        pytest.importorskip("timm")
    size = 224 if changes.get("arch") == "vit_b_16" else 64
    dataset = replace(SHAPES, resize=size, crop=size)
    if "arch" in changes:
        data = load_dataset(dataset)
    else:
        dataset = SHAPES
    config = replace(CONFIG, **{"batch_size": 4, "dataset": dataset, **changes})
    eager = trained(replace(config, cuda_graphs=False), data)
    assert not replays
    replayed = trained(config, data)
    assert replays, "no step was replayed"
    again = trained(replace(config, cuda_graphs=False), data)
    assert apart(eager, replayed) <= 2 * apart(eager, again)


@pytest.mark.parametrize(
    "draw", ["random.random()", "torch.rand(1).item()", "torch.rand(1).to(images.device)", "images.mean().item()"]
)
def test_a_network_that_decides_by_itself_is_not_replayed(
    draw: str, data: LoadedData, replays: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"decides_{abs(hash(draw))}"
    (tmp_path / f"{name}.py").write_text(OWN.format(draw=draw))
    monkeypatch.syspath_prepend(tmp_path)
    trained(replace(CONFIG, arch=f"{name}:build"), data)
    trained(replace(CONFIG, arch=f"{name}:build", cuda_graphs=True), data)
    assert not replays


@pytest.mark.parametrize("changes", QUICK, ids=named)
def test_no_step_waits_for_the_gpu(changes: dict[str, Any]) -> None:
    """But where losses are looked at, every sixteen steps, and at the end of an epoch."""
    config = replace(CONFIG, arch="alexnet", batch_size=2, dataset=replace(SHAPES, resize=64, crop=64))
    config, data = replace(config, **changes), load_dataset(config.dataset)
    training = Training(config, data, build_model(config, len(data.split.classes)), GPU)
    training.run_epoch()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            training.train_epoch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in said if "called a synchron" in str(w.message))
    assert training.steps == 12
    own = {
        place: count for place, count in waits.items() if not place.startswith("_color.py")
    }  # torchvision's equalize
    assert sum(own.values()) <= 1, waits


def test_images_that_do_not_fit_come_from_the_processor(data: LoadedData, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, arch="alexnet", dataset=replace(SHAPES, resize=64, crop=64))
    data = load_dataset(config.dataset)
    there = trained(config, data)
    monkeypatch.setattr(resident, "_SHARE", 10**12)
    assert resident.resident_crops(load_dataset(config.dataset), "train", 64, GPU) is None
    assert apart(there, trained(config, load_dataset(config.dataset))) == 0


def test_trials_share_the_images_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked = load_dataset(SHAPES), []
    crops = data.center_crops
    monkeypatch.setattr(data, "center_crops", lambda *args, **more: asked.append(args) or crops(*args, **more))
    trained(CONFIG, data)
    trained(replace(CONFIG, lr=0.01), data)
    assert sorted(asked) == [("train", 32), ("val", 32)]


def test_a_batch_that_does_not_fit_is_named() -> None:
    config = replace(CONFIG, arch="vgg16", dataset=replace(SHAPES, resize=64, crop=64))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2e8 / torch.cuda.mem_get_info(GPU)[1], GPU)
    try:
        with pytest.raises(OutOfMemoryError, match="a batch of 8 images did not fit on cuda:0"):
            list(run_trial(config, load_dataset(config.dataset), GPU))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)


def test_what_a_worker_takes_of_a_gpu_is_known(data: LoadedData) -> None:
    trained(CONFIG, data)
    held, free = gpu_memory(GPU)
    assert held > torch.cuda.max_memory_reserved(GPU) and 0 < free < torch.cuda.mem_get_info(GPU)[1]


def test_classifiers_that_train_together_end_as_each_does_by_itself() -> None:
    config = replace(CONFIG, freeze="conv", arch="resnet18", augment=(), epochs=2, precision="float32")
    data = load_dataset(config.dataset)
    classes = len(data.split.classes)
    alone, joined = (
        [Training(each, data, build_model(each, classes), GPU) for each in (config, replace(config, seed=1, lr=0.001))]
        for _ in range(2)
    )
    for _ in range(2):
        train_together(joined)
        assert all(training.ahead is not None for training in joined)
        for one, other in zip(alone, joined, strict=True):
            assert other.run_epoch().train_loss == pytest.approx(one.run_epoch().train_loss, rel=1e-3)
