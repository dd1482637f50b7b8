"""Time the whole report over a store of 10,000 runs compared with ``mlflow.search_runs`` over the same store.

    python benchmarks/report.py [--runs 10000] [--store FOLDER]

Builds the store in a temporary folder with bulk inserts (15 params, 8 metrics of 30 steps and 7 tags a run, tests of
2,893 images for the rows and the best sampled trials), or keeps it in FOLDER and uses it again. Both readings are
timed in this process after their imports; the imports are printed too.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from caltech_sweep.study.definition import StudyDefinition
from caltech_sweep.study.file import load_study
from caltech_sweep.tracking.writer import MlflowTracker

STUDIES = ("scratch", "transfer", "freeze", "augment", "tencrop", "resnet")
IMAGES = {"train": 3856, "val": 1928, "test": 2893, "classes": 101}
STEPS = 30
BEST = 3
START = 1_700_000_000_000  # milliseconds since 1970
PARAMS = ("arch", "weights", "freeze", "optimizer", "lr", "momentum", "weight_decay", "step_size", "gamma", "epochs")
PARAMS += ("batch_size", "augment", "test_views", "test_batch_size", "seed")
METRICS = ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "lr", "best/val_accuracy", "best/epoch")
BATCH = 500  # runs inserted together

Line = tuple[str, dict[str, Any]]  # a table's name and the values of one of its lines


def make_runs(definition: StudyDefinition, count: int, experiment_id: str, parent: str, folder: Path) -> Iterator[Line]:
    """Yield table and values of each line of ``count`` trials of a study, its rows first."""
    draw = random.Random(definition.name)
    part = "test_tencrop" if definition.name == "tencrop" else "test"
    for number in range(count):
        row = definition.rows[number] if number < len(definition.rows) else None
        settings = {"lr": draw.uniform(0.001, 0.05), "step_size": draw.randint(5, 30), "epochs": STEPS}
        config = definition.row_config(row) if row else definition.config(settings)
        shown = number < len(definition.rows) + BEST  # these are the best, so that the report compares predictions
        val = draw.uniform(0.84, 0.88) if shown else draw.uniform(0.5, 0.8)
        run, name = uuid.UUID(int=draw.getrandbits(128)).hex, row.name if row else f"trial-{number:03d}"
        location = folder / run / "artifacts"
        if shown:
            write_predictions(location / "predictions", part, val)
        yield "runs", run_line(run, name, number, int(experiment_id), location)
        tags = {"kind": "trial", "study": definition.name, "mlflow.runName": name, "mlflow.parentRunId": parent}
        tags |= {"trial_number": str(number), "fingerprint": config.fingerprint(), "outcome": "complete"}
        if row:
            tags["row"] = row.name
        yield from (("tags", {"run_uuid": run, "key": key, "value": value}) for key, value in tags.items())
        params = config.to_params()
        yield from (("params", {"run_uuid": run, "key": key, "value": params[key]}) for key in PARAMS)
        for key in (*METRICS, f"{part}/accuracy"):
            yield from metric_lines(run, key, float(draw.randint(10, 30)) if key == "best/epoch" else val)


def run_line(run: str, name: str, number: int, experiment: int, location: Path) -> dict[str, Any]:
    """Return the line of a finished run."""
    return {
        "run_uuid": run,
        "name": name,
        "source_type": "LOCAL",
        "user_id": "",
        "status": "FINISHED",
        "start_time": START + number,
        "end_time": START + number + 100_000,
        "lifecycle_stage": "active",
        "artifact_uri": location.as_uri(),
        "experiment_id": experiment,
    }


def metric_lines(run: str, key: str, value: float) -> Iterator[Line]:
    """Yield the lines of one metric's steps, and of its latest value."""
    line = {"run_uuid": run, "key": key, "value": value, "is_nan": False}
    for step in range(1, STEPS + 1):
        yield "metrics", {**line, "step": step, "timestamp": START + step}
    yield "latest_metrics", {**line, "step": STEPS, "timestamp": START + STEPS}


