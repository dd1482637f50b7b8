"""Who may import whom: read off the import statements."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import caltech_sweep

ROOT = Path(caltech_sweep.__file__).parent
MODULES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def users_of(package: str) -> set[str]:
    return {name for name, path in MODULES.items() if any(i.split(".")[0] == package for i in imports(path))}


def test_one_package_imports_optuna() -> None:
    assert {name.split("/")[0] for name in users_of("optuna")} <= {"sweep", "testing.py"}


def test_mlflow_stays_with_the_tracking_store_and_the_champion() -> None:
    allowed = {"tracking.py", "tracking_read.py", "tracking_history.py", "champion.py", "served_model.py"}
    assert users_of("mlflow") <= allowed


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("data/", ("training", "sweep", "report", "tracking", "cli")),
        ("training/", ("sweep", "report", "tracking", "cli")),
        ("report/", ("sweep", "training", "cli")),
        ("config.py", ("data", "training", "sweep", "report", "tracking", "cli")),
        ("records.py", ("data", "training", "sweep", "report", "tracking", "cli")),
    ],
)
def test_imports_point_one_way(room: str, forbidden: tuple[str, ...]) -> None:
    for name, path in MODULES.items():
        if name.startswith(room):
            crossed = {i for i in imports(path) for f in forbidden if i.startswith(f"caltech_sweep.{f}")}
            assert not crossed, f"{name} imports {crossed}"


def test_the_command_line_imports_nothing_heavy_at_the_top() -> None:
    heavy = {"torch", "torchvision", "mlflow", "optuna", "numpy", "matplotlib", "sqlalchemy", "rich"}
    assert not {i.split(".")[0] for i in imports(MODULES["cli.py"], top_level_only=True)} & heavy


def test_no_function_is_longer_than_a_screen() -> None:
    long = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
                length = node.end_lineno - node.lineno + 1
                if length > 50:
                    long.append(f"{name}: {node.name} has {length} lines")
    assert not long
