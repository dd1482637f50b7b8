"""torchvision classifiers by name: initial weights, a last layer of the right size, and frozen layers."""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from caltech_sweep.config import TrialConfig
from caltech_sweep.data.fetch.download import download, is_there
from caltech_sweep.errors import DatasetError, ModelError
from caltech_sweep.seeds import derive_seed
from caltech_sweep.training.heartbeat import beat

TRANSFORMING = ("googlenet", "inception_v3")  # whose published weights want a transform of the normalised input
_AUXILIARY = ("aux1", "aux2", "AuxLogits")
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


def _published(arch: str) -> torchvision.models.WeightsEnum:
    check_arch(arch)
    weights = list(torchvision.models.get_model_weights(arch))
    if not weights:
        raise ModelError(f"weights: torchvision has no ImageNet weights for {arch!r}")
    return weights[0]


def imagenet_file(arch: str) -> Path:
    """Return where the published ImageNet weights of a network lie, or will: where torchvision looks for them too."""
    return Path(torch.hub.get_dir(), "checkpoints", str(_published(arch).url).rsplit("/", 1)[-1])


def _checksums(arch: str) -> list[str]:
    digits = re.search(r"-([0-9a-f]{8,64})\.", imagenet_file(arch).name)
    return [f"sha256:{digits[1]}"] if digits else []


def has_imagenet(arch: str) -> bool:
    """Tell whether the published ImageNet weights are here; raise ModelError where there are none to have."""
    return is_there(imagenet_file(arch), _checksums(arch))


def fetch_imagenet(arch: str, progress: Callable[[int, int], None]) -> Path:
    """Return the file of the first published ImageNet weights, which the reference report used.

    Where it is not there it is downloaded; ``progress`` gets the bytes done and in all. The digits in the file's name
    begin its SHA-256; a file that was there is compared with them too. Raises ModelError offline.
    """
    url, target = str(_published(arch).url), imagenet_file(arch)
    try:
        download(url, target, _checksums(arch), progress, fix=f"or put {target.name} into {target.parent}")
    except DatasetError as error:
        reason = str(error).replace("CALTECH_SWEEP_DATA", "TORCH_HOME")  # which names the folder of these files
        raise ModelError(f"weights: the ImageNet weights of {arch} are not available: {reason}") from error
    return target


@dataclass(frozen=True)
class _Weights:
    """A state dict as its file holds it, what the file says about it, and the words for it in messages."""

    state: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]
    source: str


