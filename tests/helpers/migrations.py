"""What MLflow and Optuna do for each new SQLite database, done once a session: it takes a tenth of a second each time.

Both create tables and run or read all migrations. Here the first database of each is kept as a template, and later ones
begin as copies of it; the newest version of a schema is looked up once.
"""

from __future__ import annotations

import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

UTILS, STORAGE = "mlflow.store.db.utils", "optuna.storages._rdb.storage"
SECONDS = 60


def migrate_once(folder: Path) -> None:
    """Let MLflow and Optuna, where they are imported, fill each later new SQLite database from one in ``folder``."""
    for name, change in ((UTILS, _change_mlflow), (STORAGE, _change_optuna)):
        module = sys.modules.get(name)
        if module is not None and not hasattr(module, "template"):
            module.template = folder / f"{name}.db"  # type: ignore[attr-defined]
            change(module, folder / f"{name}.db")


def _change_mlflow(utils: ModuleType, template: Path) -> None:
    migrate = utils._upgrade_db

    def upgrade(engine: Any) -> None:
        import sqlalchemy as sa

        if engine.dialect.name != "sqlite" or sa.inspect(engine).has_table("alembic_version"):
            migrate(engine)
            return
        if not template.exists():
            migrate(engine)
            _copy(engine.url.database, template)
            return
        _copy(template, engine.url.database)

    utils._upgrade_db = upgrade
    utils._get_latest_schema_revision = _once(utils._get_latest_schema_revision)


def _change_optuna(storage: ModuleType, template: Path) -> None:
    make, manager = storage.RDBStorage.__init__, storage._VersionManager

    def begin(self: Any, url: str, *arguments: Any, **named: Any) -> None:
        file = Path(url.removeprefix("sqlite:///"))
        new = url.startswith("sqlite:////") and file.parent.is_dir() and not (file.exists() and file.stat().st_size)
        if new and template.exists():
            try:
                shutil.copyfile(template, file)
            except OSError:  # which Optuna itself is to meet
                with suppress(OSError):
                    file.unlink()
        make(self, url, *arguments, **named)
        if new and not template.exists():
            _copy(file, template)

    storage.RDBStorage.__init__ = begin
    manager.get_head_version = _once(manager.get_head_version)


def _once(ask: Callable[..., str]) -> Callable[..., str]:
    answers: list[str] = []

    def answer(*arguments: Any) -> str:
        if not answers:
            answers.append(ask(*arguments))
        return answers[0]

    return answer


def _copy(source: str | Path, target: str | Path) -> None:
    with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target, timeout=SECONDS)) as other:
        other.execute("PRAGMA synchronous=OFF")
        one.backup(other)
