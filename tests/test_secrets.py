"""No command tells a secret of a store's address, however it is spelled and whatever the store answers."""

from __future__ import annotations

import http.server
import itertools
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import click
import pytest
from PIL import Image

from caltech_sweep import stores
from caltech_sweep.errors import UsageError
from caltech_sweep.tracking.journal import Journal, journal_folder
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.commands import COMMANDS, TAKES_ADDRESS, TAKES_OTHER_TEXT, calls, options
from helpers.places import invoke

SECRET = "hunter2"
SPELLED = (SECRET, "%68unter2", "%32", "aHVudGVyMg", "dXNlcjpodW50ZXIy")  # percent-encoded, and in base64
SERVERS = (
    f"http://user:{SECRET}@HOST",
    f"http://user:a/{SECRET}@HOST",
    f"http://user:p@{SECRET}@HOST",
    f"http://{SECRET}@HOST",
    "http://user:x%2F%68unter2%40y@HOST",
    f"http://HOST/?token={SECRET}",
    f"http://HOST/mlflow?x=1&api_key={SECRET}",
    f"http://HOST?access-token=hunter%32&password={SECRET}",
)
ADDRESSES = (
    *(address.replace("HOST", "127.0.0.1:9") for address in SERVERS),
    f"postgresql://user:{SECRET}@127.0.0.1:9/db",
    f"postgresql://user:a/{SECRET}@127.0.0.1:9/db",
    f"postgresql+psycopg://user:p@{SECRET}@127.0.0.1:9/db",
    f"postgresql+psycopg://user:p@{SECRET}/x@127.0.0.1:9/db",
    "postgresql://user:%68unter2@127.0.0.1:9/db",
    f"postgresql://127.0.0.1:9/db?user=me&password={SECRET}",
    f"postgresql://127.0.0.1:9/db?sslmode=require&sslpassword={SECRET}",
    f"postgresql://127.0.0.1:port/db?passfile=x&password={SECRET}",
    f"mysql+pymysql://user:p@{SECRET}@127.0.0.1:9/db",
    f"mssql+pyodbc://user:{SECRET}@127.0.0.1:9/db?odbc_connect=PWD={SECRET}",
    f"no-such-kind://user:{SECRET}@host/db?password={SECRET}",
    f"sqlite:///nowhere.db?password={SECRET}",
    f"s3://key:{SECRET}@bucket/path",
)

FEW = (SERVERS[5].replace("HOST", "127.0.0.1:9"), f"postgresql+psycopg://user:p@{SECRET}@127.0.0.1:9/db")


ANSWERS = [(0, 403), (1, 403), (2, 404), (1, 200)]


def test_every_text_that_a_command_takes_is_known_to_be_an_address_or_not() -> None:
    for path, command in COMMANDS.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option) and isinstance(
                parameter.type, (click.types.StringParamType, click.Tuple)
            ):
                assert parameter.name in TAKES_ADDRESS | TAKES_OTHER_TEXT, (path, parameter.name)
    assert len(COMMANDS) > 10 and ("data", "list") in COMMANDS and ("data",) in COMMANDS


