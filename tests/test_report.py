"""The report from a store that was written without any training: states, columns, selection, readers, errors."""

import ast
import csv
import json
import math
import os
import pty
import re
import shutil
import sqlite3
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from caltech_sweep.cli import main
from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import StoreError, UsageError
from caltech_sweep.report.build import build_report, check_report, load_tables
from caltech_sweep.report.grid import grid
from caltech_sweep.report.model import Table
from caltech_sweep.report.page.assemble import build_page
from caltech_sweep.report.page.section import Options
from caltech_sweep.report.terminal import terminal_table
from caltech_sweep.study.definition import Choices, Range, Row, StudyDefinition, SubsetOf
from caltech_sweep.study.file import load_study
from caltech_sweep.tracking.reader import ClientReader, SqlReader
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.places import invoke, sql
from helpers.servers import mlflow_server
from helpers.stores import PREDICTIONS, write_study, write_table, write_trial

# MLflow's own query options, which SQLAlchemy 2.1 no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")

GOLDEN = Path(__file__).parent / "golden"
STUDIES = Path(__file__).parent.parent / "sweeps"
IMAGES = {"train": 400, "val": 200, "test": 300, "classes": 5}


def check_golden(name: str, text: str) -> None:
    """Compare with a golden file; only UPDATE_GOLDEN=1 writes one."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path} is missing; make it with UPDATE_GOLDEN=1 and read it before committing"
    assert text == path.read_text(encoding="utf-8")


@dataclass
class Writer:
    """Writes trials as the coordinator does, each with predictions that give the accuracy asked for."""

    tracker: MlflowTracker
    folder: Path
    count: int = 0

    def study(self, definition: StudyDefinition, images: Mapping[str, int] = IMAGES, **changes: Any) -> None:
        write_study(self.tracker, definition, images, **changes)

    def trial(
        self,
        study: str,
        config: TrialConfig,
        number: int,
        outcome: str | None,
        scores: tuple[float, int, int] | None = None,
        *,
        row: str | None = None,
        shift: int = 0,
        spent: tuple[int, float] | None = None,
        measures: Mapping[str, float] | None = None,
        **tags: str,
    ) -> str:
        """Write a trial; ``scores``: validation accuracy, test images classified right, the epoch that won.

        ``spent`` is epochs and seconds, ``measures`` further ones of both parts.
        """
        metrics: dict[str, float] = {}
        folder = None
        if scores is not None and scores[1] < 0:  # without test images
            metrics = {"best/val_accuracy": scores[0], "best/epoch": scores[2]}
        elif scores is not None:
            val, right, epoch = scores
            part = "test_tencrop" if config.test_views == "tencrop" else "test"
            accuracy = right / IMAGES["test"]
            metrics = {"best/val_accuracy": val, "best/epoch": epoch, "test/accuracy": accuracy - 0.01}
            metrics[f"{part}/accuracy"] = accuracy
            folder = self.predictions(part, right, shift)
        for name, value in (measures or {}).items():
            metrics |= {f"best/val_{name}": value, f"test/{name}": value}
        epochs = [{"val/accuracy": 0.1, "train/loss": 2.0}]
        if spent is not None:
            epochs.append({"spent/epochs": spent[0], "spent/seconds": spent[1]})
        more = {"epochs": epochs, "row": row, "metrics": metrics, "files": folder, **tags}
        return write_trial(self.tracker, study, config, number, outcome, **more)

    def predictions(self, part: str, right: int, shift: int) -> Path:
        """Write predictions: ``right`` of them hit, beginning at image ``shift``; every third image is a fish."""
        self.count += 1
        path = self.folder / str(self.count) / "predictions" / f"{part}.csv"
        rows: list[tuple[str, ...]] = [PREDICTIONS]
        for index in range(IMAGES["test"]):
            label = "fish" if index % 3 == 0 else f"class {index % 7}"
            hit = (index - shift) % IMAGES["test"] < right
            rows.append((f"{index}.jpg", label, label if hit else "nothing", "0.5"))
        write_table(path, rows)
        return path.parent.parent


def write_transfer(writer: Writer) -> None:
    """A study in every state: complete rows, one that failed, one interrupted, one never run; sampled trials."""
    study = load_study(str(STUDIES / "transfer.yaml"))
    writer.study(study)
    first, second, third, fourth, fifth = study.rows
    configs = {row.name: study.row_config(row) for row in study.rows}
    old = study.config({**first.settings, "lr": 0.5})
    writer.trial("transfer", old, 0, "complete", (0.99, 299, 3), row=first.name)
    writer.trial("transfer", configs[first.name], 1, "interrupted", row=first.name)
    writer.trial("transfer", configs[first.name], 1, "complete", (0.855, 258, 28), row=first.name, shift=10)
    writer.trial("transfer", configs[first.name], 1, "interrupted", row=first.name)
    writer.trial("transfer", configs[second.name], 2, "diverged", row=second.name, reason="the loss became NaN")
    writer.trial("transfer", configs[third.name], 3, "complete", (0.881, 262, 17), row=third.name, shift=3)
    writer.trial("transfer", configs[fourth.name], 4, None, row=fourth.name)
    for number, val, freeze in ((5, 0.87, "none"), (6, 0.79, "fc"), (7, 0.86, "conv"), (8, 0.86, "none")):
        sampled = study.config({"lr": 0.0123456, "step_size": 7, "epochs": 20, "freeze": freeze, "augment": ["hflip"]})
        writer.trial("transfer", sampled, number, "complete", (val, 230 + number, 9))
    sampled = study.config({"lr": 0.02, "step_size": 7, "epochs": 20, "freeze": "none", "augment": []})
    writer.trial("transfer", sampled, 9, "pruned")


def write_others(writer: Writer) -> None:
    """TenCrop with its own columns, and a study of another name on a subset with overrides, and without references."""
    tencrop = load_study(str(STUDIES / "tencrop.yaml"))
    writer.study(tencrop)
    (row,) = tencrop.rows
    writer.trial("tencrop", tencrop.row_config(row), 0, "complete", (0.86, 261, 29), row=row.name)
    writer.tracker.finish_study("tencrop", complete=True)
    overrides = ["dataset.classes=5", "dataset.images_per_class=20", "epochs=2"]
    quick = load_study(str(STUDIES / "demo.yaml"), overrides, name="quick look")
    writer.study(quick)
    plain = quick.rows[0]
    writer.trial("quick look", quick.row_config(plain), 0, "complete", (0.3, 100, 2), row=plain.name)


def write_repeats(writer: Writer) -> None:
    """Rows trained with several seeds, one of them unfinished, and a sampled trial that was repeated."""
    reference = {"val_accuracy": 0.8, "test_accuracy": 0.85}
    rows = (Row("Three seeds", {"lr": 0.01}, reference), Row("Missing"))
    study = StudyDefinition("repeats", "Several seeds", 5, {}, {"epochs": 4}, {}, rows)
    writer.study(study, tolerance=0.02)
    for number, (seed, val, right) in enumerate(((0, 0.8, 240), (1, 0.82, 246), (2, 0.81, 237))):
        config = study.config({**rows[0].settings, "seed": seed})
        writer.trial("repeats", config, number, "complete", (val, right, 3), row="Three seeds", replicate=str(seed))
    config = study.config({**rows[0].settings, "seed": 3})
    writer.trial("repeats", config, 3, "interrupted", row="Three seeds", replicate="3")
    for changed in ({"lr": 0.05, "seed": 1}, {"lr": 0.01, "seed": 7}):  # the row's older versions
        writer.trial("repeats", study.config(changed), 9, "complete", (0.99, 299, 3), row="Three seeds")
    writer.trial("repeats", study.config({"lr": 0.02}), 4, "complete", (0.9, 250, 4))
    for number, val in ((5, 0.84), (6, 0.86)):
        config = study.config({"lr": 0.02, "seed": number})
        writer.trial("repeats", config, number, "complete", (val, 250, 4), confirms="4")


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store to copy, since MLflow takes seconds to make one."""
    path = tmp_path_factory.mktemp("blank") / "mlflow.db"
    MlflowTracker(str(path), create=True).client._tracking_client.store.engine.dispose()
    return path.parent


