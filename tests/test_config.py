"""TrialConfig: one frozen value that round-trips and is told apart by its fingerprint."""

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from caltech_sweep.config import AUGMENT_CHOICES, DatasetConfig, TrialConfig

configs = st.builds(
    TrialConfig,
    dataset=st.builds(DatasetConfig, classes=st.one_of(st.none(), st.integers(2, 101), st.just(("a", "b")))),
    lr=st.floats(1e-6, 1.0),
    epochs=st.integers(1, 90),
    augment=st.sets(st.sampled_from(AUGMENT_CHOICES)).map(
        lambda chosen: tuple(name for name in AUGMENT_CHOICES if name in chosen)
    ),
)


@given(configs)
def test_round_trip_through_json_keeps_the_config(config: TrialConfig) -> None:
    again = TrialConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.fingerprint() == config.fingerprint()


@given(configs, configs)
def test_fingerprints_agree_exactly_when_configs_do(first: TrialConfig, second: TrialConfig) -> None:
    assert (first.fingerprint() == second.fingerprint()) == (first == second)


def test_augmentation_order_does_not_matter() -> None:
    one = TrialConfig.from_dict({"augment": ["rotation", "hflip"]})
    other = TrialConfig.from_dict({"augment": ["hflip", "rotation"]})
    assert one == other


def test_params_name_every_field() -> None:
    params = replace(TrialConfig(), augment=("hflip", "rotation")).to_params()
    assert params["augment"] == "hflip+rotation"
    assert params["dataset.name"] == "caltech101"
    assert params["outputs"] == "none"


def test_normalisation_follows_the_initial_weights() -> None:
    assert TrialConfig().resolved_normalize() == "half"
    assert TrialConfig(weights="imagenet").resolved_normalize() == "imagenet"
    assert TrialConfig(weights="imagenet", normalize="half").resolved_normalize() == "half"
