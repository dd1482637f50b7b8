"""Promotion and prediction against torchvision by hand, on a trained run in a real store, and over real HTTP."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms

from caltech_sweep.artifacts import CHECKPOINT
from caltech_sweep.cli import main
from caltech_sweep.config import DatasetConfig, TrialConfig
from caltech_sweep.data.shapes import CLASSES as SHAPES
from caltech_sweep.data.shapes import draw_sample
from caltech_sweep.errors import ModelError
from caltech_sweep.files import SUMS
from caltech_sweep.serving.promote import promote
from caltech_sweep.serving.runs import model_spec
from caltech_sweep.serving.served_model import Classifier
from caltech_sweep.study.file import load_study
from caltech_sweep.sweep.options import RunOptions, started
from caltech_sweep.sweep.session import run_study
from caltech_sweep.tracking.records import TrialRecord
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.marks import slow_but
from helpers.servers import answering

# MLflow's own query options, which SQLAlchemy 2.1 no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")

STUDY = """\
title: Tiny
dataset: {name: shapes, resize: 40, crop: 32, classes: 4, images_per_class: 12}
fixed: {arch: resnet18, batch_size: 16, epochs: 1, outputs: 6}
rows:
  - {name: Fast, set: {lr: 0.02}}
  - {name: Slow, set: {lr: 1.0e-9}}
"""
CLASSES = ["cross", "disc", "ring", "square", "output 4", "output 5"]


@dataclass(frozen=True)
class Store:
    """A store with one study of two complete trials."""

    folder: Path
    uri: str

    @property
    def tracker(self) -> MlflowTracker:
        return MlflowTracker(self.uri)

    def trials(self) -> dict[str, TrialRecord]:
        study = self.tracker.study("tiny")
        assert study is not None
        return {trial.name: trial for trial in self.tracker.trials(study)}

    def best(self) -> TrialRecord:
        return self.tracker.best_trial("tiny")

    def checkpoint(self, trial: TrialRecord) -> Path:
        return Path(trial.artifact_uri.removeprefix("file://")) / CHECKPOINT

    def cli(self, *arguments: str | Path) -> Result:
        result = CliRunner().invoke(main, [*map(str, arguments), "--tracking-uri", self.uri])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def refuses(self, *arguments: str | Path) -> str:
        """Run a command that must end in one sentence and exit code 2; return the sentence."""
        result = self.cli(*arguments)
        assert result.exit_code == 2 and result.stdout == "", result.output
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
        return result.stderr

    def copy(self, folder: Path) -> Store:
        """Return a store of the same runs and artifacts, whose registry can be changed."""
        folder.mkdir()
        target = folder / "mlflow.db"
        with contextlib.closing(sqlite3.connect(self.uri)) as old, contextlib.closing(sqlite3.connect(target)) as new:
            old.backup(new)
        return Store(self.folder, str(target))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("champion")
    study = folder / "tiny.yaml"
    study.write_text(STUDY)
    uri = str(folder / "mlflow.db")
    options = RunOptions(uri, str(folder / "optuna.db"), device="cpu", threads=1, in_process=True)
    with started(options, print) as begun:
        assert run_study(load_study(str(study)), options, print, begun).outcomes == {"complete": 2}
    return Store(folder, uri)


@pytest.fixture(scope="module")
def promoted(trained: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with version 1 of ``tiny`` as its champion; tests leave it as it is."""
    store = trained.copy(tmp_path_factory.mktemp("promoted") / "store")
    promote("tiny", tracking_uri=store.uri)
    return store


@pytest.fixture
def store(trained: Store, tmp_path: Path) -> Store:
    return trained.copy(tmp_path / "store")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images that are not square, some of other modes, and one in a folder below."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(7):
        picture = Image.fromarray(draw_sample(Path(SHAPES[number]) / "train_000", 70, 5)).resize((70 + 9 * number, 64))
        if number == 1:
            picture = picture.convert("L")
        if number == 2:
            picture = picture.convert("P")
        path = folder / ("below" if number == 6 else "") / f"{number}.{'jpg' if number % 4 == 0 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
    (folder / "notes.txt").write_text("no image")
    return folder


