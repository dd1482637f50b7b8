"""Which files of a folder are images of which class, and what is said of the others."""

from __future__ import annotations

import csv
import io
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from caltech_sweep.config import DatasetConfig
from caltech_sweep.data import load_split
from caltech_sweep.data.given import folder_split
from caltech_sweep.data.splits import SPLITS, Split
from caltech_sweep.errors import DatasetError, UsageError
from helpers.places import Cli


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def images_of(split: Split, root: Path) -> dict[str, list[str]]:
    """Return the paths of each class."""
    found: dict[str, list[str]] = {name: [] for name in split.classes}
    for part in SPLITS:
        for item in split.part(part):
            found[item.class_name].append(item.path.relative_to(root).as_posix())
    return {name: sorted(paths) for name, paths in found.items()}


def two_classes(root: Path) -> Path:
    return put(root, *(f"{name}/{index}.png" for name in ("ant", "bee") for index in range(6)))


def test_whatever_pillow_reads_counts_at_any_depth_for_its_top_folder(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "images")
    more = ["a.jfif", "b.PPM", "deep/c.pgm", "deep/er/d.avif", "deep/er/still/e.jp2", "f.JPEG", "g.apng", "h.tga"]
    put(root, *(f"ant/{name}" for name in more))
    split = folder_split(root, DatasetConfig())
    found = images_of(split, root)
    assert found["ant"] == sorted([*(f"ant/{i}.png" for i in range(6)), *(f"ant/{name}" for name in more)])
    assert found["bee"] == [f"bee/{i}.png" for i in range(6)] and split.passed_over == ""


def test_hidden_things_never_count_and_all_else_is_counted_by_its_kind(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "images")
    before = folder_split(root, DatasetConfig())
    hidden = [".ipynb_checkpoints/0.png", "__MACOSX/ant/0.png", "ant/@eaDir/0.png", "bee/.x/0.png"]
    left = ["ant/._0.png", "ant/Thumbs.db", "bee/desktop.ini", ".DS_Store"]
    other = ["ant/notes.txt", "bee/notes.TXT", "readme.txt", "ant/drawing.svg", "bee/LICENSE", "cover.png"]
    put(root, *hidden, *left, *other)
    (root / "empty" / "below").mkdir(parents=True)
    (root / "ant" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "ant" / "self.png").symlink_to(root / "ant" / "self.png")
    (root / "bee" / "up").symlink_to(root / "bee")
    (root / "bee" / "root").symlink_to(root)
    os.mkfifo(root / "bee" / "pipe.png")
    split = folder_split(root, DatasetConfig())
    assert split == Split(before.classes, before.train, before.val, before.test, split.passed_over)
    assert split.passed_over == (
        "3 .txt, 1 .svg, 1 without an extension, 2 broken links, 4 hidden files, 4 hidden folders, "
        "1 image in no class, 2 links to folders that are read already, 1 special file, 1 empty class 'empty'"
    )


def test_linked_images_and_folders_count(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "images")
    elsewhere = put(tmp_path / "elsewhere", *(f"{i}.png" for i in range(6)))
    (root / "cow").symlink_to(elsewhere)
    (root / "bee" / "linked.png").symlink_to(elsewhere / "0.png")
    found = images_of(folder_split(root, DatasetConfig()), root)
    assert found["cow"] == [f"cow/{i}.png" for i in range(6)] and "bee/linked.png" in found["bee"]


def test_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    names = [f"class{i}" for i in range(8)]
    root = put(tmp_path / "images", *(f"{name}/{i}.png" for name in names for i in range(6)))
    for one in names:
        for other in names:
            (root / one / f"to_{other}").symlink_to(root / other)
    split = folder_split(root, DatasetConfig())
    assert all(len(paths) == 48 for paths in images_of(split, root).values())


def nested(folder: Path, name: str, depth: int) -> None:
    """Make folders within folders, deeper than the path of one may be long."""
    inside = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=inside)
        inside, above = os.open(name, os.O_RDONLY, dir_fd=inside), inside
        os.close(above)
    os.close(inside)


@pytest.mark.parametrize(
    ("name", "depth", "said"),
    [("d", 500, "in more than 200 folders; move its images up"), ("d" * 100, 60, "(File name too long); give it a sh")],
)
def test_folders_that_are_nested_too_deep_are_a_sentence(
    tmp_path: Path, cli: Cli, name: str, depth: int, said: str
) -> None:
    nested(two_classes(tmp_path / "images") / "ant", name, depth)
    listed = cli("data", "list", "--split", "test", "--data", str(tmp_path / "images"))
    assert listed.exit_code == 2 and said in listed.output and len(listed.output) < 500
    shutil.rmtree(tmp_path / "images")


