"""All figures of results. Each function returns a figure and a table of the numbers in it.

They draw from the long table of `runs.read_table`, evaluations only: a row has task, group, seed, folder, state,
step, hours, `value`, the metric, and `score`, the same on the scale on which tasks are averaged."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmark.runs import RUN
from benchmark.statistics import interval, profile

COLOURS = ("#2a6f97", "#d1495b", "#4c956c", "#e09f3e", "#6d597a", "#00798c", "#8d5a3b", "#5c677d")
POINTS = 60  # at most, of a curve
CITED = dict(color="0.45", linewidth=1.2, linestyle=(0, (4, 3)))  # of numbers that are not ours
plt.rcParams.update(
    {
        "font.size": 10,
        "axes.edgecolor": "0.6",
        "xtick.color": "0.35",
        "ytick.color": "0.35",
        "axes.labelcolor": "0.25",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": "0.92",
        "legend.frameon": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "pdf.fonttype": 42,
    }
)


def save(figure: Figure, table: pd.DataFrame, path: pathlib.Path) -> None:
    """Write a figure as PNG and PDF and its numbers as CSV; a path without suffix. The same numbers make the
    same files."""
    figure.savefig(f"{path}.png", dpi=150)
    figure.savefig(f"{path}.pdf", metadata={"CreationDate": None})
    plt.close(figure)
    table.to_csv(f"{path}.csv", index=False, float_format="%.6g")


def frames(
    count: int, columns: int = 4, width: float = 3.3, height: float = 2.6
) -> tuple[Figure, list[Axes]]:
    """A figure with so many frames in rows."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(width * columns, 5.5), height * rows + 0.7),
        layout="constrained",
        squeeze=False,
    )
    for empty in axes.flat[count:]:
        empty.set_axis_off()
    return figure, list(axes.flat[:count])


def unit_of(values: Iterable[float], axis: str) -> tuple[float, str]:
    """What an axis up to these values is shown in, and its label."""
    largest = max(values, default=0)
    if axis == "hours":
        return (1, "hours of training") if largest >= 1.5 else (1 / 60, "minutes of training")
    return (1e6, "environment steps (millions)") if largest >= 1e6 else (1e3, "environment steps (thousands)")


def start_at_zero(axes: Axes) -> None:
    """Show zero where all there is to see is positive, so that small differences look small."""
    if axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend above all frames, of what any of them shows; none for a single entry."""
    entries = {
        label: handle
        for frame in axes
        for handle, label in zip(*frame.get_legend_handles_labels(), strict=True)
    }
    if len(entries) > 1:
        columns = min(len(entries), int(figure.get_figwidth() / 1.9))
        figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns)


def draw_band(axes: Axes, points: np.ndarray, band: np.ndarray, **style: Any) -> None:
    """A line and, where it is known, its interval: points (S,), estimate and ends (3, S)."""
    axes.plot(points, band[0], linewidth=2, solid_capstyle="round", **style)
    if not np.isnan(band[1:]).any():
        axes.fill_between(points, *band[1:], color=style["color"], alpha=0.2, linewidth=0)


@dataclasses.dataclass(frozen=True)
class Panel:
    """What there is to compare in a suite: its groups, on the tasks of which all of them have finished runs."""

    title: str
    groups: list[str]
    tasks: list[str]
    left_out: list[str]  # tasks of which some groups have finished runs
    log: pd.DataFrame  # evaluations of the finished runs of groups and tasks
    seeds: pd.DataFrame  # a row for each of these runs, with its last score
    normalized: bool

    def log_of(self, group: str) -> pd.DataFrame:
        """The evaluations of a group."""
        return self.log[self.log.group == group]

    def scores_of(self, group: str) -> np.ndarray:
        """The last scores (R, T) of a group."""
        return matrix(self.seeds[self.seeds.group == group], self.tasks, "score")


# ---------------------------------------------------------------------------------------------------- numbers
def matrix(seeds: pd.DataFrame, tasks: Sequence[str], column: str) -> np.ndarray:
    """A column (R, T) of runs, a row each, of these tasks. Of a task that has more runs than another the first
    ones count."""
    runs = {task: seeds.loc[seeds.task == task, column].to_numpy() for task in tasks}
    count = min(map(len, runs.values()))
    return np.stack([own[:count] for own in runs.values()], 1)


def shared_points(log: pd.DataFrame, axis: str) -> np.ndarray:
    """Points (S,) in steps or hours at which all of these runs can be compared: from the latest first evaluation
    to the earliest last one, at the evaluations or, if these are many or at different hours, evenly spread."""
    ends = log.groupby(["task", *RUN])[axis].agg(["min", "max"])
    low, high = ends["min"].max(), ends["max"].min()
    points = np.unique(log[axis])
    points = points[(points >= low) & (points <= high)]
    if low > high:
        return np.zeros(0)
    return points if axis == "step" and 0 < len(points) <= POINTS else np.linspace(low, high, POINTS)


def curves(
    log: pd.DataFrame, tasks: Sequence[str], axis: str, points: np.ndarray, column: str = "score"
) -> np.ndarray:
    """A column (R, T, S) of the runs of these tasks at points (S,), between the evaluations by interpolation."""
    runs = {task: [] for task in tasks}
    for (task, *_), run in log.groupby(["task", *RUN]):
        runs[task].append(np.interp(points, run[axis], run[column]))
    count = min(map(len, runs.values()))
    return np.stack([own[:count] for own in runs.values()], 1)


def band_of(
    log: pd.DataFrame, tasks: Sequence[str], axis: str, column: str = "score"
) -> tuple[np.ndarray, np.ndarray]:
    """Points (S,) and IQM with its interval (3, S) over these tasks' runs."""
    points = shared_points(log, axis)
    if not len(points):
        return points, np.zeros((3, 0))
    return points, interval(curves(log, tasks, axis, points, column))


