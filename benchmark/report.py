"""Statistics and figures of any number of runs, as PNG, PDF and CSV and one Markdown page.

    python -m benchmark.report runs --out results [--metric eval/success_once] [--seeds 10]

Groups are the runs' --exp-name, as benchmark.launch gives one to each sweep and to each value of an ablation;
--group-by takes another argument, or "folder". Interquartile means (IQM) are over finished runs and have 95%
stratified bootstrap intervals; groups are compared on the tasks of which all have finished runs, and of a task
with more runs than another the first ones count. What is missing or not finished is listed. With
--until-steps, tasks and suites are compared after so many environment steps, while wall clock has the whole
runs, of which the faster may be the longer. Runs of benchmark.launch --hours are compared with each other only,
over hours."""

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import tyro

from benchmark import figures
from benchmark.figures import Panel, matrix
from benchmark.markdown import markdown_table
from benchmark.runs import (
    OTHER,
    RETURN,
    RUN,
    SEED_COLUMNS,
    VARIANT,
    each_seed,
    evaluations,
    limit_of,
    read_entropies,
    read_evaluations,
    read_table,
    with_missing,
    with_repeats,
)
from benchmark.statistics import improvement, interval
from benchmark.tasks import ROOT, SUITES, task_of, tasks_of

SHOWN = {"epsilon": "ε", "denoising": "denoising steps N"}
ANCHORS = ROOT / "benchmark" / "anchors"
PAPER_HUMANOIDS = pd.read_csv(ANCHORS / "humanoids.csv")  # Table 2: after 50M steps
PAPER_ENTROPY = pd.DataFrame(
    columns=["task", "method", "entropy", "spread"],
    data=[  # Table 1
        ("PushT", "TruDi", 0.32, 0.13),
        ("PushT", "DIME", 0.20, 0.20),
        ("PushT", "REPPO", 0.0, 0.0),
        ("StackCube", "TruDi", 0.87, 0.08),
        ("StackCube", "DIME", 0.68, 0.15),
        ("StackCube", "REPPO", 0.0, 0.0),
    ],
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Report on runs."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders, or folders that have some
    out: str  # folder to write to
    metric: str = RETURN  # what is compared
    group_by: str = "exp_name"  # an argument's name, or "folder"
    # runs that each task ought to have, at least; a task that has fewer than another is short of runs anyway
    seeds: int = 1
    # compare tasks and suites after so many environment steps, even where runs went on
    until_steps: int | None = None
    # files of benchmark/speed/rollout_and_update.py at the paper's sizes, for the cost of the experiments
    throughput: tuple[str, ...] = ()


class Page:
    """The results page: text, and figures that are written beside it."""

    def __init__(self, folder: pathlib.Path) -> None:
        """In a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.parts = folder, []

    def text(self, *lines: str) -> None:
        """Add a paragraph."""
        self.parts.append("\n".join(lines) + "\n")

    def table(self, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
        """Add a table."""
        self.parts.append(markdown_table(header, rows))

    def figure(self, name: str, caption: str, drawn: tuple[Any, pd.DataFrame]) -> None:
        """Add a figure, and links to its PDF and its numbers."""
        figures.save(*drawn, self.folder / name)
        self.text(f"![{caption}]({name}.png)", "", f"{caption} ([PDF]({name}.pdf), [CSV]({name}.csv))")

    def write(self) -> pathlib.Path:
        """Write the page."""
        path = self.folder / "README.md"
        path.write_text("\n".join(self.parts))
        return path


# ---------------------------------------------------------------------------------------------------- numbers
def title_of(suite: str) -> str:
    """A suite's title."""
    return SUITES[suite].title if suite in SUITES else "Other tasks"


def number_of_tasks(suite: str) -> int:
    """How many of the 73 are in a suite."""
    return len(tasks_of([suite]))


def label_of(metric: str) -> str:
    """A metric's name for an axis."""
    return metric.rpartition("/")[2].replace("_", " ")


def shown(band: np.ndarray, decimals: int = 1) -> str:
    """An estimate with its interval (3,), if it has one; "none" for NaN."""
    if np.isnan(band[0]):
        return "none"
    estimate, low, high = (f"{x:.{decimals}f}" for x in band)
    return estimate if np.isnan(band[1]) else f"{estimate} [{low}, {high}]"


def decimals_of(values: Iterable[float]) -> int:
    """Digits after the point that tell such values apart."""
    return 3 if np.nanmax(np.abs(list(values)), initial=0) <= 1 else 1


def final_band(scores: np.ndarray) -> np.ndarray:
    """The IQM and its interval (3,) of scores (R, T); NaN if any is."""
    return np.full(3, np.nan) if np.isnan(scores).any() else interval(scores)[:, 0]


def scaled(log: pd.DataFrame) -> pd.DataFrame:
    """Evaluations of finished runs with a column `score`: the metric or, in a suite whose returns differ between
    tasks, that on a scale like Atari's human-normalised scores, between a random policy's return and a
    reference's. 0 is the lowest mean of a group's first evaluations, whose policies have hardly learned, and 1
    the highest mean of a group's first or last ones."""
    runs = log.groupby(["suite", "task", "group", *RUN]).value
    ends = (
        pd.DataFrame({"first": runs.first(), "last": runs.last()}).groupby(["suite", "task", "group"]).mean()
    )
    low = ends["first"].groupby(["suite", "task"]).min()
    high = ends.max(axis=1).groupby(["suite", "task"]).max()
    scale = pd.DataFrame({"low": low, "width": (high - low).where(high > low, 1.0)}).reset_index()
    alike = [suite not in SUITES or not SUITES[suite].normalized for suite in scale.suite]
    scale.loc[alike, ["low", "width"]] = 0.0, 1.0
    joined = log.merge(scale, on=["suite", "task"], how="left")
    return joined.assign(score=(joined.value - joined.low) / joined.width)


def panel_of(log: pd.DataFrame, seeds: pd.DataFrame, title: str, normalized: bool) -> Panel | None:
    """What there is to compare among finished runs of one suite or ablation; None if no task has a run of
    every group. `log` are their evaluations, `seeds` has a row for each."""
    groups = list(seeds.group.unique())
    counts = seeds.groupby("task", sort=False).group.nunique()
    tasks = list(counts.index[counts == len(groups)])
    left_out = sorted(counts.index[counts < len(groups)])
    if not tasks:
        return None
    log, seeds = (table[table.task.isin(tasks)] for table in (log, seeds))
    last = log.groupby(["task", "group", *RUN]).score.last()
    seeds = seeds.join(last, on=["task", "group", *RUN])
    return Panel(title, groups, tasks, left_out, log, seeds, normalized)


def panels_of(log: pd.DataFrame, seeds: pd.DataFrame) -> dict[str, Panel]:
    """A panel for each suite that has finished runs to compare."""
    panels = {}
    for suite in SUITES:
        done = seeds[(seeds.suite == suite) & (seeds.state == "finished")]
        own = log[(log.suite == suite) & (log.state == "finished") & log.group.isin(done.group)]
        if panel := panel_of(scaled(own), done, "", SUITES[suite].normalized):
            title = f"{SUITES[suite].title}\n{len(panel.tasks)} of {number_of_tasks(suite)} tasks"
            panels[suite] = dataclasses.replace(panel, title=title)
    return panels


def improvements(panels: dict[str, Panel]) -> pd.DataFrame:
    """P(X > Y) of every pair of groups in each suite."""
    rows = []
    for suite, panel in panels.items():
        for x, y in itertools.combinations(panel.groups, 2):
            rows.append((suite, x, y, *interval([panel.scores_of(x), panel.scores_of(y)], improvement)[:, 0]))
    return pd.DataFrame(rows, columns=["suite", "x", "y", "probability", "low", "high"])


def at_matched_time(panel: Panel) -> tuple[pd.Series, pd.DataFrame]:
    """For each task of a panel the hours of training that every run of it had had at its last evaluation, and the
    panel's seeds with the score `matched` then; NaN where the first evaluation was later."""
    runs = panel.log.groupby(["task", "group", *RUN])
    hours = runs.hours.max().groupby("task").min()[panel.tasks]
    matched = {key: np.interp(hours[key[0]], run.hours, run.score, left=np.nan) for key, run in runs}
    keys = pd.MultiIndex.from_frame(panel.seeds[["task", "group", *RUN]])
    return hours, panel.seeds.assign(matched=[matched[key] for key in keys])


# --------------------------------------------------------------------------------------------------- sections
def write_runs(page: Page, seeds: pd.DataFrame) -> None:
    """What there is and what is missing: runs.csv, with a row a run, and a summary by suite and group."""
    folders = seeds.folder.map(lambda folder: pathlib.Path(folder).name, na_action="ignore")
    table = seeds.assign(folder=folders)[[*SEED_COLUMNS, "same_as"]]
    table.to_csv(page.folder / "runs.csv", index=False, float_format="%.6g")
    page.text(
        "## Runs",
        "",
        "Every run, also each that is missing, is in [runs.csv](runs.csv). IQMs are of the finished.",
    )
    notes = []
    for (suite, group, twin), again in seeds[seeds.same_as != ""].groupby(["suite", "group", "same_as"]):
        notes.append(
            f"- {group}, {title_of(suite)}, the same runs as {twin}'s and counted there: {listed(again)}"
        )
    states = ["finished", "unfinished", "diverged", "missing", "superseded"]
    rows = []
    for (suite, group), own in seeds[seeds.same_as == ""].groupby(["suite", "group"], sort=False):
        counts = own.state.value_counts().reindex(states, fill_value=0)
        rows.append((title_of(suite), group, own[own.state != "missing"].task.nunique(), *counts))
        notes += [
            f"- {group}, {title_of(suite)}, {state}: {listed(own[own.state == state])}"
            for state in ("unfinished", "diverged", "missing")
            if counts[state]
        ]
    page.table(("suite", "group", "tasks", *states), rows)
    absent = [f"- {suite.title}: no run" for name, suite in SUITES.items() if name not in set(seeds.suite)]
    page.text(*notes, *absent)


def listed(seeds: pd.DataFrame) -> str:
    """Tasks and seeds, with the steps that there are; without seeds where all listed ones are the same."""
    numbers = seeds.groupby("task", sort=False).seed.agg(lambda own: ", ".join(map(str, own)))
    if len(numbers) > 1 and numbers.nunique() == 1 and not seeds.last_step.any():
        return f"{', '.join(numbers.index)} (seed {numbers.iloc[0]} of each)"
    parts = []
    for task, own in seeds.groupby("task", sort=False):
        steps = ", ".join(dict.fromkeys(f"at {step:,.0f}" for step in own.last_step if step))
        parts.append(f"{task} (seed {numbers[task]}{'; ' + steps if steps else ''})")
    return ", ".join(parts)


def task_row(task: str, group: str, own: pd.DataFrame, cited: dict[str, float]) -> tuple:
    """The table's row of the finished runs of one task and group."""
    final = shown(interval(own[["final"]].to_numpy())[:, 0], decimals_of(own.final))
    success = f"{own.success.mean():.2f}" if own.success.notna().any() else ""
    return (
        task,
        group,
        len(own),
        final,
        success,
        f"{own.last_step.min():,.0f}",
        f"{own.last_hours.mean() * 60:.1f}",
        cited.get(task, ""),
    )


def write_tasks(
    page: Page, log: pd.DataFrame, seeds: pd.DataFrame, colours: dict[str, str], metric: str
) -> None:
    """Each task's last evaluations, and its curves (Figures 9 to 14)."""
    cited = pd.read_csv(ANCHORS / "reppo_returns.csv", index_col="env").reppo_large_final_50M
    cited = cited.to_dict() if metric == RETURN else {}
    page.text(
        "## Tasks",
        "",
        f"IQM of the last {metric} over finished runs, which for fewer than four runs is the mean, "
        "with its 95% interval, which for two or three runs is hardly more than their range. Minutes "
        "are of training, without compilation, evaluations and checkpoints.",
    )
    done = seeds[seeds.state == "finished"]
    cells = done.groupby(["task", "group"], sort=False)
    order = {key: number for number, key in enumerate(dict.fromkeys(done.task))}
    rows = [task_row(*key, own, cited) for key, own in sorted(cells, key=lambda cell: order[cell[0][0]])]
    page.table(("task", "group", "runs", "IQM", "success", "steps", "minutes", "REPPO at 50M (cited)"), rows)
    for suite, own in log[log.state != "superseded"].groupby("suite", sort=False):
        without = seeds[seeds.suite == suite].task.nunique() - own.task.nunique()
        note = (
            f"no run of {without} of the suite's {number_of_tasks(suite)} tasks"
            if without and suite != OTHER
            else ""
        )
        number = f" (the paper's Figure {SUITES[suite].figure})" if suite in SUITES else ""
        caption = (
            f"{title_of(suite)}{number}: IQM and its 95% interval; thin: each seed, dotted: not finished"
        )
        drawn = figures.tasks_figure(own, colours, cited, label_of(metric), note)
        page.figure(f"tasks_{suite}", caption, drawn)


def write_suites(page: Page, panels: dict[str, Panel], colours: dict[str, str], metric: str) -> None:
    """Aggregates over suites: curves (Figure 2), profiles, probability of improvement."""
    page.text(
        "## Suites",
        "",
        "Over the tasks of which every group has finished runs; curves end where the shortest run "
        "does." + how_normalised(panels),
    )
    rows = []
    for suite, panel in panels.items():
        for group in panel.groups:
            scores = panel.scores_of(group)
            rows.append(
                (
                    title_of(suite),
                    group,
                    f"{len(panel.tasks)} of {number_of_tasks(suite)}",
                    scores.size,
                    shown(final_band(scores), decimals_of(scores.flat)),
                    ", ".join(panel.left_out),
                )
            )
    page.table(
        ("suite", "group", "tasks", "runs", "IQM of last evaluations", "left out, as another group has none"),
        rows,
    )
    cited = {}
    if metric == RETURN:
        cited = {"humanoid": [(row.method, row.iqm, None) for row in PAPER_HUMANOIDS.itertuples()]}
    page.figure(
        "suites",
        "IQM over tasks and seeds with its 95% interval (the paper's Figure 2)",
        figures.suites_figure(panels, colours, "step", label_of(metric), cited),
    )
    page.figure(
        "profiles",
        "Performance profiles: share of runs whose last evaluation is above τ",
        figures.profiles_figure(panels, colours, label_of(metric)),
    )
    table = improvements(panels)
    if len(table):
        page.figure(
            "improvement",
            "Probability of improvement, with its 95% interval",
            figures.improvement_figure(table),
        )
    else:
        page.text("Probability of improvement: there are no two groups with finished runs of the same tasks.")


def how_normalised(panels: dict[str, Panel]) -> str:
    """What normalised returns are, if any suite has them."""
    titles = ", ".join(title_of(suite) for suite, panel in panels.items() if panel.normalized)
    return (
        (
            f" Returns of {titles} are normalised for each task: 0 is the lowest mean of a group's first "
            "evaluations, and 1 the highest of a group's first or last ones."
        )
        if titles
        else ""
    )


def wall_clock_rows(suite: str, panel: Panel) -> tuple[list[tuple], list[tuple]]:
    """The rows of a suite's groups, and those of its tasks, for which there is something to compare."""
    hours, seeds = at_matched_time(panel)
    times = " to ".join(dict.fromkeys(f"{x * 60:.1f}" for x in (hours.min(), hours.max())))
    rows, tasks = [], []
    for group in panel.groups:
        own = seeds[seeds.group == group]
        minutes = 60 * own.last_hours
        matched = shown(final_band(matrix(own, panel.tasks, "matched")), 2)
        rows.append(
            (
                title_of(suite),
                group,
                f"{minutes.mean():.1f} ± {minutes.std(ddof=0):.1f}",
                f"{60 * own.other_hours.mean():.1f}",
                shown(final_band(panel.scores_of(group)), 2),
                f"{matched} at {times}",
                ", ".join(sorted(own.device.unique())),
            )
        )
    for task, group in itertools.product(panel.tasks, panel.groups if len(panel.groups) > 1 else []):
        scores = matrix(seeds[seeds.group == group], [task], "matched")
        tasks.append((task, f"{hours[task] * 60:.2f}", group, shown(final_band(scores), 2)))
    return rows, tasks


def write_wall_clock(
    page: Page, panels: dict[str, Panel], colours: dict[str, str], metric: str, limit: float | None = None
) -> None:
    """Returns over hours of training, and training times (Table 2); of runs that were given so many hours
    (Figure 5, left) or, without a limit, so many steps."""
    name, title = "wall_clock", "Wall clock"
    caption = "IQM over training time (the paper's Table 2 has the times)"
    if limit is not None:
        name, title = f"wall_clock_{limit:g}h", f"Wall clock of {limit:g} hours each"
        caption = f"IQM over training time, {limit:g} hours each (the paper's Figure 5, left, has 2.5)"
    page.text(
        f"## {title}",
        "",
        "Minutes of training are of iterations only, other minutes of evaluations, checkpoints and logging; "
        "compilation is in neither. Times of different devices cannot be compared. A task is compared "
        "when the first of its runs has trained until its last evaluation; a group that has a run "
        "without any evaluation by then has none." + how_normalised(panels),
    )
    found = [wall_clock_rows(suite, panel) for suite, panel in panels.items()]
    rows, tasks = ([row for part in parts for row in part] for parts in zip(*found, strict=True))
    cited = PAPER_HUMANOIDS.iloc[:0]
    if metric == RETURN and "humanoid" in panels and limit is None:
        cited = PAPER_HUMANOIDS
    rows += [
        (
            title_of("humanoid"),
            f"{row.method} (cited)",
            f"{row.hours * 60:.0f} ± {row.hours_spread * 60:.0f}",
            "",
            f"{row.iqm} ± {row.iqm_spread}",
            "",
            "A100 or H100",
        )
        for row in cited.itertuples()
    ]
    page.table(
        (
            "suite",
            "group",
            "minutes of training",
            "other minutes",
            "IQM of last evaluations",
            "IQM at matched minutes",
            "device",
        ),
        rows,
    )
    if tasks:
        page.table(("task", "matched minutes", "group", "IQM"), tasks)
    points = {"humanoid": [(row.method, row.iqm, row.hours) for row in cited.itertuples()]}
    page.figure(name, caption, figures.suites_figure(panels, colours, "hours", label_of(metric), points))


def write_limited(
    page: Page, log: pd.DataFrame, seeds: pd.DataFrame, colours: dict[str, str], metric: str
) -> None:
    """Runs of benchmark.launch --hours, those of equal hours together."""
    for limit, own in seeds.groupby(seeds.group.map(limit_of)):
        panels = panels_of(log[log.group.isin(own.group)], own)
        if panels:
            write_wall_clock(page, panels, colours, metric, limit)


def write_ablations(page: Page, log: pd.DataFrame, seeds: pd.DataFrame, metric: str) -> None:
    """Each ablation of each sweep and suite."""
    variant = seeds.group.str.extract(VARIANT).dropna()
    families = seeds.join(variant, how="inner").groupby(["base", "kind", "suite"], sort=False)
    for key, own in families:
        own = with_default(own, seeds, key)
        own_log = log[(log.suite == key[2]) & log.group.isin(own.group) & (log.state == "finished")]
        write_ablation(page, key, own, scaled(own_log), label_of(metric))
    if not len(families):
        page.text("No runs of an ablation of ε or of denoising steps.")


def with_default(own: pd.DataFrame, seeds: pd.DataFrame, key: tuple[str, str, str]) -> pd.DataFrame:
    """The runs of an ablation and, if none of its own has it, those of the sweep, which have the default value."""
    base, kind, suite = key
    sweep = seeds[(seeds.group == base) & (seeds.suite == suite) & seeds.task.isin(own.task)]
    sweep = sweep[sweep[kind].notna()]
    sweep = sweep.assign(value=sweep[kind].map("{:g}".format))
    sweep = sweep[~sweep.value.astype(float).isin(own.value.astype(float))]
    both = pd.concat([own, sweep]) if len(sweep) else own
    return both.sort_values("value", key=lambda value: value.astype(float), kind="stable")


def write_ablation(
    page: Page, key: tuple[str, str, str], seeds: pd.DataFrame, log: pd.DataFrame, ylabel: str
) -> None:
    """One ablation: a table and a figure (Figures 5, 6) over tasks of which all values have finished runs, as far
    as the shortest of these went."""
    base, kind, suite = key
    title = f"{base}, {kind}, {title_of(suite)}"
    axis = "step" if limit_of(base) is None else "hours"
    done = seeds[seeds.state == "finished"]
    if axis == "step":
        log = log[log.step <= log.groupby(["task", *RUN]).step.max().min()]
    without = [value for value in dict.fromkeys(seeds.value) if value not in set(done.value)]
    note = f"; without a finished run: {', '.join(without)}" if without else ""
    panel = panel_of(log, done, title, normalized=False)
    if panel is None:
        return page.text(f"{title}: no task has finished runs of two values{note}.")
    finals = np.array([final_band(panel.scores_of(group)) for group in panel.groups])
    own = [panel.seeds[panel.seeds.group == group] for group in panel.groups]
    values = [float(x.value.iloc[0]) for x in own]
    decimals = decimals_of(finals[:, 0])
    page.table(
        (SHOWN[kind], "runs", "IQM of last evaluations"),
        [
            (f"{value:g}{same_runs(x)}", len(x), shown(final, decimals))
            for value, x, final in zip(values, own, finals, strict=True)
        ],
    )
    over = ", ".join(panel.tasks) if len(panel.tasks) < 3 else f"{len(panel.tasks)} tasks"
    logs = {value: panel.log_of(group) for value, group in zip(values, panel.groups, strict=True)}
    drawn = figures.ablation_figure(logs, panel.tasks, finals, f"{kind}: {over}", SHOWN[kind], ylabel, axis)
    return page.figure(f"ablation_{base}_{kind}_{suite}", f"{title}: {', '.join(panel.tasks)}{note}", drawn)


def same_runs(seeds: pd.DataFrame) -> str:
    """The group that has the same runs as all of these, in brackets, if there is one."""
    groups = set(seeds.same_as)
    return f" (= {groups.pop()})" if len(groups) == 1 and "" not in groups else ""


def write_evaluations(page: Page, sources: Iterable[str], metric: str) -> None:
    """Ways to evaluate (Figure 6, right), each over the tasks and seeds of which all were evaluated."""
    rows = read_evaluations(sources, metric)
    if rows.value.notna().sum() == 0:
        return page.text("No evaluations of finished runs by benchmark.launch --ablation evaluation.")
    lines = []
    for (suite, group), own in rows.groupby(["suite", "group"]):
        grid = own.pivot_table(index=["task", "seed"], columns="evaluation", values="value")
        complete = grid.dropna().reset_index()
        tasks = list(complete.task.unique())
        for evaluation in sorted(grid.columns, key=order_of) if tasks else []:
            counts = len(tasks), len(complete), len(grid) - len(complete)
            band = final_band(matrix(complete, tasks, evaluation))
            lines.append((suite, group, evaluation, *counts, *band))
    table = pd.DataFrame(lines, columns="suite group evaluation tasks runs incomplete iqm low high".split())
    page.table(
        table.columns, [(*line[:6], f"{line[6]:.4g}", *(f"{x:.4g}" for x in line[7:])) for line in lines]
    )
    if len(table):
        page.figure(
            "ablation_evaluation",
            "Ways to evaluate the same checkpoints (the paper's Figure 6, right)",
            figures.evaluation_figure(table, label_of(metric)),
        )
    return None


def order_of(evaluation: str) -> tuple:
    """Ways to evaluate in the paper's order: SDE, ODE by its c, best of K by K."""
    kind, _, number = evaluation.rpartition("-")
    return ("", "ode", "best-of").index(kind), float(number) if kind else 0


def write_entropies(page: Page, sources: Iterable[str]) -> None:
    """Behaviour entropy (Table 1)."""
    table = read_entropies(sources)
    page.text("## Behaviour entropy")
    if table.empty:
        return page.text(
            "No run has a behavior_entropy.json of benchmark.studies.multimodality.behavior_entropy."
        )
    page.table(
        table.columns,
        [
            ["" if x is None or x != x else f"{x:.3g}" if isinstance(x, float) else x for x in row]
            for row in table.itertuples(index=False)
        ],
    )
    drawn = figures.entropy_figure(table, PAPER_ENTROPY)
    return page.figure("behavior_entropy", "Behaviour entropy (the paper's Table 1)", drawn)


def write_cost(page: Page, seeds: pd.DataFrame, throughput: tuple[str, ...]) -> None:
    """What 10 runs of each of the 73 tasks would take, from what was measured at the paper's sizes only."""
    own = seeds[seeds.paper_sizes.eq(True) & (seeds.last_hours > 0)]
    beside = own.groupby("folder").seed.transform("nunique")  # seeds of one process, on one device
    found = list(zip(own.suite, own.device, beside * own.last_step / (own.last_hours * 3600), strict=True))
    found += [x for path in throughput for x in [measured_speed(pathlib.Path(path))] if x]
    speeds = pd.DataFrame(found, columns=["suite", "device", "speed"])
    speeds = speeds.groupby(["suite", "device"]).speed.median()
    rows = []
    for suite, data in SUITES.items():
        count = number_of_tasks(suite)
        start = data.title, count, f"{data.settings.total_timesteps:,}"
        own = speeds[suite] if suite in speeds.index.get_level_values(0) else {}
        rows += [
            (
                *start,
                f"{speed:,.0f}",
                device,
                f"{10 * count * data.settings.total_timesteps / speed / 3600:,.0f}",
            )
            for device, speed in own.items()
        ]
        if not len(own):
            rows.append((*start, "not measured", "", ""))
    page.text(
        "## Cost of the paper's experiments",
        "",
        "Ten runs of each task, at the median speed of any with Table 5's sizes.",
    )
    page.table(("suite", "tasks", "steps of a run", "steps/s", "device", "hours of the device"), rows)
    page.text(cost_by_operations())


def cost_by_operations() -> str:
    """The hours of all experiments at the rate of operations that the paper's hours imply."""
    estimates = json.loads((ROOT / "benchmark" / "results" / "estimates.json").read_text())
    hours = {
        suite: 10
        * sum(row["flop"] for row in estimates["tasks"] if row["suite"] == suite)
        / estimates["gpu_flop_per_second"]
        / 3600
        for suite in SUITES
    }
    cited = [f"{row.hours} for {row.method}" for row in PAPER_HUMANOIDS.itertuples()]
    return (
        f"The paper's Table 2 has these hours of an A100 or H100 for a run on a humanoid (cited): "
        f"{', '.join(cited)}; forty of TruDi's are {hours['humanoid']:,.0f} hours. At the operations a "
        "second which that implies, counted by benchmark.speed.estimates, all would take "
        f"{sum(hours.values()):,.0f} hours of such a GPU: "
        f"{', '.join(f'{title_of(suite)} {x:,.0f}' for suite, x in hours.items())}; more where "
        "simulators are slower."
    )


def measured_speed(path: pathlib.Path) -> tuple[str, str, float] | None:
    """Suite, device and environment steps a second of a file of benchmark.speed.rollout_and_update; None, and a
    word, at other sizes."""
    saved = json.loads(path.read_text())
    args, task = saved["args"], task_of("trudi_mjx", saved["args"]["env_id"])
    if not task or any(
        args[name] != getattr(task.settings, name) for name in ("num_envs", "num_steps", "hidden_dim")
    ):
        print(f"left out: {path} is not of the paper's sizes", file=sys.stderr)
        return None
    return task.suite, saved["provenance"]["device"], saved["steps_per_second"]["whole iteration"]["median"]


# ------------------------------------------------------------------------------------------------------- main
def fail(message: str) -> None:
    """Refuse bad input: one line on stderr and exit code 2."""
    print(f"benchmark.report: error: {message}", file=sys.stderr)
    sys.exit(2)


def read(options: Options) -> pd.DataFrame:
    """The runs' long table; exits with code 2 if there is nothing to report on."""
    for source in (x for x in [*options.runs, *options.throughput] if not pathlib.Path(x).exists()):
        fail(f"there is no {source}")
    table = read_table(options.runs, options.group_by)
    if options.metric not in table:
        fail(f"no run in {' '.join(options.runs)} has {options.metric}")
    return table


def compared(table: pd.DataFrame, options: Options) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Evaluations and seeds of what is compared after equal steps: no ablation, and no limit of hours."""
    seeds = with_missing(each_seed(table, options.metric), options.seeds)
    log = evaluations(table, options.metric)
    return tuple(part[~part.group.map(special)] for part in (log, seeds))


def special(group: str) -> bool:
    """Whether a group is a value of an ablation, or was given hours."""
    return bool(VARIANT.fullmatch(group)) or limit_of(group) is not None


def main() -> None:
    """Read the runs, write the page."""
    options = tyro.cli(Options)
    metric, table = options.metric, read(options)
    log = evaluations(table, metric)
    seeds = with_repeats(with_missing(each_seed(table, metric), options.seeds))
    groups = [group for group in dict.fromkeys(seeds.group) if not VARIANT.fullmatch(group)]
    colours = dict(zip(groups, itertools.cycle(figures.COLOURS), strict=False))
    page = Page(pathlib.Path(options.out))
    until, after = np.inf, ""
    if options.until_steps:
        until = options.until_steps
        after = f"; tasks and suites are compared after {until:,} environment steps"
    page.text("# Results", "", f"Written by `python -m benchmark.report`; the metric is `{metric}`{after}.")
    write_runs(page, seeds)
    equal = compared(table[table.step <= until], options)
    write_tasks(page, *equal, colours, metric)
    for write, panels in (
        (write_suites, panels_of(*equal)),
        (write_wall_clock, panels_of(*compared(table, options))),
    ):
        if panels:
            write(page, panels, colours, metric)
    limited = seeds.group.isin([group for group in groups if limit_of(group) is not None])
    write_limited(page, log, seeds[limited], colours, metric)
    page.text("## Ablations")
    write_ablations(page, log, seeds, metric)
    write_evaluations(page, options.runs, metric)
    write_entropies(page, options.runs)
    write_cost(page, seeds, options.throughput)
    print(page.write())


if __name__ == "__main__":
    main()
