"""One contract for every executor: in this process, and in worker processes that may die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from caltech_sweep import heartbeat
from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.errors import ArtifactError, CaltechSweepError, DatasetError, DivergedError, OutOfMemoryError
from caltech_sweep.files import file_digest, locked
from caltech_sweep.sweep.executors.base import (
    Done,
    Epoch,
    Epochs,
    Event,
    Executor,
    Failed,
    Job,
    Stopped,
    Trained,
    WorkerDied,
    Write,
)
from caltech_sweep.sweep.executors.in_process import InProcessExecutor
from caltech_sweep.sweep.executors.processes import STOPPING, ProcessExecutor
from caltech_sweep.testing import Script, ScriptedExecutor, epoch_metrics, scripted_coordinator


def runner(job: Job) -> Epochs:
    """Count epochs; the seed tells what goes wrong."""
    if job.config.seed == 1:
        raise DivergedError(1, 2, float("nan"))
    if job.config.seed == 2:
        raise KeyError("a bug")
    if job.config.seed == 5 and not job.alone:
        raise OutOfMemoryError("a batch of 256 images did not fit on cpu")
    if job.config.seed == 6:
        raise DatasetError("image 7 is gone")
    for epoch in range(1, job.config.epochs + 1):
        if job.config.seed == 8:  # a long epoch
            heartbeat.EVERY = 0.0
            (job.folder / "started").touch()
            while not (job.folder / "end").exists():
                heartbeat.beat()
                time.sleep(0.01)
        memory = (job.config.batch_size, 1000) if job.config.seed == 9 else None
        yield Epoch(job.number, epoch, {"val/accuracy": epoch / 10}, memory=memory)
        if job.config.seed == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if job.config.seed == 4:
            time.sleep(60)
        if job.config.seed == 7:
            time.sleep(0.1)
    (job.folder / "device.txt").write_text(str(job.device))
    return Done(
        job.number,
        {"best/val_accuracy": job.config.epochs / 10},
        {"pid": str(os.getpid()), "at": str(time.monotonic())},
    )


def script(config: TrialConfig) -> Script:
    """Return what ``runner`` does, as a script."""
    accuracies = [epoch / 10 for epoch in range(1, config.epochs + 1)]
    failures = {1: "diverged", 2: "crashed", 6: "data_error"}
    return Script([] if config.seed in failures else accuracies, failure=failures.get(config.seed))


def on_ray() -> Executor:
    from caltech_sweep.sweep.executors.cluster import Demand
    from caltech_sweep.sweep.executors.ray import RayExecutor

    return RayExecutor(runner, Demand(1, 0, 1), device="cpu")


EXECUTORS: dict[str, Callable[[], Executor]] = {
    "in-process": lambda: InProcessExecutor(runner, "cpu"),
    "processes": lambda: processes(1),
    "scripted": lambda: ScriptedExecutor(script),
}


@pytest.fixture(params=[*EXECUTORS, pytest.param("ray", marks=pytest.mark.slow)])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "ray":
        request.getfixturevalue("ray_here")
    made = EXECUTORS.get(request.param, on_ray)()
    yield made
    made.close()


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """A private Ray cluster on this machine, whose workers can import the tests."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from caltech_sweep.sweep.executors.cluster import connected

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        with connected(cpus=1):
            yield


def processes(workers: int) -> ProcessExecutor:
    return ProcessExecutor(runner, workers, ["cpu"], threads=None)


def job(tmp_path: Path, number: int = 0, seed: int = 0, epochs: int = 3, wait_each_epoch: bool = False) -> Job:
    return Job(number, TrialConfig(seed=seed, epochs=epochs), tmp_path, wait_each_epoch=wait_each_epoch)


def drain(executor: Executor, until: int = 1, seconds: float = 120) -> list[Event]:
    """Poll until so many jobs ended."""
    events: list[Event] = []
    end = time.monotonic() + seconds
    while sum(not isinstance(event, Epoch) for event in events) < until:
        assert time.monotonic() < end, events
        events += executor.poll(0.2)
    return events


def test_epochs_come_in_order_and_then_the_end(executor: Executor, tmp_path: Path) -> None:
    executor.submit(job(tmp_path))
    *epochs, done = drain(executor)
    assert [event.epoch for event in epochs] == [1, 2, 3]
    assert isinstance(done, Done) and done.metrics["best/val_accuracy"] == 0.3
    assert any(tmp_path.iterdir())
    assert list(executor.poll(0)) == []


