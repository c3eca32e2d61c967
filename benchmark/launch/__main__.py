"""Runs, or continues, a sweep: tasks x seeds, an ablation of them, or evaluations of what they trained.

    python -m benchmark.launch --suite dmc --seeds 10                        # a process on each GPU found here
    python -m benchmark.launch --suite all --slurm --slurm-hours 8           # the same as a job array
    python -m benchmark.launch --tasks CheetahRun WalkerWalk --seeds 3 --workers 2 --flags="--preset cpu"
    python -m benchmark.launch --suite maniskill --algorithm reppo --seeds 10      # one of benchmark/baselines
    python -m benchmark.launch --suite humanoid --hours 2.5                  # for hours of training, not for steps
    python -m benchmark.launch --suite humanoid --hours 2.5 --algorithm reppo    # both make Figure 5, left
    python -m benchmark.launch --ablation epsilon --tasks CheetahRun --seeds 3 --flags="--preset cpu"

The same command again skips what is finished and continues what was interrupted; Ctrl-C lets every run write
a checkpoint first. --dry-run prints the commands that remain. The exit code is 1 if a run failed; the last
lines of its log are printed at the end."""

import dataclasses
import difflib
import functools
import pathlib
import shlex
import sys
from typing import Literal

import tyro

from benchmark.launch import slurm
from benchmark.launch.local import Machine, run_locally
from benchmark.launch.units import State, Unit, assess, command, conflict, fail, given_values
from benchmark.runs import find_runs
from benchmark.tasks import ALGORITHMS, ROOT, SUITES, Task, constants, place_of, tasks_of


@dataclasses.dataclass(frozen=True)
class Ablation:
    """What an ablation of the paper varies."""

    suite: str  # the paper's
    values: tuple[str, ...]
    flag: str | None = None  # that takes the value; None for evaluations, each of which has flags of its own
    default: str | None = None  # the scripts' value, which the sweep's own runs have


N_STEPS = ("1", "4", "8", "16", "32")
ABLATIONS = {
    # Figure 6, left
    "epsilon": Ablation(
        "isaaclab", tuple("0.01 0.05 0.1 0.2 0.4 1 5 10 50".split()), "--trust-region-bound", "0.1"
    ),
    "evaluation": Ablation(
        "humanoid", tuple("sde ode-0.5 ode-0.75 ode-1 ode-1.25 ode-1.5 best-of-10 best-of-20".split())
    ),
    "denoising": Ablation("humanoid", N_STEPS, "--num-diffusion-steps", "8"),
}  # Figure 5, right


@dataclasses.dataclass(frozen=True)
class Options:
    """Run or continue a sweep."""

    # whose tasks
    suite: Literal["dmc", "humanoid", "maniskill", "humanoidbench", "isaaclab", "all"] | None = None
    tasks: tuple[str, ...] = ()  # only these of them; without --suite, of all
    algorithm: Literal["trudi", "reppo", "dime", "ppo", "spo", "fpo", "dppo"] = "trudi"  # what trains
    seeds: int = 10  # runs of each task
    first_seed: int = 1  # the seed of the first of them; the others follow
    name: str | None = None  # the sweep's; part of the run folders' names; default: the algorithm's
    flags: str = ""  # further flags of the scripts, as in --flags="--preset cpu"
    log_dir: str = "runs"  # parent of the run folders, of logs/ and of evaluations/
    # vary this; default suite: the paper's
    ablation: Literal["epsilon", "denoising", "evaluation"] | None = None
    values: tuple[str, ...] = ()  # of what the ablation varies; default: the paper's
    # train each run for so many hours, evaluations and checkpoints not counted, instead of so many steps
    hours: float | None = None
    vmap_seeds: int = 1  # seeds that one process trains side by side, on Playground
    # processes at a time; default: one for each GPU, or one on a CPU; with --slurm: no limit
    workers: int | None = None
    python: tuple[str, ...] = ()  # SUITE=INTERPRETER, where one is not this process's
    status_interval: float = 60.0  # seconds between status tables
    dry_run: bool = False  # print the commands that remain, and run nothing
    slurm: bool = False  # submit a job array instead, requeued when preempted or out of time
    slurm_hours: float = 8.0  # time limit of a job; a run that needs longer is requeued
    slurm_gpus: int = 1  # of each job
    slurm_cpus: int = 8  # of each job
    slurm_sbatch: tuple[str, ...] = ()  # further options of sbatch, as in partition=gpu account=me


