"""The frozen description of one training, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal

FREEZE_CHOICES = ("none", "conv", "fc", "fc_but_last")
AUGMENT_CHOICES = ("hflip", "color_jitter", "rotation")
OPTIMIZER_CHOICES = ("sgd", "adam", "adamw")

Freeze = Literal["none", "conv", "fc", "fc_but_last"]


# The fields that count at their default, too, since the first fingerprints were made of them. A new field does not
# belong here: it counts where it is not at its default, which must then never change.
FIRST_DATASET_FIELDS = frozenset({
    "name", "root", "classes", "images_per_class", "resize", "crop", "val_fraction", "test_fraction", "split_seed",
})  # fmt: skip
FIRST_TRIAL_FIELDS = frozenset({
    "dataset", "arch", "weights", "outputs", "freeze", "optimizer", "lr", "momentum", "weight_decay", "step_size",
    "gamma", "epochs", "batch_size", "drop_last", "augment", "augment_probability", "rotation_degrees", "normalize",
    "test_views", "test_batch_size", "seed", "precision", "channels_last",
})  # fmt: skip


@dataclass(frozen=True)
class DatasetConfig:
    """Which images a trial sees and how they are cut; shapes are in pixels."""

    name: str = "caltech101"  # caltech101 | shapes (drawn by code) | folder
    root: str | None = None  # folder of class folders, only for name "folder"
    classes: int | str | tuple[str, ...] | None = None  # first N | first_half | second_half | names | all
    images_per_class: int | None = None  # at most so many of each class in each split
    resize: int = 256  # short side, pixels
    crop: int = 224  # centre crop, pixels, square
    val_fraction: float = 1 / 3  # of train, class by class
    test_fraction: float = 1 / 3  # only for "folder"; Caltech-101 has its official rule
    split_seed: int = 0
    background: str = "white"  # what transparent pixels show
    exif: str = "apply"  # turn an image as its EXIF orientation says, or ignore that as torchvision does


@dataclass(frozen=True)
class TrialConfig:
    """All that decides one training, and nothing else.

    Same config, same images, same device kind and library versions: same weights, bit for bit on the CPU.
    """

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    arch: str = "alexnet"  # any torchvision classification model
    weights: str = "none"  # none | imagenet | file:PATH | run:RUN_ID | study:NAME
    outputs: int | None = None  # size of the last layer; None: one for each class
    freeze: Freeze = "none"
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9  # SGD only
    weight_decay: float = 5e-5
    step_size: int = 20  # epochs between learning-rate drops
    gamma: float = 0.1  # factor of each drop
    epochs: int = 30
    batch_size: int = 256  # images a training step
    drop_last: bool = True
    augment: tuple[str, ...] = ()  # of AUGMENT_CHOICES, in that order
    augment_probability: float = 0.5  # of each op, for each image
    rotation_degrees: float = 20.0  # angles are uniform in +- this
    normalize: str = "auto"  # auto | half | imagenet
    test_views: str = "center"  # center | tencrop
    test_batch_size: int = 256  # images a step in evaluation
    seed: int = 0
    precision: str = "auto"  # auto | float32 | bfloat16
    channels_last: bool | None = None  # None: on CUDA only

    def to_dict(self) -> dict[str, Any]:
        """Return a plain nested dict that :meth:`from_dict` reads back."""
        return asdict(self)

    def to_params(self) -> dict[str, str]:
        """Return every field as text for MLflow params, dataset fields prefixed ``dataset.``."""
        flat: dict[str, str] = {}
        for name, value in self.to_dict().items():
            if name == "dataset":
                flat.update({f"dataset.{key}": _as_text(item) for key, item in value.items()})
            else:
                flat[name] = _as_text(value)
        return flat

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialConfig:
        """Build a config from :meth:`to_dict` output or its JSON round trip."""
        values = _with_tuples(values)
        dataset = _with_tuples(values.pop("dataset", {}))
        if "augment" in values:
            chosen = set(values["augment"])
            values["augment"] = tuple(name for name in AUGMENT_CHOICES if name in chosen)
        for name in FLOAT_FIELDS & values.keys():
            values[name] = float(values[name])  # 1 and 1.0 are one learning rate
        return cls(dataset=DatasetConfig(**dataset), **values)

    def counted(self) -> dict[str, Any]:
        """Return the settings that tell this training from others, as a nested dict that JSON can hold.

        The dataset's root is left out: a copy of the images elsewhere is the same training. So is a setting at its
        default that earlier versions did not have: they trained as that default says.
        """
        values = _counted(self, FIRST_TRIAL_FIELDS)
        values["dataset"] = _counted(self.dataset, FIRST_DATASET_FIELDS)
        del values["dataset"]["root"]
        return values

    def fingerprint(self) -> str:
        """Return 16 hex digits that are equal exactly when every field is equal, except where the images lie.

        A field that a later version adds changes no fingerprint while it has its default.
        """
        canonical = json.dumps(self.counted(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _counted(config: TrialConfig | DatasetConfig, always: frozenset[str]) -> dict[str, Any]:
    """Return the fields that count ``always``, and those others whose value is not their default."""
    values = asdict(config)
    for field_ in fields(config):
        default = field_.default if field_.default_factory is MISSING else field_.default_factory()
        if field_.name not in always and getattr(config, field_.name) == default:
            del values[field_.name]
    return values


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with tuples for JSON's lists, so that a config can be hashed."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _as_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value)) if value else "none"
    return "none" if value is None else str(value)


TRIAL_FIELDS = {f.name: f for f in fields(TrialConfig)}
FLOAT_FIELDS = {name for name, field_ in TRIAL_FIELDS.items() if isinstance(field_.default, float)}
DATASET_FIELDS = {f.name: f for f in fields(DatasetConfig)}
