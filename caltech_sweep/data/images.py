"""Images decoded once: a memory-mapped uint8 cache that every worker of the machine shares.

The whole resized image is kept, not its centre crop, because TenCrop's corners need it; images are not square,
so the store is one flat buffer with offsets and shapes. The cache's name is a digest of the file list, the
files' contents, the geometry and the decoder's version: another of any of these is another cache. Where an image is
not plain (see ``pixels.Facts``), the settings that decide its pixels and the version of the code are in the name too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torchvision.transforms import functional as tvf
from torchvision.transforms.v2.functional import resize_image

from caltech_sweep.data.pixels import DEFAULT_RULES, VERSION, Facts, PixelRules, examine, read_file, read_rgb
from caltech_sweep.data.splits import SPLITS, Sample, Split
from caltech_sweep.errors import DatasetError
from caltech_sweep.files import create_atomically
from caltech_sweep.heartbeat import beat
from caltech_sweep.machine import cores
from caltech_sweep.paths import closest
from caltech_sweep.text import readable

T = TypeVar("T")
Progress = Callable[[int, int], None]
Read = Callable[[Path], bytes]  # from a sample's path to the content of an image file
FORMAT = 1
_LARGEST = 180_000_000  # pixels of a resized image; about what Pillow takes for a decompression bomb
_WAVE, _WAVE_BYTES = 256, 1 << 29  # images, or bytes of them, that are decoded ahead of the writer of a cache


def decode(content: bytes, resize: int, rules: PixelRules = DEFAULT_RULES) -> np.ndarray:
    """Return a file's content as (H, W, 3) uint8 RGB, its short side ``resize`` pixels, as torchvision's Resize.

    Raises DatasetError with the reason for what is damaged, is no image, or has pixels that eight bits cannot show.
    """

    def resized(image: Image.Image) -> Image.Image:
        _check_shape(image.size, resize)
        return tvf.resize(image, [resize], tvf.InterpolationMode(rules.interpolation))

    return np.asarray(read_rgb(content, rules, resized))


def _check_shape(size: tuple[int, int], resize: int) -> None:
    """Refuse a ribbon that is a small file and would be gigabytes once its short side is resized."""
    short, long = sorted(size)
    if long * resize * resize > _LARGEST * short:
        raise DatasetError(
            f"its {size[0]} x {size[1]} pixels have too extreme an aspect ratio to resize to {resize}; crop it"
        )


def _file_digests(paths: Sequence[Path], read: Read) -> tuple[bytes, ...]:
    """Return the SHA-256 of the content of each file."""
    digests = []
    for path in paths:
        beat()
        try:
            digests.append(hashlib.sha256(read(path)).digest())
        except OSError as error:
            raise DatasetError(f"{readable(str(path))} cannot be read: {error.strerror}") from error
        except DatasetError as error:
            raise DatasetError(f"{readable(str(path))} cannot be read: {error}") from error
    return tuple(digests)


def _each(
    paths: Sequence[Path],
    work: Callable[[bytes], T],
    progress: Progress | None,
    read: Read = read_file,
    wave: int = _WAVE,
) -> Iterator[T]:
    """Do something with every file's content, in order; at the end name all that cannot be read in one error."""
    bad: list[str] = []

    def attempt(path: Path) -> tuple[T | None, str]:
        try:
            return work(read(path)), ""
        except OSError as error:
            return None, f"{readable(str(path))} ({error.strerror})"
        except DatasetError as error:
            return None, f"{readable(str(path))} ({error})"

    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(paths), wave):
            results = pool.map(attempt, paths[start : start + wave])
            for done, (result, problem) in enumerate(results, start=start + 1):
                beat()
                if problem:
                    bad.append(problem)
                elif not bad:
                    yield result  # type: ignore[misc]
                if progress:
                    progress(done, len(paths))
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise DatasetError(
            f"{len(bad)} of {len(paths)} image files cannot be read: {'; '.join(bad[:10])}{more}; "
            "replace or remove them and run again"
        )


def _unwritable(cache: Path, reason: str) -> DatasetError:
    return DatasetError(
        f"the image cache folder {readable(str(cache))} cannot be written ({reason}); "
        "name another with the environment variable CALTECH_SWEEP_DATA"
    )


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[Path]:
    """Yield the path to write a file of a cache to; it is then absent or whole, also when two write it at once."""
    try:
        with create_atomically(target) as made:
            yield made
    except OSError as error:
        raise _unwritable(target.parent, str(error.strerror)) from error


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

    def resized_crops(
        self, indices: Sequence[int], crop: int, cuts: Sequence[Callable[[int, int], tuple[int, int, int, int]]]
    ) -> torch.Tensor:
        """Return (N, 3, crop, crop) uint8, equal to torchvision's ``resized_crop`` of each whole image.

        ``cuts`` give top, left, height and width of the box of each by the height and width of its image.
        """
        out = torch.empty((len(indices), 3, crop, crop), dtype=torch.uint8)
        for position, (index, cut) in enumerate(zip(indices, cuts, strict=True)):
            image = self.array(index)
            top, left, height, width = cut(*image.shape[:2])
            box = torch.from_numpy(np.array(image[top : top + height, left : left + width])).permute(2, 0, 1)
            out[position] = resize_image(box, [crop, crop], antialias=True)
        return out


