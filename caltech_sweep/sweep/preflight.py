"""Everything that is checked before a study writes anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import filesize

from caltech_sweep import machine, paths
from caltech_sweep.artifacts import CHECKPOINT
from caltech_sweep.config import TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.data.images import LoadedData
from caltech_sweep.data.splits import SPLITS, Split
from caltech_sweep.errors import CaltechSweepError, DatasetError, ModelError, UsageError
from caltech_sweep.files import file_digest
from caltech_sweep.stores import Store, study_store, tracking_store
from caltech_sweep.study.definition import Dimension, Range, StudyDefinition, SubsetOf, variants
from caltech_sweep.study.file import weights_key
from caltech_sweep.study.site import within
from caltech_sweep.sweep.options import OF_RAY, RunOptions
from caltech_sweep.sweep.optuna_store import by_content, check_resumable
from caltech_sweep.sweep.recorder import DatasetInfo
from caltech_sweep.text import progress_line, suggestion
from caltech_sweep.tracking.records import GREY_BITS, InitialWeights
from caltech_sweep.tracking.writer import MlflowTracker, nothing_complete
from caltech_sweep.training.augment import AUGMENTATIONS

_LONGEST_TAG = 5000  # characters, which every tracking store takes
Weights = dict[str, InitialWeights]  # by ``weights_key``


def find_weights(definition: StudyDefinition, tracking: Store) -> Weights:
    """Resolve every ``file:``, ``run:`` and ``study:`` of a study to a file, its contents and the run it is of."""
    found: Weights = {}
    for config in variants(definition, ("weights",)):
        kind, _, name = config.weights.partition(":")
        if kind not in ("file", "run", "study") or config.weights in found:
            continue
        if kind == "file":
            found[config.weights] = _digested(paths.expanded(name))
            continue
        if kind == "study" and tracking.is_missing:
            raise nothing_complete(name, tracking)
        tracker = MlflowTracker(tracking)
        near = within(definition.name.rpartition("/")[0], name)  # a study of the same namespace comes first
        if kind == "study" and near is not None and near != name and tracker.study(near) is not None:
            name = near
        run_id = tracker.best_trial(name).run_id if kind == "study" else name
        found[config.weights] = _digested(tracker.checked_artifact(run_id, CHECKPOINT), run_id)
    return found


def _digested(path: Path, run_id: str | None = None) -> InitialWeights:
    try:
        if path.exists() and not path.is_file():  # a device may have no end
            raise ModelError(f"weights: {path} is no file")
        return InitialWeights(path, file_digest(path), run_id)
    except FileNotFoundError as error:
        where = "" if path.is_absolute() else f" in {Path.cwd()}, from where its path counts"
        raise ModelError(f"weights: there is no file {path}{where}; put it there, or name another") from error
    except OSError as error:
        raise ModelError(f"weights: {path} cannot be read ({error.strerror})") from error


def published_weights(definition: StudyDefinition, progress: Callable[[int, int], None] | None) -> Weights:
    """Resolve the published weights of a study to files and their contents.

    Those that are not there are downloaded, of which ``progress`` is told; without it they are left out.
    """
    from caltech_sweep.training.networks import source_of

    found: Weights = {}
    for config in variants(definition, ("arch", "weights")):
        if config.pretrained and weights_key(config) not in found:
            source = source_of(config.arch)
            path = source.published_file(config.arch) if progress is None else source.fetch(config.arch, progress)
            if path is not None:
                found[weights_key(config)] = _digested(path)
    return found


def _batch_sizes(definition: StudyDefinition, config: TrialConfig, images: int) -> Iterator[TrialConfig]:
    """Yield a config that is sampled with every batch size that a range of them may give it.

    Of those above the number of ``images``, which all give one batch, it is the first.
    """
    sizes = definition.space.get("batch_size")
    if not isinstance(sizes, Range):
        yield config
        return
    for size in sizes.integers:
        yield replace(config, batch_size=size)
        if size > images:
            return


def _variants(definition: StudyDefinition, images: int) -> Iterator[TrialConfig]:
    """Yield every row, and every sampled combination of what decides whether a network can be trained."""
    yield from (definition.row_config(row) for row in definition.rows)
    keys = ("arch", "weights", "outputs", "freeze", "unfreeze_epoch", "batch_size", "drop_last")
    for config in variants(definition, keys, rows=False):
        yield from _batch_sizes(definition, config, images)


def _needs_whole_images(definition: StudyDefinition) -> str | None:
    """Return what of a study needs more of an image than its centre crop."""
    subset = definition.space.get("augment")
    ops = set(subset.values if isinstance(subset, SubsetOf) else ())
    for config in variants(definition, ("test_views", "augment")):
        if config.test_views == "tencrop":
            return "TenCrop"
        ops.update(config.augment)
    return next((op for op in sorted(ops) if AUGMENTATIONS[op].cuts is not None), None)


def check(definition: StudyDefinition, data: LoadedData, weights: Weights) -> None:
    """Raise the error that a trial would meet: a network that cannot be built or trained, a batch that is not filled.

    Every network of the study takes one step, without numbers, in the shapes that it will meet.
    """
    from caltech_sweep.training.rehearsal import batch_kinds, rehearse

    classes, images = len(data.split.classes), len(data.split.train)
    for part in SPLITS:
        if not data.split.part(part) and part != "test":
            raise DatasetError(f"the {part} part of the dataset is empty; raise its fraction or the number of images")
    if definition.dataset.get("cache") == "crop" and (what := _needs_whole_images(definition)):
        raise UsageError(f"dataset.cache: crop keeps centre crops only, and {what} needs whole images; set it to jpeg")
    seen = set()
    for config in _variants(definition, images):
        if config.outputs is not None and config.outputs < classes:
            raise UsageError(f"outputs: {config.outputs} outputs cannot tell {classes} classes apart; leave it out")
        if config.drop_last and config.batch_size > images:
            raise UsageError(
                f"batch_size: {config.batch_size} is more than the {images} training images, and drop_last leaves out "
                "a batch that is not full; lower it (--set batch_size=...) or set drop_last to false"
            )
        batches = batch_kinds(config, images)
        model = (config.arch, config.weights, config.outputs, config.freeze, config.thaws(config.epochs), batches)
        if model not in seen:
            seen.add(model)
            source = weights.get(weights_key(config))
            if config.pretrained and source is None:  # not here yet; they cannot be held against the model
                config = replace(config, weights="none")
            rehearse(config, classes, batches, *((source.path, source.digest) if source else ()))


def _check_rows(definition: StudyDefinition, rows: tuple[str, ...]) -> None:
    names = [row.name for row in definition.rows]
    for name in rows:
        if name not in names:
            raise UsageError(f"--row: study {definition.name!r} has no row {name!r}{suggestion(name, names)}")


def cache_place(options: RunOptions) -> tuple[Path, str | None]:
    """Return the folder of what trials share on this machine, and the address that it is a copy of, if it is one."""
    given = options.cache
    if given is not None and "://" not in given:
        return paths.expanded(given).resolve(), None
    return paths.cache_folder().resolve(), given


def check_executor(options: RunOptions) -> None:
    """Raise UsageError for options of one executor that are given to another."""
    on_ray = options.executor == "ray"
    if on_ray and options.in_process:
        raise UsageError("--executor ray: trains in the processes of a cluster; leave --in-process out")
    if on_ray and (options.workers or options.per_device != RunOptions.per_device):
        raise UsageError("--executor ray: takes --slots and --gpus-per-trial in place of --workers and --per-device")
    for name in OF_RAY:
        if not on_ray and getattr(options, name) not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')}: is for --executor ray")


@dataclass(frozen=True)
class _Checked:
    """What a run starts from, once nothing that can be known before is wrong."""

    tracking: Store
    storage: Store
    weights: Weights
    data: LoadedData
    images: DatasetInfo


def check_options(definition: StudyDefinition, options: RunOptions) -> tuple[Store, Store]:
    """Return the tracking and the study store.

    Raises UsageError for options that no run takes, StoreError for a store that cannot be written.
    """
    from caltech_sweep.training.device import pick_device
    from caltech_sweep.training.mirror import check_address

    _check_rows(definition, options.rows)
    check_executor(options)
    if options.executor != "ray":
        pick_device(options.device)
    if url := cache_place(options)[1]:
        check_address(url)
    tracking, storage = tracking_store(options.tracking_uri), study_store(options.storage)
    if tracking.is_same(storage):
        raise UsageError("--storage: MLflow and Optuna cannot share one database; name another file")
    if options.upload_from_workers and tracking.is_local:
        raise UsageError(
            f"--upload-from-workers: the artifacts of {tracking.shown} are kept on this machine; name a tracking "
            "server with --tracking-uri, or leave it out"
        )
    tracking.check_writable()
    storage.check_writable()
    if options.resume_trials and (options.rows or options.confirm):
        raise UsageError("--resume-trial: runs nothing but the trials it names; leave --row and --confirm out")
    check_resumable(definition.name, storage, options.resume_trials)
    return tracking, storage


def identity_of(definition: StudyDefinition, data: LoadedData, weights: Weights) -> dict[str, Any]:
    """Return what must stay the same of a study under its name: its definition, images, weights and networks."""
    from caltech_sweep.training.networks import SOURCE, source_of

    initial = {name: source.digest for name, source in weights.items()}
    known = by_content(definition.identity(), weights)
    archs = {config.arch for config in variants(definition, ("arch",))}
    own = {arch: version[SOURCE] for arch in sorted(archs) if SOURCE in (version := source_of(arch).version(arch))}
    return {**known, "images": data.fingerprint, "initial_weights": initial, **({"networks": own} if own else {})}


def kept_epochs(options: RunOptions, data: LoadedData | None, weights: Weights | None) -> Callable[[TrialConfig], int]:
    """Return what tells how many epochs of a trial are kept from earlier trials of any study."""
    if data is None or weights is None or not options.reuse or options.address is not None:
        return lambda config: 0  # what other machines keep is not known here
    import torch

    from caltech_sweep.training.checkpoints import stored_epochs
    from caltech_sweep.training.device import pick_device
    from caltech_sweep.training.keys import CacheOptions

    torch.set_num_threads(options.threads or machine.threads())
    device, use = pick_device(options.device), CacheOptions(cache_place(options)[0], 0)

    def kept(config: TrialConfig) -> int:
        try:
            source = weights.get(weights_key(config))
            return stored_epochs(config, data, device, source.path if source else None, use)
        except CaltechSweepError:  # weights that are not there; the run is refused for that anyway
            return 0

    return kept


def _full_batch_sizes(definition: StudyDefinition, images: int) -> set[int]:
    """Return the batch sizes of trials that drop a batch which is not full, of those that fill one."""
    configs = [*variants(definition, ("batch_size", "drop_last"))]
    dimension: Dimension | None = definition.space.get("batch_size")
    sizes: set[int] = set()
    if isinstance(dimension, Range):
        if any(config.drop_last for config in variants(definition, ("drop_last",), rows=False)):
            sizes = {size for size in dimension.integers if size <= images}
        configs = [definition.row_config(row) for row in definition.rows]
    return sizes | {config.batch_size for config in configs if config.drop_last and config.batch_size <= images}


def left_out(definition: StudyDefinition, split: Split) -> list[str]:
    """Return sentences about what no epoch sees: files that are passed over, and images that drop_last leaves out."""
    sentences = [f"passed over: {split.passed_over}"] if split.passed_over else []
    sentences += split.notes
    images = len(split.train)
    worst = max(sorted(_full_batch_sizes(definition, images)), key=lambda size: images % size, default=1)
    if images % worst * 10 > images:
        sentences.append(
            f"drop_last leaves out {images % worst:,} of the {images:,} training images in every epoch of batch_size "
            f"{worst}; choose another batch_size, or set drop_last to false"
        )
    return sentences


def _checked(
    definition: StudyDefinition, options: RunOptions, tracking: Store, storage: Store, write: Callable[[str], None]
) -> _Checked:
    """Raise the error of whatever is wrong with a study, its data or its stores; nothing is written but caches.

    A store that a run can use only without its write-ahead log loses that here.
    """
    for store in (tracking, storage):
        store.leave_log()
    weights = find_weights(definition, tracking)
    dataset = definition.config({}).dataset
    with progress_line("decoding images", write) as progress:
        data = load_dataset(dataset, progress, write, options.verify)
    with progress_line("downloading published weights", write, filesize.decimal) as progress:
        weights |= published_weights(definition, progress)
    check(definition, data, weights)
    for sentence in left_out(definition, data.split):
        write(sentence)
    parts = {part: len(data.split.part(part)) for part in SPLITS}
    tags = {"dataset.passed_over": data.split.passed_over[:_LONGEST_TAG]} if data.split.passed_over else {}
    if data.split.notes:
        tags["dataset.notes"] = "; ".join(data.split.notes)[:_LONGEST_TAG]
    if data.grey_bits < 16:
        tags[GREY_BITS] = str(data.grey_bits)
    images = DatasetInfo(data.fingerprint, parts, dataset.root or dataset.name, len(data.split.classes), tags)
    return _Checked(tracking, storage, weights, data, images)
