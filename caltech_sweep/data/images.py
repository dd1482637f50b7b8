"""Images by number, whole or cut, from wherever they are kept; and a dataset's, with their labels, by part.

The whole resized image is asked for where TenCrop needs its corners; images are not square, so a store is one flat
buffer with offsets and shapes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as tvf
from torchvision.transforms.v2.functional import resize_image

from caltech_sweep.data.digests import Files, why_unreadable
from caltech_sweep.data.pixels import DEFAULT_RULES, PixelRules, read_rgb
from caltech_sweep.data.splits import SPLITS, Sample, Split
from caltech_sweep.errors import DatasetError
from caltech_sweep.heartbeat import beat
from caltech_sweep.machine import cores
from caltech_sweep.text import readable

_LARGEST = 180_000_000  # pixels of a resized image; about what Pillow takes for a decompression bomb


def decode(content: bytes, resize: int, rules: PixelRules = DEFAULT_RULES) -> np.ndarray:
    """Return a file's content as (H, W, 3) uint8 RGB, its short side ``resize`` pixels, as torchvision's Resize.

    Raises DatasetError with the reason for what is damaged, is no image, or has pixels that eight bits cannot show.
    """

    def resized(image: Image.Image) -> Image.Image:
        check_shape(image.size, resize)
        return tvf.resize(image, [resize], tvf.InterpolationMode(rules.interpolation))

    return np.asarray(read_rgb(content, rules, resized))


def resized_size(size: tuple[int, int], resize: int) -> tuple[int, int]:
    """Return the sides of a picture once its short side is ``resize`` pixels, the short one first."""
    short, long = sorted(size)
    return resize, int(resize * long / short)


def check_shape(size: tuple[int, int], resize: int) -> None:
    """Refuse a ribbon that is a small file and would be gigabytes once its short side is resized."""
    short, long = sorted(size)
    if long * resize * resize > _LARGEST * short:
        raise DatasetError(
            f"its {size[0]} x {size[1]} pixels have too extreme an aspect ratio to resize to {resize}; crop it"
        )


def center_crop(image: np.ndarray, crop: int) -> np.ndarray:
    """Return a view of the centre of a (H, W, 3) array, equal to torchvision's CenterCrop."""
    top, left = (round((side - crop) / 2) for side in image.shape[:2])
    return image[top : top + crop, left : left + crop]


class ImageStore:
    """Decoded images by number: (H, W, 3) uint8 arrays over one flat buffer, of (N, 2) heights and widths."""

    def __init__(self, flat: np.ndarray, shapes: np.ndarray | Sequence[tuple[int, int]]) -> None:
        self._flat, self._shapes = flat, np.array(shapes, np.int64).reshape(-1, 2)
        self._offsets = np.concatenate([[0], np.cumsum(self._shapes.prod(axis=1) * 3)])

    def __len__(self) -> int:
        return len(self._shapes)

    def array(self, index: int) -> np.ndarray:
        """Return image ``index`` as a (H, W, 3) uint8 array, which may be a view of the buffer."""
        height, width = self._shapes[index]
        return self._flat[self._offsets[index] : self._offsets[index + 1]].reshape(height, width, 3)

    def whole(self, index: int) -> np.ndarray:
        """Return image ``index`` with all that was resized of it; raise DatasetError where only a part is kept."""
        return self.array(index)

    def tensor(self, index: int) -> torch.Tensor:
        """Return image ``index`` as a (3, H, W) uint8 tensor of its own."""
        return torch.from_numpy(np.array(self.whole(index))).permute(2, 0, 1).contiguous()

    def center_crops(self, indices: Sequence[int], crop: int, pinned: bool = False) -> torch.Tensor:
        """Return (N, 3, crop, crop) uint8, equal to torchvision's CenterCrop of each image.

        The pixels are copied straight out of where they are kept; in memory the channels come last. ``pinned`` is
        memory that a GPU reads by itself.
        """
        crops = torch.empty((len(indices), crop, crop, 3), dtype=torch.uint8, pin_memory=pinned)
        out = crops.numpy()

        def fill(position: int) -> None:
            out[position] = center_crop(self.array(indices[position]), crop)

        self._do(fill, range(len(indices)))
        return crops.permute(0, 3, 1, 2)

    def resized_crops(
        self, indices: Sequence[int], crop: int, cuts: Sequence[Callable[[int, int], tuple[int, int, int, int]]]
    ) -> torch.Tensor:
        """Return (N, 3, crop, crop) uint8, equal to torchvision's ``resized_crop`` of each whole image.

        ``cuts`` give top, left, height and width of the box of each by the height and width of its image.
        """
        out = torch.empty((len(indices), 3, crop, crop), dtype=torch.uint8)

        def fill(position: int) -> None:
            image = self.whole(indices[position])
            top, left, height, width = cuts[position](*image.shape[:2])
            box = torch.from_numpy(np.array(image[top : top + height, left : left + width])).permute(2, 0, 1)
            out[position] = resize_image(box, [crop, crop], antialias=True)

        self._do(fill, range(len(indices)))
        return out

    def _do(self, work: Callable[[int], None], numbers: Iterable[int]) -> None:
        for number in numbers:
            work(number)


