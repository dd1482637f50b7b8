"""What a study trains, and on which images: looked at before anything is written, by a process that can train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich import filesize

from caltech_sweep.config import TrialConfig
from caltech_sweep.data.splits import SPLITS, Split
from caltech_sweep.errors import DatasetError, ModelError, UsageError
from caltech_sweep.files import file_digest
from caltech_sweep.study.definition import Dimension, Range, StudyDefinition, SubsetOf, variants
from caltech_sweep.study.file import weights_key
from caltech_sweep.sweep.executors.worker import load_images
from caltech_sweep.text import progress_line
from caltech_sweep.tracking.records import GREY_BITS, DatasetInfo, InitialWeights
from caltech_sweep.training.augment import AUGMENTATIONS

if TYPE_CHECKING:
    from caltech_sweep.data.images import LoadedData

_LONGEST_TAG = 5000  # characters, which every tracking store takes
Weights = dict[str, InitialWeights]  # by ``weights_key``


def digested(path: Path, run_id: str | None = None) -> InitialWeights:
    """Return a file of weights and its contents' name; raise ModelError when it is not there or cannot be read."""
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
                found[weights_key(config)] = digested(path)
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


def own_networks(definition: StudyDefinition) -> dict[str, str]:
    """Return what the code of each network of the user's own is, by its name."""
    from caltech_sweep.training.networks import SOURCE, source_of

    archs = {config.arch for config in variants(definition, ("arch",))}
    return {arch: version[SOURCE] for arch in sorted(archs) if SOURCE in (version := source_of(arch).version(arch))}


@dataclass(frozen=True)
class Survey:
    """What a study trains: its images as runs record them, all its initial weights, and its own networks' code."""

    images: DatasetInfo
    weights: Weights
    networks: Mapping[str, str]
    split: Split | None = None  # where it is asked for: that of a large data set takes long to send

    @property
    def fingerprint(self) -> str:
        """The digest of the images."""
        return self.images.digest


def survey(
    definition: StudyDefinition, verify: bool, found: Weights, with_split: bool, write: Callable[[str], None]
) -> Survey:
    """Make a study's images and published weights ready, and try its networks; ``found`` are its other weights.

    ``write`` is told what the user should know. Raises the error of whatever is wrong with them; nothing is written but
    caches. The images stay loaded for the trials that this process trains.
    """
    dataset = definition.config({}).dataset
    with progress_line("decoding images", write) as progress:
        data = load_images(dataset, progress, write, verify)
    with progress_line("downloading published weights", write, filesize.decimal) as progress:
        weights = found | published_weights(definition, progress)
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
    return Survey(images, weights, own_networks(definition), data.split if with_split else None)
