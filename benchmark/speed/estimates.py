"""What do the paper's experiments compute and store? Floating-point operations and bytes of TruDi's learner
for each task at the sizes of Table 5, counted and not measured, and the hours that they imply.

    python -m benchmark.speed.estimates

* FLOP: XLA's count for one gradient step of critic, actor and duals, for a chain and for a value, each
  compiled without loops; an environment step has a chain in the rollout, a chain and a value in the targets,
  and --num-epochs shares of a gradient step. The simulator is not in it.
* memory: networks and Adam's moments; the rollout, its normalised copy and its shuffled minibatches' source,
  by their shapes; and what XLA says a gradient step needs besides (of its CPU backend). The simulator's state
  is not in it.
* hours: FLOP at a rate that was measured. On a GPU that is the paper's: TruDi's hours (Table 2, A100 or H100,
  in benchmark/anchors/humanoids.csv) for a run on one of the four humanoids, simulator included, imply so
  many FLOP/s, and a suite's runs are charged at that rate. On a CPU it is
  benchmark/results/update_time_cpu.json's, a gradient step at the paper's width and minibatch.
  HumanoidBench's simulator runs on a CPU anyway: its core-hours are from
  throughput_h1hand-walk-v0_cpu.json.

Observations and actions are those that benchmark/studies/all_tasks.py found, in benchmark/results/all_tasks_*.json;
for ManiSkill, of which there is no such file, PushCube's are taken for all. Results:
benchmark/results/estimates.json and estimates.md.
"""

import functools
import json
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pandas as pd

import trudi_mjx as trudi
from benchmark.markdown import markdown_table
from benchmark.measurements import RESULTS, write_json
from benchmark.tasks import ROOT, SUITES, Task, tasks_of

PAPER_HUMANOIDS = pd.read_csv(ROOT / "benchmark/anchors/humanoids.csv")  # Table 2
HUMANOID_HOURS = PAPER_HUMANOIDS.set_index("method").hours["TruDi"]
PUSH_CUBE = {"observation": 35, "privileged": 35, "action": 8}
GIB = 2**30


# ------------------------------------------------------------------------------------------------------ sizes
def sizes_of(task: Task) -> dict[str, int]:
    """Entries of an observation, of what the critic sees, and of an action."""
    path = RESULTS / f"all_tasks_{task.script}.json"
    if not path.exists():
        return PUSH_CUBE
    rows = {
        row["task"].removesuffix("-v0") if task.suite == "isaaclab" else row["task"]: row
        for row in json.loads(path.read_text())["tasks"]
    }
    name = task.env_id if task.env_id in rows else task.env_id.replace("Reorient", "Repose")
    if name not in rows:
        sys.exit(f"{path.name} does not have {task.env_id}; run benchmark/studies/all_tasks.py for it first")
    return {key: rows[name][key] for key in PUSH_CUBE}


def arguments(task: Task) -> trudi.Args:
    """trudi_mjx.py's arguments at a task's sizes; its learner is that of every script."""
    settings = task.settings
    return trudi.resolve(
        trudi.Args(
            num_envs=settings.num_envs,
            num_steps=settings.num_steps,
            hidden_dim=settings.hidden_dim,
            total_timesteps=settings.total_timesteps,
            device="cpu",
        )
    )


