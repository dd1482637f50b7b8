"""Addresses of the stores and names of studies: what is not understood is refused in a sentence that helps."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from caltech_sweep import paths, stores
from caltech_sweep.errors import StoreError, UsageError
from caltech_sweep.report.build import build_report
from caltech_sweep.testing import ScriptedExecutor, run_scripted
from caltech_sweep.tracking.journal import Journal, journal_folder
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.commands import COMMANDS, calls, options
from helpers.places import RUN, invoke
from helpers.studies import DEFINITION

OPTIONS = {"--tracking-uri": stores.tracking_store, "--storage": stores.study_store}
BOTH = tuple(OPTIONS)

# What was given, for which options, what the sentence says, and the address that it offers instead.
REFUSED: tuple[tuple[str, tuple[str, ...], str, str | None], ...] = (
    ("localhost:5000", BOTH[:1], "does not say what kind", "http://localhost:5000"),
    ("[::1]:5000", BOTH[:1], "does not say what kind", "http://[::1]:5000"),
    ("127.0.0.1:5000/mlflow", BOTH[:1], "does not say what kind", "http://127.0.0.1:5000/mlflow"),
    ("localhost:5432", BOTH[1:], "does not say what kind", None),
    ("localhost:port", BOTH, "does not say what kind", None),
    ("localhost", BOTH, "is neither the address of a server", None),
    ("mlflow.example.com", BOTH, "is neither the address of a server", None),
    ("http//localhost:5000", BOTH, "is neither the address of a server", None),
    ("http:/localhost:5000", BOTH[:1], "too few slashes", "http://localhost:5000"),
    ("file:./mlruns", BOTH[:1], "names a folder of files", "mlruns/mlflow.db"),
    ("file:mlruns/optuna.db", BOTH[1:], "names a folder of files", "mlruns/optuna.db"),
    ("file:///srv/mlruns", BOTH[:1], "names a folder of files", "/srv/mlruns/mlflow.db"),
    ("databricks", BOTH, "Databricks, which is not supported", None),
    ("databricks://profile", BOTH, "Databricks, which is not supported", None),
    ("databricks-uc", BOTH, "Databricks, which is not supported", None),
    ("sqlite:relative.db", BOTH, "too few slashes", "sqlite:///relative.db"),
    ("sqlite:/srv/x.db", BOTH, "too few slashes", "sqlite:////srv/x.db"),
    ("sqlite://relative.db", BOTH, "too few slashes", "sqlite:///relative.db"),
    ("sqlite3:///x.db", BOTH, "not known", "sqlite:///x.db"),
    ("sqlite:///:memory:", BOTH, "lost when the command ends", None),
    ("sqlite://", BOTH, "lost when the command ends", None),
    ("sqlite:///file:x.db?mode=memory", BOTH, "an address within the address", "sqlite:///x.db"),
    ("sqlite:///x.db?timeout=3", BOTH, "? and % are special characters", None),
    ("sqlite:///x%20.db", BOTH, "? and % are special characters", None),
    ("postgres://host/db", BOTH, "not known", "postgresql://host/db"),
    ("postgresq://host/db", BOTH, "not known", "postgresql://host/db"),
    ("postgresql:/host/db", BOTH, "too few slashes", "postgresql://host/db"),
    ("postgresql+psycopg3://host/db", BOTH, "a driver that cannot be used", "postgresql+psycopg://host/db"),
    ("postgresql+asyncpg://host/db", BOTH, "a driver that cannot be used", "postgresql://host/db"),
    ("postgresql://host:54x2/db", BOTH, "a port that is not a number", None),
    ("htp://localhost:5000", BOTH[:1], "not known", "http://localhost:5000"),
    ("http://localhost:50x", BOTH[:1], "a port that is not a number", None),
    ("http://localhost:", BOTH[:1], "a port that is not a number", None),
    ("http://localhost:70000", BOTH[:1], "a port that is not a number", None),
    ("http://", BOTH[:1], "names no host", None),
    ("http://::1:5000", BOTH[:1], "a port that is not a number", None),
    ("http://h:5000/#/experiments/1", BOTH[:1], "the address of a web page", "http://h:5000"),
    ("http://localhost:5000", BOTH[1:], "which holds no studies", None),
    ("https://example.com", BOTH[1:], "which holds no studies", None),
    ("redis://localhost", BOTH, "it may start with", None),
    ("://x", BOTH, "it may start with", None),
    ("sweeps", BOTH, "is a folder", None),
    ("sweeps/", BOTH[:1], "is a folder", "sweeps/mlflow.db"),
    ("./none/", BOTH[1:], "is a folder", "./none/optuna.db"),
    ("sqlite:///sweeps", BOTH, "is a folder", None),
    (".", BOTH, "is a folder", None),
    ("/dev/null", BOTH, "is not an ordinary file", None),
    ("~no-such-user/x.db", BOTH, "home folder of a user", None),
    ("$STORES/x.db", BOTH, "a variable that no shell has replaced; write what $STORES stands for", None),
    ("${STORES}/x.db", BOTH, "a variable that no shell has replaced", None),
    ("sqlite:///$STORES/x.db", BOTH, "a variable that no shell has replaced", None),
    ("%STORES%/x.db", BOTH, "a variable that no shell has replaced", None),
    ("", BOTH, "is empty", None),
    ("  ", BOTH, "is empty", None),
    (" x.db", BOTH, "has a space at an end", "x.db"),
    ("x\n.db", BOTH, "cannot be printed", None),
    ("x\0.db", BOTH, "cannot be printed", None),
    (f"{'x' * 300}.db", BOTH, "File name too long", None),
)
CASES = [(text, option, says, offers) for text, given_as, says, offers in REFUSED for option in given_as]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize(("text", "option", "says", "offers"), CASES)
def test_an_address_that_is_not_understood_is_refused_with_what_was_meant(
    place: Path, text: str, option: str, says: str, offers: str | None
) -> None:
    before = files(place)
    result = invoke("plan", "tiny", f"{option}={text}")
    assert result.exit_code == 2 and result.output.count("\n") == 1, result.output
    assert result.output.startswith(f"Error: {option}: ") and says in result.output
    assert ";" in result.output, "it says how to fix it"
    if offers is not None:
        assert offers in result.output
        OPTIONS[option](offers)  # is understood
    assert files(place) == before


@pytest.mark.filterwarnings("ignore")  # of MLflow, where it is imported for models
@pytest.mark.parametrize(
    "path", [p for p in COMMANDS if options(COMMANDS[p], {"tracking_uri", "storage"})], ids="-".join
)
def test_every_command_refuses_what_is_not_understood(place: Path, path: tuple[str, ...]) -> None:
    (place / "image.png").touch()
    before = files(place)
    for option in options(COMMANDS[path], {"tracking_uri", "storage"}):
        for text in ("localhost:5000", "postgres://host/db", ""):
            result = invoke(*next(calls(path)), f"{option}={text}")
            assert result.exit_code == 2 and f"{option}: {text!r} " in result.output, result.output
    assert files(place) == before


def test_the_sentence_names_the_environment_variable_that_is_wrong(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "localhost:5000")
    result = invoke("report")
    assert result.exit_code == 2 and "MLFLOW_TRACKING_URI: 'localhost:5000' " in result.output
    assert "--tracking-uri: 'localhost:1'" in invoke("report", "--tracking-uri", "localhost:1").output
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # as good as none
    assert stores.tracking_store().uri == f"sqlite:///{place.resolve()}/mlruns/mlflow.db"


@pytest.mark.parametrize(
    "text",
    [
        "me:hunter2@localhost:5000",
        "http://me:hunter2@localhost:port",
        "http://me:hun#ter2@localhost",
        "http://me:hunter2@localhost/#/experiments",
        "http://localhost/?token=hunter2#/x",
        "postgres://me:hunter2@host/db",
        "postgres:me:hunter2@host/db",
        "postgresql:/me:hunter2@host/db",
        "postgresql+asyncpg://me:a b://hunter2@host/db",
        "postgresql://me:hunter2@host:x/db",
        "none://me:hunter2@host/db?password=hunter2",
        "sqlite://me:hunter2@host",
        "databricks://hunter2@host",
        "file://me:hunter2@host/mlruns",
    ],
)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_refused_address_keeps_its_secrets(place: Path, option: str, text: str) -> None:
    result = invoke("plan", "tiny", f"{option}={text}")
    assert result.exit_code == 2 and f"{option}: " in result.output
    assert "hunter2" not in result.output and "ter2" not in result.output, result.output


def test_what_is_understood_gets_an_absolute_path_or_stays_as_it_is(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (place / "plain").write_bytes(b"")
    for text, meant in {
        "x.db": f"sqlite:///{place}/x.db",
        "./x:y": f"sqlite:///{place}/x:y",
        "plain": f"sqlite:///{place}/plain",
        "a/../x.sqlite": f"sqlite:///{place}/x.sqlite",
        "sqlite:///x": f"sqlite:///{place}/x",
        "sqlite+pysqlite:///x.db": f"sqlite:///{place}/x.db",
        "SQLite:////srv/x.db": "sqlite:////srv/x.db",
        "sqlite://///srv/x.db": "sqlite:////srv/x.db",
        "~/x.db": f"sqlite:///{home}/x.db",
        "sqlite:///~/x.db": f"sqlite:///{home}/x.db",
        "mysql+pymysql://u:p@h/db": "mysql+pymysql://u:p@h/db",
        "postgresql+psycopg2:///db?host=/run/x": "postgresql+psycopg2:///db?host=/run/x",
    }.items():
        for read in OPTIONS.values():
            assert read(text).uri == meant == read(meant).uri
    for text in ("http://h", "http://u:p@[::1]:5000/a?x=1", "https://h:5000/mlflow/"):
        assert stores.tracking_store(text).uri == text
    assert stores.tracking_store("HTTP://h:1").uri == "http://h:1"


def test_postgresql_takes_the_driver_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg")
    assert stores.study_store("postgresql://h/db").uri == "postgresql+psycopg://h/db"
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.setitem(sys.modules, "psycopg2", sys)
    assert stores.study_store("postgresql://h/db").uri == "postgresql+psycopg2://h/db"
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(UsageError, match=r"pip install 'caltech-sweep\[postgresql\]'"):
        stores.study_store("postgresql://h/db")


# -- any text ----------------------------------------------------------------------------------------------------------

STARTS = ("", "sqlite:", "sqlite:/", "sqlite://", "sqlite:///", "sqlite:////", "http://", "https:", "postgresql://")
STARTS += ("postgres://", "mysql+", "file:", "databricks", "~", "./", "../", "/", "localhost:", "u:p@", "[")
TEXTS = st.tuples(st.sampled_from(STARTS), st.text(max_size=30)).map("".join) | st.text(
    st.sampled_from("ab1:/@#?%.~[] \\\0\n-+=&"), max_size=30
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, option=st.sampled_from(BOTH))
@example(text="http://[", option="--tracking-uri")
@example(text="sqlite:///\ud800", option="--storage")
def test_any_text_is_understood_the_same_twice_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    read = OPTIONS[option]
    try:
        meant = read(text)
    except UsageError as error:
        assert str(error).startswith(f"{option}: ") and "\n" not in str(error)
    else:
        assert read(meant.uri) == meant and meant.is_same(meant)
        file = meant.file
        assert file is None or (file.is_absolute() and not file.is_dir())
    assert not list(tmp_path.iterdir())


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_no_text_gives_a_traceback_or_makes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    for option, read in OPTIONS.items():
        with suppress(UsageError):
            assume(read(text).file)  # no network
        command = "report" if option == "--tracking-uri" else "doctor"
        result = invoke(command, f"{option}={text}")  # raises what is no sentence
        assert result.exit_code == 2 and result.output.startswith("Error: "), result.output
    assert not list(tmp_path.iterdir())


# -- one database in two ways ------------------------------------------------------------------------------------------


def test_two_addresses_of_one_file_are_refused_for_both_stores(place: Path) -> None:
    (place / "x.db").write_bytes(b"")
    os.link(place / "x.db", place / "hard.db")
    (place / "soft.db").symlink_to("x.db")
    (place / "there").symlink_to(place)
    (place / "to-none.db").symlink_to("none.db")
    pairs = [("x.db", other) for other in ("hard.db", "soft.db", "there/x.db", f"sqlite:///{place}/x.db", "a/../x.db")]
    for one, other in [*pairs, ("none.db", "to-none.db"), ("none/y.db", "there/none/y.db")]:
        for first, second in ((one, other), (other, one)):
            result = invoke("plan", "tiny", "--tracking-uri", first, "--storage", second)
            assert result.exit_code == 2 and "cannot share one database" in result.output, (first, second)
    assert invoke("plan", "tiny", "--tracking-uri", "none.db", "--storage", "other.db").exit_code == 0


SAME = "postgresql://me:a@localhost/db"


@pytest.mark.parametrize(
    "other",
    [
        "postgresql+psycopg2://me:a@localhost/db",
        "postgresql://you:b@127.0.0.1:5432/db",
        "postgresql://[::1]/db?sslmode=require",
        "postgresql:///db",
        "postgresql:///db?host=/var/run/postgresql",
        "postgresql://LOCALHOST/db",
        "postgresql://?host=localhost&port=5432&dbname=db",
    ],
)
def test_two_addresses_of_one_database_on_a_server_are_refused_for_both_stores(place: Path, other: str) -> None:
    result = invoke("plan", "tiny", "--tracking-uri", SAME, "--storage", other)
    assert result.exit_code == 2 and "cannot share one database" in result.output, result.output


def test_other_databases_are_not_told_to_be_the_same() -> None:
    one = stores.study_store(SAME)
    for other in (
        "postgresql://localhost/other",
        "postgresql://localhost:5433/db",
        "postgresql://host/db",
        "postgresql://localhost/db?options=-csearch_path%3Dmlflow",
        "mysql://localhost/db",
        "db.db",
    ):
        assert not one.is_same(stores.study_store(other)), other


# -- names of studies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x", "x/../../y", "/srv/x", "..", ".", "a//b", "a/", "", " ", "a\nb", "a ", "x" * 200]
)
@pytest.mark.parametrize("command", [RUN, ("plan", "tiny")], ids=["run", "plan"])
def test_a_name_that_leaves_its_folder_is_refused(place: Path, command: tuple[str, ...], name: str) -> None:
    before = files(place)
    result = invoke(*command, f"--name={name}")
    assert result.exit_code == 2 and f"Error: --name {name!r}: " in result.output, result.output
    assert files(place) == before and not (place.parent / "x").exists()


@given(one=st.text("ab_/%2F5"), other=st.text("ab_/%2F5"))
def test_every_study_has_file_names_of_its_own(one: str, other: str) -> None:
    assert "/" not in paths.file_name(one) and paths.study_name(paths.file_name(one)) == one
    assert (paths.file_name(one) == paths.file_name(other)) == (one == other)


def test_studies_whose_names_are_alike_do_not_lock_each_other(place: Path) -> None:
    store = stores.study_store("x.db")
    names = ("team/b", "team_b", "team%2Fb", "team%b")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(stores.study_lock(store, name))
        for name in names:
            with pytest.raises(StoreError, match="is being run by"), stores.study_lock(store, name):
                raise AssertionError
    assert len({journal_folder(place, name, store) for name in names}) == len(names)


@pytest.mark.slow
def test_what_waits_in_a_journal_of_an_earlier_version_is_found(copied: Path) -> None:
    run = (*RUN, "--name", "team/b", "--row", "First", "--set", "epochs=1")
    assert invoke(*run).exit_code == 0 and invoke(*RUN, "--name", "team_b", *run[7:]).exit_code == 0
    tracker = MlflowTracker()
    uri = stores.tracking_store().uri
    folder = copied / "mlruns" / "journal" / f"team_b-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"
    study = tracker.study("team/b")
    assert study is not None
    (trial,) = tracker.trials(study)
    for command in (("replay",), ("doctor", "--fix"), run):
        journal = Journal(folder)
        journal.add("log_params", {"run_id": trial.run_id, "params": {command[0]: "1"}})
        journal.add("finish_study", {"name": "team/b", "complete": False})
        looked = invoke("doctor", "team/b")
        assert looked.exit_code == 1 and "team/b: would fix: 2 writes in" in looked.output, looked.output
        result = invoke(*command)
        assert result.exit_code == 0, result.output
        assert tracker.client.get_run(trial.run_id).data.params[command[0]] == "1"
        assert not folder.exists()
    assert "nothing waits" in invoke("replay").output and invoke("doctor").exit_code == 0


def test_a_journal_is_found_however_the_address_of_its_store_is_written(tmp_path: Path) -> None:
    def folder(text: str) -> Path:
        return journal_folder(tmp_path, "s", stores.tracking_store(text))

    assert folder(SAME) == folder("postgresql+psycopg2://other:secret@127.0.0.1:5432/db") != folder("postgresql:///x")
    assert folder("http://me:a@localhost:5000/") == folder("http://127.0.0.1:5000") != folder("http://127.0.0.1:5001")
    assert not re.search("secret|me", str(folder(SAME).name))


def test_only_a_store_that_is_being_made_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    def waits(address: str) -> int:
        engine = sa.create_engine(address)
        with engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE IF NOT EXISTS t (n)"))
            found: int = connection.execute(sa.text("PRAGMA synchronous")).scalar_one()
        engine.dispose()
        return found

    store, seen = stores.study_store(str(tmp_path / "odd #place & more.db")), []
    store.make_whole(lambda address: seen.append((waits(address), waits(f"sqlite:///{tmp_path}/other.db"))))
    assert seen == [(0, 2)] and waits(store.uri) == 2


CLOSES = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1])
print(*database.execute("SELECT count(*) FROM runs").fetchone())
database.close()
"""


def test_a_look_at_a_store_that_this_process_writes_keeps_its_locks(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    tracker = MlflowTracker(str(file), create=True)
    run_scripted(replace(DEFINITION, trials=2), ScriptedExecutor(), tracker)
    log = Path(f"{file}-wal")  # which the last process that closes the store takes away
    before = log.stat().st_ino
    assert "One" in build_report([DEFINITION.name], "markdown", 3, tracker.store)  # as a run's description is made
    look = [sys.executable, "-c", CLOSES, str(file)]
    for runs in (3, 4):
        assert subprocess.run(look, capture_output=True, text=True, check=True).stdout == f"{runs}\n"
        assert log.exists() and log.stat().st_ino == before
        tracker.client.create_run("0")
