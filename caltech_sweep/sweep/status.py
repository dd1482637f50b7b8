"""Which studies are being run, by whom, and how far their trials are: read from the two stores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import HeldStudyError, UsageError
from caltech_sweep.metrics import EPOCH_SECONDS
from caltech_sweep.stores import Address, study_store, tracking_store
from caltech_sweep.study.site import select
from caltech_sweep.sweep.lease import check_free
from caltech_sweep.text import counted, duration, suggestion
from caltech_sweep.tracking.records import HOST, UNFINISHED, StudyRecord, TrialRecord
from caltech_sweep.tracking.writer import MlflowTracker


def status(
    name: str | None, tracking_uri: Address, storage: Address, clock: Callable[[], float] = time.time
) -> Iterator[str]:
    """Yield lines about one study, or about every one that has running trials or is held by a process.

    ``clock`` returns the seconds since 1970. Raises UsageError for a study that is not there.
    """
    tracking, store = tracking_store(tracking_uri), study_store(storage)
    tracking.check()
    tracker = MlflowTracker(tracking)
    records = {record.name: record for record in tracker.studies()}
    one = name is not None and not name.endswith("/")
    if name is not None and one and name not in records:
        raise UsageError(f"there is no study {name!r} in {tracking.shown}{suggestion(name, records)}")
    shown = 0
    for record in (records[each] for each in select(name, records)):
        trials = tracker.trials(record)
        running = [trial for trial in trials if trial.state == "running"]
        runner = ""
        try:
            check_free(store, record.name)
        except HeldStudyError as error:
            runner = str(error).partition(";")[0]
        if not one and not running and not runner:
            continue
        shown += 1
        yield _summary(record, trials, len(running), runner)
        yield from (_line(trial, tracker.last_epoch(trial.run_id), clock()) for trial in running)
    if not shown:
        yield "no study is being run"


def _summary(record: StudyRecord, trials: list[TrialRecord], running: int, runner: str) -> str:
    ended = sum(trial.state not in ("running", *UNFINISHED) for trial in trials)
    total = f" of {record.definition.trials}" if record.definition is not None else ""
    by = f"; {runner}" if runner else "; no process holds it in this study store"
    return f"{record.name}: {ended}{total} trials ended, {counted(running, 'trial')} running{by}"


def _line(trial: TrialRecord, epoch: int, now: float) -> str:
    epochs = TrialConfig.from_params(trial.params).epochs
    since = f"{datetime.fromtimestamp(trial.start_time / 1000):%F %T}"
    seconds = trial.metrics.get(EPOCH_SECONDS)
    left = f", about {duration(seconds * (epochs - epoch))} left" if seconds is not None else ""
    where = f" on {trial.tags[HOST]}" if HOST in trial.tags else ""
    ago = duration(max(0.0, now - trial.start_time / 1000))
    return f"  [{trial.number}] {trial.name}: epoch {epoch} of {epochs}{where}, since {since} ({ago} ago){left}"
