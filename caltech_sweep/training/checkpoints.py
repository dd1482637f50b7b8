"""States of a training under the key of all that decided them: where a trial starts, and what it leaves.

A stage is the state after some epoch: weights, optimiser state, the best-on-val weights so far and the history of
epochs. Resuming after a kill, sharing between trials and skipping a repeated trial are all the same search for the
longest stage on a trial's own list of learning rates. Frozen weights are not stored: the key names where they came
from, and the model a trial starts from has them.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from caltech_sweep.config import TrialConfig
from caltech_sweep.data.images import LoadedData
from caltech_sweep.errors import ModelError
from caltech_sweep.files import file_digest
from caltech_sweep.heartbeat import EVERY, beat, leaving
from caltech_sweep.machine import free_memory
from caltech_sweep.metrics import objective
from caltech_sweep.paths import expanded
from caltech_sweep.training.augment import versions
from caltech_sweep.training.cache import Cache
from caltech_sweep.training.device import numerics
from caltech_sweep.training.evaluate import Evaluation
from caltech_sweep.training.fit import EpochResult, Training, steps_of
from caltech_sweep.training.keys import (
    AUGMENTATION_VERSION,
    FROZEN_VERSION,
    SPLIT_BEFORE,
    CacheOptions,
    checkpoint_keys,
    digest,
    epoch_marks,
    may_train_together,
    recipe,
)
from caltech_sweep.training.mirror import store_of
from caltech_sweep.training.models import load_state, resting
from caltech_sweep.training.networks import source_of
from caltech_sweep.training.stopping import last_epoch

SAVING_SHARE = 0.02  # of the training time, for saves that only serve resuming
REPEAT_SHARE = 0.05  # of what it saves, for the save of a last state that no known trial goes on from
CHEAP = 0.3  # seconds of a save that are not worth asking for
_HEADER_ROOM = 100_000  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """The state after an epoch: a header that JSON can hold, and tensors by dotted name, all on the CPU."""

    header: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the tensors below ``prefix``, by the rest of their names."""
        start = f"{prefix}."
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}


@lru_cache(maxsize=64)
def _known_digest(path: Path, size: int, changed: int) -> str:
    return file_digest(path)


def initial_weights(config: TrialConfig, weights_file: Path | None, known: str | None = None) -> str:
    """Return what names the initial weights: the contents of a file, whatever its name.

    Published weights go by the name of their file where it holds a checksum, which is checked when they are read.
    ``known`` is the file's SHA-256, where that is checked when it is read; otherwise it is computed here. Raises
    ModelError for a file that is not there.
    """
    if config.weights == "none":
        return "none"
    source, published = source_of(config.arch), config.pretrained
    if published and (key := source.published_key(config.arch)) is not None:
        return f"imagenet {key}"
    if known is not None:
        return f"file {known}"
    path = expanded(config.weights[5:]) if config.weights.startswith("file:") else weights_file
    if published:
        path = source.published_file(config.arch)
    try:
        if path is None:
            raise FileNotFoundError
        status = path.stat()
        return f"file {_known_digest(path, status.st_size, status.st_mtime_ns)}"
    except OSError as error:
        raise ModelError(f"weights: there is no file {path} for {config.weights}") from error


def identity(
    config: TrialConfig,
    data: LoadedData,
    device: torch.device,
    weights_file: Path | None,
    use: CacheOptions,
    known: str | None = None,
) -> dict[str, Any]:
    """Return all that decides a training's weights but its learning rates, as one dict that JSON can hold.

    Whether the outputs of frozen layers are kept changes no bit on the CPU; elsewhere this is not certain, so there it
    counts. One that trains with others counts as such, whoever they are.
    """
    together = {"together": True} if use.together and may_train_together(config) else {}
    augmentation = {"augmentation": AUGMENTATION_VERSION, **versions(config.augment)} if config.augment else {}
    frozen = {"frozen": FROZEN_VERSION} if config.freeze == "conv" and not config.arch.startswith(SPLIT_BEFORE) else {}
    return {
        **recipe(config),
        **augmentation,
        **frozen,
        **together,
        **source_of(config.arch).version(config.arch),
        "initial": initial_weights(config, weights_file, known),
        "outputs": config.outputs or len(data.split.classes),
        "data": data.fingerprint,
        "crop": config.dataset.crop,
        "surroundings": numerics(config, device),
        "features": use.features and device.type != "cpu",
    }


def _names(config: TrialConfig, identity: dict[str, Any], steps: int) -> list[str]:
    """Return the name of the stage after each epoch of so many steps."""
    return [f"stage-{key}" for key in checkpoint_keys(digest(identity), epoch_marks(config, steps))]


def stored_epochs(
    config: TrialConfig, data: LoadedData, device: torch.device, weights_file: Path | None, use: CacheOptions
) -> int:
    """Return how many epochs of a trial are in the store already, without training or building anything.

    torch's number of threads must be the one of the training. Whether the stage is sound shows when it is used.
    """
    known = identity(config, data, device, weights_file, use)
    names = _names(config, known, steps_of(config, len(data.split.part("train"))))
    store = store_of(use)
    return next((epoch for epoch in range(len(names), 0, -1) if store.has(names[epoch - 1])), 0)


