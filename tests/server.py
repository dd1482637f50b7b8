"""A real HTTP server on loopback that tests make misbehave: files with ranges, cut bodies, errors in turn."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


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
