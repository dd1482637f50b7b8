"""Writing to the tracking store.

Names that writing and reading agree on: the experiment is the study's name; its parent run (tag ``kind: study``)
holds ``study.json``; every trial is a child run (tag ``kind: trial``).
"""

from __future__ import annotations

import getpass
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import DatasetInput, Experiment, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

from caltech_sweep import paths
from caltech_sweep.errors import ForeignStudyError, LostStudyError, StoreError
from caltech_sweep.files import SUMS, file_digest, read_sums
from caltech_sweep.stores import Address, Store, reason, tracking_store
from caltech_sweep.text import one_line
from caltech_sweep.tracking.answers import Answer, meaning
from caltech_sweep.tracking.client import (
    STUDY_FILE,
    check_server,
    deleted,
    guarded,
    local_path,
    move_artifacts,
    open_client,
)
from caltech_sweep.tracking.direct import Destination
from caltech_sweep.tracking.reader import ClientReader
from caltech_sweep.tracking.records import (
    END_TAGS,
    FORMER_TAG,
    HOST,
    MISSING_TAG,
    OUTCOMES,
    STEP_METRIC,
    STORE_TAG,
    STRIKES,
    UNFINISHED,
    EpochLog,
    StudyRecord,
    Tracker,
    TrialRecord,
    missing_artifacts,
)

_LARGEST_BATCH = 900  # metrics of one call; MLflow takes 1,000
_LONGEST_TAG = 7900  # characters; a database store of MLflow takes 8,000
OWNER_SECONDS = 10.0  # after which a write asks again whether the study is still this study store's
CLAIM_SECONDS = 1.0  # that two study stores which claim one study at the same time have to see each other


def provenance() -> dict[str, str]:
    """Return the tags of who starts a run, how, and from which git commit; those that cannot be known are left out."""
    tags = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    tags[HOST] = socket.gethostname()
    with suppress(OSError, KeyError, ImportError):  # of a process whose user has no name
        tags["mlflow.user"] = getpass.getuser()
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    with suppress(OSError, subprocess.SubprocessError):  # outside a repository
        run = [
            subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for command in commands
        ]
        tags |= {"mlflow.source.git.commit": run[0], "git.dirty": "true" if run[1] else "false"}
    return tags


