"""The one reader of runs: the folders that the scripts write, and all of their logs as one long table.

A folder has args.json, metrics.jsonl (in seed_*/ where seeds were trained side by side) and checkpoints."""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from benchmark.tasks import ALGORITHMS, SUITES, algorithm_of, task_of, tasks_of

RETURN = "eval/episodic_return"
OTHER = "other"  # suite of tasks that are not of the 73
RUN = ["seed", "folder"]  # columns that tell the runs of one task and group apart
# columns of a table with a row for each seed, as runs.csv has it
SEED_COLUMNS = (
    "suite group task seed state last_step last_hours other_hours final success device folder".split()
)
NOT_SEARCHED = ("checkpoints", "videos", "wandb", "diverged", "logs", "slurm")  # many files, and no runs
TAIL = 65536  # bytes from a log's end in which its last line lies
NAMES = ("exp_name", "seed", "num_seeds", "preset", "log_dir")  # arguments that are not an experiment's own
VARIANT = re.compile(r"(?P<base>.+)-(?P<kind>epsilon|denoising)-(?P<value>[\d.]+)")  # of an ablation
LIMITED = re.compile(r".+-wall-clock-(?P<hours>[\d.]+)h(-.+)?")  # by benchmark.launch --hours


# ------------------------------------------------------------------------------------------------------ folders
@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder, of one seed or of several trained side by side."""

    folder: pathlib.Path
    script: str  # without .py
    args: dict[str, Any]  # resolved, as args.json has them
    device: str  # as args.json describes it
    command: tuple[str, ...] = ()  # that began it

    @property
    def identity(self) -> tuple[str, str, str, int, int]:
        """What no two runs of a sweep share: script, exp_name, env_id, first seed and number of seeds."""
        args = self.args
        return self.script, args["exp_name"], args["env_id"], args["seed"], args.get("num_seeds", 1)

    @property
    def logs(self) -> dict[int, pathlib.Path]:
        """Each seed's metrics.jsonl, whether it exists or not."""
        seeds = range(self.args["seed"], self.args["seed"] + self.args.get("num_seeds", 1))
        return {
            seed: self.folder / (f"seed_{seed}" if len(seeds) > 1 else "") / "metrics.jsonl" for seed in seeds
        }

    @property
    def checkpoint(self) -> int:
        """Environment steps of the newest checkpoint; -1 without one."""
        names = (path.stem for path in self.folder.glob("checkpoints/*"))
        return max((int(name) for name in names if name.isdigit()), default=-1)

    @property
    def dead(self) -> set[int]:
        """The seeds that a metric which was not finite has ended; others beside them go on."""
        return {seed for seed, path in self.logs.items() if (path.parent / "diverged").exists()}

    @property
    def diverged(self) -> bool:
        """Whether that has ended all seeds, and so the run."""
        return len(self.dead) == len(self.logs)

    @property
    def living(self) -> list[pathlib.Path]:
        """The logs of the seeds that go on, or of all if none does."""
        return [path for seed, path in self.logs.items() if self.diverged or seed not in self.dead]

    @property
    def experiment(self) -> str:
        """Script and arguments but for seeds and names: what decides the numbers. Those up to `device`, as from
        there on they may differ when a run is continued."""
        args = itertools.takewhile(lambda item: item[0] != "device", self.args.items())
        return json.dumps([self.script, {name: value for name, value in args if name not in NAMES}])

    @property
    def paper_sizes(self) -> bool:
        """Whether environments, horizon and width are those of Table 5, and the script is TruDi's."""
        task = task_of(self.script, self.args["env_id"])
        names = ("num_envs", "num_steps", "hidden_dim")
        return bool(
            task
            and self.script == task.script
            and all(self.args.get(name) == getattr(task.settings, name) for name in names)
        )

    def last(self) -> dict[str, Any]:
        """The last event of the living seed that is least far, with step 0 and wall_time 0 before the first."""
        return min((last_event(path) for path in self.living), key=lambda event: event["step"])

    def training_seconds(self) -> float:
        """Seconds of training so far of the living seed that is least far."""
        return min(
            training_seconds(path, path.stat().st_mtime_ns) if path.exists() else 0.0 for path in self.living
        )

    def end(self, total_timesteps: int | None = None) -> int:
        """The step at which a run of so many environment steps ends; default: of its arguments' number."""
        total = self.args["total_timesteps"] if total_timesteps is None else total_timesteps
        # steps that do not fill an iteration are left out
        return total // self.args["batch_size"] * self.args["batch_size"]

    def finished(self, total_timesteps: int | None = None) -> bool:
        """Whether every living seed has reached the end and was evaluated there."""
        event = self.last()
        return event["step"] >= self.end(total_timesteps) and math.isfinite(event.get(RETURN, math.nan))

    def state(self, seed: int) -> str:
        """A seed's: "diverged", "finished", also if it has had its hours of training, or "unfinished"."""
        if seed in self.dead:
            return "diverged"
        limit = limit_of(self.args["exp_name"])
        over = limit is not None and self.training_seconds() >= limit * 3600
        return "finished" if over or self.finished() else "unfinished"