def read_weights(path: Path, digest: str | None = None) -> _Weights:
    """Return the tensors of a .safetensors or of a plain-tensor .pt or .pth file; pickled code is refused.

    What is hashed is what is loaded: raises ModelError when the contents are not those of ``digest``, a SHA-256.
    """
    try:
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest() if digest else None
        if found != digest:
            raise ModelError(
                f"weights: {path} changed while the study ran: its SHA-256 was {digest} when it started and is {found} "
                "now; put the file back and run the study again, or run the new one under another --name"
            )
        if path.suffix == ".safetensors":
            return _Weights(load(content), _safetensors_metadata(content), str(path))
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(f"weights: there is no file {path}") from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"weights: {path} cannot be read as a weight file; is it complete?") from error
    except ModelError:
        raise
    except Exception as error:  # torch's unpickler refuses code with an error of its own kind
        raise ModelError(
            f"weights: {path} holds more than tensors and is not loaded; save it as safetensors"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise ModelError(f"weights: {path} does not hold a state dict of tensors")
    return _Weights(loaded, {}, str(path))


def _safetensors_metadata(content: bytes) -> Mapping[str, str]:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata: Mapping[str, str] = header.get("__metadata__", {})
    return metadata


def not_finite(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity."""
    return [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor], strict: bool = True) -> tuple[list[str], list[str]]:
    """Load a state dict, as torchvision does, and return its missing and its unexpected keys.

    Networks read older names and shapes by the versions that a pickled state dict carries. One without versions, such
    as a safetensors file, gets that of the network as a whole, which MNASNet asks for.
    """
    versioned = OrderedDict(state)
    own = {"": {"version": model._version}}
    versioned._metadata = getattr(state, "_metadata", own)  # type: ignore[attr-defined]
    result = model.load_state_dict(versioned, strict=strict)
    return result.missing_keys, result.unexpected_keys


class _Renamed:
    """Stands for the model and the weights of torchvision's DenseNet loader, to have it rename the keys of a state."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self.state = OrderedDict(state)

    def get_state_dict(self, progress: bool, check_hash: bool) -> OrderedDict[str, torch.Tensor]:
        return self.state

    def load_state_dict(self, state: OrderedDict[str, torch.Tensor]) -> None:
        self.state = state


def _renamed(state: Mapping[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """Return a DenseNet's state dict under the names of today; published ones have those of an older version."""
    renamed = _Renamed(state)
    torchvision.models.densenet._load_state_dict(renamed, renamed, progress=False)
    return renamed.state


def _load(model: nn.Module, weights: _Weights, last: str) -> None:
    """Load every tensor but a last layer of another size; anything else that differs is an error."""
    own, given, source = model.state_dict(), weights.state, weights.source
    wanted = _renamed(given) if isinstance(model, torchvision.models.DenseNet) else OrderedDict(given)
    dropped = {name for name in _AUXILIARY if getattr(model, name, None) is None}
    for key in list(wanted):
        resized = key.startswith(f"{last}.") and key in own and wanted[key].shape != own[key].shape
        if resized or key.split(".")[0] in dropped:
            del wanted[key]
    broken = not_finite(wanted)
    if broken:
        raise ModelError(f"weights: {source} hold NaN or infinity, for one in {broken[0]}; take another checkpoint")
    if f"{last}.weight" in wanted and f"{last}.bias" in own:
        wanted.setdefault(f"{last}.bias", torch.zeros(own[f"{last}.bias"].shape))  # MaxViT's has none
    if hasattr(given, "_metadata"):
        wanted._metadata = given._metadata  # type: ignore[attr-defined]
    try:
        missing, wrong = load_state(model, wanted, strict=False)
    except (RuntimeError, ValueError) as error:
        missing, wrong = [], re.findall(r"size mismatch for (\S+):", str(error))
        if not wrong:
            raise ModelError(f"weights: {source} do not fit this model ({error}); use its own arch") from error
    missing = [key for key in missing if not key.startswith(f"{last}.")]
    if wrong or missing:
        raise ModelError(
            f"weights: {source} do not fit this model: {len(wrong)} tensors are unknown or of another shape "
            f"{wrong[:2]}, {len(missing)} are missing {missing[:2]}; was it trained with the same arch?"
        )


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
        raise ModelError(f"freeze: {how} freezes nothing here, the classifier of this model is only its last layer")


def train_mode(model: nn.Module) -> None:
    """Set training mode, but keep the statistics of frozen batch normalisation as they are."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()


def _arguments(arch: str, weights: _Weights | None) -> dict[str, Any]:
    """Return the arguments of torchvision's builder that come with the weights, as its own builders set them."""
    arguments: dict[str, Any] = {}
    if arch in TRANSFORMING:
        arguments["init_weights"] = True
        arguments["transform_input"] = weights is not None and weights.metadata.get("transform_input") == "true"
    if arch.startswith("vit_") and weights is not None:
        position, patch = weights.state.get("encoder.pos_embedding"), weights.state.get("conv_proj.weight")
        if position is not None and patch is not None:  # else what is missing is told when they are loaded
            arguments["image_size"] = math.isqrt(position.shape[1] - 1) * patch.shape[-1]
    return arguments


def _network(arch: str, outputs: int, weights: _Weights | None, seed: int) -> tuple[nn.Module, str]:
    """Return a network with a new last layer, before any weights are loaded, and that layer's name."""
    check_arch(arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "model"))
        model = torchvision.models.get_model(arch, weights=None, **_arguments(arch, weights))
        last = _replace_last(model, outputs)
    for auxiliary in _AUXILIARY:  # extra classifiers that only some recipes train
        if hasattr(model, auxiliary):
            setattr(model, auxiliary, None)
            model.aux_logits = False
    return model, last


def _initial(config: TrialConfig, weights_file: Path | None, digest: str | None) -> _Weights | None:
    if config.weights == "none":
        return None
    if config.weights == "imagenet":
        check_arch(config.arch)
        path = fetch_imagenet(config.arch, lambda done, total: beat())
        metadata = {"transform_input": "true"} if config.arch in TRANSFORMING else {}
        return _Weights(read_weights(path, digest).state, metadata, "the ImageNet weights")
    if config.weights.startswith("file:"):
        return read_weights(weights_file or Path(config.weights[5:]), digest)
    if weights_file is None:
        raise ModelError(f"weights: {config.weights} was not found in the tracking store")
    return replace(read_weights(weights_file, digest), source=config.weights)


def build_model(
    config: TrialConfig, num_classes: int, weights_file: Path | None = None, digest: str | None = None
) -> nn.Module:
    """Return the model a trial starts from, on the CPU.

    ``weights_file`` is where ``run:`` and ``study:`` weights lie, ``digest`` the SHA-256 that the file of the weights
    must have. Raises ModelError for an unknown arch or weights that do not fit.
    """
    weights = _initial(config, weights_file, digest)
    model, last = _network(config.arch, config.outputs or num_classes, weights, config.seed)
    if weights is not None:
        _load(model, weights, last)
    freeze(model, config.freeze)
    return model


def trained_model(
    arch: str, outputs: int, state: Mapping[str, torch.Tensor], transform_input: bool = False
) -> nn.Module:
    """Return a network that a trial has trained; raise RuntimeError when ``state`` is not all of it and no more."""
    metadata = {"transform_input": "true"} if transform_input else {}
    model, _ = _network(arch, outputs, _Weights(state, metadata, "checkpoint"), 0)
    load_state(model, state)
    return model


def model_on_meta(
    config: TrialConfig, num_classes: int, weights_file: Path | None = None, digest: str | None = None
) -> nn.Module:
    """Return what :func:`build_model` would, with shapes and no numbers; raises what it would."""
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.filterwarnings("ignore", message=".*is a no-op")  # weights are checked, not copied, here
            return build_model(config, num_classes, weights_file, digest)
    except NotImplementedError:  # of a model that computes while it is built
        return build_model(config, num_classes, weights_file, digest).to("meta")


def count_parameters(config: TrialConfig, num_classes: int, weights_file: Path | None = None) -> tuple[int, int]:
    """Return how many parameters a trial trains, and how many its model has, without allocating the model."""
    model = model_on_meta(config, num_classes, weights_file)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
