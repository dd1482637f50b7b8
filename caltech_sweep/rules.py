"""The words of rules: what a setting may be, in a sentence, and how its values are written and read.

A rule stands in the field of the setting that it is of (:func:`setting`). Study files, ``--set``, the documents and the
params of stored runs read it there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import ImageColor

from caltech_sweep.text import parse_json, quoted


@dataclass(frozen=True)
class Rule:
    """A test of one value and the words that follow "must be"; ``kind`` says which ranges make sense.

    ``most`` is the largest number that makes sense: beyond it a value is a slip, or costs more than any machine has.

    The words may be a function, for what is known only later: the names of a registry that grows.
    """

    text: str | Callable[[], str]
    accepts: Callable[[Any], bool]
    kind: str = "other"  # integer | number | other
    most: float = math.inf
    order: Collection[str] | None = None  # of a list whose order means nothing
    form: Callable[[Any], Any] | None = None  # gives the one form of a value that can be written in a way of its own

    @property
    def words(self) -> str:
        """What follows "must be"."""
        return self.text if isinstance(self.text, str) else self.text()

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with a value, or None."""
        if not self.accepts(value):
            return f"must be {self.words}, got {quoted(value)}"
        if self.kind != "other" and value is not None and value > self.most:
            return f"must be at most {self.most:,}, got {quoted(value)}"
        return None

    def normal(self, value: Any) -> Any:
        """Return the one form of a value that can be written in several: 1 and 1.0, a list and a tuple."""
        if self.form is not None:
            return self.form(value)
        if self.kind == "number" and is_number(value):
            return float(value)
        return tuple(value) if isinstance(value, list) else value

    def ordered(self, value: Any) -> Any:
        """Return a value in its one form, and a list whose order means nothing in the usual order."""
        value = self.normal(value)
        if self.order is None or not isinstance(value, tuple):
            return value
        known = [name for name in self.order if name in value]
        return (*known, *(name for name in value if name not in known))

    def parse(self, text: str) -> Any:
        """Return the value that :func:`as_text` wrote; raise ValueError for a text of no value that is accepted."""
        value = next((value for value in _readings(text) if self.problem(value) is None), Rule)
        if value is Rule:
            raise ValueError(f"must be {self.words}, got {text!r}")
        return self.normal(value)


def setting(default: Any, rule: Rule, about: str = "") -> Any:
    """Return the field of a setting: its default, what it may be, and its unit or what it does in a few words."""
    return field(default=default, metadata={"rule": rule, "about": about})


def as_text(value: Any) -> str:
    """Return a setting as the text of an MLflow param."""
    if isinstance(value, (list, tuple)):
        names = list(map(str, value))
        return json.dumps(names) if any("+" in name for name in names) else "+".join(names) or "none"
    return "none" if value is None else str(value)


def _readings(text: str) -> Iterator[Any]:
    """Yield what a param's text may stand for, the narrowest kind first."""
    yield from {"none": (None, ()), "True": (True,), "False": (False,)}.get(text, ())
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            yield kind(text)
    if text.startswith("["):
        with contextlib.suppress(ValueError):
            yield tuple(parse_json(text))
    with contextlib.suppress(ValueError):
        yield tuple(map(int, text.split("+")))
    yield tuple(text.split("+"))
    yield text


def is_integer(value: Any) -> bool:
    """Tell an integer from a boolean, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Tell a finite number from a boolean, NaN and infinity."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def integer(low: int, most: int = 1_000_000) -> Rule:
    """Return the rule of an integer with a lower and an upper bound."""
    return Rule(f"an integer >= {low}", lambda v: is_integer(v) and v >= low, "integer", most)


def number(words: str, accepts: Callable[[float], bool], most: float = 1_000_000) -> Rule:
    """Return the rule of a finite number with an upper bound."""
    return Rule(f"a number {words}", lambda v: is_number(v) and accepts(v), "number", most)


def one_of(choices: Collection[str]) -> Rule:
    """Return the rule of a name out of a few; a registry may grow."""
    return Rule(lambda: f"one of {', '.join(choices)}", lambda v: isinstance(v, str) and v in choices)


def some_of(choices: Collection[str]) -> Rule:
    """Return the rule of a list of names, each at most once, whose order means nothing; a registry may grow."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
            return False
        return len(set(value)) == len(value) and set(value) <= set(choices)

    return Rule(lambda: f"a list of {', '.join(choices)}, each at most once", accepts, order=choices)