class CropStore(ImageStore):
    """The centre crops of images, and nothing else of them."""

    def whole(self, index: int) -> np.ndarray:
        """Raise DatasetError: what lies outside of the crop is not kept."""
        raise DatasetError("dataset.cache: crop keeps centre crops only, and whole images are asked for; set resized")


class FileStore(ImageStore):
    """Images that are decoded whenever they are asked for, from files whose contents are known by their digests."""

    def __init__(self, files: Files, digests: np.ndarray, decode: Callable[[bytes], np.ndarray]) -> None:
        self._files, self._digests, self._decode = files, digests, decode
        self._pool = ThreadPoolExecutor(cores())

    def __len__(self) -> int:
        return len(self._files.paths)

    def array(self, index: int) -> np.ndarray:
        """Return image ``index``; raise DatasetError when its file is not what it was."""
        path = self._files.paths[index]
        try:
            content = self._files.read(path)
            if hashlib.sha256(content).digest() != self._digests[index].tobytes():
                raise DatasetError("it has changed since the study was started; run again")
            return self._decode(content)
        except (OSError, DatasetError) as error:
            raise DatasetError(f"{readable(str(path))} cannot be read: {why_unreadable(error)}") from error

    def _do(self, work: Callable[[int], None], numbers: Iterable[int]) -> None:
        for _ in self._pool.map(work, numbers):
            beat()


@dataclass(frozen=True)
class OpenedStore:
    """A dataset's decoded images, the digest that names them, and the bits of its sixteen-bit grey images."""

    images: ImageStore
    key: str
    grey_bits: int = 16
    files: np.ndarray = field(default_factory=lambda: np.empty((0, 32), np.uint8))  # each file's SHA-256
    to_build: int = 0  # bytes of a cache that is not there yet


def store_of(images: Sequence[np.ndarray]) -> OpenedStore:
    """Return (H, W, 3) uint8 pictures that are in memory, named by their pixels."""
    flat = np.concatenate([image.ravel() for image in images])
    store = ImageStore(flat, [(image.shape[0], image.shape[1]) for image in images])
    return OpenedStore(store, hashlib.sha256(flat.data).hexdigest()[:16])


class LoadedData:
    """The images and labels of one dataset, cut into train, val and test."""

    def __init__(self, split: Split, store: OpenedStore, root: Path | None) -> None:
        self.split, self._store, self.grey_bits, self.to_build = split, store.images, store.grey_bits, store.to_build
        self._root = "" if root is None else f"{root}{os.sep}"
        starts = np.cumsum([0, *(len(split.part(part)) for part in SPLITS)])
        self._starts = {part: int(start) for part, start in zip(SPLITS, starts, strict=False)}
        self.fingerprint = self._fingerprint(store.key)

    def _fingerprint(self, key: str) -> str:
        """Return the digest of [key, [[part, class, label, name], ...]] as JSON, which is never whole in memory."""
        content = hashlib.sha256(f"[{json.dumps(key)}, [".encode())
        comma = ""
        for part in SPLITS:
            for item in self.split.part(part):
                entry = json.dumps([part, item.class_name, item.label, self._name(item)])
                content.update(f"{comma}{entry}".encode())
                comma = ", "
        content.update(b"]]")
        return content.hexdigest()[:16]

    def _name(self, item: Sample) -> str:
        return readable(str(item.path).removeprefix(self._root).replace(os.sep, "/"))

    def paths(self, part: str) -> list[str]:
        """Return each image's path below the dataset's root."""
        return [self._name(item) for item in self.split.part(part)]

    def labels(self, part: str) -> torch.Tensor:
        """Return (N,) int64 class indices."""
        return torch.tensor([item.label for item in self.split.part(part)], dtype=torch.int64)

    def center_crops(
        self, part: str, crop: int, indices: Sequence[int] | None = None, pinned: bool = False
    ) -> torch.Tensor:
        """Return (N, 3, crop, crop) uint8 centre crops of a part's images at ``indices``, or of all of them."""
        start = self._starts[part]
        wanted = range(len(self.split.part(part))) if indices is None else indices
        return self._store.center_crops([start + index for index in wanted], crop, pinned)

    def resized_crops(
        self,
        part: str,
        crop: int,
        indices: Sequence[int],
        cuts: Sequence[Callable[[int, int], tuple[int, int, int, int]]],
    ) -> torch.Tensor:
        """Return (N, 3, crop, crop) uint8: boxes of a part's whole images, resized, as ``cuts`` give them."""
        return self._store.resized_crops([self._starts[part] + index for index in indices], crop, cuts)

    def ten_crops(self, part: str, index: int, crop: int) -> torch.Tensor:
        """Return (10, 3, crop, crop) uint8, equal to torchvision's TenCrop of the resized image."""
        return torch.stack(tvf.ten_crop(self._store.tensor(self._starts[part] + index), [crop]))
