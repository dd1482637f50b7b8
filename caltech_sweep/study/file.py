"""Study files: strict YAML 1.2, read into a frozen definition; every problem of a file is reported at once.

A sentence about a problem starts with where it is: ``sweeps/x.yaml:12: space.lr.low: must be ...``.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from caltech_sweep import paths
from caltech_sweep.config import PLACE_FIELDS, TRIAL_RULES, DatasetConfig, TrialConfig
from caltech_sweep.data.registry import dataset_rules, name_for, unread
from caltech_sweep.errors import StudyFileError, UsageError
from caltech_sweep.metrics import DEFAULT_OBJECTIVE
from caltech_sweep.rules import (
    BOOLEAN,
    FRACTION,
    POSITIVE,
    Rule,
    integer,
    is_integer,
    is_number,
    number,
)
from caltech_sweep.study.definition import (
    Choices,
    Component,
    Dimension,
    Range,
    Row,
    StudyDefinition,
    SubsetOf,
    column_names,
)
from caltech_sweep.text import is_overgrown, one_line, quoted, suggestion
from caltech_sweep.training.schedule import schedule_settings

REFERENCES = {
    "val_accuracy": number("between 0 and 1", lambda v: 0 <= v <= 1),
    "test_accuracy": number("between 0 and 1", lambda v: 0 <= v <= 1),
    "best_epoch": integer(1),
}


_VARYING = {name: rule for name, rule in TRIAL_RULES.items() if name != "objective"}  # it is the whole study's
BUDGETS = {"epochs": integer(1), "hours": POSITIVE}
_EARLY_STOPPING = ("patience", "min_delta")
_LONGEST_FILE = 1 << 18  # bytes: of some thousand rows
_DEEPEST = 100  # brackets within brackets
_LONGEST_NAME = 150  # bytes: a file's name has 255, of which three stand for one / and a digest takes some


def weights_key(config: TrialConfig) -> str:
    """Return the name of the weights that a trial starts from; each network has published ones of its own."""
    return f"imagenet {config.arch}" if config.pretrained else config.weights


def _plain(node: Any) -> Any:
    """Return a YAML node without its marks, as plain Python values."""
    if isinstance(node, Mapping):
        return {_plain(key): _plain(value) for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [_plain(value) for value in node]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return str(node)


def _cannot_be_stored(text: str) -> bool:
    """Tell whether a text has control characters, or halves of characters, which stores and terminals do not take."""
    return any(unicodedata.category(each) in ("Cc", "Cs") and each not in "\t\n\r\x85" for each in text)


def _check_depth(text: str, where: str) -> None:
    """Refuse brackets within brackets within brackets, over which the parser takes the square of their number."""
    depth = 0
    for found in re.finditer(r"[\[{]|([\]}])", text):
        depth = max(0, depth - 1) if found[1] else depth + 1
        if depth > _DEEPEST:
            line = text.count("\n", 0, found.start()) + 1
            raise StudyFileError([f"{where}:{line}: not valid YAML: brackets are nested more than {_DEEPEST} deep"])


def _crop_problem(dataset: Mapping[str, Any]) -> str | None:
    crop, resize = dataset.get("crop", DatasetConfig.crop), dataset.get("resize", DatasetConfig.resize)
    return f"{crop} pixels cannot be cut from images of {resize} (dataset.resize)" if crop > resize else None


def _load_yaml(text: str, where: str) -> Any:
    if found := re.match(r"\ufeff?%YAML\s+(?!1\.2\b)\S*", text):
        raise StudyFileError([f"{where}:1: {found[0]} is another YAML than 1.2, as study files are; remove the line"])
    _check_depth(text, where)
    yaml = YAML(typ="rt", pure=True)
    try:
        root = yaml.load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = one_line(error.problem or "cannot be read")
        raise StudyFileError([f"{where}:{line}: not valid YAML: {problem}"]) from error
    except (YAMLError, ValueError, RecursionError) as error:
        raise StudyFileError([f"{where}:1: not valid YAML: {one_line(str(error))}"]) from error
    if is_overgrown(root):
        raise StudyFileError(
            [f"{where}:1: has more than 100,000 values, or aliases that name themselves; write out what they stand for"]
        )
    return root


class _Reader:
    """Walks one file, collecting a sentence for each problem."""

    def __init__(self, where: str) -> None:
        self.where, self._found = where, list[tuple[int, str]]()

    @property
    def problems(self) -> list[str]:
        """The sentences so far, in the order of their lines."""
        return [text for _, text in sorted(self._found, key=lambda found: found[0])]

    def problem(self, node: Any, key: Any, path: str, text: str) -> None:
        line = 1
        if isinstance(node, (CommentedMap, CommentedSeq)):
            position = node.lc.data.get(key) if node.lc.data and key is not None else None
            line = (position[0] if position else node.lc.line or 0) + 1
        self._found.append((line, f"{self.where}:{line}: {path}: {text}"))

    def mapping(self, parent: Any, key: Any, path: str) -> CommentedMap:
        """Return a mapping below a node; a missing one is empty, another kind is a problem."""
        node = parent.get(key) if isinstance(parent, Mapping) else parent[key]
        if node is None:
            return CommentedMap()
        if isinstance(node, CommentedMap):
            return node
        self.problem(parent, key, path, f"must be a mapping of names to values, got {quoted(_plain(node))}")
        return CommentedMap()

    def known(self, node: CommentedMap, path: str, known: Sequence[str]) -> list[str]:
        """Return the keys that are known, and report the others."""
        good = []
        for key in node:
            if key in known:
                good.append(key)
            else:
                self.problem(node, key, f"{path}{key}", f"is an unknown key{suggestion(key, known)}")
        return good

    def ruled(self, node: CommentedMap, path: str, rules: Mapping[str, Rule]) -> dict[str, Any]:
        """Return the values that their rules accept, and report the others."""
        values = {}
        for key in self.known(node, path, list(rules)):
            value = _plain(node[key])
            wrong = rules[key].problem(value)
            if wrong:
                self.problem(node, key, f"{path}{key}", wrong)
            else:
                values[key] = rules[key].normal(value)
        return values

    def dataset(self, root: CommentedMap) -> dict[str, Any]:
        dataset = self.ruled(self.mapping(root, "dataset", "dataset"), "dataset.", dataset_rules())
        for key, text in unread(dataset):
            self.problem(root["dataset"], key, f"dataset.{key}", text)
        if wrong := _crop_problem(dataset):
            self.problem(root, "dataset", "dataset.crop", wrong)
        return dataset

    def dimension(self, space: CommentedMap, key: str) -> Dimension | None:
        path, before = f"space.{key}", len(self.problems)
        node = self.mapping(space, key, path)
        forms = [form for form in ("choices", "subset_of", "low") if form in node]
        if len(forms) != 1:
            if len(self.problems) == before:
                self.problem(space, key, path, "must have either low and high, or choices, or subset_of")
            return None
        if forms[0] == "low":
            return self._range(space, node, key, path)
        self.known(node, f"{path}.", forms)
        values = _plain(node[forms[0]])
        if not isinstance(values, list) or not values:
            self.problem(node, forms[0], f"{path}.{forms[0]}", f"must be a list with values, got {quoted(values)}")
            return None
        if forms[0] == "subset_of":
            wrong = "can only be sampled for augment" if key != "augment" else TRIAL_RULES[key].problem(values)
            if wrong:
                self.problem(node, "subset_of", f"{path}.subset_of", wrong)
            return SubsetOf(tuple(values))
        for value in values:
            wrong = TRIAL_RULES[key].problem(value)
            if wrong:
                self.problem(node, "choices", f"{path}.choices", wrong)
        if len(set(map(TRIAL_RULES[key].ordered, values))) < len(values):
            self.problem(node, "choices", f"{path}.choices", "has a value twice")
        return Choices(tuple(map(TRIAL_RULES[key].normal, values)))

    def _range(self, space: CommentedMap, node: CommentedMap, key: str, path: str) -> Range | None:
        rule, before = TRIAL_RULES[key], len(self.problems)
        if rule.kind == "other":
            self.problem(space, key, path, "is not a number and cannot have a range; use choices")
            return None
        self.known(node, f"{path}.", ["low", "high", "log", "step"])
        values = _plain(node)
        for end in ("low", "high"):
            value = values.get(end)
            if end not in values:
                self.problem(node, None, f"{path}.{end}", "is missing")
            elif values.get("log") is True and is_number(value) and value <= 0:
                self.problem(node, end, f"{path}.{end}", f"must be > 0 for a log range, got {quoted(value)}")
            elif wrong := rule.problem(value):
                self.problem(node, end, f"{path}.{end}", wrong)
        if wrong := BOOLEAN.problem(values.get("log", False)):
            self.problem(node, "log", f"{path}.log", wrong)
        step = values.get("step")
        if step is not None and not (is_number(step) and step > 0 and (rule.kind == "number" or is_integer(step))):
            self.problem(node, "step", f"{path}.step", f"must be a positive {rule.kind}, got {quoted(step)}")
        if step is not None and values.get("log"):
            self.problem(node, "step", f"{path}.step", "cannot be combined with log; leave one of them out")
        if len(self.problems) > before:
            return None
        if values["low"] > values["high"]:
            self.problem(node, "low", f"{path}.low", f"is above high: {values['low']} > {values['high']}")
        low, high, step = (rule.normal(value) for value in (values["low"], values["high"], step))
        return Range(low, high, values.get("log", False), step, rule.kind == "integer")

    def rows(self, root: CommentedMap) -> tuple[Row, ...]:
        nodes = root.get("rows")
        if nodes is None:
            return ()
        if not isinstance(nodes, CommentedSeq):
            self.problem(root, "rows", "rows", "must be a list, each item starting with - name:")
            return ()
        rows: list[Row] = []
        for index in range(len(nodes)):
            path = f"rows[{index}]"
            node = self.mapping(nodes, index, path)
            self.known(node, f"{path}.", ["name", "set", "reference", "tolerance"])
            name = _plain(node.get("name"))
            if not isinstance(name, str) or not name.strip():
                self.problem(nodes, index, f"{path}.name", "every row needs a name")
            elif _cannot_be_stored(name):
                self.problem(node, "name", f"{path}.name", f"{quoted(name)} has a character that cannot be printed")
            elif name in {row.name for row in rows}:
                self.problem(node, "name", f"{path}.name", f"{quoted(name)} is a duplicate row name")
            settings = self.ruled(self.mapping(node, "set", f"{path}.set"), f"{path}.set.", _VARYING)
            reference = self.ruled(
                self.mapping(node, "reference", f"{path}.reference"), f"{path}.reference.", REFERENCES
            )
            tolerance = self.tolerance(node, f"{path}.")
            rows.append(Row(str(name), settings, reference, tolerance))
        return tuple(rows)

    def expand(self, root: CommentedMap, taken: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        node = self.mapping(root, "expand", "expand")
        expand: dict[str, tuple[Any, ...]] = {}
        for key in self.known(node, "expand.", sorted(schedule_settings() - {"lr"})):
            values, path = _plain(node[key]), f"expand.{key}"
            wrong = (
                [text for value in values if (text := TRIAL_RULES[key].problem(value))]
                if isinstance(values, list)
                else []
            )
            if not isinstance(values, list) or not values:
                self.problem(node, key, path, f"must be a list with values, got {quoted(values)}")
            elif wrong:
                self.problem(node, key, path, wrong[0])
            elif len(set(map(TRIAL_RULES[key].ordered, values))) < len(values):
                self.problem(node, key, path, "has a value twice")
            elif key in taken:
                self.problem(node, key, path, "is also under fixed or space; leave it in one place")
            else:
                expand[key] = tuple(map(TRIAL_RULES[key].normal, values))
        return expand

    def total(self, root: CommentedMap, rows: int, has_space: bool, family: int) -> int:
        """Return the number of trials; ``family`` is how many of them each sampled setting gives, 0 without expand."""
        trials: int = _plain(root.get("trials", rows))
        wrong = integer(1).problem(trials)
        if wrong:
            self.problem(root, "trials", "trials", f"{wrong}; it counts rows and sampled trials together")
        elif not has_space and trials > rows:
            self.problem(root, "trials", "trials", f"asks for {trials} trials, but there are {rows} rows and no space")
        if family and not wrong and (not has_space or (trials - rows) % family):
            fix = (
                f"{rows} rows and a multiple of {family}" if has_space else "a space to sample the other settings from"
            )
            self.problem(root, "expand", "expand", f"each sampled setting gives {family} trials, so it needs {fix}")
        return trials

    def early_stopping(self, root: CommentedMap, taken: Mapping[str, Any]) -> dict[str, Any]:
        node = self.mapping(root, "early_stopping", "early_stopping")
        rules = {key: TRIAL_RULES[key] for key in _EARLY_STOPPING}
        values = self.ruled(node, "early_stopping.", rules)
        if "early_stopping" in root and node.get("patience") is None:
            self.problem(root, "early_stopping", "early_stopping.patience", "is missing")
        if "early_stopping" in root and not root.get("space"):
            text = "is for sampled trials, and there is no space; a row stops early with set: {patience: ...}"
            self.problem(root, "early_stopping", "early_stopping", text)
        for key in taken.keys() & values:
            self.problem(node, key, f"early_stopping.{key}", "is also under fixed or space; leave it in one place")
        return values

    def columns(self, root: CommentedMap) -> tuple[str, ...]:
        """Return the settings and measures that the study's table shows."""
        if root.get("columns") is None:
            return ()
        names, known = _plain(root["columns"]), column_names()
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            example = "must be a list of settings and measures, such as [lr, test/macro_accuracy]"
            self.problem(root, "columns", "columns", f"{example}, got {quoted(names)}")
            return ()
        for place, name in enumerate(names):
            if name not in known:
                text = f"there is no setting or measure {quoted(name)}{suggestion(name, known)}"
                self.problem(root["columns"], place, f"columns[{place}]", text)
            elif name in names[:place]:
                self.problem(root["columns"], place, f"columns[{place}]", f"{quoted(name)} is there twice; remove one")
        return tuple(names)

    def exhaustive(self, root: CommentedMap, definition: StudyDefinition) -> None:
        """Report what keeps an exhaustive sampler from trying the whole space."""
        from caltech_sweep.study.grid import exhaustive_problems

        for path, text in exhaustive_problems(definition):
            top, _, key = path.partition(".")
            list_name, _, index = top.rstrip("]").partition("[")
            node, mark = (root[list_name], int(index)) if index else (root[top], key) if key else (root, top)
            self.problem(node, mark, path, text)

    def tolerance(self, node: CommentedMap, path: str) -> float | None:
        tolerance: float | None = _plain(node.get("tolerance"))
        if tolerance is not None and (wrong := FRACTION.problem(tolerance)):
            self.problem(node, "tolerance", f"{path}tolerance", wrong)
        return tolerance

    def objective(self, root: CommentedMap) -> dict[str, str]:
        """Return the study's measure as a setting of all its trials; the usual one is none."""
        name = _plain(root.get("objective", DEFAULT_OBJECTIVE))
        if wrong := TRIAL_RULES["objective"].problem(name):
            self.problem(root, "objective", "objective", wrong)
        return {"objective": name} if name != DEFAULT_OBJECTIVE and not wrong else {}

    def component(self, root: CommentedMap, key: str) -> Component | None:
        from caltech_sweep.study.components import component_problems

        if root.get(key) is None:
            return None
        node = _plain(self.mapping(root, key, key))
        name = node.pop("name", None)
        component = Component(name, node)
        for argument, text in component_problems(key, component):
            self.problem(root[key], argument if argument != key else "name", f"{key}.{argument}", text)
        return component


