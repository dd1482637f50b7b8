"""What each setting of a trial may be: one rule a field, used by study files and by ``--set`` alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import ImageColor

from caltech_sweep.config import AUGMENT_CHOICES, FREEZE_CHOICES, OPTIMIZER_CHOICES


@dataclass(frozen=True)
class Rule:
    """A test of one value and the words that follow "must be"; ``kind`` says which ranges make sense."""

    words: str
    accepts: Callable[[Any], bool]
    kind: str = "other"  # integer | number | other

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with a value, or None."""
        return None if self.accepts(value) else f"must be {self.words}, got {value!r}"


def is_integer(value: Any) -> bool:
    """Tell an integer from a boolean, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Tell a finite number from a boolean, NaN and infinity."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def integer(low: int) -> Rule:
    """Return the rule of an integer with a lower bound."""
    return Rule(f"an integer >= {low}", lambda v: is_integer(v) and v >= low, "integer")


def number(words: str, accepts: Callable[[float], bool]) -> Rule:
    """Return the rule of a finite number."""
    return Rule(f"a number {words}", lambda v: is_number(v) and accepts(v), "number")


def one_of(*choices: str) -> Rule:
    """Return the rule of a name out of a few."""
    return Rule(f"one of {', '.join(choices)}", lambda v: isinstance(v, str) and v in choices)


def optional(rule: Rule, missing: str) -> Rule:
    """Let a rule accept null as well."""
    return Rule(f"{rule.words}, or null for {missing}", lambda v: v is None or rule.accepts(v), rule.kind)


def _is_weights(value: Any) -> bool:
    if value in ("none", "imagenet"):
        return True
    if not isinstance(value, str):
        return False
    prefix, _, rest = value.partition(":")
    return prefix in ("file", "run", "study") and bool(rest)


def _is_augment(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        return False
    return len(set(value)) == len(value) and set(value) <= AUGMENTS


def _is_classes(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) >= 2 and all(isinstance(name, str) for name in value)
    return value in (None, "first_half", "second_half") or (is_integer(value) and value >= 2)


def _is_colour(value: Any) -> bool:
    try:
        return isinstance(value, str) and len(ImageColor.getrgb(value)) == 3
    except ValueError:
        return False


AUGMENTS = frozenset(AUGMENT_CHOICES)
BOOLEAN = Rule("true or false", lambda v: isinstance(v, bool))
TEXT = Rule("a name", lambda v: isinstance(v, str) and bool(v.strip()))
POSITIVE = number("above 0", lambda v: v > 0)
FRACTION = number("between 0 and 1, both excluded", lambda v: 0 < v < 1)

TRIAL_RULES = {
    "arch": TEXT,
    "weights": Rule("none, imagenet, file:PATH, run:RUN_ID or study:NAME", _is_weights),
    "outputs": optional(integer(2), "one for each class"),
    "freeze": one_of(*FREEZE_CHOICES),
    "optimizer": one_of(*OPTIMIZER_CHOICES),
    "lr": POSITIVE,
    "momentum": number("of at least 0 and below 1", lambda v: 0 <= v < 1),
    "weight_decay": number("of at least 0", lambda v: v >= 0),
    "step_size": integer(1),
    "gamma": number("above 0 and at most 1", lambda v: 0 < v <= 1),
    "epochs": integer(1),
    "batch_size": integer(1),
    "drop_last": BOOLEAN,
    "augment": Rule(f"a list of {', '.join(AUGMENT_CHOICES)}, each at most once", _is_augment),
    "augment_probability": number("between 0 and 1", lambda v: 0 <= v <= 1),
    "rotation_degrees": number("between 0 and 180", lambda v: 0 <= v <= 180),
    "normalize": one_of("auto", "half", "imagenet"),
    "test_views": one_of("center", "tencrop"),
    "test_batch_size": integer(1),
    "seed": integer(0),
    "precision": one_of("auto", "float32", "bfloat16"),
    "channels_last": optional(BOOLEAN, "CUDA only"),
}
DATASET_RULES = {
    "name": one_of("caltech101", "folder", "shapes"),
    "root": optional(TEXT, "the default place"),
    "classes": Rule("a number of at least 2, first_half, second_half, a list of class names, or null", _is_classes),
    "images_per_class": optional(integer(1), "all"),
    "resize": integer(8),
    "crop": integer(8),
    "val_fraction": FRACTION,
    "test_fraction": FRACTION,
    "split_seed": integer(0),
    "background": Rule("an opaque colour such as white or '#ff8800', in quotes", _is_colour),
    "exif": one_of("apply", "ignore"),
}
