"""The pictures of a report's page, held against what Pillow itself shows of their files."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_ALT = "Test image "


class _Pictures(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Image.Image] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "img" and given.get("alt", "").startswith(_ALT):
            content = base64.b64decode(given["src"].removeprefix("data:image/webp;base64,"), validate=True)
            self.found[given["alt"].removeprefix(_ALT)] = Image.open(io.BytesIO(content)).convert("RGB")


def pictures(page: str) -> dict[str, Image.Image]:
    """Return a page's pictures of images, by the paths that it gives for them."""
    parser = _Pictures()
    parser.feed(page)
    return parser.found


def rendered(file: Path, size: tuple[int, int]) -> np.ndarray:
    """Return an image file as Pillow's own functions show it on white, in a size."""
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.new("RGBA", upright.size, "white")
    return np.asarray(Image.alpha_composite(white, upright).convert("RGB").resize(size, Image.Resampling.BOX))


def check_pictures(page: str, root: Path) -> int:
    """Assert that every picture of a page is that of its file below ``root``; return how many there are.

    A picture is compressed with losses, so it is held against the pictures of all the files: its own is the closest.
    """
    found = pictures(page)
    for name, shown in found.items():
        levels = np.asarray(shown).astype(int)
        distance = {other: np.abs(levels - rendered(root / other, shown.size)).mean() for other in found}
        assert min(distance, key=distance.__getitem__) == name and distance[name] < 12, (name, distance[name])
        with Image.open(root / name) as image:
            sides = ImageOps.exif_transpose(image).size
        assert abs(shown.width / shown.height - sides[0] / sides[1]) < 0.05 * sides[0] / sides[1], (name, shown.size)
    return len(found)
