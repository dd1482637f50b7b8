"""The trials of one study: what is to run, what runs next, and how each ended. Optuna keeps them.

Rows run first, are never pruned, and may be repeated on further seeds. ``trials`` is a total: a study that resumes
starts only what is missing from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from caltech_sweep.config import TrialConfig
from caltech_sweep.errors import UsageError
from caltech_sweep.metrics import Objective
from caltech_sweep.stores import reason
from caltech_sweep.study.components import make_sampler
from caltech_sweep.study.definition import Row, StudyDefinition, in_fold
from caltech_sweep.study.grid import EXHAUSTIVE, grid_of, grid_size, param_names, reachable
from caltech_sweep.sweep import optuna_trials
from caltech_sweep.sweep.optuna_trials import InSpaceSampler, is_unsampled
from caltech_sweep.sweep.sharing import next_index
from caltech_sweep.sweep.space import all_branches, enqueue_params, own_branch, sample
from caltech_sweep.tracking.records import REPEAT_TAGS

CONFIRMING_SEEDS = 3  # at least so many fresh seeds for a trial that is confirmed


@dataclass
class QueuedTrial:
    """A trial that was handed out; ``tags`` say which seed of its row it is, or which trial it confirms."""

    trial: optuna.Trial
    config: TrialConfig
    row: str | None
    prunable: bool
    tags: Mapping[str, str] = field(default_factory=dict)
    reported: int = 0  # the last epoch that Optuna has

    @property
    def number(self) -> int:
        """Its number in the study."""
        return self.trial.number

    @property
    def until(self) -> int:
        """The epoch that it goes on to before another trial may take its slot."""
        return self.config.epochs

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
    """Hands out the trials of a study until its total is reached; of the rows only those named ``only``, if any."""

    def __init__(self, definition: StudyDefinition, study: optuna.Study, only: Sequence[str] = ()) -> None:
        self.definition, self.study, self.only = definition, study, tuple(only)
        self.objective = definition.objective
        self._sampled_left = 0
        self._exhausts = False  # whether the space ends before the total is reached

    def prepare(self) -> tuple[int, int]:
        """Let what is missing wait; return how many trials are done, and how many there will be."""
        definition = self.definition
        enqueue_missing_rows(self.study, definition, self.only)
        for trial in filter(is_family_base, self.study.get_trials(deepcopy=False)):
            complete_family(self.study, definition, trial)
        for trial in self.study.get_trials(deepcopy=False):
            enqueue_folds(self.study, definition, trial)
        if definition.sampler.name in EXHAUSTIVE:
            retry_failed(self.study)
        trials = self.study.get_trials(deepcopy=False)
        waiting = self._waiting(trials)
        done = [trial for trial in trials if is_finished(trial) and self.is_current(trial)]
        counted = sum(not is_extra(trial) for trial in done + waiting)
        counted += (definition.family_size - 1) * sum(map(is_unsampled, waiting))
        self._sampled_left = 0 if self.only else max(0, definition.trials - counted)
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

    def ending(self) -> str | None:
        """Return a sentence where the study ends before its total, because its space does."""
        size = f"{grid_size(self.definition.space):,} combinations" if self._exhausts else ""
        return f"the study ends here: all {size} of its space have been tried, each once" if size else None

    def is_current(self, trial: FrozenTrial) -> bool:
        """Tell whether a trial is a sampled one, or trains its row with settings that the row has now."""
        return is_current(trial, self.definition)

    def enqueue_confirmations(self, count: int) -> None:
        """Let the best sampled trials be repeated on fresh seeds."""
        seeds = max(CONFIRMING_SEEDS, self.definition.replicates)
        enqueue_confirmations(self.study, self.objective, count, seeds)

    def _waiting(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return the trials that wait and may be run now, in the order of their numbers."""
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        return [trial for trial in waiting if not self.only or trial.user_attrs.get("row") in self.only]

    def next(self, running: Mapping[TrialConfig, int]) -> QueuedTrial | None:
        """Start the next trial: one that waits (an interrupted one, a row, a variant), or else a sampled one.

        ``running`` holds the epochs that running trials have finished: a trial that shares epochs with one of them
        waits for these, as long as there is something else to do. None: there is nothing to start now.
        """
        trials = self.study.get_trials(deepcopy=False)
        waiting = self._waiting(trials)
        unsampled = next((trial for trial in waiting if is_unsampled(trial)), None)
        if unsampled is not None:  # its coordinator died while it was sampled: it gets what it would have got
            sampler = self._sampler(unsampled.number)
            return self._suggest(lambda: optuna_trials.start_unsampled(self.study, unsampled, sampler))
        configs = [TrialConfig.from_dict(trial.user_attrs["config"]) for trial in waiting]
        chosen = next_index(configs, running, other_work=self._sampled_left > 0)
        if chosen is not None:
            return self._start(waiting[chosen])
        if self._sampled_left <= 0:
            return None
        self._sampled_left -= self.definition.family_size
        return self._suggest(lambda: optuna_trials.start_sampled(self.study, self._sampler(len(trials))))

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
        trial.set_user_attr("fingerprint", config.fingerprint())
        trial.set_user_attr("config", json.loads(json.dumps(config.to_dict())))
        if self.definition.expand:
            complete_family(self.study, self.definition, self.study.get_trials(deepcopy=False)[trial.number])
        return self._queued(trial, config)

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
        tags: dict[str, str] = {key: str(attributes[key]) for key in (*REPEAT_TAGS, "family") if key in attributes}
        prunable = row is None and not {"confirms", "fold_of"} & tags.keys() and self.definition.pruner is not None
        return QueuedTrial(trial, config, row, prunable, tags)

    def report(self, queued: QueuedTrial, epoch: int, value: float) -> None:
        """Tell the pruner of an epoch; rows too, since others are held against them."""
        if self.definition.pruner is not None and epoch > queued.reported:
            queued.trial.report(value, epoch)
            queued.reported = epoch

    def should_stop(self, queued: QueuedTrial, epoch: int) -> bool:
        """Tell whether the pruner ends a trial after an epoch; one that it let through before goes on."""
        # The last epoch costs nothing more: a trial that got there is complete.
        return epoch == queued.reported and epoch < queued.config.epochs and queued.trial.should_prune()

    def end(self, queued: QueuedTrial, outcome: str, value: float | None) -> None:
        """Give a trial the state of its outcome; an interrupted one waits again."""
        if outcome == "interrupted":
            optuna_trials.requeue(self.study, queued.number)
        else:
            optuna_trials.end_trial(self.study, queued.number, outcome, value)
            enqueue_folds(self.study, self.definition, self.study.get_trials(deepcopy=False)[queued.number])


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


