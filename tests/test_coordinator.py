"""The coordinator over scripted trials: order, totals, outcomes, pruning, deaths, stops and continuation."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import UsageError
from caltech_sweep.study.definition import Component, Row
from caltech_sweep.sweep.executors.base import Done, Event, Failed, Job, Trained, WorkerDied, failure_of
from caltech_sweep.sweep.optuna_store import check_identity
from caltech_sweep.sweep.optuna_trials import start_sampled
from caltech_sweep.sweep.queue import enqueue_missing_rows, sampler_for
from caltech_sweep.sweep.space import sample
from caltech_sweep.testing import MemoryTracker, Script, ScriptedExecutor, run_scripted, scripted_coordinator
from caltech_sweep.tracking.records import OUTCOMES
from helpers.studies import DEFINITION, ROWS, Dying, Killed, new_study, records


def test_rows_run_first_then_sampled_trials_up_to_the_total() -> None:
    executor, tracker, study = ScriptedExecutor(), MemoryTracker(), new_study()
    summary = run_scripted(DEFINITION, executor, tracker, study)
    assert summary.complete and summary.outcomes == {"complete": 6}
    assert [r.name for r in records(tracker)] == ["One", "Two", "trial-002", "trial-003", "trial-004", "trial-005"]
    assert [job.config.lr for job in executor.jobs[:2]] == [0.1, 9.0]  # 9.0 lies outside the space, and is trained
    assert {t.state for t in study.trials} == {TrialState.COMPLETE}
    assert all(r.status == "FINISHED" and r.tags["outcome"] == "complete" for r in records(tracker))


class Writing(ScriptedExecutor):
    """A slot that writes what a trial left while some polls go by, and may train the next one meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.late: list[Done] = []
        self.ahead: list[int] = []  # jobs that were handed out meanwhile
        self._polls = 0

    def free(self) -> int:
        return int(not self._events and not self.late)

    def free_soon(self) -> int:
        return int(not self._events and bool(self.late))

    def submit(self, job: Job) -> None:
        if self.late:
            self.ahead.append(job.number)
        super().submit(job)

    def poll(self, timeout: float) -> list[Event]:
        self._polls += 1
        written = [self.late.pop()] if self.late and self._polls > 2 else []
        events = super().poll(timeout)
        self.late += [event for event in events if isinstance(event, Done)]
        self._polls = self._polls if self.late and not written else 0
        return [*written, *(Trained(event.job) if isinstance(event, Done) else event for event in events)]


def test_rows_are_trained_while_the_artifacts_of_others_are_written_and_sampled_trials_wait_for_these() -> None:
    writing, at_once = Writing(), ScriptedExecutor()
    trackers, studies = (MemoryTracker(), MemoryTracker()), (new_study(), new_study())
    definition = replace(DEFINITION, rows=(*ROWS, Row("Three", {"lr": 0.2})), trials=7)
    for executor, tracker, study in zip((writing, at_once), trackers, studies, strict=True):
        assert run_scripted(definition, executor, tracker, study).outcomes == {"complete": 7}
    assert writing.ahead == [1, 2] and not writing.late
    assert [trial.params for trial in studies[0].trials] == [trial.params for trial in studies[1].trials]
    assert all(r.status == "FINISHED" and r.tags["outcome"] == "complete" for r in records(trackers[0]))


def test_a_row_inside_the_space_teaches_the_sampler() -> None:
    study = new_study()
    run_scripted(DEFINITION, ScriptedExecutor(), MemoryTracker(), study)
    assert study.trials[0].params == {"lr": 0.1, "step_size": 5}
    assert study.trials[1].params == {"step_size": 3}


def test_every_epoch_is_logged_once_with_its_names_and_tags() -> None:
    tracker = MemoryTracker()
    run_scripted(replace(DEFINITION, trials=2), ScriptedExecutor(Script([0.1, 0.4, 0.4, 0.2])), tracker)
    run = tracker.runs["run-0"]
    assert [(epoch, metrics["val/accuracy"]) for epoch, metrics, _ in run.history] == [
        (1, 0.1),
        (2, 0.4),
        (3, 0.4),
        (4, 0.2),
    ]
    assert run.metrics["best/val_accuracy"] == 0.4 and run.metrics["best/epoch"] == 2
    assert run.tags["row"] == "One" and run.tags["trial_number"] == "0"
    assert run.params["lr"] == "0.1" and run.params["dataset.name"] == "shapes"
    assert tracker.datasets["run-0"] == "scripted" and "config.yaml" in run.artifacts


