"""The doctor on real stores that were hurt: what it says, that it changes nothing unasked, and that fixes last."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from caltech_sweep.tracking.records import TrialRecord
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.places import RUN, invoke, sql
from helpers.servers import HANG_UP, Gate, gated_mlflow


def trials() -> list[TrialRecord]:
    tracker = MlflowTracker()
    study = tracker.study("tiny")
    assert study is not None
    return tracker.trials(study)


def artifacts(place: Path, name: str) -> Path:
    (record,) = [record for record in trials() if record.name == name]
    return place / "mlruns" / "artifacts" / "tiny" / record.run_id / "artifacts"


def contents(place: Path) -> dict[str, list[str]]:
    """Return all that the two databases hold."""
    found = {}
    for file in ("mlflow.db", "optuna.db"):
        with closing(sqlite3.connect(place / "mlruns" / file)) as connection:
            found[file] = list(connection.iterdump())
    return found


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("0", "trial 0 waits with settings that its row no longer has: it failed"),
        ("0, 1", "trials 0 and 1 wait with settings that their rows no longer have: they failed"),
    ],
)
def test_trials_that_wait_for_rows_that_have_changed_are_told_in_one_line(copied: Path, rows: str, said: str) -> None:
    run_ids = [trial.run_id for trial in trials()[: len(rows.split(", "))]]
    sql(copied, "optuna.db", f"UPDATE trials SET state = 'WAITING' WHERE number IN ({rows})")
    for run_id in run_ids:
        MlflowTracker().discard(run_id)
    study = copied / "sweeps" / "tiny.yaml"
    study.write_text(study.read_text().replace("{lr: 0.0", "{lr: 0.06"))
    result = invoke(*RUN)
    assert said in result.output and result.exit_code == 0, result.output
    assert result.output.count("no longer ha") == 1 and "study tiny: 2 complete" in result.output


def test_a_healthy_store_is_left_alone(copied: Path) -> None:
    before = contents(copied)
    result = invoke("doctor")
    assert (result.exit_code, result.output) == (0, "1 study examined: 0 found, 0 fixed\n")
    assert invoke("doctor", "tiny", "--fix").exit_code == 0 and contents(copied) == before
    wrong = invoke("doctor", "tinny")
    assert wrong.exit_code == 2 and "there is no study 'tinny' in either store; did you mean 'tiny'?" in wrong.output


def left_running(place: Path) -> None:
    sql(place, "optuna.db", "UPDATE trials SET state = 'RUNNING' WHERE number = 2")
    sql(place, "mlflow.db", "UPDATE runs SET status = 'RUNNING' WHERE name = 'trial-002' OR name = 'A tiny study'")
    sql(place, "mlflow.db", f"DELETE FROM tags WHERE key = 'outcome' AND run_uuid = '{trials()[2].run_id}'")


def ended_in_one_store_alone(place: Path) -> None:
    sql(place, "optuna.db", "UPDATE trials SET state = 'RUNNING' WHERE number = 2")


def wrong_status(place: Path) -> None:
    sql(place, "mlflow.db", "UPDATE runs SET status = 'KILLED' WHERE name = 'First'")


def another_end(place: Path) -> None:
    run = trials()[0].run_id
    sql(place, "mlflow.db", f"UPDATE tags SET value = 'interrupted' WHERE key = 'outcome' AND run_uuid = '{run}'")


def a_run_without_a_trial(place: Path) -> None:
    tracker = MlflowTracker()
    tracker.start_study("tiny", "A tiny study", dict(tracker.study("tiny").document))  # type: ignore[union-attr]
    tracker.start_trial("tiny", "stray", {}, {"trial_number": "9", "fingerprint": "none"})
    tracker.start_trial("tiny", "again", {}, {"trial_number": "0", "fingerprint": trials()[0].fingerprint})
    tracker.finish_study("tiny", True)


def a_trial_without_a_run(place: Path) -> None:
    MlflowTracker().discard(trials()[2].run_id)


def a_truncated_checkpoint(place: Path) -> None:
    file = artifacts(place, "trial-002") / "checkpoints" / "best.safetensors"
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[:-1000])


def a_bit_flipped(place: Path) -> None:
    file = artifacts(place, "trial-002") / "checkpoints" / "best.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.unlink()  # it may be linked into other copies of this store
    file.write_bytes(content)


def lines_lost(place: Path) -> None:
    file = artifacts(place, "Views") / "predictions" / "test_tencrop.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-3]))


def a_prediction_changed(place: Path) -> None:
    file = artifacts(place, "First") / "predictions" / "val.csv"
    lines = [line.split(",") for line in file.read_text().splitlines()]
    for line in lines[1:]:
        line[2] = "nothing"
    file.write_text("\n".join(",".join(line) for line in lines) + "\n")


HURTS: list[tuple[list[Callable[[Path], None]], list[str], int]] = [
    (
        [left_running],
        [
            "trial 2 was left running: it waits again",
            "run trial-002 is shown as running",
            "shown as running, but no process",
        ],
        1,
    ),
    (
        [ended_in_one_store_alone, wrong_status, a_run_without_a_trial],
        [
            "trial 2 ended as complete in the tracking store",
            "run First is complete and KILLED, but its trial is complete: copied",
            *("run stray", "belongs to no trial", "run again", "repeats another run of its trial"),
        ],
        0,
    ),
    (
        [a_truncated_checkpoint, lines_lost, a_prediction_changed],
        [
            "trial 2 (trial-002): checkpoints/best.safetensors is damaged (",
            "trial 1 (Views): predictions/test_tencrop.csv has 21 rows instead of 24",
            "trial 0 (First): predictions/val.csv gives an accuracy of 0.0000 instead of",
        ],
        3,
    ),
    (
        [a_bit_flipped],
        ["trial 2 (trial-002): checkpoints/best.safetensors is not what was written: its checksum differs"],
        1,
    ),
    (
        [another_end, a_trial_without_a_run],
        [
            "trial 0 is complete in the study store, but its run First is interrupted",
            "trial 2 ended but has no run in the tracking store",
        ],
        2,
    ),
]


@pytest.mark.parametrize(("harms", "sentences", "again"), HURTS, ids=[harms[0].__name__ for harms, _, _ in HURTS])
def test_what_is_hurt_is_named_then_fixed_and_found_no_more(
    copied: Path, harms: list[Callable[[Path], None]], sentences: list[str], again: int
) -> None:
    for harm in harms:
        harm(copied)
    before = contents(copied)
    looked = invoke("doctor")
    assert looked.exit_code == 1 and "would fix" in looked.output and contents(copied) == before
    fixed = invoke("doctor", "--fix")
    assert fixed.exit_code == 0, fixed.output
    for sentence in sentences:
        assert sentence in looked.output and sentence in fixed.output
    assert invoke("doctor").output == "1 study examined: 0 found, 0 fixed\n"
    run = invoke(*RUN)
    assert (f"study tiny: {again} complete" if again else "nothing to do") in run.output, run.output
    looked = invoke("doctor")
    assert looked.exit_code == 0, looked.output
    report = invoke("report", "tiny", "--format", "json").output
    assert report.count('"state": "complete"') == 3 and '"state": "running"' not in report


def rewritten(place: Path, text: str) -> None:
    for file in (place / "mlruns" / "artifacts").rglob("study.json"):
        file.write_text(file.read_text().replace("0.05", text))


def replaced_artifacts(place: Path) -> None:
    folder = place / "mlruns" / "artifacts"
    shutil.rmtree(folder)
    folder.write_text("no folder")


TWO = "value = {} WHERE key IN ('test/accuracy', 'best/val_accuracy')"
NO_WRITING_OF_OURS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # what was done to the stores, what the doctor says of it, what a run says
    "an accuracy above one": (
        lambda place: sql(
            place, "mlflow.db", *(f"UPDATE {t} SET {TWO.format(2)}" for t in ("metrics", "latest_metrics"))
        ),
        "its run First is diverged: the next run trains it again",
        "study tiny: 3 complete",
    ),
    "an accuracy of 1e308": (
        lambda place: sql(
            place, "mlflow.db", *(f"UPDATE {t} SET {TWO.format('1e308')}" for t in ("metrics", "latest_metrics"))
        ),
        "its run First is diverged: the next run trains it again",
        "study tiny: 3 complete",
    ),
    "settings that are a number": (
        lambda place: sql(
            place, "optuna.db", "UPDATE trial_user_attributes SET value_json = '1e400' WHERE key = 'config'"
        ),
        "is damaged (inf in place of settings): put back a copy of that store",
        "is damaged (inf in place of settings): put back a copy of that store",
    ),
    "an identity that is a number": (
        lambda place: sql(
            place, "optuna.db", "UPDATE study_user_attributes SET value_json = '1' WHERE key = 'identity'"
        ),
        "is damaged (1 in place of settings): put back a copy of that store",
        "is damaged (1 in place of settings): put back a copy of that store",
    ),
    "attributes that are cut off": (
        lambda place: sql(place, "optuna.db", "UPDATE trial_user_attributes SET value_json = '{'"),
        "optuna.db cannot be opened: Expecting property name",
        "optuna.db cannot be opened: Expecting property name",
    ),
    "a distribution that is cut off": (
        lambda place: sql(place, "optuna.db", "UPDATE trial_params SET distribution_json = '{'"),
        "is damaged (Expecting property name",
        "is damaged (Expecting property name",
    ),
    "a study file with NaN": (lambda place: rewritten(place, "NaN"), "0 found", "study tiny: nothing to do"),
    "a study file with infinity": (lambda place: rewritten(place, "1e400"), "0 found", "study tiny: nothing to do"),
    "artifacts that are a file": (
        replaced_artifacts,
        "its artifacts are not in ",
        "a part of its path is a file; move that away",
    ),
}


@pytest.mark.parametrize("case", NO_WRITING_OF_OURS)
def test_stores_that_hold_what_nobody_writes_are_a_sentence_to_every_command(copied: Path, case: str) -> None:
    hurt, examined, run = NO_WRITING_OF_OURS[case]
    hurt(copied)
    for command in (("report",), ("report", "--all", "--format", "csv"), ("report", "--format", "html"), ("status",)):
        assert invoke(*command).exit_code in (0, 2)
    json.loads(invoke("report", "--format", "json").stdout)
    invoke("plan", "tiny")
    assert examined in invoke("doctor").output
    assert run in invoke("run", *RUN[1:]).output


def test_a_study_whose_store_is_damaged_is_rebuilt_in_a_new_one(copied: Path) -> None:
    hurt, _, said = NO_WRITING_OF_OURS["settings that are a number"]
    hurt(copied)
    assert said in invoke(*RUN).output
    rebuilt = invoke(*RUN, "--storage", "sqlite:///new.db", "--adopt")
    assert rebuilt.exit_code == 0 and "study tiny: nothing to do" in rebuilt.output
    assert invoke("doctor", "tiny", "--storage", "sqlite:///new.db").output == "1 study examined: 0 found, 0 fixed\n"


def test_a_moved_store_finds_its_artifacts_again(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = copied.parent / "a place with & and more"
    copied.rename(moved)
    monkeypatch.chdir(moved)
    looked = invoke("doctor")
    assert looked.exit_code == 1 and looked.output.count("would fix") == 1
    assert "its artifacts are no longer in" in looked.output and "locations updated" in looked.output
    assert invoke("doctor", "--fix").exit_code == 0
    assert invoke("doctor").output == "1 study examined: 0 found, 0 fixed\n"
    assert MlflowTracker().artifact(trials()[0].run_id, "config.yaml").is_file()
    assert "nothing to do" in invoke(*RUN).output
    shutil.rmtree(moved / "mlruns" / "artifacts")
    lost = invoke("doctor", "--fix")
    assert "its artifacts are not in" in lost.output and lost.exit_code == 1


def test_stores_of_another_version_name_the_command_that_upgrades_them(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = copied.rename(copied.parent / "older")  # a place that this process has not opened yet
    monkeypatch.chdir(copied)
    sql(copied, "mlflow.db", "UPDATE alembic_version SET version_num = 'cfd24bdc0731'")
    sql(copied, "optuna.db", "UPDATE alembic_version SET version_num = 'v3.0.0.a'")
    result = invoke("doctor", "--fix")
    assert result.exit_code == 1 and "0 studies examined: 2 found, 0 fixed" in result.output
    assert f"run `mlflow db upgrade sqlite:///{copied}/mlruns/mlflow.db`" in result.output
    assert f"run `optuna storage upgrade --storage sqlite:///{copied}/mlruns/optuna.db`" in result.output
    again = invoke(*RUN)
    assert again.exit_code == 2 and "mlflow db upgrade" in again.output and "Traceback" not in again.output


def test_a_study_in_one_store_alone_is_said(copied: Path) -> None:
    (copied / "mlruns" / "optuna.db").rename(copied / "away.db")
    assert "there is no study store" in invoke("doctor").output
    shutil.copy(copied / "away.db", copied / "mlruns" / "optuna.db")
    sql(copied, "optuna.db", "UPDATE studies SET study_name = 'other'")
    result = invoke("doctor", "--fix")
    assert result.exit_code == 1 and "tiny: is only in the tracking store" in result.output
    assert "other: is only in the study store" in result.output


def test_a_study_that_is_being_run_is_skipped(copied: Path) -> None:
    left_running(copied)
    code = (
        "import sys; from caltech_sweep.stores import study_store, study_lock\n"
        "with study_lock(study_store(), 'tiny'): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=copied
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        result = invoke("doctor", "--fix")
        holder.kill()
    assert result.exit_code == 0 and f"tiny: skipped, since study 'tiny' is being run by process {holder.pid}" in (
        result.output
    )
    assert "0 studies examined, 1 skipped" in result.output


# -- a run compares as the doctor does ---------------------------------------------------------------------------------


def test_a_finished_study_is_refused_where_no_run_of_it_is(copied: Path) -> None:
    """Against an empty store, one with other studies only, and after its experiment was renamed."""
    invoke(*RUN, "--name", "other", "--row", "First", "--set", "epochs=1", "--tracking-uri", "else.db")
    for tracking in ("empty.db", "else.db"):
        for command in (RUN, ("plan", "tiny")):
            refused = invoke(*command, "--tracking-uri", tracking)
            assert refused.exit_code == 2, refused.output
            assert "3 trials of study 'tiny' ended and left no run in the tracking store" in refused.output
            assert "--tracking-uri" in refused.output and "nothing to do" not in refused.output
    client = MlflowTracker().client
    client.rename_experiment(client.get_experiment_by_name("tiny").experiment_id, "renamed")
    for command in (RUN, ("plan", "tiny")):
        refused = invoke(*command)
        assert refused.exit_code == 2 and "rename its experiment, which is 'renamed' now, back" in refused.output
    client.rename_experiment(client.get_experiment_by_name("renamed").experiment_id, "tiny")
    assert invoke(*RUN).exit_code == 0 and invoke("doctor", "tiny").exit_code == 0


@pytest.mark.parametrize("lost", [[0], [1, 2]], ids=["a row", "a row and a sampled trial"])
def test_a_trial_whose_run_was_deleted_is_trained_again_by_the_next_run(copied: Path, lost: list[int]) -> None:
    for run in [trials()[number] for number in lost]:
        MlflowTracker().discard(run.run_id)
    result = invoke(*RUN)
    assert result.exit_code == 0 and "ended but has no run in the tracking store" in result.output, result.output
    assert f"study tiny: {len(lost)} complete" in result.output, result.output
    assert invoke("doctor").exit_code == 0
    report = json.loads(invoke("report", "tiny", "--format", "json").output)
    assert [row["state"] for row in report[0]["rows"]] == ["complete"] * 3


def a_finished_stray(place: Path, outcome: str = "complete") -> str:
    tracker = MlflowTracker()
    tracker.start_study("tiny", "A tiny study", dict(tracker.study("tiny").document))  # type: ignore[union-attr]
    run_id = tracker.start_trial("tiny", "stray", {}, {"trial_number": "9", "fingerprint": "none"})
    tracker.finish_trial(run_id, outcome, {"best/val_accuracy": 0.5}, {}, None)
    tracker.finish_study("tiny", True)
    return run_id


@pytest.mark.parametrize("outcome", ["complete", "pruned", "diverged"])
def test_a_run_whose_result_no_other_has_is_kept_and_named(copied: Path, outcome: str) -> None:
    run_id = a_finished_stray(copied, outcome)
    for _ in range(2):
        fixed = invoke("doctor", "--fix")
        assert fixed.exit_code == 1 and f"run stray ({run_id}) is {outcome}, belongs to no trial" in fixed.output
        assert "1 found, 0 fixed" in fixed.output
    assert MlflowTracker().client.get_run(run_id).info.lifecycle_stage == "active"


@pytest.mark.parametrize("in_store", ["tags", "trial"])
def test_a_run_of_its_trial_in_another_spelling_is_its_own(copied: Path, in_store: str) -> None:
    """Trials and runs of earlier versions: a value was 1 in one store, 1.0 in the other, and so was the fingerprint."""
    before = [(trial.run_id, trial.outcome) for trial in trials()]
    if in_store == "tags":
        sql(copied, "mlflow.db", "UPDATE tags SET value = 'spelt otherwise' || value WHERE key = 'fingerprint'")
        sql(copied, "mlflow.db", "UPDATE params SET value = '1' WHERE value = '1.0'")
    else:
        table = "UPDATE trial_user_attributes SET value_json = '\"spelt otherwise\"' WHERE key = 'fingerprint'"
        sql(copied, "optuna.db", table)
    fixed = invoke("doctor", "--fix")
    assert "belongs to no trial" not in fixed.output and "trains it again" not in fixed.output
    assert [(trial.run_id, trial.outcome) for trial in trials()] == before


def test_of_two_complete_runs_of_a_trial_the_sound_one_is_kept(copied: Path) -> None:
    tracker, old = MlflowTracker(), trials()[2]
    tracker.start_study("tiny", "A tiny study", dict(tracker.study("tiny").document))  # type: ignore[union-attr]
    tags = {"trial_number": "2", "fingerprint": old.fingerprint}
    later = tracker.start_trial("tiny", "later", dict(old.params), tags)
    tracker.finish_trial(later, "complete", dict(old.metrics), {}, None)  # its artifacts are missing
    tracker.finish_study("tiny", True)
    fixed = invoke("doctor", "--fix")
    assert fixed.exit_code == 0 and "run later" in fixed.output and "repeats another run" in fixed.output
    assert old.run_id in [trial.run_id for trial in trials()] and "nothing to do" in invoke(*RUN).output


# -- a tracking server -------------------------------------------------------------------------------------------------


@pytest.fixture
def served(copied: Path) -> Iterator[Gate]:
    """The finished study behind MLflow's own server, which hands out its artifacts as well."""
    tracker = MlflowTracker()
    record = tracker.study("tiny")
    assert record is not None
    tracker.move_artifacts(record.experiment_id, (copied / "mlruns" / "artifacts").as_uri(), "mlflow-artifacts:")
    with gated_mlflow(copied / "mlruns") as gate:
        yield gate


