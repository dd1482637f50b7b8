"""torchvision's classification datasets by name, each with its own parts; downloaded as torchvision does it."""

from __future__ import annotations

import contextlib
import inspect
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from caltech_sweep import paths
from caltech_sweep.config import DatasetConfig
from caltech_sweep.data.given import Item, given_split
from caltech_sweep.data.pixels import read_file
from caltech_sweep.data.splits import Split
from caltech_sweep.errors import DatasetError
from caltech_sweep.text import one_line, readable, suggestion

Arguments = Mapping[str, Any]
_ONE_BY_ONE = threading.Lock()


def _splits(train: str = "train", val: str | None = None, test: str | None = "test") -> dict[str, Arguments]:
    words = {"train": train, "val": val, "test": test}
    return {part: {"split": word} for part, word in words.items() if word is not None}


def _flag(**more: Any) -> dict[str, Arguments]:
    return {"train": {"train": True, **more}, "test": {"train": False, **more}}


_NOISE = {"image_size": (3, 48, 48), "num_classes": 3}
_THREE = _splits(val="val")
# The arguments that give each part; a part that has none is carved, and "all" is cut as a folder is.
SOURCES: dict[str, dict[str, Arguments]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"), _flag()),
    "EMNIST": _flag(split="balanced"),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102", "PCAM", "RenderedSST2"), _THREE),
    "Country211": _splits(val="valid"),
    **dict.fromkeys(("FER2013", "Food101", "GTSRB", "LFWPeople", "StanfordCars", "STL10", "SVHN"), _splits()),
    "OxfordIIITPet": _splits("trainval"),
    **dict.fromkeys(("CLEVRClassification", "ImageNet", "Imagenette"), _splits(val="val", test=None)),
    "Places365": _splits("train-standard", "val", None),
    **dict.fromkeys(("Caltech256", "EuroSAT", "SEMEION", "SUN397"), {"all": {}}),
    # Noise, for trying things out.
    "FakeData": {"train": {"size": 60, **_NOISE}, "test": {"size": 30, "random_offset": 60, **_NOISE}},
}


def _source(config: DatasetConfig) -> str:
    if config.source is None:
        raise DatasetError("dataset.source: name the dataset of torchvision, such as CIFAR10")
    if config.source not in SOURCES:
        raise DatasetError(
            f"dataset.source: {config.source!r} is none of the datasets of torchvision that can be named"
            f"{suggestion(config.source, SOURCES)}"
        )
    return config.source


def _place(config: DatasetConfig) -> Path:
    return paths.expanded(config.root) if config.root else paths.data_home() / "torchvision"


def _make(source: str, place: Path, arguments: Arguments, download: bool) -> Any:
    from torchvision import datasets

    kind: Callable[..., Any] = getattr(datasets, source)
    known = inspect.signature(kind).parameters
    own: dict[str, Any] = {"root": str(place)} if source != "FakeData" else {}
    # A dataset without this parameter of its own hands it on to one that has it, or has nothing to download.
    if "download" in known or any(each.kind is each.VAR_KEYWORD for each in known.values()) and source != "ImageNet":
        own["download"] = download
    with contextlib.redirect_stdout(io.StringIO()):
        return kind(**own, **arguments)


@lru_cache(maxsize=4)
def _opened(source: str, place: Path) -> dict[str, Any]:
    """Return torchvision's dataset of each part; raise DatasetError when it is not there."""
    try:
        return {part: _make(source, place, arguments, False) for part, arguments in SOURCES[source].items()}
    except ImportError as error:
        raise _needs(source, error) from error
    except (RuntimeError, OSError, ValueError) as error:
        raise DatasetError(
            f"{source} is not in {readable(str(place))} ({one_line(str(error))}); `caltech-sweep run` downloads what "
            "torchvision can download, and dataset.root names another folder"
        ) from error


def _needs(source: str, error: ImportError) -> DatasetError:
    return DatasetError(f"{source} needs the package {error.name or 'that torchvision names'} ({one_line(str(error))})")


