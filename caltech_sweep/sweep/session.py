"""Runs and plans of a study: everything is checked before anything is written."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from caltech_sweep import paths, stores
from caltech_sweep.data import load_dataset
from caltech_sweep.data.images import LoadedData
from caltech_sweep.data.splits import PARTS
from caltech_sweep.errors import DatasetError, StoreError, UsageError
from caltech_sweep.journal import Journal, JournalingTracker, journal_folder, journals
from caltech_sweep.sweep.coordinator import Coordinator, Images, Limits, Summary
from caltech_sweep.sweep.executors import Executor, InProcessExecutor, ProcessExecutor
from caltech_sweep.sweep.rules import suggestion
from caltech_sweep.sweep.runner import train
from caltech_sweep.sweep.study import await_outages, open_study
from caltech_sweep.sweep.study_file import StudyDefinition, variants
from caltech_sweep.sweep.watch import LiveWatcher, PlainWatcher, Watcher, progress_line
from caltech_sweep.tracking import MlflowTracker, git_state, is_outage
from caltech_sweep.training.reuse import StageUse
from caltech_sweep.workplaces import remove_abandoned, workplace

_SCRATCH = "caltech-sweep-run-"  # the folder of what trials leave, until the tracking store has it
Weights = dict[str, tuple[str, Path]]


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about where and how trials run; None leaves it to the machine."""

    tracking_uri: str | None = None
    storage: str | None = None
    workers: int | None = None  # processes; one a GPU, one on the CPU
    per_device: int = 1  # workers sharing a GPU
    device: str | None = None
    threads: int | None = None  # of torch in each worker; all cores
    in_process: bool = False
    rows: tuple[str, ...] = ()  # these alone
    confirm: int = 0  # so many of the best sampled trials are repeated on fresh seeds
    reuse: bool = True  # share training states and frozen features between trials, and go on from them
    hang_timeout: float = Limits.hang_seconds  # seconds without a sign after which a worker is killed
    max_failures: int = Limits.failures_in_a_row  # failed trials in a row that stop the study
    stage_budget: float | None = None  # GB of these; None: 20 GB, or a tenth of the free disk if that is less


def find_weights(definition: StudyDefinition, tracking_uri: str | None) -> Weights:
    """Resolve every ``run:`` and ``study:`` weights of a study to a run and its checkpoint file."""
    from caltech_sweep.training.artifacts import CHECKPOINT

    found: Weights = {}
    for config in variants(definition, ("weights",)):
        kind, _, name = config.weights.partition(":")
        if kind not in ("run", "study") or config.weights in found:
            continue
        tracker = MlflowTracker(tracking_uri)
        run_id = tracker.best_trial(name).run_id if kind == "study" else name
        found[config.weights] = (run_id, tracker.checked_artifact(run_id, CHECKPOINT))
    return found


def check(
    definition: StudyDefinition, data: LoadedData, weights: Weights, progress: Callable[[int, int], None]
) -> None:
    """Raise the error that the first trial would meet: a model that cannot be built, a batch that cannot be filled.

    ImageNet weights that are not there are downloaded, of which ``progress`` is told.
    """
    from caltech_sweep.training.models import count_parameters, fetch_imagenet

    classes, images = len(data.split.classes), len(data.split.train)
    for part in PARTS:
        if not data.split.part(part):
            raise DatasetError(f"the {part} part of the dataset is empty; raise its fraction or the number of images")
    seen = set()
    for config in variants(definition, ("arch", "weights", "outputs", "freeze", "batch_size", "drop_last")):
        if config.outputs is not None and config.outputs < classes:
            raise UsageError(f"outputs: {config.outputs} outputs cannot tell {classes} classes apart; leave it out")
        if config.drop_last and config.batch_size > images:
            raise UsageError(
                f"batch_size: {config.batch_size} is more than the {images} training images, and drop_last leaves out "
                "a batch that is not full; lower it (--set batch_size=...) or set drop_last to false"
            )
        model = (config.arch, config.weights, config.outputs, config.freeze)
        if model not in seen:
            seen.add(model)
            if config.weights == "imagenet":
                fetch_imagenet(config.arch, progress)
            count_parameters(config, classes, weights.get(config.weights, ("", None))[1])


def stage_use(options: RunOptions) -> StageUse | None:
    """Return where trials find and leave what can be reused."""
    if not options.reuse:
        return None
    from caltech_sweep.training.store import default_budget

    folder = paths.reuse_store().resolve()
    budget = default_budget(folder) if options.stage_budget is None else int(options.stage_budget * 10**9)
    return StageUse(folder, budget)


def table_of(study: str, tracking_uri: str) -> str:
    """Return the table of a study as Markdown, with the best three sampled trials."""
    from caltech_sweep.report.build import build_report

    return build_report([study], "markdown", 3, tracking_uri)


