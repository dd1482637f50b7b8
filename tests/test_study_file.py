"""Study files: every problem at once, each with line, path and how to fix it; overrides; the shipped studies."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caltech_sweep.config import DATASET_RULES, TRIAL_RULES
from caltech_sweep.errors import CaltechSweepError, StudyFileError, UsageError
from caltech_sweep.study.definition import Choices, Range, SubsetOf, identity_difference
from caltech_sweep.study.file import list_studies, load_study, override, parse_override
from caltech_sweep.training.augment import AUGMENTATIONS

GOOD = """\
title: A study
dataset: {name: shapes, resize: 32, crop: 32}
trials: 5
sampler: {name: random, seed: 1}
pruner: {name: median, warmup_epochs: 2}
fixed: {arch: resnet18, gamma: 0.1}
space:
  lr: {low: 1e-3, high: 1e-1, log: true}
  step_size: {low: 2, high: 6}
  epochs: {choices: [4, 6]}
  augment: {subset_of: [hflip, rotation]}
rows:
  - name: First
    set: {lr: 1e-2, step_size: 4, epochs: 6, augment: []}
    reference: {val_accuracy: 0.5, test_accuracy: 0.4, best_epoch: 3}
"""


def write(tmp_path: Path, text: str, name: str = "x") -> Path:
    (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def problems(tmp_path: Path, text: str) -> list[str]:
    folder = write(tmp_path, text)
    with pytest.raises(StudyFileError) as caught:
        load_study("x", folder=folder)
    return [problem.replace(str(folder / "x.yaml"), "x.yaml") for problem in caught.value.problems]


def test_a_good_file_is_read_as_yaml_1_2(tmp_path: Path) -> None:
    study = load_study("x", folder=write(tmp_path, GOOD))
    assert study.space == {
        "lr": Range(1e-3, 1e-1, log=True),
        "step_size": Range(2, 6, integer=True),
        "epochs": Choices((4, 6)),
        "augment": SubsetOf(("hflip", "rotation")),
    }
    config = study.row_config(study.rows[0])
    assert (config.lr, config.augment, config.arch, config.dataset.name) == (0.01, (), "resnet18", "shapes")
    assert study.rows[0].reference["best_epoch"] == 3 and study.trials == 5


def test_every_problem_is_told_at_once_with_its_line_and_fix(tmp_path: Path) -> None:
    text = """\
title: A study
datset: {name: shapes}
trials: 0
sampler: {name: tpee}
pruner: {name: median, warmup: 3}
fixed: {arch: resnet18, lr: fast, drop_last: off}
space:
  lr: {low: 0, high: 1, log: true}
  step_size: {low: 9, high: 2}
  epochs: {choices: [10, 1.5]}
  augment: {subset_of: [hflip, flip]}
rows:
  - name: One
    set: {freeze: some}
  - name: One
    set: {lr: -1}
    reference: {val_accuracy: 87.9}
