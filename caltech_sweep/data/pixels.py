"""What the pixels of a file are: decided here for training, predictions, the served model and the report's pictures.

A file becomes opaque, upright eight-bit RGB: what is transparent shows the background, a photograph is turned as its
EXIF data says, and sixteen-bit grey is scaled by the bits that a dataset's images use. Everything else is Pillow's
own conversion. Of a file with several frames or pages the first counts.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

from caltech_sweep.config import DatasetConfig
from caltech_sweep.errors import DatasetError

VERSION = 2  # of what this module makes of images that are not plain; another version is another cache
DEPTHS = (8, 10, 12, 14, 16)  # bits of a grey sample that is stored in sixteen
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_SCALED = ("PPM", "JPEG2000")  # whose files tell how many bits they use, and which Pillow scales to sixteen
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LARGEST_FILE = 1 << 30  # bytes: what Pillow reads has no more
_STRIP = 1 << 22  # pixels that are converted at once
# Larger blocks than Pillow's own go back to the system when an image is freed, rather than into a pool of each thread.
Image.core.set_block_size(64 << 20)  # type: ignore[attr-defined]
_SHARE, _SHARES = 1 << 22, 32  # pixels a share, and shares: 134 million pixels are held at once, or one larger image
_ROOM, _TURNSTILE = threading.BoundedSemaphore(_SHARES), threading.Lock()
# EPS starts Ghostscript; IPTC opens what it holds as any format; the others are no images, or read by no decoder.
_NEVER = frozenset({"EPS", "IPTC", "PDF", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"})

# Pillow warns of large images, odd palettes and broken EXIF data, none of which harms the pixels.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class PixelRules:
    """How files become pixels: a dataset's settings, and the bits that its sixteen-bit grey images use."""

    background: str = "white"  # a colour that Pillow's ImageColor knows
    exif: str = "apply"  # apply | ignore
    grey_bits: int = 16  # of DEPTHS
    interpolation: str = "bilinear"  # of the resize that follows: bilinear | bicubic

    @classmethod
    def of(cls, config: DatasetConfig, grey_bits: int = 16) -> PixelRules:
        """Return the rules of a dataset."""
        return cls(config.background, config.exif, grey_bits, config.interpolation)

    @property
    def rgb(self) -> tuple[int, ...]:
        """The background as (red, green, blue); raises DatasetError when it is no opaque colour."""
        try:
            colour = ImageColor.getrgb(self.background)
        except (ValueError, AttributeError) as error:
            raise DatasetError(f"dataset.background: there is no colour {self.background!r}") from error
        return colour[:3]


DEFAULT_RULES = PixelRules()


@dataclass(frozen=True)
class Facts:
    """What has to be known of a file's pixels, or of a whole dataset's, before they are scaled."""

    plain: bool = True  # opaque and upright: Pillow's own conversion, whatever the settings say
    grey: int | None = None  # the largest value of sixteen-bit grey; None where there is none
    colour: int | None = None  # the largest high byte of sixteen-bit colour
    size: tuple[int, int] = (1, 1)  # (width, height), as the file has it

    @classmethod
    def of_all(cls, each: Iterable[Facts]) -> Facts:
        """Return the facts of several files as one."""
        plain, grey, colour = True, None, None
        for fact in each:
            plain = plain and fact.plain
            grey = max((value for value in (grey, fact.grey) if value is not None), default=None)
            colour = max((value for value in (colour, fact.colour) if value is not None), default=None)
        return cls(plain, grey, colour)

    def grey_bits(self) -> int:
        """Return the least of DEPTHS that holds every sixteen-bit grey value; 16 where there is none."""
        return 16 if self.grey is None else next(bits for bits in DEPTHS if self.grey < 1 << bits)


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Return the formats that are opened: all that Pillow reads by a file extension, but for those in _NEVER."""
    Image.init()
    named = set(Image.registered_extensions().values()) - _NEVER
    return tuple(name for name in Image.ID if name in named)


@lru_cache(maxsize=1)
def suffixes() -> frozenset[str]:
    """Return the file extensions of :func:`formats`, in lower case with their dot."""
    known = {*formats(), "MPO"}  # which Pillow opens as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def read_file(path: Path) -> bytes:
    """Return a file's content; raise DatasetError for one that is too large to be an image, or has no end."""
    with path.open("rb") as file:
        content = file.read(_LARGEST_FILE + 1)
    if len(content) > _LARGEST_FILE:
        raise DatasetError(f"it has more than {_LARGEST_FILE >> 20} MB; make it smaller")
    return content


def read_rgb(content: bytes, rules: PixelRules, use: Callable[[Image.Image], Image.Image] | None = None) -> Image.Image:
    """Return a file's content as an RGB image; its format is told by the content, never by a file's name.

    ``use`` makes something smaller of it while its memory is accounted for. Raises DatasetError with the reason for
    what is damaged, is no image, or has pixels that eight bits cannot show.
    """
    with _opened(content) as image:
        flat = _flatten(image, rules)
        turn = _turn(image) if rules.exif == "apply" else None
        flat = flat if turn is None else flat.transpose(turn)
        return (use(flat) if use else flat).convert("RGB")


def size_of(content: bytes) -> tuple[int, int]:
    """Return the (width, height) of a file's content from its header; raise DatasetError when it has none."""
    with _opened(content) as image:
        return image.size


