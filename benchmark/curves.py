"""Learning curves side by side: a table of them on stdout and, with --output, a picture.

    python -m benchmark.curves benchmark/results/curves/CartpoleBalance benchmark/results/curves/CheetahRun \
        --output benchmark/results/curves.png [--threshold 900]
    python -m benchmark.curves benchmark/results/humanoids/study --public

Arguments are run folders, or folders that are searched for them. A group is what is in one folder; --group-by
takes an argument instead, such as env_id.

The table. Final: the last evaluation of each seed. Best: the highest evaluation of any seed. Stays up: the
lowest evaluation of any seed in the last quarter of its run. First reaches: the steps at which each seed's
evaluation was first at the threshold or above. Minutes: the longest run's, evaluations and checkpoints included
and compilation not; seeds that one process trained side by side share them.

With --public the table has a row for each run, beside the mean of REPPO's public ones at the same environment
steps: its evaluations at the three early steps that benchmark/anchors/reppo_returns.csv has, its last one, the
mean of those of the last half million steps, since one evaluation of few episodes is noise, and its best one.

The picture. A thick line for a group's mean, thin ones for its seeds; nothing is smoothed. The mean is drawn as
far as all seeds go, over the steps at which any of them was evaluated, by interpolation where one was not.
"""

import dataclasses
import itertools
import pathlib
import sys
from typing import NoReturn

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro

from benchmark import figures
from benchmark.markdown import markdown_table
from benchmark.runs import RETURN, RUN, evaluations, read_table
from benchmark.tasks import ROOT

EARLY = {"2.49M": 2_490_368, "4.98M": 4_980_736, "9.96M": 9_961_472}
LAST = 500_000  # steps over which the last evaluations are averaged


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare learning curves."""

    sources: tyro.conf.Positional[tuple[str, ...]]  # run folders, or folders that have some
    metric: str = RETURN  # what counts
    group_by: str = "folder"  # "folder", or an argument's name
    until: float = np.inf  # leaves out what was logged after this step
    threshold: float | None = None  # adds the first step at which an evaluation reaches it
    decimals: int = 1  # of the metric
    public: bool = False  # a table beside REPPO's public runs instead
    output: str | None = None  # the image to write
    title: str = ""  # above its axes
    ylabel: str | None = None  # of its vertical axis; default: the metric's name
    ymin: float | None = None  # lower end of its vertical axis


# ------------------------------------------------------------------------------------------------------ tables
def first_step(run: pd.DataFrame, threshold: float) -> str:
    """When an evaluation first reached a threshold."""
    steps = run.step[run.value >= threshold]
    return f"{steps.iloc[0]:,.0f}" if len(steps) else "never"


def group_row(group: str, table: pd.DataFrame, options: Options) -> list[str]:
    """One group's row of the table."""
    ends = table.groupby(RUN).step.max()
    found = dict(list(evaluations(table, options.metric).groupby(RUN)))
    late = [run.value[run.step >= 0.75 * ends[name]] for name, run in found.items()]
    runs = list(found.values())
    final = [run.value.iloc[-1] for run in runs]
    numbers = np.mean(final), max(run.value.max() for run in runs), pd.concat(late).min()
    reached = []
    if options.threshold is not None:
        reached = [", ".join(first_step(run, options.threshold) for run in runs)]
    shown = [f"{x:.{options.decimals}f}" for x in (*final, *numbers)]
    return [
        group,
        str(len(runs)),
        ", ".join(shown[:-3]),
        *shown[-3:],
        *reached,
        f"{table.wall_time.max() / 60:.1f}",
        f"{ends.max():,}",
    ]


def group_table(table: pd.DataFrame, options: Options) -> str:
    """A row for each group."""
    reached = [] if options.threshold is None else [f"first reaches {options.threshold:g} (steps)"]
    header = ["group", "seeds", "final", "mean", "best", "stays up", *reached, "minutes", "steps"]
    rows = [group_row(group, own, options) for group, own in table.groupby("group", sort=False)]
    return markdown_table(header, rows)


def public_table(table: pd.DataFrame, options: Options) -> str:
    """A row for each run, and above each task's one of REPPO's published means."""
    public = pd.read_csv(ROOT / "benchmark" / "anchors" / "reppo_returns.csv", index_col="env")
    rows = []
    for task, own in table.groupby("task"):
        if task not in public.index:
            fail(f"--public has no runs of {task}; it has {', '.join(public.index)}")
        mean = public.loc[task]
        early = [f"{mean[f'reppo_large_at_{name}']:.1f}" for name in EARLY]
        final = f"{mean.reppo_large_final_50M:.1f}"
        rows.append((f"**{task}**: REPPO, public", *early, final, "", "", "50,000,000", ""))
        runs = own.groupby(["algorithm", "group", *RUN])
        rows += [public_row(f"{group}, seed {seed}", run, options) for (_, group, seed, _), run in runs]
    header = (
        "run",
        *(f"at {name}" for name in EARLY),
        "last",
        "mean of the last",
        "best",
        "steps",
        "minutes",
    )
    return markdown_table(header, rows)


