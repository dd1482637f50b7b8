"""A slot of a cluster on its node, without a cluster: jobs, files that come home, and what is brought there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caltech_sweep import heartbeat
from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data import dataset_root, load_dataset
from caltech_sweep.errors import DatasetError, ModelError
from caltech_sweep.files import file_digest
from caltech_sweep.sweep.executors import luggage, node
from caltech_sweep.sweep.executors.base import Done, Epoch, Epochs, Failed, Job, Stopped, WorkerDied
from caltech_sweep.sweep.executors.luggage import Files, Luggage, Trainer, luggage_of
from caltech_sweep.sweep.executors.node import Incoming, Left, LeftFile, Sent, Slot
from caltech_sweep.tracking.direct import Destination
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.servers import HANG, Gate, gated_mlflow


def leaving(job: Job) -> Epochs:
    """Leave files of several sizes."""
    for epoch in (1, 2):
        yield Epoch(job.number, epoch, {})
    (job.folder / "deep").mkdir()
    for name, content in FILES.items():
        (job.folder / name).write_bytes(content)
    return Done(job.number, {"best/val_accuracy": 0.5})


FILES = {"deep/large": bytes(range(256)) * 40, "empty": b"", "exact": bytes(1000)}


@pytest.fixture
def slot(monkeypatch: pytest.MonkeyPatch) -> Slot:
    monkeypatch.setattr(node, "CHUNK", 1000)
    return Slot(leaving, None)


def heard(slot: Slot) -> Iterator[object]:
    while True:
        yield from (event for event in slot.listen() if event is not None)


def test_what_a_job_leaves_comes_home_in_chunks_and_whole(slot: Slot, tmp_path: Path) -> None:
    slot.run(Job(3, TrialConfig(), tmp_path / "elsewhere"))
    events = heard(slot)
    assert [type(next(events)) for _ in range(2)] == [Epoch, Epoch]
    left = next(events)
    assert isinstance(left, Left)
    incoming, chunks = Incoming(left, tmp_path / "home"), 0
    while wanted := incoming.next():
        assert incoming.take(slot.chunk(3, wanted[0].path, wanted[1])) == ""
        chunks += 1
    assert {name: (tmp_path / "home" / name).read_bytes() for name in FILES} == FILES
    assert chunks == 11 + 1 + 1 and not (tmp_path / "elsewhere").exists()
    slot.run(Job(4, TrialConfig(), tmp_path))
    with pytest.raises(FileNotFoundError):  # what an earlier job left goes with the next one
        slot.chunk(3, "exact", 0)


@pytest.mark.parametrize("sent", [b"other", b""])
def test_a_file_that_arrives_otherwise_than_it_was_sent_is_told(sent: bytes, tmp_path: Path) -> None:
    right = tmp_path / "right"
    right.write_bytes(b"right")
    incoming = Incoming(Left(Done(0, {}), (LeftFile("weights", 5, file_digest(right)),)), tmp_path / "home")
    assert incoming.next() is not None
    assert incoming.take(sent) == "weights did not arrive as it was sent"


def test_a_job_that_waits_goes_on_or_stops_as_it_is_told(slot: Slot, tmp_path: Path) -> None:
    thread = threading.Thread(target=slot.run, args=(Job(0, TrialConfig(), tmp_path, wait_each_epoch=True),))
    thread.start()
    events = heard(slot)
    assert isinstance(next(events), Epoch)
    slot.answer(True)
    assert isinstance(next(events), Epoch)
    slot.answer(False)
    assert next(events) == Stopped(0)
    thread.join()


@pytest.fixture
def notice() -> Iterator[threading.Event]:
    """What tells this process that its machine will be taken away."""
    yield heartbeat.leaving
    heartbeat.leaving.clear()


@pytest.mark.parametrize("answer", [None, True, False])
def test_a_job_whose_machine_will_be_taken_away_ends_after_the_epoch_under_way(
    notice: threading.Event, answer: bool | None, tmp_path: Path
) -> None:
    def training(job: Job) -> Epochs:
        for epoch in (1, 2, 3, 4):
            if epoch == 2:
                slot.leave()
            yield Epoch(job.number, epoch, {}, last=epoch == 4)
        return Done(job.number, {})

    slot = Slot(training, None)
    for go_on in (True, True, answer):
        slot.answer(bool(go_on))
    slot.run(Job(0, TrialConfig(), tmp_path, wait_each_epoch=answer is not None))
    events = heard(slot)
    assert [next(events) for _ in range(3)] == [Epoch(0, epoch, {}) for epoch in (1, 2, 3)]
    end = next(events)
    if answer is False:
        assert end == Stopped(0)
    else:
        assert isinstance(end, WorkerDied) and end.moved and "will be taken away" in end.why


def test_what_goes_wrong_around_a_job_is_its_failure(slot: Slot, tmp_path: Path) -> None:
    slot._folder.rmdir()  # the node's temporary files were cleared
    slot.run(Job(0, TrialConfig(), tmp_path))
    failed = next(heard(slot))
    assert isinstance(failed, Failed) and failed.outcome == "crashed"


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Luggage:
    """What a node is told of a study over a folder of images, of which it then sees none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(tmp_path / "coordinator"))
    draw = np.random.default_rng(0)
    for number in range(24):
        file = tmp_path / "photos" / "ab"[number % 2] / "deeper" / f"{number} é.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (20, 20, 3), np.uint8)).save(file)
    config = DatasetConfig(name="folder", root="photos", resize=16, crop=16)
    mark = tmp_path / "coordinator" / "mark"
    known = luggage_of(config, load_dataset(config), dataset_root(config), mark)
    (tmp_path / "weights.pt").write_bytes(b"weights" * 10)
    files = Files(known, {file_digest(tmp_path / "weights.pt"): tmp_path / "weights.pt"})
    monkeypatch.setattr(luggage, "BLOCK", 30)
    monkeypatch.setenv("CALTECH_SWEEP_DATA", str(tmp_path / "node"))
    return replace(known, supply=files)