def by_hand(store: Store, path: Path) -> list[float]:
    """Return the probabilities of every output, by torchvision only."""
    model = torchvision.models.resnet18(num_classes=6)
    model.load_state_dict(load_file(store.checkpoint(store.best())))
    prepare = transforms.Compose(
        [
            transforms.Resize(40),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    with torch.no_grad():
        logits = model.eval()(prepare(Image.open(path).convert("RGB")).unsqueeze(0))
    probabilities: list[float] = logits.softmax(1)[0].tolist()
    return probabilities


def ask(store: Store, *arguments: str | Path) -> dict[str, dict[str, float]]:
    """Predict as JSON; return each image's probabilities by class, after checking their order."""
    result = store.cli("predict", *arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    answers = {}
    for item in json.loads(result.stdout):
        ranking = [entry["probability"] for entry in item["predictions"]]
        assert ranking == sorted(ranking, reverse=True)
        answers[item["image"]] = {entry["class"]: entry["probability"] for entry in item["predictions"]}
    return answers


# -- promote -----------------------------------------------------------------------------------------------------------


def test_promoting_registers_the_best_on_validation_and_leaves_its_run_as_it_was(store: Store) -> None:
    best, client = store.best(), store.tracker.client
    before = client.get_run(best.run_id)
    assert best.metrics["best/val_accuracy"] == max(t.metrics["best/val_accuracy"] for t in store.trials().values())
    result = store.cli("promote", "tiny")
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"tiny version 1 is now tiny@champion: trial {best.name!r} (run {best.run_id}), "
        f"validation accuracy {best.metrics['best/val_accuracy']:.4f}\n"
    )
    found = client.get_model_version_by_alias("tiny", "champion")
    assert (str(found.version), found.run_id, found.status) == ("1", best.run_id, "READY")
    assert found.tags == {
        "study": "tiny",
        "run_id": best.run_id,
        "val_accuracy": str(best.metrics["best/val_accuracy"]),
        "fingerprint": best.fingerprint,
    }
    after = client.get_run(best.run_id)
    assert (after.info.status, after.info.end_time) == ("FINISHED", before.info.end_time)
    assert after.data.metrics == before.data.metrics and after.data.tags == before.data.tags
    (output,) = after.outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert logged.status == "READY" and logged.source_run_id == best.run_id
    assert logged.artifact_location == found.source
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "tiny", "version": 1}]


@pytest.mark.slow
def test_promoting_again_is_version_2_and_moves_the_alias(store: Store) -> None:
    trials, client = store.trials(), store.tracker.client
    store.cli("promote", "tiny")
    other = next(trial for trial in trials.values() if trial.run_id != store.best().run_id)
    assert store.cli("promote", "tiny", "--run", other.run_id).exit_code == 0
    found = client.get_model_version_by_alias("tiny", "champion")
    assert (str(found.version), found.run_id) == ("2", other.run_id)
    assert client.get_model_version("tiny", "1").run_id == store.best().run_id
    store.cli("promote", "tiny", "--name", "it's mine", "--alias", "next")
    assert client.get_registered_model("it's mine").aliases.keys() == {"next"}


def test_the_logged_model_holds_no_pickle_and_says_what_it_needs(promoted: Store) -> None:
    folder = model_folder(promoted)
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    page = {".html", ".css", ".js"}  # the package that travels along has the report's templates
    assert suffixes - page == {"", ".py", ".yaml", ".json", ".txt", ".safetensors"}  # "": MLmodel
    assert (folder / "requirements.txt").read_text().split() == [
        f"{name}=={installed(name).split('+')[0]}"
        for name in ("mlflow", "torch", "torchvision", "pillow", "safetensors", "numpy", "pandas")
    ]
    spec = json.loads((folder / "artifacts" / "model.json").read_text())
    assert spec["outputs"] == CLASSES and (spec["arch"], spec["resize"], spec["crop"]) == ("resnet18", 40, 32)
    example = json.loads((folder / "serving_input_example.json").read_text())["dataframe_split"]
    assert Image.open(io.BytesIO(base64.b64decode(example["data"][0][0]))).size == (32, 32)


