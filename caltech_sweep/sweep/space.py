"""Spaces, samplers and pruners in Optuna's terms."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import optuna

from caltech_sweep.study.definition import Choices, Dimension, SubsetOf
from caltech_sweep.study.grid import encode, reachable


def sample(trial: optuna.Trial, space: Mapping[str, Dimension]) -> dict[str, Any]:
    """Return the settings that Optuna suggests; a subset is one yes or no a member, named ``augment.hflip``."""
    settings: dict[str, Any] = {}
    for key, dimension in space.items():
        if isinstance(dimension, SubsetOf):
            settings[key] = [v for v in dimension.values if trial.suggest_categorical(f"{key}.{v}", [False, True])]
        elif isinstance(dimension, Choices):
            settings[key] = _choose(trial, key, dimension.values)
        elif dimension.integer:
            step = int(dimension.step or 1)
            settings[key] = trial.suggest_int(
                key, int(dimension.low), int(dimension.high), step=step, log=dimension.log
            )
        else:
            settings[key] = trial.suggest_float(
                key, float(dimension.low), float(dimension.high), step=dimension.step, log=dimension.log
            )
    return settings


def own_branch(trial: optuna.Trial, expand: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Return the combination of ``expand`` that a trial takes."""
    return {key: _choose(trial, key, values) for key, values in expand.items()}


def _choose(trial: optuna.Trial, key: str, values: Sequence[Any]) -> Any:
    encoded = [encode(value) for value in values]
    return values[encoded.index(trial.suggest_categorical(key, encoded))]


def all_branches(expand: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Return every combination of ``expand``."""
    return [dict(zip(expand, values, strict=True)) for values in itertools.product(*expand.values())]


def enqueue_params(space: Mapping[str, Dimension], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's settings as Optuna params, only those that the space can give."""
    params: dict[str, Any] = {}
    for key, dimension in reachable(space, settings).items():
        if isinstance(dimension, SubsetOf):
            params.update({f"{key}.{name}": name in settings[key] for name in dimension.values})
        else:
            params[key] = encode(settings[key])
    return params
