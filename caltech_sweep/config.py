"""The frozen description of one training, and its fingerprint.

Each field carries its default, its rule and what it means: study files, ``--set``, the documents and "did you mean"
read them there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from caltech_sweep.metrics import DEFAULT_OBJECTIVE, objective_names
from caltech_sweep.rules import (
    AT_LEAST_1,
    BOOLEAN,
    CLASSES,
    COLOUR,
    EPOCHS,
    FRACTION,
    FREEZE,
    LARGEST_SEED,
    LEVEL,
    NOT_NEGATIVE,
    ODD,
    POSITIVE,
    PRETRAINED,
    PROBABILITY,
    SHARE,
    SIGMA,
    TEXT,
    WEIGHTS,
    Rule,
    as_text,
    integer,
    number,
    one_of,
    optional,
    setting,
    some_of,
)
from caltech_sweep.training.augment import AUGMENTATIONS, not_augmenting
from caltech_sweep.training.schedule import SCHEDULES, not_scheduling

OPTIMIZER_CHOICES = ("sgd", "adam", "adamw")


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


# The settings of a dataset that decide no pixel, and so no result: where its files lie, and what of them is kept.
PLACE_FIELDS = frozenset({"root", "cache"})

OBJECTIVE = Rule(lambda: f"one of {', '.join(objective_names())}", lambda v: v in objective_names())


def _normalise(config: DatasetConfig | TrialConfig) -> None:
    """Give each value the one form that it has here: a fingerprint tells 1 from 1.0, and a list cannot be hashed."""
    for field_ in fields(config):
        if (rule := field_.metadata.get("rule")) is not None:
            object.__setattr__(config, field_.name, rule.ordered(getattr(config, field_.name)))


@dataclass(frozen=True)
class DatasetConfig:
    """Which images a trial sees and how they are cut; shapes are in pixels."""

    name: str = setting("caltech101", TEXT, "an entry of data/registry.py")
    root: str | None = setting(None, optional(TEXT, "the default place"), "folder of class folders")
    classes: int | str | tuple[str, ...] | None = setting(None, CLASSES, "which classes; a number means the first ones")
    images_per_class: int | None = setting(
        None, optional(integer(1, 1_000_000_000), "all"), "at most so many in each split"
    )
    resize: int = setting(256, integer(8, 4096), "short side, in pixels")
    crop: int = setting(224, integer(8, 4096), "side of the square that is cut from the centre, in pixels")
    val_fraction: float = setting(1 / 3, FRACTION, "of train, class by class")
    test_fraction: float = setting(1 / 3, FRACTION, "for folder only; Caltech-101 has its official rule")
    split_seed: int = setting(0, integer(0, LARGEST_SEED))
    background: str = setting("white", COLOUR, "what transparent pixels show")
    exif: str = setting("apply", one_of(("apply", "ignore")), "turn an image as its EXIF orientation says, or not")
    on_bad_image: str = setting("stop", one_of(("stop", "skip")), "what an image that cannot be read does to a study")
    folds: int = setting(1, integer(1, 1000), "equal parts of train and val, one of which is val; 1: by val_fraction")
    fold: int | None = setting(None, optional(integer(1, 1000), "each in turn"), "which of the folds is val")
    interpolation: str = setting("bilinear", one_of(("bilinear", "bicubic")), "how images are resized")
    source: str | None = setting(None, optional(TEXT, "none"), "which dataset of torchvision, such as CIFAR10")
    path_column: str = setting("path", TEXT, "of a csv file")
    label_column: str = setting("label", TEXT, "of a csv file")
    split_column: str = setting("split", TEXT, "of a csv file, which may lack it: train, val or test")
    group_column: str = setting("group", TEXT, "of a csv file, which may lack it: a group stays in one part")
    cache: str = setting(
        "resized",
        one_of(("resized", "crop", "jpeg")),
        "what is kept on disk: resized images, their centre crops, or only the files, decoded in every epoch",
    )

    def __post_init__(self) -> None:
        _normalise(self)


@dataclass(frozen=True)
class TrialConfig:
    """All that decides one training, and nothing else.

    Same config, same images, same device kind and library versions: same weights, bit for bit on the CPU.
    """

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    arch: str = setting("alexnet", TEXT, "a network of torchvision, timm/NAME, or MODULE:FACTORY of your own")
    weights: str = setting("none", WEIGHTS, "what the training starts from")
    outputs: int | None = setting(None, optional(integer(2, 100_000), "one for each class"), "size of the last layer")
    freeze: str = setting("none", FREEZE, "which layers are not trained")
    optimizer: str = setting("sgd", one_of(OPTIMIZER_CHOICES))
    lr: float = setting(0.01, POSITIVE, "learning rate that the schedule starts from")
    momentum: float = setting(0.9, number("of at least 0 and below 1", lambda v: 0 <= v < 1), "of sgd")
    weight_decay: float = setting(5e-5, NOT_NEGATIVE)
    step_size: int = setting(20, integer(1), "epochs between two drops of the learning rate")
    gamma: float = setting(0.1, SHARE, "factor of each drop")
    epochs: int = setting(30, integer(1, 100_000))
    batch_size: int = setting(256, integer(1, 100_000), "images in a training step")
    drop_last: bool = setting(True, BOOLEAN, "leave out an incomplete last batch")
    augment: tuple[str, ...] = setting((), some_of(AUGMENTATIONS), "applied in this order")
    augment_probability: float = setting(0.5, PROBABILITY, "of an augmentation that does not change every image")
    rotation_degrees: float = setting(
        20.0, number("between 0 and 180", lambda v: 0 <= v <= 180), "angles lie in +- this"
    )
    normalize: str = setting("auto", one_of(("auto", "half", "imagenet")), "auto follows the initial weights")
    test_views: str = setting("center", one_of(("center", "tencrop")))
    test_batch_size: int = setting(256, integer(1, 100_000), "images in a step of the test; 64 at most on a processor")
    seed: int = setting(0, integer(0, LARGEST_SEED))
    precision: str = setting("auto", one_of(("auto", "float32", "bfloat16")), "auto: bfloat16 where it is faster")
    channels_last: bool | None = setting(None, optional(BOOLEAN, "where faster"), "memory layout of images")
    cuda_graphs: bool | None = setting(
        None, optional(BOOLEAN, "where it is safe"), "launch the passes of a step on a GPU at once; changes no result"
    )
    label_smoothing: float = setting(0.0, number("of at least 0 and below 1", lambda v: 0 <= v < 1), "of the targets")
    mixup: float = setting(0.0, NOT_NEGATIVE, "alpha of mixup; 0: none")
    cutmix: float = setting(0.0, NOT_NEGATIVE, "alpha of cutmix; 0: none; with mixup, each batch has one of the two")
    class_weights: str = setting("none", one_of(("none", "balanced")), "balanced: rare classes count more in the loss")
    sample_weights: str = setting(
        "none", one_of(("none", "balanced")), "balanced: an epoch draws as many images of each class, some repeatedly"
    )
    clip_grad_norm: float | None = setting(None, optional(POSITIVE, "no limit"), "the largest norm of a gradient")
    accumulate: int = setting(1, integer(1), "parts that a batch is trained in, one after the other, to save memory")
    ema_decay: float | None = setting(
        None,
        optional(FRACTION, "no average"),
        "of the average of the weights over the steps, which is what is evaluated",
    )
    head_lr_factor: float = setting(1.0, POSITIVE, "of the learning rate, for the classifier")
    layer_decay: float = setting(1.0, SHARE, "of the learning rate, from each block to the one before")
    unfreeze_epoch: int | None = setting(
        None, optional(integer(2), "never"), "first epoch in which frozen layers are trained, too"
    )
    schedule: str = setting("step", one_of(SCHEDULES), "of the learning rate")
    warmup_epochs: int = setting(0, integer(0), "in which the learning rate rises from almost nothing, step by step")
    warmup_steps: int = setting(0, integer(0), "the same in steps; they come on top")
    milestones: tuple[int, ...] = setting((), EPOCHS, "of multistep: the epochs after which the learning rate drops")
    min_lr: float = setting(0.0, NOT_NEGATIVE, "of cosine, linear and wsd: the learning rate that they end at")
    cooldown_epochs: int = setting(5, integer(1), "of wsd: the last epochs, in which the learning rate falls")
    resized_crop_scale: float = setting(0.08, SHARE, "of random_resized_crop: the least share of the area")
    resized_crop_ratio: float = setting(4 / 3, AT_LEAST_1, "of random_resized_crop: the largest ratio of the sides")
    rand_augment_ops: int = setting(2, integer(1), "of rand_augment: how many follow each other")
    rand_augment_magnitude: int = setting(9, LEVEL, "of rand_augment: how strong they are")
    blur_kernel: int = setting(5, ODD, "of gaussian_blur: width in pixels")
    blur_sigma: float = setting(2.0, SIGMA, "of gaussian_blur: the largest standard deviation, in pixels")
    erasing_scale: float = setting(0.33, SHARE, "of random_erasing: the largest share of the area")
    pct_start: float = setting(0.3, FRACTION, "of one_cycle: the share of the steps in which the learning rate rises")
    div_factor: float = setting(25.0, POSITIVE, "of one_cycle: lr by the first learning rate")
    final_div_factor: float = setting(1e4, POSITIVE, "of one_cycle: the first learning rate by the last")
    objective: str = setting(DEFAULT_OBJECTIVE, OBJECTIVE, "which measure decides, for the whole study")
    patience: int | None = setting(
        None, optional(integer(1), "training every epoch"), "epochs without a better objective that end the training"
    )
    min_delta: float = setting(0.0, NOT_NEGATIVE, "an objective is better when it is so by more than this")

    def __post_init__(self) -> None:
        _normalise(self)

    @property
    def pretrained(self) -> bool:
        """Whether the training starts from the published weights of its network."""
        return self.weights in PRETRAINED

    def thaws(self, epoch: int) -> bool:
        """Tell whether the frozen layers are trained in a 1-based epoch."""
        return self.freeze != "none" and self.unfreeze_epoch is not None and epoch >= self.unfreeze_epoch

    def to_dict(self) -> dict[str, Any]:
        """Return a plain nested dict that :meth:`from_dict` reads back."""
        return asdict(self)

    def to_params(self) -> dict[str, str]:
        """Return every field as text for MLflow params, dataset fields prefixed ``dataset.``."""
        values = self.to_dict()
        dataset = {f"dataset.{name}": value for name, value in values.pop("dataset").items()}
        return {name: as_text(value) for name, value in {**dataset, **values}.items()}

    @classmethod
    def from_params(cls, params: Mapping[str, str]) -> TrialConfig:
        """Build a config from :meth:`to_params` output; what is missing, or of another version, has its default."""
        dataset = {key[8:]: value for key, value in params.items() if key.startswith("dataset.")}
        return cls(dataset=DatasetConfig(**parsed(dataset, DATASET_RULES)), **parsed(params, TRIAL_RULES))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialConfig:
        """Build a config from :meth:`to_dict` output or its JSON round trip."""
        return cls(**{**values, "dataset": DatasetConfig(**values.get("dataset", {}))})

    def counted(self) -> dict[str, Any]:
        """Return the settings that tell this training from others, as a nested dict that JSON can hold.

        The dataset's root is left out, and what is kept of the images: a copy of them elsewhere, or in another form, is
        the same training. So is a setting at its default that earlier versions did not have: they trained as that
        default says.
        """
        values = _counted(self, FIRST_TRIAL_FIELDS)
        dataset = _counted(self.dataset, FIRST_DATASET_FIELDS)
        values["dataset"] = {name: value for name, value in dataset.items() if name not in PLACE_FIELDS}
        values["weights"] = as_stored(self.weights)
        return values

    def fingerprint(self) -> str:
        """Return 16 hex digits that are equal exactly when every field is equal, except where the images lie.

        A field that a later version adds changes no fingerprint while it has its default.
        """
        canonical = json.dumps(self.counted(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def as_stored(weights: Any) -> Any:
    """Return the word that stores know weights by: the published ones by the older word."""
    return "imagenet" if weights in PRETRAINED else weights


def _counted(config: TrialConfig | DatasetConfig, always: frozenset[str]) -> dict[str, Any]:
    """Return the fields that count ``always``, and those others whose value is not their default."""
    values = asdict(config)
    for field_ in fields(config):
        default = field_.default if field_.default_factory is MISSING else field_.default_factory()
        if field_.name not in always and getattr(config, field_.name) == default:
            del values[field_.name]
    return values


def parsed(params: Mapping[str, str], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Return the values of those settings whose texts are there and stand for a value that is accepted."""
    values = {}
    for name, rule in rules.items():
        with contextlib.suppress(KeyError, ValueError):
            values[name] = rule.parse(params[name])
    return values


def unread_settings(settings: Mapping[str, Any]) -> set[str]:
    """Return what nothing reads in a training with these settings, such as the drops of a rate that has none."""
    unread = not_augmenting(settings.get("augment", ())) | not_scheduling(settings.get("schedule", "step"))
    return unread if settings.get("optimizer", "sgd") == "sgd" else unread | {"momentum"}


TRIAL_FIELDS = {f.name: f for f in fields(TrialConfig)}
DATASET_FIELDS = {f.name: f for f in fields(DatasetConfig)}
TRIAL_RULES: dict[str, Rule] = {name: f.metadata["rule"] for name, f in TRIAL_FIELDS.items() if name != "dataset"}
DATASET_RULES: dict[str, Rule] = {name: f.metadata["rule"] for name, f in DATASET_FIELDS.items()}
