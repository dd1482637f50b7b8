"""Small pictures of dataset images, as data that a page carries itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from caltech_sweep.config import DatasetConfig
from caltech_sweep.errors import DatasetError
from caltech_sweep.records import TrialRecord

SIDE = 112  # pixels
Thumbnail = Callable[[str], str | None]  # from an image's path below the root to a data address, or None


def datasets_of(document: Mapping[str, Any], run: TrialRecord, data: str | None) -> list[DatasetConfig]:
    """Return where a run's images may lie: in ``data`` alone where that is given, else where they lay, or as usual."""
    known = {field.name for field in fields(DatasetConfig)}
    values = {key: value for key, value in (document.get("dataset") or {}).items() if key in known}
    config = DatasetConfig(**values)
    recorded = run.params.get("dataset.root", "none")
    roots = [data] if data else [recorded, config.root] if recorded != "none" else [config.root]
    return [replace(config, root=root) for root in roots]


def find_thumbnails(configs: Sequence[DatasetConfig]) -> Thumbnail:
    """Return what makes thumbnails of the first dataset that is there; raise the first's DatasetError when none is."""
    errors = []
    for config in configs:
        try:
            return open_thumbnails(config)
        except DatasetError as error:
            errors.append(error)
    raise errors[0]


def open_thumbnails(config: DatasetConfig) -> Thumbnail:
    """Return what makes thumbnails of a dataset's images; raise DatasetError when the images are not there."""
    if config.name == "shapes":
        return _drawn(config)
    from caltech_sweep.data import dataset_root

    root = dataset_root(config).resolve()

    def thumbnail(name: str) -> str | None:
        from PIL import Image

        path = (root / name).resolve()
        if not path.is_relative_to(root):  # a store may come from anyone; it names images, no other files
            return None
        try:
            with Image.open(path) as image:
                image.draft("RGB", (2 * SIDE, 2 * SIDE))
                return _encode(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None

    return thumbnail


def _drawn(config: DatasetConfig) -> Thumbnail:
    """Draw the shapes again, which are no files."""
    from PIL import Image

    from caltech_sweep.data.shapes import shapes_split
    from caltech_sweep.data.splits import PARTS

    try:
        split, images = shapes_split(config.resize, config.split_seed)
    except (TypeError, ValueError, MemoryError) as error:
        raise DatasetError(f"the shapes cannot be drawn again: {error}") from error
    names = (item.path.as_posix() for part in PARTS for item in split.part(part))
    by_name = dict(zip(names, images, strict=True))
    return lambda name: _encode(Image.fromarray(by_name[name])) if name in by_name else None


def _encode(image: Any) -> str:
    from PIL import Image

    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # A drawn shape is smaller than a thumbnail: enlarged with hard edges it stays what the network saw.
    resampling = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    buffer = io.BytesIO()
    image.resize(size, resampling).save(buffer, "WEBP", quality=72, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
