"""The commands as a user meets them: what they print, what they refuse, and that refusing writes nothing."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from caltech_sweep import __version__
from helpers.places import RUN, Cli, invoke


def files(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}


def test_help_and_version_are_instant_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from caltech_sweep.cli import main\n"
        "try: main(['--help'], prog_name='caltech-sweep')\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'mlflow', 'optuna', 'numpy', 'sqlalchemy') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("[]\n") and "Sweep, track and report" in out
    done = subprocess.run([sys.executable, "-m", "caltech_sweep", "--version"], capture_output=True, text=True)
    assert done.stdout == f"caltech-sweep, version {__version__}\n"


COORDINATOR = """
import sys
from caltech_sweep.cli import main
try:
    main(["run", "tiny", "--threads", "1", "--device", "cpu"])
except SystemExit as end:
    print(end.code, [name for name in ("torch", "torchvision", "timm") if name in sys.modules])
"""


def test_only_the_workers_of_a_study_import_torch_and_its_stores_are_closed_at_its_end(place: Path) -> None:
    done = subprocess.run([sys.executable, "-c", COORDINATOR], cwd=place, capture_output=True, text=True)
    assert done.stdout == "0 []\n" and "study tiny: 3 complete" in done.stderr, done.stderr
    assert {name for name in files(place / "mlruns") if ".db" in name} == {"mlflow.db", "optuna.db"}


def test_every_command_has_help_and_an_example(cli) -> None:
    commands = re.findall(r"^  (\w+)", cli("--help").output.split("Commands:")[1], re.M)
    assert {"run", "plan", "studies", "report", "ui", "data"} <= set(commands)
    for command in commands:
        assert "Example: caltech-sweep" in cli(command, "--help").output, command


def test_a_plan_writes_nothing(cli, place: Path) -> None:
    assert "2 rows, 3 trials" in cli("studies").output
    assert "to train" in cli("plan", "tiny").output
    assert not (place / "mlruns").exists()


def test_a_finished_study_from_plan_to_tables(finished: Path) -> None:
    plan = invoke("plan", "tiny").output
    assert "complete" in plan and "nothing to train" in plan
    again = invoke(*RUN)
    assert again.exit_code == 0 and "nothing to do" in again.output
    (finished / "sweeps").rename(finished / "away")
    try:
        report = invoke("report", "tiny")
        out = finished / "table.csv"
        assert invoke("report", "tiny", "--format", "csv", "--out", str(out)).output == ""
    finally:
        (finished / "away").rename(finished / "sweeps")
    assert report.exit_code == 0 and "First" in report.output and "trial-002" in report.output
    assert "First" in out.read_text()


def test_an_old_name_of_an_option_answers_with_the_new_one(place: Path, cli: Cli) -> None:
    result = cli("run", "tiny", "--stage-budget", "1")
    assert result.exit_code == 2 and "Error: --stage-budget is called --cache-size now.\n" in result.output
    assert not (place / "mlruns").exists()
    assert "No such option" in cli("run", "tiny", "--nothing-like-it").output


def test_every_artifact_of_a_trial_is_in_its_run(finished: Path) -> None:
    from caltech_sweep.tracking.writer import MlflowTracker

    tracker = MlflowTracker()
    study = tracker.study("tiny")
    assert study is not None
    trial = next(t for t in tracker.trials(study) if t.row == "Views")
    root = Path(urlparse(trial.artifact_uri).path)
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    parts = ("val", "test", "test_tencrop")
    assert names == {
        *(f"confusion_matrix/{part}.{suffix}" for part in parts for suffix in ("png", "csv")),
        *(f"predictions/{part}.csv" for part in parts),
        *("per_class.csv", "checkpoints/best.safetensors", "config.yaml", "environment.json", "SHA256SUMS"),
    }
    with Image.open(root / "confusion_matrix" / "test.png") as picture:
        assert picture.size[0] > 300
    assert set(trial.metrics) >= {
        *("train/loss", "train/accuracy", "val/loss", "val/accuracy", "lr", "epoch_seconds", "images_per_second"),
        *("best/val_accuracy", "best/epoch", "test/accuracy", "test/loss", "test_tencrop/accuracy"),
    }
    history = tracker.client.get_metric_history(trial.run_id, "val/accuracy")
    assert [metric.step for metric in history] == [1, 2]
    assert trial.metrics["best/val_accuracy"] == max(metric.value for metric in history)
    note = tracker.client.get_run(study.run_id).data.tags["mlflow.note.content"]
    assert note.startswith("## A tiny study") and "| First " in note and "| Views " in note


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("run", "tinny"), "there is no study 'tinny' in sweeps; did you mean 'tiny'?"),
        (("plan", "tinny"), "there is no study 'tinny'"),
        (("report", "tiny"), "run a study first"),
        (("ui",), "run a study first"),
        ((*RUN, "--set", "arch=alexnett"), "no classification model 'alexnett'; did you mean 'alexnet'?"),
        ((*RUN, "--set", "lr=fast"), "lr must be a number above 0, got 'fast'"),
        ((*RUN, "--set", "batch_size=500"), "batch_size: 500 is more than the 24 training images"),
        ((*RUN, "--set", "weights=study:other"), "'other' has no complete trial"),
        ((*RUN, "--set", "weights=file:none.pt"), "there is no file none.pt"),
        ((*RUN, "--set", "freeze=fc_but_last"), "fc_but_last freezes nothing"),
        ((*RUN, "--set", "outputs=2"), "2 outputs cannot tell 3 classes apart"),
        ((*RUN, "--set", "dataset.classes=99"), "must be between 2 and 8, got 99"),
        ((*RUN, "--set", "dataset.crop=64"), "64 pixels cannot be cut from images of 32"),
        ((*RUN, "--row", "Frist"), "has no row 'Frist'; did you mean 'First'?"),
        ((*RUN, "--device", "cuda:7"), "'cuda:7' cannot be used on this machine"),
        ((*RUN, "--tracking-uri", "http://127.0.0.1:9"), "http://127.0.0.1:9 does not answer"),
        ((*RUN, "--storage", "mlruns/mlflow.db"), "cannot share one database"),
        ((*RUN, "--set", "dataset.name=caltech101"), "fetch it with `caltech-sweep data`"),
        ((*RUN, "--set", "dataset.name=folder"), "needs the folder of its class folders"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(cli, place: Path, arguments, sentence: str) -> None:
    before = files(place)
    result = cli(*arguments)
    assert result.exit_code == 2, result.output
    assert sentence in result.output and "Traceback" not in result.output
    assert files(place) == before


def test_a_malformed_study_file_is_refused_with_all_its_problems(cli, place: Path) -> None:
    (place / "sweeps" / "bad.yaml").write_text("title: x\nfixed: {lrr: 1, epochs: few}\nrows: [{name: a}]\n")
    result = cli("run", "bad")
    assert result.exit_code == 2 and result.output.count("sweeps/bad.yaml:2:") == 2
    assert "cannot be read: sweeps/bad.yaml:2" in cli("studies").output
    assert not (place / "mlruns").exists()


def test_a_folder_that_cannot_be_written_is_refused(cli, place: Path) -> None:
    (place / "mlruns").write_text("a file where a folder should be")
    result = cli(*RUN)
    assert result.exit_code == 2 and "mlruns" in result.output


def test_a_corrupt_image_is_named_and_the_sweep_does_not_start(cli, place: Path) -> None:
    for name in ("cat", "dog"):
        (place / "own" / name).mkdir(parents=True)
        for index in range(12):
            Image.new("RGB", (40, 40), (index * 20, 0, 0)).save(place / "own" / name / f"{index}.png")
    (place / "own" / "cat" / "5.png").write_bytes(b"no image")
    own = (*RUN, "--set", "dataset.name=folder", "--set", "dataset.classes=null", "--data", str(place / "own"))
    result = cli(*own)
    assert result.exit_code == 2 and "5.png" in result.output and not (place / "mlruns").exists()
    Image.new("RGB", (40, 40)).save(place / "own" / "cat" / "5.png")
    assert "1 complete" in cli(*own, "--row", "First").output


def test_a_port_in_use_is_refused(finished: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = invoke("ui", "--port", port)
    assert result.exit_code == 2 and f"127.0.0.1:{port} cannot be used" in result.output


def test_a_changed_study_is_refused_under_its_old_name_with_the_difference(finished: Path) -> None:
    result = invoke(*RUN, "--set", "momentum=0.5")
    assert result.exit_code == 2
    assert "overrides.momentum: was null, is 0.5" in result.output and "--name" in result.output


def test_weights_of_another_study_are_transferred(copied: Path) -> None:
    result = invoke(*RUN, "--row", "First", "--set", "weights=study:tiny", "--name", "target")
    assert result.exit_code == 0, result.output
    from caltech_sweep.tracking.writer import MlflowTracker

    tracker = MlflowTracker()
    study = tracker.study("target")
    assert study is not None
    assert tracker.trials(study)[0].tags["weights.run_id"] == tracker.best_trial("tiny").run_id


def weights_of(place: Path, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return the best weights of every trial by its fingerprint."""
    found = {}
    for path in (place / folder / "artifacts").rglob("best.safetensors"):
        with safe_open(path, "pt") as file:
            found[file.metadata()["fingerprint"]] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_weights_are_the_same_with_workers_as_without(workers: str, finished_place: Path, cli, place: Path) -> None:
    result = cli("run", "tiny", "--threads", "1", "--workers", workers)
    assert result.exit_code == 0, result.output
    without, found = weights_of(finished_place, "mlruns"), weights_of(place, "mlruns")
    assert len(without) == 3 and found.keys() == without.keys()
    for fingerprint, weights in without.items():
        assert all(torch.equal(weights[name], found[fingerprint][name]) for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["--in-process", "--workers=1"])
def test_ctrl_c_stops_cleanly_and_the_next_run_goes_on(where: str, place: Path, cli) -> None:
    options = ("--set", "epochs=10", "--row", "First")
    command = [sys.executable, "-m", "caltech_sweep", "run", "tiny", "--threads", "1", where, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=place) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "epoch 2/10" in line)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "interrupted" in rest and "run the same command to resume" in rest and "Traceback" not in rest
    from caltech_sweep.tracking.writer import MlflowTracker

    tracker = MlflowTracker()
    study = tracker.study("tiny")
    assert study is not None
    assert [t.status for t in tracker.trials(study)] == ["KILLED"]
    assert "1 complete" in cli(*RUN, *options).output
    (trial,) = tracker.trials(study)
    assert [m.step for m in tracker.client.get_metric_history(trial.run_id, "lr")] == list(range(1, 11))


@pytest.mark.slow
def test_two_runs_of_one_study_at_once_are_refused(place: Path, cli) -> None:
    command = [sys.executable, "-m", "caltech_sweep", *RUN, "--set", "epochs=400"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=place) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "started" in line)
        result = cli(*RUN, "--set", "epochs=400")
        process.kill()
    assert result.exit_code == 2 and f"being run by process {process.pid}" in result.output