# ------------------------------------------------------------------------------------------------------- plan
def pairs(words: tuple[str, ...], flag: str) -> dict[str, str]:
    """What NAME=VALUE words say; exits with code 2 on others."""
    for word in words:
        if "=" not in word:
            fail(f"{flag} takes NAME=VALUE, not {word}")
    return dict(word.split("=", 1) for word in words)


def chosen_tasks(options: Options) -> list[Task]:
    """The tasks to run; exits with code 2 on unknown ones."""
    suite = options.suite or (
        "all" if options.tasks else options.ablation and ABLATIONS[options.ablation].suite
    )
    if not suite:
        fail(f"name a --suite ({', '.join(SUITES)} or all), --tasks or an --ablation")
    tasks = {task.env_id: task for task in tasks_of(SUITES if suite == "all" else [suite], options.algorithm)}
    for unknown in (name for name in options.tasks if name not in tasks):
        near = difflib.get_close_matches(unknown, tasks, 3, 0.4) or list(tasks)[:3]
        fail(f"{unknown} is none of the tasks of --suite {suite}; the nearest are {', '.join(near)}")
    chosen = [tasks[name] for name in options.tasks or tasks]
    for task in (task for task in chosen if not (ROOT / place_of(task.script)).exists()):
        fail(
            f"--algorithm {options.algorithm} has no script for {SUITES[task.suite].title}, as of "
            f"{task.env_id}"
        )
    return chosen


def sweep_name(options: Options) -> str:
    """The sweep's name, which tells a baseline's runs from TruDi's, and a limit of hours."""
    name, algorithm = options.name or options.algorithm, options.algorithm
    name = name if algorithm == ALGORITHMS[0] or name.startswith(algorithm) else f"{algorithm}-{name}"
    return name if options.hours is None else f"{name}-wall-clock-{options.hours:g}h"


def evaluation_flags(value: str) -> tuple[str, ...]:
    """The flags that evaluate as sde, ode-C or best-of-K says; exits with code 2 on anything else."""
    kind, _, number = value.rpartition("-")
    if value == "sde":
        return "--eval-mode", "sde"
    if kind == "ode" and number.replace(".", "", 1).isdigit():
        return "--eval-mode", "ode", "--ode-score-scale", number
    if kind == "best-of" and number.isdigit():
        return "--eval-mode", "best-of-k", "--best-of-k", number
    return fail(f"--values of an evaluation are sde, ode-C or best-of-K, not {value}")


def variants(options: Options) -> list[dict]:
    """What an ablation changes in every unit: one set of Unit's fields for each value. Of the default value the
    sweep's own runs are taken, or made."""
    flags, sweep = tuple(shlex.split(options.flags)), sweep_name(options)
    if not options.ablation:
        return [dict(exp_name=sweep, flags=flags)]
    ablation, kind = ABLATIONS[options.ablation], options.ablation
    values = options.values or ablation.values
    if kind == "evaluation":
        return [
            dict(exp_name=sweep, flags=(*flags, *evaluation_flags(value)), evaluation=value)
            for value in values
        ]
    for value in values:
        if not value.replace(".", "", 1).isdigit():
            fail(f"--values of --ablation {kind} are numbers, not {value}")
    return [
        dict(exp_name=sweep, flags=flags)
        if float(value) == float(ablation.default)
        else dict(exp_name=f"{sweep}-{kind}-{value}", flags=(*flags, ablation.flag, value))
        for value in values
    ]


def endless(unit: Unit) -> Unit:
    """A unit with a limit of hours, with a thousand times its steps if they are not given: more than it can
    take."""
    given = any(word.startswith("--total-timesteps") for word in unit.flags)
    if unit.hours is None or unit.evaluation or given:
        return unit
    steps = str(1000 * unit.total_timesteps)
    return dataclasses.replace(unit, flags=(*unit.flags, "--total-timesteps", steps))


