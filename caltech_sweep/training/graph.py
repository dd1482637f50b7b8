"""The forward and the backward pass of a step as one CUDA graph: small kernels take longer to launch than to run.

A graph runs the very kernels that were recorded, with the random numbers that the generator's seed gives then, so a
step has the result that it would have without. What a graph cannot know are decisions of the network's Python code: a
network that waits for the GPU in its passes, or draws random numbers on the processor, is found out and runs as it is.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

Passes = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_EAGER_STEPS = 4  # of a training, before its passes are recorded: libraries choose their kernels in the first


class ReplayedPasses:
    """The passes of a training as a CUDA graph, once that is worth recording.

    Only full batches are replayed, those of ``size`` images. The passes are given with each call, and are the same
    ones: kept here, they would keep their training, and its memory, after its end.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], size: int) -> None:
        self._parameters, self._size = list(parameters), size
        self._steps, self._suitable = 0, True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._held: list[torch.Tensor] = []
        self._found = torch.empty(0)
        self._gradients: list[tuple[nn.Parameter, torch.Tensor]] = []

    def __call__(
        self, passes: Passes, inputs: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return what ``passes`` does.

        It maps inputs (n, ...), labels (n,) and targets to a tensor, and leaves the gradients of the parameters, which
        it finds to be None.
        """
        given = [inputs, labels, targets]
        if len(inputs) != self._size or not self._suitable:
            return passes(*given)
        self._steps += 1
        if self._steps < _EAGER_STEPS:
            return passes(*given)
        if self._steps == _EAGER_STEPS:
            return self._watched(passes, given)
        if self._graph is None:
            self._record(passes, given)
        return self._replay(given)

    def _watched(self, passes: Passes, given: list[torch.Tensor]) -> torch.Tensor:
        """Run the passes, and see whether they do what a graph would not repeat."""
        before, mode = _drawn_so_far(), torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                found = passes(*given)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = any("called a synchronizing" in str(warning.message) for warning in said)
        self._suitable = not waits and _drawn_so_far() == before
        return found

    def _record(self, passes: Passes, given: list[torch.Tensor]) -> None:
        inputs, labels, targets = given
        self._held = [inputs.clone(), labels.clone()]
        self._held.append(self._held[1] if targets is labels else targets.clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(inputs.device):  # of several, not always the current one
            stream = torch.cuda.Stream()
            # States are saved by another thread meanwhile, which may use the GPU as it likes.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._found = passes(*self._held)
        self._gradients = [(p, p.grad) for p in self._parameters if p.grad is not None]
        self._graph = graph

    def _replay(self, given: list[torch.Tensor]) -> torch.Tensor:
        assert self._graph is not None
        for held, fresh in zip(self._held, given, strict=True):
            held.copy_(fresh)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._found.clone()


def _drawn_so_far() -> tuple[Any, ...]:
    """Return the states of the processor's random generators."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    return torch.default_generator.get_state().tolist(), random.getstate(), repr(numpy)
