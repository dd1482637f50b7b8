"""What this machine gives to a run, and what would make it faster."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from caltech_sweep import machine, paths
from caltech_sweep.stores import Store
from caltech_sweep.text import counted
from caltech_sweep.training.device import BFLOAT16_UNITS, has_bfloat16

_ROOMY = 2 * 10**9  # bytes of memory that a worker can well use: torch, a network of AlexNet's size and its state


@dataclass(frozen=True)
class Found:
    """One property of the machine: its name, what it is, and what would be faster, where something would."""

    name: str
    text: str
    advice: str = ""


def look_around(tracking: Store, storage: Store, workers: int | None, threads: int | None) -> list[Found]:
    """Return what a run with so many workers and threads finds here; None leaves them to the machine."""
    gpus = [torch.device(f"cuda:{number}") for number in range(torch.cuda.device_count())]
    count = workers or len(gpus) or 1
    each = threads or machine.threads_each(count, bool(gpus))
    return [
        _processors(),
        _load(),
        _workers(count, each, bool(gpus)),
        _bfloat16(bool(gpus)),
        _memory(count),
        _allocator(),
        *(map(_gpu, gpus) if gpus else [_no_gpu()]),
        *_places(tracking, storage),
    ]


def _processors() -> Found:
    affinity, quota = machine.affinity(), machine.quota()
    limits = [f"{affinity} by affinity", f"{quota:g} by cgroup" if quota is not None else "no limit by cgroup"]
    return Found("processors", f"{machine.cores()} of {os.cpu_count()} ({', '.join(limits)})")


def _load() -> Found:
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    advice = ""
    if busy > machine.cores() / 2:
        advice = "other programs use the processors, too; end them, or run the study when they have ended"
    return Found("load", f"{busy:.1f} processes ran or waited in the last minute", advice)


def _workers(workers: int, threads: int, on_gpu: bool) -> Found:
    cores, asked = machine.cores(), workers * threads
    text = f"{counted(workers, 'worker')} x {counted(threads, 'thread')} on {counted(cores, 'processor')}"
    advice = ""
    if asked > cores:
        fewer = min(threads, cores)
        pairs = dict.fromkeys([(cores // fewer, fewer), (cores, 1)])
        ways = ", or ".join(f"--workers {count} --threads {each}" for count, each in pairs)
        advice = f"{text} wait for each other; use {ways}"
    elif asked < cores and not on_gpu:
        advice = f"{text} leave {cores - asked} idle; use --threads {cores // workers}"
    return Found("workers", text, advice)


def _bfloat16(on_gpu: bool) -> Found:
    units = sorted(BFLOAT16_UNITS & machine.processor_flags())
    if has_bfloat16(torch.device("cpu")):
        but = "not for small crops or networks like MobileNet"
        return Found("bfloat16", f"{', '.join(units)}; precision auto uses it, but {but}")
    advice = "this processor has no bfloat16 units; one with AVX-512 BF16, AMX or Arm BF16 trains most networks faster"
    if units:
        advice = f"this torch cannot use the processor's bfloat16 units ({', '.join(units)}); install one with oneDNN"
    return Found("bfloat16", "not on this processor; precision auto means float32 on it", "" if on_gpu else advice)


def _memory(workers: int) -> Found:
    whole, free = machine.memory(), machine.free_memory()
    if whole is None or free is None:
        return Found("memory", "not known on this system")
    advice = ""
    if free < workers * _ROOMY:
        advice = (
            f"{free / 1e9:.1f} GB are little for {counted(workers, 'worker')}: training states are written while the "
            "training waits; end other programs, or use fewer workers"
        )
    return Found("memory", f"{free / 1e9:.1f} of {whole / 1e9:.1f} GB are free", advice)


def _allocator() -> Found:
    if machine.keeps_freed_memory():
        return Found("allocator", "freed memory is kept by the process")
    own = [name for name in os.environ if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_")]
    if own:
        return Found("allocator", f"as {', '.join(own)} says", "leave it unset, and freed memory is kept by itself")
    return Found("allocator", "as this system has it; only glibc can be told to keep freed memory")


def _gpu(device: torch.device) -> Found:
    free, whole = torch.cuda.mem_get_info(device)
    native = has_bfloat16(device)
    text = f"{torch.cuda.get_device_name(device)}, {free / 1e9:.1f} of {whole / 1e9:.1f} GB are free"
    text += ", bfloat16 units" if native else ", no bfloat16 units"
    return Found(str(device), text, "" if native else "this GPU has no bfloat16 units; newer ones train faster")


def _no_gpu() -> Found:
    advice = ""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        built = "its driver does not answer" if torch.version.cuda else "this torch is built without CUDA"
        advice = f"there is an NVIDIA GPU, but {built}; install what pytorch.org names for it"
    return Found("GPU", "none that torch can use", advice)


def _places(tracking: Store, storage: Store) -> Iterator[Found]:
    """Yield the file systems of the cache and of the stores that are files."""
    cache = paths.closest(paths.cache_folder()).resolve()
    kind = machine.file_system(cache)
    remote = "copy it to a local disk: name one by CALTECH_SWEEP_DATA" if machine.is_remote(kind) else ""
    yield Found("cache", _on_disk(cache, kind), remote)
    for name, store in (("tracking store", tracking), ("study store", storage)):
        if not store.is_local:
            yield Found(name, f"on a server: {store.shown}")
            continue
        place = paths.closest(store.folder).resolve()
        problem = machine.log_problem(place)
        advice = f"it lies on {problem}, so that writes wait for each other; use --local-stores" if problem else ""
        yield Found(name, _on_disk(place, machine.file_system(place)), advice)


def _on_disk(place: Path, kind: str) -> str:
    return f"{place}: {kind or 'a file system of unknown kind'}, {shutil.disk_usage(place).free / 1e9:.0f} GB are free"


def lines(found: Iterable[Found]) -> Iterator[str]:
    """Yield what was found as text, what would be faster last."""
    kept = list(found)
    for one in kept:
        yield f"{one.name + ':':16}{one.text}"
    advice = [one.advice for one in kept if one.advice]
    yield from (f"faster: {sentence}" for sentence in advice)
    if not advice:
        yield "nothing was found that would make it faster"
