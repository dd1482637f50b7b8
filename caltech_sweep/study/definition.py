"""What a study is: its space, rows, sampler and pruner, frozen."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from caltech_sweep.config import DATASET_RULES, PLACE_FIELDS, TRIAL_RULES, TrialConfig
from caltech_sweep.metrics import Objective, measure_names, objective
from caltech_sweep.rules import Rule


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; ``log`` spreads them evenly by order of magnitude."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False

    @property
    def integers(self) -> range:
        """Its numbers, where they are integers."""
        return range(int(self.low), int(self.high) + 1, int(self.step or 1))


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
    fingerprint: str | None = field(default=None, compare=False)  # of a stored study, which may be of another version


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
    early_stopping: Mapping[str, Any] = field(default_factory=dict)  # ``patience`` and ``min_delta`` of sampled trials
    budget: Mapping[str, float] = field(default_factory=dict)  # the most ``epochs`` or ``hours`` that it may spend
    columns: tuple[str, ...] = ()  # settings and measures that its table shows; none: what varies, and the usual ones

    @property
    def family_size(self) -> int:
        """How many trials each sampled setting gives: one for every combination of ``expand``."""
        return math.prod(map(len, self.expand.values()))

    @property
    def folds(self) -> int:
        """How many folds every setting is trained on in turn."""
        return int(self.dataset.get("folds", 1)) if self.dataset.get("fold") is None else 1

    @property
    def trainings(self) -> int:
        """How many trainings a row has: one for each seed and fold."""
        return self.replicates * self.folds

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """The settings that vary: the sampled ones, and those of ``expand``."""
        return {**self.space, **{key: Choices(values) for key, values in self.expand.items()}}

    @property
    def sampled_epochs(self) -> Sequence[int]:
        """The numbers of epochs that a sampled trial may ask for."""
        dimension = self.dimensions.get("epochs")
        if isinstance(dimension, Range):
            return dimension.integers
        return [int(value) for value in dimension.values] if dimension else [self.config({}).epochs]

    @property
    def objective(self) -> Objective:
        """The measure that decides which epoch and which trial is best."""
        return objective(self.config({}).objective)

    def config(self, settings: Mapping[str, Any]) -> TrialConfig:
        """Return the config of a trial with some settings besides the fixed ones; of several folds, in the first."""
        config = TrialConfig.from_dict({**self.fixed, **settings, "dataset": self.dataset})
        return in_fold(config, 1) if self.folds > 1 else config

    def sampled_config(self, settings: Mapping[str, Any]) -> TrialConfig:
        """Return the config of a sampled trial with some settings besides the fixed ones."""
        return self.config({**self.early_stopping, **settings})

    def row_config(self, row: Row, replicate: int = 0) -> TrialConfig:
        """Return the config of a row's training of that number, from 0, of :attr:`trainings`.

        Each takes the next fold, and after the last fold the next seed; it is otherwise the same.
        """
        config = self.config(row.settings)
        seeds, fold = divmod(replicate, self.folds)
        config = replace(config, seed=config.seed + seeds)
        return in_fold(config, fold + 1) if self.folds > 1 else config

    def identity(self) -> dict[str, Any]:
        """Return what must not change while the study goes on under its name; rows and ``trials`` may."""
        dataset = {key: value for key, value in self.dataset.items() if key not in PLACE_FIELDS}
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
        if self.early_stopping:
            parts["early_stopping"] = dict(self.early_stopping)
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
        if self.budget:
            document["budget"] = dict(self.budget)
        if self.columns:
            document["columns"] = list(self.columns)
        result: dict[str, Any] = json.loads(json.dumps(document))
        return result

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> StudyDefinition:
        """Read :meth:`to_dict` output back; what an earlier version did not write has its default.

        Settings that only a later version has are left out.
        """
        rows = [
            Row(
                str(row["name"]),
                _known(row["set"] if "set" in row else row.get("config", {}), TRIAL_RULES),
                row.get("reference") or {},
                row.get("tolerance"),
                row.get("fingerprint"),
            )
            for row in document.get("rows", ())
        ]
        space = _known(document.get("space") or {}, TRIAL_RULES, _dimension)
        expand = _known(document.get("expand") or {}, TRIAL_RULES, lambda rule, values: tuple(map(rule.normal, values)))
        name = str(document.get("name", ""))
        return cls(
            name,
            str(document.get("title", name)),
            document.get("trials", len(rows)),
            _known(document.get("dataset") or {}, DATASET_RULES),
            _known(document.get("fixed") or {}, TRIAL_RULES),
            space,
            tuple(rows),
            _component(document.get("sampler")) or Component("tpe", {"seed": 0}),
            _component(document.get("pruner")),
            document.get("overrides") or {},
            document.get("tolerance"),
            expand,
            document.get("replicates") or 1,
            document.get("early_stopping") or {},
            document.get("budget") or {},
            tuple(name for name in document.get("columns") or () if name in column_names()),
        )


def column_names() -> list[str]:
    """Return what may have a column in a study's table: settings, and measures such as ``test/macro_accuracy``."""
    return [*(name for name in TRIAL_RULES if name != "objective"), *measure_names()]


def in_fold(config: TrialConfig, fold: int) -> TrialConfig:
    """Return a config whose validation images are those of a fold."""
    return replace(config, dataset=replace(config.dataset, fold=fold))


def variants(definition: StudyDefinition, keys: tuple[str, ...], rows: bool = True) -> Iterator[TrialConfig]:
    """Yield one config for each row, and for each combination of the space's choices of ``keys``."""
    if rows:
        yield from (definition.row_config(row) for row in definition.rows)
    chosen = ((key, definition.space.get(key)) for key in keys)
    choices = {key: dimension.values for key, dimension in chosen if isinstance(dimension, Choices)}
    if definition.space:
        for values in itertools.product(*choices.values()):
            yield definition.sampled_config(dict(zip(choices, values, strict=True)))


def _known(
    values: Mapping[str, Any], rules: Mapping[str, Rule], read: Callable[[Rule, Any], Any] = Rule.normal
) -> dict[str, Any]:
    """Return the values of settings that have a rule here."""
    return {key: read(rules[key], value) for key, value in values.items() if key in rules}


def _dimension(rule: Rule, values: Mapping[str, Any]) -> Dimension:
    """Read :func:`_dimension_dict` output back."""
    if "choices" in values:
        return Choices(tuple(map(rule.normal, values["choices"])))
    if "subset_of" in values:
        return SubsetOf(tuple(values["subset_of"]))
    low, high, step = (rule.normal(values.get(key)) for key in ("low", "high", "step"))
    return Range(low, high, bool(values.get("log")), step, rule.kind == "integer")


def _component(values: Mapping[str, Any] | None) -> Component | None:
    return Component(values["name"], {k: v for k, v in values.items() if k != "name"}) if values else None


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
