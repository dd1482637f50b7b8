"""A study on a Ray cluster: the report of one machine, whatever nodes have and lose; and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import OutOfMemoryError
from caltech_sweep.sweep.executors.base import Done, Epoch, Epochs, Event, Failed, Job, WorkerDied
from caltech_sweep.tracking.records import TrialRecord
from caltech_sweep.tracking.writer import MlflowTracker
from helpers import chaos, chaos_cluster
from helpers.clusters import QUICK, FarNode, Network, add_node, cluster_of, network, reports
from helpers.places import Cli
from helpers.servers import gated_mlflow

pytestmark = pytest.mark.slow
ON_RAY = ("run", "tiny", "--threads", "1", "--executor", "ray")


def slowly(job: Job) -> Epochs:
    """Count epochs, each of which takes a while; the artifacts are more than one chunk."""
    for epoch in range(1, job.config.epochs + 1):
        yield Epoch(job.number, epoch, {"val/accuracy": epoch / 10})
        time.sleep(0.2)
    (job.folder / "deep").mkdir()
    (job.folder / "deep" / "large").write_bytes(bytes(range(256)) * 100_000)
    (job.folder / "empty").touch()
    return Done(job.number, {"best/val_accuracy": 0.5})


def job(tmp_path: Path, number: int = 0, epochs: int = 3) -> Job:
    folder = tmp_path / str(number)
    folder.mkdir(exist_ok=True)
    return Job(number, TrialConfig(epochs=epochs), folder)


def until(executor: Any, kind: type[Event], count: int = 1, seconds: float = 120) -> list[Event]:
    """Poll until there are so many events of a kind."""
    events: list[Event] = []
    end = time.monotonic() + seconds
    while sum(isinstance(event, kind) for event in events) < count:
        assert time.monotonic() < end, events
        events += executor.poll(0.2)
    return events


class Clock:
    """A clock that moves on by ``step`` each time it is read."""

    now = step = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with cluster_of(tmp_path_factory.mktemp("nodes"), 2) as made:
        yield made


def test_a_study_on_two_nodes_gives_the_report_of_one_machine(
    cluster: Any, cli: Cli, place: Path, finished_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = cli(*ON_RAY, "--address", cluster.address)
    assert result.exit_code == 0 and "study tiny: 3 complete" in result.output, result.output
    assert "raylet" not in result.output and not (place / "data" / "reuse").exists()
    ours = reports("tiny")
    assert cli("doctor").exit_code == 0
    monkeypatch.chdir(finished_place)
    assert ours == reports("tiny")


def test_slots_come_with_jobs_and_go_when_idle_and_files_come_home_whole(cluster: Any, tmp_path: Path) -> None:
    from caltech_sweep.sweep.executors import ray as on_ray
    from caltech_sweep.sweep.executors.cluster import Demand, connected, nodes

    with connected(cluster.address, cpus=1):
        executor = on_ray.RayExecutor(slowly, Demand(1, 0))
        assert executor.free() == 2 and not executor.places
        for number in (0, 1):
            executor.submit(job(tmp_path, number))
        assert executor.free() == 0
        until(executor, Done, 2)
        assert executor.free() == 2
        for number in (0, 1):
            assert (tmp_path / str(number) / "deep" / "large").read_bytes() == bytes(range(256)) * 100_000
            assert (tmp_path / str(number) / "empty").read_bytes() == b""
        later = time.monotonic() + on_ray.IDLE_SECONDS
        executor._clock = lambda: later + 1
        executor.poll(0)
        executor.poll(0)
        import ray

        end = time.monotonic() + 60
        while ray.available_resources().get("CPU") != sum(node.get("CPU", 0) for node in nodes().values()):
            assert time.monotonic() < end
            time.sleep(0.2)
        executor.close()


def test_a_worker_that_is_killed_is_told_and_one_that_wakes_after_it_was_given_up_writes_nothing(
    cluster: Any, tmp_path: Path
) -> None:
    from caltech_sweep.sweep.executors.cluster import Demand, connected
    from caltech_sweep.sweep.executors.ray import RayExecutor

    with connected(cluster.address, cpus=1):
        clock = Clock()
        executor = RayExecutor(slowly, Demand(1, 0, 2), hang_seconds=60, clock=clock)
        executor.submit(job(tmp_path, 0))
        until(executor, Epoch)
        os.kill(executor.places[0].pid, signal.SIGKILL)
        assert "worker process on" in until(executor, WorkerDied)[-1].why
        executor.submit(job(tmp_path, 1))
        until(executor, Epoch)
        pid = executor.places[1].pid
        os.kill(pid, signal.SIGSTOP)
        clock.step = 40
        assert until(executor, WorkerDied)[-1].hung == 60
        clock.step = 0
        os.kill(pid, signal.SIGCONT)
        end = time.monotonic() + 30
        while time.monotonic() < end and Path(f"/proc/{pid}").exists():
            assert executor.poll(0.2) == []
        assert not list((tmp_path / "1").iterdir()) and not Path(f"/proc/{pid}").exists()
        executor.submit(job(tmp_path, 1))
        assert [event.epoch for event in until(executor, Done) if isinstance(event, Epoch)] == [1, 2, 3]
        executor.close()


def test_a_node_that_sees_no_image_gets_them_and_the_weights_from_the_coordinator(
    cluster: Any, cli: Cli, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node is in a mount name space in which an empty file system lies over all of the coordinator's files."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mount name space can be made here")
    import numpy as np

    draw = np.random.default_rng(0)
    for kind in "ab":
        for number in range(12):
            file = place / "photos" / kind / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 255, (40, 40, 3), np.uint8)).save(file)
    text = (place / "sweeps" / "tiny.yaml").read_text()
    text = text.replace("{name: shapes,", "{name: folder, root: photos,").replace(
        ", classes: 3, images_per_class: 8", ""
    )
    (place / "sweeps" / "tiny.yaml").write_text(text.replace("A tiny study", "Photos"))
    assert cli("run", "tiny", "--in-process", "--threads", "1", "--name", "base").exit_code == 0
    more = ("--set", "weights=study:base", "--row", "First", "--data", "photos")
    assert cli("run", "tiny", "--in-process", "--threads", "1", "--no-reuse", *more).exit_code == 0
    ours = reports("tiny")
    data = tmp_path.parent / f"{tmp_path.name}-node"
    data.mkdir()
    start = f"mount -t tmpfs none {place} && exec {sys.executable} -m ray.scripts.scripts start --block"
    start += f" --address={cluster.address} --num-cpus=3 --object-store-memory=100000000"
    environment = {**os.environ, "CALTECH_SWEEP_DATA": str(data), "RAY_TMPDIR": os.environ["RAY_TMPDIR"]}
    node = subprocess.Popen(["unshare", "-m", "sh", "-c", start], env=environment, cwd="/", start_new_session=True)
    try:
        from caltech_sweep.tracking.writer import MlflowTracker

        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlruns' / 'mlflow.db'}")
        wait_for_cpus(cluster, 3)
        on_node = ("--executor", "ray", "--address", cluster.address, "--cpus-per-trial", "3", "--threads", "1")
        result = cli("run", "tiny", *on_node, *more, "--name", "far")
        assert result.exit_code == 0, result.output
        assert reports("far") == ours
        assert len(list((data / "received").rglob("*.png"))) == 24
        assert len(list((data / "received").rglob("*.safetensors"))) == 1
        assert MlflowTracker(os.environ["MLFLOW_TRACKING_URI"]).study("far") is not None
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        node.wait(30)


def test_the_trial_of_a_node_that_dies_goes_on_elsewhere_from_its_last_state_in_a_folder_that_all_nodes_see(
    cluster: Any, tmp_path: Path
) -> None:
    from caltech_sweep.config import DatasetConfig
    from caltech_sweep.data import load_dataset
    from caltech_sweep.sweep.executors.cluster import Demand, connected
    from caltech_sweep.sweep.executors.luggage import Trainer, luggage_of
    from caltech_sweep.sweep.executors.ray import RayExecutor
    from caltech_sweep.training.keys import CacheOptions

    dataset = DatasetConfig(name="shapes", resize=32, crop=32, classes=3, images_per_class=8)
    luggage = replace(luggage_of(dataset, load_dataset(dataset), None, tmp_path / "mark"), shared_cache=True)
    config = TrialConfig(dataset=dataset, arch="squeezenet1_1", batch_size=8, epochs=40)
    states = CacheOptions(tmp_path / "states", 10**9, save_at=frozenset(range(1, 40)))
    trial = replace(job(tmp_path), config=config, stages=states, device="cpu")
    doomed = add_node(cluster, tmp_path / "fifth", num_cpus=5)
    with connected(cluster.address, cpus=5):
        executor = RayExecutor(Trainer(luggage), Demand(5, 0), threads=1)
        executor.submit(trial)
        seen = [event.epoch for event in until(executor, Epoch, 3) if isinstance(event, Epoch)]
        cluster.remove_node(doomed, allow_graceful=False)
        died = until(executor, WorkerDied)[-1]
        assert isinstance(died, WorkerDied) and "its node" in died.why and not died.moved
        add_node(cluster, tmp_path / "sixth", num_cpus=5)
        executor.submit(trial)
        events = until(executor, Done)
        epochs = [event for event in events if isinstance(event, Epoch)]
        assert [epoch.epoch for epoch in epochs] == list(range(1, 41))
        assert all(epoch.reused for epoch in epochs[: seen[-1] - 1]) and not epochs[-1].reused
        executor.close()


def test_artifacts_that_a_node_sends_by_itself_do_not_come_home_and_the_others_do(cluster: Any, tmp_path: Path) -> None:
    from caltech_sweep.sweep.executors.cluster import Demand, connected
    from caltech_sweep.sweep.executors.ray import RayExecutor

    with gated_mlflow(tmp_path) as gate, connected(cluster.address, cpus=1):
        tracker = MlflowTracker(gate.address)
        tracker.start_study("s", "S", {})
        run_id = tracker.start_trial("s", "n", {}, {})
        gate.rule = lambda method, path, length: 403 if method == "PUT" and path.endswith("empty") else None
        executor = RayExecutor(slowly, Demand(1, 0))
        executor.submit(replace(job(tmp_path), upload=tracker.destination(run_id)))
        (done,) = (event for event in until(executor, Done) if isinstance(event, Done))
        assert "empty was not taken" in done.tags["artifacts.came_home"]
        assert [path.name for path in (tmp_path / "0").rglob("*") if path.is_file()] == ["empty"]
        gate.open()
        tracker.finish_trial(run_id, "complete", done.metrics, done.tags, tmp_path / "0")
        assert tracker.artifact(run_id, "deep/large").read_bytes() == bytes(range(256)) * 100_000
        assert tracker.artifact(run_id, "empty").read_bytes() == b""
        executor.close()


def test_the_nodes_of_a_study_upload_each_file_once_and_nothing_comes_home(
    cluster: Any, cli: Cli, tmp_path: Path, finished_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = tmp_path.parent / f"{tmp_path.name}-server"
    server.mkdir()
    with gated_mlflow(server) as gate:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", gate.address)
        result = cli(*ON_RAY, "--address", cluster.address, "--upload-from-workers")
        assert result.exit_code == 0 and "study tiny: 3 complete" in result.output, result.output
        sent = Counter(path for method, path in gate.asked if method == "PUT")
        assert len([path for path in sent if path.endswith("best.safetensors")]) == 3 and set(sent.values()) == {1}
        assert all("artifacts.came_home" not in trial.tags for trial in trials_of("tiny"))
        looked = cli("doctor", "--tracking-uri", gate.address)  # a server in this process changes the variable
        assert looked.exit_code == 0 and "1 study examined: 0 found" in looked.output, looked.output
        ours = chaos.read_reports(chaos.Place(Path.cwd(), gate.address), chaos.report_in_process, "tiny")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(finished_place)
    assert ours == reports("tiny")


def trials_of(study: str) -> list[TrialRecord]:
    tracker = MlflowTracker()
    record = tracker.study(study)
    assert record is not None
    return tracker.trials(record)


def short_of_memory(job: Job) -> Epochs:
    """Need the device for itself, or take a while; say when and where it ended."""
    if job.config.seed == 5 and not job.alone:
        raise OutOfMemoryError("a batch of 256 images did not fit on cpu")
    yield Epoch(job.number, 1, {"val/accuracy": 0.1})
    time.sleep(3 if job.config.seed != 5 else 0)
    return Done(job.number, {"best/val_accuracy": 0.5}, {"at": str(time.time()), "pid": str(os.getpid())})


def test_a_job_alone_has_a_new_process_on_its_node_once_the_others_there_have_ended(
    cluster: Any, tmp_path: Path
) -> None:
    from caltech_sweep.sweep.executors.cluster import Demand, connected
    from caltech_sweep.sweep.executors.ray import RayExecutor

    node = add_node(cluster, tmp_path / "seventh", num_cpus=14, num_gpus=1)
    with connected(cluster.address, cpus=7, gpus=0.5):
        executor = RayExecutor(short_of_memory, Demand(7, 0.5), device="cpu")
        assert executor.free() == 2
        greedy = replace(job(tmp_path, 0), config=TrialConfig(seed=5))
        executor.submit(greedy)
        executor.submit(job(tmp_path, 1))
        failed = next(event for event in until(executor, Failed) if isinstance(event, Failed))
        assert failed.outcome == "out_of_memory"
        executor.submit(replace(greedy, alone=True))
        assert executor.free() == 0
        ended = {event.job: event.tags for event in until(executor, Done, 2) if isinstance(event, Done)}
        assert ended[0]["at"] > ended[1]["at"] and ended[0]["pid"] != ended[1]["pid"]
        assert executor.free() == 2
        executor.close()
    cluster.remove_node(node)


def test_a_worker_that_the_memory_monitor_ends_ran_out_of_memory(tmp_path: Path) -> None:
    from caltech_sweep.sweep.executors.cluster import Demand, connected
    from caltech_sweep.sweep.executors.ray import RayExecutor

    with cluster_of(tmp_path, 1, memory_usage_threshold=0.01) as full, connected(full.address, cpus=1):
        executor = RayExecutor(slowly, Demand(1, 0))
        executor.submit(job(tmp_path, 0, epochs=1000))
        failed = next(event for event in until(executor, Failed) if isinstance(event, Failed))
        assert failed.outcome == "out_of_memory" and "ran low on memory" in failed.message
        executor.close()


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Network]]:
    """A head without processors, and the network that nodes join as other machines do."""
    pytest.importorskip("ray", reason="Ray is not installed")
    folder = tmp_path_factory.mktemp("far")
    with network(folder) as made, cluster_of(folder, 0, made.address, **QUICK) as head:
        yield head, made
        for node in made.nodes:
            node.end()


def test_a_cluster_without_nodes_is_refused_or_waited_for(
    far: tuple[Any, Network], cli: Cli, place: Path, tmp_path: Path
) -> None:
    from caltech_sweep.sweep.executors.cluster import connected
    from caltech_sweep.sweep.executors.ray import RayExecutor

    head, net = far
    result = cli(*ON_RAY, "--address", head.address)
    assert result.exit_code == 2 and "it has 1 node with 0 CPUs and 0 GPUs; if it grows" in result.output
    assert result.output.count("\n") == 1 and not (place / "mlruns").exists()
    said: list[str] = []
    with connected(head.address, slots=1, cpus=1, note=said.append) as (demand, _):
        assert "has 1 node with 0 CPUs and 0 GPUs; trials wait until it has grown" in said[0]
        executor = RayExecutor(slowly, demand)
        assert executor.free() == 1
        executor.submit(job(tmp_path, 0))
        assert executor.poll(0.5) == []
        net.join(head)
        until(executor, Done)
        executor.close()


@pytest.mark.parametrize("how", ["cut", "stopped"])
def test_a_node_that_comes_back_after_it_was_taken_for_dead_writes_nothing_and_ends(
    far: tuple[Any, Network], how: str, tmp_path: Path
) -> None:
    from caltech_sweep.sweep.executors.cluster import Demand, connected
    from caltech_sweep.sweep.executors.ray import RayExecutor

    head, net = far
    node = standing(head, net)
    with connected(head.address, cpus=1):
        executor = RayExecutor(slowly, Demand(1, 0, 1))
        executor.submit(job(tmp_path, 0, epochs=1000))
        until(executor, Epoch)
        pid = executor.places[0].pid
        assert pid in node.pids()
        node.cut() if how == "cut" else node.send(signal.SIGSTOP)
        assert "its node" in until(executor, WorkerDied)[-1].why
        node.wait(alive=False)
        node.cut(healed=True) if how == "cut" else node.send(signal.SIGCONT)
        net.join(head)
        executor.submit(job(tmp_path, 1))
        events = until(executor, Done)
        assert {event.job for event in events} == {1} and not list((tmp_path / "0").iterdir())
        node.process.wait(90)
        assert pid not in node.pids()
        executor.close()


def test_a_trial_whose_node_will_be_taken_away_saves_its_state_and_goes_on_elsewhere(
    far: tuple[Any, Network], tmp_path: Path
) -> None:
    from caltech_sweep.config import DatasetConfig
    from caltech_sweep.data import load_dataset
    from caltech_sweep.sweep.executors.cluster import Demand, connected
    from caltech_sweep.sweep.executors.luggage import Trainer, luggage_of
    from caltech_sweep.sweep.executors.ray import RayExecutor
    from caltech_sweep.training.keys import CacheOptions

    dataset = DatasetConfig(name="shapes", resize=32, crop=32, classes=3, images_per_class=8)
    luggage = replace(luggage_of(dataset, load_dataset(dataset), None, tmp_path / "mark"), shared_cache=True)
    config = TrialConfig(dataset=dataset, arch="squeezenet1_1", batch_size=8, epochs=100)
    trial = replace(job(tmp_path), config=config, stages=CacheOptions(tmp_path / "states", 10**9), device="cpu")
    head, net = far
    node = standing(head, net)
    with connected(head.address, cpus=1):
        executor = RayExecutor(Trainer(luggage), Demand(1, 0), threads=1)
        executor.submit(trial)
        until(executor, Epoch)
        node.process.send_signal(signal.SIGTERM)
        *epochs, moved = until(executor, WorkerDied)
        assert isinstance(moved, WorkerDied) and moved.moved and isinstance(epochs[-1], Epoch)
        net.join(head)
        executor.submit(trial)
        again = [event for event in until(executor, Done) if isinstance(event, Epoch)]
        assert [event.reused for event in again] == [event.epoch <= epochs[-1].epoch for event in again]
        assert len(again) == 100 and again[-1].epoch == 100
        node.process.wait(60)
        executor.close()


@pytest.mark.parametrize("all_of_it", [True, False], ids=["this machine is the head", "another machine is"])
def test_without_the_head_node_the_command_ends_with_a_sentence_and_goes_on_with_another_cluster(
    all_of_it: bool, tmp_path: Path
) -> None:
    epochs = 12 if all_of_it else 30  # so that it is not through before the head is missed
    reference = chaos_cluster.on_one_machine(tmp_path / "one", 4, epochs)
    place = chaos.furnish(tmp_path / "lost", chaos.INDEPENDENT, 4, epochs)
    place.log.touch()
    with cluster_of(tmp_path / "first", 1, **QUICK) as cluster:
        process = chaos_cluster.launch(place, cluster.address)
        chaos_cluster.wait(process, 120, place.log, "epoch 3/")
        cluster.head_node.kill_gcs_server(check_alive=False)
        if all_of_it:
            cluster.head_node.kill_raylet(check_alive=False)
        try:
            assert process.wait(50) == 2  # sooner than Ray ends it, without a word
        finally:
            process.kill()
    said = place.log.read_text()
    why = "this machine's node of it has ended" if all_of_it else "its head node has not answered for 15 s"
    assert f"Error: the Ray cluster is lost ({why}); start Ray again, then run the same command" in said
    assert "Traceback" not in said
    assert "interrupted, waits for the next run of this study" in said or not all_of_it  # it may be between two trials
    with cluster_of(tmp_path / "second", 1, **QUICK) as cluster:
        again = chaos_cluster.launch(place, cluster.address)
        assert again.wait(240) == 0, place.log.read_text()
    assert chaos.read_reports(place) == reference


def standing(head: Any, net: Network) -> FarNode:
    """Return a node that is alive, a new one where there is none."""
    found = next((node for node in net.nodes if node.alive), None) or net.join(head)
    found.wait(alive=True)
    return found


def wait_for_cpus(cluster: Any, cpus: int) -> None:
    """Wait until a node has so many."""
    end = time.monotonic() + 90
    while not any(node["Alive"] and node["Resources"].get("CPU") == cpus for node in cluster.global_state.node_table()):
        assert time.monotonic() < end
        time.sleep(0.5)


def test_what_no_node_has_is_refused_with_what_there_is_and_nothing_is_written(
    cluster: Any, cli: Cli, place: Path
) -> None:
    result = cli(*ON_RAY, "--address", cluster.address, "--cpus-per-trial", "99", "--gpus-per-trial", "2")
    assert result.exit_code == 2 and "nodes with 1 CPU and 0 GPUs" in result.output, result.output
    assert result.output.count("\n") == 1 and not (place / "mlruns").exists()


REFUSED = {
    ("--address", "127.0.0.1:1"): "no Ray cluster answers at 127.0.0.1:1",
    ("--address", "nonsense"): "is not the HOST:PORT of a Ray head node",
    ("--address", "ray://127.0.0.1:10001"): "is not the HOST:PORT of a Ray head node",
    ("--in-process",): "leave --in-process out",
    ("--upload-from-workers",): "are kept on this machine; name a tracking server",
    ("--workers", "2"): "takes --slots and --gpus-per-trial",
}


@pytest.mark.parametrize("options", REFUSED)
def test_a_cluster_that_cannot_be_used_is_refused_in_a_sentence(cli: Cli, place: Path, options: tuple[str]) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    result = cli(*ON_RAY, *options)
    assert result.exit_code == 2 and REFUSED[options] in result.output
    assert result.output.count("\n") == 1 and not (place / "mlruns").exists()


def test_without_ray_the_command_names_what_to_install(place: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; from caltech_sweep.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *ON_RAY], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'caltech-sweep[ray]'" in done.stderr
    assert done.stderr.count("\n") == 1 and not (place / "mlruns").exists()


def test_another_version_of_ray_or_python_is_named() -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    from caltech_sweep.sweep.executors.cluster import refused

    said = RuntimeError(
        "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.10.1\n"
        "This process on node 1 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    )
    assert "runs Ray 2.9.0 on Python 3.10.1, and this is Ray 2.60.0 on Python 3.11.7" in str(refused("a:1", said))


def raylets() -> bytes:
    """Return the processes of clusters that this one has started."""
    return subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "raylet"], capture_output=True).stdout


def test_no_cluster_is_joined_that_was_not_named_and_the_private_one_ends(
    cli: Cli, place: Path, finished_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("CALTECH_SWEEP_EXECUTOR", "ray")
    run = [*ON_RAY[:-2], "--slots", "2"]
    command = [sys.executable, "-m", "caltech_sweep", *run]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=place, start_new_session=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "started" in line)
        os.killpg(process.pid, signal.SIGTERM)  # which Ray's own processes, of the same group, must not end by
        rest = process.stderr.read()
    assert process.returncode == 130 and "interrupted, waits for the next run" in rest, rest
    assert "tried again" not in rest and "Traceback" not in rest
    end = time.monotonic() + 30
    while left := subprocess.run(["pgrep", "-a", "-s", str(process.pid)], capture_output=True, text=True).stdout:
        assert time.monotonic() < end, f"processes of Ray are left:\n{left}"
        time.sleep(0.2)
    before = raylets()
    result = cli(*run)
    assert result.exit_code == 0, result.output
    assert raylets() == before
    ours = reports("tiny")
    monkeypatch.chdir(finished_place)
    assert ours == reports("tiny")
