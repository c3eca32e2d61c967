"""Does every task run? Two tiny iterations, an evaluation and a checkpoint of each of Playground's tasks that TruDi knows.

    python benchmark/all_tasks.py [--tasks CheetahRun HopperHop] [any flag of trudi_mjx.py]

Each task is a process `python trudi_mjx.py --env-id TASK` with networks and batches too small to learn, so its return says only
that an evaluation took place. A failure is reported and the next task follows. Sizes are read from the checkpoint that the
run left. Results go to benchmark/results/all_tasks.json and all_tasks.md; the exit code is 1 if any task failed.
"""

import dataclasses
import json
import logging
import math
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any, Literal

import tyro
from common import RESULTS, Sizes, cpu_name, markdown_table, shown_args, training_command, trudi, write_json


@dataclasses.dataclass(frozen=True)
class Options(Sizes):
    """Try all tasks, with these flags of trudi_mjx.py."""

    env_id: tyro.conf.Suppress[str] = ""
    tasks: tuple[str, ...] = trudi.DMC + trudi.HUMANOID  # which ones
    iterations: int = 2  # of each task
    timeout: float = 3600.0  # seconds for each task
    output: str = str(RESULTS / "all_tasks")  # results, without .json and .md
    impl: Literal["jax", "warp"] | None = "jax"  # simulator, MJX or MuJoCo Warp
    num_envs: int = 8  # parallel environments
    num_steps: int = 4  # steps of each environment in a rollout
    minibatch_size: int = 16  # states in a gradient step
    num_epochs: int = 1  # passes over a rollout
    hidden_dim: int = 16  # width of actor and critic
    num_eval_envs: int = 2  # episodes in an evaluation

def sizes(run: pathlib.Path) -> dict[str, int]:
    """Numbers of observations (actor's and critic's) and actions, from a run's checkpoint."""
    arrays = trudi.read_checkpoint(str(run))["state"]
    moments = {name.rpartition(".")[2]: x.shape[-1] for name, x in arrays.items() if name.startswith("statistics.moments")}
    actor = moments.get("state", next(iter(moments.values())))
    friction = next(x for name, x in arrays.items() if name.startswith("learner.actor.raw_friction"))  # one per dimension
    return {"observation": actor, "privileged": moments.get("privileged_state", actor), "action": friction.shape[-1]}

def outcome(log_dir: pathlib.Path, output: str, iterations: int) -> dict[str, Any]:
    """What a finished process left behind."""
    compiled = re.search(r"compiled in ([\d.]+) s", output)
    logs = sorted(log_dir.rglob("metrics.jsonl"))
    lines = [json.loads(line) for line in logs[0].read_text().splitlines()] if logs else []
    losses = [value for line in lines for name, value in line.items() if name.startswith("losses")]
    found = {"compile_seconds": float(compiled[1]) if compiled else None,
             "iterations_ok": len(lines) == iterations and all(map(math.isfinite, losses)),
             "eval_return": lines[-1].get("eval/episodic_return") if lines else None}
    return found | (sizes(logs[0].parent) if found["iterations_ok"] else {})

def try_task(options: Options, task: str) -> dict[str, Any]:
    """Run one task in a process of its own."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        steps = options.iterations * options.num_envs * options.num_steps
        command = training_command(options.training_args(env_id=task, total_timesteps=steps, log_dir=folder))
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                                  timeout=options.timeout, cwd=folder)
            code, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            code, output = "timeout", (error.output or b"").decode(errors="replace")
        result = {"task": task, "exit_code": code, "seconds": time.perf_counter() - began}
        result |= outcome(pathlib.Path(folder), output, options.iterations)
    if code != 0:
        result["error"] = re.sub(r"(?<!\S)/\S*/", "", (output.strip().splitlines() or [""])[-1])[:500]  # without folders
    return result

def as_markdown(results: list[dict[str, Any]]) -> str:
    """The table of all tasks."""
    rows = []
    for result in results:
        seen, privileged = (result.get(name, "") for name in ("observation", "privileged"))
        both = f"{seen}" if seen == privileged else f"{seen} / {privileged}"
        numbers = ["" if result[name] is None else f"{result[name]:.1f}" for name in ("compile_seconds", "eval_return")]
        good = "yes" if result["iterations_ok"] else "no"
        rows.append((result["task"], both, result.get("action", ""), numbers[0], good, numbers[1], result["exit_code"]))
    header = ("task", "observation (actor / critic)", "action", "compile (s)", "iterations ok", "eval return", "exit code")
    return markdown_table(header, rows)

def main() -> None:
    """Try the tasks one after another, writing the results as they come."""
    options, results = tyro.cli(Options), []
    logging.getLogger("absl").setLevel(logging.ERROR)
    for task in options.tasks:
        results.append(try_task(options, task))
        print(json.dumps(results[-1]), flush=True)
        write_json(pathlib.Path(options.output + ".json"), {"args": shown_args(options.training_args()), "tasks": results})
        text = as_markdown(results) + f"\n{options.iterations} iterations of each, {options.impl}, on {cpu_name()}.\n"
        pathlib.Path(options.output + ".md").write_text(text)
    print(text)
    sys.exit(any(result["exit_code"] != 0 or not result["iterations_ok"] for result in results))

if __name__ == "__main__":
    main()