def model_folder(store: Store) -> Path:
    found = store.tracker.client.get_model_version_by_alias("tiny", "champion")
    return Path(found.source.removeprefix("file://"))


def test_the_card_follows_the_training_config() -> None:
    config = TrialConfig(weights="imagenet", dataset=DatasetConfig(resize=300, crop=280))
    spec = model_spec(config, ["ant", "bee"])
    assert spec["outputs"] == ["ant", "bee"] and (spec["resize"], spec["crop"]) == (300, 280)
    assert spec["mean"] == (0.485, 0.456, 0.406) and spec["std"] == (0.229, 0.224, 0.225)


def registry(store: Store) -> tuple[Any, ...]:
    client, best = store.tracker.client, store.best()
    experiment = client.get_run(best.run_id).info.experiment_id
    models = [(model.name, dict(model.aliases)) for model in client.search_registered_models()]
    files = sorted(path.name for path in (store.folder / "artifacts" / "tiny" / "models").glob("m-*"))
    return models, [m.model_id for m in client.search_logged_models([experiment])], files, best.status


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tinny"], "there is no study 'tinny' in .*; it has tiny, empty"),
        (["empty"], "study 'empty' has no complete trial in .*; run it first: make sweep STUDY=empty"),
        (["tiny", "--run", "0" * 32], "--run: study 'tiny' has no trial with run id 0{32}"),
        (["tiny", "--name", "a/b"], "MLflow cannot register 'a/b' as 'champion': .*; choose --name or --alias"),
        (["tiny", "--alias", "latest"], "MLflow cannot register 'tiny' as 'latest': .* reserved"),
    ],
)
def test_what_cannot_be_promoted_is_one_sentence_and_changes_nothing(
    store: Store, arguments: list[str], sentence: str
) -> None:
    tracker = store.tracker
    tracker.start_study("empty", "Empty", {})
    before = registry(store)
    assert re.search(sentence, store.refuses("promote", *arguments))
    assert registry(store) == before


def test_a_trial_that_is_not_complete_cannot_be_promoted(store: Store) -> None:
    tracker = store.tracker
    tracker.start_study("tiny", "Tiny", {})
    run_id = tracker.start_trial("tiny", "trial-002", {}, {"trial_number": "2"})
    tracker.finish_trial(run_id, "diverged", {}, {}, None)
    assert f"--run: run {run_id} is diverged" in store.refuses("promote", "tiny", "--run", run_id)


@contextlib.contextmanager
def replaced(path: Path, content: bytes | None) -> Iterator[None]:
    """Another content of a file, or none, for a while."""
    kept = path.read_bytes()
    try:
        path.unlink() if content is None else path.write_bytes(content)
        yield
    finally:
        path.write_bytes(kept)


def flipped(path: Path) -> bytes:
    """Return a file's content with one bit changed, near its end."""
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    return bytes(content)