def write_predictions(folder: Path, part: str, accuracy: float) -> None:
    """Write the predictions of a run on the test images."""
    folder.mkdir(parents=True)
    draw = random.Random(accuracy)
    with (folder / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "label", "prediction", "confidence"])
        for index in range(IMAGES["test"]):
            label = f"class {index % 101}"
            writer.writerow([f"{label}/{index}.jpg", label, label if draw.random() < accuracy else "other", "0.9"])


def build_store(folder: Path, runs: int) -> str:
    """Build the store; return its address."""
    tracker = MlflowTracker(str(folder / "mlflow.db"), create=True)
    engine = sa.create_engine(tracker.uri)
    tables = sa.MetaData()
    tables.reflect(engine, only=["runs", "tags", "params", "metrics", "latest_metrics"])
    with engine.connect() as connection:
        connection.execute(sa.text("PRAGMA synchronous = OFF"))
        for index, name in enumerate(STUDIES):
            definition = load_study(name)
            parent = tracker.start_study(name, definition.title, {**definition.to_dict(), "images": IMAGES})
            tracker.finish_study(name, complete=True)
            experiment = tracker.client.get_run(parent).info.experiment_id
            count = runs // len(STUDIES) + (index < runs % len(STUDIES))
            insert(connection, tables, make_runs(definition, count, experiment, parent, folder / "artifacts" / name))
            connection.commit()
    engine.dispose()
    return tracker.uri


def insert(connection: sa.Connection, tables: sa.MetaData, values: Iterator[Line]) -> None:
    """Insert values in large batches, a run before what belongs to it."""
    pending: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("runs", "tags", "params", "metrics", "latest_metrics")
    }

    def flush() -> None:
        for name, rows in pending.items():
            if rows:
                connection.execute(tables.tables[name].insert(), rows)
                rows.clear()

    for name, row in values:
        if name == "runs" and len(pending["runs"]) == BATCH:
            flush()
        pending[name].append(row)
    flush()


def timed(what: str, call: Callable[[], Any], repeats: int = 1) -> Any:
    """Print the time of the first call and the least of some; return what the last one gave."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    best = f"   (best of {repeats}: {min(seconds):.2f} s)" if repeats > 1 else ""
    print(f"{what:36} {seconds[0]:8.2f} s{best}", flush=True)
    return result


def main() -> None:
    """Build, or find, the store and time the readings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--store", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="report-benchmark-") as temporary:
        folder = arguments.store or Path(temporary)
        uri = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        if not (folder / "mlflow.db").exists():
            timed(f"build a store of {arguments.runs:,} runs", lambda: build_store(folder, arguments.runs))

        def imports() -> None:
            import scipy.stats  # noqa: F401

            import caltech_sweep.report.build  # noqa: F401

        timed("import the report and its statistics", imports)
        from caltech_sweep.report.build import build_report

        text = timed("the whole report, Markdown", lambda: build_report([], "markdown", BEST, uri), repeats=3)
        print(f"{'':4}{len(STUDIES)} tables, {text.count(chr(10) + '| ')} lines of tables")
        for what, kind in (
            ("every trial, Markdown", "markdown"),
            ("every trial, CSV", "csv"),
            ("every trial, JSON", "json"),
        ):
            text = timed(what, lambda kind=kind: build_report([], kind, BEST, uri, everything=True), repeats=3)
            print(f"{'':4}{text.count(chr(10)):,} lines, {len(text.encode()) / 1e6:.1f} MB")
        import mlflow

        mlflow.set_tracking_uri(uri)
        frame = timed(
            "mlflow.search_runs",
            lambda: mlflow.search_runs(search_all_experiments=True, max_results=50_000),
        )
        print(f"{'':4}{len(frame):,} runs")


if __name__ == "__main__":
    main()