_TOP = (
    "title", "dataset", "objective", "trials", "sampler", "pruner", "fixed", "space", "expand", "rows", "tolerance",
    "replicates", "early_stopping", "budget", "columns",
)  # fmt: skip


def _read(reader: _Reader, root: CommentedMap, name: str) -> StudyDefinition:
    reader.known(root, "", _TOP)
    title = _plain(root.get("title", name))
    if not isinstance(title, str) or not title.strip():
        reader.problem(root, "title", "title", f"must be text, got {quoted(title)}")
    elif _cannot_be_stored(title):
        reader.problem(root, "title", "title", f"{quoted(title)} has a character that cannot be printed; remove it")
    dataset = reader.dataset(root)
    fixed = reader.ruled(reader.mapping(root, "fixed", "fixed"), "fixed.", _VARYING)
    fixed.update(reader.objective(root))
    node = reader.mapping(root, "space", "space")
    space = {key: reader.dimension(node, key) for key in reader.known(node, "space.", list(_VARYING))}
    for key in set(space) & set(fixed):
        reader.problem(node, key, f"space.{key}", "is also under fixed; leave it in one of the two")
    expand = reader.expand(root, {**space, **fixed})
    rows = reader.rows(root)
    trials = reader.total(root, len(rows), bool(space), math.prod(map(len, expand.values())) if expand else 0)
    sampler = reader.component(root, "sampler") or Component("tpe", {"seed": 0})
    pruner = reader.component(root, "pruner")
    kept = {key: dimension for key, dimension in space.items() if dimension is not None}
    early_stopping = reader.early_stopping(root, {**space, **fixed})
    budget = reader.ruled(reader.mapping(root, "budget", "budget"), "budget.", BUDGETS)
    tolerance = reader.tolerance(root, "")
    replicates = _plain(root.get("replicates", 1))
    if wrong := integer(1, 10_000).problem(replicates):
        reader.problem(root, "replicates", "replicates", wrong)
    return StudyDefinition(
        name,
        title,
        trials,
        dataset,
        fixed,
        kept,
        rows,
        sampler,
        pruner,
        tolerance=tolerance,
        expand=expand,
        replicates=replicates,
        early_stopping=early_stopping,
        budget=budget,
        columns=reader.columns(root),
    )