def hide(packed: Luggage) -> Luggage:
    """Name a place that is not there, as the coordinator's folder is on another machine."""
    return replace(packed, dataset=replace(packed.dataset, root="/not/here"))


def test_images_that_a_node_lacks_are_brought_once_and_are_the_same(packed: Luggage, tmp_path: Path) -> None:
    here = load_dataset(replace(packed.dataset))
    there = Trainer(hide(packed))._data(packed.dataset)
    assert there.fingerprint == here.fingerprint == packed.fingerprint
    assert all(there.paths(part) == here.paths(part) for part in ("train", "val", "test"))
    assert there.center_crops("test", 16).equal(here.center_crops("test", 16))
    assert len(list((tmp_path / "node" / "received").rglob("*.png"))) == 24
    again = Trainer(replace(hide(packed), supply=None))._data(packed.dataset)
    assert again.fingerprint == packed.fingerprint


def test_images_that_a_node_can_read_are_not_brought(packed: Luggage, tmp_path: Path) -> None:
    assert Trainer(replace(packed, supply=None))._data(packed.dataset).fingerprint == packed.fingerprint
    assert not (tmp_path / "node" / "received").exists()


def test_other_images_at_the_same_place_are_not_taken(packed: Luggage, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for file in (tmp_path / "photos").rglob("*.png"):
        target = other / file.relative_to(tmp_path / "photos")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), "red").save(target)
    lying = replace(packed, dataset=replace(packed.dataset, root=str(other)))
    assert Trainer(lying)._data(packed.dataset).fingerprint == packed.fingerprint


def test_images_that_changed_on_the_node_or_cannot_be_had_are_a_sentence(packed: Luggage, tmp_path: Path) -> None:
    Trainer(hide(packed))._data(packed.dataset)
    received = next((tmp_path / "node" / "received").rglob("*.png"))
    Image.new("RGB", (20, 20), "red").save(received)
    with pytest.raises(DatasetError, match="are not those of the study; remove that folder"):
        Trainer(hide(packed))._data(packed.dataset)
    with pytest.raises(DatasetError, match="cannot read the images of the study"):
        Trainer(replace(hide(packed), supply=None, fingerprint="another"))._data(packed.dataset)