@functools.cache
def read_args(path: pathlib.Path, _changed: int) -> Run | None:
    """The run of an args.json, read again only if it has changed; None, and a word on stderr, if not ours."""
    try:
        saved = json.loads(path.read_text())
        first = (saved.get("earlier_starts") or [saved])[0]
        command = tuple(first.get("command", ()))
        run = Run(path.parent, saved["script"], saved["args"], saved.get("device", ""), command)
        return run if run.identity and run.args["batch_size"] > 0 else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"left out: {path} is not of a run ({type(error).__name__}: {error})", file=sys.stderr)
        return None


def find_files(sources: Iterable[str | pathlib.Path], name: str) -> list[pathlib.Path]:
    """All files of this name in these folders and below, each once, in the order of their paths."""
    found = set()
    for source in sources:
        for folder, below, files in os.walk(source):
            below[:] = [other for other in below if other not in NOT_SEARCHED]
            found |= {pathlib.Path(folder, name).resolve()} if name in files else set()
    return sorted(found)


def find_runs(sources: Iterable[str | pathlib.Path]) -> list[Run]:
    """All runs in these folders and below, each once, in the order of their paths."""
    runs = (read_args(path, path.stat().st_mtime_ns) for path in find_files(sources, "args.json"))
    return [run for run in runs if run]


def furthest(runs: Iterable[Run]) -> Run | None:
    """Of runs with one identity the one to go on with: finished, or else with the newest checkpoint."""
    return max(runs, key=lambda run: (run.finished(), run.checkpoint, run.last()["step"]), default=None)


def limit_of(name: str) -> float | None:
    """The hours of training that the runs of such an --exp-name were given instead of steps, if any."""
    limited = LIMITED.fullmatch(name)
    return float(limited["hours"]) if limited else None


