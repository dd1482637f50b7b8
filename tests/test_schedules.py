"""Learning-rate schedules against torch's own, their warm-up, and which epochs they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as oracle

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.training.schedule import SCHEDULES, epoch_rates, learning_rates, shared_epochs

EPOCHS, STEPS = 12, 7
CONFIG = TrialConfig(lr=0.3, epochs=EPOCHS, step_size=5, gamma=0.2, milestones=(3, 7), min_lr=0.01, cooldown_epochs=4)


def wsd(optimizer: torch.optim.Optimizer) -> Any:
    down = oracle.LinearLR(optimizer, 1.0, 0.01 / 0.3, total_iters=4 * STEPS)
    flat = oracle.ConstantLR(optimizer, 1.0)
    return oracle.SequentialLR(optimizer, [flat, down], milestones=[8 * STEPS])


# Of torch's schedulers, those that step once an epoch and those that step with every batch.
ORACLES: dict[str, tuple[bool, Callable[[torch.optim.Optimizer], Any]]] = {
    "step": (False, lambda o: oracle.StepLR(o, 5, 0.2)),
    "multistep": (False, lambda o: oracle.MultiStepLR(o, [3, 7], 0.2)),
    "constant": (False, lambda o: oracle.ConstantLR(o, 1.0)),
    "cosine": (True, lambda o: oracle.CosineAnnealingLR(o, EPOCHS * STEPS, 0.01)),
    "linear": (True, lambda o: oracle.LinearLR(o, 1.0, 0.01 / 0.3, EPOCHS * STEPS)),
    "one_cycle": (True, lambda o: oracle.OneCycleLR(o, 0.3, total_steps=EPOCHS * STEPS, cycle_momentum=False)),
    "wsd": (True, wsd),
}


def of_torch(make: Callable[[torch.optim.Optimizer], Any], count: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule, rates = make(optimizer), []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def every_step(config: TrialConfig, steps: int = STEPS) -> list[float]:
    """Return the rate of each step of a training."""
    lists = learning_rates(config, steps)
    return [rate for rates in lists for rate in (rates if len(rates) > 1 else rates * steps)]


def test_every_schedule_has_an_oracle() -> None:
    assert ORACLES.keys() == SCHEDULES.keys()


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.filterwarnings("ignore:The epoch parameter in")
def test_the_rate_of_every_step_is_torch_s(name: str) -> None:
    per_step, make = ORACLES[name]
    rates = of_torch(make, EPOCHS * (STEPS if per_step else 1))
    want = rates if per_step else [rate for rate in rates for _ in range(STEPS)]
    assert every_step(replace(CONFIG, schedule=name)) == pytest.approx(want, rel=1e-9)
    assert SCHEDULES[name].per_step is per_step


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize(
    "warmup", [{"warmup_epochs": 2}, {"warmup_steps": 10}, {"warmup_epochs": 1, "warmup_steps": 3}]
)
def test_a_warm_up_is_torch_s_linear_one_times_the_schedule(name: str, warmup: dict[str, int]) -> None:
    steps = warmup.get("warmup_epochs", 0) * STEPS + warmup.get("warmup_steps", 0)
    ramp = of_torch(lambda o: oracle.LinearLR(o, 1 / (steps + 1), 1.0, steps), EPOCHS * STEPS)
    plain = every_step(replace(CONFIG, schedule=name))
    want = [rate * factor / 0.3 for rate, factor in zip(plain, ramp, strict=True)]
    assert every_step(replace(CONFIG, schedule=name, **warmup)) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2])
def test_no_length_is_too_short(name: str, epochs: int, steps: int) -> None:
    config = replace(CONFIG, schedule=name, epochs=epochs, warmup_epochs=9)
    assert all(math.isfinite(rate) and 0 < rate <= 0.3 for rate in every_step(config, steps))


def test_a_rate_that_holds_all_through_an_epoch_is_one_number() -> None:
    rates = learning_rates(replace(CONFIG, schedule="wsd"), STEPS)
    assert [len(epoch) for epoch in rates] == [1] * 8 + [STEPS] * 4
    assert learning_rates(replace(CONFIG, schedule="step"), STEPS) == learning_rates(replace(CONFIG, schedule="step"))
    warm = replace(CONFIG, schedule="step", warmup_steps=STEPS + 1)
    assert [len(epoch) for epoch in learning_rates(warm, STEPS)] == [STEPS] * 2 + [1] * 10


@pytest.mark.parametrize("steps", [2, 8, 13])
def test_which_schedules_share_what_is_as_documented(steps: int) -> None:
    def shared(name: str, other: str | None = None, **changes: Any) -> int:
        one, two = replace(CONFIG, schedule=name), replace(CONFIG, schedule=other or name, **changes)
        return shared_epochs(learning_rates(one, steps), learning_rates(two, steps))

    assert shared("wsd", epochs=30) == 8  # all but the cool-down
    assert shared("wsd", cooldown_epochs=2) == 8
    assert shared("constant", epochs=30) == 12
    assert shared("step", step_size=3) == 3 and shared("multistep", milestones=(3, 9)) == 7
    assert shared("step", "constant") == 5 == shared("step", "wsd")
    for name in ("cosine", "linear", "one_cycle"):
        assert shared(name, epochs=13) == 0 and shared(name) == 12
    for name in SCHEDULES:
        assert shared(name, warmup_steps=3) == 0 and shared(name, lr=0.2) == 0


def test_the_nominal_length_of_an_epoch_gives_the_epochs_that_any_other_gives() -> None:
    configs = [
        replace(CONFIG, schedule=name, **changes)
        for name in SCHEDULES
        for changes in ({}, {"epochs": 9}, {"warmup_epochs": 1}, {"warmup_epochs": 1, "epochs": 9}, {"warmup_steps": 5})
    ]
    for one in configs:
        for other in configs:
            counts = {shared_epochs(learning_rates(one, n), learning_rates(other, n)) for n in (2, 8, 13)}
            assert len(counts) == 1, (one, other)


def test_the_first_version_s_keys_stay() -> None:
    from caltech_sweep.training.keys import checkpoint_keys, digest, rate_mark

    rates = (0.01, 0.01, 0.001)
    marks = [rate_mark((rate,)) for rate in rates]
    exact = [rate.hex() for rate in rates]
    assert list(checkpoint_keys('a "base"', marks)) == [digest(['a "base"', exact[:epoch]]) for epoch in (1, 2, 3)]
    assert list(checkpoint_keys("base", [])) == []
    assert len({rate_mark(rates), rate_mark(rates[:2]), rate_mark((0.01,))}) == 3
    assert epoch_rates(CONFIG, 6) == (0.3 * 0.2**1,)
    assert DatasetConfig() == TrialConfig().dataset