def test_a_slot_is_free_before_and_after_a_job_and_not_during_it(executor: Executor, tmp_path: Path) -> None:
    assert executor.free() == 1
    executor.submit(job(tmp_path))
    assert executor.free() == 0
    drain(executor)
    assert executor.free() == 1


@pytest.mark.parametrize(("seed", "outcome", "traced"), [(1, "diverged", False), (2, "crashed", True)])
def test_errors_become_outcomes(executor: Executor, tmp_path: Path, seed: int, outcome: str, traced: bool) -> None:
    executor.submit(job(tmp_path, seed=seed))
    (failed,) = drain(executor)
    assert isinstance(failed, Failed) and failed.outcome == outcome
    assert bool(failed.trace) == traced or isinstance(executor, ScriptedExecutor)
    executor.submit(job(tmp_path, 1))
    assert isinstance(drain(executor)[-1], Done)


def test_a_lockstep_job_waits_for_its_answer(executor: Executor, tmp_path: Path) -> None:
    executor.submit(job(tmp_path, wait_each_epoch=True))
    events: list[Event] = []
    while not events:
        events += executor.poll(0.2)
    executor.answer(0, True)
    while len(events) < 2:
        events += executor.poll(0.2)
    executor.answer(0, False)
    assert isinstance(drain(executor)[-1], Stopped)
    assert [event.epoch for event in events] == [1, 2]


class Clock:
    """A clock that moves on by ``step`` each time it is read."""

    def __init__(self) -> None:
        self.now = self.step = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_a_silent_worker_is_killed_and_only_time_that_it_was_listened_to_counts(tmp_path: Path) -> None:
    clock = Clock()
    executor = ProcessExecutor(runner, 1, hang_seconds=60, clock=clock)
    try:
        executor.submit(job(tmp_path, 1, seed=4))
        while not executor.poll(0.2):
            pass
        for _ in range(3):
            clock.now += 3600  # in which this process was blocked
            assert executor.poll(0.2) == []
        clock.step = 40
        assert drain(executor) == [WorkerDied(1, -9, hung=60)]
        clock.step = 0
        executor.submit(job(tmp_path, 2))
        assert isinstance(drain(executor)[-1], Done)
    finally:
        executor.close()


def test_a_long_epoch_with_heartbeats_is_no_hang(tmp_path: Path) -> None:
    clock = Clock()
    executor = ProcessExecutor(runner, 1, hang_seconds=60, clock=clock)
    try:
        executor.submit(job(tmp_path, 4, seed=8, epochs=1))
        while not (tmp_path / "started").exists():
            assert executor.poll(0.05) == []
        clock.step = 50
        for _ in range(10):
            assert executor.poll(1) == []
        clock.step = 0
        (tmp_path / "end").touch()
        assert [type(event) for event in drain(executor)] == [Epoch, Done]
    finally:
        executor.close()


def test_a_worker_that_dies_is_told_and_replaced(tmp_path: Path) -> None:
    executor = processes(1)
    try:
        executor.submit(job(tmp_path, seed=3))
        assert drain(executor)[-1] == WorkerDied(0, -signal.SIGKILL)
        executor.submit(job(tmp_path, 1))
        assert isinstance(drain(executor)[-1], Done)
        os.kill(executor.pids[0], signal.SIGKILL)  # while idle
        time.sleep(0.3)
        executor.submit(job(tmp_path, 2))
        assert isinstance(drain(executor)[-1], Done)
    finally:
        executor.close()