@pytest.mark.parametrize("outcome", ["diverged", "out_of_memory", "crashed"])
def test_failures_map_once_and_are_never_a_score(outcome: str) -> None:
    tracker, study = MemoryTracker(), new_study()

    def script(config: TrialConfig) -> Script:
        return Script([0.3], failure=outcome) if config.lr == 0.1 else Script()

    summary = run_scripted(replace(DEFINITION, trials=2), ScriptedExecutor(script), tracker, study)
    assert summary.outcomes == {outcome: 1, "complete": 1}
    assert study.trials[0].state.name == OUTCOMES[outcome].optuna and study.trials[0].value is None
    first = records(tracker)[0]
    assert (first.status, first.outcome) == (OUTCOMES[outcome].mlflow, outcome)
    assert first.tags["reason"] == f"scripted to be {outcome}"
    assert tracker.runs[first.run_id].artifacts["traceback.txt"] == b"scripted"


@pytest.mark.parametrize("kept", [True, False])
def test_a_crash_says_where_its_traceback_is_and_ends_its_trial_where_none_can_be_kept(
    tmp_path: Path, kept: bool
) -> None:
    class Crashing(ScriptedExecutor):
        def poll(self, timeout: float) -> list[Event]:
            if not kept:  # as a cleaner of temporary files does
                for job in self.jobs:
                    shutil.rmtree(job.folder, ignore_errors=True)
            return [
                failure_of(e.job, ValueError("a\udce9\0")) if isinstance(e, Failed) else e
                for e in super().poll(timeout)
            ]

    said: list[str] = []
    tracker, one = MemoryTracker(), replace(DEFINITION, trials=1, rows=ROWS[:1])
    executor = Crashing(Script([0.3], failure="crashed"))
    summary = scripted_coordinator(one, executor, tracker, tmp_path, write=said.append).run()
    assert summary.outcomes == {"crashed": 1} and tracker.runs["run-0"].tags["reason"] == "a\\udce9\\0"
    if kept:
        assert b"NoneType: None" in tracker.runs["run-0"].artifacts["traceback.txt"]
        assert "One: its traceback is traceback.txt of run run-0" in said
    else:
        assert "One: its traceback could not be kept (No such file or directory)" in said


def test_what_crashed_is_tried_by_the_next_run_and_what_diverged_is_not() -> None:
    for outcome, again in (("crashed", 1), ("diverged", 0)):
        tracker, study = MemoryTracker(), new_study()
        small = replace(DEFINITION, trials=1, rows=ROWS[:1])
        run_scripted(small, ScriptedExecutor(Script([0.3], failure=outcome)), tracker, study)
        executor = ScriptedExecutor()
        run_scripted(small, executor, tracker, study)
        assert len(executor.jobs) == again


def test_a_worker_that_dies_is_tried_again_twice_in_the_same_run() -> None:
    for deaths, outcome in ((2, "complete"), (3, "crashed")):
        tracker = MemoryTracker()
        small = replace(DEFINITION, trials=1, rows=ROWS[:1])
        summary = run_scripted(small, ScriptedExecutor(Script([0.1, 0.2, 0.3, 0.4], deaths=deaths)), tracker)
        assert summary.outcomes == {outcome: 1} and len(tracker.runs) == 1
        run = tracker.runs["run-0"]
        assert [epoch for epoch, _, _ in run.history] == [1, 2, 3, 4]
        assert run.tags["attempt"] == "3"


def test_a_trial_whose_worker_died_trains_by_itself_from_then_on(tmp_path: Path) -> None:
    executor = ScriptedExecutor(Script([0.1], deaths=1))
    coordinator = scripted_coordinator(
        replace(DEFINITION, trials=1, rows=ROWS[:1]), executor, MemoryTracker(), tmp_path
    )
    alone = coordinator.make_job
    coordinator.make_job = lambda queued: replace(alone(queued), together=True)
    assert coordinator.run().outcomes == {"complete": 1}
    assert [job.together for job in executor.jobs] == [True, False]


