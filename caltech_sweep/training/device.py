"""The machine: its devices, number formats and versions."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from torch import nn

from caltech_sweep import __version__
from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import UsageError
from caltech_sweep.machine import keeps_freed_memory, processor_flags
from caltech_sweep.training.models import model_on_meta
from caltech_sweep.training.networks import is_in, source_of

# Of the code from models to evaluation: raise it whenever the same config would train other weights.
TRAINING_VERSION = 1
DEPTHWISE_SHARE = 0.02  # of a backbone's weights
SMALLEST_CROP = 48  # pixels a side; below, a processor is no faster with bfloat16 or with its channels last
CONTEXT_BYTES = 10**9  # of a GPU, which a process takes besides its tensors: CUDA's context and its libraries
BFLOAT16_UNITS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # what /proc/cpuinfo calls them, the last on Arm


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device has bfloat16 units that torch uses; others only emulate them, slowly."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and not BFLOAT16_UNITS.isdisjoint(processor_flags())
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


@lru_cache(maxsize=64)
def is_depthwise(arch: str) -> bool:
    """Return whether a backbone has so many depthwise convolutions that bfloat16 is no faster on processors.

    That was measured (docs/LOG.md): MobileNet, MNASNet and EfficientNet have 2% of their weights or more in such
    layers, ConvNeXt, EfficientNetV2 and ShuffleNet less.
    """
    model = model_on_meta(TrialConfig(arch=arch), 2)
    tail = source_of(arch).tail(model)
    sizes = [
        (layer.weight.numel(), isinstance(layer, nn.modules.conv._ConvNd) and 1 < layer.groups == layer.in_channels)
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)) and not any(is_in(name, part) for part in tail)
    ]
    return sum(size for size, depthwise in sizes if depthwise) > DEPTHWISE_SHARE * sum(size for size, _ in sizes)


def uses_bfloat16(
    config: TrialConfig, device: torch.device, has_units: Callable[[torch.device], bool] = has_bfloat16
) -> bool:
    """Return whether the network computes in bfloat16.

    ``auto`` means where the device ``has_units`` for it; on a processor not for small images, nor for networks like
    MobileNet. It is a rule, not a measurement, so that all workers and every resumed trial decide alike.
    """
    if config.precision != "auto":
        return config.precision == "bfloat16"
    slower = device.type == "cpu" and (config.dataset.crop < SMALLEST_CROP or is_depthwise(config.arch))
    return has_units(device) and not slower


def uses_channels_last(config: TrialConfig, device: torch.device) -> bool:
    """Return whether images lie with their channels last in memory.

    None means on a GPU, and where torch has oneDNN on a processor, too, unless images are small: most networks train
    faster so there, in float32, too, and with AVX2 only (docs/LOG.md).
    """
    if config.channels_last is not None:
        return config.channels_last
    if device.type != "cpu":
        return device.type == "cuda"
    return config.dataset.crop >= SMALLEST_CROP and torch.backends.mkldnn.is_available()


def gpu_memory(device: torch.device) -> tuple[int, int] | None:
    """Return how many bytes of a GPU this process has held at most, and how many are free; None on a processor."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES, torch.cuda.mem_get_info(device)[0]


def uses_graphs(config: TrialConfig, device: torch.device) -> bool:
    """Return whether steps are replayed as CUDA graphs; None means where the network's code is known to allow it."""
    if device.type != "cuda":
        return False
    return source_of(config.arch).replayable if config.cuda_graphs is None else config.cuda_graphs


def numerics(config: TrialConfig, device: torch.device) -> dict[str, Any]:
    """Return what besides config and data decides the last bit of a number: versions, hardware, number format."""
    on_gpu = device.type == "cuda"
    return {
        "training": TRAINING_VERSION,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "device": device.type,
        "machine": platform.machine(),
        "hardware": torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "threads": None if on_gpu else torch.get_num_threads(),
        "bfloat16": uses_bfloat16(config, device),
        "channels_last": uses_channels_last(config, device),
    }


_NO_MEMORY = re.compile(  # what torch, CUDA, cuDNN and oneDNN say
    r"out of memory|allocate memory|not enough memory|ALLOC_FAILED|could not create a (primitive|memory)"
)


def pick_device(name: str | None = None) -> torch.device:
    """Return the named device, or the first GPU, or the CPU; raise UsageError for one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device: {name!r} cannot be used on this machine; try cpu") from error
    return device


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that memory ran out; on the CPU torch has no type of its own for that."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def environment(device: torch.device, config: TrialConfig) -> dict[str, Any]:
    """Return what besides the config decides the numbers of a trial: versions, hardware, and what ``auto`` meant."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "caltech_sweep": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        **source_of(config.arch).version(config.arch),
        "device": device.type,
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "keeps_freed_memory": keeps_freed_memory(),
        "precision": "bfloat16" if uses_bfloat16(config, device) else "float32",
        "channels_last": uses_channels_last(config, device),
    }
