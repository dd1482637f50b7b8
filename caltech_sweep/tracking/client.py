"""MLflow's client: made, asked page by page, and guarded. Whatever is private of MLflow is used here only."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.db.utils import _initialize_tables, _verify_schema
from mlflow.store.tracking.dbmodels.models import (
    SqlExperiment,
    SqlLatestMetric,
    SqlMetric,
    SqlParam,
    SqlRun,
    SqlTag,
)
from mlflow.tracking._tracking_service import utils as _tracking_utils
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from mlflow.utils.rest_utils import http_request
from mlflow.utils.uri import is_local_uri
from mlflow.utils.validation import (
    _validate_batch_log_data,
    _validate_metric_name,
    _validate_model_alias_name,
    _validate_model_alias_name_reserved,
    _validate_model_name,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import configure_mappers

from caltech_sweep import paths
from caltech_sweep.addresses import SQLITE, hide_secrets
from caltech_sweep.errors import ArtifactError, StoreError
from caltech_sweep.stores import Store, tracking_store, tune_sqlite
from caltech_sweep.tracking.answers import Answer, advice, meaning, status_of

# The bare tables: configuring MLflow's hundred mapped classes takes longer than reading a usual store.
EXPERIMENTS, RUNS, TAGS, PARAMS = (model.__table__ for model in (SqlExperiment, SqlRun, SqlTag, SqlParam))
METRICS, LATEST_METRICS = SqlMetric.__table__, SqlLatestMetric.__table__


def _upsert(table: Any, *columns: str, later: Sequence[str] = ()) -> Any:
    """Return the statement that adds the row of a key and a run, or changes some columns of the one that is there.

    That one is changed only where the new one comes after it, in the order of the columns ``later``.
    """
    new = insert(table)
    changed = {column: new.excluded[column] for column in columns}
    after = sa.tuple_(*(new.excluded[c] for c in later)) > sa.tuple_(*(table.c[c] for c in later)) if later else None
    return new.on_conflict_do_update(index_elements=["key", "run_uuid"], set_=changed, where=after)


_AGE = ("step", "timestamp", "value")  # what tells which value of a metric is the latest
_LATEST, _TAG = _upsert(LATEST_METRICS, *_AGE, "is_nan", later=_AGE), _upsert(TAGS, "value")

STUDY_FILE = "study.json"  # of a study's parent run: what the study is
PAGE = 1000  # runs, experiments or models of one answer
_LOCK_SECONDS = 5  # that a write waits for a database that another holds, before it goes to the journal
_MISSING = re.compile("no such|not found|does not exist|NoSuchKey", re.I)  # of an artifact that is not there
_WRITES = ("create_", "log_", "set_", "update_", "delete_")

# Else MLflow asks a server for each run that ends, to print two lines with its address.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
for _name in ("alembic", "mlflow"):  # after the import, which sets its own levels
    logging.getLogger(_name).setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs the errors that it raises, in full


# -- opening a store ---------------------------------------------------------------------------------------------------


def check_server(store: Store) -> None:
    """Ask a server for its health as MLflow would, but for five seconds only: MLflow would try for minutes.

    Whatever it answers, it is there; other servers than MLflow's own may lack this page, or want to know the user.
    """
    try:
        credentials = get_default_host_creds(store.uri)
        http_request(credentials, "/health", "GET", timeout=5, max_retries=0, raise_on_status=False)
    except (MlflowException, OSError, ValueError) as error:
        how = advice(error) if meaning(error) is Answer.OURS else "start it"
        raise StoreError(
            f"the tracking server {store.shown} does not answer ({store.reason(error)}); {how}, or choose another "
            "store with --tracking-uri"
        ) from None  # the cause may hold secrets


def _make_database(uri: str) -> None:
    engine = sa.create_engine(uri)
    _initialize_tables(engine)
    engine.dispose()


def draft_of(store: Store, folder: Path) -> Path | None:
    """Do what takes long when a local store is opened later; return an empty database in ``folder`` for a missing one.

    None of another store, and where it cannot be made: opening the store says why.
    """
    draft = folder / "empty.db"
    with suppress(Exception):  # of SQLAlchemy, Alembic, MLflow or the disk
        if store.is_local:
            configure_mappers()  # the first use of the store would
        if store.is_missing:
            tracking_store(f"{SQLITE}{draft}").make_whole(_make_database)
            return draft
    return None


class LocalClient(MlflowClient):
    """MLflow's client of a local database, which writes in bulk what MLflow's own writes row by row.

    It writes what is new of a run that is there. MLflow's own call answers all else: a run that was deleted, a param
    that has another value, a metric that is there already.
    """

    @property
    def _engine(self) -> sa.Engine:
        engine: sa.Engine = self._tracking_client.store.engine
        return engine

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        tags: Sequence[RunTag] = (),
        synchronous: bool | None = None,
    ) -> Any:
        """Log metrics, params and tags in one transaction."""
        try:
            if all(tag.key != MLFLOW_RUN_NAME for tag in tags) and self._log_new(run_id, metrics, params, tags):
                return None
        except sa.exc.IntegrityError:
            pass
        return super().log_batch(run_id, metrics, params, tags, synchronous)

    def _log_new(self, run_id: str, metrics: Sequence[Metric], params: Sequence[Param], tags: Sequence[RunTag]) -> bool:
        """Return whether all was written, in a run that is there; raises IntegrityError where some of it was before."""
        for key in {metric.key for metric in metrics}:
            _validate_metric_name(key)
        _, params, tags = _validate_batch_log_data([], params, tags)
        rows = []
        for metric in metrics:
            is_nan, value = self._tracking_client.store.sanitize_metric_value(metric.value)
            own = {"key": metric.key, "run_uuid": run_id, "value": value, "is_nan": is_nan}
            rows.append({**own, "timestamp": metric.timestamp, "step": metric.step})
        latest = {row["key"]: row for row in sorted(rows, key=itemgetter(*_AGE))}
        texts = [
            [{"key": pair.key, "value": pair.value, "run_uuid": run_id} for pair in some] for some in (params, tags)
        ]
        writes = ((sa.insert(METRICS), rows), (_LATEST, list(latest.values())), (sa.insert(PARAMS), texts[0]))
        active = sa.select(RUNS.c.run_uuid).where(RUNS.c.run_uuid == run_id, RUNS.c.lifecycle_stage == "active")
        with self._engine.begin() as connection:
            if connection.execute(active).first() is None:
                return False
            for statement, values in (*writes, (_TAG, texts[1])):
                if values:
                    connection.execute(statement, values)
        return True

    def log_artifacts(self, run_id: str, local_dir: str, artifact_path: str | None = None) -> None:
        """Copy the files of a folder into a run's."""
        with self._engine.connect() as connection:
            uri = connection.scalar(sa.select(RUNS.c.artifact_uri).where(RUNS.c.run_uuid == run_id))
        if uri is None:
            super().log_artifacts(run_id, local_dir, artifact_path)
        else:
            get_artifact_repository(uri).log_artifacts(local_dir, artifact_path)

    def set_terminated(self, run_id: str, status: str | None = None, end_time: int | None = None) -> None:
        """Give a run its final status."""
        ended = {"status": status or "FINISHED", "end_time": end_time or int(time.time() * 1000)}
        run = sa.update(RUNS).where(RUNS.c.run_uuid == run_id, RUNS.c.lifecycle_stage == "active").values(**ended)
        with self._engine.begin() as connection:
            done = connection.execute(run).rowcount
        if not done:
            super().set_terminated(run_id, status, end_time)