def test_a_trial_whose_machines_are_taken_away_goes_on_as_often_as_it_must() -> None:
    class Moving(ScriptedExecutor):
        def poll(self, timeout: float) -> list[Event]:
            why = "its node will be taken away"
            return [replace(e, why=why, moved=True) if isinstance(e, WorkerDied) else e for e in super().poll(timeout)]

    tracker, small = MemoryTracker(), replace(DEFINITION, trials=1, rows=ROWS[:1])
    summary = run_scripted(small, Moving(Script([0.1, 0.2, 0.3, 0.4], deaths=5)), tracker)
    assert summary.outcomes == {"complete": 1} and tracker.runs["run-0"].tags["attempt"] == "6"
    assert [epoch for epoch, _, _ in tracker.runs["run-0"].history] == [1, 2, 3, 4]


def test_only_sampled_trials_are_pruned_and_rows_set_the_bar() -> None:
    definition = replace(
        DEFINITION, pruner=Component("median", {"startup_trials": 1, "warmup_epochs": 1}), rows=ROWS[:1]
    )

    def script(config: TrialConfig) -> Script:
        return Script([0.9] * 4) if config.lr == 0.1 else Script([0.2, 0.2, 0.2, 0.2])

    tracker, study = MemoryTracker(), new_study(definition)
    executor = ScriptedExecutor(script)
    summary = run_scripted(definition, executor, tracker, study)
    assert summary.outcomes == {"complete": 1, "pruned": 5}
    pruned = records(tracker)[1]
    assert (pruned.status, pruned.outcome) == ("KILLED", "pruned")
    assert [epoch for epoch, _, _ in tracker.runs[pruned.run_id].history] == [1, 2]
    assert study.trials[1].value == 0.2
    assert [job.wait_each_epoch for job in executor.jobs] == [False, True, True, True, True, True]


def test_a_stop_lets_trials_wait_and_the_next_run_finishes_them_in_their_runs(tmp_path: Path) -> None:
    tracker, study = MemoryTracker(), new_study()
    executor = ScriptedExecutor(Script([0.1, 0.2, 0.3, 0.4]), slots=2)
    coordinator = scripted_coordinator(DEFINITION, executor, tracker, tmp_path, study)
    polls = 0

    class Stopping(ScriptedExecutor):
        def poll(self, timeout: float) -> list:
            nonlocal polls
            polls += 1
            if polls == 3:
                coordinator.request_stop()
            return executor.poll(timeout)

        free, submit, answer, close = executor.free, executor.submit, executor.answer, executor.close

    coordinator.executor = Stopping()
    summary = coordinator.run()
    assert not summary.complete and summary.outcomes == {"interrupted": 2}
    assert [t.state for t in study.trials] == [TrialState.WAITING] * 2
    assert [r.status for r in records(tracker)] == ["KILLED"] * 2 and tracker.statuses["s"] == "KILLED"
    run_scripted(DEFINITION, ScriptedExecutor(Script([0.1, 0.2, 0.3, 0.4])), tracker, study)
    assert len(tracker.runs) == 6 and tracker.statuses["s"] == "FINISHED"
    assert all([e for e, _, _ in run.history] == [1, 2, 3, 4] for run in tracker.runs.values())
    assert all("reason" not in run.tags for run in tracker.runs.values())


def test_going_on_reaches_a_raised_total_without_repeating() -> None:
    tracker, study = MemoryTracker(), new_study()
    run_scripted(DEFINITION, ScriptedExecutor(), tracker, study)
    executor = ScriptedExecutor()
    run_scripted(replace(DEFINITION, trials=8), executor, tracker, study)
    assert [job.number for job in executor.jobs] == [6, 7]
    executor = ScriptedExecutor()
    assert run_scripted(DEFINITION, executor, tracker, study).complete and executor.jobs == []


