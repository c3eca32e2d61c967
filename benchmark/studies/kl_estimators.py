"""How good and how dear is the trust region's c(s)? Bias, spread, errors and time of its estimators.

    python -m benchmark.studies.kl_estimators RUN_DIR [--fresh-chains 1 2 4 8 16]

RUN_DIR is a folder that trudi_mjx.py wrote; of several seeds the first is taken. Its newest checkpoint is the
old policy; one more iteration of training, by the script's own functions and with the keys it would use next,
makes the new one. On states of that iteration's rollout, KL(old || new) of the trajectories is then estimated

* from the stored chain: `trajectory_kl` on the one chain that acted in that state, as trudi_mjx.py does. The
  updates were fitted to these chains, so it may be optimistic;
* from K fresh chains of the old policy, with the same closed form;
* from K fresh chains of the old policy, with the log-ratios of the paper's c(s):
  mean over the chains of sum_n log pi_old(a^{n-1} | a^n) / pi_theta(a^{n-1} | a^n).

The reference of every state is the closed form on many further chains (--reference-chains). Reported for each
estimator:

* bias: mean over states of (estimate - reference), with its standard error over the states. That of a mean of
  K chains does not depend on K, so all K are given the same chains to divide among them;
* spread: standard deviation of (estimate - reference) over states and repetitions, the reference's own noise
  taken off;
* misjudged: fraction of (state, repetition) pairs on the other side of epsilon than the reference, i.e. given
  the wrong loss;
* time: of c and its gradient on a minibatch, drawing the chains included where they are fresh.
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from jax.scipy.stats import norm
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.ticker import LogLocator, MaxNLocator

import trudi_mjx as trudi
from benchmark import figures
from benchmark.markdown import markdown_table
from benchmark.measurements import RESULTS, cpu_name, measure, write_json

KINDS = {"closed": "fresh chains, closed form", "ratio": "fresh chains, log-ratios"}
COLOURS = {"stored": figures.COLOURS[1], "closed": figures.COLOURS[0], "ratio": figures.COLOURS[2]}
STATES = 2048  # states of the rollout that are looked at, at most all
GROUPS = 4  # independent repetitions of the largest K; smaller ones have more


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare estimators of the trust region's KL on a trained policy."""

    run: tyro.conf.Positional[str]  # folder of a run, with args.json and checkpoints
    fresh_chains: tuple[int, ...] = (1, 2, 4, 8, 16)  # the numbers K of fresh chains
    reference_chains: int = 256  # fresh chains of the reference
    repeats: int = 20  # timed calls of each estimator
    seed: int = 0  # of the states and the fresh chains
    device: Literal["auto", "cpu", "gpu"] = "auto"  # where to run
    impl: Literal["jax", "warp", "mujoco"] | None = None  # another than the run's starts new episodes
    output: str = str(RESULTS / "kl_estimators")  # results, without .json, .md and .png


# ------------------------------------------------------------------------------------------- the two policies
def load(options: Options) -> tuple[trudi.Setup, trudi.TrainState, bool]:
    """A run's setup, a seed's state from its newest checkpoint, and whether episodes had to start anew."""
    saved = trudi.read_args(options.run)
    arrays = trudi.read_checkpoint(options.run)["state"]
    impl = options.impl or saved.impl
    args = dataclasses.replace(saved, device=options.device, num_devices=1, impl=impl)
    setup = trudi.make_setup(trudi.resolve(args))
    keys = np.stack([jax.random.PRNGKey(saved.seed + k) for k in range(saved.num_seeds)])
    abstract = jax.eval_shape(trudi.over_seeds(setup, trudi.init_state), keys)
    restarted = impl != saved.impl
    if restarted:  # the simulators' states are not interchangeable
        abstract = abstract._replace(env_state=None)
        arrays = {name: x for name, x in arrays.items() if not name.startswith("env_state.")}
    state = jax.tree.map(lambda x: x[0], trudi.fill_state(abstract, arrays))
    state = jax.device_put(state, NamedSharding(setup.mesh, PartitionSpec()))
    if restarted:
        reset = jax.jit(functools.partial(trudi.env_reset, setup))
        state = state._replace(env_state=reset(keys[0]))
    return setup, state, restarted


