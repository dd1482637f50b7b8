"""Studies in a real tracking store that were written without any training, as the coordinator writes them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caltech_sweep.config import TrialConfig
from caltech_sweep.study.definition import Choices, Range, Row, StudyDefinition
from caltech_sweep.tracking.writer import MlflowTracker


def write_study(tracker: MlflowTracker, study: StudyDefinition, images: Mapping[str, int], **changes: Any) -> None:
    """Write a study with the numbers of its images; ``changes`` to its document are keys of a study file."""
    document = {**study.to_dict(), "images": dict(images), **changes}
    tracker.start_study(study.name, document["title"], document)


def write_trial(
    tracker: MlflowTracker,
    study: str,
    config: TrialConfig,
    number: int,
    outcome: str | None,
    *,
    epochs: Iterable[Mapping[str, float]],
    row: str | None = None,
    metrics: Mapping[str, float] | None = None,
    files: Path | None = None,
    **tags: str,
) -> str:
    """Write a trial and return its run's id; without an outcome it still runs."""
    own = {"trial_number": str(number), "fingerprint": config.fingerprint(), **({"row": row} if row else {})}
    run_id = tracker.start_trial(study, row or f"trial-{number:03d}", config.to_params(), {**own, **tags})
    for epoch, values in enumerate(epochs, 1):
        tracker.log_epochs(run_id, [(epoch, values, epoch)])
    if outcome is not None:
        tracker.finish_trial(run_id, outcome, metrics or {}, {}, files)
    return run_id


def write_table(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file into a folder that is made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


PREDICTIONS = ("image", "label", "prediction", "confidence")

DRAWN = {"name": "shapes", "resize": 32, "crop": 32}
SHAPES = ("cross", "disc", "ring")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"q\" 'a' $x_1$ {{ 7*7 }}\n\x00\x1b 猫"
HOSTILE_CLASSES = (HOSTILE.replace("\x00", ""), "<b>&amp;</b>", "$\\frac{$")  # no folder has NUL in its name
SPACE = {"lr": Range(1e-3, 1e-1, log=True), "freeze": Choices(("none", "conv"))}


@dataclass
class PageStore:
    """Writes studies as the coordinator does, with matrices and predictions that hold what a test asks for."""

    tracker: MlflowTracker
    folder: Path
    count: int = 0
    runs: dict[str, str] = field(default_factory=dict)

    def study(
        self, name: str, title: str, rows: tuple[Row, ...], dataset: Mapping[str, Any], **more: Any
    ) -> StudyDefinition:
        study = StudyDefinition(name, title, 20, dataset, {"arch": "resnet18", "epochs": 4}, SPACE, rows, **more)
        write_study(self.tracker, study, {"train": 30, "val": 20, "test": 30, "classes": 3})
        return study

    def trial(
        self,
        study: str,
        config: TrialConfig,
        number: int,
        right: int,
        classes: tuple[str, ...] = SHAPES,
        *,
        row: str | None = None,
        outcome: str = "complete",
        files: bool = True,
        epochs: int = 4,
        **tags: str,
    ) -> str:
        """Write a trial: ``right`` of the ten images of the first class hit, the others go to the second."""
        accuracy = (20 + right) / 30
        history = []
        for epoch in range(1, epochs + 1):
            loss = 1000.0 if (number, epoch) == (1, 1) else 2.0 / epoch
            value = accuracy * epoch / 4
            history.append({"train/loss": loss, "val/loss": loss, "train/accuracy": value, "val/accuracy": value})
        complete = outcome == "complete"
        final = {"best/val_accuracy": accuracy, "best/epoch": 4.0, "test/accuracy": accuracy} if complete else {}
        folder = self.files(classes, right) if complete and files else None
        run_id = write_trial(
            self.tracker, study, config, number, outcome, epochs=history, row=row, metrics=final, files=folder, **tags
        )
        self.runs[f"{study}/{row or number}"] = run_id
        return run_id

    def files(self, classes: tuple[str, ...], right: int) -> Path:
        self.count += 1
        folder = self.folder / str(self.count)
        counts = [[10 if i == j else 0 for j in range(3)] for i in range(3)]
        counts[0] = [right, 10 - right, 0]
        table = [["true class", *classes], *([name, *row] for name, row in zip(classes, counts, strict=True))]
        predictions: list[Iterable[object]] = [PREDICTIONS]
        for label, name in enumerate(classes):
            for image in range(10):
                hit = label != 0 or image < right
                predictions.append([f"{name}/test_{image:03d}", name, name if hit else classes[1], 0.5 + image / 20])
        write_table(folder / "confusion_matrix" / "test.csv", table)
        write_table(folder / "predictions" / "test.csv", predictions)
        return folder


def write_store(writer: PageStore) -> None:
    """A study with a search, a hostile one, one whose files are lost, and one without trials."""
    rows = (Row("Plain", {"lr": 0.01}), Row("Frozen", {"lr": 0.01, "freeze": "conv"}), Row("Missing"))
    study = writer.study("shapes", "Drawn shapes", rows, DRAWN)
    writer.trial("shapes", study.row_config(rows[0]), 0, 9, row="Plain")
    writer.trial("shapes", study.row_config(rows[1]), 1, 2, row="Frozen")
    for number in range(2, 9):
        settings = {"lr": 0.001 * number, "freeze": "conv" if number % 2 else "none"}
        writer.trial("shapes", study.config(settings), number, 3 if number % 2 else 8)
    writer.trial("shapes", study.config({"lr": 0.05}), 9, 1, outcome="pruned")
    writer.trial("shapes", study.config({"lr": 0.06}), 10, 1, outcome="interrupted")
    rows = (Row(HOSTILE, {"lr": 0.01}),)
    study = writer.study("hostile", HOSTILE, rows, {"name": "folder", "root": "/nowhere at all"})
    writer.trial("hostile", study.row_config(rows[0]), 0, 4, HOSTILE_CLASSES, row=HOSTILE)
    rows = (Row("Plain", {"lr": 0.01}),)
    study = writer.study("lost", "Lost files", rows, DRAWN)
    writer.trial("lost", study.row_config(rows[0]), 0, 4, row="Plain", files=False)
    writer.study("empty", "Nothing yet", (Row("To come"),), DRAWN)


def new_store(folder: Path) -> PageStore:
    return PageStore(MlflowTracker(str(folder / "mlflow.db"), create=True), folder / "files")
