"""What a person sees: plain lines in a pipe, a live table on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from caltech_sweep.sweep import watch
from caltech_sweep.sweep.watch import LiveWatcher, PlainWatcher, Watcher, duration

METRICS = {"train/loss": 1.25, "val/accuracy": 0.5}


def story(watcher: Watcher) -> None:
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
    story(PlainWatcher(lines.append))
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


def test_the_time_left_is_told_by_the_last_epoch_though_earlier_ones_were_reused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch.time, "monotonic", lambda: 100.0)
    lines: list[str] = []
    watcher = PlainWatcher(lines.append)
    watcher.trial_started(7, "Row", 20)
    for epoch in (2, 4):
        watcher.epoch(7, epoch, {**METRICS, "epoch_seconds": 4.0})
    assert lines[1].endswith(", 1 min 12 s left") and lines[2].endswith(", 1 min 4 s left")


def test_the_live_table_shows_what_runs_and_keeps_what_ended() -> None:
    out = io.StringIO()
    with LiveWatcher(Console(file=out, force_terminal=True, width=100)) as watcher:
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
