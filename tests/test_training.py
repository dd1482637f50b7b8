"""Training against torch and torchvision: augmentation, schedule, freezing, determinism, evaluation."""

import gc
import weakref
from dataclasses import replace
from itertools import combinations

import pytest
import torch
import torchvision
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import kstest
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as oracle

from caltech_sweep import heartbeat as pulse
from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data import load_dataset
from caltech_sweep.data.images import LoadedData
from caltech_sweep.errors import DatasetError, DivergedError, ModelError
from caltech_sweep.training import augment
from caltech_sweep.training.device import has_bfloat16, pick_device, uses_bfloat16, uses_channels_last
from caltech_sweep.training.fit import Training
from caltech_sweep.training.models import build_model, not_finite, train_mode
from caltech_sweep.training.schedule import epoch_rates
from caltech_sweep.training.trial import TrialOutcome, run_trial

SHAPES = DatasetConfig(name="shapes", resize=32, crop=32, classes=4, images_per_class=8)
CONFIG = TrialConfig(dataset=SHAPES, arch="resnet18", epochs=2, batch_size=16, step_size=1, augment=("hflip",))


@pytest.fixture(scope="module")
def data() -> LoadedData:
    return load_dataset(SHAPES)


def run(config: TrialConfig, data: LoadedData) -> tuple[list, TrialOutcome]:
    trial, epochs = run_trial(config, data, pick_device("cpu")), []
    while True:
        try:
            epochs.append(next(trial))
        except StopIteration as end:
            return epochs, end.value


def test_every_augmentation_equals_torchvision_sample_by_sample(data: LoadedData) -> None:
    images = data.center_crops("train", 32)[:32].float() / 255
    draws = augment.draw(replace(CONFIG, augment=augment_all, seed=3), 1, 32)
    got = augment.apply(images, draws)
    (flip, _), (jittered, jitter), (turned, angle) = (draws.by_op[op] for op in augment_all)
    assert 0 < flip.sum() < 32 and 0 < jittered.sum() < 32 and 0 < turned.sum() < 32
    for index in range(32):
        want = images[index]
        if flip[index]:
            want = oracle.horizontal_flip(want)
        if jittered[index]:
            brightness, contrast, saturation = jitter[index].tolist()
            want = oracle.adjust_brightness(want, brightness)
            want = oracle.adjust_contrast(want, contrast)
            want = oracle.adjust_saturation(want, saturation)
        if turned[index]:
            want = oracle.rotate(want, angle[index].item())
        # Nearest-pixel rotation may fall on the other side of a tie for a few pixels in a thousand.
        assert ((got[index] - want).abs() > 1e-5).float().mean() < 0.005


def test_parameters_belong_to_the_sample_and_the_epoch() -> None:
    angles = [augment.draw(replace(CONFIG, augment=augment_all), epoch, 9).by_op["rotation"][1] for epoch in (1, 1, 2)]
    assert torch.equal(angles[0], angles[1]) and not torch.equal(angles[0], angles[2])


augment_all = ("hflip", "color_jitter", "rotation")
SUBSETS = [ops for count in range(4) for ops in combinations(augment_all, count)]


@pytest.mark.parametrize("ops", SUBSETS)
def test_what_an_op_draws_depends_on_no_other_op(ops: tuple[str, ...]) -> None:
    together = augment.draw(replace(CONFIG, augment=augment_all, seed=5), 2, 200)
    drawn = augment.draw(replace(CONFIG, augment=ops, seed=5), 2, 200)
    assert set(drawn.by_op) == set(ops)
    for op in ops:
        assert all(map(torch.equal, drawn.by_op[op], together.by_op[op])), op


# Of eight samples of epoch 3 with seed 7, as the first version with a generator for each op drew them.
FIRST_DRAWS = {
    "hflip": ([0, 1, 0, 1, 1, 1, 1, 0], []),
    "color_jitter": (
        [0, 0, 1, 1, 0, 1, 1, 0],
        ["0x1.57a0e60000000p-1", "0x1.5a1f320000000p+0", "0x1.0416160000000p+0", "0x1.626a560000000p+0"],
    ),
    "rotation": ([1, 0, 0, 0, 0, 0, 0, 0], ["0x1.04bc5e0000000p+4"]),
}


