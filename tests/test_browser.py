"""The page and the MLflow UI in a real browser: what is seen, what is fetched, and what the console says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from caltech_sweep.report.page.assemble import build_page
from caltech_sweep.report.page.importance import weigh
from caltech_sweep.report.page.section import Options
from caltech_sweep.tracking.writer import MlflowTracker
from helpers import browser as real
from helpers.browser import Browser, chromium
from helpers.servers import mlflow_server
from helpers.stores import new_store, write_store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(real.missing()), reason=real.missing() or "there is one"),
    # MLflow's own query options, which SQLAlchemy 2.1 no longer likes.
    pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated"),
]

PHONE = 390  # pixels


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page with every kind of study, hostile names among them."""
    folder = tmp_path_factory.mktemp("browser")
    store = new_store(folder)
    write_store(store)
    file = folder / "report.html"
    file.write_text(build_page([], Options(importances=weigh), store.tracker.uri).html, encoding="utf-8")
    return file.as_uri()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, PHONE, 320])
def test_the_page_opens_offline_without_a_word_and_fits(browser: Browser, page: str, width: int, dark: bool) -> None:
    browser.requests(), browser.console()
    browser.open(page, width, dark=dark)
    assert browser.console() == []
    asked = {url for url in browser.requests() if not url.startswith(("data:", "about:", "chrome:"))}
    assert {url.partition("#")[0] for url in asked} == {page}
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return document.scripts.length") == 2
    assert all(browser.run("return [...document.images].map((image) => image.naturalWidth > 0)"))


CONTRAST = """
const channels = (text) => text.match(/[\\d.]+/g).map(Number);
const luminance = (rgb) => {
  const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const [r, g, b, a = 1] = channels(getComputedStyle(e).backgroundColor);
    if (a === 1) return [r, g, b];
  }
};
const weak = [];
let count = 0;
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || element.closest(".count, .skip, [hidden], script, option, title")) continue;
  count += 1;
  const style = getComputedStyle(element);
  const ink = channels(element.tagName === "text" ? style.fill : style.color).slice(0, 3);
  const [light, dim] = [luminance(ink), luminance(behind(element))].sort((a, b) => b - a);
  const ratio = (light + 0.05) / (dim + 0.05);
  if (ratio < 4.5) weak.push(`${element.tagName} ${element.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
}
return [count, weak];
"""


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_stands_out_from_what_is_behind_it(browser: Browser, page: str, dark: bool) -> None:
    browser.open(page, dark=dark)
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(14, 19, 24)" if dark else "rgb(244, 246, 248)")
    count, weak = browser.run(CONTRAST)
    assert count > 300 and weak == []


def test_every_picture_table_and_choice_has_a_name_in_the_accessibility_tree(browser: Browser, page: str) -> None:
    browser.open(page)
    nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    seen = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")]
    roles = {role for role, _ in seen}
    assert {"banner", "navigation", "main", "contentinfo", "table", "columnheader", "rowheader", "radio"} <= roles
    named = ("image", "table", "combobox", "radio", "button", "link", "navigation")
    assert [role for role, name in seen if role in named and not name.strip()] == []


def test_choices_change_what_is_shown(browser: Browser, page: str) -> None:
    browser.open(page)
    series = "document.querySelectorAll('#s0-curves .charts figure:first-child .series')"
    lines = f"return [...{series}].map((e) => e.classList[1])"
    assert "cs" in browser.run(lines)
    browser.run("document.querySelector('#s0-curves input[value=freeze]').click()")
    assert set(browser.run(lines)) == {"c0", "c1"}
    legends = (
        "return [...document.querySelectorAll('#s0-curves > .legend')].filter((e) => !e.hidden).map((e) => e.innerText)"
    )
    assert [text.split() for text in browser.run(legends)] == [["none", "conv"]]

    select = "const s = document.querySelector('#s0-matrix-row'); s.value = 1; s.dispatchEvent(new Event('change'));"
    browser.run(select)
    shown = "return [...document.querySelectorAll('[data-for=s0-matrix]:not([hidden])')].map((e) => e.dataset.item)"
    assert set(browser.run(shown)) == {"1"}
    assert "Most confused pairs of Frozen" in browser.text()
    read = """
      const svg = document.querySelector('#s0 svg.matrix'), at = svg.getBoundingClientRect();
      const scale = at.width / svg.viewBox.baseVal.width;
      const [start, cell] = [svg.dataset.margin, svg.dataset.cell].map(Number);
      svg.dispatchEvent(new PointerEvent('pointermove', {
        clientX: at.left + (start + 1.5 * cell) * scale, clientY: at.top + (start + 0.5 * cell) * scale}));
      return document.querySelector('#s0 output').textContent"""
    assert browser.run(read) == "cross taken for disc: 8"


