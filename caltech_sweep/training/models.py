"""A network as a trial starts from it: initial weights, a last layer of the right size, and frozen layers."""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import ModelError
from caltech_sweep.heartbeat import beat
from caltech_sweep.paths import expanded
from caltech_sweep.seeds import derive_seed
from caltech_sweep.text import suggestion
from caltech_sweep.training.networks import is_in, last_layer, source_of


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
    floats = ((name, value) for name, value in state.items() if value.is_floating_point() and value.numel())
    return [name for name, value in floats if not all(end.isfinite() for end in value.aminmax())]  # with no copy


def load_state(
    model: nn.Module, state: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False
) -> tuple[list[str], list[str]]:
    """Load a state dict, as torchvision does, and return its missing and its unexpected keys.

    To ``assign`` lets the model have these very tensors, and leaves those that it had as they are.

    Networks read older names and shapes by the versions that a pickled state dict carries. One without versions, such
    as a safetensors file, gets that of the network as a whole, which MNASNet asks for.
    """
    versioned = OrderedDict(state)
    own = {"": {"version": model._version}}
    versioned._metadata = getattr(state, "_metadata", own)  # type: ignore[attr-defined]
    result = model.load_state_dict(versioned, strict=strict, assign=assign)
    return result.missing_keys, result.unexpected_keys


def _load(arch: str, model: nn.Module, weights: _Weights) -> None:
    """Load every tensor but a last layer of another size; anything else that differs is an error."""
    own, given, source = model.state_dict(), weights.state, weights.source
    wanted = source_of(arch).matching(model, given)
    last = last_layer(model, source_of(arch).tail(model)[-1])
    for key in list(wanted):
        if is_in(key, last) and key in own and wanted[key].shape != own[key].shape:
            del wanted[key]
    broken = not_finite(wanted)
    if broken:
        raise ModelError(f"weights: {source} hold NaN or infinity, for example in {broken[0]}; take another checkpoint")
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
    missing = [key for key in missing if not is_in(key, last)]
    if wrong or missing:
        raise ModelError(
            f"weights: {source} do not fit this model: {len(wrong)} tensors are unknown or of another shape "
            f"{wrong[:2]}, {len(missing)} are missing {missing[:2]}; was it trained with the same arch?"
        )


def freeze(model: nn.Module, config: TrialConfig) -> None:
    """Stop the gradients of the layers that ``config.freeze`` names; raise ModelError where it names none or all."""
    names = frozen_names(model, config)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)


def thaw(model: nn.Module, config: TrialConfig) -> list[nn.Parameter]:
    """Let the layers that :func:`freeze` stopped be trained; return their parameters."""
    names = frozen_names(model, config)
    thawed = [parameter for name, parameter in model.named_parameters() if name in names]
    for parameter in thawed:
        parameter.requires_grad_(True)
    return thawed


