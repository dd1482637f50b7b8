"""Datasets that say themselves which image belongs where: folders called train, val and test, and csv files."""

from __future__ import annotations

import csv
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from caltech_sweep.config import DatasetConfig
from caltech_sweep.data import load_split
from caltech_sweep.data.given import deal
from caltech_sweep.data.splits import SPLITS, Split
from caltech_sweep.errors import DatasetError
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.places import Cli


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def part_of(root: Path, folder: str, count: int = 6, classes: tuple[str, ...] = ("ant", "bee")) -> None:
    put(root, *(f"{folder}/{name}/{folder}{i}.png" for name in classes for i in range(count)))


def names(split: Split, root: Path) -> dict[str, list[str]]:
    return {part: sorted(i.path.relative_to(root).as_posix() for i in split.part(part)) for part in SPLITS}


def folder(root: Path, **settings: object) -> Split:
    return load_split(DatasetConfig(name="folder", root=str(root), **settings))  # type: ignore[arg-type]


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "called",
    [
        ("train", "val", "test"),
        ("Train", "VALID", "Eval"),
        ("TRAIN", "validation", "TEST"),
        ("train", "Dev", "test"),
        ("training", "val", "Testing"),
    ],
)
def test_folders_named_after_parts_are_the_parts(tmp_path: Path, called: tuple[str, str, str]) -> None:
    for word, count in zip(called, (6, 3, 2), strict=True):
        part_of(tmp_path, word, count)
    put(tmp_path, "readme.txt", ".git/x", f"{called[0]}/ant/deep/er/x.png")
    split = folder(tmp_path)
    assert split.classes == ("ant", "bee") and split.notes == ()
    assert [len(split.part(part)) for part in SPLITS] == [13, 6, 4]
    for part, word in zip(SPLITS, called, strict=True):
        assert all(path.startswith(word + "/") for path in names(split, tmp_path)[part])


def test_a_missing_val_is_carved_from_train_and_a_missing_test_is_said(tmp_path: Path) -> None:
    part_of(tmp_path, "train", 9)
    split = folder(tmp_path)
    assert [len(split.part(part)) for part in SPLITS] == [12, 6, 0]
    assert Counter(item.class_name for item in split.val) == {"ant": 3, "bee": 3}
    assert split.notes == ("the dataset has no test images, so there is no test accuracy",)
    part_of(tmp_path, "test", 2)
    again = folder(tmp_path)
    assert (again.train, again.val) == (split.train, split.val) and len(again.test) == 4 and again.notes == ()


def test_folders_that_are_not_only_parts_are_classes_as_before(tmp_path: Path) -> None:
    for name in ("train", "test", "bus"):
        put(tmp_path / "toys", *(f"{name}/red/{i}.png" for i in range(6)))
        put(tmp_path / "flat", *(f"{name}/{i}.png" for i in range(6)))
    (tmp_path / "flat" / "bus").rename(tmp_path / "flat" / "val")
    assert folder(tmp_path / "toys").classes == ("bus", "test", "train")
    assert folder(tmp_path / "flat").classes == ("test", "train", "val")
    assert folder(tmp_path / "toys").notes == folder(tmp_path / "flat").notes == ()


def test_classes_that_look_like_parts_are_said(tmp_path: Path) -> None:
    part_of(tmp_path, "train")
    part_of(tmp_path, "holdout")
    split = folder(tmp_path)
    assert split.classes == ("holdout", "train")
    assert split.notes == (
        "the classes 'holdout', 'train' hold folders of the same names ('ant', 'bee'); where they are parts of a "
        "dataset and not classes, call them train, val and test",
    )
    for place in (".", "holdout", "train"):
        (tmp_path / place / "loop").symlink_to("loop")
    assert folder(tmp_path).train == split.train
    (tmp_path / "holdout").rename(tmp_path / "test")
    assert folder(tmp_path).classes == ("ant", "bee")
    (tmp_path / "test").rename(tmp_path / "holdout")
    part_of(tmp_path, "other", classes=("ant", "cow"))
    assert folder(tmp_path).notes == ()


def test_parts_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    part_of(tmp_path / "twice", "train")
    part_of(tmp_path / "twice", "val")
    part_of(tmp_path / "twice", "valid")
    with pytest.raises(DatasetError, match="the folders val and valid both mean val"):
        folder(tmp_path / "twice")
    part_of(tmp_path / "more", "train")
    part_of(tmp_path / "more", "test", classes=("ant", "bee", "cow", "Ant"))
    with pytest.raises(DatasetError, match="test has images of 'Ant', 'cow', of which train has none"):
        folder(tmp_path / "more")
    part_of(tmp_path / "one", "train", classes=("ant",))
    with pytest.raises(DatasetError, match="at least two classes.*it has 1"):
        folder(tmp_path / "one")