def test_stopping_and_going_on_samples_what_one_run_would_have_sampled() -> None:
    for sampler in (Component("random", {"seed": 3}), Component("tpe", {"startup_trials": 2})):
        definition = replace(DEFINITION, sampler=sampler)
        whole, parts, study = ScriptedExecutor(), ScriptedExecutor(), new_study(definition)
        run_scripted(definition, whole, MemoryTracker())
        tracker = MemoryTracker()
        for total in (3, 5, 6):
            run_scripted(replace(definition, trials=total), parts, tracker, study)
        assert [job.config for job in parts.jobs] == [job.config for job in whole.jobs]
        assert len({job.config.lr for job in whole.jobs}) == 6


def test_a_changed_row_is_trained_again_and_a_changed_space_is_refused() -> None:
    tracker, study = MemoryTracker(), new_study()
    run_scripted(replace(DEFINITION, trials=2), ScriptedExecutor(), tracker, study)
    changed = replace(DEFINITION, trials=2, rows=(Row("One", {"lr": 0.2, "step_size": 5}), ROWS[1]))
    executor = ScriptedExecutor()
    run_scripted(changed, executor, tracker, study)
    assert [job.config.lr for job in executor.jobs] == [0.2]
    other = replace(DEFINITION, fixed={"epochs": 5})
    with pytest.raises(UsageError, match=r"fixed.epochs: was 4, is 5\ngive this one a name of its own with --name"):
        check_identity(study, other.name, other.identity())


def test_a_study_goes_on_with_another_sampler_and_pruner() -> None:
    tracker, study = MemoryTracker(), new_study()
    run_scripted(replace(DEFINITION, trials=3), ScriptedExecutor(), tracker, study)
    other = replace(DEFINITION, sampler=Component("tpe", {"seed": 1}), pruner=Component("median"))
    check_identity(study, other.name, other.identity())
    assert run_scripted(other, ScriptedExecutor(), tracker, study).outcomes == {"complete": 3}
    recorded = study.user_attrs["identity"]
    assert (recorded["sampler"], recorded["pruner"]) == ({"name": "tpe", "seed": 1}, {"name": "median"})


def test_one_row_alone(tmp_path: Path) -> None:
    tracker, study, executor = MemoryTracker(), new_study(), ScriptedExecutor()
    scripted_coordinator(DEFINITION, executor, tracker, tmp_path, study, only=("Two",)).run()
    assert [r.name for r in records(tracker)] == ["Two"]


def test_forty_rows_on_eight_slots_are_forty_trials_each_once() -> None:
    rows = tuple(Row(f"row {i}", {"lr": 0.001 * (i + 1), "step_size": 3}) for i in range(40))
    definition = replace(DEFINITION, rows=rows, trials=40)
    executor, tracker = ScriptedExecutor(slots=8), MemoryTracker()
    assert run_scripted(definition, executor, tracker).outcomes == {"complete": 40}
    assert sorted(job.config.lr for job in executor.jobs) == [row.settings["lr"] for row in rows]
    assert sorted(r.row for r in records(tracker)) == sorted(row.name for row in rows)


def test_a_dead_coordinator_s_trials_are_taken_over(tmp_path: Path) -> None:
    """What a kill leaves: both stores say running; or MLflow has the end and Optuna has not."""
    tracker, study = MemoryTracker(), new_study()

    class Untidy(Dying):
        def close(self) -> None:
            raise Killed  # so that the coordinator cannot tidy up

    with pytest.raises(Killed):
        scripted_coordinator(DEFINITION, Untidy(), tracker, tmp_path, study).run()
    assert study.trials[2].state == TrialState.RUNNING and records(tracker)[2].status == "RUNNING"
    tracker.finish_trial("run-2", "complete", {"best/val_accuracy": 0.75}, {}, None)
    executor = ScriptedExecutor()
    run_scripted(DEFINITION, executor, tracker, study)
    assert study.trials[2].state == TrialState.COMPLETE and study.trials[2].value == 0.75
    assert [job.number for job in executor.jobs] == [3, 4, 5]
    assert {r.status for r in records(tracker)} == {"FINISHED"} and len(tracker.runs) == 6


