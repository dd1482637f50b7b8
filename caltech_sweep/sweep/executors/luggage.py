"""What a node needs for its trials beyond the package: the images, the initial weights, and a place to keep things.

A node that sees the coordinator's data folder works in it, as a worker process of one machine does. Another one has a
folder of its own, and takes images and weights from paths that it can read, or else from the coordinator: once a node,
as the original files, whose contents decide the digest that they must have.
"""

from __future__ import annotations

import hashlib
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from caltech_sweep import paths
from caltech_sweep.config import DatasetConfig
from caltech_sweep.data import image_files, load_dataset, load_files, open_dataset
from caltech_sweep.data.fetch.remote import is_remote
from caltech_sweep.data.registry import dataset_of, fetch_root
from caltech_sweep.data.splits import Split, moved
from caltech_sweep.errors import CaltechSweepError, DatasetError, ModelError
from caltech_sweep.files import create_atomically, file_digest, locked
from caltech_sweep.heartbeat import beat, leaving
from caltech_sweep.sweep.executors.base import Epochs, Job
from caltech_sweep.sweep.executors.worker import train
from caltech_sweep.training.cache import default_budget
from caltech_sweep.training.mirror import wait_until_sent

if TYPE_CHECKING:
    from caltech_sweep.data.images import LoadedData

BLOCK = 16 << 20  # bytes that travel at once, or the first image that is larger
_OWN = "~/.cache/caltech-sweep"  # where a node keeps things that names no other place
_HOME = "CALTECH_SWEEP_DATA"


class Supply(Protocol):
    """What hands out the coordinator's files."""

    def images(self, first: int) -> list[bytes]:
        """Return the contents of some images, by their numbers in the split, from ``first`` on."""

    def weights(self, digest: str, start: int) -> bytes:
        """Return a part of the file of weights with this SHA-256; nothing at its end."""


class Files:
    """The coordinator's files, in parts; runs on its machine."""

    def __init__(self, luggage: Luggage, weights: Mapping[str, Path]) -> None:
        os.environ[_HOME] = str(luggage.home)
        self._read = dataset_of(luggage.dataset).read(luggage.dataset)
        self._images, self._weights = image_files(luggage.split), dict(weights)

    def images(self, first: int) -> list[bytes]:
        """Return the contents of the images from number ``first`` on, about BLOCK bytes of them."""
        block: list[bytes] = []
        room = BLOCK
        for path in self._images[first:]:
            block.append(self._read(path))
            room -= len(block[-1])
            if room <= 0:
                break
        return block

    def weights(self, digest: str, start: int) -> bytes:
        """Return a part of a file of weights."""
        with self._weights[digest].open("rb") as file:
            file.seek(start)
            return file.read(BLOCK)


@dataclass(frozen=True)
class Luggage:
    """What every slot of a study is told once; the paths are the coordinator's."""

    home: Path  # its data folder
    mark: Path  # a folder in that, which is there while the study runs: a node that sees it shares the data folder
    dataset: DatasetConfig
    split: Split
    root: Path | None  # what the names of images are relative to
    fingerprint: str  # of the images
    supply: Supply | None = None  # None where every node is the coordinator's machine
    shared_cache: bool = False  # every node sees the folder of training states
    cache_size: int | None = None  # bytes of a node's own; None: its default


class Listed(Protocol):
    """A data set, with its pixels or without them."""

    @property
    def split(self) -> Split | None:
        """Which images are in which part; None where nobody needed it."""

    @property
    def fingerprint(self) -> str:
        """The digest of the images."""


def luggage_of(dataset: DatasetConfig, data: Listed, root: Path | None, mark: Path) -> Luggage:
    """Return what the slots of a study need to know, for processes that work in other folders."""
    split = data.split
    assert split is not None
    if root is not None:
        split, root = moved(split, root, root.absolute()), root.absolute()
    if dataset.root and not is_remote(dataset.root):
        dataset = replace(dataset, root=str(paths.expanded(dataset.root).absolute()))
    elif root is not None and not dataset.root:
        dataset = replace(dataset, root=str(root))
    return Luggage(mark.parent.absolute(), mark.absolute(), dataset, split, root, data.fingerprint)


