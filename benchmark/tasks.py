"""The paper's 73 tasks as data: suite, script, id, and the settings that Table 5 gives.

Nothing here imports a simulator, JAX or PyTorch, so that listing tasks and printing commands takes no time:
the ids and the presets are read from the scripts' own tables."""

import ast
import dataclasses
import functools
import pathlib
from collections.abc import Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
# all but the first in benchmark/baselines, each for the suites whose script stands there
ALGORITHMS = ("trudi", "reppo", "dime", "ppo", "spo", "fpo", "dppo")
# a script's tables, in terms of literals and of each other
CONSTANTS = ("DMC", "HUMANOID", "NAMES", "TASKS", "PAPER", "CPU", "CPU_HUMANOID", "PRESET")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A row of Table 5, and the width of the networks (Section E)."""

    total_timesteps: int  # environment steps of a run, over all its environments
    gamma: float
    v_min: float
    v_max: float
    num_envs: int
    num_steps: int
    hidden_dim: int


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of tasks of one script."""

    script: str  # without .py
    tasks: str  # the script's table that lists the ids
    title: str  # over a figure
    figure: str  # the paper's figure of the curves of each task
    settings: Settings
    success: str | None = None  # metric of the share of successful episodes, where there is one
    # returns of different tasks cannot be averaged as they are; the paper normalises them
    normalized: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """One of the 73."""

    suite: str
    env_id: str
    algorithm: str = "trudi"  # that trains it

    @property
    def script(self) -> str:
        """The script that trains it, without .py."""
        return SUITES[self.suite].script.replace("trudi", self.algorithm)

    @property
    def settings(self) -> Settings:
        """Its row of Table 5."""
        return SUITES[self.suite].settings


# ManiSkill's row is printed as "ManiSkill350M", which is taken for ManiSkill3 and 50M (E9).
SUITES = {
    "dmc": Suite(
        "trudi_mjx",
        "DMC",
        "MuJoCo Playground, DeepMind Control",
        "10",
        Settings(50_000_000, 0.99, 0.0, 150.0, 1024, 128, 512),
    ),
    "humanoid": Suite(
        "trudi_mjx",
        "HUMANOID",
        "MuJoCo Playground, humanoids",
        "9",
        Settings(50_000_000, 0.97, -10.0, 10.0, 1024, 128, 512),
    ),
    "maniskill": Suite(
        "trudi_maniskill",
        "TASKS",
        "ManiSkill3",
        "11",
        Settings(50_000_000, 0.99, -15.0, 15.0, 1024, 128, 512),
        "eval/success_once",
    ),
    "humanoidbench": Suite(
        "trudi_humanoidbench",
        "TASKS",
        "HumanoidBench",
        "13 and 14",
        Settings(50_000_000, 0.99, -250.0, 250.0, 128, 128, 256),
        "eval/success",
    ),
    "isaaclab": Suite(
        "trudi_isaaclab",
        "TASKS",
        "Isaac Lab",
        "12",
        Settings(300_000_000, 0.97, -10.0, 10.0, 4096, 64, 512),
        normalized=True,
    ),
}


def place_of(script: str) -> str:
    """The path of a script in the repository."""
    return f"{script}.py" if script.startswith("trudi") else f"benchmark/baselines/{script}.py"


def algorithm_of(script: str) -> str:
    """The algorithm of a script."""
    return script.partition("_")[0]


@functools.cache
def constants(script: str) -> dict[str, Any]:
    """A script's tables of tasks and presets by name, evaluated without importing the script and with it a
    simulator."""
    tree = ast.parse((ROOT / place_of(script)).read_text())
    named = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in CONSTANTS
    ]
    found: dict[str, Any] = {}
    exec(compile(ast.Module(named, []), script, "exec"), found)
    return {name: found[name] for name in CONSTANTS if name in found}


def tasks_of(suites: Iterable[str], algorithm: str = "trudi") -> list[Task]:
    """The tasks of these suites, in the scripts' order; Isaac Lab's have the ids of version 3.0."""
    found = [
        Task(name, env_id, algorithm)
        for name in suites
        for env_id in constants(SUITES[name].script)[SUITES[name].tasks]
    ]
    return [task for task in found if not task.env_id.startswith("Mjlab-")]  # which one script knows too


def preset_values(script: str, preset: str, suite: str) -> dict[str, Any]:
    """The arguments that a script's preset sets for the tasks of a suite."""
    tables = constants(script)
    return tables.get(f"{preset}_{suite}".upper(), tables["PRESET"][preset])


def task_of(script: str, env_id: str) -> Task | None:
    """TruDi's task of a run of any algorithm, also under Isaac Lab's ids of version 2.3; None for one that is
    not of the 73."""
    if algorithm_of(script) in ALGORITHMS:
        script = script.replace(algorithm_of(script), "trudi")
    if script == "trudi_isaaclab":
        env_id = env_id.removesuffix("-v0").replace("Repose", "Reorient")
    return next(
        (known for known in tasks_of(SUITES) if (known.script, known.env_id) == (script, env_id)), None
    )
