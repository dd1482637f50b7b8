"""Every format from one table whose texts try to break it: whole strings, and what a reader of the format sees."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from caltech_sweep.report.build import render
from caltech_sweep.report.grid import grid, note, one_line
from caltech_sweep.report.model import Reference, Score, Table, TableRow
from caltech_sweep.report.render import latex_text, markdown_text

GOLDEN = Path(__file__).parent / "golden"
FORMATS = {"markdown": "md", "html": "html", "latex": "tex", "csv": "csv", "json": "json"}
SETTINGS = {"lr": 0.01, "test_batch_size": 32, "batch_size": 256, "step_size": 10, "epochs": 30}
STATES = ("missing", "running", "interrupted", "pruned", "diverged", "out_of_memory", "data_error", "crashed")
HOSTILE = [
    "a|b || c\\|d",
    "<script>alert(1)</script> & &amp; </td></table>",
    "_em_ __init__ fc_but_last *b* `code` ~~gone~~ $x_1$",
    "50% # {braces} \\input{x} \\\\ ^ ~ $",
    "quotes \" ' `` '' -- --- ,, ?` « »",
    "two\nlines\r\n\tand a tab",
    "[link](javascript:alert(1)) ![x](y) [1]: z",
    "[0.5em] starts like an argument",
    "*starts like a star",
    "=SUM(A1) °±–é 猫",
]


def hostile_table() -> Table:
    """A table with each text as a name, a reason or a remark, and every kind of figure."""
    score, mean = Score(0.87144, 0.858731, 0.883128), Score(0.5, 0.4, 0.6, 0.01)
    rows = [
        TableRow(
            "row" if index % 2 else "sampled",
            text,
            SETTINGS,
            "complete",
            remarks=(text,),
            seeds=3 if index == 1 else 1,
            scores={"val/accuracy": mean if index == 1 else score, "test/accuracy": score},
            best_epoch=27.333333 if index == 1 else 29.0,
            val_reference=Reference(0.871, 0.00044, True) if index == 2 else None,
            test_reference=Reference(0.95, -0.07856, False) if index == 2 else None,
            best_epoch_reference=28 if index == 2 else None,
            standing="best" if index == 3 else "tied" if index == 4 else "better" if index == 5 else "worse",
            p_value=1.0 if index == 4 else 0.0001,
            majority=index == 6,
            run_id=f"{index:032x}",
            url=f"https://host/?a=1&b=%20_#/runs/{index}" if index else None,
        )
        for index, text in enumerate(HOSTILE)
    ]
    rows += [TableRow("row", state, {"lr": None, "epochs": 30}, state, reason="a | reason") for state in STATES]
    title = "T | <b>&amp;_%\"'\n\\end{table}</section>"
    return Table("study/1", title, tuple(SETTINGS), tuple(rows), tuple(HOSTILE), tuple(HOSTILE), {"test": 9}, {"lr": 1})


def plain_table() -> Table:
    """A second table, without references and without rows."""
    return Table("empty", "Nothing yet", ("lr", "step_size", "epochs"), ())


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_texts(kind: str) -> None:
    text = render([hostile_table(), plain_table()], kind)
    path = GOLDEN / f"hostile.{FORMATS[kind]}"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_bytes(text.encode())
    assert path.is_file(), f"{path} is missing; make it with UPDATE_GOLDEN=1 and read it before committing"
    assert text.encode() == path.read_bytes()


def expected_cells() -> list[list[str]]:
    header, rows = grid(hostile_table())
    return [header, *([cell.text for cell in row] for row in rows)]


class _Reader(HTMLParser):
    """Collects the text of every cell, paragraph and heading of a page, and every tag and link."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str | None] = []
        self._open: list[str] | None = None  # the list whose last text is being read

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag == "a":
            self.links.append(dict(attrs)["href"])
        elif tag in ("td", "th", "p", "h2", "caption"):
            self._open = self.rows[-1] if tag in ("td", "th") else self.texts
            self._open.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag != "a":
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self._open[-1] += data


def read_html(text: str) -> _Reader:
    reader = _Reader()
    reader.feed(text)
    return reader


