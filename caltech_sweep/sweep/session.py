"""Runs and plans of a study: everything is checked before anything is written."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import optuna

from caltech_sweep import paths
from caltech_sweep.config import PLACE_FIELDS, DatasetConfig
from caltech_sweep.data import dataset_root
from caltech_sweep.errors import ForeignStudyError, LostStudyError, StoreError
from caltech_sweep.files import locked_directory, remove_abandoned
from caltech_sweep.stores import Address, Store, study_store, tracking_store, without_log
from caltech_sweep.study.definition import StudyDefinition
from caltech_sweep.study.file import weights_key
from caltech_sweep.sweep.budget import Ledger
from caltech_sweep.sweep.coordinator import Coordinator, Limits, Summary
from caltech_sweep.sweep.executors.base import Job, Write
from caltech_sweep.sweep.executors.processes import STOPPING
from caltech_sweep.sweep.executors.worker import images_of
from caltech_sweep.sweep.lease import Held, fencing, holding
from caltech_sweep.sweep.local_stores import LocalStores
from caltech_sweep.sweep.options import Begun, LocalExecutor, RunOptions
from caltech_sweep.sweep.optuna_store import await_outages, engine_of, open_study
from caltech_sweep.sweep.ownership import adopt, check_adoptable, check_own, check_runs
from caltech_sweep.sweep.preflight import cache_place, check_options, find_weights, identity_of, kept_epochs
from caltech_sweep.sweep.progress import Progress, showing
from caltech_sweep.sweep.queue import QueuedTrial, TrialQueue
from caltech_sweep.sweep.recorder import Recorder
from caltech_sweep.sweep.sharing import branch_epochs
from caltech_sweep.sweep.survey import Survey, Weights, survey
from caltech_sweep.tracking.client import draft_of
from caltech_sweep.tracking.direct import Destination
from caltech_sweep.tracking.journal import Journal, JournalingTracker, journals, own_folder
from caltech_sweep.tracking.records import STORE_TAG, StudyRecord
from caltech_sweep.tracking.writer import MlflowTracker, Owner, provenance
from caltech_sweep.training.keys import CacheOptions, may_train_together

if TYPE_CHECKING:
    from caltech_sweep.sweep.executors.ray import RayExecutor

_MARK = ".run-"  # a folder in the data folder, by which the nodes of a cluster see that they share it
_SCRATCH = "caltech-sweep-run-"  # the folder of what trials leave, until the tracking store has it


def cache_options(options: RunOptions) -> CacheOptions | None:
    """Return where trials find and leave what can be reused."""
    if not options.reuse:
        return None
    from caltech_sweep.training.cache import default_budget

    folder, url = cache_place(options)
    budget = default_budget(folder) if options.cache_size is None else int(options.cache_size * 10**9)
    return CacheOptions(folder, budget, url=url, together=options.together > 1)


def job_of(
    definition: StudyDefinition,
    scratch: Path,
    weights: Weights,
    stages: CacheOptions | None,
    queued: QueuedTrial,
    upload: Destination | None = None,
    together: bool = False,
) -> Job:
    """Return the job of a trial: its folder below ``scratch``, its initial weights, when it saves, where it uploads."""
    config, source = queued.config, weights.get(weights_key(queued.config))
    # Of a trial that waited, the images may lie elsewhere by now.
    dataset = definition.config({}).dataset
    config = replace(config, dataset=replace(config.dataset, **{name: getattr(dataset, name) for name in PLACE_FIELDS}))
    if stages is not None:
        stages = replace(stages, save_at=branch_epochs(definition, config), hold_at=frozenset(queued.rungs))
    return Job(
        queued.number,
        config,
        scratch / str(queued.number),
        weights_file=source.path.absolute() if source else None,
        weights_digest=source.digest if source else None,
        wait_each_epoch=queued.prunable,
        stages=stages,
        together=together and may_train_together(config),
        upload=upload,
    )


def table_of(study: str, tracking: Store) -> str:
    """Return the table of a study as Markdown, with the best three sampled trials."""
    from caltech_sweep.report.build import build_report

    return build_report([study], "markdown", 3, tracking)


def _executor(
    stack: ExitStack, begun: Begun, options: RunOptions, dataset: DatasetConfig, found: Survey
) -> LocalExecutor | RayExecutor:
    """Return what runs trials, once their images and networks were looked at; the stack ends what it needs."""
    if begun.cluster is None:
        return begun.local
    from caltech_sweep.sweep.executors.luggage import Trainer, luggage_of
    from caltech_sweep.sweep.executors.ray import with_supply

    begun.local.close()  # what it had in memory is for others
    home = paths.data_home().absolute()
    home.mkdir(parents=True, exist_ok=True)
    mark = stack.enter_context(locked_directory(home, _MARK))
    luggage = replace(
        luggage_of(dataset, found, dataset_root(dataset), mark),
        shared_cache=options.cache is not None and cache_place(options)[1] is None,
        cache_size=None if options.cache_size is None else int(options.cache_size * 10**9),
    )
    if options.address is not None:
        files = {source.digest: source.path.absolute() for source in found.weights.values()}
        luggage = with_supply(luggage, files)
    begun.cluster.name_runner(Trainer(luggage))
    return begun.cluster


@contextmanager
def _stoppable(coordinator: Coordinator, watcher: Progress) -> Iterator[None]:
    """Let the first Ctrl-C, SIGTERM or closed terminal stop cleanly, and a second Ctrl-C at once.

    A signal that the shell has this process ignore, as nohup does, stays ignored.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        watcher.note("Stopping: running trials will resume on the next run. Press Ctrl-C again to stop at once.")
        coordinator.request_stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {}
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _scratch(stack: ExitStack) -> Path:
    """Return a folder for what trials leave; those of runs that were killed are removed."""
    try:
        place = Path(tempfile.gettempdir())
        remove_abandoned(place, _SCRATCH)
        return stack.enter_context(locked_directory(place, _SCRATCH))
    except OSError as error:
        raise StoreError(
            f"temporary files cannot be written ({error.strerror or error}); free some disk space, or name "
            "another folder with the environment variable TMPDIR"
        ) from error


