"""What the command line says about a run; and its workers, which start before the coordinator loads what it needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from caltech_sweep import machine
from caltech_sweep.stores import Address
from caltech_sweep.sweep.executors.base import HANG_SECONDS, MAX_FAILURES
from caltech_sweep.sweep.executors.in_process import InProcessExecutor
from caltech_sweep.sweep.executors.processes import ProcessExecutor
from caltech_sweep.sweep.executors.worker import prepare, train

MOST_ON_A_GPU = 4  # workers; how many are worth it was not measured
OF_RAY = ("address", "cpus_per_trial", "gpus_per_trial", "slots", "upload_from_workers")  # options of that executor


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about where and how trials run; None leaves it to the machine."""

    tracking_uri: Address = None
    storage: Address = None
    workers: int | None = None  # processes; one a GPU, one on the CPU
    per_device: int | None = 1  # workers sharing a GPU; None: as many as its memory has room for
    device: str | None = None
    threads: int | None = None  # of torch in each worker; all cores
    in_process: bool = False
    adopt: bool = False  # take the study over from another study store, by rebuilding it from its runs
    rows: tuple[str, ...] = ()  # only these
    resume_trials: tuple[int, ...] = ()  # only these, which are paused, to their ends
    confirm: int = 0  # so many of the best sampled trials are repeated on fresh seeds
    reuse: bool = True  # share training states and frozen features between trials, and go on from them
    hang_timeout: float = HANG_SECONDS  # seconds without a sign after which a worker is killed
    max_failures: int = MAX_FAILURES  # failed trials in a row that stop the study
    local_stores: Path | None = None  # keep the stores here while the study runs, and copy them after each trial
    verify: bool = False  # read all images and the whole image cache again, whatever their times say
    cache_size: float | None = None  # GB of these; None: 20 GB, or a tenth of the free disk if that is less
    cache: str | None = None  # the folder that they are kept in, or an address; None: below the data folder
    executor: str = "processes"  # or "ray"
    address: str | None = None  # of a Ray cluster; None: a private one
    cpus_per_trial: float | None = None  # on the node of a cluster
    gpus_per_trial: float | None = None
    slots: str | None = None  # how many trials run at once on a cluster: a number, or "max"
    upload_from_workers: bool = False  # nodes send artifacts to the tracking store by themselves


LocalExecutor = ProcessExecutor | InProcessExecutor


def _devices() -> list[str]:
    """Return the devices that trials run on by default; torch, which takes a second, is asked where it may find any."""
    if not machine.may_have_gpus():
        return ["cpu"]
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def make_executor(options: RunOptions) -> LocalExecutor:
    """Return the executor that the options and the machine ask for."""
    devices = [options.device] if options.device else _devices()
    if options.in_process:
        import torch

        threads = options.threads or machine.threads()
        torch.set_num_threads(threads)
        return InProcessExecutor(train, devices[0])
    workers = options.workers or len(devices) * (options.per_device or 1)
    at_most = 1 if options.per_device or options.workers else min(MOST_ON_A_GPU, machine.cores() // len(devices))
    most = max(workers, at_most * len(devices))
    threads = options.threads or machine.threads_each(most, devices[0].startswith("cuda"))
    if workers * threads > machine.cores():  # threads that spin while they wait would hold the others up
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return ProcessExecutor(train, workers, devices, threads, options.hang_timeout, prepare=prepare, at_most=at_most)


@contextmanager
def started(options: RunOptions) -> Iterator[LocalExecutor | None]:
    """Start the workers of this machine, which import what they need meanwhile; None for those of a cluster."""
    if options.executor == "ray":
        yield None
        return
    with closing(make_executor(options)) as executor:
        yield executor