def open_client(store: Store, create: bool, draft: Path | None = None) -> MlflowClient:
    """Return MLflow's client of a store; ``create`` makes a missing local one, of a ``draft`` if there is one.

    Raises StoreError.
    """

    def make(uri: str) -> None:
        if draft is None:
            _make_database(uri)
        else:
            shutil.copyfile(draft, uri.removeprefix(SQLITE))

    def connect() -> MlflowClient:
        client = (LocalClient if store.is_local else MlflowClient)(store.uri, store.uri)
        try:
            client.search_experiments(max_results=1)  # the first use creates the tables, once, here
        except MlflowException as error:
            if not store.is_web or meaning(error) is not Answer.OURS:
                raise
            why = f"does not let this process in ({store.reason(error)}); {advice(error)}"
            raise StoreError(f"the tracking server {store.shown} {why}") from None
        return client

    if store.is_web:
        check_server(store)
    store.check(create)
    with store.opening():
        if not (store.is_web or store.is_local):
            store.engine().connect().close()  # MLflow would retry in silence for minutes
        if create:
            store.make_whole(make)
        client = store.make_tables(connect)
        if store.is_local and create:
            tune_sqlite(client._tracking_client.store.engine, _LOCK_SECONDS)
    return client


def unchecked(uri: str) -> MlflowClient:
    """Return MLflow's client of a store that another process has opened, and found to be there."""
    return MlflowClient(uri, uri)


def check_schema(store: Store, engine: sa.Engine) -> None:
    """Raise StoreError for a database of another version of MLflow; nothing is written."""
    try:
        _verify_schema(engine)
    except MlflowException as error:
        raise store.cannot_open(error) from error


