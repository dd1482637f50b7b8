"""Metrics by epoch from a tracking store, for the few runs that a page draws."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from mlflow.exceptions import MlflowException

from caltech_sweep.errors import StoreError
from caltech_sweep.stores import Address, Store, tracking_store
from caltech_sweep.tracking.client import METRICS, open_client

_CHUNK = 500  # run ids in one query; databases limit how many values it may carry

Curve = tuple[tuple[int, float], ...]  # (1-based epoch, finite value), the first epoch first
Histories = Mapping[str, Mapping[str, Curve]]  # by run id, then by metric


def read_histories(tracking: Address, run_ids: Sequence[str], metrics: Sequence[str]) -> Histories:
    """Return some metrics of some runs by epoch; raise StoreError when the store cannot be read."""
    store = tracking_store(tracking)
    points = (_from_server if store.is_web else _from_database)(store, run_ids, metrics)
    by_step: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for run_id, metric, step, value, _ in points:
        if step > 0 and math.isfinite(value):
            by_step[run_id, metric][step] = value  # a step that was logged twice has its later value
    histories: dict[str, dict[str, Curve]] = {run_id: {} for run_id in run_ids}
    for (run_id, metric), curve in by_step.items():
        histories[run_id][metric] = tuple(sorted(curve.items()))
    return histories


@dataclass(frozen=True)
class Moment:
    """The value of a metric after an epoch of a run; ``at`` is when that was logged, in milliseconds since 1970."""

    run_id: str
    epoch: int
    value: float
    at: int


def read_moments(tracking: Address, run_ids: Sequence[str], metric: str) -> list[Moment]:
    """Return the finite values of a metric of some runs; raise StoreError when the store cannot be read."""
    store = tracking_store(tracking)
    points = (_from_server if store.is_web else _from_database)(store, run_ids, [metric])
    return [Moment(run, step, value, at) for run, _, step, value, at in points if step > 0 and math.isfinite(value)]


Point = tuple[str, str, int, float, int]  # run id, metric, step, value, time


def _from_database(store: Store, run_ids: Sequence[str], metrics: Sequence[str]) -> Iterable[Point]:
    columns: Any = [METRICS.c[name] for name in ("run_uuid", "key", "step", "value", "timestamp")]
    try:
        with store.engine().connect() as connection:
            for start in range(0, len(run_ids), _CHUNK):
                query: Any = (
                    sa.select(*columns)
                    .where(METRICS.c.run_uuid.in_(run_ids[start : start + _CHUNK]), METRICS.c.key.in_(metrics))
                    .where(METRICS.c.is_nan == sa.false())
                    .order_by(METRICS.c.timestamp)
                )
                yield from (tuple(row) for row in connection.execute(query))
    except sa.exc.SQLAlchemyError as error:
        raise _unreadable(store, error) from None  # the cause may hold secrets


def _from_server(store: Store, run_ids: Sequence[str], metrics: Sequence[str]) -> Iterable[Point]:
    client = open_client(store, create=False)
    try:
        for run_id in run_ids:
            for name in metrics:
                for metric in sorted(client.get_metric_history(run_id, name), key=lambda m: m.timestamp):
                    yield run_id, name, metric.step, metric.value, metric.timestamp
    except MlflowException as error:
        raise _unreadable(store, error) from None  # the cause may hold secrets


def _unreadable(store: Store, error: Exception) -> StoreError:
    return StoreError(f"metrics by epoch cannot be read from {store.shown} ({store.reason(error)})")
