"""The two stores of every study, compared with each other and with the files that they name.

A study that is being run is skipped. What is found is a :class:`Finding`; nothing is changed until it is fixed,
and what is fixed is not found again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from caltech_sweep import paths
from caltech_sweep.artifacts import artifact_problems
from caltech_sweep.config import PLACE_FIELDS, TrialConfig
from caltech_sweep.errors import ArtifactError, HeldStudyError, StoreError, UsageError
from caltech_sweep.stores import Address, Store, study_store, tracking_store
from caltech_sweep.study.site import select
from caltech_sweep.sweep.lease import Held, fencing, holding
from caltech_sweep.sweep.optuna_store import check_readable, engine_of, open_storage, stored_studies
from caltech_sweep.sweep.ownership import foreign_studies
from caltech_sweep.sweep.queue import wanted_rows
from caltech_sweep.sweep.reconcile import Finding, give_up, key_of, survey
from caltech_sweep.text import counted, suggestion
from caltech_sweep.tracking.client import STUDY_FILE, local_path
from caltech_sweep.tracking.journal import Journal, JournalingTracker, journals
from caltech_sweep.tracking.records import RESULTS, StudyRecord, TrialRecord, missing_artifacts, worth
from caltech_sweep.tracking.writer import MlflowTracker

Key = tuple[int, str]  # a trial's number and fingerprint


@dataclass
class Diagnosis:
    """What the doctor has seen: how many studies, how many findings, and how many of these were fixed."""

    studies: int = 0
    found: int = 0
    fixed: int = 0
    skipped: int = 0

    @property
    def healthy(self) -> bool:
        """Whether nothing is left to fix."""
        return self.found == self.fixed


def examine(
    name: str | None, tracking_uri: Address, storage: Address, fix: bool, say: Callable[[str], None]
) -> Diagnosis:
    """Compare the stores of one study, or of all, and fix what is found if asked; ``say`` gets every sentence.

    Raises UsageError for a study that is in neither store, StoreError when no store is there.
    """
    diagnosis = Diagnosis()
    tracking, store = tracking_store(tracking_uri), study_store(storage)
    opened = _open(tracking, store, diagnosis, say)
    if opened is None:
        return diagnosis
    tracker, known = opened
    tracked = {record.name: record for record in tracker.studies()}
    foreign = dict(foreign_studies(tracker, store, tracked))
    incomplete = _replay(tracker, store, fix, diagnosis, say, tracked, foreign)
    names = list(dict.fromkeys([*tracked, *known]))
    if name is not None and not name.endswith("/") and name not in names:
        raise UsageError(f"there is no study {name!r} in either store{suggestion(name, names)}")
    for chosen in select(name, names):
        if chosen in incomplete:
            continue
        if chosen in foreign:
            say(f"{chosen}: {foreign[chosen]}")
            diagnosis.skipped += 1
            continue
        try:
            if chosen in known:
                check_readable(known[chosen], store)
        except StoreError as error:
            say(str(error))
            diagnosis.found += 1
            continue
        with ExitStack() as stack:
            try:
                held = stack.enter_context(holding(store, chosen))
            except HeldStudyError as error:
                say(f"{chosen}: skipped, since {str(error).partition(';')[0]}")
                diagnosis.skipped += 1
                continue
            _guard(stack, tracker, known.get(chosen), held)
            diagnosis.studies += 1
            findings = _findings(chosen, tracker, tracked.get(chosen), known.get(chosen), store)
            _treat(chosen, findings, fix, diagnosis, say)
    if name is None:
        _treat("image cache", _damaged_caches(), fix, diagnosis, say)
    return diagnosis


def _damaged_caches() -> Iterator[Finding]:
    from caltech_sweep.data.cache import damaged_caches

    for file in damaged_caches(paths.image_cache()):
        yield Finding(f"{file} is damaged: removed, and decoded again by the next run", file.unlink)


def _guard(stack: ExitStack, tracker: MlflowTracker, study: optuna.Study | None, held: Held) -> None:
    """Let both stores take writes to a study as long as this process holds it."""
    tracker.guard(held.check)
    engine = engine_of(study) if study is not None else None
    if engine is not None:
        stack.enter_context(fencing(engine, held))


def _open(
    tracking: Store, store: Store, diagnosis: Diagnosis, say: Callable[[str], None]
) -> tuple[MlflowTracker, dict[str, optuna.Study]] | None:
    """Open both stores; one that cannot be opened, such as one of another version, is a finding of its own."""
    tracking.check()
    store.check()
    tracker: MlflowTracker | None = None
    known: dict[str, optuna.Study] | None = None
    try:
        tracker = MlflowTracker(tracking)
    except StoreError as error:
        say(str(error))
        diagnosis.found += 1
    try:
        known = stored_studies(open_storage(store))
    except StoreError as error:
        say(str(error))
        diagnosis.found += 1
    return (tracker, known) if tracker is not None and known is not None else None


def _replay(
    tracker: MlflowTracker,
    store: Store,
    fix: bool,
    diagnosis: Diagnosis,
    say: Callable[[str], None],
    tracked: Iterable[str],
    foreign: Container[str],
) -> set[str]:
    """Bring results that wait in a journal first: without them the stores would seem to disagree.

    Returns the studies that still lack some.
    """
    incomplete = set()
    for study, folder in journals(store.folder, tracker.store, lambda: tracked):
        if study in foreign:
            continue
        try:
            with holding(store, study) as held:
                tracker.guard(held.check)
                journaling = JournalingTracker(tracker, Journal(folder), say, held.check)
                text = f"{counted(journaling.waiting, 'write')} in {folder}, not in the tracking store: replayed"
                if journaling.waiting:
                    _treat(study, [Finding(text, partial(_bring, journaling))], fix, diagnosis, say)
                if journaling.waiting:
                    incomplete.add(study)
        except StoreError as error:
            say(f"{study}: {error}")
            incomplete.add(study)
    return incomplete


def _bring(journaling: JournalingTracker) -> None:
    if not journaling.replay():
        raise StoreError(f"the tracking store does not take what waits in {journaling.journal.folder}")


def _treat(name: str, findings: Iterable[Finding], fix: bool, diagnosis: Diagnosis, say: Callable[[str], None]) -> None:
    for finding in findings:
        diagnosis.found += 1
        if finding.fix is None:
            say(f"{name}: {finding.text}")
        elif not fix:
            say(f"{name}: would fix: {finding.text}")
        else:
            finding.fix()
            diagnosis.fixed += 1
            say(f"{name}: fixed: {finding.text}")


def _findings(
    name: str, tracker: MlflowTracker, record: StudyRecord | None, study: optuna.Study | None, store: Store
) -> Iterator[Finding]:
    """Yield what is wrong with a study, in an order in which each fix leaves the later ones true."""
    if record is None:
        yield Finding(
            "is only in the study store; name its tracking store with --tracking-uri, or remove it with "
            f"`optuna delete-study --study-name {name} --storage {store.shown}`",
            None,
        )
        return
    yield from _moved(tracker, record)
    if study is None:
        yield Finding("is only in the tracking store; name its study store with --storage, or put its file back", None)
        return
    runs = _runs_by_trial(tracker.trials(record), study)
    by_worth = partial(worth, sound=lambda run: not any(_damage(tracker, record, run)))
    chosen = {key: max(same, key=by_worth) if len(same) > 1 else same[0] for key, same in runs.items()}
    yield from _surplus(tracker, study, runs, chosen)
    numbers = {key_of(trial) for trial in study.get_trials(deepcopy=False)}
    chosen = {key: run for key, run in chosen.items() if key in numbers}
    yield from survey(study, tracker, chosen, partial(_is_wanted, _wanted(record)))
    yield from _damaged(tracker, record, study, chosen)
    if tracker.status(record.run_id) == "RUNNING":
        yield Finding(
            "is shown as running, but no process is running it: stopped", partial(tracker.finish, record.run_id)
        )


def _runs_by_trial(records: Iterable[TrialRecord], study: optuna.Study) -> dict[Key, list[TrialRecord]]:
    """Return the runs by trial; one with its trial's settings in another spelling, 1 for 1.0, is its own."""
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    runs: dict[Key, list[TrialRecord]] = defaultdict(list)
    for run in records:
        trial = trials.get(run.number)
        same = trial is not None and _has_settings(run, trial.user_attrs.get("config"))
        runs[key_of(trial) if trial is not None and same else (run.number, run.fingerprint)].append(run)
    return runs


