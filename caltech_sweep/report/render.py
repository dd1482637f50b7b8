"""Tables as text: Markdown, HTML, LaTeX, CSV and JSON from one typed model, each escaping what is special to it."""

from __future__ import annotations

import csv
import html
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from caltech_sweep.config import TRIAL_RULES
from caltech_sweep.report.grid import Cell, grid, note, one_line
from caltech_sweep.report.model import HEADINGS, TEST, VAL, Reference, Score, Table, TableRow
from caltech_sweep.rules import as_text

# -- Markdown --------------------------------------------------------------------------------------------------------


# What CommonMark and GitHub's tables give a meaning to; a bracket has one only before a parenthesis, and an underscore
# only next to something that is no letter or digit.
_MARKDOWN = re.compile(r"[\\`*|~$#]|\](?=\()|(?<![^\W_])_|_(?![^\W_])")


def markdown_text(text: str) -> str:
    """Escape text for Markdown, in a table's cell or outside of one."""
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\g<0>", text)


def _markdown_cell(cell: Cell) -> str:
    text = markdown_text(cell.text)
    return f"[{text}]({cell.url})" if cell.url else text


def markdown_table(table: Table, everything: bool = False) -> str:
    """Return one table as GitHub-flavoured Markdown with its heading and notes, its columns aligned in the text."""
    header, rows = grid(table, everything)
    lines = [[markdown_text(text) for text in header], *([_markdown_cell(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    parts = [f"## {markdown_text(table.title)}", *map(markdown_text, table.notes)]
    parts.append("\n".join(_markdown_row(line, widths) for line in lines))
    parts += map(markdown_text, table.footnotes)
    return "\n\n".join(parts) + "\n"


def _markdown_row(cells: Iterable[str], widths: Iterable[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


# -- HTML ------------------------------------------------------------------------------------------------------------


def html_text(text: str) -> str:
    """Escape text for HTML, in an element or in a quoted attribute."""
    return html.escape(one_line(text), quote=True)


def _html_cell(cell: Cell, first: bool) -> str:
    text = html_text(cell.text)
    if cell.url:
        text = f'<a href="{html_text(cell.url)}">{text}</a>'
    return f'<th scope="row">{text}</th>' if first else f"<td>{text}</td>"


def anchors(tables: Sequence[Table]) -> list[str]:
    """Return an identifier for each table, made from its study's name; no two are equal."""
    found: list[str] = []
    for table in tables:
        plain = "study-" + re.sub(r"[^A-Za-z0-9_-]+", "-", table.study)
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        found.append(next(name for name in itertools.chain([plain], numbered) if name not in found))
    return found


def html_table(table: Table, anchor: str, everything: bool = False) -> str:
    """Return one table as an HTML section with an identifier: a heading, notes, the table and its footnotes."""
    header, rows = grid(table, everything)
    lines = [f'<section class="study" id="{anchor}">', f"<h2>{html_text(table.title)}</h2>"]
    lines += [f'<p class="note">{html_text(text)}</p>' for text in table.notes]
    lines += ['<div class="scroll">', "<table>", f"<caption>{html_text(table.title)}</caption>", "<thead>", "<tr>"]
    lines += [f'<th scope="col">{html_text(text)}</th>' for text in header]
    lines += ["</tr>", "</thead>", "<tbody>"]
    shown = (*table.rows, *((table.others or ()) if everything else ()))
    for row, cells in zip(shown, rows, strict=True):
        best = " best" if row.standing == "best" else ""
        lines.append(f'<tr class="{row.kind}{best}">')
        lines += [_html_cell(cell, index == 0) for index, cell in enumerate(cells)]
        lines.append("</tr>")
    lines += ["</tbody>", "</table>", "</div>"]
    lines += [f'<p class="footnote">{html_text(text)}</p>' for text in table.footnotes]
    return "\n".join([*lines, "</section>"]) + "\n"


# -- LaTeX -----------------------------------------------------------------------------------------------------------

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    '"': r"{\char34}",  # a shorthand's start in several languages
    "±": r"$\pm$",
    "°": r"\textdegree{}",
    "–": "--",
}
_LATEX_PATTERN = re.compile("|".join(map(re.escape, _LATEX)))


def latex_text(text: str) -> str:
    """Escape text for LaTeX's text mode, with its ligatures broken, so that it shows as it is."""
    text = one_line(text)
    text = re.sub(r"([-,'])(?=\1)", "\\1\0", text)
    text = _LATEX_PATTERN.sub(lambda match: _LATEX[match[0]], text).replace("\0", "{}")
    return f"{{}}{text}" if text.startswith(("[", "*")) else text  # they would be arguments of the row's end before


def _latex_cell(cell: Cell) -> str:
    if not cell.url:
        return latex_text(cell.text)
    address = re.sub(r"([\\%#{}&])", r"\\\1", cell.url)
    return rf"\href{{{address}}}{{{latex_text(cell.text)}}}"


def latex_table(table: Table, everything: bool = False) -> str:
    """Return one table as a LaTeX table environment, as wide as the page."""
    header, rows = grid(table, everything)
    align = "l" + "r" * (len(header) - 3) + "ll"
    lines = [r"% \usepackage{booktabs,graphicx,hyperref}", r"\begin{table}", r"\centering"]
    lines += [rf"\caption{{{latex_text(table.title)}}}", r"\resizebox{\textwidth}{!}{%"]
    lines += [rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
    lines += [" & ".join(map(latex_text, header)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(_latex_cell, row)) + r" \\" for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}}"]
    lines += [rf"\par\footnotesize {latex_text(text)}" for text in (*table.notes, *table.footnotes)]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


# -- formats for programs: figures to six decimals, settings as they are ----------------------------------------


def _number(value: float | None) -> float | int | None:
    if value is None:
        return None
    return int(value) if float(value).is_integer() else round(value, 6)


def _fraction(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _field(measure: str) -> str:
    """Return the name of a measure's field: val_accuracy of val/accuracy."""
    return measure.replace("/", "_")


def _range(name: str, score: Score | None) -> dict[str, Any]:
    return {
        f"{name}_low": _fraction(score.low) if score else None,
        f"{name}_high": _fraction(score.high) if score else None,
        f"{name}_deviation": _fraction(score.deviation) if score else None,
    }


def _distance(part: str, reference: Reference | None) -> dict[str, Any]:
    return {
        f"{part}_difference": _fraction(reference.difference) if reference else None,
        f"{part}_inside": reference.inside if reference else None,
    }


def _fields(tables: Sequence[Table]) -> tuple[list[str], list[str], list[str]]:
    """Return the settings, the measures and the parts of the data that the rows of some tables have fields of."""
    parts = ["val", *(["test"] if any(table.tested for table in tables) else [])]
    named = {key for table in tables for key in (*table.columns, *table.varied)}
    usual = [key for key in HEADINGS if "test" in parts or key in named or not key.startswith("test")]
    settings = [*usual, *(key for key in TRIAL_RULES if key in named and key not in usual)]
    asked = (name for table in tables for name in (*table.measures, table.objective.each_epoch))
    return settings, list(dict.fromkeys([*(f"{part}/accuracy" for part in parts), *asked])), parts


def flat_row(row: TableRow, settings: Sequence[str], measures: Sequence[str], parts: Sequence[str]) -> dict[str, Any]:
    """Return a row as plain values by field: settings, scores, the published figures, the rest."""
    values = {name: _fraction(score.value) if (score := row.scores.get(name)) else None for name in measures}
    references = {"val": row.val_reference, "test": row.test_reference}
    more = [name for name in measures if name not in (VAL, TEST)]
    flat = {
        "model": row.name,
        **{key: row.settings.get(key) for key in settings},
        **{_field(name): value for name, value in values.items() if name not in more},
        "best_epoch": _number(row.best_epoch),
        **{f"{part}_reference": _fraction(r.value) if (r := references[part]) else None for part in parts},
        "best_epoch_reference": row.best_epoch_reference,
        "state": row.state,
        "note": note(row) or None,
        "kind": row.kind,
        "seeds": row.seeds,
        "epochs_trained": row.epochs,
        "seconds": _number(row.seconds),
    }
    for part in parts:
        flat |= {**_range(part, row.scores.get(f"{part}/accuracy")), **_distance(part, references[part])}
    for name in more:
        flat |= {_field(name): values[name], **_range(_field(name), row.scores.get(name))}
    return {
        **flat,
        "standing": row.standing,
        "p_value": _fraction(row.p_value),
        "majority": row.majority,
        "tolerance": row.tolerance,
        "run_id": row.run_id,
        "url": row.url,
    }


def _flat_rows(table: Table, fields: tuple[list[str], list[str], list[str]]) -> list[dict[str, Any]]:
    return [flat_row(row, *fields) for row in (*table.rows, *(table.others or ()))]


def to_csv(tables: Sequence[Table]) -> str:
    """Return every table's rows and further trials below one header, each line naming its study."""
    text, fields = io.StringIO(), _fields(tables)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["study", *flat_row(TableRow("row", "", {}, "missing"), *fields)])
    for table in tables:
        writer.writerows([table.study, *map(_csv_value, row.values())] for row in _flat_rows(table, fields))
    return text.getvalue()


def _csv_value(value: Any) -> Any:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else as_text(value) if isinstance(value, tuple) else value


def to_json(tables: Sequence[Table]) -> str:
    """Return the tables, with their further trials, as a JSON list."""
    document = [
        {
            "study": table.study,
            "title": table.title,
            "columns": ["model", *table.columns, *map(_field, table.measures), "best_epoch"],
            "images": {name: count for name, count in table.images.items() if count},
            "overrides": dict(table.overrides),
            "settings": dict(table.constant),
            "notes": list(table.notes),
            **({"objective": table.objective.each_epoch} if table.own_objective else {}),
            "rows": _flat_rows(table, _fields([table])),
            "footnotes": list(table.footnotes),
        }
        for table in tables
    ]
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


RENDERERS: dict[str, Callable[[Sequence[Table], bool], str]] = {
    "markdown": lambda tables, everything: "\n".join(markdown_table(table, everything) for table in tables),
    "html": lambda tables, everything: "\n".join(
        html_table(table, anchor, everything) for table, anchor in zip(tables, anchors(tables), strict=True)
    ),
    "latex": lambda tables, everything: "\n".join(latex_table(table, everything) for table in tables),
    "csv": lambda tables, everything: to_csv(tables),
    "json": lambda tables, everything: to_json(tables),
}
