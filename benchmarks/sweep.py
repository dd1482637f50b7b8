"""The rows of the shipped tables by a plain script and by caltech-sweep, from the start of a process to its end.

    CALTECH101_ROOT=... python benchmarks/sweep.py [--tables transfer] [--rows NAME] [--all] [--images 5] [--scale 5]

The plain script is what an engineer writes with torchvision, a DataLoader with workers, Optuna and MLflow, with their
defaults: it decodes each image in each epoch, logs each epoch, keeps the best weights, tests once, and logs weights,
predictions and a confusion matrix. Ours is ``caltech-sweep run`` with new stores and a new cache each time. Both train
AlexNet at 224 px on the same images of the first classes; epochs and steps are divided by ``--scale``, and weights are
random, which costs the same. Each column but the first leaves one thing out or changes one; without ``--all`` a table
has the columns that can matter to it. Of a run of ours, the seconds before its first epoch are told as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PLAIN, OURS = "plain script", "caltech-sweep"


@dataclass(frozen=True)
class Column:
    """A way to run ours: more arguments and variables, the program, and the tables for which it matters."""

    arguments: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    tables: tuple[str, ...] = ("transfer", "scratch", "freeze")
    program: tuple[str, ...] = ("-m", "caltech_sweep")


# A training has one thing to share: of frozen layers their outputs, else its epochs; --no-reuse leaves out either.
COLUMNS = {
    OURS: Column(),
    "float32": Column(("--set", "precision=float32"), tables=("transfer", "freeze")),
    "bfloat16": Column(("--set", "precision=bfloat16"), tables=("transfer", "freeze")),
    "without sharing": Column(("--no-reuse",), tables=("transfer", "scratch")),
    "without features": Column(("--no-reuse",), tables=("freeze",)),
    "writing in the foreground": Column(
        tables=("transfer", "scratch"), program=(str(Path(__file__).with_name("foreground.py")),)
    ),
    "freed memory given back": Column(variables={"GLIBC_TUNABLES": ""}, tables=("transfer",)),
}


def rows_of(table: str, scale: int) -> list[dict[str, Any]]:
    """Return the settings of a table's rows, with their epochs and steps divided."""
    from caltech_sweep.study.file import load_study

    definition = load_study(str(Path(__file__).parent.parent / "sweeps" / f"{table}.yaml"))
    rows = [{**definition.fixed, **row.settings, "weights": "none", "name": row.name} for row in definition.rows]
    for row in rows:
        row.update({name: max(1, round(row[name] / scale)) for name in ("epochs", "step_size")})
    return rows


# -- the plain script --


def plain(spec: dict[str, Any], folder: Path) -> None:
    """Train the rows as a script of its own would."""
    import mlflow
    import optuna
    import torch
    from torch import nn
    from torchvision import models, transforms

    prepare = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ]
    )

    def loader(part: str) -> Any:
        return torch.utils.data.DataLoader(
            Pictures(spec["images"][part], prepare),
            spec["batch"],
            shuffle=part == "train",
            num_workers=os.cpu_count() or 1,
            persistent_workers=True,
        )

    loaders = {part: loader(part) for part in ("train", "val", "test")}

    def passed(model: nn.Module, part: str) -> tuple[float, list[int], list[int]]:
        model.eval()
        labels, found = [], []
        with torch.no_grad():
            for images, targets in loaders[part]:
                labels += targets.tolist()
                found += model(images).argmax(1).tolist()
        return sum(a == b for a, b in zip(labels, found, strict=True)) / len(labels), labels, found

    def objective(trial: optuna.Trial) -> float:
        row = spec["rows"][trial.suggest_categorical("row", range(len(spec["rows"])))]
        torch.manual_seed(0)
        model = models.alexnet(num_classes=spec["classes"])
        frozen = {"conv": model.features, "fc": model.classifier}.get(row.get("freeze", "none"))
        for parameter in frozen.parameters() if frozen is not None else ():
            parameter.requires_grad = False
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, row["lr"], momentum=0.9, weight_decay=5e-5)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, row["step_size"], row["gamma"])
        best, weights = -1.0, {}
        with mlflow.start_run(run_name=row["name"]):
            mlflow.log_params(row)
            for epoch in range(row["epochs"]):
                model.train()
                total = 0.0
                for images, targets in loaders["train"]:
                    loss = nn.functional.cross_entropy(model(images), targets)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += loss.item()
                schedule.step()
                accuracy, _, _ = passed(model, "val")
                mlflow.log_metrics({"train/loss": total, "val/accuracy": accuracy}, step=epoch)
                if accuracy > best:
                    best = accuracy
                    weights = {name: value.clone() for name, value in model.state_dict().items()}
            model.load_state_dict(weights)
            tested, labels, found = passed(model, "test")
            mlflow.log_metric("test/accuracy", tested)
            torch.save(weights, folder / "best.pt")
            mlflow.log_artifact(str(folder / "best.pt"))
            mlflow.log_dict({"labels": labels, "predictions": found}, "predictions.json")
            mlflow.log_figure(confusions(labels, found, spec["classes"]), "confusion_matrix.png")
        return best

    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    mlflow.set_experiment("plain")
    study = optuna.create_study(storage=f"sqlite:///{folder / 'optuna.db'}", direction="maximize")
    for number in range(len(spec["rows"])):
        study.enqueue_trial({"row": number})
    study.optimize(objective, n_trials=len(spec["rows"]))


