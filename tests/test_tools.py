"""The scripts in tools/: what they write is what the network reads."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from caltech_sweep.study.file import load_study
from caltech_sweep.training.models import build_model

timm = pytest.importorskip("timm")

ROOT = Path(__file__).parent.parent
STUDY = load_study(str(ROOT / "sweeps" / "efficientnet.yaml"))


def convert(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    script = str(ROOT / "tools" / "efficientnet_lite0.py")
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(script, run_name="__main__")


def test_weights_of_the_package_become_those_of_timm_s_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    state = model.state_dict().items()
    own_names = {f"_own.{number}.{name.rpartition('.')[2]}": value for number, (name, value) in enumerate(state)}
    torch.save(own_names, tmp_path / "own.pth")
    target = tmp_path / "made" / "weights.safetensors"
    convert(monkeypatch, target, "--file", tmp_path / "own.pth")
    config = STUDY.config({"weights": f"file:{target}", "outputs": 1000})
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(build_model(config, 101).eval()(images), model(images))
    swapped = dict(zip(own_names, reversed(own_names.values()), strict=True))
    torch.save(swapped, tmp_path / "own.pth")
    with pytest.raises(SystemExit, match=r"does not fit timm's conv_stem.weight \(32, 3, 3, 3\)"):
        convert(monkeypatch, tmp_path / "other", "--file", tmp_path / "own.pth")
    assert not (tmp_path / "other").exists()
