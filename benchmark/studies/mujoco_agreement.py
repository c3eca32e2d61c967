"""Does `--impl mujoco` compute what MJX computes? All tasks, the same random actions from the same states.

    python -m benchmark.studies.mujoco_agreement [--tasks CheetahRun WalkerRun]

For each task: the largest difference of observations and of rewards

* after one step: each of 50 steps is begun by both from the state that MJX had, so that nothing adds up;
* over 50 steps: each goes its own way, and whatever is chaotic in a task multiplies rounding errors;

of simulations whose episode has not ended (a robot that has fallen sinks into the floor, which its trunk does
not touch). They are compared as the task is, and if they do not agree within the tolerance, once more in full,
without what Playground spares MJX: with solvers that may iterate until they converge (100 iterations, 50 of the
line search) and with all contacts (some models have MJX keep the closest few, so that legs pass through each
other; MuJoCo keeps all).
A task agrees as it is; or in full, if return and length of episodes of random actions, as the task is, are within
three standard errors of their difference too; or in these statistics alone, where MJX keeps other contacts than
MuJoCo by itself: of a box on a plane only corners within a millimetre of the deepest (G1's feet), and on a
height field some of a foot's, where MuJoCo has one with each prism that it is in.
Results go to benchmark/results/mujoco_agreement.json and .md, where those of other tasks are kept; the exit code
is 1 if a task does not agree.
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import tyro
from mujoco import mjx

import trudi_mjx as trudi
from benchmark.markdown import markdown_table
from benchmark.measurements import RESULTS, cpu_name, write_json

STEPS = 50
TOLERANCE = 2e-3  # of observations relative to 1 + their size, and of rewards
EPISODE_STEPS = 100  # at most in an episode of the statistics
CONVERGED = dict(iterations=100, ls_iterations=50)
CONTACT_LIMITS = ("max_contact_points", "max_geom_pairs")  # MJX reads these of a model's custom numbers


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare --impl mujoco with MJX."""

    tasks: tuple[str, ...] = (*trudi.DMC, *trudi.HUMANOID)
    num_envs: int = 4  # simulations of the comparison step by step
    episodes: int = 64  # of the statistics
    output: str = str(RESULTS / "mujoco_agreement")  # results, without .json and .md


def compute_in_full(env: Any) -> None:
    """Let the solvers of an MjxEnv converge, and have MJX keep all contacts."""
    model = env.mj_model
    for name, value in CONVERGED.items():
        setattr(model.opt, name, value)
    for index in range(model.nnumeric):
        if model.numeric(index).name in CONTACT_LIMITS:
            model.numeric(index).data[:] = -1
    env._mjx_model = mjx.put_model(model, impl="jax")


def other_contacts(model: mujoco.MjModel) -> bool:
    """Whether a model has a height field or a box that may meet a plane, with which MJX finds other contacts."""
    box_on_plane = {mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX}
    pairs = zip(model.geom_type[model.pair_geom1], model.geom_type[model.pair_geom2], strict=True)
    return model.nhfield > 0 or any(set(pair) == box_on_plane for pair in pairs)


def make(env_id: str, impl: str, full: bool) -> trudi.Setup:
    """A task as it is, or in full."""
    args = trudi.resolve(trudi.Args(env_id=env_id, preset="cpu", impl="jax"))
    setup = trudi.make_setup(args)
    if full:
        compute_in_full(setup.env)
    if impl == "mujoco":
        trudi.use_mujoco(setup.env, args)
    return setup


def difference(one: Any, other: Any, counts: np.ndarray) -> float:
    """The largest of the simulations that count (N,), relative to 1 + size."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.max((np.abs(a - b) / (1 + np.abs(b)))[counts], initial=0)) for a, b in pairs)


def start(setup: trudi.Setup, num_envs: int) -> Any:
    """Playground's states after resets, the same for both simulators."""
    reset = jax.jit(lambda keys: trudi.over_envs(setup, setup.env.reset, keys))
    return reset(jax.random.split(jax.random.PRNGKey(0), num_envs))


def compare_steps(env_id: str, num_envs: int, full: bool) -> dict[str, float]:
    """Differences of observations and rewards, after one step and over all of them."""
    mujoco, other = (make(env_id, impl, full) for impl in ("mujoco", "jax"))
    step_mujoco, step_other = (jax.jit(jax.vmap(setup.env.step)) for setup in (mujoco, other))
    sim, truth = start(mujoco, num_envs), start(other, num_envs)
    alive = np.ones(num_envs, bool)
    found = {"reset": difference(sim.obs, truth.obs, alive)}
    for t in range(STEPS):
        shape = (num_envs, mujoco.action_size)
        action = jax.random.uniform(jax.random.PRNGKey(t), shape, minval=-1, maxval=1)
        beside = truth.replace(data=truth.data.replace(_impl=None))  # the state that MJX has
        beside = step_mujoco(beside, action)
        sim = step_mujoco(sim, action)
        truth = step_other(truth, action)
        both = itertools.product((("one step", beside), ("50 steps", sim)), ("obs", "reward"))
        for (name, mine), what in both:
            new = difference(getattr(mine, what), getattr(truth, what), alive)
            found[f"{name}, {what}"] = max(new, found.get(f"{name}, {what}", 0.0))
        alive &= np.asarray(truth.done) == 0
    return found