def test_what_the_first_ops_draw_stays_to_the_last_bit() -> None:
    draws = augment.draw(replace(CONFIG, augment=tuple(FIRST_DRAWS), seed=7), 3, 8)
    for op, (chosen, params) in draws.by_op.items():
        assert (chosen.int().tolist(), [float(v).hex() for v in params[chosen].flatten()[:4]]) == FIRST_DRAWS[op], op


def test_ops_draw_independently_and_as_often_and_as_wide_as_asked() -> None:
    count, probability, degrees = 20_000, 0.3, 25.0
    config = replace(CONFIG, augment=augment_all, seed=1, augment_probability=probability, rotation_degrees=degrees)
    drawn = augment.draw(config, 1, count).by_op
    hit = torch.stack([drawn[op][0] for op in augment_all]).double()
    assert torch.allclose(hit.mean(1), torch.tensor(probability).double(), atol=0.015)  # 4.6 standard errors
    assert (torch.corrcoef(hit) - torch.eye(3)).abs().max() < 0.03
    turned = drawn["rotation"][1][hit[2].bool(), 0] / degrees
    jittered = (drawn["color_jitter"][1][hit[1].bool()] - 1) / augment.JITTER
    for values in (turned, *jittered.T):
        assert kstest((values.double().numpy() + 1) / 2, "uniform").pvalue > 1e-4
    assert (torch.corrcoef(jittered.T) - torch.eye(3)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("precision", "device", "units", "arch", "expected"),
    [
        ("auto", "cuda", True, "alexnet", True),
        ("auto", "cuda", True, "mobilenet_v3_small", True),
        ("auto", "cuda", False, "alexnet", False),  # a GPU that emulates it, such as a T4
        ("bfloat16", "cuda", False, "alexnet", True),
        ("float32", "cuda", True, "alexnet", False),
        *(
            ("auto", "cpu", True, arch, True)
            for arch in ("alexnet", "resnext50_32x4d", "vgg11", "vit_b_16", "convnext_tiny")
        ),
        *(("auto", "cpu", True, arch, False) for arch in ("mobilenet_v3_small", "efficientnet_b0", "mnasnet0_5")),
        ("auto", "cpu", False, "alexnet", False),
        ("bfloat16", "cpu", False, "mobilenet_v3_small", True),
        ("float32", "cpu", True, "alexnet", False),
    ],
)
def test_auto_means_bfloat16_where_the_device_has_units_and_the_network_uses_them(
    precision: str, device: str, units: bool, arch: str, expected: bool
) -> None:
    config = TrialConfig(precision=precision, arch=arch)
    assert uses_bfloat16(config, torch.device(device), lambda asked: units) is expected


def test_auto_leaves_small_images_as_they_are_on_a_processor() -> None:
    config = TrialConfig(dataset=DatasetConfig(name="shapes", resize=32, crop=28))
    assert not uses_bfloat16(config, torch.device("cpu"), lambda asked: True)
    assert not uses_channels_last(config, torch.device("cpu"))
    assert uses_bfloat16(config, torch.device("cuda"), lambda asked: True)


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch does not say what the processor has")
def test_the_units_are_those_that_torch_finds() -> None:
    known = torch.cpu.get_capabilities()
    own = torch.backends.mkldnn.is_available() and any(known.get(n) for n in ("avx512_bf16", "amx_bf16", "bf16"))
    cpu, config = torch.device("cpu"), TrialConfig()
    assert uses_bfloat16(config, cpu) is has_bfloat16(cpu) is own
    for changes in ({}, {"arch": "mobilenet_v3_small"}, {"precision": "float32"}):
        assert uses_channels_last(replace(config, **changes), cpu) is torch.backends.mkldnn.is_available()
        assert not uses_channels_last(replace(config, **changes, channels_last=False), cpu)
        assert uses_channels_last(replace(config, **changes, channels_last=True), cpu)
    if torch.cuda.is_available():
        own = torch.cuda.get_device_capability(0) >= (8, 0)  # the first with such units, by NVIDIA's tables
        assert uses_bfloat16(config, torch.device("cuda:0")) is own


