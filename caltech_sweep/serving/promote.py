"""The champion of a study: logged as an MLflow model, registered, and asked for predictions.

    promote(study)         best-on-val trial -> MLflow model in the trial's run -> version -> alias
    open_model(name)       a registered model or a run -> Classifier
    predict_files(...)     image files -> rankings, in batches

A registered model is opened as data: its card and its safetensors. Code that lies in the store is never run here.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import torch
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS
from PIL import Image

import caltech_sweep
from caltech_sweep import stores
from caltech_sweep.errors import StoreError, UsageError
from caltech_sweep.files import file_digest
from caltech_sweep.metrics import BEST_ACCURACY, TEST_ACCURACY
from caltech_sweep.serving.registry import ALIAS, _registered_model
from caltech_sweep.serving.runs import MODEL_NAME, _read_run, _Trained
from caltech_sweep.serving.served_model import SPEC, WEIGHTS, Classifier
from caltech_sweep.stores import Address
from caltech_sweep.tracking.client import check_model_names, local_path
from caltech_sweep.tracking.records import TrialRecord
from caltech_sweep.tracking.writer import MlflowTracker

_PACKAGES = ("mlflow", "torch", "torchvision", "pillow", "safetensors", "numpy", "pandas")

# The bytes of one image file in; JSON carries bytes as base64.
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, "image")]),
    outputs=Schema([ColSpec(Array(DataType.string), "classes"), ColSpec(Array(DataType.double), "probabilities")]),
    params=ParamSchema([ParamSpec("top", DataType.long, 0)]),
)


# -- promoting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Promotion:
    """What was promoted, and to which version of which registered model."""

    trial: TrialRecord
    name: str
    version: str
    alias: str


def _choose(tracker: MlflowTracker, study: str, run_id: str | None) -> TrialRecord:
    """Return the named trial of a study, or its best on validation; test accuracy never selects."""
    where = tracker.store.shown
    record = tracker.study(study)
    if record is None:
        known = ", ".join(study.name for study in tracker.studies())
        raise StoreError(f"there is no study {study!r} in {where}; {'it has ' + known if known else 'it is empty'}")
    trials = {trial.run_id: trial for trial in tracker.trials(record)}
    if run_id is None:
        if not any(trial.state == "complete" for trial in trials.values()):
            raise StoreError(
                f"study {study!r} has no complete trial in {where}; run it first: make sweep STUDY={study}"
            )
        return tracker.best_trial(study)
    if run_id not in trials:
        raise UsageError(f"--run: study {study!r} has no trial with run id {run_id}; see them with caltech-sweep ui")
    if trials[run_id].state != "complete":
        raise UsageError(f"--run: run {run_id} is {trials[run_id].state}; only completed trials can be promoted")
    return trials[run_id]


def _check_names(name: str, alias: str) -> None:
    try:
        check_model_names(name, alias)
    except MlflowException as error:
        raise UsageError(
            f"MLflow cannot register {name!r} as {alias!r}: {stores.reason(error)}; choose --name or --alias"
        ) from error


def _example(side: int) -> pd.DataFrame:
    """Return one drawn image, since the dataset need not be on this machine."""
    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], ramp[::-1, None]), axis=-1)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return pd.DataFrame({"image": [file.getvalue()]})


def _requirements(arch: str) -> list[str]:
    """Return the versions that are installed; a build label such as +cpu is no part of a published version."""
    packages = (*_PACKAGES, "timm") if arch.startswith("timm/") else _PACKAGES
    return [f"{name}=={installed(name).partition('+')[0]}" for name in packages]


def _save_model(folder: Path, trained: _Trained, metadata: Mapping[str, Any], mlflow_model: Model) -> None:
    """Write the MLflow model: code as text, weights as safetensors, everything else as JSON and YAML."""
    with tempfile.TemporaryDirectory(prefix="caltech-sweep-") as temporary:
        spec = Path(temporary) / SPEC
        spec.write_text(
            json.dumps({**trained.spec, "sha256": file_digest(trained.checkpoint), **metadata}, indent=2) + "\n"
        )
        weights = Path(temporary) / WEIGHTS
        shutil.copyfile(trained.checkpoint, weights)
        package = Path(caltech_sweep.__file__).parent
        with warnings.catch_warnings():  # pandas about how MLflow compares the columns of the example
            warnings.filterwarnings("ignore", message="Operation with range is deprecated")
            mlflow.pyfunc.save_model(
                folder,
                python_model=str(package / "serving" / "served_model.py"),
                code_paths=[str(package)],
                artifacts={"weights": weights.as_uri(), "card": spec.as_uri()},
                signature=SIGNATURE,
                input_example=_example(trained.spec["crop"]),
                pip_requirements=_requirements(trained.spec["arch"]),
                metadata=dict(metadata),
                mlflow_model=mlflow_model,
            )


def _quietly(undo: Callable[..., Any], *arguments: Any) -> None:
    """Undo as far as a store that has just failed still lets us."""
    with contextlib.suppress(MlflowException, OSError):
        undo(*arguments)


def _log_model(
    tracker: MlflowTracker, trial: TrialRecord, trained: _Trained, tags: Mapping[str, str], undo: contextlib.ExitStack
) -> str:
    """Log the model into the trial's finished run; return its id.

    Through the client, with explicit ids: the fluent ``log_model`` would need the run to be active, and end it again.
    """
    client = tracker.client
    experiment = client.get_run(trial.run_id).info.experiment_id
    logged = client.create_logged_model(experiment, MODEL_NAME, trial.run_id, dict(tags), model_type="classifier")
    undo.callback(_quietly, client.delete_logged_model, logged.model_id)
    files = local_path(logged.artifact_location)
    if files is not None:
        own = files.parent if files.parent.name == logged.model_id else files
        undo.callback(shutil.rmtree, own, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="caltech-sweep-") as temporary:
        folder = Path(temporary) / "model"
        document = Model(artifact_path=logged.artifact_location, run_id=trial.run_id, model_id=logged.model_id)
        _save_model(folder, trained, tags, document)
        client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(trial.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    model_id: str = logged.model_id
    return model_id


def _reason(trial: TrialRecord) -> str:
    """Return what a trial was chosen by, where that is not its accuracy."""
    goal = trial.objective
    return "" if goal.name == "accuracy" or trial.score is None else f" by its {goal.label} of {trial.score:.4f}"


def _register(
    tracker: MlflowTracker,
    name: str,
    model_id: str,
    trial: TrialRecord,
    tags: Mapping[str, str],
    undo: contextlib.ExitStack,
) -> str:
    """Make a version of the logged model, and its registered model where that is new; return the version."""
    client = tracker.client
    if _registered_model(tracker, name) is None:
        client.create_registered_model(name)
        undo.callback(_quietly, client.delete_registered_model, name)
    val = trial.metrics.get(BEST_ACCURACY, float("nan"))
    test = f"{trial.metrics[TEST_ACCURACY]:.4f}" if TEST_ACCURACY in trial.metrics else "not measured"
    version = client.create_model_version(
        name,
        client.get_logged_model(model_id).artifact_location,  # MLflow would look models:/ID up in its default store
        trial.run_id,
        dict(tags),
        model_id=model_id,
        description=f"Trial {trial.name!r} of study {trial.study!r}, chosen on validation{_reason(trial)}: "
        f"validation accuracy {val:.4f}, test accuracy {test}.",
    )
    undo.callback(_quietly, client.delete_model_version, name, version.version)
    versions = [{"name": name, "version": version.version}]
    client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(versions)})  # the link in MLflow's UI
    return str(version.version)


def promote(
    study: str,
    run_id: str | None = None,
    name: str | None = None,
    alias: str = ALIAS,
    tracking_uri: Address = None,
) -> Promotion:
    """Log a study's best-on-val trial as an MLflow model, register it and move the alias to it.

    The weights are tried on an image first; on any failure what was written is taken back. The trial's run keeps its
    status. Raises StoreError, ModelError or UsageError.
    """
    name = name or study.replace("/", ".")  # MLflow takes no slash in the name of a model
    _check_names(name, alias)
    tracker = MlflowTracker(tracking_uri)
    with contextlib.ExitStack() as undo:
        try:
            trial = _choose(tracker, study, run_id)
            trained = _read_run(tracker, trial.run_id)
            classifier = Classifier(trained.spec, trained.weights, torch.device("cpu"))
            classifier.rank([classifier.prepare(_example(trained.spec["crop"])["image"][0])])
            tags = {
                "study": study,
                "run_id": trial.run_id,
                "val_accuracy": str(trial.metrics.get(BEST_ACCURACY, "")),
                "fingerprint": trial.fingerprint,
            }
            model_id = _log_model(tracker, trial, trained, tags, undo)
            version = _register(tracker, name, model_id, trial, tags, undo)
            tracker.client.set_registered_model_alias(name, alias, version)
        except (MlflowException, OSError) as error:
            where, reason = tracker.store.shown, tracker.store.reason(error)
            raise StoreError(
                f"study {study!r} cannot be promoted in {where}: {reason}"
            ) from None  # it may hold secrets
        undo.pop_all()
    return Promotion(trial, name, version, alias)
