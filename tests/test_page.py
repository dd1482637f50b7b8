"""The page from stores that were written without any training: what a reader sees, and what may not be in it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import optuna
import pytest
from click.testing import CliRunner
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator
from PIL import Image

from caltech_sweep.cli import main
from caltech_sweep.config import DatasetConfig
from caltech_sweep.errors import UsageError
from caltech_sweep.report.build import build_report
from caltech_sweep.report.model import Importance
from caltech_sweep.report.page.assemble import build_page
from caltech_sweep.report.page.confusion import Confusion, Pair, confused_pairs
from caltech_sweep.report.page.curves import Line, groupings
from caltech_sweep.report.page.importance import FEWEST, importances, weigh
from caltech_sweep.report.page.section import Options
from caltech_sweep.report.page.thumbnails import SIDE, open_thumbnails
from caltech_sweep.study.definition import Choices, Component, Range, Row
from caltech_sweep.tracking.history import _from_database, _from_server, read_histories
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.stores import DRAWN, HOSTILE, HOSTILE_CLASSES, PageStore, new_store, write_store

# MLflow's own query options, which SQLAlchemy 2.1 no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store to copy, since MLflow takes seconds to make one."""
    path = tmp_path_factory.mktemp("blank") / "mlflow.db"
    MlflowTracker(str(path), create=True).client._tracking_client.store.engine.dispose()
    return path


@pytest.fixture
def own(blank: Path, tmp_path: Path) -> PageStore:
    """An empty store of a test's own."""
    shutil.copy(blank, tmp_path)
    return new_store(tmp_path)


@pytest.fixture(scope="module")
def store(blank: Path, tmp_path_factory: pytest.TempPathFactory) -> PageStore:
    folder = tmp_path_factory.mktemp("page")
    shutil.copy(blank, folder)
    writer = new_store(folder)
    write_store(writer)
    return writer


def page_of(store: PageStore, *studies: str, **options: Any) -> str:
    return build_page(studies, Options(importances=weigh, **options), store.tracker.uri).html


@pytest.fixture(scope="module")
def shapes(store: PageStore) -> str:
    return page_of(store, "shapes")


@pytest.fixture(scope="module")
def everything(store: PageStore) -> str:
    return page_of(store)


VOID = frozenset({"meta", "link", "img", "input", "br"})
Attributes = dict[str, str | None]