def one_iteration(setup: trudi.Setup, state: trudi.TrainState) -> tuple[trudi.Learner, trudi.Batch]:
    """`iterate` up to its updates, with the keys that it would use: what it learned, and from what data."""
    rollout_key, target_key, epochs_key, _, _ = jax.random.split(state.key, 5)
    old, statistics = state.learner, state.statistics
    _, data = trudi.rollout(setup, old.actor, statistics, state.env_state, rollout_key)
    inputs = trudi.network_inputs(trudi.normalize(statistics, data.observation))
    next_inputs = trudi.network_inputs(trudi.normalize(statistics, data.next_observation))
    target = trudi.critic_targets(setup, old, data, next_inputs, target_key)
    batch = trudi.Batch(inputs.actor, inputs.critic, data.action, data.trajectory, target)
    batch = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), batch)
    return trudi.update_epochs(setup, old, batch, epochs_key)[0], batch


# ------------------------------------------------------------------------------------------------- estimators
class OldChain(NamedTuple):
    """A chain of the old policy in B states."""

    trajectory: trudi.Trajectory
    samples: jax.Array  # (B, N, A), a^0 ... a^(N-1), drawn around the trajectory's means


def old_chain(old: trudi.Actor, observation: jax.Array, key: jax.Array) -> OldChain:
    """A fresh chain of the old policy at normalised observations (B, .)."""
    noise = jax.random.normal(key, (old.num_steps + 1, len(observation), len(old.raw_friction[...])))
    trajectory = trudi.sample_chain(old, observation, noise, unroll=True).trajectory
    samples = trajectory.means + jnp.sqrt(2 * old.step_sizes()) * jnp.moveaxis(noise[:-1], 0, 1)
    return OldChain(trajectory, samples)


def closed_form(new: trudi.Actor, old: trudi.Actor, observation: jax.Array, chain: Any) -> jax.Array:
    """The script's estimate (B,) on a chain of the old policy."""
    return trudi.trajectory_kl(new, old, observation, chain.trajectory)


def log_ratio(new: trudi.Actor, old: trudi.Actor, observation: jax.Array, chain: OldChain) -> jax.Array:
    """The paper's estimate (B,) on a chain of the old policy:
    sum_n log pi_old(a^{n-1} | a^n) / pi_theta(a^{n-1} | a^n)."""
    observation_part, time_part = new.embed(observation)
    latents, old_means = chain.trajectory
    h = new.step_sizes()
    means = latents + h * (new(observation_part[:, None], time_part, latents) - latents / new.prior_std**2)
    old_log_prob = norm.logpdf(chain.samples, old_means, jnp.sqrt(2 * old.step_sizes()))
    return (old_log_prob - norm.logpdf(chain.samples, means, jnp.sqrt(2 * h))).sum((-2, -1))


ESTIMATE = {"closed": closed_form, "ratio": log_ratio}


def fresh_estimates(
    old: trudi.Actor, new: trudi.Actor, observation: jax.Array, keys: jax.Array
) -> dict[str, jax.Array]:
    """Both fresh estimates of every state on each of several chains, (chains, B)."""

    def estimates(key: jax.Array) -> dict[str, jax.Array]:
        chain = old_chain(old, observation, key)
        return {kind: estimate(new, old, observation, chain) for kind, estimate in ESTIMATE.items()}

    return jax.lax.map(estimates, keys)


def judge(estimates: np.ndarray, reference: np.ndarray, epsilon: float) -> dict[str, float]:
    """Bias, spread and misjudged fraction of estimates (repetitions, B), by the reference's (chains, B)."""
    truth, noise = reference.mean(0), reference.var(0, ddof=1).mean() / len(reference)
    error = estimates - truth
    return {
        "mean": float(estimates.mean()),
        "bias": float(error.mean()),
        "bias_standard_error": float(error.mean(0).std(ddof=1) / np.sqrt(len(truth))),
        "spread": float(np.sqrt(max(error.var() - noise, 0.0))),
        "misjudged": float(((estimates <= epsilon) != (truth <= epsilon)).mean()),
    }


