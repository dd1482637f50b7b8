"""The datasets by name: which images there are, where their files lie, and what an entry of its own may say.

To add one, add an entry to DATASETS: study files, ``--set``, the commands, the report and the docs read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caltech_sweep import paths
from caltech_sweep.config import DATASET_RULES, FIRST_DATASET_FIELDS, DatasetConfig
from caltech_sweep.data.fetch.remote import fetch_archive, fetched, is_remote
from caltech_sweep.data.given import csv_file, csv_split, fold_split, folder_split
from caltech_sweep.data.library import fetch_library, library_place, library_reader, library_split
from caltech_sweep.data.pixels import read_file
from caltech_sweep.data.shapes import draw_sample, shape_file, shapes_listing
from caltech_sweep.data.splits import BACKGROUND, SPLITS, Split, caltech_split, subset
from caltech_sweep.errors import DatasetError
from caltech_sweep.rules import Rule, one_of

if TYPE_CHECKING:
    from caltech_sweep.data.images import OpenedStore

Read = Callable[[Path], bytes]  # from a sample's path to the content of an image file
Place = Callable[[Path], "Path | None"]  # from a sample's path to the file that holds it and nothing else
CSV_COLUMNS = ("path_column", "label_column", "split_column", "group_column")
_MOST_DRAWN = 2_000_000_000  # bytes


@dataclass(frozen=True)
class Dataset:
    """One kind of dataset; each function is called with a dataset's settings.

    ``split`` returns every image without opening one, ``read`` what gives an image's content, and ``file`` what gives
    the file that it lies in, if any. ``root`` returns the folder that names of images are relative to, or raises
    DatasetError when it is not there; it is None where the images are no files. ``images`` is for pixels that are not
    decoded from files. ``fetch`` downloads what is not there; only a run does.
    """

    about: str  # in a few words
    split: Callable[[DatasetConfig], Split]
    root: Callable[[DatasetConfig], Path] | None = None
    read: Callable[[DatasetConfig], Read] = lambda config: read_file
    file: Callable[[DatasetConfig], Place] = lambda config: lambda path: path
    images: Callable[[DatasetConfig], OpenedStore] | None = None
    fetch: Callable[[DatasetConfig], None] | None = None
    settings: frozenset[str] = frozenset()  # that this dataset reads, and not every one
    claims: Callable[[Path], bool] = lambda place: False  # tells whether a folder or file of no stated kind is one


def caltech_root(config: DatasetConfig) -> Path:
    """Return the folder of Caltech-101's class folders; raise DatasetError when it is not there."""
    root = _local(config.root) if config.root else paths.caltech_root()
    if (root / paths.CALTECH_FOLDER).is_dir():
        root = root / paths.CALTECH_FOLDER
    return _there(root, "fetch it with `caltech-sweep data`, or name your copy with --data or CALTECH101_ROOT")


def _folder_root(config: DatasetConfig) -> Path:
    if config.root is None:
        raise DatasetError("dataset.root: a dataset named folder needs the folder of its class folders")
    return _there(_local(config.root), "name the folder with --data")


def _local(root: str) -> Path:
    return fetched(root) if is_remote(root) else paths.expanded(root)


def fetch_root(config: DatasetConfig) -> None:
    """Fetch a dataset's archive from an address that is not here yet; raise DatasetError when that fails."""
    if config.root is not None and is_remote(config.root):
        fetch_archive(config.root)


def _is_caltech(place: Path) -> bool:
    return any((place / mark).is_dir() for mark in (paths.CALTECH_FOLDER, BACKGROUND, "Faces_easy"))


def _there(root: Path, fix: str) -> Path:
    if not root.is_dir():
        raise DatasetError(f"there is no dataset folder {root}; {fix}")
    return root


def _caltech(config: DatasetConfig) -> Split:
    return caltech_split(caltech_root(config), config.val_fraction, config.split_seed)


