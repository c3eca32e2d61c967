"""What a sweep consists of, and how one process of it is run: the same on this machine and in a job of Slurm.

A unit is one process: a task, a variant and a seed, or several seeds side by side; or the evaluation of such
a run. What has been done is read from the run folders, never remembered, so that a sweep can be continued
after any end."""

import dataclasses
import fcntl
import itertools
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import pandas as pd

from benchmark.runs import Run, find_runs, furthest
from benchmark.tasks import ROOT, Task, place_of, preset_values

SWEEPS_OWN = "env_id exp_name seed num_seeds log_dir".split()  # arguments that the sweep gives by itself
# exit codes after a signal
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one process does."""

    task: Task
    exp_name: str  # of the sweep and the variant
    seed: int  # the first one
    num_seeds: int = 1  # trained side by side
    flags: tuple[str, ...] = ()  # further ones of the script
    hours: float | None = None  # stop once the run has trained for so long, or is at its last step
    evaluation: str | None = None  # how the finished run is evaluated, instead of being trained
    python: str = sys.executable  # the interpreter

    @property
    def name(self) -> str:
        """What a person calls it; also the name of its log."""
        parts = [
            self.task.env_id,
            self.exp_name,
            str(self.seed),
            *([self.evaluation] if self.evaluation else []),
        ]
        return "__".join(parts)

    @property
    def total_timesteps(self) -> int:
        """Environment steps of each seed."""
        given = given_values(self.flags)
        preset = preset_values(self.task.script, given.get("preset", "paper"), self.task.suite)
        total = given.get("total_timesteps") or preset["total_timesteps"]
        try:
            return int(total)
        except ValueError:
            fail(f"--flags: --total-timesteps {total} is not a whole number")


@dataclasses.dataclass(frozen=True)
class State:
    """How far a unit is."""

    kind: str  # "finished", "waiting" or "diverged"
    run: Run | None  # the run folder it has, if any
    step: int = 0  # environment steps of each seed so far
    wall_time: float = 0.0  # seconds so far, without compilation
    training_seconds: float = 0.0  # of them, without evaluations and checkpoints; where there is a limit


def fail(message: str) -> NoReturn:
    """Refuse bad input: one line on stderr and exit code 2."""
    print(f"benchmark.launch: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def words_of(flags: Iterable[str]) -> list[str]:
    """The words of a command line, with --a=b as two."""
    words = []
    for word in flags:
        words += word.split("=", 1) if word.startswith("--") else [word]
    return words


def given_values(flags: Iterable[str]) -> dict[str, str]:
    """The values that a command line gives, by the argument's name: --a-b 3, --a-b=3, --a-b and --no-a-b."""
    found, name = {}, ""
    for word in words_of(flags):
        if word.startswith("--"):
            off = word.startswith("--no-")
            name = word[5 if off else 2 :].replace("-", "_")
            found[name] = str(not off)
        else:
            found[name] = word
    return found


def same_value(saved: Any, given: str) -> bool:
    """Whether an argument in args.json is what a command line says."""
    try:
        return float(saved) == float(given)
    except (TypeError, ValueError):
        return str(saved) == given


def given_settings(flags: Iterable[str]) -> list[str]:
    """The texts of all --env-config of a command line."""
    return [value for name, value in itertools.pairwise(words_of(flags)) if name == "--env-config"]


def settings_of(texts: Iterable[str]) -> dict[str, str]:
    """Dotted keys and values of --env-config's texts, each key=value or a JSON object."""
    found: dict[str, str] = {}
    for text in texts:
        key, _, value = text.partition("=")
        nested = pd.json_normalize(json.loads(text)).iloc[0] if text.startswith("{") else {key: value}
        found |= {name: str(value).lower() for name, value in nested.items()}
    return found


def conflict(unit: Unit, run: Run) -> str | None:
    """The first argument that decides a run's numbers and is not what the sweep's flags say."""
    given = given_values(unit.flags)
    own = given_values(run.command[1:])
    settings, wanted = (settings_of(given_settings(words)) for words in (run.command[1:], unit.flags))
    if run.command and settings != wanted:
        return f"--env-config {settings or 'unset'}, where this sweep has {wanted or 'none'}"
    for name, saved in run.args.items():
        if name == "device":  # those from here on may differ when a run is continued
            return None
        if name == "env_config":
            continue
        if name in given and not same_value(saved, given[name]):
            return f"{name} {saved}, where this sweep has {given[name]}"
        if name in own and name not in (*given, *SWEEPS_OWN):
            return f"{name} {saved}, which was given to it and not to this sweep"
    return None


# ------------------------------------------------------------------------------------------------------ state
def existing(unit: Unit, runs: Iterable[Run]) -> Run | None:
    """The run of a unit among these, told by what its args.json says."""
    identity = unit.task.script, unit.exp_name, unit.task.env_id, unit.seed, unit.num_seeds
    return furthest(run for run in runs if run.identity == identity)


def result_path(unit: Unit, log_dir: pathlib.Path) -> pathlib.Path:
    """Where an evaluation's numbers are kept; not in the run's folder, which evaluating leaves as it is."""
    return log_dir / "evaluations" / f"{unit.name}.json"


def is_trained(unit: Unit, run: Run) -> bool:
    """Whether a run is at the unit's end: at the last step, evaluated, or at the limit of hours if any."""
    over = unit.hours is not None and run.training_seconds() >= unit.hours * 3600
    return over or run.finished(unit.total_timesteps)


