import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_nemo.evaluation.statistics import bootstrap_interval, mean_ranks, pearson, spearman


def test_ranks_of_equal_values_are_their_mean():
    assert mean_ranks([10, 30, 20, 30]).tolist() == [1, 3.5, 2, 3.5]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=60))
def test_correlations_are_scipys(pairs):
    scipy_stats = pytest.importorskip("scipy.stats")
    x, y = zip(*pairs, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert pearson(x, y) is None and spearman(x, y) is None
    else:
        assert pearson(x, y) == pytest.approx(scipy_stats.pearsonr(x, y).statistic, abs=1e-9)
        assert spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y).statistic, abs=1e-9)


def test_one_point_has_no_correlation():
    assert pearson([1], [1]) is None


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        sample = rng.normal(2.0, 1.0, size=40).tolist()
        low, high = bootstrap_interval(sample, lambda values: float(np.mean(values)), seed=trial)
        covered += low <= 2.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_statistic_that_never_exists_has_no_interval():
    assert bootstrap_interval([1, 2, 3], lambda values: None) is None
