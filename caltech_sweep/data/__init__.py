"""Datasets: fetched, split, decoded once, and handed out as tensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

from caltech_sweep import paths
from caltech_sweep.config import DatasetConfig
from caltech_sweep.data.splits import SPLITS, Split, caltech_split, folder_split, subset
from caltech_sweep.errors import DatasetError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caltech_sweep.data.images import LoadedData, Progress


def dataset_root(config: DatasetConfig) -> Path:
    """Return the folder of class folders that a config names; raise DatasetError when it is not there."""
    if config.name == "folder" and config.root is None:
        raise DatasetError("dataset.root: a dataset named folder needs the folder of its class folders")
    if config.name not in ("caltech101", "folder"):
        raise DatasetError(f"dataset.name: must be caltech101, shapes or folder, got {config.name!r}")
    root = Path(config.root) if config.root else paths.caltech_root()
    if config.name == "caltech101" and (root / paths.CALTECH_FOLDER).is_dir():
        root = root / paths.CALTECH_FOLDER
    if not root.is_dir():
        fix = (
            "fetch it with `caltech-sweep data`, or name your copy with --data or CALTECH101_ROOT"
            if config.name == "caltech101"
            else "name the folder with --data"
        )
        raise DatasetError(f"there is no dataset folder {root}; {fix}")
    return root


def load_split(config: DatasetConfig) -> Split:
    """Return the split of a dataset without decoding or drawing an image."""
    from caltech_sweep.data.shapes import shapes_listing

    if config.name == "shapes":
        return subset(shapes_listing(), config)
    root = dataset_root(config)
    if config.name == "caltech101":
        return subset(caltech_split(root, config.val_fraction, config.split_seed), config)
    return subset(folder_split(root, config.val_fraction, config.test_fraction, config.split_seed), config)


def load_dataset(config: DatasetConfig, progress: Progress | None = None) -> LoadedData:
    """Return a dataset ready to train on, decoding its images into the shared cache the first time."""
    import numpy as np

    from caltech_sweep.data.images import ImageStore, LoadedData, OpenedStore, open_store
    from caltech_sweep.data.pixels import PixelRules
    from caltech_sweep.data.shapes import shapes_split

    if config.name == "shapes":
        split, images = shapes_split(config.resize, config.split_seed)
        if config.classes is not None or config.images_per_class is not None:
            everything = [item for part in SPLITS for item in split.part(part)]
            split = subset(split, config)
            kept = {item.path for part in SPLITS for item in split.part(part)}
            images = [image for item, image in zip(everything, images, strict=True) if item.path in kept]
        flat = np.concatenate([image.ravel() for image in images])
        store = ImageStore(flat, [(image.shape[0], image.shape[1]) for image in images])
        return LoadedData(split, OpenedStore(store, hashlib.sha256(flat.data).hexdigest()[:16]), None)
    root = dataset_root(config)
    split = load_split(config)
    opened = open_store(_files(split), config.resize, PixelRules.of(config), paths.image_cache(), progress)
    return LoadedData(split, opened, root)


def inspect_dataset(config: DatasetConfig) -> LoadedData:
    """Return what :func:`load_dataset` would, but for the pixels, with nothing written.

    Raises its DatasetError, but for damage that only decoding would show.
    """
    from caltech_sweep.data.images import LoadedData, inspect_store
    from caltech_sweep.data.pixels import PixelRules

    if config.name == "shapes":
        return load_dataset(config)
    root, split = dataset_root(config), load_split(config)
    return LoadedData(
        split, inspect_store(_files(split), config.resize, PixelRules.of(config), paths.image_cache()), root
    )


def _files(split: Split) -> list[Path]:
    return [item.path for part in SPLITS for item in split.part(part)]