def parse_override(text: str) -> tuple[str, Any]:
    """Return the key and value of one ``key=value``, the value read as YAML; raise UsageError for a wrong one."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    known = [*TRIAL_RULES, *(f"dataset.{name}" for name in dataset_rules())]
    if not equals:
        raise UsageError(f"--set {one_line(text)}: must be key=value, such as lr=0.01")
    if key not in known:
        raise UsageError(f"--set {one_line(text)}: there is no setting {quoted(key)}{suggestion(key, known)}")
    try:
        value = _plain(_load_yaml(raw, "--set"))
    except StudyFileError as error:
        raise UsageError(f"--set {one_line(text)}: the value is not valid YAML") from error
    rule = dataset_rules()[key[8:]] if key.startswith("dataset.") else TRIAL_RULES[key]
    wrong = rule.problem(value)
    if wrong:
        raise UsageError(f"--set {one_line(text)}: {key} {wrong}")
    return key, rule.normal(value)


def override(definition: StudyDefinition, overrides: Mapping[str, Any]) -> StudyDefinition:
    """Fix some settings for every trial: out of the space, and in place of what rows set."""
    dataset, fixed, space = dict(definition.dataset), dict(definition.fixed), dict(definition.space)
    expand = {key: values for key, values in definition.expand.items() if key not in overrides}
    for key, value in overrides.items():
        if key.startswith("dataset."):
            dataset[key[8:]] = value
        else:
            fixed[key] = value
            space.pop(key, None)
    early_stopping = {key: value for key, value in definition.early_stopping.items() if key not in overrides}
    rows = tuple(
        replace(row, settings={key: overrides.get(key, value) for key, value in row.settings.items()})
        for row in definition.rows
    )
    recorded = {key: value for key, value in overrides.items() if key.removeprefix("dataset.") not in PLACE_FIELDS}
    if wrong := _crop_problem(dataset):
        raise UsageError(f"dataset.crop: {wrong}; set both")
    return replace(
        definition,
        dataset=dataset,
        fixed=fixed,
        space=space,
        rows=rows,
        overrides=recorded,
        expand=expand,
        early_stopping=early_stopping,
    )


def parse_budget(texts: Sequence[str]) -> dict[str, float]:
    """Return the budget of some ``KEY=NUMBER``, or no budget for ``none``; raise UsageError for a wrong one."""
    budget: dict[str, float] = {}
    for text in texts:
        key, _, raw = text.partition("=")
        if text == "none" and len(texts) == 1:
            continue
        if key not in BUDGETS:
            raise UsageError(f"--budget {text}: must be epochs=NUMBER, hours=NUMBER or none")
        try:
            value = float(raw) if key == "hours" else int(raw)
        except ValueError:
            value = math.nan
        if wrong := BUDGETS[key].problem(value):
            raise UsageError(f"--budget {text}: {key} {wrong.partition(', got')[0]}, such as {key}=400")
        budget[key] = value
    return budget


def dataset_of(study: str | None, overrides: Sequence[str], data: str | None) -> DatasetConfig:
    """Return the dataset of a study, or without one what the overrides and the folder ``data`` say.

    A folder is Caltech-101 where it has some of its folders. Raises UsageError, or StudyFileError.
    """
    if study is not None:
        return load_study(study, overrides, data=data).config({}).dataset
    changes = dict(parse_override(item) for item in overrides)
    for key in changes:
        if not key.startswith("dataset."):
            raise UsageError(f"--set {key}: decides no split; a setting of a dataset starts with dataset.")
    values = {key[8:]: value for key, value in changes.items()}
    root = data if data is not None else values.get("root")
    if root is not None and "name" not in values:
        values["name"] = name_for(paths.expanded(root))
    return TrialConfig.from_dict({"dataset": {**values, "root": root}}).dataset


def find_study(study: str, folder: Path = paths.STUDIES) -> Path:
    """Return the file of a study given by name or by path; raise UsageError with a suggestion."""
    as_path = paths.expanded(study)
    if as_path.suffix in (".yaml", ".yml"):
        if as_path.is_file():
            return as_path
        raise UsageError(f"there is no study file {study}")
    path = folder / f"{study}.yaml"
    if not path.is_file():
        if os.path.lexists(path):
            raise UsageError(f"{path} is no file, or a link to none; put the study file there")
        names = list_studies(folder)
        hint = suggestion(study, names) if names else "; the folder has no study files"
        raise UsageError(f"there is no study {study!r} in {folder}{hint}")
    return path


def list_studies(folder: Path = paths.STUDIES) -> list[str]:
    """Return the names of the study files in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.is_file())