@pytest.mark.slow
def test_artifacts_on_a_server_are_checked_fixed_and_promoted_like_local_ones(copied: Path, served: Gate) -> None:
    there = ("--tracking-uri", served.address)
    looked = invoke("doctor", *there)
    assert looked.output == "1 study examined: 0 found, 0 fixed\n" and looked.exit_code == 0
    assert any("/mlflow-artifacts/" in path and path.endswith("best.safetensors") for _, path in served.asked)
    best = MlflowTracker().best_trial("tiny")
    folder = copied / "mlruns" / "artifacts" / "tiny" / best.run_id / "artifacts"
    content = bytearray((folder / "checkpoints" / "best.safetensors").read_bytes())
    content[-100] ^= 1
    (folder / "checkpoints" / "best.safetensors").unlink()
    (folder / "checkpoints" / "best.safetensors").write_bytes(content)
    refused = invoke("promote", "tiny", *there)
    assert (
        refused.exit_code == 2
        and "caltech-sweep doctor --fix makes the next run train the trial again" in refused.output
    )
    fixed = invoke("doctor", "--fix", *there)  # which does so
    assert "checkpoints/best.safetensors is not what was written" in fixed.output, fixed.output
    assert fixed.output.endswith("1 study examined: 1 found, 1 fixed\n") and fixed.exit_code == 0
    again = invoke(*RUN, *there)
    assert again.exit_code == 0 and "study tiny: 1 complete" in again.output, again.output
    assert invoke("promote", "tiny", *there).exit_code == 0
    assert invoke("doctor", *there).output == "1 study examined: 0 found, 0 fixed\n"


@pytest.mark.slow
@pytest.mark.parametrize("status", [401, 403, 404, 500, 503, HANG_UP])
def test_artifacts_that_a_server_does_not_hand_out_are_said_and_never_taken_for_sound(
    served: Gate, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    there = ("--tracking-uri", served.address)
    served.rule = lambda method, path, length: status if "/mlflow-artifacts/" in path else None
    for command in (("doctor", "--fix"), ("promote", "tiny")):
        result = invoke(*command, *there)
        assert result.exit_code != 0 and " 0 found" not in result.output, result.output
        read = (
            "its artifacts cannot be read, not even study.json",
            "cannot be read from mlflow-artifacts:",
            "is missing",
        )
        assert any(said in result.output for said in read), result.output
    served.open()
    assert "0 found" in invoke("doctor", *there).output
