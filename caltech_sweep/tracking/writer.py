"""The tracking store: everything that is written to, or read from, MLflow. The only importer of MLflow.

Names that writing and reading agree on: the experiment is the study's name; its parent run (tag ``kind: study``)
holds ``study.json``; every trial is a child run (tag ``kind: trial``).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

from caltech_sweep import paths, stores
from caltech_sweep.errors import ForeignStudyError, LostStudyError, StoreError
from caltech_sweep.files import SUMS, file_digest, read_sums
from caltech_sweep.metrics import TRAIN_LOSS
from caltech_sweep.tracking.records import (
    END_TAGS,
    FORMER_TAG,
    OUTCOMES,
    STORE_TAG,
    UNFINISHED,
    EpochLog,
    StudyRecord,
    TrialRecord,
    sound_outcome,
)

for _variable, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # what a server does not take goes to the journal
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}.items():
    os.environ.setdefault(_variable, _value)

import sqlalchemy as sa  # noqa: E402
from mlflow import MlflowClient  # noqa: E402  (the settings above must come first)
from mlflow.entities import Dataset as DatasetEntity  # noqa: E402
from mlflow.entities import DatasetInput, Experiment, InputTag, Metric, Param, Run, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, TEMPORARILY_UNAVAILABLE, ErrorCode  # noqa: E402
from mlflow.store.db.utils import _initialize_tables  # noqa: E402
from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlRun  # noqa: E402
from mlflow.tracking._tracking_service import utils as _tracking_utils  # noqa: E402

_DATABASES = ("postgresql", "mysql", "mssql")  # the servers that MLflow stores in
STUDY_FILE = "study.json"
_LOCK_SECONDS = 5  # that a write waits for a database that another holds, before it goes to the journal
_LARGEST_BATCH = 900  # metrics of one call; MLflow takes 1,000
_LONGEST_TAG = 7900  # characters; a database store of MLflow takes 8,000
OWNER_SECONDS = 10.0  # after which a write asks again whether the study is still this study store's
CLAIM_SECONDS = 1.0  # that two study stores which claim one study at the same time have to see each other
STEP_METRIC = TRAIN_LOSS  # logged by every epoch, so its last step is the last epoch that a run has

for _name in ("alembic", "mlflow"):  # after the import, which sets its own levels
    logging.getLogger(_name).setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs the errors that it raises, in full


def git_state() -> dict[str, str]:
    """Return the tags of the git commit in the working directory, or none outside a repository."""
    try:
        run = [
            subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for command in (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": run[0], "git.dirty": "true" if run[1] else "false"}


def _check_server(uri: str) -> None:
    """Ask a server for its health, since MLflow's own client would retry for minutes."""
    try:
        parts = urlsplit(uri)
        host = parts.netloc.rpartition("@")[2]  # urllib would take a user's name for the host's
        urllib.request.urlopen(f"{parts.scheme}://{host}{parts.path.rstrip('/')}/health", timeout=5).close()
    except urllib.error.HTTPError:
        return  # it answers; other servers than MLflow's own may lack this page, or want to know the user
    except (OSError, ValueError, HTTPException) as error:
        raise StoreError(
            f"the tracking server {stores.hide_secrets(uri)} does not answer ({stores.reason(error, uri)}); "
            "start it, or choose another store with --tracking-uri"
        ) from None  # the cause may hold secrets


def _check_database(uri: str) -> None:
    """Connect to a database server once, since MLflow would retry in silence for minutes."""
    engine = sa.create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _make_database(uri: str) -> None:
    engine = sa.create_engine(uri)
    _initialize_tables(engine)
    engine.dispose()


_UNAVAILABLE = ErrorCode.Name(TEMPORARILY_UNAVAILABLE)
_AWAY = re.compile(
    r"failed with exception|failed with error code 5\d\d|max retries exceeded|connection refused|database is locked"
    r"|disk i/o error|disk is full|unable to open database|readonly database|no space left",
    re.I,
)


def is_outage(error: Exception) -> bool:
    """Tell whether an error says that the store is unavailable or cannot write now, not that a call is wrong."""
    if isinstance(error, OSError):  # those of requests are among these
        return not isinstance(error, FileNotFoundError)
    if isinstance(error, MlflowException) and error.error_code == _UNAVAILABLE:  # what a database's driver said
        return True
    if isinstance(error, (StoreError, sa.exc.OperationalError, sa.exc.InterfaceError)):
        return True
    return isinstance(error, (MlflowException, sa.exc.SQLAlchemyError)) and _AWAY.search(str(error)) is not None


