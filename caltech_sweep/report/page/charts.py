"""Charts as SVG inside a page, drawn by Matplotlib: text stays text, and the page's style sheet sets every colour.

Matplotlib draws with stand-in colours, which become CSS variables, so that one drawing follows light and dark. What
Matplotlib adds for files of their own (a document type, a style sheet for all elements, identifiers) is taken out.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from caltech_sweep.metrics import Objective
from caltech_sweep.report.model import Share
from caltech_sweep.report.page.confusion import Confusion
from caltech_sweep.report.page.curves import Grouping, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# Stand-ins, which nothing else draws with, and the page's variables.
INK, MUTED, GRID, ACCENT, WRONG = "#010203", "#010205", "#010207", "#010209", "#01020b"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", ACCENT: "accent", WRONG: "wrong"}

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 8,
    "path.simplify": False,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}

Marks = Mapping[str, tuple[Mapping[str, str], str]]  # by gid: attributes of the element, and its tooltip


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    FigureCanvasSVG(figure)
    return figure


def clean(text: str) -> str:
    """Return text without the characters that XML cannot hold."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _svg(figure: Figure, label: str, marks: Marks, **attributes: str) -> str:
    """Return a figure as an ``svg`` element that a screen reader reads as ``label``."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts draw the text, not Matplotlib's
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    used = set(re.findall(r'(?:url\(|href=")#(\w+)', buffer.getvalue().decode()))
    for element in root.iter():
        _tidy(element, used, marks)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib.update({"role": "img", "aria-label": clean(label), **attributes})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    text = ElementTree.tostring(root, encoding="unicode")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"(?:<g></g>|<g />|<defs></defs>|<defs />)", "", re.sub(r">\s+<", "><", text))


_RECTANGLE = re.compile(r"M (\d+) (\d+) L (\d+) \2 L \3 (\d+) L \1 \4 (?:L \1 \2 )?z ?")


def _short_rectangle(match: re.Match[str]) -> str:
    """Return a rectangle by its sides, since a matrix has hundreds of them."""
    left, top, right, bottom = map(int, match.groups())
    return f"M{left} {top}h{right - left}v{bottom - top}h{left - right}z"


def _tidy(element: Any, used: set[str], marks: Marks) -> None:
    """Drop identifiers that nothing refers to, fonts and superfluous decimals; put marks on what has a gid."""
    name = element.attrib.get("id")
    if name in marks:
        attributes, tooltip = marks[name]
        element.attrib.update(attributes)
        for child in element.iter(f"{{{_SVG}}}path"):
            child.attrib.pop("style", None)  # the class decides
        if tooltip:
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = clean(tooltip)
            element.insert(0, title)
    if name is not None and name not in used:
        del element.attrib["id"]
    if "style" in element.attrib:
        style = re.sub(r"font: (?:\S+ )*?([\d.]+px) [^;]*", r"font-size: \1", element.attrib["style"])
        style = re.sub(r"font-family: [^;]*;?", "", style).replace("; stroke-linejoin: miter", "")
        element.attrib["style"] = style.replace(": ", ":").replace("; ", ";")
    if re.fullmatch(r"rotate\(-?0 .*\)", element.attrib.get("transform", "")):
        del element.attrib["transform"]
    for key in ("d", "x", "y", "transform"):
        if key in element.attrib:
            value = re.sub(r"\d+\.\d{2,}", lambda match: f"{float(match[0]):.1f}", element.attrib[key])
            element.attrib[key] = " ".join(value.replace(".0 ", " ").split())
    if "d" in element.attrib:
        element.attrib["d"] = _RECTANGLE.sub(_short_rectangle, element.attrib["d"])


def _unique(figure_id: str) -> dict[Any, Any]:
    """Return the drawing settings; the salt keeps identifiers of several figures in one page apart."""
    return {**_SETTINGS, "svg.hashsalt": figure_id}


# -- learning curves ---------------------------------------------------------------------------------------------------


def curves_svg(lines: Sequence[Line], groupings: Sequence[Grouping], key: str, title: str, figure_id: str) -> str:
    """Return one metric of every line by epoch; each line carries its style in each grouping."""
    import matplotlib as mpl
    from matplotlib.ticker import MaxNLocator

    marks = {}
    with mpl.rc_context(_unique(figure_id)):
        figure = _figure(330, 210)
        axes = figure.add_axes((0.115, 0.15, 0.87, 0.82))
        # The last drawn lies on top: the rows, and among them the first.
        for index in sorted(range(len(lines)), key=lambda i: (lines[i].kind == "row", -i)):
            curve = lines[index].metrics.get(key, ())
            if curve:
                epochs, values = zip(*(curve if len(curve) > 1 else curve * 2), strict=True)
                axes.plot(epochs, values, gid=f"line{index}")
                marks[f"line{index}"] = (_line_attributes(groupings, index), f"{lines[index].name}: {values[-1]:.3f}")
        _scale(axes, [value for line in lines for _, value in line.metrics.get(key, ())], key)
        axes.set_xlabel("epoch", labelpad=2)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return _svg(figure, _curves_label(lines, key, title), marks, **{"class": "chart"})


def _line_attributes(groupings: Sequence[Grouping], index: int) -> dict[str, str]:
    styles = {f"data-{grouping.key}": grouping.style(index) for grouping in groupings}
    return {"class": f"series {groupings[0].style(index)}", **styles}


def _scale(axes: Axes, values: Sequence[float], key: str) -> None:
    """Start losses at zero, or use a log scale where a few that exploded would press all others to the floor."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if key.endswith("accuracy") or not values:
        return
    positive = sorted(value for value in values if value > 0)
    if not positive or positive[-1] < 8 * positive[len(positive) // 2]:
        axes.set_ylim(0, (max(values) or 1) * 1.05)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.text(0.995, 0.99, "log scale", transform=axes.transAxes, ha="right", va="top", color=MUTED)


def _curves_label(lines: Sequence[Line], key: str, title: str) -> str:
    better = max if key.endswith("accuracy") else min
    found = [(value, -epoch, line.name) for line in lines for epoch, value in line.metrics.get(key, ())]
    if not found:
        return f"{title} by epoch: nothing was logged."
    value, epoch, name = better(found, key=lambda item: item[0])
    count = sum(1 for line in lines if line.metrics.get(key))
    word = "highest" if better is max else "lowest"
    return f"{title} by epoch of {count} trials; the {word} is {value:.3f}, of {name} in epoch {-epoch}."


# -- the search --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchPoint:
    """A sampled trial: its number, validation accuracy and outcome, and whether it was sampled at random."""

    number: int
    value: float
    outcome: str
    random: bool = False


_MARKERS = {"pruned": "x", "paused": "_"}


def history_svg(
    points: Sequence[SearchPoint],
    before: float | None,
    row_best: float | None,
    goal: Objective,
    label: str,
    figure_id: str,
) -> str:
    """Return the search's history, in the order of ``points``.

    ``before`` is the best score of the trials before these, if there are any.
    """
    import matplotlib as mpl
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(_unique(figure_id)):
        figure = _figure(330, 210)
        axes = figure.add_axes((0.115, 0.15, 0.87, 0.82))
        best, steps = before, list[tuple[int, float]]()
        for point in points:
            reached = [point.value] if point.outcome == "complete" else []
            best = goal.best([*([] if best is None else [best]), *reached])
            steps += [] if best is None else [(point.number, best)]
        if row_best is not None:
            axes.axhline(row_best, color=WRONG, linewidth=1, linestyle=(0, (5, 3)))
        if steps:
            axes.step(*zip(*steps, strict=True), where="post", color=ACCENT, linewidth=1.4)
        groups: dict[tuple[str, bool], list[tuple[int, float]]] = {}
        for point in points:
            hollow = point.random and point.outcome == "complete"
            groups.setdefault((point.outcome, hollow), []).append((point.number, point.value))
        for (outcome, hollow), places in sorted(groups.items()):
            colour = ACCENT if outcome == "complete" else MUTED
            face = "none" if hollow else colour
            marker = _MARKERS.get(outcome, "o")
            axes.plot(*zip(*places, strict=True), marker, markersize=4, color=colour, markerfacecolor=face)
        axes.set_xlabel("trial number", labelpad=2)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return _svg(figure, label, {}, **{"class": "chart"})


def effort_svg(
    line: Sequence[tuple[int, float]], results: Sequence[tuple[int, float, bool]], label: str, figure_id: str
) -> str:
    """Return the best accuracy by epochs spent, and each result at a rung: (epochs spent, accuracy, went on)."""
    import matplotlib as mpl
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(_unique(figure_id)):
        figure = _figure(330, 210)
        axes = figure.add_axes((0.115, 0.15, 0.87, 0.82))
        for on, colour in ((False, MUTED), (True, ACCENT)):
            chosen = [(spent, value) for spent, value, went_on in results if went_on is on]
            if chosen:
                axes.plot(*zip(*chosen, strict=True), "D" if on else "_", markersize=3.5 if on else 6, color=colour)
        axes.step(*zip(*line, strict=True), where="post", color=ACCENT, linewidth=1.4)
        axes.set_xlabel("epochs spent", labelpad=2)
        axes.set_xlim(0, line[-1][0] * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return _svg(figure, label, {}, **{"class": "chart"})


def importance_svg(shares: Mapping[str, Share], figure_id: str) -> str:
    """Return the importance of each setting as a bar with its figure and its range."""
    import matplotlib as mpl

    with mpl.rc_context({**_unique(figure_id), "axes.grid": False, "axes.spines.bottom": False}):
        figure = _figure(330, max(70, 24 * len(shares) + 16))
        axes = figure.add_axes((0.27, 0.03, 0.63, 0.94))
        names, values = [clean(name)[:22] for name in shares], [share.value for share in shares.values()]
        axes.barh(range(len(names)), values, height=0.62, color=ACCENT)
        for index, share in enumerate(shares.values()):
            axes.plot([share.low, share.high], [index, index], color=INK, linewidth=1)
            axes.text(max(share.value, share.high), index, f" {share.value:.2f}", va="center", color=INK)
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks([])
        axes.invert_yaxis()
        axes.set_xlim(0, max((share.high for share in shares.values()), default=1) or 1)
        text = ", ".join(
            f"{name} {share.value:.2f} ({share.low:.2f} to {share.high:.2f})" for name, share in shares.items()
        )
        return _svg(figure, f"Importance of each setting: {text}.", {}, **{"class": "chart"})


# -- confusion matrices ------------------------------------------------------------------------------------------------

_SHADES = 5
_LONG = 18  # letters of a class's label
_FEW = 12  # classes whose cells have room for their counts


def _geometry(labels: Sequence[str]) -> tuple[int, int, float]:
    """Return the side of a cell, the width of the labels and the size of their text, in pixels."""
    cell, size = (38, 11.0) if len(labels) <= _FEW else (20, 10.0) if len(labels) <= 40 else (10, 8.5)
    return cell, round(max(map(len, labels)) * size * 0.62) + 8, size


def matrix_svg(matrices: Sequence[Confusion], shown: int, name: str) -> str:
    """Return the matrices of one list of classes over one another, of which the page shows one at a time."""
    import matplotlib as mpl

    classes = matrices[0].classes
    count = len(classes)
    labels = [clean(text) if len(text) <= _LONG else clean(text)[: _LONG - 1] + "…" for text in classes]
    cell, margin, size = _geometry(labels)
    marks: dict[str, tuple[dict[str, str], str]] = {}
    with mpl.rc_context({**_unique(name), "axes.grid": False, "font.size": size}):
        side = margin + cell * count + 4
        figure = _figure(side, side)
        axes = figure.add_axes((margin / side, 4 / side, cell * count / side, cell * count / side))
        axes.set(xlim=(0, count), ylim=(count, 0))
        centres = [index + 0.5 for index in range(count)]
        axes.set_yticks(centres, labels)
        axes.xaxis.tick_top()
        axes.set_xticks(centres, labels, rotation=90)
        axes.tick_params(pad=3)
        axes.plot([0, count], [0, count], color=GRID, linewidth=0.6, zorder=0.5)
        for index, matrix in enumerate(matrices):
            own = {"data-for": name, "data-item": str(index), **({} if index == shown else {"hidden": ""})}
            _draw_cells(axes, matrix, own, f"m{index}", marks)
        attributes = {"data-cell": str(cell), "data-margin": str(margin), "style": f"width:{side}px"}
        size_class = "matrix few" if count <= _FEW else "matrix"
        return _svg(figure, _matrix_label(matrices[shown]), marks, **{"class": size_class, **attributes})


def _draw_cells(
    axes: Axes, matrix: Confusion, own: Mapping[str, str], prefix: str, marks: dict[str, tuple[dict[str, str], str]]
) -> None:
    """Draw the cells that hold anything: one path for each shade of right and of wrong."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    shades: dict[tuple[str, int], list[Path]] = {}
    for true, predicted, number in matrix.cells:
        share = number / matrix.totals[true]
        kind = "right" if true == predicted else "wrong"
        corners = [(predicted, true), (predicted + 1, true), (predicted + 1, true + 1), (predicted, true + 1)]
        path = Path([*corners, corners[0]], closed=True)
        shades.setdefault((kind, min(_SHADES, int(share * _SHADES) + 1)), []).append(path)
        if len(matrix.classes) <= _FEW:
            gid = f"{prefix}-{true}-{predicted}"
            axes.text(predicted + 0.5, true + 0.5, str(number), ha="center", va="center", gid=gid, zorder=3)
            marks[gid] = ({**own, "class": "count"}, "")
    for (kind, shade), paths in sorted(shades.items()):
        gid = f"{prefix}-{kind}-{shade}"
        axes.add_patch(PathPatch(Path.make_compound_path(*paths), linewidth=0, gid=gid))
        marks[gid] = ({**own, "class": f"{kind} shade{shade}"}, "")


def _matrix_label(matrix: Confusion) -> str:
    return (
        f"Confusion matrix of {len(matrix.classes)} classes, true classes down and predicted classes across; "
        f"{matrix.correct} of {sum(matrix.totals)} images lie on the diagonal. The table has the most confused pairs."
    )
