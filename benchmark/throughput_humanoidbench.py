"""How fast do trudi_humanoidbench.py's workers step? Against one environment in one process and Gymnasium's AsyncVectorEnv.

    python benchmark/throughput_humanoidbench.py --env-id h1hand-walk-v0 --num-envs 16 --num-workers 2

One vector after the other is started: --num-envs environments in --num-workers processes of trudi_humanoidbench.Simulators, and
as many in Gymnasium's AsyncVectorEnv, which has a process for each. Every round steps one environment in this process, then the
vector, for as many seconds each, so that a round's ratio compares what ran within half a minute, whatever else the machine did;
reported are medians over rounds. Actions are uniformly random, episodes start anew as they end. The learner's CPU time is this
process's for each environment step.
Results go to benchmark/results/throughput_{env}_cpu.json and, as a table, to stdout.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import tyro
from common import RESULTS, cpu_name, markdown_table, write_json

import trudi_humanoidbench as trudi


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure stepping rates."""

    env_id: str = "h1hand-walk-v0"  # task of trudi_humanoidbench.py
    num_envs: int = 16  # environments of both vectors
    num_workers: int = 2  # worker processes
    seconds: float = 10.0  # of each measurement
    rounds: int = 5  # of measurements
    output: str | None = None  # the JSON file; default: named after the task

def single(options: Options, action_size: int) -> Callable[[], None]:
    """A step of one environment in this process."""
    env, rng = trudi.make_env(options.env_id), np.random.default_rng(0)
    env.reset(seed=0)
    def step() -> None:
        _, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, action_size).astype(np.float32))
        if terminated or truncated:
            env.reset()
    return step

def ours(options: Options, task: trudi.Task) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of all environments in the script's workers, and their end."""
    envs, rng = trudi.Simulators(options.env_id, task, options.num_envs, options.num_workers), np.random.default_rng(0)
    envs.reset(0)
    def stop() -> None:
        for worker, _ in envs.workers:
            worker.terminate()
            worker.join()
    return lambda: envs.step(rng.uniform(-1, 1, (options.num_envs, task.action_size))), stop

def gymnasiums(options: Options, action_size: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of all environments in Gymnasium's processes, and their end."""
    envs = gym.vector.AsyncVectorEnv([lambda: trudi.make_env(options.env_id)] * options.num_envs, context="forkserver",
                                     autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    rng = np.random.default_rng(0)
    envs.reset(seed=0)
    return lambda: envs.step(rng.uniform(-1, 1, (options.num_envs, action_size)).astype(np.float32)), envs.close

def rate(step: Callable[[], None], steps: int, seconds: float) -> dict[str, float]:
    """Environment steps a second of calls that are `steps` of them each, and this process's CPU seconds for one."""
    step()
    began, cpu, calls = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        step()
        calls += 1
    return {"steps_per_second": calls * steps / (time.perf_counter() - began),
            "cpu_per_step": (time.process_time() - cpu) / (calls * steps)}

def main() -> None:
    """Measure and report."""
    options = tyro.cli(Options)
    task = trudi.load_agent(trudi.resolve(trudi.Args(env_id=options.env_id, device="cpu"))).env
    one, rows, results = single(options, task.action_size), [], {}
    names = {f"{options.num_workers} workers": lambda: ours(options, task),
             "AsyncVectorEnv": lambda: gymnasiums(options, task.action_size)}
    for name, start in names.items():
        step, stop = start()
        rounds = [(rate(one, 1, options.seconds), rate(step, options.num_envs, options.seconds)) for _ in range(options.rounds)]
        stop()
        alone, both = ([x[k]["steps_per_second"] for x in rounds] for k in (0, 1))
        ratio, cpu = np.median(np.divide(both, alone)), np.median([x[1]["cpu_per_step"] for x in rounds])
        results[name] = {"alone": alone, "steps_per_second": both, "median_ratio": ratio, "cpu_per_step": cpu}
        rows.append((f"{options.num_envs} environments, {name}", f"{np.median(both):,.0f}", f"{np.median(alone):,.0f}",
                     f"{ratio:.2f}", f"{1e6 * cpu:.0f}"))
    path = pathlib.Path(options.output or RESULTS / f"throughput_{options.env_id}_cpu.json")
    write_json(path, {"options": vars(options) | {"output": None}, "results": results})
    header = (f"{options.env_id}, {cpu_name()}", "steps/s", "one environment, one process", "ratio", "learner's CPU (µs/step)")
    print(markdown_table(header, rows))

if __name__ == "__main__":
    main()
