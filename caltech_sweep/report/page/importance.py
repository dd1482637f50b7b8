"""Which settings mattered, and how much by Optuna, from plain values: the report knows no Optuna."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator

from caltech_sweep.report.model import Importance, Share
from caltech_sweep.report.statistics import ALPHA, holm
from caltech_sweep.study.definition import Dimension, Range

Floats = NDArray[np.float64]

# With fewer trials even a setting of two values that decides everything may be a coincidence: 2 of the 70 ways to halve
# 8 trials do so, 3%, which is too much where several settings are looked at together.
FEWEST = 10
_MOST = 100  # trials that Optuna weighs; the time of fANOVA grows with them
_SHUFFLES = 2000
_RESAMPLES = 39  # of which the extremes hold 95%
_FEW_TREES = 8


def weigh(space: Mapping[str, Dimension], trials: Sequence[tuple[Mapping[str, str], float]]) -> Importance | None:
    """Return which settings of a space mattered, and how much, or None when there are not ``FEWEST`` trials.

    ``space`` is a study's; ``trials`` are (settings as text, objective). Optuna's shares sum to 1 on noise
    too, so a setting has one only if it explains more of the objective's ranks than it does when the objective is
    shuffled (p below ALPHA, corrected for all settings that vary).
    """
    columns = _columns(space, trials)
    scores = np.array([score for _, score in trials])
    if len(trials) < FEWEST:
        return None
    if not columns or len(set(scores.tolist())) < 2:
        return Importance({}, tuple(columns))
    random = np.random.default_rng(0)
    p_values = holm([_p_value(space[key], values, scores, random) for key, values in columns.items()])
    real = {key for key, p_value in zip(columns, p_values, strict=True) if p_value < ALPHA}
    chance = tuple(key for key in columns if key not in real)
    if not real:
        return Importance({}, chance)
    chosen = sorted(random.permutation(len(trials))[:_MOST].tolist())
    weighed = [trials[index] for index in chosen]
    shares = {key: value for key, value in importances(space, weighed).items() if key in real}
    draws: dict[str, list[float]] = {key: [value] for key, value in shares.items()}
    for _ in range(_RESAMPLES):
        drawn = [weighed[index] for index in random.integers(0, len(weighed), len(weighed))]
        found = importances(space, drawn, trees=_FEW_TREES)
        for key, values in draws.items():
            values.append(found.get(key, 0.0))
    return Importance({key: Share(value, min(draws[key]), max(draws[key])) for key, value in shares.items()}, chance)


def _p_value(dimension: Dimension, values: Sequence[Any], scores: Floats, random: np.random.Generator) -> float:
    """Return how often a setting explains as much of a shuffled objective's ranks as of the real one's."""
    from scipy.stats import rankdata

    if _is_range(dimension):  # a curve over its ranks, since the best value may lie in the middle
        ranks = rankdata(values)
        basis = np.stack([ranks, (ranks - ranks.mean()) ** 2], axis=1)
    else:
        basis = np.array([[value == choice for choice in sorted(set(values))] for value in values], dtype=float)
    vectors, sizes, _ = np.linalg.svd(basis - basis.mean(axis=0), full_matrices=False)
    vectors = vectors[:, sizes > 1e-9 * sizes[0]]
    objective = rankdata(scores) - (len(scores) + 1) / 2
    shuffled = random.permuted(np.tile(objective, (_SHUFFLES, 1)), axis=1)
    explained = ((shuffled @ vectors) ** 2).sum(axis=1)
    real = ((objective @ vectors) ** 2).sum()
    return float((1 + (explained >= real * (1 - 1e-9)).sum()) / (1 + _SHUFFLES))


def importances(
    space: Mapping[str, Dimension], trials: Sequence[tuple[Mapping[str, str], float]], trees: int = 64
) -> dict[str, float]:
    """Return the share of the objective's variance that each setting of a space explains, the largest first.

    They are those of Optuna's fANOVA, of what the settings explain together; on noise they sum to 1 as well. Settings
    that no trial varied are left out, and nothing is returned when there is nothing to tell apart.
    """
    columns = _columns(space, trials)
    scores = [score for _, score in trials]
    if not columns or len(set(scores)) < 2:
        return {}
    distributions = {key: _distribution(space[key], values) for key, values in columns.items()}
    study = _study(columns, distributions, scores)
    found = optuna.importance.get_param_importances(study, evaluator=FanovaImportanceEvaluator(n_trees=trees, seed=0))
    return {key: float(value) for key, value in found.items() if math.isfinite(value)}


def _columns(
    space: Mapping[str, Dimension], trials: Sequence[tuple[Mapping[str, str], float]]
) -> dict[str, list[float | str | None]]:
    """Return the values of the settings that every trial has and that vary."""
    columns = {key: [_parse(dimension, params.get(key)) for params, _ in trials] for key, dimension in space.items()}
    return {key: values for key, values in columns.items() if None not in values and len(set(values)) > 1}


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


def _is_range(dimension: Dimension) -> TypeGuard[Range]:
    return isinstance(dimension, Range)


def _parse(dimension: Dimension, text: str | None) -> float | str | None:
    """Return a setting as a number of a range or as the text of a choice; None when a run does not have it."""
    if text is None or not _is_range(dimension):
        return text
    try:
        return float(text)
    except ValueError:
        return None


def _distribution(dimension: Dimension, values: Sequence[Any]) -> BaseDistribution:
    """Return the distribution that the values came from; they may exceed what an edited document says."""
    if not _is_range(dimension):
        return CategoricalDistribution(sorted(set(values)))
    low, high = min(values), max(values)
    return FloatDistribution(low, high, log=dimension.log and low > 0)
