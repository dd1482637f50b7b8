"""The splits: the course's rule on a tree of Caltech-101's size, and any folder of class folders."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltech_sweep.config import DatasetConfig
from caltech_sweep.data import load_split
from caltech_sweep.data.given import folder_split
from caltech_sweep.data.splits import caltech_split, subset
from caltech_sweep.errors import DatasetError
from helpers.datasets import fake_caltech


@pytest.fixture(scope="module")
def caltech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_caltech(tmp_path_factory.mktemp("data") / "101_ObjectCategories")


def test_every_third_file_of_the_whole_listing_is_test(caltech: Path) -> None:
    split = caltech_split(caltech)
    listing = [p for d in sorted(caltech.iterdir(), key=lambda d: d.name.lower()) for p in sorted(d.iterdir())]
    expected = [p for i, p in enumerate(listing) if i % 3 == 0 and p.parent.name != "BACKGROUND_Google"]
    assert [item.path for item in split.test] == expected
    assert (len(split.train), len(split.val)) == (3856, 1928)
    parts = [{item.path for item in part} for part in (split.train, split.val, split.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert sum(map(len, parts)) == 8677


def test_a_link_to_itself_is_neither_a_class_nor_an_image(caltech: Path) -> None:
    before = caltech_split(caltech)
    loops = [caltech / "loop", caltech / "class_005" / "loop"]
    for loop in loops:
        loop.symlink_to("loop")
    try:
        assert caltech_split(caltech) == before
    finally:
        for loop in loops:
            loop.unlink()


def test_a_missing_tmp_is_named_because_it_shifts_the_rule(caltech: Path) -> None:
    (caltech / "BACKGROUND_Google" / "tmp").unlink()
    try:
        with pytest.raises(DatasetError, match="lacks the stray file 'tmp'"):
            caltech_split(caltech)
    finally:
        (caltech / "BACKGROUND_Google" / "tmp").touch()


def test_an_incomplete_folder_is_refused_with_its_counts(caltech: Path) -> None:
    victim = caltech / "class_005" / "image_0001.jpg"
    victim.unlink()
    try:
        with pytest.raises(DatasetError, match=r"9,144 files in 102 folders, not 9,145 in 102"):
            caltech_split(caltech)
    finally:
        victim.touch()


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index:03d}.PNG").touch()
    return root


@given(sizes=st.lists(st.integers(6, 25), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_a_folder_split_is_disjoint_exhaustive_and_stratified(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int
) -> None:
    root = make_folder(tmp_path_factory.mktemp("folder"), {f"c{i}": n for i, n in enumerate(sizes)})
    split = folder_split(root, DatasetConfig(split_seed=seed))
    parts = [[item.path for item in part] for part in (split.train, split.val, split.test)]
    everything = [path for part in parts for path in part]
    assert len(everything) == len(set(everything)) == sum(sizes)
    for label in range(len(sizes)):
        assert all(any(item.label == label for item in part) for part in (split.train, split.val, split.test))
    assert folder_split(root, DatasetConfig(split_seed=seed)) == split


def test_impossible_splits_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="at least two classes"):
        folder_split(make_folder(tmp_path / "one", {"a": 9}), DatasetConfig(val_fraction=0.3, test_fraction=0.3))
    with pytest.raises(DatasetError, match="class 'b' has 2 images, too few"):
        folder_split(
            make_folder(tmp_path / "two", {"a": 9, "b": 2}), DatasetConfig(val_fraction=0.3, test_fraction=0.3)
        )
    with pytest.raises(DatasetError, match="caltech-sweep data"):
        load_split(DatasetConfig(root=str(tmp_path / "nowhere")))


def test_subsets_renumber_their_classes(tmp_path: Path) -> None:
    split = folder_split(make_folder(tmp_path, dict.fromkeys("abcde", 12)), DatasetConfig())
    second = subset(split, DatasetConfig(classes="second_half", images_per_class=2))
    assert second.classes == ("d", "e")
    assert [item.label for item in second.val] == [0, 0, 1, 1]
    with pytest.raises(DatasetError, match="no class 'bb'; did you mean 'b'"):
        subset(split, DatasetConfig(classes=("a", "bb")))