def writing(job: Job) -> Epochs:
    """Train an epoch, then write until a file says so; the first job's process dies with seed 1 of the second."""
    yield Epoch(job.number, 1, {"val/accuracy": 0.5})
    if job.config.seed == 1 and not (job.folder / "died").exists():
        (job.folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    yield Trained(job.number)
    while not (job.folder / f"written {job.number}").exists():
        heartbeat.EVERY = 0.0
        heartbeat.beat()
        time.sleep(0.01)
    return Done(job.number, {"best/val_accuracy": 0.5}, {"pid": str(os.getpid())})


def seen(executor: Executor, wanted: list[tuple[str, int]]) -> None:
    """Poll until these events have come, in whatever order."""
    found: list[tuple[str, int]] = []
    end = time.monotonic() + 60
    while len(found) < len(wanted):
        assert time.monotonic() < end, found
        found += [(type(event).__name__, event.job) for event in executor.poll(0.2)]
    assert sorted(found) == sorted(wanted)


def test_a_worker_trains_the_next_job_while_it_writes_what_the_last_one_left(tmp_path: Path) -> None:
    executor = ProcessExecutor(writing, 1, ["cpu"], hang_seconds=60)
    try:
        executor.submit(job(tmp_path))
        assert (executor.free(), executor.free_soon()) == (0, 0)
        seen(executor, [("Epoch", 0), ("Trained", 0)])
        assert (executor.free(), executor.free_soon()) == (0, 1)
        executor.submit(job(tmp_path, 1))
        assert (executor.free(), executor.free_soon()) == (0, 0)
        seen(executor, [("Epoch", 1)])
        time.sleep(0.3)
        assert executor.poll(0.2) == []  # it waits, since the artifacts of one job are written at a time
        (tmp_path / "written 0").touch()
        seen(executor, [("Done", 0), ("Trained", 1)])
        (tmp_path / "written 1").touch()
        seen(executor, [("Done", 1)])
        assert (executor.free(), executor.free_soon()) == (1, 0)
    finally:
        executor.close()


def test_both_jobs_of_a_worker_that_dies_are_told_and_tried_again_one_after_the_other(tmp_path: Path) -> None:
    executor = ProcessExecutor(writing, 1, ["cpu"])
    try:
        executor.submit(job(tmp_path))
        seen(executor, [("Epoch", 0), ("Trained", 0)])
        executor.submit(job(tmp_path, 1, seed=1))
        seen(executor, [("Epoch", 1), ("WorkerDied", 0), ("WorkerDied", 1)])
        (tmp_path / "written 0").touch()
        (tmp_path / "written 1").touch()
        for number in (0, 1):
            executor.submit(job(tmp_path, number, seed=number))
        assert (executor.free(), executor.free_soon()) == (0, 0)
        seen(executor, [(kind, number) for kind in ("Epoch", "Trained", "Done") for number in (0, 1)])
    finally:
        executor.close()


def test_a_job_that_is_sent_to_a_worker_which_has_died_hides_no_death(tmp_path: Path) -> None:
    executor = ProcessExecutor(writing, 1, ["cpu"])
    try:
        executor.submit(job(tmp_path))
        seen(executor, [("Epoch", 0), ("Trained", 0)])
        os.kill(executor.pids[0], signal.SIGKILL)
        time.sleep(0.3)
        executor.submit(job(tmp_path, 1))
        seen(executor, [("WorkerDied", 0), ("WorkerDied", 1)])
    finally:
        executor.close()


def test_a_job_to_run_alone_waits_until_all_is_written(tmp_path: Path) -> None:
    executor = ProcessExecutor(writing, 1, ["cpu"])
    try:
        executor.submit(job(tmp_path))
        seen(executor, [("Epoch", 0), ("Trained", 0)])
        executor.submit(replace(job(tmp_path), alone=True))
        assert executor.poll(0.3) == [] and executor.free_soon() == 0
        (tmp_path / "written 0").touch()
        seen(executor, [("Done", 0), ("Epoch", 0), ("Trained", 0), ("Done", 0)])
    finally:
        executor.close()


def test_a_worker_has_room_for_several_that_may_train_together(tmp_path: Path) -> None:
    executor, waits = ProcessExecutor(runner, 1, ["cpu"], together=3), job(tmp_path, seed=8, epochs=1)
    try:
        assert executor.free() == 3
        executor.submit(replace(waits, together=True))
        assert (executor.free(), executor.free_soon()) == (2, 0)
        executor.submit(replace(waits, number=1))  # it waits until the worker has ended the others
        assert executor.free() == 0
        (tmp_path / "end").touch()
        assert [event.job for event in drain(executor, 2) if isinstance(event, Done)] == [0, 1]
        assert executor.free() == 3
        executor.submit(replace(waits, number=2))
        assert executor.free() == 0
    finally:
        executor.close()


@pytest.mark.slow
def test_a_worker_that_dies_takes_all_that_train_together_and_takes_them_again(tmp_path: Path) -> None:
    executor = ProcessExecutor(runner, 1, ["cpu"], together=3)
    try:
        executor.submit(replace(job(tmp_path, 0, seed=3), together=True))
        executor.submit(replace(job(tmp_path, 1, seed=7, epochs=1000), together=True))
        died = [event for event in drain(executor, 2) if isinstance(event, WorkerDied)]
        assert {event.job for event in died} == {0, 1}
        executor.submit(replace(job(tmp_path, 1), together=True))
        assert [event.job for event in drain(executor) if isinstance(event, Done)] == [1]
    finally:
        executor.close()


def looks(what: str, write: Write) -> str:
    write(f"looking at {what}")
    if what == "nothing":
        raise ArtifactError("images.bin", "is missing", "/data")
    if what == "a bug":
        raise KeyError(what)
    if what == "the end":
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{what}, seen"


@pytest.mark.parametrize("kind", [InProcessExecutor, ProcessExecutor])
def test_what_is_no_job_is_done_where_jobs_are_and_told_to_the_user(kind: type, tmp_path: Path) -> None:
    executor = processes(1) if kind is ProcessExecutor else InProcessExecutor(runner)
    said: list[str] = []
    try:
        assert executor.ask(partial(looks, "images"), said.append)() == "images, seen"
        with pytest.raises(ArtifactError) as told:
            executor.ask(partial(looks, "nothing"), said.append)()
        assert (str(told.value), told.value.problem) == (
            "the artifact images.bin is missing in /data",
            "images.bin is missing",
        )
        with pytest.raises(KeyError, match="a bug") as bug:
            executor.ask(partial(looks, "a bug"), said.append)()
        assert kind is InProcessExecutor or "raise KeyError(what)" in str(bug.value.__cause__)
        executor.submit(job(tmp_path))
        assert isinstance(drain(executor)[-1], Done)
    finally:
        executor.close()
    assert said == ["looking at images", "looking at nothing", "looking at a bug"]


def test_a_worker_that_dies_before_the_first_job_is_told() -> None:
    executor = processes(1)
    try:
        with pytest.raises(CaltechSweepError, match="images ready ended with signal 9; run the command again"):
            executor.ask(partial(looks, "the end"), print)()
    finally:
        executor.close()


def broken() -> None:
    raise RuntimeError("a bug")


@pytest.mark.slow
def test_a_worker_that_just_starts_is_stopped_by_nothing_that_asks_the_coordinator_to_stop(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    executor = ProcessExecutor(runner, 1, ["cpu"], prepare=broken)  # the job works without being prepared for
    try:
        before = executor.pids
        for number in STOPPING:
            os.kill(before[0], number)
        executor.submit(job(tmp_path))
        assert isinstance(drain(executor, seconds=60)[-1], Done) and executor.pids == before
    finally:
        executor.close()
    assert capfd.readouterr().err == ""
    assert not set(STOPPING) & signal.pthread_sigmask(signal.SIG_BLOCK, [])  # they still stop this process


def test_workers_persist_and_work_at_once(tmp_path: Path) -> None:
    executor = processes(2)
    try:
        for number in (0, 1):
            executor.submit(job(tmp_path, number))
        first = {event.tags["pid"] for event in drain(executor, 2) if isinstance(event, Done)}
        for number in (2, 3):
            executor.submit(job(tmp_path, number))
        second = {event.tags["pid"] for event in drain(executor, 2) if isinstance(event, Done)}
        assert first == second == {str(pid) for pid in executor.pids}
    finally:
        executor.close()


@pytest.mark.parametrize(("held", "at_most", "workers"), [(300, 8, 4), (300, 2, 2), (901, 8, 1), (300, 1, 1)])
def test_workers_become_as_many_as_a_gpu_has_room_for(tmp_path: Path, held: int, at_most: int, workers: int) -> None:
    executor = ProcessExecutor(runner, 1, ["gpu"], threads=None, at_most=at_most)
    config = TrialConfig(seed=9, epochs=2, batch_size=held)  # which stands for the bytes that a trial holds
    try:
        for number in range(2):  # measured once
            executor.submit(Job(number, config, tmp_path))
            drain(executor)
            assert executor.free() == len(executor.pids) == workers
        for number in range(workers):
            executor.submit(Job(number, TrialConfig(epochs=1), tmp_path))
        done = [event for event in drain(executor, workers) if isinstance(event, Done)]
        assert len({event.tags["pid"] for event in done}) == workers
        assert (tmp_path / "device.txt").read_text() == "gpu"
    finally:
        executor.close()


def test_closing_ends_the_workers_at_once(tmp_path: Path) -> None:
    executor = processes(2)
    executor.submit(job(tmp_path, seed=4))
    pids, start = executor.pids, time.monotonic()
    executor.close()
    assert time.monotonic() - start < 10
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_job_alone_waits_for_its_device_and_nobody_joins_it(tmp_path: Path) -> None:
    executor = ProcessExecutor(runner, 3, ["cpu", "other"])  # two workers on cpu, one on the other device
    try:
        long = job(tmp_path, 1, seed=7, epochs=10)
        executor.submit(job(tmp_path, 0, seed=5))
        executor.submit(replace(long, number=2))  # on the other device
        executor.submit(long)
        failed = next(event for event in drain(executor) if isinstance(event, Failed))
        assert (failed.job, failed.outcome) == (0, "out_of_memory")
        executor.submit(replace(job(tmp_path, 0, seed=5), alone=True))
        assert not executor.free()  # cpu is reserved, the other device is busy
        ended = {e.job: float(e.tags["at"]) for e in drain(executor, 3) if isinstance(e, Done)}
        assert set(ended) == {0, 1, 2} and ended[0] > ended[1]
        assert executor.free()
    finally:
        executor.close()


def test_bad_data_is_named(executor: Executor, tmp_path: Path) -> None:
    executor.submit(job(tmp_path, 0, seed=6))
    (failed,) = drain(executor)
    assert isinstance(failed, Failed) and failed.outcome == "data_error"
    assert failed.message == "image 7 is gone" or isinstance(executor, ScriptedExecutor)


def labelled(job: Job) -> Epochs:
    """Give every trial an accuracy that no other has."""
    for epoch in range(1, job.config.epochs + 1):
        yield Epoch(job.number, epoch, epoch_metrics(job.config.lr / epoch))
    accuracy = {"best/val_accuracy": job.config.lr, "test/accuracy": job.config.lr, "test/loss": 1.0}
    return Done(job.number, accuracy | {"best/epoch": 1.0}, {"pid": str(os.getpid())})


@pytest.mark.slow
def test_forty_rows_on_eight_workers_are_forty_trials_each_once_in_both_stores(tmp_path: Path) -> None:
    """Eight processes that each ask Optuna, over one SQLite file, get the same rows again and again, and die."""
    # Here, not above: the workers import this module, and need none of these.
    from caltech_sweep.study.definition import Row
    from caltech_sweep.sweep.optuna_store import open_study
    from caltech_sweep.tracking.writer import MlflowTracker
    from helpers.studies import DEFINITION

    rates = [(index + 1) / 100 for index in range(40)]
    rows = tuple(Row(f"row {rate}", {"lr": rate}) for rate in rates)
    definition = replace(DEFINITION, name="forty", trials=40, rows=rows)
    stores = {name: f"sqlite:///{tmp_path}/{name}.db" for name in ("mlflow", "optuna")}
    tracker = MlflowTracker(stores["mlflow"], create=True)
    study = open_study(definition, stores["optuna"], definition.identity())
    executor = ProcessExecutor(labelled, 8)
    summary = scripted_coordinator(definition, executor, tracker, tmp_path / "scratch", study).run()
    assert summary.complete and summary.outcomes == {"complete": 40}
    record = tracker.study("forty")
    assert record is not None
    runs = tracker.trials(record)
    assert sorted((run.row, run.metrics["test/accuracy"]) for run in runs) == sorted((f"row {r}", r) for r in rates)
    assert sorted(run.number for run in runs) == list(range(40)) and len({run.tags["pid"] for run in runs}) == 8
    assert {(trial.number, trial.value) for trial in study.trials} == {
        (run.number, run.metrics["best/val_accuracy"]) for run in runs
    }


def test_every_long_reading_gives_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images from a slow disk, of their contents, of checksums, and while another process holds a lock."""
    monkeypatch.setattr(heartbeat, "EVERY", 0.0)
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(tmp_path / "data"))
    for number in range(12):
        place = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(place)
    signs: list[str] = []
    with heartbeat.beating(lambda: signs.append("read")):
        load_dataset(DatasetConfig(name="folder", root=str(tmp_path / "photos"), resize=8, crop=8))
    assert len(signs) >= 3 * 12  # for their names in the cache, for what is in them, and decoded
    signs.clear()
    with heartbeat.beating(lambda: signs.append("read")), locked(tmp_path):
        file_digest(place)
        assert len(signs) == 1
        with locked(tmp_path, patience=0.06) as held:
            assert held is False and len(signs) > 1
