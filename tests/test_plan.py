"""Plans: they say what is so, refuse what a run refuses with the same sentence, and write nothing."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from caltech_sweep.data import inspect_dataset
from caltech_sweep.files import locked
from caltech_sweep.stores import study_store
from caltech_sweep.study.definition import StudyDefinition
from caltech_sweep.study.file import load_study
from caltech_sweep.sweep.optuna_store import open_study
from caltech_sweep.sweep.preflight import identity_of
from caltech_sweep.sweep.sharing import new_epochs
from caltech_sweep.testing import MemoryTracker, Script, ScriptedExecutor, run_scripted
from caltech_sweep.tracking.records import STORE_TAG
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.datasets import draw
from helpers.places import Cli, invoke, sql

FOLDER = ("--set", "dataset.name=folder", "--set", "dataset.classes=null", "--set", "dataset.images_per_class=null")
REFUSALS = {
    "an unknown row": ("--row", "Frist"),
    "a device that is not there": ("--device", "cuda:7"),
    "one database for both stores": ("--storage", "mlruns/mlflow.db"),
    "a server that does not answer": ("--tracking-uri", "http://127.0.0.1:9"),
    "a file where a store's folder should be": ("--storage", "sweeps/tiny.yaml/x/optuna.db"),
    "an unknown network": ("--set", "arch=alexnett"),
    "weights of no study": ("--set", "weights=study:other"),
    "weights of no file": ("--set", "weights=file:none.pt"),
    "frozen layers that are not there": ("--set", "freeze=fc_but_last"),
    "too few outputs": ("--set", "outputs=2"),
    "too many classes": ("--set", "dataset.classes=99"),
    "a batch that is never full": ("--set", "batch_size=500"),
    "no dataset": ("--set", "dataset.name=caltech101"),
    "no folder": (*FOLDER, "--data", "none"),
    "a folder with too little in it": (*FOLDER, "--data", "few"),
    "a folder with images that are none": (*FOLDER, "--data", "broken"),
}


def counts(plan: str, group: str) -> tuple[str, str]:
    """Return the epochs that a group is asked for and those that are left, as the plan says them."""
    found = re.search(rf"^{group}: (.+) epochs requested, (.+) to train$", plan, re.M)
    assert found is not None, plan
    return found[1], found[2]


@pytest.mark.parametrize("text", ["1e400", "99999999999999999999999", "", "[[[["])
def test_a_setting_that_is_none_in_the_tracking_store_is_planned_as_the_study_says(copied: Path, text: str) -> None:
    before = invoke("plan", "tiny").output
    sql(copied, "mlflow.db", f"UPDATE params SET value = '{text}' WHERE key IN ('epochs', 'lr', 'step_size', 'gamma')")
    assert invoke("plan", "tiny").output == before


def test_the_time_of_a_plan_is_that_of_trials_of_the_same_kind(copied: Path) -> None:
    seconds = {"First": 1, "Views": 3, "trial-002": 8}
    for name, value in seconds.items():
        run = f"(SELECT run_uuid FROM runs WHERE name = '{name}')"
        for table in ("metrics", "latest_metrics"):
            sql(
                copied,
                "mlflow.db",
                f"UPDATE {table} SET value = {value} WHERE key = 'epoch_seconds' AND run_uuid = {run}",
            )
    file = copied / "sweeps" / "tiny.yaml"
    file.write_text(f"{file.read_text()}  - name: Frozen\n    set: {{lr: 0.3, freeze: conv}}\n")
    plan = invoke("plan", "tiny").stdout
    assert "\ntime: unknown until one epoch of this study has been measured\n" in plan
    file.write_text(f"{file.read_text()}  - name: Fast\n    set: {{lr: 0.2}}\n")
    sql(copied, "mlflow.db", "DELETE FROM params WHERE key = 'unfreeze_epoch'")  # as runs of an older version
    plan = invoke("plan", "tiny").stdout
    assert (
        "\ntime: about 6 s on one worker, at 3.0 s an epoch (median of 3 measured trials); that is without Frozen, "
        in plan
    )


@pytest.mark.parametrize("case", REFUSALS)
def test_a_plan_refuses_what_a_run_refuses_with_the_same_sentence(place: Path, case: str) -> None:
    draw(place / "few", images=2)
    broken = draw(place / "broken")
    (broken / "class 1" / "0.png").write_bytes(b"no image")
    (broken / "class 2" / "0.png").write_bytes(b"")
    plan = invoke("plan", "tiny", *REFUSALS[case])
    assert not (place / "data").exists()
    run = invoke("run", "tiny", *REFUSALS[case])
    assert (plan.exit_code, run.exit_code) == (2, 2)
    *_, sentence = run.stderr.splitlines()  # after those about decoding images
    assert sentence.startswith("Error: ") and sentence.removeprefix("Error: ") in plan.stderr
    assert not (place / "mlruns").exists()


def test_a_plan_refuses_other_settings_under_the_name_of_a_study_as_a_run_does(finished: Path) -> None:
    other = ("tiny", "--set", "momentum=0.5")
    plan, run = invoke("plan", *other), invoke("run", *other, "--in-process")
    assert (plan.exit_code, run.exit_code) == (2, 2)
    assert run.stderr.removeprefix("Error: ") in plan.stderr and "overrides.momentum: was null, is 0.5" in plan.stderr
    assert invoke("plan", "tiny").exit_code == 0


def test_a_plan_refuses_a_study_that_was_deleted_or_that_another_process_runs(copied: Path) -> None:
    with locked(copied / "mlruns" / "locks" / "tiny.lock"):
        plan, run = invoke("plan", "tiny"), invoke("run", "tiny", "--in-process")
    assert run.stderr.removeprefix("Error: ") in plan.stderr and "is being run by" in plan.stderr
    assert "nothing to train" in plan.stdout and plan.exit_code == run.exit_code == 2
    assert invoke("plan", "tiny").exit_code == 0
    client = MlflowTracker().client
    client.delete_experiment(client.get_experiment_by_name("tiny").experiment_id)
    plan, run = invoke("plan", "tiny"), invoke("run", "tiny", "--in-process")
    assert (plan.exit_code, plan.stderr) == (run.exit_code, run.stderr) and "was deleted in MLflow" in run.stderr


def test_what_a_broken_dataset_leaves_unknown_is_called_unknown(place: Path) -> None:
    (draw(place / "broken") / "class 1" / "0.png").write_bytes(b"no image")
    plan = invoke("plan", "tiny", *FOLDER, "--data", "broken")
    assert "broken/class 1/0.png (unknown image format)" in plan.stderr
    assert "not here" not in plan.output and "101" not in plan.output
    assert re.search(r"^First +2 +unknown +unknown +2 +to train$", plan.stdout, re.M), plan.stdout
    # With a number of outputs the classes do not matter.
    plan = invoke("plan", "tiny", *FOLDER, "--data", "broken", "--set", "outputs=9")
    assert re.search(r"^First +2 +unknown +727,113 +2 +to train$", plan.stdout, re.M), plan.stdout


def test_a_plan_without_its_images_still_counts_epochs(place: Path) -> None:
    plan = invoke("plan", "tiny", "--set", "dataset.name=caltech101")
    assert counts(plan.stdout, "rows") == ("4", "4") and plan.exit_code == 2
    assert "fetch it with `caltech-sweep data`" in plan.stderr


# -- counts ------------------------------------------------------------------------------------------------------------

FAMILIES = """\
dataset: {name: shapes, resize: 32, crop: 32, classes: 3, images_per_class: 8}
trials: 37
fixed: {arch: resnet18, batch_size: 8, gamma: 0.1}
space: {lr: {low: 1e-3, high: 5e-2, log: true}}
expand: {step_size: [10, 20, 30], epochs: [20, 30, 40]}
rows: [{name: Baseline, set: {lr: 0.5, step_size: 20, epochs: 30}}]
"""


def family_study(place: Path, **changes: str) -> StudyDefinition:
    text = FAMILIES
    for old, new in changes.items():
        text = re.sub(rf"^{old}: .*$", new, text, flags=re.M)
    (place / "sweeps" / "many.yaml").write_text(text, encoding="utf-8")
    return load_study("many")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trials": "trials: 10", "rows": ""},  # not a multiple of the family: both of its families are trained whole
        {"expand": "expand: {gamma: [0.5, 0.1], epochs: [20, 30]}", "fixed": "fixed: {step_size: 15, batch_size: 8}"},
        {"expand": "", "fixed": "fixed: {epochs: 7, arch: resnet18}", "rows": "", "trials": "trials: 4"},
    ],
    ids=["families", "a part of a family", "two drops", "no families"],
)
def test_epochs_are_those_that_the_coordinator_then_trains(place: Path, changes: dict[str, str]) -> None:
    if changes.get("trials") == "trials: 10":
        study = replace(family_study(place, rows="", trials="trials: 9"), trials=10)
        plan = invoke("plan", "many", "--trials", "10")
    else:
        study = family_study(place, **changes)
        plan = invoke("plan", "many")
    executor = ScriptedExecutor(Script([0.5]))
    run_scripted(study, executor, MemoryTracker())
    sampled = [job.config for job in executor.jobs if job.config.lr != 0.5]
    asked, left = sum(config.epochs for config in sampled), sum(new_epochs(sampled))
    assert counts(plan.stdout, "sampled") == (f"{asked:,}", f"{left:,}")
    if not changes:
        assert counts(plan.stdout, "sampled")[0] == "1,080"


def test_a_pruner_and_a_space_of_few_settings_make_a_count_the_most(place: Path) -> None:
    family_study(place, trials="trials: 10\npruner: {name: median}")
    assert counts(invoke("plan", "many").stdout, "sampled") == ("270", "up to 90")
    family_study(place, trials="trials: 10", space="space: {lr: {choices: [0.1, 0.2]}}")
    assert counts(invoke("plan", "many").stdout, "sampled") == ("270", "up to 90")


def started(study: StudyDefinition) -> MlflowTracker:
    """Return a tracking store in which the study store of the current folder has begun a study."""
    data = inspect_dataset(study.config({}).dataset)
    tracker = MlflowTracker(create=True)
    own = open_study(study, study_store(None), identity_of(study, data.fingerprint, {}, {}))
    tracker.start_study(study.name, study.title, {**study.to_dict(), STORE_TAG: own.user_attrs[STORE_TAG]})
    return tracker


def record(
    tracker: MlflowTracker, study: StudyDefinition, number: int, outcome: str, tags: dict[str, str], **settings: object
) -> None:
    config = study.config({"lr": 0.01, **settings})
    own = {"trial_number": str(number), "fingerprint": config.fingerprint(), **tags}
    run_id = tracker.start_trial(study.name, f"trial-{number:03d}", config.to_params(), own)
    tracker.finish_trial(run_id, outcome, {"best/val_accuracy": 0.5, "test/accuracy": 0.5}, {}, None)


def test_trials_that_are_known_count_exactly_and_repeats_do_not_count(place: Path) -> None:
    family = (
        "trials: 5",
        "space: {lr: {low: 0.1, high: 0.2}, epochs: {choices: [4, 9]}}",
        "fixed: {step_size: 2, batch_size: 8}",
    )
    study = family_study(place, rows="", expand="", **dict(zip(("trials", "space", "fixed"), family, strict=True)))
    assert counts(invoke("plan", "many").stdout, "sampled") == ("20 to 45", "20 to 45")
    tracker = started(study)
    record(tracker, study, 0, "complete", {}, epochs=9)
    record(tracker, study, 1, "crashed", {}, epochs=9)  # another is sampled in its place
    record(tracker, study, 2, "interrupted", {}, epochs=4)
    record(tracker, study, 3, "complete", {"confirms": "0"}, epochs=9, seed=1)
    plan = invoke("plan", "many").stdout
    assert "1 of 5 done" in plan
    assert counts(plan, "sampled") == ("25 to 40", "12 to 31")


def test_a_family_that_was_begun_lacks_what_its_other_schedules_need(place: Path) -> None:
    study = family_study(place, trials="trials: 10")
    tracker = started(study)
    record(tracker, study, 1, "complete", {}, step_size=10, epochs=20)
    record(tracker, study, 2, "complete", {"family": "1"}, step_size=20, epochs=40)
    # Of the family's tree: 20 + 20 more of step 10, and of step 30 what differs from step 20 after epoch 20: 20.
    assert counts(invoke("plan", "many").stdout, "sampled") == ("270", "40")


def test_every_seed_of_a_row_is_planned_and_rows_may_be_chosen(place: Path) -> None:
    plan = invoke("plan", "tiny", "--replicates", "3").stdout
    assert counts(plan, "rows") == ("12", "12") and "First x 3 seeds" in plan
    plan = invoke("plan", "tiny", "--replicates", "3", "--row", "Views").stdout
    assert counts(plan, "rows") == ("6", "6") and "First" not in plan and "sampled:" not in plan


def test_images_of_a_trial_follow_every_size_of_its_batches(place: Path) -> None:
    family_study(
        place,
        trials="trials: 3",
        rows="",
        expand="",
        fixed="fixed: {epochs: 2, arch: resnet18}",
        space="space: {batch_size: {low: 7, high: 24}, lr: {low: 0.1, high: 0.2}}",
    )
    # 24 images to train on: batches of 13 leave the most out, batches of 8 or 24 nothing.
    assert re.search(r"^sampled x 3 +2 +26 to 48 ", invoke("plan", "many").stdout, re.M)


# -- nothing is written ------------------------------------------------------------------------------------------------


def everything(*places: Path) -> dict[str, tuple[int, bytes]]:
    """Return time and content of every file, and every folder."""
    found: dict[str, tuple[int, bytes]] = {}
    for path in (path for place in places for path in place.rglob("*")):
        found[str(path)] = (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else (0, b"folder")
    return found


def plan_outside(arguments: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Plan in a process of its own, in which no cache of this one helps."""
    command = [sys.executable, "-m", "caltech_sweep", "plan", *arguments]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