# --------------------------------------------------------------------------------------------------------- logs
def events(path: pathlib.Path) -> list[dict[str, Any]]:
    """All events of a metrics.jsonl; without the last line that a killed run may have half written."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_event(path: pathlib.Path) -> dict[str, Any]:
    """The last whole event of a metrics.jsonl, read from its end."""
    nothing = {"step": 0, "wall_time": 0.0}
    if not path.exists():
        return nothing
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL, 0))
        lines = [line for line in file.read().split(b"\n")[:-1] if line]
    return json.loads(lines[-1]) if lines else nothing


def training_times(log: list[dict[str, Any]]) -> list[float]:
    """Seconds of training until each event: environment steps over charts/SPS, their speed, which is that of
    iterations alone, where wall_time has evaluations and checkpoints too. Compilation is in neither."""
    steps = [0, *(event["step"] for event in log)]
    return list(
        itertools.accumulate(
            (step - before) / event["charts/SPS"]
            for before, step, event in zip(steps, steps[1:], log, strict=False)
        )
    )


@functools.cache
def training_seconds(path: pathlib.Path, _changed: int) -> float:
    """Seconds of training in a metrics.jsonl, read again only if it has changed."""
    return max(training_times(events(path)), default=0.0)


# ------------------------------------------------------------------------------------------------------- tables
def group_of(run: Run, group_by: str) -> str:
    """The group of a run: the folder that it is in, or an argument's value, and a baseline's algorithm unless
    that says it."""
    algorithm = algorithm_of(run.script)
    name = run.folder.parent.name if group_by == "folder" else str(run.args.get(group_by, "?"))
    return f"{algorithm}-{name}" if algorithm in ALGORITHMS[1:] and not name.startswith(algorithm) else name


def seed_table(run: Run, seed: int, path: pathlib.Path) -> pd.DataFrame:
    """The log of one seed, a row an event, with its hours of training; one row of step 0 before any event."""
    log = events(path)
    table = pd.DataFrame(log or [{"step": 0, "wall_time": 0.0}])
    hours = np.array(training_times(log) or [0.0]) / 3600
    known = task_of(run.script, run.args["env_id"])
    suite, task = (known.suite, known.env_id) if known else (OTHER, run.args["env_id"])
    labels = dict(
        suite=suite,
        task=task,
        algorithm=algorithm_of(run.script),
        seed=seed,
        folder=str(run.folder),
        device=run.device,
        paper_sizes=run.paper_sizes,
        experiment=run.experiment,
        epsilon=run.args.get("trust_region_bound"),
        denoising=run.args.get("num_diffusion_steps"),
    )
    return table.assign(**labels, hours=hours).dropna(axis="columns", how="all")


def read_table(sources: Iterable[str | pathlib.Path], group_by: str = "exp_name") -> pd.DataFrame:
    """All logs below these folders as one table with a row for each event: suite, task, algorithm, group, seed,
    state, folder, step, wall_time (s), hours (of training), and a column for each metric. Of several runs of
    the same group, task and seed the furthest counts; the state of the others is "superseded"."""
    same: dict[tuple, list[Run]] = {}
    for run in find_runs(sources):
        for seed in run.logs:
            same.setdefault((group_of(run, group_by), run.args["env_id"], seed), []).append(run)
    parts = []
    for (group, _, seed), runs in same.items():
        best = furthest(runs)
        for run in runs:
            state = run.state(seed) if run is best else "superseded"
            parts.append(seed_table(run, seed, run.logs[seed]).assign(group=group, state=state))
    return in_order(pd.concat(parts, ignore_index=True)) if parts else pd.DataFrame()


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of suites, groups, an ablation's values by size, tasks in their own order, seeds."""
    suites = [*SUITES, OTHER]
    tasks = {task.env_id: number for number, task in enumerate(tasks_of(SUITES))}
    variant = table.group.str.extract(VARIANT)
    keys = pd.DataFrame(
        {
            "suite": table.suite.map(suites.index),
            "base": variant.base.fillna(table.group),
            "kind": variant.kind.fillna(""),
            "value": variant.value.astype(float).fillna(0.0),
            "number": table.task.map(tasks).fillna(len(tasks)),
            "task": table.task,
            "seed": table.seed,
        }
    )
    return table.loc[keys.sort_values(list(keys), kind="stable").index].reset_index(drop=True)


