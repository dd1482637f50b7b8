"""The trials of one study: what is to run, what runs next, and how each ended. Optuna keeps them.

Rows run first, are never pruned, and may be repeated on further seeds. ``trials`` is a total: a study that resumes
starts only what is missing from it.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import UsageError
from caltech_sweep.stores import reason
from caltech_sweep.study.components import LEARN_FROM_PRUNED, make_sampler, startup_trials
from caltech_sweep.study.definition import Row, StudyDefinition, in_fold
from caltech_sweep.study.grid import EXHAUSTIVE, encode, grid_of, grid_size, param_names, reachable
from caltech_sweep.study.pausing import Contender, make_pausing
from caltech_sweep.sweep import optuna_trials
from caltech_sweep.sweep.optuna_trials import PROMOTED, RUNG, ViewSampler, is_paused, is_unsampled, over_folds
from caltech_sweep.sweep.sharing import next_index
from caltech_sweep.sweep.space import all_branches, enqueue_params, own_branch, sample
from caltech_sweep.text import counted
from caltech_sweep.tracking.records import REPEAT_TAGS, SUGGESTED_BY

CONFIRMING_SEEDS = 3  # at least so many fresh seeds for a trial that is confirmed
REPORT_SECONDS = 1.0  # how long the epochs of running trials may wait to be reported together


@dataclass
class QueuedTrial:
    """A trial that was handed out; ``tags`` say which seed of its row it is, or which trial it confirms."""

    trial: optuna.Trial
    config: TrialConfig
    row: str | None
    prunable: bool
    tags: Mapping[str, str] = field(default_factory=dict)
    reported: int = 0  # the last epoch that Optuna has, or that waits
    rungs: tuple[int, ...] = ()  # epochs after which it may pause
    paused_at: int = 0  # the last epoch that it was paused at
    promoted: int = 0  # it does not pause at this rung or before
    resumes: bool = False  # it was paused until now

    @property
    def number(self) -> int:
        """Its number in the study."""
        return self.trial.number

    @property
    def until(self) -> int:
        """The epoch that it goes on to before another trial may take its slot."""
        return next((rung for rung in self.rungs if rung > self.promoted), self.config.epochs)

    @property
    def name(self) -> str:
        """What people call it: its row, with the seed where there are several, or its number."""
        fold = f"fold {self.config.dataset.fold}" if self.config.dataset.fold else ""
        if "fold_of" in self.tags:
            return f"trial-{self.number:03d} ({fold} of trial-{int(self.tags['fold_of']):03d})"
        if "replicate" in self.tags:
            return f"{self.row} ({', '.join(filter(None, (f'seed {self.config.seed}', fold)))})"
        return self.row or f"trial-{self.number:03d}"


class TrialQueue:
    """Hands out the trials of a study until its total is reached.

    Of the rows only those named ``only`` run, if any; with ``resumed``, these paused trials run to their ends and
    nothing else does.
    """

    def __init__(
        self, definition: StudyDefinition, study: optuna.Study, only: Sequence[str] = (), resumed: Sequence[int] = ()
    ) -> None:
        self.definition, self.study, self.only, self.resumed = definition, study, tuple(only), tuple(resumed)
        self.pausing = make_pausing(definition.pruner)
        self.objective = definition.objective
        if definition.folds > 1:
            study.pruner = optuna_trials.ViewPruner(study.pruner, definition.folds)
        self._sampled_left = 0
        self._exhausts = False  # whether the space ends before the total is reached
        self._unreported: list[tuple[optuna.Trial, int, float]] = []  # epochs that the store has not heard of
        self._reported = time.monotonic()  # when it last was told
        self._complete: list[FrozenTrial] | None = None  # the complete trials, as long as none ends

    def prepare(self) -> tuple[int, int]:
        """Let what is missing wait; return how many trials are done, and how many there will be."""
        definition = self.definition
        if self.resumed:
            self._resume()
        else:
            self._enqueue_missing()
        trials = self.study.get_trials(deepcopy=False)
        waiting = self._waiting(trials)
        done = [trial for trial in trials if (is_finished(trial) or is_paused(trial)) and self.is_current(trial)]
        counted = sum(not is_extra(trial) for trial in done + waiting)
        counted += (definition.family_size - 1) * sum(map(is_unsampled, waiting))
        self._sampled_left = 0 if self.only or self.resumed else max(0, definition.trials - counted)
        if definition.sampler.name in EXHAUSTIVE:
            left = untried(self.study, definition)
            self._exhausts, self._sampled_left = left < self._sampled_left, min(left, self._sampled_left)
        folds = (self.definition.folds - 1) * (self._sampled_left + sum("row" not in t.user_attrs for t in waiting))
        return len(done), len(done) + len(waiting) + self._sampled_left + folds

    def left(self) -> tuple[list[TrialConfig], int]:
        """Return the trials that wait, and how many are yet to be sampled."""
        waiting = self._waiting(self.study.get_trials(deepcopy=False))
        configs = [TrialConfig.from_dict(t.user_attrs["config"]) for t in waiting if not is_unsampled(t)]
        return configs, self._sampled_left + len(waiting) - len(configs)

    def _enqueue_missing(self) -> None:
        """Let rows, schedules of families and settings to be tried again wait."""
        enqueue_missing_rows(self.study, self.definition, self.only)
        for trial in filter(is_family_base, self.study.get_trials(deepcopy=False)):
            complete_family(self.study, self.definition, trial)
        if self.definition.folds > 1:
            for trial in self.study.get_trials(deepcopy=False):
                enqueue_folds(self.study, self.definition, trial)
        if self.definition.sampler.name in EXHAUSTIVE:
            retry_failed(self.study)

    def _resume(self) -> None:
        """Let the trials that were named wait to be run to their ends, whatever rungs lie before them."""
        trials = self.study.get_trials(deepcopy=False)
        for number in self.resumed:
            if is_paused(trials[number]):
                epochs = trials[number].user_attrs["config"]["epochs"]
                optuna_trials.mark_waiting(self.study, trials[number], PROMOTED, epochs)

    def endings(self) -> Iterator[str]:
        """Yield a sentence where the study ends before its total, and one where trials stay paused."""
        if self._exhausts:
            size = grid_size(self.definition.space)
            yield f"the study ends here: all {size:,} combinations of its space were tried once"
        paused = list(filter(is_paused, self.study.get_trials(deepcopy=False)))
        if paused and not (self.only or self.resumed):
            example = paused[0].number
            yield (
                f"{counted(len(paused), 'trial')} left paused, since others were better at the same epoch; more trials "
                f"may promote them, and --resume-trial N runs one to its end, such as --resume-trial {example}"
            )

    def is_current(self, trial: FrozenTrial) -> bool:
        """Tell whether a trial is a sampled one, or trains its row with settings that the row has now."""
        return is_current(trial, self.definition)

    def enqueue_confirmations(self, count: int) -> None:
        """Let the best sampled trials be repeated on fresh seeds."""
        seeds = max(CONFIRMING_SEEDS, self.definition.replicates)
        enqueue_confirmations(self.study, self.definition, count, seeds)

    def _waiting(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return the trials that wait and may be run now, in the order of their numbers."""
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING and not is_paused(trial)]
        if self.resumed:
            return [trial for trial in waiting if trial.number in self.resumed]
        return [trial for trial in waiting if not self.only or trial.user_attrs.get("row") in self.only]

    def next(self, running: Mapping[TrialConfig, int], rows_only: bool = False) -> QueuedTrial | None:
        """Start the next trial: one that waits (an interrupted one, a row), a promoted one, a variant, a sampled one.

        ``running`` holds the epochs that running trials have finished: a trial that shares epochs with one of them
        waits for these, as long as there is something else to do. ``rows_only`` asks for a row, on which no trial
        that still runs has an influence. None: there is nothing to start now.
        """
        self._report()
        trials = self.study.get_trials(deepcopy=False)
        waiting = self._waiting(trials)
        unsampled = next((trial for trial in waiting if is_unsampled(trial)), None)
        if rows_only:
            waiting, unsampled = [trial for trial in waiting if "row" in trial.user_attrs], None
        if unsampled is not None:  # its coordinator died while it was sampled: it gets what it would have got
            sampler = self._sampler(unsampled.number)
            return self._suggest(lambda: optuna_trials.start_unsampled(self.study, unsampled, sampler))
        promoted = None if rows_only else self._promoted(trials)
        if promoted is not None:
            waiting = [trial for trial in waiting if not is_new_variant(trial)]
        configs = [TrialConfig.from_dict(trial.user_attrs["config"]) for trial in waiting]
        other_work = rows_only or promoted is not None or self._sampled_left > 0
        chosen = next_index(configs, running, other_work)
        if chosen is not None:
            return self._start(waiting[chosen])
        if promoted is not None:
            return self._promote(trials[promoted])
        if rows_only or self._sampled_left <= 0:
            return None
        self._sampled_left -= self.definition.family_size
        others = any(trial.state == TrialState.WAITING for trial in trials)
        return self._suggest(lambda: optuna_trials.start_sampled(self.study, self._sampler(len(trials)), others))

    def _promoted(self, trials: Sequence[FrozenTrial], number: int | None = None, rung: int = 0) -> int | None:
        """Return the number of the paused trial that goes on next; trial ``number`` has just reached ``rung``."""
        if self.pausing is None or self.only or self.resumed:
            return None
        contenders = []
        for trial in trials:
            failed = trial.state.is_finished() and not is_finished(trial)
            if failed or is_unsampled(trial) or is_extra(trial):
                continue
            at = rung if trial.number == number else trial.user_attrs[RUNG] if is_paused(trial) else 0
            epochs = trial.user_attrs["config"]["epochs"]
            bracket = None if "row" in trial.user_attrs else self.pausing.bracket(trial.number, epochs)
            results = {epoch: -self.objective.loss(value) for epoch, value in trial.intermediate_values.items()}
            contenders.append(Contender(trial.number, results, at, bracket))
        return self.pausing.promoted(contenders)

    def _promote(self, paused: FrozenTrial) -> QueuedTrial:
        queued = self._start(paused)
        queued.promoted, queued.resumes = queued.paused_at, True
        queued.trial.set_user_attr(PROMOTED, queued.promoted)
        return queued

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        return sampler_for(self.definition, number)

    def _suggest(self, start: Callable[[], optuna.Trial]) -> QueuedTrial:
        """Let Optuna suggest a trial's settings; the other schedules of their family wait from now on."""
        try:
            trial = start()
            settings = sample(trial, self.definition.space)
            settings.update(own_branch(trial, self.definition.expand))
        except (ImportError, ValueError) as error:
            name = self.definition.sampler.name
            raise UsageError(f"sampler {name} cannot suggest settings for this study: {reason(error)}") from error
        config = self.definition.sampled_config(settings)
        if (origin := self._origin()) is not None:
            trial.set_user_attr(SUGGESTED_BY, origin)
        trial.set_user_attr("fingerprint", config.fingerprint())
        trial.set_user_attr("config", json.loads(json.dumps(config.to_dict())))
        if self.definition.expand:
            complete_family(self.study, self.definition, self.study.get_trials(deepcopy=False)[trial.number])
        return self._queued(trial, config)

    def _origin(self) -> str | None:
        """Return whether the trial that is being sampled comes from the sampler's model, where one will be made."""
        component = self.definition.sampler
        if component.name == "random":
            return "random"
        startup = startup_trials(component)
        if startup is None:
            return None
        states = [TrialState.COMPLETE, *([TrialState.PRUNED] if component.name in LEARN_FROM_PRUNED else [])]
        seen = optuna_trials.seen_trials(self.study, self.study.sampler)
        return "random" if sum(trial.state in states for trial in seen) < startup else "model"

    def _start(self, waiting: FrozenTrial) -> QueuedTrial:
        config = TrialConfig.from_dict(waiting.user_attrs["config"])
        trial = optuna_trials.start_waiting(self.study, waiting, self._sampler(waiting.number))
        # Suggesting what is fixed lets the sampler learn from it.
        sample(trial, reachable(self.definition.space, config.to_dict()))
        if waiting.user_attrs.get("row") is None:
            own_branch(trial, self.definition.expand)
        queued = self._queued(trial, config)
        queued.reported = max(waiting.intermediate_values, default=0)
        return queued

    def _queued(self, trial: optuna.Trial, config: TrialConfig) -> QueuedTrial:
        attributes = trial.user_attrs
        row = attributes.get("row")
        tags: dict[str, str] = {
            key: str(attributes[key]) for key in (*REPEAT_TAGS, "family", SUGGESTED_BY) if key in attributes
        }
        prunable = row is None and not {"confirms", "fold_of"} & tags.keys() and self.definition.pruner is not None
        queued = QueuedTrial(trial, config, row, prunable, tags)
        if prunable and self.pausing is not None:
            queued.rungs = self.pausing.rungs(trial.number, config.epochs)
        queued.paused_at, queued.promoted = attributes.get(RUNG, 0), attributes.get(PROMOTED, 0)
        return queued

    def report(self, queued: QueuedTrial, epoch: int, value: float) -> None:
        """Tell the pruner of an epoch; rows too, since others are held against them. The store is told soon."""
        if self.definition.pruner is not None and epoch > queued.reported:
            optuna_trials.note_epoch(queued.trial, epoch, value)
            self._unreported.append((queued.trial, epoch, value))
            queued.reported = epoch
            self.keep_up()

    def keep_up(self) -> None:
        """Tell the store of epochs that have waited long enough."""
        if time.monotonic() - self._reported > REPORT_SECONDS:
            self._report()

    def _report(self) -> None:
        """Tell the store of all epochs; nothing is decided by what it has before that, but by the pruner."""
        if self._unreported:
            optuna_trials.report(self.study, self._unreported)
            self._unreported = []
        self._reported = time.monotonic()

    def stops(self, queued: QueuedTrial, epoch: int) -> str | None:
        """Return "pruned" or "paused" where a trial does not go on after an epoch.

        One that was let through before goes on, and so does one that gets the slot back which it would leave.
        """
        # The last epoch costs nothing more: a trial that got there is complete.
        if epoch != queued.reported or epoch >= queued.config.epochs:
            return None
        if self.pausing is None:
            if self._complete is None:
                self._complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            return "pruned" if optuna_trials.is_pruned(self.study, queued.trial, self._complete) else None
        if epoch not in queued.rungs or epoch <= queued.promoted:
            return None
        self._report()
        trials = self.study.get_trials(deepcopy=False)
        others = any(not is_new_variant(trial) for trial in self._waiting(trials))
        if others or self._promoted(trials, queued.number, epoch) != queued.number:
            return "paused"
        queued.promoted = epoch
        for key in (PROMOTED, RUNG):  # in this order: it never seems to be paused
            queued.trial.set_user_attr(key, epoch)
        return None

    def end(self, queued: QueuedTrial, outcome: str, value: float | None) -> None:
        """Give a trial the state of its outcome; an interrupted or paused one waits again."""
        self._report()
        self._complete = None
        optuna_trials.end_trial(self.study, queued.number, outcome, value)
        if outcome == "complete" and self.definition.folds > 1:
            enqueue_folds(self.study, self.definition, self.study.get_trials(deepcopy=False)[queued.number])


