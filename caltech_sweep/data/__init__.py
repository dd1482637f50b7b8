"""Datasets: fetched, split, decoded once, and handed out as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from caltech_sweep import paths
from caltech_sweep.config import DatasetConfig
from caltech_sweep.data.registry import dataset_of, dataset_root, load_split
from caltech_sweep.data.splits import SPLITS, Split, in_two_parts, without

if TYPE_CHECKING:
    from caltech_sweep.data.images import LoadedData, Progress

__all__ = [
    "dataset_root",
    "image_files",
    "inspect_dataset",
    "load_dataset",
    "load_files",
    "load_split",
    "open_dataset",
]


def load_dataset(config: DatasetConfig, progress: Progress | None = None) -> LoadedData:
    """Return a dataset ready to train on, decoding its images into the shared cache the first time."""
    entry = dataset_of(config)
    if entry.fetch is not None:
        entry.fetch(config)
    return open_dataset(config, progress)


def open_dataset(config: DatasetConfig, progress: Progress | None = None) -> LoadedData:
    """Return what :func:`load_dataset` does, of files that are there already."""
    from caltech_sweep.data.images import LoadedData, bad_images, open_store
    from caltech_sweep.data.pixels import PixelRules

    entry = dataset_of(config)
    root, split = dataset_root(config), load_split(config)
    if entry.images is not None:
        return LoadedData(split, entry.images(config), root)
    rules, read, cache = PixelRules.of(config), entry.read(config), paths.image_cache()
    if config.on_bad_image == "skip":
        split = without(split, bad_images(image_files(split), config.resize, rules, cache, read, write=True), root)
    opened = open_store(image_files(split), config.resize, rules, cache, progress, read)
    return LoadedData(in_two_parts(split, opened.files, root), opened, root)


def inspect_dataset(config: DatasetConfig) -> LoadedData:
    """Return what :func:`load_dataset` would, but for the pixels, with nothing written.

    Raises its DatasetError, but for damage that only decoding would show.
    """
    from caltech_sweep.data.images import LoadedData, bad_images, inspect_store
    from caltech_sweep.data.pixels import PixelRules

    entry = dataset_of(config)
    if entry.images is not None:
        return load_dataset(config)
    root, split, rules, read = dataset_root(config), load_split(config), PixelRules.of(config), entry.read(config)
    cache = paths.image_cache()
    if config.on_bad_image == "skip":
        split = without(split, bad_images(image_files(split), config.resize, rules, cache, read, write=False), root)
    opened = inspect_store(image_files(split), config.resize, rules, cache, read)
    return LoadedData(in_two_parts(split, opened.files, root), opened, root)


def load_files(config: DatasetConfig, split: Split, root: Path) -> LoadedData:
    """Return the images of a split whose files were copied below ``root``, decoding them the first time."""
    from caltech_sweep.data.images import LoadedData, open_store
    from caltech_sweep.data.pixels import PixelRules

    opened = open_store(image_files(split), config.resize, PixelRules.of(config), paths.image_cache(), None)
    return LoadedData(split, opened, root)


def image_files(split: Split) -> list[Path]:
    """Return the files of a split's images in the order of their numbers: those of train, val and test."""
    return [item.path for part in SPLITS for item in split.part(part)]
