"""Where networks come from: a registry of sources by the prefix of ``arch``; knows no torch until asked.

A source says which networks it has, builds them, names their classifier, knows their published weights and what input
these were trained on. A new source is a class here and an entry in ``SOURCES``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import DatasetError, ModelError

if TYPE_CHECKING:
    import torch
    import torchvision
    from torch import nn

    State = Mapping[str, torch.Tensor]

Statistics = tuple[float, float, float]  # of red, green and blue, in a range of 0 to 1
NORMALIZE: Mapping[str, tuple[Statistics, Statistics]] = {  # mean and standard deviation by name
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class NetworkSource(Protocol):
    """A family of networks. ``arch`` is always the whole setting, prefix included; ModelError is the only error."""

    def check(self, arch: str) -> None:
        """Raise ModelError, with a suggestion, unless there is a network of this name."""

    def build(self, arch: str, outputs: int, state: State | None, metadata: Mapping[str, str]) -> nn.Module:
        """Return a network with random weights, drawn from torch's global stream, and ``outputs`` outputs.

        ``state`` and ``metadata`` are those that will be loaded: some decide how the network is built.
        """

    def tail(self, model: nn.Module) -> tuple[str, ...]:
        """Return the dotted names of the modules that run after the backbone, in order; the last is the classifier."""

    def matching(self, model: nn.Module, state: State) -> OrderedDict[str, torch.Tensor]:
        """Return a state dict under the names of this model, without tensors that it has no use for."""

    def normalization(self, arch: str) -> str:
        """Return the name of the mean and standard deviation that the published weights want."""

    def input_size(self, arch: str, model: nn.Module) -> tuple[int, bool]:
        """Return a side in pixels that the network takes, and whether it takes no other."""

    def published_key(self, arch: str) -> str:
        """Return what tells the published weights from all others; raise ModelError where there are none."""

    def published_metadata(self, arch: str) -> Mapping[str, str]:
        """Return what a checkpoint that starts from the published weights says about its network."""

    def published_file(self, arch: str) -> Path | None:
        """Return the file of the published weights, or None where it has to be downloaded first."""

    def fetch(self, arch: str, progress: Callable[[int, int], None]) -> Path:
        """Return the file of the published weights, downloaded where it is not there; raise ModelError offline.

        ``progress`` gets the bytes done and in all.
        """


class TorchvisionNetworks:
    """torchvision's classifiers, by its own names, with the first published weights of each."""

    _TRANSFORMING = ("googlenet", "inception_v3")  # whose published weights want the normalised input transformed
    _HALF_NORMALIZED = ("efficientnet_v2_l",)  # its published weights were trained on other statistics than all others'
    _AUXILIARY = ("aux1", "aux2", "AuxLogits")  # extra classifiers that only some training recipes use
    _HEADS = ("classifier", "fc", "heads", "head")  # what torchvision calls the classifier

    def check(self, arch: str) -> None:
        """See :class:`NetworkSource`."""
        import torchvision

        names = torchvision.models.list_models(module=torchvision.models)
        if arch not in names:
            near = difflib.get_close_matches(arch, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "; see torchvision.models for the names"
            raise ModelError(f"arch: torchvision has no classification model {arch!r}{hint}")

    def build(self, arch: str, outputs: int, state: State | None, metadata: Mapping[str, str]) -> nn.Module:
        """See :class:`NetworkSource`. The arguments that come with weights are those of torchvision's own builders."""
        import torchvision

        self.check(arch)
        arguments: dict[str, object] = {}
        if arch in self._TRANSFORMING:
            arguments["init_weights"] = True
            arguments["transform_input"] = metadata.get("transform_input") == "true"
        if arch.startswith("vit_") and state is not None:
            position, patch = state.get("encoder.pos_embedding"), state.get("conv_proj.weight")
            if position is not None and patch is not None:  # else what is missing is told when they are loaded
                arguments["image_size"] = math.isqrt(position.shape[1] - 1) * patch.shape[-1]
        model = torchvision.models.get_model(arch, weights=None, **arguments)
        replace_last(model, self.tail(model)[-1], outputs)
        for auxiliary in self._AUXILIARY:
            if hasattr(model, auxiliary):
                setattr(model, auxiliary, None)
                model.aux_logits = False
        return model

    def tail(self, model: nn.Module) -> tuple[str, ...]:
        """See :class:`NetworkSource`. GoogLeNet and Inception have a dropout of their own before the classifier."""
        from torch import nn

        head = next((name for name in self._HEADS if hasattr(model, name)), None)
        if head is None:
            raise ModelError(f"the classifier of {type(model).__name__} was not found; this model is not supported")
        return ("dropout", head) if isinstance(getattr(model, "dropout", None), nn.Dropout) else (head,)

    def matching(self, model: nn.Module, state: State) -> OrderedDict[str, torch.Tensor]:
        """See :class:`NetworkSource`."""
        import torchvision

        renamed = _renamed(state) if isinstance(model, torchvision.models.DenseNet) else state
        unused = {name for name in self._AUXILIARY if getattr(model, name, None) is None}
        return OrderedDict((key, value) for key, value in renamed.items() if key.split(".")[0] not in unused)

    def normalization(self, arch: str) -> str:
        """See :class:`NetworkSource`."""
        return "half" if arch in self._HALF_NORMALIZED else "imagenet"

    def input_size(self, arch: str, model: nn.Module) -> tuple[int, bool]:
        """See :class:`NetworkSource`."""
        import torchvision

        weights = list(torchvision.models.get_model_weights(arch))
        least = max(weights[0].meta["min_size"]) if weights else 224
        exactly = getattr(model, "image_size", least if arch.startswith("maxvit") else None)
        return (exactly, True) if exactly else (least, False)

    def published_key(self, arch: str) -> str:
        """See :class:`NetworkSource`. The name of the published file holds its checksum, which is compared."""
        return self._place(arch).name + (" with transform_input" if arch in self._TRANSFORMING else "")

    def published_metadata(self, arch: str) -> Mapping[str, str]:
        """See :class:`NetworkSource`."""
        return {"transform_input": "true"} if arch in self._TRANSFORMING else {}

    def published_file(self, arch: str) -> Path | None:
        """See :class:`NetworkSource`."""
        from caltech_sweep.data.fetch.download import is_there

        place = self._place(arch)
        return place if is_there(place, self._checksums(place)) else None

    def fetch(self, arch: str, progress: Callable[[int, int], None]) -> Path:
        """See :class:`NetworkSource`. These are the weights that the reference report used."""
        from caltech_sweep.data.fetch.download import download

        url, place = str(self._published(arch).url), self._place(arch)
        try:
            download(url, place, self._checksums(place), progress, fix=f"or put {place.name} into {place.parent}")
        except DatasetError as error:
            reason = str(error).replace("CALTECH_SWEEP_DATA", "TORCH_HOME")  # which names the folder of these files
            raise ModelError(f"weights: the ImageNet weights of {arch} are not available: {reason}") from error
        return place

    def _published(self, arch: str) -> torchvision.models.WeightsEnum:
        import torchvision

        self.check(arch)
        weights = list(torchvision.models.get_model_weights(arch))
        if not weights:
            raise ModelError(f"weights: torchvision has no ImageNet weights for {arch!r}")
        return weights[0]

    def _place(self, arch: str) -> Path:
        """Return where the published file lies, or will: where torchvision looks for it too."""
        import torch

        return Path(torch.hub.get_dir(), "checkpoints", str(self._published(arch).url).rsplit("/", 1)[-1])

    @staticmethod
    def _checksums(place: Path) -> Sequence[str]:
        digits = re.search(r"-([0-9a-f]{8,64})\.", place.name)  # the beginning of its SHA-256
        return [f"sha256:{digits[1]}"] if digits else []


class _Renamed:
    """Stands for the model and the weights of torchvision's DenseNet loader, to have it rename the keys of a state."""

    def __init__(self, state: State) -> None:
        self.state = OrderedDict(state)

    def get_state_dict(self, progress: bool, check_hash: bool) -> OrderedDict[str, torch.Tensor]:
        return self.state

    def load_state_dict(self, state: OrderedDict[str, torch.Tensor]) -> None:
        self.state = state


def _renamed(state: State) -> OrderedDict[str, torch.Tensor]:
    """Return a DenseNet's state dict under the names of today; published ones have those of an older version."""
    import torchvision

    renamed = _Renamed(state)
    torchvision.models.densenet._load_state_dict(renamed, renamed, progress=False)
    return renamed.state


SOURCES: Mapping[str, NetworkSource] = {"": TorchvisionNetworks()}  # by what stands before the slash in ``arch``


def source_of(arch: str) -> NetworkSource:
    """Return the source that an ``arch`` names; its own ``check`` says whether it has such a network."""
    return SOURCES.get(arch.partition("/")[0], SOURCES[""])


def normalization(config: TrialConfig) -> str:
    """Return a name in ``NORMALIZE``; ``auto`` follows the initial weights (reference report)."""
    if config.normalize != "auto":
        return config.normalize
    return source_of(config.arch).normalization(config.arch) if config.weights == "imagenet" else "half"


def last_layer(model: nn.Module, head: str) -> str:
    """Return the dotted name of the layer that gives the outputs: the last linear or convolutional one in ``head``."""
    from torch import nn

    layers = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    return [name for name in layers if is_in(name, head)][-1]


def is_in(name: str, module: str) -> bool:
    """Tell whether a dotted name is that of a module or of something in it."""
    return name == module or name.startswith(f"{module}.")


def replace_last(model: nn.Module, head: str, outputs: int) -> None:
    """Give a model a new last layer with ``outputs`` outputs, its weights drawn anew."""
    from torch import nn

    name = last_layer(model, head)
    old = model.get_submodule(name)
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, outputs)
    else:
        assert isinstance(old, nn.Conv2d)
        new = nn.Conv2d(old.in_channels, outputs, kernel_size=1)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)
