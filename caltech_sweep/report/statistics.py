"""The intervals and tests of the tables, all from statsmodels and scipy."""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Iterator, Sequence

ALPHA = 0.05  # intervals are 95%, and a corrected p-value below this tells two rows apart


def wilson_interval(accuracy: float, images: int) -> tuple[float, float]:
    """Return the 95% Wilson interval of an accuracy over some images."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(round(accuracy * images), images, alpha=ALPHA, method="wilson")
    return float(low), float(high)


def mean_interval(accuracies: Sequence[float]) -> tuple[float, float, float]:
    """Return the standard deviation of accuracies over seeds and the 95% t interval of their mean, within 0 and 1."""
    from scipy.stats import t

    mean, deviation = statistics.fmean(accuracies), statistics.stdev(accuracies)
    if deviation == 0:  # scipy has no interval of no width
        return 0.0, mean, mean
    error = deviation / len(accuracies) ** 0.5
    low, high = t.interval(1 - ALPHA, len(accuracies) - 1, loc=mean, scale=error)
    return deviation, max(0.0, float(low)), min(1.0, float(high))


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Return the p-value of the exact McNemar test that two models are right equally often on the same images."""
    from statsmodels.stats.contingency_tables import mcnemar

    cells = [[0, 0], [0, 0]]
    for one, other in zip(first, second, strict=True):
        cells[not one][not other] += 1
    return float(mcnemar(cells, exact=True).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected by Holm's method for being tested together."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return []
    with _cheap_collection():
        return [float(p) for p in multipletests(p_values, method="holm")[1]]


@contextlib.contextmanager
def _cheap_collection() -> Iterator[None]:
    """Keep what lives out of garbage collections: multipletests forces one at each call, 0.2 s beside MLflow."""
    if gc.get_freeze_count():  # someone else's, which unfreezing would undo
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
