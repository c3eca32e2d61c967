"""Does TruDi learn more than Gaussian policies?

    python -m benchmark.studies.comparison RUNS... --steps 3000000 --out benchmark/results/study

A run's score is the mean of the last third of its evaluations: after equal environment steps, of those up to
--steps; after equal training time, of those up to the hours that the fastest run of --ours took for these steps
on that task. Training time is that of iterations, without compilation, evaluations and checkpoints; with
--clock, that of short runs of the same groups and tasks which had their core for themselves, by the median speed
of their iterations, so that the long ones may share a machine. Groups are the runs' --exp-name.

Methods are compared over tasks and seeds of a suite by the interquartile mean (IQM) and by the probability that
a run of --ours is better than one of the other on the same task, both with 95% stratified bootstrap intervals.
One is called better only where both intervals exclude that there is no difference. Runs that have not come far
enough are listed and do not count.
"""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Iterator, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro

from benchmark import figures
from benchmark.figures import matrix
from benchmark.report import Page, final_band, shown, title_of
from benchmark.runs import RETURN, RUN, evaluations, read_table
from benchmark.statistics import improvement, interval, iqm

KEYS = ["suite", "task", "group", *RUN]
REACHED = 0.97  # of the end: where a run's last evaluation may lie, as evaluations are some steps apart
AXES = {"step": "equal steps", "hours": "equal training time"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare one group of runs with all others."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders, or folders that have some
    out: str  # folder to write to
    steps: int  # environment steps after which runs are compared
    ours: str = "trudi"  # the group that is compared with the others
    metric: str = RETURN  # what is compared
    clock: str | None = None  # folder of the short runs that tell how long an iteration takes


# --------------------------------------------------------------------------------------------------------- scores
def without_superseded(sources: Sequence[str]) -> pd.DataFrame:
    """The logs of the runs that count, where a run was begun anew; exits with code 2 if there are none."""
    table = read_table(sources)
    if table.empty:
        fail(f"there are no runs in {' '.join(sources)}")
    return table[table.state != "superseded"]


def clocked(log: pd.DataFrame, clock: pd.DataFrame) -> pd.DataFrame:
    """The log with the hours that its steps take at the median speed of the clock's runs of task and group."""
    speeds = clock.groupby(["task", "group"])["charts/SPS"].median()
    pairs = pd.MultiIndex.from_frame(log[["task", "group"]])
    for task, group in pairs.unique().difference(speeds.index):
        fail(f"--clock has no run of {group} on {task}")
    return log.assign(hours=log.step / speeds.reindex(pairs).to_numpy() / 3600)


def ends_of(log: pd.DataFrame, steps: int, ours: str) -> pd.DataFrame:
    """For each task, the steps (column `step`) and hours (`hours`) until which runs are compared; hours are NaN
    where no run of ours has come so far."""
    runs = log[(log.group == ours) & (log.step <= steps)].groupby(["task", *RUN])
    whole = runs.step.max() >= REACHED * steps
    hours = runs.hours.max()[whole].groupby("task").min()
    return pd.DataFrame({"step": float(steps), "hours": hours.reindex(log.task.unique())})


def last_third(log: pd.DataFrame, axis: str, ends: pd.Series) -> pd.Series:
    """Each run's mean of the evaluations in the last third of [0, end of its task] along an axis, by KEYS; NaN
    where the run has not come to the end."""
    share = log[axis] / log.task.map(ends)
    furthest = share.groupby([log[key] for key in KEYS]).max()
    scores = log[(share > 2 / 3) & (share <= 1)].groupby(KEYS).value.mean()
    return scores.reindex(furthest.index).where(furthest >= REACHED)


def score_table(log: pd.DataFrame, options: Options) -> pd.DataFrame:
    """A row for each run, with its scores after equal steps and after equal training time."""
    ends = ends_of(log, options.steps, options.ours)
    scores = {axis: last_third(log, axis, ends[axis]) for axis in AXES}
    return pd.DataFrame(scores).reset_index()


# ----------------------------------------------------------------------------------------------------- comparison
def difference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """IQM (1,) of scores X (R, T) less that of Y (R', T)."""
    return iqm(x) - iqm(y)


def verdict(apart: np.ndarray, probability: np.ndarray) -> str:
    """What both intervals (3,) say: "better" or "worse" if both exclude that there is no difference."""
    if apart[1] > 0 and probability[1] > 0.5:
        return "better"
    if apart[2] < 0 and probability[2] < 0.5:
        return "worse"
    return "open"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One group against another on one suite, along one axis."""

    suite: str
    axis: str
    other: str
    tasks: list[str]  # of which both have runs
    runs: tuple[int, int]  # of each task, of ours and of the other
    means: tuple[np.ndarray, np.ndarray]  # IQM and interval (3,) of ours and of the other
    apart: np.ndarray  # difference of the IQMs and its interval (3,)
    probability: np.ndarray  # that ours is better, and its interval (3,)


def compare(table: pd.DataFrame, suite: str, axis: str, ours: str, other: str) -> Comparison | None:
    """Compare two groups on the tasks of a suite of which both have runs; None if there is none."""
    done = table[(table.suite == suite) & table[axis].notna()]
    own, theirs = (done[done.group == group] for group in (ours, other))
    tasks = [task for task in dict.fromkeys(own.task) if task in set(theirs.task)]
    if not tasks:
        return None
    x, y = (matrix(part, tasks, axis) for part in (own, theirs))
    return Comparison(
        suite=suite,
        axis=axis,
        other=other,
        tasks=tasks,
        runs=(len(x), len(y)),
        means=(final_band(x), final_band(y)),
        apart=interval([x, y], difference)[:, 0],
        probability=interval([x, y], improvement)[:, 0],
    )


def comparisons(table: pd.DataFrame, ours: str) -> list[Comparison]:
    """All groups against ours, on every suite, along both axes."""
    others = [group for group in dict.fromkeys(table.group) if group != ours]
    found = itertools.product(dict.fromkeys(table.suite), AXES, others)
    return [x for suite, axis, other in found if (x := compare(table, suite, axis, ours, other))]


# --------------------------------------------------------------------------------------------------------- the page
def comparison_rows(found: list[Comparison]) -> Iterator[tuple]:
    """A row for each comparison."""
    for x in found:
        yield (
            title_of(x.suite),
            AXES[x.axis],
            x.other,
            len(x.tasks),
            " and ".join(map(str, x.runs)),
            *(shown(band) for band in x.means),
            shown(x.apart),
            shown(x.probability, 2),
            verdict(x.apart, x.probability),
        )


def task_rows(table: pd.DataFrame, axis: str, groups: list[str], hours: pd.Series) -> Iterator[tuple]:
    """A row for each task: its time, and of each group the mean score, its standard error and number of runs."""
    for task, own in table[table[axis].notna()].groupby("task", sort=False):
        cells = []
        for group in groups:
            scores = own.loc[own.group == group, axis]
            error = scores.sem() if len(scores) > 1 else 0.0
            cells.append(f"{scores.mean():.1f} ± {error:.1f} ({len(scores)})" if len(scores) else "")
        yield task, "" if np.isnan(hours[task]) else f"{hours[task] * 60:.1f}", *cells


def not_far_enough(table: pd.DataFrame) -> str:
    """The runs that do not count, along either axis."""
    lines = []
    for axis, name in AXES.items():
        for (group, task), own in table[table[axis].isna()].groupby(["group", "task"], sort=False):
            seeds = ", ".join(map(str, own.seed))
            lines.append(f"- {name}: {group} on {task}, seed {seeds}")
    return "\n".join(["Runs that have not come far enough, and do not count:", "", *lines]) if lines else ""


def common_tasks(own: pd.DataFrame) -> list[str]:
    """The tasks of which every group has runs."""
    counts = own.groupby("task", sort=False).group.nunique()
    return list(counts.index[counts == own.group.nunique()])


def curves_figure(own: pd.DataFrame, options: Options) -> tuple[plt.Figure, pd.DataFrame]:
    """IQM over tasks and seeds with its interval, over steps and over training time, of a suite's tasks of which
    every group has runs."""
    own = own.assign(score=own.value)
    groups = [options.ours, *(group for group in dict.fromkeys(own.group) if group != options.ours)]
    tasks = common_tasks(own)
    figure, frames = figures.frames(len(AXES), len(AXES), 4.2, 3.2)
    tables = []
    for frame, axis in zip(frames, AXES, strict=True):
        bands = {}
        for group in groups:
            rows = own[(own.group == group) & own.task.isin(tasks)]
            bands[group] = figures.band_of(rows, tasks, axis)
        unit, label = figures.unit_of([points[-1] for points, _ in bands.values() if len(points)], axis)
        for (group, (points, band)), colour in zip(bands.items(), figures.COLOURS, strict=False):
            figures.draw_band(frame, points / unit, band, color=colour, label=group)
            tables.append(figures.band_rows(points, band, axis, group=group))
        frame.set(xlabel=label, xlim=(0, None), ylabel="IQM of episodic return")
        figures.start_at_zero(frame)
    figures.legend(figure, frames)
    return figure, pd.concat(tables)


def write_page(log: pd.DataFrame, options: Options) -> pathlib.Path:
    """All tables and figures of the comparison."""
    table = score_table(log, options)
    hours = ends_of(log, options.steps, options.ours).hours
    groups = list(dict.fromkeys([options.ours, *table.group]))
    page = Page(pathlib.Path(options.out))
    page.text(
        f"# {options.ours} and the others",
        "",
        "Written by `python -m benchmark.studies.comparison`, which says how. Scores are means of the last "
        f"third of evaluations: of {options.steps:,} environment steps, or of the time that {options.ours} "
        "takes for them.",
    )
    page.table(
        ("suite", "after", "other", "tasks", "runs of each")
        + (f"IQM of {options.ours}", "of the other", "difference", "P(better)", options.ours),
        comparison_rows(comparisons(table, options.ours)),
    )
    for axis, name in AXES.items():
        page.text(f"After {name}: mean score, its standard error (number of runs).")
        page.table(("task", "minutes", *groups), task_rows(table, axis, groups, hours))
    for suite, own in log.groupby("suite", sort=False):
        caption = f"{title_of(suite)}: IQM over tasks and seeds, and its 95% interval"
        if common_tasks(own):
            page.figure(f"curves_{suite}", caption, curves_figure(own, options))
    page.text(not_far_enough(table))
    table.to_csv(page.folder / "scores.csv", index=False, float_format="%.6g")
    return page.write()


def fail(message: str) -> None:
    """Refuse bad input: one line on stderr and exit code 2."""
    print(f"benchmark.studies.comparison: error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Read the runs, write the page."""
    options = tyro.cli(Options)
    sources = [*options.runs, options.clock] if options.clock else options.runs
    for source in (x for x in sources if not pathlib.Path(x).exists()):
        fail(f"there is no {source}")
    table = without_superseded(options.runs)
    if options.metric not in table:
        fail(f"no run in {' '.join(options.runs)} has {options.metric}")
    log = evaluations(table, options.metric)
    if options.ours not in set(log.group):
        fail(f"--ours {options.ours} is none of the groups {', '.join(dict.fromkeys(log.group))}")
    if options.clock:
        log = clocked(log, without_superseded([options.clock]))
    print(write_page(log, options))


if __name__ == "__main__":
    main()
