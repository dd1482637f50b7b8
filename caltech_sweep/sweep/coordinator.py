"""The owner of both stores: asks Optuna, hands out jobs, reports, prunes, logs to MLflow, tells Optuna.

Rows run first and are never pruned. ``trials`` is a total: going on with a study starts only what is missing from
it. One trial is one MLflow run, however often it was interrupted or its worker died.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import StoreError
from caltech_sweep.records import FAILURES, EpochLog, Tracker, TrialRecord
from caltech_sweep.stores import reason
from caltech_sweep.sweep import study as studies
from caltech_sweep.sweep.executors import Alive, Done, Epoch, Event, Executor, Failed, Job, Stopped, WorkerDied
from caltech_sweep.sweep.recovery import records_by_trial, survey
from caltech_sweep.sweep.sharing import branch_epochs, next_index
from caltech_sweep.sweep.space import make_sampler, own_branch, reachable, sample
from caltech_sweep.sweep.study_file import StudyDefinition
from caltech_sweep.sweep.watch import Watcher
from caltech_sweep.training.reuse import StageUse

MAX_RETRIES = 2  # of a trial whose worker died
CONFIRMING_SEEDS = 3  # at least so many fresh seeds for a trial that is confirmed
DESCRIBE_SECONDS = 20.0  # how old the description of a running study may be
FLUSH_SECONDS = 5.0  # how long epochs may wait to be logged together


@dataclass(frozen=True)
class Images:
    """What the runs record about the dataset: a digest of the images, how many each part has, where they came from."""

    digest: str
    parts: Mapping[str, int]
    source: str
    classes: int


@dataclass
class _Running:
    """A trial in a slot, and what of it is on its way to the stores."""

    trial: optuna.Trial
    name: str
    config: TrialConfig
    row: str | None
    extra: Mapping[str, str]  # tags of a repeat: which seed of its row, or which trial it confirms
    folder: Path
    prunable: bool
    epoch: int = 0  # the last epoch that its worker has finished
    run_id: str = ""
    logged: int = 0  # the last epoch that the tracking store has
    reported: int = 0  # the last epoch that Optuna has
    attempt: int = 0
    alone: bool = False  # it did not fit beside others, and is tried once more without them
    heard: float = field(default_factory=time.monotonic)  # when its worker last gave a sign
    hung: bool = False  # its worker was killed since it gave none
    pending: list[EpochLog] = field(default_factory=list)
    flushed: float = field(default_factory=time.monotonic)


@dataclass
class Summary:
    """How many trials of this run ended in each outcome, and whether the study reached its total."""

    outcomes: dict[str, int] = field(default_factory=dict)
    complete: bool = False
    stopped: str = ""  # why the study stopped by itself

    @property
    def failures(self) -> int:
        """How many trials failed for another reason than their settings."""
        return sum(self.outcomes.get(outcome, 0) for outcome in FAILURES)


@dataclass(frozen=True)
class Limits:
    """When patience ends: with a worker that gives no sign, and with trials that fail one after the other."""

    hang_seconds: float = 600.0  # without a sign of life, which every step of a training gives
    failures_in_a_row: int = 5  # then the study stops


class Coordinator:
    """Runs one study to its total. ``only`` names the rows to run, and then nothing is sampled."""

    def __init__(
        self,
        definition: StudyDefinition,
        study: optuna.Study,
        tracker: Tracker,
        executor: Executor,
        watcher: Watcher,
        scratch: Path,
        images: Images,
        *,
        weights: Mapping[str, tuple[str, Path]] | None = None,
        tags: Mapping[str, str] | None = None,
        only: tuple[str, ...] = (),
        stages: StageUse | None = None,
        confirm: int = 0,
        describe: Callable[[], str] | None = None,
        limits: Limits = Limits(),
    ) -> None:
        self.definition, self.study, self.tracker, self.executor = definition, study, tracker, executor
        self.watcher, self.scratch, self.images = watcher, scratch, images
        self.weights, self.tags, self.only = dict(weights or {}), dict(tags or {}), only
        self.stages, self.confirm, self.describe, self.limits = stages, confirm, describe, limits
        self._failed_in_a_row = 0
        self.summary = Summary()
        self._stop = False
        self._running: dict[int, _Running] = {}
        self._records: dict[tuple[int, str], TrialRecord] = {}
        self._sampled_left = 0
        self._beat = time.monotonic()
        self._described, self._undescribed = 0.0, False  # when last; whether a trial has ended since

    def request_stop(self) -> None:
        """Stop at the next event: running trials wait again, nothing stays RUNNING. Safe in a signal handler."""
        self._stop = True

    def run(self) -> Summary:
        """Run trials until the total is reached or a stop is requested."""
        studies.check_alone(self.study)
        document = {**self.definition.to_dict(), "images": {**self.images.parts, "classes": self.images.classes}}
        self.tracker.start_study(self.definition.name, self.definition.title, document)
        try:
            self._prepare()
            self._run_all()
            if self.confirm and not self._stop:
                studies.enqueue_confirmations(
                    self.study, self.confirm, max(CONFIRMING_SEEDS, self.definition.replicates)
                )
                self._run_all()
            self.summary.complete = not self._stop
        except studies.STORE_ERRORS as error:
            raise StoreError(
                f"the study store cannot be read or written ({reason(error)}); mend that and run the study again: "
                "it goes on where it was"
            ) from None
        finally:
            self._close()
        return self.summary

    def _close(self) -> None:
        """Let what runs wait. A store that takes no more is mended by the next run."""
        self.executor.close()
        with suppress(StoreError, *studies.STORE_ERRORS):
            for number in list(self._running):
                self._end(number, "interrupted", "waits for the next run of this study")
            self.tracker.finish_study(self.definition.name, self.summary.complete)
            self._describe()

    def _run_all(self) -> None:
        while not self._stop and (self._fill() or self._running):
            for event in self.executor.poll(0.5):
                self._handle(event)
            self._heartbeat()
            self._end_what_hangs()
            self.tracker.keep_up()
            if self._undescribed and time.monotonic() - self._described > DESCRIBE_SECONDS:
                self._describe()

    def _describe(self) -> None:
        """Keep the table that is the study's description in the tracking store current."""
        try:
            if self.describe is not None:
                self.tracker.describe_study(self.definition.name, self.describe())
        except StoreError:  # a store that is away has no table either
            pass
        except Exception as error:  # no table is worth a study
            self.watcher.note(f"the study's description cannot be written: {reason(error)}")
        self._described, self._undescribed = time.monotonic(), False

    # -- what is to do ---------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Take over what an earlier run left, let the rows that are missing wait, and count what is left."""
        self._records = records_by_trial(self.tracker, self.definition.name)
        for finding in list(survey(self.study, self.tracker, self._records, self._is_current)):
            assert finding.mend is not None
            finding.mend()
            self.watcher.note(finding.text)
        studies.enqueue_missing_rows(self.study, self.definition, self.only)
        for trial in filter(studies.is_family_base, self.study.get_trials(deepcopy=False)):
            studies.complete_family(self.study, self.definition, trial)
        trials = self.study.get_trials(deepcopy=False)
        waiting = len(self._waiting(trials))
        ended = [trial for trial in trials if studies.is_finished(trial) and self._is_current(trial)]
        counted = sum(not studies.is_extra(trial) for trial in ended + self._waiting(trials))
        counted += (self.definition.family_size - 1) * sum(map(studies.is_unsampled, self._waiting(trials)))
        self._sampled_left = 0 if self.only else max(0, self.definition.trials - counted)
        done = len(ended)
        self.watcher.study_started(self.definition.name, done, done + waiting + self._sampled_left)

    def _is_current(self, trial: FrozenTrial) -> bool:
        return studies.is_current(trial, self.definition)

    def _waiting(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Return the trials that wait and may be run now, in the order of their numbers."""
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        return [trial for trial in waiting if not self.only or trial.user_attrs.get("row") in self.only]

    def _fill(self) -> bool:
        """Hand a trial to every free slot; return whether any was handed out."""
        before = len(self._running)
        while len(self._running) < self.executor.slots and self.executor.has_room():
            running = self._next()
            if running is None:
                break
            self._submit(running)
        return len(self._running) > before

    def _next(self) -> _Running | None:
        """Return the next trial: one that waits (an interrupted one, a row, a branch), or else a sampled one."""
        trials = self.study.get_trials(deepcopy=False)
        waiting = self._waiting(trials)
        unsampled = next((trial for trial in waiting if studies.is_unsampled(trial)), None)
        if unsampled is not None:
            return self._resample(unsampled)
        configs = [TrialConfig.from_dict(trial.user_attrs["config"]) for trial in waiting]
        running = {running.config: running.epoch for running in self._running.values()} if self.stages else {}
        chosen = next_index(configs, running, other_work=self._sampled_left > 0)
        if chosen is not None:
            return self._resume(waiting[chosen])
        return self._sample(len(trials)) if self._sampled_left > 0 else None

    def _sample(self, number: int) -> _Running:
        """Ask for new settings."""
        self._sampled_left -= self.definition.family_size
        self.study.sampler = make_sampler(self.definition.sampler, number)
        return self._settle(studies.ask(self.study))

    def _resample(self, waiting: FrozenTrial) -> _Running:
        """Sample a trial whose coordinator died while it was sampled: it gets what it would have got."""
        self.study.sampler = make_sampler(self.definition.sampler, waiting.number)
        return self._settle(studies.take_unsampled(self.study, waiting))

    def _settle(self, trial: optuna.Trial) -> _Running:
        """Let Optuna suggest a trial's settings; the other schedules of their family wait from now on."""
        settings = sample(trial, self.definition.space)
        config = self.definition.config({**settings, **own_branch(trial, self.definition.expand)})
        studies.set_config(trial, config)
        if self.definition.expand:
            base = self.study.get_trials(deepcopy=False)[trial.number]
            studies.complete_family(self.study, self.definition, base)
        return self._prepared(trial, None, config)

    def _resume(self, waiting: FrozenTrial) -> _Running:
        config, row = TrialConfig.from_dict(waiting.user_attrs["config"]), waiting.user_attrs.get("row")
        trial = studies.take(self.study, waiting)
        # Suggesting what is fixed lets the sampler learn from it.
        sample(trial, reachable(self.definition.space, config.to_dict()))
        if row is None:
            own_branch(trial, self.definition.expand)
        running = self._prepared(trial, row, config)
        running.reported = max(waiting.intermediate_values, default=0)
        return running

    def _prepared(self, trial: optuna.Trial, row: str | None, config: TrialConfig) -> _Running:
        attributes = trial.user_attrs
        name = row or f"trial-{trial.number:03d}"
        extra: dict[str, str] = {
            key: str(attributes[key]) for key in ("replicate", "confirms", "family") if key in attributes
        }
        if "replicate" in extra:
            name = f"{row} (seed {config.seed})"
        prunable = row is None and "confirms" not in extra and self.definition.pruner is not None
        return _Running(trial, name, config, row, extra, self.scratch / str(trial.number), prunable)

    # -- one trial -------------------------------------------------------------------------------------------------

    def _submit(self, running: _Running) -> None:
        config, number = running.config, running.trial.number
        self._running[number] = running
        studies.record_heartbeats(self.study, [running.trial])
        self._open_run(running)
        shutil.rmtree(running.folder, ignore_errors=True)
        running.folder.mkdir(parents=True)
        file = self.weights[config.weights][1] if config.weights in self.weights else None
        stages = self.stages
        if stages is not None:
            stages = replace(stages, save_at=branch_epochs(self.definition, config))
        running.epoch, running.heard, running.hung = 0, time.monotonic(), False
        lockstep, alone = running.prunable, running.alone
        self.executor.submit(Job(number, config, running.folder, file, None, lockstep, stages, alone))
        self.watcher.trial_started(number, running.name, config.epochs)

    def _open_run(self, running: _Running) -> None:
        """Create the trial's MLflow run, or open the one it has."""
        config, number, images = running.config, running.trial.number, self.images
        record = self._records.get((number, config.fingerprint()))
        if record is not None or running.run_id:
            running.run_id = running.run_id or (record.run_id if record else "")
            attempt = {"attempt": str(running.attempt + 1)} if running.attempt else {}
            running.logged = self.tracker.resume_trial(running.run_id, attempt)
            if record is not None:  # of an earlier process, which may have died before it had written all this
                if len(record.params) < len(config.to_params()):
                    self.tracker.log_params(running.run_id, config.to_params())
                self._log_dataset(running)
            return
        tags = {
            "trial_number": str(number),
            "fingerprint": config.fingerprint(),
            "dataset.digest": images.digest,
            "sampler": self.definition.sampler.name,
            **running.extra,
            **self.tags,
        }
        if running.row:
            tags["row"] = running.row
        if config.weights in self.weights:
            tags["weights.run_id"] = self.weights[config.weights][0]
        running.run_id = self.tracker.start_trial(self.definition.name, running.name, config.to_params(), tags)
        self._log_dataset(running)

    def _log_dataset(self, running: _Running) -> None:
        images, name = self.images, running.config.dataset.name
        self.tracker.log_dataset(running.run_id, name, images.digest, images.parts, images.source)

    def _handle(self, event: Event) -> None:
        running = self._running[event.job]
        running.heard = time.monotonic()
        if isinstance(event, Alive):
            return
        if isinstance(event, Epoch):
            self._epoch(running, event)
        elif isinstance(event, Done):
            text = ", ".join(
                f"{label} accuracy {event.metrics[key]:.3f}"
                for label, key in (("val", "best/val_accuracy"), ("test", "test/accuracy"))
                if key in event.metrics
            )
            if event.tags.get("reuse.epochs_reused", "0") != "0":
                text += f"; {event.tags['reuse.epochs_reused']} of {running.config.epochs} epochs reused"
            if "reuse.warnings" in event.tags:
                self.watcher.note(f"{running.name}: {event.tags['reuse.warnings']}")
            self._end(event.job, "complete", text, event.metrics, event.tags)
        elif isinstance(event, Stopped):
            self._end(event.job, "pruned", "")
        elif isinstance(event, Failed) and event.outcome == "out_of_memory" and not running.alone:
            running.alone = True
            self._again(running, f"{event.message}; it is tried again alone on its device")
        elif isinstance(event, Failed):
            if event.trace:
                (running.folder / "traceback.txt").write_text(event.trace)
            self._end(event.job, event.outcome, event.message)
        else:
            self._worker_died(running, event)

    def _epoch(self, running: _Running, event: Epoch) -> None:
        """Log and report an epoch; one that the stores have already, from before an interruption, only prunes."""
        running.epoch = event.epoch
        if event.epoch > running.logged:
            running.pending.append((event.epoch, event.metrics, int(time.time() * 1000)))
            running.logged = event.epoch
        self.watcher.epoch(event.job, event.epoch, event.metrics)
        if self.definition.pruner is not None and event.epoch > running.reported:
            running.trial.report(event.metrics["val/accuracy"], event.epoch)  # rows too: others are held against them
            running.reported = event.epoch
        if running.prunable:
            # The last epoch costs nothing more: a trial that got there is complete.
            last = event.epoch == running.config.epochs
            behind = event.epoch < running.reported  # it was let through here before it was interrupted
            self.executor.answer(event.job, last or behind or not running.trial.should_prune())
        if time.monotonic() - running.flushed > FLUSH_SECONDS:
            self._flush(running)

    def _flush(self, running: _Running) -> None:
        if running.pending:
            self.tracker.log_epochs(running.run_id, running.pending)
            running.pending.clear()
        running.flushed = time.monotonic()

    def _heartbeat(self) -> None:
        if time.monotonic() - self._beat > studies.HEARTBEAT_SECONDS / 2:
            self._beat = time.monotonic()
            studies.record_heartbeats(self.study, [running.trial for running in self._running.values()])

    def _worker_died(self, running: _Running, event: WorkerDied) -> None:
        code = event.exit_code or 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        message = f"its worker process ended with {how}"
        if running.hung:
            message = f"its worker process gave no sign for {self.limits.hang_seconds:g} seconds and was killed"
        if running.attempt >= MAX_RETRIES:
            self._end(event.job, "crashed", f"{message} {running.attempt + 1} times")
            return
        self._again(running, f"{message}; it is tried again")

    def _again(self, running: _Running, message: str) -> None:
        """Try a trial once more in this run of the study; it goes on from its last stage."""
        self._flush(running)
        self.watcher.trial_ended(running.trial.number, running.name, "interrupted", message)
        running.attempt += 1
        self._submit(running)

    def _end_what_hangs(self) -> None:
        now = time.monotonic()
        for number, running in self._running.items():
            if self.executor.waits(number):
                running.heard = now
            if not running.hung and now - running.heard > self.limits.hang_seconds:
                running.hung = self.executor.abandon(number)

    def _count_failures(self, outcome: str, name: str, text: str) -> None:
        """Stop the study when one trial after the other fails for another reason than its settings."""
        if outcome == "interrupted":
            return
        self._failed_in_a_row = self._failed_in_a_row + 1 if outcome in FAILURES else 0
        if self._failed_in_a_row == self.limits.failures_in_a_row:
            self.summary.stopped = (
                f"the study stopped after {self._failed_in_a_row} failed trials in a row, the last of them "
                f"{name} ({text}); mend the cause and run it again, or raise --max-failures"
            )
            self._stop = True

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
        if outcome == "interrupted":
            studies.put_back(self.study, running.trial._trial_id)
        else:
            value = (metrics or {}).get("best/val_accuracy") if outcome == "complete" else None
            studies.end_trial(self.study, running.trial._trial_id, outcome, value)
        del self._running[number]
        shutil.rmtree(running.folder, ignore_errors=True)
        self.summary.outcomes[outcome] = self.summary.outcomes.get(outcome, 0) + 1
        self._undescribed = True
        self.watcher.trial_ended(number, running.name, outcome, text)
        self._count_failures(outcome, running.name, text)