# ------------------------------------------------------------------------------------------------------- time
def gradient_programs(numbers: tuple[int, ...]) -> dict[tuple[str, int], Callable]:
    """For each estimator a compiled function of (new and old actor, minibatch, key): mean c and gradient."""

    def stored(new: trudi.Actor, old: trudi.Actor, batch: trudi.Batch, key: jax.Array) -> jax.Array:
        return closed_form(new, old, batch.actor_observation, batch)

    def fresh(
        new: trudi.Actor, old: trudi.Actor, batch: trudi.Batch, key: jax.Array, kind: str, k: int
    ) -> jax.Array:
        observation = batch.actor_observation
        chains = jax.vmap(lambda key: old_chain(old, observation, key))(jax.random.split(key, k))
        estimate = functools.partial(ESTIMATE[kind], new, old, observation)
        return jax.vmap(estimate)(chains).mean(0)

    def compiled(c: Callable) -> Callable:
        def mean_c(new: Any, old: Any, batch: trudi.Batch, key: jax.Array) -> jax.Array:
            return c(new, old, batch, key).mean()

        return jax.jit(jax.value_and_grad(mean_c))

    return {("stored", 1): compiled(stored)} | {
        (kind, k): compiled(functools.partial(fresh, kind=kind, k=k)) for kind in KINDS for k in numbers
    }


def time_all(
    setup: trudi.Setup, old: trudi.Learner, new: trudi.Learner, batch: trudi.Batch, options: Options
) -> tuple[dict[tuple[str, int], list[float]], list[float]]:
    """Seconds of c and its gradient on a minibatch for each estimator, and of a whole gradient step."""
    batch = jax.tree.map(lambda x: x[: setup.args.minibatch_size], batch)
    key = jax.random.PRNGKey(options.seed)
    programs = gradient_programs(options.fresh_chains)
    seconds = {name: [] for name in programs}
    for _ in range(options.repeats):  # in turn, so that a busy machine is unfair to none
        for name, program in programs.items():
            seconds[name] += measure(program, (new.actor, old.actor, batch, key), 1)
    step = jax.jit(functools.partial(trudi.update_minibatch, setup))
    return seconds, measure(step, (new, old.actor, batch, key), options.repeats)