def fetch_library(config: DatasetConfig) -> None:
    """Download a dataset that is not there yet; raise DatasetError when that fails."""
    source, place = _source(config), _place(config)
    try:
        _opened(source, place)
        return
    except DatasetError as error:
        missing = error
    from caltech_sweep.files import alone, make_folder

    with alone(make_folder(place)):
        try:
            for arguments in SOURCES[source].values():
                _make(source, place, arguments, True)
        except ImportError as error:
            raise _needs(source, error) from error
        except Exception as error:  # of the network, of archives and of disks: torchvision lets all through
            reason = one_line(str(error) or type(error).__name__)
            raise DatasetError(
                f"{source} cannot be downloaded to {readable(str(place))} ({reason}); "
                "connect to the network and run again, or put torchvision's files there, or name their folder with "
                "dataset.root"
            ) from (error if isinstance(error, OSError) else missing)


def _labels(data: Any) -> Sequence[int]:
    """Return the class index of every image, without opening it where torchvision has a list of them."""
    for name in ("targets", "labels", "_labels", "y", "_samples", "samples", "imgs"):
        found = getattr(data, name, None)
        if found is None or len(found) != len(data):
            continue
        labels = [each[1] if isinstance(each, tuple) else each for each in found]
        if all(int(labels[index]) == int(data[index][1]) for index in {0, len(labels) - 1}):
            return [int(label) for label in labels]
    return [int(data[index][1]) for index in range(len(data))]


def _classes(data: Any, most: int) -> list[str]:
    """Return the names of the classes by index; numbers where torchvision has none, or has one twice."""
    found = getattr(data, "class_to_idx", None)
    names = [str(n) for n in range(most)]
    if found and sorted(set(found.values())) == list(range(len(found))):
        names = [str(name) for name, _ in sorted(found.items(), key=lambda item: item[1])]
    elif found := getattr(data, "classes", None) or getattr(data, "categories", None):
        names = [str(name[0] if isinstance(name, tuple) else name) for name in found]
    names = [readable(name) for name in names]
    return names if len(set(names)) == len(names) >= most else [str(n) for n in range(max(most, len(names)))]


def library_split(config: DatasetConfig) -> Split:
    """Return the parts of one of torchvision's datasets; what it does not have is carved, or missing and said."""
    source = _source(config)
    labels = {part: _labels(data) for part, data in _opened(source, _place(config)).items()}
    data = next(iter(_opened(source, _place(config)).values()))
    names = _classes(data, 1 + max(max(each, default=0) for each in labels.values()))
    items = [
        Item(Path(part) / f"{index:06d}", names[label], None if part == "all" else part)
        for part, each in labels.items()
        for index, label in enumerate(each)
    ]
    used = {item.class_name for item in items}
    return given_split(items, config, source, classes=[name for name in names if name in used])


def library_reader(config: DatasetConfig) -> Callable[[Path], bytes]:
    """Return what gives an image of :func:`library_split` as the content of a file."""
    find = _finder(config)

    def read(path: Path) -> bytes:
        data, index = find(path)
        file = _file_of(data, index)
        if file is not None:
            return read_file(file)
        with _ONE_BY_ONE:  # FakeData draws from the global random numbers
            image = data[index][0]
        content = io.BytesIO()
        image.save(content, "PPM" if image.mode in ("L", "RGB") else "PNG")  # a PPM is the pixels behind a header
        return content.getvalue()

    return read


def library_place(config: DatasetConfig) -> Callable[[Path], Path | None]:
    """Return what gives the file of an image of :func:`library_split`, or None where torchvision has no file of it."""
    find = _finder(config)
    return lambda path: _file_of(*find(path))


def _finder(config: DatasetConfig) -> Callable[[Path], tuple[Any, int]]:
    """Return what gives torchvision's dataset of an image, and its index there; OSError for one that is not there."""
    source, place = _source(config), _place(config)

    def find(path: Path) -> tuple[Any, int]:
        try:
            data, index = _opened(source, place)[path.parent.as_posix()], int(path.name)
            if not 0 <= index < len(data):
                raise KeyError(path)
        except (KeyError, ValueError) as error:
            raise FileNotFoundError(2, "there is no such image", str(path)) from error
        return data, index

    return find


def _file_of(data: Any, index: int) -> Path | None:
    """Return the file of an image, or None where torchvision keeps images in another form."""
    for name in ("_image_files", "_images", "_samples", "samples", "imgs"):
        found = getattr(data, name, None)
        if isinstance(found, (list, tuple)) and len(found) == len(data):
            entry = found[index][0] if isinstance(found[index], tuple) else found[index]
            if isinstance(entry, (str, Path)) and Path(entry).is_file():
                return Path(entry)
    return None
