"""What a store answers to a write: every answer has its meaning, and none costs a result or stops the training."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests
import sqlalchemy as sa
from mlflow.exceptions import MlflowException, RestException

from caltech_sweep.errors import StoreError
from caltech_sweep.sweep.executors.base import Event, Job
from caltech_sweep.testing import ScriptedExecutor, scripted_coordinator
from caltech_sweep.tracking import journal as journals
from caltech_sweep.tracking.answers import Answer, meaning
from caltech_sweep.tracking.journal import Journal, JournalingTracker
from caltech_sweep.tracking.records import MISSING_TAG, TrialRecord
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.marks import slow_but
from helpers.servers import HANG, HANG_UP, Gate, gated_mlflow
from helpers.studies import DEFINITION


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    with gated_mlflow(tmp_path_factory.mktemp("server")) as gate:
        yield gate


@pytest.fixture
def gate(server: Gate, monkeypatch: pytest.MonkeyPatch) -> Gate:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(journals, "FIRST_WAIT", 0.01)
    server.open()
    return server


def http_error(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} for url", response=response)


class OfBotocore(Exception):
    response = {"ResponseMetadata": {"HTTPStatusCode": 403}}


class OfAzure(Exception):
    status_code = 413


API = "API request to endpoint /api/2.0/mlflow/runs/create failed with error code"
ANSWERS: tuple[tuple[Exception, Answer], ...] = (
    (MlflowException("API request to http://x failed with exception HTTPConnectionPool(...)"), Answer.LATER),
    (MlflowException(f"{API} 503 != 200. Response body: 'busy'"), Answer.LATER),
    (http_error(429), Answer.LATER),
    (http_error(507), Answer.LATER),
    (requests.ConnectionError("Connection aborted"), Answer.LATER),
    (requests.Timeout("Read timed out"), Answer.LATER),
    (sa.exc.OperationalError("INSERT", {}, Exception("server closed the connection unexpectedly")), Answer.LATER),
    (MlflowException("(sqlite3.OperationalError) database is locked"), Answer.LATER),
    (StoreError("no answer within 5 s"), Answer.LATER),
    (MlflowException(f"{API} 401 != 200. Response body: 'who are you'"), Answer.OURS),
    (RestException({"error_code": "PERMISSION_DENIED", "message": "Permission denied"}), Answer.OURS),
    (http_error(403), Answer.OURS),
    (http_error(407), Answer.OURS),
    (OfBotocore("An error occurred (AccessDenied)"), Answer.OURS),
    (requests.exceptions.SSLError("certificate verify failed"), Answer.OURS),
    (MlflowException("request was successful but the response body was not in a valid JSON format"), Answer.OURS),
    (MlflowException(f"{API} 500 != 200. Response body: 'bug'"), Answer.UNSURE),
    (http_error(500), Answer.UNSURE),
    (MlflowException(f"{API} 404 != 200. Response body: 'default backend - 404'"), Answer.UNSURE),
    (http_error(405), Answer.UNSURE),
    (
        MlflowException("failed with exception ... (Caused by ResponseError('too many 500 error responses'))"),
        Answer.UNSURE,
    ),
    (
        MlflowException("failed with exception ... (Caused by ResponseError('too many 503 error responses'))"),
        Answer.LATER,
    ),
    (RuntimeError("of an artifact store that nobody knows"), Answer.UNSURE),
    (MlflowException(f"{API} 413 != 200. Response body: 'too large'"), Answer.NEVER),
    (OfAzure("RequestBodyTooLarge"), Answer.NEVER),
    (http_error(422), Answer.NEVER),
    (RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "Invalid name"}), Answer.NEVER),
    (RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Run was deleted"}), Answer.NEVER),
    (sa.exc.DataError("INSERT", {}, Exception("invalid byte sequence for encoding")), Answer.NEVER),
    (UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"), Answer.NEVER),
)


@pytest.mark.parametrize(("error", "answer"), ANSWERS, ids=lambda value: str(value)[:40])
def test_every_answer_has_its_meaning(error: Exception, answer: Answer) -> None:
    assert meaning(error) is answer


def trials_of(address: str, name: str) -> tuple[TrialRecord, ...]:
    tracker = MlflowTracker(address)
    record = tracker.study(name)
    return () if record is None else tuple(tracker.trials(record))


Study = tuple[JournalingTracker, list[str]]


def run_study(gate: Gate, name: str, folder: Path, patience: float = 5.0) -> Study:
    """Run a scripted study against the server; every trial of it must come to its end."""
    notes: list[str] = []
    tracker = JournalingTracker(MlflowTracker(gate.address), Journal(folder / "j"), notes.append, patience=patience)
    definition = replace(DEFINITION, name=name, trials=3)
    summary = scripted_coordinator(definition, ScriptedExecutor(), tracker, folder / "scratch").run()
    assert summary.complete and summary.outcomes == {"complete": 3}
    return tracker, notes


@pytest.mark.parametrize(
    ("status", "says"),
    slow_but(
        [(401, "MLFLOW_TRACKING_TOKEN"), (500, "fails at a write"), (HANG_UP, "is unavailable")],
        [
            (401, "MLFLOW_TRACKING_TOKEN"),
            (403, "MLFLOW_TRACKING_TOKEN"),
            (404, "fails at a write"),
            (500, "fails at a write"),
            (503, "is unavailable"),
            (HANG_UP, "is unavailable"),
        ],
    ),
)
def test_a_server_that_takes_nothing_from_some_moment_on_costs_no_result(
    gate: Gate, tmp_path: Path, status: int, says: str
) -> None:
    name = f"shut-{status}"
    gate.close_after(20, status)
    tracker, notes = run_study(gate, name, tmp_path)
    tracker.say_what_waits(name, notes.append)  # as a run ends: it waits for what is under way
    assert tracker.waiting > 5
    (said,) = [note for note in notes if "results are buffered" in note]
    assert says in said and "training continues" in said
    again = JournalingTracker(tracker.inner, Journal(tmp_path / "j"), notes.append)
    with pytest.raises(StoreError) as caught:  # a rerun
        again.start_study(name, "A title", {})
    assert ("start it" in str(caught.value)) == (says == "is unavailable")
    assert says in notes[-1]  # which it says above that sentence
    gate.open()
    assert again.replay() and not (tmp_path / "j").exists()
    assert [trial.state for trial in trials_of(gate.address, name)] == ["complete"] * 3


@pytest.mark.parametrize("status", [413, 500, HANG_UP, 403])
def test_an_artifact_that_is_never_taken_is_set_aside_and_all_else_arrives(
    gate: Gate, tmp_path: Path, status: int
) -> None:
    """A server behind a proxy that takes no body of more than a few bytes."""
    name = f"large-{status}"
    gate.rule = lambda method, path, length: status if method == "PUT" and length > 1000 else None
    folder, notes = tmp_path / "files", list[str]()
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "best.safetensors").write_bytes(b"x" * 2000)
    (folder / "config.yaml").write_text("a: 1\n")
    tracker = JournalingTracker(MlflowTracker(gate.address), Journal(tmp_path / "j"), notes.append)
    tracker.start_study(name, "A title", {})
    first, second = (tracker.start_trial(name, n, {}, {"trial_number": n}) for n in ("1", "2"))
    tracker.finish_trial(first, "complete", {"best/val_accuracy": 0.5}, {}, folder)
    tracker.finish_trial(second, "complete", {"best/val_accuracy": 0.6}, {}, None)
    tracker.replay()
    assert not tracker.waiting
    one, other = trials_of(gate.address, name)
    assert one.state == other.state == "complete" and "best.safetensors" in one.tags[MISSING_TAG]
    assert MlflowTracker(gate.address).artifact(first, "config.yaml").read_text() == "a: 1\n"
    (said,) = [note for note in notes if "refuses a write" in note]
    assert "checkpoints/best.safetensors" in said
    (kept,) = (tmp_path / "j").rglob("best.safetensors")
    assert kept.stat().st_size == 2000
    again = JournalingTracker(tracker.inner, Journal(tmp_path / "j"), notes.append)
    assert again.replay() and again.start_study(name, "A title", {})


@pytest.mark.parametrize("status", [400, 422, 500])
def test_a_run_that_is_never_taken_is_set_aside_with_what_belongs_to_it(
    gate: Gate, tmp_path: Path, status: int
) -> None:
    """As of a row whose name the server's database does not take."""
    name, created = f"row-{status}", []

    def rule(method: str, path: str, length: int) -> int | None:
        if path.endswith("/runs/create"):
            created.append(path)
        return status if path.endswith("/runs/create") and len(created) > 2 and created[-1] != "let through" else None

    gate.rule = rule
    tracker, notes = run_study(gate, name, tmp_path)  # the study's run and the first trial's are made, no further one
    for _ in range(3):
        tracker.replay()
    assert len(trials_of(gate.address, name)) == 1 and (tmp_path / "j" / "journal.db").exists()
    assert not tracker.waiting and any("start_trial" in note and "it is kept in" in note for note in notes)
    assert JournalingTracker(tracker.inner, Journal(tmp_path / "j"), notes.append).replay()


@pytest.mark.parametrize("request_of", slow_but(["runs/log-batch"], ["runs/log-batch", "runs/create", "runs/update"]))
def test_a_server_that_accepts_and_never_answers_stops_no_training(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_of: str
) -> None:
    waited: list[float] = []

    class Listening(ScriptedExecutor):
        def submit(self, job: Job) -> None:
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
            gate.rule = lambda method, path, length: HANG if path.endswith(request_of) else None
            super().submit(job)

        def poll(self, timeout: float) -> list[Event]:
            waited.append(time.monotonic())
            return super().poll(timeout)

    name, notes = f"silent-{request_of.replace('/', '-')}", list[str]()
    tracker = JournalingTracker(MlflowTracker(gate.address), Journal(tmp_path / "j"), notes.append, patience=0.2)
    definition = replace(DEFINITION, name=name, trials=3)
    assert scripted_coordinator(definition, Listening(), tracker, tmp_path / "scratch").run().complete
    assert tracker.waiting and "no answer within 0.2 s" in "".join(notes)
    assert max(later - earlier for earlier, later in itertools.pairwise(waited)) < 1.5
    gate.open()
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    assert tracker.replay()
    assert [trial.state for trial in trials_of(gate.address, name)] == ["complete"] * 3