def test_missing_damaged_and_foreign_checkpoints_are_refused(store: Store, images: Path) -> None:
    run_id = store.best().run_id
    checkpoint = store.checkpoint(store.best())
    other = next(trial for trial in store.trials().values() if trial.run_id != run_id)
    foreign = store.checkpoint(other).read_bytes()
    before = registry(store)
    for content, sentence in (
        (None, f"the artifact {CHECKPOINT} is missing in "),
        (checkpoint.read_bytes()[:5000], f"of run {run_id} is damaged"),
        (b"", f"of run {run_id} is damaged"),
        (flipped(checkpoint), f"of run {run_id} is damaged: its checksum is not the recorded one"),
        (foreign, f"of run {run_id} is damaged: its checksum is not the recorded one"),
    ):
        with replaced(checkpoint, content):
            assert sentence in store.refuses("promote", "tiny")
            assert sentence in store.refuses("predict", images, "--model", run_id)
    for content, sentence in (  # where no checksum is recorded
        (checkpoint.read_bytes()[:5000], f"of run {run_id} is damaged"),
        (foreign, f"is not of run {run_id}, but of another training"),
    ):
        with replaced(checkpoint, content), replaced(checkpoint.parent.parent / SUMS, None):
            assert sentence in store.refuses("promote", "tiny")
    with replaced(checkpoint.parent.parent / "config.yaml", b"arch: {"):
        assert "config.yaml cannot be read as a trial's config" in store.refuses("promote", "tiny")
    assert registry(store) == before


def test_a_failing_upload_is_taken_back(store: Store, promoted: Store) -> None:
    folder = store.folder / "artifacts" / "tiny" / "models"
    before = registry(store)
    folder.rename(folder.with_name("kept"))
    folder.write_text("a file where the models would be")
    try:
        assert "study 'tiny' cannot be promoted in" in store.refuses("promote", "tiny")
    finally:
        folder.unlink()
        folder.with_name("kept").rename(folder)
    assert registry(store) == before


def test_a_server_that_does_not_answer_and_a_missing_store_are_one_sentence(tmp_path: Path, images: Path) -> None:
    closed = Store(tmp_path, "http://127.0.0.1:9")
    for command in (["promote", "tiny"], ["predict", str(images)]):
        assert "the tracking server http://127.0.0.1:9 does not answer" in closed.refuses(*command)
        missing = Store(tmp_path, str(tmp_path / "none.db"))
        assert "there is no tracking store" in missing.refuses(*command)
    assert not list(tmp_path.iterdir())


# -- predict -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", slow_but([None], [None, "tiny@champion", "tiny/1", "models:/tiny@champion", "run"]))
def test_predictions_are_torchvisions_by_hand(promoted: Store, images: Path, model: str | None) -> None:
    named = [] if model is None else ["--model", promoted.best().run_id if model == "run" else model]
    files = sorted(path for path in images.rglob("*") if path.suffix in (".jpg", ".png"))
    answers = ask(promoted, images, "--top", "9", *named)
    assert list(answers) == [str(path) for path in files] and len(files) == 7
    for path in files:
        want = dict(zip(CLASSES, by_hand(promoted, path), strict=True))
        assert answers[str(path)] == pytest.approx(want, abs=1e-6)


def test_batches_give_what_single_images_give(promoted: Store, images: Path) -> None:
    batch = ask(promoted, images, "--top", "6")
    for size in ("1", "3"):
        parts = ask(promoted, images, "--top", "6", "--batch-size", size)
        assert list(parts) == list(batch)
        for image, classes in parts.items():
            assert classes == pytest.approx(batch[image], abs=1e-6)


def test_a_broken_image_is_named_and_the_others_are_predicted(promoted: Store, images: Path, tmp_path: Path) -> None:
    good = images / "0.jpg"
    broken = {"empty.jpg": b"", "text.png": b"hello", "cut.jpg": good.read_bytes()[:600]}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    result = promoted.cli("predict", tmp_path / "cut.jpg", good, tmp_path, tmp_path / "none.png", "--top", "1")
    assert result.exit_code == 2
    assert [line.split()[0] for line in result.stdout.splitlines()] == [str(good)]
    cut = f"Error: {tmp_path}/cut.jpg cannot be read as an image: Truncated File Read; is it complete?"
    assert result.stderr.splitlines() == [
        cut,
        cut,
        f"Error: {tmp_path}/empty.jpg cannot be read as an image: it is empty",
        f"Error: {tmp_path}/text.png cannot be read as an image: unknown image format",
        f"Error: {tmp_path}/none.png cannot be read: No such file or directory",
    ]