def band_rows(points: np.ndarray, band: np.ndarray, axis: str, **labels: Any) -> pd.DataFrame:
    """The numbers of a band as a table."""
    columns = {
        "environment_steps" if axis == "step" else axis: points,
        "iqm": band[0],
        "low": band[1],
        "high": band[2],
    }
    return pd.DataFrame({**labels, **columns})


# ---------------------------------------------------------------------------------------------------- figures
def draw_task(axes: Axes, log: pd.DataFrame, colours: dict[str, str], unit: float) -> list[pd.DataFrame]:
    """One task's frame: each group's band over finished runs; thin lines for seeds, dotted if unfinished."""
    tables = []
    for group, colour in colours.items():
        own = log[log.group == group]
        for _, run in own.groupby(RUN):
            finished, unfinished = dict(linewidth=0.7, alpha=0.45), dict(linewidth=1.2, linestyle=":")
            style = finished if run.state.iloc[0] == "finished" else unfinished
            axes.plot(run.step / unit, run.value, color=colour, **style)
        done = own[own.state == "finished"]
        if done.empty:
            continue
        points, band = band_of(done, list(done.task.unique()), "step", "value")
        if len(points):
            draw_band(axes, points / unit, band, color=colour, label=group)
            runs = done.groupby(RUN).ngroups
            tables.append(band_rows(points, band, "step", task=done.task.iloc[0], group=group, runs=runs))
    return tables


def tasks_figure(
    log: pd.DataFrame, colours: dict[str, str], cited: dict[str, float], ylabel: str, missing: str
) -> tuple[Figure, pd.DataFrame]:
    """A frame for each task that any group has a run of (Figures 9 to 14); cited returns as dashed lines."""
    tasks = list(log.task.unique())
    unit, xlabel = unit_of(log.step, "step")
    figure, axes = frames(len(tasks), 5 if len(tasks) > 12 else 4 if len(tasks) > 4 else min(len(tasks), 3))
    tables = []
    for frame, task in zip(axes, tasks, strict=True):
        tables += draw_task(frame, log[log.task == task], colours, unit)
        if task in cited:
            frame.axhline(cited[task], label="REPPO after 50M steps (cited)", **CITED)
        frame.set_title(task.rpartition(":")[2])
        frame.set_xlim(0)
        start_at_zero(frame)
    figure.supxlabel(xlabel + (f"\n{missing}" if missing else ""), fontsize=10, color="0.25")
    figure.supylabel(ylabel, fontsize=10, color="0.25")
    legend(figure, axes)
    return figure, pd.concat(tables) if tables else pd.DataFrame(columns=["task", "group"])


