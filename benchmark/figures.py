"""The figures of a results page. Each function returns a figure and a table of the numbers in it."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from benchmark.aggregates import interval, iqm, profile, stack  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmark.outcomes import Outcome, axis_of, by_task, curve, select  # noqa: E402

COLOURS = ("#2a6f97", "#d1495b", "#4c956c", "#e09f3e", "#6d597a", "#00798c", "#8d5a3b", "#5c677d")
Scale = dict[str, tuple[float, float]]  # a task's returns that count as 0 and as 1
CITED = dict(color="0.45", linewidth=1.2, linestyle=(0, (4, 3)))  # of numbers that are not ours
plt.rcParams.update({"font.size": 10, "axes.edgecolor": "0.6", "xtick.color": "0.35", "ytick.color": "0.35",
                     "axes.labelcolor": "0.25", "axes.spines.top": False, "axes.spines.right": False,
                     "axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "y", "grid.color": "0.92",
                     "legend.frameon": False, "axes.titlesize": 10, "axes.titlelocation": "left",
                     "pdf.fonttype": 42})

def save(figure: Figure, table: pd.DataFrame, path: pathlib.Path) -> None:
    """Write a figure as PNG and PDF and its numbers as CSV; a path without suffix."""
    for suffix in ("png", "pdf"):
        figure.savefig(f"{path}.{suffix}", dpi=150)
    plt.close(figure)
    table.to_csv(f"{path}.csv", index=False, float_format="%.6g")

def frames(count: int, columns: int = 4, width: float = 3.3,
           height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """A figure with so many frames in rows."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(max(width * columns, 5.5), height * rows + 0.7),
                                layout="constrained", squeeze=False)
    for empty in axes.flat[count:]:
        empty.set_axis_off()
    return figure, list(axes.flat[:count])

def unit_of(values: Sequence[float], axis: str) -> tuple[float, str]:
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
    entries = {label: handle for frame in axes
               for handle, label in zip(*frame.get_legend_handles_labels(), strict=True)}
    if len(entries) > 1:
        columns = min(len(entries), int(figure.get_figwidth() / 1.9))
        figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns)

def draw_band(axes: Axes, points: np.ndarray, band: np.ndarray, **style: Any) -> None:
    """A line and, where it is known, its interval: points (S,), estimate and ends (3, S)."""
    axes.plot(points, band[0], linewidth=2, solid_capstyle="round", **style)
    if not np.isnan(band[1:]).any():
        axes.fill_between(points, *band[1:], color=style["color"], alpha=0.2, linewidth=0)

def normalise(values: np.ndarray, scale: tuple[float, float] | None) -> np.ndarray:
    """Values on a scale that is 0 and 1 at these two; as they are without one."""
    low, high = scale or (0.0, 1.0)
    return (values - low) / (high - low)

