"""The drawing of a confusion matrix: its size, memory and time are bounded, whatever the number of classes."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.text import Text

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
    with _drawing, mpl.rc_context(settings):
        _frame(len(classes), tuple(named)).draw(_merged(matrix), title, path)


def _longest(names: Sequence[str], size: float) -> float:
    """Return the length in inches of the longest of some names."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer, font = RendererAgg(1, 1, 100), FontProperties(size=size)
    return max(renderer.get_text_width_height_descent(name, font, False)[0] for name in names) / 100


class _Frame:
    """What all drawings of the same classes share, which takes most of the time: the names, the axes and the scale.

    The cells and the title are drawn over it, as matplotlib's animations do. Places are computed here: matplotlib's own
    layouts draw everything twice.
    """

    def __init__(self, classes: int, named: Sequence[str]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._classes, self._size = classes, 9 if classes <= 20 else 6
        # In inches:
        side, margin = max(3.2, 0.16 * min(classes, _MOST_LABELS)), _longest(named, self._size) + 0.5
        width, height = margin + side + 1.1, margin + side + 0.6
        figure = Figure(figsize=(width, height), dpi=_DPI)
        self._canvas = FigureCanvasAgg(figure)
        self._axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
        edges = (-0.5, classes - 0.5, classes - 0.5, -0.5)
        self._image = self._axes.imshow(
            np.zeros((1, 1)), cmap="Blues", vmin=0, vmax=1, interpolation="nearest", extent=edges
        )
        places = np.arange(len(named)) * math.ceil(classes / _MOST_LABELS)
        self._axes.set_xticks(places, named, rotation=90, fontsize=self._size)
        self._axes.set_yticks(places, named, fontsize=self._size)
        self._axes.set_xlabel("predicted class")
        self._axes.set_ylabel("true class")
        self._title = self._axes.set_title("")
        scale = figure.add_axes(
            ((margin + side + 0.2) / width, (margin + 0.2 * side) / height, 0.15 / width, 0.6 * side / height)
        )
        figure.colorbar(self._image, cax=scale, label="share of the true class")
        self._over = [self._image, *self._axes.spines.values(), self._title]
        for artist in self._over:
            artist.set_animated(True)
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(figure.bbox)

    def draw(self, matrix: np.ndarray, title: str, path: Path) -> None:
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        self._canvas.restore_region(self._background)
        self._image.set_data(shares)
        self._title.set_text(title)
        numbers = self._numbers(matrix, shares) if self._classes <= 20 else []
        for artist in (*self._over, *numbers):
            self._axes.draw_artist(artist)
        for number in numbers:
            number.remove()
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB").save(path, dpi=(_DPI, _DPI))

    def _numbers(self, matrix: np.ndarray, shares: np.ndarray) -> list[Text]:
        """Return the count of each cell that has one."""
        look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": self._size}
        return [
            self._axes.text(
                column, row, str(matrix[row, column]), color="white" if shares[row, column] > 0.5 else "black", **look
            )
            for row, column in np.argwhere(matrix > 0)
        ]


_frame = lru_cache(maxsize=2)(_Frame)
_drawing = threading.Lock()  # of what a frame draws on, and of matplotlib's settings