def make_executor(options: RunOptions) -> Executor:
    """Return the executor that the options and the machine ask for."""
    import torch

    devices = [options.device] if options.device else [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    cores = os.cpu_count() or 1
    threads = options.threads or cores
    if options.in_process:
        torch.set_num_threads(threads)
        return InProcessExecutor(train, devices[0])
    workers = options.workers or len(devices) * options.per_device
    if workers * threads > cores:  # threads that spin while they wait would hold the others up
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return ProcessExecutor(train, workers, devices, threads)


@contextmanager
def _stoppable(coordinator: Coordinator, watcher: Watcher) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM stop cleanly, and a second one at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        watcher.note("Stopping: the running trials go back to waiting. Press Ctrl-C again to stop at once.")
        coordinator.request_stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_rows(definition: StudyDefinition, rows: tuple[str, ...]) -> None:
    names = [row.name for row in definition.rows]
    for name in rows:
        if name not in names:
            raise UsageError(f"--row: study {definition.name!r} has no row {name!r}{suggestion(name, names)}")


@dataclass(frozen=True)
class _Checked:
    """What a run starts from, once nothing that can be known before is wrong."""

    tracking: str
    storage: str
    weights: Weights
    data: LoadedData
    images: Images


def _checked(definition: StudyDefinition, options: RunOptions, write: Callable[[str], None]) -> _Checked:
    """Raise the error of whatever is wrong with a study, its data or the options; nothing is written but caches."""
    from caltech_sweep.training.trial import pick_device

    _check_rows(definition, options.rows)
    pick_device(options.device)
    tracking, storage = stores.tracking_uri(options.tracking_uri), stores.storage_uri(options.storage)
    if tracking == storage:
        raise UsageError("--storage: MLflow and Optuna cannot share one database; name another file")
    weights = find_weights(definition, options.tracking_uri)
    dataset = definition.config({}).dataset
    data = load_dataset(dataset, progress_line("decoding images", write))
    check(definition, data, weights, progress_line("downloading ImageNet weights", write, 1e6, " MB"))
    parts = {part: len(data.split.part(part)) for part in PARTS}
    images = Images(data.fingerprint, parts, dataset.root or dataset.name, len(data.split.classes))
    return _Checked(tracking, storage, weights, data, images)


def _watcher(stack: ExitStack, write: Callable[[str], None]) -> Watcher:
    """Return a live table on a terminal, and plain lines elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    return stack.enter_context(LiveWatcher(console)) if console.is_terminal else PlainWatcher(write)


def _scratch(stack: ExitStack) -> Path:
    """Return a folder for what trials leave; those of runs that were killed are removed."""
    try:
        place = Path(tempfile.gettempdir())
        remove_abandoned(place.glob(f"{_SCRATCH}*"))
        return stack.enter_context(workplace(place, _SCRATCH))
    except OSError as error:
        raise StoreError(
            f"there is no room for temporary files ({error.strerror or error}); make some, or name another folder with "
            "the environment variable TMPDIR"
        ) from error


def run_study(definition: StudyDefinition, options: RunOptions, write: Callable[[str], None]) -> Summary:
    """Check a study, then run it to its total; ``write`` prints a line."""
    checked = _checked(definition, options, write)
    tracker = MlflowTracker(checked.tracking, create=True)
    stores.check_file(checked.storage, "study store", create=True)
    identity = {
        **definition.identity(),
        "images": checked.images.digest,
        "initial_weights": {name: run_id for name, (run_id, _) in checked.weights.items()},
    }
    with ExitStack() as stack:
        stack.enter_context(stores.only_one(checked.storage, definition.name))
        study = open_study(definition, checked.storage, identity)
        watcher = _watcher(stack, write)
        await_outages(study, watcher.note)
        journal = Journal(journal_folder(stores.journal_root(checked.storage), definition.name, checked.tracking))
        journaling = JournalingTracker(tracker, journal, is_outage, watcher.note)
        stack.callback(journaling.say_what_waits, definition.name, write)
        scratch = _scratch(stack)
        executor = make_executor(options)
        stack.callback(executor.close)
        coordinator = Coordinator(
            definition,
            study,
            journaling,
            executor,
            watcher,
            scratch,
            checked.images,
            weights=checked.weights,
            tags=git_state(),
            only=options.rows,
            stages=stage_use(options),
            confirm=options.confirm,
            describe=partial(table_of, definition.name, checked.tracking),
            limits=Limits(options.hang_timeout, options.max_failures),
        )
        stack.enter_context(_stoppable(coordinator, watcher))
        return coordinator.run()


def replay(tracking_uri: str | None, storage_uri: str | None, write: Callable[[str], None]) -> bool:
    """Bring to a tracking store what waits for it in journals; return whether all of it is there."""
    tracking, storage = stores.tracking_uri(tracking_uri), stores.storage_uri(storage_uri)
    found = journals(stores.journal_root(storage), tracking)
    if not found:
        write("nothing waits to be replayed")
        return True
    tracker, complete = MlflowTracker(tracking), True
    for study, folder in found.items():
        with stores.only_one(storage, study):
            journaling = JournalingTracker(tracker, Journal(folder), is_outage, write)
            complete = journaling.replay() and complete
            journaling.say_what_waits(study, write)
    return complete