def draw_cited(axes: Axes, cited: list[tuple[str, float, float | None]], unit: float) -> None:
    """Numbers that are not ours: points where they took known hours, otherwise lines."""
    for number, (label, value, hours) in enumerate(cited):
        style = dict(color=f"{0.15 + 0.2 * number}", label=f"{label} (cited)")
        if hours is None:
            axes.axhline(value, **CITED | style)
        else:
            axes.plot(hours / unit, value, "d", markersize=6, **style)


def suites_figure(
    panels: dict[str, Panel],
    colours: dict[str, str],
    axis: str,
    ylabel: str,
    cited: dict[str, list[tuple[str, float, float | None]]],
) -> tuple[Figure, pd.DataFrame]:
    """A frame for each suite (Figure 2; over hours, Figure 5). Cited numbers are a label, a value, and the hours
    they took if axis is hours."""
    figure, axes = frames(len(panels), min(len(panels), 3), 4.2, 3.2)
    tables = []
    for frame, (suite, panel) in zip(axes, panels.items(), strict=True):
        bands = {group: band_of(panel.log_of(group), panel.tasks, axis) for group in panel.groups}
        unit, xlabel = unit_of([points[-1] for points, _ in bands.values() if len(points)], axis)
        for group, (points, band) in bands.items():
            draw_band(frame, points / unit, band, color=colours[group], label=group)
            tables.append(band_rows(points, band, axis, suite=suite, group=group, tasks=len(panel.tasks)))
        draw_cited(frame, cited.get(suite, []), unit)
        frame.set(xlabel=xlabel, xlim=(0, None), title=panel.title)
        start_at_zero(frame)
        frame.set_ylabel(f"IQM of {'normalised ' if panel.normalized else ''}{ylabel}")
    legend(figure, axes)
    return figure, pd.concat(tables)


def profiles_figure(
    panels: dict[str, Panel], colours: dict[str, str], xlabel: str
) -> tuple[Figure, pd.DataFrame]:
    """For each suite the share of runs whose last evaluation is above a threshold."""
    figure, axes = frames(len(panels), min(len(panels), 3), 4.2, 3.2)
    tables = []
    for frame, (suite, panel) in zip(axes, panels.items(), strict=True):
        scores = {group: panel.scores_of(group) for group in panel.groups}
        low, high = (f([f(x) for x in scores.values()]) for f in (np.min, np.max))
        taus = np.linspace(low - 0.05 * (high - low), high + 0.02 * (high - low), 101)
        for group, values in scores.items():
            band = interval(values, lambda x, taus=taus: profile(x, taus))
            draw_band(frame, taus, band, color=colours[group], label=group)
            numbers = dict(threshold=taus, share=band[0], low=band[1], high=band[2])
            tables.append(pd.DataFrame({"suite": suite, "group": group, **numbers}))
        frame.set(
            xlabel=f"{'normalised ' if panel.normalized else ''}{xlabel} τ",
            ylabel="share of runs above τ",
            ylim=(-0.02, 1.02),
            title=panel.title,
        )
    legend(figure, axes)
    return figure, pd.concat(tables)


def points_with_intervals(axes: Axes, places: Sequence[float], bands: np.ndarray, **style: Any) -> None:
    """A point for each estimate at its place, with its interval: (P,), (P, 3)."""
    ends = np.nan_to_num(np.abs(bands[:, 1:] - bands[:, :1])).T  # no interval is drawn as none
    axes.errorbar(places, bands[:, 0], ends, fmt="o", capsize=3, **style)


