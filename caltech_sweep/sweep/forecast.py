"""What ``plan`` says of a search: who proposes its settings, what its pruner saves, how far its budget goes."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence

from caltech_sweep.metrics import objective
from caltech_sweep.study.components import pruning_start, startup_trials
from caltech_sweep.study.definition import Component, StudyDefinition
from caltech_sweep.study.grid import EXHAUSTIVE, grid_size, reachable
from caltech_sweep.sweep.budget import spent_by
from caltech_sweep.text import counted
from caltech_sweep.tracking.records import TrialRecord

RUNGS = {"asha": ("min_epochs", "factor", 1, 3), "halving": ("min_resource", "reduction_factor", None, 4)}


def first_proposal(definition: StudyDefinition) -> int | None:
    """Return the number of the first trial that the sampler's model proposes on one worker, or None without a model.

    The rows come before it, and of these the ones inside the space are learnt from (``nsgaii`` breeds sampled trials
    only). A family is sampled once.
    """
    startup = startup_trials(definition.sampler)
    if startup is None:
        return None
    space, family = definition.space, definition.family_size
    inside = sum(reachable(space, definition.row_config(row).to_dict()) == space for row in definition.rows)
    learnt = 0 if definition.sampler.name == "nsgaii" else inside * definition.replicates
    at_random = -(-max(0, startup - learnt) // family) * family
    return len(definition.rows) * definition.replicates + at_random


def _proposals(definition: StudyDefinition) -> str:
    name, first = definition.sampler.name, first_proposal(definition)
    if name in EXHAUSTIVE:
        return f"sampler: {name} tries each of {grid_size(definition.space):,} combinations once"
    if first is None:
        return f"sampler: {name} draws all settings without a model of earlier trials"
    rows = len(definition.rows) * definition.replicates
    trials = definition.trials - len(definition.rows) + rows
    kinds = [(rows, "row", ""), (first - rows, "sampled at random", "sampled at random")]
    before = " and ".join(counted(*kind) for kind in kinds if kind[0])
    if first >= trials:
        return (
            f"sampler: no trial is proposed by the model of {name}, which waits for "
            f"{startup_trials(definition.sampler)} ended trials; lower its startup_trials, or raise trials"
        )
    return f"sampler: {name} proposes from its model from trial-{first:03d} on, after {before}"


def rungs(pruner: Component, epochs: int) -> tuple[tuple[int, ...], int] | None:
    """Return the epochs at which a trial is held against others, and of how many one goes on; None where unknown."""
    if pruner.name not in RUNGS:
        return None
    least, factor, default, usual = RUNGS[pruner.name]
    first, share = pruner.arguments.get(least, default), pruner.arguments.get(factor, usual)
    if not isinstance(first, int) or not isinstance(share, int):
        return None
    first *= share ** int(pruner.arguments.get("min_early_stopping_rate", 0))
    powers = itertools.takewhile(lambda rung: rung < epochs, (first * share**k for k in itertools.count()))
    return tuple(powers), share


def expected_epochs(pruner: Component, epochs: int) -> float | None:
    """Return the epochs that a trial trains on average when of ``factor`` trials one goes on at each rung."""
    found = rungs(pruner, epochs)
    if found is None:
        return None
    stops, share = [*found[0], epochs], found[1]
    return stops[0] + sum((b - a) / share**k for k, (a, b) in enumerate(itertools.pairwise(stops), 1))


def _savings(definition: StudyDefinition, pruner: Component) -> str:
    """Return what pausing or pruning is expected to save of the epochs of sampled trials, or can save at most."""
    each, number = definition.sampled_epochs, definition.trials - len(definition.rows)
    asked = statistics.fmean(each) * number
    expected = [value for epochs in each if (value := expected_epochs(pruner, epochs)) is not None]
    if expected:
        points, share = rungs(pruner, max(each)) or ((), 0)
        verb = "pauses" if pruner.name == "asha" else "stops"
        total = statistics.fmean(expected) * number
        at = f"epoch{'s' if len(points) > 1 else ''} {', '.join(map(str, points))}" if points else "no epoch"
        return (
            f"pruner: {pruner.name} {verb} sampled trials at {at} and lets 1 in {share} go on: about {total:,.0f} of "
            f"{asked:,.0f} epochs are expected, {1 - total / asked:.0%} less"
        )
    start = pruning_start(pruner)
    if start is None:
        return f"pruner: what {pruner.name} saves cannot be told before"
    epoch, complete = start
    free = max(0, number - max(0, complete - len(definition.rows) * definition.replicates))
    saved = statistics.fmean(max(0, epochs - epoch) for epochs in each) * free
    return (
        f"pruner: {pruner.name} stops sampled trials from epoch {epoch} on, once {counted(complete, 'trial')} are "
        f"complete: it saves at most {saved:,.0f} of {asked:,.0f} epochs"
    )


def _within(definition: StudyDefinition, records: Sequence[TrialRecord], rows_left: int) -> Iterator[str]:
    """Yield what is left of each limit of the budget, and what that is enough for.

    ``rows_left`` are the epochs that rows have to train.
    """
    spent = spent_by(records)
    measured = [r.metrics["epoch_seconds"] for r in records if "epoch_seconds" in r.metrics]
    for kind, limit in definition.budget.items():
        if kind == "epochs":
            left = limit - spent.epochs
            text = f"budget: {limit:,} epochs, {spent.epochs:,} spent"
        else:
            seconds = max(0.0, limit * 3600 - spent.seconds)
            text = f"budget: {limit:g} hours, {spent.seconds / 3600:.2f} spent"
            if not measured:
                yield f"{text}; how far they go is unknown until one epoch of this study has been measured"
                continue
            left = seconds / statistics.median(measured)
            text += f"; the rest is about {left:,.0f} epochs on one worker"
        yield f"{text}; {_enough(definition, records, left, rows_left)}"


def _enough(definition: StudyDefinition, records: Sequence[TrialRecord], left: float, rows_left: int) -> str:
    if left < rows_left:
        return f"that is not enough for the rows, which have {rows_left:,} epochs to train"
    ended = sum(r.row is None and "confirms" not in r.tags and r.state in ("complete", "pruned") for r in records)
    sampled = max(0, definition.trials - len(definition.rows) - ended) if definition.space else 0
    fit = min(sampled, int((left - rows_left) // max(definition.sampled_epochs)))
    if fit == sampled:
        return "that is enough for all trials"
    return f"that is enough for the rows and at least {fit:,} of {counted(sampled, 'sampled trial')}"


def outlook(definition: StudyDefinition, records: Sequence[TrialRecord], rows_left: int) -> list[str]:
    """Return the sentences of a plan about sampler, pruner, early stopping and budget."""
    lines = []
    if definition.space and definition.trials > len(definition.rows):
        lines.append(_proposals(definition))
        lines += [_savings(definition, definition.pruner)] if definition.pruner else []
        config = definition.sampled_config({})
        if config.patience is not None and "patience" not in definition.space:
            better = f" by more than {config.min_delta:g}" if config.min_delta else ""
            lines.append(
                f"early stopping: a sampled trial ends after {counted(config.patience, 'epoch')} without a validation "
                f"{objective(config.objective).label} that is better{better}"
            )
    return [*lines, *_within(definition, records, rows_left)]