def optional(rule: Rule, missing: str) -> Rule:
    """Let a rule accept null as well."""
    return Rule(
        lambda: f"{rule.words}, or null for {missing}", lambda v: v is None or rule.accepts(v), rule.kind, rule.most
    )


FREEZE_CHOICES = ("none", "conv", "fc", "fc_but_last")


def _as_freeze(value: Any) -> Any:
    """Return {up_to: layer3} as up_to:layer3, and {first: 0.5} as first:0.5."""
    if isinstance(value, dict) and len(value) == 1:
        [(kind, argument)] = value.items()
        if isinstance(argument, str) or is_number(argument):
            return f"{kind}:{argument}"
    return value


def _is_freeze(value: Any) -> bool:
    text = _as_freeze(value)
    if not isinstance(text, str):
        return False
    kind, _, argument = text.partition(":")
    if kind == "first":
        with contextlib.suppress(ValueError):
            return 0 < float(argument) < 1
        return False
    return text in FREEZE_CHOICES or (kind == "up_to" and bool(argument.strip()))


PRETRAINED = ("pretrained", "imagenet")  # words for the published weights of a network; the second is the older one


def _is_weights(value: Any) -> bool:
    if value in ("none", *PRETRAINED):
        return True
    if not isinstance(value, str):
        return False
    prefix, _, rest = value.partition(":")
    return prefix in ("file", "run", "study") and bool(rest)


def _is_classes(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) >= 2 and all(isinstance(name, str) for name in value)
    return value in (None, "first_half", "second_half") or (is_integer(value) and value >= 2)


def _is_colour(value: Any) -> bool:
    try:
        return isinstance(value, str) and len(ImageColor.getrgb(value)) == 3
    except ValueError:
        return False


def _is_epochs(value: Any) -> bool:
    rising = isinstance(value, (list, tuple)) and all(map(is_integer, value))
    return rising and all(one < other for one, other in itertools.pairwise((0, *value)))


LARGEST_SEED = 2**62  # with what is added to it for a replicate, torch takes it
BOOLEAN = Rule("true or false", lambda v: isinstance(v, bool))
TEXT = Rule("a name", lambda v: isinstance(v, str) and bool(v.strip()))
POSITIVE = number("above 0", lambda v: v > 0)
NOT_NEGATIVE = number("of at least 0", lambda v: v >= 0)
FRACTION = number("between 0 and 1, both excluded", lambda v: 0 < v < 1)
PROBABILITY = number("between 0 and 1", lambda v: 0 <= v <= 1)
SHARE = number("above 0 and at most 1", lambda v: 0 < v <= 1)
AT_LEAST_1 = number("of at least 1", lambda v: v >= 1)
SIGMA = number("of at least 0.1", lambda v: v >= 0.1)
LEVEL = Rule("an integer from 0 to 30", lambda v: is_integer(v) and 0 <= v <= 30, "integer")
ODD = Rule("an odd integer from 3 to 15", lambda v: is_integer(v) and 3 <= v <= 15 and v % 2 == 1, "integer")
WEIGHTS = Rule("none, pretrained, file:PATH, run:RUN_ID or study:NAME", _is_weights)
FREEZE = Rule(
    f"one of {', '.join(FREEZE_CHOICES)}, {{up_to: LAYER}} or {{first: FRACTION}}", _is_freeze, form=_as_freeze
)
CLASSES = Rule("a number of at least 2, first_half, second_half, a list of class names, or null", _is_classes)
EPOCHS = Rule("a list of numbers of epochs of at least 1, each larger than the one before", _is_epochs)
COLOUR = Rule("an opaque colour such as white or '#ff8800', in quotes", _is_colour)