def is_new_variant(trial: FrozenTrial) -> bool:
    """Tell whether a waiting trial is a further schedule of a sampled one that has not been started yet."""
    return "family" in trial.user_attrs and not trial.params


def is_finished(trial: FrozenTrial) -> bool:
    """Tell whether a trial counts towards the study's total and is not to be run again."""
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
        return True
    return trial.state == TrialState.FAIL and trial.user_attrs.get("outcome") == "diverged"


def wanted_rows(definition: StudyDefinition) -> Iterator[tuple[Row, int, TrialConfig]]:
    """Yield every row with each of its trainings: all first folds and seeds, then all second ones, and so on."""
    for replicate in range(definition.trainings):
        for row in definition.rows:
            yield row, replicate, definition.row_config(row, replicate)


def is_extra(trial: FrozenTrial) -> bool:
    """Tell whether a trial repeats another on a further seed or fold; ``trials`` does not count these."""
    return bool(set(REPEAT_TAGS) & trial.user_attrs.keys())


def is_current(trial: FrozenTrial, definition: StudyDefinition) -> bool:
    """Tell whether a trial is a sampled one, or trains its row with settings that the row has now.

    A replicate stays current when fewer are asked for later: it was trained, and the table shows it.
    """
    name = trial.user_attrs.get("row")
    if name is None:
        return True
    replicate = trial.user_attrs.get("replicate", 0)
    rows = [row for row in definition.rows if row.name == name]
    return any(definition.row_config(row, replicate).fingerprint() == trial.user_attrs["fingerprint"] for row in rows)