@dataclass(frozen=True)
class OpenedStore:
    """A dataset's decoded images, the digest that names them, and the bits of its sixteen-bit grey images."""

    images: ImageStore
    key: str
    grey_bits: int = 16
    files: tuple[bytes, ...] = ()  # the SHA-256 of each image's file


@dataclass(frozen=True)
class _Cache:
    """Two files: pixels, and a header of JSON that tells how they are cut and what they were made from."""

    base: Path

    def header(self) -> dict[str, Any]:
        file = self.base.with_suffix(".json")
        try:
            header = json.loads(file.read_bytes()) if file.is_file() else {}  # a pipe would never end
        except (OSError, ValueError):
            return {}
        return header if isinstance(header, dict) else {}

    def open(self) -> ImageStore | None:
        """Open the cache, or return None when there is none or it is damaged."""
        header = self.header()
        try:
            flat = np.memmap(self.base.with_suffix(".bin"), np.uint8, "r")
            if flat.nbytes != header["bytes"] or zlib.crc32(flat.data) != header["crc32"]:
                return None
            return ImageStore(flat, [tuple(shape) for shape in header["shapes"]])
        except (OSError, ValueError, KeyError):
            return None

    def write_header(self, header: dict[str, Any]) -> None:
        with _writing(self.base.with_suffix(".json")) as made:
            made.write_text(json.dumps(header))

    def build(self, images: Iterator[np.ndarray], facts: dict[str, Any]) -> ImageStore:
        shapes: list[list[int]] = []
        written = checksum = 0
        with _writing(self.base.with_suffix(".bin")) as made, made.open("wb") as file:
            for image in images:
                data = image.tobytes()
                shapes.append(list(image.shape[:2]))
                written, checksum = written + len(data), zlib.crc32(data, checksum)
                file.write(data)
        self.write_header({"bytes": written, "crc32": checksum, "shapes": shapes, **facts})
        opened = self.open()
        if opened is None:
            raise DatasetError(f"the image cache {self.base}.bin was damaged when it was written; is the disk failing?")
        return opened


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _keys(digests: Sequence[bytes], resize: int, rules: PixelRules) -> tuple[str, str]:
    """Return the digests that name the cache of these files: where all are plain, and where the rules count."""
    content = hashlib.sha256(b"".join(digests)).hexdigest()
    size = f"{resize}" if rules.interpolation == "bilinear" else f"{resize} {rules.interpolation}"
    plain = _digest(f"{FORMAT}|{PIL.__version__}|{torchvision.__version__}|{size}|{content}")
    return plain, _digest(f"{plain}|{VERSION}|{rules.rgb}|{rules.exif}")


def inspect_store(
    paths: Sequence[Path], resize: int, rules: PixelRules, cache: Path, read: Read = read_file
) -> OpenedStore:
    """Return what :func:`open_store` would, without the images and with nothing written.

    Raises its DatasetError for images whose headers show that they cannot be decoded, and for a cache that cannot be
    written, unless the images are decoded already.
    """
    files = _file_digests(paths, read)
    plain_key, own_key = _keys(files, resize, rules)
    empty = ImageStore(np.empty(0, np.uint8), [])
    if _Cache(cache / f"images-{plain_key}").header().get("plain"):
        return OpenedStore(empty, plain_key, files=files)
    if header := _Cache(cache / f"images-{own_key}").header():
        return OpenedStore(empty, own_key, header["grey_bits"], files)
    facts = Facts.of_all(_each(paths, partial(_inspect, resize), None, read))
    _check_colour(facts)
    place = closest(cache)
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise _unwritable(cache, "Read-only" if place.is_dir() else f"{place} is a file")
    bits = facts.grey_bits()
    return OpenedStore(empty, plain_key if facts.plain and bits == 16 else own_key, bits, files)


def _inspect(resize: int, content: bytes) -> Facts:
    facts = examine(content)
    _check_shape(facts.size, resize)
    return facts