def examine(content: bytes) -> Facts:
    """Return the facts of a file's content; raise DatasetError as :func:`read_rgb` does."""
    with _opened(content) as image:
        raw = _raw_mode(image)
        if image.format not in ("JPEG", "MPO"):  # which tell all that is asked here before their pixels
            image.load()
        _check_mode(image)
        plain = _turn(image) is None and not _is_transparent(image, raw)
        grey = colour = None
        if image.mode in _SIXTEEN_BIT:
            largest = int(_grey_values(image).max())
            grey = None if image.format in _SCALED else largest
        elif ";16" in raw:
            # With the alpha channel: one that is scaled right tells that black is meant to be black.
            colour = int(np.asarray(image).max())
        return Facts(plain, grey, colour, image.size)


def _check_mode(image: Image.Image) -> None:
    if image.mode == "F":
        raise DatasetError("its pixels are floats, whose range is not known; convert it to 8 or 16 bits")


@contextlib.contextmanager
def _in_turn(pixels: int) -> Iterator[None]:
    """Wait until the pixels that all threads hold, this image's included, are few enough to fit in memory.

    A file of kilobytes may have 179 million of them, after which Pillow refuses it.
    """
    share = min(_SHARES, 1 + pixels // _SHARE)
    with _TURNSTILE:  # one after another, so that two large images never wait for each other
        for _ in range(share):
            _ROOM.acquire()
    try:
        yield
    finally:
        _ROOM.release(share)


@contextlib.contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """Open a file's content, and turn whatever goes wrong with it into a DatasetError."""
    if not content:
        raise DatasetError("it is empty")
    try:
        with Image.open(io.BytesIO(content), formats=formats()) as image, _in_turn(image.size[0] * image.size[1]):
            yield image
    except DatasetError:
        raise
    except UnidentifiedImageError as error:
        raise DatasetError("unknown image format") from error
    except Image.DecompressionBombError as error:
        raise DatasetError(str(error).rstrip(".")) from error
    except Exception as error:  # Pillow's decoders raise errors of many kinds on damaged files
        raise DatasetError(f"{str(error) or type(error).__name__}; is it complete?") from error


def _flatten(image: Image.Image, rules: PixelRules) -> Image.Image:
    """Return an image as RGB, or as L where that has the same pixels; what is transparent lies over the background.

    Only a strip of an image is in memory twice.
    """
    _check_mode(image)
    raw = _raw_mode(image)
    image.load()
    if image.mode in ("L", "1", "RGB") and not image.has_transparency_data:
        return image.convert("L") if image.mode == "1" else image
    flat = Image.new("RGB", image.size)
    height = max(1, _STRIP // image.width)
    for top in range(0, image.height, height):
        strip = image.crop((0, top, image.width, min(top + height, image.height)))
        flat.paste(_flat_strip(strip, image.format, raw, rules), (0, top))
    return flat


def _flat_strip(image: Image.Image, kind: str | None, raw: str, rules: PixelRules) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        return _flat_grey(image, kind, rules)
    if not image.has_transparency_data:
        return image.convert("RGB")
    above = _rgba(image, raw)
    return Image.alpha_composite(Image.new("RGBA", above.size, rules.rgb), above).convert("RGB")


def _raw_mode(image: Image.Image) -> str:
    """Return how the samples lie in a file, such as "L;4" or "RGB;16B"; known before they are loaded."""
    tile: Any = getattr(image, "tile", None)  # of an image that was opened from a file
    arguments = tile[0][3] if tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _rgba(image: Image.Image, raw: str) -> Image.Image:
    """Return a loaded image, which has transparency of some kind, as RGBA."""
    if image.mode == "La":
        image = image.convert("LA")
    key = image.info.get("transparency")
    # A PNG names its transparent colour in the samples of the file, and Pillow has scaled the pixels to eight bits.
    if image.mode == "L" and isinstance(key, int) and raw in ("L;2", "L;4"):
        image.info["transparency"] = key * {"L;2": 0x55, "L;4": 0x11}[raw]
    elif image.mode == "RGB" and isinstance(key, tuple) and ";16" in raw:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return image.convert("RGBA")


def _is_transparent(image: Image.Image, raw: str) -> bool:
    if image.mode in _SIXTEEN_BIT:
        return "transparency" in image.info
    if not image.has_transparency_data:
        return False
    height = max(1, _STRIP // image.width)
    for top in range(0, image.height, height):
        strip = image.crop((0, top, image.width, min(top + height, image.height)))
        if _rgba(strip, raw).getchannel("A").getextrema()[0] != 0xFF:
            return True
    return False


def _grey_values(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise DatasetError("its pixels have more than 16 bits; convert it to 8 or 16")
    return values.astype(np.uint16)


def _flat_grey(image: Image.Image, kind: str | None, rules: PixelRules) -> Image.Image:
    """Return sixteen-bit grey as RGB: Pillow's own conversion would clip it to white."""
    values = _grey_values(image)
    bits = 16 if kind in _SCALED else rules.grey_bits
    if values.max() >= 1 << bits:
        raise DatasetError(
            f"its grey values reach {values.max():,}, and the images of its dataset have {bits} bits; scale it to 0 to "
            f"{(1 << bits) - 1:,}"
        )
    grey = (values >> (bits - 8)).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=2)
    key = image.info.get("transparency")
    if key is not None:
        pixels[values == key] = rules.rgb
    return Image.fromarray(pixels)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return how a loaded image is to be turned; Pillow has turned a TIFF when it loaded it."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # malformed EXIF data, which fails in many ways, says nothing
        return None
    return _TURNS.get(value) if isinstance(value, int) else None
