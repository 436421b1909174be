import numpy as np

from steerlm_nemo.evaluation.intervals import bootstrap_interval


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