def test_html_shows_every_text_and_runs_none() -> None:
    table = hostile_table()
    reader = read_html(render([table], "html"))
    assert reader.rows == expected_cells()
    assert reader.tags == {*["section", "h2", "p", "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "a"]}
    notes = [one_line(text) for text in HOSTILE]
    assert reader.texts == [one_line(table.title), *notes, one_line(table.title), *notes]
    assert reader.links == [row.url for row in table.rows if row.url]


def test_markdown_shows_every_text_and_makes_no_markup_of_it() -> None:
    table = hostile_table()
    page = (
        MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(render([table], "markdown"))
    )
    reader = read_html(page)
    assert reader.rows == expected_cells()
    assert reader.tags == {*["h2", "p", "table", "thead", "tbody", "tr", "th", "td", "a"]}
    notes = [one_line(text) for text in HOSTILE]
    assert reader.texts == [one_line(table.title), *notes, *notes]


def test_markdown_leaves_what_needs_no_escape() -> None:
    assert markdown_text("images_per_class [0.1, 0.2] (fc_but_last)") == "images_per_class [0.1, 0.2] (fc_but_last)"


def test_latex_leaves_no_special_character_bare() -> None:
    text = render([hostile_table()], "latex")
    # What remains once every escape that the renderer writes is taken away must be free of special characters.
    for row in HOSTILE:
        rest = re.sub(r"\\text\w+\{\}|\\[{}$&#%_]|\{\\char34\}|\$\\pm\$|\{\}", "", latex_text(row))
        assert not re.search(r'[\\{}$&#%_~^<>|`"]', rest), rest
        assert not re.search(r"--|,,|''", rest.replace("--é", "")) or "{}" in latex_text(row)
    assert latex_text("[x] *").startswith("{}[x]") and latex_text("* [x]").startswith("{}*")
    assert text.count(r"\end{table}") == text.count(r"\begin{table}") == 1
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    columns = len(expected_cells()[0])
    lines = body.splitlines()[1:]
    assert len(lines) == len(hostile_table().rows)
    assert {len(re.findall(r"(?<!\\)&", re.sub(r"\\href\{.*?\}\{", "{", line))) for line in lines} == {columns - 1}


def test_csv_and_json_give_names_back_exactly() -> None:
    table = hostile_table()
    lines = list(csv.DictReader(io.StringIO(render([table], "csv"))))
    assert [line["model"] for line in lines] == [row.name for row in table.rows]
    assert [line["note"] for line in lines] == [note(row) for row in table.rows]
    assert (lines[2]["val_reference"], lines[2]["test_difference"], lines[2]["test_inside"]) == (
        "0.871",
        "-0.07856",
        "false",
    )
    (document,) = json.loads(render([table], "json"))
    assert document["title"] == table.title
    assert [row["model"] for row in document["rows"]] == [row.name for row in table.rows]
    assert document["rows"][1]["best_epoch"] == 27.333333
    assert document["rows"][2]["val_accuracy"] == 0.87144


def test_figures_are_those_of_the_report() -> None:
    header, rows = grid(hostile_table())
    assert header[:9] == [
        "Model",
        "LR",
        "BATCH SIZE TEST",
        "BATCH SIZE",
        "STEP SIZE",
        "EPOCHS",
        "Accuracy on Validation Set",
        "Accuracy on Test Set",
        "Number of Epochs",
    ]
    assert [cell.text for cell in rows[2][6:12]] == [
        "0.871 [0.859, 0.883]",
        "0.871 [0.859, 0.883]",
        "29",
        "0.871 (+0.000, inside)",
        "0.950 (-0.079, outside)",
        "28",
    ]
    assert [cell.text for cell in rows[1][6:9]] == [
        "0.500 ± 0.010 [0.400, 0.600] (n = 3)",
        "0.871 [0.859, 0.883] (n = 3)",
        "27.3",
    ]
    assert rows[4][12].text.startswith("tied with the best (p = 1.000)")
    assert rows[5][12].text.startswith("better than the best on test (p < 0.001)")
    assert [row[12].text for row in rows[10:]] == [
        "missing: a | reason",
        "running: a | reason",
        "interrupted: a | reason",
        "pruned: a | reason",
        "failed (diverged): a | reason",
        "failed (out of memory): a | reason",
        "failed (data error): a | reason",
        "failed (crashed): a | reason",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report", "hostile"])
def test_latex_takes_the_tables(name: str, tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("needs LaTeX: apt-get install texlive-latex-recommended")
    tables = (GOLDEN / f"{name}.tex").read_text(encoding="utf-8")
    packages = r"\usepackage[T1]{fontenc}\usepackage{booktabs,graphicx,hyperref}"
    body = tables.replace("猫", "")  # pdfLaTeX has no fonts for it; LuaLaTeX does
    (tmp_path / "t.tex").write_text(rf"\documentclass{{article}}{packages}\begin{{document}}{body}\end{{document}}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0 and (tmp_path / "t.pdf").stat().st_size > 10_000, done.stdout[-2000:]
