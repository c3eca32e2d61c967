"""How long does an iteration of TruDi take beside one of REPPO at equal sizes, where does the time go, and what did each way to
save some of it buy?

    python benchmark/iteration_time.py --env-id CartpoleBalance --preset cpu --hidden-dims 64 256 [any flag of trudi_mjx.py]

Both are programs of one process, timed in turn, so that a disturbance of the machine meets both; ratios are medians of the
rounds' ratios, times medians. The parts are the simulator alone (random actions), the rollout, the critic's targets, `improve`
(targets, all epochs of minibatches, and the check of the KL) and the whole iteration; each is compiled by itself. Then the same
`improve` of TruDi with one way to save time undone, everything else as it is:

* the whole first layer at every denoising step, instead of its observation part once for a chain;
* the chain as a loop in the loss, instead of unrolled;
* the KL one denoising step after the other, instead of all steps in one batch;
* the old chains drawn again for the KL, instead of those of the rollout, which is unbiased but another sequential chain.

All but the last compute the same, which is checked. Results go to benchmark/results/iteration_time_{env}_{device}.json.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import RESULTS, Sizes, cpu_name, markdown_table, shown_args, trudi, write_json
from throughput import simulate

from benchmark.baselines import reppo_mjx as reppo


@dataclasses.dataclass(frozen=True)
class Options(Sizes):
    """Time iterations of TruDi and REPPO with these flags of trudi_mjx.py."""

    hidden_dims: tuple[int, ...] = (64, 256)  # widths of actor and critic, in place of --hidden-dim
    repeats: int = 5  # timed rounds
    output: str | None = None  # the JSON file; default: named after task and device

# ---------------------------------------------------------------------------------------------------- ways undone
def embed_inputs(self: trudi.Actor, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In place of Actor.embed: what the first layer takes, itself."""
    angle = jnp.arange(1, self.num_steps + 1)[:, None] * 10000.0 ** -jnp.arange(0, 1, 2 / trudi.TIME_FEATURES)
    hidden = trudi.nnx.gelu(self.time_mlp[0](jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)))
    return observation, self.time_mlp[1](hidden)

def call_whole(self: trudi.Actor, state: jax.Array, time: jax.Array, latent: jax.Array) -> jax.Array:
    """In place of Actor.__call__: the whole first layer at every latent."""
    parts = (jnp.broadcast_to(x, (*latent.shape[:-1], x.shape[-1])) for x in (state, latent, time))
    x = self.input(jnp.concatenate(list(parts), -1))
    for norm, hidden in zip(self.norms, self.hidden, strict=True):
        x = x + trudi.nnx.gelu(hidden(norm(x)))
    return self.output(x)

def kl_in_turn(actor: trudi.Actor, observation: jax.Array, latents: jax.Array, means: jax.Array, old_h: jax.Array) -> jax.Array:
    """In place of trajectory_kl: one denoising step after the other."""
    (state, time), variance = actor.embed(observation), actor.prior_std**2
    def step(total: jax.Array, now: tuple) -> tuple[jax.Array, None]:
        h, old, time_n, latent, mean = now
        new_mean = latent + h * (actor(state, time_n, latent) - latent / variance)
        return total + 0.5 * (old / h - 1 - jnp.log(old / h) + (mean - new_mean) ** 2 / (2 * h)).sum(-1), None
    chains = (jnp.moveaxis(x, 1, 0) for x in (latents, means))
    return jax.lax.scan(step, jnp.zeros(len(observation)), (actor.step_sizes(), old_h, time, *chains))[0]

def kl_of_new_chains(actor: trudi.Actor, observation: jax.Array, latents: jax.Array, means: jax.Array, old_h: jax.Array
                     ) -> jax.Array:
    """In place of trajectory_kl: chains drawn again. They are of a copy of this actor, which costs what the old one's would."""
    key = jax.random.PRNGKey(latents[0, 0, 0].astype(int))  # not known when this is compiled
    noise = jax.random.normal(key, (latents.shape[1] + 1, len(latents), latents.shape[2]))
    chain = jax.lax.stop_gradient(trudi.sample_chain(actor, observation, noise))
    return TRAJECTORY_KL(actor, observation, chain.latents, chain.means, old_h)

TRAJECTORY_KL, SAMPLE_CHAIN = trudi.trajectory_kl, trudi.sample_chain
UNDONE: dict[str, tuple[tuple[Any, str, Callable], ...]] = {
    "as it is": (),
    "whole first layer at every step": ((trudi.Actor, "embed", embed_inputs), (trudi.Actor, "__call__", call_whole)),
    "chain as a loop in the loss": (
        (trudi, "sample_chain", lambda actor, observation, noise, unroll=False: SAMPLE_CHAIN(actor, observation, noise)),),
    "KL one step after the other": ((trudi, "trajectory_kl", kl_in_turn),),
    "old chains drawn again": ((trudi, "trajectory_kl", kl_of_new_chains),)}

@contextlib.contextmanager
def undone(name: str) -> Iterator[None]:
    """Within it, TruDi's losses are traced without one way to save time."""
    with contextlib.ExitStack() as stack:
        for place, attribute, replacement in UNDONE[name]:
            stack.enter_context(mock.patch.object(place, attribute, replacement))
        yield