def check(arguments: list[str], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> int:
    """Run a command; return its exit code."""
    result = invoke(*arguments)
    told = "".join([result.output, result.stderr, caplog.text, *capfd.readouterr()])
    for spelled in SPELLED:
        assert spelled not in told and spelled not in unquote(told), arguments
    assert "Traceback" not in told, arguments
    return result.exit_code


@contextmanager
def something_to_replay(address: str) -> Iterator[None]:
    """Let a write wait for a tracking store, without which no replay opens it."""
    try:
        uri = stores.tracking_store(address)
    except UsageError:  # it is understood as no store: nothing can wait for it
        yield
        return
    journal = journal_folder(Path("mlruns").resolve(), "tiny", uri)
    Journal(journal).add("log_params", {"run_id": "0" * 32, "params": {}})
    yield
    shutil.rmtree(journal, ignore_errors=True)


@pytest.fixture
def working(finished: Path) -> Path:
    Image.new("RGB", (40, 40)).save(finished / "image.png")
    return finished


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("addresses", [FEW, pytest.param(ADDRESSES, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("path", COMMANDS, ids="-".join)
def test_no_command_tells_a_secret_of_an_address_that_cannot_be_opened(
    path: tuple[str, ...],
    addresses: tuple[str, ...],
    working: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for option in options(COMMANDS[path], TAKES_ADDRESS):
        for address in addresses:
            with something_to_replay(address):
                code = check([*next(calls(path)), option, address], caplog, capfd)
            assert code in (1, 2) or path == ("plan",) or (*path, option) == ("replay", "--storage"), (address, path)
    if path != ("data",):  # it would download
        monkeypatch.setenv("MLFLOW_TRACKING_URI", addresses[-1])
        for call in calls(path):
            check(call, caplog, capfd)


class Echo(http.server.BaseHTTPRequestHandler):
    """A server that is healthy, and answers all but the first ``good`` other requests with what it was asked."""

    good, status, asked = 0, 403, 0

    def do_GET(self) -> None:
        if self.path.startswith("/health") or "/mlflow/health" in self.path:
            return self.answer(200, "OK")
        kind = type(self)
        kind.asked += 1
        if kind.asked <= kind.good:
            return self.answer(200, "{}")
        told = {"url": self.path, "plain": unquote(self.path), "headers": dict(self.headers)}
        text = f"no: {json.dumps(told)} at http://user:{SECRET}@here/?token={SECRET} password={SECRET}"
        self.answer(kind.status, text)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def answer(self, status: int, text: str) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def echoing(good: int, status: int) -> Iterator[tuple[type[Echo], str]]:
    kind = type("Kind", (Echo,), {"good": good, "status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield kind, f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", [p for p in COMMANDS if options(COMMANDS[p], {"tracking_uri"})], ids="-".join)
@pytest.mark.parametrize(
    ("good", "status", "servers"),
    [(1, 403, SERVERS[2:6:3]), *(pytest.param(g, s, SERVERS, marks=pytest.mark.slow) for g, s in ANSWERS)],
)
def test_no_command_tells_a_secret_that_a_failing_server_repeats(
    path: tuple[str, ...],
    good: int,
    status: int,
    servers: tuple[str, ...],
    working: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with echoing(good, status) as (kind, host):
        for address in servers:
            for call in calls(path):
                kind.asked = 0
                check([*call, "--tracking-uri", address.replace("HOST", host)], caplog, capfd)


def test_a_server_whose_address_names_a_user_is_found_and_told_who_asks(finished: Path) -> None:
    seen: list[str | None] = []

    class Asked(Echo):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.answer(200, "{}")

        do_POST = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Asked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        MlflowTracker(f"http://user:p%40ss@127.0.0.1:{server.server_port}")
        server.shutdown()
    assert seen[-1] == "Basic dXNlcjpwQHNz"  # user:p@ss


def test_what_hides_secrets_hides_all_of_them_and_nothing_else() -> None:
    for text, shown in {
        "postgresql://me:a@b/c@host/db": "postgresql://***@host/db",
        "cannot reach http://u:p@h:5000/x and s3://k:s@b": "cannot reach http://***@h:5000/x and s3://***@b",
        "postgresql://host/db?user=me&password=pw&sslkey=k": "postgresql://host/db?user=me&password=***&sslkey=***",
        "http://h/?X-Amz-Signature=s&X-Amz-Credential=c&sig=z": "http://h/?X-Amz-Signature=***&X-Amz-Credential=***&sig=***",
        "host=h user=u password=pw dbname=d": "host=h user=u password=*** dbname=d",
        "Authorization: Bearer abcdefgh": "Authorization: Bearer ***",
        "sqlite:///a/b.db": "sqlite:///a/b.db",
        "mail someone@example.org about sqlite:///a/b.db": "mail someone@example.org about sqlite:///a/b.db",
        "basic statistics of a monkey = 3, --set lr=0.1": "basic statistics of a monkey = 3, --set lr=0.1",
    }.items():
        assert stores.hide_secrets(text) == shown
    address = "postgresql://me:p@hunter2/xyz@host/db"
    for cut in ("p@hunter2/xyz", "hunter2/xyz", "hunter2"):
        told = stores.hide_secrets(f'could not translate host name "{cut}@host"', address)
        assert told.endswith('***@host"') and not set(re.split(r"\W", cut)) & set(re.split(r"\W", told)) - {"p"}, told


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_command_opens_another_store_than_the_named_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for folder in ("sweeps", "data"):
        (tmp_path / folder).symlink_to(finished / folder)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40)).save("image.png")
    named = {"--tracking-uri": "else/where/mlflow.db", "--storage": "else/where/optuna.db"}
    order = sorted((p for p in COMMANDS if options(COMMANDS[p], {"tracking_uri"})), key=lambda p: p != ("run",))
    assert order[0] == ("run",)
    for path in order:
        for call in calls(path):
            if path == ("ui",) or "0" * 32 in call:  # it would serve; there is no such run
                continue
            taken = [option for option in options(COMMANDS[path], TAKES_ADDRESS) if option in named]
            result = invoke(*call, *itertools.chain(*((option, named[option]) for option in taken)))
            assert result.exit_code == 0, (call, result.output)
            if path == ("run",):
                assert invoke("promote", "tiny", "--tracking-uri", named["--tracking-uri"]).exit_code == 0
    assert not (tmp_path / "mlruns").exists() and not list(tmp_path.glob("*.db"))
