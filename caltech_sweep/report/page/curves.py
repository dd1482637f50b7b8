"""Learning curves of a study's trials, and the settings by which they can be told apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from caltech_sweep.metrics import TRAIN_ACCURACY, TRAIN_LOSS, VAL_ACCURACY, VAL_LOSS
from caltech_sweep.report.entries import row_entries
from caltech_sweep.report.grid import one_line
from caltech_sweep.tracking.history import Curve, Histories
from caltech_sweep.tracking.reader import StoredStudy
from caltech_sweep.tracking.records import TrialRecord

METRICS = {
    VAL_ACCURACY: "Validation accuracy",
    TRAIN_ACCURACY: "Train accuracy",
    VAL_LOSS: "Validation loss",
    TRAIN_LOSS: "Train loss",
}
SETTINGS = {
    "lr": "Learning rate",
    "step_size": "Step size",
    "freeze": "Freezing",
    "augment": "Augmentation",
    "arch": "Network",
}
SAMPLED = "sampled trials"
OTHERS = "others"
STYLES = 12  # line styles of the page; the last of them is for what is left over
MOST = 40  # lines of one chart
_RANGES = 5  # that many distinct numbers are shown one by one, more in as many ranges


@dataclass(frozen=True)
class Line:
    """One trial's curves: its name, its settings as text, and each metric by epoch."""

    name: str
    kind: str  # row | sampled
    study: str
    outcome: str
    settings: Mapping[str, str]
    metrics: Mapping[str, Curve] = field(default_factory=dict)


@dataclass(frozen=True)
class Grouping:
    """A way to colour lines: a name for each group, and each line's group."""

    key: str
    label: str
    groups: tuple[str, ...]
    member: tuple[int, ...]

    def style(self, line: int) -> str:
        """Return the style class of a line; sampled trials are drawn in the background, what is left over last."""
        return self.styles[self.member[line]]

    @property
    def styles(self) -> tuple[str, ...]:
        """Return the style class of each group."""
        return tuple("cs" if name in (SAMPLED, OTHERS) else f"c{index}" for index, name in enumerate(self.groups))


def _drawable(study: StoredStudy) -> list[tuple[str, str, TrialRecord]]:
    chosen = [(entry.name, "row", entry.shown) for entry in row_entries(study) if entry.shown is not None]
    return chosen + [(trial.name, "sampled", trial) for trial in best_sampled(study)]


def drawn(study: StoredStudy) -> list[tuple[str, str, TrialRecord]]:
    """Return (name, kind, run) of what a study's charts draw: its rows, then its best sampled trials."""
    return _drawable(study)[:MOST]


def left_out(study: StoredStudy) -> int:
    """Return how many rows and sampled trials a study's charts have no room for."""
    return max(0, len(_drawable(study)) - MOST)


def sampled(study: StoredStudy) -> list[TrialRecord]:
    """Return the run of each sampled trial, by number: a complete one before any other, then the latest."""
    by_number: dict[int, TrialRecord] = {}
    for trial in study.trials:
        if trial.row is None and not {"confirms", "fold_of"} & trial.tags.keys():
            known = by_number.get(trial.number)
            if known is None or known.state != "complete" or trial.state == "complete":
                by_number[trial.number] = trial
    return [by_number[number] for number in sorted(by_number)]


def best_sampled(study: StoredStudy) -> list[TrialRecord]:
    """Return the sampled trials, those first that are complete and the best on validation."""
    return sorted(sampled(study), key=lambda trial: (trial.state != "complete", trial.rank))


def lines(study: StoredStudy, histories: Histories) -> list[Line]:
    """Return the curves of the trials that have any."""
    return [
        Line(one_line(name), kind, study.record.name, run.state, run.params, histories[run.run_id])
        for name, kind, run in drawn(study)
        if histories.get(run.run_id)
    ]


# -- groupings ---------------------------------------------------------------------------------------------------------


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _ranges(values: Iterable[str]) -> Callable[[str], str]:
    """Return the label of a numeric setting: the number, or one of a few ranges that hold as many numbers each."""
    distinct = sorted({float(value) for value in values})
    if len(distinct) <= _RANGES:
        return lambda value: f"{float(value):.3g}"
    labels: dict[float, str] = {}
    for index in range(_RANGES):
        part = distinct[len(distinct) * index // _RANGES : len(distinct) * (index + 1) // _RANGES]
        ends = dict.fromkeys(f"{end:.3g}" for end in (part[0], part[-1]))
        labels.update(dict.fromkeys(part, " to ".join(ends)))
    return lambda value: labels[float(value)]


def _grouping(key: str, label: str, values: Sequence[str]) -> Grouping | None:
    """Return the grouping of lines by the values of a setting, or None when they do not differ."""
    numbers = [_number(value) for value in values]
    if all(number is not None for number in numbers):
        order = sorted(values, key=float)
        name = _ranges(values)
        names = [name(value) for value in values]
        groups = list(dict.fromkeys(map(name, order)))
    else:
        names, groups = list(values), list(dict.fromkeys(values))
    if len(groups) < 2:
        return None
    if len(groups) > STYLES:
        kept = [group for group in groups if group != SAMPLED][: STYLES - 1]
        names = [name if name in kept or name == SAMPLED else OTHERS for name in names]
        groups = list(dict.fromkeys([*kept, *names]))
    return Grouping(key, label, tuple(groups), tuple(groups.index(name) for name in names))


def groupings(drawn_lines: Sequence[Line], across: bool = False, varied: Iterable[str] = ()) -> list[Grouping]:
    """Return every way in which lines differ; there is always the first, by row or, ``across`` studies, by study.

    The others are by the usual settings and those that the study has ``varied``.
    """
    names = [line.name if line.kind == "row" or across else SAMPLED for line in drawn_lines]
    key, label = ("study", "Study") if across else ("row", "Row")
    first = _grouping(key, label, names) or Grouping(key, label, tuple(dict.fromkeys(names)), (0,) * len(names))
    found = [first]
    for key in dict.fromkeys((*SETTINGS, *varied)):
        label = SETTINGS.get(key) or key.replace("_", " ").capitalize()
        values = [line.settings.get(key, "unknown") for line in drawn_lines]
        grouping = _grouping(key, label, [value.replace("+", " + ") for value in values])
        found += [grouping] if grouping else []
    return found
