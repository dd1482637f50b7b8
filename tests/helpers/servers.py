"""Real servers on loopback: one of files that tests make misbehave, MLflow's own, PostgreSQL, and any with /health."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest


@dataclass
class FileServer:
    """What is served, how it misbehaves, and the Range headers that were asked for."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True  # answer Range with 206, else send the whole file
    cut: int | None = None  # end each body after so many bytes, whatever Content-Length said
    statuses: list[int] = field(default_factory=list)  # answer the next requests with these errors; 0: hang up
    shift: int = 0  # send another range than was asked for
    lengths: bool = True  # say Content-Length
    asked: list[str | None] = field(default_factory=list)

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"


class _Handler(BaseHTTPRequestHandler):
    state: FileServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        state = self.state
        state.asked.append(self.headers.get("Range"))
        body = state.files.get(self.path.partition("?")[0].lstrip("/"))
        if state.statuses or body is None:
            self._answer(state.statuses.pop(0) if state.statuses else 404, {"Content-Length": "0"}, b"")
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not (asked and state.ranges):
            self._answer(200, {}, body)
            return
        start = int(asked[1]) + state.shift
        if start >= len(body):
            self._answer(416, {}, b"")
            return
        self._answer(206, {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}, body[start:])

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        if not status:
            return
        self.send_response(status)
        if self.state.lengths:
            headers = {"Content-Length": str(len(body)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: self.state.cut])


@contextmanager
def serve() -> Iterator[FileServer]:
    """Serve until the block ends."""
    state = FileServer()
    handler = type("Handler", (_Handler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.address = f"http://127.0.0.1:{server.server_port}"
        with _serving(server):
            yield state


@contextmanager
def _serving(server: HTTPServer) -> Iterator[None]:
    """Answer in a thread until the block ends."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


def free_port() -> int:
    """Return a port of loopback that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def answering(
    command: Sequence[str],
    log: Path,
    port: int | None = None,
    *,
    cwd: Path | None = None,
    end: signal.Signals = signal.SIGTERM,
    **environment: str,
) -> Iterator[str]:
    """Run a server that takes ``--port`` in a process group of its own; yield its address once it answers.

    The signal ``end`` goes to the group when the block ends, and must end it within half a minute.
    """
    port = port or free_port()
    with log.open("a") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=cwd,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", **environment},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            _wait_until_it_answers(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}"
            os.killpg(process.pid, end)
            process.wait(30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float = 180) -> None:
    limit = time.monotonic() + seconds
    while True:
        try:
            urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < limit, log.read_text()
            time.sleep(0.2)


def mlflow_server(store: str, log: Path) -> AbstractContextManager[str]:
    """Serve a tracking store with MLflow, and yield its address."""
    return answering([sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"], log)


Rule = Callable[[str, str, int], int | None]  # from method, path and body's length to a status; None lets it through
HANG, HANG_UP = 0, -1  # in place of a status: never answer, or close the connection


@dataclass
class Gate:
    """MLflow's own server in this process, behind a proxy that answers some requests itself, by a rule."""

    address: str
    rule: Rule = field(default=lambda method, path, length: None)
    both_sides: bool = False  # clients need a certificate, too
    wants: str | None = None  # the Authorization that every request must have
    asked: list[tuple[str, str]] = field(default_factory=list)
    opened: threading.Event = field(default_factory=threading.Event)  # lets go what hangs

    def close_after(self, requests: int, status: int) -> None:
        """Answer everything but the first few requests with a status."""
        left = iter(range(requests))
        self.rule = lambda method, path, length: None if next(left, None) is not None else status

    def open(self) -> None:
        """Let everything through."""
        self.rule = lambda method, path, length: None
        self.opened.set()
        self.opened = threading.Event()


@contextmanager
def gated_mlflow(folder: Path, tls: ssl.SSLContext | None = None) -> Iterator[Gate]:
    """Serve an MLflow store in ``folder`` from this process, through a gate, over HTTPS where ``tls`` is given."""
    server_only = {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server_only.items():
            patch.setenv(name, value)
        with warnings.catch_warnings():  # of its web frameworks, about one another
            warnings.simplefilter("ignore")
            import mlflow.server.fastapi_app
            from mlflow.server import handlers
        from werkzeug.serving import WSGIRequestHandler, make_server

        for name in ("_tracking_store", "_artifact_repo", "_model_registry_store"):
            patch.setattr(handlers, name, None)
        gate = Gate("")

        def answer(environ: dict[str, Any], start_response: Any) -> Any:
            method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
            gate.asked.append((method, path))
            environ["HTTP_HOST"] = "localhost"  # whichever host was asked for: a gate may be a proxy
            status = gate.rule(method, path, int(environ.get("CONTENT_LENGTH") or 0))
            if gate.wants is not None and environ.get("HTTP_AUTHORIZATION") != gate.wants:
                status = 401
            if status is None:
                return mlflow.server.app(environ, start_response)
            if status == HANG:
                gate.opened.wait(60)
            if status == HANG_UP:
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            start_response(f"{status if status > 0 else 503} Refused", [("Content-Type", "text/plain")])
            return [b"not so"]

        quiet = type("Quiet", (WSGIRequestHandler,), {"log": lambda *_: None})
        server = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=quiet, ssl_context=tls)
        gate.address = f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
        with server, _serving(server):
            try:
                yield gate
            finally:
                gate.open()


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL server on loopback with its data in ``folder``."""

    binaries: Path
    folder: Path
    port: int

    def call(self, *arguments: str) -> None:
        """Run one of PostgreSQL's programs; as another user, for it refuses to serve root."""
        user = "postgres" if os.getuid() == 0 else None
        command = [str(self.binaries / arguments[0]), *arguments[1:]]
        with (self.folder / "calls.log").open("a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, user=user, cwd=self.folder, env={"LC_ALL": "C"})

    def make(self) -> None:
        """Make its data, for a user with a password."""
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres")
        password = self.folder / "password"
        password.write_text("hunter2\n")
        password.chmod(0o644)
        who = ("-U", "tester", "-A", "md5", "--pwfile", str(password))
        self.call("initdb", "-D", str(self.folder / "data"), "-E", "UTF8", *who)

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = str(self.folder / "server.log")
        self.call("pg_ctl", "-D", str(self.folder / "data"), "-l", log, "-o", options, "-w", "start")

    def stop(self) -> None:
        self.call("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "stop")

    def address(self, database: str) -> str:
        return f"postgresql://tester:hunter2@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        """Make a new database; return its address."""
        import psycopg

        connection = psycopg.connect(self.address("postgres"), autocommit=True)
        connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(database)))
        connection.close()
        return self.address(database)


def installed_postgres() -> Path | None:
    """Return the folder of PostgreSQL's programs, or None where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    return found[-1].parent if found else None


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Serve databases with PostgreSQL; skips where it is not installed."""
    pytest.importorskip("psycopg", reason="needs psycopg: pip install 'psycopg[binary]'")
    binaries = installed_postgres()
    if binaries is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    server = Postgres(binaries, Path(tempfile.mkdtemp(prefix="caltech-sweep-postgres-")), free_port())
    server.make()
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.folder, ignore_errors=True)