def each_seed(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A row for each seed of each run, in the table's order: how far it is, the last evaluation of a metric, and
    the share of successful episodes in it where the suite tells one."""
    seeds = table.groupby(["suite", "group", "task", *RUN], sort=False, observed=True)
    last = seeds.last(skipna=False).rename(columns={"step": "last_step", "hours": "last_hours"})
    last = last.assign(other_hours=last.wall_time / 3600 - last.last_hours)
    evaluated = (
        evaluations(table, metric).groupby(["suite", "group", "task", *RUN], observed=True).last(skipna=False)
    )
    last = last.assign(final=evaluated.value, success=evaluated.success).reset_index()
    last.loc[last.final.isna() & (last.state == "finished"), "state"] = "unfinished"
    others = ["experiment", "paper_sizes", "epsilon", "denoising"]
    return last.reindex(columns=[*SEED_COLUMNS, *others])


def evaluations(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The table's rows that have a metric, as `value`, and the suite's metric of success as `success`."""
    found = table[table[metric].notna()] if metric in table else table.iloc[:0]
    success = pd.Series(np.nan, found.index)
    for name, suite in SUITES.items():
        if suite.success in found:
            success[found.suite == name] = found[suite.success]
    return found.assign(value=found.get(metric, np.nan), success=success)


def with_missing(seeds: pd.DataFrame, wanted: int) -> pd.DataFrame:
    """The rows of `each_seed` and, for every group and suite that has any, those of the runs that there are not.
    Each task ought to have the seeds that any has, and 1 to `wanted`; an ablation, the tasks that any of its
    values has; others, the whole suite."""
    variant = seeds.group.str.extract(VARIANT)
    family = (variant.base + "-" + variant.kind).fillna(seeds.group)
    parts = [seeds]
    for (suite, group), own in seeds.groupby(["suite", "group"]):
        kin = seeds[(seeds.suite == suite) & (family == family[own.index[0]])]
        whole = suite != OTHER and not VARIANT.fullmatch(group)
        tasks = dict.fromkeys([*(task.env_id for task in tasks_of([suite] if whole else [])), *kin.task])
        ought = pd.MultiIndex.from_product(
            [tasks, sorted({*kin.seed, *range(1, wanted + 1)})], names=["task", "seed"]
        )
        absent = ought.difference(pd.MultiIndex.from_frame(own[["task", "seed"]])).to_frame(index=False)
        parts.append(absent.assign(suite=suite, group=group, state="missing", last_step=0))
    return in_order(pd.concat([part for part in parts if len(part)], ignore_index=True))


def with_repeats(seeds: pd.DataFrame) -> pd.DataFrame:
    """The rows of `each_seed` with a column `same_as`. An ablation's finished runs with the default value have
    there the group that has the same ones, as far or farther: the sweep itself or another ablation."""
    first: dict[tuple, pd.Series] = {}
    same = pd.Series("", seeds.index)
    for number, row in seeds[seeds.state == "finished"].iterrows():
        variant = VARIANT.fullmatch(row.group)
        sweep = variant["base"] if variant else row.group
        twin = first.setdefault((sweep, row.experiment, row.seed), row)
        if twin.group != row.group and twin.last_step >= row.last_step:
            same[number] = twin.group
    return seeds.assign(same_as=same)


# ------------------------------------------------------------------------------------------- what else is in runs
def read_evaluations(sources: Iterable[str], metric: str) -> pd.DataFrame:
    """What benchmark.launch --ablation evaluation found: a row for each seed and way to evaluate."""
    rows = []
    for path in sorted(
        path for source in sources for path in pathlib.Path(source).rglob("evaluations/*.json")
    ):
        saved = json.loads(path.read_text())
        task = task_of(saved["script"], saved["env_id"])
        values = np.atleast_1d(saved["results"].get(metric, np.nan))
        rows += [
            (
                task.suite if task else OTHER,
                saved["env_id"],
                saved["exp_name"],
                saved["seed"] + k,
                saved["evaluation"],
                saved["step"],
                float(value),
            )
            for k, value in enumerate(values)
        ]
    return pd.DataFrame(rows, columns=["suite", "task", "group", "seed", "evaluation", "step", "value"])


def read_entropies(sources: Iterable[str]) -> pd.DataFrame:
    """What studies/multimodality/behavior_entropy.py wrote into run folders."""
    rows = []
    for path in find_files(sources, "behavior_entropy.json"):
        saved = json.loads(path.read_text())
        task = "PushT" if "PushT" in saved["env_id"] else "StackCube"
        names = ("episodes", "successes_at_end", "entropy", "entropy_of_successes", "return_mean")
        rows.append(dict(task=task, run=path.parent.name, **{name: saved[name] for name in names}))
    return pd.DataFrame(rows)
