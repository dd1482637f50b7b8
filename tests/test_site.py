"""What a site sets once: namespaces that keep people's studies apart, and a file of options."""

from __future__ import annotations

from pathlib import Path

import pytest

from caltech_sweep.study.site import select, within
from caltech_sweep.tracking.writer import MlflowTracker
from helpers.places import invoke as cli

ONE = ("--in-process", "--threads", "1", "--row", "First", "--set", "epochs=1")


def test_a_name_with_a_slash_is_whole_and_one_that_ends_with_it_stands_for_those_below() -> None:
    assert [within("ana", name) for name in ("tiny", "bob/tiny", None)] == ["ana/tiny", "bob/tiny", "ana/"]
    assert [within(None, name) for name in ("tiny", None)] == ["tiny", None]
    names = ["tiny", "ana/tiny", "anatole", "ana/b/c"]
    assert select("ana/", names) == ["ana/tiny", "ana/b/c"]
    assert select(None, names) == names and select("tiny", names) == ["tiny"]


@pytest.mark.slow
def test_two_people_with_studies_of_one_name_see_their_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for person in ("ana", "bob"):
        monkeypatch.setenv("CALTECH_SWEEP_NAMESPACE", person)
        ran = cli("run", "tiny", *ONE, "--set", f"seed={len(person) + ord(person[0])}")
        assert ran.exit_code == 0 and f"study {person}/tiny: 1 complete" in ran.output, ran.output
    assert "bob/tiny" in cli("report", "--format", "csv").output
    assert "ana/tiny" not in cli("report", "--format", "csv").output
    assert "ana/tiny" in cli("report", "ana/tiny", "--format", "csv").output
    assert cli("report", "--namespace", "eve").exit_code == 2
    assert cli("doctor").output.startswith("1 study examined: 0 found")
    assert cli("status", "tiny").output.startswith("bob/tiny: 1 of 3 trials ended")
    assert "bob.tiny@champion" in cli("promote", "tiny").output
    ran = cli("run", "tiny", *ONE, "--name", "fine", "--set", "weights=study:tiny")
    assert ran.exit_code == 0, ran.output
    tracker = MlflowTracker()
    (fine,) = tracker.trials(tracker.study("bob/fine"))  # type: ignore[arg-type]
    assert fine.tags["weights.run_id"] == tracker.best_trial("bob/tiny").run_id
    monkeypatch.delenv("CALTECH_SWEEP_NAMESPACE")
    assert cli("doctor").output.startswith("3 studies examined: 0 found")


@pytest.fixture
def settings(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALTECH_SWEEP_SETTINGS", str(place / "site.yaml"))
    monkeypatch.delenv("CALTECH_SWEEP_EXECUTOR", raising=False)
    return place / "site.yaml"


def test_the_site_sets_the_executor_unless_the_environment_or_the_command_does(
    settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.write_text("executor: ray\nslots: 3\n")
    assert "--executor ray: trains in the processes of a cluster" in cli("run", "tiny", *ONE).output
    told = "--address: is for --executor ray"
    assert told in cli("run", "tiny", *ONE, "--executor", "processes", "--address", "a:1").output
    monkeypatch.setenv("CALTECH_SWEEP_EXECUTOR", "processes")
    assert told in cli("run", "tiny", *ONE, "--address", "a:1").output


def test_the_site_sets_the_stores_unless_the_environment_does(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.write_text("tracking-uri: theirs.db\n")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "theirs.db" in cli("status").output
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ours.db")
    assert "ours.db" in cli("status").output


REFUSED = {
    "exectuor: ray": "cannot set 'exectuor'; did you mean 'executor'?",
    "executor: [ray]": "executor must be one value",
    "executor: slurm": "'slurm' is not one of",
    "- ray": "must be a mapping such as `executor: ray`",
    None: "cannot be read: No such file",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_file_of_the_site_that_is_wrong_is_refused_in_a_sentence(settings: Path, text: str | None) -> None:
    if text is not None:
        settings.write_text(text)
    result = cli("run", "tiny")
    assert result.exit_code == 2 and REFUSED[text] in result.output, result.output
    assert not (settings.parent / "mlruns").exists()
