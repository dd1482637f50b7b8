"""TrialConfig: one frozen value that round-trips and is told apart by its fingerprint."""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.study.file import load_study
from caltech_sweep.training.augment import AUGMENTATIONS
from caltech_sweep.training.keys import digest, prefix_key, recipe
from caltech_sweep.training.networks import normalization

SWEEPS = Path(__file__).parents[1] / "sweeps"

configs = st.builds(
    TrialConfig,
    dataset=st.builds(DatasetConfig, classes=st.one_of(st.none(), st.integers(2, 101), st.just(("a", "b")))),
    lr=st.floats(1e-6, 1.0),
    epochs=st.integers(1, 90),
    augment=st.sets(st.sampled_from(list(AUGMENTATIONS))).map(tuple),
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
    assert normalization(TrialConfig()) == "half"
    assert normalization(TrialConfig(weights="imagenet")) == "imagenet"
    assert normalization(TrialConfig(weights="imagenet", normalize="half")) == "half"


# Of the shipped studies' rows, as the first version computed them; stores are full of these, and none may ever change.
FIRST_FINGERPRINTS = {
    "augment": "f90993924ae2c6db 6aefafec14dfb43f 12f4f11924253206 53b99e5f517864bd",
    "classsplit-source": "fbe644f7416ded1c",
    "classsplit-target": "6d52b40ba9af29ce 5bd85a916cf47e71 5473ace5b6a85d54 aeb2daa7427f5a81",
    "demo": "0b1d8fe929cc1110 0404e83c984ff3f5 67f2e918004b04d4 c4865bee13ff8234",
    "freeze": "8537d8cfc4966480 0fbcf79d8aaefbc7",
    "resnet": "0153bb9484e035ef",
    "scratch": "6bdbac1cc5ca5cde d1aca395ffa46d28 73336808380e4ff5 9d613f0aef8d9fa8 218b821383555901",
    "tencrop": "9b94f8f5c48f5552",
    "transfer": "6e07de802e5f3331 53efccc709f8068a 744ded1b4b0e7e02 08d788b71e96b9a6 24433c0c80a41bcc",
}


@pytest.mark.parametrize("study", FIRST_FINGERPRINTS)
def test_rows_have_the_fingerprints_that_stores_know_them_by(study: str) -> None:
    definition = load_study(str(SWEEPS / f"{study}.yaml"))
    found = [definition.row_config(row).fingerprint() for row in definition.rows]
    assert set(FIRST_FINGERPRINTS[study].split()) <= set(found)


@pytest.mark.parametrize(
    ("study", "prefix"),
    [("transfer", "b020a058ec657cc1d7eeb2b42090de87"), ("augment", "b47b87731bd44ea532d75daefaca0cb6")],
)
def test_rows_have_the_prefix_keys_of_the_first_version(study: str, prefix: str) -> None:
    definition = load_study(str(SWEEPS / f"{study}.yaml"))
    assert prefix_key(definition.row_config(definition.rows[0])) == prefix


@dataclass(frozen=True)
class LaterDataset(DatasetConfig):
    letterbox: bool = False


@dataclass(frozen=True)
class LaterTrial(TrialConfig):
    """What a later version may add, defaults of every kind."""

    warmup: int = 0
    sharpness: float = 0.2
    layers: tuple[str, ...] = ()
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    teacher: str | None = None


def later(config: TrialConfig, **changes: Any) -> LaterTrial:
    """Return a config as a later version reads it from a store of this one."""
    old = {f.name: getattr(config, f.name) for f in fields(config)}
    own = {f.name: getattr(config.dataset, f.name) for f in fields(config.dataset)}
    return LaterTrial(**{**old, "dataset": LaterDataset(**own), **changes})


LATER_CHANGES: list[dict[str, Any]] = [
    {"warmup": 2},
    {"sharpness": 0.1},
    {"layers": ("fc",)},
    {"betas": [0.9, 0.99]},
    {"teacher": "study:x"},
    {"dataset": LaterDataset(letterbox=True)},
]


@given(configs)
def test_a_new_field_at_its_default_changes_no_fingerprint_and_no_key(config: TrialConfig) -> None:
    assert later(config).fingerprint() == config.fingerprint()
    assert prefix_key(later(config)) == prefix_key(config)
    assert recipe(later(config)) == recipe(config)  # with the data and the machine, all that a stage's key is made of


def test_a_new_field_at_any_other_value_changes_every_fingerprint_and_key() -> None:
    variants = [TrialConfig(), *(later(TrialConfig(), **changes) for changes in LATER_CHANGES)]
    for key in (TrialConfig.fingerprint, prefix_key, lambda config: digest(recipe(config))):
        assert len({key(config) for config in variants}) == len(variants)
