"""Numbers and names in sentences."""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from caltech_sweep.machine import rewrites_lines

_NAMED = 12  # rows, or trials, that a sentence names


def counted(number: int, one: str, many: str = "") -> str:
    """Return "1 study" or "3 studies"; ``many`` is for plurals that are not made with an s."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def listed(names: Sequence[str]) -> str:
    """Return names as a phrase: a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def first_of(names: Sequence[object]) -> str:
    """Return the first of some names as a phrase, and how many more there are."""
    left = len(names) - _NAMED
    return listed([*map(str, names[:_NAMED]), *([f"{left} more"] if left > 0 else [])])


def readable(name: str) -> str:
    """Return a file's name as text that every file and stream takes: bytes that are no UTF-8 are shown as ``\\xe9``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def one_line(text: str, longest: int = 80) -> str:
    """Return a text without its line breaks, cut to ``longest`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def quoted(value: object, longest: int = 80) -> str:
    """Return what the user wrote as Python would, cut to ``longest`` characters, to stand in a sentence."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or an integer of very many digits
        return f"a very long {type(value).__name__}"
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:30]} is not a finite number")
    return number


def parse_json(text: str) -> Any:
    """Return what JSON of others says; raise ValueError for what is none, or is nested too deep to be read.

    NaN and numbers that are too large to be finite are no JSON, though Python reads them.
    """
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def is_overgrown(node: object, most: int = 100_000) -> bool:
    """Tell whether nested lists and mappings hold more than ``most`` values once every alias is written out.

    A few lines of YAML whose aliases name each other would otherwise become more values than any memory holds.
    """
    sizes: dict[int, float] = {}
    stack = [(node, False)]
    while stack:
        value, counted_ = stack.pop()
        inner = [*value, *value.values()] if isinstance(value, Mapping) else value
        if isinstance(inner, str) or not isinstance(inner, Sequence):
            continue
        if counted_:
            sizes[id(value)] = 1 + sum(sizes.get(id(each), 1) for each in inner)
            if sizes[id(value)] > most:
                return True
        elif id(value) not in sizes:
            sizes[id(value)] = float("inf")  # until it is counted: what holds itself has no end
            stack += [(value, True), *((each, False) for each in inner)]
    return False


def suggestion(word: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """Return "; did you mean 'x'?" to end a sentence about an unknown word.

    Where nothing is near, it is ``otherwise``, or the list of what is known.
    """
    known = list(known)
    near = difflib.get_close_matches(str(word), known, 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; it may be {', '.join(known)}" if otherwise is None else otherwise


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or the error's name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def progress_line(
    what: str, write: Callable[[str], None], amount: Callable[[int], str] = "{:,}".format
) -> Iterator[Callable[[int, int], None]]:
    """Yield a progress callback: one rewritten line on a terminal, which ends with the context; few lines elsewhere.

    These are one every tenth, or one whenever what is done has doubled. ``amount`` writes what is done and the total,
    which is 0 when it is not known; :func:`rich.filesize.decimal` writes bytes.
    """
    last, width = -1, 0  # width: characters of the line that has not ended
    rewritten = rewrites_lines(sys.stderr)

    def show(done: int, total: int) -> None:
        nonlocal last, width
        step = done * 10 // total if total else done.bit_length()
        text = f"{what}: {amount(done)}{f' of {amount(total)}' if total else ''}"
        if rewritten:
            whole = 0 < total == done
            sys.stderr.write(f"\r{text:{width}}" + ("\n" if whole else ""))
            sys.stderr.flush()
            width = 0 if whole else len(text)
        elif step != last:
            last = step
            write(text)

    try:
        yield show
    finally:
        if width:
            sys.stderr.write("\n")


def duration(seconds: float) -> str:
    """Return seconds as words a person reads at a glance, such as 45 s, 3 min 20 s or 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
