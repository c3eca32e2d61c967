"""What runs came to: their curves, whether they are finished, and which are missing."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmark.runs import NOT_SEARCHED, Run, events, find_runs, furthest, training_times
from benchmark.tasks import ALGORITHMS, SUITES, algorithm_of, task_of, tasks_of

OTHER = "other"  # suite of tasks that are not of the 73
VARIANT = re.compile(r"(?P<base>.+)-(?P<kind>epsilon|denoising)-(?P<value>[\d.]+)")  # of an ablation
LIMITED = re.compile(r".+-wall-clock-(?P<hours>[\d.]+)h(-.+)?")  # by benchmark.launch --hours
POINTS = 60  # at most, of a curve
NAMES = ("exp_name", "seed", "num_seeds", "preset", "log_dir")  # arguments that are not an experiment's own

@dataclasses.dataclass(frozen=True)
class Outcome:
    """One seed of one task."""

    suite: str
    env_id: str
    group: str
    seed: int
    state: str  # "finished", "unfinished", "diverged", "superseded" by another run of the same, or "missing"
    steps: np.ndarray  # (n,), environment steps of the evaluations
    hours: np.ndarray  # (n,), training until then, without compilation, evaluations and checkpoints
    values: np.ndarray  # (n,), the metric
    last_step: int = 0  # of the log
    last_hours: float = 0.0
    other_hours: float = 0.0  # of evaluations, checkpoints and logging until then
    success: float = np.nan  # share of successful episodes in the last evaluation, where the task tells
    # whether environments, horizon and width are those of Table 5, and the script is TruDi's
    paper_sizes: bool = False
    device: str = ""
    folder: str = ""
    experiment: str = ""  # what decides the numbers, but for the seed
    same_as: str = ""  # the group that has these very runs, if that is another one

    @property
    def final(self) -> float:
        """The last evaluation."""
        return self.values[-1] if len(self.values) else np.nan

def missing(suite: str, env_id: str, group: str, seed: int) -> Outcome:
    """The outcome of a run that there is not."""
    return Outcome(suite, env_id, group, seed, "missing", *[np.zeros(0)] * 3)

def limit_of(name: str) -> float | None:
    """The hours of training that the runs of such an --exp-name were given instead of steps, if any."""
    limited = LIMITED.fullmatch(name)
    return float(limited["hours"]) if limited else None

def state_of(run: Run, superseded: bool) -> str:
    """How a run ended; one with a limit of hours is finished once it has had them."""
    if superseded:
        return "superseded"
    limit = limit_of(run.args["exp_name"])
    over = limit is not None and run.training_seconds() >= limit * 3600
    return "finished" if over or run.finished() else "diverged" if run.diverged else "unfinished"

def outcomes_of(run: Run, group: str, metric: str, superseded: bool, until_steps: float) -> list[Outcome]:
    """One outcome for each seed of a run, as if it had ended after so many environment steps."""
    task, found, state = task_of(run.script, run.args["env_id"]), [], state_of(run, superseded)
    suite, env_id = (task.suite, task.env_id) if task else (OTHER, run.args["env_id"])
    names = ("num_envs", "num_steps", "hidden_dim") if task and run.script == task.script else ()
    sizes = names and all(run.args[name] == getattr(task.settings, name) for name in names)
    for seed, path in run.logs.items():
        log = [event for event in events(path) if event["step"] <= until_steps]
        log = [event | {"hours": x / 3600} for event, x in zip(log, training_times(log), strict=True)]
        own = [event for event in log if metric in event]
        columns = [np.array([event[name] for event in own], float) for name in ("step", "hours", metric)]
        measured = own and task and SUITES[suite].success
        success = own[-1].get(SUITES[suite].success, np.nan) if measured else np.nan
        end = log[-1] if log else {"step": 0, "wall_time": 0.0, "hours": 0.0}
        found.append(Outcome(suite, env_id, group, seed, state if own else "unfinished", *columns,
                             end["step"], end["hours"], end["wall_time"] / 3600 - end["hours"], success,
                             bool(sizes), run.device, run.folder.name, experiment_of(run)))
    return found

def experiment_of(run: Run) -> str:
    """Script and arguments of a run but for its seeds and names: those up to `device`, as from there on they
    may differ when a run is continued."""
    args = itertools.takewhile(lambda item: item[0] != "device", run.args.items())
    return json.dumps([run.script, {name: value for name, value in args if name not in NAMES}])

def group_of(run: Run, group_by: str) -> str:
    """The group of a run: the folder that it is in, or an argument's value, and a baseline's algorithm unless
    that says it."""
    algorithm = algorithm_of(run.script)
    name = run.folder.parent.name if group_by == "folder" else str(run.args.get(group_by, "?"))
    return f"{algorithm}-{name}" if algorithm in ALGORITHMS[1:] and not name.startswith(algorithm) else name

def read_outcomes(sources: Iterable[str], metric: str, group_by: str,
                  until_steps: float = np.inf) -> list[Outcome]:
    """The outcomes of all runs in these folders, until so many steps. Of several runs of the same group, task
    and seeds the furthest counts; the others are marked as superseded."""
    same: dict[tuple, list[Run]] = {}
    for run in find_runs(sources):
        same.setdefault((group_of(run, group_by), *run.identity[2:]), []).append(run)
    return [outcome for (group, *_), runs in same.items() for run in runs
            for outcome in outcomes_of(run, group, metric, run is not furthest(runs), until_steps)]

def with_missing(outcomes: list[Outcome], seeds: int) -> list[Outcome]:
    """The outcomes and, for every group and suite that has any, those of the runs that there are not. Each
    task ought to have the seeds that any has, and 1 to `seeds`; an ablation, the tasks that any of its values
    has; others, the whole suite."""
    complete = list(outcomes)
    for group, suite in sorted({(outcome.group, outcome.suite) for outcome in outcomes}):
        variant = VARIANT.fullmatch(group)
        kin = [o for o in outcomes
               if o.suite == suite and (o.group == group or variant and same_ablation(o.group, group))]
        known = set() if variant or suite == OTHER else {task.env_id for task in tasks_of([suite])}
        wanted = {(env_id, seed) for env_id in known | {o.env_id for o in kin}
                  for seed in {o.seed for o in kin} | set(range(1, seeds + 1))}
        there = {(o.env_id, o.seed) for o in outcomes if (o.group, o.suite) == (group, suite)}
        complete += [missing(suite, env_id, group, seed) for env_id, seed in wanted - there]
    return sorted(complete, key=order_of)

def with_repeats(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes, as `with_missing` orders them. An ablation's finished runs with the default value are
    marked with the group that has the same ones, as far or farther: the sweep itself or another ablation."""
    first: dict[tuple, Outcome] = {}
    marked = []
    for o in outcomes:
        variant = VARIANT.fullmatch(o.group)
        sweep = variant["base"] if variant else o.group
        twin = first.setdefault((sweep, o.experiment, o.seed), o) if o.state == "finished" else o
        same = twin.group != o.group and twin.last_step >= o.last_step
        marked.append(dataclasses.replace(o, same_as=twin.group if same else ""))
    return marked