class Casts(TorchDispatchMode):
    """Counts how often tensors of a shape become bfloat16."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.count += args[0].shape == self.shape
        return func(*args, **kwargs)


def test_an_evaluation_in_bfloat16_casts_the_weights_once_and_finds_what_a_plain_loop_finds(data: LoadedData) -> None:
    config = replace(CONFIG, precision="bfloat16", batch_size=4)
    training = Training(config, data, build_model(config, 4), pick_device("cpu"))
    with Casts(training.model.layer4[0].conv1.weight.shape) as casts:
        for number in (1, 2):  # what is kept is kept for one evaluation: the next one sees other weights
            training.model.layer4[0].conv1.weight.data.mul_(number)
            found = training.evaluate("val")
            assert casts.count == number
    images = (data.center_crops("val", 32, range(len(data.labels("val")))).float() / 255 - 0.5) / 0.5
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        batches = [training.model(batch).float() for batch in images.split(4)]
    assert len(batches) > 1 and torch.equal(found.predictions, torch.cat(batches).argmax(1))


def test_the_schedule_is_torch_step_lr() -> None:
    config = TrialConfig(lr=0.03, step_size=3, gamma=0.1, epochs=10)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, config.step_size, config.gamma)
    for epoch in range(1, 11):
        assert epoch_rates(config, epoch) == pytest.approx((optimizer.param_groups[0]["lr"],))
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("arch", "how", "trained"),
    [
        ("alexnet", "none", {"features", "classifier"}),
        ("alexnet", "conv", {"classifier"}),
        ("alexnet", "fc", {"features"}),
        ("alexnet", "fc_but_last", {"features", "classifier.6"}),
        ("resnet50", "conv", {"fc"}),
    ],
)
def test_freezing_trains_what_it_says(arch: str, how: str, trained: set[str]) -> None:
    model = build_model(replace(CONFIG, arch=arch, freeze=how), 7)
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {n for n, _ in model.named_parameters() if any(n.startswith(f"{t}.") for t in trained)}
    assert free == wanted and free


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    model = build_model(replace(CONFIG, freeze="conv"), 4)
    before = model.bn1.running_mean.clone()
    train_mode(model, replace(CONFIG, freeze="conv"))
    model(torch.randn(4, 3, 32, 32))
    assert torch.equal(model.bn1.running_mean, before)


def test_models_that_cannot_be_are_sentences() -> None:
    with pytest.raises(ModelError, match="no classification model 'alexnt'; did you mean 'alexnet'"):
        build_model(replace(CONFIG, arch="alexnt"), 4)
    with pytest.raises(ModelError, match="fc_but_last freezes nothing"):
        build_model(replace(CONFIG, freeze="fc_but_last"), 4)
    with pytest.raises(ModelError, match="there is no file nowhere.safetensors"):
        build_model(replace(CONFIG, weights="file:nowhere.safetensors"), 4)


def test_initial_weights_are_torchvision_s_of_the_saved_file(tmp_path) -> None:
    other = torchvision.models.resnet18(num_classes=9)
    torch.save(other.state_dict(), tmp_path / "w.pt")
    model = build_model(replace(CONFIG, weights=f"file:{tmp_path / 'w.pt'}"), 4)
    assert torch.equal(model.layer4[1].conv2.weight, other.layer4[1].conv2.weight)
    assert model.fc.out_features == 4
    with pytest.raises(ModelError, match="do not fit"):
        build_model(replace(CONFIG, arch="alexnet", weights=f"file:{tmp_path / 'w.pt'}"), 4)


def test_the_same_config_trains_the_same_weights(data: LoadedData) -> None:
    first, other = run(CONFIG, data)[1], run(CONFIG, data)[1]
    torch.randn(3)
    assert all(torch.equal(first.weights[k], other.weights[k]) for k in first.weights)
    different = run(replace(CONFIG, seed=1), data)[1]
    assert any(not torch.equal(first.weights[k], different.weights[k]) for k in first.weights)


def test_the_best_epoch_is_the_earliest_of_the_highest(data: LoadedData) -> None:
    epochs, outcome = run(replace(CONFIG, epochs=4, lr=1e-9), data)
    accuracies = [epoch.val.accuracy for epoch in epochs]
    assert outcome.best.epoch == accuracies.index(max(accuracies)) + 1


def test_divergence_names_epoch_and_step(data: LoadedData) -> None:
    with pytest.raises(DivergedError, match=r"epoch \d+, step \d+"):
        run(replace(CONFIG, lr=1e30, epochs=3), data)


def test_a_batch_larger_than_the_data_is_refused(data: LoadedData) -> None:
    with pytest.raises(DatasetError, match="batch_size: 999 is more than the 32 training images"):
        run(replace(CONFIG, batch_size=999), data)


def test_every_step_of_training_and_evaluation_gives_a_sign_of_life(
    data: LoadedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "EVERY", 0.0)
    signs: list[int] = []
    config = replace(CONFIG, epochs=1, batch_size=5, test_batch_size=3, drop_last=False)
    with pulse.beating(lambda: signs.append(1)):
        run(config, data)
    steps = [-(-len(data.split.part(part)) // size) for part, size in (("train", 5), ("val", 5), ("test", 3))]
    assert len(signs) == sum(steps)
    pulse.beat()  # to nobody
    assert len(signs) == sum(steps)


@given(
    st.lists(st.floats(width=16), max_size=9),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(1, 3),
)
@example([], torch.float32, 1)
def test_what_is_not_finite_is_found_as_torch_finds_it(values: list[float], kind: torch.dtype, step: int) -> None:
    state = {"whole": torch.ones(3, dtype=torch.int64), "of it": torch.tensor(values, dtype=kind)[::step]}
    assert not_finite(state) == [name for name, value in state.items() if not value.isfinite().all()]


def test_a_test_takes_no_larger_steps_on_a_processor_than_a_validation() -> None:
    whole = load_dataset(DatasetConfig(name="shapes", resize=32, crop=32))
    config = replace(CONFIG, dataset=DatasetConfig(name="shapes", resize=32, crop=32), test_batch_size=256)
    training = Training(config, whole, build_model(config, len(whole.split.classes)), torch.device("cpu"))
    steps: list[int] = []
    training.model.register_forward_pre_hook(lambda model, given: steps.append(len(given[0])))
    assert len(training.evaluate("test").predictions) == 192 and steps == [64, 64, 64]
    steps.clear()
    training.config = replace(config, test_batch_size=50)
    training.evaluate("test")
    assert steps == [50, 50, 50, 42]


@pytest.mark.slow
def test_a_tiny_set_is_learnt_by_heart_and_tencrop_is_evaluated(data: LoadedData) -> None:
    epochs, outcome = run(
        replace(CONFIG, epochs=24, lr=0.02, step_size=18, augment=(), test_views="tencrop", drop_last=False), data
    )
    assert epochs[-1].train_accuracy > 0.85
    assert outcome.test_tencrop is not None
    assert set(outcome.metrics()) >= {"best/val_accuracy", "test/accuracy", "test_tencrop/accuracy"}


@pytest.mark.parametrize("changes", [{}, {"freeze": "conv"}, {"freeze": "conv", "unfreeze_epoch": 2}])
def test_a_training_is_gone_when_nobody_has_it(changes: dict, data: LoadedData) -> None:
    """Its memory, on a GPU too, is the next trial's at once, not after some garbage collection."""
    config = replace(CONFIG, **changes)
    gc.collect()
    gc.disable()
    try:
        training = Training(config, data, build_model(config, 4), torch.device("cpu"))
        while not training.ended:
            training.run_epoch()
        gone = weakref.ref(training)
        del training
        assert gone() is None
    finally:
        gc.enable()
