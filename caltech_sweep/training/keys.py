"""What decides the weights after each epoch, as keys that any two trials may share; knows no torch until asked.

Two trainings that start alike, see the same data under the same settings, and whose lists of learning rates agree
for k epochs have the same weights for k epochs, whatever their schedules.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caltech_sweep.config import FIRST_DATASET_FIELDS, TrialConfig, as_stored, unread_settings
from caltech_sweep.training.augment import all_fixed
from caltech_sweep.training.networks import normalization
from caltech_sweep.training.schedule import NOMINAL_STEPS, EpochRates, learning_rates, schedule_settings

AUGMENTATION_VERSION = 2  # of what the augmentations draw and do; counts where there are any
FROZEN_VERSION = 2  # of how a frozen backbone runs: in evaluation mode, in chunks
SPLIT_BEFORE = ("alexnet", "mobilenet_v3", "resnet", "resnext", "vgg", "wide_resnet")  # which ran so in the first, too

_DIGITS = 32  # of a key
_TEST_ONLY = ("test_views", "test_batch_size")  # validation has a batch size of its own
_ENDING = ("patience", "min_delta")  # they end a training, and change no epoch before its end
_SPEED_ONLY = ("cuda_graphs",)  # they change no result
_BY_NAME = ("dataset", "weights", "outputs", "precision", "channels_last")  # what they stand for decides


@dataclass(frozen=True)
class CacheOptions:
    """Where a trial finds and leaves what can be reused, and when it saves."""

    folder: Path
    budget: int  # bytes of the whole folder
    save_at: frozenset[int] = frozenset()  # epochs after which another trial may branch, saved where that pays
    every_seconds: float = 60.0  # at most so often for resuming, and never above 2% of the training time
    hold_at: frozenset[int] = frozenset()  # epochs after which the trial may pause: saved, and dropped last
    features: bool = True  # keep the outputs of frozen layers
    together: bool = False  # train with others, so that a result is within rounding of what it is without them
    url: str | None = None  # where the folder's entries are sent to, and fetched from, by other machines too


def digest(value: Any) -> str:
    """Return 32 hex digits of anything that JSON can hold; floats count to their last bit."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:_DIGITS]


def recipe(config: TrialConfig) -> dict[str, Any]:
    """Return the settings that decide the weights whatever the schedule, the machine and the names of files.

    A setting that nothing reads, such as the angle of a rotation that is not used, is left out. A field that a
    later version adds counts where it is not at its default, until it is named here.
    """
    idle = {*epoch_settings(), *unread_settings(vars(config)), *_TEST_ONLY, *_ENDING, *_SPEED_ONLY, *_BY_NAME}
    counted = config.counted()
    values = {name: value for name, value in counted.items() if name not in idle}
    values.update({f"dataset.{k}": v for k, v in counted["dataset"].items() if k not in FIRST_DATASET_FIELDS})
    values["normalize"] = normalization(config)
    return values


def may_train_together(config: TrialConfig) -> bool:
    """Tell whether a trial may train only a classifier on outputs that are kept: then others train theirs with it."""
    fixed = config.freeze != "none" and config.unfreeze_epoch is None and all_fixed(config)
    return fixed and config.accumulate == 1


def epoch_settings() -> frozenset[str]:
    """Return the settings that decide the weights only by what :func:`epoch_marks` says of each epoch."""
    return schedule_settings() | {"unfreeze_epoch"}


def prefix_key(config: TrialConfig) -> str:
    """Return a key that is equal for two configs of one study exactly when only their epochs set them apart.

    Such trials share an epoch for each of :func:`epoch_marks` that they have in common from the start. Weights and
    dataset count by name here, since no file is read; in the store their contents count.
    """
    dataset = config.counted()["dataset"]
    weights = as_stored(config.weights)
    return digest([recipe(config), dataset, weights, config.outputs, config.precision, config.channels_last])


def epoch_marks(config: TrialConfig, steps: int = NOMINAL_STEPS) -> Iterator[str]:
    """Yield what stands for each epoch of so many steps in a key: its learning rates, and whether layers thawed."""
    for epoch, rates in enumerate(learning_rates(config, steps), start=1):
        yield f"thawed {rate_mark(rates)}" if config.thaws(epoch) else rate_mark(rates)


def rate_mark(rates: EpochRates) -> str:
    """Return what stands for the learning rates of an epoch in a key, exact to the last bit."""
    exact = [rate.hex() for rate in rates]
    return exact[0] if len(exact) == 1 else digest(exact)


def checkpoint_keys(base: str, marks: Iterable[str]) -> Iterator[str]:
    """Yield the key of the state after each epoch; ``base`` is the key of all but these, of which are the ``marks``.

    Each is :func:`digest` of [base, marks up to there]; hashing goes on where the epoch before it ended.
    """
    hashed = hashlib.sha256(f"[{json.dumps(base)},[".encode())
    for index, mark in enumerate(marks):
        hashed.update(f"{',' if index else ''}{json.dumps(mark)}".encode())
        whole = hashed.copy()
        whole.update(b"]]")
        yield whole.hexdigest()[:_DIGITS]
