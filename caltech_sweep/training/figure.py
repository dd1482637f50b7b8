"""The drawing of a confusion matrix: its size, memory and time are bounded, whatever the number of classes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

_MOST_LABELS = 120  # classes that are named; of more, every second or third
_MOST_CELLS = 1000  # in a row of the drawing; of more classes, several share a cell
_LONGEST = 28  # characters of a class's name
_DPI = 110
# Fonts with letters that matplotlib's own lacks, by the words in their names.
_WIDE = re.compile(r"CJK|Noto|Hei|Ming|Song|Gothic|Mincho|Nanum|Malgun|Unifont|Unicode|Droid|Batang|Arial|Sans", re.I)


@lru_cache(maxsize=64)
def _letters(path: str) -> frozenset[int]:
    """Return the characters that a font file has; none where it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def fonts_for(text: str) -> tuple[list[str], set[str]]:
    """Return the names of fonts that together have the letters of a text, and the letters that no font has."""
    from matplotlib import font_manager

    own = "DejaVu Sans"
    families, missing = [own], {ord(letter) for letter in text} - _letters(font_manager.findfont(own)) - {10}
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: ("CJK" not in font.name, font.name)):
        if not missing:
            break
        if _WIDE.search(font.name) and font.name not in families and missing & _letters(font.fname):
            missing -= _letters(font.fname)
            families.append(font.name)
    return families, {chr(code) for code in missing}


def _labels(classes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what each class is called in the drawing, and the fonts for it.

    A name with a letter that no font here has is called by its number in the list of classes, from 1.
    """
    shown = [
        "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name) for name in classes
    ]
    shown = [name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…" for name in shown]
    families, missing = fonts_for("".join(shown))
    return [f"class {i}" if missing & set(name) else name for i, name in enumerate(shown, 1)], families


def _merged(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix of at most _MOST_CELLS rows and columns, by adding up neighbours."""
    each = math.ceil(len(matrix) / _MOST_CELLS)
    if each == 1:
        return matrix
    starts = np.arange(0, len(matrix), each)
    return np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)


def draw_confusion_matrix(matrix: np.ndarray, classes: Sequence[str], title: str, path: Path) -> None:
    """Draw (classes, classes) counts as shares of each true class; readable at 101 classes, when zoomed into.

    Names are text, never markup. Of more than 120 classes some are named, and of more than 1,000 several share a cell.
    """
    import matplotlib as mpl

    step = math.ceil(len(classes) / _MOST_LABELS)
    named, families = _labels(classes[::step])
    title += f"\nOne class in {step} is named." if step > 1 else ""
    settings: dict[Any, Any] = {"text.parse_math": False, "text.usetex": False, "font.family": families}
    with mpl.rc_context(settings):
        _draw(_merged(matrix), len(classes), named, title, path)


def _longest(names: Sequence[str], size: float) -> float:
    """Return the length in inches of the longest of some names."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer, font = RendererAgg(1, 1, 100), FontProperties(size=size)
    return max(renderer.get_text_width_height_descent(name, font, False)[0] for name in names) / 100


def _draw(matrix: np.ndarray, classes: int, named: Sequence[str], title: str, path: Path) -> None:
    """Draw in places that are computed here: matplotlib's own layouts draw everything twice, most of the time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = 9 if classes <= 20 else 6
    side, margin = max(3.2, 0.16 * min(classes, _MOST_LABELS)), _longest(named, size) + 0.5  # inches
    width, height = margin + side + 1.1, margin + side + 0.6
    figure = Figure(figsize=(width, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    edges = (-0.5, classes - 0.5, classes - 0.5, -0.5)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", extent=edges)
    places = np.arange(len(named)) * math.ceil(classes / _MOST_LABELS)
    axes.set_xticks(places, named, rotation=90, fontsize=size)
    axes.set_yticks(places, named, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title)
    if classes <= 20:
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=size)
    scale = figure.add_axes(
        ((margin + side + 0.2) / width, (margin + 0.2 * side) / height, 0.15 / width, 0.6 * side / height)
    )
    figure.colorbar(image, cax=scale, label="share of the true class")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