def test_the_formats_say_the_same(promoted: Store, images: Path, tmp_path: Path) -> None:
    odd = tmp_path / 'a, "b".png'
    shutil.copy(images / "1.png", odd)
    answer = ask(promoted, odd, "--top", "2")[str(odd)]
    rows = list(csv.reader(io.StringIO(promoted.cli("predict", odd, "--top", "2", "--format", "csv").stdout)))
    assert rows[0] == ["image", "rank", "class", "probability"]
    assert rows[1:] == [[str(odd), str(r), name, f"{p:.6f}"] for r, (name, p) in enumerate(answer.items(), 1)]
    table = promoted.cli("predict", odd, "--top", "2").stdout
    assert table == f"{odd}  {'  '.join(f'{name} {p:.4f}' for name, p in answer.items())}\n"


def test_which_model_is_asked_when_none_is_named(store: Store, images: Path) -> None:
    image = images / "0.jpg"
    assert "no registered model in" in store.refuses("predict", image)
    promote("tiny", name="one", tracking_uri=store.uri)
    promote("tiny", name="side", alias="next", tracking_uri=store.uri)
    assert ask(store, image)
    promote("tiny", name="two", tracking_uri=store.uri)
    assert "has 2 champions; name one of one@champion, two@champion" in store.refuses("predict", image)
    assert "'side' has no alias 'champion'; its aliases: side@next" in store.refuses(
        "predict", image, "--model", "side@champion"
    )
    assert "'side' has no version '9'" in store.refuses("predict", image, "--model", "side/9")
    assert "'side' needs an alias or a version" in store.refuses("predict", image, "--model", "side")
    assert "no registered model or run 'sid'; registered: one, side, two" in store.refuses(
        "predict", image, "--model", "sid@next"
    )


def test_a_folder_without_images_is_one_sentence(promoted: Store, tmp_path: Path) -> None:
    assert f"the folder {tmp_path} has no image files" in promoted.refuses("predict", tmp_path)


class Code:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


def test_pickled_weights_are_refused_unless_the_flag_says_so(store: Store, images: Path, tmp_path: Path) -> None:
    run_id = store.best().run_id
    checkpoint = store.checkpoint(store.best())
    pickled = checkpoint.with_suffix(".pt")
    want = ask(store, images, "--model", run_id)
    state = load_file(checkpoint)
    with replaced(checkpoint, None):
        try:
            torch.save({"weight": Code(tmp_path / "evil")}, pickled)
            for command in (["promote", "tiny"], ["predict", images, "--model", run_id]):
                assert "has its weights as a pickle (checkpoints/best.pt)" in store.refuses(*command)
            assert not (tmp_path / "evil").exists()
            torch.save(state, pickled)
            assert ask(store, images, "--model", run_id, "--allow-pickle") == want
            pickled.write_bytes(b"no pickle")
            sentence = store.refuses("predict", images, "--model", run_id, "--allow-pickle")
            assert f"of run {run_id} holds no state dict" in sentence
        finally:
            pickled.unlink()


def test_a_damaged_or_foreign_registered_model_is_refused(store: Store, images: Path) -> None:
    promote("tiny", tracking_uri=store.uri)
    weights = model_folder(store) / "artifacts" / "model.safetensors"
    with replaced(weights, flipped(weights)):
        assert "model.safetensors are damaged" in store.refuses("predict", images)
    with replaced(weights, None):
        assert "model.safetensors cannot be read" in store.refuses("predict", images)
    with replaced(weights.with_name("model.json"), b"{}"):
        assert "card" in store.refuses("predict", images)
    with replaced(weights.with_name("model.json"), None):
        assert "tiny/1 was not logged by caltech-sweep promote" in store.refuses("predict", images)


