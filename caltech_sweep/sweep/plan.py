"""What running a study would train, said without training or writing: rows, epochs, images, parameters, time."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from rich import filesize

from caltech_sweep.config import TRIAL_RULES, TrialConfig, as_stored, parsed
from caltech_sweep.data import inspect_dataset
from caltech_sweep.data.images import LoadedData
from caltech_sweep.data.splits import SPLITS
from caltech_sweep.errors import CaltechSweepError, UsageError
from caltech_sweep.metrics import EPOCH_SECONDS
from caltech_sweep.stores import Store
from caltech_sweep.study.definition import Dimension, Range, Row, StudyDefinition, variants
from caltech_sweep.study.grid import EXHAUSTIVE, grid_size
from caltech_sweep.sweep.forecast import outlook
from caltech_sweep.sweep.lease import check_free
from caltech_sweep.sweep.options import RunOptions
from caltech_sweep.sweep.optuna_store import check_stored
from caltech_sweep.sweep.ownership import check_record, check_runs
from caltech_sweep.sweep.preflight import check_options, find_weights, identity_of, kept_epochs
from caltech_sweep.sweep.queue import wanted_rows
from caltech_sweep.sweep.sharing import new_epochs
from caltech_sweep.sweep.space import all_branches
from caltech_sweep.sweep.survey import Weights, check, left_out, own_networks, published_weights
from caltech_sweep.text import counted, duration
from caltech_sweep.tracking.reader import StoredStudy, open_reader
from caltech_sweep.tracking.records import RESULTS, UNFINISHED, InitialWeights, StudyRecord, TrialRecord

Span = tuple[int, int]  # the least and the most
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """A plan as text, and every reason why a run would not start now."""

    text: str
    problems: tuple[CaltechSweepError, ...]


@dataclass(frozen=True)
class Planned:
    """One row with all its seeds, or the sampled trials as a group."""

    name: str
    epochs: Span  # of one trial
    images: Span | None  # a trial's train images, those of every epoch summed; None when the dataset cannot be read
    trained: Span | None  # parameters that are trained; None when they cannot be known
    state: str
    asked: Span  # epochs of all its trials
    new_epochs: Span  # those of them that are left to train
    kinds: tuple[TrialConfig, ...]  # a trial of each kind whose epochs may take longer or shorter than another's

    def cells(self) -> tuple[str, ...]:
        """Return the columns as text."""
        return (
            self.name,
            _between(self.epochs),
            _between(self.images),
            _between(self.trained),
            _between(self.new_epochs),
            self.state,
        )


HEADER = ("trial", "epochs", "images/trial", "parameters trained", "epochs to train", "state")
_KIND = ("arch", "freeze", "unfreeze_epoch")  # what an epoch's time depends on most
_MOST_VALUES = 4096  # of an integer's range that are looked at one by one


def _between(span: Span | None) -> str:
    if span is None:
        return "unknown"
    if span[0] == span[1]:
        return f"{span[0]:,}"
    return f"{span[0]:,} to {span[1]:,}" if span[0] else f"up to {span[1]:,}"


def _total(spans: Sequence[Span]) -> Span:
    return sum(low for low, _ in spans), sum(high for _, high in spans)


# -- what is there -----------------------------------------------------------------------------------------------------


def _recorded(definition: StudyDefinition, tracking: Store) -> StoredStudy | None:
    """Return what a tracking store has of a study; raise StoreError where no run could write."""
    if tracking.is_missing:
        return None
    reader = open_reader(tracking)
    reader.check_study(definition.name)
    return reader.studies([definition.name])[0] if definition.name in reader.names() else None


def _all(tracking: Store) -> list[StudyRecord]:
    """Return every study of a tracking store, which may be yet to be made."""
    if tracking.is_missing:
        return []
    reader = open_reader(tracking)
    return [study.record for study in reader.studies(reader.names())]


# -- what one trial costs ----------------------------------------------------------------------------------------------


def _images_of(config: TrialConfig, data: LoadedData) -> int:
    train = len(data.split.train)
    an_epoch = train // config.batch_size * config.batch_size if config.drop_last else train
    return config.epochs * an_epoch


def _trained(configs: Sequence[TrialConfig], data: LoadedData | None) -> Span | None:
    """Return the parameters that some configs train; None where the classes or a network are not known."""
    from caltech_sweep.training.models import count_parameters

    if data is None and any(config.outputs is None for config in configs):
        return None
    classes = len(data.split.classes) if data else 0
    try:
        # Which weights a model starts from does not change how many it has, and they may not be here yet.
        counts = [count_parameters(replace(config, weights="none"), classes)[0] for config in configs]
    except CaltechSweepError:
        return None
    return min(counts), max(counts)


# -- rows --------------------------------------------------------------------------------------------------------------


def _state(row: Row, config: TrialConfig, records: Sequence[TrialRecord]) -> str:
    outcomes = [r.state for r in records if r.row == row.name and r.fingerprint == config.fingerprint()]
    return "complete" if "complete" in outcomes else (outcomes[-1] if outcomes else "to train")


def _other_weights(record: TrialRecord, weights: Mapping[str, InitialWeights]) -> str | None:
    """Return a sentence when a run started from other contents than its weights have now."""
    name = record.params.get("weights", "none")
    if as_stored(name) == "imagenet":
        name = f"imagenet {record.params.get('arch')}"
    was, now = record.tags.get("weights.digest"), weights.get(name)
    if was is None or now is None or was == now.digest:
        return None
    return (
        f"the SHA-256 of {name} was {was} when trials of this study were trained, is {now.digest}: run refuses to mix "
        "them; put the old contents back, or give this study a name of its own with --name"
    )


def _planned_rows(
    definition: StudyDefinition,
    only: Sequence[str],
    data: LoadedData | None,
    records: Sequence[TrialRecord],
    kept: Callable[[TrialConfig], int],
) -> list[Planned]:
    wanted = [(row, config) for row, _, config in wanted_rows(definition) if not only or row.name in only]
    states = [_state(row, config, records) for row, config in wanted]
    there = [
        config.epochs if state == "complete" else kept(config)
        for (_, config), state in zip(wanted, states, strict=True)
    ]
    new = new_epochs([config for _, config in wanted], there)
    left, seeds = defaultdict[str, int](int), defaultdict[str, list[str]](list)
    for (row, _), state, count in zip(wanted, states, new, strict=True):
        left[row.name] += 0 if state in RESULTS else count
        seeds[row.name].append(state)
    planned = []
    for row in definition.rows:
        if row.name in seeds:
            config, counts = definition.row_config(row), Counter(seeds[row.name])
            images = _images_of(config, data) if data else None
            planned.append(
                Planned(
                    row.name + (f" x {len(seeds[row.name])} seeds" if len(seeds[row.name]) > 1 else ""),
                    (config.epochs,) * 2,
                    None if images is None else (images,) * 2,
                    _trained([config], data),
                    next(iter(counts))
                    if len(counts) == 1
                    else ", ".join(f"{n} {state}" for state, n in counts.items()),
                    (config.epochs * len(seeds[row.name]),) * 2,
                    (left[row.name] if config.patience is None else 0, left[row.name]),
                    (config,),
                )
            )
    return planned


# -- sampled trials ----------------------------------------------------------------------------------------------------


def _ends(dimension: Dimension) -> tuple[Any, ...]:
    """Return the values of a setting between which all others lie."""
    if not isinstance(dimension, Range):
        return dimension.values
    if dimension.step is None:
        return (dimension.low, dimension.high)
    steps = math.floor((dimension.high - dimension.low) / dimension.step + 1e-9)
    return (dimension.low, dimension.low + steps * dimension.step)


def _every(dimension: Dimension) -> Sequence[Any]:
    """Return all values of a setting that is a choice or an integer, or its ends where they are too many."""
    few = isinstance(dimension, Range) and dimension.high - dimension.low < _MOST_VALUES
    return dimension.integers if isinstance(dimension, Range) and few else _ends(dimension)


def _branches(definition: StudyDefinition, base: TrialConfig) -> list[TrialConfig]:
    return [replace(base, **settings) for settings in all_branches(definition.expand)]


def _families(definition: StudyDefinition) -> Iterator[list[TrialConfig]]:
    """Yield the schedules that a sampled setting gives, for the ends of each sampled part of a schedule."""
    sampled = {key: _ends(definition.space[key]) for key in ("epochs", "step_size", "gamma") if key in definition.space}
    for values in itertools.product(*sampled.values()):
        yield _branches(definition, definition.sampled_config(dict(zip(sampled, values, strict=True))))


def _is_finite(dimension: Dimension) -> bool:
    return not isinstance(dimension, Range) or dimension.integer or dimension.step is not None


def _may_be_less(definition: StudyDefinition) -> bool:
    """Tell whether sampled trials may train less than all their epochs: stopped, or alike when few can be sampled."""
    stops = definition.sampled_config({}).patience is not None or "patience" in definition.space
    return definition.pruner is not None or stops or all(map(_is_finite, definition.space.values()))


def _schedule(config: TrialConfig) -> tuple[int, float, int]:
    return config.step_size, config.gamma, config.epochs


def _as_trained(definition: StudyDefinition, record: TrialRecord) -> TrialConfig:
    """Return a config with the schedule of a sampled trial, which its run knows as text."""
    rules = {name: TRIAL_RULES[name] for name in ("lr", "step_size", "gamma", "epochs")}
    return replace(definition.config({}), **parsed(record.params, rules))


def _begun(definition: StudyDefinition, family: Sequence[TrialRecord]) -> tuple[int, Span]:
    """Return the epochs that a family of which trials are known requests, and those that are left."""
    ended = {_schedule(_as_trained(definition, record)) for record in family if record.state in RESULTS}
    configs = _branches(definition, _as_trained(definition, family[0]))
    configs.sort(key=lambda config: _schedule(config) not in ended)
    new = new_epochs(configs, [config.epochs if _schedule(config) in ended else 0 for config in configs])
    left = sum(count for config, count in zip(configs, new, strict=True) if _schedule(config) not in ended)
    interrupted = any(record.state not in RESULTS for record in family)
    return sum(config.epochs for config in configs), (0 if interrupted or _may_be_less(definition) else left, left)


def _sampled_images(definition: StudyDefinition, data: LoadedData, epochs: Span) -> Span:
    """Return the images of a sampled trial, for any size and treatment of its batches."""
    size = definition.space.get("batch_size")
    configs = [
        replace(config, epochs=1, batch_size=number)
        for config in variants(definition, ("drop_last",), rows=False)
        for number in ([config.batch_size] if size is None else _every(size))
    ]
    each = [_images_of(config, data) for config in configs]
    return epochs[0] * min(each), epochs[1] * max(each)


def _times(number: int, epochs: Sequence[int]) -> Span:
    return number * min(epochs), number * max(epochs)


def _planned_sampled(
    definition: StudyDefinition, data: LoadedData | None, records: Sequence[TrialRecord]
) -> Planned | None:
    number = definition.trials - len(definition.rows)
    if definition.sampler.name in EXHAUSTIVE:  # the study ends with its space
        number = min(number, grid_size(definition.space))
    if number < 1 or not definition.space:
        return None
    size = definition.family_size
    total = math.ceil(number / size)  # families; each is trained as a whole
    groups: dict[str, dict[int, TrialRecord]] = defaultdict(dict)
    for record in records:  # a trial that failed is sampled again, so it does not count
        if (
            record.row is None
            and not {"confirms", "fold_of"} & record.tags.keys()
            and record.state in (*RESULTS, *UNFINISHED, "running")
        ):
            groups[record.tags.get("family", str(record.number))][record.number] = record
    begun = [_begun(definition, list(group.values())) for group in groups.values()]
    states = [record.state for group in groups.values() for record in group.values()]
    done, paused = sum(state in RESULTS for state in states), states.count("paused")
    families = list(_families(definition))
    asked = [sum(config.epochs for config in family) for family in families]
    left = [sum(new_epochs(family)) for family in families]
    missing = max(0, total - len(groups))
    folds = definition.folds - 1  # further trainings of each; those of a trial that was pruned are counted, too
    repeats = [record for record in records if "fold_of" in record.tags and record.state in RESULTS]
    later = sum(TrialConfig.from_params(record.params).epochs for record in repeats)
    least = 0 if _may_be_less(definition) else min(left)
    epochs = sorted(config.epochs for family in families for config in family)
    span, kinds = (epochs[0], epochs[-1]), tuple(variants(definition, (*_KIND, "outputs"), rows=False))
    return Planned(
        f"sampled x {total * size}",
        span,
        _sampled_images(definition, data, span) if data else None,
        _trained(kinds, data),
        (f"{done} of {total * size} done" + (f", {paused} paused" if paused else "")) if done + paused else "to sample",
        _total([*((count * (1 + folds),) * 2 for count, _ in begun), _times(missing * (1 + folds), asked)]),
        _total(
            [
                *(rest for _, rest in begun),
                *((count * folds,) * 2 for count, _ in begun),
                (-later, -later),
                (missing * (least + folds * min(asked)), missing * (max(left) + folds * max(asked))),
            ]
        ),
        kinds,
    )


# -- the text ----------------------------------------------------------------------------------------------------------


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i in (0, 5) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _kind(config: TrialConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in _KIND)


def _time(groups: Sequence[Planned], records: Sequence[TrialRecord]) -> str:
    """Say how long the epochs that are left take, those of each group by trials of its kind that were measured."""
    measured = {
        record.run_id: (_kind(TrialConfig.from_params(record.params)), took)
        for record in records
        if math.isfinite(took := record.metrics.get(EPOCH_SECONDS, math.nan))
    }
    seen: set[str] = set()
    each, spans, unknown = list[float](), list[tuple[float, float]](), list[str]()
    for group in groups:
        if not group.new_epochs[1]:
            continue
        kinds = set(map(_kind, group.kinds))
        known = {run: took for run, (kind, took) in measured.items() if kind in kinds}
        if not known:
            unknown.append(group.name)
            continue
        seen |= known.keys()
        each.append(statistics.median(known.values()))
        spans.append((each[-1] * group.new_epochs[0], each[-1] * group.new_epochs[1]))
    if not spans:
        return "time: unknown until one epoch of this study has been measured"
    least = sum(low for low, _ in spans)
    low, high = duration(least), duration(sum(high for _, high in spans))
    span = low if low == high else f"{low} to {high}" if least else f"up to {high}"
    an_epoch = " to ".join(dict.fromkeys(f"{took:.1f}" for took in (min(each), max(each))))
    text = (
        f"time: about {span} on one worker, at {an_epoch} s an epoch (median of {counted(len(seen), 'measured trial')})"
    )
    return text + (f"; that is without {', '.join(unknown)}, of whose kind no trial was measured" if unknown else "")


def _about_data(definition: StudyDefinition, data: LoadedData | None) -> str:
    name = definition.config({}).dataset.name
    if data is None:
        return f"{name}: the images cannot be read, see below; what depends on them is unknown"
    sizes = ", ".join(f"{part} {len(data.split.part(part)):,}" for part in SPLITS)
    to_build = f"; they are decoded once into a cache of {filesize.decimal(data.to_build)}" if data.to_build else ""
    return f"{name}: {len(data.split.classes)} classes, {sizes} images{to_build}"


def _inputs(definition: StudyDefinition) -> list[str]:
    """Return a sentence for each way in which a network with published weights sees the images."""
    from caltech_sweep.training.networks import input_note

    found: list[str] = []
    for config in variants(definition, ("arch", "weights", "normalize")):
        with contextlib.suppress(CaltechSweepError):  # of a network that is not there; the run is refused for that
            found += [note] if (note := input_note(config)) is not None else []
    return list(dict.fromkeys(found))


def _text(
    definition: StudyDefinition,
    about: Sequence[str],
    rows: Sequence[Planned],
    sampled: Planned | None,
    records: Sequence[TrialRecord],
) -> str:
    groups = [*rows, *([sampled] if sampled else [])]
    count = sampled.name.removeprefix("sampled x ") if sampled else "0"
    size = f"{counted(len(rows), 'row')}, {counted(int(count), 'sampled trial')}"
    lines = [f"{definition.title} ({definition.name}): {size}", *about]
    if definition.overrides:
        lines.append("overrides: " + ", ".join(f"{key}={value}" for key, value in definition.overrides.items()))
    lines += ["", *_table([HEADER, *(group.cells() for group in groups)]), ""]
    for name, some in (("rows", rows), ("sampled", [sampled] if sampled else [])):
        if some:
            asked, left = _total([g.asked for g in some]), _total([g.new_epochs for g in some])
            lines.append(f"{name}: {_between(asked)} epochs requested, {_between(left)} to train")
    left = _total([group.new_epochs for group in groups])
    lines += outlook(definition, records, _total([row.new_epochs for row in rows])[1])
    lines.append(_time(groups, records) if left[1] else "nothing to train")
    return "\n".join(lines)


def _attempt(problems: list[CaltechSweepError], step: Callable[[], T]) -> T | None:
    try:
        return step()
    except CaltechSweepError as error:
        problems.append(error)
        return None


def plan_study(definition: StudyDefinition, options: RunOptions) -> Plan:
    """Return the plan of a run with some options; nothing is trained, downloaded or written.

    What keeps a run from starting is reported along with what can be planned. Raises at once, as a run does, for
    options that do not fit and for a tracking store that cannot be used.
    """
    tracking, storage = check_options(definition, options)
    recorded = _recorded(definition, tracking)
    records: tuple[TrialRecord, ...] = ()
    problems: list[CaltechSweepError] = []
    if recorded is not None:
        trials = list(recorded.trials)
        _attempt(problems, partial(check_record, recorded.record, lambda: trials, tracking, storage))
        records = () if problems else recorded.trials
    if not problems:
        _attempt(problems, partial(check_runs, definition.name, records, tracking, storage, partial(_all, tracking)))
    weights = _attempt(problems, partial(_find_weights, definition, tracking))
    data = _attempt(problems, partial(inspect_dataset, definition.config({}).dataset, options.verify))
    identity = None
    if data is not None and weights is not None:
        _attempt(problems, partial(check, definition, data, weights))
        identity = identity_of(definition, data.fingerprint, weights, own_networks(definition))
    _attempt(problems, partial(check_free, storage, definition.name))
    stored = len(problems)
    _attempt(problems, partial(check_stored, definition.name, storage, identity, weights))
    other = {record.run_id: sentence for record in records if (sentence := _other_weights(record, weights or {}))}
    if len(problems) == stored:
        problems += [UsageError(sentence) for sentence in dict.fromkeys(other.values())]
    records = tuple(record for record in records if record.run_id not in other)
    rows = _planned_rows(definition, options.rows, data, records, kept_epochs(options, data, weights))
    sampled = None if options.rows else _planned_sampled(definition, data, records)
    about = [_about_data(definition, data), *(left_out(definition, data.split) if data else []), *_inputs(definition)]
    if weights is not None:
        missing = {c.arch for c in variants(definition, ("arch", "weights")) if c.pretrained}
        missing -= {name.removeprefix("imagenet ") for name in weights}
        about += [
            f"the published weights of {arch} are not here yet; a run downloads them first" for arch in sorted(missing)
        ]
    return Plan(_text(definition, about, rows, sampled, records), tuple(problems))


def _find_weights(definition: StudyDefinition, tracking: Store) -> Weights:
    return find_weights(definition, tracking) | published_weights(definition, None)
