"""Which of the goals do trained policies go to? Episodes from the place between them, and a picture of the paths.

    python -m benchmark.studies.two_goals.paths RUN ... --output benchmark/results/two_goals

RUN are folders of runs on benchmark.studies.two_goals's tasks, of trudi_mjx.py or a baseline. Each run's newest checkpoint
plays --episodes episodes by its deterministic --eval-mode (of a diffusion policy, whose noise a^N differs, with c = 1
and 0.5) and by samples. An episode has found the goal that it ends within 0.2 of. For each are printed the
return, the share that found one, and the entropy of which one it was, to the base of their number: 1 if all are
found equally often, 0 if but one is. Beside it stands what the critic makes of the goals, which pay alike: how far its
values of a step to each lie apart, over alpha. A policy that follows exp(Q / alpha) has the odds of the two goals at e
to this many nats.

Results go to OUTPUT.json and .md; OUTPUT.png has the paths of each task and algorithm, a colour for each seed.
"""

import dataclasses
import importlib
import itertools
import json
import math
import pathlib
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro

from benchmark.figures import COLOURS
from benchmark.markdown import markdown_table
from benchmark.measurements import RESULTS, write_json

FOUND = 0.2  # distance from a goal


@dataclasses.dataclass(frozen=True)
class Options:
    """Play trained policies from the place between the goals."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # their folders
    episodes: int = 200
    seed: int = 0  # of the policies' noise
    output: str = str(RESULTS / "two_goals")  # results, without .json, .md and .png


def load(run: str) -> tuple[Any, Any, Any]:
    """The script of a run, its setup and the training state of its newest checkpoint (K, ...)."""
    name = json.loads(pathlib.Path(run, "args.json").read_text())["script"]
    script = importlib.import_module(name if name == "trudi_mjx" else f"benchmark.baselines.{name}")
    args = dataclasses.replace(script.read_args(run), device="cpu")
    setup = script.make_setup(script.resolve(args))
    state, _ = script.prepare(setup, script.read_checkpoint(run))
    return script, setup, state


def ways_to_act(script: Any) -> dict[str, dict[str, Any]]:
    """Names and arguments: of a diffusion policy the ODE with both of the paper's c, and samples."""
    fixed, sampled = script.Args.__annotations__["eval_mode"].__args__[:2]
    if fixed != "ode":
        return {mode: dict(eval_mode=mode) for mode in (fixed, sampled)}
    ways = {f"ode, c = {c}": dict(eval_mode="ode", ode_score_scale=c) for c in (1.0, 0.5)}
    return ways | {sampled: dict(eval_mode=sampled)}