@pytest.fixture(scope="module")
def store(blank: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(blank, folder / "store")
    writer = Writer(MlflowTracker(str(folder / "store" / "mlflow.db"), create=True), folder / "files")
    write_others(writer)
    write_transfer(writer)
    write_repeats(writer)
    return writer.tracker.uri


def without_run_ids(text: str, tables: Iterable[Table]) -> str:
    """Return text with run ids, which differ each time, replaced by their row's place."""
    for table in tables:
        for index, row in enumerate((*table.rows, *(table.others or ()))):
            if row.run_id:
                text = text.replace(row.run_id, f"{table.study}-{index}").replace(row.run_id[:8], f"run{index:05d}")
    return text


@pytest.mark.parametrize("kind", ["markdown", "json", "csv", "html", "latex"])
def test_the_report_of_the_store_is_this_text(store: str, kind: str) -> None:
    text = build_report([], kind, 3, store)
    suffix = {"markdown": "md", "latex": "tex"}.get(kind, kind)
    everything = kind in ("json", "csv")
    check_golden(f"report.{suffix}", without_run_ids(text, load_tables([], 3, store, everything)))


def test_the_studies_come_in_the_order_of_the_report_then_by_age(store: str) -> None:
    assert [table.study for table in load_tables([], 0, store)] == ["transfer", "tencrop", "quick look", "repeats"]
    assert [table.study for table in load_tables(["tencrop", "transfer"], 0, store)] == ["tencrop", "transfer"]


def test_a_row_is_its_complete_run_with_the_settings_it_has_now(store: str) -> None:
    (table,) = load_tables(["transfer"], 2, store)
    states = [(row.name, row.state) for row in table.rows if row.kind == "row"]
    assert [state for _, state in states] == ["complete", "diverged", "complete", "running", "missing"]
    first = table.rows[0]
    assert first.val is not None and first.val.value == 0.855  # not the older version's 0.99
    assert [row.name for row in table.rows if row.kind == "sampled"] == ["trial-005", "trial-007"]


def test_repeats_give_a_mean_and_the_repeated_score_not_the_one_that_was_selected(store: str) -> None:
    (table,) = load_tables(["repeats"], 3, store)
    three, missing, confirmed = table.rows
    assert three.val is not None and three.seeds == 3
    assert math.isclose(three.val.value, 0.81) and math.isclose(three.val.deviation or 0, 0.01)
    assert three.remarks == ("1 more seed not complete",)
    assert (missing.state, missing.seeds) == ("missing", 0)
    assert confirmed.val is not None and math.isclose(confirmed.val.value, 0.85)
    assert confirmed.remarks == ("repeated on fresh seeds; selected at 0.900",)


def test_the_check_names_each_row_outside_its_tolerance(store: str) -> None:
    assert check_report([], store) == [
        "repeats: Three seeds: test accuracy 0.803 is 0.047 below the reference 0.850, more than its tolerance of 0.02",
        "repeats: Missing: missing, so there is nothing to hold against its reference",
    ]
    with pytest.raises(UsageError, match="no row of 'transfer' has a tolerance"):
        check_report(["transfer", "repeats"], store)
    result = CliRunner().invoke(main, ["report", "repeats", "--check", "--tracking-uri", store])
    assert result.exit_code == 1
    assert "more than its tolerance" in result.stderr
    assert "Several seeds" in result.stdout


def test_both_ways_of_reading_give_the_same_records(store: str) -> None:
    database, client = SqlReader(store), ClientReader(store, page=2)
    names = database.names()
    assert names == client.names() == ["tencrop", "quick look", "transfer", "repeats"]
    ours, theirs = database.studies(names), client.studies(names)
    assert ours == theirs
    trial = ours[0].trials[0]
    assert database.text(trial, "predictions/test_tencrop.csv") == client.text(trial, "predictions/test_tencrop.csv")
    for reader in (database, client):
        with pytest.raises(StoreError, match="the artifact nothing.csv is missing"):
            reader.text(trial, "nothing.csv")


def test_odd_runs_are_read_alike_and_a_stale_outcome_does_not_hide_that_a_run_goes_on(
    blank: Path, tmp_path: Path
) -> None:
    shutil.copytree(blank, tmp_path / "odd")
    tracker = MlflowTracker(str(tmp_path / "odd" / "mlflow.db"), create=True)
    with pytest.raises(StoreError, match="has no study yet"):
        build_report([], "json", 3, tracker.uri)
    tracker.start_study("s", "S", {})
    run = tracker.start_trial("s", "trial-000", {"lr": "1"}, {"trial_number": "0"})
    tracker.finish_trial(run, "complete", {"test/accuracy": math.nan, "best/val_accuracy": math.inf}, {}, None)
    run = tracker.start_trial("s", "trial-001", {}, {"trial_number": "1"})
    tracker.finish_trial(run, "interrupted", {}, {}, None)
    tracker.client.update_run(run, "RUNNING")
    for reader in (SqlReader(tracker.uri), ClientReader(tracker.uri)):
        (study,) = reader.studies(reader.names())
        first, second = study.trials
        assert math.isnan(first.metrics["test/accuracy"]) and first.metrics["best/val_accuracy"] > 1e300
        assert second.state == "running"


@pytest.mark.slow
def test_a_server_gives_the_same_tables_with_links(store: str, tmp_path: Path) -> None:
    with mlflow_server(store, tmp_path / "server.log") as address:
        served = json.loads(build_report([], "json", 3, address))
    read = json.loads(build_report([], "json", 3, store))
    for table in served:
        for row in table["rows"]:
            if row["run_id"]:
                assert row["url"].startswith(f"{address}/#/experiments/") and row["url"].endswith(row["run_id"])
            row["url"] = None
    assert served == read


def test_the_report_needs_no_study_files_and_writes_nothing(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    result = CliRunner().invoke(main, ["report", "transfer", "--format", "csv", "--out", "table.csv"])
    assert (result.exit_code, result.stdout) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    with (tmp_path / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["state"] for line in lines[:5]] == ["complete", "diverged", "complete", "running", "missing"]


def test_a_moved_store_keeps_its_tables(store: str, tmp_path: Path) -> None:
    source = Path(store.removeprefix("sqlite:///")).parent
    moved = shutil.copytree(source, tmp_path / "elsewhere")
    hidden = source.rename(source.with_name("hidden"))
    try:
        assert "tied with the best" in build_report(["transfer"], "markdown", 3, str(moved / "mlflow.db"))
    finally:
        hidden.rename(source)


@pytest.mark.parametrize("damage", ["lost", "cut short", "changed", "no table"])
def test_damaged_predictions_are_said_and_compare_nothing(store: str, tmp_path: Path, damage: str) -> None:
    source = Path(store.removeprefix("sqlite:///")).parent
    moved = shutil.copytree(source, tmp_path / "copy")
    uri = str(moved / "mlflow.db")
    with sqlite3.connect(moved / "mlflow.db") as connection:
        connection.execute("UPDATE runs SET artifact_uri = replace(artifact_uri, ?, ?)", (str(source), str(moved)))
    connection.close()

    def third() -> Any:
        return next(row for row in load_tables(["transfer"], 3, uri)[0].rows if row.name == "Third model")

    assert third().standing == "best"
    (file,) = (moved / "artifacts" / "transfer" / third().run_id).rglob("predictions/*.csv")
    lines = file.read_text().splitlines(keepends=True)
    wrong = next(index for index, line in enumerate(lines) if ",nothing," in line)
    lines[wrong] = lines[wrong].replace("nothing", lines[wrong].split(",")[1])
    content = {"cut short": file.read_text()[:-3000], "changed": "".join(lines), "no table": "\x00"}.get(damage)
    file.unlink()
    if content is not None:
        file.write_text(content)
    (table,) = load_tables(["transfer"], 3, uri)
    assert third().remarks == ("not compared: its predictions are lost or damaged",)
    assert {row.standing for row in table.rows} == {None}  # nobody else becomes the best


def test_a_study_without_its_document_shows_its_runs(store: str, tmp_path: Path) -> None:
    source = Path(store.removeprefix("sqlite:///")).parent
    moved = shutil.copytree(source, tmp_path / "copy")
    with sqlite3.connect(moved / "mlflow.db") as connection:
        connection.execute("UPDATE runs SET artifact_uri = '/nowhere'")
    connection.close()
    shutil.rmtree(moved / "artifacts")
    (table,) = load_tables(["tencrop"], 0, str(moved / "mlflow.db"))
    assert table.notes == (
        "The study's document is missing from the store, so rows and settings are those of its runs.",
    )
    assert [(row.name, row.state, row.settings["lr"]) for row in table.rows] == [("TenCrop", "complete", 0.01)]


@pytest.fixture
def own(blank: Path, tmp_path: Path) -> Writer:
    """An empty store of a test's own, and what writes to it."""
    shutil.copytree(blank, tmp_path / "own")
    return Writer(MlflowTracker(str(tmp_path / "own" / "mlflow.db"), create=True), tmp_path / "files")


def mixed(name: str, *rows: Row, **changes: Any) -> StudyDefinition:
    return replace(StudyDefinition(name, name, 9, {}, {"epochs": 4}, {}, rows), **changes)


def test_rows_that_were_computed_in_several_number_formats_are_told_apart(own: Writer) -> None:
    kinds = [{"precision": "bfloat16"}, {}, {"precision": "float32"}]  # an earlier version recorded the device only
    study = mixed("kinds", *(Row(name, {"lr": 0.01 * at}) for at, name in enumerate(("One", "Two", "Three"), 1)))
    asked = mixed("asked", *(Row(name, {"precision": name}) for name in ("bfloat16", "float32")))
    for each in (study, asked):
        own.study(each)
        for number, (row, kind) in enumerate(zip(each.rows, kinds, strict=False)):
            tags = {f"environment.{key}": value for key, value in {"device": "cpu", **kind}.items()}
            own.trial(each.name, each.row_config(row), number, "complete", (0.5, 150, 4), row=row.name, **tags)
    mixture, on_purpose = load_tables(["kinds", "asked"], 0, own.tracker.uri)
    said = "Not all trainings were computed alike, which may matter as much as a seed does: "
    assert f"{said}One in bfloat16 on processors; Two and Three in float32 on processors." in mixture.footnotes
    assert not any(said in note for note in on_purpose.footnotes)


def test_ten_views_are_said_of_the_rows_that_have_them_and_of_no_other(own: Writer) -> None:
    rows = (
        Row("Plain", {"lr": 0.01}),
        Row("Views", {"lr": 0.02, "test_views": "tencrop"}),
        Row("Views to come", {"lr": 0.03, "test_views": "tencrop"}),
    )
    study = mixed("mixed", *rows)
    own.study(study)
    for number, row in enumerate(rows[:2]):
        own.trial("mixed", study.row_config(row), number, "complete", (0.8, 240, 3), row=row.name)
    sampled = study.config({"lr": 0.04, "test_views": "tencrop"})
    own.trial("mixed", sampled, 5, "complete", (0.7, 230, 3))
    sentence = (
        "The test accuracy of Views and trial-005 is over ten views of each image (TenCrop), "
        "of the others over the centre crop."
    )
    (table,) = load_tables(["mixed"], 3, own.tracker.uri)
    assert sentence in table.footnotes
    assert [row.remarks for row in table.rows if row.test][0] == ()
    for kind in ("markdown", "html", "latex", "json"):
        assert sentence in build_report(["mixed"], kind, 3, own.tracker.uri)
    (table,) = load_tables(["mixed"], 0, own.tracker.uri)
    assert table.footnotes[1].startswith("The test accuracy of Views is over ten views")
    own.study(mixed("views", rows[1]))
    own.trial("views", study.row_config(rows[1]), 0, "complete", (0.8, 240, 3), row="Views")
    (table,) = load_tables(["views"], 3, own.tracker.uri)
    assert table.footnotes[1] == "Test accuracy is over ten views of each image (TenCrop)."


def test_overrides_are_said_with_the_rows_that_were_trained_otherwise(own: Writer) -> None:
    study = mixed("short", Row("Plain", {"lr": 0.01}), overrides={"epochs": 3, "momentum": 0.5}, fixed={"epochs": 3})
    own.study(study)
    own.trial("short", study.config({"lr": 0.01, "momentum": 0.5}), 0, "complete", (0.8, 240, 3), row="Plain")
    own.trial("short", study.config({"lr": 0.02, "momentum": 0.5, "epochs": 2}), 1, "complete", (0.7, 240, 2))
    own.trial("short", study.config({"lr": 0.03, "momentum": 0.9}), 2, "complete", (0.6, 240, 2))
    (table,) = load_tables(["short"], 3, own.tracker.uri)
    (note,) = [note for note in table.notes if note.startswith("Overridden")]
    # The row's fingerprint is another one: it is missing, and the settings are those of the runs that are shown.
    assert note == "Overridden settings: epochs = 3 (not so in trial-001), momentum = 0.5 (not so in trial-002)."


VARIED = StudyDefinition(
    "varied",
    "What was varied",
    9,
    {"name": "shapes"},
    {"epochs": 4, "arch": "resnet18", "gamma": 0.5},
    {
        "weight_decay": Range(1e-5, 1e-2, log=True),
        "augment": SubsetOf(("hflip", "rotation")),
        "momentum": Choices((0.9,)),
    },
    (
        Row("Plain", {"optimizer": "sgd", "weight_decay": 1e-4, "augment": ()}),
        Row("Adam", {"optimizer": "adamw", "weight_decay": 1e-4, "augment": ()}),
    ),
    early_stopping={"patience": 2},
)
LONG = 0.0001942711129047409


def write_varied(own: Writer, **changes: Any) -> StudyDefinition:
    """A study with a row that is complete, a sampled trial in each state, and a seed that failed."""
    study = replace(VARIED, **changes)
    own.study(study)
    first, second = study.rows
    more = {"macro_accuracy": 0.5, "top5_accuracy": 0.9}
    own.trial(study.name, study.row_config(first), 0, "complete", (0.8, 240, 3), row=first.name, measures=more)
    own.trial(study.name, study.row_config(second), 1, "crashed", row=second.name, reason="no luck")
    for number, outcome in enumerate(("complete", "complete", "pruned", "paused", "diverged", None), 2):
        config = study.sampled_config({"weight_decay": LONG * number, "augment": ("hflip", "rotation")})
        scores = (0.7 + number / 100, 200, 2) if outcome == "complete" else None
        tags = {"paused_at": "3"} if outcome == "paused" else {}
        own.trial(study.name, config, number, outcome, scores, spent=(number, 61.5 * number), **tags)
    older = study.config({"optimizer": "adam", "weight_decay": 0.1, "augment": ()})
    own.trial(study.name, older, 8, "complete", (0.99, 299, 3), row=second.name)
    return study


def test_columns_are_what_rows_and_space_vary_and_what_is_constant_stands_above(own: Writer) -> None:
    write_varied(own)
    (table,) = load_tables(["varied"], 1, own.tracker.uri)
    assert table.columns == ("optimizer", "weight_decay", "augment")
    assert table.notes[1:] == (
        "The same in all rows: arch = resnet18, weights = none, lr = 0.01, momentum = 0.9, gamma = 0.5, epochs = 4, "
        "batch_size = 256.",
        "Sampled trials only: patience = 2.",
    )
    header, *_ = build_report(["varied"], "markdown", 1, own.tracker.uri).split("| Model")[1].splitlines()
    assert header.split("|")[1:4] == [" OPTIMIZER ", " WEIGHT DECAY ", " AUGMENT        "]
    text = build_report(["varied"], "markdown", 1, own.tracker.uri)
    row = next(line for line in text.splitlines() if line.startswith("| trial-003"))
    assert [cell.strip() for cell in row.split("|")][1:5] == ["trial-003", "sgd", "0.0005828", "hflip+rotation"]
    assert str(LONG)[:12] not in text
    assert "Best Epoch: the epoch with the highest validation accuracy, whose weights are tested." in text


def test_a_setting_is_shown_only_of_trainings_that_read_it(own: Writer) -> None:
    rows = (
        Row("Steps", {"step_size": 3, "momentum": 0.5, "rotation_degrees": 10.0, "augment": ("rotation",)}),
        Row("Cosine", {"schedule": "cosine", "optimizer": "adamw", "augment": ()}),
    )
    study = replace(VARIED, space={"step_size": Choices((2, 4))}, rows=rows)
    own.study(study)
    for number, row in enumerate(rows):
        own.trial(study.name, study.row_config(row), number, "complete", (0.8, 240, 3), row=row.name)
    own.trial(study.name, study.sampled_config({"step_size": 4}), 2, "complete", (0.7, 200, 2))
    (table,) = load_tables([study.name], 1, own.tracker.uri)
    header, cells = grid(table)
    shown = [dict(zip(header, (cell.text for cell in line), strict=False)) for line in cells]
    columns = ("STEP SIZE", "SCHEDULE", "OPTIMIZER", "AUGMENT")
    assert [tuple(row[name] for name in columns) for row in shown] == [
        ("3", "step", "sgd", "rotation"),
        ("–", "cosine", "adamw", "none"),
        ("4", "step", "sgd", "none"),
    ]
    assert shown[1].get("MOMENTUM") == "–" and "ROTATION DEGREES" not in header  # one row alone reads it
    (document,) = json.loads(build_report([study.name], "json", 1, own.tracker.uri))
    assert document["rows"][1]["step_size"] is None and document["rows"][0]["step_size"] == 3


def test_a_study_names_the_settings_and_measures_of_its_columns(own: Writer) -> None:
    write_varied(own, columns=("epochs", "weight_decay", "test/macro_accuracy", "val/top5_accuracy"))
    (table,) = load_tables(["varied"], 1, own.tracker.uri)
    header, rows = grid(table)
    assert header[:7] == [
        *("Model", "EPOCHS", "WEIGHT DECAY", "Macro accuracy on Test Set", "Top-5 accuracy on Validation Set"),
        *("Best Epoch", "Note"),
    ]
    assert [cell.text for cell in rows[0][:7]] == ["Plain", "4", "0.0001", "0.500", "0.900", "3", "best"]
    assert rows[2][6].text.endswith(
        "optimizer sgd, augment hflip+rotation"
    )  # what sampled trials have without a column
    assert "epochs" not in table.notes[1] and table.footnotes[0].startswith("EPOCHS: how many a row trains at most.")
    (measures,) = load_tables([write_varied(own, name="only", columns=("val/loss",)).name], 1, own.tracker.uri)
    assert measures.columns == ("optimizer", "weight_decay", "augment") and measures.measures == ("val/loss",)
    assert not any("Wilson" in text for text in (*table.footnotes, *measures.footnotes))  # no such bracket is shown


def test_every_trial_is_listed_with_its_settings_epochs_time_and_end(own: Writer) -> None:
    write_varied(own)
    shown = CliRunner().invoke(main, ["report", "varied", "--all", "--best", "1", "--tracking-uri", own.tracker.uri])
    lines = [line for line in shown.stdout.splitlines() if line.startswith("| ")]
    header = [cell.strip() for cell in lines[0].split("|")]
    cells = [dict(zip(header, (cell.strip() for cell in line.split("|")), strict=True)) for line in lines[2:]]
    assert [(row["Model"], row["Outcome"]) for row in cells] == [
        *(("Plain", "complete"), ("Adam", "failed (crashed)"), ("trial-003", "complete"), ("trial-002", "complete")),
        *(("trial-004", "pruned"), ("trial-005", "paused"), ("trial-006", "failed (diverged)")),
        *(("trial-007", "running"), ("Adam", "complete")),
    ]
    pruned, paused = cells[4], cells[5]
    assert [pruned[name] for name in ("WEIGHT DECAY", "Epochs Trained", "Time")] == ["0.0007771", "4", "4 min 6 s"]
    assert paused["Note"] == "at epoch 3" and cells[1]["Note"] == "no luck"
    assert cells[-1]["Note"] == "an older version of this row"
    assert "6 trials at the end are compared with no other." in shown.stdout
    assert "Epochs Trained" not in build_report(["varied"], "markdown", 1, own.tracker.uri)


def test_programs_get_every_trial_and_each_setting_in_its_type(own: Writer) -> None:
    write_varied(own, columns=("epochs", "test/macro_accuracy"))
    (document,) = json.loads(build_report(["varied"], "json", 1, own.tracker.uri))
    states = [row["state"] for row in document["rows"]]
    assert states == [
        "complete",
        "crashed",
        "complete",
        "complete",
        "pruned",
        "paused",
        "diverged",
        "running",
        "complete",
    ]
    pruned = document["rows"][4]
    assert (pruned["weight_decay"], pruned["augment"], pruned["epochs"]) == (LONG * 4, ["hflip", "rotation"], 4)
    assert (pruned["epochs_trained"], pruned["seconds"], pruned["kind"]) == (4, 246, "sampled")
    assert document["rows"][0]["test_macro_accuracy"] == 0.5 and document["settings"]["arch"] == "resnet18"
    lines = list(csv.DictReader(build_report(["varied"], "csv", 1, own.tracker.uri).splitlines()))
    assert [line["state"] for line in lines] == states
    assert (lines[4]["weight_decay"], lines[4]["augment"], lines[0]["augment"]) == (
        str(LONG * 4),
        "hflip+rotation",
        "none",
    )
    assert lines[0]["optimizer"] == "sgd" and lines[0]["test_macro_accuracy"] == "0.5"


def test_a_terminal_gets_tables_of_its_width_with_every_word(own: Writer) -> None:
    write_varied(own)
    (table,) = load_tables(["varied"], 3, own.tracker.uri, everything=True)
    header, rows = grid(table, everything=True)
    for width in (60, 80, 200):
        lines = terminal_table(table, width, everything=True).splitlines()
        assert max(map(cell_len, lines)) <= width
        wanted = {word for cells in (header, *([cell.text for cell in row] for row in rows)) for text in cells
                  for word in text.split()}  # fmt: skip
        assert wanted <= set(" ".join(lines).split()) | {"–"}
    (line,) = [line for line in terminal_table(table, 300).splitlines() if line.startswith("trial-003")]
    assert line.split()[1:4] == ["sgd", "0.0005828", "hflip+rotation"]


def test_nothing_says_test_where_there_are_no_test_images(own: Writer) -> None:
    study = mixed("bare", Row("One", {"lr": 0.01}), Row("Two", {"lr": 0.02}), fixed={"epochs": 4, "test_batch_size": 9})
    own.study(study, {"train": 400, "val": 200, "test": 0, "classes": 5})
    for number, row in enumerate(study.rows):
        own.trial("bare", study.row_config(row), number, "complete", (0.8 + number / 10, -1, 3), row=row.name)
    for kind in ("markdown", "latex", "csv", "json"):
        for everything in (False, True):
            text = build_report(["bare"], kind, 3, own.tracker.uri, everything)
            assert "test" not in text.replace("bare-test", "").lower().replace("latest", ""), text
    html = build_page(["bare"], Options(), own.tracker.uri).html
    body = html[html.index("<main") : html.index("<script", html.index("<main"))]
    assert "test" not in re.sub(r"<[^>]+>", " ", body).lower()
    (table,) = load_tables(["bare"], 3, own.tracker.uri)
    assert [row.standing for row in table.rows] == [None, "best"]
    assert table.footnotes[-1] == "Best: the highest validation accuracy."


def test_a_reader_of_a_pipe_gets_markdown_and_of_a_terminal_a_table(
    own: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_varied(own)
    command = ["report", "varied", "--tracking-uri", own.tracker.uri]
    assert "| Model" in CliRunner().invoke(main, command).stdout
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setenv("COLUMNS", "70")
        monkeypatch.setattr(sys, "stdout", terminal)
        main(command, standalone_mode=False)
        terminal.flush()
    shown = os.read(master, 1 << 20).decode()
    assert "| Model" not in shown and "trial-003" in shown
    assert max(map(cell_len, shown.splitlines())) <= 70
    os.close(master)


def test_published_figures_are_of_the_whole_only_where_the_subset_was_asked_for_beside_the_file(own: Writer) -> None:
    row = Row("Plain", {}, {"test_accuracy": 0.8})
    own.study(mixed("file", row, dataset={"classes": 5}))
    own.study(mixed("line", row, dataset={"classes": 5}, overrides={"dataset.classes": 5}))
    file, line = load_tables(["file", "line"], 0, own.tracker.uri)
    assert file.notes[1] == "A subset of the dataset: its first 5 classes."
    assert line.notes[1] == f"{file.notes[1]} The published figures are of the whole of it."


def test_brackets_of_one_training_and_of_several_are_told_apart(own: Writer) -> None:
    rows = (Row("Once", {"lr": 0.01}), Row("Twice", {"lr": 0.02}))
    study = mixed("seeds", *rows)
    own.study(study)
    own.trial("seeds", study.row_config(rows[0]), 0, "complete", (0.8, 240, 3), row="Once")
    for seed in range(3):
        config, scores = study.row_config(rows[1], seed), (math.nan if seed == 2 else 0.7 + seed / 100, 230 + seed, 3)
        own.trial("seeds", config, 1 + seed, "complete", scores, row="Twice", replicate=str(seed))
    (table,) = load_tables(["seeds"], 0, own.tracker.uri)
    assert table.footnotes[:3] == (
        "Best Epoch: the epoch with the highest validation accuracy, whose weights are tested; the mean over the "
        "trainings of Twice.",
        "Brackets of Once: 95% Wilson interval, n = 200 validation and 300 test images.",
        "Twice, with n seeds: mean ± standard deviation, brackets the 95% t interval of the mean.",
    )
    text = build_report(["seeds"], "markdown", 0, own.tracker.uri)
    assert "0.705 ± 0.007 [0.641, 0.769] (n = 2)" in text
    assert "0.768 ± 0.002 [0.747, 0.790] (n = 2)" in text and "1 more seed not complete" in text  # NaN is no result


def test_rows_of_other_test_images_are_not_compared_and_are_held_against_their_own_majority(own: Writer) -> None:
    rows = (Row("Best", {"lr": 0.01}), Row("Equal", {"lr": 0.02}), Row("Other images", {"lr": 0.03}))
    study = mixed("others", *rows)
    own.study(study)
    for number, row in enumerate(rows):
        config = study.row_config(row)
        own.trial("others", config, number, "complete", (0.8, 103 if number else 99, 3), row=row.name)
    (table,) = load_tables(["others"], 0, own.tracker.uri)
    folder = Path(own.tracker.uri.removeprefix("sqlite:///")).parent / "artifacts" / "others"
    (file,) = (folder / str(table.rows[2].run_id)).rglob("predictions/test.csv")
    file.write_text(file.read_text().replace(".jpg", ".png").replace("fish", "bird"))
    (table,) = load_tables(["others"], 0, own.tracker.uri)
    best, equal, other = table.rows
    assert (best.standing, best.majority, equal.standing) == ("best", True, "tied")
    assert (other.standing, other.majority) == (None, False)
    assert equal.remarks == ("not told apart from the majority class",)  # 0.343, and 0.333 is in its interval
    assert other.remarks == ("not compared: its test images are others", *equal.remarks)
    assert table.footnotes[2].startswith("Best: the highest validation accuracy, the first of equals. Tied:")
    assert "on the same 300 images (p at least 0.05, Holm-corrected)." in table.footnotes[2]
    assert table.footnotes[3:] == (
        "Majority class of Best and Equal: always answering 'fish' is right for 0.333 of the test images.",
        "Majority class of Other images: always answering 'bird' is right for 0.333 of the test images.",
    )


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["report", *arguments])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_bad_input_is_one_sentence_and_writes_nothing(store: str, tmp_path: Path) -> None:
    assert "did you mean 'transfer'?" in refused("transfr", "--tracking-uri", store)
    assert "it has transfer, tencrop, quick look, repeats" in refused("xyz", "--tracking-uri", store)
    assert "run a study first" in refused("--tracking-uri", str(tmp_path / "none" / "mlflow.db"))
    other = tmp_path / "other.db"
    sqlite3.connect(other).close()
    assert "cannot be read (no such table: experiments)" in refused("--tracking-uri", str(other))
    other.write_text("no database at all, but long enough to be taken for one " * 20)
    assert "cannot be read (file is not a database)" in refused("--tracking-uri", str(other))
    assert "does not answer" in refused("--tracking-uri", "http://127.0.0.1:9")
    assert "cannot be written" in refused("--tracking-uri", store, "--out", str(tmp_path / "none" / "x.md"))
    assert "install the database's driver" in refused("--tracking-uri", "mysql://127.0.0.1/none")
    assert [path.name for path in tmp_path.iterdir()] == ["other.db"]


def test_the_report_knows_neither_sweeps_nor_trainings() -> None:
    for path in (STUDIES.parent / "caltech_sweep" / "report").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] not in ("mlflow", "optuna", "torch"), (path, name)
                assert not name.startswith(("caltech_sweep.sweep", "caltech_sweep.training")), (path, name)


def test_a_report_does_not_depend_on_the_clocks_of_the_machines_that_ran_the_trials(copied: Path) -> None:
    before = [invoke("report", "tiny", "--format", kind).output for kind in ("json", "markdown", "csv")]
    sql(copied, "mlflow.db", "UPDATE runs SET start_time = 3000000000000 - start_time, end_time = start_time - 5")
    sql(copied, "mlflow.db", "UPDATE metrics SET timestamp = 3000000000000 - timestamp")
    assert [invoke("report", "tiny", "--format", kind).output for kind in ("json", "markdown", "csv")] == before
