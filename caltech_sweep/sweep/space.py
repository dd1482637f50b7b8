"""Spaces, samplers and pruners in Optuna's terms."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import optuna

from caltech_sweep.config import AUGMENT_CHOICES
from caltech_sweep.keys import derive
from caltech_sweep.sweep.rules import suggestion
from caltech_sweep.sweep.study_file import Choices, Component, Dimension, Range, SubsetOf

SAMPLERS = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "gp": "GPSampler",
    "qmc": "QMCSampler",
    "cmaes": "CmaEsSampler",
    "nsgaii": "NSGAIISampler",
    "brute_force": "BruteForceSampler",
}
PRUNERS = {
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "halving": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
    "threshold": "ThresholdPruner",
}
_FIXED_SEQUENCE = ("qmc", "brute_force")
ALIASES = {"startup_trials": "n_startup_trials", "warmup_epochs": "n_warmup_steps", "interval_epochs": "interval_steps"}


def _class_of(kind: str, name: str) -> Any:
    return getattr(optuna.samplers if kind == "sampler" else optuna.pruners, _names(kind)[name])


def _names(kind: str) -> dict[str, str]:
    return SAMPLERS if kind == "sampler" else PRUNERS


def _build(kind: str, component: Component) -> Any:
    arguments = {ALIASES.get(key, key): value for key, value in component.arguments.items()}
    if isinstance(component.arguments.get("warmup_epochs"), int):
        arguments["n_warmup_steps"] += 1  # Optuna's steps are our epochs, whose first is 1
    return _class_of(kind, component.name)(**arguments)


def component_problems(kind: str, component: Component) -> Iterator[tuple[str, str]]:
    """Yield (argument, sentence) for what is wrong with a "sampler" or a "pruner"."""
    names = _names(kind)
    if not isinstance(component.name, str) or component.name not in names:
        yield "name", f"there is no {kind} {component.name!r}{suggestion(str(component.name), names)}"
        return
    known = [name for name in inspect.signature(_class_of(kind, component.name)).parameters if name != "self"]
    aliases = {alias: name for alias, name in ALIASES.items() if name in known}
    unknown = [key for key in component.arguments if aliases.get(key, key) not in known]
    for key in unknown:
        yield key, f"is no argument of {component.name}{suggestion(str(key), [*aliases, *known])}"
    if not unknown:
        try:
            _build(kind, component)
        except (ImportError, TypeError, ValueError) as error:
            yield kind, f"optuna refuses these arguments: {str(error).splitlines()[0]}"


def make_sampler(component: Component, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler that suggests trial ``number``.

    Its seed is keyed by the trial, not by how far a stream has run: a study that was stopped and goes on samples
    what it would have sampled, and never its first settings again. Samplers that walk a fixed sequence, or that
    remember the trials they have seen in the study itself, keep the study's seed.
    """
    known = inspect.signature(_class_of("sampler", component.name)).parameters
    if "seed" not in known:
        sampler: optuna.samplers.BaseSampler = _build("sampler", component)
        return sampler
    seed = component.arguments.get("seed")
    seed = 0 if seed is None else int(seed)
    if component.name not in _FIXED_SEQUENCE:
        seed = derive(seed, "sampler", number) % 2**32
    sampler = _build("sampler", Component(component.name, {**component.arguments, "seed": seed}))
    return sampler


def make_pruner(component: Component | None) -> optuna.pruners.BasePruner:
    """Return the pruner of a study, or one that never prunes."""
    if component is None:
        return optuna.pruners.NopPruner()
    pruner: optuna.pruners.BasePruner = _build("pruner", component)
    return pruner


def _encode(value: Any) -> Any:
    """Return a choice as a value that Optuna stores: a list becomes its names joined by ``+``."""
    return "+".join(value) if isinstance(value, (list, tuple)) else value


def sample(trial: optuna.Trial, space: Mapping[str, Dimension]) -> dict[str, Any]:
    """Return the settings that Optuna suggests; a subset is one yes or no a member, named ``augment.hflip``."""
    settings: dict[str, Any] = {}
    for key, dimension in space.items():
        if isinstance(dimension, SubsetOf):
            chosen = [v for v in dimension.values if trial.suggest_categorical(f"{key}.{v}", [False, True])]
            settings[key] = [name for name in AUGMENT_CHOICES if name in chosen]
        elif isinstance(dimension, Choices):
            encoded = [_encode(value) for value in dimension.values]
            settings[key] = dimension.values[encoded.index(trial.suggest_categorical(key, encoded))]
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
    return {key: trial.suggest_categorical(key, list(values)) for key, values in expand.items()}


def all_branches(expand: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Return every combination of ``expand``."""
    return [dict(zip(expand, values, strict=True)) for values in itertools.product(*expand.values())]


def contains(dimension: Dimension, value: Any) -> bool:
    """Tell whether a space's dimension can give a value."""
    if isinstance(dimension, SubsetOf):
        return set(value) <= set(dimension.values)
    if isinstance(dimension, Choices):
        return _encode(value) in [_encode(choice) for choice in dimension.values]
    inside = dimension.low <= value <= dimension.high
    if not inside or not isinstance(dimension, Range) or dimension.step is None:
        return inside
    steps = (value - dimension.low) / dimension.step
    return abs(steps - round(steps)) < 1e-9


def reachable(space: Mapping[str, Dimension], settings: Mapping[str, Any]) -> dict[str, Dimension]:
    """Return the dimensions that can give a row's settings; Optuna would resample the others in silence."""
    return {key: dimension for key, dimension in space.items() if contains(dimension, settings[key])}


def enqueue_params(space: Mapping[str, Dimension], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's settings as Optuna params, those alone that the space can give."""
    params: dict[str, Any] = {}
    for key, dimension in reachable(space, settings).items():
        if isinstance(dimension, SubsetOf):
            params.update({f"{key}.{name}": name in settings[key] for name in dimension.values})
        else:
            params[key] = _encode(settings[key])
    return params
