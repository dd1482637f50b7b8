"""What running a study would train, said without training: rows, epochs, images, parameters, what is done, time."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from caltech_sweep import paths
from caltech_sweep.config import TrialConfig
from caltech_sweep.data import load_split
from caltech_sweep.data.splits import PARTS
from caltech_sweep.errors import CaltechSweepError, StoreError
from caltech_sweep.records import TrialRecord
from caltech_sweep.sweep.sharing import new_epochs
from caltech_sweep.sweep.space import all_branches
from caltech_sweep.sweep.study_file import Choices, Dimension, Range, StudyDefinition, variants
from caltech_sweep.sweep.watch import duration


@dataclass(frozen=True)
class Planned:
    """One row, or the sampled trials as a group; pairs are the least and the most."""

    name: str
    trials: int
    epochs: tuple[int, int]
    images: tuple[int, int]  # a trial's, train images of every epoch summed; 0 when the dataset is not there
    trained: tuple[int, int]  # parameters that are trained
    state: str
    new_epochs: tuple[int, int]  # epochs of all its trials that are left to train

    def cells(self) -> tuple[str, ...]:
        """Return the columns as text."""
        return (
            self.name,
            _between(self.epochs),
            _between(self.images) if self.images[1] else "unknown",
            _between(self.trained),
            _between(self.new_epochs),
            self.state,
        )


HEADER = ("trial", "epochs", "images/trial", "parameters trained", "epochs to train", "state")
ENDED = ("complete", "pruned", "diverged")


def _between(pair: tuple[int, int]) -> str:
    return f"{pair[0]:,}" if pair[0] == pair[1] else f"{pair[0]:,} to {pair[1]:,}"


def _counts(definition: StudyDefinition) -> tuple[dict[str, int], int, str]:
    """Return how many images each part has, how many classes there are, and a sentence about them."""
    dataset = definition.config({}).dataset
    if dataset.name == "shapes":
        from caltech_sweep.data import load_dataset

        split = load_dataset(dataset).split
    else:
        try:
            split = load_split(dataset)
        except CaltechSweepError as error:
            return {}, 101, f"the dataset is not here: {error}"
    counts = {part: len(split.part(part)) for part in PARTS}
    sizes = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    return counts, len(split.classes), f"{dataset.name}: {len(split.classes)} classes, {sizes} images"


def _images_of(config: TrialConfig, train: int) -> int:
    an_epoch = train // config.batch_size * config.batch_size if config.drop_last else train
    return config.epochs * an_epoch


def _epochs_of(definition: StudyDefinition) -> tuple[int, int]:
    if "epochs" in definition.expand:
        return min(definition.expand["epochs"]), max(definition.expand["epochs"])
    dimension: Dimension | None = definition.space.get("epochs")
    if isinstance(dimension, Choices):
        return min(dimension.values), max(dimension.values)
    if isinstance(dimension, Range):
        return int(dimension.low), int(dimension.high)
    epochs = definition.config({}).epochs
    return epochs, epochs


def _trained(configs: Sequence[TrialConfig], classes: int) -> tuple[int, int]:
    """Return the least and the most parameters that some configs train."""
    from caltech_sweep.training.models import count_parameters

    # Which weights a model starts from does not change how many it has, and they may not be here yet.
    counts = [count_parameters(replace(config, weights="none"), classes)[0] for config in configs]
    return min(counts), max(counts)


def _records(definition: StudyDefinition, tracking_uri: str | None) -> list[TrialRecord]:
    from caltech_sweep.tracking import MlflowTracker

    try:
        tracker = MlflowTracker(tracking_uri)
    except StoreError:
        return []
    study = tracker.study(definition.name)
    return tracker.trials(study) if study else []


def _planned_rows(
    definition: StudyDefinition,
    counts: Mapping[str, int],
    classes: int,
    records: Sequence[TrialRecord],
    machine: tuple[str | None, int],
) -> list[Planned]:
    configs = [definition.row_config(row) for row in definition.rows]
    states = []
    for row, config in zip(definition.rows, configs, strict=True):
        outcomes = [r.outcome for r in records if r.row == row.name and r.fingerprint == config.fingerprint()]
        states.append("complete" if "complete" in outcomes else (outcomes[-1] if outcomes else "to train"))
    kept = [
        c.epochs if s == "complete" else _stored(definition, c, *machine) for c, s in zip(configs, states, strict=True)
    ]
    new = new_epochs(configs, kept)
    return [
        Planned(
            row.name,
            1,
            (config.epochs,) * 2,
            (_images_of(config, counts.get("train", 0)),) * 2,
            _trained([config], classes),
            state,
            (0 if state in ENDED else left,) * 2,
        )
        for row, config, state, left in zip(definition.rows, configs, states, new, strict=True)
    ]


def _stored(definition: StudyDefinition, config: TrialConfig, device: str | None, threads: int) -> int:
    """Return how many epochs of a trial are kept from earlier trials of any study."""
    from caltech_sweep.training.reuse import StageUse

    folder = paths.reuse_store()
    if not any(folder.glob("stage-*")):
        return 0
    import torch

    from caltech_sweep.data import load_dataset
    from caltech_sweep.sweep.session import find_weights
    from caltech_sweep.training.stages import stored_epochs
    from caltech_sweep.training.trial import pick_device

    try:
        weights = find_weights(definition, None).get(config.weights, ("", None))[1]
        torch.set_num_threads(threads)
        data = load_dataset(config.dataset)
        return stored_epochs(config, data, pick_device(device), weights, StageUse(folder.resolve(), 0))
    except CaltechSweepError:
        return 0


def _planned_sampled(
    definition: StudyDefinition, counts: Mapping[str, int], classes: int, records: Sequence[TrialRecord]
) -> Planned | None:
    number = definition.trials - len(definition.rows)
    if number < 1 or not definition.space:
        return None
    done = len({r.number for r in records if r.row is None and r.outcome in ENDED})
    low, high = _epochs_of(definition)
    configs = list(variants(definition, ("arch", "freeze", "batch_size"), rows=False))
    images = [
        _images_of(replace(config, epochs=epochs), counts.get("train", 0))
        for config in configs
        for epochs in (low, high)
    ]
    families = (number - done) / definition.family_size
    each = (low, high)
    if definition.expand:
        family = [replace(definition.config({}), **settings) for settings in all_branches(definition.expand)]
        each = (sum(new_epochs(family)),) * 2
    left = (round(families * each[0]), round(families * each[1]))
    state = f"{done} of {number} done" if done else "to sample"
    return Planned(
        f"sampled x {number}",
        number,
        (low, high),
        (min(images), max(images)),
        _trained(configs, classes),
        state,
        left,
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i in (0, 5) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _time(records: Sequence[TrialRecord], epochs: tuple[int, int]) -> str:
    measured = [r.metrics["epoch_seconds"] for r in records if "epoch_seconds" in r.metrics]
    if not measured:
        return "time: unknown until one epoch of this study has been measured"
    each = statistics.median(measured)
    low, high = (duration(each * count) for count in epochs)
    span = low if low == high else f"{low} to {high}"
    return f"time: about {span} on one worker, at {each:.1f} s an epoch (median of {len(measured)} measured trials)"


def plan_study(
    definition: StudyDefinition, tracking_uri: str | None, device: str | None = None, threads: int | None = None
) -> str:
    """Return the plan of a study as text; nothing is trained or written.

    ``device`` and ``threads`` are those of the run: kept epochs are shared only where they agree.
    """
    counts, classes, sentence = _counts(definition)
    records = _records(definition, tracking_uri)
    machine = (device, threads or os.cpu_count() or 1)
    rows = _planned_rows(definition, counts, classes, records, machine)
    sampled = _planned_sampled(definition, counts, classes, records)
    groups = rows + ([sampled] if sampled else [])
    lines = [
        f"{definition.title} ({definition.name}): {len(rows)} rows, {sampled.trials if sampled else 0} sampled trials",
        sentence,
    ]
    if definition.overrides:
        lines.append("overrides: " + ", ".join(f"{key}={value}" for key, value in definition.overrides.items()))
    lines += ["", *_table([HEADER, *(group.cells() for group in groups)]), ""]
    if rows:
        lines.append(f"rows: {_asked(rows)} epochs asked for, {_between(_left(rows))} to train")
    if sampled:
        lines.append(f"sampled: {_asked([sampled])} epochs asked for, {_between(sampled.new_epochs)} to train")
    left = _left(groups)
    lines.append(_time(records, left) if left[1] else "nothing to train")
    return "\n".join(lines)


def _asked(groups: Sequence[Planned]) -> str:
    low, high = (sum(group.trials * group.epochs[i] for group in groups) for i in (0, 1))
    return _between((low, high))


def _left(groups: Sequence[Planned]) -> tuple[int, int]:
    low, high = (sum(group.new_epochs[i] for group in groups) for i in (0, 1))
    return low, high