def band_of(outcomes: Sequence[Outcome], tasks: Sequence[str], axis: str,
            scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Points (S,) and IQM with its interval (3, S) of these tasks' finished outcomes, each on its scale."""
    found = by_task(outcomes)
    points = axis_of([o for task in tasks for o in found[task]], axis)
    scores = [[normalise(curve(o, axis, points), scale.get(task)) for o in found[task]] for task in tasks]
    return points, interval(stack(scores), iqm)

def band_rows(points: np.ndarray, band: np.ndarray, axis: str, **labels: Any) -> pd.DataFrame:
    """The numbers of a band as a table."""
    columns = {"environment_steps" if axis == "steps" else axis: points, "iqm": band[0], "low": band[1],
               "high": band[2]}
    return pd.DataFrame({**labels, **columns})

# ---------------------------------------------------------------------------------------------------- figures
def draw_task(axes: Axes, outcomes: list[Outcome], colours: dict[str, str],
              unit: float) -> list[pd.DataFrame]:
    """One task's frame: each group's band over finished runs; thin lines for seeds, dotted if unfinished."""
    tables = []
    for group, colour in colours.items():
        own = [o for o in select(outcomes, group=group) if len(o.values) and o.state != "superseded"]
        done = select(own, state="finished")
        for o in own:
            finished, unfinished = dict(linewidth=0.7, alpha=0.45), dict(linewidth=1.2, linestyle=":")
            style = finished if o.state == "finished" else unfinished
            axes.plot(o.steps / unit, o.values, color=colour, **style)
        if done and len(points := axis_of(done, "steps")):
            band = interval(stack([[curve(o, "steps", points) for o in done]]), iqm)
            draw_band(axes, points / unit, band, color=colour, label=group)
            tables.append(band_rows(points, band, "steps", task=done[0].env_id, group=group, runs=len(done)))
    return tables

def tasks_figure(outcomes: list[Outcome], colours: dict[str, str], cited: dict[str, float], ylabel: str,
                 missing: str) -> tuple[Figure, pd.DataFrame]:
    """A frame for each task that any group has a run of (Figures 9 to 14); cited returns as dashed lines."""
    tasks = list(dict.fromkeys(o.env_id for o in outcomes if len(o.values)))
    unit, xlabel = unit_of([o.steps[-1] for o in outcomes if len(o.values)], "steps")
    figure, axes = frames(len(tasks), 5 if len(tasks) > 12 else 4 if len(tasks) > 4 else min(len(tasks), 3))
    tables = []
    for frame, task in zip(axes, tasks, strict=True):
        tables += draw_task(frame, select(outcomes, env_id=task), colours, unit)
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

def suites_figure(panels: dict[str, dict[str, Any]], colours: dict[str, str], axis: str, ylabel: str,
                  cited: dict[str, list[tuple[str, float, float | None]]]) -> tuple[Figure, pd.DataFrame]:
    """A frame for each suite (Figure 2; over hours, Figure 5). A panel has its title, outcomes, tasks, groups
    and scale; cited numbers are a label, a value, and the hours they took if axis is hours."""
    figure, axes = frames(len(panels), min(len(panels), 3), 4.2, 3.2)
    tables = []
    for frame, (suite, panel) in zip(axes, panels.items(), strict=True):
        bands = {group: band_of(select(panel["outcomes"], group=group), panel["tasks"], axis, panel["scale"])
                 for group in panel["groups"]}
        unit, xlabel = unit_of([points[-1] for points, _ in bands.values() if len(points)], axis)
        for group, (points, band) in bands.items():
            draw_band(frame, points / unit, band, color=colours[group], label=group)
            tables.append(band_rows(points, band, axis, suite=suite, group=group, tasks=len(panel["tasks"])))
        draw_cited(frame, cited.get(suite, []), unit)
        frame.set(xlabel=xlabel, xlim=(0, None), title=panel["title"])
        start_at_zero(frame)
        frame.set_ylabel(f"IQM of {'normalised ' if panel['scale'] else ''}{ylabel}")
    legend(figure, axes)
    return figure, pd.concat(tables)

def profiles_figure(panels: dict[str, dict[str, Any]], colours: dict[str, str],
                    xlabel: str) -> tuple[Figure, pd.DataFrame]:
    """For each suite the share of runs whose last evaluation is above a threshold."""
    figure, axes = frames(len(panels), min(len(panels), 3), 4.2, 3.2)
    tables = []
    for frame, (suite, panel) in zip(axes, panels.items(), strict=True):
        scores = {group: final_scores(select(panel["outcomes"], group=group), panel["tasks"], panel["scale"])
                  for group in panel["groups"]}
        low, high = (f([f(x) for x in scores.values()]) for f in (np.nanmin, np.nanmax))
        taus = np.linspace(low - 0.05 * (high - low), high + 0.02 * (high - low), 101)
        for group, values in scores.items():
            band = interval(values, lambda x, taus=taus: profile(x, taus))
            draw_band(frame, taus, band, color=colours[group], label=group)
            numbers = dict(threshold=taus, share=band[0], low=band[1], high=band[2])
            tables.append(pd.DataFrame({"suite": suite, "group": group, **numbers}))
        frame.set(xlabel=f"{'normalised ' if panel['scale'] else ''}{xlabel} τ",
                  ylabel="share of runs above τ", ylim=(-0.02, 1.02), title=panel["title"])
    legend(figure, axes)
    return figure, pd.concat(tables)

def final_scores(outcomes: list[Outcome], tasks: Sequence[str], scale: Scale) -> np.ndarray:
    """Last evaluations (R, T) of finished outcomes."""
    found = by_task(outcomes)
    return stack([[normalise(o.final, scale.get(task)) for o in found[task]] for task in tasks])

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
    axes.set(yticks=range(len(rows)), yticklabels=labels, xlim=(-0.02, 1.02), ylim=(-0.6, len(rows) - 0.4),
             xlabel="probability that a run of the first is better than one of the second")
    return figure, table

def ablation_figure(outcomes: dict[float, list[Outcome]], tasks: Sequence[str], scale: Scale,
                    title: str, xlabel: str, ylabel: str, axis: str) -> tuple[Figure, pd.DataFrame]:
    """Curves for each value, coloured by its logarithm, and last evaluations over values (Figures 5, 6)."""
    figure, (left, right) = frames(2, 2, 4.6, 3.2)
    spread = np.log10(list(outcomes))
    shade = plt.get_cmap("viridis")((spread - spread.min()) / max(np.ptp(spread), 1e-9) * 0.92)
    bands = {value: band_of(own, tasks, axis, scale) for value, own in outcomes.items()}
    finals = np.array([interval(final_scores(own, tasks, scale), iqm)[:, 0] for own in outcomes.values()])
    unit, label = unit_of([points[-1] for points, _ in bands.values() if len(points)], axis)
    tables = []
    for colour, (value, (points, band)), final in zip(shade, bands.items(), finals, strict=True):
        draw_band(left, points / unit, band, color=colour, label=f"{value:g}")
        points_with_intervals(right, [value], final[None], color=colour, markersize=7)
        tables.append(band_rows(points, band, axis, value=value, runs=len(outcomes[value]), tasks=len(tasks)))
    right.plot(list(outcomes), finals[:, 0], color="0.75", linewidth=1, zorder=1)
    left.set(xlabel=label, ylabel=f"IQM of {ylabel}", xlim=(0, None), title=title)
    start_at_zero(left)
    left.legend(title=xlabel, fontsize=8, title_fontsize=8)
    right.set(xscale="log", xlabel=xlabel, ylabel=f"IQM of last {ylabel}", xticks=list(outcomes))
    right.set_xticklabels([f"{value:g}" for value in outcomes])
    right.tick_params(axis="x", which="minor", bottom=False)
    start_at_zero(right)
    return figure, pd.concat(tables)

def evaluation_figure(table: pd.DataFrame, ylabel: str) -> tuple[Figure, pd.DataFrame]:
    """Returns of the ways to evaluate (Figure 6, right): a frame for each suite and group; a table with
    suite, group, evaluation, iqm, low, high."""
    panels = list(table.groupby(["suite", "group"], sort=False))
    figure, axes = frames(len(panels), min(len(panels), 3), max(4.2, 0.75 * table.evaluation.nunique()), 3.0)
    for frame, ((suite, group), rows) in zip(axes, panels, strict=True):
        points_with_intervals(frame, range(len(rows)), rows[["iqm", "low", "high"]].to_numpy(),
                              color=COLOURS[0], markersize=7)
        frame.set(xticks=range(len(rows)), ylabel=f"IQM of {ylabel}", title=f"{suite}, {group}",
                  xlim=(-0.5, len(rows) - 0.5))
        frame.set_xticklabels(rows.evaluation, rotation=30, ha="right")
    return figure, table

def entropy_figure(table: pd.DataFrame, cited: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Behaviour entropy of each run, with its mean, beside the paper's (Table 1); tables with task and
    entropy, and method."""
    figure, (axes,) = frames(1, 1, 5.5, 3.0)
    tasks = list(dict.fromkeys([*table.task, *cited.task]))
    for place, task in enumerate(tasks):
        own = table[table.task == task].entropy.astype(float)
        axes.plot(np.full(len(own), place - 0.15), own, "o", color=COLOURS[0], alpha=0.5,
                  label="runs" if place == 0 else None)
        axes.plot(place - 0.15, own.mean(), "_", markersize=24, color=COLOURS[0],
                  label="their mean" if place == 0 else None)
        for k, row in enumerate(cited[cited.task == task].itertuples()):
            axes.errorbar(place + 0.1 + 0.1 * k, row.entropy, row.spread, fmt="d", capsize=3,
                          color=f"{0.2 + 0.25 * k}", label=f"{row.method} (cited)" if place == 0 else None)
    axes.set(xticks=range(len(tasks)), xticklabels=tasks, ylim=(-0.05, 1.05), ylabel="behaviour entropy",
             xlim=(-0.6, len(tasks) - 0.3))
    legend(figure, [axes])
    return figure, table
