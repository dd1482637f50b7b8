"""Where networks come from: a registry of sources by the prefix of ``arch``; knows no torch until asked.

A source says which networks it has, builds them, names their classifier, knows their published weights and what input
these were trained on. A new source is a class here and an entry in ``SOURCES``.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import json
import math
import re
import sys
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import DatasetError, ModelError
from caltech_sweep.text import first_line, suggestion

if TYPE_CHECKING:
    import torch
    import torchvision
    from torch import nn

    State = Mapping[str, torch.Tensor]

SOURCE = "network_source"  # what a network of the user's own calls the digest of its source in its version
Progress = Callable[[int, int], None]
Statistics = tuple[float, ...]  # of red, green and blue, in a range of 0 to 1
NORMALIZE: Mapping[str, tuple[Statistics, Statistics]] = {  # mean and standard deviation by name
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class NetworkSource(ABC):
    """A family of networks. ``arch`` is always the whole setting, prefix included; ModelError is the only error."""

    replayable = True  # whether their code does the same in every step, so that a CUDA graph may repeat it

    @abstractmethod
    def check(self, arch: str) -> None:
        """Raise ModelError, with a suggestion, unless there is a network of this name."""

    @abstractmethod
    def build(self, arch: str, outputs: int, state: State | None, metadata: Mapping[str, str]) -> nn.Module:
        """Return a network with random weights, drawn from torch's global stream, and ``outputs`` outputs.

        ``state`` and ``metadata`` are those that will be loaded: some decide how the network is built.
        """

    @abstractmethod
    def tail(self, model: nn.Module) -> tuple[str, ...]:
        """Return the dotted names of the modules that run after the backbone, in order; the last is the classifier."""

    def matching(self, model: nn.Module, state: State) -> OrderedDict[str, torch.Tensor]:
        """Return a state dict under the names of this model, without tensors that it has no use for."""
        return OrderedDict(state)

    def normalization(self, arch: str, pretrained: bool) -> str:
        """Return the name of the mean and standard deviation that a network wants, see :func:`mean_and_std`.

        ``pretrained`` says whether it starts from its published weights.
        """
        return "half"

    def input_size(self, arch: str, model: nn.Module) -> tuple[int | None, bool]:
        """Return a side in pixels that the network takes, where that is known, and whether it takes no other."""
        return None, False

    def published_input(self, arch: str) -> tuple[int, str] | None:
        """Return the side in pixels and the interpolation that the published weights were made for, where known."""
        return None

    def version(self, arch: str) -> Mapping[str, str]:
        """Return what, besides torchvision's version, tells the code of the network from that of other days."""
        return {}

    @abstractmethod
    def published_key(self, arch: str) -> str | None:
        """Return what tells the published weights from all others, or None where their contents do.

        Raises ModelError where there are none.
        """

    def published(self, arch: str, state: State) -> tuple[State, Mapping[str, str]]:
        """Return published weights under the names of the network, and what a checkpoint that starts from them says."""
        return state, {}

    @abstractmethod
    def published_file(self, arch: str) -> Path | None:
        """Return the file of the published weights, or None where it has to be downloaded first."""

    @abstractmethod
    def fetch(self, arch: str, progress: Progress) -> Path:
        """Return the file of the published weights, downloaded where it is not there; raise ModelError offline.

        ``progress`` gets the bytes done and in all.
        """