def enqueue_missing_rows(study: optuna.Study, definition: StudyDefinition, only: Sequence[str] = ()) -> None:
    """Let every row wait that no trial has trained, or waits to train, with the settings that it has now.

    What a row trains is stored with its trial, since Optuna resamples what its space lacks.
    """
    known = {
        (trial.user_attrs.get("row"), trial.user_attrs.get("fingerprint"))
        for trial in study.get_trials(deepcopy=False)
        if is_finished(trial) or trial.state == TrialState.WAITING
    }
    for row, replicate, config in wanted_rows(definition):
        if (row.name, config.fingerprint()) in known or (only and row.name not in only):
            continue
        attributes = {"row": row.name, **({"replicate": replicate} if replicate else {})}
        _enqueue(study, enqueue_params(definition.space, config.to_dict()), config, attributes)


def enqueue_confirmations(study: optuna.Study, definition: StudyDefinition, count: int, seeds: int) -> None:
    """Let the best sampled trials be repeated on fresh seeds, none of which took part in choosing them."""
    trials, better = study.get_trials(deepcopy=False), definition.objective.loss
    sampled = [
        trial
        for trial in over_folds(trials, definition.folds)
        if trial.state == TrialState.COMPLETE and "row" not in trial.user_attrs and not is_extra(trial)
    ]
    known = {(t.user_attrs["confirms"], t.user_attrs["fingerprint"]) for t in trials if "confirms" in t.user_attrs}
    for trial in sorted(sampled, key=lambda t: (better(t.value or 0), t.number))[:count]:
        config = TrialConfig.from_dict(trial.user_attrs["config"])
        for further, fold in itertools.product(range(1, seeds + 1), range(1, definition.folds + 1)):
            repeat = replace(config, seed=config.seed + further)
            repeat = in_fold(repeat, fold) if definition.folds > 1 else repeat
            if (trial.number, repeat.fingerprint()) not in known:
                _enqueue(study, trial.params, repeat, {"confirms": trial.number})