class _Guarded:
    """MLflow's client, each of whose writes asks first whether this process may still write."""

    def __init__(self, client: MlflowClient, may: Callable[[], None]) -> None:
        self.unguarded, self._may = client, may

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.unguarded, name)
        if not name.startswith(_WRITES):
            return found

        def write(*arguments: Any, **named: Any) -> Any:
            self._may()
            return found(*arguments, **named)

        return write


def guarded(client: MlflowClient, may: Callable[[], None]) -> MlflowClient:
    """Return a client that calls ``may`` before each write, in place of what a guard called that it had before."""
    return cast(MlflowClient, _Guarded(client.unguarded if isinstance(client, _Guarded) else client, may))


def deleted(name: str) -> StoreError:
    """Return the error of a study whose experiment was deleted."""
    return StoreError(f"the experiment {name!r} was deleted in MLflow; restore it there, or choose --name")


# -- asking ------------------------------------------------------------------------------------------------------------


def pages(search: Callable[..., Any], *arguments: Any, size: int = PAGE, **named: Any) -> Iterator[Any]:
    """Yield everything that one of the client's searches finds, asked ``size`` at a time."""
    token = None
    while True:
        page = search(*arguments, max_results=size, page_token=token, **named)
        yield from page
        token = page.token
        if not token:
            return


def check_model_names(name: str, alias: str) -> None:
    """Raise MlflowException for a model or an alias that cannot be registered."""
    _validate_model_name(name)
    _validate_model_alias_name(alias)
    _validate_model_alias_name_reserved(alias)


# -- artifacts ---------------------------------------------------------------------------------------------------------


def local_path(uri: str) -> Path | None:
    """Return the folder of an artifact address that is on this machine, or None of a server's."""
    return Path(local_file_uri_to_path(uri)) if is_local_uri(uri, is_tracking_or_registry_uri=False) else None


class Artifacts:
    """The files that a store's runs and models left."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._copies: str | None = None

    def moved(self, study: str) -> Path | None:
        """Return the folder next to a local store in which a study's runs leave their files by default.

        Recorded addresses are absolute, so they are wrong after a store was moved with its files.
        """
        return self.store.folder / paths.ARTIFACTS.name / study if self.store.is_local else None

    def folder(self, uri: str, study: str = "") -> Path | None:
        """Return the folder of a run's files, which may have moved with the store; None where they are on a server."""
        place, moved = local_path(uri), self.moved(study)
        if place is not None and study and moved is not None and not place.exists():
            return moved.joinpath(*place.parts[-2:])  # RUN_ID/artifacts
        return place

    def file(self, uri: str, path: str, study: str = "") -> Path:
        """Return a file or folder with an artifact: itself where it is local, else a copy that ends with the process.

        Raises ArtifactError when it is not there.
        """
        from mlflow.artifacts import download_artifacts

        folder, where = self.folder(uri, study), hide_secrets(uri)
        try:
            if folder is None:
                whole = f"{uri}/{path}" if path else uri
                return Path(download_artifacts(whole, dst_path=self._own_folder(), tracking_uri=self.store.uri))
            (folder / path).stat()
            return folder / path
        except Exception as error:  # each kind of artifact store raises errors of its own
            if folder is not None or status_of(error) == 404 or _MISSING.search(str(error)):
                raise ArtifactError(path or "model", "is missing", f"{where}; was the store moved?") from error
            raise StoreError(f"{path or 'a model'} cannot be read from {where} ({self.store.reason(error)})") from None

    def text(self, uri: str, path: str, study: str = "") -> str:
        """Return the text of an artifact; raise ArtifactError when it is not there, or no text."""
        file = self.file(uri, path, study)
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ArtifactError(path, f"cannot be read ({why})", hide_secrets(uri)) from error

    def _own_folder(self) -> str:
        """Return a new folder for a download, so that no two runs' files are mixed up."""
        if self._copies is None:
            self._copies = tempfile.mkdtemp(prefix="caltech-sweep-")
            weakref.finalize(self, shutil.rmtree, self._copies, ignore_errors=True)
        return tempfile.mkdtemp(dir=self._copies)


def move_artifacts(client: MlflowClient, experiment_id: str, old: str, new: str) -> None:
    """Let the artifact locations of an experiment and its runs that begin with ``old`` begin with ``new``."""
    with client._tracking_client.store.engine.begin() as connection:
        for table, column in ((EXPERIMENTS, EXPERIMENTS.c.artifact_location), (RUNS, RUNS.c.artifact_uri)):
            connection.execute(
                sa.update(table)
                .where(table.c.experiment_id == int(experiment_id), column.startswith(old, autoescape=True))
                .values({column: new + sa.func.substr(column, len(old) + 1)})
            )
    getattr(_tracking_utils, "_artifact_repos_cache", {}).clear()  # where MLflow remembers each run's to be