"""
    assert problems(tmp_path, text) == [
        "x.yaml:2: datset: is an unknown key; did you mean 'dataset'?",
        "x.yaml:3: trials: must be an integer >= 1, got 0; it counts rows and sampled trials together",
        "x.yaml:4: sampler.name: there is no sampler 'tpee'; did you mean 'tpe'?",
        "x.yaml:5: pruner.warmup: is not an argument of median; did you mean 'warmup_epochs'?",
        "x.yaml:6: fixed.lr: must be a number above 0, got 'fast'",
        "x.yaml:6: fixed.drop_last: must be true or false, got 'off'",
        "x.yaml:8: space.lr.low: must be > 0 for a log range, got 0",
        "x.yaml:9: space.step_size.low: is above high: 9 > 2",
        "x.yaml:10: space.epochs.choices: must be an integer >= 1, got 1.5",
        f"x.yaml:11: space.augment.subset_of: must be a list of {', '.join(AUGMENTATIONS)}, each at most once, "
        "got ['hflip', 'flip']",
        "x.yaml:14: rows[0].set.freeze: must be one of none, conv, fc, fc_but_last, {up_to: LAYER} or "
        "{first: FRACTION}, "
        "got 'some'",
        "x.yaml:15: rows[1].name: 'One' is a duplicate row name",
        "x.yaml:16: rows[1].set.lr: must be a number above 0, got -1",
        "x.yaml:17: rows[1].reference.val_accuracy: must be a number between 0 and 1, got 87.9",
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("title: [", "x.yaml:1: not valid YAML"),
        ("a: 1\na: 2\n", "x.yaml:2: not valid YAML"),
        ("just text", "x.yaml:1: must be a mapping"),
        ("", "x.yaml:1: must be a mapping"),
        ("title: x\ntrials: 3\n", "asks for 3 trials, but there are 0 rows and no space"),
        ("title: x\ntrials: 1\n", "asks for 1 trials, but there are 0 rows and no space"),
        ("title: x\ndataset: {resize: 64, crop: 224}\nspace: {lr: {choices: [1]}}\ntrials: 1\n", "224 pixels cannot"),
        ("title: x\nfixed: {lr: .nan}\nrows: [{name: a}]\n", "fixed.lr: must be a number above 0, got nan"),
        ("title: x\nspace: {lr: {low: 1}}\ntrials: 2\n", "space.lr"),
        ("title: x\nspace: 3\nrows: [{name: a}]\n", "space: must be a mapping of names to values, got 3"),
        ("title: x\nrows: {a: 1}\n", "rows: must be a list"),
        ("title: x\nrows: [3]\n", "rows[0]: must be a mapping"),
        ("1: 2\n", "1: is an unknown key"),
    ],
)
def test_malformed_files_are_sentences(tmp_path: Path, text: str, sentence: str) -> None:
    assert sentence in "\n".join(problems(tmp_path, text))


def test_names_and_paths_of_studies(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "mine")
    assert list_studies(tmp_path) == ["mine"]
    assert load_study(str(tmp_path / "mine.yaml")).name == "mine"
    assert load_study("mine", folder=tmp_path, name="other").name == "other"
    with pytest.raises(UsageError, match="there is no study 'mime'.*did you mean 'mine'"):
        load_study("mime", folder=tmp_path)
    with pytest.raises(UsageError, match="there is no study file"):
        load_study(str(tmp_path / "none.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StudyFileError, match="UTF-8"):
        load_study("bytes", folder=tmp_path)


def test_overrides_fix_settings_for_rows_and_space_and_are_part_of_the_identity(tmp_path: Path) -> None:
    folder = write(tmp_path, GOOD)
    plain = load_study("x", folder=folder)
    study = load_study("x", ["lr=1e-4", "dataset.classes=3"], folder=folder)
    assert study.row_config(study.rows[0]).lr == 1e-4 and "lr" not in study.space
    assert study.overrides == {"lr": 1e-4, "dataset.classes": 3}
    assert any(line.startswith("overrides") for line in identity_difference(plain.identity(), study.identity()))
    moved = load_study("x", folder=folder, data="/elsewhere")
    assert moved.identity() == plain.identity() and moved.config({}).dataset.root == "/elsewhere"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lr", "must be key=value"),
        ("lrr=1", "there is no setting 'lrr'; did you mean 'lr'"),
        ("lr=fast", "lr must be a number above 0"),
        ("dataset.clases=3", "did you mean 'dataset.classes'"),
        ("augment=[hflip, hflip]", "each at most once"),
        ("lr=[", "not valid YAML"),
        ("epochs=true", "an integer"),
    ],
)
def test_wrong_overrides_are_sentences(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence.replace("[", r"\[")):
        parse_override(text)


def test_crop_and_resize_must_fit_together(tmp_path: Path) -> None:
    study = load_study("x", folder=write(tmp_path, GOOD))
    with pytest.raises(UsageError, match="48 pixels cannot be cut from images of 32"):
        override(study, {"dataset.crop": 48})


def test_the_shipped_studies_ask_for_what_the_report_did() -> None:
    shipped = {name: load_study(name) for name in list_studies()}
    tables = ("scratch", "transfer", "freeze", "augment", "tencrop", "resnet")
    assert set(shipped) >= {*tables, "demo", "classsplit-source", "classsplit-target"}
    epochs = {name: [shipped[name].row_config(row).epochs for row in shipped[name].rows] for name in tables}
    assert sum(map(len, epochs.values())) == 18
    assert sum(epochs["scratch"]) == 150 and sum(epochs["transfer"]) == 130
    for name in tables:
        assert all(row.reference for row in shipped[name].rows)
    resnet = shipped["resnet"].row_config(shipped["resnet"].rows[0])
    assert (resnet.arch, resnet.batch_size, resnet.momentum, resnet.weight_decay) == ("resnet50", 32, 0.9, 5e-5)
    assert shipped["demo"].trials >= 8 and shipped["demo"].dataset["name"] == "shapes"


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ("[lr, learning_rate]", "columns[1]: there is no setting or measure 'learning_rate'; did you mean"),
        ("[test/macro_acuracy]", "did you mean 'test/macro_accuracy'?"),
        ("[train/accuracy]", "columns[0]: there is no setting or measure 'train/accuracy'"),
        ("[objective]", "columns[0]: there is no setting or measure 'objective'"),
        ("[lr, epochs, lr]", "columns[2]: 'lr' is there twice; remove one"),
        ("lr", "columns: must be a list of settings and measures, such as [lr, test/macro_accuracy], got 'lr'"),
        ("[]", "columns: must be a list of settings and measures, such as [lr, test/macro_accuracy], got []"),
        ("[[lr]]", "columns: must be a list of settings and measures"),
    ],
)
def test_wrong_columns_are_refused_with_their_line_and_how_to_fix_them(
    tmp_path: Path, columns: str, sentence: str
) -> None:
    (problem,) = problems(tmp_path, f"title: X\nrows: [{{name: One}}]\ncolumns: {columns}\n")
    assert problem.startswith("x.yaml:3: columns") and sentence in problem


def test_a_wrong_value_of_any_setting_is_refused_with_its_line_and_what_it_may_be(tmp_path: Path) -> None:
    trial = [f"  {name}: {{wrong: 1}}" for name in TRIAL_RULES if name != "objective"]
    dataset = [f"  {name}: {{wrong: 1}}" for name in DATASET_RULES]
    lines = ["fixed:", *trial, "dataset:", *dataset]
    told = problems(tmp_path, "\n".join(lines) + "\n")
    for number, line in enumerate(lines, 1):
        if line.startswith(" "):
            key = line.strip().partition(":")[0]
            (found,) = [text for text in told if text.startswith(f"x.yaml:{number}: ")]
            assert re.search(rf"(fixed|dataset)\.{key}: must be .+, got {{'wrong': 1}}", found)


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
)
keys = st.sampled_from(
    ["title", "dataset", "trials", "sampler", "pruner", "fixed", "space", "rows", "columns", "lr", "name", "low"]
)
trees = st.recursive(values, lambda inner: st.dictionaries(keys, inner, max_size=5), max_leaves=12)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose one study file is written again and again."""
    return tmp_path_factory.mktemp("generated")


