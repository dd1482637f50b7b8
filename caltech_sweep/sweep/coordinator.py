"""The owner of both stores: asks Optuna, hands out jobs, reports, prunes, logs to MLflow, tells Optuna.

Rows run first and are never pruned; what they train is stored with the trial, not read back from Optuna's params,
since Optuna resamples a param that its space cannot give. ``trials`` is a total: going on with a study starts only
what is missing from it.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import StoreError, UsageError
from caltech_sweep.stores import hide_secrets
from caltech_sweep.sweep.executors import Done, Epoch, Event, Executor, Failed, Job, Stopped, WorkerDied
from caltech_sweep.sweep.space import enqueue_params, make_pruner, make_sampler, reachable, sample
from caltech_sweep.sweep.study_file import Row, StudyDefinition, identity_difference
from caltech_sweep.sweep.watch import Watcher
from caltech_sweep.tracking import OUTCOMES, MlflowTracker

MAX_RETRIES = 2  # of a trial whose worker died
FLUSH_SECONDS = 5.0  # how long epochs may wait to be logged together

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Images:
    """What the runs record about the dataset: a digest of the images, how many each part has, where they came from."""

    digest: str
    parts: Mapping[str, int]
    source: str
    classes: int


@dataclass
class _Running:
    trial: optuna.Trial
    name: str
    config: TrialConfig
    row: str | None
    run_id: str
    folder: Path
    prunable: bool
    attempt: int = 0
    pending: list[tuple[int, Mapping[str, float], int]] = field(default_factory=list)
    flushed: float = field(default_factory=time.monotonic)


@dataclass
class Summary:
    """How many trials of this run ended in each outcome, and whether the study reached its total."""

    outcomes: dict[str, int] = field(default_factory=dict)
    complete: bool = False


def open_study(definition: StudyDefinition, storage: str, identity: Mapping[str, Any]) -> optuna.Study:
    """Create the Optuna study, or open it; raise UsageError with the difference when its identity has changed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                storage=storage,
                study_name=definition.name,
                direction="maximize",
                load_if_exists=True,
                sampler=make_sampler(definition.sampler),
                pruner=make_pruner(definition.pruner),
            )
    except Exception as error:  # SQLAlchemy's and Optuna's errors have no common base
        raise StoreError(
            f"the study store {hide_secrets(storage)} cannot be opened: {str(error).splitlines()[0]}"
        ) from error
    stored = study.user_attrs.get("identity")
    if stored is None:
        study.set_user_attr("identity", dict(identity))
        study.set_user_attr("optuna", optuna.__version__)
    elif stored != identity:
        lines = "\n".join(f"  {line}" for line in identity_difference(stored, identity))
        raise UsageError(
            f"study {definition.name!r} has trials with other settings, and tables must not mix them:\n{lines}\n"
            "give this one a name of its own with --name"
        )
    return study


def is_finished(trial: FrozenTrial) -> bool:
    """Tell whether a trial counts towards the study's total and is not to be run again."""
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
        return True
    return trial.state == TrialState.FAIL and trial.user_attrs.get("outcome") == "diverged"


def pending_rows(definition: StudyDefinition, trials: list[FrozenTrial]) -> list[Row]:
    """Return the rows that no trial has trained, or waits to train, with the settings they have now."""
    known = {
        (trial.user_attrs.get("row"), trial.user_attrs.get("fingerprint"))
        for trial in trials
        if is_finished(trial) or trial.state == TrialState.WAITING
    }
    return [row for row in definition.rows if (row.name, definition.row_config(row).fingerprint()) not in known]


