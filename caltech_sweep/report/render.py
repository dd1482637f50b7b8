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

from caltech_sweep.report.grid import Cell, grid, note, one_line
from caltech_sweep.report.model import HEADINGS, Reference, Score, Table, TableRow

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


def markdown_table(table: Table) -> str:
    """Return one table as GitHub-flavoured Markdown with its heading and notes, its columns aligned in the text."""
    header, rows = grid(table)
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


def html_table(table: Table, anchor: str) -> str:
    """Return one table as an HTML section with an identifier: a heading, notes, the table and its footnotes."""
    header, rows = grid(table)
    lines = [f'<section class="study" id="{anchor}">', f"<h2>{html_text(table.title)}</h2>"]
    lines += [f'<p class="note">{html_text(text)}</p>' for text in table.notes]
    lines += ['<div class="scroll">', "<table>", f"<caption>{html_text(table.title)}</caption>", "<thead>", "<tr>"]
    lines += [f'<th scope="col">{html_text(text)}</th>' for text in header]
    lines += ["</tr>", "</thead>", "<tbody>"]
    for row, cells in zip(table.rows, rows, strict=True):
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


def latex_table(table: Table) -> str:
    """Return one table as a LaTeX table environment, as wide as the page."""
    header, rows = grid(table)
    align = "l" + "r" * (len(header) - 3) + "ll"
    lines = [r"% \usepackage{booktabs,graphicx,hyperref}", r"\begin{table}", r"\centering"]
    lines += [rf"\caption{{{latex_text(table.title)}}}", r"\resizebox{\textwidth}{!}{%"]
    lines += [rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
    lines += [" & ".join(map(latex_text, header)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(_latex_cell, row)) + r" \\" for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}}"]
    lines += [rf"\par\footnotesize {latex_text(text)}" for text in (*table.notes, *table.footnotes)]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


# -- formats for programs: figures to six decimals, every column always there ----------------------------------------


def _number(value: float | None) -> float | int | None:
    if value is None:
        return None
    return int(value) if float(value).is_integer() else round(value, 6)


def _fraction(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _flat_score(name: str, score: Score | None, reference: Reference | None) -> dict[str, Any]:
    return {
        f"{name}_low": _fraction(score.low) if score else None,
        f"{name}_high": _fraction(score.high) if score else None,
        f"{name}_deviation": _fraction(score.deviation) if score else None,
        f"{name}_difference": _fraction(reference.difference) if reference else None,
        f"{name}_inside": reference.inside if reference else None,
    }


def flat_row(row: TableRow) -> dict[str, Any]:
    """Return a row as plain values by column: the published columns in their order, the published figures, the rest."""
    return {
        "model": row.name,
        **{key: row.settings.get(key) for key in HEADINGS},
        "val_accuracy": _fraction(row.val.value) if row.val else None,
        "test_accuracy": _fraction(row.test.value) if row.test else None,
        "best_epoch": _number(row.best_epoch),
        "val_reference": _fraction(row.val_reference.value) if row.val_reference else None,
        "test_reference": _fraction(row.test_reference.value) if row.test_reference else None,
        "best_epoch_reference": row.best_epoch_reference,
        "state": row.state,
        "note": note(row) or None,
        "kind": row.kind,
        "detail": row.detail or None,
        "seeds": row.seeds,
        **_flat_score("val", row.val, row.val_reference),
        **_flat_score("test", row.test, row.test_reference),
        "standing": row.standing,
        "p_value": _fraction(row.p_value),
        "majority": row.majority,
        "tolerance": row.tolerance,
        "run_id": row.run_id,
        "url": row.url,
    }


def _goals(table: Table, row: TableRow) -> dict[str, Any]:
    """Return what decides, where that is something else than accuracy."""
    if not table.own_objective:
        return {}
    return {**_flat_score("objective_val", row.goal, None), **_flat_score("objective_test", row.goal_test, None)}


def to_csv(tables: Sequence[Table]) -> str:
    """Return every table's rows below one header, each line naming its study."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["study", *flat_row(TableRow("row", "", {}, "missing"))])
    for table in tables:
        writer.writerows([table.study, *map(_csv_value, flat_row(row).values())] for row in table.rows)
    return text.getvalue()


def _csv_value(value: Any) -> Any:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else value


def to_json(tables: Sequence[Table]) -> str:
    """Return the tables as a JSON list."""
    document = [
        {
            "study": table.study,
            "title": table.title,
            "columns": ["model", *table.columns, "val_accuracy", "test_accuracy", "best_epoch"],
            "images": dict(table.images),
            "overrides": dict(table.overrides),
            "notes": list(table.notes),
            **({"objective": table.objective.each_epoch} if table.own_objective else {}),
            "rows": [{**flat_row(row), **_goals(table, row)} for row in table.rows],
            "footnotes": list(table.footnotes),
        }
        for table in tables
    ]
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


RENDERERS: dict[str, Callable[[Sequence[Table]], str]] = {
    "markdown": lambda tables: "\n".join(map(markdown_table, tables)),
    "html": lambda tables: "\n".join(map(html_table, tables, anchors(tables))),
    "latex": lambda tables: "\n".join(map(latex_table, tables)),
    "csv": to_csv,
    "json": to_json,
}
