"""How long does an iteration of TruDi take beside one of REPPO at equal sizes, where does the time go, and
what did each way to save some of it buy?

    python -m benchmark.speed.iteration --env-id CartpoleBalance --preset cpu --hidden-dims 64 256

Any flag of trudi_mjx.py may follow.

Both are programs of one process, timed in turn, so that a disturbance of the machine meets both; ratios are
medians of the rounds' ratios, times medians. The parts are the simulator alone (random actions), the rollout,
the critic's targets, `update` (targets, all epochs of minibatches, and the check of the KL) and the whole
iteration; each is compiled by itself. Then the same `update` of TruDi with one way to save time undone,
everything else as it is:

* the whole first layer at every denoising step, instead of its observation part once for a chain;
* the chain as a loop in the loss, instead of unrolled;
* the KL one denoising step after the other, instead of all steps in one batch;
* the old chains drawn again for the KL, instead of those of the rollout, which is unbiased but another
  sequential chain;
* an axis of one in front of everything in the epochs, as that of a single seed would be under vmap.

All but the old chains' compute the same, which is checked. With --whole only the two whole iterations are compiled
and timed, where the rest takes minutes to compile, and it is printed what takes the device's time in each.
Results go to benchmark/results/iteration_time_{env}_{device}.json.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import trudi_mjx as trudi
from benchmark.baselines import reppo_mjx as reppo
from benchmark.markdown import markdown_table
from benchmark.measurements import RESULTS, cpu_name, measure_in_turn, write_json
from benchmark.speed.flags import Sizes, shown_args
from benchmark.speed.rollout_and_update import profiled, simulate


@dataclasses.dataclass(frozen=True)
class Options(Sizes):
    """Time iterations of TruDi and REPPO with these flags of trudi_mjx.py."""

    hidden_dims: tuple[int, ...] = (64, 256)  # widths of actor and critic, in place of --hidden-dim
    repeats: int = 5  # timed rounds
    whole: bool = False  # time only whole iterations, and profile them
    output: str | None = None  # the JSON file; default: named after task and device


# ------------------------------------------------------------------------------------------------ ways undone
def embed_inputs(self: trudi.Actor, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In place of Actor.embed: what the first layer takes, itself."""
    angle = jnp.arange(1, self.num_steps + 1)[:, None] * 10000.0 ** -jnp.arange(0, 1, 2 / trudi.TIME_FEATURES)
    hidden = trudi.nnx.gelu(self.time_mlp[0](jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)))
    return observation, self.time_mlp[1](hidden)


def call_whole(
    self: trudi.Actor, observation: jax.Array, features: jax.Array, latent: jax.Array
) -> jax.Array:
    """In place of Actor.__call__: the whole first layer at every latent."""
    parts = (jnp.broadcast_to(x, (*latent.shape[:-1], x.shape[-1])) for x in (observation, latent, features))
    x = self.input(jnp.concatenate(list(parts), -1))
    for norm, hidden in zip(self.norms, self.hidden, strict=True):
        x = x + trudi.nnx.gelu(hidden(norm(x)))
    return self.output(x)


def kl_in_turn(
    actor: trudi.Actor, old_actor: trudi.Actor, observation: jax.Array, trajectory: trudi.Trajectory
) -> jax.Array:
    """In place of trajectory_kl: one denoising step after the other."""
    observation_part, time_part = actor.embed(observation)
    variance = actor.prior_std**2

    def step(total: jax.Array, now: tuple) -> tuple[jax.Array, None]:
        h, old_h, time_n, latent, mean = now
        new_mean = latent + h * (actor(observation_part, time_n, latent) - latent / variance)
        kl = 0.5 * (old_h / h - 1 - jnp.log(old_h / h) + (mean - new_mean) ** 2 / (2 * h))
        return total + kl.sum(-1), None

    chains = (jnp.moveaxis(x, 1, 0) for x in trajectory)
    steps = (actor.step_sizes(), old_actor.step_sizes(), time_part, *chains)
    return jax.lax.scan(step, jnp.zeros(len(observation)), steps)[0]


def kl_of_new_chains(
    actor: trudi.Actor, old_actor: trudi.Actor, observation: jax.Array, trajectory: trudi.Trajectory
) -> jax.Array:
    """In place of trajectory_kl: on chains of the old actor that are drawn again."""
    latents = trajectory.latents
    key = jax.random.PRNGKey(latents[0, 0, 0].astype(int))  # not known when this is compiled
    noise = jax.random.normal(key, (latents.shape[1] + 1, len(latents), latents.shape[2]))
    chain = jax.lax.stop_gradient(trudi.sample_chain(old_actor, observation, noise))
    return TRAJECTORY_KL(actor, old_actor, observation, chain.trajectory)