STUDY = """\
title: Own parts
dataset: {name: DATASET, root: ROOT, resize: 32, crop: 32}
fixed: {arch: resnet18, batch_size: 4, epochs: 1}
rows:
  - {name: Only, set: {lr: 0.01}}
"""


def paint(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.mark.slow  # it promotes
def test_without_test_images_the_table_has_no_test_column(place: Path, cli: Cli) -> None:
    for number in range(12):
        paint(place / "mine" / "train" / "ab"[number % 2] / f"{number}.png", number)
    (place / "sweeps" / "mine.yaml").write_text(STUDY.replace("DATASET", "folder").replace("ROOT", "mine"))
    for command in (("plan", "mine"), ("run", "mine", "--in-process", "--threads", "1")):
        result = cli(*command)
        assert result.exit_code == 0 and "the dataset has no test images, so there is no test accuracy" in result.output
    table = cli("report", "mine").output
    assert "Accuracy on Validation Set" in table and "Accuracy on Test Set" not in table
    assert "test_accuracy" not in json.loads(cli("report", "mine", "--format", "json").output)[0]["rows"][0]
    page = cli("report", "mine", "--format", "html")
    assert page.exit_code == 0 and "is lost" not in page.output
    assert cli("doctor").exit_code == 0
    assert cli("promote", "mine").exit_code == 0
    tracker = MlflowTracker(None)
    study = tracker.study("mine")
    assert study is not None
    (run,) = tracker.trials(study)
    assert run.tags["dataset.notes"].startswith("the dataset has no test images") and "test/accuracy" not in run.metrics


# -- csv files ---------------------------------------------------------------------------------------------------------


def table(root: Path, *lines: str, name: str = "images.csv") -> DatasetConfig:
    """Write a csv file, and the images that its first column names."""
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    for line in lines[1:]:
        path = line.split(",")[0].strip('"')
        if path and ".." not in path and not path.startswith("/"):
            put(root, path)
    return DatasetConfig(name="csv", root=str(root / name))


def test_a_csv_file_gives_labels_and_parts(tmp_path: Path) -> None:
    rows = [
        f"img/{part}{i}.png,{label},{part},x" for part in ("Train", "valid", "TEST") for label in "ba" for i in "12"
    ]
    rows = [row.replace(".png", f"{n}.png") for n, row in enumerate(rows)]
    split = load_split(table(tmp_path, "path,label,split,notes", *rows, ""))
    assert split.classes == ("a", "b") and [len(split.part(part)) for part in SPLITS] == [4, 4, 4]
    assert [item.path.name for item in split.train] == ["Train10.png", "Train21.png", "Train12.png", "Train23.png"]
    assert all(item.class_name == split.classes[item.label] for part in SPLITS for item in split.part(part))


def test_columns_have_other_names_where_they_are_set_and_semicolons_and_marks_are_read(tmp_path: Path) -> None:
    lines = ["\ufeffFile;Klasse", *(f'"a {i}.png";"{"xy"[i % 2]}"' for i in range(12))]
    put(tmp_path, *(f"a {i}.png" for i in range(12)))
    (tmp_path / "t.csv").write_text("\n".join(lines), encoding="utf-8")
    config = DatasetConfig(name="csv", root=str(tmp_path / "t.csv"), path_column="File", label_column="Klasse")
    split = load_split(config)
    assert sum(len(split.part(part)) for part in SPLITS) == 12 and len(split.test) == 4 and len(split.val) == 2
    with pytest.raises(
        DatasetError, match=r"t.csv:1: there is no column 'path' among 'File, Klasse'; set dataset.path_column"
    ):
        load_split(DatasetConfig(name="csv", root=str(tmp_path / "t.csv")))


def test_every_problem_of_a_csv_file_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    good = [f"{i}.png,{'ab'[i % 2]},train,g{i}" for i in range(6)]
    bad = ["../x.png,a,train,", "/etc/x.png,a,train,", "0.png,b,train,", "7.png,,train,", "8.png,a,rest,"]
    strange = ["6.png,zebra,test,", "0.png,zebra,val,"]
    table(tmp_path, "path,label,split,group", *good, *bad, "9.png,a,test,g1", ",a,train,", *strange)
    (tmp_path / "x.csv").write_text((tmp_path / "images.csv").read_text() + "gone.png,a,train,\n")
    with pytest.raises(DatasetError) as caught:
        load_split(DatasetConfig(name="csv", root=str(tmp_path / "x.csv")))
    said = [line.partition("x.csv:")[2] for line in str(caught.value).splitlines()]
    said[-1] = str(caught.value).splitlines()[-1]
    assert said == [
        "8: '../x.png' leads out of the file's folder; give paths below it",
        "9: '/etc/x.png' leads out of the file's folder; give paths below it",
        "10: '0.png' is on line 2 already",
        "11: the label is empty",
        "12: 'rest' is not a part; write train, val or test",
        "13: group 'g1' is in test, and in train on line 3",
        "14: the path is empty",
        "15: test has images of 'zebra', of which train has none",
        "... and 2 more",
    ]


def test_names_with_line_breaks_and_every_other_character_come_through_a_csv_file(tmp_path: Path) -> None:
    odd = (
        "a\nb",
        "a\rb",
        "a\u2028b",
        "a\x85b",
        "a\x0cb",
        'q"b',
        "%s",
        "$HOME",
        "-rf",
        "\U0001f600",
        "=1+1",
        "a,b",
        "<b>",
    )
    names = [f"{stem}{i}.png" for stem in odd for i in range(4)]
    put(tmp_path, *names)
    with (tmp_path / "t.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((name, f"c{i % 4 // 2}") for i, name in enumerate(names))])
    split = load_split(DatasetConfig(name="csv", root=str(tmp_path / "t.csv")))
    assert {item.path.name for part in SPLITS for item in split.part(part)} == set(names)


def test_a_line_is_counted_as_an_editor_counts_it(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('path,label\n\n"a\n\nb",x\ngone.png,y\n', encoding="utf-8")
    with pytest.raises(DatasetError, match=r"t.csv:5: there is no file 'a b'\n.*t.csv:6: there is no file 'gone.png'"):
        load_split(DatasetConfig(name="csv", root=str(tmp_path / "t.csv")))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"path,label\na.png,a\n" + b"x" * (3 << 20), "line 3 has more than a million characters"),
        (b"x" * (1 << 21), "line 1 has more than a million characters"),
        (b"path,label\n" + b"x" * 200_000 + b",a\n", "after line 1: field larger than field limit"),
        (b"path,label\na.png,a\nb\0.png,b\n", "line 3 has a NUL character; save the file as text in UTF-8"),
        ("path,label\na.png,a\n".encode("utf-16-le"), "line 1 has a NUL character"),
        ("path,label\na.png,a\n".encode("utf-16"), "cannot be read as a csv file in UTF-8: 'utf-8' codec"),
        (b'path,label\na.png,a\n"b.png,b\n', "after line 2: unexpected end of data; is a quotation mark not closed?"),
        (b"path,label\n" + b"x" * 300 + b",a\n", "t.csv:2: there is no file 'xxx"),
        (b"path,label\n" + b"x/" * 4000 + b",a\n", "t.csv:2: there is no file 'x/x"),
        (b"path,label\n" + b"a,b\n" * 30_000, r"t.csv:9: there is no file 'a'\n... and at least 9,992 more$"),
    ],
)
def test_a_file_that_is_no_table_of_images_is_a_short_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DatasetError, match=said) as caught:
        load_split(DatasetConfig(name="csv", root=str(tmp_path / "t.csv")))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(caught.value)) < 2000 and most < 30 << 20