class TorchvisionNetworks(NetworkSource):
    """torchvision's classifiers, by its own names, with the first published weights of each."""

    _TRANSFORMING = ("googlenet", "inception_v3")  # whose published weights want the normalised input transformed
    _HALF_NORMALIZED = ("efficientnet_v2_l",)  # its published weights were trained on other statistics than all others'
    _AUXILIARY = ("aux1", "aux2", "AuxLogits")  # extra classifiers that only some training recipes use
    _HEADS = ("classifier", "fc", "heads", "head")  # what torchvision calls the classifier

    def check(self, arch: str) -> None:
        import torchvision

        names = torchvision.models.list_models(module=torchvision.models)
        if arch not in names:
            hint = suggestion(arch, names, "; timm's are written timm/NAME, and your own MODULE:FACTORY")
            raise ModelError(f"arch: torchvision has no classification model {arch!r}{hint}")

    def build(self, arch: str, outputs: int, state: State | None, metadata: Mapping[str, str]) -> nn.Module:
        """The arguments that come with weights are those of torchvision's own builders."""
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
        """GoogLeNet and Inception have a dropout of their own before the classifier."""
        from torch import nn

        head = next((name for name in self._HEADS if hasattr(model, name)), None)
        if head is None:
            raise ModelError(f"the classifier of {type(model).__name__} was not found; this model is not supported")
        return ("dropout", head) if isinstance(getattr(model, "dropout", None), nn.Dropout) else (head,)

    def matching(self, model: nn.Module, state: State) -> OrderedDict[str, torch.Tensor]:
        import torchvision

        renamed = _renamed(state) if isinstance(model, torchvision.models.DenseNet) else state
        unused = {name for name in self._AUXILIARY if getattr(model, name, None) is None}
        return OrderedDict((key, value) for key, value in renamed.items() if key.split(".")[0] not in unused)

    def normalization(self, arch: str, pretrained: bool) -> str:
        """Without published weights it is that of the reference report."""
        return "imagenet" if pretrained and arch not in self._HALF_NORMALIZED else "half"

    def published_input(self, arch: str) -> tuple[int, str] | None:
        transform = self._published(arch).transforms()
        return transform.crop_size[0], transform.interpolation.value

    def input_size(self, arch: str, model: nn.Module) -> tuple[int | None, bool]:
        import torchvision

        weights = list(torchvision.models.get_model_weights(arch))
        least = max(weights[0].meta["min_size"]) if weights else 224
        exactly = getattr(model, "image_size", least if arch.startswith("maxvit") else None)
        return (exactly, True) if exactly else (least, False)

    def published_key(self, arch: str) -> str | None:
        """The name of the published file holds its checksum, which is compared."""
        return self._place(arch).name + (" with transform_input" if arch in self._TRANSFORMING else "")

    def published(self, arch: str, state: State) -> tuple[State, Mapping[str, str]]:
        return state, {"transform_input": "true"} if arch in self._TRANSFORMING else {}

    def published_file(self, arch: str) -> Path | None:
        from caltech_sweep.data.fetch.download import is_there

        place = self._place(arch)
        return place if is_there(place, checksums(place)) else None

    def fetch(self, arch: str, progress: Progress) -> Path:
        """These are the weights that the reference report used."""
        return fetch_file(arch, str(self._published(arch).url), progress)

    def _published(self, arch: str) -> torchvision.models.WeightsEnum:
        import torchvision

        self.check(arch)
        weights = list(torchvision.models.get_model_weights(arch))
        if not weights:
            raise ModelError(f"weights: torchvision has no ImageNet weights for {arch!r}")
        return weights[0]

    def _place(self, arch: str) -> Path:
        return hub_file(str(self._published(arch).url))


def hub_file(url: str) -> Path:
    """Return where a published file lies, or will: where torch.hub, torchvision and timm look for it too."""
    import torch

    return Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])


def checksums(place: Path) -> Sequence[str]:
    """Return what a published file's name says of its contents: the beginning of its SHA-256."""
    digits = re.search(r"-([0-9a-f]{8,64})\.", place.name)
    return [f"sha256:{digits[1]}"] if digits else []


def fetch_file(arch: str, url: str, progress: Progress) -> Path:
    """Return a published file, downloaded where it is not there; raise ModelError offline."""
    from caltech_sweep.data.fetch.download import download

    place = hub_file(url)
    try:
        download(url, place, checksums(place), progress, fix=f"or put {place.name} into {place.parent}")
    except DatasetError as error:
        reason = str(error).replace("CALTECH_SWEEP_DATA", "TORCH_HOME")  # which names the folder of these files
        raise ModelError(f"weights: the ImageNet weights of {arch} are not available: {reason}") from error
    return place


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


