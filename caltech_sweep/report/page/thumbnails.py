"""Small pictures of dataset images, as data that a page carries itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from caltech_sweep.config import DatasetConfig
from caltech_sweep.errors import DatasetError
from caltech_sweep.study.definition import StudyDefinition
from caltech_sweep.tracking.records import TrialRecord, grey_bits

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 112  # pixels
Thumbnail = Callable[[str], str | None]  # from an image's path below the root to a data address, or None


def datasets_of(definition: StudyDefinition | None, run: TrialRecord, data: str | None) -> list[DatasetConfig]:
    """Return where a run's images may lie: only in ``data`` where that is given, else where they lay, or as usual."""
    config = definition.config({}).dataset if definition else DatasetConfig()
    recorded = run.params.get("dataset.root", "none")
    roots = [data] if data else [recorded, config.root] if recorded != "none" else [config.root]
    return [replace(config, root=root) for root in roots]


def find_thumbnails(configs: Sequence[DatasetConfig], run: TrialRecord) -> Thumbnail:
    """Return what makes thumbnails of the first dataset that is there, with the pixels that a run was trained on.

    Raises the first's DatasetError when none is there.
    """
    errors = []
    for config in configs:
        try:
            return open_thumbnails(config, grey_bits(run.tags))
        except DatasetError as error:
            errors.append(error)
    raise errors[0]


def open_thumbnails(config: DatasetConfig, bits: int = 16) -> Thumbnail:
    """Return what makes thumbnails of a dataset's images, of which ``bits`` are those of its sixteen-bit grey ones.

    Raises DatasetError when the images are not there.
    """
    from caltech_sweep.data.pixels import PixelRules, read_rgb
    from caltech_sweep.data.registry import dataset_of, dataset_root

    root, rules, read = dataset_root(config), PixelRules.of(config, bits), dataset_of(config).read(config)

    def thumbnail(name: str) -> str | None:
        # A store may come from anyone: it names images of the dataset, no other files.
        path = (root / name).resolve() if root else Path(name)
        if root and not path.is_relative_to(root.resolve()):
            return None
        try:
            return _encode(read_rgb(read(path), rules, _shrunk))
        except (OSError, TypeError, ValueError, DatasetError):
            return None

    return thumbnail


def _shrunk(image: Image) -> Image:
    from PIL.Image import Resampling

    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # A drawn shape is smaller than a thumbnail: enlarged with hard edges it stays what the network saw.
    return image.resize(size, Resampling.LANCZOS if scale < 1 else Resampling.NEAREST)


def _encode(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=72, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
