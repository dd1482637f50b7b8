"""Datasets: fetched, split, decoded once, and handed out as tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from caltech_sweep import paths
from caltech_sweep.config import DatasetConfig
from caltech_sweep.data.registry import dataset_of, dataset_root, load_split
from caltech_sweep.data.splits import SPLITS, Split, in_two_parts, without

if TYPE_CHECKING:
    from caltech_sweep.data.cache import Progress
    from caltech_sweep.data.digests import Files
    from caltech_sweep.data.images import LoadedData

__all__ = [
    "dataset_root",
    "image_files",
    "inspect_dataset",
    "load_dataset",
    "load_files",
    "load_split",
    "open_dataset",
]


def load_dataset(
    config: DatasetConfig,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    verify: bool = False,
) -> LoadedData:
    """Return a dataset ready to train on, decoding its images into the shared cache the first time.

    ``say`` is told the size of a cache before it is built; ``verify`` reads all files and the whole cache again.
    """
    entry = dataset_of(config)
    if entry.fetch is not None:
        entry.fetch(config)
    return open_dataset(config, progress, say, verify)


def open_dataset(
    config: DatasetConfig,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    verify: bool = False,
) -> LoadedData:
    """Return what :func:`load_dataset` does, of files that are there already."""
    from caltech_sweep.data.cache import bad_images, open_store
    from caltech_sweep.data.images import LoadedData

    entry = dataset_of(config)
    root, split = dataset_root(config), load_split(config)
    if entry.images is not None:
        return LoadedData(split, entry.images(config), root)
    cache = paths.image_cache()
    if config.on_bad_image == "skip":
        split = without(split, bad_images(_files(split, config), config, cache, write=True), root)
    opened = open_store(_files(split, config), config, cache, progress, say, verify)
    return LoadedData(in_two_parts(split, opened.files, root), opened, root)


def inspect_dataset(config: DatasetConfig, verify: bool = False) -> LoadedData:
    """Return what :func:`load_dataset` would, but for the pixels, with nothing written.

    Raises its DatasetError, but for damage that only decoding would show.
    """
    from caltech_sweep.data.cache import bad_images, inspect_store
    from caltech_sweep.data.images import LoadedData

    entry = dataset_of(config)
    if entry.images is not None:
        return load_dataset(config)
    root, split, cache = dataset_root(config), load_split(config), paths.image_cache()
    if config.on_bad_image == "skip":
        split = without(split, bad_images(_files(split, config), config, cache, write=False), root)
    opened = inspect_store(_files(split, config), config, cache, verify)
    return LoadedData(in_two_parts(split, opened.files, root), opened, root)


def _files(split: Split, config: DatasetConfig) -> Files:
    from caltech_sweep.data.digests import Files

    entry = dataset_of(config)
    return Files(image_files(split), entry.read(config), entry.file(config))


def load_files(config: DatasetConfig, split: Split, root: Path) -> LoadedData:
    """Return the images of a split whose files were copied below ``root``, decoding them the first time."""
    from caltech_sweep.data.cache import open_store
    from caltech_sweep.data.digests import Files
    from caltech_sweep.data.images import LoadedData
    from caltech_sweep.data.pixels import read_file

    opened = open_store(Files(image_files(split), read_file, lambda path: path), config, paths.image_cache())
    return LoadedData(split, opened, root)


def image_files(split: Split) -> list[Path]:
    """Return the files of a split's images in the order of their numbers: those of train, val and test."""
    return [item.path for part in SPLITS for item in split.part(part)]
