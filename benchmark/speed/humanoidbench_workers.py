"""How fast do trudi_humanoidbench.py's workers step, against one environment and AsyncVectorEnv?

    python -m benchmark.speed.humanoidbench_workers --env-id h1hand-walk-v0 --num-envs 16 --num-workers 2

One vector after the other is started: --num-envs environments in --num-workers processes of
trudi_humanoidbench.Simulators, and as many in Gymnasium's AsyncVectorEnv, which has a process for each. Every
round steps one environment in this process, then the vector, for as many seconds each, so that a round's
ratio compares what ran within half a minute, whatever else the machine did; reported are medians over rounds.
Actions are uniformly random, episodes start anew as they end. The learner's CPU time is this process's for
each environment step. Results go to benchmark/results/throughput_{env}_cpu.json and, as a table, to stdout.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import tyro

import trudi_humanoidbench as trudi
from benchmark.markdown import markdown_table
from benchmark.measurements import RESULTS, cpu_name, write_json

SECONDS = 10.0  # of each measurement
ROUNDS = 5  # of measurements


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure stepping rates."""

    env_id: str = "h1hand-walk-v0"
    """task of trudi_humanoidbench.py"""
    num_envs: int = 16
    """environments of both vectors"""
    num_workers: int = 2
    """worker processes"""
    output: str | None = None
    """the JSON file; default: named after the task"""


class Vector(NamedTuple):
    """Environments that are measured together."""

    step: Callable[[], Any]
    stop: Callable[[], Any]


class Rate(NamedTuple):
    """Of one measurement."""

    steps_per_second: float  # environment steps
    cpu_per_step: float  # this process's CPU seconds for one


def start_single(options: Options, action_size: int) -> Vector:
    """One environment in this process."""
    env = trudi.make_env(options.env_id)
    rng = np.random.default_rng(0)
    env.reset(seed=0)

    def step() -> None:
        action = rng.uniform(-1, 1, action_size).astype(np.float32)
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()

    return Vector(step, env.close)


def start_workers(options: Options, setup: trudi.Setup) -> Vector:
    """The environments in the script's workers."""
    envs = trudi.Simulators(setup, options.num_envs)
    rng = np.random.default_rng(0)
    envs.reset(0)

    def step() -> None:
        envs.step(rng.uniform(-1, 1, (options.num_envs, setup.action_size)))

    return Vector(step, envs.close)


def start_gymnasium(options: Options, action_size: int) -> Vector:
    """The environments in Gymnasium's processes."""
    envs = gym.vector.AsyncVectorEnv(
        [lambda: trudi.make_env(options.env_id)] * options.num_envs,
        context="forkserver",
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )
    rng = np.random.default_rng(0)
    envs.reset(seed=0)

    def step() -> None:
        envs.step(rng.uniform(-1, 1, (options.num_envs, action_size)).astype(np.float32))

    return Vector(step, envs.close)


def measure(step: Callable[[], Any], steps: int, seconds: float) -> Rate:
    """The rate of calls that are `steps` environment steps each."""
    step()
    calls = 0
    began = time.perf_counter()
    cpu = time.process_time()
    while time.perf_counter() - began < seconds:
        step()
        calls += 1
    wall_time = time.perf_counter() - began
    cpu = time.process_time() - cpu
    return Rate(calls * steps / wall_time, cpu / (calls * steps))


def compare(options: Options, single: Vector, vector: Vector) -> dict[str, Any]:
    """Rates of all rounds, and the medians of their ratio and of the learner's CPU time."""
    alone = []
    together = []
    for _ in range(ROUNDS):
        alone.append(measure(single.step, 1, SECONDS))
        together.append(measure(vector.step, options.num_envs, SECONDS))
    vector.stop()
    single_rates = [rate.steps_per_second for rate in alone]
    vector_rates = [rate.steps_per_second for rate in together]
    return {
        "alone": single_rates,
        "steps_per_second": vector_rates,
        "median_ratio": np.median(np.divide(vector_rates, single_rates)),
        "cpu_per_step": np.median([rate.cpu_per_step for rate in together]),
    }


def table_row(options: Options, name: str, result: dict[str, Any]) -> tuple[str, ...]:
    """What `compare` found, as a row of the table."""
    return (
        f"{options.num_envs} environments, {name}",
        f"{np.median(result['steps_per_second']):,.0f}",
        f"{np.median(result['alone']):,.0f}",
        f"{result['median_ratio']:.2f}",
        f"{1e6 * result['cpu_per_step']:.0f}",
    )


def main() -> None:
    """Measure and report."""
    options = tyro.cli(Options)
    args = trudi.Args(env_id=options.env_id, device="cpu", num_workers=options.num_workers)
    setup = trudi.load_setup(trudi.resolve(args))
    single = start_single(options, setup.action_size)
    workers = f"{options.num_workers} workers"
    results = {workers: compare(options, single, start_workers(options, setup))}
    vector = start_gymnasium(options, setup.action_size)
    results["AsyncVectorEnv"] = compare(options, single, vector)

    path = pathlib.Path(options.output or RESULTS / f"throughput_{options.env_id}_cpu.json")
    write_json(path, {"options": vars(options) | {"output": None}, "results": results})
    where = f"{options.env_id}, {cpu_name()}"
    header = (where, "steps/s", "one environment, one process", "ratio", "learner's CPU (µs/step)")
    print(markdown_table(header, [table_row(options, name, result) for name, result in results.items()]))


if __name__ == "__main__":
    main()
