"""How much each setting mattered, by Optuna, from plain values: the report knows no Optuna."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator

# fANOVA explains the whole of the variance and works with few trials, but its time grows with them; Optuna's default,
# PED-ANOVA, is instant for any number and needs many.
_FANOVA_TRIALS = 100


def importances(space: Mapping[str, Any], trials: Sequence[tuple[Mapping[str, str], float]]) -> dict[str, float]:
    """Return the share of the objective's variance that each setting of a space explains, the largest first.

    ``space`` is a study's document's; ``trials`` are (settings as text, objective). Settings that no trial varied are
    left out, and nothing is returned when there is nothing to tell apart.
    """
    columns = {key: [_parse(dimension, params.get(key)) for params, _ in trials] for key, dimension in space.items()}
    columns = {key: values for key, values in columns.items() if None not in values and len(set(values)) > 1}
    scores = [score for _, score in trials]
    if not columns or len(set(scores)) < 2:
        return {}
    distributions = {key: _distribution(space[key], values) for key, values in columns.items()}
    study = _study(columns, distributions, scores)
    few = len(trials) <= _FANOVA_TRIALS
    evaluator = FanovaImportanceEvaluator(seed=0) if few else PedAnovaImportanceEvaluator()
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(value) for key, value in found.items() if math.isfinite(value)}


def _study(
    columns: Mapping[str, Sequence[Any]], distributions: dict[str, BaseDistribution], scores: Sequence[float]
) -> optuna.Study:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a study in memory is no news
    try:
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
        for index, score in enumerate(scores):
            params = {key: values[index] for key, values in columns.items()}
            study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=score))
    finally:
        optuna.logging.set_verbosity(verbosity)
    return study


def _is_range(dimension: Any) -> bool:
    return isinstance(dimension, Mapping) and "low" in dimension


def _parse(dimension: Any, text: str | None) -> float | str | None:
    """Return a setting as a number of a range or as the text of a choice; None when a run does not have it."""
    if text is None or not _is_range(dimension):
        return text
    try:
        return float(text)
    except ValueError:
        return None


def _distribution(dimension: Any, values: Sequence[Any]) -> BaseDistribution:
    """Return the distribution that the values came from; they may exceed what an edited document says."""
    if not _is_range(dimension):
        return CategoricalDistribution(sorted(set(values)))
    low, high = min(values), max(values)
    return FloatDistribution(low, high, log=bool(dimension.get("log")) and low > 0)
