"""States at an address that machines without a common folder share: whole, checked when fetched, never in the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.heartbeat import leaving
from caltech_sweep.sweep.executors.base import Done, Epoch, Epochs, Job, Trained
from caltech_sweep.sweep.executors.luggage import Trainer, luggage_of
from caltech_sweep.sweep.executors.worker import train
from caltech_sweep.training.keys import CacheOptions
from caltech_sweep.training.mirror import MirroredCache, store_of
from helpers.places import Cli

DATASET = DatasetConfig(name="shapes", resize=32, crop=32, classes=3, images_per_class=8)
CONFIG = TrialConfig(dataset=DATASET, arch="squeezenet1_1", batch_size=8, epochs=2)


def write(cache: MirroredCache, name: str, content: bytes) -> bool:
    return cache.write(name, {"number": 7}, len(content), lambda path: path.write_bytes(content) and None)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path / 'bucket'}"


def machine(tmp_path: Path, name: str, url: str) -> MirroredCache:
    return MirroredCache(tmp_path / name, 10**6, url)


def test_what_one_machine_keeps_another_one_has(tmp_path: Path, url: str) -> None:
    one, other = machine(tmp_path, "one", url), machine(tmp_path, "other", url)
    assert not other.has("stage-a") and other.open("stage-a") is None
    assert write(one, "stage-a", b"weights")
    one.flush()
    assert other.has("stage-a")
    found = other.open("stage-a")
    assert found is not None and found[0] == {"number": 7} and found[1].read_bytes() == b"weights"
    one.discard("stage-a")
    one.flush()
    assert not machine(tmp_path, "third", url).has("stage-a") and other.has("stage-a")
    assert not one.take_warnings() and not other.take_warnings()


def test_an_entry_pushed_out_of_a_small_folder_stays_at_the_address(tmp_path: Path, url: str) -> None:
    small = MirroredCache(tmp_path / "small", 3000, url)
    for name in ("stage-a", "stage-b"):
        assert write(small, name, bytes(2000))
        small.flush()
    assert not (tmp_path / "small" / "stage-a").exists()
    assert small.open("stage-a") is not None
    assert not (tmp_path / "small" / "stage-b").exists()


def test_a_half_or_damaged_entry_at_the_address_is_none(tmp_path: Path, url: str) -> None:
    one = machine(tmp_path, "one", url)
    for name in ("stage-half", "stage-damaged"):
        write(one, name, b"weights")
    one.flush()
    (tmp_path / "bucket" / "stage-half" / "header.json").unlink()  # whose machine died before it was sent
    (tmp_path / "bucket" / "stage-damaged" / "data").write_bytes(b"wAights")
    other = machine(tmp_path, "other", url)
    assert not other.has("stage-half")
    assert other.open("stage-damaged") is None and "is damaged" in " ".join(other.take_warnings())


def test_an_address_that_fails_is_one_warning_and_the_folder_goes_on(tmp_path: Path) -> None:
    (tmp_path / "bucket").write_text("a file, where a folder was to be")
    one = machine(tmp_path, "one", f"file://{tmp_path / 'bucket'}")
    for name in ("stage-a", "stage-b"):
        assert write(one, name, b"weights") and one.open(name) is not None
    one.flush()
    (warning,) = one.take_warnings()
    assert "cannot be used for training states now" in warning


def test_a_trial_goes_on_from_the_states_of_another_machine(tmp_path: Path, url: str) -> None:
    data = load_dataset(DATASET)
    ended = []
    for name in ("one", "other"):
        (tmp_path / name / "left").mkdir(parents=True)
        states = CacheOptions(tmp_path / name / "states", 10**9, save_at=frozenset({1}), url=url)
        job = Job(0, CONFIG, tmp_path / name / "left", stages=states, device="cpu")
        epochs, events = train(job, lambda config: data), []
        while True:
            try:
                event = next(epochs)
                events += [event] if event != Trained(0) else []
            except StopIteration as end:
                ended.append((events, end.value))
                break
        store = store_of(replace(states))
        assert isinstance(store, MirroredCache)
        store.flush()
    (first, one), (second, other) = ended
    assert [event.reused for event in first] == [False, False] and [event.reused for event in second] == [True, True]
    assert isinstance(one, Done) and all(isinstance(event, Epoch) for event in second)
    assert one.metrics == other.metrics


def test_the_state_after_the_epoch_in_which_a_machine_is_taken_away_is_at_the_address_when_the_job_ends(
    tmp_path: Path, url: str
) -> None:
    luggage = luggage_of(DATASET, load_dataset(DATASET), None, tmp_path / "mark")

    def epochs_of(name: str) -> Epochs:
        states = CacheOptions(tmp_path / name, 10**9, url=url)
        job = Job(0, replace(CONFIG, epochs=4), tmp_path / name, stages=states, device="cpu")
        return Trainer(replace(luggage, shared_cache=True))(job)

    try:
        epochs = epochs_of("taken")
        assert not next(epochs).reused
        leaving.set()
        assert next(epochs).epoch == 2
        epochs.close()
    finally:
        leaving.clear()
    epochs = epochs_of("other")
    assert [next(epochs).reused for _ in range(3)] == [True, True, False]
    epochs.close()


@pytest.mark.parametrize("address", ["nosuch://bucket/states", "s3a-://x"])
def test_an_address_that_nothing_reads_is_refused(cli: Cli, place: Path, address: str) -> None:
    result = cli("run", "tiny", "--cache", address)
    assert result.exit_code == 2 and f"--cache: {address} cannot be used" in result.output
    assert result.output.count("\n") == 1 and not (place / "mlruns").exists()
