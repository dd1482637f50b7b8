"""What a study leaves in the tracking store: a run for each trial, its epochs and its end, and the study's table.

One trial is one MLflow run, however often it was interrupted or its worker died.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import LostStudyError, StoreError
from caltech_sweep.stores import reason
from caltech_sweep.study.definition import StudyDefinition
from caltech_sweep.study.file import weights_key
from caltech_sweep.sweep.budget import Spent
from caltech_sweep.sweep.queue import QueuedTrial
from caltech_sweep.tracking.background import Background
from caltech_sweep.tracking.records import (
    HOST,
    STORE_TAG,
    DatasetInfo,
    EpochLog,
    InitialWeights,
    Tracker,
    TrialRecord,
    records_by_trial,
)

DESCRIBE_SECONDS = 60.0  # at most so often the table in the tracking store is renewed while trials run
FLUSH_SECONDS = 5.0  # how long epochs may wait to be logged together
MOST_FLUSH_SECONDS = 60.0  # the same where many trials run, or the store takes long:
FLUSH_SHARE = 0.1  # of the time is spent on logging epochs, if that is enough


@dataclass
class RecordedTrial:
    """The run of one trial, and the epochs that wait to be logged."""

    run_id: str
    logged: int = 0  # the last epoch that the tracking store has, or that waits
    pending: list[EpochLog] = field(default_factory=list)
    flushed: float = 0.0  # when the last ones were logged
    spent: Spent = field(default_factory=Spent)
    spent_step: int = -1  # the last step at which that was logged
    host: str = ""  # the machine that trains it, where that is not this one


class Recorder:
    """Writes one study into the tracking store.

    ``tags`` are those of every run, ``weights`` what trials start from, and ``describe`` makes the table that becomes
    the study's description.
    """

    def __init__(
        self,
        tracker: Tracker,
        definition: StudyDefinition,
        data: DatasetInfo,
        note: Callable[[str], None],
        *,
        tags: Mapping[str, str] | None = None,
        weights: Mapping[str, InitialWeights] | None = None,
        describe: Callable[[], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.tracker, self.definition, self.data, self.note = tracker, definition, data, note
        self.tags, self.weights, self.describe = dict(tags or {}), dict(weights or {}), describe
        self.records: dict[tuple[int, str], TrialRecord] = {}  # as they were when this process began
        self._opened: dict[tuple[int, str], str] = {}  # the ids of the runs that it has opened
        self._open, self._took = 0, 0.0  # how many runs are open, and the seconds that logging epochs takes, smoothed
        self._described, self._undescribed = 0.0, False  # when last; whether a trial has ended since
        self._table: Future[str] | None = None  # that is being made
        self._thread = Background("description")

    def start(self, attributes: Mapping[str, Any]) -> None:
        """Open the study's run, and look which trials have one.

        ``attributes`` are those of the study store's study: of these, its identity and its id are recorded.
        """
        own = {key: value for key, value in attributes.items() if key in ("identity", STORE_TAG)}
        spec = {**self.definition.to_dict(), "images": {**self.data.splits, "classes": self.data.classes}, **own}
        self.tracker.start_study(self.definition.name, self.definition.title, spec)
        self.records = records_by_trial(self.tracker, self.definition.name)

    def open(self, queued: QueuedTrial) -> RecordedTrial:
        """Create a trial's run, or open the one it has."""
        config = queued.config
        key, params = (queued.number, config.fingerprint()), config.to_params()
        record = self.records.get(key)
        known = record.run_id if record is not None else self._opened.get(key)
        here = {HOST: self.tags[HOST]} if HOST in self.tags else {}
        if known is None:
            known = self.tracker.start_trial(self.definition.name, queued.name, params, self._tags(queued))
            run = RecordedTrial(known, flushed=self._clock())
        else:
            logged = self.tracker.resume_trial(known, {**self._weights_tags(config), **here})
            run = RecordedTrial(known, logged, flushed=self._clock())
        if record is not None and len(record.params) < len(params):  # its process died before it had written all this
            self.tracker.log_params(known, params)
        self._opened[key] = known
        self._open += 1
        info = self.data
        self.tracker.log_dataset(run.run_id, config.dataset.name, info.digest, info.splits, info.source)
        return run

    def run_of(self, queued: QueuedTrial) -> str:
        """Return the id of the run that :meth:`open` has opened for a trial."""
        return self._opened[queued.number, queued.config.fingerprint()]

    def _tags(self, queued: QueuedTrial) -> dict[str, str]:
        config = queued.config
        tags = {
            "trial_number": str(queued.number),
            "fingerprint": config.fingerprint(),
            "dataset.digest": self.data.digest,
            "sampler": self.definition.sampler.name,
            **self.data.tags,
            **self._weights_tags(config),
            **queued.tags,
            **self.tags,
        }
        if queued.row:
            tags["row"] = queued.row
        return tags

    def _weights_tags(self, config: TrialConfig) -> dict[str, str]:
        weights = self.weights.get(weights_key(config))
        if weights is None:
            return {}
        return {"weights.digest": weights.digest, **({"weights.run_id": weights.run_id} if weights.run_id else {})}

    def retry(self, run: RecordedTrial, attempt: int) -> None:
        """Open a run again whose trial is tried once more."""
        self.flush(run)
        run.logged = self.tracker.resume_trial(run.run_id, {"attempt": str(attempt)})

    def place(self, run: RecordedTrial, host: str) -> None:
        """Record which machine a trial goes on at."""
        self.flush(run)
        self.tracker.resume_trial(run.run_id, {HOST: host})
        run.host = host

    def epoch(self, run: RecordedTrial, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log an epoch, soon; one that the store has from before an interruption is logged once."""
        if epoch > run.logged:
            run.pending.append((epoch, metrics, int(time.time() * 1000)))
            run.logged = epoch
        if self._clock() - run.flushed > self._patience:
            self._flush_with_spent(run)  # in case there is no end

    @property
    def _patience(self) -> float:
        """How long epochs may wait: so that the logging of all other runs leaves time for everything else."""
        wanted = self._took * (self._open - 1) / FLUSH_SHARE
        return max(FLUSH_SECONDS, min(wanted, MOST_FLUSH_SECONDS))

    def flush(self, run: RecordedTrial) -> None:
        """Log the epochs that wait."""
        began = self._clock()
        if run.pending:
            self.tracker.log_epochs(run.run_id, run.pending)
            run.pending.clear()
            self._took += 0.1 * (self._clock() - began - self._took)
        run.flushed = self._clock()

    def _flush_with_spent(self, run: RecordedTrial) -> None:
        """Log the epochs that wait, and what the trial has spent: at its milliseconds, so that no step comes twice."""
        step = round(run.spent.seconds * 1000)
        if step > run.spent_step:
            run.pending.append((step, run.spent.metrics(), int(time.time() * 1000)))
            run.spent_step = step
        self.flush(run)

    def end(
        self,
        run: RecordedTrial,
        outcome: str,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        folder: Path | None,
    ) -> None:
        """Write a trial's end, with the artifacts in ``folder``."""
        self._flush_with_spent(run)
        self._open -= 1
        self.tracker.finish_trial(run.run_id, outcome, metrics, tags, folder)
        self._undescribed = True

    def keep_up(self) -> None:
        """Do now and then what need not be done at once."""
        self.tracker.keep_up()
        if self._table is not None and self._table.done():
            self._describe(0.0)
        elif self._undescribed and time.monotonic() - self._described > DESCRIBE_SECONDS:
            self._make_table()

    def close(self, complete: bool) -> None:
        """Close the study's run: complete when it has all its trials."""
        self.tracker.finish_study(self.definition.name, complete)
        self._make_table()
        self._describe(DESCRIBE_SECONDS)

    def _make_table(self) -> None:
        """Begin to make the table that is the study's description; it reads the tracking store, which may take long."""
        if self.describe is not None and not self._thread.is_busy:
            self._table = self._thread.submit(self.describe)
        self._described, self._undescribed = time.monotonic(), False

    def _describe(self, patience: float) -> None:
        """Write the table to the tracking store, once it is there."""
        table, self._table = self._table, None
        try:
            if table is not None:
                self.tracker.describe_study(self.definition.name, table.result(patience))
        except (StoreError, TimeoutError):  # a store that is unavailable has no table either
            pass
        except LostStudyError:
            raise
        except Exception as error:  # no table is worth a study
            self.note(f"the study's description cannot be written: {reason(error)}")