# --------------------------------------------------------------------------------------------------- counting
def counted(function: Any, *inputs: Any) -> tuple[float, int]:
    """FLOP of a compiled function and its bytes besides inputs and outputs; inputs may be shapes."""
    compiled = jax.jit(function).lower(*inputs).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def bytes_of(tree: Any) -> int:
    """Bytes of a tree of shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@functools.cache
def learner_costs(args: trudi.Args, observation: int, privileged: int, action: int) -> dict[str, float]:
    """FLOP for an environment step, and bytes."""

    def make(key: jax.Array) -> trudi.Learner:
        rngs = trudi.nnx.Rngs(key)
        actor = trudi.Actor(args, observation, action, rngs)
        critic = trudi.Critic(args, privileged, action, rngs)
        duals = {name: jnp.log(trudi.INITIAL_DUAL) for name in ("log_alpha", "log_lambda")}
        optimizers = trudi.make_optimizers(args)
        opt_states = [o.init(p) for o, p in zip(optimizers, (actor, critic, duals), strict=True)]
        return trudi.Learner(actor, critic, duals, *opt_states)

    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    learner, chain = jax.eval_shape(make, key), (args.num_diffusion_steps, action)
    setup = trudi.Setup(args, env=None, action_size=action, time_limit=0, mesh=None)

    def states(count: int) -> trudi.Batch:
        shapes = trudi.Batch((observation,), (privileged,), (action,), trudi.Trajectory(chain, chain), ())
        return jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct((count, *shape), jnp.float32),
            shapes,
            is_leaf=lambda x: type(x) is tuple,
        )

    minibatch, whole, envs = states(args.minibatch_size), states(args.batch_size), args.num_envs
    update = functools.partial(trudi.update_minibatch, setup)
    step, temporary = counted(update, learner, learner.actor, minibatch, key)
    noise = jax.ShapeDtypeStruct((chain[0] + 1, envs, action), jnp.float32)
    act = functools.partial(trudi.sample_chain, unroll=True)
    acting, _ = counted(act, learner.actor, states(envs).actor_observation, noise)
    valuing, _ = counted(
        lambda critic, seen, u: trudi.q_value(args, critic(seen, u)),
        learner.critic,
        states(envs).critic_observation,
        states(envs).action,
    )
    flop = args.num_epochs * step / args.minibatch_size + (2 * acting + valuing) / envs
    seen = observation + (privileged if privileged != observation else 0)
    # What `rollout` returns, Transition, and the batch, with the normalised next observations.
    raw = 4 * args.batch_size * (2 * seen + action + 2 * chain[0] * action + 8)
    batch = bytes_of(whole) + 4 * args.batch_size * seen
    return {
        "flop_per_step": flop,
        "update_flop": step,
        "learner_bytes": bytes_of(learner),
        "rollout_bytes": raw,
        "batch_bytes": batch,
        "update_bytes": temporary,
        "parameters": bytes_of((learner.actor, learner.critic)) // 4,
    }


def count_tasks() -> list[dict[str, Any]]:
    """A row for each of the 73 tasks."""
    rows = []
    for task in tasks_of(SUITES):
        sizes = sizes_of(task)
        costs = learner_costs(arguments(task), **sizes)
        total = sum(costs[f"{name}_bytes"] for name in ("learner", "rollout", "batch", "update"))
        rows.append(
            {
                "suite": task.suite,
                "task": task.env_id,
                **sizes,
                **costs,
                "bytes": total,
                "flop": costs["flop_per_step"] * task.settings.total_timesteps,
            }
        )
        print(
            f"{task.env_id}: {costs['flop_per_step'] / 1e6:,.0f} MFLOP a step, {total / GIB:.2f} GiB",
            flush=True,
        )
    return rows


# ------------------------------------------------------------------------------------------------------ rates
def gpu_rate(rows: list[dict[str, Any]]) -> float:
    """FLOP/s of the learner that the paper's hours for a humanoid imply."""
    flop = statistics.mean(row["flop"] for row in rows if row["suite"] == "humanoid")
    return flop / (HUMANOID_HOURS * 3600)


def cpu_rate(rows: list[dict[str, Any]]) -> tuple[float, str]:
    """FLOP/s of gradient steps at the paper's width and minibatch, measured on a CPU, and which."""
    found = [
        x
        for x in json.loads((RESULTS / "update_time_cpu.json").read_text())
        if (x["options"]["hidden_dim"], x["options"]["minibatch_size"]) == (512, 2048)
    ]
    flop = next(row["update_flop"] for row in rows if row["suite"] == "maniskill")  # of its sizes
    provenance = found[-1]["provenance"]
    machine = f"{provenance['cpu']}, {provenance['device'].split(', ')[-1]}"
    return flop / statistics.median(found[-1]["seconds"]["JAX"]), machine


