"""A trial's run as a model: its settings, classes and checkpoint, read and checked."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.artifacts
import torch
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from safetensors import SafetensorError, safe_open

from caltech_sweep import stores
from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import ModelError, StoreError
from caltech_sweep.text import is_overgrown
from caltech_sweep.tracking.records import grey_bits
from caltech_sweep.tracking.writer import MlflowTracker
from caltech_sweep.training.models import not_finite
from caltech_sweep.training.networks import mean_and_std
from caltech_sweep.training.results import CHECKPOINT

MODEL_NAME = "model"  # of the logged model in its run
_PICKLED = (f"{Path(CHECKPOINT).stem}.pt", f"{Path(CHECKPOINT).stem}.pth")


def _fetch(tracker: MlflowTracker, uri: str, path: str, scratch: Path) -> Path:
    """Return a local file or folder of an artifact address, in place where it is on this machine."""
    try:
        if is_local_uri(uri, is_tracking_or_registry_uri=False):
            found = Path(local_file_uri_to_path(uri)) / path
            if not found.exists():
                raise FileNotFoundError(str(found))
            return found
        whole = f"{uri}/{path}" if path else uri
        return Path(mlflow.artifacts.download_artifacts(whole, dst_path=str(scratch), tracking_uri=tracker.uri))
    except (MlflowException, OSError) as error:
        raise StoreError(
            f"there is no artifact {path or MODEL_NAME} in {stores.hide_secrets(uri)}; was the store moved?"
        ) from error


def _read_config(path: Path) -> TrialConfig:
    try:
        loaded = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        if is_overgrown(loaded):
            raise ValueError("it has too many values")
        return TrialConfig.from_dict(loaded)
    except (OSError, RecursionError, YAMLError, ValueError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} cannot be read as a trial's config; was it damaged?") from error


def _read_classes(path: Path) -> list[str]:
    """Return the classes of a run whose checkpoint does not name them, from its table of classes."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [row["class"] for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise StoreError(f"{path} cannot be read as a run's table of classes; was it damaged?") from error


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
        json.loads(metadata["classes"])
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


def _read_run(tracker: MlflowTracker, run_id: str, scratch: Path, allow_pickle: bool = False) -> _Trained:
    """Read the checkpoint and config of a run; pickled weights only where the caller trusts them."""
    run = tracker.client.get_run(run_id)
    uri = run.info.artifact_uri
    config = _read_config(_fetch(tracker, uri, "config.yaml", scratch))
    folder = Path(CHECKPOINT).parent.as_posix()
    names = {Path(file.path).name for file in tracker.client.list_artifacts(run_id, folder)}
    pickled = sorted(names.intersection(_PICKLED)) if Path(CHECKPOINT).name not in names else []
    if not pickled:
        path = tracker.checked_artifact(run_id, CHECKPOINT)
        weights, metadata = _read_checkpoint(path, run_id, run.data.tags.get("fingerprint", ""))
        return _Trained(model_spec(config, json.loads(metadata["classes"]), metadata), path, weights)
    if not allow_pickle:
        raise ModelError(
            f"run {run_id} has its weights as a pickle ({folder}/{pickled[0]}), which can run code when it is loaded; "
            "pass --allow-pickle to predict if you trust it, or save it as safetensors"
        )
    path = _fetch(tracker, uri, f"{folder}/{pickled[0]}", scratch)
    weights, classes = _read_pickled(path, run_id), _read_classes(_fetch(tracker, uri, "per_class.csv", scratch))
    return _Trained(model_spec(config, classes, grey_bits=grey_bits(run.data.tags)), path, weights)
