"""Initial weights by their contents: a file that changed is never mixed into a study, the same file elsewhere is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from caltech_sweep.artifacts import CHECKPOINT
from caltech_sweep.config import TrialConfig
from caltech_sweep.files import SUMS, file_digest, write_sums
from caltech_sweep.study.file import load_study
from caltech_sweep.sweep.executors.base import Done, Epoch, Failed, Job, Trained
from caltech_sweep.sweep.executors.in_process import InProcessExecutor
from caltech_sweep.sweep.executors.worker import train
from caltech_sweep.sweep.optuna_store import open_storage, stored_studies
from caltech_sweep.tracking.records import TrialRecord
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.marks import slow_but
from helpers.places import Cli, clone, furnish, ran

ARCH = "shufflenet_v2_x0_5"
RUN = ("--in-process", "--threads", "1", "--row", "First")


def write_weights(path: Path, seed: int) -> str:
    """Write weights that a trial can start from; return their digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_file(torchvision.models.get_model(ARCH).state_dict(), path)
    return file_digest(path)


def use(place: Path, weights: str) -> None:
    """Let the study start from weights."""
    study = place / "sweeps" / "tiny.yaml"
    fixed = f"fixed: {{arch: {ARCH}, batch_size: 8, epochs: 1, weights: '{weights}'}}"
    study.write_text(re.sub("fixed: .*", fixed, study.read_text(encoding="utf-8")), encoding="utf-8")