def enqueue_confirmations(study: optuna.Study, objective: Objective, count: int, seeds: int) -> None:
    """Let the best sampled trials be repeated on fresh seeds, none of which took part in choosing them."""
    trials = study.get_trials(deepcopy=False)
    sampled = [t for t in trials if t.state == TrialState.COMPLETE and "row" not in t.user_attrs and not is_extra(t)]
    known = {(t.user_attrs["confirms"], t.user_attrs["fingerprint"]) for t in trials if "confirms" in t.user_attrs}
    for trial in sorted(sampled, key=lambda t: (objective.loss(t.value or 0), t.number))[:count]:
        config = TrialConfig.from_dict(trial.user_attrs["config"])
        for further in range(1, seeds + 1):
            repeat = replace(config, seed=config.seed + further)
            if (trial.number, repeat.fingerprint()) not in known:
                _enqueue(study, trial.params, repeat, {"confirms": trial.number})


def enqueue_folds(study: optuna.Study, definition: StudyDefinition, base: FrozenTrial) -> None:
    """Let a sampled trial that is complete be trained on the other folds too, unless it is or waits to be."""
    if definition.folds == 1 or base.state != TrialState.COMPLETE or {"row", *REPEAT_TAGS} & base.user_attrs.keys():
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
            _enqueue(study, {**base.params, **settings}, branch, {"family": base.number})


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
    if definition.sampler.name in EXHAUSTIVE or all(reachable(space, config) == space for config in configs):
        return sampler
    return InSpaceSampler(sampler, param_names(space))