class PageReader(HTMLParser):
    """Reads a page strictly: every element is closed in its order; keeps elements and what stands in them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, Attributes, list[str]]] = []
        self._open: list[tuple[str, Attributes, list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        element: tuple[str, Attributes, list[str]] = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, _, texts in self._open:
            texts.append(data)

    def all(self, *tags: str) -> list[tuple[Attributes, str]]:
        """Return attributes and text of the elements with some tags, in order."""
        found = [(attributes, texts) for tag, attributes, texts in self.elements if tag in tags]
        return [(attributes, " ".join("".join(texts).split())) for attributes, texts in found]


def read(html: str) -> PageReader:
    reader = PageReader()
    reader.feed(html)
    reader.close()
    assert not reader._open
    return reader


# -- what the page is --------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_says_what_it_is_to_a_screen_reader(everything: str) -> None:
    page = read(everything)
    assert page.all("html")[0][0] == {"lang": "en"}
    assert [len(page.all(tag)) for tag in ("main", "header", "footer", "h1")] == [1] * 4
    assert page.all("nav")[0][0] == {"aria-label": "Contents"}
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    for attributes, _ in page.all("svg"):
        described = attributes.get("role") == "img" and len(attributes.get("aria-label") or "") > 20
        assert described or attributes.get("aria-hidden") == "true"
    assert all(attributes["alt"] for attributes, _ in page.all("img"))
    assert all(attributes["scope"] in ("col", "row") for attributes, _ in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption"))
    labelled = {attributes["for"] for attributes, _ in page.all("label") if "for" in attributes}
    assert {attributes["id"] for attributes, _ in page.all("select")} == labelled
    scrolled = [attributes for attributes, _ in page.all("div") if "scroll" in (attributes.get("class") or "").split()]
    assert scrolled and all(attributes["tabindex"] == "0" for attributes in scrolled)


def test_identifiers_are_unique_and_every_link_inside_leads_somewhere(everything: str) -> None:
    page = read(everything)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"] for attributes, _ in page.all("a")}
    used = {str(target)[1:] for target in targets if str(target).startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", everything)) | set(re.findall(r'xlink:href="#([^"]+)"', everything))
    assert used <= set(ids) and "s0" in used


def test_nothing_is_fetched_and_only_the_pages_own_script_may_run(everything: str) -> None:
    page = read(everything)
    for tag, attributes, _ in page.elements:
        for name in ("src", "srcset", "data", "poster", "action", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, attributes)
        if tag != "a":
            assert (attributes.get("href") or "#").startswith(("data:", "#")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.findall(r"url\((?!#)|@import", everything)
    policy = next(a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy") or ""
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", everything, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert json.loads(data)["rows"]


def test_every_run_of_a_table_is_linked(store: PageStore, everything: str) -> None:
    links = {attributes["href"] for attributes, _ in read(everything).all("a")}
    run_id = store.runs["shapes/Plain"]
    assert any(re.fullmatch(rf"http://127.0.0.1:5000/#/experiments/\d+/runs/{run_id}", str(link)) for link in links)
    assert "caltech-sweep ui" in everything


def test_titles_names_and_classes_are_text_and_nothing_else(everything: str) -> None:
    page = read(everything)
    assert len(page.all("script")) == 2
    assert {tag for tag, _, _ in page.elements if tag in ("iframe", "object", "embed", "form", "base")} == set()
    assert all(str(attributes["src"]).startswith("data:image/webp;base64,") for attributes, _ in page.all("img"))
    title = re.sub("[\x00\x1b]", "\N{REPLACEMENT CHARACTER}", " ".join(HOSTILE.split()))
    assert title in [text for _, text in page.all("h2")]
    assert {"<b>&amp;</b>", "$\\frac{$"} <= {text for _, text in page.all("text")}
    assert "49" not in [text for _, text in page.all("h2")]
    (data,) = [text for attributes, text in page.all("script") if attributes.get("id") == "data"]
    assert json.loads(data)["matrices"]["s1-matrix"]["classes"][1:] == list(HOSTILE_CLASSES[1:])


def test_a_page_of_the_same_store_is_the_same(store: PageStore, shapes: str) -> None:
    assert shapes == page_of(store, "shapes")


# -- what the page says ------------------------------------------------------------------------------------------------


def texts(html: str) -> list[str]:
    return [text for _, text in read(html).all("p", "figcaption", "caption", "h2", "h3", "summary")]


def table_after(html: str, caption: str) -> list[list[str]]:
    """Return the texts of a table's body, by its caption."""
    start = html.index(f"<caption>{caption}</caption>")
    body = html[html.index("<tbody>", start) : html.index("</tbody>", start) + 8]
    rows = re.findall(r"<tr[^>]*>.*?</tr>", body, re.S)
    return [[text for _, text in read(row).all("th", "td")] for row in rows]


def test_curves_are_drawn_with_the_groupings_that_vary(shapes: str) -> None:
    page = read(shapes)
    groups = [attributes["value"] for attributes, _ in page.all("input")]
    assert groups == ["row", "lr", "freeze"]  # one network, one step size, no augmentation
    labels = [attributes["aria-label"] or "" for attributes, _ in page.all("svg") if "aria-label" in attributes]
    assert labels[0] == ("Validation accuracy by epoch of 11 trials; the highest is 0.967, of Plain in epoch 4.")
    assert [label.split(" by epoch")[0] for label in labels[:4]] == [
        *("Validation accuracy", "Train accuracy", "Validation loss", "Train loss"),
    ]
    series = [a for a, _ in page.all("g") if (a.get("class") or "").startswith("series")]
    drawn = [a for a in series if "data-freeze" in a]  # the others are keys of legends
    assert {a["class"] for a in drawn} == {"series c0", "series c1", "series cs"}
    assert {a["data-freeze"] for a in drawn} == {"c0", "c1"}
    titles = [text for _, text in page.all("title")[1:]]
    assert "Plain: 0.967" in titles
    assert "log scale" in [text for _, text in page.all("text")]  # a loss of 1000 among others of 2


