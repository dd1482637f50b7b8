"""The UI command: a real server on the local stores, on loopback alone."""

from __future__ import annotations

import json
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from helpers.servers import answering


def answer(url: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


@pytest.mark.slow
def test_the_ui_serves_the_study_and_stops_on_ctrl_c(finished: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "caltech_sweep", "ui"]
    with answering(command, tmp_path / "log", cwd=finished, end=signal.SIGINT) as base:
        assert answer(f"{base}/health") == "OK"
        found = answer(f"{base}/api/2.0/mlflow/experiments/search", {"max_results": 10})
        assert "tiny" in {experiment["name"] for experiment in json.loads(found)["experiments"]}
