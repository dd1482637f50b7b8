"""Several study stores on one tracking store: each study is one study store's, until another one adopts it."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial

from caltech_sweep import stores
from caltech_sweep.errors import ForeignStudyError, LostStudyError, UsageError
from caltech_sweep.stores import study_store
from caltech_sweep.study.definition import Choices, Component, Range, StudyDefinition, SubsetOf
from caltech_sweep.sweep.optuna_store import open_study
from caltech_sweep.sweep.ownership import adopt, check_adoptable
from caltech_sweep.testing import Script, ScriptedExecutor, epoch_metrics, scripted_coordinator
from caltech_sweep.tracking import writer as tracking
from caltech_sweep.tracking.journal import Journal, journal_folder
from caltech_sweep.tracking.reader import ClientReader, SqlReader
from caltech_sweep.tracking.records import STORE_TAG
from caltech_sweep.tracking.writer import MlflowTracker, Owner
from helpers.places import RUN, furnish, invoke, sql
from helpers.studies import DEFINITION, ROWS


def dump(file: Path) -> list[str]:
    with closing(sqlite3.connect(file)) as connection:
        return list(connection.iterdump())


@pytest.fixture
def clone(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in another working folder, without stores, whose tracking store is that of the finished study."""
    (tmp_path / "clone").mkdir()
    furnish(tmp_path / "clone")
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{copied / 'mlruns' / 'mlflow.db'}")
    yield tmp_path / "clone"


def test_a_second_study_store_is_refused_and_writes_nothing(copied: Path, clone: Path) -> None:
    before, report = dump(copied / "mlruns" / "mlflow.db"), invoke("report", "tiny", "--format", "json").output
    for command in (RUN, (*RUN, "--set", "epochs=3"), ("plan", "tiny"), ("plan", "tiny", "--set", "epochs=3")):
        refused = invoke(*command)
        assert refused.exit_code == 2 and "study 'tiny' in sqlite:" in refused.stderr, refused.output
        assert "belongs to another study store" in refused.output and "nothing to train" not in refused.output
        assert "--name" in refused.output and "--adopt" in refused.output
    assert dump(copied / "mlruns" / "mlflow.db") == before and not (clone / "mlruns").exists()
    assert invoke("report", "tiny", "--format", "json").output == report