def test_two_class_folders_that_read_the_same_are_refused(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "images")
    put(root, "bl\udce9/1.png", "bl\\xe9/1.png")
    with pytest.raises(DatasetError, match=r"two class folders of .* read 'bl\\xe9'; rename one"):
        folder_split(root, DatasetConfig())


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_classes_depends_on_names_only(tmp_path: Path, seed: int) -> None:
    names = ["Cat", "cat", "CAT", "dog", "Dog", "ant", "Éclair", "éclair"]
    random.Random(seed).shuffle(names)
    root = put(tmp_path / "images", *(f"{name}/{i}.png" for name in names for i in range(6)))
    classes = folder_split(root, DatasetConfig()).classes
    assert classes == ("ant", "CAT", "Cat", "cat", "Dog", "dog", "Éclair", "éclair")


def test_a_folder_without_classes_says_what_it_has(tmp_path: Path) -> None:
    root = put(tmp_path / "images", "a.png", "b.png", "notes.txt", "ant/0.png")
    with pytest.raises(DatasetError, match=r"it has 1 \(passed over: 1 .txt, 2 images in no class\)"):
        folder_split(root, DatasetConfig())


def test_a_folder_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "images")
    (root / "bee" / "closed").mkdir(mode=0)
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    with pytest.raises(DatasetError, match="closed cannot be read: Permission denied"):
        folder_split(root, DatasetConfig())


# -- through the commands ----------------------------------------------------------------------------------------------

STUDY = """\
title: Mine
dataset: {name: folder, root: images, resize: 16, crop: 16}
fixed: {arch: resnet18, batch_size: 5, epochs: 1}
rows:
  - {name: Only, set: {lr: 0.01}}
"""


def painted(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 18), (40 * number % 256, 99, 7)).save(root / name, "PNG")
    return root


def mine(place: Path) -> None:
    painted(place / "images", *(f"{name}/in/{i}.png" for name in ("ant", "bee") for i in range(9)))
    put(place / "images", "ant/sound.ogg", "bee/sound.ogg", ".git/HEAD")
    (place / "sweeps" / "mine.yaml").write_text(STUDY)


PASSED = "passed over: 2 .ogg, 1 hidden folder"
DROPPED = (
    "drop_last leaves out 3 of the 8 training images in every epoch of batch_size 5; choose another batch_size, or set"
)


def test_a_plan_says_once_what_is_left_out(place: Path, cli: Cli) -> None:
    mine(place)
    output = cli("plan", "mine").output
    assert output.count(PASSED) == 1 and output.count(DROPPED) == 1


@pytest.mark.slow
def test_a_run_says_once_what_is_left_out_and_records_it(place: Path, cli: Cli) -> None:
    from caltech_sweep.tracking.writer import MlflowTracker

    mine(place)
    result = cli("run", "mine", "--in-process", "--threads", "1")
    assert result.exit_code == 0 and result.output.count(PASSED) == 1 and result.output.count(DROPPED) == 1
    tracker = MlflowTracker(None)
    study = tracker.study("mine")
    assert study is not None
    assert [run.tags["dataset.passed_over"] for run in tracker.trials(study)] == ["2 .ogg, 1 hidden folder"]


@pytest.mark.parametrize(("size", "said"), [(8, False), (4, False), (7, True), (3, True), (9, False)])
def test_only_a_drop_of_more_than_a_tenth_is_said(place: Path, cli: Cli, size: int, said: bool) -> None:
    mine(place)
    output = cli("plan", "mine", "--set", f"batch_size={size}").output
    assert bool(re.search(r"drop_last leaves out \d", output)) == said
    output = cli("plan", "mine", "--set", f"batch_size={size}", "--set", "drop_last=false").output
    assert "drop_last leaves out" not in output


def test_a_sampled_batch_size_is_asked_for_its_worst_value(place: Path, cli: Cli) -> None:
    mine(place)
    for space, said in (
        ("{low: 3, high: 6}", "out 3 of the 8 training images in every epoch of batch_size 5"),
        ("{choices: [4, 7, 8]}", "out 1 of the 8 training images in every epoch of batch_size 7"),
        ("{choices: [4, 8]}", ""),
        ("{low: 2, high: 8, step: 2}", "out 2 of the 8"),
    ):
        text = STUDY.replace("batch_size: 5, ", "").replace("lr: 0.01", "lr: 0.01, batch_size: 8")
        (place / "sweeps" / "mine.yaml").write_text(f"{text}trials: 3\nspace:\n  batch_size: {space}\n")
        output = cli("plan", "mine").output
        assert (said in output) if said else ("drop_last" not in output), output


