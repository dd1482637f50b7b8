"""What ``caltech-sweep status`` says of studies that are run, of those whose process died, and of none."""

from __future__ import annotations

import socket
from pathlib import Path

from caltech_sweep.stores import study_lock, study_store
from helpers.places import invoke as cli
from helpers.places import sql


def test_nothing_is_said_of_a_study_that_is_not_run_unless_it_is_named(finished: Path) -> None:
    assert cli("status").output == "no study is being run\n"
    assert cli("status", "tiny").output == (
        "tiny: 3 of 3 trials ended, 0 trials running; no process holds it in this study store\n"
    )
    result = cli("status", "tinny")
    assert result.exit_code == 2 and "did you mean 'tiny'?" in result.output


def test_running_trials_are_told_with_their_machine_their_epoch_and_the_time_left(copied: Path) -> None:
    sql(
        copied,
        "mlflow.db",
        "UPDATE runs SET status = 'RUNNING' WHERE name = 'Views'",
        "DELETE FROM metrics WHERE step = 2 AND run_uuid IN (SELECT run_uuid FROM runs WHERE name = 'Views')",
        "UPDATE latest_metrics SET value = 90 WHERE key = 'epoch_seconds'",
    )
    with study_lock(study_store(None), "tiny"):
        summary, line = cli("status").output.splitlines()
    assert summary.startswith("tiny: 2 of 3 trials ended, 1 trial running; study 'tiny' is being run by")
    assert line.startswith(f"  [1] Views: epoch 1 of 2 on {socket.gethostname()}, since ")
    assert line.endswith("about 1 min 30 s left")
    assert "no process holds it" in cli("status").output