class Pictures:
    """A map-style dataset of files and labels."""

    def __init__(self, items: list[tuple[str, int]], prepare: Any) -> None:
        self.items, self.prepare = items, prepare

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        path, label = self.items[index]
        return self.prepare(Image.open(path).convert("RGB")), label


def confusions(labels: list[int], found: list[int], classes: int) -> Any:
    """Return a figure of how often a class was taken for another."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels, found), 1)
    figure, axes = pyplot.subplots()
    axes.imshow(counts)
    return figure


# -- both sides, each in processes of its own --


def timed(command: list[str], folder: Path, variables: dict[str, str]) -> tuple[float, str]:
    """Return the seconds of a command and what it wrote; raise SystemExit when it fails."""
    start = time.perf_counter()
    environment = {**os.environ, "CALTECH_SWEEP_DATA": str(folder / "data"), **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start, done.stdout + done.stderr


def run_plain(spec: dict[str, Any], folder: Path) -> float:
    """Return the seconds of the plain script."""
    (folder / "spec.json").write_text(json.dumps(spec))
    return timed([sys.executable, __file__, "--plain", str(folder)], folder, {})[0]


def run_ours(spec: dict[str, Any], column: Column, folder: Path) -> tuple[float, float]:
    """Return the seconds of ours, and those of them before its first epoch began."""
    study = {
        "title": "Rows",
        "dataset": spec["dataset"],
        "trials": len(spec["rows"]),
        "fixed": {"batch_size": spec["batch"], "drop_last": False},
        "rows": [
            {
                "name": row["name"],
                "set": {key: value for key, value in row.items() if key not in ("name", "batch_size")},
            }
            for row in spec["rows"]
        ],
    }
    (folder / "rows.yaml").write_text(json.dumps(study))
    began = time.time()
    command = [sys.executable, *column.program, "run", "rows.yaml", *column.arguments]
    seconds, said = timed(command, folder, column.variables)
    if f"{len(spec['rows'])} complete" not in said:
        raise SystemExit(f"not every row is complete:\n{said}")
    return seconds, first_epoch(folder / "mlruns" / "mlflow.db") - began


def first_epoch(store: Path) -> float:
    """Return when the first epoch of a store's first run began: when it was logged, less how long it took."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(store)) as database:
        ask = (
            "SELECT timestamp / 1000.0, value FROM metrics WHERE key = 'epoch_seconds' ORDER BY timestamp, step LIMIT 1"
        )
        at, seconds = database.execute(ask).fetchone()
    return float(at) - float(seconds)


def specify(table: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what both sides train: rows, files and labels."""
    from caltech_sweep.config import DatasetConfig
    from caltech_sweep.data import load_split

    dataset = {"name": "caltech101", "classes": options.classes, "images_per_class": options.images}
    split = load_split(DatasetConfig(**dataset))
    images = {
        part: [(str(item.path.resolve()), item.label) for item in split.part(part)] for part in ("train", "val", "test")
    }
    rows = [row for row in rows_of(table, options.scale) if not options.rows or row["name"] in options.rows]
    return {"rows": rows, "dataset": dataset, "classes": options.classes, "images": images, "batch": options.batch}


def main() -> None:
    """Run both sides of each table in turn, and print a row of ratios for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=("transfer", "scratch", "freeze"))
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows of the tables")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, help="only these")
    parser.add_argument("--all", action="store_true", help="every column for every table")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=5, help="at most so many of each class in each part")
    parser.add_argument("--scale", type=int, default=5, help="what epochs and steps are divided by")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        plain(json.loads((options.plain / "spec.json").read_text()), options.plain)
        return
    print("| table | | seconds | of the plain script | before the first epoch |\n| --- | --- | --- | --- | --- |")
    for table in options.tables or ("transfer", "scratch", "freeze"):
        spec = specify(table, options)
        sizes = "/".join(str(len(items)) for items in spec["images"].values())
        epochs = sum(row["epochs"] for row in spec["rows"])
        with tempfile.TemporaryDirectory() as folder:
            base = run_plain(spec, Path(folder))
        name = f"{table}, {epochs} epochs, {sizes} images"
        print(f"| {name} | {PLAIN} | {base:.1f} | 1 | |", flush=True)
        for title, column in COLUMNS.items():
            wanted = options.all or table in column.tables
            if title in options.columns if options.columns else wanted:
                with tempfile.TemporaryDirectory() as folder:
                    seconds, start = run_ours(spec, column, Path(folder))
                print(f"| {name} | {title} | {seconds:.1f} | {seconds / base:.3f} | {start:.1f} |", flush=True)
    print(f"{os.cpu_count()} cores, load average of the last minute {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
