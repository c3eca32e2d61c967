"""What does `--impl mujoco` give? Control steps a second, beside MJX, in one run on the same machine.

    python -m benchmark.speed.mujoco_engine [--tasks G1JoystickRoughTerrain CheetahRun] [--num-envs 256]

For each task, in control steps a second:

* mj_step: MuJoCo's own function, called from a loop on one thread, on states that a rollout of random actions
  met, one after another;
* engine: the batch that `--impl mujoco` steps, on the same states, with one thread and with one for each core;
* env.step: the task as a compiled program steps it, with random actions and restarts (`trudi_mjx.env_step`);
* rollout: the same with the untrained policy and new states for the next episodes;
* iteration: rollout, targets and updates;

the last three for both simulators. `share` is the rollout's rate over cores times that of mj_step. Medians of
--repeats calls after one that is not counted. Results go to benchmark/results/mujoco_speed.json and .md.
"""

import dataclasses
import json
import time
from typing import Any

import jax
import mujoco
import numpy as np
import tyro

import trudi_mjx as trudi
from benchmark.markdown import markdown_table
from benchmark.measurements import RESULTS, cpu_name, measure, write_json
from benchmark.speed.rollout_and_update import act, compile_iteration, measure_iteration, simulate

CORES = trudi.num_cores()
MJX_HUMANOID_STEPS = 2  # of a rollout of the humanoids with MJX, which takes seconds a step


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure both simulators on a CPU."""

    tasks: tuple[str, ...] = (
        "G1JoystickRoughTerrain",
        "T1JoystickFlatTerrain",
        "CartpoleBalance",
        "CheetahRun",
        "HopperHop",
    )
    num_envs: int = 256
    num_steps: int = 32  # of a rollout with MuJoCo
    repeats: int = 5
    output: str = str(RESULTS / "mujoco_speed")  # results, without .json and .md


def make(env_id: str, impl: str, options: Options) -> trudi.Setup:
    """A task with the sizes of --preset cpu but for the environments and steps."""
    humanoid_mjx = impl == "jax" and env_id in trudi.HUMANOID
    num_steps = MJX_HUMANOID_STEPS if humanoid_mjx else options.num_steps
    sizes = dict(num_envs=options.num_envs, num_steps=num_steps, total_timesteps=10**6)
    args = trudi.resolve(trudi.Args(env_id=env_id, preset="cpu", impl=impl, device="cpu", **sizes))
    trudi.check_args(args)
    return trudi.make_setup(args)


def visited(setup: trudi.Setup, state: trudi.TrainState) -> dict[str, np.ndarray]:
    """Inputs of the engine, (T, E, .), at the states that a rollout of random actions meets."""
    shape = (setup.args.num_envs, setup.action_size)

    def step(env_state: trudi.EnvState, key: jax.Array) -> tuple[trudi.EnvState, dict[str, Any]]:
        env_state, _ = trudi.env_step(setup, env_state, jax.random.uniform(key, shape, minval=-1, maxval=1))
        return env_state, {name: getattr(env_state.sim.data, name) for name in trudi.MUJOCO_INPUTS}

    def play(state: trudi.TrainState) -> dict[str, Any]:
        return jax.lax.scan(step, state.env_state, jax.random.split(state.key, setup.args.num_steps))[1]

    one = jax.tree.map(lambda x: x[0], state)
    return jax.tree.map(np.asarray, jax.jit(play)(one))


def time_mj_step(setup: trudi.Setup, states: dict[str, np.ndarray], repeats: int) -> float:
    """Control steps a second of MuJoCo's own function on one thread."""
    model = setup.env.mj_model
    data = mujoco.MjData(model)
    met = states["time"].size
    flat = {name: x.reshape(met, *x.shape[2:]).astype(float) for name, x in states.items()}
    count = min(met, 2048)
    rates = []
    for _ in range(repeats):
        seconds = 0.0
        for i in range(count):
            put(data, {name: x[i] for name, x in flat.items()})
            began = time.perf_counter()
            mujoco.mj_step(model, data, setup.env.n_substeps)
            seconds += time.perf_counter() - began
        rates.append(count / seconds)
    return float(np.median(rates))


