"""A trial's run as a model: its settings, classes and checkpoint, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from caltech_sweep.artifacts import CHECKPOINT, read_classes, read_config
from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import ModelError
from caltech_sweep.text import parse_json
from caltech_sweep.tracking.records import grey_bits
from caltech_sweep.tracking.writer import MlflowTracker
from caltech_sweep.training.models import not_finite
from caltech_sweep.training.networks import mean_and_std

MODEL_NAME = "model"  # of the logged model in its run
_PICKLED = (f"{Path(CHECKPOINT).stem}.pt", f"{Path(CHECKPOINT).stem}.pth")


def model_spec(
    config: TrialConfig,
    classes: Sequence[str],
    metadata: Mapping[str, str] | None = None,
    grey_bits: int = 16,
) -> dict[str, Any]:
    """Return what, besides its weights, a trained network is: architecture, outputs by name and preprocessing.

    A last layer with more outputs than there are classes has names for them too, as in a run's predictions.
    ``metadata`` is the checkpoint's, which says how its network was trained; an older one says less. ``grey_bits`` are
    those of the sixteen-bit grey images that it was trained on.
    """
    metadata = metadata or {}
    usual = config.normalize if config.normalize != "auto" else "imagenet" if config.pretrained else "half"
    mean, std = mean_and_std(metadata.get("normalize", usual))
    extra = [f"output {number}" for number in range(len(classes), config.outputs or 0)]
    return {
        "arch": config.arch,
        "outputs": [*classes, *extra],
        "resize": config.dataset.resize,
        "crop": config.dataset.crop,
        "background": config.dataset.background,
        "exif": config.dataset.exif,
        "grey_bits": grey_bits,
        "interpolation": config.dataset.interpolation,
        "mean": mean,
        "std": std,
        "transform_input": metadata.get("transform_input") == "true",
    }


@dataclass(frozen=True)
class _Trained:
    """What a run left of its network."""

    spec: dict[str, Any]
    checkpoint: Path
    weights: dict[str, torch.Tensor]


def _read_checkpoint(path: Path, run_id: str, fingerprint: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the weights and the metadata of a checkpoint, which must be of the run's own config."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
        parse_json(metadata["classes"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"the checkpoint {path} of run {run_id} is damaged; train the trial again") from error
    if metadata.get("fingerprint") != fingerprint:
        raise ModelError(f"the checkpoint {path} is not of run {run_id}, but of another training")
    if not_finite(weights):
        raise ModelError(
            f"the checkpoint {path} of run {run_id} holds NaN or infinity, so it can predict nothing; take another run"
        )
    return weights, metadata


def _read_pickled(path: Path, run_id: str) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=False)
        return {str(key): torch.as_tensor(value) for key, value in loaded.items()}
    except Exception as error:  # whatever the pickled code raises
        raise ModelError(f"the checkpoint {path} of run {run_id} holds no state dict: {error!r}") from error


def _read_run(tracker: MlflowTracker, run_id: str, allow_pickle: bool = False) -> _Trained:
    """Read the checkpoint and config of a run; pickled weights only where the caller trusts them."""
    run = tracker.client.get_run(run_id)
    uri = run.info.artifact_uri
    read = partial(tracker.artifacts.text, uri)
    config = read_config(read)
    folder = Path(CHECKPOINT).parent.as_posix()
    names = {Path(file.path).name for file in tracker.client.list_artifacts(run_id, folder)}
    pickled = sorted(names.intersection(_PICKLED)) if Path(CHECKPOINT).name not in names else []
    if not pickled:
        path = tracker.checked_artifact(run_id, CHECKPOINT)
        weights, metadata = _read_checkpoint(path, run_id, run.data.tags.get("fingerprint", ""))
        return _Trained(
            model_spec(config, json.loads(metadata["classes"]), metadata, grey_bits(run.data.tags)), path, weights
        )
    if not allow_pickle:
        raise ModelError(
            f"run {run_id} has its weights as a pickle ({folder}/{pickled[0]}), which can run code when it is loaded; "
            "pass --allow-pickle to predict if you trust it, or save it as safetensors"
        )
    path = tracker.artifacts.file(uri, f"{folder}/{pickled[0]}")
    weights = _read_pickled(path, run_id)
    return _Trained(model_spec(config, read_classes(read), grey_bits=grey_bits(run.data.tags)), path, weights)