def name_problem(name: str) -> str | None:
    """Return what is wrong with a study's name, which files and folders are named after, or None."""
    if not name.strip():
        return "the name of a study is empty; leave it out for that of its file"
    if name != name.strip() or not name.isprintable():
        return "the name of a study has a space at an end or a character that cannot be printed; remove it"
    if {"", ".", ".."} & set(name.split("/")):
        return "the name of a study leads out of the folder of its files; write words, with a / only between them"
    if len(name.encode()) > _LONGEST_NAME:
        return f"the name of a study is longer than {_LONGEST_NAME} bytes; shorten it"
    return None


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > _LONGEST_FILE:
            raise StudyFileError([f"{path}: has more than {_LONGEST_FILE >> 10} KB; split it into several studies"])
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StudyFileError([f"{path}: cannot be read as UTF-8 text; save it in that encoding"]) from error
    except OSError as error:
        raise StudyFileError([f"{path}: cannot be read: {error.strerror}"]) from error


def _mapping(path: Path, example: str) -> CommentedMap:
    root = _load_yaml(_text_of(path), str(path))
    if not isinstance(root, CommentedMap):
        raise StudyFileError([f"{path}:1: must be a mapping such as `{example}`, got {quoted(_plain(root))}"])
    return root


def read_mapping(path: Path) -> dict[str, Any]:
    """Return what another YAML file than a study's maps; raise StudyFileError as for those."""
    return dict(_plain(_mapping(path, "executor: ray")))