def runs(study: str = "tiny") -> list[TrialRecord]:
    tracker = MlflowTracker()
    record = tracker.study(study)
    assert record is not None
    return tracker.trials(record)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study whose row started from pre.safetensors, made once."""
    folder = furnish(tmp_path_factory.mktemp("original"))
    write_weights(folder / "pre.safetensors", 1)
    use(folder, "file:pre.safetensors")
    ran(folder, "run", "tiny", *RUN)
    return folder


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, to work in."""
    clone(original, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def trained(place: Path) -> str:
    """The digest of the weights that the row started from."""
    return file_digest(place / "pre.safetensors")


def test_every_run_records_the_contents_that_it_started_from(trained: str) -> None:
    assert [run.tags["weights.digest"] for run in runs()] == [trained]


def test_a_file_that_was_overwritten_is_refused_and_plan_says_so(cli: Cli, place: Path, trained: str) -> None:
    assert re.search("First .* complete", cli("plan", "tiny").output)
    now = write_weights(place / "pre.safetensors", 2)
    result = cli("run", "tiny", *RUN)
    assert result.exit_code == 2
    assert (
        f"the SHA-256 of file:pre.safetensors was {trained}, is {now};" in result.output and "--name" in result.output
    )
    plan = cli("plan", "tiny").output
    assert re.search("First .* 1 +to train", plan) and trained in plan and now in plan and "--name" in plan, plan
    assert cli("run", "tiny", *RUN, "--name", "other").exit_code == 0
    assert [run.tags["weights.digest"] for run in runs("other")] == [now]
    write_weights(place / "pre.safetensors", 1)  # what was there before
    assert cli("run", "tiny", *RUN).exit_code == 0 and len(runs()) == 1


@pytest.mark.parametrize("how", slow_but(["renamed"], ["renamed", "absolute", "linked"]))
def test_the_same_contents_elsewhere_go_on_with_the_study_and_train_nothing(
    cli: Cli, place: Path, trained: str, how: str
) -> None:
    if how == "renamed":
        (place / "pre.safetensors").rename(place / "other.safetensors")
        use(place, "file:other.safetensors")
    elif how == "absolute":
        use(place, f"file:{place / 'pre.safetensors'}")
    else:
        (place / "real").mkdir()
        (place / "pre.safetensors").rename(place / "real" / "pre.safetensors")
        (place / "link").symlink_to(place / "real")
        use(place, "file:link/pre.safetensors")
    result = cli("run", "tiny", *RUN)
    assert result.exit_code == 0, result.output
    assert runs()[-1].tags["weights.digest"] == trained and runs()[-1].tags["reuse.epochs_trained"] == "0"
    if how == "linked":  # the link leads elsewhere now
        now = write_weights(place / "new" / "pre.safetensors", 2)
        (place / "link").unlink()
        (place / "link").symlink_to(place / "new")
        result = cli("run", "tiny", *RUN)
        assert result.exit_code == 2 and trained in result.output and now in result.output


def test_a_study_of_an_older_version_goes_on_with_a_sentence_once(cli: Cli, place: Path, trained: str) -> None:
    study = stored_studies(open_storage(f"sqlite:///{place / 'mlruns' / 'optuna.db'}"))["tiny"]
    identity = {**study.user_attrs["identity"], "initial_weights": {}}
    assert trained in identity["fixed"]["weights"]
    study.set_user_attr("identity", {**identity, "fixed": {**identity["fixed"], "weights": "file:pre.safetensors"}})
    result = cli("run", "tiny", *RUN)
    known = f"from now on they are those with SHA-256 {trained}"
    sentence = f"the contents of file:pre.safetensors were not recorded before; {known}"
    assert result.exit_code == 0 and sentence in result.output
    assert sentence not in cli("run", "tiny", *RUN).output
    write_weights(place / "pre.safetensors", 2)
    assert cli("run", "tiny", *RUN).exit_code == 2


@pytest.mark.slow
def test_a_source_whose_checkpoint_was_rewritten_is_refused(cli: Cli, place: Path, trained: str) -> None:
    source = runs()[0]
    (place / "sweeps" / "child.yaml").write_text((place / "sweeps" / "tiny.yaml").read_text(encoding="utf-8"))
    for weights in (f"run:{source.run_id}", "study:tiny"):
        text = re.sub("weights: '[^']*'", f"weights: '{weights}'", (place / "sweeps" / "child.yaml").read_text())
        (place / "sweeps" / "child.yaml").write_text(text, encoding="utf-8")
        name = weights.split(":")[0]
        assert cli("run", "child", *RUN, "--name", name).exit_code == 0
        assert runs(name)[0].tags["weights.run_id"] == source.run_id
    artifacts = place / "mlruns" / "artifacts" / "tiny" / source.run_id / "artifacts"
    was = file_digest(artifacts / CHECKPOINT)
    save_file(
        {k: v + 0 if v.dtype == torch.long else v * 2 for k, v in load_file(artifacts / CHECKPOINT).items()},
        artifacts / CHECKPOINT,
    )
    assert "damaged" in cli("run", "child", *RUN, "--name", "study").output  # its checksum says so
    (artifacts / SUMS).unlink()
    write_sums(artifacts)
    result = cli("run", "child", *RUN, "--name", "study")
    assert result.exit_code == 2
    assert f"the SHA-256 of study:tiny was {was}, is {file_digest(artifacts / CHECKPOINT)}" in result.output


def test_a_file_that_changes_before_its_trial_starts_fails_that_trial(place: Path, tmp_path: Path) -> None:
    digest = write_weights(place / "pre.safetensors", 1)
    use(place, "file:pre.safetensors")
    definition = load_study("tiny")
    config = definition.row_config(definition.rows[0])

    def end(job: Job) -> Done | Failed:
        executor = InProcessExecutor(train, "cpu")
        job.folder.mkdir(exist_ok=True)
        executor.submit(job)
        while True:
            [event] = executor.poll(0)
            if not isinstance(event, (Epoch, Trained)):
                assert isinstance(event, (Done, Failed))
                return event

    job = Job(0, config, tmp_path / "out", place / "pre.safetensors", weights_digest=digest)
    assert isinstance(end(job), Done)
    write_weights(place / "pre.safetensors", 2)
    failed = end(job)
    assert isinstance(failed, Failed) and failed.outcome == "crashed" and not failed.trace
    assert (
        failed.message.startswith("weights: ")
        and f"changed while the study ran: its SHA-256 was {digest}" in failed.message
    )


def test_every_network_has_imagenet_weights_of_its_own() -> None:
    from caltech_sweep.study.file import weights_key

    config = TrialConfig(arch="alexnet", weights="imagenet")
    assert weights_key(config) != weights_key(replace(config, arch="resnet18"))
    assert weights_key(replace(config, weights="file:a")) == "file:a"


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/full", "/tmp"])
def test_weights_that_are_a_device_or_a_folder_are_refused_and_not_read_for_ever(cli: Cli, name: str) -> None:
    refused = cli("plan", "tiny", "--set", f"weights=file:{name}")
    assert refused.exit_code == 2 and f"weights: {name} is no file" in refused.output