@pytest.mark.parametrize("path", ["a/../../b.png", "..\\b.png", "C:\\b.png", "\\\\host\\b.png", "./../b.png"])
def test_a_path_that_climbs_out_is_refused_however_it_is_written(tmp_path: Path, path: str) -> None:
    put(tmp_path, "b.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "t.csv").write_text(f"path,label\n{path},a\n")
    with pytest.raises(DatasetError, match="leads out of the file's folder"):
        load_split(DatasetConfig(name="csv", root=str(tmp_path / "in" / "t.csv")))


def test_a_label_that_train_lacks_is_named(tmp_path: Path) -> None:
    rows = [f"{i}.png,{'ab'[i % 2]},train" for i in range(6)]
    with pytest.raises(DatasetError, match="test has images of 'c', of which train has none"):
        load_split(table(tmp_path, "path,label,split", *rows, "9.png,c,test"))


def test_images_of_one_group_stay_together_whatever_is_carved(tmp_path: Path) -> None:
    rows = [f"{i}.png,{'ab'[i // 3 % 2]},p{i // 3}" for i in range(90)]
    config = table(tmp_path, "path,label,group", *rows)
    split = load_split(config)
    group = {f"{i}.png": f"p{i // 3}" for i in range(90)}
    parts = [{group[item.path.name] for item in split.part(part)} for part in SPLITS]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2]) and len(set().union(*parts)) == 30
    assert [len(split.part(part)) for part in SPLITS] == [42, 18, 30]
    assert all(min(Counter(item.label for item in split.part(part)).values()) >= 9 for part in SPLITS)
    assert load_split(config) == split