# ---------------------------------------------------------------------------------------------------- results
def compare(
    setup: trudi.Setup, state: trudi.TrainState, options: Options
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the estimators were compared on, and one row of results for each of them."""
    old, args = state.learner, setup.args
    new, batch = jax.jit(functools.partial(one_iteration, setup))(state)
    state_key, chain_key = jax.random.split(jax.random.PRNGKey(options.seed))
    index = jax.random.permutation(state_key, args.batch_size)[:STATES]
    picked, epsilon = jax.tree.map(lambda x: x[index], batch), args.trust_region_bound
    pool = GROUPS * max(options.fresh_chains)
    keys = jax.random.split(chain_key, options.reference_chains + pool)
    chains = jax.jit(fresh_estimates)(old.actor, new.actor, picked.actor_observation, keys)
    chains = {kind: np.asarray(x, np.float64) for kind, x in chains.items()}
    reference = chains["closed"][: options.reference_chains]

    stored = closed_form(new.actor, old.actor, picked.actor_observation, picked)
    estimates = {("stored", 1): np.asarray(stored, np.float64)[None]}
    for kind in KINDS:
        for k in options.fresh_chains:
            used = chains[kind][options.reference_chains :][: pool // k * k]
            estimates[kind, k] = used.reshape(-1, k, used.shape[-1]).mean(1)

    seconds, whole = time_all(setup, old, new, batch, options)
    rows = [
        {"estimator": kind, "chains": k, **judge(x, reference, epsilon), "seconds": seconds[kind, k]}
        for (kind, k), x in estimates.items()
    ]
    truth = reference.mean(0)
    about = {
        "env_id": args.env_id,
        "iteration": int(state.iteration),
        "states": len(truth),
        "epsilon": epsilon,
        "minibatch_size": args.minibatch_size,
        "hidden_dim": args.hidden_dim,
        "actor_learning_rate": args.actor_learning_rate,
        "action_size": setup.action_size,
        "reference_chains": options.reference_chains,
        "reference_mean": float(truth.mean()),
        "reference_above_epsilon": float((truth > epsilon).mean()),
        "gradient_step_seconds": whole,
    }
    return about, rows


def name_of(row: dict[str, Any]) -> str:
    """An estimator's name in tables."""
    if row["estimator"] == "stored":
        return "stored chain"
    return f"{KINDS[row['estimator']]}, K = {row['chains']}"


def as_markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The results for a reader."""
    lines = [
        (
            name_of(row),
            f"{row['bias']:+.2g} ± {row['bias_standard_error']:.1g}",
            f"{row['spread']:.3g}",
            f"{100 * row['misjudged']:.1f}%",
            f"{1e3 * np.median(row['seconds']):.2f}",
        )
        for row in rows
    ]
    header = (
        "estimator of c(s)",
        "bias (nats)",
        "spread per state (nats)",
        "misjudged states",
        "ms per minibatch",
    )
    mean, above = about["reference_mean"], 100 * about["reference_above_epsilon"]
    return markdown_table(header, lines) + (
        f"\n{about['env_id']} after {about['iteration']} iterations, {about['action_size']} action "
        f"dimensions, hidden width {about['hidden_dim']}, learning rate {about['actor_learning_rate']:.2g}; "
        f"{about['states']} states, true mean KL {mean:.3g} nats, {above:.1f}% of the states above epsilon = "
        f"{about['epsilon']} (reference: {about['reference_chains']} fresh chains each). Minibatches of "
        f"{about['minibatch_size']}; the time is the median for c and its gradient. A whole gradient step of "
        "training, with its own c, takes "
        f"{1e3 * np.median(about['gradient_step_seconds']):.2f} ms.\n"
    )


def draw(about: dict[str, Any], rows: list[dict[str, Any]], path: str) -> None:
    """Spread against time, and bias, of all estimators."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    for kind in COLOURS:
        own = [row for row in rows if row["estimator"] == kind]
        x, y = [1e3 * np.median(row["seconds"]) for row in own], [row["spread"] for row in own]
        marker, size, label = ("*", 15, "stored chain") if kind == "stored" else ("o-", 5, KINDS[kind])
        left.plot(x, y, marker, color=COLOURS[kind], markersize=size, label=label, zorder=3)
        for row, a, b in zip(own, x, y, strict=True):
            text = "" if kind == "stored" else f"K = {row['chains']}" if row is own[0] else str(row["chains"])
            left.annotate(text, (a, b), (5, 4), textcoords="offset points", color=COLOURS[kind], fontsize=9)
    left.set(yscale="log", xlabel="c and its gradient on a minibatch (ms)", ylabel="spread per state (nats)")
    left.set_xlim(0, 1.12 * max(1e3 * np.median(row["seconds"]) for row in rows))
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.minorticks_off()
    left.legend(frameon=False, fontsize=9)
    # the bias is the same for every K
    first = [next(row for row in rows if row["estimator"] == kind) for kind in COLOURS]
    bias = [row["bias"] for row in first]
    height, colours = np.arange(len(first))[::-1], list(COLOURS.values())
    right.axvline(0, color="0.8", linewidth=1)
    right.errorbar(
        bias,
        height,
        xerr=[2 * row["bias_standard_error"] for row in first],
        fmt="none",
        ecolor=colours,
        elinewidth=2,
    )
    right.scatter(bias, height, color=colours, s=30, zorder=3)
    right.set_yticks(height, ["stored chain", *KINDS.values()], fontsize=9)
    right.xaxis.set_major_locator(MaxNLocator(4))
    right.set_ylim(-0.6, len(first) - 0.4)
    right.set(xlabel="bias ± 2 standard errors (nats)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Estimators of the trust region's KL, {about['env_id']}, true mean "
        f"{about['reference_mean']:.2g} nats",
        fontsize=11,
    )
    figure.savefig(path, dpi=200)


def main() -> None:
    """Measure, and write the three files."""
    options = tyro.cli(Options)
    logging.getLogger("absl").setLevel(logging.ERROR)
    setup, state, restarted = load(options)
    about, rows = compare(setup, state, options)
    about["episodes_started_anew"] = restarted
    write_json(pathlib.Path(options.output + ".json"), {"about": about, "estimators": rows})
    text = as_markdown(about, rows) + f"Measured on {jax.local_devices()[0].device_kind} ({cpu_name()}).\n"
    pathlib.Path(options.output + ".md").write_text(text)
    draw(about, rows, options.output + ".png")
    print(text)


if __name__ == "__main__":
    main()
