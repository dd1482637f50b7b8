"""One step of a network in the shapes that a study gives it, before anything is written.

It runs on torch's "meta" device, which computes shapes and no numbers: the same layers complain about the same sizes,
in a fraction of a second and of the memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import ModelError
from caltech_sweep.text import first_line
from caltech_sweep.training.models import build_model, model_on_meta, thaw, train_mode
from caltech_sweep.training.networks import OwnNetworks, source_of


def batch_kinds(config: TrialConfig, images: int) -> frozenset[int]:
    """Return which batches an epoch over so many images has: of one image (1), of more (2); to layers all are alike."""
    last = 0 if config.drop_last else images % config.batch_size
    whole = {min(config.batch_size, images), last}
    sizes = {len(part) for size in whole for part in torch.arange(size).chunk(config.accumulate)}
    return frozenset(min(size, 2) for size in sizes if size)


def rehearse(
    config: TrialConfig,
    num_classes: int,
    batches: Iterable[int],
    weights_file: Path | None = None,
    digest: str | None = None,
) -> None:
    """Raise ModelError when the network cannot be built, or cannot train and evaluate a trial's batches.

    ``batches`` holds how many images they have; more than two are as good as two.
    """
    model = model_on_meta(config, num_classes, weights_file, digest)
    outputs, sizes = config.outputs or num_classes, sorted(batches, reverse=True)
    own = isinstance(source_of(config.arch), OwnNetworks)
    if own and any(_problem(model, size, config, outputs) for size in sizes):
        model = build_model(config, num_classes, weights_file, digest)  # code of the user may need numbers
    _rehearse(model, config, sizes, outputs)
    if config.thaws(config.epochs):
        thaw(model, config)
        _rehearse(model, config, sizes, outputs)


def _rehearse(model: nn.Module, config: TrialConfig, sizes: Iterable[int], outputs: int) -> None:
    for size in sizes:
        if (problem := _problem(model, size, config, outputs)) is None:
            continue
        if size == 1 and _problem(model, 2, config, outputs) is None:
            parts, fix = "", "set drop_last to true, or another batch_size"
            if config.accumulate > 1:
                parts, fix = f" in {config.accumulate} parts (accumulate)", "take fewer parts, or another batch_size"
            raise ModelError(
                f"batch_size: {config.batch_size}{parts} leaves a batch of one image, which {config.arch} cannot train "
                f"at a crop of {config.dataset.crop} pixels ({problem}); {fix}"
            )
        raise ModelError(
            f"arch: {config.arch} cannot be trained on crops of {config.dataset.crop} pixels ({problem}); "
            f"{_way_out(config.arch, model)}"
        )


def _problem(model: nn.Module, size: int, config: TrialConfig, outputs: int) -> str | None:
    """Train a batch and evaluate one; return the first line of what a layer says against it, or None.

    Raises ModelError when what comes out is not one number for each class.
    """
    try:
        train_mode(model, config)
        device = next(iter(model.parameters())).device
        images = torch.zeros(size, 3, config.dataset.crop, config.dataset.crop, device=device)
        logits = _checked(model(images), config, (size, outputs))
        F.cross_entropy(logits, torch.zeros(size, dtype=torch.long, device=device)).backward()
        model.eval()
        with torch.no_grad():
            _checked(model(images), config, (size, outputs))
    except ModelError:
        raise
    except NotImplementedError:  # an operation that the meta device lacks says nothing about sizes
        return None
    except Exception as error:  # each layer has errors of its own: RuntimeError, ValueError, AssertionError
        return first_line(error)
    return None


def _checked(given: object, config: TrialConfig, shape: tuple[int, int]) -> torch.Tensor:
    if isinstance(given, torch.Tensor) and given.shape == shape:
        return given
    what = f"outputs of {tuple(given.shape)}" if isinstance(given, torch.Tensor) else f"a {type(given).__name__}"
    raise ModelError(
        f"arch: {config.arch} gives {what} for {shape[0]} images where a tensor of {shape} is needed, one number for "
        "each class; let its last layer have as many outputs as it is told, and return these only"
    )


def _way_out(arch: str, model: nn.Module) -> str:
    """Return what the crop has to be: of some networks exactly one size, of others at least one."""
    side, exactly = source_of(arch).input_size(arch, model)
    if side is None:
        return "set dataset.crop, and dataset.resize to at least that, to a size that it takes"
    if exactly:
        return f"it takes exactly {side}: set dataset.crop to {side}, and dataset.resize to at least that"
    return f"set dataset.crop to {side} or more, and dataset.resize to at least that, or choose another arch"
