"""How fast is trudi_mjx.py? Environment steps per second, compile and start-up seconds, peak memory.

    python -m benchmark.speed.rollout_and_update --env-id G1JoystickRoughTerrain [any flag of trudi_mjx.py] [--repeats 5]

* start-up: seconds from `python trudi_mjx.py ...` to the first iteration in metrics.jsonl, of a process that
  finds an empty --compilation-cache-dir (and empty caches of Warp's and CUDA's kernels), and of a second one
  that finds what the first left;
* compile: tracing and lowering of one iteration, then its compilation, in this process and without any cache;
* steps/s, each part run on its own: the simulator alone (uniformly random actions), the rollout (policy,
  simulator and new starts), the new starts alone (states for the next episodes of the environments in which
  one ended in that rollout, whose share is printed), the critic's targets (with the observations' normalisation), the update
  (all epochs of minibatches) and the whole iteration. Steps are environment steps, summed over --num-seeds;
  every part is charged an iteration's steps. Compiled programs only, after a warm-up call and up to their
  results' arrival. The policy is an untrained one: where a simulator's time depends on contacts, that of a
  trained one may differ;
* --profile: what takes an iteration's time, by JAX's profiler: the names of a GPU's kernels, or of a CPU's
  operations, whose times add up to the most;
* memory: the device's peak after the iterations and before anything else ran (GPU only), and the process's
  largest resident set, compilation included.

Medians are over --repeats calls. Results go to benchmark/results/throughput_{env}_{device}.json and, as a
table, to stdout.
"""

import dataclasses
import functools
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tyro
from jax.sharding import NamedSharding, PartitionSpec

import trudi_mjx as trudi
from benchmark.markdown import markdown_table
from benchmark.measurements import RESULTS, cpu_name, measure, write_json
from benchmark.speed.flags import Sizes, shown_args, training_command
from benchmark.tasks import preset_values


@dataclasses.dataclass(frozen=True)
class Options(Sizes):
    """Measure the speed of trudi_mjx.py with these flags."""

    repeats: int = 5  # timed calls of each part
    starts: bool = True  # measure the start-up of whole processes too; --no-starts leaves it out
    profile: bool = False  # profile an iteration
    output: str | None = None  # the JSON file; default: named after task and device


# --------------------------------------------------------------------------------------------------- start-up
def logged(folder: pathlib.Path) -> bool:
    """Whether a run in a folder has logged an iteration."""
    return any(path.stat().st_size for path in folder.rglob("metrics.jsonl"))


def seconds_to_log(
    command: list[str], environment: dict[str, str], folder: str, output: pathlib.Path
) -> float:
    """Seconds until a process logs its first iteration in a folder, or ends; it is then killed."""
    began = time.perf_counter()
    with output.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder
        )
    while process.poll() is None and not logged(pathlib.Path(folder)):
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    return seconds


def measure_start(args: trudi.Args, cache: pathlib.Path) -> dict[str, float]:
    """Seconds until a process logs its first iteration, and those of compiling."""
    with tempfile.TemporaryDirectory() as folder:
        args = dataclasses.replace(args, log_dir=folder, compilation_cache_dir=str(cache / "jax"))
        command = training_command(args)
        environment = {
            name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
        }
        environment |= {"WARP_CACHE_PATH": str(cache / "warp"), "CUDA_CACHE_PATH": str(cache / "cuda")}
        output = pathlib.Path(folder, "output.txt")
        seconds = seconds_to_log(command, environment, folder, output)
        compiled = re.search(r"compiled in ([\d.]+) s", output.read_text())
        if not logged(pathlib.Path(folder)):
            sys.exit(f"{' '.join(command)} did not get to its first iteration:\n{output.read_text()[-2000:]}")
    return {"first_iteration_logged": seconds, "compile": float(compiled[1])}


def measure_starts(options: Options) -> dict[str, dict[str, float]]:
    """Start-up without and with compiled programs of an earlier start."""
    # `resolve` would take hold of the GPU, which the processes need
    sizes = preset_values("trudi_mjx", options.preset, trudi.find_suite(options.env_id))
    steps = (options.num_envs or sizes["num_envs"]) * (options.num_steps or sizes["num_steps"])
    # the first one is logged without an evaluation
    args = options.training_args(total_timesteps=2 * steps, eval_interval=2)
    with tempfile.TemporaryDirectory() as cache:
        return {name: measure_start(args, pathlib.Path(cache)) for name in ("empty cache", "warm cache")}