def _folder(config: DatasetConfig) -> Split:
    return folder_split(_folder_root(config), config)


def _drawn(config: DatasetConfig) -> Read:
    return lambda path: shape_file(path, config.resize, config.split_seed)


def _drawings(config: DatasetConfig) -> OpenedStore:
    from caltech_sweep.data.images import store_of

    split = load_split(config)
    samples = [item for part in SPLITS for item in split.part(part)]
    if (size := len(samples) * config.resize**2 * 3) > _MOST_DRAWN:
        raise DatasetError(
            f"dataset.resize: {len(samples):,} shapes of {config.resize} pixels take {size / 1e9:.0f} GB of memory; "
            "lower it, or take fewer images with dataset.images_per_class"
        )
    return store_of([draw_sample(item.path, config.resize, config.split_seed) for item in samples])


DATASETS = {
    "caltech101": Dataset(
        "Caltech-101 with its official split",
        _caltech,
        caltech_root,
        fetch=fetch_root,
        settings=frozenset({"root", "val_fraction"}),
        claims=_is_caltech,
    ),
    "csv": Dataset(
        "a csv file with a path and a label a line, and a split and a group where it has them",
        csv_split,
        lambda config: csv_file(config).parent,
        settings=frozenset({"root", "val_fraction", "test_fraction", *CSV_COLUMNS}),
        claims=lambda place: place.suffix.lower() in (".csv", ".tsv"),
    ),
    "torchvision": Dataset(
        "one of torchvision's classification datasets, such as CIFAR10 or Flowers102",
        library_split,
        read=library_reader,
        file=library_place,
        fetch=fetch_library,
        settings=frozenset({"root", "source", "val_fraction", "test_fraction"}),
    ),
    "folder": Dataset(
        "a folder of class folders, or of folders train, val and test with these",
        _folder,
        _folder_root,
        fetch=fetch_root,
        settings=frozenset({"root", "val_fraction", "test_fraction"}),
        claims=lambda place: True,
    ),
    "shapes": Dataset("shapes drawn by code", lambda config: shapes_listing(), read=_drawn, images=_drawings),
}


def dataset_rules() -> dict[str, Rule]:
    """Return what each setting of a dataset may be, the names in DATASETS included."""
    return {**DATASET_RULES, "name": one_of(DATASETS)}


def dataset_of(config: DatasetConfig) -> Dataset:
    """Return the entry of a config's dataset; raise DatasetError for a name that has none."""
    try:
        return DATASETS[config.name]
    except KeyError:
        raise DatasetError(f"dataset.name: must be one of {', '.join(DATASETS)}, got {config.name!r}") from None


def dataset_root(config: DatasetConfig) -> Path | None:
    """Return the folder that a dataset's files lie in, None where they are drawn; DatasetError when it is not there."""
    entry = dataset_of(config)
    return entry.root(config) if entry.root else None


def load_split(config: DatasetConfig) -> Split:
    """Return the split of a dataset without decoding or drawing an image."""
    split = dataset_of(config).split(config)
    if (config.fold or 1) > config.folds:
        raise DatasetError(f"dataset.fold: there is no fold {config.fold} of {config.folds}; set dataset.folds")
    return subset(fold_split(split, config) if config.folds > 1 else split, config)


def name_for(place: Path) -> str:
    """Return the name of the dataset that a folder or file is: the first that claims it."""
    return next(name for name, entry in DATASETS.items() if entry.claims(place))


def unread(dataset: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield (setting, sentence) for every setting of a study's dataset that only datasets of other names read."""
    name = str(dataset.get("name", DatasetConfig.name))
    entry = DATASETS[name]
    for setting in dataset:
        readers = [other for other, each in DATASETS.items() if setting in each.settings]
        if readers and setting not in entry.settings and setting not in FIRST_DATASET_FIELDS:
            yield setting, f"is not read by a dataset named {name}; it is for {', '.join(readers)}"