def chain_as_loop(
    actor: trudi.Actor, observation: jax.Array, noise: jax.Array, unroll: bool = False
) -> trudi.Chain:
    """In place of sample_chain: never unrolled."""
    return SAMPLE_CHAIN(actor, observation, noise)


def epochs_of_one_seed(
    setup: trudi.Setup, learner: trudi.Learner, data: trudi.Batch, key: jax.Array
) -> tuple[trudi.Learner, trudi.Metrics]:
    """In place of update_epochs: with an axis of one in front."""
    inputs = jax.tree.map(lambda x: x[None], (learner, data, key))
    result = jax.vmap(functools.partial(UPDATE_EPOCHS, setup))(*inputs)
    return jax.tree.map(lambda x: x[0], result)


TRAJECTORY_KL, SAMPLE_CHAIN = trudi.trajectory_kl, trudi.sample_chain
UPDATE_EPOCHS = trudi.update_epochs
UNDONE: dict[str, tuple[tuple[Any, str, Callable], ...]] = {
    "as it is": (),
    "whole first layer at every step": (
        (trudi.Actor, "embed", embed_inputs),
        (trudi.Actor, "__call__", call_whole),
    ),
    "chain as a loop in the loss": ((trudi, "sample_chain", chain_as_loop),),
    "KL one step after the other": ((trudi, "trajectory_kl", kl_in_turn),),
    "old chains drawn again": ((trudi, "trajectory_kl", kl_of_new_chains),),
    "an axis of one in front": ((trudi, "update_epochs", epochs_of_one_seed),),
}


@contextlib.contextmanager
def undone(name: str) -> Iterator[None]:
    """Within it, TruDi's losses are traced without one way to save time."""
    with contextlib.ExitStack() as stack:
        for place, attribute, replacement in UNDONE[name]:
            stack.enter_context(mock.patch.object(place, attribute, replacement))
        yield


# ----------------------------------------------------------------------------------------------------- timing
def make(script: Any, options: Options, width: int) -> tuple[Any, Any]:
    """A script's setup and initial state with these flags, as far as it has them."""
    given = options.training_args(hidden_dim=width)
    own = {name: getattr(given, name) for name in vars(given) if name in script.Args.__annotations__}
    for name in ("exp_name", "eval_mode", "target_entropy_scale"):
        own[name] = script.Args.__dataclass_fields__[name].default
    setup = script.make_setup(script.resolve(script.Args(**own)))
    options = {"xla_backend_optimization_level": 0}  # it runs only once
    init = jax.jit(functools.partial(script.init_state, setup), compiler_options=options)
    return setup, init(jax.random.PRNGKey(given.seed))


def inputs_of(script: Any, state: Any, observation: Any) -> Any:
    """Normalised observations as both networks see them, as `iterate` has them."""
    return script.network_inputs(script.normalize(state.statistics, observation))


def update(script: Any, setup: Any, state: Any, data: Any) -> tuple:
    """All that an iteration learns from a rollout; returns networks and metrics."""
    inputs = inputs_of(script, state, data.observation)
    next_inputs = inputs_of(script, state, data.next_observation)
    keys = list(jax.random.split(state.key, 3))
    return script.update(setup, state.learner, data, inputs, next_inputs, keys)


def targets(script: Any, setup: Any, state: Any, data: Any) -> jax.Array:
    """The critic's targets of a rollout."""
    next_inputs = inputs_of(script, state, data.next_observation)
    return script.critic_targets(setup, state.learner, data, next_inputs, state.key)


def rollout(script: Any, setup: Any, state: Any) -> Any:
    """A rollout's transitions."""
    return script.rollout(setup, state.learner.actor, state.statistics, state.env_state, state.key)[1]


def parts_of(name: str, script: Any, options: Options, width: int) -> dict[str, Callable[[], Any]]:
    """Calls of a script's compiled parts, on the same rollout."""
    setup, state = make(script, options, width)
    functions = {"rollout": rollout, "targets": targets, "update": update}
    programs = {part: jax.jit(functools.partial(f, script, setup)) for part, f in functions.items()}
    data = programs["rollout"](state)
    iteration = jax.jit(functools.partial(script.iterate, setup))
    calls = {
        f"{name}, rollout": functools.partial(programs["rollout"], state),
        f"{name}, targets": functools.partial(programs["targets"], state, data),
        f"{name}, update": functools.partial(programs["update"], state, data),
        f"{name}, iteration": functools.partial(iteration, state),
    }
    if script is trudi:
        calls["simulator alone"] = functools.partial(jax.jit(functools.partial(simulate, setup)), state)
        for way in UNDONE:
            calls[f"update, {way}"] = functools.partial(traced_without(way, setup), state, data)
    return calls


def iteration_of(script: Any, options: Options, width: int) -> Callable[[], Any]:
    """A call of a script's compiled iteration, on its initial state."""
    setup, state = make(script, options, width)
    return functools.partial(jax.jit(functools.partial(script.iterate, setup)), state)


