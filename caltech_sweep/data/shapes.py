"""A small dataset drawn by code, so that a first study needs no download: eight kinds of shape on noise."""

from __future__ import annotations

import errno
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from caltech_sweep.data.splits import Sample, Split

CLASSES = ("cross", "disc", "ring", "square", "star", "stripes", "triangle", "wedge")
COUNTS = {"train": 60, "val": 24, "test": 24}  # images of each class
_SCALE = 4  # drawn larger, then reduced, so that edges are smooth


def _polygon(corners: int, radius: float, turn: float, inner: float | None = None) -> list[tuple[float, float]]:
    points = []
    steps = corners * 2 if inner else corners
    for step in range(steps):
        reach = radius * inner if inner and step % 2 else radius
        angle = turn + 2 * math.pi * step / steps
        points.append((reach * math.cos(angle), reach * math.sin(angle)))
    return points


def _draw(draw: ImageDraw.ImageDraw, name: str, centre: np.ndarray, radius: float, turn: float, ink: str) -> None:
    x, y = map(float, centre)
    box = (x - radius, y - radius, x + radius, y + radius)

    def polygon(points: list[tuple[float, float]]) -> None:
        draw.polygon([(x + px, y + py) for px, py in points], fill=ink)

    if name == "disc":
        draw.ellipse(box, fill=ink)
    elif name == "ring":
        draw.ellipse(box, outline=ink, width=max(2, int(radius / 3)))
    elif name == "wedge":
        draw.pieslice(box, math.degrees(turn), math.degrees(turn) + 100, fill=ink)
    elif name in ("square", "triangle"):
        polygon(_polygon(4 if name == "square" else 3, radius, turn))
    elif name == "star":
        polygon(_polygon(5, radius, turn, inner=0.4))
    else:  # cross: two bars; stripes: three side by side
        bars = [(0.0, 0.0), (math.pi / 2, 0.0)] if name == "cross" else [(0.0, s) for s in (-0.7, 0.0, 0.7)]
        for angle, shift in bars:
            along = np.array([math.cos(turn + angle), math.sin(turn + angle)]) * radius
            across = np.array([-along[1], along[0]])
            middle = centre + across * shift
            ends = [tuple(map(float, middle - along)), tuple(map(float, middle + along))]
            draw.line([ends[0], ends[1]], fill=ink, width=max(2, int(radius / 3)))


def draw_shape(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return one (size, size, 3) uint8 picture of the named shape, at a random place, size, turn and colour."""
    large = size * _SCALE
    background = rng.integers(20, 110, size=(3,))
    image = Image.new("RGB", (large, large), tuple(int(v) for v in background))
    ink = "#" + "".join(f"{v:02x}" for v in rng.integers(140, 256, size=(3,)))
    radius = float(rng.uniform(0.22, 0.36)) * large
    centre = rng.uniform(radius, large - radius, size=2)
    _draw(ImageDraw.Draw(image), name, centre, radius, float(rng.uniform(0, 2 * math.pi)), ink)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX)).astype(np.int16)
    return (pixels + rng.integers(-14, 15, size=pixels.shape)).clip(0, 255).astype(np.uint8)


def shapes_listing() -> Split:
    """Return which shape is where, without drawing one."""
    parts = {
        part: tuple(
            Sample(Path(name) / f"{part}_{index:03d}", label, name)
            for label, name in enumerate(CLASSES)
            for index in range(count)
        )
        for part, count in COUNTS.items()
    }
    return Split(CLASSES, parts["train"], parts["val"], parts["test"])


def draw_sample(path: Path, size: int, seed: int) -> np.ndarray:
    """Return the (size, size, 3) uint8 picture that :func:`shapes_listing` names; every picture has its own key."""
    part, _, index = path.name.partition("_")
    key = [seed, list(COUNTS).index(part), CLASSES.index(path.parent.name), int(index)]
    return draw_shape(path.parent.name, size, np.random.default_rng(key))


def shape_file(path: Path, size: int, seed: int) -> bytes:
    """Return the picture that :func:`shapes_listing` names as a file; raise OSError where it names none."""
    try:
        pixels = draw_sample(path, size, seed)
    except ValueError as error:
        raise FileNotFoundError(errno.ENOENT, "there is no such shape", str(path)) from error
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