class TimmNetworks(NetworkSource):
    """timm's networks, as ``timm/NAME`` or ``timm/NAME.TAG``, and the Hugging Face hub's as ``timm/hf-hub:OWNER/NAME``.

    What timm says of a network decides its input; its published weights are downloaded to where timm keeps them.
    """

    _FILES = ("model.safetensors", "pytorch_model.bin")  # of the hub; the first that is there

    def check(self, arch: str) -> None:
        self._config(arch)

    def build(self, arch: str, outputs: int, state: State | None, metadata: Mapping[str, str]) -> nn.Module:
        self.check(arch)
        model: nn.Module = self._timm().create_model(self._name(arch), pretrained=False, num_classes=outputs)
        return model

    def tail(self, model: nn.Module) -> tuple[str, ...]:
        classifier = model.pretrained_cfg.get("classifier")  # type: ignore[union-attr, operator]
        if not isinstance(classifier, str):
            kind = type(model).__name__
            raise ModelError(f"arch: timm's {kind} has more or less than one classifier, which does not work here")
        return (classifier,)

    def normalization(self, arch: str, pretrained: bool) -> str:
        config = self._config(arch)
        return normalization_name(config["mean"], config["std"])

    def input_size(self, arch: str, model: nn.Module) -> tuple[int | None, bool]:
        config = self._config(arch)
        return config["input_size"][-1], bool(config["fixed_input_size"])

    def published_input(self, arch: str) -> tuple[int, str] | None:
        config = self._config(arch)
        return config["input_size"][-1], config["interpolation"]

    def version(self, arch: str) -> Mapping[str, str]:
        return {"timm": self._timm().__version__}

    def published_key(self, arch: str) -> str | None:
        self._location(arch)
        return None

    def published(self, arch: str, state: State) -> tuple[State, Mapping[str, str]]:
        """timm itself loads them, into a network of the size that they were made for."""
        import torch

        overlay = {"state_dict": dict(state), "source": None}
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                model = self._timm().create_model(self._name(arch), pretrained=True, pretrained_cfg_overlay=overlay)
        except (RuntimeError, KeyError, ValueError) as error:
            raise ModelError(
                f"weights: timm cannot load the published weights of {arch}: {first_line(error)}"
            ) from error
        return model.state_dict(), {}

    def published_file(self, arch: str) -> Path | None:
        from caltech_sweep.data.fetch.download import is_there

        repository, files, url = self._location(arch)
        if not repository:
            place = hub_file(url)
            return place if is_there(place, checksums(place)) else None
        found = (_cached(repository, file) for file in files)
        return next((path for path in found if path is not None), None)

    def fetch(self, arch: str, progress: Progress) -> Path:
        if (path := self.published_file(arch)) is not None:
            return path
        repository, files, url = self._location(arch)
        if not repository:
            return fetch_file(arch, url, progress)
        for file in files:
            if (path := _from_hub(repository, file, f"weights: the published weights of {arch}")) is not None:
                return path
        raise ModelError(f"weights: the repository {repository} of the Hugging Face hub has none of {', '.join(files)}")

    @staticmethod
    def _timm() -> ModuleType:
        try:
            import timm
        except ImportError as error:
            raise ModelError(
                "arch: networks of timm/ need the package timm; install it: pip install 'caltech-sweep[timm]'"
            ) from error
        return timm

    def _name(self, arch: str) -> str:
        """Return the name that timm knows a network by; one of the hub is known by the folder of its files here."""
        name = arch.partition("/")[2]
        if not name.startswith("hf-hub:"):
            return name
        repository = name.removeprefix("hf-hub:")
        path = _cached(repository, "config.json") or _from_hub(repository, "config.json", f"arch: {arch}")
        if path is None:
            raise ModelError(f"arch: the repository {repository} of the Hugging Face hub holds no network of timm")
        return f"local-dir:{path.parent}"

    def _config(self, arch: str) -> dict[str, Any]:
        """Return what timm says of a network; raise ModelError, with a suggestion, where it has none of this name."""
        models = self._timm().models
        name = self._name(arch)
        if name.startswith("local-dir:"):
            document = json.loads(Path(name.removeprefix("local-dir:"), "config.json").read_text(encoding="utf-8"))
            return {**vars(models.PretrainedCfg()), **document.get("pretrained_cfg", document)}
        plain = models.split_model_name_tag(name)[0]
        if not models.is_model(plain):
            hint = suggestion(plain, models.list_models(), "; see timm.list_models() for the names")
            raise ModelError(f"arch: timm has no network {plain!r}{hint}".replace("mean '", "mean 'timm/"))
        try:
            return dict(vars(models.get_pretrained_cfg(name)))
        except RuntimeError as error:
            tags = ", ".join(known.partition(".")[2] for known in models.list_pretrained(f"{plain}.*"))
            raise ModelError(f"arch: timm has no weights {name!r}; of {plain} it has {tags or 'none'}") from error

    def _location(self, arch: str) -> tuple[str, Sequence[str], str]:
        """Return where published weights are: a repository of the hub and the files to look for there, or a URL."""
        config, name = self._config(arch), arch.partition("/")[2]
        repository = name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else config["hf_hub_id"] or ""
        if config["custom_load"]:
            raise ModelError(f"weights: the published weights of {arch} have a format of their own, which is not read")
        if not repository and not config["url"]:
            raise ModelError(f"weights: timm has no published weights for {arch!r}")
        file = config["hf_hub_filename"]
        return repository, (file,) if file else self._FILES, config["url"] or ""