# -------------------------------------------------------------------------------------- parts of an iteration
def simulate(setup: trudi.Setup, state: trudi.TrainState) -> trudi.Outcome:
    """A rollout's steps of the simulator with random actions; returns the outcomes, which `rollout` keeps."""
    args, shape = setup.args, (setup.args.num_envs, setup.action_size)

    def step(env_state: trudi.EnvState, key: jax.Array) -> tuple[trudi.EnvState, trudi.Outcome]:
        action = jax.random.uniform(key, shape, minval=-trudi.ACTION_LIMIT, maxval=trudi.ACTION_LIMIT)
        return trudi.env_step(setup, env_state, action)

    return jax.lax.scan(step, state.env_state, jax.random.split(state.key, args.num_steps))[1]


def act(setup: trudi.Setup, state: trudi.TrainState) -> trudi.Transition:
    """A rollout of the policy: its transitions."""
    return trudi.rollout(setup, state.learner.actor, state.statistics, state.env_state, state.key)[1]


def refill(setup: trudi.Setup, state: trudi.TrainState, data: trudi.Transition) -> Any:
    """States for the next episodes of the environments in which one ended in a rollout."""
    ended = data.terminated | data.truncated
    return trudi.refill_starts(setup, state.env_state, ended.any(0), state.key).starts


def make_batch(setup: trudi.Setup, state: trudi.TrainState, data: trudi.Transition) -> trudi.Batch:
    """What the epochs learn from: targets beside normalised observations, as in `trudi_mjx.update`."""
    inputs = trudi.network_inputs(trudi.normalize(state.statistics, data.observation))
    next_inputs = trudi.network_inputs(trudi.normalize(state.statistics, data.next_observation))
    target = trudi.critic_targets(setup, state.learner, data, next_inputs, state.key)
    batch = trudi.Batch(inputs.actor, inputs.critic, data.action, data.trajectory, target)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), batch)


def update_epochs(setup: trudi.Setup, state: trudi.TrainState, batch: trudi.Batch) -> trudi.Learner:
    """All epochs of minibatches."""
    return trudi.update_epochs(setup, state.learner, batch, state.key)[0]