def episodes(setup: trudi.Setup, options: Options) -> dict[str, np.ndarray]:
    """Returns and lengths of episodes of random actions."""
    shape = (options.episodes, setup.action_size)

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
        sim, alive, total, length = carry
        sim = trudi.over_envs(setup, setup.env.step, sim, jax.random.uniform(key, shape, minval=-1, maxval=1))
        total = total + jnp.where(alive, sim.reward, 0)
        return (sim, alive & (sim.done == 0), total, length + alive), None

    first = (
        start(setup, options.episodes),
        jnp.ones(options.episodes, bool),
        jnp.zeros(options.episodes),
        jnp.zeros(options.episodes),
    )
    keys = jax.random.split(jax.random.PRNGKey(1), EPISODE_STEPS)
    (_, _, total, length), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))(first)
    return {"return": np.asarray(total), "length": np.asarray(length)}


def compare_episodes(env_id: str, options: Options) -> dict[str, list[float]]:
    """Mean and standard error of both simulators' returns and lengths, as the task is."""
    found = {}
    for impl in ("mujoco", "jax"):
        for name, x in episodes(make(env_id, impl, full=False), options).items():
            found[f"{name}, {impl}"] = [float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5)]
    return found


def agree(found: dict[str, list[float]], name: str) -> bool:
    """Whether two means differ by at most three standard errors of their difference."""
    (a, error_a), (b, error_b) = found[f"{name}, mujoco"], found[f"{name}, jax"]
    return abs(a - b) <= 3 * (error_a**2 + error_b**2) ** 0.5 + 1e-6


def within(found: dict[str, float]) -> bool:
    """Whether both go the same way, or would if no error added up."""
    return any(
        all(found[f"{name}, {what}"] <= TOLERANCE for what in ("obs", "reward"))
        for name in ("50 steps", "one step")
    )


def compare(env_id: str, options: Options) -> dict[str, Any]:
    """All of a task's comparisons, as far as they are needed."""
    result: dict[str, Any] = {"task": env_id, "commit": trudi.provenance()["git_commit"]}
    result["as it is"] = compare_steps(env_id, options.num_envs, full=False)
    if not within(result["as it is"]):
        result["in full"] = compare_steps(env_id, options.num_envs, full=True)
        result["episodes"] = compare_episodes(env_id, options)
        result["other contacts"] = other_contacts(make(env_id, "jax", full=False).env.mj_model)
    result["agrees"] = verdict(result)
    return result


def verdict(result: dict[str, Any]) -> str:
    """How far a task agrees: as it is, in full, in statistics, or no."""
    if within(result["as it is"]):
        return "as it is"
    if not all(agree(result["episodes"], name) for name in ("return", "length")):
        return "no"
    if within(result["in full"]):
        return "in full"
    return "in statistics" if result["other contacts"] else "no"


def as_markdown(results: list[dict[str, Any]]) -> str:
    """The table of all tasks."""
    rows = []
    for result in results:
        row = [result["task"]]
        for kind, name in itertools.product(("as it is", "in full"), ("one step", "50 steps")):
            both = [result.get(kind, {}).get(f"{name}, {what}") for what in ("obs", "reward")]
            row.append("" if both[0] is None else " / ".join(f"{x:.0e}" for x in both))
        for name in ("return", "length"):
            both = [result.get("episodes", {}).get(f"{name}, {impl}") for impl in ("mujoco", "jax")]
            row.append("" if both[0] is None else " and ".join(f"{x:.2f} ± {e:.2f}" for x, e in both))
        rows.append((*row, result["agrees"]))
    return markdown_table(
        (
            "task",
            "one step: observations / rewards",
            "50 steps",
            "one step, in full",
            "50 steps, in full",
            "return, MuJoCo and MJX",
            "length",
            "agrees",
        ),
        rows,
    )


def kept(path: pathlib.Path, tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    """The results of an earlier call, less those of the tasks to be compared now."""
    before = json.loads(path.read_text())["tasks"] if path.exists() else []
    return [result for result in before if result["task"] not in tasks]


def main() -> None:
    """Compare the tasks one after another, writing the results as they come."""
    options = tyro.cli(Options)
    data, page = (pathlib.Path(f"{options.output}.{kind}") for kind in ("json", "md"))
    shown = {name: value for name, value in vars(options).items() if name not in ("tasks", "output")}
    results = kept(data, options.tasks)
    for env_id in options.tasks:
        results.append(compare(env_id, options))
        print(json.dumps(results[-1]), flush=True)
        results.sort(key=lambda result: result["task"])
        write_json(data, {"options": shown, "tasks": results})
        page.write_text(
            as_markdown(results) + f"\nOn {cpu_name()}, {options.num_envs} simulations of each task.\n"
        )
    print(page.read_text())
    sys.exit(any(result["agrees"] == "no" for result in results))


if __name__ == "__main__":
    main()