class OwnNetworks(NetworkSource):
    """Networks of the user's own code, as ``package.module:factory``: ``factory(num_classes)`` returns a module.

    The module may lie in the working folder. All of its source that is not installed as a package counts: that of the
    module's own package, and of what these import in the working folder.
    """

    replayable = False  # not known of other people's code

    def check(self, arch: str) -> None:
        self._factory(arch)

    def build(self, arch: str, outputs: int, state: State | None, metadata: Mapping[str, str]) -> nn.Module:
        import torch
        from torch import nn

        factory = self._factory(arch)
        try:
            inspect.signature(factory).bind(outputs)
        except (TypeError, ValueError) as error:
            raise ModelError(f"arch: {arch} has to take one argument, the number of classes: {error}") from error
        try:
            model = factory(outputs)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            if torch.get_default_device().type == "meta":  # numbers are missed there
                raise NotImplementedError from error
            raise ModelError(f"arch: {arch}({outputs}) raised {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(model, nn.Module):
            raise ModelError(f"arch: {arch} returned {type(model).__name__} where a torch.nn.Module is needed")
        return model

    def tail(self, model: nn.Module) -> tuple[str, ...]:
        """The last linear or convolutional layer is taken for the classifier."""
        return (last_layer(model, ""),)

    def version(self, arch: str) -> Mapping[str, str]:
        """Return a digest of the source, and the version of the package where it has one."""
        top = arch.partition(":")[0].partition(".")[0]
        self._factory(arch)
        found = {SOURCE: _source_digest(top)}
        with contextlib.suppress(PackageNotFoundError):
            found["network_version"] = installed(top)
        return found

    def published_key(self, arch: str) -> str | None:
        raise ModelError(
            f"weights: {arch} has no published weights; have the factory load them and leave weights out, or name a "
            "file: file:PATH"
        )

    def published_file(self, arch: str) -> Path | None:
        self.published_key(arch)
        return None

    def fetch(self, arch: str, progress: Progress) -> Path:
        self.published_key(arch)
        raise AssertionError("unreachable")

    @staticmethod
    def _factory(arch: str) -> Callable[..., Any]:
        """Import a factory; the working folder is looked into after what is installed."""
        module, _, name = arch.partition(":")
        folder = str(Path.cwd())
        if folder not in sys.path:
            sys.path.append(folder)
        try:
            factory = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            where = f"neither installed nor in {folder}" if error.name in (module, module.split(".")[0]) else str(error)
            raise ModelError(f"arch: the module {module} of {arch} cannot be imported: {where}") from error
        except AttributeError as error:
            raise ModelError(f"arch: the module {module} has no {name!r}") from error
        except (Exception, SystemExit) as error:  # the user's code may raise anything, and parse the command line
            raise ModelError(
                f"arch: the module {module} cannot be imported: {type(error).__name__}: {first_line(error)}"
            ) from error
        if not callable(factory):
            raise ModelError(f"arch: {arch} is not a function, but {type(factory).__name__}")
        result: Callable[..., Any] = factory
        return result


@lru_cache
def _source_digest(top: str) -> str:
    """Return a digest of a package or module and of what it imports in the working folder, as this process saw it."""
    content, seen, waiting = hashlib.sha256(), {top}, [top]
    for name in waiting:
        for path in _files(name) if name == top or _is_here(name) else ():
            text = path.read_bytes()
            content.update(f"{name} {path.name} {hashlib.sha256(text).hexdigest()}\n".encode())
            new = _imports(text) - seen
            seen |= new
            waiting += sorted(new)
    return content.hexdigest()


def _files(top: str) -> list[Path]:
    """Return the Python files of a top-level package or module; those of a built-in one are none."""
    spec = importlib.util.find_spec(top)
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return sorted(path for folder in spec.submodule_search_locations for path in Path(folder).rglob("*.py"))
    return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []


def _is_here(top: str) -> bool:
    """Tell whether a module lies in the working folder, and is not installed below it."""
    with contextlib.suppress(ImportError, ValueError):
        files = _files(top)
        return bool(files) and files[0].is_relative_to(Path.cwd()) and "site-packages" not in files[0].parts
    return False


def _imports(text: bytes) -> set[str]:
    """Return the top-level modules that a source imports by their whole names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def _revision(repository: str) -> tuple[str, str | None]:
    name, _, revision = repository.partition("@")
    return name, revision or None


def _cached(repository: str, file: str) -> Path | None:
    """Return a file of a repository of the Hugging Face hub where an earlier download left it."""
    from huggingface_hub import try_to_load_from_cache

    name, revision = _revision(repository)
    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _from_hub(repository: str, file: str, what: str) -> Path | None:
    """Download a file of a repository of the Hugging Face hub; None where the repository has none of this name."""
    import requests
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, revision = _revision(repository)
    try:
        requests.head(hf_hub_url(name, file, revision=revision), timeout=30)  # the hub's own client retries for long
        return Path(hf_hub_download(name, file, revision=revision))
    except (requests.RequestException, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"{what} cannot be downloaded from the Hugging Face hub; is there a network? A download on another machine "
            f"is taken from there, too: hf download {name}{f' --revision {revision}' if revision else ''}, in HF_HOME"
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(f"{what} cannot be downloaded from the Hugging Face hub: {first_line(error)}") from error


SOURCES: Mapping[str, NetworkSource] = {  # by what stands before the first slash of ``arch``
    "": TorchvisionNetworks(),
    "timm": TimmNetworks(),
    ":": OwnNetworks(),  # no prefix, but MODULE:FACTORY
}


def source_of(arch: str) -> NetworkSource:
    """Return the source that an ``arch`` names; its own ``check`` says whether it has such a network."""
    prefix, slash, _ = arch.partition("/")
    return SOURCES.get(prefix if slash else ":" if ":" in arch else "", SOURCES[""])


def normalization(config: TrialConfig) -> str:
    """Return the name of a trial's mean and standard deviation; ``auto`` follows network and initial weights."""
    if config.normalize != "auto":
        return config.normalize
    return source_of(config.arch).normalization(config.arch, config.pretrained)


def input_note(config: TrialConfig) -> str | None:
    """Return a phrase about what a network sees, and what its weights were published for; None where they are not used.

    Weights from a file are taken for published ones where the network's source has a configuration of its own.
    """
    source = source_of(config.arch)
    published = source.published_input(config.arch) if config.pretrained or config.arch.startswith("timm/") else None
    if published is None:
        return None
    mean, std = (", ".join(f"{value:.3g}" for value in values) for values in mean_and_std(normalization(config)))
    side, interpolation = published
    dataset = config.dataset
    size = f"resized to {dataset.resize} and cropped to {dataset.crop} pixels, {dataset.interpolation}"
    return (
        f"{config.arch} sees mean {mean} and standard deviation {std}, {size}; its weights are published for {side} "
        f"pixels, {interpolation}"
    )


def normalization_name(mean: Statistics, std: Statistics) -> str:
    """Return the name of a mean and a standard deviation: that in ``NORMALIZE``, or the numbers themselves."""
    values = (tuple(mean), tuple(std))
    known = next((name for name, statistics in NORMALIZE.items() if statistics == values), None)
    return known or "/".join(",".join(map(repr, numbers)) for numbers in values)


def mean_and_std(name: str) -> tuple[Statistics, Statistics]:
    """Return the mean and the standard deviation that a name of :func:`normalization_name` stands for."""
    if name in NORMALIZE:
        return NORMALIZE[name]
    mean, std = (tuple(map(float, numbers.split(","))) for numbers in name.split("/"))
    return mean, std


def last_layer(model: nn.Module, head: str) -> str:
    """Return the dotted name of the last linear or convolutional layer in ``head``, or anywhere where that is ""."""
    from torch import nn

    layers = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    found = [name for name in layers if not head or is_in(name, head)]
    if not found:
        raise ModelError(f"arch: the last layer of {type(model).__name__} was not found; this network is not supported")
    return found[-1]


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