def simulator_core_hours() -> float:
    """Core-hours of HumanoidBench's simulator for ten runs of each task, by benchmark/speed/humanoidbench_workers.py."""
    measured = json.loads((RESULTS / "throughput_h1hand-walk-v0_cpu.json").read_text())
    speed = statistics.median(measured["results"]["2 workers"]["steps_per_second"]) / 2
    return 10 * sum(task.settings.total_timesteps for task in tasks_of(["humanoidbench"])) / speed / 3600


def cited_table() -> str:
    """The paper's Table 2, and the hours of its ten runs of each of the four humanoids."""
    rows = [
        (
            row.method,
            f"{row.hours} ± {row.hours_spread}",
            f"{row.iqm} ± {row.iqm_spread}",
            f"{40 * row.hours:.0f}",
        )
        for row in PAPER_HUMANOIDS.itertuples()
    ]
    return markdown_table(("humanoids", "hours of a run", "IQM of returns", "hours of forty runs"), rows)


def report(rows: list[dict[str, Any]], gpu: float, cpu: float, machine: str) -> str:
    """All tables as Markdown."""
    suites = []
    for name, suite in SUITES.items():
        own = [row for row in rows if row["suite"] == name]
        total = 10 * sum(row["flop"] for row in own)
        suites.append((suite.title, len(own), f"{total:.2e}", total / gpu / 3600, total / cpu / 3600))
    total = 10 * sum(row["flop"] for row in rows)
    suites.append(("all", len(rows), f"{total:.2e}", *(sum(x[i] for x in suites) for i in (3, 4))))
    header = ("ten runs of each task", "tasks", "FLOP of the learner", "GPU-hours", "CPU-hours")
    table = markdown_table(header, [(*x[:3], *(f"{hours:,.0f}" for hours in x[3:])) for x in suites])
    tasks = markdown_table(
        (
            "task",
            "observation",
            "critic's",
            "action",
            "parameters",
            "MFLOP a step",
            "GiB",
            "of it rollout and batch",
        ),
        [
            (
                row["task"],
                row["observation"],
                row["privileged"],
                row["action"],
                f"{row['parameters']:,}",
                f"{row['flop_per_step'] / 1e6:,.0f}",
                f"{row['bytes'] / GIB:.2f}",
                f"{(row['rollout_bytes'] + row['batch_bytes']) / GIB:.2f}",
            )
            for row in rows
        ],
    )
    text = (
        "Written by `python -m benchmark.speed.estimates`, which says how. GPU-hours are not measured, but "
        f"of an A100 or H100 at {gpu / 1e12:.2f} TFLOP/s, the rate that the paper's "
        f"{HUMANOID_HOURS} hours for a humanoid imply, with that simulator's share; where a simulator is "
        f"slower, as HumanoidBench's on a CPU, it takes more. CPU-hours are of {machine}, at "
        f"{cpu / 1e9:.0f} GFLOP/s, measured, and without any simulator. HumanoidBench's simulator, "
        f"measured, takes {simulator_core_hours():,.0f} core-hours besides: with 16 cores to a GPU, that "
        f"waits for {simulator_core_hours() / 16:,.0f} hours."
    )
    caption = "One run of each task, memory without the simulator's (ManiSkill's observations: PushCube's):"
    cited = (
        "Table 2 of the paper (cited, A100 or H100), whose methods do different operations, so that no "
        f"other's hours follow from TruDi's:\n\n{cited_table()}"
    )
    return f"# Estimates\n\n{text}\n\n{table}\n{cited}\n{caption}\n\n{tasks}"


def main() -> None:
    """Count, write JSON and Markdown."""
    rows = count_tasks()
    gpu, (cpu, machine) = gpu_rate(rows), cpu_rate(rows)
    rates = {"gpu_flop_per_second": gpu, "cpu_flop_per_second": cpu, "cpu": machine}
    write_json(RESULTS / "estimates.json", rates | {"tasks": rows})
    text = report(rows, gpu, cpu, machine)
    (RESULTS / "estimates.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