PLANS = (
    ("tiny", "--threads", "1"),
    ("tiny", "--name", "new", *FOLDER, "--data", "photos"),
    ("tiny", "--name", "new", "--set", "weights=imagenet"),
    ("tiny", "--tracking-uri", "elsewhere/mlflow.db", "--storage", "elsewhere/optuna.db"),
    ("tiny", "--name", "new", "--set", "weights=study:tiny"),
)


@pytest.fixture
def watched(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, ...]:
    """Work in a copy of the finished study, with a home and a folder for temporary files, all of which are watched."""
    for store in copied.glob("mlruns/*.db"):
        with closing(sqlite3.connect(store)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    own = tmp_path / "own"  # without the logs that this process holds open
    shutil.copytree(copied, own, ignore=shutil.ignore_patterns("*-wal", "*-shm"))
    monkeypatch.chdir(own)
    draw(own / "photos")
    for variable, name in (("HOME", "home"), ("XDG_CACHE_HOME", "home"), ("TMPDIR", "temporary")):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setenv(variable, str(tmp_path / name))
    return own, tmp_path / "home", tmp_path / "temporary"


def test_a_plan_writes_nothing_at_all(watched: tuple[Path, ...]) -> None:
    before = everything(*watched)
    for arguments in PLANS[:-1]:
        plan = invoke("plan", *arguments)
        assert plan.exit_code == 0, plan.output
        assert everything(*watched) == before, arguments
        assert ("weights of squeezenet1_1 are not here yet; a run downloads them" in plan.stdout) == (
            arguments == PLANS[2]
        )


@pytest.mark.slow
def test_a_plan_of_a_process_of_its_own_writes_nothing_at_all(watched: tuple[Path, ...]) -> None:
    before = everything(*watched)
    for arguments in PLANS:
        done = plan_outside(arguments)
        assert done.returncode == 0, (arguments, done.stderr)
        assert everything(*watched) == before, arguments


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_refused_as_a_run_refuses_it(place: Path, small_disk: Path) -> None:
    draw(place / "photos")
    arguments = ("tiny", *FOLDER, "--data", "photos")
    mount = ["mount", "-o", "remount,ro", str(small_disk)]
    assert subprocess.run(mount).returncode == 0
    plan = plan_outside(arguments, CALTECH_SWEEP_DATA=str(small_disk))
    assert plan.returncode == 2 and f"the image cache folder {small_disk}/cache cannot be written" in plan.stderr
    assert "3 classes" not in plan.stdout and "rows: 4 epochs" in plan.stdout
    assert invoke("plan", *arguments).exit_code == 0


def test_the_weights_of_a_study_are_looked_up_in_the_store_that_is_named(
    finished_place: Path, place: Path, cli: Cli
) -> None:
    call = ("plan", "tiny", "--name", "new", "--set", "weights=study:tiny", "--storage", "own.db")
    named = cli(*call, "--tracking-uri", str(finished_place / "mlruns" / "mlflow.db"))
    assert named.exit_code == 0, named.output
    assert cli(*call).exit_code == 2  # nothing is in the default store
