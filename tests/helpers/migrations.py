"""MLflow's migrations of a new SQLite database, run once a session: they take a second each time."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

UTILS = "mlflow.store.db.utils"
SECONDS = 60


def migrate_once(template: Path) -> None:
    """Let MLflow, where it is imported, fill each later new SQLite database with a copy of the first, ``template``."""
    utils = sys.modules.get(UTILS)
    if utils is not None and not hasattr(utils._upgrade_db, "template"):
        utils._upgrade_db = _copying(utils._upgrade_db, template)


def _copying(migrate: Callable[[Any], None], template: Path) -> Callable[[Any], None]:
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

    upgrade.template = template  # type: ignore[attr-defined]
    return upgrade


def _copy(source: str | Path, target: str | Path) -> None:
    with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target, timeout=SECONDS)) as other:
        one.backup(other)
