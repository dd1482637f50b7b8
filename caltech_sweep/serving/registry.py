"""Registered models: found by name, version or alias."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from caltech_sweep.errors import ModelError, StoreError, UsageError
from caltech_sweep.serving.runs import _read_run
from caltech_sweep.serving.served_model import SPEC, WEIGHTS, Classifier, read_spec, read_weights
from caltech_sweep.stores import Address
from caltech_sweep.tracking.client import pages
from caltech_sweep.tracking.writer import MlflowTracker
from caltech_sweep.training.device import pick_device

ALIAS = "champion"


def _registered(tracker: MlflowTracker) -> Iterator[RegisteredModel]:
    return pages(tracker.client.search_registered_models)


def _registered_model(tracker: MlflowTracker, name: str) -> RegisteredModel | None:
    try:
        return tracker.client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _default_model(tracker: MlflowTracker) -> ModelVersion:
    """Return the champion of a registry with exactly one."""
    champions = [model.name for model in _registered(tracker) if ALIAS in model.aliases]
    where = tracker.store.shown
    if not champions:
        raise UsageError(
            f"--model: no registered model in {where} has the alias {ALIAS!r}; "
            "promote a study first (caltech-sweep promote STUDY), or name a run"
        )
    if len(champions) > 1:
        names = ", ".join(f"{name}@{ALIAS}" for name in sorted(champions))
        raise UsageError(f"--model: {where} has {len(champions)} champions; name one of {names}")
    return tracker.client.get_model_version_by_alias(champions[0], ALIAS)


def _find_version(tracker: MlflowTracker, model: str) -> ModelVersion:
    """Return the version that NAME@ALIAS or NAME/VERSION names; raise UsageError with what there is."""
    where = tracker.store.shown
    name, sign, wanted = model.rpartition("@") if "@" in model else model.rpartition("/")
    found = _registered_model(tracker, name or model)
    if found is None:
        known = ", ".join(sorted(m.name for m in _registered(tracker))) or "none"
        raise UsageError(f"--model: {where} has no registered model or run {name or model!r}; registered: {known}")
    aliases = ", ".join(f"{found.name}@{alias}" for alias in sorted(found.aliases)) or "none"
    if not sign:
        raise UsageError(f"--model: {model!r} needs an alias or a version, as in {model}@{ALIAS} or {model}/1")
    try:
        if sign == "@":
            return tracker.client.get_model_version_by_alias(name, wanted)
        return tracker.client.get_model_version(name, wanted)
    except MlflowException as error:
        what = "alias" if sign == "@" else "version"
        raise UsageError(f"--model: {name!r} has no {what} {wanted!r}; its aliases: {aliases}") from error


def _open_version(tracker: MlflowTracker, found: ModelVersion) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the card and weights of a model that ``promote`` logged; the code next to them is not run."""
    uri = tracker.client.get_model_version_download_uri(found.name, found.version)
    folder = tracker.artifacts.file(uri, "")
    if not (folder / "artifacts" / SPEC).is_file():
        raise ModelError(
            f"{found.name}/{found.version} was not logged by caltech-sweep promote, or lost its card; loading it could "
            "run pickled code, so it is not loaded; promote a study, or run it with `mlflow models predict`"
        )
    spec = read_spec(folder / "artifacts" / SPEC)
    return spec, read_weights(folder / "artifacts" / WEIGHTS, spec["sha256"])


def open_model(
    model: str | None = None,
    tracking_uri: Address = None,
    device: str | None = None,
    allow_pickle: bool = False,
) -> Classifier:
    """Open NAME@ALIAS, NAME/VERSION or the checkpoint of a RUN_ID; without a name, the registry's only champion."""
    chosen = pick_device(device)
    tracker = MlflowTracker(tracking_uri)
    try:
        if model and re.fullmatch("[0-9a-f]{32}", model) and tracker.run_exists(model):
            trained = _read_run(tracker, model, allow_pickle)
            return Classifier(trained.spec, trained.weights, chosen)
        found = _find_version(tracker, model.removeprefix("models:/")) if model else _default_model(tracker)
        return Classifier(*_open_version(tracker, found), chosen)
    except (MlflowException, OSError) as error:
        raise StoreError(
            f"the model cannot be read from {tracker.store.shown}: {tracker.store.reason(error)}"
        ) from None  # the cause may hold secrets