def test_curves_are_a_table_too(shapes: str) -> None:
    rows = table_after(shapes, "Where each curve ends")
    assert rows[0] == ["Plain", "complete", "4", "0.967", "4", "0.500", "0.967", "0.500"]
    assert [row[1] for row in rows[-2:]] == ["pruned", "interrupted"]


def test_the_search_shows_the_history_of_the_sampled_trials_alone(store: PageStore, shapes: str) -> None:
    html = shapes
    labels = [attributes.get("aria-label") or "" for attributes, _ in read(html).all("svg")]
    (history,) = [label for label in labels if label.startswith("Validation accuracy by trial number")]
    assert history.endswith(
        "8 sampled trials: 7 complete, 1 pruned. The best sampled trial has 0.933. The best row has 0.967."
    )
    assert "8 sampled trials: 7 complete, 1 pruned. Without an accuracy to show: 1 interrupted." in texts(html)
    assert "7 complete sampled trials: not enough trials to tell which setting mattered." in texts(html)
    assert not [label for label in labels if label.startswith("Importance")]
    html = page_of(store, "lost")
    assert "No sampled trial has ended yet, so there is no search to show." in texts(html)


def test_the_search_shows_rungs_paused_trials_and_which_ones_the_model_proposed(blank: Path, tmp_path: Path) -> None:
    shutil.copy(blank, tmp_path)
    own = new_store(tmp_path)
    study = own.study("pausing", "Pausing", (), DRAWN, pruner=Component("asha", {"min_epochs": 1, "factor": 2}))
    for number, last in enumerate((1, 4, 1, 2, 4)):
        config, origin = study.config({"lr": 0.001 * (number + 1)}), "random" if number < 2 else "model"
        own.trial("pausing", config, number, number, outcome="complete" if last == 4 else "paused", epochs=last,
                  suggested_by=origin, **({} if last == 4 else {"paused_at": str(last)}))  # fmt: skip
    html = page_of(own, "pausing")
    sentence = "5 sampled trials: 2 complete, 0 pruned, 3 paused. 2 sampled at random, 3 proposed by the model of the "
    assert sentence + "sampler. Paused: 2 at epoch 1 of 4, 1 at epoch 2 of 4." in texts(html)
    labels = [attributes.get("aria-label") or "" for attributes, _ in read(html).all("svg")]
    (effort,) = [label for label in labels if label.startswith("Best validation accuracy of the complete")]
    assert effort.endswith("by epochs spent: 0.800 after 12 epochs of 5 trials.")
    cells = re.findall(r'<th scope="row">(\d)</th><td>(\d)</td><td>(\d)</td><td>([\d.]+)</td>', html)
    assert cells == [("1", "5", "3", "0.200"), ("2", "3", "2", "0.400")]
    for legend in ("complete, sampled at random", "paused", "went on from a rung", "paused at a rung"):
        assert f"</svg>{legend}</li>" in html
    report = build_report(["pausing"], "markdown", 3, own.tracker.uri)
    assert (
        "Paused: 2 trials at epoch 1 of 4 (0 and 2) and 1 trial at epoch 2 of 4 (3). They have no results yet; "
        "caltech-sweep run pausing --resume-trial N runs trial N to its end."
    ) in report
    assert "trial-003" not in report and "trial-004" in report


# lr decides, freeze does not; the trials of a seed are in an order of their own.
LR = {"lr": Range(1e-3, 1e-1, log=True)}
TWO = {**LR, "freeze": Choices(("none", "conv"))}


def sampled_trials(number: int, seed: int, matters: bool) -> list[tuple[dict[str, str], float]]:
    """Return trials at random, whose accuracy lr decides, best in the middle, or nothing does."""
    random = Random(seed)
    found = []
    for _ in range(number):
        size = random.uniform(-3, -1)
        accuracy = random.gauss(0.8, 0.02) - (0.15 * (size + 2) ** 2 if matters else 0)
        found.append(({"lr": repr(10**size), "freeze": random.choice(["none", "conv"])}, accuracy))
    return found


