"""Datasets that say themselves which image belongs where: by folders, by a column, or by a library.

What is not given is carved out: a test part only where no part is given at all, a validation part from train. Images
of one group, such as those of one patient, always stay together.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TextIO

import numpy as np

from caltech_sweep import paths
from caltech_sweep.config import DatasetConfig
from caltech_sweep.data.listing import PassedOver, by_name, folders_in, list_classes
from caltech_sweep.data.splits import SPLITS, Sample, Split, carve, carve_val
from caltech_sweep.errors import DatasetError
from caltech_sweep.text import counted, one_line, readable

NO_TEST = "the dataset has no test images, so there is no test accuracy"
_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True, slots=True)
class Item:
    """One image: its path, its class, and where it is given, its part and its group."""

    path: Path
    class_name: str
    part: str | None = None
    group: str | None = None


def part_named(name: str) -> str | None:
    """Return the part that a folder's or a column's word means, in any letter case: train, val, test, or None."""
    return _PARTS.get(name.strip().casefold())


def deal(groups: Sequence[Mapping[str, int]], shares: Sequence[float], seed: Sequence[int]) -> list[int]:
    """Return for each group, which has so many images of each class, the part that it goes to.

    Parts get about their ``shares`` of every class: the larger groups first, in a seeded order, each to the part that
    lacks its classes most.
    """
    totals = Counter[str]()
    for group in groups:
        totals.update(group)
    have = [Counter[str]() for _ in shares]
    parts = [0] * len(groups)
    order = np.random.default_rng(list(seed)).permutation(len(groups)).tolist()
    for index in sorted(order, key=lambda index: -sum(groups[index].values())):
        group = groups[index]

        def cost(part: int, group: Mapping[str, int] = group) -> float:
            return sum((2 * have[part][c] + n) * n / (shares[part] * totals[c]) for c, n in group.items())

        parts[index] = min(range(len(shares)), key=cost)
        have[parts[index]].update(group)
    return parts


def _deal_out(items: Sequence[Item], fraction: float, seed: Sequence[int]) -> tuple[list[Item], list[Item]]:
    """Return what stays and what is carved out of items that have groups."""
    members: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        members.setdefault(item.group if item.group is not None else f"\0{index}", []).append(index)
    counts = [Counter(items[index].class_name for index in indices) for indices in members.values()]
    parts = deal(counts, [1 - fraction, fraction], seed)
    return _parted(items, {i for part, own in zip(parts, members.values(), strict=True) if part for i in own})


def _parted(items: Sequence[Item], out: Container[int]) -> tuple[list[Item], list[Item]]:
    return [item for i, item in enumerate(items) if i not in out], [item for i, item in enumerate(items) if i in out]


def _carve_test(
    items: Sequence[Item], classes: Sequence[str], fraction: float, seed: int
) -> tuple[list[Item], list[Item]]:
    if any(item.group is not None for item in items):
        return _deal_out(items, fraction, [seed, 2])
    chosen: set[int] = set()
    members: dict[str, list[int]] = {name: [] for name in classes}
    for index, item in enumerate(items):
        members[item.class_name].append(index)
    for label, name in enumerate(classes):
        own = members[name]
        picked = [own[place] for place in carve(len(own), fraction, [seed, 0, label]).tolist()]
        if not 0 < len(picked) < len(own) - 1:
            raise DatasetError(
                f"class {name!r} has {counted(len(own), 'image')}, too few for a train, val and test part; "
                "add images or change dataset.test_fraction"
            )
        chosen.update(picked)
    return _parted(items, chosen)


def given_split(
    items: Sequence[Item], config: DatasetConfig, where: str, passed: str = "", classes: Sequence[str] = ()
) -> Split:
    """Return the split of items, in their order; ``where`` names the dataset, ``classes`` their order if it is given.

    Raises DatasetError for fewer than two classes, for one that train lacks, or too few images to carve from.
    """
    parts = {part: [item for item in items if item.part == part] for part in SPLITS}
    known = classes or sorted({item.class_name for item in items}, key=lambda name: by_name(Path(name)))
    rest = [item for item in items if item.part is None]
    if len(known) < 2:
        other = f" (passed over: {passed})" if passed else ""
        raise DatasetError(
            f"{where} must hold images of at least two classes, each in a folder of its own or by its label; it has "
            f"{len(known)}{other}"
        )
    if rest and not any(parts.values()):
        parts["train"], parts["test"] = _carve_test(rest, known, config.test_fraction, config.split_seed)
    trained = {item.class_name for item in parts["train"]}
    for part in ("val", "test"):
        if strange := sorted({item.class_name for item in parts[part]} - trained):
            names = ", ".join(map(repr, strange[:5])) + (" and others" if len(strange) > 5 else "")
            raise DatasetError(
                f"{where}: {part} has images of {names}, of which train has none; add some, or leave them out"
            )
    labels = {name: label for label, name in enumerate(known)}

    def samples(chosen: Sequence[Item]) -> tuple[Sample, ...]:
        return tuple(Sample(item.path, labels[item.class_name], item.class_name) for item in chosen)

    train, val = parts["train"], parts["val"]
    if val:
        kept, held = samples(train), samples(val)
    elif any(item.group is not None for item in train):
        first, second = _deal_out(train, config.val_fraction, [config.split_seed, 3])
        if not second or {item.class_name for item in first} != trained:
            raise DatasetError(f"{where} has too few groups to carve a validation part; change dataset.val_fraction")
        kept, held = samples(first), samples(second)
    else:
        kept, held = carve_val(known, samples(train), config.val_fraction, config.split_seed)
    groups = {item.path: item.group for item in items if item.group is not None and item.part != "test"}
    return Split(
        tuple(known),
        kept,
        held,
        samples(parts["test"]),
        passed,
        groups=groups,
        notes=() if parts["test"] else (NO_TEST,),
    )


def fold_split(split: Split, config: DatasetConfig) -> Split:
    """Return a split whose val is one of ``config.folds`` equal parts of train and val, and whose train is the others.

    Each fold has about as many images of each class; a group is in one fold. The test part stays. Raises DatasetError
    where there are too few images or groups.
    """
    samples = sorted((*split.train, *split.val), key=lambda item: item.path.parts)
    number = config.fold or 1
    chosen = (
        _grouped_folds(samples, split.groups, config) if split.groups else _stratified_folds(samples, split, config)
    )
    val = tuple(item for item, fold in zip(samples, chosen, strict=True) if fold == number - 1)
    train = tuple(item for item, fold in zip(samples, chosen, strict=True) if fold != number - 1)
    lost = {item.class_name for item in samples} - {item.class_name for item in train}
    if lost or not val:
        what = f"holds all of class {min(lost)!r}" if lost else "is empty"
        raise DatasetError(f"dataset.folds: fold {number} of {config.folds} {what}; take fewer folds")
    return replace(split, train=train, val=val)


def _stratified_folds(samples: Sequence[Sample], split: Split, config: DatasetConfig) -> list[int]:
    folds, start = [0] * len(samples), 0
    members: list[list[int]] = [[] for _ in split.classes]
    for index, item in enumerate(samples):
        members[item.label].append(index)
    for label, (name, own) in enumerate(zip(split.classes, members, strict=True)):
        if 0 < len(own) < config.folds:
            raise DatasetError(
                f"class {name!r} has {counted(len(own), 'image')} in train and val, fewer than dataset.folds: "
                f"{config.folds}"
            )
        order = np.random.default_rng([config.split_seed, 4, label]).permutation(own).tolist()
        for place, index in enumerate(order, start):  # where the last class ended, so that folds are equally large
            folds[index] = place % config.folds
        start += len(own)
    return folds


def _grouped_folds(samples: Sequence[Sample], groups: Mapping[Path, str], config: DatasetConfig) -> list[int]:
    counts: dict[str, Counter[str]] = {}
    names = [groups.get(item.path, f"\0{item.path}") for item in samples]
    for item, name in zip(samples, names, strict=True):
        counts.setdefault(name, Counter())[item.class_name] += 1
    parts = deal(list(counts.values()), [1 / config.folds] * config.folds, [config.split_seed, 5])
    fold_of = dict(zip(counts, parts, strict=True))
    return [fold_of[name] for name in names]


# -- folders -----------------------------------------------------------------------------------------------------------


def part_folders(root: Path) -> dict[str, Path]:
    """Return the folders of a root that are its parts, by part; none where its folders are classes.

    They are where one is called train, holds folders, and no other folder has another name than a part's.
    """
    found: dict[str, list[Path]] = {}
    for entry in folders_in(root):
        part = part_named(entry.name)
        if part is None:
            return {}
        found.setdefault(part, []).append(Path(entry.path))
    if "train" not in found or not folders_in(found["train"][0]):
        return {}
    for part, folders in found.items():
        if len(folders) > 1:
            names = " and ".join(readable(folder.name) for folder in folders)
            raise DatasetError(f"{readable(str(root))}: the folders {names} both mean {part}; merge them or rename one")
    return {part: folders[0] for part, folders in found.items()}


def _alike(root: Path) -> Iterator[str]:
    """Yield a sentence where all folders of a root, which are classes, hold folders of the same names."""
    common: set[str] | None = None
    tops = [Path(entry.path) for entry in folders_in(root)]
    for top in tops:
        inside = {entry.name for entry in folders_in(top)}
        common = inside if common is None else common & inside
        if len(common) < 2:
            return
    if common:
        tells = ", ".join(repr(readable(name)) for name in sorted(common)[:3])
        names = ", ".join(repr(readable(top.name)) for top in tops[:5])
        yield (
            f"the classes {names} hold folders of the same names ({tells}); where they are parts of a dataset and not "
            "classes, call them train, val and test"
        )


def folder_split(root: Path, config: DatasetConfig) -> Split:
    """Return the split of a folder of class folders, or of folders called train, val and test with these.

    An image counts for its top folder.
    """
    items: list[Item] = []
    passed, order = PassedOver(), list[str]()
    folders: Sequence[tuple[str | None, Path]] = [*part_folders(root).items()] or [(None, root)]
    for part, folder in folders:
        classes, others = list_classes(folder)
        passed.add(others)
        items += [Item(path, name, part) for name, paths in classes.items() for path in paths]
        order = list(classes) if part is None else []
    split = given_split(items, config, readable(str(root)), str(passed), order)
    return replace(split, notes=(*split.notes, *(_alike(root) if order else ())))


# -- a table of paths and labels ---------------------------------------------------------------------------------------

_MOST_PROBLEMS, _ENOUGH = 8, 10_000  # that are told, and after which a file is read no further
_LONGEST = 1 << 20  # characters of a line


def csv_file(config: DatasetConfig) -> Path:
    """Return the file that a dataset named csv is; raise DatasetError when it is not there."""
    if config.root is None:
        raise DatasetError("dataset.root: a dataset named csv needs its file; name it with --data")
    path = paths.expanded(config.root)
    if not os.path.isfile(path):
        raise DatasetError(f"there is no file {readable(str(path))}; name the csv file of the dataset with --data")
    return path


def _lines(file: TextIO) -> Iterator[str]:
    """Yield the lines of a table with their ends; raise ValueError for one that no table has."""
    for number in count(1):
        line = file.readline(_LONGEST)
        if len(line) == _LONGEST:
            raise ValueError(f"line {number} has more than a million characters; is it such a file?")
        if "\0" in line:
            raise ValueError(f"line {number} has a NUL character; save the file as text in UTF-8")
        if not line:
            return
        yield line


def csv_split(config: DatasetConfig) -> Split:
    """Return the split that a file of paths and labels gives; raise DatasetError with every problem of its lines."""
    return given_split(CsvReader(config).items(), config, readable(str(csv_file(config))))


class CsvReader:
    """Reads the lines of a dataset's file, collecting a sentence for each problem."""

    def __init__(self, config: DatasetConfig) -> None:
        self.config, self.path = config, csv_file(config)
        self.problems: list[tuple[int, str]] = []  # the line of each, and what is wrong there

    def items(self) -> list[Item]:
        """Return the images of the file in its order."""
        rows = self.rows()
        columns = self._columns(next(rows, (1, []))[1])
        items: list[Item] = []
        seen: dict[str, int] = {}
        groups: dict[str, tuple[str | None, int]] = {}
        parts: dict[str, dict[str, int]] = {}  # of each label, with the first line there
        for number, row in rows:
            if len(self.problems) >= _ENOUGH:
                break
            if not any(cell.strip() for cell in row):
                continue
            cells = {name: row[place].strip() if place < len(row) else "" for name, place in columns.items()}
            if cells["label"] and (part := part_named(cells.get("split", ""))):
                parts.setdefault(cells["label"], {}).setdefault(part, number)
            item = self._item(number, cells, seen)
            if item is None:
                continue
            if item.group is not None:
                known, first = groups.setdefault(item.group, (item.part, number))
                if known != item.part:
                    self._say(number, f"group {item.group!r} is in {item.part}, and in {known} on line {first}")
            items.append(item)
        for label, lines in parts.items() if len(self.problems) < _ENOUGH else ():  # all lines were read
            if "train" not in lines:
                part, number = next(iter(lines.items()))
                self._say(number, f"{part} has images of {one_line(label)!r}, of which train has none")
        self._refuse()
        return items

    def _say(self, line: int, text: str) -> None:
        self.problems.append((line, text))

    def _refuse(self) -> None:
        """Raise DatasetError with every problem that was found, by line, as far as a person reads them."""
        told = [f"{readable(str(self.path))}:{line}: {text}" for line, text in sorted(self.problems)]
        if more := told[_MOST_PROBLEMS:]:
            least = "at least " * (len(told) >= _ENOUGH)  # where the rest was not read
            told[_MOST_PROBLEMS:] = [f"... and {least}{len(more):,} more"]
        if told:
            raise DatasetError("\n".join(told))

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the cells of every row and the line that it ends on, the header's first."""
        import csv

        number = 0
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                delimiter = max(",;\t", key=next(_lines(file), "").count)
                file.seek(0)
                reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
                for row in reader:
                    number = reader.line_num
                    yield number, row
        except (OSError, ValueError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or one_line(str(error))
            if isinstance(error, csv.Error):
                reason = f"after line {number}: {reason}; is a quotation mark not closed?"
            raise DatasetError(f"{readable(str(self.path))} cannot be read as a csv file in UTF-8: {reason}") from error

    def _columns(self, header: Sequence[str]) -> dict[str, int]:
        """Return where each column is; of split and group, only if they are there, or named by a setting."""
        names = [cell.strip() for cell in header]
        columns: dict[str, int] = {}
        for column in ("path", "label", "split", "group"):
            setting = f"{column}_column"
            name = getattr(self.config, setting)
            if names.count(name) > 1:
                self._say(1, f"there are {names.count(name)} columns {name!r}; rename all but one")
            elif name in names:
                columns[column] = names.index(name)
            elif column in ("path", "label") or name != getattr(DatasetConfig, setting):
                self._say(1, f"there is no column {name!r} among {one_line(', '.join(names))!r}; set dataset.{setting}")
        self._refuse()
        return columns

    def _item(self, line: int, cells: Mapping[str, str], seen: dict[str, int]) -> Item | None:
        name, label, before = cells["path"].replace("\\", "/"), cells["label"], len(self.problems)
        path = Path(*[part for part in name.split("/") if part not in ("", ".")])
        if not name or not label:
            self._say(line, f"the {'path' if not name else 'label'} is empty")
        elif name.startswith("/") or ".." in path.parts or (len(name) > 1 and name[1] == ":"):
            self._say(line, f"{one_line(name)!r} leads out of the file's folder; give paths below it")
        elif path.as_posix() in seen:
            self._say(line, f"{one_line(name)!r} is on line {seen[path.as_posix()]} already")
        elif not os.path.isfile(self.path.parent / path):  # also where the name is too long
            self._say(line, f"there is no file {one_line(name)!r}")
        part = None
        if "split" in cells:
            part = part_named(cells["split"])
            if part is None:
                self._say(line, f"{one_line(cells['split'])!r} is not a part; write train, val or test")
        if len(self.problems) > before:
            return None
        seen[path.as_posix()] = line
        return Item(self.path.parent / path, label, part, cells.get("group") or None)


_USUAL = {
    "path_column": (
        "path",
        "file",
        "filename",
        "file_name",
        "filepath",
        "image",
        "image_path",
        "img",
        "image_id",
        "id",
    ),
    "label_column": ("label", "class", "category", "target", "class_name", "species", "y"),
    "split_column": ("split", "subset", "set", "partition", "fold"),
    "group_column": ("group", "patient", "patient_id", "subject", "subject_id"),
}


def guess_columns(config: DatasetConfig) -> dict[str, str]:
    """Return the settings of a csv file's columns by their usual names, as far as there are columns of these names.

    A column of splits is one whose words are all parts. Raises DatasetError when the file cannot be read.
    """
    rows = [row for _, row in CsvReader(config).rows()]
    header = [cell.strip() for cell in rows[0]] if rows else []
    found: dict[str, str] = {}
    for setting, usual in _USUAL.items():
        ranked = [name for word in usual for name in header if name.casefold() == word]
        if setting == "split_column":
            cells = {name: {row[header.index(name)] for row in rows[1:] if len(row) == len(header)} for name in ranked}
            ranked = [name for name in ranked if all(part_named(word) for word in cells[name])]
        if ranked:
            found[setting] = ranked[0]
    return found