def play(
    script: Any, setup: Any, state: Any, way: dict[str, Any], options: Options
) -> tuple[np.ndarray, np.ndarray]:
    """Places (T, episodes, 2) and rewards (T, episodes) of episodes of a state's first seed."""
    setup = setup._replace(args=dataclasses.replace(setup.args, **way))
    learner, statistics = jax.tree.map(lambda x: x[0], (state.learner, state.statistics))
    key = jax.random.PRNGKey(options.seed)
    sim = jax.vmap(setup.env.reset)(jax.random.split(key, options.episodes))
    sim = sim.replace(obs=0 * sim.obs)

    def step(sim: Any, key: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        inputs = script.network_inputs(script.normalize(statistics, sim.obs))
        action = script.evaluation_action(setup, learner, inputs, key)
        sim = jax.vmap(setup.env.step)(sim, action.clip(-script.ACTION_LIMIT, script.ACTION_LIMIT))
        return sim, (sim.obs, sim.reward)

    keys = jax.random.split(key, setup.time_limit)
    places, rewards = jax.jit(lambda sim: jax.lax.scan(step, sim, keys))(sim)[1]
    return np.asarray(places), np.asarray(rewards)


def found_goals(places: np.ndarray, goals: np.ndarray) -> list[int]:
    """How many episodes end at each of the goals (G, 2), by their places (T, E, 2)."""
    distance = np.linalg.norm(places[-1][:, None] - goals, axis=-1)
    nearest = distance.argmin(1)[distance.min(1) < FOUND]
    return np.bincount(nearest, minlength=len(goals)).tolist()


def behaviour_entropy(counts: list[int]) -> float:
    """Of which goal was found, to the base of their number; NaN if none ever was."""
    share = np.array(counts) / max(sum(counts), 1)
    if not share.any():
        return math.nan
    share = share[share > 0]
    return float(-(share * np.log(share)).sum() / math.log(len(counts))) + 0.0


def preference(script: Any, setup: Any, state: Any) -> float:
    """Nats between the best and the worst goal in exp(Q / alpha), of steps to each from the middle; NaN of a
    critic that does not see actions."""
    if not hasattr(script, "q_value"):
        return math.nan
    learner, statistics = jax.tree.map(lambda x: x[0], (state.learner, state.statistics))
    goals = setup.env.goals
    action = script.ACTION_LIMIT * goals / np.abs(goals).max()
    observed = script.normalize(statistics, np.zeros_like(goals))
    q = script.q_value(setup.args, learner.critic(observed, action))
    return float((q.max() - q.min()) / np.exp(learner.duals["log_alpha"]))


def measure(run: str, options: Options) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """A row for each way of acting, and its places."""
    script, setup, state = load(run)
    goals = np.asarray(setup.env.goals)
    nats = preference(script, setup, state)
    rows, paths = [], {}
    for name, way in ways_to_act(script).items():
        places, rewards = play(script, setup, state, way, options)
        counts = found_goals(places, goals)
        rows.append(
            {
                "task": setup.args.env_id.rpartition(":")[2],
                "algorithm": setup.args.exp_name,
                "seed": setup.args.seed,
                "acts": name,
                "return": float(rewards.sum(0).mean()),
                "found": sum(counts) / options.episodes,
                "goals": counts,
                "entropy": behaviour_entropy(counts),
                "critic_prefers": nats,
            }
        )
        paths[name] = places
    return rows, {"goals": goals, **paths}


def as_markdown(table: pd.DataFrame) -> str:
    """Means over the seeds, and each seed's entropy."""
    rows = []
    for names, group in table.groupby(["task", "algorithm", "acts"], sort=False):
        means = [f"{group[name].mean():.2f}" for name in ("return", "found", "entropy")]
        entropies, nats = (
            ", ".join(f"{x:.2f}" for x in group[name]) for name in ("entropy", "critic_prefers")
        )
        rows.append((*names, str(len(group)), *means, entropies, nats))
    header = (
        "task",
        "algorithm",
        "acts by",
        "seeds",
        "return",
        "found a goal",
        "entropy",
        "by seed",
        "critic prefers one (nats)",
    )
    return markdown_table(header, rows)


def draw_paths(panel: plt.Axes, seeds: list[dict[str, np.ndarray]], way: str) -> None:
    """The paths of one way of acting, a colour for each seed, and the goals."""
    panel.axis("on")
    for found, colour in zip(seeds, itertools.cycle(COLOURS), strict=False):
        centre = np.zeros((1, *found[way].shape[1:]))
        across, up = np.concatenate([centre, found[way]]).transpose(2, 0, 1)
        panel.plot(across, up, color=colour, alpha=0.15, linewidth=0.6)
    panel.plot(*seeds[0]["goals"].T, "o", color="black")
    panel.set(xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[], aspect="equal")


def draw(
    table: pd.DataFrame, paths: dict[tuple[str, str], list[dict[str, np.ndarray]]], path: pathlib.Path
) -> None:
    """The paths of each task and algorithm (columns), all seeds, its ways of acting one above the other."""
    tasks, algorithms = (list(dict.fromkeys(table[name])) for name in ("task", "algorithm"))
    most = max(len(seeds[0]) for seeds in paths.values()) - 1  # ways of acting
    shape = (most * len(tasks), len(algorithms))
    figure, axes = plt.subplots(*shape, figsize=(2.2 * shape[1], 2.2 * shape[0]), squeeze=False)
    for panel in axes.flat:
        panel.axis("off")
    for (task, algorithm), seeds in paths.items():
        first = most * tasks.index(task)
        for row, way in enumerate(name for name in seeds[0] if name != "goals"):
            panel = axes[first + row, algorithms.index(algorithm)]
            draw_paths(panel, seeds, way)
            panel.set_title(f"{task}: {algorithm}\n{way}", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Play, and write table and picture."""
    options = tyro.cli(Options)
    rows: list[dict[str, Any]] = []
    paths: dict[tuple[str, str], list[dict[str, np.ndarray]]] = {}
    for run in options.runs:
        own, found = measure(run, options)
        rows += own
        paths.setdefault((own[0]["task"], own[0]["algorithm"]), []).append(found)
    table = pd.DataFrame(rows)
    output = pathlib.Path(options.output)
    write_json(output.with_suffix(".json"), {"episodes": options.episodes, "rows": rows})
    text = as_markdown(table)
    output.with_suffix(".md").write_text(text)
    print(text)
    draw(table, paths, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