def public_row(name: str, run: pd.DataFrame, options: Options) -> tuple[str, ...]:
    """One run's row; what it has not reached is empty."""
    found = evaluations(run, options.metric)
    values = found.set_index("step").value
    early = [f"{values[step]:.1f}" if step in values else "" for step in EARLY.values()]
    late = values[values.index > values.index[-1] - LAST].mean()
    return (
        name,
        *early,
        f"{values.iloc[-1]:.1f}",
        f"{late:.1f}",
        f"{values.max():.1f}",
        f"{run.step.max():,}",
        f"{run.wall_time.max() / 60:.0f}",
    )


# ----------------------------------------------------------------------------------------------------- picture
def spread_labels(heights: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Heights moved as little as needed for labels to be at least gap apart within [low, high]."""
    order, placed = np.argsort(heights), np.array(heights, float)
    for below, above in itertools.pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    if len(placed) and placed[order[-1]] > high:
        placed[order[-1]] = high
        for above, below in itertools.pairwise(order[::-1]):
            placed[below] = min(placed[below], placed[above] - gap)
    return np.maximum(placed, low)


def note(seeds: pd.Series) -> str:
    """What thick and thin lines are, by the number of seeds of each group."""
    fewest, most = seeds.min(), seeds.max()
    count = most if fewest == most else f"{fewest} to {most}"
    return f"thick: mean of {count} seeds; thin: each of them" if most > 1 else ""


def draw_group(axes: plt.Axes, own: pd.DataFrame, colour: str, unit: float) -> tuple[float, float]:
    """A group's curves; where its mean ends."""
    runs = [run for _, run in own.groupby(RUN)]
    for run in runs if len(runs) > 1 else []:
        axes.plot(run.step / unit, run.value, color=colour, linewidth=0.8, alpha=0.4)
    steps = np.unique(own.step)
    first = max(run.step.min() for run in runs)
    # Where a run has just begun, the mean is drawn at its first evaluation.
    last = max(min(run.step.max() for run in runs), first)
    steps = steps[(steps >= first) & (steps <= last)]
    mean = np.mean([np.interp(steps, run.step, run.value) for run in runs], axis=0)
    axes.plot(steps / unit, mean, color=colour, linewidth=2.4, solid_capstyle="round")
    return steps[-1] / unit, mean[-1]


def draw(table: pd.DataFrame, options: Options) -> None:
    """Draw all groups in one frame, each labelled where its mean ends."""
    log = evaluations(table, options.metric)
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    unit, xlabel = figures.unit_of(log.step, "step")
    ends = {}
    for (group, own), colour in zip(log.groupby("group", sort=False), itertools.cycle(figures.COLOURS)):
        ends[group] = (*draw_group(axes, own, colour, unit), colour)
    axes.set(xlim=(0, log.step.max() / unit), xlabel=xlabel)
    axes.set_ylabel(options.ylabel or options.metric.split("/")[-1].replace("_", " "))
    axes.set_ylim(bottom=options.ymin)
    axes.set_title(options.title, loc="left", fontsize=13)
    axes.set_title(note(log.groupby("group")[RUN].nunique().seed), loc="right", color="0.45")
    low, high = axes.get_ylim()
    heights = spread_labels(np.array([end[1] for end in ends.values()]), (high - low) * 0.06, low, high)
    for (group, (x, _, colour)), height in zip(ends.items(), heights, strict=True):
        axes.annotate(
            group,
            (x, height),
            (8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )
    pathlib.Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=200)


# -------------------------------------------------------------------------------------------------------- main
def fail(message: str) -> NoReturn:
    """Refuse bad input: one line on stderr and exit code 2."""
    print(f"benchmark.curves: error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Print the table, draw the picture."""
    options = tyro.cli(Options)
    table = read_table(options.sources, options.group_by)
    if options.metric not in table:
        fail(f"no run in {' '.join(options.sources)} has {options.metric}")
    table = table[(table.step <= options.until) & (table.state != "superseded")]
    evaluated = table.groupby(RUN)[options.metric].transform("count") > 0
    table = table[evaluated]
    print(public_table(table, options) if options.public else group_table(table, options), end="")
    if options.output:
        draw(table, options)


if __name__ == "__main__":
    main()
