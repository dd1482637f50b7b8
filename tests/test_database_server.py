"""Both stores in a real PostgreSQL server, which goes away in the middle of a study."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import invoke
from test_journal import free_port

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

EPOCHS = 30


@dataclass(frozen=True)
class Server:
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

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = str(self.folder / "server.log")
        self.call("pg_ctl", "-D", str(self.folder / "data"), "-l", log, "-o", options, "-w", "start")

    def stop(self) -> None:
        self.call("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "stop")

    def address(self, database: str) -> str:
        return f"postgresql+psycopg2://tester:hunter2@127.0.0.1:{self.port}/{database}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg2", reason="needs psycopg2: pip install psycopg2-binary")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="caltech-sweep-postgres-"))
    if os.getuid() == 0:
        shutil.chown(folder, "postgres")
    server = Server(found[-1].parent, folder, free_port())
    (folder / "password").write_text("hunter2\n")
    (folder / "password").chmod(0o644)
    server.call(
        "initdb",
        "-D",
        str(folder / "data"),
        "-E",
        "UTF8",
        "-U",
        "tester",
        "-A",
        "md5",
        "--pwfile",
        str(folder / "password"),
    )
    server.start()
    try:
        import psycopg2

        for name in ("mlflow", "optuna"):
            connection = psycopg2.connect(server.address("postgres").replace("+psycopg2", ""))
            connection.autocommit = True
            connection.cursor().execute(f"CREATE DATABASE {name}")
            connection.close()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def stores(server: Server) -> tuple[str, ...]:
    return ("--tracking-uri", server.address("mlflow"), "--storage", server.address("optuna"))


def run(place: Path, stores: tuple[str, ...]) -> subprocess.Popen[bytes]:
    arguments = ["run", "tiny", "--workers", "1", "--threads", "1", "--set", f"epochs={EPOCHS}", *stores]
    with (place / "log.txt").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "caltech_sweep", *arguments], stdout=log, stderr=log, cwd=place)


def wait_for(place: Path, process: subprocess.Popen[bytes], text: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while text not in (place / "log.txt").read_text():
        assert time.monotonic() < end and process.poll() is None, (place / "log.txt").read_text()
        time.sleep(0.02)


def test_a_database_server_that_goes_away_does_not_stop_a_study(
    place: Path, server: Server, stores: tuple[str, ...]
) -> None:
    process = run(place, stores)
    try:
        wait_for(place, process, "Views: started")
        time.sleep(0.5)
        server.stop()
        time.sleep(20)
        server.start()
        assert process.wait(120) == 0, (place / "log.txt").read_text()
    finally:
        process.kill()
    said = (place / "log.txt").read_text()
    assert "study tiny: 3 complete" in said and "hunter2" not in said and "Traceback" not in said, said
    assert "the tracking store does not take results" in said and "is back" in said
    assert "the study store does not answer" in said
    table = json.loads(invoke("report", "tiny", "--format", "json", *stores[:2]).output)[0]
    assert [row["state"] for row in table["rows"]][:2] == ["complete", "complete"]
    from caltech_sweep.tracking import MlflowTracker

    tracker = MlflowTracker(stores[1])
    study = tracker.study("tiny")
    assert study is not None
    for trial in tracker.trials(study):
        history = tracker.client.get_metric_history(trial.run_id, "train/loss")
        assert sorted(metric.step for metric in history) == list(range(1, EPOCHS + 1)), trial.name
    looked = invoke("doctor", *stores)
    assert looked.exit_code == 0, looked.output


def test_a_second_coordinator_is_refused_by_the_first_one_s_signs_of_life(
    place: Path, stores: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server has no lock of ours, so a dead coordinator's study is free once its last sign is old."""
    from caltech_sweep.sweep import study as studies

    named = ("--name", "other")
    process = run(place, (*stores, *named))
    try:
        wait_for(place, process, "Views: started")
        second = invoke("run", "tiny", "--in-process", "--threads", "1", "--set", f"epochs={EPOCHS}", *stores, *named)
        assert second.exit_code == 2 and "is being run by another process" in second.output, second.output
        process.send_signal(signal.SIGKILL)
        process.wait()
        monkeypatch.setattr(studies, "HEARTBEAT_SECONDS", 1)
        time.sleep(3)
        third = invoke("run", "tiny", "--in-process", "--threads", "1", "--set", f"epochs={EPOCHS}", *stores, *named)
        assert third.exit_code == 0 and "it waits again" in third.output, third.output
        assert "study other: 2 complete" in third.output, third.output
    finally:
        process.kill()


def test_a_server_that_is_not_there_is_a_sentence_at_once(place: Path) -> None:
    address = f"postgresql+psycopg2://tester:hunter2@127.0.0.1:{free_port()}/mlflow"
    begun = time.monotonic()
    for option in ("--tracking-uri", "--storage"):
        result = invoke("run", "tiny", "--in-process", "--threads", "1", option, address)
        assert result.exit_code == 2 and "cannot be opened" in result.output and "refused" in result.output
        assert "hunter2" not in result.output
    assert time.monotonic() - begun < 60
