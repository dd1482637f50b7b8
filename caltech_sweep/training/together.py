"""Epochs of several trainings of one linear classifier each, on kept features, as one batched product a step.

Each training has its own order of images, learning rate, optimiser and random numbers. Their classifiers do not see
each other, so each ends where it would by itself but for rounding: a batched product adds in another order.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F

from caltech_sweep.errors import DivergedError
from caltech_sweep.training.fit import EpochSteps, EpochTrained, Head, Training


def train_together(trainings: Sequence[Training]) -> None:
    """Train the next epoch of those trainings that fit together; each takes what it came to when it runs that epoch.

    The others are left as they are. An error of one is raised when that one runs its epoch.
    """
    groups: dict[Hashable, list[tuple[Training, Head]]] = {}
    for training in trainings:
        if (head := training.head) is not None:
            groups.setdefault((training.data.fingerprint, head.kind), []).append((training, head))
    for group in groups.values():
        if len(group) > 1:
            start = time.perf_counter()
            try:
                results = _epochs(group)
            except Exception as error:  # of all of them, such as memory that is short
                results = [error] * len(group)
            share = (time.perf_counter() - start) / len(group)
            for (training, _), result in zip(group, results, strict=True):
                training.ahead = replace(result, seconds=share) if isinstance(result, EpochTrained) else result
                training.together = max(training.together, len(group))


@contextmanager
def _stacked(parameters: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Let K parameters of one shape be parts of one (K, ...) tensor meanwhile, so that changing them changes it."""
    own = [parameter.data for parameter in parameters]
    stack = torch.stack(own).requires_grad_()
    for parameter, part in zip(parameters, stack.detach(), strict=True):
        parameter.data = part
    try:
        yield stack
    finally:
        for parameter, data in zip(parameters, own, strict=True):
            parameter.data = data.copy_(parameter.data)


def _epochs(group: Sequence[tuple[Training, Head]]) -> list[EpochTrained | Exception]:
    """Train an epoch of each; one that diverges takes no further step."""
    trainings = [training for training, _ in group]
    linears = [head.linear for _, head in group]
    failed: dict[int, Exception] = {}
    with (
        _stacked([linear.weight for linear in linears]) as weights,
        _stacked([linear.bias for linear in linears if linear.bias is not None] or [torch.empty(0)]) as biases,
    ):
        epochs = [training.begin_epoch() for training in trainings]
        for number in range(1, len(epochs[0].batches) + 1):
            found = _passes(group, epochs, number, weights, biases)
            assert weights.grad is not None
            for place, (training, steps) in enumerate(zip(trainings, epochs, strict=True)):
                if place in failed:
                    continue
                linears[place].weight.grad = weights.grad[place]
                if biases.grad is not None:
                    linears[place].bias.grad = biases.grad[place]
                training.end_step(steps, number)
                try:
                    steps.add(found[place])
                except DivergedError as error:
                    failed[place] = error
            weights.grad = biases.grad = None
    for linear in linears:
        linear.zero_grad(set_to_none=True)
    return [failed.get(place) or steps.result() for place, steps in enumerate(epochs)]


def _passes(
    group: Sequence[tuple[Training, Head]],
    epochs: Sequence[EpochSteps],
    number: int,
    weights: torch.Tensor,
    biases: torch.Tensor,
) -> torch.Tensor:
    """Leave the gradients of (K, outputs, features) weights and (K, outputs) biases.

    Returns the K mean losses of step ``number`` and how many of its predictions are right, (K, 2).
    """
    given, truths = [], []
    first, head = group[0]
    with first.autocast():
        for (training, own), steps in zip(group, epochs, strict=True):
            inputs, labels = training.step_inputs(steps, number)
            given.append(own.before(inputs))
            truths.append(labels)
        inputs, turned = torch.stack(given), weights.transpose(1, 2)
        logits = inputs @ turned if head.linear.bias is None else torch.baddbmm(biases.unsqueeze(1), inputs, turned)
    targets = torch.stack(truths)
    each = F.cross_entropy(
        logits.float().flatten(0, 1),
        targets.flatten(),
        head.class_weights,
        reduction="none",
        label_smoothing=head.label_smoothing,
    ).view(targets.shape)
    shares = torch.ones_like(each) if head.class_weights is None else head.class_weights[targets]
    losses = each.sum(1) / shares.sum(1)
    losses.sum().backward()
    correct = (logits.detach().argmax(2) == targets).sum(1)
    return torch.stack([losses.detach().double(), correct.double()], 1)
