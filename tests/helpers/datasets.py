"""Folders that look like a dataset."""

import hashlib
from pathlib import Path

from PIL import Image


def fake_caltech(root: Path) -> Path:
    """Make 102 folders of 9,145 empty files; the sizes differ, the rule does not care."""
    counts = {"BACKGROUND_Google": 467, **{f"class_{i:03d}": 86 if i > 8 else 85 for i in range(101)}}
    counts["class_100"] += 8677 - (sum(counts.values()) - 467)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"image_{index + 1:04d}.jpg").touch()
    (root / "BACKGROUND_Google" / "tmp").touch()
    return root


def draw(folder: Path, classes: int = 3, images: int = 6) -> Path:
    """Write a folder of class folders with noise in it."""
    for label in range(classes):
        (folder / f"class {label}").mkdir(parents=True)
        for index in range(images):
            noise = Image.frombytes("RGB", (40, 40), hashlib.sha512(bytes((label, index))).digest() * 75)
            noise.save(folder / f"class {label}" / f"{index}.png")
    return folder
