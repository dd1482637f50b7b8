"""Real servers on loopback: one of files that tests make misbehave, MLflow's own, and any that answers /health."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen


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
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


def free_port() -> int:
    """Return a port of loopback that nobody uses."""
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