def test_weights_are_brought_by_their_content(packed: Luggage, tmp_path: Path) -> None:
    digest, trainer = file_digest(tmp_path / "weights.pt"), Trainer(packed)
    assert trainer._weights_file(tmp_path / "weights.pt", digest) == tmp_path / "weights.pt"
    (tmp_path / "here.pt").write_bytes(b"of another study")
    brought = Trainer(packed)._weights_file(tmp_path / "here.pt", digest)
    assert brought.name == "here.pt" and file_digest(brought) == digest
    (tmp_path / "weights.pt").write_bytes(b"changed meanwhile")
    with pytest.raises(ModelError, match="changed while the study ran"):
        Trainer(packed)._weights_file(tmp_path / "gone.pt", digest)


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    with gated_mlflow(tmp_path_factory.mktemp("server")) as gate:
        yield gate


@pytest.fixture
def sending(gate: Gate, slot: Slot, request: pytest.FixtureRequest) -> Iterator[tuple[Left, Destination]]:
    """What a job left on a slot, and where its run's artifacts go."""
    tracker = MlflowTracker(gate.address)
    tracker.start_study(request.node.name, "T", {})
    to = tracker.destination(tracker.start_trial(request.node.name, "n", {}, {}))
    slot.run(Job(3, TrialConfig(), Path("elsewhere")))
    left = next(event for event in heard(slot) if isinstance(event, Left))
    assert to is not None and gate.address not in repr(to)
    yield left, to
    gate.open()


def known(left: Left) -> dict[str, tuple[int, str]]:
    return {file.path: (file.size, file.digest) for file in left.files}


def test_a_node_sends_its_files_to_the_server_and_what_is_not_there_as_it_was_is_not_confirmed(
    slot: Slot, sending: tuple[Left, Destination], tmp_path: Path
) -> None:
    left, to = sending
    sums = "".join(f"{file.digest}  {file.path}\n" for file in left.files)
    (tmp_path / "SHA256SUMS").write_text(sums)
    assert slot.send(3, left.files, to, 60) == Sent(tuple(FILES), "")
    assert to.take(tmp_path / "SHA256SUMS", "SHA256SUMS", file_digest(tmp_path / "SHA256SUMS")) == ""
    files = {**known(left), "SHA256SUMS": (len(sums), file_digest(tmp_path / "SHA256SUMS"))}
    assert to.confirmed(files) == files.keys()
    assert to.confirmed({**files, "exact": (999, files["exact"][1]), "gone": (1, "")}) == {*FILES, "SHA256SUMS"} - {
        "exact"
    }
    assert to.confirmed({**files, "exact": (1000, "0" * 64)}) == {*FILES, "SHA256SUMS"} - {"exact"}
    assert to.confirmed({**files, "SHA256SUMS": (len(sums), "0" * 64)}) == set()


def test_what_the_server_does_not_take_from_a_node_is_said(
    slot: Slot, sending: tuple[Left, Destination], gate: Gate
) -> None:
    left, to = sending
    gate.rule = lambda method, path, length: 403 if method == "PUT" and path.endswith("empty") else None
    sent = slot.send(3, left.files, to, 60)
    assert sent.paths == ("deep/large",) and sent.why.startswith("empty was not taken: ")
    gate.rule = lambda method, path, length: HANG
    assert slot.send(3, left.files, to, 0.2) == Sent((), "the tracking store did not take all within 0.2 s")


def test_a_file_that_the_server_keeps_otherwise_is_not_taken(sending: tuple[Left, Destination], tmp_path: Path) -> None:
    _, to = sending
    (tmp_path / "file").write_bytes(b"kept")
    assert to.take(tmp_path / "file", "a/file", "0" * 64) == "a/file was not kept as it was sent"
