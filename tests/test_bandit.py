"""A bandit with two optima: the policy must learn both, which no Gaussian can."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import small_args
from scipy.stats import norm

import trudi_mjx as trudi

OPTIMUM, CLOSE = 0.6, 0.2  # optima at -0.6 and 0.6, and what counts as found
ITERATIONS, STATES, MINIBATCHES = 150, 256, 8


def value(u):
    """Q: 0 at both optima, -7.2 between them."""
    return -20 * (jnp.abs(u) - OPTIMUM) ** 2


def critic(observation, action):
    """Logits of a critic with atoms at -10 and 10 whose expectation is `value`."""
    p = (jnp.maximum(value(action[:, 0]), -9.9) + 10) / 20
    return jnp.stack([jnp.zeros_like(p), jnp.log(p / (1 - p))], -1)


def trainer(args, graph):
    """Of actors' parameters and duals, at the learning rates of both: ITERATIONS of a rollout and minibatch steps, as `iterate`
    has them. Gives parameters and duals at the end, and KLs."""
    faster = {"xla_backend_optimization_level": 1}  # as it runs for longer than it is compiled
    return jax.jit(lambda *start: train(args, graph, *start), compiler_options=faster)


def train(args, graph, params, duals, rates):
    args = dataclasses.replace(args, actor_learning_rate=rates[0], dual_learning_rate=rates[1])
    actor_opt, _, dual_opt = trudi.make_optimizers(args)
    seen, shape = jnp.zeros((STATES, 1)), (args.num_diffusion_steps + 1, STATES, 1)

    def iteration(carry, key):
        old = trudi.nnx.merge(graph, carry[0])
        keys = jax.random.split(key, 1 + MINIBATCHES)
        chain = trudi.sample_chain(old, seen, jax.random.normal(keys[0], shape))
        batch = trudi.Batch(seen, seen, chain.action, chain.trajectory, None)

        def step(carry, key):
            params, duals, actor_state, dual_state = carry
            (_, (bound, kl)), gradient = jax.value_and_grad(
                lambda p: trudi.actor_loss(trudi.nnx.merge(graph, p), args, old, critic, duals, batch,
                                           jax.random.normal(key, shape)), has_aux=True)(params)
            update, actor_state = actor_opt.update(gradient, actor_state)
            params = jax.tree.map(jnp.add, params, update)
            update, dual_state = dual_opt.update(jax.grad(trudi.dual_loss)(duals, args, bound, kl, 1), dual_state)
            return (params, jax.tree.map(jnp.add, duals, update), actor_state, dual_state), kl.mean()

        return jax.lax.scan(step, carry, keys[1:])

    start = (params, duals, actor_opt.init(params), dual_opt.init(duals))
    (params, duals, *_), kl = jax.lax.scan(iteration, start, jax.random.split(jax.random.PRNGKey(0), ITERATIONS))
    return params, duals, kl


@pytest.fixture(scope="module")
def trained():
    args = small_args(num_atoms=2, v_min=-10.0, v_max=10.0, hidden_dim=32,
                      target_entropy_scale=0.665, num_steps=STATES // 16, minibatch_size=STATES, num_epochs=MINIBATCHES,
                      total_timesteps=STATES * ITERATIONS)
    duals = {name: jnp.log(trudi.INITIAL_DUAL) for name in ("log_alpha", "log_lambda")}
    graph, params = trudi.nnx.split(trudi.Actor(args, 1, 1, trudi.nnx.Rngs(1)))
    learn = trainer(args, graph)
    params, duals, first = learn(params, duals, jnp.array([1.5e-3, 3e-3]))
    params, duals, last = learn(params, duals, jnp.array([3e-4, 1e-3]))  # to settle
    return trudi.nnx.merge(graph, params), duals, np.concatenate([first, last])


def shares(u):
    """Of the samples, those close to the one optimum and to the other."""
    return np.array([np.mean(np.abs(np.asarray(u) - optimum) < CLOSE) for optimum in (-OPTIMUM, OPTIMUM)])


def behaviour_entropy(share):
    """In bits, of which mode was taken; shares (2, ...)."""
    share = share / share.sum(0)
    return -np.sum(share * np.log2(np.maximum(share, 1e-12)), 0)


def best_gaussian():
    """The largest share close to the optima of any tanh of a Gaussian that takes both with half a bit, over means and stds."""
    mean, std = np.meshgrid(np.linspace(0, 2, 81), np.geomspace(0.05, 8, 200))
    share = np.array([np.subtract(*norm.cdf(np.arctanh([optimum + CLOSE, optimum - CLOSE])[:, None, None], mean, std))
                      for optimum in (-OPTIMUM, OPTIMUM)])
    return share.sum(0)[behaviour_entropy(share + 1e-12) > 0.5].max()


def test_both_optima_are_found_by_the_ode_and_by_samples(trained):
    actor, _, _ = trained
    limit = best_gaussian()
    assert 0.4 < limit < 0.6
    noise = jax.random.normal(jax.random.PRNGKey(1), (9, 200, 1))
    for u, least in ((trudi.ode_action(actor, jnp.zeros((200, 1)), noise[-1], 1.0), 0.85),
                     (trudi.sample_chain(actor, jnp.zeros((200, 1)), noise).action, 0.65)):
        share = shares(u)
        assert behaviour_entropy(share) > 0.5
        assert share.sum() > least > limit


def test_the_duals_held_their_constraints(trained):
    """The region on average, and the entropy at its target, from which both started far away."""
    actor, duals, kl = trained
    assert np.abs(kl[:, 0]).max() < 1e-5  # an iteration's first minibatch
    assert 0.03 < kl[:, 1:].mean() < 0.2
    assert np.isfinite(list(duals.values())).all()
    chain = trudi.sample_chain(actor, jnp.zeros((2000, 1)), jax.random.normal(jax.random.PRNGKey(2), (9, 2000, 1)))
    assert abs(chain.entropy_bound.mean() + 0.665) < 0.3