def order_of(outcome: Outcome) -> tuple:
    """Suites and tasks in their own order, an ablation's values by size, then seeds."""
    suites, tasks = [*SUITES, OTHER], [task.env_id for task in tasks_of(SUITES)]
    variant = VARIANT.fullmatch(outcome.group)
    group = (outcome.group, "", 0.0)
    if variant:
        group = (variant["base"], variant["kind"], float(variant["value"]))
    task = tasks.index(outcome.env_id) if outcome.env_id in tasks else len(tasks)
    return suites.index(outcome.suite), group, task, outcome.env_id, outcome.seed

def same_ablation(one: str, other: str) -> bool:
    """Whether two groups are values of one ablation."""
    a, b = (VARIANT.fullmatch(x) for x in (one, other))
    return bool(a and b and (a["base"], a["kind"]) == (b["base"], b["kind"]))

def select(outcomes: Iterable[Outcome], **fields: Any) -> list[Outcome]:
    """Those with these values of their fields."""
    return [o for o in outcomes if all(getattr(o, name) == value for name, value in fields.items())]

def by_task(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Finished outcomes by task, tasks in the suite's order."""
    done = sorted(select(outcomes, state="finished"), key=order_of)
    return {name: select(done, env_id=name) for name in dict.fromkeys(o.env_id for o in done)}

def axis_of(outcomes: list[Outcome], axis: str) -> np.ndarray:
    """Points (S,) in steps or hours at which all of these can be compared: from the latest first evaluation
    to the earliest last one, at the evaluations or, if these are many or at different hours, evenly
    spread."""
    every = [getattr(o, axis) for o in outcomes]
    low, high = max(x[0] for x in every), min(x[-1] for x in every)
    points = np.unique(np.concatenate(every))
    points = points[(points >= low) & (points <= high)]
    if low > high:
        return np.zeros(0)
    return points if axis == "steps" and 0 < len(points) <= POINTS else np.linspace(low, high, POINTS)

def curve(outcome: Outcome, axis: str, points: np.ndarray) -> np.ndarray:
    """The metric (S,) at points (S,), between the evaluations by interpolation."""
    return np.interp(points, getattr(outcome, axis), outcome.values)

def find_files(sources: Iterable[str], name: str, folder: str | None = None) -> list[pathlib.Path]:
    """Files of a name, or all in folders of a name, in these folders and below."""
    found = set()
    for source in sources:
        for place, below, files in os.walk(source):
            below[:] = [x for x in below if x not in NOT_SEARCHED]
            wanted = [x for x in files
                      if x.endswith(name) and (folder is None or pathlib.Path(place).name == folder)]
            found |= {pathlib.Path(place, x).resolve() for x in wanted}
    return sorted(found)

def read_evaluations(sources: Iterable[str], metric: str) -> list[dict[str, Any]]:
    """What benchmark.launch --ablation evaluation found: a row for each seed and way to evaluate."""
    rows = []
    for path in find_files(sources, ".json", "evaluations"):
        saved = json.loads(path.read_text())
        task = task_of(saved["script"], saved["env_id"])
        values = np.atleast_1d(saved["results"].get(metric, np.nan))
        rows += [dict(suite=task.suite if task else OTHER, env_id=saved["env_id"], group=saved["exp_name"],
                      seed=saved["seed"] + k, evaluation=saved["evaluation"], step=saved["step"],
                      value=float(value))
                 for k, value in enumerate(values)]
    return rows

def read_entropies(sources: Iterable[str]) -> list[dict[str, Any]]:
    """What multimodality/behavior_entropy.py wrote into run folders."""
    rows = []
    for path in find_files(sources, "behavior_entropy.json"):
        saved = json.loads(path.read_text())
        task = "PushT" if "PushT" in saved["env_id"] else "StackCube"
        names = ("entropy", "entropy_of_successes", "episodes", "successes_at_end", "return_mean")
        rows.append(dict(task=task, run=path.parent.name, **{name: saved[name] for name in names}))
    return rows