def test_any_two_rows_can_be_compared(browser: Browser, page: str) -> None:
    browser.open(page)
    first = (
        "return document.querySelector('#comparison tbody tr:not([hidden])').innerText.split(/\\s+/).join(' ').trim()"
    )
    choose = """
      const [a, b] = document.querySelectorAll('#comparison select');
      for (const [select, name] of [[a, arguments[0]], [b, arguments[1]]]) {
        select.value = [...select.options].find((option) => option.textContent === name).value;
        select.dispatchEvent(new Event('change'));
      }"""
    browser.run(choose, "Plain", "Frozen")
    shown = "return document.querySelector('.summary').innerText.replace(/\\s+/g, ' ')"
    assert browser.run(first) == "cross \N{MINUS SIGN}0.70 9 of 10 2 of 10"
    assert browser.run(shown) == "Classes that lose: 1, that gain: 0, that stay the same: 2."
    browser.run("document.querySelector('#comparison button').click()")
    assert browser.run(shown) == "Classes that lose: 0, that gain: 1, that stay the same: 2."
    heads = browser.run("return [...document.querySelectorAll('#comparison thead th')].map((e) => e.textContent)")
    assert heads == ["Class", "Difference", "Frozen", "Plain"]
    assert browser.console() == []


# -- the MLflow UI -----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(cli, place: Path) -> Iterator[str]:
    """A server over the store of a study that was really trained."""
    result = cli("run", "tiny", "--in-process", "--threads", "1")
    assert result.exit_code == 0, result.output
    with mlflow_server(f"sqlite:///{place}/mlruns/mlflow.db", place / "server.log") as address:
        yield address


def test_the_mlflow_ui_shows_studies_nested_trials_charts_and_confusion_matrices(browser: Browser, served: str) -> None:
    tracker = MlflowTracker(served)
    study = tracker.study("tiny")
    assert study is not None
    first = next(trial for trial in tracker.trials(study) if trial.row == "First")
    browser.requests(), browser.console()

    browser.open(f"{served}/#/experiments")
    browser.wait("return [...document.querySelectorAll('a')].some((a) => a.textContent === 'tiny')")

    runs = f"{served}/#/experiments/{study.experiment_id}/runs?workflowType=machine_learning"
    browser.open(runs)
    parent = "[...document.querySelectorAll('[role=gridcell]')].find((e) => e.innerText.includes('A tiny study'))"
    browser.wait(f"return Boolean({parent})")
    assert "trial-002" not in browser.text()
    browser.run(f"{parent}.querySelector('button').click()")
    browser.wait("return ['First', 'Views', 'trial-002'].every((name) => document.body.innerText.includes(name))")

    browser.open(f"{served}/#/experiments/{study.experiment_id}/runs/{first.run_id}/model-metrics")
    browser.wait("return document.body.innerText.includes('val_accuracy')")
    headings = "[...document.querySelectorAll('[role=button], button')].filter((e) => e.innerText.trim() === 'val')"
    browser.run(f"{headings}.forEach((e) => e.click())")
    browser.wait("""  // a chart is drawn once its section is open and in sight
      for (const e of document.querySelectorAll('*')) if (e.scrollHeight > e.clientHeight) e.scrollTop += 300;
      return [...document.querySelectorAll('.js-plotly-plot')].some((e) => e.querySelector('.scatterlayer .trace'))""")

    browser.open(
        f"{served}/#/experiments/{study.experiment_id}/runs/{first.run_id}/artifacts/confusion_matrix/test.png"
    )
    browser.wait("return [...document.images].some((image) => image.naturalWidth > 400 && image.naturalHeight > 400)")

    asked = [url for url in browser.requests() if url.startswith(("http:", "https:"))]
    assert asked and all(url.startswith(served) for url in asked), [u for u in asked if not u.startswith(served)]