def capture(training: Training, copy: bool = True) -> Checkpoint:
    """Return the state of a training after at least one epoch, without what its start has already.

    Without ``copy`` the tensors may be the training's own, which its next step changes.
    """
    best = training.best
    assert best is not None
    model = training.model.state_dict()
    if best.epoch != training.epoch:
        states = {"model": (model, copy), "best": (training.best_weights, False)}
    else:  # the best weights are these, or the average of these: kept once, and never changed in place
        states = {"model": (model, copy) if training.average else (training.best_weights, False)}
    rests = resting(training.model)
    tensors = {
        f"{kind}.{name}": _on_cpu(value, copied)
        for kind, (state, copied) in states.items()
        for name, value in state.items()
        if name not in rests
    }
    tensors |= {f"average.{name}": _on_cpu(value, copy) for name, value in training.average.items()}
    for index, values in training.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": _on_cpu(v, copy) for k, v in values.items() if torch.is_tensor(v)}
    history = training.history
    tensors["val.predictions"] = torch.stack([epoch.val.predictions for epoch in history])
    tensors["val.confidences"] = torch.stack([epoch.val.confidences for epoch in history])
    return Checkpoint({"best_epoch": best.epoch, "history": [_as_record(epoch) for epoch in history]}, tensors)


def _on_cpu(value: torch.Tensor, copied: bool) -> torch.Tensor:
    return value.detach().to("cpu", copy=copied, memory_format=torch.contiguous_format).contiguous()


def _as_record(epoch: EpochResult) -> dict[str, Any]:
    kept = [f.name for f in fields(epoch) if f.name not in ("val", "reused", "saving")]
    return {**{name: getattr(epoch, name) for name in kept}, "val": dict(epoch.val.scores)}


def restore(training: Training, stage: Checkpoint, end: int | None = None) -> None:
    """Put a training that has not begun into a stored state, bit for bit; its history is marked as reused.

    ``end`` is the epoch after which it has ended, where the state is a later one: no epoch may be trained after that.
    """
    if training.config.thaws(len(stage.header["history"])):
        training.thaw()
    model, optimizer = training.model, training.optimizer
    load_state(model, stage.group("model"), strict=False)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in stage.group("optimizer").items():
        index, _, key = name.partition(".")
        states.setdefault(int(index), {})[key] = _laid_out_like(parameters[int(index)], value)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    training.average = {name: value.to(training.device) for name, value in stage.group("average").items()}
    by_epoch = (stage.tensors[f"val.{name}"].clone() for name in ("predictions", "confidences"))
    values = zip(stage.header["history"], *by_epoch, strict=True)
    training.history = [
        EpochResult(**{**record, "val": Evaluation(record["val"], p, c), "reused": True}) for record, p, c in values
    ][:end]
    training.epoch = len(training.history)
    training.thawed = training.config.thaws(training.epoch)
    training.best = training.history[stage.header["best_epoch"] - 1]
    best = {**training.average, **stage.group("best")}  # the latter where the best epoch is an earlier one
    training.keep_best({**model.state_dict(), **best})


def _laid_out_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return an optimiser's tensor in its parameter's memory layout, which the fused optimisers rely on."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value.clone()