def put(data: mujoco.MjData, state: dict[str, np.ndarray]) -> None:
    """Write a state into MuJoCo's."""
    data.time = state["time"]
    for name in state.keys() - {"time"}:
        getattr(data, name)[:] = state[name]


def time_engine(setup: trudi.Setup, states: dict[str, np.ndarray], threads: int, repeats: int) -> float:
    """Control steps a second of the batch, copying into and out of it included."""
    engine = trudi.MujocoEngine(setup.env.mj_model, threads)
    data = jax.eval_shape(setup.env.reset, jax.random.PRNGKey(0)).data
    fields = {
        field.name: getattr(data, field.name) for field in dataclasses.fields(data) if field.name != "_impl"
    }
    rates = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        for t in range(len(states["time"])):
            engine.simulate(setup.env.n_substeps, fields, {name: x[t] for name, x in states.items()})
        rates.append(states["time"].size / (time.perf_counter() - began))
    return float(np.median(rates[1:]))


def time_script(setup: trudi.Setup, repeats: int) -> tuple[dict[str, float], trudi.TrainState]:
    """Control steps a second of env.step, a rollout and an iteration, and an untrained state."""
    keys = np.stack([jax.random.PRNGKey(setup.args.seed)])
    program, state, _ = compile_iteration(setup, keys)
    found = {}
    for name, function in (("env.step", simulate), ("rollout", act)):
        seconds = measure(jax.jit(trudi.over_seeds(setup, function)), (state,), repeats)
        found[name] = setup.args.batch_size / float(np.median(seconds))
    first = jax.tree.map(np.asarray, state)  # an iteration takes the state
    seconds, _ = measure_iteration(program, state, repeats)
    found["iteration"] = setup.args.batch_size / float(np.median(seconds))
    return found, first


def compare(env_id: str, options: Options) -> dict[str, Any]:
    """All rates of a task."""
    setup = make(env_id, "mujoco", options)
    found, state = time_script(setup, options.repeats)
    states = visited(setup, state)
    result = {"task": env_id, "mj_step": time_mj_step(setup, states, options.repeats)}
    for threads in sorted({1, CORES}):
        result[f"engine, threads: {threads}"] = time_engine(setup, states, threads, options.repeats)
    result["mujoco"] = found
    result["jax"], _ = time_script(make(env_id, "jax", options), max(1, options.repeats // 2))
    result["share"] = found["rollout"] / (CORES * result["mj_step"])
    return result


def as_markdown(results: list[dict[str, Any]]) -> str:
    """The table of all tasks."""
    rows = []
    for result in results:
        engine = [f"{result[f'engine, threads: {threads}']:,.0f}" for threads in sorted({1, CORES})]
        pairs = [f"{result['mujoco'][name]:,.0f} / {result['jax'][name]:,.0f}" for name in result["jax"]]
        ratio = result["mujoco"]["rollout"] / result["jax"]["rollout"]
        rows.append(
            (
                result["task"],
                f"{result['mj_step']:,.0f}",
                *engine,
                *pairs,
                f"{result['share']:.0%}",
                f"{ratio:.2f}",
            )
        )
    engines = [f"engine, {threads} thread{'s' * (threads > 1)}" for threads in sorted({1, CORES})]
    return markdown_table(
        (
            "task",
            "mj_step, 1 thread",
            *engines,
            "env.step, MuJoCo / MJX",
            "rollout",
            "iteration",
            "rollout's share",
            "rollout, MuJoCo to MJX",
        ),
        rows,
    )


def main() -> None:
    """Measure the tasks one after another, writing the results as they come."""
    options, results = tyro.cli(Options), []
    jax.config.update("jax_enable_compilation_cache", False)
    for env_id in options.tasks:
        results.append(compare(env_id, options))
        print(json.dumps(results[-1]), flush=True)
        shown = {name: value for name, value in vars(options).items() if name != "output"}
        write_json(
            RESULTS.parent / f"{options.output}.json", {"options": shown, "cores": CORES, "tasks": results}
        )
        where = f"{options.num_envs} environments, {CORES} cores of {cpu_name()}"
        text = as_markdown(results) + f"\nControl steps a second; {where}.\n"
        (RESULTS.parent / f"{options.output}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
