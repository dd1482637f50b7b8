"""The intervals and tests of the tables, from scipy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
SHUFFLES = 2000
ALPHA = 0.05  # intervals are 95%, and a corrected p-value below this tells two rows apart


def wilson_interval(accuracy: float, images: int) -> tuple[float, float]:
    """Return the 95% Wilson interval of an accuracy over some images."""
    from scipy.stats import binomtest

    right = round(accuracy * images)
    test = binomtest(right, images, right / images)  # for whose p-value, which is not used, scipy need not search
    low, high = test.proportion_ci(1 - ALPHA, method="wilson")
    return float(low), float(high)


def mean_interval(accuracies: Sequence[float], share: bool = True) -> tuple[float, float, float]:
    """Return the standard deviation of scores over seeds and the 95% t interval of their mean.

    The interval of a ``share`` lies within 0 and 1.
    """
    from scipy.stats import t

    mean, deviation = statistics.fmean(accuracies), statistics.stdev(accuracies)
    if deviation == 0:  # scipy has no interval of no width
        return 0.0, mean, mean
    error = deviation / len(accuracies) ** 0.5
    low, high = t.interval(1 - ALPHA, len(accuracies) - 1, loc=mean, scale=error)
    return deviation, max(0.0, float(low)), min(1.0, float(high)) if share else float(high)


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Return the p-value of the exact McNemar test that two models are right equally often on the same images."""
    from scipy.stats import binomtest

    differing = [one for one, other in zip(first, second, strict=True) if one != other]
    return float(binomtest(sum(differing), len(differing)).pvalue) if differing else 1.0


def paired_permutation(
    labels: Ints, first: Ints, second: Ints, measure: Callable[[Ints, Ints], float], shuffles: int = SHUFFLES
) -> float:
    """Return the p-value of the paired permutation test that two models reach the same on the same images.

    ``measure`` gives a score for (N,) labels and predictions. In each shuffle, the models' predictions of half of the
    images, chosen at random, change places (Good, Permutation Tests, 2nd edition, 2000).
    """
    random = np.random.default_rng(0)
    observed = abs(measure(labels, first) - measure(labels, second))
    as_large = 0
    for _ in range(shuffles):
        swap = random.random(len(labels)) < 0.5
        one, other = np.where(swap, second, first), np.where(swap, first, second)
        as_large += abs(measure(labels, one) - measure(labels, other)) >= observed - 1e-12
    return (1 + as_large) / (1 + shuffles)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for being tested together (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    values = np.asarray(p_values, dtype=float)
    order = values.argsort()
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1)
    return [float(value) for value in corrected]