@pytest.mark.slow
def test_a_setting_that_decides_is_found_with_thirty_trials_and_its_share_is_optunas() -> None:
    for seed in range(2):
        trials = sampled_trials(30, seed, matters=True)
        found = weigh(TWO, trials)
        assert found is not None and list(found.shares) == ["lr"] and found.chance == ("freeze",)
        share = found.shares["lr"]
        study = optuna.create_study(direction="maximize")
        space = {"lr": FloatDistribution(1e-3, 1e-1, log=True), "freeze": CategoricalDistribution(["none", "conv"])}
        for params, accuracy in trials:
            values = {"lr": float(params["lr"]), "freeze": params["freeze"]}
            study.add_trial(optuna.create_trial(params=values, distributions=space, value=accuracy))
        evaluator = FanovaImportanceEvaluator(seed=0)
        theirs = optuna.importance.get_param_importances(study, evaluator=evaluator)["lr"]
        assert abs(share.value - theirs) < 0.05 and theirs > 0.8
        assert share.low <= share.value <= share.high and 0 < share.high - share.low < 0.5
        assert weigh(TWO, trials) == found


@pytest.mark.slow
@pytest.mark.parametrize("number", [6, FEWEST, 30, pytest.param(200, marks=pytest.mark.slow)])
def test_noise_is_no_ranking_of_settings(number: int) -> None:
    ranked = 0
    for seed in range(40):
        trials = sampled_trials(number, seed, matters=False)
        if seed < 2 and number < 200:
            assert math.isclose(sum(importances(TWO, trials).values()), 1)  # as Optuna has it, noise is one
        found = weigh(TWO, trials)
        assert (found is None) == (number < FEWEST)
        ranked += bool(found and found.shares)
    assert ranked <= 5  # two of forty are to be expected at 5%


def test_settings_that_do_not_vary_are_neither_important_nor_chance() -> None:
    trials = sampled_trials(30, 0, matters=True)
    same = [({**params, "freeze": "none"}, accuracy) for params, accuracy in trials]
    found = weigh(TWO, same)
    assert found is not None and list(found.shares) == ["lr"] and found.chance == ()
    assert weigh(TWO, [(params, 0.5) for params, _ in trials]) == Importance({}, ("lr", "freeze"))
    assert weigh(TWO, [({}, accuracy) for _, accuracy in trials]) == Importance({}, ())


def write_search(own: PageStore, name: str, trials: int, right: Callable[[int], int]) -> str:
    """Write a study whose sampled trials have the accuracy that ``right`` gives them; return its page."""
    study = own.study(name, name, (), DRAWN)
    for number in range(trials):
        settings = {"lr": 0.001 * (number % 7 + 1), "freeze": "conv" if number % 2 else "none"}
        own.trial(name, study.config(settings), number, right(number))
    return page_of(own, name)


def test_the_page_shows_what_a_setting_explains_only_where_it_can_be_told_from_chance(own: PageStore) -> None:
    html = write_search(own, "few", 9, lambda number: 2 if number % 2 else 8)
    assert "9 complete sampled trials: not enough trials to tell which setting mattered." in texts(html)
    html = write_search(own, "noise", 14, lambda number: number * 5 % 9)
    (note,) = [text for text in texts(html) if "not enough trials" in text]
    assert note.endswith("Not told apart from chance: lr, freeze.")
    assert "Importance of each setting: " not in html
    html = write_search(own, "clear", 14, lambda number: 2 if number % 2 else 8)
    labels = [attributes.get("aria-label") or "" for attributes, _ in read(html).all("svg")]
    (importance,) = [label for label in labels if label.startswith("Importance")]
    assert re.fullmatch(r"Importance of each setting: freeze [01]\.\d\d \([01]\.\d\d to [01]\.\d\d\)\.", importance)
    (note,) = [text for text in texts(html) if "from 14 complete sampled trials, with its 95% range" in text]
    assert note.endswith("(p below 0.05, Holm-corrected). Not told apart from chance: lr.")


