"""Tables for a terminal: as wide as it is, in several parts where the columns do not fit side by side."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Drawing
from rich.text import Text

from caltech_sweep.report.grid import NOTHING, grid, one_line
from caltech_sweep.report.model import Table

_GAP = 2  # cells between two columns: padding, and a line that is blank
_LONGEST = 24  # cells of a word that a column is made wide enough for


def _widest(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _parts(narrowest: Sequence[int], width: int) -> Iterator[list[int]]:
    """Yield the columns of each part; every part has the first one, and is no wider than ``width`` where it can be."""
    part, used = [0], narrowest[0]
    for column in range(1, len(narrowest)):
        wanted = narrowest[column] + _GAP
        if used + wanted > width and len(part) > 1:
            yield part
            part, used = [0], narrowest[0]
        part.append(column)
        used += wanted
    yield part


def _widths(part: Sequence[int], narrowest: Sequence[int], widest: Sequence[int], width: int) -> list[int]:
    """Return how wide each column of a part is: as its longest word, and what is left goes to those with more."""
    widths = [narrowest[column] for column in part]
    spare = width - sum(widths) - _GAP * (len(part) - 1)
    while spare > 0 and (short := [i for i, column in enumerate(part) if widths[i] < widest[column]]):
        for i in short[:spare]:
            widths[i] += 1
        spare -= min(spare, len(short))
    return widths


def terminal_table(table: Table, width: int, everything: bool = False) -> str:
    """Return one table as lines of at most ``width`` cells; a column that says nothing of any row is left out."""
    header, rows = grid(table, everything)
    lines = [header, *([cell.text for cell in row] for row in rows)]
    told = [i for i in range(len(header)) if i == 0 or any(line[i] not in ("", NOTHING) for line in lines[1:])]
    lines = [[line[i] for i in told] for line in lines]
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False, no_color=True, force_terminal=False)
    console.print(Text(one_line(table.title)), *map(Text, map(one_line, table.notes)), sep="\n")
    columns = list(zip(*lines, strict=True))
    widest = [_widest(texts) for texts in columns]
    narrowest = [min(_LONGEST, _widest(word for text in texts for word in text.split())) for texts in columns]
    for part in _parts(narrowest, width):
        drawing = Drawing(box=box.SIMPLE_HEAD, padding=(0, _GAP - 1, 0, 0), pad_edge=False, show_edge=False)
        for column, wide in zip(part, _widths(part, narrowest, widest, width), strict=True):
            drawing.add_column(Text(lines[0][column]), overflow="fold", width=wide)
        for line in lines[1:]:
            drawing.add_row(*(Text(line[column]) for column in part))
        console.print()
        console.print(drawing)
    console.print()
    for text in table.footnotes:
        console.print(Text(one_line(text)))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