def test_replicates_train_every_row_on_further_seeds_beyond_the_total() -> None:
    definition = replace(DEFINITION, replicates=3, trials=3)
    executor, tracker, study = ScriptedExecutor(), MemoryTracker(), new_study()
    assert run_scripted(definition, executor, tracker, study).outcomes == {"complete": 7}
    assert [r.name for r in records(tracker)] == [
        *("One", "Two", "One (seed 1)", "Two (seed 1)", "One (seed 2)", "Two (seed 2)"),
        "trial-006",
    ]
    assert [r.tags.get("replicate") for r in records(tracker)] == [None, None, "1", "1", "2", "2", None]
    assert {job.config.seed for job in executor.jobs if job.config.lr == 0.1} == {0, 1, 2}
    again = ScriptedExecutor()
    run_scripted(definition, again, tracker, study)
    assert again.jobs == []


def test_the_best_sampled_trials_are_confirmed_on_fresh_seeds(tmp_path: Path) -> None:
    tracker, study = MemoryTracker(), new_study()
    executor = ScriptedExecutor(lambda config: Script([min(0.9, config.lr)]))
    for again in (False, True):
        coordinator = scripted_coordinator(DEFINITION, executor, tracker, tmp_path, study)
        assert coordinator.run(confirm=2).outcomes == ({} if again else {"complete": 12})
    sampled = sorted(records(tracker)[2:6], key=lambda r: -r.metrics["best/val_accuracy"])
    confirmed = [int(r.tags["confirms"]) for r in records(tracker)[6:]]
    assert sorted(confirmed) == sorted([sampled[0].number] * 3 + [sampled[1].number] * 3)
    assert {job.config.seed for job in executor.jobs[6:]} == {1, 2, 3}
    assert all(r.row is None for r in records(tracker)[6:])


@pytest.mark.parametrize("sampler", [Component("random", {"seed": 3}), Component("tpe", {"startup_trials": 2})])
@pytest.mark.parametrize("drawn", [0, 1, 2])
def test_a_trial_whose_sampling_was_cut_short_gets_the_settings_it_would_have_got(
    tmp_path: Path, sampler: Component, drawn: int
) -> None:
    definition = replace(DEFINITION, sampler=sampler)
    whole, parts, tracker, study = ScriptedExecutor(), ScriptedExecutor(), MemoryTracker(), new_study(definition)
    run_scripted(definition, whole, MemoryTracker())
    run_scripted(replace(definition, trials=5), parts, tracker, study)
    trial = start_sampled(study, sampler_for(definition, 5))
    sample(trial, dict(list(definition.space.items())[:drawn]))  # and then it is killed
    run_scripted(definition, parts, tracker, study)
    assert [job.config for job in parts.jobs] == [job.config for job in whole.jobs]
    assert [job.number for job in parts.jobs] == list(range(6)) and len(study.trials) == 6


def test_a_run_that_was_opened_but_not_described_is_completed(tmp_path: Path) -> None:
    class Cut(MemoryTracker):
        def log_dataset(self, *_: object) -> None:
            raise Killed

    tracker, study = Cut(), new_study()
    executor = ScriptedExecutor()
    executor.close = lambda: (_ for _ in ()).throw(Killed())  # type: ignore[method-assign]
    with pytest.raises(Killed):
        scripted_coordinator(DEFINITION, executor, tracker, tmp_path, study).run()
    tracker.runs["run-0"].params = {}
    healed = MemoryTracker()
    healed.documents, healed.runs = tracker.documents, tracker.runs
    run_scripted(DEFINITION, ScriptedExecutor(), healed, study)
    assert healed.runs["run-0"].params["lr"] == "0.1" and healed.datasets["run-0"] == "scripted"
    assert len(healed.runs) == 6


def test_a_waiting_row_is_not_mistaken_for_a_new_trial() -> None:
    study = new_study()
    enqueue_missing_rows(study, DEFINITION)
    sampler = sampler_for(DEFINITION, 2)
    assert start_sampled(study, sampler).number == 2
    assert [t.state.name for t in study.trials] == ["WAITING", "WAITING", "RUNNING"]
