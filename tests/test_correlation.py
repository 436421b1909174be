import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm_nemo.correlation import mean_ranks, pearson, spearman


def test_ranks_of_equal_values_are_their_mean():
    assert mean_ranks([10, 30, 20, 30]).tolist() == [1, 3.5, 2, 3.5]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=60))
def test_correlations_are_scipys(pairs):
    x, y = zip(*pairs, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert pearson(x, y) is None and spearman(x, y) is None
    else:
        assert pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-9)
        assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-9)


def test_one_point_has_no_correlation():
    assert pearson([1], [1]) is None


def test_points_that_are_counted_are_points_that_are_repeated():
    assert pearson([0, 1, 2, 9], [1, 0, 2, 9], [3, 1, 2, 0]) == pytest.approx(
        pearson([0] * 3 + [1, 2, 2], [1] * 3 + [0, 2, 2])
    )
    assert pearson([0, 1], [0, 1], [5, 0]) is None
