"""Networks whose first layers never change: those layers' outputs, computed once an image and shared by all trials.

What the frozen layers make of an image does not depend on other images as long as the batch has the same
shape, so they always run on chunks of one fixed size. Then an output that was kept is, on the CPU, bit for bit the
output that would be computed, and whether anything is kept changes no result.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from caltech_sweep.heartbeat import beat
from caltech_sweep.training.augment import Draws
from caltech_sweep.training.cache import Cache
from caltech_sweep.training.keys import digest

CHUNK = 32  # images that the frozen layers see at once, the last chunk filled up with zeros
_DIFFERS_IN_TRAINING = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, StochasticDepth)

Images = Callable[[str, torch.Tensor, "Draws | None"], torch.Tensor]
Autocast = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True)
class SplitModel:
    """A network as two that follow each other and share its modules: ``frozen`` never changes, ``tail`` is trained."""

    frozen: nn.Sequential
    tail: nn.Sequential

    def fingerprint(self) -> str:
        """Return a digest of the frozen layers: their kinds, settings and weights."""
        transforms = getattr(self.frozen[0], "transform_input", False)  # of GoogLeNet and Inception, which is no layer
        content = hashlib.sha256(f"{self.frozen!r} {transforms}".encode())
        for name, value in self.frozen.state_dict().items():
            content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            content.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return content.hexdigest()


def _layers(module: nn.Module) -> list[nn.Module]:
    return list(module) if type(module) is nn.Sequential else [module]


def _changes(layer: nn.Module) -> bool:
    """Return whether a layer is trained, or differs from run to run in training mode."""
    return any(parameter.requires_grad for parameter in layer.parameters()) or any(
        module.training and isinstance(module, _DIFFERS_IN_TRAINING) for module in layer.modules()
    )


def _without(module: nn.Module, paths: Iterable[str]) -> nn.Module:
    """Return a module that shares all layers and weights of another, but does nothing at some dotted ``paths``."""
    twin = copy.copy(module)
    twin._modules, twin.training = dict(module._modules), False
    below: dict[str, list[str]] = {}
    for path in paths:
        child, _, rest = path.partition(".")
        below.setdefault(child, []).append(rest)
    for child, rests in below.items():
        twin._modules[child] = nn.Identity() if "" in rests else _without(module.get_submodule(child), rests)
    return twin


def split_model(model: nn.Module, tail: Sequence[str]) -> SplitModel | None:
    """Split a network, in the mode it is trained in, before the first layer of its ``tail`` that changes.

    ``tail`` names the modules that follow the backbone, in order. None where more than they changes: outputs from
    further up may be larger than the images.
    """
    backbone = _without(model, tail)
    if _changes(backbone):
        return None
    layers = [layer for path in tail for layer in _layers(model.get_submodule(path))]
    count = next((number for number, layer in enumerate(layers) if _changes(layer)), len(layers))
    return SplitModel(nn.Sequential(backbone, *layers[:count]), nn.Sequential(*layers[count:]))


@torch.no_grad()
def agrees(model: nn.Module, split: SplitModel, images: torch.Tensor) -> bool:
    """Return whether the two halves give what the network gives for (n, 3, H, W) float images.

    The network is left in eval mode.
    """
    model.eval()
    whole = model(images)
    try:
        halves = split.tail(split.frozen(images))
    except (RuntimeError, ValueError, IndexError):  # the network does more between its backbone and its classifier
        return False
    return halves.shape == whole.shape and torch.allclose(
        halves, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max())
    )


class FrozenFeatures:
    """The outputs of a network's frozen layers by part and image; kept in ``store`` where there is one.

    ``images`` maps a part, an index (n,) and what augments them, by fixed ops only, to (n, 3, H, W) float; ``counts``
    holds the images of each part. ``known`` is what else decides an output, apart from the frozen layers and the part.
    """

    def __init__(
        self,
        split: SplitModel,
        images: Images,
        counts: Mapping[str, int],
        autocast: Autocast,
        store: Cache | None,
        known: Mapping[str, Any],
    ) -> None:
        self.tail = split.tail
        self._frozen, self._images, self._counts, self._autocast = split.frozen, images, counts, autocast
        self._store = store
        self._key = [split.fingerprint(), CHUNK, dict(known)] if store else []
        self._tables: dict[tuple[str, tuple[str, ...]], torch.Tensor | None] = {}

    def rows(self, part: str, index: torch.Tensor, draws: Draws | None = None) -> torch.Tensor:
        """Return the outputs for the images at ``index``, augmented as ``draws`` says: (n, ...) on the device."""
        ops = draws.by_op if draws else {}
        variants = [tuple(itertools.compress(ops, on)) for on in itertools.product((False, True), repeat=len(ops))]
        tables = {variant: self._table(part, variant) for variant in variants}
        plain = tables[()]
        if plain is None or any(table is None for table in tables.values()):
            return self._compute(part, index, draws)
        rows = plain.index_select(0, index.to(plain.device, non_blocking=True))
        for variant, table in tables.items():
            if variant and table is not None:
                chosen = torch.stack([chosen == (op in variant) for op, (chosen, _) in ops.items()]).all(0)
                place = chosen.nonzero().squeeze(1)  # found on the processor: a GPU need not be waited for
                changed = table.index_select(0, index[place].to(table.device, non_blocking=True))
                rows.index_copy_(0, place.to(rows.device, non_blocking=True), changed.to(rows.device))
        return rows.to(self._device())

    def _device(self) -> torch.device:
        return next(self._frozen.parameters()).device

    @torch.no_grad()
    def _compute(self, part: str, index: torch.Tensor, draws: Draws | None) -> torch.Tensor:
        outputs = []
        for place in torch.arange(len(index)).split(CHUNK):
            chosen = index[place]
            images = self._images(part, chosen, draws[place] if draws else None)
            missing = CHUNK - len(chosen)
            beat()
            if missing:
                images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing))
            with self._autocast():
                outputs.append(self._frozen(images)[: len(chosen)])
        return torch.cat(outputs)

    def _table(self, part: str, ops: tuple[str, ...]) -> torch.Tensor | None:
        """Return the outputs of all images of a part, each changed by ``ops``; None: nothing is kept.

        They are computed by the first to need them.
        """
        if self._store is None:
            return None
        if (part, ops) not in self._tables:
            variant = {(): False, ("hflip",): True}.get(ops, list(ops))  # the first two as the first version wrote them
            name = f"features-{digest([*self._key, part, variant])}"
            with self._store.lock(name):
                table = self._open(name, self._counts[part])
                if table is None and self._write(self._store, name, part, ops):
                    table = self._open(name, self._counts[part])
            self._tables[part, ops] = None if table is None else self._near(table)
        return self._tables[part, ops]

    def _near(self, table: torch.Tensor) -> torch.Tensor:
        """Move a table into the GPU's memory where there is room for it."""
        device = self._device()
        if device.type == "cuda" and table.nbytes <= torch.cuda.mem_get_info(device)[0] // 4:
            return table.to(device)
        return table

    def _open(self, name: str, count: int) -> torch.Tensor | None:
        """Map a kept table into memory: (count, ...) in the type it was computed in."""
        assert self._store is not None
        found = self._store.open(name)
        if found is None:
            return None
        header, path = found
        try:
            flat = np.memmap(path, np.uint8, "c")  # copy on write: torch wants an array that it might write to
        except FileNotFoundError:  # dropped by another process just now
            return None
        return torch.from_numpy(flat).view(getattr(torch, header["dtype"])).view(count, *header["shape"])

    def _write(self, store: Cache, name: str, part: str, ops: tuple[str, ...]) -> bool:
        chunks = self._chunks(part, ops)
        first = next(chunks)
        header = {"dtype": str(first.dtype).removeprefix("torch."), "shape": list(first.shape[1:]), "part": part}

        def fill(path: Path) -> None:
            with path.open("wb") as file:
                file.write(_bytes(first))
                for chunk in chunks:
                    file.write(_bytes(chunk))

        size = self._counts[part] * math.prod(first.shape[1:]) * first.element_size()
        return store.write(name, header, size, fill)

    def _chunks(self, part: str, ops: tuple[str, ...]) -> Iterator[torch.Tensor]:
        for index in torch.arange(self._counts[part]).split(CHUNK):
            every, nothing = torch.ones(len(index), dtype=torch.bool), torch.empty(len(index), 0)
            yield self._compute(part, index, Draws(dict.fromkeys(ops, (every, nothing))) if ops else None).cpu()


def _bytes(rows: torch.Tensor) -> memoryview:
    return rows.contiguous().view(torch.uint8).numpy().data
