"""What the command line says about a run; and its workers, which start before the coordinator loads what it needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caltech_sweep import machine
from caltech_sweep.errors import UsageError
from caltech_sweep.stores import Address, tracking_store
from caltech_sweep.sweep.executors.base import HANG_SECONDS, MAX_FAILURES, Write
from caltech_sweep.sweep.executors.in_process import InProcessExecutor
from caltech_sweep.sweep.executors.processes import ProcessExecutor
from caltech_sweep.sweep.executors.worker import prepare, train

if TYPE_CHECKING:
    from caltech_sweep.sweep.executors.ray import RayExecutor

MOST_ON_A_GPU = 4  # workers; how many are worth it was not measured
OF_RAY = ("address", "cpus_per_trial", "gpus_per_trial", "slots", "upload_from_workers")  # options of that executor


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about where and how trials run; None leaves it to the machine."""

    tracking_uri: Address = None
    storage: Address = None
    workers: int | None = None  # processes; one a GPU, one on the CPU
    per_device: int | None = 1  # workers sharing a GPU; None: as many as its memory has room for
    together: int = 1  # trials in a worker that train as one where they train a classifier on kept outputs only
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
    """Return the executor that the options and the machine ask for; for a cluster, one process that trains nothing."""
    if options.executor == "ray":
        return ProcessExecutor(train, 1, ["cpu"], prepare=prepare)
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
    return ProcessExecutor(
        train,
        workers,
        devices,
        threads,
        options.hang_timeout,
        prepare=prepare,
        at_most=at_most,
        together=options.together,
    )


def check_executor(options: RunOptions) -> None:
    """Raise UsageError for options of one executor that are given to another."""
    on_ray = options.executor == "ray"
    if on_ray and options.in_process:
        raise UsageError("--executor ray: trains in the processes of a cluster; leave --in-process out")
    if on_ray and (options.workers or options.per_device != RunOptions.per_device):
        raise UsageError("--executor ray: takes --slots and --gpus-per-trial in place of --workers and --per-device")
    if options.together > 1 and (on_ray or options.in_process):
        raise UsageError("--together: is for worker processes of this machine; leave it out")
    for name in OF_RAY:
        if not on_ray and getattr(options, name) not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')}: is for --executor ray")
    tracking = tracking_store(options.tracking_uri)
    if options.upload_from_workers and tracking.is_local:
        raise UsageError(
            f"--upload-from-workers: the artifacts of {tracking.shown} are kept on this machine; name a tracking "
            "server with --tracking-uri, or leave it out"
        )


@dataclass(frozen=True)
class Begun:
    """What of a run starts first: processes of this machine, one on a cluster, and there what trains in their place."""

    local: LocalExecutor
    cluster: RayExecutor | None = None


@contextmanager
def started(options: RunOptions, note: Write) -> Iterator[Begun]:
    """Start the processes of a run, which import what they need meanwhile; ``note`` is told what a cluster lacks.

    Raises UsageError for options that do not fit, and for a cluster that cannot be used.
    """
    check_executor(options)
    with ExitStack() as stack:
        local = stack.enter_context(closing(make_executor(options)))
        yield Begun(local, _on_cluster(stack, options, note) if options.executor == "ray" else None)


def _on_cluster(stack: ExitStack, options: RunOptions, note: Write) -> RayExecutor:
    from caltech_sweep.sweep.executors.cluster import check_packages, connected
    from caltech_sweep.sweep.executors.ray import RayExecutor

    slots = None if options.slots in (None, "max") else int(options.slots)
    demand, threads = stack.enter_context(
        connected(options.address, slots, options.cpus_per_trial, options.gpus_per_trial, options.threads, note)
    )
    device = options.device or ("cuda" if demand.gpus else "cpu")
    executor = RayExecutor(None, demand, threads, device, options.hang_timeout)
    stack.callback(executor.close)
    executor.warm()
    if options.address is not None:
        check_packages()
    return executor