def deleted(name: str) -> StoreError:
    """Return the error of a study whose experiment was deleted."""
    return StoreError(f"the experiment {name!r} was deleted in MLflow; restore it there, or choose --name")


_WRITES = ("create_", "log_", "set_", "update_", "delete_")


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


class MlflowTracker:
    """One tracking store. ``create`` makes a missing local one; raises StoreError when it cannot be used."""

    def __init__(self, uri: str | None = None, artifacts: Path | None = None, create: bool = False) -> None:
        self.uri = stores.tracking_uri(uri)
        self._artifacts = artifacts
        if self.uri.startswith(("http://", "https://")):
            _check_server(self.uri)
        stores.check_file(self.uri, "tracking store", create)
        file = stores.sqlite_file(self.uri)
        if file is not None and artifacts is None:
            self._artifacts = file.parent / paths.ARTIFACTS.name
        try:
            if file is None and self.uri.startswith(_DATABASES):
                _check_database(self.uri)
            if create:
                stores.make_whole(self.uri, _make_database)
            self.client = stores.make_tables(self.uri, self._connect)
            if file is not None and create:
                stores.tune_sqlite(self.client._tracking_client.store.engine, _LOCK_SECONDS)
        except Exception as error:  # SQLAlchemy, MLflow and HTTP errors have no common base
            raise stores.cannot_open("tracking store", self.uri, error) from None  # the cause may hold secrets
        self._copies: str | None = None  # a folder for downloads, which goes with this tracker
        self._experiment: dict[str, str] = {}
        self._parent: dict[str, str] = {}
        self._store: dict[str, str | None] = {}

    def _connect(self) -> MlflowClient:
        client = MlflowClient(self.uri, self.uri)
        client.search_experiments(max_results=1)  # the first use creates the tables, once, here
        return client

    # -- writing ---------------------------------------------------------------------------------------------------

    def guard(self, may: Callable[[], None]) -> None:
        """Call ``may`` before each write from now on; it raises the error of a process that may not write any more."""
        client = self.client.unguarded if isinstance(self.client, _Guarded) else self.client
        self.client = cast(MlflowClient, _Guarded(client, may))

    def start_study(self, name: str, title: str, document: Mapping[str, Any]) -> str:
        """Create the study's experiment and parent run, or go on with those that are there; return the run id.

        They carry the id of the study store that the document names. Raises ForeignStudyError when they carry
        another one, also when another study store claims the study at the same time and is the last to do so.
        """
        store = document.get(STORE_TAG)
        experiment = self._experiment_for(name, store)
        record = self._study(experiment.experiment_id, name)
        owner = record.store if record else experiment.tags.get(STORE_TAG)
        if store and owner not in (None, store):
            raise ForeignStudyError(name, stores.hide_secrets(self.uri))
        own = {STORE_TAG: store} if store else {}
        if record is None:
            tags = {"kind": "study", "study": name, "mlflow.runName": title, **own}
            run_id = self.client.create_run(experiment.experiment_id, tags=tags).info.run_id
        else:
            run_id = record.run_id
        if store and owner is None:
            self._claim(name, experiment.experiment_id, run_id, own)
        if record is not None:
            self.client.update_run(run_id, "RUNNING")
        self._experiment[name], self._parent[name] = experiment.experiment_id, run_id
        self._store[name] = store
        self.client.log_dict(run_id, dict(document), STUDY_FILE)
        return run_id

    def _experiment_for(self, name: str, store: str | None) -> Experiment:
        """Return the study's experiment; creating it claims the study, since its name can be taken once."""
        if self.client.get_experiment_by_name(name) is None:
            location = (self._artifacts.resolve() / name).as_uri() if self._artifacts else None
            try:
                self.client.create_experiment(name, location, {STORE_TAG: store} if store else None)
            except MlflowException as error:
                if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                    raise
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None or experiment.lifecycle_stage == "deleted":
            raise deleted(name)
        return experiment

    def _claim(self, name: str, experiment_id: str, run_id: str, tags: Mapping[str, str]) -> None:
        """Write whose a study is, then read it back: of several that do so at the same time, one finds itself."""
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        time.sleep(CLAIM_SECONDS)
        record = self._study(experiment_id, name)
        if record is None or record.store != tags[STORE_TAG]:
            if record is not None and record.run_id != run_id:
                self.discard(run_id)
            raise ForeignStudyError(name, stores.hide_secrets(self.uri))

    def adopt(self, record: StudyRecord, store: str) -> None:
        """Give a study to another study store; a process of the one before notices within ``OWNER_SECONDS``."""
        former = ",".join(dict.fromkeys(filter(None, [*record.former, record.store])))
        tags = {STORE_TAG: store, **({FORMER_TAG: former} if former else {})}
        self._claim(record.name, record.experiment_id, record.run_id, tags)
        if self.status(record.run_id) == "RUNNING":
            time.sleep(OWNER_SECONDS)

    def finish_study(self, name: str, complete: bool) -> None:
        """Close the parent run: FINISHED when all its trials have run, KILLED when it was stopped before."""
        self.client.set_terminated(self._opened(name), "FINISHED" if complete else "KILLED")

    def _opened(self, name: str) -> str:
        """Return the parent run of a study, which may have been started by another process."""
        if name not in self._parent:
            record = self.study(name)
            if record is None:
                raise StoreError(f"there is no study {name!r} in {stores.hide_secrets(self.uri)}; was it deleted?")
            self._experiment[name], self._parent[name] = record.experiment_id, record.run_id
            self._store[name] = record.store
        return self._parent[name]

    def describe_study(self, name: str, description: str) -> None:
        """Give the parent run a description, which the MLflow UI shows as Markdown."""
        if len(description) > _LONGEST_TAG:
            cut = description[:_LONGEST_TAG].rpartition("\n")[0]
            description = f"{cut}\n\nThe rest is in `caltech-sweep report {name}`."
        self.client.set_tag(self._opened(name), "mlflow.note.content", description)

    def start_trial(self, study: str, name: str, params: Mapping[str, str], tags: Mapping[str, str]) -> str:
        """Create a trial's run below the study's; return its id."""
        own = {"kind": "trial", "study": study, "mlflow.parentRunId": self._opened(study), "mlflow.runName": name}
        if self._store[study]:
            own[STORE_TAG] = str(self._store[study])
        run = self.client.create_run(self._experiment[study], tags={**tags, **own})
        run_id: str = run.info.run_id
        self.log_params(run_id, params)
        return run_id

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Record what a trial trains; those that are recorded already stay as they are."""
        self.client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])

    def resume_trial(self, run_id: str, tags: Mapping[str, str]) -> int:
        """Open a trial's run again; return the last epoch whose metrics it has, or 0."""
        self.client.update_run(run_id, "RUNNING")
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        known = self.client.get_run(run_id).data.tags
        for stale in END_TAGS:
            if stale in known:
                self.client.delete_tag(run_id, stale)
        return self.last_epoch(run_id)

    def last_epoch(self, run_id: str) -> int:
        """Return the last epoch whose metrics a run has, or 0."""
        return max((metric.step for metric in self.history(run_id, STEP_METRIC)), default=0)

    def history(self, run_id: str, key: str) -> list[Metric]:
        """Return all values of a run's metric."""
        return list(self.client.get_metric_history(run_id, key))

    def has_ended(self, run_id: str) -> bool:
        """Tell whether a trial's run has its final end."""
        run = self.client.get_run(run_id)
        return run.info.status != "RUNNING" and run.data.tags.get("outcome") not in (None, *UNFINISHED)

    def keep_up(self) -> None:
        """Raise StoreError when a server does not answer."""
        if self.uri.startswith(("http://", "https://")):
            _check_server(self.uri)

    def log_dataset(self, run_id: str, name: str, digest: str, profile: Mapping[str, int], source: str) -> None:
        """Record which images a run used: their digest and how many each part has."""
        entity = DatasetEntity(name, digest, "local", source, schema=None, profile=json.dumps(dict(profile)))
        self.client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "train, val, test")])])

    def log_epochs(self, run_id: str, epochs: Sequence[EpochLog]) -> None:
        """Log the metrics of (epoch, metrics, time in milliseconds), in as few calls as MLflow's limits allow."""
        batch: list[Metric] = []
        for epoch, values, at in epochs:
            if len(batch) + len(values) > _LARGEST_BATCH:  # never cut within an epoch: each is logged whole or not
                self.client.log_batch(run_id, metrics=batch)
                batch = []
            batch += [Metric(key, value, at, epoch) for key, value in values.items()]
        self.client.log_batch(run_id, metrics=batch)

    def finish_trial(
        self, run_id: str, outcome: str, metrics: Mapping[str, float], tags: Mapping[str, str], folder: Path | None
    ) -> None:
        """Upload a trial's artifacts, log what is known only at its end, and set its final status.

        May be done again, after it was cut short, without doubling anything.
        """
        if folder is not None and folder.is_dir() and any(folder.iterdir()):
            self.client.log_artifacts(run_id, str(folder))
        now = int(time.time() * 1000)
        known = self.client.get_run(run_id).data.metrics if metrics else {}
        self.client.log_batch(
            run_id,
            metrics=[Metric(key, value, now, 0) for key, value in metrics.items() if known.get(key) != value],
            tags=[RunTag(key, value) for key, value in {**tags, "outcome": outcome}.items()],
        )
        self.client.set_terminated(run_id, OUTCOMES[outcome].mlflow)

    # -- reading ---------------------------------------------------------------------------------------------------

    def _search(self, experiment_id: str, query: str) -> Iterator[Run]:
        token = None
        while True:
            page = self.client.search_runs([experiment_id], query, max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _study(self, experiment_id: str, name: str) -> StudyRecord | None:
        for run in self._search(experiment_id, "tags.kind = 'study'"):
            return study_record(name, run.info.run_id, experiment_id, self._document(run), run.data.tags)
        return None

    def _document(self, run: Run) -> Mapping[str, Any]:
        try:
            loaded: Mapping[str, Any] = json.loads(self.artifact(run.info.run_id, STUDY_FILE).read_text())
        except (StoreError, OSError, ValueError):
            return {}
        return loaded

    def studies(self) -> list[StudyRecord]:
        """Return every study of the store, the oldest first."""
        found, token = [], None
        while True:
            page = self.client.search_experiments(max_results=1000, page_token=token, order_by=["creation_time ASC"])
            for experiment in page:
                record = self._study(experiment.experiment_id, experiment.name)
                if record is not None:
                    found.append(record)
            token = page.token
            if not token:
                return found

    def study(self, name: str) -> StudyRecord | None:
        """Return one study, or None."""
        experiment = self.client.get_experiment_by_name(name)
        return None if experiment is None else self._study(experiment.experiment_id, name)

    def owner(self, name: str) -> str | None:
        """Return the id of the study store that a study belongs to, or None where it has none yet."""
        if name in self._parent:
            found: str | None = self.client.get_run(self._parent[name]).data.tags.get(STORE_TAG)
            return found
        record = self.study(name)
        return record.store if record else None

    def trials(self, study: StudyRecord) -> list[TrialRecord]:
        """Return every trial run of a study, the oldest first; those of another study of its name are none of it."""
        runs = (run for run in self._search(study.experiment_id, "tags.kind = 'trial'") if study.has(run.data.tags))
        return sorted((_record(study.name, run) for run in runs), key=lambda t: (t.start_time, t.number))

    def artifact(self, run_id: str, path: str) -> Path:
        """Return a file with an artifact of a run: itself where it is local, else a copy that ends with the process.

        Raises StoreError when it is not there.
        """
        try:
            root = urlsplit(self.client.get_run(run_id).info.artifact_uri)
            if root.scheme in ("", "file"):
                local = Path(url2pathname(root.path)) / path
                if local.is_file():
                    return local
                raise FileNotFoundError(local)
            return Path(self.client.download_artifacts(run_id, path, self._downloads()))
        except (MlflowException, OSError) as error:
            raise StoreError(f"run {run_id} has no artifact {path}; was the store moved?") from error

    def checked_artifact(self, run_id: str, path: str) -> Path:
        """Return a file with an artifact whose checksum, if it was recorded, is right; else raise StoreError."""
        file = self.artifact(run_id, path)
        try:
            known = read_sums(self.artifact(run_id, SUMS)).get(path)
        except StoreError:  # a run that others have written
            return file
        if known is not None and file_digest(file) != known:
            raise StoreError(
                f"the artifact {path} of run {run_id} is damaged: its checksum is not the recorded one; "
                "caltech-sweep doctor --fix lets the trial be trained again"
            )
        return file

    def _downloads(self) -> str:
        if self._copies is None:
            self._copies = tempfile.mkdtemp(prefix="caltech-sweep-")
            weakref.finalize(self, shutil.rmtree, self._copies, ignore_errors=True)
        return self._copies

    # -- mending ---------------------------------------------------------------------------------------------------

    def status(self, run_id: str) -> str:
        """Return a run's status."""
        status: str = self.client.get_run(run_id).info.status
        return status

    def finish(self, run_id: str) -> None:
        """Show a study that no process is running as stopped."""
        self.client.set_terminated(run_id, "KILLED")

    def discard(self, run_id: str) -> None:
        """Move a run to MLflow's deleted ones, out of every table and list; MLflow can restore it."""
        if self.status(run_id) == "RUNNING":
            self.client.set_terminated(run_id, "KILLED")
        self.client.delete_run(run_id)

    def move_artifacts(self, experiment_id: str, old: str, new: str) -> None:
        """Let the artifact locations of an experiment and its runs that begin with ``old`` begin with ``new``."""
        experiments, runs = SqlExperiment.__table__, SqlRun.__table__
        with self.client._tracking_client.store.engine.begin() as connection:
            for table, column in ((experiments, experiments.c.artifact_location), (runs, runs.c.artifact_uri)):
                connection.execute(
                    sa.update(table)
                    .where(table.c.experiment_id == int(experiment_id), column.startswith(old, autoescape=True))
                    .values({column: new + sa.func.substr(column, len(old) + 1)})
                )
        getattr(_tracking_utils, "_artifact_repos_cache", {}).clear()  # where MLflow remembers each run's to be

    def best_trial(self, study: str) -> TrialRecord:
        """Return the complete trial with the best score on validation, the earliest of equals."""
        record = self.study(study)
        complete = [t for t in self.trials(record) if t.outcome == "complete"] if record else []
        if not complete:
            raise StoreError(
                f"weights: study {study!r} has no complete trial in {stores.hide_secrets(self.uri)}; "
                f"run it first: make sweep STUDY={study}"
            )
        return min(complete, key=lambda trial: trial.rank)

    def run_exists(self, run_id: str) -> bool:
        """Tell whether the store has a run."""
        try:
            self.client.get_run(run_id)
        except MlflowException:
            return False
        return True


class Owner:
    """Whose a study is in the tracking store, asked again every ``OWNER_SECONDS``."""

    def __init__(self, tracker: MlflowTracker, name: str, store: str) -> None:
        self._tracker, self._name, self._store = tracker, name, store
        self._asked = float("-inf")

    def check(self) -> None:
        """Raise LostStudyError when the study was adopted by another study store."""
        if time.monotonic() - self._asked < OWNER_SECONDS:
            return
        owner = self._tracker.owner(self._name)
        if owner not in (None, self._store):
            raise LostStudyError(
                f"study {self._name!r} was adopted by another study store while this process ran it; it has written "
                "nothing more to the tracking store, and the other one continues the study"
            )
        self._asked = time.monotonic()


def study_record(
    name: str, run_id: str, experiment_id: str, document: Mapping[str, Any], tags: Mapping[str, str]
) -> StudyRecord:
    """Return the record of a study from its parent run's tags and file."""
    former = tuple(filter(None, tags.get(FORMER_TAG, "").split(",")))
    return StudyRecord(name, run_id, experiment_id, document, tags.get(STORE_TAG), former)


def _record(study: str, run: Run) -> TrialRecord:
    tags, info = dict(run.data.tags), run.info
    outcome = sound_outcome(tags.get("outcome") or "running", run.data.metrics)
    return TrialRecord(
        info.run_id,
        study,
        info.run_name or "",
        tags.get("row"),
        int(tags.get("trial_number", -1)),
        outcome,
        info.status,
        tags.get("fingerprint", ""),
        dict(run.data.params),
        dict(run.data.metrics),
        tags,
        info.start_time or 0,
        info.artifact_uri or "",
    )
