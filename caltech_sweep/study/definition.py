"""What a study is: its space, rows, sampler and pruner, frozen."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from caltech_sweep.config import TrialConfig


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; ``log`` spreads them evenly by order of magnitude."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False


@dataclass(frozen=True)
class Choices:
    """One of some values."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class SubsetOf:
    """Any subset of some names, the empty one included."""

    values: tuple[str, ...]


Dimension = Range | Choices | SubsetOf


@dataclass(frozen=True)
class Component:
    """A sampler or a pruner: its name and its arguments."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One row of the study's table: settings to train, and what a published table says of them."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)
    tolerance: float | None = None  # of accuracies, as a fraction


@dataclass(frozen=True)
class StudyDefinition:
    """A study as its file and the command line's overrides define it."""

    name: str
    title: str
    trials: int  # in total, rows included
    dataset: Mapping[str, Any]
    fixed: Mapping[str, Any]
    space: Mapping[str, Dimension]
    rows: tuple[Row, ...]
    sampler: Component = Component("tpe", {"seed": 0})
    pruner: Component | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float | None = None  # of every row that has none of its own
    expand: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # schedules tried for each sampled setting
    replicates: int = 1  # seeds that every row is trained on; not counted by ``trials``

    @property
    def family_size(self) -> int:
        """How many trials each sampled setting gives: one for every combination of ``expand``."""
        return math.prod(map(len, self.expand.values()))

    def config(self, settings: Mapping[str, Any]) -> TrialConfig:
        """Return the config of a trial with some settings besides the fixed ones."""
        return TrialConfig.from_dict({**self.fixed, **settings, "dataset": self.dataset})

    def row_config(self, row: Row, replicate: int = 0) -> TrialConfig:
        """Return the config of a row; each further replicate has the next seed and is otherwise the same."""
        config = self.config(row.settings)
        return replace(config, seed=config.seed + replicate)

    def identity(self) -> dict[str, Any]:
        """Return what must not change while the study goes on under its name; rows and ``trials`` may."""
        dataset = {key: value for key, value in self.dataset.items() if key != "root"}
        parts = {
            "dataset": dataset,
            "fixed": dict(self.fixed),
            "space": {key: _dimension_dict(dimension) for key, dimension in self.space.items()},
            "sampler": _component_dict(self.sampler),
            "pruner": _component_dict(self.pruner) if self.pruner else None,
            "overrides": dict(self.overrides),
        }
        if self.expand:
            parts["expand"] = {key: list(values) for key, values in self.expand.items()}
        result: dict[str, Any] = json.loads(json.dumps(parts))
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return all that a report needs to know of the study, JSON-safe."""
        rows = []
        for row in self.rows:
            config = self.row_config(row)
            rows.append(
                {
                    "name": row.name,
                    "set": dict(row.settings),
                    "reference": dict(row.reference),
                    "tolerance": row.tolerance,
                    "fingerprint": config.fingerprint(),
                    "config": config.to_dict(),
                }
            )
        document = {"name": self.name, "title": self.title, "trials": self.trials, **self.identity(), "rows": rows}
        document["tolerance"] = self.tolerance
        document["replicates"] = self.replicates
        result: dict[str, Any] = json.loads(json.dumps(document))
        return result


def variants(definition: StudyDefinition, keys: tuple[str, ...], rows: bool = True) -> Iterator[TrialConfig]:
    """Yield one config for each row, and for each combination of the space's choices of ``keys``."""
    if rows:
        yield from (definition.row_config(row) for row in definition.rows)
    chosen = ((key, definition.space.get(key)) for key in keys)
    choices = {key: dimension.values for key, dimension in chosen if isinstance(dimension, Choices)}
    if definition.space:
        for values in itertools.product(*choices.values()):
            yield definition.config(dict(zip(choices, values, strict=True)))


def _component_dict(component: Component) -> dict[str, Any]:
    return {"name": component.name, **component.arguments}


def _dimension_dict(dimension: Dimension) -> dict[str, Any]:
    if isinstance(dimension, Choices):
        return {"choices": list(dimension.values)}
    if isinstance(dimension, SubsetOf):
        return {"subset_of": list(dimension.values)}
    optional = {"log": dimension.log or None, "step": dimension.step}
    return {"low": dimension.low, "high": dimension.high, **{k: v for k, v in optional.items() if v is not None}}


def identity_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return one line for each leaf that differs between two identities."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += identity_difference(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: was {json.dumps(before)}, is {json.dumps(after)}")
    return lines
