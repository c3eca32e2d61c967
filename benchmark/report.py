"""Statistics and figures of any number of runs, as PNG, PDF and CSV and one Markdown page.

    python -m benchmark.report runs --out results [--metric eval/success_once] [--seeds 10]

Groups are the runs' --exp-name, as benchmark.launch gives one to each sweep and to each value of an ablation;
--group-by takes another argument, or "folder". Interquartile means (IQM) are over finished runs and have 95%
stratified bootstrap intervals; groups are compared on the tasks of which all have finished runs. What is
missing or not finished is listed. With --until-steps, tasks and suites are compared after so many environment
steps, while wall clock has the whole runs, of which the faster may be the longer. Runs of benchmark.launch
--hours are compared with each other only, over hours."""

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
from benchmark.aggregates import improvement_interval, interval, iqm, present, stack
from benchmark.tables import markdown_table

from benchmark import figures
from benchmark.outcomes import (
    OTHER,
    VARIANT,
    Outcome,
    by_task,
    curve,
    limit_of,
    read_entropies,
    read_evaluations,
    read_outcomes,
    select,
    with_missing,
    with_repeats,
)
from benchmark.runs import RETURN
from benchmark.tasks import ROOT, SUITES, task_of, tasks_of

SHOWN = {"epsilon": "ε", "denoising": "denoising steps N"}
ANCHORS = ROOT / "benchmark" / "anchors"
PAPER_HUMANOIDS = pd.read_csv(ANCHORS / "humanoids.csv")  # Table 2: after 50M steps
PAPER_ENTROPY = pd.DataFrame(columns=["task", "method", "entropy", "spread"], data=[  # Table 1
    ("PushT", "TruDi", 0.32, 0.13), ("PushT", "DIME", 0.20, 0.20), ("PushT", "REPPO", 0.0, 0.0),
    ("StackCube", "TruDi", 0.87, 0.08), ("StackCube", "DIME", 0.68, 0.15), ("StackCube", "REPPO", 0.0, 0.0)])

@dataclasses.dataclass(frozen=True)
class Options:
    """Analyse runs."""

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

def shown(band: np.ndarray, decimals: int = 1) -> str:
    """An estimate with its interval (3,), if it has one; "none" for NaN."""
    if np.isnan(band[0]):
        return "none"
    estimate, low, high = (f"{x:.{decimals}f}" for x in band)
    return estimate if np.isnan(band[1]) else f"{estimate} [{low}, {high}]"

def decimals_of(values: Iterable[float]) -> int:
    """Digits after the point that tell such values apart."""
    return 3 if np.nanmax(np.abs(list(values)), initial=0) <= 1 else 1

def scale_of(outcomes: list[Outcome], suite: str) -> figures.Scale:
    """Each task's scale in a suite whose returns differ in it, like that of Atari's human-normalised scores,
    between a random policy's and a reference's: 0 is the lowest mean of a group's first evaluations, whose
    policies have hardly learned, and 1 the highest mean of a group's first or last ones."""
    scale = {}
    if suite not in SUITES or not SUITES[suite].normalized:
        return scale
    for task, found in by_task(select(outcomes, suite=suite)).items():
        groups = [select(found, group=group) for group in dict.fromkeys(o.group for o in found)]
        first = [float(np.mean([o.values[0] for o in own])) for own in groups]
        last = [float(np.mean([o.final for o in own])) for own in groups]
        low, high = min(first), max(first + last)
        scale[task] = low, high if high > low else low + 1.0  # where nobody ever got better
    return scale

