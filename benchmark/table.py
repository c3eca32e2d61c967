"""A Markdown table of learning curves, from the raw metrics.jsonl files behind them.

    python benchmark/table.py --threshold 900 \
        benchmark/results/curves/CartpoleBalance benchmark/results/curves/CheetahRun

Arguments and groups as in plot_curves.py. Final: the last evaluation of each seed. Best: the highest
evaluation of any seed. Stays up: the lowest evaluation of any seed in the last quarter of its run. First
reaches: the steps at which each seed's evaluation was first at the threshold or above. Minutes: the longest
run's, evaluations and checkpoints included and compilation not; seeds that one process trained side by side
share them.
"""

import dataclasses

import numpy as np
import tyro
from common import markdown_table
from plot_curves import FOLDER, Curve, read_groups


@dataclasses.dataclass(frozen=True)
class Options:
    """Print a table of learning curves."""

    sources: tyro.conf.Positional[tuple[str, ...]]  # metrics.jsonl files, folders or globs
    threshold: float | None = None  # adds the first step at which an evaluation reaches it
    metric: str = "eval/episodic_return"  # what counts
    label_by: str = FOLDER  # "folder", or an argument's name in args.json, such as env_id
    until: float = np.inf  # leaves out what was logged after this step
    decimals: int = 1  # of the metric

def lowest_in_last_quarter(curve: Curve) -> float:
    """The lowest evaluation in the last quarter of a run."""
    return curve.values[curve.steps >= 0.75 * curve.last_step].min(initial=np.inf)

def first_step(curve: Curve, threshold: float) -> str:
    """When an evaluation first reached a threshold."""
    steps = curve.steps[curve.values >= threshold]
    return f"{steps[0]:,.0f}" if len(steps) else "never"

def row(label: str, curves: list[Curve], threshold: float | None, decimals: int) -> list[str]:
    """One group's row."""
    final = [curve.values[-1] for curve in curves]
    best, lowest = max(curve.values.max() for curve in curves), min(map(lowest_in_last_quarter, curves))
    numbers = [", ".join(f"{x:.{decimals}f}" for x in final),
               *(f"{x:.{decimals}f}" for x in (np.mean(final), best, lowest))]
    reached = [] if threshold is None else [", ".join(first_step(curve, threshold) for curve in curves)]
    length = [f"{max(curve.seconds for curve in curves) / 60:.1f}",
              f"{max(curve.last_step for curve in curves):,}"]
    return [label, str(len(curves)), *numbers, *reached, *length]

if __name__ == "__main__":
    OPTIONS = tyro.cli(Options)
    GROUPS = read_groups(OPTIONS.sources, OPTIONS.metric, OPTIONS.label_by, OPTIONS.until)
    REACHED = [] if OPTIONS.threshold is None else [f"first reaches {OPTIONS.threshold:g} (steps)"]
    HEADER = ["group", "seeds", "final", "mean", "best", "stays up", *REACHED, "minutes", "steps"]
    ROWS = [row(label, curves, OPTIONS.threshold, OPTIONS.decimals) for label, curves in GROUPS.items()]
    print(markdown_table(HEADER, ROWS), end="")
