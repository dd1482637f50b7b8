"""The UI command: a real server on the local stores, on loopback only."""

from __future__ import annotations

import json
import signal
import socket
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


@pytest.mark.slow
@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_a_ui_that_others_may_reach_answers_by_this_machine_s_names(finished: Path, tmp_path: Path, host: str) -> None:
    name = socket.gethostname()

    def ask(base: str, asked: str) -> int:
        port = base.rpartition(":")[2]
        headers = {"Content-Type": "application/json", "Host": f"{asked}:{port}", "Origin": f"http://{asked}:{port}"}
        request = urllib.request.Request(
            f"{base}/ajax-api/2.0/mlflow/experiments/search", b'{"max_results": 1}', headers
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    command = [sys.executable, "-m", "caltech_sweep", "ui", "--host", host]
    with answering(command, tmp_path / "log", cwd=finished, end=signal.SIGINT) as base:
        assert ask(base, "localhost") == 200 and ask(base, "evil.example") == 403
        assert [ask(base, name), ask(base, "192.168.1.5")] == [200, 200] or host == "127.0.0.1"