@given(
    st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(1, 9), min_size=1), min_size=1, max_size=60),
    st.integers(0, 9),
)
def test_dealt_groups_have_about_the_asked_shares(groups: list[dict[str, int]], seed: int) -> None:
    parts = deal(groups, [0.75, 0.25], [seed])
    assert parts == deal(groups, [0.75, 0.25], [seed]) and set(parts) <= {0, 1}
    sizes = [sum(sum(g.values()) for g, p in zip(groups, parts, strict=True) if p == part) for part in (0, 1)]
    largest = max(sum(group.values()) for group in groups)
    assert abs(sizes[1] - 0.25 * sum(sizes)) <= 2 * largest + 0.25 * sum(sizes)


def test_a_study_over_a_csv_file_runs_and_its_page_has_the_pictures(place: Path, cli: Cli) -> None:
    lines = ["path,label,split"]
    for number in range(18):
        paint(place / "photos" / f"{number}.png", number)
        lines.append(f"photos/{number}.png,{'ab'[number % 2]},{('train', 'val', 'test')[number // 6]}")
    (place / "list.csv").write_text("\n".join(lines))
    listed = cli("data", "list", "--data", "list.csv", "--split", "test")
    assert listed.stdout.splitlines()[0] == "photos/12.png,a" and len(listed.stdout.splitlines()) == 6
    (place / "sweeps" / "mine.yaml").write_text(STUDY.replace("DATASET", "csv").replace("ROOT", "list.csv"))
    assert cli("run", "mine", "--in-process", "--threads", "1").exit_code == 0
    page = cli("report", "mine", "--format", "html").output
    assert "cannot be read" not in page
    predictions = next((place / "mlruns").rglob("predictions/test.csv")).read_text().splitlines()[1:]
    assert page.count("data:image/webp") == sum(line.split(",")[1] != line.split(",")[2] for line in predictions)


def test_a_setting_that_only_other_datasets_read_is_refused(place: Path, cli: Cli) -> None:
    study = place / "sweeps" / "tiny.yaml"
    study.write_text(study.read_text().replace("resize: 32,", "resize: 32, path_column: file,"))
    result = cli("plan", "tiny")
    assert result.exit_code == 2
    assert "dataset.path_column: is not read by a dataset named shapes; it is for csv" in result.output


# -- folds -------------------------------------------------------------------------------------------------------------


def test_folds_take_turns_as_val_and_each_has_its_share_of_every_class(tmp_path: Path) -> None:
    put(tmp_path, *(f"{name}/{i}.png" for name, count in {"a": 31, "b": 17, "c": 12}.items() for i in range(count)))
    whole = folder(tmp_path)
    folds = [folder(tmp_path, folds=5, fold=number) for number in range(1, 6)]
    developed = {item.path for item in (*whole.train, *whole.val)}
    assert all(split.test == whole.test and split.classes == whole.classes for split in folds)
    assert all({item.path for item in (*split.train, *split.val)} == developed for split in folds)
    assert sum(len(split.val) for split in folds) == len(developed) == len(set().union(*(split.val for split in folds)))
    assert len({len(split.val) for split in folds}) <= 2
    for label in range(3):
        counts = [sum(item.label == label for item in split.val) for split in folds]
        assert max(counts) - min(counts) <= 1 and min(counts) > 0
    assert folder(tmp_path, folds=5, fold=2) == folds[1]
    assert folder(tmp_path, folds=5, fold=2, split_seed=1).val != folds[1].val


def test_a_group_is_in_one_fold(tmp_path: Path) -> None:
    rows = [f"{i}.png,{'ab'[i // 3 % 2]},p{i // 3}" for i in range(90)]
    config = table(tmp_path, "path,label,group", *rows)
    seen: list[str] = []
    for number in (1, 2, 3, 4):
        split = load_split(DatasetConfig(name="csv", root=config.root, folds=4, fold=number))
        groups = {f"p{int(item.path.stem) // 3}" for item in split.val}
        assert not groups & {f"p{int(item.path.stem) // 3}" for item in split.train}
        assert min(Counter(item.label for item in split.val).values()) >= 6
        seen += groups
    assert len(seen) == len(set(seen)) == 20


def test_folds_that_cannot_be_made_are_sentences(tmp_path: Path) -> None:
    part_of(tmp_path, "train", 9)
    with pytest.raises(DatasetError, match="class 'ant' has 9 images in train and val, fewer than dataset.folds: 10"):
        folder(tmp_path, folds=10)
    with pytest.raises(DatasetError, match="there is no fold 2 of 1; set dataset.folds"):
        folder(tmp_path, fold=2)