class TrialCheckpoints:
    """The stages of one trial: the longest stored one to start from, and those that it leaves."""

    def __init__(
        self, use: CacheOptions, training: Training, weights_file: Path | None, known: str | None = None
    ) -> None:
        config = training.config
        self._use, self._training = use, training
        self._store: Cache = store_of(use)
        self._identity = identity(config, training.data, training.device, weights_file, use, known)
        self._trial = config.fingerprint()
        self._names = _names(config, self._identity, training.steps)
        self._saved = time.monotonic()
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._write: Future[bool] | None = None  # of the state after the epoch `_writing`
        self._writing = 0
        self.seconds = 0.0  # that loading and saving held the trial up for
        self._spent = 0.0  # seconds that saving took, most of them beside the training
        self._trained = 0.0  # seconds that this process has trained
        self._unsaved = 0.0  # seconds of training that the next state would spare
        self._held: str | None = None  # the stage that is dropped last, since the trial may pause there
        self._passing: str | None = None  # the last stage that only serves resuming, until there is a later one

    def resume(self) -> None:
        """Put the training into its longest sound stored state, if there is one.

        A training with ``patience`` may have ended before that epoch. It then ends with what the state has of the
        best epoch until then, or goes on from a shorter state where a later epoch was better.
        """
        start = time.monotonic()
        for epoch in range(len(self._names), 0, -1):
            stage = self._load(self._names[epoch - 1])
            if stage is None:
                continue
            goal = objective(self._training.config.objective).name
            scores = [record["val"][goal] for record in stage.header["history"]]
            end = last_epoch(self._training.config, scores) or epoch
            if stage.header["best_epoch"] > end:
                continue
            restore(self._training, stage, end)
            self._hold(self._training.epoch, resumed=True)
            if stage.header.get("trial") == self._trial:
                self._supersede(epoch)
            break
        self.seconds += time.monotonic() - start

    def _load(self, name: str) -> Checkpoint | None:
        found = self._store.open(name) if self._store.has(name) else None
        if found is None:
            return None
        header, path = found
        try:
            return Checkpoint(header, load_file(path))
        except FileNotFoundError:  # dropped by another process just now
            return None

    def after(self, result: EpochResult) -> int:
        """Save the state after an epoch that has just been trained, if another may need it or it is time to.

        It is written while the training goes on, from a copy where that changes it. It is written at once where the
        trial may pause, and where a copy would take much of the memory that is left. Returns of how many epochs, this
        one included, the states are not kept yet.
        """
        self._trained += result.seconds
        self._unsaved += result.seconds
        there = self._store.has(self._names[result.epoch - 1])
        if there:
            self._unsaved = 0.0
        if not there and self._is_due(result.epoch):
            self._save(result.epoch)
        else:
            self._hold(result.epoch)
        return result.epoch - self._writing + 1 if self._write is not None and not self._write.done() else 0

    def _save(self, epoch: int) -> None:
        self.settle()  # one state is written at a time
        start = time.monotonic()
        free = free_memory()
        changes = not self._training.ended
        short = changes and free is not None and 2 * _guess(self._training) > free
        at_once = short or epoch in self._use.hold_at
        stage = capture(self._training, copy=changes and not at_once)
        name = self._names[epoch - 1]
        header = {**stage.header, "identity": self._identity, "trial": self._trial}
        self._writing, self._write = epoch, self._writer.submit(self._write_stage, name, header, stage.tensors, start)
        self._saved, self._unsaved = time.monotonic(), 0.0
        self.seconds += self._saved - start
        if at_once:
            self.settle()

    def _write_stage(self, name: str, header: dict[str, Any], tensors: dict[str, torch.Tensor], start: float) -> bool:
        def fill(path: Path) -> None:
            try:
                save_file(tensors, path)
            except SafetensorError as error:  # how it reports a disk that is full
                raise OSError(str(error)) from error

        try:
            return self._store.write(name, header, sum(v.nbytes for v in tensors.values()) + _HEADER_ROOM, fill)
        finally:
            self._spent += time.monotonic() - start

    def settle(self) -> None:
        """Wait until the state that is being written is kept; an error that is not the disk's own is raised here."""
        write, self._write = self._write, None
        if write is None:
            return
        start = time.monotonic()
        while not wait([write], EVERY).done:
            beat()
        self.seconds += time.monotonic() - start
        if write.result():
            self._supersede(self._writing)
            self._hold(self._writing)

    def close(self) -> None:
        """Wait for what is being written, and end."""
        try:
            self.settle()
        finally:
            self._writer.shutdown()

    def _hold(self, epoch: int, resumed: bool = False) -> None:
        """Let the state that a trial which may pause would go on from be dropped last; the one before is let go."""
        last = self._is_last(epoch)
        if not self._use.hold_at or not (resumed or last or epoch in self._use.hold_at):
            return
        before = {self._names[earlier - 1] for earlier in self._use.hold_at if earlier < epoch}
        for name in before | ({self._held} if self._held else set()):
            self._store.release(name, self._trial)
        self._held = None if last else self._names[epoch - 1]
        if self._held is not None:
            self._store.hold(self._held, self._trial)

    def _supersede(self, epoch: int) -> None:
        """Drop the stage that served resuming until there was a later one: it would push out what others need."""
        if self._passing is not None:
            self._store.discard(self._passing)
        self._passing = None if self._is_needed(epoch) else self._names[epoch - 1]

    def _is_last(self, epoch: int) -> bool:
        return epoch == len(self._names) or (epoch == self._training.epoch and self._training.ended)

    def _is_needed(self, epoch: int) -> bool:
        return self._is_last(epoch) or epoch in self._use.save_at | self._use.hold_at

    def _is_due(self, epoch: int) -> bool:
        """Tell whether the state after an epoch is worth saving, by how long that takes and what it spares."""
        cost = self._store.seconds_to_write(_guess(self._training))
        if epoch in self._use.hold_at or leaving.is_set():
            return True
        if self._is_needed(epoch):
            share = 1.0 if epoch in self._use.save_at else REPEAT_SHARE
            return cost <= max(CHEAP, share * self._unsaved)
        if time.monotonic() - self._saved < self._use.every_seconds:
            return False
        return self._spent + cost <= SAVING_SHARE * self._trained


def _guess(training: Training) -> int:
    """Return about how many bytes a stage takes: the trained weights, the best ones and the optimiser's state."""
    trained = sum(parameter.nbytes for parameter in training.model.parameters() if parameter.requires_grad)
    state = sum(v.nbytes for values in training.optimizer.state.values() for v in values.values() if torch.is_tensor(v))
    return trained * (1 if training.best is not None and training.best.epoch == training.epoch else 2) + state
