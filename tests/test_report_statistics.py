"""Intervals and tests against published examples and against statsmodels."""

import gc
import statistics
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from caltech_sweep.report.statistics import holm, mcnemar_exact, mean_interval, wilson_interval


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    # Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine 17 (1998), method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(right: int, images: int, low: float, high: float) -> None:
    assert wilson_interval(right / images, images) == pytest.approx((low, high), abs=5e-5)


def test_accuracies_of_rounding_floats_are_whole_numbers_of_images() -> None:
    for right in range(2894):
        assert round(right / 2893 * 2893) == right


def test_the_interval_of_a_mean_is_that_of_a_t_test() -> None:
    accuracies = [0.871, 0.866, 0.879, 0.868]
    deviation, low, high = mean_interval(accuracies)
    assert deviation == pytest.approx(np.std(accuracies, ddof=1))
    assert (low, high) == pytest.approx(tuple(stats.ttest_1samp(accuracies, 0).confidence_interval(0.95)))


def test_the_interval_of_a_mean_stays_an_accuracy() -> None:
    assert mean_interval([0.9, 0.9]) == (0.0, 0.9, 0.9)
    _, low, high = mean_interval([0.5, 0.99])
    assert (low, high) == (0.0, 1.0)
    assert statistics.fmean([0.5, 0.99]) < high


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (5, 5), (2, 11), (30, 12), (0, 9)])
def test_mcnemar_is_the_binomial_test_of_the_images_that_only_one_gets_right(only_first: int, only_second: int) -> None:
    first = [True] * 40 + [False] * 7 + [True] * only_first + [False] * only_second
    second = [True] * 40 + [False] * 7 + [False] * only_first + [True] * only_second
    total = only_first + only_second
    expected = min(1.0, 2 * stats.binom.cdf(min(only_first, only_second), total, 0.5))
    assert mcnemar_exact(first, second) == pytest.approx(expected)
    assert mcnemar_exact(second, first) == pytest.approx(expected)


def test_mcnemar_on_a_published_table() -> None:
    # 59 and 121 discordant pairs: the worked example of statsmodels and of R's exact2x2, p = 4.434e-06
    cells = [(True, True)] * 101 + [(True, False)] * 121 + [(False, True)] * 59 + [(False, False)] * 33
    first, second = zip(*cells, strict=True)
    assert mcnemar_exact(first, second) == pytest.approx(4.434e-06, rel=1e-3)


def test_holm_on_the_textbook_example() -> None:
    # p = 0.01, 0.04, 0.03, 0.005: rejected in the order 0.005 * 4, 0.01 * 3, 0.03 * 2, then not below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7]) == [0.7]
    assert holm([]) == []


@pytest.fixture(scope="module")
def little_garbage() -> Iterator[None]:
    """Let the collector pass over what is there already: statsmodels calls it each time, half a second."""
    gc.freeze()
    yield
    gc.unfreeze()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_is_that_of_statsmodels(little_garbage: None, p_values: list[float]) -> None:
    from statsmodels.stats.multitest import multipletests

    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_mcnemar_and_wilson_are_those_of_statsmodels(only_first: int, only_second: int, both: int) -> None:
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.proportion import proportion_confint

    first = [True] * (both + only_first) + [False] * only_second
    second = [True] * both + [False] * only_first + [True] * only_second
    theirs = mcnemar([[both, only_first], [only_second, 0]], exact=True)
    assert mcnemar_exact(first, second) == pytest.approx(float(theirs.pvalue))
    images = only_first + only_second + 1
    expected = proportion_confint(only_first, images, alpha=0.05, method="wilson")
    assert wilson_interval(only_first / images, images) == pytest.approx(expected, abs=1e-12)
