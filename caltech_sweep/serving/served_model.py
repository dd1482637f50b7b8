"""The model that ``promote`` logs, as code: raw images in, class names and probabilities out.

MLflow runs this file instead of unpickling a model ("models from code"). A copy of this package travels with it, so
the server decodes images and builds the network with the code of the training. Everything else is data: the weights as
safetensors, and a card, a JSON file with the architecture, the classes and the preprocessing.

Serve it from an activated environment, where ``mlflow`` finds its web server:

    MLFLOW_TRACKING_URI=sqlite:///mlruns/mlflow.db mlflow models serve -m models:/NAME@champion --env-manager local

Over HTTP an image is the base64 of its file, in a column named ``image``; the params are optional:

    POST /invocations   {"dataframe_split": {"columns": ["image"], "data": [["iVBORw0..."]]}, "params": {"top": 3}}
    200                 {"predictions": [{"classes": ["disc", "ring", "star"], "probabilities": [0.9, 0.06, 0.01]}]}

``dataframe_records`` works too. In a process, ``predict`` takes a DataFrame with the bytes themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torchvision.transforms import functional as tvf

from caltech_sweep.data.images import decode
from caltech_sweep.data.pixels import PixelRules
from caltech_sweep.errors import DatasetError, ModelError, UsageError
from caltech_sweep.files import file_digest
from caltech_sweep.text import parse_json
from caltech_sweep.training.models import not_finite, trained_model

WEIGHTS = "model.safetensors"
SPEC = "model.json"
_BATCH = 64  # images of a request that are computed at once

Ranking = list[tuple[str, float]]  # class names and probabilities, the most probable first


class Classifier:
    """A trained network with its preprocessing. ``spec`` is what ``runs.model_spec`` returns.

    Raises ModelError when the weights are not those of its architecture and outputs.
    """

    def __init__(self, spec: Mapping[str, Any], weights: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self.names: list[str] = list(spec["outputs"])
        self._resize, self._crop = int(spec["resize"]), int(spec["crop"])
        # Cards of models that were promoted before these settings were recorded lack them.
        self._rules = PixelRules(
            **{key: spec[key] for key in ("background", "exif", "grey_bits", "interpolation") if key in spec}
        )
        self._device = device
        mean, std = (torch.tensor(spec[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
        self._mean, self._std = mean, std
        self._source = f"the weights of this {spec['arch']}"
        if not_finite(weights):
            raise ModelError(f"{self._source} hold NaN or infinity, so it can predict nothing; promote another trial")
        try:
            model = trained_model(spec["arch"], len(self.names), weights, spec.get("transform_input", False))
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise ModelError(
                f"the weights do not fit {spec['arch']} with {len(self.names)} outputs: {reason}"
            ) from error
        self._model = model.to(device).eval()

    def prepare(self, image: bytes) -> torch.Tensor:
        """Return the (3, H, W) uint8 centre crop of an image file's bytes; raise DatasetError when it is broken."""
        try:
            pixels = decode(image, self._resize, self._rules)
        except DatasetError as error:
            raise DatasetError(f"cannot be read as an image: {error}") from error
        return tvf.center_crop(torch.from_numpy(np.array(pixels)).permute(2, 0, 1), [self._crop])

    @torch.inference_mode()
    def rank(self, crops: Sequence[torch.Tensor], top: int | None = None) -> list[Ranking]:
        """Return the ``top`` most probable classes, or all, of each prepared image, computed as one batch.

        Raises ModelError when an output is no number, UsageError when the batch does not fit.
        """
        try:
            floats = torch.stack(list(crops)).to(self._device).float().div_(255)
            logits = self._model(floats.sub_(self._mean).div_(self._std)).float()
        except torch.cuda.OutOfMemoryError as error:
            raise UsageError(
                f"a batch of {len(crops)} images did not fit on {self._device}; use smaller batches, or the CPU"
            ) from error
        if not logits.isfinite().all():
            raise ModelError(f"{self._source} give outputs that are NaN or infinite; promote another trial")
        probabilities, order = logits.softmax(1).cpu().sort(stable=True, dim=1, descending=True)
        rows = zip(order[:, :top].tolist(), probabilities[:, :top].tolist(), strict=True)
        return [[(self.names[i], value) for i, value in zip(indices, values, strict=True)] for indices, values in rows]


def read_spec(path: Path) -> dict[str, Any]:
    """Return the card next to a model's weights; raise ModelError when it is damaged."""
    try:
        spec: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        if missing := {"arch", "outputs", "resize", "crop", "mean", "std", "sha256"} - set(spec):
            raise ValueError(f"without {sorted(missing)[0]}")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"the model's card {path} cannot be read ({error}); promote the study again") from error
    return spec


def read_weights(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, which can hold no code; raise ModelError when it was changed."""
    try:
        if file_digest(path) != sha256:
            raise ModelError(f"the model's weights {path} are damaged; promote the study again")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the model's weights {path} cannot be read; promote the study again") from error


class ServedClassifier(PythonModel):
    """What ``mlflow models serve`` asks: one column ``image`` of bytes (in JSON: base64), one answer a row."""

    def load_context(self, context: Any) -> None:
        """Load the weights and the card that were logged."""
        spec = read_spec(Path(context.artifacts["card"]))
        weights = read_weights(Path(context.artifacts["weights"]), spec["sha256"])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._classifier = Classifier(spec, weights, device)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return the columns ``classes`` and ``probabilities``, the most probable first; ``top`` 0 means all.

        A broken image is an error that names its row, and the client's: 400 over HTTP.
        """
        top = int((params or {}).get("top", 0)) or None
        crops = []
        for row, image in enumerate(model_input["image"]):
            try:
                crops.append(self._classifier.prepare(bytes(image)))
            except (DatasetError, TypeError) as error:
                raise MlflowException(f"image {row}: {error}", INVALID_PARAMETER_VALUE) from error
        rankings: list[Ranking] = []
        for start in range(0, len(crops), _BATCH):
            try:
                rankings += self._classifier.rank(crops[start : start + _BATCH], top)
            except ModelError as error:
                raise MlflowException(str(error)) from error
        classes = [[name for name, _ in ranking] for ranking in rankings]
        probabilities = [[value for _, value in ranking] for ranking in rankings]
        return pd.DataFrame({"classes": classes, "probabilities": probabilities})


mlflow.models.set_model(ServedClassifier())
