"""Our training loop compared with a bare torch loop on resident tensors, at 224 px, in one run.

    CALTECH101_ROOT=... python benchmarks/training.py [--arch alexnet] [--batch-size 128] [--precision bfloat16]

The bare loop holds normalised float images in memory and does nothing but forward, backward and step: as torch does
it unless told otherwise, with channels last, and with a fused optimiser, too. Ours gathers uint8 crops from the shared
cache, normalises, draws keyed dropout, guards against NaN and counts what is right; its memory layout is its default.
All take the same optimiser settings and precision, and are timed in turn, each in a process of its own. Without
CALTECH101_ROOT the images are drawn. On a GPU our loop is timed without CUDA graphs, too, and how much of its memory
each side held is said.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.machine import keeps_freed_memory
from caltech_sweep.training.device import pick_device
from caltech_sweep.training.fit import Training
from caltech_sweep.training.models import build_model


def bare(config: TrialConfig, training: Training, batches: int, side: str) -> Callable[[], None]:
    """Return an epoch of a bare loop."""
    layout = torch.contiguous_format if side == BARE else torch.channels_last
    device, size = training.device, config.batch_size
    model = build_model(config, len(training.data.split.classes)).to(device, memory_format=layout).train()
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=side == FUSED
    )
    crops = training.data.center_crops("train", config.dataset.crop, range(size * batches))
    images = ((crops.contiguous().to(device).float() / 255 - 0.5) / 0.5).contiguous(memory_format=layout)
    labels = training.data.labels("train")[: size * batches].to(device)

    def epoch() -> None:
        for start in range(0, size * batches, size):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                logits = model(images[start : start + size])
            loss = F.cross_entropy(logits.float(), labels[start : start + size])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return epoch


def timed(work: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Return seconds by a clock, the device's queue included."""
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def serve(side: str, options: argparse.Namespace, connection: Connection) -> None:
    """Time an epoch of a side in a process of its own, since how memory is kept is a matter of the whole process."""
    if side not in BARES:
        keeps_freed_memory()
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    name = "caltech101" if os.environ.get("CALTECH101_ROOT") else "shapes"
    dataset = DatasetConfig(name=name, images_per_class=options.images_per_class)
    precision = options.precision or ("float32" if device.type == "cpu" else "bfloat16")
    settings = {"precision": precision, "batch_size": options.batch_size, "lr": 0.001, "cuda_graphs": side == OURS}
    config = TrialConfig(arch=options.arch, dataset=dataset, **settings)
    data = load_dataset(dataset)
    training = Training(config, data, build_model(config, len(data.split.classes)), device)
    batches = len(data.split.train) // options.batch_size
    work = bare(config, training, batches, side) if side in BARES else lambda: training.train_epoch()
    connection.send(batches * options.batch_size)
    while connection.recv():
        connection.send(timed(work, device, time.process_time if options.cpu_time else time.perf_counter))
    connection.send(torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0)


BARE, LAST, FUSED = BARES = "bare torch", "bare torch, channels last", "bare torch, channels last, fused optimiser"
OURS, EAGER = "caltech-sweep", "without CUDA graphs"


def main() -> None:
    """Print images a second of each side, and its time as a share of the bare loop's and of the fastest bare one's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="alexnet")
    parser.add_argument("--images-per-class", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), help="of both sides; by default float32, and bfloat16 on a GPU"
    )
    parser.add_argument("--cpu-time", action="store_true", help="count processors' time, where others use them, too")
    options = parser.parse_args()
    context, connections = multiprocessing.get_context("spawn"), {}
    sides = (*BARES, OURS, *([EAGER] if pick_device(options.device).type == "cuda" else []))
    for side in sides:
        connections[side], theirs = context.Pipe()
        context.Process(target=serve, args=(side, options, theirs), daemon=True).start()
    images = [connection.recv() for connection in connections.values()][0]  # when all have loaded them
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(options.rounds + 1):
        for side, connection in connections.items():
            connection.send(True)
            taken = connection.recv()
            if number:  # the first round warms up
                seconds[side].append(taken)
    memory = {}
    for side, connection in connections.items():
        connection.send(False)
        memory[side] = connection.recv()
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    best = min(medians[side] for side in BARES)
    for side, middle in medians.items():
        held = f", {memory[side] / 1e9:.1f} GB" if memory[side] else ""
        shares = f"{middle / medians[BARE]:.3f} of the bare loop's time, {middle / best:.3f} of the best bare one's"
        print(f"{side:46} {images / middle:8.1f} images/s, {shares}{held}")


if __name__ == "__main__":
    main()
