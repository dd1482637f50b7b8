"""One table as frozen, typed values: every format is rendered from these, and none computes anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from caltech_sweep.metrics import DEFAULT_OBJECTIVE, Objective, objective

Kind = Literal["row", "sampled"]
Standing = Literal["best", "tied", "worse", "better"]

# The published tables' own headings, by setting.
HEADINGS = {
    "lr": "LR",
    "test_batch_size": "BATCH SIZE TEST",
    "batch_size": "BATCH SIZE",
    "step_size": "STEP SIZE",
    "epochs": "EPOCHS",
}


@dataclass(frozen=True)
class Score:
    """An accuracy as a fraction, or its mean over seeds, with its 95% interval."""

    value: float
    low: float | None = None
    high: float | None = None
    deviation: float | None = None  # standard deviation over seeds; None for one training
    trainings: int | None = None  # that it is the mean of; None: as many as its row has seeds


@dataclass(frozen=True)
class Reference:
    """A published accuracy next to ours."""

    value: float
    difference: float | None = None  # ours minus the published one
    inside: bool | None = None  # whether the published one lies in our interval


@dataclass(frozen=True)
class Share:
    """How much of what all settings explain together one setting does, with its 95% range over resampled trials."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Importance:
    """The settings that mattered more than chance would have it, the largest share first, and those that did not."""

    shares: Mapping[str, Share]
    chance: tuple[str, ...]


@dataclass(frozen=True)
class TableRow:
    """One row: settings, scores, and how they compare."""

    kind: Kind
    name: str
    settings: Mapping[str, float | int | None]  # by the keys of HEADINGS, shown or not
    state: str  # an outcome of caltech_sweep.records, or running, or missing
    detail: str = ""  # what else sets a sampled trial apart
    reason: str = ""  # of a state other than complete
    remarks: tuple[str, ...] = ()
    seeds: int = 0  # trainings behind the scores
    val: Score | None = None
    test: Score | None = None
    goal: Score | None = None  # what decides, on validation; the same as ``val`` where that is accuracy
    goal_test: Score | None = None
    best_epoch: float | None = None  # the epoch that won on validation; a mean over seeds
    val_reference: Reference | None = None
    test_reference: Reference | None = None
    best_epoch_reference: int | None = None
    standing: Standing | None = None  # on the test set, against the table's best row
    p_value: float | None = None  # of the difference to the best row, corrected
    majority: bool = False  # no better than answering with the most frequent class
    tolerance: float | None = None  # of accuracies, for the check
    run_id: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class Table:
    """One study's table."""

    study: str
    title: str
    columns: tuple[str, ...]  # keys of HEADINGS, in the published order
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()  # above the table: images, subset, overrides
    footnotes: tuple[str, ...] = ()  # below: methods
    images: Mapping[str, int] = field(default_factory=dict)  # of each part, and the number of classes
    overrides: Mapping[str, object] = field(default_factory=dict)
    objective: Objective = objective(DEFAULT_OBJECTIVE)

    @property
    def own_objective(self) -> bool:
        """Tell whether something else than accuracy decides."""
        return self.objective.each_epoch != DEFAULT_OBJECTIVE

    @property
    def best(self) -> TableRow | None:
        """The row that is the best on validation, the first of equals."""
        scored = [row for row in self.rows if row.goal is not None]
        return min(scored, key=lambda row: self.objective.loss(row.goal.value), default=None)  # type: ignore[union-attr]

    @property
    def has_reference(self) -> bool:
        """Tell whether any row has a published figure."""
        return any(r.val_reference or r.test_reference or r.best_epoch_reference is not None for r in self.rows)