@contextmanager
def _arriving(target: Path) -> Iterator[bool]:
    """Let one process of a node bring something to its place, and tell it whether that is still to be done."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f"{target.name}.lock"), math.inf):
        yield not target.exists()


class Trainer:
    """Trains jobs on a node; the first one brings there what the node lacks."""

    def __init__(self, luggage: Luggage) -> None:
        self._luggage = luggage
        self._loaded: LoadedData | None = None
        self._weights: dict[str, Path] = {}  # by digest

    def __call__(self, job: Job) -> Epochs:
        """Train one job with what this node has."""
        if not os.environ.get(_HOME):
            shared = self._luggage.mark.is_dir()
            os.environ[_HOME] = str(self._luggage.home) if shared else os.path.expanduser(_OWN)
        if job.stages is not None and not self._luggage.shared_cache:
            folder = paths.cache_folder().resolve()
            size = self._luggage.cache_size
            budget = default_budget(folder) if size is None else size
            job = replace(job, stages=replace(job.stages, folder=folder, budget=budget))
        if job.weights_file is not None and job.weights_digest is not None:
            job = replace(job, weights_file=self._weights_file(job.weights_file, job.weights_digest))
        try:
            return (yield from train(job, self._data))
        finally:
            if leaving.is_set() and job.stages is not None:
                wait_until_sent(job.stages)

    def _data(self, config: DatasetConfig) -> LoadedData:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> LoadedData:
        """Return the images: drawn, from a path that this node can read, or from the coordinator."""
        known = self._luggage
        if dataset_of(known.dataset).images is not None:
            return load_dataset(known.dataset)
        with suppress(CaltechSweepError, OSError):
            fetch_root(known.dataset)
            data = open_dataset(known.dataset)
            if data.fingerprint == known.fingerprint:
                return data
        folder = paths.data_home() / "received" / known.fingerprint
        split = moved(known.split, known.root, folder)
        with _arriving(folder) as missing:
            if missing:
                self._bring_images(folder, split)
        data = load_files(known.dataset, split, folder)
        if data.fingerprint != known.fingerprint:
            raise DatasetError(
                f"the images in {folder} on {socket.gethostname()} are not those of the study; remove that folder, and "
                "install the same torchvision and Pillow on every machine"
            )
        return data

    def _bring_images(self, folder: Path, split: Split) -> None:
        supply = self._luggage.supply
        if supply is None:
            raise DatasetError(f"{socket.gethostname()} cannot read the images of the study")
        with create_atomically(folder) as made:
            targets = [made / path.relative_to(folder) for path in image_files(split)]
            done = 0
            while done < len(targets):
                block = supply.images(done)
                for target, content in zip(targets[done:], block, strict=False):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content)
                done += len(block)
                beat()

    def _weights_file(self, file: Path, digest: str) -> Path:
        """Return where this node has a file of weights: where the coordinator has it, or where it was brought to."""
        if digest not in self._weights:
            there = False
            with suppress(OSError):
                there = file_digest(file) == digest
            self._weights[digest] = file if there else self._bring_weights(file.name, digest)
        return self._weights[digest]

    def _bring_weights(self, name: str, digest: str) -> Path:
        supply, target = self._luggage.supply, paths.data_home() / "received" / digest / name
        with _arriving(target) as missing:
            if missing and supply is None:
                raise ModelError(f"{socket.gethostname()} cannot read the initial weights {name}")
            if missing and supply is not None:
                content = hashlib.sha256()
                with create_atomically(target) as made, made.open("wb") as file:
                    while block := supply.weights(digest, file.tell()):
                        content.update(block)
                        file.write(block)
                        beat()
                    if content.hexdigest() != digest:
                        raise ModelError(f"the initial weights {name} changed while the study ran; run it again")
        return target
