"""The UI command: a real server on the local stores, on loopback alone."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest


def answer(url: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


@pytest.mark.slow
def test_the_ui_serves_the_study_and_stops_on_ctrl_c(finished: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "caltech_sweep", "ui", "--port", str(port)]
    with subprocess.Popen(command, cwd=finished, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            base, end = f"http://127.0.0.1:{port}", time.monotonic() + 90
            while True:
                try:
                    assert answer(f"{base}/health") == "OK"
                    break
                except (urllib.error.URLError, ConnectionError):
                    assert time.monotonic() < end and server.poll() is None
                    time.sleep(0.5)
            found = answer(f"{base}/api/2.0/mlflow/experiments/search", {"max_results": 10})
            assert "tiny" in {experiment["name"] for experiment in json.loads(found)["experiments"]}
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