def test_a_name_of_its_own_lets_a_second_study_store_run_and_no_doctor_touches_the_other_s(
    copied: Path, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = invoke("report", "tiny", "--format", "json").output
    mine = invoke(*RUN, "--name", "mine", "--row", "First", "--set", "epochs=1")
    assert mine.exit_code == 0 and "study mine: 1 complete" in mine.output, mine.output
    sql(copied, "mlflow.db", "UPDATE runs SET status = 'RUNNING' WHERE name = 'Views'")  # what a doctor fixes
    before = dump(copied / "mlruns" / "mlflow.db")
    looked = invoke("doctor", "--fix")
    assert looked.exit_code == 0 and "1 study examined, 1 skipped: 0 found, 0 fixed" in looked.output, looked.output
    assert "tiny: is only in the tracking store, and belongs to another study store: skipped" in looked.output
    # The same with a study of this name in the study store as well: it was run into another tracking store.
    files = [clone / "mlruns" / name for name in ("optuna.db", "both.db")]
    with closing(sqlite3.connect(files[0])) as source, closing(sqlite3.connect(files[1])) as copy:
        source.backup(copy)
        with copy:
            copy.execute("UPDATE studies SET study_name = 'tiny'")
    both = ("--storage", f"sqlite:///{clone / 'mlruns' / 'both.db'}")
    looked = invoke("doctor", "tiny", "--fix", *both)
    assert looked.exit_code == 0 and "tiny: skipped, since in the tracking store it belongs to another" in looked.output
    assert invoke(*RUN, *both).exit_code == 2
    taken = invoke(*RUN, *both, "--adopt")
    assert taken.exit_code == 2 and "has a study 'tiny' of its own with 1 trial;" in taken.output, taken.output
    assert dump(copied / "mlruns" / "mlflow.db") == before
    monkeypatch.chdir(copied)
    looked = invoke("doctor")
    assert "mine: is only in the tracking store, and belongs to another study store: skipped" in looked.output
    assert "run Views is shown as running" in looked.output
    sql(copied, "mlflow.db", "UPDATE runs SET status = 'FINISHED' WHERE name = 'Views'")
    assert invoke("report", "tiny", "--format", "json").output == report


def trials(uri: str, name: str = "tiny") -> list[FrozenTrial]:
    return optuna.load_study(study_name=name, storage=uri).get_trials()


def lose(place: Path) -> None:
    """Put the study store, with its write-ahead log, away as ``lost-optuna.db``."""
    for file in (place / "mlruns").glob("optuna.db*"):
        file.rename(place / f"lost-{file.name}")


def compared(trial: FrozenTrial) -> tuple[object, ...]:
    known = (trial.number, trial.state, trial.values, trial.params, trial.distributions, trial.user_attrs)
    return (*known, trial.intermediate_values)


def test_a_lost_study_store_is_rebuilt_by_adoption_and_nothing_is_trained_again(copied: Path) -> None:
    report = [invoke("report", "tiny", "--format", kind).output for kind in ("json", "markdown", "latex", "csv")]
    lose(copied)
    before = dump(copied / "mlruns" / "mlflow.db")
    for command in (RUN, ("plan", "tiny")):
        refused = invoke(*command)
        assert refused.exit_code == 2 and "run --adopt" in refused.output, refused.output
    other = invoke(*RUN, "--adopt", "--set", "epochs=3")
    assert other.exit_code == 2 and "fixed.epochs: was 2, is 3" in other.output and "--name" in other.output
    assert dump(copied / "mlruns" / "mlflow.db") == before and not (copied / "mlruns" / "optuna.db").exists()
    adopted = invoke(*RUN, "--adopt")
    assert adopted.exit_code == 0 and "study 'tiny' was rebuilt from 3 runs" in adopted.output, adopted.output
    assert "study tiny: nothing to do" in adopted.output
    new, lost = (trials(f"sqlite:///{file}") for file in (copied / "mlruns" / "optuna.db", copied / "lost-optuna.db"))
    assert list(map(compared, new)) == list(map(compared, lost)) and len(new) == 3
    assert [
        invoke("report", "tiny", "--format", kind).output for kind in ("json", "markdown", "latex", "csv")
    ] == report
    assert invoke("doctor").output == "1 study examined: 0 found, 0 fixed\n"
    assert "nothing to train" in invoke("plan", "tiny").output
    again = invoke(*RUN, "--adopt", "--trials", "4")
    assert again.exit_code == 0 and "study tiny: 1 complete" in again.output and "rebuilt" not in again.output
    assert invoke("doctor").exit_code == 0


LEARNING = StudyDefinition(
    name="s",
    title="A study",
    trials=14,
    dataset={"name": "shapes"},
    fixed={"epochs": 4},
    space={
        "lr": Range(1e-3, 1.0, log=True),
        "step_size": Choices((3, 5)),
        "batch_size": Range(8, 64, step=8, integer=True),
        "augment": SubsetOf(("hflip", "rotation")),
        "freeze": Choices(("none", "conv")),
    },
    rows=ROWS,
    replicates=2,
    sampler=Component("tpe", {"seed": 3, "startup_trials": 3}),
    pruner=Component("median", {"startup_trials": 2}),
)
FAMILIES = replace(
    LEARNING,
    space={"lr": Range(1e-3, 1.0, log=True), "freeze": Choices(("none", "conv"))},
    expand={"step_size": (2, 4), "epochs": (2, 4)},
    fixed={},
    rows=(replace(ROWS[0], settings={**ROWS[0].settings, "epochs": 4}),),
    pruner=None,
)


def script(config: object) -> Script:
    """Give every setting accuracies of its own; some fail, and one diverges."""
    lr = config.lr  # type: ignore[attr-defined]
    failure = "diverged" if 0.3 < lr < 0.5 else "crashed" if 0.008 < lr < 0.02 else None
    peak = min(0.9, lr * 7 % 1)
    return Script([round(peak * part / 4, 6) for part in range(1, config.epochs + 1)], failure=failure)  # type: ignore[attr-defined]


def go_on(definition: StudyDefinition, folder: Path, storage: str) -> ScriptedExecutor:
    executor = ScriptedExecutor(script)
    (folder / "scratch").mkdir(exist_ok=True)
    tracker = MlflowTracker(str(folder / "mlflow.db"), create=True)
    study = open_study(definition, storage, identity(definition))
    scripted_coordinator(definition, executor, tracker, folder / "scratch", study).run()  # type: ignore[arg-type]
    return executor


def identity(definition: StudyDefinition) -> dict[str, object]:
    return {**definition.identity(), "images": "scripted", "initial_weights": {}}


@pytest.mark.slow
@pytest.mark.parametrize("definition", [LEARNING, FAMILIES], ids=["pruned-and-replicated", "families"])
def test_a_rebuilt_study_has_the_trials_of_the_lost_one_and_samples_what_it_would_have_sampled(
    tmp_path: Path, definition: StudyDefinition
) -> None:
    lost, new = (f"sqlite:///{tmp_path / name}.db" for name in ("lost", "new"))
    go_on(definition, tmp_path, lost)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("mlflow.db", "lost.db"):
        with closing(sqlite3.connect(tmp_path / name)) as one, closing(sqlite3.connect(other / name)) as two:
            one.backup(two)
    tracker = MlflowTracker(str(other / "mlflow.db"))
    record = check_adoptable(definition, identity(definition), {}, tracker, study_store(new))
    assert record is not None
    assert "was rebuilt from" in adopt(definition, identity(definition), tracker, record, study_store(new))
    old, rebuilt = trials(lost, "s"), list(map(compared, trials(new, "s")))
    assert rebuilt == list(map(compared, old[: len(rebuilt)]))
    assert {trial.state.name for trial in old[len(rebuilt) :]} <= {"WAITING"}  # they have no run yet
    states = {trial.state.name for trial in trials(lost, "s")}
    assert states >= ({"COMPLETE", "PRUNED"} if definition.pruner else {"COMPLETE"}) and len(old) >= 14
    more = replace(definition, trials=definition.trials + 8)
    here, there = go_on(more, tmp_path, lost), go_on(more, other, new)
    assert [(job.number, job.config) for job in there.jobs] == [(job.number, job.config) for job in here.jobs]
    assert len(here.jobs) >= 8


def test_what_an_adoption_finds_interrupted_waits_and_a_number_without_a_run_stays_free(tmp_path: Path) -> None:
    tracker = MlflowTracker(str(tmp_path / "mlflow.db"), create=True)
    document = {**DEFINITION.to_dict(), "identity": identity(DEFINITION), STORE_TAG: "lost"}
    tracker.start_study("s", "A study", document)
    configs = [DEFINITION.row_config(ROWS[0]), None, DEFINITION.config({"lr": 0.25, "step_size": 3})]
    for number, config in enumerate(configs):
        if config is not None:
            tags = {
                "trial_number": str(number),
                "fingerprint": config.fingerprint(),
                **({} if number else {"row": "One"}),
            }
            run = tracker.start_trial("s", ["One", "", "trial-002"][number], config.to_params(), tags)
            tracker.log_epochs(run, [(1, epoch_metrics(0.5), 1)])
    tracker.finish_study("s", False)
    storage = f"sqlite:///{tmp_path / 'new.db'}"
    store = study_store(storage)
    record = check_adoptable(DEFINITION, identity(DEFINITION), {}, tracker, store)
    assert record is not None
    adopt(DEFINITION, identity(DEFINITION), tracker, record, store)
    rebuilt = trials(storage, "s")
    assert [trial.state.name for trial in rebuilt] == ["WAITING", "FAIL", "WAITING"]
    executor = go_on(DEFINITION, tmp_path, storage)
    assert [job.config for job in executor.jobs if job.number in (0, 2)] == [configs[0], configs[2]]
    assert 1 not in [job.number for job in executor.jobs]
    runs = tracker.trials(record)
    assert len({run.number for run in runs}) == len(runs) and {run.status for run in runs} == {"FINISHED"}
    assert all([m.step for m in tracker.history(run.run_id, "train/loss")] == [1, 2, 3, 4] for run in runs)


@pytest.mark.slow
def test_an_adoption_that_was_cut_short_is_refused_until_it_is_done_anew(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(copied)
    add, added = optuna.Study.add_trial, []

    def die(self: optuna.Study, trial: FrozenTrial) -> None:
        if added:
            raise SystemExit(9)
        added.append(trial)
        add(self, trial)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "add_trial", die)
        assert invoke(*RUN, "--adopt").exit_code == 9
    for command in (RUN, ("plan", "tiny")):
        refused = invoke(*command)
        assert refused.exit_code == 2 and "--adopt" in refused.output, refused.output
    assert "1 skipped" in invoke("doctor", "--fix").output
    done = invoke(*RUN, "--adopt")
    assert done.exit_code == 0 and "rebuilt from 3 runs" in done.output and "nothing to do" in done.output
    new, lost = (trials(f"sqlite:///{file}") for file in (copied / "mlruns" / "optuna.db", copied / "lost-optuna.db"))
    assert list(map(compared, new)) == list(map(compared, lost))


def of_an_earlier_version(place: Path) -> None:
    """Take what earlier versions did not write out of both stores."""
    sql(place, "mlflow.db", "DELETE FROM tags WHERE key LIKE 'study_store%'", "DELETE FROM experiment_tags")
    sql(place, "optuna.db", "DELETE FROM study_user_attributes WHERE key = 'study_store'")
    tracker = MlflowTracker(str(place / "mlruns" / "mlflow.db"))
    record = tracker.study("tiny")
    assert record is not None
    kept = {key: value for key, value in record.document.items() if key not in ("identity", STORE_TAG)}
    tracker.client.log_dict(record.run_id, kept, "study.json")


def test_a_study_of_an_earlier_version_goes_on_in_the_study_store_that_has_its_trials(
    copied: Path, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_an_earlier_version(copied)
    assert invoke(*RUN).exit_code == 2 and invoke("plan", "tiny").exit_code == 2
    monkeypatch.chdir(copied)
    assert invoke("doctor").output == "1 study examined: 0 found, 0 fixed\n"
    assert "nothing to train" in invoke("plan", "tiny").output
    claimed = invoke(*RUN)
    assert claimed.exit_code == 0 and "nothing to do" in claimed.output
    assert "study 'tiny' in the tracking store belongs to this study store from now on" in claimed.output
    assert "from now on" not in invoke(*RUN).output
    monkeypatch.chdir(clone)
    assert invoke(*RUN).exit_code == 2


def test_a_study_of_an_earlier_version_is_adopted_by_its_settings(copied: Path, clone: Path) -> None:
    of_an_earlier_version(copied)
    other = invoke(*RUN, "--adopt", "--set", "dataset.images_per_class=7")
    assert other.exit_code == 2 and "dataset.images_per_class: was 8, is 7" in other.output, other.output
    adopted = invoke(*RUN, "--adopt")
    assert adopted.exit_code == 0 and "nothing to do" in adopted.output, adopted.output


@pytest.mark.slow
@pytest.mark.parametrize("claimed", ["new", "without an owner"])
def test_of_study_stores_that_claim_one_study_together_one_gets_it(
    tmp_path: Path, claimed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "CLAIM_SECONDS", 1.5)  # other tests keep the cores busy
    uri = str(tmp_path / "mlflow.db")
    trackers = [MlflowTracker(uri, create=True) for _ in range(3)]
    for number in range(3):
        name, got, refused = f"s{number}", [], []
        if claimed != "new":
            trackers[0].start_study(name, "A study", {})
        start = threading.Barrier(len(trackers))

        def claim(index: int, name: str = name, got: list = got, refused: list = refused, start=start) -> None:
            start.wait()
            try:
                trackers[index].start_study(name, "A study", {STORE_TAG: f"store {index}"})
                got.append(f"store {index}")
            except ForeignStudyError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=claim, args=(index,)) for index in range(len(trackers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        record = trackers[0].study(name)
        assert record is not None and got == [record.store] and len(refused) == 2
        parents = trackers[0].client.search_runs([record.experiment_id], "tags.kind = 'study'")
        assert len(parents) == 1


def test_who_runs_a_study_that_is_adopted_notices_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "OWNER_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "CLAIM_SECONDS", 0.0)
    first, second = (MlflowTracker(str(tmp_path / "mlflow.db"), create=True) for _ in range(2))
    first.start_study("s", "A study", {STORE_TAG: "first"})
    first.guard(Owner(first, "s", "first").check)
    run = first.start_trial("s", "One", {}, {"trial_number": "0"})
    record = second.study("s")
    assert record is not None
    second.adopt(record, "second")
    for write in (
        lambda: first.log_epochs(run, [(1, epoch_metrics(0.5), 1)]),
        lambda: first.finish_trial(run, "complete", {}, {}, None),
        lambda: first.start_trial("s", "Two", {}, {}),
        lambda: first.finish_study("s", True),
        lambda: first.describe_study("s", "text"),
    ):
        with pytest.raises(LostStudyError, match="was adopted by another study store"):
            write()
    adopted = second.study("s")
    assert adopted is not None and (adopted.store, adopted.former) == ("second", ("first",))
    (kept,) = second.trials(adopted)
    assert kept.state == "running" and not kept.metrics


def test_runs_of_another_study_store_are_in_no_table(copied: Path) -> None:
    tracker = MlflowTracker()
    before = invoke("report", "tiny", "--format", "json", "--best", "9").output
    record = tracker.study("tiny")
    assert record is not None
    (first, *_) = tracker.trials(record)
    tags = {**{k: first.tags[k] for k in ("row", "trial_number", "fingerprint")}, "kind": "trial", "study": "tiny"}
    stray = tracker.client.create_run(record.experiment_id, tags={**tags, STORE_TAG: "another"}).info.run_id
    tracker.finish_trial(stray, "complete", {"best/val_accuracy": 1.0, "test/accuracy": 1.0}, {}, None)
    assert invoke("report", "tiny", "--format", "json", "--best", "9").output == before
    for reader in (SqlReader(tracker.uri), ClientReader(tracker.uri)):
        reader.names()
        (study,) = reader.studies(["tiny"])
        assert stray not in [trial.run_id for trial in study.trials] and len(study.trials) == 3
    assert tracker.best_trial("tiny").run_id != stray
    assert invoke("doctor", "--fix").output == "1 study examined: 0 found, 0 fixed\n"
    assert tracker.client.get_run(stray).info.lifecycle_stage == "active"


def test_what_waits_for_another_study_store_s_study_is_not_replayed(copied: Path, clone: Path) -> None:
    uri = stores.tracking_store()
    assert invoke(*RUN, "--name", "mine", "--row", "First", "--set", "epochs=1").exit_code == 0
    before = dump(copied / "mlruns" / "mlflow.db")
    folder = journal_folder(clone / "mlruns", "tiny", uri)
    Journal(folder).add("finish_study", {"name": "tiny", "complete": False})
    refused = invoke("replay")
    assert refused.exit_code == 1 and "belongs to another study store" in refused.output, refused.output
    assert "tiny: is only in the tracking store" in invoke("doctor", "--fix").output
    assert dump(copied / "mlruns" / "mlflow.db") == before and Journal(folder).pending


def test_there_must_be_a_study_to_adopt(place: Path, tmp_path: Path) -> None:
    refused = invoke(*RUN, "--adopt")
    assert refused.exit_code == 2 and "--adopt: there is no study 'tiny' in" in refused.output
    assert not (place / "mlruns" / "optuna.db").exists()
    tracker = MlflowTracker(str(tmp_path / "mlflow.db"), create=True)
    tracker.start_study("s", "A study", {**DEFINITION.to_dict(), "identity": identity(DEFINITION), STORE_TAG: "other"})
    changed = {**identity(DEFINITION), "images": "changed", "fixed": {"epochs": 9}}
    with pytest.raises(UsageError, match=r'fixed.epochs: was \d+, is 9\n.*images: was "scripted", is "changed"'):
        check_adoptable(DEFINITION, changed, {}, tracker, study_store(f"{tmp_path}/none.db"))