def test_studies_of_one_title_are_told_apart_wherever_it_stands(own: PageStore) -> None:
    for name in ("a b", "a-b", "other"):
        study = own.study(name, "Another" if name == "other" else "One title", (Row("Plain"),), DRAWN)
        own.trial(name, study.row_config(study.rows[0]), 0, 4 if name == "a b" else 8, row="Plain")
    page = read(page_of(own))
    titles = ["One title (a b)", "One title (a-b)", "Another"]
    assert [text for _, text in page.all("h2")][1:4] == titles
    links = [text for attributes, text in page.all("a") if re.fullmatch(r"#s\d", str(attributes["href"]))]
    assert links == titles * 2  # the contents and the overview
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and {"study-a-b", "study-a-b-2", "study-other"} <= set(ids)
    caption = "Test images classified right, by class; the greatest loss first"
    assert caption in [text for _, text in page.all("caption")]
    headings = [text for attributes, text in page.all("th") if attributes.get("scope") == "col"]
    assert headings[-2:] == ["a-b: Plain", "a b: Plain"]
    for kind in ("markdown", "html", "latex", "json"):
        text = build_report([], kind, 3, own.tracker.uri)
        assert all(title in text for title in titles), kind
        assert len(re.findall(r"One title(?! \(a)", text)) == 0, kind
    ids = re.findall(r'id="([^"]+)"', build_report([], "html", 3, own.tracker.uri))
    assert ids == ["study-a-b", "study-a-b-2", "study-other"]
    assert "One title (" not in page_of(own, "a b")  # nothing else has it here


def test_importances_are_optunas_and_find_what_mattered() -> None:
    space = {
        "lr": {"low": 0.001, "high": 0.1, "log": True},
        "freeze": {"choices": ["none", "conv"]},
        "fixed": {"choices": [1]},
    }
    trials = [
        ({"lr": str(0.001 * (n % 7 + 1)), "freeze": ("none", "conv")[n % 2], "fixed": "1"}, 0.9 - 0.3 * (n % 2))
        for n in range(24)
    ]
    found = importances(space, trials)
    assert list(found) == ["freeze", "lr"] and found["freeze"] > 0.9
    assert math.isclose(sum(found.values()), 1) and found == importances(space, trials)
    assert list(importances(space, trials * 5)) == ["freeze", "lr"]  # more trials
    assert importances(space, [(params, 0.5) for params, _ in trials]) == {}
    assert importances(space, [({}, 0.5), ({"lr": "fast"}, 0.6)]) == {}


def test_confused_pairs_are_the_most_frequent_first() -> None:
    matrix = Confusion(("a", "b", "c"), ((0, 0, 5), (0, 1, 2), (1, 0, 2), (1, 1, 1), (2, 0, 3), (2, 2, 7)), (7, 3, 10))
    expected = [Pair("c", "a", 3, 10), Pair("b", "a", 2, 3), Pair("a", "b", 2, 7)]
    assert confused_pairs(matrix, 9) == expected and confused_pairs(matrix, 1) == expected[:1]
    assert (matrix.right, matrix.correct) == ((5, 1, 7), 13)


def test_every_row_has_its_matrix_and_pairs_and_the_best_is_shown(shapes: str) -> None:
    page = read(shapes)
    (switch,) = [a for a, _ in page.all("select") if "data-switch" in a]
    assert switch["data-switch"] == "s0-matrix"
    assert table_after(shapes, "Most confused pairs of Plain") == [["cross", "disc", "1 of 10"]]
    assert table_after(shapes, "Most confused pairs of Frozen") == [["cross", "disc", "8 of 10"]]
    shown = {a["data-item"] for _, a, _ in page.elements if a.get("data-for") == "s0-matrix" and "hidden" not in a}
    assert shown == {"0"}
    (label,) = [a["aria-label"] or "" for a, _ in page.all("svg") if (a.get("class") or "").startswith("matrix")]
    assert "29 of 30 images lie on the diagonal" in label


def test_the_best_and_the_worst_row_are_compared_class_by_class(store: PageStore, shapes: str) -> None:
    html = shapes
    caption = "Test images classified right, by class; the greatest loss first"
    assert table_after(html, caption) == [
        ["cross", "−0.70", "9 of 10", "2 of 10"],
        ["disc", "0.00", "10 of 10", "10 of 10"],
        ["ring", "0.00", "10 of 10", "10 of 10"],
    ]
    assert "1 classes lose , 0 gain , 2 stay the same." in texts(
        html
    ) or "Classes that lose: 1, that gain: 0, that stay the same: 2." in texts(html)
    html = page_of(store, "shapes", compare=("Frozen", "shapes:trial-002"))
    assert table_after(html, caption)[-1] == ["cross", "+0.60", "2 of 10", "8 of 10"]
    with pytest.raises(UsageError, match="no row 'Other' with a confusion matrix; there are: 'Plain', 'Frozen'"):
        page_of(store, "shapes", compare=("Plain", "Other"))


