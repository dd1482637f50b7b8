"""Reading the tracking store for reports: all trials of some studies, and the files that their runs left.

A database is read through MLflow's own table models in a fixed number of queries, however many runs there are, and is
never written, not even to create or to upgrade its tables. A server is read through the client, page by page. Both
give the same records.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa

from caltech_sweep import paths, stores
from caltech_sweep.errors import StoreError
from caltech_sweep.tracking.records import FORMER_TAG, STORE_TAG, StudyRecord, TrialRecord, sound_outcome
from caltech_sweep.tracking.writer import STUDY_FILE, MlflowTracker, deleted, study_record

_ALIVE = ("RUNNING", "SCHEDULED")

# The import of caltech_sweep.tracking above sets MLflow up, so these must come after it.
from mlflow.entities import Run  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.store.db.db_types import DATABASE_ENGINES  # noqa: E402
from mlflow.store.db.utils import _verify_schema  # noqa: E402
from mlflow.store.tracking.dbmodels.models import (  # noqa: E402
    SqlExperiment,
    SqlLatestMetric,
    SqlParam,
    SqlRun,
    SqlTag,
)
from mlflow.utils.file_utils import local_file_uri_to_path  # noqa: E402

# The bare tables: configuring MLflow's hundred mapped classes takes longer than reading a usual store.
_EXPERIMENTS, _RUNS, _TAGS = SqlExperiment.__table__, SqlRun.__table__, SqlTag.__table__
_PARAMS, _METRICS = SqlParam.__table__, SqlLatestMetric.__table__


@dataclass(frozen=True)
class StoredStudy:
    """One study as the store has it: its parent run and every trial, the oldest first."""

    record: StudyRecord
    trials: tuple[TrialRecord, ...]


class Reader(Protocol):
    """A tracking store to read from."""

    uri: str

    def check_study(self, name: str) -> None:
        """Raise StoreError where no run of a study of this name could write, however well it is read."""

    def names(self) -> list[str]:
        """Return the name of every study, the oldest first."""

    def studies(self, names: Sequence[str]) -> list[StoredStudy]:
        """Return some studies in the order of their names."""

    def text(self, trial: TrialRecord, path: str) -> str:
        """Return the text of a trial's artifact; raise StoreError when it is not there."""


def open_reader(uri: str | None = None) -> Reader:
    """Open the named tracking store, or the default one; raise StoreError when it cannot be read."""
    address = stores.tracking_uri(uri)
    return SqlReader(address) if address.startswith(tuple(DATABASE_ENGINES)) else ClientReader(address)


def _record(
    study: str,
    info: tuple[str, str | None, str, int | None, str | None],
    params: Mapping[str, str],
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
) -> TrialRecord:
    run_id, name, status, start_time, artifact_uri = info
    # A run that goes on after an interruption may still carry the outcome it had before.
    outcome = "running" if status in _ALIVE else sound_outcome(tags.get("outcome") or "interrupted", metrics)
    number = tags.get("trial_number", "")
    return TrialRecord(
        run_id,
        study,
        name or tags.get("mlflow.runName", ""),
        tags.get("row"),
        int(number) if number.isdecimal() else -1,
        outcome,
        status,
        tags.get("fingerprint", ""),
        params,
        metrics,
        tags,
        start_time or 0,
        artifact_uri or "",
    )


def _document(text: str | None) -> Mapping[str, Any]:
    """Return a study's document; an unreadable one is empty, and the report says so."""
    try:
        loaded = json.loads(text or "")
    except ValueError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _in_order(trials: Iterable[TrialRecord]) -> tuple[TrialRecord, ...]:
    return tuple(sorted(trials, key=lambda trial: (trial.start_time, trial.number, trial.run_id)))