def _has_settings(run: TrialRecord, config: Mapping[str, Any] | None) -> bool:
    """Tell whether a run's settings are those of a config, of which an older run may lack the later ones."""
    if config is None or not run.params:
        return False
    wanted = TrialConfig.from_dict(config).to_params()
    counted_ = (name for name in wanted if name.removeprefix("dataset.") not in PLACE_FIELDS)
    return all(_is_equal(run.params.get(name, wanted[name]), wanted[name]) for name in counted_)


def _is_equal(one: str, other: str) -> bool:
    try:
        return one == other or float(one) == float(other)
    except ValueError:
        return False


def _wanted(record: StudyRecord) -> set[tuple[str, str]] | None:
    """Return what the study's rows train, as (name, fingerprint) with every seed; None where it is not known."""
    definition = record.definition
    if definition is None or any(definition.row_config(r).fingerprint() != r.fingerprint for r in definition.rows):
        return None  # its document is lost, or of another version
    return {(row.name, config.fingerprint()) for row, _, config in wanted_rows(definition)}


def _is_wanted(wanted: set[tuple[str, str]] | None, trial: FrozenTrial) -> bool:
    row = trial.user_attrs.get("row")
    return wanted is None or row is None or (row, trial.user_attrs.get("fingerprint")) in wanted


