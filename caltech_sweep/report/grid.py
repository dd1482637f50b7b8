"""The words and figures of a table's cells, the same in every format that is meant for reading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from caltech_sweep.metrics import label_of
from caltech_sweep.report.model import HEADINGS, Reference, Score, Table, TableRow
from caltech_sweep.rules import as_text
from caltech_sweep.text import duration

NOTHING = "–"
_STATES = {
    "diverged": "failed (diverged)",
    "out_of_memory": "failed (out of memory)",
    "data_error": "failed (data error)",
    "crashed": "failed (crashed)",
}


@dataclass(frozen=True)
class Cell:
    """Text to show, not yet escaped, and where it leads."""

    text: str
    url: str | None = None


def one_line(text: str) -> str:
    """Return text on one line, since a line break would end a table's row in most formats."""
    return " ".join(text.split())


def setting_text(value: Any) -> str:
    """Return a setting as a person reads it: four digits of a number, + between the names of a list."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).lower() if isinstance(value, bool) else as_text(value)


def heading(setting: str) -> str:
    """Return the heading of a setting's column."""
    return HEADINGS.get(setting) or setting.replace("_", " ").upper()


def _measure(name: str) -> str:
    """Return the heading of a measure's column."""
    part, _, measure = name.partition("/")
    label = label_of(measure)
    return f"{label[:1].upper()}{label[1:]} on {'Validation' if part == 'val' else 'Test'} Set"


def _score(score: Score | None, seeds: int) -> str:
    if score is None:
        return NOTHING
    text = f"{score.value:.3f}"
    if score.deviation is not None:
        text += f" ± {score.deviation:.3f}"
    if score.low is not None and score.high is not None:
        text += f" [{score.low:.3f}, {score.high:.3f}]"
    trainings = seeds if score.trainings is None else score.trainings
    return text + (f" (n = {trainings})" if trainings > 1 else "")


def _reference(reference: Reference | None) -> str:
    if reference is None:
        return NOTHING
    parts = []
    if reference.difference is not None:
        # Adding zero keeps a difference that rounds to nothing from showing as -0.000.
        parts.append(f"{round(reference.difference, 3) + 0.0:+.3f}")
    if reference.inside is not None:
        parts.append("inside" if reference.inside else "outside")
    return f"{reference.value:.3f}" + (f" ({', '.join(parts)})" if parts else "")


def _epoch(epoch: float | None) -> str:
    if epoch is None:
        return NOTHING
    return str(int(epoch)) if float(epoch).is_integer() else f"{epoch:.1f}"


def _p_value(value: float | None) -> str:
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def outcome(row: TableRow) -> str:
    """Return how a row ended."""
    return _STATES.get(row.state, row.state)


def note(row: TableRow, told: bool = False) -> str:
    """Return what there is to say of a row besides its figures, and besides its outcome where that is ``told``."""
    words = {
        "best": "best",
        "tied": f"tied with the best ({_p_value(row.p_value)})",
        "better": f"better than the best on test ({_p_value(row.p_value)})",
    }
    notes = [words[row.standing]] if row.standing in words else []
    if row.state != "complete":
        state = [] if told else [outcome(row)]
        notes.append(": ".join([*state, *([row.reason] if row.reason else [])]))
    if row.majority:
        notes.append("no better than the majority class")
    return "; ".join(filter(None, [*notes, *row.remarks]))


def grid(table: Table, everything: bool = False) -> tuple[list[str], list[list[Cell]]]:
    """Return a table's headings and cells in the published order, then what the report adds.

    With ``everything``, it has the table's other trials too, and what each trial took and how it ended.
    """
    header = ["Model", *map(heading, table.columns), *map(_measure, table.measures), table.best_epoch_heading]
    header += ["Epochs Trained", "Time", "Outcome"] if everything else []
    if table.has_reference:
        header += ["Reference: Validation Set", *(["Reference: Test Set"] if table.tested else [])]
        header += [f"Reference: {table.best_epoch_heading}"]
    header += ["Note", "Run"]
    rows = []
    for row in (*table.rows, *((table.others or ()) if everything else ())):
        texts = [row.name, *(NOTHING if (v := row.settings.get(k)) is None else setting_text(v) for k in table.columns)]
        texts += [_score(row.scores.get(measure), row.seeds) for measure in table.measures]
        texts.append(_epoch(row.best_epoch))
        if everything:
            texts += [NOTHING if row.epochs is None else str(row.epochs)]
            texts += [NOTHING if row.seconds is None else duration(row.seconds), outcome(row)]
        if table.has_reference:
            texts += [_reference(row.val_reference), *([_reference(row.test_reference)] if table.tested else [])]
            texts += [_epoch(row.best_epoch_reference)]
        texts.append(note(row, told=everything))
        cells = [Cell(one_line(text)) for text in texts]
        rows.append([*cells, Cell(row.run_id[:8] if row.run_id else NOTHING, row.url)])
    return header, rows
