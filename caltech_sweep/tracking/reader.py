"""Reading the tracking store for reports: all trials of some studies, and the files that their runs left.

A database is read through MLflow's own table models in a fixed number of queries, however many runs there are, and is
never written, not even to create or to upgrade its tables. A server is read through the client, page by page. Both
give the same records.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa
from mlflow import MlflowClient
from mlflow.entities import Experiment, Run

from caltech_sweep.errors import StoreError
from caltech_sweep.stores import Address, Store, tracking_store
from caltech_sweep.text import parse_json
from caltech_sweep.tracking.client import (
    EXPERIMENTS,
    LATEST_METRICS,
    PAGE,
    PARAMS,
    RUNS,
    STUDY_FILE,
    TAGS,
    Artifacts,
    check_schema,
    deleted,
    open_client,
    pages,
)
from caltech_sweep.tracking.records import FORMER_TAG, STORE_TAG, StudyRecord, TrialRecord


@dataclass(frozen=True)
class StoredStudy:
    """One study as the store has it: its parent run and every trial, the oldest first."""

    record: StudyRecord
    trials: tuple[TrialRecord, ...]


class Reader(Protocol):
    """A tracking store to read from."""

    store: Store
    artifacts: Artifacts

    def check_study(self, name: str) -> None:
        """Raise StoreError where no run of a study of this name could write, however well it is read."""

    def names(self) -> list[str]:
        """Return the name of every study, the oldest first."""

    def studies(self, names: Sequence[str]) -> list[StoredStudy]:
        """Return some studies in the order of their names."""

    def text(self, trial: TrialRecord, path: str) -> str:
        """Return the text of a trial's artifact; raise StoreError when it is not there."""
        return self.artifacts.text(trial.artifact_uri, path, trial.study)


def open_reader(tracking: Address = None) -> Reader:
    """Open the named tracking store, or the default one; raise StoreError when it cannot be read."""
    store = tracking_store(tracking)
    return ClientReader(store) if store.is_web else SqlReader(store)