def _moved(tracker: MlflowTracker, record: StudyRecord) -> Iterator[Finding]:
    """Artifact locations are absolute: find those that point nowhere while the artifacts lie next to the database."""
    location = tracker.client.get_experiment(record.experiment_id).artifact_location
    named, moved = local_path(location), tracker.artifacts.moved(record.name)
    if named is None or named.exists():
        return
    if moved is not None and moved.is_dir():
        fix = partial(tracker.move_artifacts, record.experiment_id, location, moved.resolve().as_uri())
        yield Finding(f"its artifacts are no longer in {named}, but in {moved}: locations updated", fix)
    elif tracker.trials(record):
        yield Finding(f"its artifacts are not in {named}; put the folder back, or next to the tracking store", None)


def _surplus(
    tracker: MlflowTracker,
    study: optuna.Study,
    runs: Mapping[Key, list[TrialRecord]],
    chosen: Mapping[Key, TrialRecord],
) -> Iterator[Finding]:
    """Runs that no trial of the study store has, and all but one of those that share a trial.

    A run with a result is discarded only where another one has the result of its trial.
    """
    keys = {key_of(trial) for trial in study.get_trials(deepcopy=False)}
    for key, same in runs.items():
        for run in same:
            name, known = f"run {run.name} ({run.run_id})", key in keys
            if known and run is chosen[key]:
                continue
            if known:
                text = f"{name} repeats another run of its trial: moved to the deleted runs"
            elif run.outcome in RESULTS:
                yield Finding(
                    f"{name} is {run.outcome}, belongs to no trial of the study store, and is kept, since no other run "
                    "has its result; delete it in MLflow, or rebuild the study store from all runs (move its file "
                    "away, then `run --adopt`)",
                    None,
                )
                continue
            else:
                text = f"{name} belongs to no trial of the study store: moved to the deleted runs"
            yield Finding(text, partial(tracker.discard, run.run_id))


def _damaged(
    tracker: MlflowTracker, record: StudyRecord, study: optuna.Study, runs: Mapping[Key, TrialRecord]
) -> Iterator[Finding]:
    """Yield the trials that are complete in both stores and whose artifacts are not what was written.

    Where not even the study's own document is there, their place is missing, and not those of each trial.
    """
    try:
        if not record.document:
            tracker.artifact(record.run_id, STUDY_FILE)
    except ArtifactError:
        yield Finding(
            "its artifacts cannot be read, not even study.json, so no trial is given up for what it lacks; put them "
            "back, or look whether the server hands them out (if only that file is lost, the next run writes it)",
            None,
        )
        return
    for trial in study.get_trials(deepcopy=False):
        run = runs.get(key_of(trial))
        if run is not None and trial.state == TrialState.COMPLETE and run.outcome == "complete":
            problems = list(_damage(tracker, record, run))
            if problems:
                text = f"trial {trial.number} ({run.name}): {'; '.join(problems)}: the next run trains it again"
                yield Finding(text, partial(give_up, tracker, study, trial, run, problems[0]))


def _damage(tracker: MlflowTracker, record: StudyRecord, run: TrialRecord) -> Iterator[str]:
    """Yield what is wrong with a run's artifacts, but for those that are known to be missing."""
    images = dict(record.images)
    if run.params.get("dataset.folds", "1") != "1":  # whose sizes differ by an image or so
        images.pop("val", None)
    artifacts, uri, study = tracker.artifacts, run.artifact_uri, record.name
    yield from artifact_problems(
        run.metrics,
        lambda path: artifacts.text(uri, path, study),
        lambda path: artifacts.file(uri, path, study),
        images,
        missing_artifacts(run.tags),
    )
