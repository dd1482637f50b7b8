"""A first study file for somebody's own images: what was found in them is in its comments, and it runs as it is."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from caltech_sweep import paths
from caltech_sweep.config import DatasetConfig
from caltech_sweep.data.given import guess_columns
from caltech_sweep.data.pixels import formats, size_of
from caltech_sweep.data.registry import CSV_COLUMNS, dataset_of, load_split, name_for
from caltech_sweep.data.splits import SPLITS, Split
from caltech_sweep.errors import DatasetError, UsageError
from caltech_sweep.metrics import objective_names
from caltech_sweep.study.file import name_problem
from caltech_sweep.text import counted, one_line, readable

ARCH = "resnet18"
_quoted = json.dumps  # a JSON string is a YAML string in quotes, whatever characters it has
_LOOKED_AT = 300  # images whose sizes are read
_CROPS = (32, 64, 96, 128, 224)  # pixels
_EVEN = "val/macro_accuracy"
_UNEVEN = 5  # times as many images in the largest class as in the smallest, from where accuracy misleads


@dataclass(frozen=True)
class Found:
    """What was found in a dataset; sides are in pixels."""

    config: DatasetConfig
    split: Split
    short_side: int  # of the median image, the shorter one
    largest: int
    smallest: int

    @property
    def counts(self) -> list[tuple[str, int]]:
        """Return the images of each class in all parts, the most frequent first."""
        return Counter(item.class_name for part in SPLITS for item in self.split.part(part)).most_common()

    @property
    def is_uneven(self) -> bool:
        """Tell whether one class has many times the images of another."""
        counts = self.counts
        return counts[0][1] >= _UNEVEN * counts[-1][1]


def look(place: Path) -> Found:
    """Look at a folder or csv file of images; raise DatasetError when it cannot be a dataset."""
    if not place.exists():
        raise UsageError(f"--from: there is no folder or file {readable(str(place))}")
    config = DatasetConfig(name=name_for(place), root=str(place))
    if config.name == "csv":
        columns: dict[str, Any] = dict(guess_columns(config))
        config = replace(config, **columns)
    split = load_split(config)
    read = dataset_of(config).read(config)
    items = [item for part in SPLITS for item in split.part(part)]
    shown = items[:: max(1, len(items) // _LOOKED_AT)]
    sides = []
    for item in shown:
        try:
            sides.append(min(size_of(read(item.path))))
        except (OSError, DatasetError):  # which plan and run name, with the reason
            continue
    if not sides:
        raise DatasetError(
            f"no image of {readable(str(place))} can be read; it may be {', '.join(formats()[:8])} and more"
        )
    return Found(config, split, int(statistics.median(sides)), max(sides), min(sides))


def settings_of(found: Found, has_weights: bool) -> dict[str, Any]:
    """Return the settings that suit a dataset: sizes, batch size and epochs."""
    crop = max(side for side in _CROPS if side <= max(found.short_side, _CROPS[0]))
    train = len(found.split.train)
    batch = next((size for size in (64, 32, 16, 8) if size * 8 <= train), 4)
    return {
        "crop": crop,
        "resize": round(crop * 256 / 224),
        "batch_size": batch,
        "drop_last": train % batch == 1,
        "epochs": 10 if has_weights else 20,
        "weights": "pretrained" if has_weights else "none",
    }


def write_study(name: str, place: Path, has_weights: bool, folder: Path = paths.STUDIES) -> tuple[Path, Found]:
    """Write a commented study file for a folder or csv file of images; raise UsageError where one is there already."""
    if wrong := name_problem(name):
        raise UsageError(wrong)
    target = folder / f"{name}.yaml"
    if target.exists():
        raise UsageError(f"there is a study file {target} already; choose another name, or remove it")
    found = look(place)
    text = _text(name, found, settings_of(found, has_weights))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from error
    return target, found


def describe(found: Found) -> list[str]:
    """Return what was found as sentences."""
    counts, split = found.counts, found.split
    parts = ", ".join(f"{part} {len(split.part(part)):,}" for part in SPLITS)
    (most, largest), (least, smallest) = counts[0], counts[-1]
    images = counted(sum(number for _, number in counts), "image")
    sizes = (
        f"The largest class, {one_line(most)}, has {counted(largest, 'image')}; the smallest, {one_line(least)}, has "
    )
    sides = f"{found.smallest} to {found.largest} pixels, {found.short_side} in the middle"
    lines = [
        f"{images} of {counted(len(counts), 'class', 'classes')}: {parts}.",
        f"{sizes}{smallest:,}." if smallest < largest else f"Each class has {counted(largest, 'image')}.",
        f"The shorter side has {sides if found.smallest < found.largest else f'{found.largest} pixels'}.",
    ]
    lines += [f"Passed over: {split.passed_over}."] if split.passed_over else []
    return lines + [f"{note[:1].upper()}{note[1:]}." for note in split.notes]


def _dataset_lines(config: DatasetConfig, chosen: Mapping[str, Any]) -> Sequence[str]:
    lines = [f"  name: {config.name}", f"  root: {_quoted(str(config.root))}"]
    defaults = DatasetConfig()
    for column in CSV_COLUMNS:
        if (value := getattr(config, column)) != getattr(defaults, column):
            lines.append(f"  {column}: {_quoted(value)}")
    return [
        *lines,
        f"  resize: {chosen['resize']}  # pixels of the shorter side; larger shows more and takes longer",
        f"  crop: {chosen['crop']}",
    ]


def _text(name: str, found: Found, chosen: Mapping[str, Any]) -> str:
    start = "What it starts from; `none` trains from scratch"
    if chosen["weights"] == "none":
        start = "`pretrained` is better for photographs, and is downloaded once"
    steps = -(-len(found.split.train) // chosen["batch_size"])
    lines = [
        *(f"# {line.replace(chr(10), ' ')}" for line in describe(found)),
        f"# Check it with: caltech-sweep plan {name}    Run it with: caltech-sweep run {name}",
        "",
        f"title: {_quoted(name)}",
        "",
        "dataset:",
        *_dataset_lines(found.config, chosen),
        "",
    ]
    if found.is_uneven and _EVEN in objective_names():
        text = "# Some classes have many times the images of others, so that each class counts the same here."
        lines += [text, f"objective: {_EVEN}", ""]
    lines += [
        "# One row and five sampled trials; raise the number for a longer search.",
        "trials: 6",
        "sampler: {name: tpe, seed: 0}",
        "",
        "fixed:",
        f"  arch: {ARCH}  # small and quick; resnet50 or convnext_tiny are more accurate on a GPU",
        f"  weights: {chosen['weights']}  # {start}",
        f"  batch_size: {chosen['batch_size']}  # {counted(steps, 'step')} in an epoch",
        f"  drop_last: {str(chosen['drop_last']).lower()}  # leave out a last batch that is not full",
        f"  epochs: {chosen['epochs']}",
        f"  step_size: {max(1, chosen['epochs'] * 2 // 3)}  # after so many epochs the learning rate drops to a tenth",
        "  optimizer: adamw",
        "",
        "space:",
        "  lr: {low: 1e-4, high: 1e-2, log: true}",
        "  weight_decay: {low: 1e-5, high: 1e-1, log: true}",
        "  augment: {subset_of: [hflip, color_jitter, rotation]}",
        "",
        "rows:",
        "  - name: Baseline",
        "    set: {lr: 1e-3, weight_decay: 1e-2}",
    ]
    return "\n".join(lines) + "\n"