def panels_of(outcomes: list[Outcome]) -> dict[str, dict[str, Any]]:
    """What there is to compare in each suite: its groups with finished runs, and the tasks of which all of
    these have some."""
    panels = {}
    for suite in SUITES:
        groups = dict.fromkeys(o.group for o in select(outcomes, suite=suite, state="finished"))
        found = {group: by_task(select(outcomes, suite=suite, group=group)) for group in groups}
        first = next(iter(found.values()), [])
        tasks = [task for task in first if all(task in own for own in found.values())]
        if tasks:
            left_out = sorted({task for own in found.values() for task in own} - set(tasks))
            panels[suite] = dict(outcomes=select(outcomes, suite=suite), groups=list(found), tasks=tasks,
                                 left_out=left_out, scale=scale_of(outcomes, suite),
                                 title=f"{SUITES[suite].title}\n"
                                       f"{len(tasks)} of {number_of_tasks(suite)} tasks")
    return panels

def number_of_tasks(suite: str) -> int:
    """How many of the 73 are in a suite."""
    return len(tasks_of([suite]))

def improvements(panels: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """P(X > Y) of every pair of groups in each suite."""
    rows = []
    for suite, panel in panels.items():
        for x, y in itertools.combinations(panel["groups"], 2):
            scores = [figures.final_scores(select(panel["outcomes"], group=g), panel["tasks"], {})
                      for g in (x, y)]
            rows.append((suite, x, y, *improvement_interval(*scores)))
    return pd.DataFrame(rows, columns=["suite", "x", "y", "probability", "low", "high"])

def at_matched_time(panel: dict[str, Any]) -> tuple[dict[str, float], dict[str, list]]:
    """For each task of a suite's panel the hours of training that every run of it had had at its last
    evaluation, and each group's scores of these tasks then; NaN where the first evaluation was later."""
    hours = {task: min(o.hours[-1] for o in own)
             for task, own in by_task(panel["outcomes"]).items() if task in panel["tasks"]}
    found = {group: by_task(select(panel["outcomes"], group=group)) for group in panel["groups"]}
    return hours, {group: [[figures.normalise(value_at(o, hours[t]), panel["scale"].get(t)) for o in own[t]]
                           for t in panel["tasks"]]
                   for group, own in found.items()}

def banded(scores: list) -> np.ndarray:
    """The IQM and its interval (3,) of tasks' scores; NaN if any is."""
    if np.isnan(np.concatenate(scores)).any():
        return np.full(3, np.nan)
    return interval(stack(scores), iqm)[:, 0]

def value_at(outcome: Outcome, hours: float) -> float:
    """The metric after so many hours; NaN if the first evaluation was later."""
    return np.nan if outcome.hours[0] > hours else curve(outcome, "hours", np.array([hours]))[0]

# --------------------------------------------------------------------------------------------------- sections
def write_runs(page: Page, outcomes: list[Outcome]) -> None:
    """What there is and what is missing: runs.csv, with a row a run, and a summary by suite and group."""
    names = ("suite", "group", "env_id", "seed", "state", "last_step", "last_hours", "other_hours", "final",
             "success", "device", "folder", "same_as")
    pd.DataFrame([{name: getattr(o, name) for name in names} for o in outcomes], columns=names).to_csv(
        page.folder / "runs.csv", index=False, float_format="%.6g")
    page.text("## Runs", "",
              "Every run, also each that is missing, is in [runs.csv](runs.csv). IQMs are of the finished.")
    rows, notes = [], []
    for suite, group, twin in dict.fromkeys((o.suite, o.group, o.same_as) for o in outcomes if o.same_as):
        again = select(outcomes, suite=suite, group=group, same_as=twin)
        notes.append(f"- {group}, {title_of(suite)}, the same runs as {twin}'s and counted there: "
                     f"{listed(again)}")
    once = select(outcomes, same_as="")
    for suite, group in dict.fromkeys((o.suite, o.group) for o in once):
        own = select(once, suite=suite, group=group)
        counts = [len(select(own, state=state))
                  for state in ("finished", "unfinished", "diverged", "missing", "superseded")]
        rows.append((title_of(suite), group, len({o.env_id for o in own if o.state != "missing"}), *counts))
        notes += [f"- {group}, {title_of(suite)}, {state}: {listed(select(own, state=state))}"
                  for state in ("unfinished", "diverged", "missing") if select(own, state=state)]
    page.table(("suite", "group", "tasks", "finished", "unfinished", "diverged", "missing", "superseded"),
               rows)
    absent = [f"- {suite.title}: no run"
              for name, suite in SUITES.items() if not select(outcomes, suite=name)]
    page.text(*notes, *absent)

def listed(outcomes: list[Outcome]) -> str:
    """Tasks and seeds, with the steps that there are; without seeds where all listed ones are the same."""
    parts, tasks = [], list(dict.fromkeys(o.env_id for o in outcomes))
    seeds = {env_id: tuple(o.seed for o in select(outcomes, env_id=env_id)) for env_id in tasks}
    if len(tasks) > 1 and len(set(seeds.values())) == 1 and not any(o.last_step for o in outcomes):
        return f"{', '.join(tasks)} (seed {', '.join(map(str, seeds[tasks[0]]))} of each)"
    for env_id in tasks:
        own = select(outcomes, env_id=env_id)
        steps = ", ".join(dict.fromkeys(f"at {o.last_step:,}" for o in own if o.last_step))
        parts.append(f"{env_id} (seed {', '.join(str(o.seed) for o in own)}{'; ' + steps if steps else ''})")
    return ", ".join(parts)

def same_runs(own: list[Outcome]) -> str:
    """The group that has the same runs as all of these, in brackets, if there is one."""
    groups = {o.same_as for o in own}
    return f" (= {groups.pop()})" if len(groups) == 1 and "" not in groups else ""

def task_row(own: list[Outcome], cited: dict[str, float]) -> tuple:
    """The table's row of the finished runs of one task and group."""
    success = [o.success for o in own if not np.isnan(o.success)]
    final = shown(interval(stack([[o.final for o in own]]), iqm)[:, 0], decimals_of(o.final for o in own))
    return (own[0].env_id, own[0].group, len(own), final, f"{np.mean(success):.2f}" if success else "",
            f"{min(o.last_step for o in own):,}", f"{np.mean([o.last_hours for o in own]) * 60:.1f}",
            cited.get(own[0].env_id, ""))

def write_tasks(page: Page, outcomes: list[Outcome], colours: dict[str, str], metric: str) -> None:
    """Each task's last evaluations, and its curves (Figures 9 to 14)."""
    cited = pd.read_csv(ANCHORS / "reppo_returns.csv", index_col="env").reppo_large_final_50M
    cited = cited.to_dict() if metric == RETURN else {}
    page.text("## Tasks", "",
              f"IQM of the last {metric} over finished runs, which for fewer than four runs is the mean, "
              "with its 95% interval, which for two or three runs is hardly more than their range. Minutes "
              "are of training, without compilation, evaluations and checkpoints.")
    suites, groups = [*SUITES, OTHER], list(dict.fromkeys(o.group for o in outcomes))
    found = [by_task(select(outcomes, suite=suite)) for suite in suites]
    cells = [select(own, group=group) for tasks in found for own in tasks.values() for group in groups]
    rows = [task_row(own, cited) for own in cells if own]
    page.table(("task", "group", "runs", "IQM", "success", "steps", "minutes", "REPPO at 50M (cited)"), rows)
    for suite in suites:
        own = select(outcomes, suite=suite)
        if any(len(o.values) for o in own):
            without = sorted({o.env_id for o in own} - {o.env_id for o in own if len(o.values)})
            note = (f"no run of {len(without)} of the suite's {number_of_tasks(suite)} tasks"
                    if without and suite != OTHER else "")
            number = f" (the paper's Figure {SUITES[suite].figure})" if suite in SUITES else ""
            caption = (f"{title_of(suite)}{number}: IQM and its 95% interval; thin: each seed, dotted: "
                       "not finished")
            page.figure(f"tasks_{suite}", caption,
                        figures.tasks_figure(own, colours, cited, label_of(metric), note))

def label_of(metric: str) -> str:
    """A metric's name for an axis."""
    return metric.rpartition("/")[2].replace("_", " ")

def write_suites(page: Page, panels: dict[str, dict[str, Any]], colours: dict[str, str], metric: str) -> None:
    """Aggregates over suites: curves (Figure 2), profiles, probability of improvement."""
    page.text("## Suites", "",
              "Over the tasks of which every group has finished runs; curves end where the shortest run "
              "does." + how_normalised(panels))
    rows = []
    for suite, panel in panels.items():
        for group in panel["groups"]:
            scores = figures.final_scores(select(panel["outcomes"], group=group), panel["tasks"],
                                          panel["scale"])
            rows.append((title_of(suite), group, f"{len(panel['tasks'])} of {number_of_tasks(suite)}",
                         present(scores).sum(), shown(interval(scores, iqm)[:, 0], decimals_of(scores.flat)),
                         ", ".join(panel["left_out"])))
    page.table(("suite", "group", "tasks", "runs", "IQM of last evaluations",
                "left out, as another group has none"), rows)
    cited = {}
    if metric == RETURN:
        cited = {"humanoid": [(row.method, row.iqm, None) for row in PAPER_HUMANOIDS.itertuples()]}
    page.figure("suites", "IQM over tasks and seeds with its 95% interval (the paper's Figure 2)",
                figures.suites_figure(panels, colours, "steps", label_of(metric), cited))
    page.figure("profiles", "Performance profiles: share of runs whose last evaluation is above τ",
                figures.profiles_figure(panels, colours, label_of(metric)))
    table = improvements(panels)
    if len(table):
        page.figure("improvement", "Probability of improvement, with its 95% interval",
                    figures.improvement_figure(table))
    else:
        page.text("Probability of improvement: there are no two groups with finished runs of the same tasks.")

def how_normalised(panels: dict[str, dict[str, Any]]) -> str:
    """What normalised returns are, if any suite has them."""
    titles = ", ".join(title_of(suite) for suite, panel in panels.items() if panel["scale"])
    return (f" Returns of {titles} are normalised for each task: 0 is the lowest mean of a group's first "
            "evaluations, and 1 the highest of a group's first or last ones.") if titles else ""

def wall_clock_rows(suite: str, panel: dict[str, Any]) -> tuple[list[tuple], list[tuple]]:
    """The rows of a suite's groups, and those of its tasks, for which there is something to compare."""
    hours, matched = at_matched_time(panel)
    ends = (min(hours.values()), max(hours.values()))
    times = " to ".join(dict.fromkeys(f"{x * 60:.1f}" for x in ends))
    rows = []
    for group in panel["groups"]:
        found = by_task(select(panel["outcomes"], group=group))
        own = [o for task in panel["tasks"] for o in found[task]]
        minutes = 60 * np.array([o.last_hours for o in own])
        others = 60 * np.mean([o.other_hours for o in own])
        final = interval(figures.final_scores(own, panel["tasks"], panel["scale"]), iqm)[:, 0]
        rows.append((title_of(suite), group, f"{minutes.mean():.1f} ± {minutes.std():.1f}", f"{others:.1f}",
                     shown(final, 2), f"{shown(banded(matched[group]), 2)} at {times}",
                     ", ".join(sorted({o.device for o in own}))))
    tasks = [(task, f"{hours[task] * 60:.2f}", group, shown(banded([matched[group][i]]), 2))
             for i, task in enumerate(panel["tasks"])
             for group in panel["groups"] if len(panel["groups"]) > 1]
    return rows, tasks

def write_wall_clock(page: Page, panels: dict[str, dict[str, Any]], colours: dict[str, str],
                     metric: str, limit: float | None = None) -> None:
    """Returns over hours of training, and training times (Table 2); of runs that were given so many hours
    (Figure 5, left) or, without a limit, so many steps."""
    name, title = "wall_clock", "Wall clock"
    caption = "IQM over training time (the paper's Table 2 has the times)"
    if limit is not None:
        name, title = f"wall_clock_{limit:g}h", f"Wall clock of {limit:g} hours each"
        caption = f"IQM over training time, {limit:g} hours each (the paper's Figure 5, left, has 2.5)"
    page.text(f"## {title}", "",
              "Minutes of training are of iterations only, other minutes of evaluations, checkpoints and logging; "
              "compilation is in neither. Times of different devices cannot be compared. A task is compared "
              "when the first of its runs has trained until its last evaluation; a group that has a run "
              "without any evaluation by then has none." + how_normalised(panels))
    found = [wall_clock_rows(suite, panel) for suite, panel in panels.items()]
    rows, tasks = ([row for part in parts for row in part] for parts in zip(*found, strict=True))
    cited = PAPER_HUMANOIDS.iloc[:0]
    if metric == RETURN and "humanoid" in panels and limit is None:
        cited = PAPER_HUMANOIDS
    rows += [(title_of("humanoid"), f"{row.method} (cited)",
              f"{row.hours * 60:.0f} ± {row.hours_spread * 60:.0f}", "", f"{row.iqm} ± {row.iqm_spread}",
              "", "A100 or H100") for row in cited.itertuples()]
    page.table(("suite", "group", "minutes of training", "other minutes", "IQM of last evaluations",
                "IQM at matched minutes", "device"), rows)
    if tasks:
        page.table(("task", "matched minutes", "group", "IQM"), tasks)
    points = {"humanoid": [(row.method, row.iqm, row.hours) for row in cited.itertuples()]}
    page.figure(name, caption, figures.suites_figure(panels, colours, "hours", label_of(metric), points))

def write_limited(page: Page, outcomes: list[Outcome], colours: dict[str, str], metric: str) -> None:
    """Runs of benchmark.launch --hours, those of equal hours together."""
    for limit in sorted({limit_of(o.group) for o in outcomes}):
        panels = panels_of([o for o in outcomes if limit_of(o.group) == limit])
        if panels:
            write_wall_clock(page, panels, colours, metric, limit)

def write_ablations(page: Page, outcomes: list[Outcome], metric: str) -> None:
    """Each ablation of each sweep and suite."""
    families: dict[tuple, dict[float, list[Outcome]]] = {}
    for o in outcomes:
        if variant := VARIANT.fullmatch(o.group):
            key = (variant["base"], variant["kind"], o.suite)
            families.setdefault(key, {}).setdefault(float(variant["value"]), []).append(o)
    for key, values in families.items():
        write_ablation(page, *key, values, label_of(metric))
    if not families:
        page.text("No runs of an ablation of ε or of denoising steps.")

def write_ablation(page: Page, base: str, kind: str, suite: str, values: dict[float, list[Outcome]],
                   ylabel: str) -> None:
    """One ablation: a table and a figure (Figures 5, 6) over tasks of which all values have finished runs."""
    found = {value: by_task(own) for value, own in sorted(values.items())}
    done = {value: tasks for value, tasks in found.items() if tasks}
    tasks = [task for task in next(iter(done.values()), []) if all(task in own for own in done.values())]
    without = [f"{value:g}" for value in found if value not in done]
    note = f"; without a finished run: {', '.join(without)}" if without else ""
    title = f"{base}, {kind}, {title_of(suite)}"
    if not tasks:
        return page.text(f"{title}: no task has finished runs of two values{note}.")
    own = {value: [o for task in tasks for o in done[value][task]] for value in done}
    scale = scale_of([o for x in own.values() for o in x], suite)
    finals = [interval(figures.final_scores(x, tasks, scale), iqm)[:, 0] for x in own.values()]
    page.table((SHOWN[kind], "runs", "IQM of last evaluations"),
               [(f"{value:g}{same_runs(x)}", len(x), shown(final, decimals_of(f[0] for f in finals)))
                for (value, x), final in zip(own.items(), finals, strict=True)])
    over = ", ".join(tasks) if len(tasks) < 3 else f"{len(tasks)} tasks"
    axis = "steps" if limit_of(base) is None else "hours"
    return page.figure(f"ablation_{base}_{kind}_{suite}", f"{title}: {', '.join(tasks)}{note}",
                       figures.ablation_figure(own, tasks, scale, f"{kind}: {over}", SHOWN[kind], ylabel,
                                               axis))

def write_evaluations(page: Page, sources: Iterable[str], metric: str) -> None:
    """Ways to evaluate (Figure 6, right), each over the tasks and seeds of which all were evaluated."""
    rows = pd.DataFrame(read_evaluations(sources, metric),
                        columns="suite env_id group seed evaluation step value".split())
    if rows.value.notna().sum() == 0:
        return page.text("No evaluations of finished runs by benchmark.launch --ablation evaluation.")
    lines = []
    for (suite, group), own in rows.groupby(["suite", "group"]):
        grid = own.pivot_table(index=["env_id", "seed"], columns="evaluation", values="value")
        complete = grid.dropna()
        tasks = complete.index.get_level_values("env_id").unique()
        for evaluation in sorted(grid.columns, key=order_of) if len(tasks) else []:
            scores = stack([complete.loc[task, evaluation].to_numpy() for task in tasks])
            counts = len(tasks), len(complete), len(grid) - len(complete)
            lines.append((suite, group, evaluation, *counts, *interval(scores, iqm)[:, 0]))
    table = pd.DataFrame(lines, columns="suite group evaluation tasks runs incomplete iqm low high".split())
    page.table(table.columns,
               [(*line[:6], f"{line[6]:.4g}", *(f"{x:.4g}" for x in line[7:])) for line in lines])
    if len(table):
        page.figure("ablation_evaluation",
                    "Ways to evaluate the same checkpoints (the paper's Figure 6, right)",
                    figures.evaluation_figure(table, label_of(metric)))
    return None

def order_of(evaluation: str) -> tuple:
    """Ways to evaluate in the paper's order: SDE, ODE by its c, best of K by K."""
    kind, _, number = evaluation.rpartition("-")
    return ("", "ode", "best-of").index(kind), float(number) if kind else 0

def write_entropies(page: Page, sources: Iterable[str]) -> None:
    """Behaviour entropy (Table 1)."""
    table = pd.DataFrame(read_entropies(sources))
    page.text("## Behaviour entropy")
    if table.empty:
        return page.text("No run has a behavior_entropy.json of benchmark/studies/multimodality/behavior_entropy.py.")
    columns = ("task", "run", "episodes", "successes_at_end", "entropy", "entropy_of_successes",
               "return_mean")
    page.table(columns,
               [["" if x is None or x != x else f"{x:.3g}" if isinstance(x, float) else x for x in row]
                for row in table[list(columns)].itertuples(index=False)])
    drawn = figures.entropy_figure(table, PAPER_ENTROPY)
    return page.figure("behavior_entropy", "Behaviour entropy (the paper's Table 1)", drawn)

def write_cost(page: Page, outcomes: list[Outcome], throughput: tuple[str, ...]) -> None:
    """What 10 runs of each of the 73 tasks would take, from what was measured at the paper's sizes only."""
    found = [(o.suite, o.device, o.last_step / (o.last_hours * 3600))
             for o in outcomes if o.paper_sizes and o.last_hours]
    found += [x for path in throughput for x in [measured_speed(pathlib.Path(path))] if x]
    speeds = pd.DataFrame(found, columns=["suite", "device", "speed"])
    speeds = speeds.groupby(["suite", "device"]).speed.median()
    rows = []
    for suite, data in SUITES.items():
        count = number_of_tasks(suite)
        own = speeds[suite] if suite in speeds.index.get_level_values(0) else {}
        rows += [(data.title, count, f"{data.settings.total_timesteps:,}", f"{speed:,.0f}", device,
                  f"{10 * count * data.settings.total_timesteps / speed / 3600:,.0f}")
                 for device, speed in own.items()]
        if not len(own):
            rows.append((data.title, count, f"{data.settings.total_timesteps:,}", "not measured", "", ""))
    page.text("## Cost of the paper's experiments", "",
              "Ten runs of each task, at the median speed of any with Table 5's sizes.")
    page.table(("suite", "tasks", "steps of a run", "steps/s", "device", "hours of the device"), rows)
    estimates = json.loads((ROOT / "benchmark" / "results" / "estimates.json").read_text())
    hours = {suite: 10 * sum(row["flop"] for row in estimates["tasks"] if row["suite"] == suite)
             / estimates["gpu_flop_per_second"] / 3600 for suite in SUITES}
    cited = [f"{row.hours} for {row.method}" for row in PAPER_HUMANOIDS.itertuples()]
    page.text(f"The paper's Table 2 has these hours of an A100 or H100 for a run on a humanoid (cited): "
              f"{', '.join(cited)}; forty of TruDi's are {hours['humanoid']:,.0f} hours. At the operations a "
              "second which that implies, counted by benchmark/speed/estimates.py, all would take "
              f"{sum(hours.values()):,.0f} hours of such a GPU: "
              f"{', '.join(f'{title_of(suite)} {x:,.0f}' for suite, x in hours.items())}; more where "
              "simulators are slower.")

def measured_speed(path: pathlib.Path) -> tuple[str, str, float] | None:
    """Suite, device and environment steps a second of a file of benchmark/speed/rollout_and_update.py; None, and a word, at
    other sizes."""
    saved = json.loads(path.read_text())
    args, task = saved["args"], task_of("trudi_mjx", saved["args"]["env_id"])
    if not task or any(args[name] != getattr(task.settings, name)
                       for name in ("num_envs", "num_steps", "hidden_dim")):
        print(f"left out: {path} is not of the paper's sizes", file=sys.stderr)
        return None
    return task.suite, saved["provenance"]["device"], saved["steps_per_second"]["whole iteration"]["median"]

# ------------------------------------------------------------------------------------------------------- main
def fail(message: str) -> None:
    """Refuse bad input: one line on stderr and exit code 2."""
    print(f"benchmark.report: error: {message}", file=sys.stderr)
    sys.exit(2)

def main() -> None:
    """Read the runs, write the page."""
    options = tyro.cli(Options)
    for source in (x for x in [*options.runs, *options.throughput] if not pathlib.Path(x).exists()):
        fail(f"there is no {source}")
    outcomes = read_outcomes(options.runs, options.metric, options.group_by)
    if not any(len(o.values) for o in outcomes):
        fail(f"no run in {' '.join(options.runs)} has {options.metric}")
    outcomes = with_repeats(with_missing(outcomes, options.seeds))
    own = [o for o in outcomes if not VARIANT.fullmatch(o.group)]
    limited = [o for o in own if limit_of(o.group) is not None]
    whole = [o for o in own if limit_of(o.group) is None]
    equal = whole
    if options.until_steps:
        cut = with_missing(read_outcomes(options.runs, options.metric, options.group_by, options.until_steps),
                           options.seeds)
        equal = [o for o in cut if not VARIANT.fullmatch(o.group) and limit_of(o.group) is None]
    colours = dict(zip(dict.fromkeys(o.group for o in own), itertools.cycle(figures.COLOURS), strict=False))
    page = Page(pathlib.Path(options.out))
    after = ""
    if options.until_steps:
        after = f"; tasks and suites are compared after {options.until_steps:,} environment steps"
    page.text("# Results", "",
              f"Written by `python -m benchmark.report`; the metric is `{options.metric}`{after}.")
    write_runs(page, outcomes)
    write_tasks(page, equal, colours, options.metric)
    for write, found in ((write_suites, panels_of(equal)), (write_wall_clock, panels_of(whole))):
        if found:
            write(page, found, colours, options.metric)
    write_limited(page, limited, colours, options.metric)
    page.text("## Ablations")
    write_ablations(page, outcomes, options.metric)
    write_evaluations(page, options.runs, options.metric)
    write_entropies(page, options.runs)
    write_cost(page, outcomes, options.throughput)
    print(page.write())

if __name__ == "__main__":
    main()
