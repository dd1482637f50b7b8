"""The champion of a study: logged as an MLflow model, registered, and asked for predictions.

    promote(study)         best-on-val trial -> MLflow model in the trial's run -> version -> alias
    open_model(name)       a registered model or a run -> Classifier
    predict_files(...)     image files -> rankings, in batches

A registered model is opened as data: its card and its safetensors. Code that lies in the store is never run here.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from PIL import Image
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from safetensors import SafetensorError, safe_open

import caltech_sweep
from caltech_sweep import stores
from caltech_sweep.checksums import file_digest
from caltech_sweep.config import TrialConfig
from caltech_sweep.data.splits import IMAGE_SUFFIXES
from caltech_sweep.errors import DatasetError, ModelError, StoreError, UsageError
from caltech_sweep.records import TrialRecord
from caltech_sweep.tracking import MlflowTracker
from caltech_sweep.training.artifacts import CHECKPOINT
from caltech_sweep.training.fit import NORMALIZE
from caltech_sweep.training.trial import pick_device

ALIAS = "champion"

# The import of caltech_sweep.tracking above sets MLflow up, so these must come after it.
with warnings.catch_warnings():  # about type hints of MLflow's own, when this module is first imported
    warnings.filterwarnings("ignore", message=".*Any type hint is inferred as AnyType")
    import mlflow.pyfunc
import mlflow.artifacts  # noqa: E402
from mlflow.entities import LoggedModelOutput  # noqa: E402
from mlflow.entities.model_registry import ModelVersion, RegisteredModel  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.models import Model, ModelSignature  # noqa: E402
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema  # noqa: E402
from mlflow.types.schema import Array  # noqa: E402
from mlflow.utils.file_utils import local_file_uri_to_path  # noqa: E402
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS  # noqa: E402
from mlflow.utils.uri import is_local_uri  # noqa: E402
from mlflow.utils.validation import (  # noqa: E402
    _validate_model_alias_name,
    _validate_model_alias_name_reserved,
    _validate_model_name,
)

from caltech_sweep.served_model import (  # noqa: E402
    CARD,
    WEIGHTS,
    Classifier,
    Ranking,
    read_card,
    read_weights,
)

MODEL_NAME = "model"  # of the logged model in its run
_PICKLED = (f"{Path(CHECKPOINT).stem}.pt", f"{Path(CHECKPOINT).stem}.pth")
_PACKAGES = ("mlflow", "torch", "torchvision", "pillow", "safetensors", "numpy", "pandas")

# The bytes of one image file in; JSON carries bytes as base64.
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, "image")]),
    outputs=Schema([ColSpec(Array(DataType.string), "classes"), ColSpec(Array(DataType.double), "probabilities")]),
    params=ParamSchema([ParamSpec("top", DataType.long, 0)]),
)


# -- reading a run -----------------------------------------------------------------------------------------------------


def _reason(error: Exception) -> str:
    """Return the first line of an error, without the user and password of an address in it."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"://[^/\s@]+@", "://***@", line)


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
        return TrialConfig.from_dict(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")))
    except (OSError, YAMLError, ValueError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} cannot be read as a trial's config; was it damaged?") from error


def _read_classes(path: Path) -> list[str]:
    """Return the classes of a run whose checkpoint does not name them, from its table of classes."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [row["class"] for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise StoreError(f"{path} cannot be read as a run's table of classes; was it damaged?") from error


def make_card(config: TrialConfig, classes: Sequence[str]) -> dict[str, Any]:
    """Return what, besides its weights, a trained network is: architecture, outputs by name and preprocessing.

    A last layer with more outputs than there are classes has names for them too, as in a run's predictions.
    """
    mean, std = NORMALIZE[config.resolved_normalize()]
    extra = [f"output {number}" for number in range(len(classes), config.outputs or 0)]
    return {
        "arch": config.arch,
        "outputs": [*classes, *extra],
        "resize": config.dataset.resize,
        "crop": config.dataset.crop,
        "mean": mean,
        "std": std,
    }


@dataclass(frozen=True)
class _Trained:
    """What a run left of its network."""

    card: dict[str, Any]
    checkpoint: Path
    weights: dict[str, torch.Tensor]


def _read_checkpoint(path: Path, run_id: str, fingerprint: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the weights and the class names of a checkpoint, which must be of the run's own config."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
        classes = json.loads(metadata["classes"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"the checkpoint {path} of run {run_id} is damaged; train the trial again") from error
    if metadata.get("fingerprint") != fingerprint:
        raise ModelError(f"the checkpoint {path} is not of run {run_id}, but of another training")
    return weights, classes


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
        weights, classes = _read_checkpoint(path, run_id, run.data.tags.get("fingerprint", ""))
    elif not allow_pickle:
        raise ModelError(
            f"run {run_id} has its weights as a pickle ({folder}/{pickled[0]}), which can run code when it is loaded; "
            "pass --allow-pickle to predict if you trust it, or save it as safetensors"
        )
    else:
        path = _fetch(tracker, uri, f"{folder}/{pickled[0]}", scratch)
        weights, classes = _read_pickled(path, run_id), _read_classes(_fetch(tracker, uri, "per_class.csv", scratch))
    return _Trained(make_card(config, classes), path, weights)


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
    where = stores.hide_secrets(tracker.uri)
    record = tracker.study(study)
    if record is None:
        known = ", ".join(study.name for study in tracker.studies())
        raise StoreError(f"there is no study {study!r} in {where}; {'it has ' + known if known else 'it is empty'}")
    trials = {trial.run_id: trial for trial in tracker.trials(record)}
    if run_id is None:
        if not any(trial.outcome == "complete" for trial in trials.values()):
            raise StoreError(
                f"study {study!r} has no complete trial in {where}; run it first: make sweep STUDY={study}"
            )
        return tracker.best_trial(study)
    if run_id not in trials:
        raise UsageError(f"--run: study {study!r} has no trial with run id {run_id}; see them with caltech-sweep ui")
    if trials[run_id].outcome != "complete":
        raise UsageError(f"--run: run {run_id} is {trials[run_id].outcome}; a complete trial alone can be promoted")
    return trials[run_id]


def _check_names(name: str, alias: str) -> None:
    try:
        _validate_model_name(name)
        _validate_model_alias_name(alias)
        _validate_model_alias_name_reserved(alias)
    except MlflowException as error:
        raise UsageError(
            f"MLflow cannot register {name!r} as {alias!r}: {error.message}; choose --name or --alias"
        ) from error


def _example(side: int) -> pd.DataFrame:
    """Return one drawn image, since the dataset need not be on this machine."""
    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], ramp[::-1, None]), axis=-1)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return pd.DataFrame({"image": [file.getvalue()]})


def _requirements() -> list[str]:
    """Return the versions that are installed; a build label such as +cpu is no part of a published version."""
    return [f"{name}=={installed(name).partition('+')[0]}" for name in _PACKAGES]


def _save_model(folder: Path, trained: _Trained, metadata: Mapping[str, Any], mlflow_model: Model) -> None:
    """Write the MLflow model: code as text, weights as safetensors, everything else as JSON and YAML."""
    with tempfile.TemporaryDirectory(prefix="caltech-sweep-") as temporary:
        card = Path(temporary) / CARD
        card.write_text(
            json.dumps({**trained.card, "sha256": file_digest(trained.checkpoint), **metadata}, indent=2) + "\n"
        )
        weights = Path(temporary) / WEIGHTS
        shutil.copyfile(trained.checkpoint, weights)
        package = Path(caltech_sweep.__file__).parent
        with warnings.catch_warnings():  # pandas about how MLflow compares the columns of the example
            warnings.filterwarnings("ignore", message="Operation with range is deprecated")
            mlflow.pyfunc.save_model(
                folder,
                python_model=str(package / "served_model.py"),
                code_paths=[str(package)],
                artifacts={"weights": weights.as_uri(), "card": card.as_uri()},
                signature=SIGNATURE,
                input_example=_example(trained.card["crop"]),
                pip_requirements=_requirements(),
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

    Through the client, with explicit ids: the fluent ``log_model`` would need the run to be active, and end it anew.
    """
    client = tracker.client
    experiment = client.get_run(trial.run_id).info.experiment_id
    logged = client.create_logged_model(experiment, MODEL_NAME, trial.run_id, dict(tags), model_type="classifier")
    undo.callback(_quietly, client.delete_logged_model, logged.model_id)
    if is_local_uri(logged.artifact_location, is_tracking_or_registry_uri=False):
        files = Path(local_file_uri_to_path(logged.artifact_location))
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
    scores = {key: trial.metrics.get(key, float("nan")) for key in ("best/val_accuracy", "test/accuracy")}
    version = client.create_model_version(
        name,
        client.get_logged_model(model_id).artifact_location,  # MLflow would look models:/ID up in its default store
        trial.run_id,
        dict(tags),
        model_id=model_id,
        description=f"Trial {trial.name!r} of study {trial.study!r}, chosen on validation: validation accuracy "
        f"{scores['best/val_accuracy']:.4f}, test accuracy {scores['test/accuracy']:.4f}.",
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
    tracking_uri: str | None = None,
) -> Promotion:
    """Log a study's best-on-val trial as an MLflow model, register it and move the alias to it.

    The weights are tried on an image first; on any failure what was written is taken back. The trial's run keeps its
    status. Raises StoreError, ModelError or UsageError.
    """
    name = name or study
    _check_names(name, alias)
    tracker = MlflowTracker(tracking_uri)
    with tempfile.TemporaryDirectory(prefix="caltech-sweep-") as scratch, contextlib.ExitStack() as undo:
        try:
            trial = _choose(tracker, study, run_id)
            trained = _read_run(tracker, trial.run_id, Path(scratch))
            classifier = Classifier(trained.card, trained.weights, torch.device("cpu"))
            classifier.rank([classifier.prepare(_example(trained.card["crop"])["image"][0])])
            tags = {
                "study": study,
                "run_id": trial.run_id,
                "val_accuracy": str(trial.metrics.get("best/val_accuracy", "")),
                "fingerprint": trial.fingerprint,
            }
            model_id = _log_model(tracker, trial, trained, tags, undo)
            version = _register(tracker, name, model_id, trial, tags, undo)
            tracker.client.set_registered_model_alias(name, alias, version)
        except (MlflowException, OSError) as error:
            raise StoreError(
                f"study {study!r} cannot be promoted in {stores.hide_secrets(tracker.uri)}: {_reason(error)}"
            ) from error
        undo.pop_all()
    return Promotion(trial, name, version, alias)


# -- opening a model ---------------------------------------------------------------------------------------------------


def _registered(tracker: MlflowTracker) -> Iterator[RegisteredModel]:
    token = None
    while True:
        page = tracker.client.search_registered_models(max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


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
    where = stores.hide_secrets(tracker.uri)
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
    where = stores.hide_secrets(tracker.uri)
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


def _open_version(
    tracker: MlflowTracker, found: ModelVersion, scratch: Path
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the card and weights of a model that ``promote`` logged; the code beside them is not run."""
    uri = tracker.client.get_model_version_download_uri(found.name, found.version)
    folder = _fetch(tracker, uri, "", scratch)
    if not (folder / "artifacts" / CARD).is_file():
        raise ModelError(
            f"{found.name}/{found.version} was not logged by caltech-sweep promote, or lost its card; loading it could "
            "run pickled code, so it is left alone; promote a study, or ask it with mlflow models predict"
        )
    card = read_card(folder / "artifacts" / CARD)
    return card, read_weights(folder / "artifacts" / WEIGHTS, card["sha256"])


def open_model(
    model: str | None = None,
    tracking_uri: str | None = None,
    device: str | None = None,
    allow_pickle: bool = False,
) -> Classifier:
    """Open NAME@ALIAS, NAME/VERSION or the checkpoint of a RUN_ID; without a name, the registry's only champion."""
    chosen = pick_device(device)
    tracker = MlflowTracker(tracking_uri)
    with tempfile.TemporaryDirectory(prefix="caltech-sweep-") as temporary:
        scratch = Path(temporary)
        try:
            if model and re.fullmatch("[0-9a-f]{32}", model) and tracker.run_exists(model):
                trained = _read_run(tracker, model, scratch, allow_pickle)
                return Classifier(trained.card, trained.weights, chosen)
            found = _find_version(tracker, model.removeprefix("models:/")) if model else _default_model(tracker)
            return Classifier(*_open_version(tracker, found, scratch), chosen)
        except MlflowException as error:
            raise StoreError(
                f"the model cannot be read from {stores.hide_secrets(tracker.uri)}: {_reason(error)}"
            ) from error


# -- predicting --------------------------------------------------------------------------------------------------------


def find_images(named: Iterable[Path]) -> Iterator[Path]:
    """Yield the named files, and for a folder the image files in and below it, by name."""
    for path in named:
        if not path.is_dir():
            yield path
            continue
        inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
        if not inside:
            raise UsageError(f"the folder {path} has no image files; they end in {', '.join(sorted(IMAGE_SUFFIXES))}")
        yield from inside


def predict_files(
    classifier: Classifier,
    files: Sequence[Path],
    top: int,
    batch_size: int,
    complain: Callable[[str], None],
) -> Iterator[tuple[Path, Ranking]]:
    """Yield each file with its ``top`` classes, in order; a broken file is a complaint, and the others go on."""

    def read(path: Path) -> torch.Tensor | str:
        try:
            return classifier.prepare(path.read_bytes())
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        except DatasetError as error:
            return f"{path} {error}"

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), batch_size):
            part = files[start : start + batch_size]
            crops = []
            for path, result in zip(part, pool.map(read, part), strict=True):
                if isinstance(result, str):
                    complain(result)
                else:
                    crops.append((path, result))
            if crops:
                rankings = classifier.rank([crop for _, crop in crops], top)
                yield from ((path, ranking) for (path, _), ranking in zip(crops, rankings, strict=True))


def format_predictions(kind: str, predictions: Iterable[tuple[Path, Ranking]], files: Sequence[Path]) -> Iterator[str]:
    """Yield lines of a "table", "csv" (a line a class) or "json" (a list of images), each as soon as it is known."""
    shown = ((click.format_filename(path), ranking) for path, ranking in predictions)
    if kind == "csv":
        yield _csv_line(["image", "rank", "class", "probability"])
        for image, ranking in shown:
            for rank, (name, probability) in enumerate(ranking, start=1):
                yield _csv_line([image, rank, name, f"{probability:.6f}"])
    elif kind == "json":
        before = "["
        for image, ranking in shown:
            classes = [{"class": name, "probability": probability} for name, probability in ranking]
            yield before + json.dumps({"image": image, "predictions": classes})
            before = ","
        yield "]" if before == "," else "[]"
    else:
        width = max((len(click.format_filename(path)) for path in files), default=0)
        for image, ranking in shown:
            cells = (f"{name} {probability:.4f}" for name, probability in ranking)
            yield f"{image:{width}}  {'  '.join(cells)}"


def _csv_line(cells: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()