def load_study(
    study: str,
    overrides: Sequence[str] = (),
    *,
    folder: Path = paths.STUDIES,
    trials: int | None = None,
    data: str | None = None,
    name: str | None = None,
    replicates: int | None = None,
    budget: Sequence[str] = (),
) -> StudyDefinition:
    """Read a study by name or path, with ``key=value`` overrides, another total, dataset folder, name or budget.

    Raises StudyFileError with every problem of the file, or UsageError for the arguments.
    """
    path = find_study(study, folder)
    wrong = name_problem(path.stem if name is None else name)
    if wrong:
        raise UsageError(f"{path if name is None else f'--name {name!r}'}: {wrong}")
    root = _mapping(path, "title: My study")
    reader = _Reader(str(path))
    definition = _read(reader, root, name if name is not None else path.stem)
    if not reader.problems:
        reader.exhaustive(root, definition)
    if reader.problems:
        raise StudyFileError(reader.problems)
    changes = dict(parse_override(item) for item in overrides)
    if data is not None:
        changes["dataset.root"] = data
    if trials is not None:
        if trials > len(definition.rows) and not definition.space:
            raise UsageError(f"--trials {trials}: {path} has {len(definition.rows)} rows and no space to sample from")
        definition = replace(definition, trials=trials)
    definition = override(definition, changes)
    if replicates is not None:
        definition = replace(definition, replicates=replicates)
    if budget:
        definition = replace(definition, budget=parse_budget(budget))
    if not definition.space:
        definition = replace(definition, trials=min(definition.trials, len(definition.rows)))
    return definition
