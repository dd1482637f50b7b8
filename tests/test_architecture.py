"""Who may import whom: read off the import statements."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import caltech_sweep

ROOT = Path(caltech_sweep.__file__).parent
MODULES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """Return all nodes of a module's syntax; its file is read once."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def imports(path: Path, top_level_only: bool = False) -> set[str]:
    nodes = nodes_of(path)
    if top_level_only:
        assert isinstance(nodes[0], ast.Module)
        nodes = list(nodes[0].body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def users_of(package: str) -> set[str]:
    return {name for name, path in MODULES.items() if any(i.split(".")[0] == package for i in imports(path))}


def room(module: str) -> str:
    """Return the part of a dotted module name that names its room: the longest that has a floor."""
    parts = module.split(".")[1:]
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in LEVEL), parts[0])


def dotted(name: str) -> str:
    return f"caltech_sweep.{name.removesuffix('.py').replace('/', '.').removesuffix('.__init__')}"


# The floors, from the top: a module may import from its own room and from those below.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli", "testing"),
    ("serving", "sweep"),
    ("training", "report"),
    ("tracking",),
    ("artifacts",),
    ("study",),
    ("data",),
    ("stores",),
    ("addresses", "files"),
    ("config",),
    ("training.schedule", "training.augment", "metrics", "rules"),  # the registries that a config's rules name
    ("training.image_ops",),
    ("heartbeat", "seeds", "text", "paths"),
    ("errors", "machine", "__version__"),
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def test_every_room_has_a_floor() -> None:
    assert {room(dotted(name)) for name in MODULES if name != "__init__.py"} == LEVEL.keys() - {"__version__"}


def test_imports_point_downwards() -> None:
    upward = []
    for name, path in MODULES.items():
        own = room(dotted(name)) if name != "__init__.py" else "__init__"
        for found in imports(path):
            other = room(found) if found.startswith("caltech_sweep.") else own
            if own not in (other, "__init__") and LEVEL[other] <= LEVEL[own]:
                upward.append(f"{name} imports {found}")
    assert not upward


def test_no_module_imports_itself_through_others() -> None:
    known = {dotted(name) for name in MODULES}
    graph = {dotted(name): imports(path) & known for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_optuna_is_imported_by_the_sweep_and_what_names_its_parts() -> None:
    allowed = {"study/components.py", "report/page/importance.py", "testing.py"}
    assert {name for name in users_of("optuna") if not name.startswith("sweep/")} <= allowed


def test_what_starts_the_workers_is_loaded_without_mlflow_and_optuna() -> None:
    known = {dotted(name): path for name, path in MODULES.items()}
    seen, wanted = set[str](), {"caltech_sweep.sweep.options"}
    while new := (wanted & known.keys()) - seen:
        seen |= new
        wanted |= {found for name in new for found in imports(known[name], top_level_only=True)}
    assert {"multiprocessing", "caltech_sweep.sweep.executors.worker"} <= wanted
    assert not {name.split(".")[0] for name in wanted} & {"mlflow", "optuna"}


def test_mlflow_is_imported_by_tracking_and_serving_only() -> None:
    assert {name.split("/")[0] for name in users_of("mlflow")} == {"tracking", "serving"}


def test_ray_is_imported_by_its_executor_only_and_by_nothing_that_runs_without_it() -> None:
    assert users_of("ray") == {"sweep/executors/cluster.py", "sweep/executors/ray.py"}
    own = {"caltech_sweep.sweep.executors.cluster", "caltech_sweep.sweep.executors.ray"}
    users = {name for name, path in MODULES.items() if imports(path, top_level_only=True) & own}
    assert users == {"sweep/executors/ray.py"}


# What is private of a library, and the modules that may use it.
PRIVATE = {
    r"\._thread_local\b|study\._storage\b|\._study_id\b|optuna\.\w*\._|optuna\.storages\._rdb": {
        "sweep/optuna_store.py",
        "sweep/optuna_trials.py",
        "sweep/owned_storage.py",
        "sweep/ownership.py",
    },
    r"mlflow\.store|mlflow\.tracking\._|_tracking_client|mlflow\.utils\.(validation|uri|file_utils)|MlflowClient\(": {
        "tracking/client.py"
    },
    r"ray\._private": {"sweep/executors/cluster.py"},
}


@pytest.mark.parametrize("private", PRIVATE)
def test_private_parts_of_a_library_have_few_users(private: str) -> None:
    users = {name for name, path in MODULES.items() if re.search(private, path.read_text(encoding="utf-8"))}
    assert users <= PRIVATE[private]


def test_the_command_line_imports_nothing_heavy_at_the_top() -> None:
    heavy = {"torch", "torchvision", "mlflow", "optuna", "numpy", "matplotlib", "sqlalchemy", "rich"}
    assert not {i.split(".")[0] for i in imports(MODULES["cli.py"], top_level_only=True)} & heavy


def test_no_function_is_longer_than_a_screen() -> None:
    long = []
    for name, path in MODULES.items():
        for node in nodes_of(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
                length = node.end_lineno - node.lineno + 1
                if length > 50:
                    long.append(f"{name}: {node.name} has {length} lines")
    assert not long


def test_one_module_locks_files_and_only_a_library_knows_how() -> None:
    assert users_of("filelock") == {"files.py"} and not users_of("fcntl") | users_of("msvcrt")


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_no_test_imports_another_but_what_they_share_lies_in_helpers(path: Path) -> None:
    text, modules = path.read_text(encoding="utf-8"), {name.split(".")[0] for name in imports(path)}
    in_code_of_its_own = re.findall(r"^from (test_\w+|conftest) import", text, re.M)  # that it hands to another process
    assert not [name for name in (*modules, *in_code_of_its_own) if name == "conftest" or name.startswith("test_")]
    assert path.parent.name != "helpers" or "def test_" not in text
