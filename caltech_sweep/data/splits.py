"""Which image belongs to train, val and test: the course's Caltech-101 rule, or a seeded stratified split.

The official rule (reference: the course's own train.txt and test.txt): sort the folders case-insensitively,
``BACKGROUND_Google`` and its stray ``tmp`` file included, sort the files in each, number all 9,145 across the
folders; every third is test; only then is ``BACKGROUND_Google`` dropped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from caltech_sweep.config import DatasetConfig
from caltech_sweep.data.listing import PassedOver, by_name, entries, is_dir, is_hidden
from caltech_sweep.errors import DatasetError
from caltech_sweep.text import counted, readable, suggestion

BACKGROUND = "BACKGROUND_Google"
CALTECH_FOLDERS, CALTECH_FILES = 102, 9145
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image: its file (or drawn name), its class index and its class name."""

    path: Path
    label: int
    class_name: str


@dataclass(frozen=True)
class Split:
    """The class names in label order, the images of each part, and what of the folder is in none, as words."""

    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    passed_over: str = ""
    groups: Mapping[Path, str] = field(default_factory=dict)  # of images of train and val that must stay together
    skipped: tuple[tuple[str, str], ...] = ()  # images that cannot be read, below the dataset's root, and why
    notes: tuple[str, ...] = ()  # sentences without their full stop, about what a reader should know of the parts

    def part(self, name: str) -> tuple[Sample, ...]:
        """Return the images of "train", "val" or "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]


def _caltech_files(root: Path) -> tuple[dict[str, list[Path]], PassedOver]:
    """Return the files of each folder in the official order: every one counts that no system left there."""
    passed = PassedOver()
    files: dict[str, list[Path]] = {}
    for entry in sorted(entries(root), key=lambda entry: by_name(Path(entry.name))):
        if is_hidden(entry.name):
            passed.others["hidden folder" if is_dir(entry) else "hidden file"] += 1
        elif is_dir(entry):
            found = [file for file in entries(Path(entry.path)) if os.path.isfile(file.path)]
            files[entry.name] = [Path(file.path) for file in found if not is_hidden(file.name)]
            if hidden := len(found) - len(files[entry.name]):
                passed.others["hidden file"] += hidden
    return files, passed


def _check_caltech(root: Path, files: dict[str, list[Path]]) -> None:
    count = sum(map(len, files.values()))
    fix = "the official split needs the complete folder; fetch it again with `caltech-sweep data`"
    if BACKGROUND not in files:
        raise DatasetError(f"{root} has no folder {BACKGROUND}, whose files count in the split; {fix}")
    if not any(path.name == "tmp" for path in files[BACKGROUND]):
        raise DatasetError(
            f"{root / BACKGROUND} lacks the stray file 'tmp', which the official split counts: without it every "
            f"later class shifts; {fix}, or create it as an empty file"
        )
    if len(files) != CALTECH_FOLDERS or count != CALTECH_FILES:
        raise DatasetError(
            f"{root} holds {count:,} files in {len(files)} folders, not {CALTECH_FILES:,} in {CALTECH_FOLDERS}; {fix}"
        )


def carve(count: int, fraction: float, seed: Sequence[int]) -> np.ndarray:
    """Return the sorted positions, of ``range(count)``, that a seeded draw of ``fraction`` chooses."""
    order = np.random.default_rng(list(seed)).permutation(count)
    return np.sort(order[: math.floor(count * fraction + 0.5)])


def _quotas(counts: Sequence[int], fraction: float) -> list[int]:
    """Share ``floor(total * fraction)`` out over classes by largest remainder, so that the sum is exact."""
    exact = [count * fraction for count in counts]
    quotas = [math.floor(value + 1e-9) for value in exact]
    missing = math.floor(sum(counts) * fraction + 1e-9) - sum(quotas)
    by_remainder = sorted(range(len(counts)), key=lambda i: (quotas[i] - exact[i], i))
    for index in by_remainder[:missing]:
        quotas[index] += 1
    return quotas


def carve_val(
    classes: Sequence[str], train: Sequence[Sample], fraction: float, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Return what stays in train and what becomes val, class by class; raise DatasetError for a class too small."""
    by_class: list[list[Sample]] = [[] for _ in classes]
    for item in train:
        by_class[item.label].append(item)
    kept: list[Sample] = []
    val: list[Sample] = []
    for label, quota in enumerate(_quotas([len(items) for items in by_class], fraction)):
        items = by_class[label]
        if not 0 < quota < len(items):
            raise DatasetError(
                f"class {classes[label]!r} has {len(items)} training images, too few to give a validation part "
                f"of {fraction:.2f}; add images or change dataset.val_fraction"
            )
        chosen = set(np.random.default_rng([seed, 1, label]).permutation(len(items))[:quota].tolist())
        for position, item in enumerate(items):
            (val if position in chosen else kept).append(item)
    return tuple(kept), tuple(val)


