"""What values a space has: whether it holds a row's, and every combination of a finite one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from caltech_sweep.study.definition import Choices, Dimension, Range, StudyDefinition, SubsetOf

EXHAUSTIVE = ("brute_force", "grid")  # they try every combination of a finite space once
LARGEST_GRID = 100_000  # combinations


def param_names(space: Mapping[str, Dimension]) -> list[str]:
    """Return the names of a space's Optuna params."""
    names = ([f"{k}.{v}" for v in d.values] if isinstance(d, SubsetOf) else [k] for k, d in space.items())
    return list(itertools.chain.from_iterable(names))


def grid_values(key: str, dimension: Dimension) -> dict[str, list[Any]] | None:
    """Return every value of each Optuna param of a dimension, or None where there is no end of them."""
    if isinstance(dimension, SubsetOf):
        return {f"{key}.{name}": [False, True] for name in dimension.values}
    if isinstance(dimension, Choices):
        return {key: [encode(value) for value in dimension.values]}
    step = dimension.step or (1 if dimension.integer else None)
    if step is None:
        return None
    low, high, each = (Decimal(str(number)) for number in (dimension.low, dimension.high, step))
    count = min(int((high - low) / each) + 1, LARGEST_GRID + 1)
    kind = int if dimension.integer else float
    return {key: [kind(low + each * index) for index in range(count)]}


def grid_of(space: Mapping[str, Dimension]) -> dict[str, list[Any]]:
    """Return every value of each Optuna param of a finite space."""
    grid: dict[str, list[Any]] = {}
    for key, dimension in space.items():
        grid.update(grid_values(key, dimension) or {})
    return grid


def grid_size(space: Mapping[str, Dimension]) -> int:
    """Return how many combinations a finite space has."""
    return math.prod(map(len, grid_of(space).values()))


def exhaustive_problems(definition: StudyDefinition) -> Iterator[tuple[str, str]]:
    """Yield (path in the study file, sentence) for what keeps an exhaustive sampler from trying a whole space."""
    name, space = definition.sampler.name, definition.space
    if name not in EXHAUSTIVE:
        return
    endless = [key for key, dimension in space.items() if grid_values(key, dimension) is None]
    for key in endless:
        yield f"space.{key}", f"has no end of values, and sampler {name} tries all of them; give it a step, or choices"
    if not endless and (size := grid_size(space)) > LARGEST_GRID:
        yield (
            "space",
            f"sampler {name} takes at most {LARGEST_GRID:,} combinations, and this space has {size:,} or more",
        )
    if definition.expand:
        yield "expand", f"sampler {name} tries every combination anyway; move these settings to space"
    if name == "brute_force":  # Optuna's search tree knows trials with all settings of the space only
        for index, row in enumerate(definition.rows):
            outside = set(space) - reachable(space, definition.row_config(row).to_dict()).keys()
            if outside:
                which = ", ".join(sorted(outside))
                yield f"rows[{index}]", f"{row.name!r} lies outside the space ({which}); sampler grid allows that"


def encode(value: Any) -> Any:
    """Return a choice as a value that Optuna stores: a list becomes its names joined by ``+``."""
    return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def contains(dimension: Dimension, value: Any) -> bool:
    """Tell whether a space's dimension can give a value."""
    if isinstance(dimension, SubsetOf):
        return set(value) <= set(dimension.values)
    if isinstance(dimension, Choices):
        return encode(value) in [encode(choice) for choice in dimension.values]
    inside = dimension.low <= value <= dimension.high
    if not inside or not isinstance(dimension, Range) or dimension.step is None:
        return inside
    steps = (value - dimension.low) / dimension.step
    return abs(steps - round(steps)) < 1e-9


def reachable(space: Mapping[str, Dimension], settings: Mapping[str, Any]) -> dict[str, Dimension]:
    """Return the dimensions that can give a row's settings; Optuna would resample the others in silence."""
    return {key: dimension for key, dimension in space.items() if contains(dimension, settings[key])}