def open_store(
    paths: Sequence[Path],
    resize: int,
    rules: PixelRules,
    cache: Path,
    progress: Progress | None,
    read: Read = read_file,
) -> OpenedStore:
    """Open the cache of these files, building it first when it is missing or damaged.

    The settings of ``rules`` are in its name only where an image depends on them. The bits of its sixteen-bit grey
    images are those that they use, whatever ``rules`` says. Raises DatasetError naming every file that cannot be read.
    """
    files = _file_digests(paths, read)
    plain_key, own_key = _keys(files, resize, rules)
    plain, own = _Cache(cache / f"images-{plain_key}"), _Cache(cache / f"images-{own_key}")
    if plain.header().get("plain") and (store := plain.open()):
        return OpenedStore(store, plain_key, files=files)
    if store := own.open():
        return OpenedStore(store, own_key, own.header()["grey_bits"], files)
    facts = Facts.of_all(_each(paths, _facts, None, read))
    _check_colour(facts)
    bits = facts.grey_bits()
    wave = max(1, min(_WAVE, _WAVE_BYTES // (6 * resize * resize)))
    images = _each(paths, lambda content: decode(content, resize, replace(rules, grey_bits=bits)), progress, read, wave)
    if not facts.plain or bits < 16:
        return OpenedStore(own.build(images, {"grey_bits": bits}), own_key, bits, files)
    if store := plain.open():  # of a version that asked no questions about plain images
        plain.write_header({**plain.header(), "plain": True})
        return OpenedStore(store, plain_key, files=files)
    return OpenedStore(plain.build(images, {"plain": True}), plain_key, files=files)


def bad_images(
    paths: Sequence[Path], resize: int, rules: PixelRules, cache: Path, read: Read = read_file, *, write: bool
) -> dict[Path, str]:
    """Return the reason for each file that is no usable image.

    They are decoded for it, and the answer is kept in the cache. Without ``write`` nothing is, and only headers are
    read unless the answer is there.
    """
    digests = [_digest_or_none(path, read) for path in paths]
    content = hashlib.sha256(b"".join(digests)).hexdigest()
    kept = cache / f"bad-{_digest(f'{PIL.__version__}|{VERSION}|{resize}|{content}')}.json"
    try:
        return {paths[int(index)]: str(why) for index, why in json.loads(kept.read_text()).items()}
    except (OSError, ValueError, AttributeError, IndexError):
        pass

    def attempt(path: Path) -> str:
        try:
            _ = decode(read(path), resize, rules) if write else _inspect(resize, read(path))
        except OSError as error:
            return str(error.strerror)
        except DatasetError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bad = {index: why for index, why in enumerate(pool.map(attempt, paths)) if why}
    if write:
        try:
            with create_atomically(kept) as made:
                made.write_text(json.dumps(bad))
        except OSError as error:
            raise _unwritable(cache, str(error.strerror)) from error
    return {paths[index]: why for index, why in bad.items()}


def _digest_or_none(path: Path, read: Read) -> bytes:
    try:
        return hashlib.sha256(read(path)).digest()
    except (OSError, DatasetError):
        return bytes(32)


def _facts(content: bytes) -> Facts:
    with contextlib.suppress(DatasetError):  # which the decoding names, with all others of its kind
        return examine(content)
    return Facts()


def _check_colour(facts: Facts) -> None:
    """Refuse sixteen-bit colour of which the high byte, all that Pillow reads, holds next to nothing."""
    if facts.colour is not None and facts.colour < 1 << 6:
        raise DatasetError(
            "the 16-bit colour images of the dataset use 14 bits at most and would be nearly black; scale their "
            "values to 0 to 65,535, or convert them to 8 bits"
        )


def store_of(images: Sequence[np.ndarray]) -> OpenedStore:
    """Return (H, W, 3) uint8 pictures that are in memory, named by their pixels."""
    flat = np.concatenate([image.ravel() for image in images])
    store = ImageStore(flat, [(image.shape[0], image.shape[1]) for image in images])
    return OpenedStore(store, hashlib.sha256(flat.data).hexdigest()[:16])


class LoadedData:
    """The images and labels of one dataset, cut into train, val and test."""

    def __init__(self, split: Split, store: OpenedStore, root: Path | None) -> None:
        self.split, self._store, self._root, self.grey_bits = split, store.images, root, store.grey_bits
        starts = np.cumsum([0, *(len(split.part(part)) for part in SPLITS)])
        self._starts = {part: int(start) for part, start in zip(SPLITS, starts, strict=False)}
        listing = [
            (part, item.class_name, item.label, self._name(item)) for part in SPLITS for item in split.part(part)
        ]
        self.fingerprint = hashlib.sha256(json.dumps([store.key, listing]).encode()).hexdigest()[:16]

    def _name(self, item: Sample) -> str:
        return readable((item.path.relative_to(self._root) if self._root else item.path).as_posix())

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
