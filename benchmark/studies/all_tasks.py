"""Does every task run? Two tiny iterations, an evaluation and a checkpoint of each task that a script knows.

    python -m benchmark.studies.all_tasks [--script trudi_mjx] [--tasks CheetahRun HopperHop] [--flags="--impl warp"]
    python -m benchmark.studies.all_tasks --script trudi_isaaclab --python ISAACLAB/bin/python  # another interpreter

Each task is a process `python SCRIPT.py --env-id TASK` with networks and batches too small to learn, so its
return says only that an evaluation took place. A failure is reported and the next task follows. Sizes are
read from the run's checkpoint. Results go to benchmark/results/all_tasks_{script}.json and .md; the exit code
is 1 if any task failed.
"""

import dataclasses
import importlib
import json
import logging
import math
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time
from typing import Any, Literal

import torch
import tyro

import trudi_mjx as trudi
from benchmark.markdown import markdown_table
from benchmark.measurements import RESULTS, cpu_name, write_json
from benchmark.tasks import ROOT

SMALL = (
    "--num-envs 8 --num-steps 4 --minibatch-size 16 --num-epochs 1 --hidden-dim 16 --eval-interval 1000 "
    "--checkpoint-interval 1000"
)
JAX_FLAGS = f"{SMALL} --num-eval-envs 2 --compilation-cache-dir="
FLAGS = {"trudi_mjx": JAX_FLAGS, "trudi_humanoidbench": JAX_FLAGS, "trudi_isaaclab": f"{SMALL} --preset cpu"}
TASKS = {"trudi_mjx": [*trudi.DMC, *trudi.HUMANOID]}


@dataclasses.dataclass(frozen=True)
class Options:
    """Try all tasks of a script."""

    script: Literal["trudi_mjx", "trudi_humanoidbench", "trudi_isaaclab"] = "trudi_mjx"  # whose tasks
    python: str = sys.executable  # the interpreter that runs it
    tasks: tuple[str, ...] = ()  # which ones; default: all of the paper's
    iterations: int = 2  # of each task
    timeout: float = 3600.0  # seconds for each task
    flags: str = ""  # more flags of the script, after those of small sizes
    output: str | None = None  # results, without .json and .md; default: named after the script


def sizes(run: pathlib.Path) -> dict[str, int]:
    """Numbers of observations (actor's and critic's) and actions, from a run's checkpoint."""
    for path in (run / "checkpoints").glob("*.pt"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        actor, critic = saved["actor"], saved["critic"]
        action = len(actor["raw_friction"])
        seen = actor["input.weight"].shape[1] - action - actor["time_mlp.0.weight"].shape[1]
        privileged = critic["blocks.0.0.weight"].shape[1] - action
        return {"observation": seen, "privileged": privileged, "action": action}
    arrays = trudi.read_checkpoint(str(run))["state"]
    moments = {
        name.rpartition(".")[2]: x for name, x in arrays.items() if name.startswith("statistics.moments")
    }
    actor = moments.get("state", next(iter(moments.values()))).shape[-1]
    privileged = moments["privileged_state"].shape[-1] if "privileged_state" in moments else actor
    # One number for each action dimension.
    friction = next(x for name, x in arrays.items() if name.startswith("learner.actor.raw_friction"))
    return {"observation": actor, "privileged": privileged, "action": friction.shape[-1]}


def outcome(log_dir: pathlib.Path, output: str, iterations: int) -> dict[str, Any]:
    """What a finished process left behind."""
    compiled = re.search(r"compiled in ([\d.]+) s", output)
    logs = sorted(log_dir.rglob("metrics.jsonl"))
    lines = [json.loads(line) for line in logs[0].read_text().splitlines()] if logs else []
    losses = [value for line in lines for name, value in line.items() if name.startswith("losses")]
    found = {
        "compile_seconds": float(compiled[1]) if compiled else None,
        "iterations_ok": len(lines) == iterations and all(map(math.isfinite, losses)),
        "steps_per_second": lines[-1]["charts/SPS"] if lines else None,
        "eval_return": lines[-1].get("eval/episodic_return") if lines else None,
    }
    return found | (sizes(logs[0].parent) if found["iterations_ok"] else {})


def try_task(options: Options, task: str) -> dict[str, Any]:
    """Run one task in a process of its own."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--total-timesteps {options.iterations * 8 * 4} --log-dir {folder} {options.flags}"
        command = [
            options.python,
            str(ROOT / f"{options.script}.py"),
            "--env-id",
            task,
            *shlex.split(FLAGS[options.script]),
            *shlex.split(flags),
        ]
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=options.timeout,
                cwd=folder,
            )
            code, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            code, output = "timeout", (error.output or b"").decode(errors="replace")
        result = {"task": task, "exit_code": code, "seconds": time.perf_counter() - began}
        result |= outcome(pathlib.Path(folder), output, options.iterations)
    if code != 0:
        last = (output.strip().splitlines() or [""])[-1]
        result["error"] = re.sub(r"(?<!\S)/\S*/", "", last)[:500]  # without folders
    return result


def as_markdown(results: list[dict[str, Any]]) -> str:
    """The table of all tasks."""
    rows = []
    for result in results:
        seen, privileged = (result.get(name, "") for name in ("observation", "privileged"))
        both = f"{seen}" if seen == privileged else f"{seen} / {privileged}"
        names = ("compile_seconds", "steps_per_second", "eval_return")
        numbers = ["" if result[name] is None else f"{result[name]:.1f}" for name in names]
        good = "yes" if result["iterations_ok"] else "no"
        rows.append((result["task"], both, result.get("action", ""), *numbers, good, result["exit_code"]))
    header = (
        "task",
        "observation (actor / critic)",
        "action",
        "compile (s)",
        "steps/s",
        "eval return",
        "iterations ok",
        "exit code",
    )
    return markdown_table(header, rows)


def main() -> None:
    """Try the tasks one after another, writing the results as they come."""
    options, results = tyro.cli(Options), []
    logging.getLogger("absl").setLevel(logging.ERROR)
    path = pathlib.Path(options.output or RESULTS / f"all_tasks_{options.script}")
    for task in options.tasks or TASKS.get(options.script) or importlib.import_module(options.script).TASKS:
        results.append(try_task(options, task))
        print(json.dumps(results[-1]), flush=True)
        flags = f"{FLAGS[options.script]} {options.flags}".strip()
        write_json(path.with_suffix(".json"), {"flags": flags, "tasks": results})
        text = as_markdown(results) + f"\n{options.iterations} iterations of each, on {cpu_name()}.\n"
        path.with_suffix(".md").write_text(text)
    print(text)
    sys.exit(any(result["exit_code"] != 0 or not result["iterations_ok"] for result in results))


if __name__ == "__main__":
    main()