def _document(artifacts: Artifacts, uri: str, study: str) -> Mapping[str, Any]:
    """Return a study's document; an unreadable one is empty, and the report says so."""
    try:
        loaded = parse_json(artifacts.text(uri, STUDY_FILE, study))
    except (StoreError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _in_order(trials: Iterable[TrialRecord]) -> tuple[TrialRecord, ...]:
    """Return trials as they began: by their numbers, since the clocks of machines differ and are set back."""
    return tuple(sorted(trials, key=lambda trial: (trial.number, trial.start_time, trial.run_id)))


class ClientReader(Reader):
    """Reads a store through MLflow's client, ``page`` runs at a time; opens one where none is given."""

    def __init__(self, tracking: Address, page: int = PAGE, client: MlflowClient | None = None) -> None:
        self.store, self._page = tracking_store(tracking), page
        self._client = client or open_client(self.store, create=False)
        self.artifacts = Artifacts(self.store)
        self._parents: dict[str, Run] = {}

    def check_study(self, name: str) -> None:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            raise deleted(name)

    def names(self) -> list[str]:
        order = ["creation_time ASC", "experiment_id ASC"]
        for experiment in pages(self._client.search_experiments, size=self._page, order_by=order):
            run = self._parent(experiment)
            if run is not None:
                self._parents[experiment.name] = run
        return list(self._parents)

    def _parent(self, experiment: Experiment) -> Run | None:
        return next(self._runs(experiment.experiment_id, "study", 1), None)

    def record(self, name: str) -> StudyRecord | None:
        """Return one study without its trials, or None; raises as MLflow's client does."""
        experiment = self._client.get_experiment_by_name(name)
        run = self._parent(experiment) if experiment is not None else None
        return None if run is None else self._record(name, run)

    def records(self) -> list[StudyRecord]:
        """Return every study without its trials, the oldest first."""
        return [self._record(name, self._parents[name]) for name in self.names()]

    def _record(self, name: str, run: Run) -> StudyRecord:
        document = _document(self.artifacts, run.info.artifact_uri, name)
        return StudyRecord.from_tags(name, run.info.run_id, run.info.experiment_id, document, run.data.tags)

    def trials(self, record: StudyRecord) -> tuple[TrialRecord, ...]:
        """Return every trial of a study, the oldest first; those of another study of its name are none of it."""
        return _in_order(
            TrialRecord(
                run.info.run_id,
                record.name,
                run.info.run_name or "",
                run.info.status,
                dict(run.data.params),
                dict(run.data.metrics),
                dict(run.data.tags),
                run.info.start_time or 0,
                run.info.artifact_uri or "",
            )
            for run in self._runs(record.experiment_id, "trial", self._page)
            if record.has(run.data.tags)
        )

    def studies(self, names: Sequence[str]) -> list[StoredStudy]:
        records = [self._record(name, self._parents[name]) for name in names]
        return [StoredStudy(record, self.trials(record)) for record in records]

    def _runs(self, experiment_id: str, kind: str, size: int) -> Iterator[Run]:
        """Yield an experiment's runs of a kind, the newest first."""
        order = ["attributes.start_time DESC", "attributes.run_id ASC"]
        return pages(self._client.search_runs, [experiment_id], f"tags.kind = '{kind}'", size=size, order_by=order)


class SqlReader(Reader):
    """Reads a tracking database with SQLAlchemy, through MLflow's table models."""

    def __init__(self, tracking: Address) -> None:
        self.store = tracking_store(tracking)
        self.store.check()
        with self.store.opening():
            self._engine = self.store.engine()
        self.artifacts = Artifacts(self.store)
        self._parents: dict[str, tuple[str, str, str | None]] = {}  # name: experiment id, run id, artifact location

    def _rows(self, query: sa.Executable) -> Iterator[Any]:
        """Yield a query's rows; none is kept, which would cost more than reading it."""
        try:
            with self._engine.connect() as connection:
                yield from connection.execute(query)
        except sa.exc.SQLAlchemyError as error:
            raise self.store.unreadable(error) from None  # the cause may hold secrets

    def check_study(self, name: str) -> None:
        """Raise StoreError for a study that was deleted, and for a store of another version of MLflow."""
        query: Any = sa.select(EXPERIMENTS.c.lifecycle_stage).where(EXPERIMENTS.c.name == name)
        if [stage for (stage,) in self._rows(query)] == ["deleted"]:
            raise deleted(name)
        check_schema(self.store, self._engine)

    def names(self) -> list[str]:
        query: Any = (
            sa.select(EXPERIMENTS.c.name, EXPERIMENTS.c.experiment_id, RUNS.c.run_uuid, RUNS.c.artifact_uri)
            .join(RUNS, RUNS.c.experiment_id == EXPERIMENTS.c.experiment_id)
            .join(TAGS, TAGS.c.run_uuid == RUNS.c.run_uuid)
            .where(EXPERIMENTS.c.lifecycle_stage == "active", RUNS.c.lifecycle_stage == "active")
            .where(TAGS.c.key == "kind", TAGS.c.value == "study")
            .order_by(
                EXPERIMENTS.c.creation_time, EXPERIMENTS.c.experiment_id, RUNS.c.start_time.desc(), RUNS.c.run_uuid
            )
        )
        for name, experiment_id, run_id, location in self._rows(query):
            self._parents.setdefault(name, (str(experiment_id), run_id, location))
        return list(self._parents)

    def studies(self, names: Sequence[str]) -> list[StoredStudy]:
        experiments = {int(self._parents[name][0]): name for name in names}
        trials = self._trials(experiments)
        found = []
        for name in names:
            experiment_id, run_id, location = self._parents[name]
            document = _document(self.artifacts, location or "", name)
            record = StudyRecord.from_tags(name, run_id, experiment_id, document, self._owner(run_id))
            own = (trial for trial in trials[name] if record.has(trial.tags))
            found.append(StoredStudy(record, _in_order(own)))
        return found

    def _owner(self, run_id: str) -> dict[str, str]:
        """Return the tags that say whose a study is."""
        query = sa.select(TAGS.c.key, TAGS.c.value)
        mine = (TAGS.c.run_uuid == run_id) & TAGS.c.key.in_((STORE_TAG, FORMER_TAG))
        return {str(key): value for key, value in self._rows(query.where(mine))}

    def _trials(self, experiments: Mapping[int, str]) -> Mapping[str, list[TrialRecord]]:
        chosen: Any = sa.select(RUNS.c.run_uuid).where(
            RUNS.c.experiment_id.in_(experiments), RUNS.c.lifecycle_stage == "active"
        )
        columns = (RUNS.c.experiment_id, RUNS.c.run_uuid, RUNS.c.name, RUNS.c.status, RUNS.c.start_time)
        runs = list(self._rows(sa.select(*columns, RUNS.c.artifact_uri).where(RUNS.c.run_uuid.in_(chosen))))
        params = self._values(PARAMS, chosen)
        tags = self._values(TAGS, chosen)
        metrics = self._values(LATEST_METRICS, chosen)
        found: dict[str, list[TrialRecord]] = defaultdict(list)
        for experiment_id, run_id, name, status, start, location in runs:
            own, study = tags.get(run_id, {}), experiments[experiment_id]
            if own.get("kind") == "trial":
                name = name or own.get("mlflow.runName", "")
                values = params.get(run_id, {}), metrics.get(run_id, {}), own
                found[study].append(TrialRecord(run_id, study, name, status, *values, start or 0, location or ""))
        return found

    def _values(self, table: Any, chosen: Any) -> dict[str, dict[str, Any]]:
        """Return key and value of params, tags or latest metrics by run."""
        value = table.c.value
        if table is LATEST_METRICS:
            value = sa.case((table.c.is_nan == sa.true(), sa.null()), else_=value)
        missing = float("nan") if table is LATEST_METRICS else ""
        values: dict[str, dict[str, Any]] = defaultdict(dict)
        query = sa.select(table.c.run_uuid, table.c.key, value).where(table.c.run_uuid.in_(chosen))
        for run_id, key, stored in self._rows(query):
            values[run_id][key] = missing if stored is None else stored
        return values
