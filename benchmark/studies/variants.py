"""Train TruDi with one thing changed that no flag changes.

    python -m benchmark.studies.variants kl-2 --env-id CheetahRun --preset cpu [any flag of trudi_mjx.py]

* kl-2, kl-4: the trust region's c(s) from 2 or 4 of the N denoising steps, drawn anew for each minibatch and
  scaled by N/2 or N/4, so that its mean stays what it is;
* actor-2: actor and duals take a step at every second minibatch, the critic at each;
* unit-time: a chain's step sizes are divided by N where they are by 8, so that chains of any N take the same
  diffusion time; as it is, fewer steps also add less noise.

A run is named after its variant, unless --exp-name says otherwise. To continue or to evaluate it, say the
variant again. Nothing else of trudi_mjx.py changes.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

import trudi_mjx as trudi

STEP_SIZES = trudi.Actor.step_sizes


def fail(message: str) -> None:
    """Refuse bad input: one line on stderr and exit code 2."""
    print(f"benchmark.studies.variants: error: {message}", file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------------------------------- variants
def partial_kl(
    count: int,
    actor: trudi.Actor,
    old_actor: trudi.Actor,
    observation: jax.Array,
    trajectory: trudi.Trajectory,
) -> jax.Array:
    """In place of trajectory_kl: c(s), (B,), from so many of the steps, the same for all states of a call."""
    latents, means = trajectory
    bits = jax.lax.bitcast_convert_type(latents[0, 0, 0], jnp.uint32)
    steps = jax.random.choice(jax.random.PRNGKey(bits), actor.num_steps, (count,), replace=False)
    observation_part, time_part = actor.embed(observation)
    h = actor.step_sizes()[steps]
    old_h = old_actor.step_sizes()[steps]
    latents = latents[:, steps]
    means = means[:, steps]
    drift = actor(observation_part[:, None], time_part[steps], latents) - latents / actor.prior_std**2
    new_means = latents + h * drift
    kl = 0.5 * (old_h / h - 1 - jnp.log(old_h / h) + (means - new_means) ** 2 / (2 * h))
    return kl.sum((-2, -1)) * (actor.num_steps / count)  # Eq. 178, of some steps


def update_critic(learner: trudi.Learner, args: trudi.Args, batch: trudi.Batch) -> trudi.Learner:
    """A gradient step of the critic alone."""
    gradient = jax.grad(trudi.critic_loss)(learner.critic, args, batch)
    step, state = trudi.make_optimizers(args).critic.update(gradient, learner.critic_opt_state)
    critic = optax.apply_updates(learner.critic, step)
    return learner._replace(critic=critic, critic_opt_state=state)


def update_in_pairs(
    setup: trudi.Setup, learner: trudi.Learner, data: trudi.Batch, key: jax.Array
) -> tuple[trudi.Learner, trudi.Metrics]:
    """In place of update_epochs: of two minibatches, the first is the critic's alone."""
    args = setup.args
    if args.batch_size // args.minibatch_size % 2:
        fail("actor-2 needs an even number of minibatches in an epoch; change --minibatch-size")
    old_actor = learner.actor
    order_key, noise_key = jax.random.split(key)
    order_keys = jax.random.split(order_key, args.num_epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, args.batch_size))(order_keys)
    pairs = order.reshape(-1, 2, args.minibatch_size)
    noise_keys = jax.random.split(noise_key, len(pairs))

    def step(learner: trudi.Learner, pair: tuple) -> tuple[trudi.Learner, trudi.Metrics]:
        rows, key = pair
        first, second = (jax.tree.map(lambda x, i=i: x[rows[i]], data) for i in range(2))
        learner = update_critic(learner, args, first)
        return trudi.update_minibatch(setup, learner, old_actor, second, key)

    learner, metrics = jax.lax.scan(step, learner, (pairs, noise_keys))
    last_epoch = len(pairs) // args.num_epochs
    return learner, jax.tree.map(lambda x: x[-last_epoch:].mean(), metrics)


def unit_time(actor: trudi.Actor) -> jax.Array:
    """In place of Actor.step_sizes: (N, A), whose sum over n hardly depends on N."""
    return STEP_SIZES(actor) / (actor.num_steps * trudi.STEP_SIZE)


VARIANTS: dict[str, tuple[Any, str, Callable]] = {
    "kl-2": (trudi, "trajectory_kl", functools.partial(partial_kl, 2)),
    "kl-4": (trudi, "trajectory_kl", functools.partial(partial_kl, 4)),
    "actor-2": (trudi, "update_epochs", update_in_pairs),
    "unit-time": (trudi.Actor, "step_sizes", unit_time),
}


@contextlib.contextmanager
def varied(name: str) -> Any:
    """Within it, trudi_mjx.py is this variant of itself."""
    place, attribute, replacement = VARIANTS[name]
    with mock.patch.object(place, attribute, replacement):
        yield


def main() -> None:
    """Run trudi_mjx.py as the variant that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in VARIANTS:
        fail(f"the first argument is one of {', '.join(VARIANTS)}, not {name!r}")
    own = ["--exp-name", name]
    given = sys.argv[2:]
    if any(flag.startswith(("--resume", "--evaluate")) for flag in given):
        own = []
    sys.argv = [sys.argv[0], *own, *given]
    with varied(name):
        trudi.main()


if __name__ == "__main__":
    main()