def test_weights_of_another_network_are_refused(trained: Store) -> None:
    state = load_file(trained.checkpoint(trained.best()))
    spec = model_spec(TrialConfig(arch="resnet34"), CLASSES)
    with pytest.raises(ModelError, match="the weights do not fit resnet34 with 6 outputs"):
        Classifier(spec, state, torch.device("cpu"))


# -- served ------------------------------------------------------------------------------------------------------------


def serving(arguments: list[str], folder: Path, **environment: str) -> contextlib.AbstractContextManager[str]:
    """Run an MLflow server on a free port of loopback until the block ends; yield its address."""
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NO_PROXY": "*", **environment}
    command = [sys.executable, "-m", "mlflow", *arguments, "--host", "127.0.0.1"]
    return answering(command, folder / "server.log", cwd=folder, **own)


def post(address: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.slow
def test_mlflow_serves_the_predictions_over_http(
    promoted: Store, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    files = sorted(path for path in images.rglob("*") if path.suffix in (".jpg", ".png"))
    rows = [[base64.b64encode(path.read_bytes()).decode()] for path in files]
    want = ask(promoted, images, "--top", "3")
    arguments = ["models", "serve", "-m", "models:/tiny@champion", "--env-manager", "local"]
    with serving(arguments, tmp_path, MLFLOW_TRACKING_URI=promoted.tracker.uri) as address:
        frame = {"columns": ["image"], "data": rows}
        status, answer = post(address, {"dataframe_split": frame, "params": {"top": 3}})
        assert status == 200 and len(answer["predictions"]) == 7
        for path, row in zip(files, answer["predictions"], strict=True):
            assert row["classes"] == list(want[str(path)])
            assert dict(zip(row["classes"], row["probabilities"], strict=True)) == pytest.approx(
                want[str(path)], abs=1e-6
            )
        status, answer = post(address, {"dataframe_records": [{"image": rows[0][0]}]})
        assert status == 200 and sorted(answer["predictions"][0]["classes"]) == sorted(CLASSES)
        status, answer = post(address, {"dataframe_split": {"columns": ["image"], "data": [rows[0], ["aGVsbG8="]]}})
        assert status == 400 and "image 1: cannot be read as an image" in answer["message"]


@pytest.mark.slow
def test_the_model_travels_with_its_code_and_loads_without_unpickling(
    promoted: Store, images: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(model_folder(promoted), moved)
    code = (
        "import json, sys, mlflow, pandas\n"
        f"model = mlflow.pyfunc.load_model({str(moved)!r})\n"
        f"frame = pandas.DataFrame({{'image': [open({str(images / '0.jpg')!r}, 'rb').read()]}})\n"
        "answer = model.predict(frame, params={'top': 6}).to_dict('records')[0]\n"
        "import caltech_sweep\n"
        "heavy = sorted({'optuna', 'ruamel', 'rich', 'matplotlib'} & set(sys.modules))\n"
        "print(json.dumps([dict(zip(*answer.values())), caltech_sweep.__file__, heavy]))"
    )
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    answer, where, heavy = json.loads(done.stdout.splitlines()[-1])
    assert answer == pytest.approx(ask(promoted, images / "0.jpg", "--top", "6")[str(images / "0.jpg")], abs=1e-6)
    assert Path(where).is_relative_to(moved) and heavy == []


@pytest.mark.slow
def test_promoting_and_predicting_through_a_tracking_server(
    store: Store, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    arguments = ["server", "--backend-store-uri", store.tracker.uri, "--workers", "1"]
    arguments += ["--default-artifact-root", (store.folder / "artifacts").as_uri()]
    want = ask(store, images, "--model", store.best().run_id)
    with serving(arguments, tmp_path) as address:
        served = Store(store.folder, address)
        assert served.cli("promote", "tiny").exit_code == 0
        assert ask(served, images) == want
        assert served.tracker.client.get_run(store.best().run_id).info.status == "FINISHED"