@dataclass(frozen=True)
class _Opening:
    """A study that is about to be opened in its store, and what the tracking store says about its owner."""

    definition: StudyDefinition
    identity: Mapping[str, Any]
    weights: Weights
    tracker: MlflowTracker
    storage: Store
    adopting: bool

    def check_owner(self) -> StudyRecord | None:
        """Return the tracking store's study that is to be adopted, or claimed since it has no owner yet, or None.

        Raises the error of one that is another study store's, or that cannot be adopted.
        """
        if self.adopting:
            return check_adoptable(self.definition, self.identity, self.weights, self.tracker, self.storage)
        name, tracker = self.definition.name, self.tracker
        tracker.check_study(name)
        record = check_own(name, tracker, self.storage)
        runs = tracker.trials(record) if record is not None else []
        check_runs(name, runs, tracker.store, self.storage, tracker.studies)
        return record if record is not None and record.store is None else None

    def open(self, write: Write) -> optuna.Study:
        """Open the study, which no other process can run now, and say when it changes hands."""
        record, name = self.check_owner(), self.definition.name
        if record is not None and self.adopting:
            write(adopt(self.definition, self.identity, self.tracker, record, self.storage))
        study = open_study(self.definition, self.storage, self.identity, self.weights, note=write)
        if record is not None and not self.adopting:
            write(f"study {name!r} in the tracking store belongs to this study store from now on")
        return study


def _guard(stack: ExitStack, study: optuna.Study, tracker: MlflowTracker, held: Held) -> None:
    """Let both stores take writes from this process as long as the study is its own, and no longer."""
    owner = Owner(tracker, study.study_name, study.user_attrs[STORE_TAG])

    def may() -> None:
        held.check()
        owner.check()

    tracker.guard(may)
    engine = engine_of(study)
    if engine is not None:
        stack.enter_context(fencing(engine, held))


@dataclass(frozen=True)
class _InUse:
    """The stores that a run works on: those that were named, or copies on this machine's disk; ``save`` copies back."""

    tracking: Store
    storage: Store
    artifacts: Path | None = None
    save: Callable[[Write], None] = lambda note: None


@contextmanager
def _stores_in_use(tracking: Store, storage: Store, options: RunOptions, study: str, write: Write) -> Iterator[_InUse]:
    if options.local_stores is None:
        if notice := without_log(tracking, storage):
            write(notice)
        yield _InUse(tracking, storage)
        return
    local = LocalStores(tracking, storage, options.local_stores)
    with ExitStack() as stack:
        if local.storage != storage:
            storage.check(create=True)
            stack.enter_context(holding(storage, study))
        local.restore(write)
        stack.callback(local.save, write)
        yield _InUse(local.tracking, local.storage, local.artifacts, local.save)