def measure_parts(
    setup: trudi.Setup, state: trudi.TrainState, repeats: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every part but the whole, each a program of its own; the share of environments that ended."""
    functions = (simulate, act, refill, make_batch, update_epochs)
    programs = [jax.jit(trudi.over_seeds(setup, f)) for f in functions]
    data = programs[1](state)
    batch = programs[3](state, data)
    arguments = {
        "simulator alone": (state,),
        "rollout": (state,),
        "new starts": (state, data),
        "targets": (state, data),
        "update": (state, batch),
    }
    seconds = {
        name: measure(program, inputs, repeats)
        for program, (name, inputs) in zip(programs, arguments.items(), strict=True)
    }
    return seconds, float((data.terminated | data.truncated).any(1).mean())


# -------------------------------------------------------------------------------------------- whole iteration
def compile_iteration(
    setup: trudi.Setup, keys: jax.Array
) -> tuple[Callable, trudi.TrainState, dict[str, float]]:
    """`iterate`, compiled as in `trudi_mjx.prepare`; the initial state; seconds of tracing and compiling."""
    whole, split = (NamedSharding(setup.mesh, spec) for spec in (PartitionSpec(), PartitionSpec(None, "env")))
    init = trudi.over_seeds(setup, trudi.init_state)
    run = trudi.over_seeds(setup, trudi.iterate)
    abstract = jax.eval_shape(init, keys)
    num_envs = (setup.args.num_envs,)
    env_state = jax.tree.map(lambda x: split if x.shape[1:2] == num_envs else whole, abstract.env_state)
    shardings = jax.tree.map(lambda _: whole, abstract)._replace(env_state=env_state)
    times = [time.perf_counter()]
    jitted = jax.jit(run, in_shardings=(shardings,), out_shardings=(shardings, whole), donate_argnums=0)
    lowered = jitted.lower(abstract)
    times.append(time.perf_counter())
    program = lowered.compile()
    times.append(time.perf_counter())
    seconds = dict(zip(("trace and lower", "compile"), np.diff(times).tolist(), strict=True))
    return program, jax.jit(init, out_shardings=shardings)(keys), seconds


def measure_iteration(
    program: Callable, state: trudi.TrainState, repeats: int
) -> tuple[list[float], trudi.TrainState]:
    """Seconds of iterations in a row after one that is not counted, and the last state."""
    state, seconds = jax.block_until_ready(program(state))[0], []
    for _ in range(repeats):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(program(state))
        seconds.append(time.perf_counter() - began)
    return seconds, state


def peak_memory(device: jax.Device) -> dict[str, int]:
    """Peak bytes on the device, where it counts them, and of this process's resident set."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"device": (device.memory_stats() or {}).get("peak_bytes_in_use"), "resident": resident}


def profiled(call: Callable[[], Any]) -> list[tuple[str, float, int]]:
    """Names, seconds and numbers of calls of what takes a device's time in a call of a compiled program, most
    first. On a CPU, an operation's time has in it that of the operations that it calls."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
        devices = [plane for plane in planes if "GPU" in plane.name]
        lines = [line for plane in devices for line in plane.lines if line.name.startswith("Stream")]
        lines = lines or [line for plane in planes for line in plane.lines if "XLA" in line.name]
        totals: dict[str, list[float]] = {}
        for event in (event for line in lines for event in line.events):
            total = totals.setdefault(re.sub(r"[.\d]+$", "", event.name), [0.0, 0])
            total[0], total[1] = total[0] + event.duration_ns * 1e-9, total[1] + 1
    rows = ((name, seconds, int(calls)) for name, (seconds, calls) in totals.items())
    return sorted(rows, key=lambda row: -row[1])


# ---------------------------------------------------------------------------------------------------- results
def report(results: dict[str, Any], title: str) -> str:
    """The results as Markdown."""
    rows = []
    for name, seconds in results["seconds"].items():
        rate = [results["steps"] / x for x in (np.median(seconds), max(seconds), min(seconds))]
        rows.append(
            (name, f"{rate[0]:,.0f}", f"{rate[1]:,.0f} to {rate[2]:,.0f}", f"{np.median(seconds):.3f}")
        )
    text = markdown_table((title, "steps/s (median)", "slowest to fastest", "seconds per iteration"), rows)
    facts = [("environments whose episode ended in a rollout", f"{results['episodes_ended']:.1%}")]
    facts += [
        (f"{name} an iteration", f"{seconds:.1f} s") for name, seconds in results["compile_seconds"].items()
    ]
    for name, x in results["start_seconds"].items():
        seconds = f"{x['first_iteration_logged']:.1f} s (of which compiling {x['compile']:.1f} s)"
        facts.append((f"start to first logged iteration, {name}", seconds))
    facts += [(f"peak memory, {name}", f"{x / 2**30:.2f} GiB") for name, x in results["memory"].items() if x]
    text += "\n" + markdown_table(("", ""), facts)
    rows = [(name[:80], f"{seconds:.4f}", calls) for name, seconds, calls in results["profile"][:15]]
    return text + ("\n" + markdown_table(("profile of an iteration", "s", "calls"), rows) if rows else "")


def main() -> None:
    """Measure; the processes first, since afterwards this one holds the GPU."""
    options = tyro.cli(Options)
    jax.config.update("jax_enable_compilation_cache", False)
    starts = measure_starts(options) if options.starts else {}
    args = trudi.resolve(options.training_args())
    trudi.check_args(args)
    setup = trudi.make_setup(args)
    keys = np.stack([jax.random.PRNGKey(args.seed + k) for k in range(args.num_seeds)])
    program, state, compile_seconds = compile_iteration(setup, keys)
    iteration, state = measure_iteration(program, state, options.repeats)
    device = setup.mesh.devices.flat[0]
    memory = peak_memory(device)
    parts, ended = measure_parts(setup, state, options.repeats)
    seconds = {**parts, "whole iteration": iteration}
    # after all else: the iteration takes the state
    profile = profiled(functools.partial(program, state))[:30] if options.profile else []
    steps = args.batch_size * args.num_seeds
    rates = {
        name: dict(median=steps / np.median(x), min=steps / max(x), max=steps / min(x))
        for name, x in seconds.items()
    }
    results = {
        "args": shown_args(args),
        "steps": steps,
        "steps_per_second": rates,
        "seconds": seconds,
        "episodes_ended": ended,
        "compile_seconds": compile_seconds,
        "start_seconds": starts,
        "memory": memory,
        "profile": profile,
        "matmul_precision": jax.config.jax_default_matmul_precision,
    }
    kind = re.sub(r"\W+", "_", device.device_kind.lower())
    path = pathlib.Path(options.output or RESULTS / f"throughput_{args.env_id}_{kind}.json")
    write_json(path, results)
    where = cpu_name() + f", {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    print(report(results, f"{args.env_id}, {args.impl}, {where}"))


if __name__ == "__main__":
    main()
