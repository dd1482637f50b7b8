"""The optimiser of a trial, and how much of the learning rate each layer has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from caltech_sweep.config import TrialConfig
from caltech_sweep.training.networks import source_of


def _block(name: str) -> str:
    """Return the block of a parameter: its dotted name up to the first part that has a number."""
    parts = name.split(".")[:-1] or [name]
    place = next((index for index, part in enumerate(parts) if any(map(str.isdigit, part))), 0)
    return ".".join(parts[: place + 1])


def rate_factors(config: TrialConfig, model: nn.Module) -> dict[str, float]:
    """Return by which factor of the learning rate each parameter is trained, by name.

    The classifier has ``head_lr_factor``. Each block before it has ``layer_decay`` times what follows, as in timm and
    BEiT (Bao et al., 2106.08254). A block is a numbered module; one without weight matrices, such as a normalisation,
    belongs to the one before.
    """
    head = tuple(f"{name}." for name in source_of(config.arch).tail(model))
    blocks: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith(head) and (parameter.dim() > 1 or not blocks):
            blocks.setdefault(_block(name), len(blocks))
    factors, last = {}, 0
    for name, _ in model.named_parameters():
        last = blocks.get(_block(name), last)
        decayed = config.layer_decay ** (len(blocks) - last)
        factors[name] = config.head_lr_factor if name.startswith(head) else decayed
    return factors


def parameter_groups(config: TrialConfig, model: nn.Module, trained: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Return some parameters of a network as groups of an optimiser, each with the ``factor`` of its learning rate."""
    if config.head_lr_factor == 1 and config.layer_decay == 1:
        return [{"params": list(trained)}]
    factors, by_factor = rate_factors(config, model), dict[float, list[nn.Parameter]]()
    chosen = set(map(id, trained))
    for name, parameter in model.named_parameters():
        if id(parameter) in chosen:
            by_factor.setdefault(factors[name], []).append(parameter)
    return [{"params": those, "factor": factor} for factor, those in by_factor.items()]


def make_optimizer(config: TrialConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the configured optimiser over the parameters that are trained, as one fused pass over memory."""
    groups = parameter_groups(config, model, [p for p in model.parameters() if p.requires_grad])
    decay = config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, config.momentum, weight_decay=decay, fused=True)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, config.lr, weight_decay=decay, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, of each group by its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