def traced_without(way: str, setup: Any) -> Callable:
    """`update` of TruDi without one way to save time, which is a program of its own."""

    def run(state: Any, data: Any) -> tuple:
        with undone(way):
            return update(trudi, setup, state, data)

    return jax.jit(run)


def check_equal(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """How far the loss is from that of `as it is`, relatively; ends with an error if a way matters that
    should not."""
    losses = {name: float(calls[f"update, {name}"]()[1]["losses/actor"]) for name in UNDONE}
    apart = {name: abs(loss / losses["as it is"] - 1) for name, loss in losses.items()}
    for name, difference in apart.items():
        if difference > 1e-3 and "drawn again" not in name:  # rounding made 1e-7 of it on a CPU
            sys.exit(f"{name}: the loss is {losses[name]}, but {losses['as it is']} as it is")
    return apart


# ---------------------------------------------------------------------------------------------------- results
def report(width: int, seconds: dict[str, list[float]], where: str) -> str:
    """The times at one width as Markdown, beside REPPO's or beside those of `as it is`."""
    medians = {name: float(np.median(x)) for name, x in seconds.items()}

    def ratio(name: str, other: str) -> str:
        return f"{np.median(np.divide(seconds[name], seconds[other])):.2f}"

    parts = ("rollout", "targets", "update", "iteration")
    rows = [
        (
            part,
            *(f"{medians[f'{name}, {part}']:.3f}" for name in ("TruDi", "REPPO")),
            ratio(f"TruDi, {part}", f"REPPO, {part}"),
        )
        for part in parts
    ]
    rows.insert(0, ("simulator alone", *[f"{medians['simulator alone']:.3f}"] * 2, ""))
    ways = [
        (name, f"{medians[f'update, {name}']:.3f}", ratio(f"update, {name}", "update, as it is"))
        for name in UNDONE
    ]
    return (
        markdown_table((f"width {width}, {where}", "TruDi, s", "REPPO, s", "ratio"), rows)
        + "\n"
        + markdown_table((f"TruDi's update, width {width}", "s", "to as it is"), ways)
    )


def report_whole(
    width: int,
    seconds: dict[str, list[float]],
    profiles: dict[str, list[tuple[str, float, int]]],
    where: str,
) -> str:
    """The times of whole iterations at one width as Markdown, and what takes the device's time in them."""
    trudi_median, reppo_median = (float(np.median(x)) for x in seconds.values())
    ratio = float(np.median(np.divide(*seconds.values())))
    text = markdown_table(
        (f"width {width}, {where}", "TruDi, s", "REPPO, s", "ratio"),
        [("iteration", f"{trudi_median:.3f}", f"{reppo_median:.3f}", f"{ratio:.2f}")],
    )
    for name, profile in profiles.items():
        busy = sum(time for _, time, _ in profile)
        rows = [(kernel[:80], f"{time:.4f}", calls) for kernel, time, calls in profile[:20]]
        text += "\n" + markdown_table((f"{name}; all add up to {busy:.3f} s", "s", "calls"), rows)
    return text


def measure_whole(options: Options, width: int, where: str) -> dict[str, Any]:
    """Time and profile whole iterations at one width."""
    calls = {
        "TruDi": iteration_of(trudi, options, width),
        "REPPO": iteration_of(reppo, options, width),
    }
    seconds = measure_in_turn(calls, options.repeats)
    profiles = {name: profiled(call) for name, call in calls.items()}
    print(report_whole(width, seconds, profiles, where), flush=True)
    return {"seconds": seconds, "profiles": profiles}


def measure_all(options: Options, width: int, where: str) -> dict[str, Any]:
    """Time all parts at one width."""
    calls = parts_of("TruDi", trudi, options, width) | parts_of("REPPO", reppo, options, width)
    seconds = measure_in_turn(calls, options.repeats)
    print(report(width, seconds, where), flush=True)
    return {"seconds": seconds, "loss_differences": check_equal(calls)}


def main() -> None:
    """Time both at every width, print tables, write JSON."""
    options = tyro.cli(Options)
    jax.config.update("jax_enable_compilation_cache", False)
    args = trudi.resolve(options.training_args(hidden_dim=options.hidden_dims[0]))
    device = jax.devices()[0]
    where = device.device_kind
    if device.platform == "cpu":
        where = f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"
    measure = measure_whole if options.whole else measure_all
    found = {width: measure(options, width, where) for width in options.hidden_dims}
    kind = re.sub(r"\W+", "_", device.device_kind.lower())
    path = pathlib.Path(options.output or RESULTS / f"iteration_time_{args.env_id}_{kind}.json")
    shown = {name: value for name, value in shown_args(args).items() if name != "hidden_dim"}
    write_json(path, {"args": shown, "where": where, "widths": found})


if __name__ == "__main__":
    main()