class Coordinator:
    """Runs one study to its total. ``only`` names the rows to run, and then nothing is sampled."""

    def __init__(
        self,
        definition: StudyDefinition,
        study: optuna.Study,
        tracker: MlflowTracker,
        executor: Executor,
        watcher: Watcher,
        scratch: Path,
        images: Images,
        *,
        weights: Mapping[str, tuple[str, Path]] | None = None,
        tags: Mapping[str, str] | None = None,
        only: tuple[str, ...] = (),
    ) -> None:
        self.definition, self.study, self.tracker, self.executor = definition, study, tracker, executor
        self.watcher, self.scratch, self.images = watcher, scratch, images
        self.weights, self.tags, self.only = dict(weights or {}), dict(tags or {}), only
        self.summary = Summary()
        self._stop = False
        self._running: dict[int, _Running] = {}
        self._rows: list[Row] = []
        self._left = 0

    def request_stop(self) -> None:
        """Stop at the next event: running trials wait again, nothing stays RUNNING. Safe in a signal handler."""
        self._stop = True

    def run(self) -> Summary:
        """Run trials until the total is reached or a stop is requested."""
        document = {**self.definition.to_dict(), "images": {**self.images.parts, "classes": self.images.classes}}
        self.tracker.start_study(self.definition.name, self.definition.title, document)
        try:
            self._adopt()
            while not self._stop and (self._fill() or self._running):
                for event in self.executor.poll(0.5):
                    self._handle(event)
            self.summary.complete = not self._stop
        finally:
            self.executor.close()
            for number in list(self._running):
                self._end(number, "interrupted", "waits for the next run of this study")
            self.tracker.finish_study(self.definition.name, self.summary.complete)
        return self.summary

    # -- what is to do ---------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take over from an earlier run of this study: what it left running waits again; count what is left."""
        storage = self.study._storage
        current = {row.name: self.definition.row_config(row).fingerprint() for row in self.definition.rows}
        for trial in self.study.get_trials(deepcopy=False):
            row = trial.user_attrs.get("row")
            if trial.state == TrialState.RUNNING and "config" in trial.user_attrs:
                storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
            elif trial.state == TrialState.RUNNING:  # its settings were not yet decided
                storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            if not trial.state.is_finished() and row and current.get(row) != trial.user_attrs["fingerprint"]:
                storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)  # the row has other settings now
        self._close_dead_runs()
        trials = self.study.get_trials(deepcopy=False)
        self._rows = pending_rows(self.definition, trials)
        waiting = sum(trial.state == TrialState.WAITING for trial in trials)
        done = sum(is_finished(trial) and not self._superseded(trial, current) for trial in trials)
        if self.only:
            self._rows = [row for row in self._rows if row.name in self.only]
            self._left = len(self._rows) + waiting
        else:
            self._left = max(waiting, self.definition.trials - done)
        self.watcher.study_started(self.definition.name, done, done + self._left)

    def _superseded(self, trial: FrozenTrial, current: Mapping[str, str]) -> bool:
        row = trial.user_attrs.get("row")
        return row is not None and current.get(row) != trial.user_attrs.get("fingerprint")

    def _close_dead_runs(self) -> None:
        """Give the runs of a coordinator that died the status that tells the truth."""
        record = self.tracker.study(self.definition.name)
        for trial in self.tracker.trials(record) if record else []:
            if trial.status == "RUNNING":
                self.tracker.finish_trial(trial.run_id, "interrupted", {}, {}, None)

    def _fill(self) -> bool:
        """Hand a trial to every free slot; return whether any was handed out."""
        before = len(self._running)
        while self._left > 0 and len(self._running) < self.executor.slots:
            self._left -= 1
            self._submit(self._ask())
        return len(self._running) > before

    # -- one trial -------------------------------------------------------------------------------------------------

    def _ask(self) -> _Running:
        """Return the next trial: one that was interrupted, a row, or a sampled one."""
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting and self._rows:
            row = self._rows.pop(0)
            config = self.definition.row_config(row)
            attributes: dict[str, Any] = {
                "row": row.name,
                "config": config.to_dict(),
                "fingerprint": config.fingerprint(),
            }
            params = enqueue_params(self.definition.space, config.to_dict())
            self.study.enqueue_trial(params, json.loads(json.dumps(attributes)))
        trial = self.study.ask()
        row_name: str | None = trial.user_attrs.get("row")
        if row_name:
            config = TrialConfig.from_dict(trial.user_attrs["config"])
            sample(trial, reachable(self.definition.space, config.to_dict()))  # so that the sampler learns from it
        else:
            config = self.definition.config(sample(trial, self.definition.space))
            if "config" not in trial.user_attrs:
                trial.set_user_attr("fingerprint", config.fingerprint())
                trial.set_user_attr("config", json.loads(json.dumps(config.to_dict())))
        prunable = row_name is None and self.definition.pruner is not None
        name = row_name or f"trial-{trial.number:03d}"
        return _Running(trial, name, config, row_name, "", self.scratch / str(trial.number), prunable)

    def _submit(self, running: _Running) -> None:
        config, number = running.config, running.trial.number
        source = self.weights.get(config.weights)
        tags = {
            "trial_number": str(number),
            "fingerprint": config.fingerprint(),
            "dataset.digest": self.images.digest,
            "sampler": self.definition.sampler.name,
            **self.tags,
        }
        if running.row:
            tags["row"] = running.row
        if running.attempt:
            tags["attempt"] = str(running.attempt + 1)
        if source:
            tags["weights.run_id"] = source[0]
        running.run_id = self.tracker.start_trial(self.definition.name, running.name, config.to_params(), tags)
        self._running[number] = running
        images = self.images
        self.tracker.log_dataset(running.run_id, config.dataset.name, images.digest, images.parts, images.source)
        shutil.rmtree(running.folder, ignore_errors=True)
        running.folder.mkdir(parents=True)
        file = source[1] if source else None
        self.executor.submit(Job(number, config, running.folder, file, lockstep=running.prunable))
        self.watcher.trial_started(number, running.name, config.epochs)

    def _handle(self, event: Event) -> None:
        running = self._running[event.job]
        if isinstance(event, Epoch):
            self._epoch(running, event)
        elif isinstance(event, Done):
            text = ", ".join(
                f"{label} accuracy {event.metrics[key]:.3f}"
                for label, key in (("val", "best/val_accuracy"), ("test", "test/accuracy"))
                if key in event.metrics
            )
            self._end(event.job, "complete", text, event.metrics, event.tags)
        elif isinstance(event, Stopped):
            self._end(event.job, "pruned", "")
        elif isinstance(event, Failed):
            if event.trace:
                (running.folder / "traceback.txt").write_text(event.trace)
            self._end(event.job, event.outcome, event.message)
        else:
            self._worker_died(running, event)

    def _epoch(self, running: _Running, event: Epoch) -> None:
        running.pending.append((event.epoch, event.metrics, int(time.time() * 1000)))
        self.watcher.epoch(event.job, event.epoch, event.metrics)
        if running.prunable:
            known = self.study._storage.get_trial(running.trial._trial_id).intermediate_values
            if event.epoch not in known:  # an interrupted trial comes by the same epochs again
                running.trial.report(event.metrics["val/accuracy"], event.epoch)
            # The last epoch costs nothing more: a trial that got there is complete.
            go_on = event.epoch == running.config.epochs or not running.trial.should_prune()
            self.executor.answer(event.job, go_on)
        if time.monotonic() - running.flushed > FLUSH_SECONDS:
            self._flush(running)

    def _flush(self, running: _Running) -> None:
        if running.pending:
            self.tracker.log_epochs(running.run_id, running.pending)
            running.pending.clear()
        running.flushed = time.monotonic()

    def _worker_died(self, running: _Running, event: WorkerDied) -> None:
        code = event.exit_code or 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        message = f"its worker process ended with {how}"
        if running.attempt >= MAX_RETRIES:
            self._end(event.job, "crashed", f"{message} {running.attempt + 1} times")
            return
        self._flush(running)
        self.tracker.finish_trial(running.run_id, "interrupted", {}, {"reason": message}, None)
        self.watcher.trial_ended(event.job, running.name, "interrupted", f"{message}; it is tried again")
        del self._running[event.job]
        running.attempt += 1
        self._submit(running)

    def _end(
        self,
        number: int,
        outcome: str,
        text: str,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Write a trial's end to both stores: MLflow first, so that a trial that Optuna counts has its artifacts."""
        running = self._running[number]
        self._flush(running)
        if outcome not in ("complete", "pruned"):
            tags = {**(tags or {}), "reason": text}
        folder = None if outcome == "interrupted" else running.folder
        self.tracker.finish_trial(running.run_id, outcome, metrics or {}, tags or {}, folder)
        state = TrialState[OUTCOMES[outcome].optuna]
        if state == TrialState.WAITING:
            self.study._storage.set_trial_state_values(running.trial._trial_id, state)
        else:
            if state == TrialState.FAIL:
                running.trial.set_user_attr("outcome", outcome)
            value = (metrics or {}).get("best/val_accuracy") if state == TrialState.COMPLETE else None
            self.study.tell(running.trial, value, state)
        del self._running[number]
        shutil.rmtree(running.folder, ignore_errors=True)
        self.summary.outcomes[outcome] = self.summary.outcomes.get(outcome, 0) + 1
        self.watcher.trial_ended(number, running.name, outcome, text)
