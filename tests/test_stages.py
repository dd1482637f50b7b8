"""Stages: resumed, branched and repeated trainings are the uninterrupted one, bit for bit; and where they are kept."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from caltech_sweep.config import TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.data.images import LoadedData
from caltech_sweep.errors import ModelError
from caltech_sweep.sweep.executors.base import Job, Trained
from caltech_sweep.sweep.executors.worker import train
from caltech_sweep.training import cache, device
from caltech_sweep.training import checkpoints as stages
from caltech_sweep.training import keys as reuse
from caltech_sweep.training.cache import Cache, default_budget
from caltech_sweep.training.checkpoints import identity, stored_epochs
from caltech_sweep.training.evaluate import Evaluation
from caltech_sweep.training.fit import EpochResult, Training
from caltech_sweep.training.keys import CacheOptions, checkpoint_keys, epoch_marks, prefix_key
from caltech_sweep.training.models import build_model
from caltech_sweep.training.schedule import epoch_rates, learning_rates
from caltech_sweep.training.trial import TrialOutcome, run_trial
from helpers.marks import slow_but
from helpers.trials import CONFIG, CPU, SHAPES, run, use_of

EVERY_EPOCH = frozenset(range(1, 5))
USE = CacheOptions(Path(), 0)


@pytest.fixture(scope="module")
def data() -> LoadedData:
    return load_dataset(SHAPES)


def kill_after(epochs: int, config: TrialConfig, data: LoadedData, use: CacheOptions) -> None:
    trial = run_trial(config, data, CPU, stages=use)
    for _ in range(epochs):
        next(trial)
    trial.close()


def facts(epoch: EpochResult) -> tuple:
    """All of an epoch but how long it took and who trained it."""
    val = (epoch.val.loss, epoch.val.accuracy, epoch.val.predictions.tolist(), epoch.val.confidences.tolist())
    return epoch.epoch, epoch.lr, epoch.train_loss, epoch.train_accuracy, epoch.images, val


def assert_same(got: tuple[list[EpochResult], TrialOutcome], want: tuple[list[EpochResult], TrialOutcome]) -> None:
    assert list(map(facts, got[0])) == list(map(facts, want[0]))
    assert facts(got[1].best) == facts(want[1].best)
    assert got[1].metrics() == want[1].metrics()
    assert got[1].test.confidences.tolist() == want[1].test.confidences.tolist()
    assert got[1].weights.keys() == want[1].weights.keys()
    assert all(torch.equal(got[1].weights[name], value) for name, value in want[1].weights.items())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"optimizer": "sgd"}, id="sgd"),
        pytest.param(
            {"optimizer": "sgd", "momentum": 0.0, "freeze": "fc_but_last", "channels_last": True},
            id="plain sgd, frozen",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"optimizer": "adam", "lr": 0.001, "arch": "squeezenet1_1", "augment": ()},
            id="adam",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"optimizer": "adamw", "lr": 0.001, "channels_last": True, "precision": "bfloat16"},
            id="adamw, bfloat16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_killed_after_every_epoch_is_uninterrupted(changes: dict, data: LoadedData, tmp_path: Path) -> None:
    config, use = replace(CONFIG, **changes), use_of(tmp_path)
    want = run(config, data)
    for epoch in (1, 2, 3):
        kill_after(epoch, config, data, use)
    got = run(config, data, use)
    assert_same(got, want)
    assert [epoch.reused for epoch in got[0]] == [True, True, True, False]
    assert (got[1].epochs_reused, got[1].epochs_trained, got[1].warnings) == (3, 1, ())


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, "tests")
from dataclasses import replace
from pathlib import Path
from caltech_sweep.data import load_dataset
from helpers import trials as t
torch.set_num_threads(int(sys.argv[2]))
data = load_dataset(t.SHAPES)
for _ in range(3):
    child = os.fork()
    if child == 0:
        trained = 0
        for epoch in t.run_trial(t.CONFIG, data, t.CPU, stages=t.use_of(Path(sys.argv[1]))):
            trained += not epoch.reused
            if trained == 2 or epoch.epoch == 4:  # the state before this one is kept, its own is being written
                os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


@pytest.mark.slow
def test_processes_killed_after_every_epoch_leave_an_uninterrupted_training(data: LoadedData, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(torch.get_num_threads())]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    got = run(CONFIG, data, use_of(tmp_path))
    assert got[1].epochs_reused >= 3 and got[1].epochs_reused + got[1].epochs_trained == 4 and not got[1].warnings
    assert_same(got, run(CONFIG, data))


@pytest.mark.slow
def test_a_branch_of_a_shared_trunk_is_a_training_of_its_own(data: LoadedData, tmp_path: Path) -> None:
    use = use_of(tmp_path, frozenset({2}))
    run(CONFIG, data, use)
    branch = replace(CONFIG, step_size=3, gamma=0.5)
    got = run(branch, data, use)
    assert (got[1].epochs_reused, got[1].epochs_trained) == (2, 2)
    assert_same(got, run(branch, data))
    longer = run(replace(CONFIG, epochs=5), data, use)
    assert (longer[1].epochs_reused, longer[1].epochs_trained) == (4, 1)


def test_a_repeated_trial_only_evaluates_its_test(data: LoadedData, tmp_path: Path) -> None:
    use = use_of(tmp_path, frozenset())
    first = run(CONFIG, data, use)
    assert len(Cache(tmp_path, 0).entries()) == 1  # the last epoch is always kept
    assert_same(run(CONFIG, data, use), first)
    views = replace(CONFIG, test_views="tencrop", test_batch_size=20)
    assert stored_epochs(views, data, CPU, None, use) == 4
    got, alone = run(views, data, use), run(views, data)
    assert_same(got, alone)
    assert got[1].epochs_trained == 0 and got[1].test_tencrop is not None and alone[1].test_tencrop is not None
    assert got[1].test_tencrop.confidences.tolist() == alone[1].test_tencrop.confidences.tolist()


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    slow_but(["weights"], ["weights", "truncated", "names", "header", "emptied"]),
)
def test_a_damaged_stage_is_trained_again(harm: str, data: LoadedData, tmp_path: Path) -> None:
    use = use_of(tmp_path, frozenset())
    want = run(CONFIG, data, use)
    [entry] = tmp_path.glob("stage-*")
    if harm == "truncated":
        os.truncate(entry / "data", (entry / "data").stat().st_size // 2)
    elif harm == "emptied":
        (entry / "header.json").write_bytes(b"")
    else:
        _flip(
            entry / ("header.json" if harm == "header" else "data"),
            {"weights": -1000, "names": 40, "header": 300}[harm],
        )
    got = run(CONFIG, data, use)
    assert_same(got, want)
    assert got[1].epochs_trained == 4
    [warning] = got[1].warnings
    assert str(entry) in warning and "damaged" in warning
    assert run(CONFIG, data, use)[1].epochs_trained == 0


def test_saves_for_resuming_wait_until_they_are_cheap(data: LoadedData, tmp_path: Path) -> None:
    run(CONFIG, data, replace(use_of(tmp_path, frozenset()), every_seconds=0.0))
    assert len(Cache(tmp_path, 0).entries()) == 1  # a second of training does not pay for one in the midst of it


def epochs_in(folder: Path) -> list[int]:
    store = Cache(folder, 0)
    return sorted(len(store.open(entry.name)[0]["history"]) for entry in store.entries())


@pytest.mark.slow
def test_what_only_serves_resuming_gives_way_to_what_is_later(
    data: LoadedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "SAVING_SHARE", math.inf)
    use = replace(use_of(tmp_path, frozenset({2})), every_seconds=0.0)
    config = replace(CONFIG, epochs=6)
    kill_after(1, config, data, use)
    assert epochs_in(tmp_path) == [1]
    kill_after(4, config, data, use)
    assert epochs_in(tmp_path) == [2, 4]
    kill_after(5, replace(config, epochs=7), data, use)  # another trial goes on from there: it is not its own to drop
    assert epochs_in(tmp_path) == [2, 4, 5]
    Cache(tmp_path, 0).clear()
    kill_after(4, config, data, use)
    run(config, data, use)
    assert epochs_in(tmp_path) == [2, 6]


def test_training_goes_on_while_a_state_is_written_and_ends_after_it(
    data: LoadedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, written = threading.Event(), stages.save_file

    def slowly(tensors: dict[str, torch.Tensor], path: Path) -> None:
        assert disk.wait(60)
        written(tensors, path)

    monkeypatch.setattr(stages, "save_file", slowly)
    trial = run_trial(CONFIG, data, CPU, stages=use_of(tmp_path, frozenset({1, 4})))
    assert [next(trial).saving for _ in range(3)] == [1, 2, 3]  # that of epoch 1 waits for the disk all the time
    assert epochs_in(tmp_path) == []
    threading.Timer(0.2, disk.set).start()
    assert next(trial).epoch == 4
    with pytest.raises(StopIteration):
        next(trial)
    assert epochs_in(tmp_path) == [1, 4]
    assert_same(run(CONFIG, data, use_of(tmp_path)), run(CONFIG, data))


def test_a_last_state_is_what_was_trained_though_the_best_weights_are_tested_while_it_is_written(
    data: LoadedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested, written, evaluate = threading.Event(), stages.save_file, Training.evaluate

    def after_the_test(tensors: dict[str, torch.Tensor], path: Path) -> None:
        assert tested.wait(60)
        written(tensors, path)

    def test(training: Training, part: str, views: str = "center") -> Evaluation:
        found = evaluate(training, part, views)
        if part == "test":
            tested.set()
        return found

    monkeypatch.setattr(stages, "save_file", after_the_test)
    monkeypatch.setattr(Training, "evaluate", test)
    short, long = replace(CONFIG, epochs=2, step_size=9), replace(CONFIG, epochs=4, step_size=9)
    first = run(short, data, use_of(tmp_path, frozenset({2})))
    assert first[1].best.epoch == 1 and epochs_in(tmp_path) == [2]
    went_on = run(long, data, use_of(tmp_path, frozenset()))
    assert went_on[1].epochs_reused == 2
    assert_same(went_on, run(long, data))


def test_a_trial_that_is_stopped_waits_for_its_state_and_one_that_may_pause_has_it_at_once(
    data: LoadedData, tmp_path: Path
) -> None:
    kill_after(2, CONFIG, data, use_of(tmp_path / "stopped", frozenset({2})))
    assert epochs_in(tmp_path / "stopped") == [2]
    trial = run_trial(CONFIG, data, CPU, stages=replace(use_of(tmp_path / "paused"), hold_at=frozenset({1})))
    assert next(trial).saving == 0 and epochs_in(tmp_path / "paused") == [1]


def test_what_goes_wrong_while_a_state_is_written_is_told_like_any_other_error(
    data: LoadedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(tensors: dict[str, torch.Tensor], path: Path) -> None:
        raise ValueError("no such tensors")

    monkeypatch.setattr(stages, "save_file", refused)
    with pytest.raises(ValueError, match="no such tensors"):
        run(CONFIG, data, use_of(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_state_is_saved_where_it_spares_more_than_it_costs(
    data: LoadedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use, config = replace(use_of(tmp_path, frozenset({1, 2})), hold_at=frozenset({3})), replace(CONFIG, epochs=5)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_FIRST_RATE", 1.0)  # a byte a second
        run(config, data, use)
    assert epochs_in(tmp_path) == [3]  # where a trial may pause it is saved at any cost
    run(config, data, use)
    assert epochs_in(tmp_path) == [3, 5]
    Cache(tmp_path, 0).clear()
    run(config, data, use)
    assert epochs_in(tmp_path) == [1, 2, 3, 5]


@pytest.mark.parametrize("changes", [{"freeze": "conv", "augment": ()}, {"ema_decay": 0.5}], ids=["frozen", "average"])
def test_a_state_holds_what_its_start_lacks_once_and_older_ones_are_read(changes: dict, data: LoadedData) -> None:
    config = replace(CONFIG, **changes)
    first = Training(config, data, build_model(config, 3), CPU)
    first.run_epoch()
    state = stages.capture(first)
    names = {name.partition(".")[2] for name in state.tensors if name.startswith("model.")}
    trained = {name for name, parameter in first.model.named_parameters() if parameter.requires_grad}
    statistics = set() if config.freeze == "conv" else {name for name, _ in first.model.named_buffers()}
    assert names == trained | statistics and not state.group("best")
    older = {f"{kind}.{k}": v for kind in ("model", "best") for k, v in first.model.state_dict().items()}
    older |= {f"best.{name}": value for name, value in first.best_weights.items()}
    second = []
    for stage in (state, stages.Checkpoint(state.header, {**state.tensors, **older})):
        training = Training(config, data, build_model(config, 3), CPU)
        stages.restore(training, stage)
        assert all(torch.equal(value, first.best_weights[name]) for name, value in training.best_weights.items())
        training.run_epoch()
        second.append(training.model.state_dict())
    first.run_epoch()
    for got in second:
        assert all(torch.equal(value, got[name]) for name, value in first.model.state_dict().items())


FULL_DISK = """
import json, resource, sys
sys.path.insert(0, "tests")
from dataclasses import replace
from pathlib import Path
from caltech_sweep.data import load_dataset
from helpers import trials as t
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))  # a stage needs more: its write really fails
data = load_dataset(t.SHAPES)
found = [t.run(config, data, t.use_of(Path(sys.argv[1])))[1] for config in (t.CONFIG, replace(t.CONFIG, lr=0.01))]
print(json.dumps([(outcome.epochs_trained, outcome.warnings) for outcome in found]))
"""


@pytest.mark.slow
def test_a_full_disk_stops_the_saving_not_the_trials(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    (trained, [warning]), (again, none) = json.loads(done.stdout)
    assert (trained, again, none) == (4, 4, [])
    assert "nothing more is cached" in warning and "large" in warning
    assert not list(tmp_path.iterdir())


def test_the_runner_says_what_was_reused(tmp_path: Path) -> None:
    job = Job(7, CONFIG, tmp_path / "one", device="cpu", stages=use_of(tmp_path / "stages", frozenset()))
    for reused in (False, True):
        epochs = train(job)
        assert [next(epochs).reused for _ in range(4)] == [reused] * 4 and next(epochs) == Trained(7)
        with pytest.raises(StopIteration) as end:
            next(epochs)
        tags = end.value.value.tags
        assert tags["environment.precision"] == "float32"  # since it has depthwise convolutions
        assert tags["environment.channels_last"] == str(device.uses_channels_last(CONFIG, CPU))
        assert (tags["reuse.epochs_reused"], tags["reuse.epochs_trained"]) == (("4", "0") if reused else ("0", "4"))


# What is in the key


def test_only_what_decides_the_weights_is_in_the_key(data: LoadedData) -> None:
    def key(**changes: object) -> str:
        return reuse.digest(identity(replace(CONFIG, **{"precision": "float32", **changes}), data, CPU, None, USE))

    base = key()
    same: list[dict] = [
        {"test_views": "tencrop"},
        {"test_batch_size": 3},
        {"lr": 0.3, "step_size": 7, "gamma": 0.2, "epochs": 9},  # the list of learning rates is the rest of the key
        {"rotation_degrees": 3.0},
        {"outputs": 3},
        {"normalize": "half"},
        {"channels_last": False},
        {"precision": "auto", "channels_last": False},  # depthwise convolutions: what it means on every processor
        {"weight_decay": 5e-5},
    ]
    for changes in same:
        assert key(**changes) == base, changes
    different: list[dict] = [
        {"arch": "resnet18"},
        {"outputs": 4},
        {"freeze": "conv"},
        {"optimizer": "adam"},
        {"momentum": 0.8},
        {"weight_decay": 0},
        {"batch_size": 4},
        {"drop_last": False},
        {"augment": ()},
        {"augment": ("hflip", "rotation")},
        {"augment_probability": 0.4},
        {"normalize": "imagenet"},
        {"seed": 1},
        {"precision": "bfloat16"},
        {"channels_last": True},
        {"dataset": replace(SHAPES, crop=28)},
    ]
    keys = [key(**changes) for changes in different]
    assert len({base, *keys}) == len(different) + 1
    assert key(optimizer="adam", momentum=0.1) == key(optimizer="adam")
    assert key(augment=(), augment_probability=0.1) == key(augment=())


def test_the_version_of_the_augmentations_counts_for_those_who_have_any(data: LoadedData) -> None:
    plain = identity(replace(CONFIG, augment=()), data, CPU, None, USE)
    for augment in (("hflip",), ("color_jitter", "rotation")):
        augmented = identity(replace(CONFIG, augment=augment), data, CPU, None, USE)
        assert augmented["augmentation"] == reuse.AUGMENTATION_VERSION
    assert "augmentation" not in plain


def test_other_images_devices_versions_and_code_never_share(
    data: LoadedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = use_of(tmp_path, frozenset())
    run(CONFIG, data, use)

    def stored(data: LoadedData = data) -> int:
        return stored_epochs(CONFIG, data, CPU, None, use)

    assert stored() == 4
    assert stored(load_dataset(replace(SHAPES, images_per_class=7))) == 0
    changes: list[tuple[object, str, object]] = [
        (device, "TRAINING_VERSION", device.TRAINING_VERSION + 1),
        (torch, "__version__", "9.9.9"),
        (sys.modules["torchvision"], "__version__", "9.9.9"),
        (sys.modules["numpy"], "__version__", "9.9.9"),
        (torch, "get_num_threads", lambda: 999),
        (torch.backends.cpu, "get_cpu_capability", lambda: "another"),
    ]
    for owner, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert stored() == 0, name
    meta = identity(CONFIG, data, torch.device("meta"), None, USE)
    assert reuse.digest(meta) != reuse.digest(identity(CONFIG, data, CPU, None, USE))
    assert stored() == 4


def test_initial_weights_count_by_their_contents(data: LoadedData, tmp_path: Path) -> None:
    for name, content in (("a.pt", b"one"), ("b.pt", b"one"), ("c.pt", b"two")):
        (tmp_path / name).write_bytes(content)

    def key(weights: str, file: str | None = None) -> str:
        place = tmp_path / file if file else None
        return reuse.digest(identity(replace(CONFIG, weights=weights), data, CPU, place, USE))

    first = key(f"file:{tmp_path / 'a.pt'}")
    assert key(f"file:{tmp_path / 'b.pt'}") == key("run:abc", "a.pt") == key("study:source", "b.pt") == first
    assert key(f"file:{tmp_path / 'c.pt'}") != first
    with pytest.raises(ModelError, match="there is no file"):
        key("run:abc", "nowhere.pt")


SCHEDULES = st.builds(
    TrialConfig,
    lr=st.sampled_from([0.1, 0.03, 0.01]),
    step_size=st.integers(1, 12),
    gamma=st.sampled_from([1.0, 0.5, 0.1]),
    epochs=st.integers(1, 12),
)


@given(SCHEDULES, SCHEDULES)
def test_two_schedules_share_exactly_the_epochs_in_which_their_rates_agree(
    one: TrialConfig, other: TrialConfig
) -> None:
    assert prefix_key(one) == prefix_key(other)
    rates, others = learning_rates(one), learning_rates(other)
    assert rates == tuple(epoch_rates(one, epoch) for epoch in range(1, one.epochs + 1))
    agree = True
    keys = zip(*(checkpoint_keys("base", epoch_marks(config)) for config in (one, other)), strict=False)
    for rate, other_rate, (key, other_key) in zip(rates, others, keys, strict=False):
        agree = agree and rate == other_rate
        assert (key == other_key) == agree


def test_what_sets_two_trunks_apart() -> None:
    base = prefix_key(CONFIG)
    assert prefix_key(replace(CONFIG, test_views="tencrop", epochs=9, dataset=replace(SHAPES, root="x"))) == base
    for changes in (
        {"weights": "imagenet"},
        {"dataset": replace(SHAPES, classes=2)},
        {"seed": 1},
        {"precision": "float32"},
    ):
        assert prefix_key(replace(CONFIG, **changes)) != base


# The store


def keep(store: Cache, name: str, content: bytes) -> bool:
    return store.write(name, {"is": name}, len(content), lambda path: path.write_bytes(content) and None)


def test_the_budget_drops_what_was_unused_for_longest(tmp_path: Path) -> None:
    store = Cache(tmp_path / "stages", 3500)
    for number in range(3):
        assert keep(store, f"stage-{number}", b"x" * 1000)
        os.utime(store.folder / f"stage-{number}", (number, number))
    assert store.open("stage-0") is not None  # used just now
    assert keep(store, "stage-3", b"x" * 1000)
    assert [entry.name for entry in store.entries()] == ["stage-2", "stage-0", "stage-3"]
    assert store.size() <= 3500
    assert not keep(store, "stage-4", b"x" * 4000) and not keep(store, "stage-5", b"x" * 4000)
    [warning] = store.take_warnings()
    assert "more than the whole budget" in warning and store.take_warnings() == ()
    assert keep(store, "stage-6", b"x")  # smaller ones are still kept


def test_how_long_writing_takes_is_known_from_what_was_written(tmp_path: Path) -> None:
    store, size = Cache(tmp_path, 10**9), 40_000_000
    assert store.seconds_to_write(500_000_000) == 1.0
    assert keep(store, "stage-small", b"x") and store.seconds_to_write(500_000_000) == 1.0  # tells nothing
    start = time.monotonic()
    assert keep(store, "stage-large", bytes(size))
    taken = time.monotonic() - start
    assert 0 < store.seconds_to_write(size) <= taken and store.seconds_to_write(2 * size) <= 2 * taken


def test_what_a_paused_trial_goes_on_from_is_dropped_last_within_half_of_the_room(tmp_path: Path) -> None:
    store = Cache(tmp_path / "stages", 4500)

    def kept(number: int, *holders: str) -> list[str]:
        assert keep(store, f"stage-{number}", b"x" * 1000)
        for holder in holders:
            store.hold(f"stage-{number}", holder)
        os.utime(store.folder / f"stage-{number}", (number, number))
        return sorted(entry.name for entry in store.entries())

    kept(0, "one", "two")
    for number in (1, 2, 3):
        kept(number)
    assert kept(4) == ["stage-0", "stage-2", "stage-3", "stage-4"]  # the oldest one is held
    kept(5, "three")
    assert kept(6, "four") == ["stage-0", "stage-4", "stage-5", "stage-6"]
    assert kept(7) == ["stage-4", "stage-5", "stage-6", "stage-7"]  # held ones had more than half
    store.release("stage-5", "nobody")
    store.release("stage-5", "three")
    assert kept(8, "five") == ["stage-5", "stage-6", "stage-7", "stage-8"]
    assert kept(9) == ["stage-6", "stage-7", "stage-8", "stage-9"]
    assert {entry.name for entry in store.entries() if entry.held} == {"stage-6", "stage-8"}
    assert store.open("stage-6") is not None  # a hold is no damage
    store.hold("stage-99", "nothing")  # neither is one of what is not there
    assert not (store.folder / "stage-99").exists()


def test_what_is_being_written_is_never_dropped(tmp_path: Path) -> None:
    store, other = Cache(tmp_path, 5000), Cache(tmp_path, 5000)

    def fill(path: Path) -> None:
        path.write_bytes(b"slow")
        os.utime(path.parent.parent, (0, 0))  # as if it took hours
        assert other.clear() == 0
        assert keep(other, "stage-other", b"x" * 4000)

    assert store.write("stage-slow", {}, 4, fill)
    assert store.open("stage-slow") is not None
    for name in (".new-left", ".writing-left"):  # by processes that died, the second of an earlier version
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_bytes(b"half")
        os.utime(tmp_path / name, (0, 0))
    assert store.clear() > 4000
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = Cache(tmp_path / "file" / "stages", 5000)
    assert not keep(store, "stage-1", b"x") and not keep(store, "stage-2", b"x")
    assert len(store.take_warnings()) == 1 and store.open("stage-1") is None
    with store.lock("stage-1"):
        pass


def test_the_default_budget_is_a_tenth_of_the_disk_at_most(tmp_path: Path) -> None:
    assert 0 < default_budget(tmp_path / "not" / "yet") <= 20 * 10**9


HAMMER = """
import sys
from pathlib import Path
from caltech_sweep.training.cache import Cache
store, seed = Cache(Path(sys.argv[1]), 6000), int(sys.argv[2])
for number in range(200):
    name, other = f"stage-{(number * 7 + seed) % 9}", f"stage-{(number + seed) % 9}"
    content = name.encode() * 100
    store.write(name, {"is": name}, len(content), lambda path: path.write_bytes(content) and None)
    found = store.open(other)
    assert found is None or found[0]["is"] == other
assert store.take_warnings() == ()
"""


def test_many_processes_share_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HAMMER, str(tmp_path)]
    root = Path(__file__).parent.parent
    processes = [subprocess.Popen([*command, str(seed)], cwd=root) for seed in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert 0 < Cache(tmp_path, 0).size() <= 6000
    assert not list(tmp_path.glob(".*"))