def enqueue_folds(study: optuna.Study, definition: StudyDefinition, base: FrozenTrial) -> None:
    """Let a sampled trial that is complete be trained on the other folds too, unless it is or waits to be."""
    if base.state != TrialState.COMPLETE or {"row", *REPEAT_TAGS} & base.user_attrs.keys():
        return
    config = TrialConfig.from_dict(base.user_attrs["config"])
    known = {
        trial.user_attrs["fingerprint"]
        for trial in study.get_trials(deepcopy=False)
        if trial.user_attrs.get("fold_of") == base.number and (is_finished(trial) or not trial.state.is_finished())
    }
    for fold in range(2, definition.folds + 1):
        other = in_fold(config, fold)
        if other.fingerprint() not in known:
            _enqueue(study, base.params, other, {"fold_of": base.number})


def _enqueue(
    study: optuna.Study, params: Mapping[str, Any], config: TrialConfig, attributes: Mapping[str, Any]
) -> None:
    stored = {**attributes, "config": config.to_dict(), "fingerprint": config.fingerprint()}
    study.enqueue_trial(dict(params), json.loads(json.dumps(stored)))


def complete_family(study: optuna.Study, definition: StudyDefinition, base: FrozenTrial) -> None:
    """Let every schedule of a sampled trial's family wait, that is not there yet, to be trained."""
    config = TrialConfig.from_dict(base.user_attrs["config"])
    family = [t for t in study.get_trials(deepcopy=False) if base.number in (t.number, t.user_attrs.get("family"))]
    known = {trial.user_attrs["fingerprint"] for trial in family}
    for settings in all_branches(definition.expand):
        branch = replace(config, **settings)
        if branch.fingerprint() not in known:
            params = {**base.params, **{key: encode(value) for key, value in settings.items()}}
            _enqueue(study, params, branch, {"family": base.number})