def improvement_figure(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """P(X > Y) with its interval for suites and pairs of groups; a table of suite, x, y, probability, low,
    high."""
    figure, (axes,) = frames(1, 1, 7.0, 0.45 * len(table) + 0.6)
    rows = table.iloc[::-1]
    labels = [f"{row.suite}: {row.x} > {row.y}" for row in rows.itertuples()]
    middle, low, high = rows[["probability", "low", "high"]].to_numpy().T
    ends = np.nan_to_num([middle - low, high - middle])  # no interval is drawn as none
    axes.errorbar(middle, range(len(rows)), xerr=ends, fmt="o", capsize=3, color=COLOURS[0])
    axes.axvline(0.5, **CITED)
    axes.set(
        yticks=range(len(rows)),
        yticklabels=labels,
        xlim=(-0.02, 1.02),
        ylim=(-0.6, len(rows) - 0.4),
        xlabel="probability that a run of the first is better than one of the second",
    )
    return figure, table


def ablation_figure(
    logs: dict[float, pd.DataFrame],
    tasks: Sequence[str],
    finals: np.ndarray,
    title: str,
    xlabel: str,
    ylabel: str,
    axis: str,
) -> tuple[Figure, pd.DataFrame]:
    """Curves for each value, coloured by its logarithm, and last evaluations (V, 3) over values (Figures 5, 6)."""
    figure, (left, right) = frames(2, 2, 4.6, 3.2)
    spread = np.log10(list(logs))
    shade = plt.get_cmap("viridis")((spread - spread.min()) / max(np.ptp(spread), 1e-9) * 0.92)
    bands = {value: band_of(log, tasks, axis) for value, log in logs.items()}
    unit, label = unit_of([points[-1] for points, _ in bands.values() if len(points)], axis)
    tables = []
    for colour, (value, (points, band)), final in zip(shade, bands.items(), finals, strict=True):
        draw_band(left, points / unit, band, color=colour, label=f"{value:g}")
        points_with_intervals(right, [value], final[None], color=colour, markersize=7)
        runs = logs[value].groupby(["task", *RUN]).ngroups
        tables.append(band_rows(points, band, axis, value=value, runs=runs, tasks=len(tasks)))
    right.plot(list(logs), finals[:, 0], color="0.75", linewidth=1, zorder=1)
    left.set(xlabel=label, ylabel=f"IQM of {ylabel}", xlim=(0, None), title=title)
    start_at_zero(left)
    left.legend(title=xlabel, fontsize=8, title_fontsize=8)
    right.set(xscale="log", xlabel=xlabel, ylabel=f"IQM of last {ylabel}", xticks=list(logs))
    right.set_xticklabels([f"{value:g}" for value in logs])
    right.tick_params(axis="x", which="minor", bottom=False)
    start_at_zero(right)
    return figure, pd.concat(tables)


def evaluation_figure(table: pd.DataFrame, ylabel: str) -> tuple[Figure, pd.DataFrame]:
    """Returns of the ways to evaluate (Figure 6, right): a frame for each suite and group; a table with
    suite, group, evaluation, iqm, low, high."""
    panels = list(table.groupby(["suite", "group"], sort=False))
    figure, axes = frames(len(panels), min(len(panels), 3), max(4.2, 0.75 * table.evaluation.nunique()), 3.0)
    for frame, ((suite, group), rows) in zip(axes, panels, strict=True):
        points_with_intervals(
            frame, range(len(rows)), rows[["iqm", "low", "high"]].to_numpy(), color=COLOURS[0], markersize=7
        )
        frame.set(
            xticks=range(len(rows)),
            ylabel=f"IQM of {ylabel}",
            title=f"{suite}, {group}",
            xlim=(-0.5, len(rows) - 0.5),
        )
        frame.set_xticklabels(rows.evaluation, rotation=30, ha="right")
    return figure, table


def entropy_figure(table: pd.DataFrame, cited: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Behaviour entropy of each run, with its mean, beside the paper's (Table 1); tables with task and
    entropy, and method."""
    figure, (axes,) = frames(1, 1, 5.5, 3.0)
    tasks = list(dict.fromkeys([*table.task, *cited.task]))
    for place, task in enumerate(tasks):
        own = table[table.task == task].entropy.astype(float)
        axes.plot(
            np.full(len(own), place - 0.15),
            own,
            "o",
            color=COLOURS[0],
            alpha=0.5,
            label="runs" if place == 0 else None,
        )
        axes.plot(
            place - 0.15,
            own.mean(),
            "_",
            markersize=24,
            color=COLOURS[0],
            label="their mean" if place == 0 else None,
        )
        for k, row in enumerate(cited[cited.task == task].itertuples()):
            axes.errorbar(
                place + 0.1 + 0.1 * k,
                row.entropy,
                row.spread,
                fmt="d",
                capsize=3,
                color=f"{0.2 + 0.25 * k}",
                label=f"{row.method} (cited)" if place == 0 else None,
            )
    axes.set(
        xticks=range(len(tasks)),
        xticklabels=tasks,
        ylim=(-0.05, 1.05),
        ylabel="behaviour entropy",
        xlim=(-0.6, len(tasks) - 0.3),
    )
    legend(figure, [axes])
    return figure, table
