"""Which epochs the trials of a study have in common, where they branch, and who should go first.

Two trials of one trunk share an epoch for each learning rate that their lists agree in from the start, so a
study's schedules form a tree (Hippo's stage trees, PVLDB 15(5)): every edge of it need be trained only once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from caltech_sweep.config import TrialConfig
from caltech_sweep.study.definition import Choices, Dimension, Range, StudyDefinition, SubsetOf
from caltech_sweep.training.keys import checkpoint_keys, epoch_marks, epoch_settings, prefix_key
from caltech_sweep.training.schedule import shared_epochs

MAX_CHOICES = 16  # values of one setting, above which two sampled trials rarely meet
MAX_BRANCHES, MAX_EPOCHS = 4096, 1_000_000  # schedules of one trunk that are compared, and their epochs in all


@lru_cache(maxsize=1024)
def _stages(config: TrialConfig) -> tuple[str, ...]:
    """Return a key for each epoch: two trials of a study have it in common where these are equal."""
    return tuple(checkpoint_keys(prefix_key(config), epoch_marks(config)))


def common_epochs(one: TrialConfig, other: TrialConfig) -> int:
    """Return how many epochs two trials have in common."""
    return shared_epochs(_stages(one), _stages(other))


def new_epochs(configs: Sequence[TrialConfig], stored: Sequence[int] | None = None) -> list[int]:
    """Return how many epochs each trial has to train when those before it have run and their states are kept.

    ``stored`` says how many epochs of each are kept already.
    """
    known: set[str] = set()
    counts = []
    for config, there in zip(configs, stored or [0] * len(configs), strict=True):
        stages = _stages(config)
        known.update(stages[:there])
        counts.append(sum(stage not in known for stage in stages))
        known.update(stages)
    return counts


def _values(dimension: Dimension | None) -> list[Any] | None:
    """Return the few values that a setting can take, or None when two trials will hardly meet in it."""
    if isinstance(dimension, Choices):
        return list(dimension.values)
    if isinstance(dimension, Range) and (dimension.integer or dimension.step):
        step = dimension.step or 1
        count = int((dimension.high - dimension.low) / step + 1e-9) + 1
        if count <= MAX_CHOICES and not dimension.log:
            return [dimension.low + step * index for index in range(count)]
    return None


def _siblings(definition: StudyDefinition, config: TrialConfig) -> Iterable[TrialConfig]:
    """Yield what else the study may train on a trial's trunk: its rows, its family, and where the whole space is
    discrete, the schedules that may be sampled again with the trial's other settings."""
    yield from (definition.row_config(row) for row in definition.rows)
    choices: dict[str, list[Any]] = {key: list(values) for key, values in definition.expand.items()}
    sampled = {key: _values(dimension) for key, dimension in definition.space.items()}
    if all(values is not None or isinstance(definition.space[key], SubsetOf) for key, values in sampled.items()):
        known = epoch_settings()
        choices.update({key: values for key, values in sampled.items() if key in known and values is not None})
    most = min(MAX_BRANCHES, MAX_EPOCHS // config.epochs)
    for values in itertools.islice(itertools.product(*choices.values()), most):
        yield replace(config, **dict(zip(choices, values, strict=True)))


def branch_epochs(definition: StudyDefinition, config: TrialConfig) -> frozenset[int]:
    """Return the epochs after which another trial of the study may part from this one: worth keeping.

    A trial is no other one than itself: only where two rows have its settings is its end among them for that.
    """
    twice = sum(definition.row_config(row) == config for row in definition.rows) > 1
    epochs = {common_epochs(config, other) for other in _siblings(definition, config) if twice or other != config}
    return frozenset(epoch for epoch in epochs if 0 < epoch <= config.epochs)


def next_index(waiting: Sequence[TrialConfig], running: Mapping[TrialConfig, int], other_work: bool) -> int | None:
    """Return which waiting trial goes next, or None when each should wait and there is other work.

    The longest shared trunks go first. A trial whose prefix is being trained right now waits for it, as long as
    there is something else to do; ``running`` holds the epochs that the running trials have finished.
    """
    ranked = sorted(range(len(waiting)), key=lambda index: (-_longest(waiting, index), index))
    free = [index for index in ranked if not _held_up(waiting[index], running)]
    if free:
        return free[0]
    return None if other_work or not ranked else ranked[0]


def _longest(configs: Sequence[TrialConfig], index: int) -> int:
    others = (common_epochs(configs[index], other) for number, other in enumerate(configs) if number != index)
    return max(others, default=0)


def _held_up(config: TrialConfig, running: Mapping[TrialConfig, int]) -> bool:
    return any(common_epochs(config, other) > done for other, done in running.items())
