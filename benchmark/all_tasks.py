"""Does every task run? Two tiny iterations, an evaluation and a checkpoint of each of the tasks that a script knows.

    python benchmark/all_tasks.py [--script trudi_mjx] [--tasks CheetahRun HopperHop] [--flags="--impl warp"]

Each task is a process `python SCRIPT.py --env-id TASK` with networks and batches too small to learn, so its return says only
that an evaluation took place. A failure is reported and the next task follows. Sizes are read from the run's checkpoint.
Results go to benchmark/results/all_tasks_{script}.json and .md; the exit code is 1 if any task failed.
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

import tyro
from common import RESULTS, ROOT, cpu_name, markdown_table, trudi, write_json

SMALL = ("--num-envs 8 --num-steps 4 --minibatch-size 16 --num-epochs 1 --hidden-dim 16 --num-eval-envs 2 --eval-interval 1000 "
         "--checkpoint-interval 1000 --compilation-cache-dir=")
TASKS = {"trudi_mjx": [*trudi.DMC, *trudi.HUMANOID]}

@dataclasses.dataclass(frozen=True)
class Options:
    """Try all tasks of a script."""

    script: Literal["trudi_mjx", "trudi_humanoidbench"] = "trudi_mjx"  # whose tasks
    tasks: tuple[str, ...] = ()  # which ones; default: all of the paper's
    iterations: int = 2  # of each task
    timeout: float = 3600.0  # seconds for each task
    flags: str = ""  # more flags of the script, after those of small sizes
    output: str | None = None  # results, without .json and .md; default: named after the script

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
        command = [sys.executable, str(ROOT / f"{options.script}.py"), "--env-id", task, *shlex.split(SMALL),
                   "--log-dir", folder, "--total-timesteps", str(options.iterations * 8 * 4), *shlex.split(options.flags)]
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
    path = pathlib.Path(options.output or RESULTS / f"all_tasks_{options.script}")
    for task in options.tasks or TASKS.get(options.script) or importlib.import_module(options.script).TASKS:
        results.append(try_task(options, task))
        print(json.dumps(results[-1]), flush=True)
        write_json(path.with_suffix(".json"), {"flags": f"{SMALL} {options.flags}".strip(), "tasks": results})
        text = as_markdown(results) + f"\n{options.iterations} iterations of each, on {cpu_name()}.\n"
        path.with_suffix(".md").write_text(text)
    print(text)
    sys.exit(any(result["exit_code"] != 0 or not result["iterations_ok"] for result in results))

if __name__ == "__main__":
    main()
