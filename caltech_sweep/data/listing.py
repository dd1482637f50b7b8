"""The image files of a folder: whatever Pillow reads, at any depth; and what is passed over, counted by kind."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from caltech_sweep.data.pixels import suffixes
from caltech_sweep.errors import DatasetError
from caltech_sweep.text import counted, one_line, readable

_DEEPEST = 200  # folders within folders
_KINDS = 8  # kinds of files, and names of empty classes, that a sentence tells
# What systems and tools leave in folders; names that start with a dot are hidden as well.
_LEFTOVERS = frozenset(
    {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "#recycle", "lost+found"}
)
_AGAIN = "link to a folder that is read already"
_PLURALS = {"image in no class": "images in no class", _AGAIN: "links to folders that are read already"}


def is_hidden(name: str) -> bool:
    """Tell what a system or a tool left in a folder, and users do not see, from their files."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


def by_name(path: Path) -> tuple[str, str]:
    """Return the sort key of a class folder: letter case decides only between names that are otherwise equal."""
    return path.name.lower(), path.name


@dataclass
class PassedOver:
    """What was found besides images."""

    kinds: Counter[str] = field(default_factory=Counter)  # of files, by extension
    others: Counter[str] = field(default_factory=Counter)  # by what they are, in the singular
    empty: list[str] = field(default_factory=list)  # names of classes

    def add(self, other: PassedOver) -> None:
        """Add what was found elsewhere."""
        self.kinds += other.kinds
        self.others += other.others
        self.empty += other.empty

    def __str__(self) -> str:
        """Return it as the end of a sentence, such as "12 .txt, 2 hidden folders, 1 empty class 'x'", or ""."""
        ranked = sorted(self.kinds.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{number:,} {kind}" for kind, number in ranked[:_KINDS]]
        if rest := sum(number for _, number in ranked[_KINDS:]):
            parts.append(counted(rest, "other file"))
        parts += [counted(number, what, _PLURALS.get(what, "")) for what, number in sorted(self.others.items())]
        if self.empty:
            names = ", ".join(f"'{readable(name)}'" for name in self.empty[:_KINDS])
            more = ", ..." if len(self.empty) > _KINDS else ""
            parts.append(f"{counted(len(self.empty), 'empty class', 'empty classes')} {names}{more}")
        return ", ".join(parts)


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what lies in a folder, by name; raise DatasetError when it cannot be read."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(f"the folder {readable(str(folder))} cannot be read: {error.strerror}") from error


def find_images(folder: Path, passed: PassedOver, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield the image files in and below a folder; a folder that is ``seen`` by a link is not entered again."""
    if len(folder.parts) > _DEEPEST:
        raise DatasetError(
            f"{one_line(readable(str(folder)))} lies in more than {_DEEPEST} folders; move its images up"
        )
    status = folder.stat()
    seen.add((status.st_dev, status.st_ino))
    for entry in entries(folder):
        yield from _images_of(entry, passed, seen)


def _images_of(entry: os.DirEntry[str], passed: PassedOver, seen: set[tuple[int, int]]) -> Iterator[Path]:
    if is_hidden(entry.name):
        passed.others["hidden folder" if is_dir(entry) else "hidden file"] += 1
    elif is_dir(entry):
        status = entry.stat()
        if (status.st_dev, status.st_ino) in seen:
            passed.others[_AGAIN] += 1
        else:
            yield from find_images(Path(entry.path), passed, seen)
    elif entry.is_symlink() and not os.path.exists(entry.path):
        passed.others["broken link"] += 1
    elif not entry.is_file():
        passed.others["special file"] += 1
    elif os.path.splitext(entry.name)[1].lower() in suffixes():
        yield Path(entry.path)
    else:
        passed.kinds[readable(Path(entry.name).suffix.lower()) or "without an extension"] += 1


def is_dir(entry: os.DirEntry[str]) -> bool:
    """Tell whether something in a folder is a folder, or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def folders_in(folder: Path) -> list[os.DirEntry[str]]:
    """Return the folders in a folder that count, by name; raise DatasetError when it cannot be read."""
    return [entry for entry in entries(folder) if not is_hidden(entry.name) and is_dir(entry)]


def list_classes(root: Path) -> tuple[dict[str, Sequence[Path]], PassedOver]:
    """Return the images of each class, a top folder of ``root``, by name; and what was passed over."""
    passed = PassedOver()
    status = root.stat()
    classes: dict[str, Sequence[Path]] = {}
    for entry in sorted(entries(root), key=lambda entry: by_name(Path(entry.name))):
        found = list(_images_of(entry, passed, {(status.st_dev, status.st_ino)}))
        if not is_dir(entry):
            passed.others["image in no class"] += len(found)
        elif readable(entry.name) in classes:  # bytes that are shown as an escape, and a name with that escape
            raise DatasetError(f"two class folders of {readable(str(root))} read '{readable(entry.name)}'; rename one")
        elif found:
            classes[readable(entry.name)] = found
        elif not is_hidden(entry.name):
            passed.empty.append(entry.name)
    passed.others = +passed.others  # without those that were met no time
    return classes, passed