def test_a_name_that_several_studies_have_must_say_which(own: PageStore) -> None:
    for name in ("one", "two"):
        rows = (Row("First", {"lr": 0.01}),)
        study = own.study(name, name, rows, DRAWN)
        own.trial(name, study.row_config(rows[0]), 0, len(name), row="First")
    with pytest.raises(UsageError, match="write 'one:First' or 'two:First'"):
        page_of(own, compare=("First", "First"))
    html = page_of(own, compare=("one:First", "two:First"))
    assert "Best of each study" in texts(html)


def test_wrong_images_are_shown_the_most_confident_first(shapes: str) -> None:
    page = read(shapes)
    assert [attributes["alt"] for attributes, _ in page.all("img")] == ["Test image cross/test_009"]
    captions = [text for _, text in page.all("figcaption")]
    assert "disc 95% is cross" in captions


def test_what_is_lost_or_not_there_is_said(everything: str, store: PageStore) -> None:
    said = texts(everything)
    assert "The confusion matrices of these rows are lost or damaged: Plain." in said
    assert "The predictions of Plain are lost or damaged." in said
    assert any(text.startswith("The images are not shown: there is no dataset folder /nowhere at all") for text in said)
    empty = texts(page_of(store, "empty"))
    assert "No trial has logged an epoch yet." in empty and "No trial is complete yet." in empty
    assert "Two complete rows with confusion matrices are needed to compare them class by class." in empty


@pytest.mark.parametrize("damage", ["", "a,b,c\n1,2,3\n", "true class,a\na,x\n", '"', "true class\n"])
def test_damaged_files_are_lost_files(damage: str, own: PageStore, tmp_path: Path) -> None:
    rows = (Row("Plain", {"lr": 0.01}),)
    study = own.study("s", "S", rows, DRAWN)
    run_id = own.trial("s", study.row_config(rows[0]), 0, 4, row="Plain")
    for folder in ("confusion_matrix", "predictions"):
        (path,) = tmp_path.glob(f"artifacts/s/{run_id}/artifacts/{folder}/test.csv")
        path.write_text(damage)
    said = texts(page_of(own))
    assert "The confusion matrices of these rows are lost or damaged: Plain." in said


def test_a_store_without_any_artifact_still_has_a_page(store: PageStore, tmp_path: Path) -> None:
    database = Path(store.tracker.uri.removeprefix("sqlite:///"))
    for file in database.parent.glob("mlflow.db*"):  # with what is not yet in the main file
        shutil.copy(file, tmp_path)
    hidden = (database.parent / "artifacts").rename(database.parent / "hidden")
    try:
        html = build_page([], Options(importances=weigh), str(tmp_path / "mlflow.db")).html
    finally:
        hidden.rename(database.parent / "artifacts")
    assert "The study’s document".replace("’", "'") in read(html).all("article")[0][1]
    assert "Importance of each setting" in html


# -- its parts ---------------------------------------------------------------------------------------------------------


def line(name: str, kind: str = "row", **settings: str) -> Line:
    return Line(name, kind, "s", "complete", settings)


def test_many_numbers_become_ranges_and_many_names_are_cut() -> None:
    by_key = {
        g.key: g for g in groupings([line(f"Row {n}", lr=str(0.001 * (n + 1)), freeze="none") for n in range(20)])
    }
    assert by_key["lr"].groups[0] == "0.001 to 0.004" and len(by_key["lr"].groups) == 5
    assert by_key["lr"].member[0] == 0 and by_key["lr"].member[-1] == 4
    assert "freeze" not in by_key
    rows = by_key["row"]
    assert len(rows.groups) == 12 and rows.groups[-1] == "others" and rows.style(19) == "cs" and rows.style(0) == "c0"
    few = {
        g.key: g
        for g in groupings([line("A", lr="0.1", augment="none"), line("B", lr="0.01", augment="hflip+rotation")])
    }
    assert few["lr"].groups == ("0.01", "0.1") and few["lr"].member == (1, 0)
    assert few["augment"].groups == ("none", "hflip + rotation")
    lines = [line("A", weight_decay="0.1"), line("B", weight_decay="0")]
    assert [(g.key, g.label) for g in groupings(lines, varied=("weight_decay",))][1:] == [
        ("weight_decay", "Weight decay")
    ]