class ClientReader:
    """Reads a tracking server through MLflow's client, ``page`` runs at a time."""

    def __init__(self, uri: str, page: int = 1000) -> None:
        self.uri, self._page = uri, page
        self._tracker = MlflowTracker(uri)
        self._client = self._tracker.client
        self._parents: dict[str, Run] = {}

    def check_study(self, name: str) -> None:
        """Raise StoreError for a study that was deleted."""
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            raise deleted(name)

    def names(self) -> list[str]:
        """Return the name of every study, the oldest first."""
        token = None
        while True:
            page = self._client.search_experiments(
                max_results=self._page, page_token=token, order_by=["creation_time ASC", "experiment_id ASC"]
            )
            for experiment in page:
                found = self._runs(experiment.experiment_id, "study", pages=False)
                if found:
                    self._parents[experiment.name] = found[0]
            token = page.token
            if not token:
                return list(self._parents)

    def studies(self, names: Sequence[str]) -> list[StoredStudy]:
        """Return some studies in the order of their names."""
        found = []
        for name in names:
            info = self._parents[name].info
            document = _document(self._read(info.run_id, STUDY_FILE))
            record = study_record(name, info.run_id, info.experiment_id, document, self._parents[name].data.tags)
            runs = self._runs(info.experiment_id, "trial")
            trials = (
                _record(
                    name,
                    (r.info.run_id, r.info.run_name, r.info.status, r.info.start_time, r.info.artifact_uri),
                    dict(r.data.params),
                    dict(r.data.metrics),
                    dict(r.data.tags),
                )
                for r in runs
                if record.has(r.data.tags)
            )
            found.append(StoredStudy(record, _in_order(trials)))
        return found

    def text(self, trial: TrialRecord, path: str) -> str:
        """Return the text of a trial's artifact; raise StoreError when it is not there."""
        text = self._read(trial.run_id, path)
        if text is None:
            raise StoreError(f"run {trial.run_id} has no artifact {path}; was the store moved?")
        return text

    def _runs(self, experiment_id: str, kind: str, pages: bool = True) -> list[Run]:
        """Return an experiment's runs of a kind, the newest first; without ``pages``, only the first one."""
        runs: list[Run] = []
        token = None
        while True:
            page = self._client.search_runs(
                [experiment_id],
                f"tags.kind = '{kind}'",
                max_results=self._page if pages else 1,
                page_token=token,
                order_by=["attributes.start_time DESC", "attributes.run_id ASC"],
            )
            runs += page
            token = page.token
            if not token or not pages:
                return runs

    def _read(self, run_id: str, path: str) -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                return Path(self._client.download_artifacts(run_id, path, folder)).read_text(encoding="utf-8")
            except (MlflowException, OSError, UnicodeDecodeError):
                return None


