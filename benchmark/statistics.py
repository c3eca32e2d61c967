"""Statistics over runs and tasks (Agarwal et al., 2021): interquartile mean, stratified bootstrap,
performance profiles, probability of improvement.

Scores are arrays (R, T) or, along curves, (R, T, S): R runs of T tasks at S points. Where a task has fewer
runs than another, its last rows are NaN; these are no scores, and are neither counted nor drawn."""

from collections.abc import Callable, Iterable

import numpy as np
import scipy.stats
from rliable import library

REPETITIONS = 2000  # of the bootstrap
LEVEL = 0.95  # of its intervals

def stack(tasks: Iterable[np.ndarray]) -> np.ndarray:
    """Scores (R, T, ...) of the runs of each task, arrays (R_t, ...)."""
    tasks = [np.asarray(task, float) for task in tasks]
    stacked = np.full((max(map(len, tasks)), len(tasks), *tasks[0].shape[1:]), np.nan)
    for number, task in enumerate(tasks):
        stacked[:len(task), number] = task
    return stacked

def present(scores: np.ndarray) -> np.ndarray:
    """Which runs there are (R, T)."""
    return ~np.isnan(scores.reshape(*scores.shape[:2], -1)).any(-1)

class Bootstrap(library.StratifiedBootstrap):
    """rliable's bootstrap over the runs within each task, which may be of different number; and with a seed
    of its own, as rliable's draws from NumPy's global state."""

    def __init__(self, scores: np.ndarray, seed: int = 0) -> None:
        """Of scores (R, T) or (R, T, S)."""
        super().__init__(scores)
        self.draws, self.runs = np.random.default_rng(seed), present(scores).sum(0)

    def update_indices(self) -> tuple[np.ndarray, ...]:
        """The next sample: for each task as many of its runs as it has; rows of NaN stay where they are."""
        rows = np.arange(self._args_shape[0])[:, None]
        drawn = (self.draws.random(self._args_shape[:2]) * self.runs).astype(int)
        indices = np.where(rows < self.runs, drawn, rows)
        return (indices.reshape(*indices.shape, *[1] * (len(self._args_shape) - 2)), *self._strata_indices)

def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over runs and tasks, (1,) of scores (R, T) or (S,) of (R, T, S): the mean of what
    lies between the quartiles."""
    points = scores[present(scores)]
    # rliable's aggregate_iqm, point by point
    return scipy.stats.trim_mean(points.reshape(len(points), -1), 0.25, axis=0)

def profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Shares (S,) of the scores (R, T) that are above each threshold (S,)."""
    return (scores[present(scores)][:, None] > thresholds).mean(0)

def interval(scores: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> np.ndarray:
    """A statistic of the scores with its interval: (3, S), estimate, low and high end. The ends are NaN where
    a task has a single run, as drawing it again and again would show no spread at all."""
    estimate = np.atleast_1d(statistic(scores))
    if present(scores).sum(0).min() < 2:
        return np.stack([estimate, *[np.full_like(estimate, np.nan)] * 2])
    ends = Bootstrap(scores, seed).conf_int(statistic, reps=REPETITIONS, size=LEVEL, method="percentile")
    return np.stack([estimate, *ends])

def improvement(x: np.ndarray, y: np.ndarray) -> float:
    """Probability that a run of X (R, T) is better than one of Y (R', T) on the same task, ties counted by
    half, averaged over tasks: Mann-Whitney's U over the number of pairs, as rliable has it."""
    missing = np.isnan(x)[:, None] | np.isnan(y)[None]
    wins = np.greater.outer(x, y).diagonal(0, 1, 3) + 0.5 * np.equal.outer(x, y).diagonal(0, 1, 3)
    wins = np.where(missing, np.nan, wins)
    return float(np.nanmean(wins, axis=(0, 1)).mean())

def improvement_interval(x: np.ndarray, y: np.ndarray, seed: int = 0) -> np.ndarray:
    """`improvement` with its interval (3,), X and Y drawn independently; NaN ends as in `interval`."""
    if min(present(x).sum(0).min(), present(y).sum(0).min()) < 2:
        return np.array([improvement(x, y), np.nan, np.nan])
    samples = zip(*(Bootstrap(z, seed + k).bootstrap(REPETITIONS) for k, z in enumerate((x, y))), strict=True)
    drawn = [improvement(a[0][0], b[0][0]) for a, b in samples]
    return np.array([improvement(x, y), *np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))])