def check(options: Options, tasks: list[Task]) -> None:
    """Exit with code 2 on options that cannot be meant."""
    flags = shlex.split(options.flags)
    own = {"--env-id", "--exp-name", "--seed", "--num-seeds", "--log-dir", "--resume", "--evaluate"}
    taken = own & {word.partition("=")[0].replace("_", "-") for word in flags}
    preset = given_values(flags).get("preset", "paper")
    known = all(preset in constants(task.script)["PRESET"] for task in tasks)
    vmapped = any(task.script.endswith("_mjx") for task in tasks)
    rules = [
        (options.seeds > 0 and options.vmap_seeds > 0, "--seeds and --vmap-seeds must be positive"),
        (options.workers is None or options.workers > 0, "--workers must be positive"),
        (
            (options.hours is None or options.hours > 0) and options.slurm_hours > 0,
            "--hours and --slurm-hours must be positive",
        ),
        (options.ablation or not options.values, "--values needs an --ablation"),
        (
            options.algorithm == ALGORITHMS[0] or not options.ablation,
            "--ablation is of TruDi, not of another --algorithm",
        ),
        (
            options.vmap_seeds == 1 or vmapped,
            "--vmap-seeds is for trudi_mjx.py and its baselines, which lack these tasks",
        ),
        (not taken, f"--flags must not have {' '.join(sorted(taken))}, which the sweep sets"),
        (known, f"there is no --preset {preset}"),
    ]
    for message in (message for holds, message in rules if not holds):
        fail(message)


def plan(options: Options) -> list[Unit]:
    """All units of a sweep: all tasks' first seeds come before any second, so that one stopped early has
    all."""
    tasks, python = chosen_tasks(options), pairs(options.python, "--python")
    check(options, tasks)
    end = options.first_seed + options.seeds
    for name in python.keys() - SUITES.keys():
        fail(f"--python {name}: there is no such suite")
    units = []
    for task in tasks:
        side = options.vmap_seeds if task.script.endswith("_mjx") else 1
        units += [
            endless(
                Unit(
                    task,
                    seed=first,
                    num_seeds=min(side, end - first),
                    python=python.get(task.suite, sys.executable),
                    hours=options.hours,
                    **variant,
                )
            )
            for variant in variants(options)
            for first in range(options.first_seed, end, side)
        ]
    return sorted(units, key=lambda unit: unit.seed)


def remaining(units: list[Unit], log_dir: pathlib.Path) -> list[tuple[Unit, State]]:
    """All units and how far they are; exits with code 2 if a run was made with other flags."""
    runs, found = find_runs([log_dir]), []
    for unit in units:
        state = assess(unit, runs, log_dir)
        if state.run and (other := conflict(unit, state.run)):
            fail(f"{state.run.folder.name} has {other}; give this sweep a --name or --log-dir of its own")
        found.append((unit, state))
    return found


# ------------------------------------------------------------------------------------------------------- main
def print_commands(states: list[tuple[Unit, State]], log_dir: pathlib.Path, machine: Machine) -> None:
    """Print the commands of what remains, on the GPUs in turn, for a person to paste."""
    todo = [(unit, state) for unit, state in states if state.kind == "waiting"]
    for number, (unit, state) in enumerate(todo):
        prefix, environment = machine.slots[number % len(machine.slots)]
        words = command(unit, state.run, log_dir)
        print(
            *(f"{name}={shlex.quote(value)}" for name, value in environment.items()),
            shlex.join([*prefix, *words]),
        )
    diverged = sum(state.kind == "diverged" for _, state in states)
    print(f"# {len(todo)} of {len(states)} remain" + (f"; {diverged} diverged" if diverged else ""))


def main() -> None:
    """Plan, then print, submit or run what remains."""
    options = tyro.cli(Options)
    log_dir, units = pathlib.Path(options.log_dir), plan(options)
    states = remaining(units, log_dir)
    machine = Machine.here(options.workers)
    if options.dry_run:
        return print_commands(states, log_dir, machine)
    if options.slurm:
        parameters = dict(
            hours=options.slurm_hours,
            gpus=options.slurm_gpus,
            cpus=options.slurm_cpus,
            parallel=options.workers,
            sbatch=pairs(options.slurm_sbatch, "--slurm-sbatch"),
        )
        return slurm.submit(states, log_dir, functools.partial(slurm.array_executor, **parameters))
    return sys.exit(run_locally(states, log_dir, machine, options.status_interval))


if __name__ == "__main__":
    main()
