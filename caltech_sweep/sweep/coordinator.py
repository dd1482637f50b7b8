"""The loop over a study's trials: it asks the queue, submits to the executor, and hands each event to both stores.

A trial's end is written to the tracking store first and to the study store second, so that a trial that Optuna counts
has its artifacts.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from caltech_sweep.errors import LostStudyError, StoreError
from caltech_sweep.metrics import BEST_ACCURACY, TEST_ACCURACY
from caltech_sweep.stores import reason
from caltech_sweep.sweep.budget import Ledger
from caltech_sweep.sweep.executors.base import (
    MAX_FAILURES,
    Done,
    Epoch,
    Event,
    Executor,
    Failed,
    Job,
    Stopped,
    Trained,
    WorkerDied,
    ending,
)
from caltech_sweep.sweep.optuna_store import STORE_ERRORS
from caltech_sweep.sweep.progress import Progress
from caltech_sweep.sweep.queue import QueuedTrial, TrialQueue
from caltech_sweep.sweep.reconcile import survey
from caltech_sweep.sweep.recorder import RecordedTrial, Recorder
from caltech_sweep.tracking.records import FAILURES, PAUSED_AT, UNFINISHED, missing_artifacts, not_a_number

TRACEBACK = "traceback.txt"
INTERRUPTED = "waits for the next run of this study"
MAX_RETRIES = 2  # of a trial whose worker died


@dataclass
class _Running:
    """A trial in a slot."""

    queued: QueuedTrial
    run: RecordedTrial
    job: Job
    epoch: int = 0  # the last one that its worker has finished
    kept: int = 0  # the last one whose state others need not wait for
    attempt: int = 0
    deaths: int = 0  # of its workers
    stops: str | None = None  # "pruned" or "paused": it was told to stop
    retrains: bool = False  # it was paused, and its state is no longer kept
    writes: bool = False  # it is trained, and its artifacts are being written
    broken: str = ""  # which of its numbers is none; nothing after it is recorded


@dataclass
class Summary:
    """How many trials of this run ended in each outcome, and whether the study reached its total or budget."""

    outcomes: dict[str, int] = field(default_factory=dict)
    complete: bool = False
    stopped: str = ""  # why the study stopped by itself

    @property
    def failures(self) -> int:
        """How many trials failed for another reason than their settings."""
        return sum(self.outcomes.get(outcome, 0) for outcome in FAILURES)


@dataclass(frozen=True)
class Limits:
    """When a run ends before its study is complete."""

    failures_in_a_row: int = MAX_FAILURES


def _broken(metrics: Mapping[str, float], when: str) -> str:
    problem = not_a_number(metrics)
    return f"its {problem} {when}; try a lower learning rate" if problem else ""


class Coordinator:
    """Runs one study to its total; ``make_job`` returns the job of a trial that was handed out.

    ``ended`` is called when a trial's end is in both stores.
    """

    def __init__(
        self,
        queue: TrialQueue,
        recorder: Recorder,
        executor: Executor,
        progress: Progress,
        make_job: Callable[[QueuedTrial], Job],
        limits: Limits = Limits(),
        ledger: Ledger | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.queue, self.recorder, self.executor, self.progress = queue, recorder, executor, progress
        self.make_job, self.limits, self.ledger, self._ended = make_job, limits, ledger or Ledger({}), ended
        self.summary = Summary()
        self._stop = False
        self._running: dict[int, _Running] = {}
        self._held: QueuedTrial | None = None  # the next trial, which does not fit into what is left of the budget
        self._outcomes: dict[int, str] = {}  # how each trial of this run ended, the last time that it did
        self._failed_in_a_row = 0

    def request_stop(self) -> None:
        """Stop at the next event: running trials wait again, nothing stays RUNNING. Safe in a signal handler."""
        self._stop = True

    def run(self, confirm: int = 0) -> Summary:
        """Run trials until the total is reached or a stop is requested.

        ``confirm`` is how many of the best sampled trials are repeated on fresh seeds after that.
        """
        self.recorder.start(self.queue.study.user_attrs)
        self.ledger.start(list(self.recorder.records.values()))
        try:
            self._reconcile()
            self.progress.study_started(self.queue.definition.name, *self.queue.prepare(), self.queue.objective)
            self._run_all()
            if confirm and not self._stop and not self._held:
                self.queue.enqueue_confirmations(confirm)
                self._run_all()
            self._settle_budget()
            self.summary.complete = not self._stop
            for sentence in self.queue.endings() if self.summary.complete else ():
                self.progress.note(sentence)
        except STORE_ERRORS as error:
            raise StoreError(
                f"the study store cannot be read or written ({reason(error)}); fix this and run the study again: "
                "it resumes where it stopped"
            ) from None
        finally:
            self._close()
        return self.summary

    def _reconcile(self) -> None:
        """Settle what an earlier run left in the two stores."""
        queue, recorder = self.queue, self.recorder
        known = recorder.records
        for finding in list(survey(queue.study, recorder.tracker, known, queue.is_current, ended=bool(known))):
            assert finding.fix is not None
            finding.fix()
            self.progress.note(finding.text)

    def _close(self) -> None:
        """Let what runs wait. What a store does not take any more is settled by the next run, or by a new owner."""
        self.executor.close()
        ends = [partial(self._end, running, "interrupted", INTERRUPTED) for running in self._running.values()]
        for step in (*ends, partial(self.recorder.close, self.summary.complete)):
            try:
                step()
            except (StoreError, LostStudyError, *STORE_ERRORS):
                continue
            except Exception as error:  # the others have their ends all the same
                self.progress.note(f"the end of the study is not recorded ({reason(error)}); the next run records it")

    def _run_all(self) -> None:
        while not self._stop and not self.ledger.over and (self._fill() or self._running):
            events = self.executor.poll(0.5)
            self.ledger.pass_time([number for number, each in self._running.items() if not each.writes])
            for event in events:
                self._handle(event)
            self.recorder.keep_up()
            self.queue.keep_up()

    def _settle_budget(self) -> None:
        """Where the budget ends the study, let what it keeps from running wait, and say what is left."""
        if self._held is not None:
            self.queue.end(self._held, "interrupted", None)
        if self._stop or not (self._held or self.ledger.over):
            return
        self.executor.close()
        for running in list(self._running.values()):
            self._end(running, "interrupted", "waits until the study has a larger budget")
        waiting, sampled = self.queue.left()
        if waiting or sampled:
            self.progress.note(self.ledger.sentence(waiting, sampled, max(self.queue.definition.sampled_epochs)))

    def _fill(self) -> bool:
        """Hand a trial to every free slot; return whether any was handed out.

        A slot that still writes the artifacts of a trial is given rows only: what a sampler or a pruner decides about
        others may hang on that one.
        """
        before = len(self._running)
        while (free := self.executor.free()) > 0 or self.executor.free_soon() > 0:
            running = {other.queued.config: other.kept for other in self._running.values()}
            queued, self._held = self._held or self.queue.next(running, rows_only=not free), None
            if queued is None:
                break
            if not self.ledger.admit(queued.number, queued.config, queued.until):
                self._held = queued
                break
            if queued.resumes:
                self.progress.trial_promoted(queued.number, queued.name, queued.paused_at)
            run = self.recorder.open(queued)
            run.spent = self.ledger.of(queued.number)
            self._submit(_Running(queued, run, self.make_job(queued)))
        return len(self._running) > before

    def _submit(self, running: _Running) -> None:
        queued, folder = running.queued, running.job.folder
        self._running[queued.number] = running
        running.epoch, running.kept, running.broken, running.stops, running.writes = 0, 0, "", None, False
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.executor.submit(running.job)
        self.progress.trial_started(queued.number, queued.name, queued.config.epochs)

    # -- events ------------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        running = self._running[event.job]
        if isinstance(event, Epoch):
            self._epoch(running, event)
        elif isinstance(event, Trained):
            running.writes, running.kept = True, running.epoch
        elif isinstance(event, Done):
            self._done(running, event)
        elif isinstance(event, Stopped):
            self._stopped(running)
        elif isinstance(event, Failed):
            self._failed(running, event)
        else:
            self._worker_died(running, event)

    def _epoch(self, running: _Running, event: Epoch) -> None:
        """Log and report an epoch; one that the stores have already, from before an interruption, changes neither."""
        running.epoch, running.kept = event.epoch, event.epoch - event.saving
        self.ledger.epoch(event)
        if event.host != running.run.host:
            self.recorder.place(running.run, event.host)
        if event.epoch <= running.queued.paused_at and not (event.reused or running.retrains):
            running.retrains = True
            self.progress.note(
                f"{running.queued.name}: its state at epoch {running.queued.paused_at} is not in the cache, so it is "
                "trained again up to there, with the same result"
            )
        running.broken = running.broken or _broken(event.metrics, f"in epoch {event.epoch}")
        if running.broken:  # neither store is told; a worker that does not wait for an answer goes on to its end
            if running.queued.prunable:
                self.executor.answer(event.job, False)
            return
        self.progress.epoch(event.job, event.epoch, event.metrics)
        self.queue.report(running.queued, event.epoch, event.metrics[self.queue.objective.each_epoch])
        if running.queued.prunable:
            running.stops = None if event.last else self.queue.stops(running.queued, event.epoch)
            self.ledger.extend(event.job, running.queued.until)
            self.executor.answer(event.job, running.stops is None)
        self.recorder.epoch(running.run, event.epoch, event.metrics)

    def _stopped(self, running: _Running) -> None:
        """End a trial that was told to stop: it is paused, pruned, or has numbers that are none."""
        if running.stops != "paused":
            self._end(running, "pruned", running.broken)
            return
        text = f"at epoch {running.epoch} of {running.queued.config.epochs}"
        self._end(running, "paused", text, tags={PAUSED_AT: str(running.epoch)})

    def _done(self, running: _Running, event: Done) -> None:
        goal = self.queue.objective
        shown = {f"val {goal.label}": goal.at_best, "val accuracy": BEST_ACCURACY, "test accuracy": TEST_ACCURACY}
        text = ", ".join(f"{label} {event.metrics[key]:.3f}" for label, key in shown.items() if key in event.metrics)
        if event.tags.get("reuse.epochs_reused", "0") != "0":
            text += f"; {event.tags['reuse.epochs_reused']} of {running.queued.config.epochs} epochs reused"
        if "stopped_early" in event.tags:
            text += f"; stopped early at {event.tags['stopped_early']}"
        if "reuse.warnings" in event.tags:
            self.progress.note(f"{running.queued.name}: {event.tags['reuse.warnings']}")
        for path, why in missing_artifacts(event.tags).items():
            self.progress.note(f"{running.queued.name}: {path} is missing: {why}")
        self._end(running, "complete", text, event.metrics, event.tags)

    def _failed(self, running: _Running, event: Failed) -> None:
        if event.outcome == "out_of_memory" and not running.job.alone:
            running.job = replace(running.job, alone=True)
            self._retry(running, f"{event.message}; retried with its device to itself")
            return
        where = f"its traceback is {TRACEBACK} of run {running.run.run_id}"
        try:
            if event.trace:
                (running.job.folder / TRACEBACK).write_text(event.trace, encoding="utf-8")
        except OSError as error:  # a full disk, or a folder that was cleaned away: the trial ends all the same
            where = f"its traceback could not be kept ({error.strerror})"
        self._end(running, event.outcome, event.message)
        if event.trace:
            self.progress.note(f"{running.queued.name}: {where}")

    def _worker_died(self, running: _Running, event: WorkerDied) -> None:
        message = event.why or f"its worker process {ending(event.exit_code)}"
        if event.hung is not None:
            message = f"its worker was unresponsive for {event.hung:g} s and was killed"
        running.deaths += not event.moved
        running.job = replace(running.job, together=False)  # which of them it was is not known
        if running.deaths > MAX_RETRIES:
            self._end(running, "crashed", f"{message} {running.deaths} times")
        else:
            self._retry(running, f"{message}; it {'goes on elsewhere' if event.moved else 'is tried again'}")

    def _retry(self, running: _Running, message: str) -> None:
        """Try a trial once more in this run of the study; it goes on from its last checkpoint."""
        running.attempt += 1
        self.progress.trial_ended(running.queued.number, running.queued.name, "interrupted", message)
        self.recorder.retry(running.run, running.attempt + 1)
        self._submit(running)

    def _end(
        self,
        running: _Running,
        outcome: str,
        text: str,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Write a trial's end to both stores."""
        queued, folder, final = running.queued, running.job.folder, dict(metrics or {})
        broken = running.broken or _broken(final, "at its end")
        if broken and outcome in ("complete", "pruned"):
            outcome, text, final = "diverged", broken, {}
        if outcome not in ("complete", "pruned", "paused"):
            tags = {**(tags or {}), "reason": text}
        kept = None if outcome in UNFINISHED or broken else folder  # no checkpoint of what is no number
        self.recorder.end(running.run, outcome, final, tags or {}, kept)
        self.queue.end(queued, outcome, self.queue.objective.score(final))
        del self._running[queued.number]
        self.ledger.release(queued.number)
        shutil.rmtree(folder, ignore_errors=True)
        self._outcomes[queued.number] = outcome
        self.summary.outcomes = dict(Counter(self._outcomes.values()))
        self.progress.trial_ended(queued.number, queued.name, outcome, text)
        self._count_failures(outcome, queued.name, text)
        if outcome != "interrupted":
            self._ended()

    def _count_failures(self, outcome: str, name: str, text: str) -> None:
        """Stop the study when one trial after the other fails for another reason than its settings."""
        if outcome == "interrupted":
            return
        self._failed_in_a_row = self._failed_in_a_row + 1 if outcome in FAILURES else 0
        if self._failed_in_a_row == self.limits.failures_in_a_row:
            self.summary.stopped = (
                f"the study stopped after {self._failed_in_a_row} consecutive failed trials, most recently {name} "
                f"({text}); fix the cause and run it again, or raise --max-failures"
            )
            self._stop = True
