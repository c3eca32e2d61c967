"""Statistics over runs and tasks (Agarwal et al., 2021), by rliable: interquartile mean, performance profile,
probability of improvement, and their stratified bootstrap intervals.

Scores are arrays (R, T) or, along curves, (R, T, S): R runs of each of T tasks at S points."""

from collections.abc import Callable, Sequence

import numpy as np
from rliable import library

REPETITIONS = 2000  # of the bootstrap
NO_INTERVAL = np.full(2, np.nan)


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over runs and tasks, (1,) of scores (R, T) or (S,) of (R, T, S): the mean of what lies
    between the quartiles. rliable's aggregate_iqm, at all points at once."""
    points = np.sort(scores.reshape(scores.shape[0] * scores.shape[1], -1), axis=0)
    quarter = len(points) // 4
    return points[quarter : len(points) - quarter].mean(0)


def profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Shares (S,) of the scores (R, T) that are above each threshold (S,)."""
    return (scores[..., None] > thresholds).mean((0, 1))


def improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probability (1,) that a run of X (R, T) is better than one of Y (R', T) on the same task, ties counted by
    half, averaged over tasks. rliable's probability_of_improvement, without a loop over tasks."""
    difference = x[:, None] - y[None]
    return np.array([((difference > 0) + (difference == 0) / 2).mean()])


def interval(
    scores: np.ndarray | Sequence[np.ndarray], statistic: Callable[..., np.ndarray] = iqm
) -> np.ndarray:
    """A statistic (S,) of scores, or of several methods' scores, with its 95% interval: (3, S), estimate, low and
    high end. The ends are NaN where a task has a single run, as drawing it again and again shows no spread."""
    samples = [scores] if isinstance(scores, np.ndarray) else list(scores)
    estimate = statistic(*samples)
    if min(len(sample) for sample in samples) < 2:
        return np.stack([estimate, *np.broadcast_to(NO_INTERVAL[:, None], (2, len(estimate)))])
    np.random.seed(0)  # rliable draws from NumPy's global state
    _, ends = library.get_interval_estimates({"": scores}, statistic, reps=REPETITIONS)
    return np.stack([estimate, *ends[""]])
