"""torchvision classifiers by name: initial weights, a last layer of the right size, and frozen layers."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from caltech_sweep import paths
from caltech_sweep.config import TrialConfig
from caltech_sweep.data.download import download
from caltech_sweep.errors import DatasetError, ModelError
from caltech_sweep.keys import derive
from caltech_sweep.training.pulse import beat

_HEADS = ("classifier", "fc", "heads", "head")  # what torchvision calls everything after the backbone


def check_arch(arch: str) -> None:
    """Raise ModelError, with a suggestion, unless torchvision has a classifier of this name."""
    names = torchvision.models.list_models(module=torchvision.models)
    if arch not in names:
        near = difflib.get_close_matches(arch, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "; see torchvision.models for the names"
        raise ModelError(f"arch: torchvision has no classification model {arch!r}{hint}")


def head_name(model: nn.Module) -> str:
    """Return the attribute that holds the classifier of a torchvision model."""
    for name in _HEADS:
        if hasattr(model, name):
            return name
    raise ModelError(f"the classifier of {type(model).__name__} was not found; this model is not supported")


def _last_layer(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    head = head_name(model)
    found = [(n, m) for n, m in model.named_modules() if n.split(".")[0] == head]
    layers = [(name, module) for name, module in found if isinstance(module, (nn.Linear, nn.Conv2d))]
    return layers[-1]


def _replace_last(model: nn.Module, outputs: int) -> str:
    """Give the model a new last layer with ``outputs`` outputs; return the layer's name."""
    name, old = _last_layer(model)
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, outputs)
    else:
        new = nn.Conv2d(old.in_channels, outputs, kernel_size=1)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)
    return name


def fetch_imagenet(arch: str, progress: Callable[[int, int], None]) -> Path:
    """Return the file of the first published ImageNet weights, which the reference report used.

    Where it is not there it is downloaded; ``progress`` gets the bytes done and in all. The digits in the file's name
    begin its SHA-256; a file that was there is compared with them too. Raises ModelError offline.
    """
    check_arch(arch)
    weights = list(torchvision.models.get_model_weights(arch))
    if not weights:
        raise ModelError(f"weights: torchvision has no ImageNet weights for {arch!r}")
    url = weights[0].url
    name = url.rsplit("/", 1)[-1]
    target = paths.weights_home() / name
    digits = re.search(r"-([0-9a-f]{8,64})\.", name)
    checksums = [f"sha256:{digits[1]}"] if digits else []
    try:
        download(url, target, checksums, progress, mend=f"or put {name} into {target.parent}")
    except DatasetError as error:
        raise ModelError(f"weights: the ImageNet weights of {arch} are not available: {error}") from error
    return target


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .safetensors or of a plain-tensor .pt or .pth file; pickled code is refused."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(f"weights: there is no file {path}") from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"weights: {path} cannot be read as a weight file; is it complete?") from error
    except Exception as error:  # torch's unpickler refuses code with an error of its own kind
        raise ModelError(
            f"weights: {path} holds more than tensors and is not loaded; save it as safetensors"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise ModelError(f"weights: {path} does not hold a state dict of tensors")
    return loaded


def _load(model: nn.Module, state: dict[str, torch.Tensor], last: str, source: str) -> None:
    """Load every tensor but a last layer of another size; anything else that differs is an error."""
    own = model.state_dict()
    state = dict(state)
    for key in (f"{last}.weight", f"{last}.bias"):
        if key in state and state[key].shape != own[key].shape:
            del state[key]
    wrong = [k for k, v in state.items() if k not in own or own[k].shape != v.shape]
    missing = [k for k in own if k not in state and not k.startswith(f"{last}.")]
    if wrong or missing:
        raise ModelError(
            f"weights: {source} do not fit this model: {len(wrong)} tensors are unknown or of another shape "
            f"{wrong[:2]}, {len(missing)} are missing {missing[:2]}; was it trained with the same arch?"
        )
    model.load_state_dict(state, strict=False)


def freeze(model: nn.Module, how: str) -> None:
    """Stop the gradients of the layers that ``how`` names (reference report).

    ``conv``: all but the classifier. ``fc``: the whole classifier, its new last layer included. ``fc_but_last``:
    the classifier without its last layer.
    """
    head, (last, _) = head_name(model), _last_layer(model)
    chosen = 0
    for name, parameter in model.named_parameters():
        in_head, in_last = name.split(".")[0] == head, name.startswith(f"{last}.")
        frozen = {"none": False, "conv": not in_head, "fc": in_head, "fc_but_last": in_head and not in_last}[how]
        parameter.requires_grad_(not frozen)
        chosen += frozen
    if how != "none" and not chosen:
        raise ModelError(f"freeze: {how} freezes nothing here, the classifier of this model is its last layer alone")


def train_mode(model: nn.Module) -> None:
    """Set training mode, but keep the statistics of frozen batch normalisation as they are."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()


def build_model(config: TrialConfig, num_classes: int, weights_file: Path | None = None) -> nn.Module:
    """Return the model a trial starts from, on the CPU.

    ``weights_file`` is where ``run:`` and ``study:`` weights lie. Raises ModelError for an unknown arch or
    weights that do not fit.
    """
    check_arch(config.arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "model"))
        extra = {"init_weights": True} if config.arch in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(config.arch, weights=None, **extra)
        last = _replace_last(model, config.outputs or num_classes)
    for auxiliary in ("aux1", "aux2", "AuxLogits"):  # extra classifiers that only some recipes train
        if hasattr(model, auxiliary):
            setattr(model, auxiliary, None)
            model.aux_logits = False
    if config.weights == "imagenet":
        published = read_weights(fetch_imagenet(config.arch, lambda done, total: beat()))
        state = {k: v for k, v in published.items() if not k.lower().startswith("aux")}
        _load(model, state, last, "the ImageNet weights")
    elif config.weights.startswith("file:"):
        path = Path(config.weights[5:])
        _load(model, read_weights(path), last, str(path))
    elif config.weights != "none":
        if weights_file is None:
            raise ModelError(f"weights: {config.weights} was not found in the tracking store")
        _load(model, read_weights(weights_file), last, config.weights)
    freeze(model, config.freeze)
    return model


def count_parameters(config: TrialConfig, num_classes: int, weights_file: Path | None = None) -> tuple[int, int]:
    """Return how many parameters a trial trains, and how many its model has, without allocating the model.

    Raises what :func:`build_model` would, so a study is checked before it starts.
    """
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.filterwarnings("ignore", message=".*is a no-op")  # weights are checked, not copied, here
            model = build_model(config, num_classes, weights_file)
    except NotImplementedError:  # some models, the RegNets, compute while they are built
        model = build_model(config, num_classes, weights_file)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
