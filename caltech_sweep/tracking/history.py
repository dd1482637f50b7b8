"""Metrics by epoch from a tracking store, for the few runs that a page draws."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from caltech_sweep import stores
from caltech_sweep.errors import StoreError
from caltech_sweep.tracking.writer import MlflowTracker

_CHUNK = 500  # run ids in one query; databases limit how many values it may carry

# The import of caltech_sweep.tracking above sets MLflow up, so these must come after it.
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.store.db.db_types import DATABASE_ENGINES  # noqa: E402
from mlflow.store.tracking.dbmodels.models import SqlMetric  # noqa: E402

Curve = tuple[tuple[int, float], ...]  # (1-based epoch, finite value), the first epoch first
Histories = Mapping[str, Mapping[str, Curve]]  # by run id, then by metric

_METRICS = SqlMetric.__table__


def read_histories(uri: str, run_ids: Sequence[str], metrics: Sequence[str]) -> Histories:
    """Return some metrics of some runs by epoch; raise StoreError when the store cannot be read."""
    database = uri.startswith(tuple(DATABASE_ENGINES))
    points = _from_database(uri, run_ids, metrics) if database else _from_server(uri, run_ids, metrics)
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


def read_moments(uri: str, run_ids: Sequence[str], metric: str) -> list[Moment]:
    """Return the finite values of a metric of some runs; raise StoreError when the store cannot be read."""
    database = uri.startswith(tuple(DATABASE_ENGINES))
    points = _from_database(uri, run_ids, [metric]) if database else _from_server(uri, run_ids, [metric])
    return [Moment(run, step, value, at) for run, _, step, value, at in points if step > 0 and math.isfinite(value)]


Point = tuple[str, str, int, float, int]  # run id, metric, step, value, time


def _from_database(uri: str, run_ids: Sequence[str], metrics: Sequence[str]) -> Iterable[Point]:
    names = ("run_uuid", "key", "step", "value", "timestamp")
    columns: Any = [_METRICS.c[name] for name in names]
    try:
        with sa.create_engine(uri, poolclass=sa.NullPool).connect() as connection:
            for start in range(0, len(run_ids), _CHUNK):
                query: Any = (
                    sa.select(*columns)
                    .where(_METRICS.c.run_uuid.in_(run_ids[start : start + _CHUNK]), _METRICS.c.key.in_(metrics))
                    .where(_METRICS.c.is_nan == sa.false())
                    .order_by(_METRICS.c.timestamp)
                )
                yield from (tuple(row) for row in connection.execute(query))
    except sa.exc.SQLAlchemyError as error:
        raise _unreadable(uri, error) from None  # the cause may hold secrets


def _from_server(uri: str, run_ids: Sequence[str], metrics: Sequence[str]) -> Iterable[Point]:
    client = MlflowTracker(uri).client
    try:
        for run_id in run_ids:
            for name in metrics:
                for metric in sorted(client.get_metric_history(run_id, name), key=lambda m: m.timestamp):
                    yield run_id, name, metric.step, metric.value, metric.timestamp
    except MlflowException as error:
        raise _unreadable(uri, error) from None  # the cause may hold secrets


def _unreadable(uri: str, error: Exception) -> StoreError:
    return StoreError(f"metrics by epoch cannot be read from {stores.hide_secrets(uri)} ({stores.reason(error, uri)})")