def assess(unit: Unit, runs: Iterable[Run], log_dir: pathlib.Path) -> State:
    """How far a unit is, as its files tell."""
    run = existing(unit, runs)
    if run is None:
        return State("waiting", None)
    step, wall_time = run.last()["step"], run.last()["wall_time"]
    if unit.evaluation:
        path = result_path(unit, log_dir)
        evaluated = path.exists() and json.loads(path.read_text())["step"] == step
        return State("finished" if evaluated else "waiting", run, 0, wall_time)
    kind = "finished" if is_trained(unit, run) else "diverged" if run.diverged else "waiting"
    return State(kind, run, step, wall_time, run.training_seconds() if unit.hours else 0.0)


# ---------------------------------------------------------------------------------------------------- command
def command(unit: Unit, run: Run | None, log_dir: pathlib.Path) -> list[str]:
    """The command that does a unit, continuing the run that there is if it has a checkpoint."""
    words = [unit.python, os.path.relpath(ROOT / place_of(unit.task.script))]
    if unit.evaluation:
        return [*words, "--evaluate", os.path.relpath(run.folder) if run else "RUN", *unit.flags]
    words += ["--env-id", unit.task.env_id, "--exp-name", unit.exp_name, "--seed", str(unit.seed)]
    words += ["--num-seeds", str(unit.num_seeds)] if unit.num_seeds > 1 else []
    begun = run and run.checkpoint >= 0
    return [
        *words,
        *unit.flags,
        *(["--resume", os.path.relpath(run.folder)] if begun else ["--log-dir", str(log_dir)]),
    ]


def log_path(unit: Unit, log_dir: pathlib.Path) -> pathlib.Path:
    """What the unit's processes printed, one after another."""
    return log_dir / "logs" / f"{unit.name}.log"


def last_lines(unit: Unit, log_dir: pathlib.Path, count: int = 8) -> list[str]:
    """The last lines that are not empty of a unit's log."""
    path = log_path(unit, log_dir)
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [line for line in lines if line.strip()][-count:]


class Refused(Exception):
    """A unit that cannot be started now; says why."""


def spawn(words: list[str], log: Any, environment: dict[str, str]) -> subprocess.Popen:
    """Start a command that writes to a log.

    It gets a session of its own, so that Ctrl-C in a terminal reaches it once, through this process: a second
    signal would kill it. Slurm sends submitit's SIGUSR2 to children too, which it would end; they inherit
    that it is blocked."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        return subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Process:
    """A unit's running process."""

    def __init__(
        self, unit: Unit, log_dir: pathlib.Path, prefix: tuple[str, ...] = (), **environment: str
    ) -> None:
        """Start it. Raises Refused if another process does this unit, or if there is nothing to evaluate.

        The log is locked, and the child, whose output it is, holds the lock as long as it or a worker of it
        lives: also when this process is killed and a second sweep comes to the same unit."""
        self.unit, self.log_dir, self.told = unit, log_dir, False
        path = log_path(unit, log_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(f"another process is doing it; it writes {path}") from None
            run = existing(unit, find_runs([log_dir]))
            if unit.evaluation and not (run and is_trained(dataclasses.replace(unit, evaluation=None), run)):
                raise Refused("there is no finished run to evaluate")
            words = [*prefix, *command(unit, run, log_dir)]
            log.write(f"$ {shlex.join(words)}\n")
            log.flush()
            self.child = spawn(words, log, environment)

    def state(self) -> State:
        """How far the unit is."""
        return assess(self.unit, find_runs([self.log_dir]), self.log_dir)

    def stop(self) -> None:
        """Have the process write a checkpoint and end; once only, as a second signal would kill it."""
        if not self.told:
            self.told = True
            self.child.terminate()

    def kill(self) -> None:
        """End the process and its workers at once."""
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)

    def poll(self) -> int | None:
        """Its exit code, None while it runs; stops a run whose hours are over."""
        code = self.child.poll()
        if code is None and self.unit.hours is not None and not self.told and self.state().kind == "finished":
            self.stop()
        return code

    def judge(self) -> str | None:
        """After its end: keep an evaluation's numbers; None if all went well, else what is wrong."""
        code, state = self.child.returncode, self.state()
        if self.unit.evaluation and code == 0:
            return self.keep(state.run)
        if state.kind == "finished" and (code == 0 or self.told and code in STOPPED):
            return None
        if self.told and code in STOPPED:
            return "stopped; the next call continues it"
        reason = ", a metric of a seed is not finite" if state.run and state.run.dead else ""
        return f"exit code {code} at step {state.step:,}{reason}"

    def keep(self, run: Run) -> str | None:
        """Write down the numbers that an evaluation printed; what is wrong if it printed none."""
        unit, path = self.unit, result_path(self.unit, self.log_dir)
        lines = [line for line in last_lines(unit, self.log_dir) if line.startswith("{")]
        if not lines:
            return f"it printed no numbers; its log is {log_path(unit, self.log_dir)}"
        content = {
            "script": run.script,
            "env_id": unit.task.env_id,
            "exp_name": unit.exp_name,
            "seed": unit.seed,
            "num_seeds": unit.num_seeds,
            "evaluation": unit.evaluation,
            "flags": unit.flags,
            "run": run.folder.name,
            "step": run.last()["step"],
            "results": json.loads(lines[-1]),
        }
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".tmp").replace(path)
        return None
