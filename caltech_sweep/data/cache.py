"""What is kept of decoded images on disk, shared by every process of the machine, and the ways to keep it.

``dataset.cache`` says what: whole resized images, their centre crops, or nothing but what is known of the files, which
are then decoded whenever they are asked for. The pixels are the same. A cache's name is a digest of the files'
contents, the geometry and the decoder's version: another of any of these is another cache. Where an image is not plain
(see ``pixels.Facts``), the settings that decide its pixels and the version of the code are in the name too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import PIL
import torchvision
from rich import filesize

from caltech_sweep.config import DatasetConfig
from caltech_sweep.data.digests import Files, digests, is_settled, signature, why_unreadable
from caltech_sweep.data.images import (
    CropStore,
    FileStore,
    ImageStore,
    OpenedStore,
    center_crop,
    check_shape,
    decode,
    resized_size,
)
from caltech_sweep.data.pixels import VERSION, Facts, PixelRules, examine
from caltech_sweep.errors import DatasetError
from caltech_sweep.files import ELSEWHERE, create_atomically
from caltech_sweep.heartbeat import beat
from caltech_sweep.machine import cores
from caltech_sweep.paths import closest
from caltech_sweep.text import readable

T = TypeVar("T")
Progress = Callable[[int, int], None]
FORMAT = 1
_WAVE, _WAVE_BYTES = 256, 1 << 29  # images, or bytes of them, that are decoded ahead of the writer of a cache
_BLOCK = 1 << 26  # bytes that are checked at once
_JPEG = b"\xff\xd8\xff"  # what its files begin with


def _each(files: Files, work: Callable[[bytes], T], progress: Progress | None = None, wave: int = _WAVE) -> Iterator[T]:
    """Do something with every file's content, in order; at the end name all that cannot be read in one error."""
    bad: list[str] = []

    def attempt(path: Path) -> tuple[T | None, str]:
        try:
            return work(files.read(path)), ""
        except (OSError, DatasetError) as error:
            return None, f"{readable(str(path))} ({why_unreadable(error)})"

    total = len(files.paths)
    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, total, wave):
            results = pool.map(attempt, files.paths[start : start + wave])
            for done, (result, problem) in enumerate(results, start=start + 1):
                beat()
                if problem:
                    bad.append(problem)
                elif not bad:
                    yield result  # type: ignore[misc]
                if progress:
                    progress(done, total)
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise DatasetError(
            f"{len(bad)} of {total} image files cannot be read: {'; '.join(bad[:10])}{more}; "
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


@dataclass(frozen=True)
class _Cache:
    """Two files: pixels, and a header of JSON that tells how they are cut and what they were made from."""

    base: Path

    @property
    def file(self) -> Path:
        """The file of pixels."""
        return self.base.with_suffix(".bin")

    def header(self) -> dict[str, Any]:
        """Return what the header says; nothing where there is none."""
        file = self.base.with_suffix(".json")
        try:
            header = json.loads(file.read_bytes()) if file.is_file() else {}  # a pipe would never end
        except (OSError, ValueError):
            return {}
        return header if isinstance(header, dict) else {}

    def open(self, verify: bool = False) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the pixels as one flat uint8 array, and (N, 2) heights and widths; None where they are not whole.

        The pixels are read for that only where the file is another than the one that was checked last, or to
        ``verify`` it, and then nothing is written.
        """
        header = self.header()
        try:
            known = list(signature(self.file))
            flat = np.memmap(self.file, np.uint8, "r")
            if flat.nbytes != header["bytes"]:
                return None
            if verify or header.get("checked") != known:
                if _checksum(flat) != header["crc32"]:
                    return None
                if not verify and is_settled((known[0], known[1], known[2])):
                    with contextlib.suppress(DatasetError):  # of a folder that is only read
                        self.write_header({**header, "checked": known})
            return flat, np.array(header["shapes"], np.int32).reshape(-1, 2)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_header(self, header: dict[str, Any]) -> None:
        """Write the header, after the pixels."""
        with _writing(self.base.with_suffix(".json")) as made:
            made.write_text(json.dumps(header))

    def build(self, images: Iterable[np.ndarray], facts: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Write the pixels of (H, W, 3) images, and return them as :meth:`open` does."""
        shapes: list[list[int]] = []
        written = checksum = 0
        with _writing(self.file) as made, made.open("wb") as file:
            for image in images:
                data = image.tobytes()
                shapes.append(list(image.shape[:2]))
                written, checksum = written + len(data), zlib.crc32(data, checksum)
                file.write(data)
        self.write_header({"bytes": written, "crc32": checksum, "shapes": shapes, **facts})
        opened = self.open()
        if opened is None:
            raise DatasetError(f"the image cache {self.file} was damaged when it was written; is the disk failing?")
        return opened


def _checksum(flat: np.ndarray) -> int:
    checksum = 0
    for start in range(0, len(flat), _BLOCK):
        beat()
        checksum = zlib.crc32(flat[start : start + _BLOCK].data, checksum)
    return checksum


def damaged_caches(folder: Path) -> Iterator[Path]:
    """Yield the image caches of a folder whose pixels are not those that were written."""
    for header in sorted(folder.glob("images-*.json")):
        cache = _Cache(header.with_suffix(""))
        if cache.file.is_file() and cache.open(verify=True) is None:
            yield cache.file


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _keys(found: np.ndarray, resize: int, rules: PixelRules) -> tuple[str, str]:
    """Return the digests that name the cache of these files: where all are plain, and where the rules count."""
    content = hashlib.sha256(found.tobytes()).hexdigest()
    size = f"{resize}" if rules.interpolation == "bilinear" else f"{resize} {rules.interpolation}"
    plain = _digest(f"{FORMAT}|{PIL.__version__}|{torchvision.__version__}|{size}|{content}")
    return plain, _digest(f"{plain}|{VERSION}|{rules.rgb}|{rules.exif}")


@dataclass(frozen=True)
class _Known:
    """What is known of a dataset's files before they are decoded."""

    key: str  # that names their pixels
    bits: int  # of their sixteen-bit grey images
    plain: bool
    resized: int  # bytes of all resized images; 0 where an earlier version did not write it down

    def to_header(self) -> dict[str, Any]:
        facts = {"plain": True} if self.plain else {"grey_bits": self.bits}
        return {**facts, "resized_bytes": self.resized}


class _Keeper:
    """Opens and builds what is kept of a dataset's files; the settings of pixels are in its name only where needed."""

    def __init__(
        self,
        files: Files,
        config: DatasetConfig,
        folder: Path,
        look: Callable[[bytes], Facts],
        *,
        verify: bool,
        write: bool,
    ) -> None:
        self.files, self.config, self.folder, self.verify, self.look = files, config, folder, verify, look
        self.rules = PixelRules.of(config)
        self._seen, self._guard = Counter[Facts](), Lock()  # of files that were read for their digests
        self.digests = digests(replace(files, read=self._read), folder, verify=verify, write=write)
        self.plain_key, self.own_key = _keys(self.digests, config.resize, self.rules)

    def _read(self, path: Path) -> bytes:
        """Read a file, and look at one whose first bytes tell all, so that it is not read again for them."""
        content = self.files.read(path)
        if content.startswith(_JPEG):
            with contextlib.suppress(DatasetError):  # which is told with all others of its kind
                facts = self.look(content)
                with self._guard:
                    self._seen[facts] += 1
        return content

    def place(self, key: str, kind: str) -> _Cache:
        """Return where a kind of cache lies."""
        suffix = {"resized": "", "crop": f"-crop{self.config.crop}", "jpeg": "-files"}[kind]
        return _Cache(self.folder / f"images-{key}{suffix}")

    def known(self) -> _Known | None:
        """Return what a cache of these files, of whichever kind, tells of them."""
        for kind in dict.fromkeys((self.config.cache, "resized", "crop", "jpeg")):
            for key in (self.plain_key, self.own_key):
                header = self.place(key, kind).header()
                plain = key == self.plain_key
                if header.get("plain") if plain else "grey_bits" in header:
                    size = header.get("resized_bytes", header.get("bytes", 0))
                    return _Known(key, 16 if plain else header["grey_bits"], plain, size)
        return None

    def examine(self) -> _Known:
        """Return the same from the files themselves."""
        if self._seen.total() != len(self.files.paths):
            self._seen = Counter(_each(self.files, self.look))
        facts = Facts.of_all(self._seen)
        _check_colour(facts)
        bits = facts.grey_bits()
        plain = facts.plain and bits == 16
        areas = {found: math.prod(resized_size(found.size, self.config.resize)) for found in self._seen}
        size = 3 * sum(areas[found] * count for found, count in self._seen.items())
        return _Known(self.plain_key if plain else self.own_key, bits, plain, size)

    def needed(self, known: _Known, kind: str) -> int:
        """Return the bytes that a kind of cache takes."""
        crops = len(self.files.paths) * self.config.crop**2 * 3
        return {"resized": known.resized, "crop": crops, "jpeg": 0}[kind]

    def check_room(self, known: _Known) -> int:
        """Return the bytes of the cache that is to be built; raise DatasetError when the disk has no room for it."""
        needed, free = self.needed(known, self.config.cache), shutil.disk_usage(closest(self.folder)).free
        if needed <= free:
            return needed
        crops = self.needed(known, "crop")
        size, crops = filesize.decimal, self.needed(known, "crop")
        less = f"crop, which takes {size(crops)}, or to " if crops <= free else ""
        raise DatasetError(
            f"the image cache needs {size(needed)}, and {readable(str(self.folder))} has {size(free)} free; "
            f"{ELSEWHERE}, or set dataset.cache to {less}jpeg, which keeps nothing"
        )

    def decoder(self, known: _Known) -> Callable[[bytes], np.ndarray]:
        """Return what makes a resized image of a file's content."""
        return partial(decode, resize=self.config.resize, rules=replace(self.rules, grey_bits=known.bits))

    def open(self, known: _Known) -> ImageStore | None:
        """Return what is kept, None where there is nothing or it is damaged."""
        place = self.place(known.key, self.config.cache)
        if self.config.cache == "jpeg":
            return self.opened(known, None) if place.header() else None
        pixels = place.open(self.verify)
        if pixels is not None and known.plain and not place.header().get("plain"):
            # Of a version that asked no questions about plain images.
            place.write_header({**place.header(), **known.to_header()})
        return None if pixels is None else self.opened(known, pixels)

    def opened(self, known: _Known, pixels: tuple[np.ndarray, np.ndarray] | None) -> ImageStore:
        """Return images over pixels that are kept, or else over the files."""
        if pixels is None:
            return FileStore(self.files, self.digests, self.decoder(known))
        return (CropStore if self.config.cache == "crop" else ImageStore)(*pixels)

    def build(self, known: _Known, progress: Progress | None) -> ImageStore:
        """Decode every file, which names all that cannot be, and keep what the settings say."""
        config, place = self.config, self.place(known.key, self.config.cache)
        wave = max(1, min(_WAVE, _WAVE_BYTES // (6 * config.resize * config.resize)))
        images = _each(self.files, self.decoder(known), progress, wave)
        if config.cache == "jpeg":
            for _ in images:
                pass
            place.write_header(known.to_header())
            return self.opened(known, None)
        kept = (center_crop(image, config.crop) for image in images) if config.cache == "crop" else images
        return self.opened(known, place.build(kept, known.to_header()))


def inspect_store(files: Files, config: DatasetConfig, folder: Path, verify: bool = False) -> OpenedStore:
    """Return what :func:`open_store` would, without the images and with nothing written.

    Raises its DatasetError for images whose headers show that they cannot be decoded, and for a cache that cannot be
    written or does not fit on the disk, unless it is there already.
    """
    keeper = _Keeper(files, config, folder, partial(_inspect, config.resize), verify=verify, write=False)
    known = keeper.known() or keeper.examine()
    to_build, kept = 0, keeper.place(known.key, config.cache)
    if not kept.header() or (verify and config.cache != "jpeg" and kept.open(verify=True) is None):
        place = closest(folder)
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise _unwritable(folder, "Read-only" if place.is_dir() else f"{place} is a file")
        to_build = keeper.check_room(known)
    return OpenedStore(ImageStore(np.empty(0, np.uint8), []), known.key, known.bits, keeper.digests, to_build)


def _inspect(resize: int, content: bytes) -> Facts:
    facts = examine(content)
    check_shape(facts.size, resize)
    return facts


def open_store(
    files: Files,
    config: DatasetConfig,
    folder: Path,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    verify: bool = False,
) -> OpenedStore:
    """Open what is kept of these files, building it first when it is missing or damaged.

    The bits of its sixteen-bit grey images are those that they use. ``verify`` reads every file and the whole cache,
    where otherwise those that are unchanged by their times are not. Raises DatasetError naming every file that cannot
    be read, or telling the size of a cache for which there is no room.
    """
    keeper = _Keeper(files, config, folder, _facts, verify=verify, write=True)
    known = keeper.known() or keeper.examine()
    images = keeper.open(known)
    if images is None:
        if (needed := keeper.check_room(known)) and say:
            where = readable(str(folder))
            say(f"decoding {len(files.paths):,} images once into a cache of {filesize.decimal(needed)} in {where}")
        images = keeper.build(known, progress)
    return OpenedStore(images, known.key, known.bits, keeper.digests)


def bad_images(files: Files, config: DatasetConfig, cache: Path, *, write: bool) -> dict[Path, str]:
    """Return the reason for each file that is no usable image.

    They are decoded for it, and the answer is kept in the cache. Without ``write`` nothing is, and only headers are
    read unless the answer is there.
    """
    paths, resize, rules = files.paths, config.resize, PixelRules.of(config)
    content = hashlib.sha256(digests(files, cache, write=write, strict=False).tobytes()).hexdigest()
    kept = cache / f"bad-{_digest(f'{PIL.__version__}|{VERSION}|{resize}|{content}')}.json"
    try:
        return {paths[int(index)]: str(why) for index, why in json.loads(kept.read_text()).items()}
    except (OSError, ValueError, AttributeError, IndexError):
        pass

    def attempt(path: Path) -> str:
        try:
            _ = decode(files.read(path), resize, rules) if write else _inspect(resize, files.read(path))
        except (OSError, DatasetError) as error:
            return why_unreadable(error)
        return ""

    bad: dict[int, str] = {}
    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(paths), _WAVE):  # a million calls that wait at once would take a gigabyte
            for index, why in enumerate(pool.map(attempt, paths[start : start + _WAVE]), start):
                beat()
                if why:
                    bad[index] = why
    if write:
        try:
            with create_atomically(kept) as made:
                made.write_text(json.dumps(bad))
        except OSError as error:
            raise _unwritable(cache, str(error.strerror)) from error
    return {paths[index]: why for index, why in bad.items()}


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
