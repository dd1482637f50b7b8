"""Samplers and pruners by name."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna

from caltech_sweep.seeds import derive_seed
from caltech_sweep.study.definition import Component, Dimension
from caltech_sweep.study.grid import EXHAUSTIVE, grid_of
from caltech_sweep.study.pausing import PAUSING, PAUSING_ARGUMENTS, Pausing, pauses
from caltech_sweep.text import quoted, suggestion

SAMPLERS = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "gp": "GPSampler",
    "qmc": "QMCSampler",
    "cmaes": "CmaEsSampler",
    "nsgaii": "NSGAIISampler",
    "brute_force": "BruteForceSampler",
    "grid": "GridSampler",
}
PRUNERS = {
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "halving": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
    "threshold": "ThresholdPruner",
}


PACKAGES = {"cmaes": "cmaes", "gp": "scipy", "qmc": "scipy"}  # what Optuna imports when these first sample


LARGEST_ARGUMENT = 1_000_000  # trials, epochs or candidates
LEARN_FROM_PRUNED = ("tpe",)  # the others learn from complete trials only
_FIXED_SEQUENCE = ("qmc", *EXHAUSTIVE)
_DERIVED = ("self", "search_space")  # arguments that the study's space gives
ALIASES = {"startup_trials": "n_startup_trials", "warmup_epochs": "n_warmup_steps", "interval_epochs": "interval_steps"}


def _class_of(kind: str, name: str) -> Any:
    return getattr(optuna.samplers if kind == "sampler" else optuna.pruners, _names(kind)[name])


def _names(kind: str) -> dict[str, str]:
    return SAMPLERS if kind == "sampler" else PRUNERS


def _build(kind: str, component: Component, grid: Mapping[str, Sequence[Any]] | None = None) -> Any:
    arguments = {ALIASES.get(key, key): value for key, value in component.arguments.items()}
    if component.name == "grid":
        arguments["search_space"] = dict(grid or {})
    if isinstance(component.arguments.get("warmup_epochs"), int):
        arguments["n_warmup_steps"] += 1  # Optuna's steps are our epochs, whose first is 1
    return _class_of(kind, component.name)(**arguments)


def _is_too_large(key: str, value: Any) -> bool:
    if isinstance(value, int):
        return not -LARGEST_ARGUMENT <= value <= (2**32 - 1 if key == "seed" else LARGEST_ARGUMENT)
    return isinstance(value, float) and not abs(value) < 1e300


def component_problems(kind: str, component: Component) -> Iterator[tuple[str, str]]:
    """Yield (argument, sentence) for what is wrong with a "sampler" or a "pruner"."""
    names = [*_names(kind), *(PAUSING if kind == "pruner" else ())]
    if not isinstance(component.name, str) or component.name not in names:
        yield "name", f"there is no {kind} {quoted(component.name)}{suggestion(str(component.name), names)}"
        return
    package = PACKAGES.get(component.name) if kind == "sampler" else None
    if package and importlib.util.find_spec(package) is None:
        install = "pip install 'caltech-sweep[samplers]'"
        yield "name", f"sampler {component.name} needs the package {package}, which is not installed: {install}"
    if kind == "pruner" and pauses(component):
        yield from _pausing_problems(component)
        return
    known = [name for name in inspect.signature(_class_of(kind, component.name)).parameters if name not in _DERIVED]
    aliases = {alias: name for alias, name in ALIASES.items() if name in known}
    unknown = [key for key in component.arguments if aliases.get(key, key) not in known]
    for key in unknown:
        yield key, f"is not an argument of {component.name}{suggestion(str(key), [*aliases, *known])}"
    too_large = [key for key, value in component.arguments.items() if _is_too_large(key, value)]
    for key in too_large:
        yield key, f"is too large a number: {quoted(component.arguments[key])}"
    if not unknown and not too_large:
        try:
            _build(kind, component)
        except (ImportError, TypeError, ValueError) as error:
            yield kind, f"optuna refuses these arguments: {str(error).splitlines()[0]}"


def _pausing_problems(component: Component) -> Iterator[tuple[str, str]]:
    for key in component.arguments:
        if key not in PAUSING_ARGUMENTS:
            hint = suggestion(str(key), PAUSING_ARGUMENTS)
            yield key, f"is not an argument of {component.name} with {' and '.join(PAUSING_ARGUMENTS)}{hint}"
    for key in PAUSING_ARGUMENTS:
        try:
            Pausing(**{k: v for k, v in component.arguments.items() if k == key})
        except ValueError as error:
            yield key, str(error).removeprefix(f"{key} ")


def _argument(kind: str, component: Component, name: str) -> Any:
    """Return an argument of a component by Optuna's name, or None where its class has none of that name."""
    given = {ALIASES.get(key, key): value for key, value in component.arguments.items()}
    known = inspect.signature(_class_of(kind, component.name)).parameters
    return given.get(name, known[name].default) if name in known else None


def startup_trials(sampler: Component) -> int | None:
    """Return how many trials have to end before a sampler proposes from a model; None for one without a model."""
    name = "population_size" if sampler.name == "nsgaii" else "n_startup_trials"
    found: int | None = _argument("sampler", sampler, name)
    return found


def pruning_start(pruner: Component) -> tuple[int, int] | None:
    """Return the first epoch after which a pruner can end a trial, and how many have to be complete by then.

    None for one that does not start at a certain epoch.
    """
    warmup = _argument("pruner", pruner, "n_warmup_steps") if pruner.name in PRUNERS else None
    complete = _argument("pruner", pruner, "n_startup_trials") if pruner.name in PRUNERS else None
    if warmup is None or complete is None:
        return None
    return max(1, warmup + ("warmup_epochs" in pruner.arguments)), complete


def make_sampler(component: Component, number: int, space: Mapping[str, Dimension]) -> optuna.samplers.BaseSampler:
    """Return the sampler that suggests trial ``number`` out of a space.

    Its seed is keyed by the trial, not by how far a stream has run: a study that was stopped and goes on samples
    what it would have sampled, and never its first settings again. Samplers that walk a fixed sequence, or that
    remember the trials they have seen in the study itself, keep the study's seed.
    """
    known = inspect.signature(_class_of("sampler", component.name)).parameters
    grid = grid_of(space) if component.name == "grid" else None
    arguments = dict(component.arguments)
    if (
        "warn_independent_sampling" in known and known["warn_independent_sampling"].default is True
    ):  # one line for each setting and trial; plan says it once
        arguments.setdefault("warn_independent_sampling", False)
    if "seed" in known:
        seed = int(arguments.get("seed") or 0)
        arguments["seed"] = seed if component.name in _FIXED_SEQUENCE else derive_seed(seed, "sampler", number) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: optuna.samplers.BaseSampler = _build("sampler", Component(component.name, arguments), grid)
    return sampler


def make_pruner(component: Component | None) -> optuna.pruners.BasePruner:
    """Return the pruner of a study, or one that never prunes."""
    if component is None or pauses(component):
        return optuna.pruners.NopPruner()
    pruner: optuna.pruners.BasePruner = _build("pruner", component)
    return pruner
