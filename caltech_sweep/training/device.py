"""The machine: its devices, number formats and versions."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
import torch
import torchvision

from caltech_sweep import __version__
from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import UsageError
from caltech_sweep.machine import keeps_freed_memory
from caltech_sweep.training.networks import source_of

if TYPE_CHECKING:
    import torch


# Of the code from models to evaluation: raise it whenever the same config would train other weights.
TRAINING_VERSION = 1


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device is a GPU with bfloat16 units; older ones only emulate them, slowly."""
    import torch

    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def uses_bfloat16(
    config: TrialConfig, device: torch.device, has_units: Callable[[torch.device], bool] = has_bfloat16
) -> bool:
    """Return whether the network computes in bfloat16; ``auto`` means where the device ``has_units`` for it."""
    return has_units(device) if config.precision == "auto" else config.precision == "bfloat16"


def uses_channels_last(config: TrialConfig, device_type: str) -> bool:
    """Return whether images lie with their channels last in memory; None means only on a GPU."""
    return config.channels_last if config.channels_last is not None else device_type == "cuda"


def numerics(config: TrialConfig, device: torch.device) -> dict[str, Any]:
    """Return what besides config and data decides the last bit of a number: versions, hardware, number format."""
    import numpy as np
    import torch
    import torchvision

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
        "channels_last": uses_channels_last(config, device.type),
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


def environment(device: torch.device, arch: str) -> dict[str, Any]:
    """Return the versions and hardware that, besides the config, decide the numbers of a trial of a network."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "caltech_sweep": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        **source_of(arch).version(arch),
        "device": device.type,
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "keeps_freed_memory": keeps_freed_memory(),
    }
