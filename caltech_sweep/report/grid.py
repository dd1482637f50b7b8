"""The words and figures of a table's cells, the same in every format that is meant for reading."""

from __future__ import annotations

from dataclasses import dataclass

from caltech_sweep.report.model import HEADINGS, Reference, Score, Table, TableRow

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


def _setting(value: float | int | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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


def note(row: TableRow) -> str:
    """Return what there is to say of a row besides its figures."""
    if row.state != "complete":
        text = _STATES.get(row.state, row.state)
        return f"{text}: {row.reason}" if row.reason else text
    words = {
        "best": "best",
        "tied": f"tied with the best ({_p_value(row.p_value)})",
        "better": f"better than the best on test ({_p_value(row.p_value)})",
    }
    notes = [words[row.standing]] if row.standing in words else []
    if row.majority:
        notes.append("no better than the majority class")
    return "; ".join([*notes, *row.remarks])


def grid(table: Table) -> tuple[list[str], list[list[Cell]]]:
    """Return a table's headings and cells in the published order, then what the report adds."""
    header = ["Model", *(HEADINGS[key] for key in table.columns)]
    tested = table.images.get("test") != 0
    header += ["Accuracy on Validation Set", *(["Accuracy on Test Set"] if tested else [])]
    if table.own_objective:
        name = table.objective.label[:1].upper() + table.objective.label[1:]
        header += [f"{name} on Validation Set", *([f"{name} on Test Set"] if tested else [])]
    header += ["Number of Epochs"]
    if table.has_reference:
        header += ["Reference: Validation Set", "Reference: Test Set", "Reference: Number of Epochs"]
    header += ["Note", "Run"]
    rows = []
    for row in table.rows:
        texts = [f"{row.name} ({row.detail})" if row.detail else row.name]
        texts += [_setting(row.settings.get(key)) for key in table.columns]
        texts += [_score(row.val, row.seeds), *([_score(row.test, row.seeds)] if tested else [])]
        if table.own_objective:
            texts += [_score(row.goal, row.seeds), *([_score(row.goal_test, row.seeds)] if tested else [])]
        texts.append(_epoch(row.best_epoch))
        if table.has_reference:
            texts += [_reference(row.val_reference), _reference(row.test_reference), _epoch(row.best_epoch_reference)]
        texts.append(note(row))
        cells = [Cell(one_line(text)) for text in texts]
        rows.append([*cells, Cell(row.run_id[:8] if row.run_id else NOTHING, row.url)])
    return header, rows