# --------------------------------------------------------------------------------------------------------- timing
def make(script: Any, options: Options, width: int) -> tuple[Any, Any]:
    """A script's agent and initial state with these flags, as far as it has them."""
    given = options.training_args(hidden_dim=width)
    own = {name: getattr(given, name) for name in vars(given) if name in script.Args.__annotations__}
    own |= {name: script.Args.__dataclass_fields__[name].default for name in ("exp_name", "eval_mode", "target_entropy_scale")}
    agent = script.make_agent(script.resolve(script.Args(**own)))
    return agent, jax.jit(functools.partial(script.init_state, agent))(jax.random.PRNGKey(given.seed))

def observed(script: Any, state: Any, data: Any) -> list[tuple]:
    """Normalised observations and next observations, as `iterate` has them."""
    return [script.views(script.normalize(state.statistics, x)) for x in (data.observation, data.next_observation)]

def improve(script: Any, agent: Any, state: Any, data: Any) -> tuple:
    """All that an iteration learns from a rollout; returns networks and metrics."""
    return script.improve(agent, state.learner, data, *observed(script, state, data), jax.random.split(state.key, 3))

def targets(script: Any, agent: Any, state: Any, data: Any) -> jax.Array:
    """The critic's targets of a rollout."""
    return script.critic_targets(agent, state.learner, data, observed(script, state, data)[1], state.key)

def rollout(script: Any, agent: Any, state: Any) -> Any:
    """A rollout's transitions."""
    return script.rollout(agent, state.learner.actor, state.statistics, state.env, state.key)[1]

def parts_of(name: str, script: Any, options: Options, width: int) -> dict[str, Callable[[], Any]]:
    """Calls of a script's compiled parts, on the same rollout."""
    agent, state = make(script, options, width)
    programs = {part: jax.jit(functools.partial(f, script, agent)) for part, f in
                (("rollout", rollout), ("targets", targets), ("improve", improve))}
    data = programs["rollout"](state)
    calls = {f"{name}, rollout": functools.partial(programs["rollout"], state),
             **{f"{name}, {part}": functools.partial(programs[part], state, data) for part in ("targets", "improve")},
             f"{name}, iteration": functools.partial(jax.jit(functools.partial(script.iterate, agent)), state)}
    if script is trudi:
        calls["simulator alone"] = functools.partial(jax.jit(functools.partial(simulate, agent)), state)
        for way in UNDONE:
            calls[f"improve, {way}"] = functools.partial(traced_without(way, agent), state, data)
    return calls

def traced_without(way: str, agent: Any) -> Callable:
    """`improve` of TruDi without one way to save time, which is a program of its own."""
    def run(state: Any, data: Any) -> tuple:
        with undone(way):
            return improve(trudi, agent, state, data)
    return jax.jit(run)

def timed(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call in each of several rounds, after one in which they compile."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds

def check_equal(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """How far the loss is from that of `as it is`, relatively; stops with an error if a way that should not matter does."""
    losses = {name: float(calls[f"improve, {name}"]()[1]["losses/actor"]) for name in UNDONE}
    apart = {name: abs(loss / losses["as it is"] - 1) for name, loss in losses.items()}
    for name, difference in apart.items():
        if difference > 1e-3 and "drawn again" not in name:  # rounding made 1e-7 of it on a CPU
            sys.exit(f"{name}: the loss is {losses[name]}, but {losses['as it is']} as it is")
    return apart

# --------------------------------------------------------------------------------------------------------- results
def report(width: int, seconds: dict[str, list[float]], where: str) -> str:
    """The times at one width as Markdown, beside REPPO's or beside those of `as it is`."""
    medians = {name: float(np.median(x)) for name, x in seconds.items()}
    def ratio(name: str, other: str) -> str:
        return f"{np.median(np.divide(seconds[name], seconds[other])):.2f}"
    parts = ("rollout", "targets", "improve", "iteration")
    rows = [(part, *(f"{medians[f'{name}, {part}']:.3f}" for name in ("TruDi", "REPPO")),
             ratio(f"TruDi, {part}", f"REPPO, {part}")) for part in parts]
    rows.insert(0, ("simulator alone", *[f"{medians['simulator alone']:.3f}"] * 2, ""))
    ways = [(name, f"{medians[f'improve, {name}']:.3f}", ratio(f"improve, {name}", "improve, as it is")) for name in UNDONE]
    return (markdown_table((f"width {width}, {where}", "TruDi, s", "REPPO, s", "ratio"), rows) + "\n"
            + markdown_table((f"TruDi's improve, width {width}", "s", "to as it is"), ways))

def main() -> None:
    """Time both at every width, print tables, write JSON."""
    options = tyro.cli(Options)
    jax.config.update("jax_enable_compilation_cache", False)
    args = trudi.resolve(options.training_args(hidden_dim=options.hidden_dims[0]))
    device = jax.devices()[0]
    where = cpu_name() + f", {len(os.sched_getaffinity(0))} cores" if device.platform == "cpu" else device.device_kind
    found = {}
    for width in options.hidden_dims:
        calls = parts_of("TruDi", trudi, options, width) | parts_of("REPPO", reppo, options, width)
        seconds = timed(calls, options.repeats)
        found[width] = {"seconds": seconds, "loss_differences": check_equal(calls)}
        print(report(width, seconds, where), flush=True)
    kind = re.sub(r"\W+", "_", device.device_kind.lower())
    path = pathlib.Path(options.output or RESULTS / f"iteration_time_{args.env_id}_{kind}.json")
    shown = {name: value for name, value in shown_args(args).items() if name != "hidden_dim"}
    write_json(path, {"args": shown, "where": where, "widths": found})

if __name__ == "__main__":
    main()