def caltech_split(root: Path, val_fraction: float = 1 / 3, seed: int = 0) -> Split:
    """Return the official split of a complete ``101_ObjectCategories`` folder: 3,856 / 1,928 / 2,893 images.

    Raises DatasetError naming what is missing when the folder is incomplete.
    """
    files, passed = _caltech_files(root)
    _check_caltech(root, files)
    classes = tuple(name for name in files if name != BACKGROUND)
    labels = {name: label for label, name in enumerate(classes)}
    train: list[Sample] = []
    test: list[Sample] = []
    number = 0
    for name, paths in files.items():
        for path in paths:
            if name != BACKGROUND:
                (test if number % 3 == 0 else train).append(Sample(path, labels[name], name))
            number += 1
    kept, val = carve_val(classes, train, val_fraction, seed)
    return Split(classes, kept, val, tuple(test), str(passed))


def _chosen_classes(classes: tuple[str, ...], wanted: int | str | tuple[str, ...]) -> tuple[str, ...]:
    half = (len(classes) + 1) // 2
    if isinstance(wanted, int):
        if not 2 <= wanted <= len(classes):
            raise DatasetError(f"dataset.classes: must be between 2 and {len(classes)}, got {wanted}")
        return classes[:wanted]
    if isinstance(wanted, str):
        halves = {"first_half": classes[:half], "second_half": classes[half:]}
        if wanted not in halves:
            raise DatasetError(f"dataset.classes: must be a number, first_half, second_half or names, got {wanted!r}")
        return halves[wanted]
    for name in wanted:
        if name not in classes:
            raise DatasetError(f"dataset.classes: there is no class {name!r}{suggestion(name, classes, '')}")
    return tuple(name for name in classes if name in wanted)


def subset(split: Split, config: DatasetConfig) -> Split:
    """Keep the configured classes, renumbered, and at most ``images_per_class`` of each in every part."""
    if config.classes is None and config.images_per_class is None:
        return split
    classes = split.classes if config.classes is None else _chosen_classes(split.classes, config.classes)
    labels = {name: label for label, name in enumerate(classes)}

    def keep(items: tuple[Sample, ...]) -> tuple[Sample, ...]:
        seen = dict.fromkeys(classes, 0)
        kept = []
        for item in items:
            if item.class_name in labels:
                seen[item.class_name] += 1
                if config.images_per_class is None or seen[item.class_name] <= config.images_per_class:
                    kept.append(Sample(item.path, labels[item.class_name], item.class_name))
        return tuple(kept)

    return replace(split, classes=classes, train=keep(split.train), val=keep(split.val), test=keep(split.test))


def without(split: Split, bad: Mapping[Path, str], root: Path | None) -> Split:
    """Return a split without its images that cannot be used; raise DatasetError where a class of train has no other."""
    if not bad:
        return split
    parts = {part: tuple(item for item in split.part(part) if item.path not in bad) for part in SPLITS}
    if lost := [name for i, name in enumerate(split.classes) if all(item.label != i for item in parts["train"])]:
        raise DatasetError(f"no training image of class {lost[0]!r} can be read; replace them, or leave the class out")
    skipped = tuple((_shown(path, root), why) for path, why in bad.items())
    some = "; ".join(f"{name} ({why})" for name, why in skipped[:3]) + (", ..." if len(skipped) > 3 else "")
    note = f"skipped {counted(len(bad), 'image')} that cannot be read: {some}"
    split = replace(split, train=parts["train"], val=parts["val"], test=parts["test"])
    return replace(split, skipped=skipped, notes=(*split.notes, note))


def moved(split: Split, old: Path | None, new: Path) -> Split:
    """Return a split whose images lie below ``new`` as they did below ``old``, or by their whole names without it."""

    def there(items: tuple[Sample, ...]) -> tuple[Sample, ...]:
        return tuple(replace(item, path=new / (item.path.relative_to(old) if old else item.path)) for item in items)

    return replace(split, train=there(split.train), val=there(split.val), test=there(split.test))


def in_two_parts(split: Split, files: np.ndarray, root: Path | None) -> Split:
    """Return a split with a note about images that are in more than one part, told by the content of their files."""
    firsts: dict[bytes, tuple[str, Path]] = {}
    others: dict[bytes, dict[str, Path]] = {}
    items = ((part, item.path) for part in SPLITS for item in split.part(part))
    for (part, path), digest in zip(items, map(bytes, files), strict=True):
        first = firsts.setdefault(digest, (part, path))
        if first[0] != part:
            others.setdefault(digest, {}).setdefault(part, path)
    if not others:
        return split
    twice = [dict([first, *others[digest].items()]) for digest, first in firsts.items() if digest in others]
    some = " and ".join(f"{_shown(path, root)} ({part})" for part, path in twice[0].items())
    note = f"{counted(len(twice), 'image')} of the same content in more than one part, such as {some}"
    return replace(split, notes=(*split.notes, note))


def _shown(path: Path, root: Path | None) -> str:
    return readable((path.relative_to(root) if root else path).as_posix())