def test_histories_are_the_same_from_a_database_and_through_the_client(store: PageStore) -> None:
    runs, metrics = list(store.runs.values()), ["val/accuracy", "train/loss"]
    database = sorted(_from_database(store.tracker.store, runs, metrics))
    assert database == sorted(_from_server(store.tracker.store, runs, metrics)) and len(database) == len(runs) * 8
    histories = read_histories(store.tracker.uri, [*runs, "none"], metrics)
    assert histories[runs[0]]["train/loss"] == ((1, 2.0), (2, 1.0), (3, 2 / 3), (4, 0.5))
    assert histories["none"] == {}


def test_a_step_logged_twice_has_its_later_value_and_what_is_not_finite_is_left_out(own: PageStore) -> None:
    own.tracker.start_study("s", "S", {})
    run_id = own.tracker.start_trial("s", "t", {}, {})
    own.tracker.log_epochs(run_id, [(1, {"train/loss": 1.0}, 1), (1, {"train/loss": 2.0}, 2)])
    own.tracker.log_epochs(run_id, [(2, {"train/loss": math.nan}, 3), (3, {"train/loss": math.inf}, 4)])
    assert read_histories(own.tracker.uri, [run_id], ["train/loss"])[run_id]["train/loss"][0] == (1, 2.0)


def test_thumbnails_come_from_inside_the_datasets_folder_alone(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        Image.new("L", (300, 200)).save(root / name / "1.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (root / "a" / "broken.jpg").write_text("no image")
    thumbnail = open_thumbnails(DatasetConfig(name="folder", root=str(root)))
    picture = thumbnail("a/1.jpg") or ""
    assert picture.startswith("data:image/webp;base64,") and len(picture) < 2000
    assert [thumbnail(name) for name in ("../secret.png", str(tmp_path / "secret.png"), "a/2.jpg", "a/broken.jpg")] == [
        *[None] * 4,
    ]
    drawn = open_thumbnails(DatasetConfig(name="shapes", resize=32))
    assert (drawn("cross/test_001") or "").startswith("data:") and drawn("cross/none") is None


@pytest.mark.slow
def test_images_are_found_where_they_lay_where_they_usually_lie_and_where_the_reader_says(
    own: PageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = ("a", "b", "c")
    rows = (Row("Plain", {"lr": 0.01}),)
    dataset = {"name": "caltech101", "root": str(tmp_path / "first")}
    study = own.study("s", "S", rows, dataset)
    own.trial("s", study.row_config(rows[0]), 0, 9, classes, row="Plain")
    monkeypatch.setenv("CALTECH101_ROOT", str(tmp_path / "usual"))
    (note,) = [text for text in texts(page_of(own)) if text.startswith("The images")]
    assert note.startswith(f"The images are not shown: there is no dataset folder {tmp_path / 'first'}; fetch it")
    sizes = {"first": (SIDE, 20), "usual": (SIDE, 30), "chosen": (SIDE, 40)}

    def shown(**options: str) -> tuple[int, int]:
        ((attributes, _),) = read(page_of(own, **options)).all("img")
        data = base64.b64decode(str(attributes["src"]).partition(",")[2])
        return Image.open(io.BytesIO(data)).size

    for name, options in (("usual", {}), ("first", {}), ("chosen", {"data": str(tmp_path / "chosen")})):
        (tmp_path / name / "a").mkdir(parents=True)
        Image.new("RGB", sizes[name]).save(tmp_path / name / "a" / "test_009", "JPEG")
        assert shown(**options) == sizes[name]


def test_the_command_writes_the_page(store: PageStore, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    common = ["report", "shapes", "--format", "html", "--tracking-uri", store.tracker.uri]
    result = CliRunner().invoke(main, [*common, "--out", str(out), "--compare", "Plain", "Frozen", "--best", "0"])
    assert (result.exit_code, result.output) == (0, "")
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "trial-002</option>" not in out.read_text(encoding="utf-8")
    result = CliRunner().invoke(main, [*common, "--compare", "Plain", "Frosen"])
    assert result.exit_code == 2 and "--compare: there is no row 'Frosen'" in result.output