def run_study(definition: StudyDefinition, options: RunOptions, write: Write, begun: Begun) -> Summary:
    """Check a study, then run it to its total; ``write`` prints a line, ``begun`` are its processes."""
    tracking, storage = check_options(definition, options)
    with ExitStack() as stack:
        for store in (tracking, storage):
            store.leave_log()
        weights, on_ray = find_weights(definition, tracking), begun.cluster is not None
        surveyed = begun.local.ask(partial(survey, definition, options.verify, weights, on_ray), write)
        scratch = _scratch(stack)
        draft = _meanwhile(tracking, scratch)
        found = surveyed()
        executor = _executor(stack, begun, options, definition.config({}).dataset, found)
        identity = identity_of(definition, found.images.digest, found.weights, found.networks)
        used = stack.enter_context(_stores_in_use(tracking, storage, options, definition.name, write))
        tracker = MlflowTracker(used.tracking, used.artifacts, create=True, draft=draft)
        opening = _Opening(definition, identity, found.weights, tracker, used.storage, options.adopt)
        opening.check_owner()
        used.storage.check(create=True)
        held = stack.enter_context(holding(used.storage, definition.name))
        study = opening.open(write)
        _guard(stack, study, tracker, held)
        watcher = stack.enter_context(showing(write))
        await_outages(study, watcher.note)
        names = partial(_names, tracker)
        journal = Journal(own_folder(storage.folder, definition.name, tracking, names))
        journaling = JournalingTracker(tracker, journal, watcher.note, held.check)
        stack.callback(journaling.say_what_waits, definition.name, write)
        recorder = Recorder(
            journaling,
            definition,
            found.images,
            watcher.note,
            tags=provenance(),
            weights=found.weights,
            describe=partial(table_of, definition.name, used.tracking),
        )
        new_job = partial(job_of, definition, scratch, found.weights, cache_options(options))

        def make_job(queued: QueuedTrial) -> Job:
            sends = options.upload_from_workers
            upload = journaling.ask(tracker.destination, recorder.run_of(queued)) if sends else None
            return new_job(queued, upload, options.together > 1)

        queue = TrialQueue(definition, study, options.rows, options.resume_trials)
        limits = Limits(options.max_failures)
        ledger, ended = _ledger(definition, options, found.weights), partial(used.save, watcher.note)
        coordinator = Coordinator(queue, recorder, executor, watcher, make_job, limits, ledger, ended)
        stack.enter_context(_stoppable(coordinator, watcher))
        return coordinator.run(options.confirm)


def _meanwhile(tracking: Store, scratch: Path) -> Path | None:
    """Do what needs no worker while the first one imports torch and looks at the images: see :func:`draft_of`."""
    import scipy.stats  # noqa: F401  # for the intervals in the tables

    from caltech_sweep.report import build  # noqa: F401  # which makes them, while trials run and at the end

    return draft_of(tracking, scratch)


def _ledger(definition: StudyDefinition, options: RunOptions, weights: Weights) -> Ledger:
    if not definition.budget:
        return Ledger({})
    return Ledger(definition.budget, kept_epochs(options, images_of(definition.config({}).dataset), weights))


def _names(tracker: MlflowTracker) -> list[str]:
    return [record.name for record in tracker.studies()]


def replay(tracking_uri: Address, storage_uri: Address, write: Write) -> bool:
    """Bring to a tracking store what waits for it in journals; return whether all of it is there."""
    tracking, storage = tracking_store(tracking_uri), study_store(storage_uri)
    found = journals(storage.folder, tracking, lambda: _names(MlflowTracker(tracking)))
    if not found:
        write("nothing waits to be replayed")
        return True
    tracker, complete = MlflowTracker(tracking), True
    for study, folder in found:
        try:
            check_own(study, tracker, storage)
            with holding(storage, study) as held:
                tracker.guard(held.check)
                journaling = JournalingTracker(tracker, Journal(folder), write, held.check)
                complete = journaling.replay() and complete
                journaling.say_what_waits(study, write)
        except (ForeignStudyError, LostStudyError) as error:
            write(str(error))
            complete = False
    return complete