class SqlReader:
    """Reads a tracking database with SQLAlchemy, through MLflow's table models."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        stores.check_file(uri, "tracking store", create=False)
        try:
            connect = stores.connect_read_only(uri)
            creator = {"creator": connect} if connect is not None else {}
            self._engine = sa.create_engine(uri, poolclass=sa.NullPool, **creator)
        except (sa.exc.SQLAlchemyError, ImportError, ValueError) as error:  # no address, or no driver for it
            raise StoreError(
                f"the tracking store {stores.hide_secrets(uri)} cannot be opened: {stores.reason(error, uri)}; "
                "correct its address, or install the database's driver"
            ) from None  # the cause may hold secrets
        self._parents: dict[str, tuple[str, str, str | None]] = {}  # name: experiment id, run id, artifact location

    def _unreadable(self, error: Exception) -> StoreError:
        return StoreError(
            f"the tracking store {stores.hide_secrets(self.uri)} cannot be read ({stores.reason(error, self.uri)}); "
            "name one that MLflow made, and bring an older one up to date with `mlflow db upgrade`"
        )

    def _rows(self, query: sa.Executable) -> Iterator[Any]:
        """Yield a query's rows; none is kept, which would cost more than reading it."""
        try:
            with self._engine.connect() as connection:
                yield from connection.execute(query)
        except sa.exc.SQLAlchemyError as error:
            raise self._unreadable(error) from None  # the cause may hold secrets

    def check_study(self, name: str) -> None:
        """Raise StoreError for a study that was deleted, and for a store of another version of MLflow."""
        query: Any = sa.select(_EXPERIMENTS.c.lifecycle_stage).where(_EXPERIMENTS.c.name == name)
        if [stage for (stage,) in self._rows(query)] == ["deleted"]:
            raise deleted(name)
        try:
            _verify_schema(self._engine)
        except MlflowException as error:
            raise stores.cannot_open("tracking store", self.uri, error) from error

    def names(self) -> list[str]:
        """Return the name of every study, the oldest first."""
        query: Any = (
            sa.select(_EXPERIMENTS.c.name, _EXPERIMENTS.c.experiment_id, _RUNS.c.run_uuid, _RUNS.c.artifact_uri)
            .join(_RUNS, _RUNS.c.experiment_id == _EXPERIMENTS.c.experiment_id)
            .join(_TAGS, _TAGS.c.run_uuid == _RUNS.c.run_uuid)
            .where(_EXPERIMENTS.c.lifecycle_stage == "active", _RUNS.c.lifecycle_stage == "active")
            .where(_TAGS.c.key == "kind", _TAGS.c.value == "study")
            .order_by(
                _EXPERIMENTS.c.creation_time, _EXPERIMENTS.c.experiment_id, _RUNS.c.start_time.desc(), _RUNS.c.run_uuid
            )
        )
        for name, experiment_id, run_id, location in self._rows(query):
            self._parents.setdefault(name, (str(experiment_id), run_id, location))
        return list(self._parents)

    def studies(self, names: Sequence[str]) -> list[StoredStudy]:
        """Return some studies in the order of their names."""
        experiments = {int(self._parents[name][0]): name for name in names}
        trials = self._trials(experiments)
        found = []
        for name in names:
            experiment_id, run_id, location = self._parents[name]
            document = _document(self._read(name, run_id, location or "", STUDY_FILE))
            record = study_record(name, run_id, experiment_id, document, self._owner(run_id))
            own = (trial for trial in trials[name] if record.has(trial.tags))
            found.append(StoredStudy(record, _in_order(own)))
        return found

    def _owner(self, run_id: str) -> dict[str, str]:
        """Return the tags that say whose a study is."""
        query = sa.select(_TAGS.c.key, _TAGS.c.value)
        mine = (_TAGS.c.run_uuid == run_id) & _TAGS.c.key.in_((STORE_TAG, FORMER_TAG))
        return {str(key): value for key, value in self._rows(query.where(mine))}

    def _trials(self, experiments: Mapping[int, str]) -> Mapping[str, list[TrialRecord]]:
        chosen: Any = sa.select(_RUNS.c.run_uuid).where(
            _RUNS.c.experiment_id.in_(experiments), _RUNS.c.lifecycle_stage == "active"
        )
        columns = (_RUNS.c.experiment_id, _RUNS.c.run_uuid, _RUNS.c.name, _RUNS.c.status, _RUNS.c.start_time)
        runs = list(self._rows(sa.select(*columns, _RUNS.c.artifact_uri).where(_RUNS.c.run_uuid.in_(chosen))))
        params = self._values(_PARAMS, chosen)
        tags = self._values(_TAGS, chosen)
        metrics = self._values(_METRICS, chosen)
        found: dict[str, list[TrialRecord]] = defaultdict(list)
        for experiment_id, *info in runs:
            study, run_id = experiments[experiment_id], info[0]
            if tags.get(run_id, {}).get("kind") == "trial":
                found[study].append(
                    _record(study, tuple(info), params.get(run_id, {}), metrics.get(run_id, {}), tags[run_id])
                )
        return found

    def _values(self, table: Any, chosen: Any) -> dict[str, dict[str, Any]]:
        """Return key and value of params, tags or latest metrics by run."""
        value = table.c.value
        if table is _METRICS:
            value = sa.case((table.c.is_nan == sa.true(), sa.null()), else_=value)
        missing = float("nan") if table is _METRICS else ""
        values: dict[str, dict[str, Any]] = defaultdict(dict)
        query = sa.select(table.c.run_uuid, table.c.key, value).where(table.c.run_uuid.in_(chosen))
        for run_id, key, stored in self._rows(query):
            values[run_id][key] = missing if stored is None else stored
        return values

    def text(self, trial: TrialRecord, path: str) -> str:
        """Return the text of a trial's artifact; raise StoreError when it is not there."""
        text = self._read(trial.study, trial.run_id, trial.artifact_uri, path)
        if text is None:
            raise StoreError(f"run {trial.run_id} has no artifact {path}; was the store moved?")
        return text

    def _read(self, study: str, run_id: str, location: str, path: str) -> str | None:
        """Read an artifact where its run says it is, or next to the store, where it may have moved."""
        if "://" in location and not location.startswith("file:"):
            return self._download(f"{location}/{path}")
        files = [Path(local_file_uri_to_path(location), path)]
        store = stores.sqlite_file(self.uri)
        if store is not None:
            files.append(store.parent / paths.ARTIFACTS.name / study / run_id / "artifacts" / path)
        for file in files:
            try:
                return file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
        return None

    def _download(self, uri: str) -> str | None:
        from mlflow.artifacts import download_artifacts

        with tempfile.TemporaryDirectory() as folder:
            try:
                return Path(download_artifacts(uri, dst_path=folder, tracking_uri=self.uri)).read_text(encoding="utf-8")
            except Exception:  # each kind of artifact store raises errors of its own
                return None
