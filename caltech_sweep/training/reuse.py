"""What decides the weights after each epoch, as keys that any two trials may share; knows no torch until asked.

Two trainings that start alike, see the same data under the same settings, and whose lists of learning rates agree
for k epochs have the same weights for k epochs, whatever their ``step_size``, ``gamma`` and ``epochs``.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caltech_sweep.config import FLOAT_FIELDS, TrialConfig

if TYPE_CHECKING:
    import torch

# Of the code from models to evaluation: raise it whenever the same config would train other weights.
TRAINING_VERSION = 1

_SCHEDULE = ("lr", "step_size", "gamma", "epochs")  # known by the learning rates that they give
_TEST_ONLY = ("test_views", "test_batch_size")  # validation has a batch size of its own
_BY_NAME = ("dataset", "weights", "outputs", "precision", "channels_last")  # what they stand for decides


@dataclass(frozen=True)
class StageUse:
    """Where a trial finds and leaves what can be reused, and when it saves."""

    folder: Path
    budget: int  # bytes of the whole folder
    save_at: frozenset[int] = frozenset()  # epochs after which another trial may branch; the last is always saved
    every_seconds: float = 60.0  # at most so often for resuming, and never above 2% of the training time
    features: bool = True  # keep the outputs of frozen layers


def learning_rate(config: TrialConfig, epoch: int) -> float:
    """Return StepLR's learning rate of a 1-based epoch."""
    return config.lr * config.gamma ** ((epoch - 1) // config.step_size)


def learning_rates(config: TrialConfig) -> tuple[float, ...]:
    """Return the learning rate of every epoch: all that a schedule means to the weights."""
    return tuple(learning_rate(config, epoch) for epoch in range(1, config.epochs + 1))


def shared_epochs(rates: Sequence[float], others: Sequence[float]) -> int:
    """Return in how many epochs from the start two lists of learning rates agree."""
    pairs = enumerate(zip(rates, others, strict=False))
    return next((epoch for epoch, (rate, other) in pairs if rate != other), min(len(rates), len(others)))


def digest(value: Any) -> str:
    """Return 32 hex digits of anything that JSON can hold; floats count to their last bit."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def recipe(config: TrialConfig) -> dict[str, Any]:
    """Return the settings that decide the weights whatever the schedule, the machine and the names of files.

    A setting that nothing reads, such as the angle of a rotation that is not asked for, is left out. A new field of
    TrialConfig counts until it is named here.
    """
    idle = {*_SCHEDULE, *_TEST_ONLY, *_BY_NAME}
    if config.optimizer != "sgd":
        idle.add("momentum")
    if not config.augment:
        idle.add("augment_probability")
    if "rotation" not in config.augment:
        idle.add("rotation_degrees")
    values = {name: value for name, value in config.to_dict().items() if name not in idle}
    values["normalize"] = config.resolved_normalize()
    return {name: float(value) if name in FLOAT_FIELDS else value for name, value in values.items()}


def trunk_key(config: TrialConfig) -> str:
    """Return a key that is equal for two configs of one study exactly when only their schedules set them apart.

    Such trials share an epoch for each learning rate that their lists have in common from the start. Weights and
    dataset count by name here, since no file is read; in the store their contents count.
    """
    dataset = config.to_dict()["dataset"]
    del dataset["root"]
    return digest([recipe(config), dataset, config.weights, config.outputs, config.precision, config.channels_last])


def stage_key(base: str, rates: Sequence[float]) -> str:
    """Return the key of the state after ``len(rates)`` epochs; ``base`` is the key of all but the learning rates."""
    return digest([base, [float(rate).hex() for rate in rates]])


def uses_bfloat16(config: TrialConfig, device_type: str) -> bool:
    """Return whether the network computes in bfloat16; ``auto`` means on a GPU alone."""
    return config.precision == "bfloat16" or (config.precision == "auto" and device_type == "cuda")


def uses_channels_last(config: TrialConfig, device_type: str) -> bool:
    """Return whether images lie with their channels last in memory; None means on a GPU alone."""
    return config.channels_last if config.channels_last is not None else device_type == "cuda"


def surroundings(config: TrialConfig, device: torch.device) -> dict[str, Any]:
    """Return what besides config and data decides the last bit of a number: versions, hardware, number format."""
    import numpy as np
    import torch
    import torchvision

    on_gpu = device.type == "cuda"
    return {
        "training": TRAINING_VERSION,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "device": device.type,
        "machine": platform.machine(),
        "hardware": torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "threads": None if on_gpu else torch.get_num_threads(),
        "bfloat16": uses_bfloat16(config, device.type),
        "channels_last": uses_channels_last(config, device.type),
    }
