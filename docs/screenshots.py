"""Take the pictures in the documents, from a store with a real study in it.

    python docs/screenshots.py sqlite:////path/to/mlruns/mlflow.db transfer docs/images

The report's page (light, dark, as on a phone) and the MLflow UI (a study's trials with their charts, a confusion
matrix), each in a headless Chromium. The images for thumbnails come from CALTECH101_ROOT.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

# The browser is the tests' own.
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from caltech_sweep.report.page.assemble import build_page
from caltech_sweep.report.page.importance import importances
from caltech_sweep.report.page.section import Options
from caltech_sweep.tracking.reader import open_reader
from helpers.browser import Browser, chromium, missing
from helpers.servers import mlflow_server


def page_pictures(browser: Browser, store: str, study: str, out: Path) -> None:
    """Save the page's pictures."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        file.write_text(build_page([study], Options(importances=importances), store).html, encoding="utf-8")
        for name, width, dark, heading, height in (
            ("report", 1280, False, "main", 1750),
            ("report-dark", 1280, True, "#classes", 900),
            ("report-phone", 390, False, ".curves", 844),
        ):
            browser.open(file.as_uri(), width, dark=dark)
            top = browser.run("return document.querySelector(arguments[0]).getBoundingClientRect().top", heading)
            browser.picture(out / f"{name}.png", 0 if heading == "main" else max(0, int(top) - 70), height)


def _close_assistant(browser: Browser) -> None:
    browser.run(
        "[...document.querySelectorAll('button')].filter((e) => /assistant.*close|close.*assistant/i.test("
        "(e.ariaLabel ?? '') + e.dataset.componentId)).forEach((e) => e.click())"
    )
    time.sleep(1)


def ui_pictures(browser: Browser, store: str, study: str, out: Path) -> None:
    """Save the MLflow UI's pictures."""
    reader = open_reader(store)
    reader.names()
    (stored,) = reader.studies([study])
    best = max(stored.trials, key=lambda trial: trial.metrics.get("best/val_accuracy", 0.0))
    with tempfile.TemporaryDirectory() as folder, mlflow_server(store, Path(folder) / "server.log") as address:
        base = f"{address}/#/experiments/{stored.record.experiment_id}/runs"
        browser.open(f"{base}?workflowType=machine_learning&compareRunsMode=CHART", 1600, 1000)
        nested = "document.querySelector('[role=gridcell] a')?.closest('[role=gridcell]').querySelector('button')"
        browser.wait(f"return Boolean({nested})")
        browser.run(f"{nested}.click()")
        browser.wait("return document.querySelectorAll('.js-plotly-plot').length > 1")
        _close_assistant(browser)
        browser.driver.find_element("css selector", "input[placeholder*='metric charts']").send_keys("val/")
        browser.wait("return document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length > 3")
        time.sleep(3)  # the charts move to their places
        browser.picture(out / "mlflow-charts.png")
        browser.open(
            f"{base}/{best.run_id}/artifacts/confusion_matrix/test.png?workflowType=machine_learning", 1600, 1000
        )
        browser.wait("return [...document.images].some((image) => image.naturalWidth > 400)")
        _close_assistant(browser)
        browser.run(  # where the store lies on this machine concerns no reader
            "for (const e of document.querySelectorAll('body *')) "
            "if (!e.children.length && e.textContent.includes('file://')) e.style.visibility = 'hidden'"
        )
        browser.picture(out / "mlflow-confusion-matrix.png")


def main() -> None:
    """Take every picture of a store and a study named on the command line."""
    if reason := missing():
        sys.exit(reason)
    store, study, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        page_pictures(browser, store, study, out)
        ui_pictures(browser, store, study, out)


if __name__ == "__main__":
    main()
