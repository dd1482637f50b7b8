"""Images decoded once: a memory-mapped uint8 cache that every worker of the machine shares.

The whole resized image is kept, not its centre crop, because TenCrop's corners need it; images are not square,
so the store is one flat buffer with offsets and shapes. The cache's name is a digest of the file list, the
files' contents, the geometry and the decoder's version: another of any of these is another cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import functional as tvf

from caltech_sweep.data.splits import PARTS, Item, Split
from caltech_sweep.errors import DatasetError

Progress = Callable[[int, int], None]
FORMAT = 1
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I")
_LARGEST = 180_000_000  # pixels of a resized image; about what Pillow takes for a decompression bomb
_WAVE = 256  # images decoded ahead of the writer; bounds the memory that a cache takes while it is built

# Pillow warns of large images, odd palettes and broken EXIF data, none of which harms the pixels.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(content: bytes, resize: int) -> np.ndarray:
    """Return an image file's content as (H, W, 3) uint8 RGB, its short side ``resize`` pixels, as torchvision's Resize.

    Sixteen-bit greyscale is scaled to eight bits, since Pillow's own conversion would clip it to white. Raises
    DatasetError with the reason for what is damaged, is no image, or has pixels that eight bits cannot show.
    """
    if not content:
        raise DatasetError("it is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            _check_shape(image.size, resize)
            return np.asarray(tvf.resize(_in_eight_bits(image).convert("RGB"), [resize]))
    except DatasetError:
        raise
    except UnidentifiedImageError as error:
        raise DatasetError("it is of no kind that is known") from error
    except Image.DecompressionBombError as error:
        raise DatasetError(str(error).rstrip(".")) from error
    except Exception as error:  # Pillow's decoders raise errors of many kinds on damaged files
        raise DatasetError(f"{str(error) or type(error).__name__}; is it complete?") from error


def _check_shape(size: tuple[int, int], resize: int) -> None:
    """Refuse a ribbon that is a small file and would be gigabytes once its short side is resized."""
    short, long = sorted(size)
    if long * resize * resize > _LARGEST * short:
        raise DatasetError(f"its {size[0]} x {size[1]} pixels are too long a ribbon to resize to {resize}; crop it")


def _in_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise DatasetError("its pixels are floats, whose range nobody knows; convert it to 8 or 16 bits")
    if image.mode not in _SIXTEEN_BIT:
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise DatasetError("its pixels have more than 16 bits; convert it to 8 or 16")
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def _content_digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _decode_each(paths: Sequence[Path], resize: int, progress: Progress | None) -> Iterator[np.ndarray]:
    """Decode every file in order, and at the end name all that cannot be decoded in one error."""
    bad: list[str] = []

    def attempt(path: Path) -> np.ndarray | str:
        try:
            return decode(path.read_bytes(), resize)
        except OSError as error:
            return f"{path} ({error.strerror})"
        except DatasetError as error:
            return f"{path} ({error})"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), _WAVE):
            for done, result in enumerate(pool.map(attempt, paths[start : start + _WAVE]), start=start + 1):
                if isinstance(result, str):
                    bad.append(result)
                elif not bad:
                    yield result
                if progress:
                    progress(done, len(paths))
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise DatasetError(
            f"{len(bad)} of {len(paths)} image files cannot be read: {'; '.join(bad[:10])}{more}; "
            "replace or remove them and run again"
        )


def _write_atomically(target: Path, chunks: Iterable[bytes]) -> None:
    """Write a file that is either absent or whole, also when two processes write it at once.

    The chunks are consumed as they are written, so that a dataset need not fit in memory.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    except OSError as error:
        raise DatasetError(
            f"the image cache folder {target.parent} cannot be written ({error.strerror}); "
            "name another with the environment variable CALTECH_SWEEP_DATA"
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise DatasetError(f"the image cache {target} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


class ImageStore:
    """Decoded images by number: (H, W, 3) uint8 arrays over one flat buffer."""

    def __init__(self, flat: np.ndarray, shapes: Sequence[tuple[int, int]]) -> None:
        self._flat, self._shapes = flat, list(shapes)
        sizes = np.array([height * width * 3 for height, width in shapes], dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        return len(self._shapes)

    def array(self, index: int) -> np.ndarray:
        """Return image ``index`` as a (H, W, 3) uint8 view of the buffer."""
        height, width = self._shapes[index]
        return self._flat[self._offsets[index] : self._offsets[index + 1]].reshape(height, width, 3)

    def tensor(self, index: int) -> torch.Tensor:
        """Return image ``index`` as a (3, H, W) uint8 tensor of its own."""
        return torch.from_numpy(np.array(self.array(index))).permute(2, 0, 1).contiguous()

    def center_crops(self, indices: Sequence[int], crop: int) -> torch.Tensor:
        """Return (N, 3, crop, crop) uint8, equal to torchvision's CenterCrop of each image.

        The pixels are copied straight out of the shared buffer; in memory the channels come last.
        """
        out = np.empty((len(indices), crop, crop, 3), dtype=np.uint8)
        for position, index in enumerate(indices):
            image = self.array(index)
            top, left = (round((side - crop) / 2) for side in image.shape[:2])
            out[position] = image[top : top + crop, left : left + crop]
        return torch.from_numpy(out).permute(0, 3, 1, 2)


def _open(base: Path) -> ImageStore | None:
    """Open a cache, or return None when there is none or it is damaged."""
    try:
        header = json.loads(base.with_suffix(".json").read_text())
        flat = np.memmap(base.with_suffix(".bin"), np.uint8, "r")
    except (OSError, ValueError):
        return None
    if flat.nbytes != header["bytes"] or zlib.crc32(flat.data) != header["crc32"]:
        return None
    return ImageStore(flat, [tuple(shape) for shape in header["shapes"]])


def open_store(paths: Sequence[Path], resize: int, cache: Path, progress: Progress | None) -> tuple[ImageStore, str]:
    """Open the cache of these files, building it first when it is missing or damaged.

    Returns the store and the digest that names it.
    """
    decoder = f"{FORMAT}|{PIL.__version__}|{torchvision.__version__}|{resize}"
    try:
        key = hashlib.sha256(f"{decoder}|{_content_digest(paths)}".encode()).hexdigest()[:16]
    except OSError as error:
        raise DatasetError(f"{error.filename} cannot be read: {error.strerror}") from error
    base = cache / f"images-{key}"
    store = _open(base)
    if store is not None:
        return store, key
    shapes: list[list[int]] = []
    written = checksum = 0

    def pixels() -> Iterator[bytes]:
        nonlocal written, checksum
        for image in _decode_each(paths, resize, progress):
            data = image.tobytes()
            shapes.append(list(image.shape[:2]))
            written, checksum = written + len(data), zlib.crc32(data, checksum)
            yield data

    _write_atomically(base.with_suffix(".bin"), pixels())
    header = {"bytes": written, "crc32": checksum, "shapes": shapes}
    _write_atomically(base.with_suffix(".json"), [json.dumps(header).encode()])
    opened = _open(base)
    if opened is None:
        raise DatasetError(f"the image cache {base}.bin was damaged as soon as it was written; is the disk failing?")
    return opened, key


class LoadedData:
    """The images and labels of one dataset, cut into train, val and test."""

    def __init__(self, split: Split, store: ImageStore, key: str, root: Path | None) -> None:
        self.split, self._store, self._root = split, store, root
        starts = np.cumsum([0, *(len(split.part(part)) for part in PARTS)])
        self._starts = {part: int(start) for part, start in zip(PARTS, starts, strict=False)}
        listing = [(part, item.class_name, item.label, self._name(item)) for part in PARTS for item in split.part(part)]
        self.fingerprint = hashlib.sha256(json.dumps([key, listing]).encode()).hexdigest()[:16]

    def _name(self, item: Item) -> str:
        return item.path.relative_to(self._root).as_posix() if self._root else item.path.as_posix()

    def paths(self, part: str) -> list[str]:
        """Return each image's path below the dataset's root."""
        return [self._name(item) for item in self.split.part(part)]

    def labels(self, part: str) -> torch.Tensor:
        """Return (N,) int64 class indices."""
        return torch.tensor([item.label for item in self.split.part(part)], dtype=torch.int64)

    def center_crops(self, part: str, crop: int, indices: Sequence[int] | None = None) -> torch.Tensor:
        """Return (N, 3, crop, crop) uint8 centre crops of a part's images at ``indices``, or of all of them."""
        start = self._starts[part]
        wanted = range(len(self.split.part(part))) if indices is None else indices
        return self._store.center_crops([start + index for index in wanted], crop)

    def ten_crops(self, part: str, index: int, crop: int) -> torch.Tensor:
        """Return (10, 3, crop, crop) uint8, equal to torchvision's TenCrop of the resized image."""
        return torch.stack(tvf.ten_crop(self._store.tensor(self._starts[part] + index), [crop]))