def frozen_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that are not trained now."""
    return frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def resting(model: nn.Module) -> frozenset[str]:
    """Return the names of the tensors that training does not change now: frozen weights, and their batch statistics."""
    statistics = (
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and any(True for _ in module.parameters())
        and not any(parameter.requires_grad for parameter in module.parameters())
        for name, _ in module.named_buffers()
    )
    return frozen_parameters(model).union(statistics)


def frozen_names(model: nn.Module, config: TrialConfig) -> frozenset[str]:
    """Return the names of the parameters that are not trained.

    ``conv``: all but the classifier's. ``fc``: those of the whole classifier, its new last layer included.
    ``fc_but_last``: those of the classifier without its last layer (reference report). ``up_to:LAYER``: all from the
    beginning to those of a layer. ``first:FRACTION``: those of a share of the layers that have any.
    """
    if config.freeze == "none":
        return frozenset()
    names = [name for name, _ in model.named_parameters()]
    kind, _, argument = config.freeze.partition(":")
    if kind == "up_to":
        return frozenset(_up_to(model, names, argument))
    if kind == "first":
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        first = set(layers[: int(float(argument) * len(layers))])
        chosen = {name for name in names if name.rpartition(".")[0] in first}
        reason = f"that share of its {len(layers)} layers is less than one layer"
    else:
        head = source_of(config.arch).tail(model)[-1]
        last = last_layer(model, head) if kind == "fc_but_last" else None
        in_head = {name for name in names if is_in(name, head) and not (last and is_in(name, last))}
        chosen = set(names) - in_head if kind == "conv" else in_head
        reason = "the classifier of this model is only its last layer"
    if not chosen:
        raise ModelError(f"freeze: {config.freeze} freezes nothing here, {reason}")
    return frozenset(chosen)


def _up_to(model: nn.Module, names: list[str], layer: str) -> list[str]:
    """Return the names of all parameters from the first one to the last of a layer, in the network's own order."""
    known = [name for name, _ in model.named_modules() if name]
    if layer not in known:
        top = ", ".join(name for name, _ in model.named_children())
        hint = suggestion(layer, known, f"; its parts are {top}, and theirs follow after a dot")
        raise ModelError(f"freeze: this network has no layer {layer!r}{hint}")
    places = [place for place, name in enumerate(names) if is_in(name, layer)]
    if not places:
        raise ModelError(f"freeze: layer {layer!r} has no weights; name the one before it")
    if places[-1] == len(names) - 1:
        raise ModelError(f"freeze: nothing is left to train after layer {layer!r}; name one before it")
    return names[: places[-1] + 1]


def train_mode(model: nn.Module, config: TrialConfig) -> None:
    """Set training mode, but not that of frozen layers, which drop nothing and keep their batch statistics.

    A frozen classifier does drop (reference report); it keeps its batch statistics like every other part.
    """
    model.train()
    tail = source_of(config.arch).tail(model) if config.freeze == "conv" else ()
    backbone = [p for name, p in model.named_parameters() if not any(is_in(name, part) for part in tail)]
    backbone_rests = not any(parameter.requires_grad for parameter in backbone)
    for name, module in model.named_modules():
        frozen = not any(p.requires_grad for p in module.parameters()) and any(True for _ in module.parameters())
        rests = frozen and (":" in config.freeze or isinstance(module, nn.modules.batchnorm._BatchNorm))
        in_backbone = name and not any(is_in(part, name) or is_in(name, part) for part in tail)
        if rests or (config.freeze == "conv" and backbone_rests and in_backbone):
            module.eval()


def _network(arch: str, outputs: int, weights: _Weights | None, seed: int) -> nn.Module:
    """Return a network with a new last layer, before any weights are loaded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "model"))
        state, metadata = (weights.state, weights.metadata) if weights else (None, {})
        return source_of(arch).build(arch, outputs, state, metadata)


def _initial(config: TrialConfig, weights_file: Path | None, digest: str | None) -> _Weights | None:
    if config.weights == "none":
        return None
    if config.pretrained:
        source = source_of(config.arch)
        path = source.fetch(config.arch, lambda done, total: beat())
        return _Weights(*source.published(config.arch, read_weights(path, digest).state), "the published weights")
    if config.weights.startswith("file:"):
        return read_weights(weights_file or expanded(config.weights[5:]), digest)
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
    model = _network(config.arch, config.outputs or num_classes, weights, config.seed)
    if weights is not None:
        _load(config.arch, model, weights)
    freeze(model, config)
    return model


def trained_model(
    arch: str, outputs: int, state: Mapping[str, torch.Tensor], transform_input: bool = False
) -> nn.Module:
    """Return a network that a trial has trained; raise RuntimeError when ``state`` is not all of it and no more."""
    metadata = {"transform_input": "true"} if transform_input else {}
    model = _network(arch, outputs, _Weights(state, metadata, "checkpoint"), 0)
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
    if config.thaws(config.epochs):
        thaw(model, config)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