class MlflowTracker(Tracker):
    """One tracking store; raises StoreError when it cannot be used.

    ``create`` makes a missing local one, of a ``draft`` if there is one (:func:`client.draft_of`).
    """

    def __init__(
        self,
        tracking: Address = None,
        artifacts: Path | None = None,
        create: bool = False,
        draft: Path | None = None,
    ) -> None:
        self.store = tracking_store(tracking)
        self.uri = self.store.uri
        self._artifacts = artifacts
        if self.store.is_local and artifacts is None:
            self._artifacts = self.store.folder / paths.ARTIFACTS.name
        self.client = open_client(self.store, create, draft)
        self._reader = ClientReader(self.store, client=self.client)
        self.artifacts = self._reader.artifacts
        self._experiment: dict[str, str] = {}
        self._parent: dict[str, str] = {}
        self._store: dict[str, str | None] = {}
        self._new: set[str] = set()  # runs that were created here, whose end has not been tried

    # -- writing ---------------------------------------------------------------------------------------------------

    def guard(self, may: Callable[[], None]) -> None:
        """Call ``may`` before each write from now on; it raises the error of a process that may not write any more."""
        self.client = guarded(self.client, may)

    def start_study(self, name: str, title: str, document: Mapping[str, Any]) -> str:
        """Create the study's experiment and parent run, or go on with those that are there; return the run id.

        They carry the id of the study store that the document names. Raises ForeignStudyError when they carry
        another one, also when another study store claims the study at the same time and is the last to do so.
        """
        store = document.get(STORE_TAG)
        experiment = self._experiment_for(name, store)
        record = self.study(name)
        owner = record.store if record else experiment.tags.get(STORE_TAG)
        if store and owner not in (None, store):
            raise ForeignStudyError(name, self.store.shown)
        own = {STORE_TAG: store} if store else {}
        if record is None:
            tags = {**provenance(), "kind": "study", "study": name, "mlflow.runName": title, **own}
            run_id = self.client.create_run(experiment.experiment_id, tags=tags).info.run_id
        else:
            run_id = record.run_id
        if store and owner is None:
            self._claim(name, run_id, own)
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

    def _claim(self, name: str, run_id: str, tags: Mapping[str, str]) -> None:
        """Write whose a study is, then read it back: of several that do so at the same time, one finds itself."""
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        time.sleep(CLAIM_SECONDS)
        record = self.study(name)
        if record is None or record.store != tags[STORE_TAG]:
            if record is not None and record.run_id != run_id:
                self.discard(run_id)
            raise ForeignStudyError(name, self.store.shown)

    def adopt(self, record: StudyRecord, store: str) -> None:
        """Give a study to another study store; a process of the one before notices within ``OWNER_SECONDS``."""
        former = ",".join(dict.fromkeys(filter(None, [*record.former, record.store])))
        tags = {STORE_TAG: store, **({FORMER_TAG: former} if former else {})}
        self._claim(record.name, record.run_id, tags)
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
                raise StoreError(f"there is no study {name!r} in {self.store.shown}; was it deleted?")
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
        self._new.add(run_id)
        self.log_params(run_id, params)
        return run_id

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        self.client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])

    def resume_trial(self, run_id: str, tags: Mapping[str, str]) -> int:
        self.client.update_run(run_id, "RUNNING")
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        known = self.client.get_run(run_id).data.tags
        for stale in END_TAGS:
            if stale in known:
                self.client.delete_tag(run_id, stale)
        return self.last_epoch(run_id)

    def last_epoch(self, run_id: str) -> int:
        return max((metric.step for metric in self.history(run_id, STEP_METRIC)), default=0)

    def history(self, run_id: str, key: str) -> list[Metric]:
        """Return all values of a run's metric."""
        return list(self.client.get_metric_history(run_id, key))

    def has_ended(self, run_id: str) -> bool:
        run = self.client.get_run(run_id)
        return run.info.status != "RUNNING" and run.data.tags.get("outcome") not in (None, *UNFINISHED)

    def keep_up(self) -> None:
        """Raise StoreError when a server does not answer."""
        if self.store.is_web:
            check_server(self.store)

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
    ) -> Mapping[str, str]:
        """Upload a trial's artifacts, log what is known only at its end, and set its final status.

        May be done again, after it was cut short, without doubling anything. Returns the artifacts that the store will
        never take, with the reasons.
        """
        refused = self._upload(run_id, folder) if folder is not None and folder.is_dir() else {}
        if refused:
            tags = {**tags, MISSING_TAG: json.dumps({**missing_artifacts(tags), **refused}, ensure_ascii=False)}
        now = int(time.time() * 1000)
        known = self.client.get_run(run_id).data.metrics if metrics and run_id not in self._new else {}
        self._new.discard(run_id)
        self.client.log_batch(
            run_id,
            metrics=[Metric(key, value, now, 0) for key, value in metrics.items() if known.get(key) != value],
            tags=[RunTag(key, value) for key, value in {**tags, "outcome": outcome}.items()],
        )
        self.client.set_terminated(run_id, OUTCOMES[outcome].mlflow)
        return refused

    def _upload(self, run_id: str, folder: Path) -> dict[str, str]:
        """Upload the files of a folder; return those that the store will never take, with the reasons.

        It is one by one that it shows which these are: where it takes the smallest file before and after, it is the
        file, however the answer reads (a proxy hangs up on one that is too large). Raises what says "later".
        """
        files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        if not files:
            return {}
        try:
            self.client.log_artifacts(run_id, str(folder))
            return {}
        except (LostStudyError, ForeignStudyError):
            raise
        except Exception as error:
            if len(files) == 1 and meaning(error) is not Answer.NEVER:
                raise
        refused: dict[str, str] = {}
        for path in files:
            problem = self._try_upload(run_id, folder, path)
            for _ in range(STRIKES - 1):
                if problem is None or meaning(problem) is Answer.NEVER:
                    break
                if path is files[0] or self._try_upload(run_id, folder, files[0]) is not None:
                    raise problem
                problem = self._try_upload(run_id, folder, path)
            if problem is not None:
                refused[path.relative_to(folder).as_posix()] = one_line(reason(problem), 300)
        return refused

    def _try_upload(self, run_id: str, folder: Path, path: Path) -> Exception | None:
        parent = path.relative_to(folder).parent.as_posix()
        try:
            self.client.log_artifact(run_id, str(path), None if parent == "." else parent)
        except (LostStudyError, ForeignStudyError):
            raise
        except Exception as error:
            return error
        return None

    def destination(self, run_id: str) -> Destination | None:
        """Return where other machines may send a run's artifacts, None where they are kept on this one."""
        uri = self.client.get_run(run_id).info.artifact_uri
        return Destination(run_id, self.uri) if local_path(uri) is None else None

    # -- reading ---------------------------------------------------------------------------------------------------

    def studies(self) -> list[StudyRecord]:
        """Return every study of the store, the oldest first."""
        return self._reader.records()

    def check_study(self, name: str) -> None:
        """Raise StoreError for a study that was deleted."""
        self._reader.check_study(name)

    def study(self, name: str) -> StudyRecord | None:
        return self._reader.record(name)

    def owner(self, name: str) -> str | None:
        """Return the id of the study store that a study belongs to, or None where it has none yet."""
        if name in self._parent:
            found: str | None = self.client.get_run(self._parent[name]).data.tags.get(STORE_TAG)
            return found
        record = self.study(name)
        return record.store if record else None

    def trials(self, study: StudyRecord) -> list[TrialRecord]:
        """Return every trial run of a study, the oldest first; those of another study of its name are none of it."""
        return list(self._reader.trials(study))

    def artifact(self, run_id: str, path: str) -> Path:
        """Return a file with an artifact of a run: itself where it is local, else a copy that ends with the process.

        Raises StoreError when it is not there.
        """
        try:
            uri = self.client.get_run(run_id).info.artifact_uri
        except MlflowException as error:
            raise StoreError(f"there is no run {run_id} in {self.store.shown}; was the store moved?") from error
        return self.artifacts.file(uri, path)

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
                "caltech-sweep doctor --fix makes the next run train the trial again"
            )
        return file

    # -- fixing ----------------------------------------------------------------------------------------------------

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
        move_artifacts(self.client, experiment_id, old, new)

    def best_trial(self, study: str) -> TrialRecord:
        """Return the complete trial with the best score on validation, the earliest of equals.

        With folds, it is the best one of the setting that has the best mean over them.
        """
        record = self.study(study)
        complete = [t for t in self.trials(record) if t.state == "complete"] if record else []
        if not complete:
            raise nothing_complete(study, self.store)
        if record is not None and record.definition is not None and record.definition.folds > 1:
            complete = _best_setting(complete)
        return min(complete, key=lambda trial: trial.rank)

    def run_exists(self, run_id: str) -> bool:
        """Tell whether the store has a run."""
        try:
            self.client.get_run(run_id)
        except MlflowException:
            return False
        return True


def nothing_complete(study: str, store: Store) -> StoreError:
    """Return the error about a study that another one starts from, and that has no best trial yet."""
    return StoreError(
        f"weights: study {study!r} has no complete trial in {store.shown}; run it first: make sweep STUDY={study}"
    )


def _best_setting(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the trials of the setting with the best mean score, of those on the most folds."""
    settings: dict[frozenset[tuple[str, str]], list[TrialRecord]] = {}
    for trial in trials:
        own = frozenset(item for item in trial.params.items() if item[0] not in ("dataset.fold", "seed"))
        settings.setdefault(own, []).append(trial)
    folds = [len({trial.params.get("dataset.fold") for trial in own}) for own in settings.values()]
    whole = [own for own, count in zip(settings.values(), folds, strict=True) if count == max(folds)]
    return min(whole, key=lambda own: statistics.fmean(trial.rank for trial in own))


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
