"""Every setting of a training and every entry of the registries, as changes of a small trial's config."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from caltech_sweep.config import OPTIMIZER_CHOICES
from caltech_sweep.data.registry import DATASETS
from caltech_sweep.metrics import objective_names
from caltech_sweep.training.augment import AUGMENTATIONS
from caltech_sweep.training.schedule import SCHEDULES, schedule_settings

# Every setting of a training, at another value than its default; those that an entry of a registry reads come with it.
OTHER: dict[str, Any] = {
    "augment_probability": 0.9, "rotation_degrees": 90.0, "resized_crop_scale": 0.5, "resized_crop_ratio": 2.0,
    "rand_augment_ops": 3, "rand_augment_magnitude": 20, "blur_kernel": 3, "blur_sigma": 1.0, "erasing_scale": 0.2,
    "step_size": 1, "gamma": 0.5, "milestones": (2,), "warmup_steps": 4, "min_lr": 0.001, "cooldown_epochs": 2,
    "pct_start": 0.5, "div_factor": 4.0, "final_div_factor": 10.0,
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "label_smoothing": 0.5, "mixup": 0.5, "cutmix": 0.5, "clip_grad_norm": 0.5, "head_lr_factor": 0.5,
    "class_weights": "balanced", "sample_weights": "balanced", "accumulate": 2,
}  # fmt: skip
RARE: dict[str, Any] = {
    "outputs": 4, "momentum": 0.5, "weight_decay": 0.01, "drop_last": True, "batch_size": 4, "normalize": "imagenet",
    "test_batch_size": 3, "test_views": "tencrop", "seed": 7, "precision": "bfloat16", "channels_last": True,
    "cuda_graphs": False,
    "patience": 3, "min_delta": 0.1, "warmup_epochs": 1, "layer_decay": 0.7, "lr": 0.03,
}  # fmt: skip
FROZEN: tuple[dict[str, Any], ...] = (
    *({"freeze": freeze, "arch": "mobilenet_v3_small"} for freeze in ("fc", "fc_but_last")),
    *({"freeze": freeze, "arch": "resnet18"} for freeze in ("up_to:layer2", "first:0.5")),
    *({"freeze": freeze, "arch": "resnet18", "unfreeze_epoch": 3} for freeze in ("conv", "up_to:layer2")),
)
NETWORKS = {"": "resnet18", "timm": "timm/test_resnet", ":": "brought_along:build"}  # one of each source


def cases() -> Iterator[dict[str, Any]]:
    """Yield the entries of the registries that a step knows, and its settings, as changes of a config."""
    read = {name: value for name, value in OTHER.items() if name in schedule_settings()}
    yield from ({"schedule": name, **read} for name in SCHEDULES)
    yield from ({"augment": (name,), **{n: OTHER[n] for n in op.settings}} for name, op in AUGMENTATIONS.items())
    yield from ({"objective": name} for name in objective_names())
    yield from ({"optimizer": name, "lr": 0.001, "layer_decay": 0.7} for name in OPTIMIZER_CHOICES)
    yield from ({name: value} for name, value in PLAIN.items())
    yield from ({"ema_decay": 0.5, "arch": arch} for arch in ("squeezenet1_1", "resnet18"))
    yield {"ema_decay": 0.5, "freeze": "conv"}
    yield from ({"freeze": "conv", "augment": ("hflip", *more)} for more in ((), ("vflip",)))
    yield {"sample_weights": "balanced", "freeze": "conv", "augment": ("hflip",)}


def rare_cases() -> Iterator[dict[str, Any]]:
    """Yield what is left of settings and registries: ways to freeze, sources of networks, and datasets."""
    yield from ({name: value} for name, value in RARE.items())
    yield from FROZEN
    yield from ({"arch": arch} for arch in NETWORKS.values())
    yield from ({"dataset": name} for name in DATASETS)


QUICK, ALL = list(cases()), [*cases(), *rare_cases()]


def named(changes: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in itertools.islice(changes.items(), 2))
