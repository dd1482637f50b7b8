"""One table as frozen, typed values: every format is rendered from these, and none computes anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from caltech_sweep.metrics import DEFAULT_OBJECTIVE, Objective, logged, objective

Kind = Literal["row", "sampled"]
Standing = Literal["best", "tied", "worse", "better"]

# The published tables' own headings, by setting; the others have their names.
HEADINGS = {
    "lr": "LR",
    "test_batch_size": "BATCH SIZE TEST",
    "batch_size": "BATCH SIZE",
    "step_size": "STEP SIZE",
    "epochs": "EPOCHS",
}
VAL, TEST = logged("val", "accuracy"), logged("test", "accuracy")


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
    settings: Mapping[str, Any]  # by name, whether they have a column or not
    state: str  # an outcome of caltech_sweep.records, or running, or missing
    reason: str = ""  # of a state other than complete
    remarks: tuple[str, ...] = ()
    seeds: int = 0  # trainings behind the scores
    scores: Mapping[str, Score] = field(default_factory=dict)  # by measure, such as "val/accuracy"
    best_epoch: float | None = None  # the epoch that won on validation; a mean over seeds
    epochs: int | None = None  # that were trained for it
    seconds: float | None = None  # that it ran
    val_reference: Reference | None = None
    test_reference: Reference | None = None
    best_epoch_reference: int | None = None
    standing: Standing | None = None  # on the test set, against the table's best row
    p_value: float | None = None  # of the difference to the best row, corrected
    majority: bool = False  # no better than answering with the most frequent class
    tolerance: float | None = None  # of accuracies, for the check
    run_id: str | None = None
    url: str | None = None

    @property
    def val(self) -> Score | None:
        """The accuracy on the validation images."""
        return self.scores.get(VAL)

    @property
    def test(self) -> Score | None:
        """The accuracy on the test images."""
        return self.scores.get(TEST)


@dataclass(frozen=True)
class Table:
    """One study's table. Its ``rows`` are held against each other; ``others`` are all further trials, where asked."""

    study: str
    title: str
    columns: tuple[str, ...]  # settings, in the order of their columns
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()  # above the table: images, subset, overrides, what is the same in all rows
    footnotes: tuple[str, ...] = ()  # below: methods
    images: Mapping[str, int] = field(default_factory=dict)  # of each part, and the number of classes
    overrides: Mapping[str, Any] = field(default_factory=dict)
    objective: Objective = objective(DEFAULT_OBJECTIVE)
    measures: tuple[str, ...] = (VAL, TEST)  # that have a column
    varied: tuple[str, ...] = ()  # settings of which rows or sampled trials have different values
    constant: Mapping[str, Any] = field(default_factory=dict)  # settings that all rows have in common
    others: tuple[TableRow, ...] | None = None

    @property
    def tested(self) -> bool:
        """Whether the dataset has test images."""
        return self.images.get("test") != 0

    @property
    def judged(self) -> str:
        """What the images are called by which rows are judged: test, or validation where there are none."""
        return "test" if self.tested else "validation"

    @property
    def own_objective(self) -> bool:
        """Tell whether something else than accuracy decides."""
        return self.objective.each_epoch != DEFAULT_OBJECTIVE

    def goal(self, row: TableRow) -> Score | None:
        """Return what decides, on validation."""
        return row.scores.get(self.objective.each_epoch)

    @property
    def best(self) -> TableRow | None:
        """The row that is the best on validation, the first of equals."""
        scored = [(self.objective.loss(goal.value), row) for row in self.rows if (goal := self.goal(row))]
        return min(scored, key=lambda found: found[0])[1] if scored else None

    @property
    def has_reference(self) -> bool:
        """Tell whether any row has a published figure."""
        return any(r.val_reference or r.test_reference or r.best_epoch_reference is not None for r in self.rows)

    @property
    def best_epoch_heading(self) -> str:
        """What the epoch that won on validation is called; published tables call it the number of epochs."""
        published = any(row.best_epoch_reference is not None for row in self.rows)
        return "Number of Epochs" if published else "Best Epoch"