def retry_failed(study: optuna.Study) -> None:
    """Let the settings of sampled trials that failed wait again; an exhaustive sampler gives each only once."""
    trials = study.get_trials(deepcopy=False)
    known = {t.user_attrs.get("fingerprint") for t in trials if is_finished(t) or not t.state.is_finished()}
    for trial in filter(is_family_base, trials):
        if trial.user_attrs["fingerprint"] not in known:
            known.add(trial.user_attrs["fingerprint"])
            _enqueue(study, trial.params, TrialConfig.from_dict(trial.user_attrs["config"]), {})


def untried(study: optuna.Study, definition: StudyDefinition) -> int:
    """Return how many combinations of a finite space no trial has tried, tries or waits to try.

    For ``brute_force`` a row's settings count as tried, for ``grid`` they do not: as in Optuna.
    """
    names, tried = sorted(grid_of(definition.space)), set()
    for trial in study.get_trials(deepcopy=False):
        params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        if params.keys() == set(names) and (definition.sampler.name != "grid" or "row" not in trial.user_attrs):
            tried.add(tuple(params[name] for name in names))
    undecided = sum(not trial.state.is_finished() and is_unsampled(trial) for trial in study.get_trials(deepcopy=False))
    return max(0, grid_size(definition.space) - len(tried) - undecided)


def is_family_base(trial: FrozenTrial) -> bool:
    """Tell whether a trial was sampled, rather than being a row or a further schedule of a sampled one."""
    return "config" in trial.user_attrs and not {"row", "family", *REPEAT_TAGS} & trial.user_attrs.keys()


def sampler_for(definition: StudyDefinition, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler that suggests the settings of one trial."""
    space = definition.space
    sampler = make_sampler(definition.sampler, number, space)
    configs = [definition.row_config(row).to_dict() for row in definition.rows]
    inside = definition.sampler.name in EXHAUSTIVE or all(reachable(space, config) == space for config in configs)
    return ViewSampler(sampler, () if inside else param_names(space), definition.folds)