@settings(max_examples=25, deadline=None)
@given(tree=st.dictionaries(keys, trees, max_size=8))
def test_any_file_is_read_or_refused_in_sentences(generated: Path, tree: dict) -> None:
    import io

    from ruamel.yaml import YAML

    buffer = io.StringIO()
    YAML().dump(tree, buffer)
    try:
        load_study("x", folder=write(generated, buffer.getvalue()))
    except CaltechSweepError as error:
        assert str(error)


@settings(max_examples=40, deadline=None)
@given(
    key=st.sampled_from(["lr", "epochs", "augment", "dataset.classes", "weights", "seed", "outputs"]),
    value=st.text(max_size=30),
)
def test_any_override_is_read_or_refused_in_a_sentence(key: str, value: str) -> None:
    try:
        parse_override(f"{key}={value}")
    except CaltechSweepError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("A tiny study", r'"A \e[31m study"', "title: 'A \\x1b[31m study' has a character that cannot be printed"),
        ("A tiny study", r'"A \ud83d study"', "title: 'A \\ud83d study' has a character that cannot be printed"),
        ("name: First", r'name: "A\0"', "rows[0].name: 'A\\x00' has a character that cannot be printed"),
        ("title:", "%YAML 1.1\n---\ntitle:", ":1: %YAML 1.1 is another YAML than 1.2"),
    ],
)
def test_text_that_no_store_takes_and_another_yaml_are_refused(
    place: Path, before: str, after: str, sentence: str
) -> None:
    file = place / "sweeps" / "tiny.yaml"
    file.write_text(file.read_text().replace(before, after, 1))
    with pytest.raises(StudyFileError) as caught:
        load_study("tiny")
    assert sentence in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_a_study_file_of_any_editor_is_read_or_its_encoding_is_named(place: Path, encoding: str, ending: str) -> None:
    file = place / "sweeps" / "tiny.yaml"
    whole = load_study("tiny")
    file.write_bytes(file.read_text().replace("\n", ending).encode(encoding))
    if encoding == "utf-8-sig":
        assert load_study("tiny") == whole
        return
    with pytest.raises(StudyFileError, match="cannot be read as UTF-8 text; save it in that encoding"):
        load_study("tiny")


def test_what_is_no_study_file_is_named_and_not_suggested(place: Path) -> None:
    (place / "sweeps" / "folder.yaml").mkdir()
    (place / "sweeps" / "dangling.yaml").symlink_to("nowhere.yaml")
    (place / "sweeps" / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(place / "sweeps" / "pipe.yaml")
    for name in ("folder", "dangling", "loop", "pipe"):
        with pytest.raises(UsageError, match=rf"{name}\.yaml is no file, or a link to none"):
            load_study(name)
    assert list_studies() == ["tiny"]
