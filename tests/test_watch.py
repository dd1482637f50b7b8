"""What a person sees: plain lines in a pipe, a live table on a terminal."""

from __future__ import annotations

import contextlib
import http.server
import io
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich import filesize
from rich.console import Console

from caltech_sweep.metrics import Objective
from caltech_sweep.sweep import progress as watch
from caltech_sweep.sweep.progress import LiveProgress, PlainProgress, Progress
from caltech_sweep.text import duration, progress_line

METRICS = {"train/loss": 1.25, "val/accuracy": 0.5}


def story(watcher: Progress) -> None:
    watcher.study_started("transfer", 1, 3)
    watcher.trial_started(7, "Fourth [model]", 20)
    for epoch in range(1, 21):
        watcher.epoch(7, epoch, METRICS)
    watcher.note("something to know")
    watcher.trial_ended(7, "Fourth [model]", "complete", "val accuracy 0.500")
    watcher.trial_started(8, "trial-008", 4)
    watcher.trial_ended(8, "trial-008", "pruned", "")


def test_plain_lines_are_at_most_ten_a_trial() -> None:
    lines: list[str] = []
    story(PlainProgress(lines.append))
    assert lines[0] == "study transfer: 1 of 3 trials done"
    assert lines[1] == "[7] Fourth [model]: started, 20 epochs"
    assert lines[2] == "[7] Fourth [model]: epoch 2/20, train loss 1.250, val accuracy 0.500"
    assert sum("epoch" in line and "/20" in line for line in lines) == 10
    assert lines[-4:] == [
        "something to know",
        "[7] Fourth [model]: complete, val accuracy 0.500",
        "[8] trial-008: started, 4 epochs",
        "[8] trial-008: pruned",
    ]


def test_the_objective_is_what_is_shown_of_each_epoch() -> None:
    lines: list[str] = []
    metrics = {**METRICS, "val/macro_f1": 0.25}
    out = io.StringIO()
    with LiveProgress(Console(file=out, force_terminal=True, width=120)) as live:
        for watcher in (PlainProgress(lines.append), live):
            watcher.study_started("uneven", 0, 1, Objective("macro_f1"))
            watcher.trial_started(0, "Only", 1)
            watcher.epoch(0, 1, metrics)
    assert lines[-1].endswith("train loss 1.250, val macro F1 0.250")
    assert "val macro F1" in out.getvalue() and "0.250" in out.getvalue() and "0.500" not in out.getvalue()


def test_the_time_left_is_told_by_the_last_epoch_though_earlier_ones_were_reused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch.time, "monotonic", lambda: 100.0)
    lines: list[str] = []
    watcher = PlainProgress(lines.append)
    watcher.trial_started(7, "Row", 20)
    for epoch in (2, 4):
        watcher.epoch(7, epoch, {**METRICS, "epoch_seconds": 4.0})
    assert lines[1].endswith(", 1 min 12 s left") and lines[2].endswith(", 1 min 4 s left")


def test_the_live_table_shows_what_runs_and_keeps_what_ended() -> None:
    out = io.StringIO()
    with LiveProgress(Console(file=out, force_terminal=True, width=100)) as watcher:
        watcher.study_started("transfer", 1, 3)
        watcher.trial_started(7, "Fourth [model]", 20)
        watcher.epoch(7, 5, METRICS)
        watcher._live.refresh()
        shown = out.getvalue()
        story(watcher)
    assert "transfer: 1 of 3 trials" in shown and "5/20" in shown and "0.500" in shown and "Fourth [model]" in shown
    assert "[7] Fourth [model]: complete, val accuracy 0.500" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_read_at_a_glance(seconds: float, words: str) -> None:
    assert duration(seconds) == words


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, calls: list[tuple[int, int]]) -> str:
    """Return what a progress line in bytes leaves on standard error, lines that it writes as such included."""
    monkeypatch.setattr("sys.stderr", stream)
    with progress_line("downloading", lambda line: print(line, file=stream), filesize.decimal) as progress:
        for done, total in calls:
            progress(done, total)
    return stream.getvalue()


UNKNOWN = [(done * 500_000, 0) for done in range(61)]


def test_a_total_that_nobody_knows_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    text = show(monkeypatch, io.StringIO(), UNKNOWN)
    sizes = ["0 bytes", "500.0 kB", "1.0 MB", "1.5 MB", "2.5 MB", "4.5 MB", "8.5 MB", "17.0 MB"]
    assert text.splitlines() == [f"downloading: {size}" for size in sizes]
    text = show(monkeypatch, Terminal(), UNKNOWN)
    assert " of " not in text and text.endswith("\rdownloading: 30.0 MB\n") and text.count("\n") == 1


def test_a_total_that_is_known_is_shown_in_tenths(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [(done * 1_000_000, 50_000_000) for done in range(51)]
    lines = show(monkeypatch, io.StringIO(), known).splitlines()
    sizes = ["0 bytes", *(f"{done}.0 MB" for done in range(5, 51, 5))]
    assert lines == [f"downloading: {size} of 50.0 MB" for size in sizes]
    text = show(monkeypatch, Terminal(), known)
    assert text.endswith("\rdownloading: 50.0 MB of 50.0 MB\n") and text.count("\n") == 1


def test_an_interrupted_line_ends_before_what_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with pytest.raises(ValueError, match="lost"), progress_line("decoding", print) as progress:
        progress(1000, 2000)
        progress(5, 2000)  # it began anew
        raise ValueError("lost")
    assert stream.getvalue() == "\rdecoding: 1,000 of 2,000\rdecoding: 5 of 2,000    \n"


def test_no_progress_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert show(monkeypatch, Terminal(), []) == show(monkeypatch, io.StringIO(), []) == ""


DOWNLOAD = """
import sys
from caltech_sweep.cli import main
main(["data", "--url", sys.argv[1]])
"""


def test_a_download_of_unknown_size_ends_its_line_on_a_terminal(tmp_path: Path) -> None:
    """The server names no length, and what it sends is no archive: the error stands on a line of its own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 3_000_000)

        def log_message(self, *arguments: object) -> None:
            pass

    ours, theirs = pty.openpty()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/file.zip"
        place = {**os.environ, "CALTECH_SWEEP_DATA": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", DOWNLOAD, url], stderr=theirs, cwd=tmp_path, env=place)
        server.shutdown()
    os.close(theirs)
    with open(ours, "rb") as terminal:
        seen = b""
        with contextlib.suppress(OSError):  # Linux: how a terminal says that nobody writes any more
            while block := terminal.read1():
                seen += block
    text = seen.decode()
    assert done.returncode == 2 and "downloading: 3.0 MB" in text and " of " not in text.partition("Error")[0], text
    assert "MB\r\nError: " in text, text
