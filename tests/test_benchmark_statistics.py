"""benchmark/statistics.py against hand-computed cases, SciPy and rliable."""

import importlib

import numpy as np
import pytest

from benchmark import tasks

ROOT = tasks.ROOT
PATIENCE = 150  # seconds that a process may take on a busy machine


@pytest.fixture
def statistics(monkeypatch):
    pytest.importorskip("rliable")
    module = importlib.import_module("benchmark.statistics")
    monkeypatch.setattr(module, "REPETITIONS", 200)
    return module


def test_interquartile_mean(statistics):
    """Of 1 ... 8 the quarters {1, 2} and {7, 8} are cut off; of three scores none is."""
    import scipy.stats
    from rliable import metrics
    assert statistics.iqm(np.array([[1.0, 8], [7, 2], [3, 6], [4, 5.4]])) == pytest.approx((3 + 4 + 5.4 + 6) / 4)
    assert statistics.iqm(np.array([[1.0], [2], [9]])) == pytest.approx(4)
    scores = np.random.default_rng(0).normal(size=(10, 7))
    assert statistics.iqm(scores) == pytest.approx(metrics.aggregate_iqm(scores))
    assert statistics.iqm(scores) == pytest.approx(scipy.stats.trim_mean(scores.ravel(), 0.25))
    curves = np.stack([scores, 2 * scores + 1], -1)
    np.testing.assert_allclose(statistics.iqm(curves), [statistics.iqm(scores)[0], 2 * statistics.iqm(scores)[0] + 1])


def test_interval_is_repeatable_and_of_each_point(statistics, monkeypatch):
    monkeypatch.setattr(statistics, "REPETITIONS", 2000)
    scores = np.random.default_rng(1).normal(size=(10, 5)) + np.arange(5)
    ours = statistics.interval(scores)[:, 0]
    assert ours[1] < ours[0] < ours[2] and ours[2] - ours[1] > 0.3
    np.testing.assert_array_equal(ours, statistics.interval(scores)[:, 0])
    curves = statistics.interval(np.stack([scores, scores + 7], -1))
    assert curves.shape == (3, 2)
    np.testing.assert_allclose(curves[:, 1] - curves[:, 0], 7, atol=0.05)
    np.testing.assert_allclose(curves[:, 0], ours, atol=0.1)


def test_bootstrap_draws_within_tasks(statistics):
    """Where all runs of a task are alike, nothing varies, however different tasks are."""
    scores = np.tile([0.0, 10.0, 500.0], (4, 1))
    np.testing.assert_array_equal(statistics.interval(scores, lambda x: np.array([x.mean()]))[:, 0], 170)


def test_interval_of_means_is_the_standard_error(statistics, monkeypatch):
    monkeypatch.setattr(statistics, "REPETITIONS", 4000)
    scores = np.random.default_rng(2).normal(size=(50, 1))
    _, low, high = statistics.interval(scores, lambda x: np.array([x.mean()]))[:, 0]
    error = scores.std() / 50**0.5
    np.testing.assert_allclose([low, high], [scores.mean() - 1.96 * error, scores.mean() + 1.96 * error], atol=0.15 * error)


def test_a_single_run_has_no_interval(statistics):
    estimate, low, high = statistics.interval(np.array([[1.0, 3.0]]))[:, 0]
    assert estimate == 2 and np.isnan([low, high]).all()
    one = statistics.interval([np.array([[1.0]]), np.array([[0.0], [0.0]])], statistics.improvement)
    assert one[0] == 1 and np.isnan(one[1:]).all()


def test_probability_of_improvement(statistics):
    """Task one: {1, 3} x {2, 2, 3} wins twice, one tie: 2.5 of 6. Task two: always better."""
    import scipy.stats
    from rliable import metrics
    x, y = np.array([[1.0, 9], [3, 9]]), np.array([[2.0, 1], [2, 2], [3, 1]])
    assert statistics.improvement(x, y) == pytest.approx((2.5 / 6 + 1) / 2)
    assert statistics.improvement(y, x) == pytest.approx(1 - (2.5 / 6 + 1) / 2)
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(8, 4)).round(1) + 1, rng.normal(size=(5, 4)).round(1)
    assert statistics.improvement(a, b) == pytest.approx(metrics.probability_of_improvement(a, b))
    u = [scipy.stats.mannwhitneyu(a[:, t], b[:, t]).statistic / 40 for t in range(4)]
    assert statistics.improvement(a, b) == pytest.approx(np.mean(u))
    p, low, high = statistics.interval([a, b], statistics.improvement)[:, 0]
    assert 0.5 < low < p < high <= 1 and p == statistics.improvement(a, b)


def test_performance_profile(statistics):
    from rliable import library
    np.testing.assert_allclose(statistics.profile(np.array([[1.0, 4], [2, 4]]), np.array([0, 1, 2.5, 4])), [1, 0.75, 0.5, 0])
    full, taus = np.random.default_rng(4).normal(size=(6, 3)), np.linspace(-2, 2, 9)
    np.testing.assert_allclose(statistics.profile(full, taus), library.score_distributions(full, taus))