def test_predict_takes_the_images_of_a_folder_and_leaves_hidden_ones_out(tmp_path: Path) -> None:
    from caltech_sweep.serving.predict import find_images

    put(tmp_path, "b/deep/1.jfif", "a.PNG", ".hidden/2.png", "b/__MACOSX/3.png", "b/._4.png", "notes.txt", "c.ps")
    assert list(find_images([tmp_path])) == [tmp_path / "a.PNG", tmp_path / "b" / "deep" / "1.jfif"]
    with pytest.raises(UsageError, match=r"has no image files; passed over: 1 .txt"):
        list(find_images([put(tmp_path / "none", "x.txt")]))


def listed(text: str) -> list[tuple[str, ...]]:
    return [tuple(row) for row in csv.reader(io.StringIO(text))]


def test_data_list_lists_every_dataset(place: Path, cli: Cli) -> None:
    mine(place)
    split = load_split(DatasetConfig(name="folder", root="images"))
    want = [(item.path.relative_to("images").as_posix(), item.class_name) for item in split.test]
    assert len(want) == 6
    for arguments in (("--data", "images"), ("mine",), ("--set", "dataset.root=images")):
        result = cli("data", "list", "--split", "test", *arguments)
        assert listed(result.stdout) == want and result.stderr == f"{PASSED}\n"
    shapes = listed(cli("data", "list", "--split", "val", "--set", "dataset.name=shapes").stdout)
    assert len(shapes) == 192 and shapes[0] == ("cross/val_000", "cross")
    tiny = listed(cli("data", "list", "tiny", "--split", "train").stdout)
    assert len(tiny) == 24 and {name for _, name in tiny} == {"cross", "disc", "ring"}
    fewer = cli("data", "list", "--split", "val", "--data", "images", "--set", "dataset.val_fraction=0.5")
    assert len(listed(fewer.stdout)) == 6
    assert "lr: decides no split" in cli("data", "list", "--split", "val", "--set", "lr=1").output


def test_an_incomplete_caltech_is_not_listed_as_another_folder(tmp_path: Path, cli: Cli) -> None:
    for present in ("BACKGROUND_Google/a.jpg", "Faces_easy/a.jpg"):
        root = two_classes(put(tmp_path / present[:5], present))
        result = cli("data", "list", "--split", "test", "--data", str(root))
        assert result.exit_code == 2 and "the official split" in result.output


@pytest.fixture
def odd_names(place: Path) -> Path:
    """A dataset with names that are Latin-1, which is no UTF-8."""
    painted(place / "images", *(f"{name}/{i}.png" for name in ("ant", "bee") for i in range(9)))
    images = os.fsencode(place / "images")
    try:
        os.rename(images + b"/ant/0.png", images + b"/ant/\xe9t\xe9.png")
        os.rename(images + b"/bee", images + b"/b\xe9e")
        os.mkdir(images + b"/vide \xe9")
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    (place / "sweeps" / "mine.yaml").write_text(STUDY)
    return place


def test_names_in_another_encoding_are_listed_as_the_disk_has_them(odd_names: Path, cli: Cli) -> None:
    rows = b"".join(cli("data", "list", "mine", "--split", part).stdout_bytes for part in SPLITS)
    assert b"ant/\xe9t\xe9.png,ant\n" in rows and b"b\xe9e/0.png,b\\xe9e\n" in rows and rows.count(b"\n") == 18


@pytest.mark.slow
def test_names_in_another_encoding_do_not_break_a_plan_or_a_run_on_a_strict_terminal(odd_names: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    for arguments in (("plan", "mine"), ("run", "mine", "--in-process", "--threads", "1")):
        program = [sys.executable, "-m", "caltech_sweep", *arguments]
        done = subprocess.run(program, capture_output=True, env=environment, text=True)
        assert done.returncode == 0 and "1 empty class 'vide \\xe9'" in done.stdout + done.stderr
    (table,) = odd_names.rglob("predictions/test.csv")
    assert "b\\xe9e/" in table.read_text(encoding="utf-8")
