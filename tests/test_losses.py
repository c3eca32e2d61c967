"""The trust region, the split loss, the duals, and an iteration of them all on a stand-in environment."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import (
    SIGMA,
    Drift,
    EndOrTimeOut,
    density_after,
    expectation,
    lively_actor,
    schedule,
    setup_for,
    small_args,
)
from scipy.stats import norm

import trudi_mjx as trudi

BOUND = 0.1


def normals(seed, *shape):
    return jax.random.normal(jax.random.PRNGKey(seed), shape)


# ----------------------------------------------------------------------------------------------- KL of trajectories
def drifts(xp):
    """Those of an old and a new policy, in numpy or jax.numpy."""
    return (lambda state, n, a: 2 * xp.sin(a + 0.3 * n) + state, lambda state, n, a: 1.5 * xp.cos(a - 0.2 * n) + 0.5 * a)


@pytest.mark.parametrize("frictions", [(1.0, 1.0), (1.0, 1.3), (0.5, 0.3)])
def test_trajectory_kl_is_the_mean_log_ratio(frictions):
    """Against log-ratios of sampled chains, with scipy's densities; also with other step sizes, whose variances differ."""
    draws, n_steps = 60_000, 8
    h = [schedule(n_steps, np.array([b, 0.7])) for b in frictions]
    old, new = (Drift(f, sizes) for f, sizes in zip(drifts(jnp), h, strict=True))
    noise, state = np.asarray(normals(1, n_steps + 1, draws, 2)), 0.4
    chain = jax.jit(lambda noise: trudi.sample_chain(old, jnp.full((draws, 1), state), noise))(noise)
    kl = np.asarray(trudi.trajectory_kl(new, old, jnp.full((draws, 1), state), chain.trajectory))
    latents = np.asarray(chain.trajectory.latents, np.float64)
    later = np.concatenate([(chain.trajectory.means[:, 0] + np.sqrt(2 * h[0][0]) * noise[0])[:, None], latents[:, :-1]], 1)
    n = np.arange(1, n_steps + 1)[:, None]
    log_density = [norm.logpdf(later, latents + sizes * (f(state, n, latents) - latents / SIGMA**2), np.sqrt(2 * sizes))
                   for f, sizes in zip(drifts(np), h, strict=True)]
    ratio = (log_density[0] - log_density[1]).sum((1, 2))
    assert kl.shape == (draws,)
    assert abs(kl.mean() - ratio.mean()) < 4 * np.std(ratio - kl) / np.sqrt(draws)
    assert np.std(ratio - kl) / np.sqrt(draws) < 0.02 * kl.mean()  # so the line above means something
    assert kl.std() < ratio.std()  # what the closed form is for


def test_trajectory_kl_bounds_the_kl_of_the_actions():
    """Eq. 135, on densities of a^0 pushed through both policies' kernels on a grid; tanh leaves their KL alone."""
    h = [schedule(8)[:, 0], schedule(8, 1.2)[:, 0]]
    density = [density_after(sizes, lambda n, a, f=f: f(0.0, n, a)) for f, sizes in zip(drifts(np), h, strict=True)]
    marginal = expectation(density[0], np.log(np.maximum(density[0], 1e-300) / np.maximum(density[1], 1e-300)))
    old, new = (Drift(f, sizes[:, None]) for f, sizes in zip(drifts(jnp), h, strict=True))
    chain = trudi.sample_chain(old, jnp.zeros((40_000, 1)), normals(2, 9, 40_000, 1))
    kl = np.asarray(trudi.trajectory_kl(new, old, jnp.zeros((40_000, 1)), chain.trajectory))
    assert marginal > 0.02
    assert kl.mean() - 4 * kl.std() / 200 > marginal


def test_trajectory_kl_of_a_shift():
    """A drift moved by d moves the means by h d: the KL is the sum of h d^2 / 4."""
    h = schedule(8, np.array([1.0, 0.5]))
    old, new = Drift(lambda state, n, a: jnp.cos(a), h), Drift(lambda state, n, a: jnp.cos(a) + jnp.array([0.7, -2.0]), h)
    chain = trudi.sample_chain(old, jnp.zeros((5, 1)), normals(3, 9, 5, 2))
    kl = trudi.trajectory_kl(new, old, jnp.zeros((5, 1)), chain.trajectory)
    np.testing.assert_allclose(kl, (h * np.array([0.49, 4.0])).sum() / 4, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------- split loss
N_STEPS = 2  # of the denoising, for the compiler's sake


@pytest.fixture(scope="module")
def split():
    """A policy and a batch of an older one: parts' gradients taken apart, the loss's of the batch and of each state."""
    args = small_args(num_diffusion_steps=N_STEPS, num_atoms=2, v_min=-10.0, v_max=10.0)
    old, actor = (lively_actor(args, 3, 2, seed=3) for _ in range(2))
    actor.hidden[0].bias[...] += 0.35 * normals(4, args.hidden_dim)
    seen, noise = normals(5, 24, 3) * jnp.linspace(0.1, 3, 24)[:, None], normals(7, N_STEPS + 1, 24, 2)
    chain = trudi.sample_chain(old, seen, normals(6, N_STEPS + 1, 24, 2))
    data = trudi.Batch(seen, seen, chain.action, chain.trajectory, jnp.zeros(24))
    graph, params = trudi.nnx.split(actor)

    def q_of(observation, action):
        return (jnp.cos(2 * action) * observation[:, :2]).sum(-1)

    def loss(params, rows, noise, bound, alpha, lambda_, q_scale):
        def critic(observation, action):  # atoms at -10 and 10
            p = (q_scale * q_of(observation, action) + 10) / 20
            return jnp.stack([jnp.zeros_like(p), jnp.log(p / (1 - p))], -1)

        duals = {"log_alpha": jnp.log(alpha), "log_lambda": jnp.log(lambda_)}
        bounded = dataclasses.replace(args, trust_region_bound=bound)
        return trudi.actor_loss(trudi.nnx.merge(graph, params), bounded, old, critic, duals, rows, noise)[0]

    def parts(params):
        actor = trudi.nnx.merge(graph, params)
        chain = trudi.sample_chain(actor, seen, noise)
        kl = trudi.trajectory_kl(actor, old, seen, data.trajectory)
        return chain.entropy_bound, q_of(seen, chain.action), kl

    def single(*settings):  # batches of one state each
        rows = jax.tree.map(lambda x: x[:, None], data)
        return jax.vmap(jax.grad(loss), (None, 0, 1, *[None] * 4))(params, rows, noise[:, :, None], *settings)

    def vectors(tree, shape):
        return np.concatenate([np.asarray(x).reshape(*shape, -1) for x in jax.tree.leaves(tree)], -1)

    batched, single, jacobians = jax.jit(jax.grad(loss)), jax.jit(single), jax.jit(jax.jacrev(parts))(params)
    kl = np.asarray(parts(params)[2])
    return dict(parts=[vectors(x, (24,)) for x in jacobians], kl=kl, bound=float(np.median(kl)),
                batch=lambda *settings: vectors(batched(params, data, noise, *settings), ()),
                each=lambda *settings: vectors(single(*settings), (24,)))


def test_every_state_has_one_of_two_losses(split):
    """A batch's gradient is the mean of lambda c's in violated states, and of -alpha l - Q's in the others."""
    entropy, q, c = split["parts"]
    violated = split["kl"] > split["bound"]
    assert 0 < violated.sum() < 24
    for alpha, lambda_ in ((0.3, 2.0), (1.0, 0.1)):
        expected = np.where(violated[:, None], lambda_ * c, -alpha * entropy - q)
        assert np.linalg.norm(expected[violated].sum(0)) > 0.1
        assert np.linalg.norm(expected[~violated].sum(0)) > 0.1
        np.testing.assert_allclose(split["batch"](split["bound"], alpha, lambda_, 1.0), expected.mean(0), atol=1e-3)
        np.testing.assert_allclose(split["each"](split["bound"], alpha, lambda_, 1.0), expected, atol=5e-3)


def test_violated_states_only_come_back(split):
    """Their gradient is lambda times that of c, whatever alpha and the critic."""
    violated, first = split["kl"] > split["bound"], split["each"](split["bound"], 0.3, 2.0, 1.0)
    for settings in ((30.0, 2.0, 1.0), (0.3, 2.0, -1.5)):
        other = split["each"](split["bound"], *settings)
        np.testing.assert_allclose(other[violated], first[violated], atol=1e-5)
        assert np.abs(other - first)[~violated].max() > 0.1
    np.testing.assert_allclose(split["each"](split["bound"], 0.3, 6.0, 1.0)[violated], 3 * first[violated], atol=1e-4)


def test_other_states_only_improve(split):
    """Their gradient does not know lambda, nor c once the bound is out of reach."""
    violated, first = split["kl"] > split["bound"], split["each"](split["bound"], 0.3, 2.0, 1.0)
    other = split["each"](split["bound"], 0.3, 40.0, 1.0)
    np.testing.assert_allclose(other[~violated], first[~violated], atol=1e-5)
    assert np.abs(other - first)[violated].max() > 0.1
    np.testing.assert_allclose(split["each"](np.inf, 0.3, 40.0, 1.0)[~violated], first[~violated], atol=1e-5)


@pytest.mark.parametrize("surplus", [-0.4, 0.4])
@pytest.mark.parametrize("excess", [-0.05, 0.3])
def test_duals_move_the_right_way(surplus, excess):
    """alpha falls iff the policy is noisier than its target, lambda grows iff the region is violated."""
    args = small_args(target_entropy_scale=0.7, trust_region_bound=BOUND)
    bound, kl = -0.7 * 3 + surplus + jnp.array([-1.0, 1.0]), BOUND + excess + jnp.array([0.02, -0.02])
    duals = {"log_alpha": jnp.log(0.5), "log_lambda": jnp.log(0.2)}
    gradient = jax.grad(trudi.dual_loss)(duals, args, bound, kl, 3)
    np.testing.assert_allclose(gradient["log_alpha"], 0.5 * surplus, rtol=1e-4)
    np.testing.assert_allclose(gradient["log_lambda"], -0.2 * excess, rtol=1e-4)
    optimizer = trudi.make_optimizers(args).duals
    update, _ = optimizer.update(gradient, optimizer.init(duals))
    np.testing.assert_allclose(update["log_alpha"], -np.sign(surplus) * args.dual_learning_rate, rtol=1e-3)
    np.testing.assert_allclose(update["log_lambda"], np.sign(excess) * args.dual_learning_rate, rtol=1e-3)


def test_gradients_of_actor_and_critic_are_clipped_apart():
    args = small_args(actor_learning_rate=0.1, critic_learning_rate=0.2)
    for optimizer, rate in zip(trudi.make_optimizers(args)[:2], (0.1, 0.2), strict=True):
        params = jnp.zeros(4)
        first, state = optimizer.update(jnp.full(4, 100.0), optimizer.init(params))  # norm 200, clipped to 0.5
        second, _ = optimizer.update(jnp.full(4, 0.25), state)  # norm 0.5, as large as the first
        np.testing.assert_allclose(first, -rate, rtol=1e-3)
        np.testing.assert_allclose(second, -rate, rtol=1e-3)


# -------------------------------------------------------------------------------------------------------- iteration
@pytest.fixture(scope="module")
def probe():
    """A setup on EndOrTimeOut, its state after 300 iterations of one minibatch each, their metrics, its first state, and what
    advances it by 20."""
    args = small_args(env_id="G1JoystickRoughTerrain", num_envs=16, num_steps=8, minibatch_size=128, num_epochs=1, gamma=0.5,
                      num_diffusion_steps=2, actor_learning_rate=3e-3, critic_learning_rate=3e-3, total_timesteps=16 * 8 * 300)
    setup = setup_for(EndOrTimeOut(), args, 3)
    start = jax.jit(lambda key: trudi.init_state(setup, key))(jax.random.PRNGKey(1))
    run = jax.jit(lambda state: jax.lax.scan(lambda s, _: trudi.iterate(setup, s), state, None, 20))

    def advance(state):  # of arrays like the first ones, so that it is compiled once
        values = zip(jax.tree.leaves(start), jax.tree.leaves(state), strict=True)
        return run(jax.tree.unflatten(jax.tree.structure(start), [old.at[...].set(new) for old, new in values]))

    state, found = start, []
    for _ in range(15):
        state, metrics = advance(state)
        found.append(metrics)
    return setup, state, {name: np.concatenate([x[name] for x in found]) for name in metrics}, start, advance


def test_kl_is_zero_before_an_iterations_first_update(probe):
    """There is one minibatch an iteration, so trust_region/kl is before it and the other two are after it."""
    kl, after = (np.asarray(probe[2][f"trust_region/{name}"]) for name in ("kl", "stored_kl"))
    assert np.abs(kl).max() < 1e-5
    assert after.min() >= -1e-6
    assert np.median(after) > 1e-4
    np.testing.assert_array_equal(probe[2]["trust_region/violated"], 0)


def test_kl_is_zero_while_statistics_move(probe):
    """The observations' mean moves from 5 to 2.75 within the iteration, of an actor that sees the difference."""
    setup, _, _, start, advance = probe
    actor = trudi.nnx.state(lively_actor(setup.args, 1, 1, seed=5))
    statistics = trudi.Statistics(jnp.array(128.0), jnp.array([[5.0], [9.0]]))
    learner = start.learner._replace(actor=actor)
    state, metrics = advance(start._replace(learner=learner, statistics=statistics, iteration=jnp.ones((), int)))
    assert np.abs(metrics["trust_region/kl"]).max() < 1e-5
    assert float(state.statistics.count) == 21 * 128


def test_first_rollout_seeds_the_statistics(probe):
    """Before anything is learned from it: whatever moments of no observations say, the first iteration is the same."""
    _, _, metrics, start, advance = probe
    statistics = trudi.Statistics(jnp.zeros(()), jnp.array([[100.0], [7.0]]))
    _, others = advance(start._replace(statistics=statistics))
    for name in ("losses/critic", "losses/actor", "critic/target"):
        np.testing.assert_allclose(others[name][:2], metrics[name][:2], rtol=1e-3, atol=1e-4)


def test_values_of_a_termination_and_of_a_time_out(probe):
    """Rewards of 1 until a termination after one step are worth 1; until time-outs, 1 / (1 - 0.5) = 2, and the entropy bonus
    of at most 0.7 alpha a step."""
    setup, state, metrics, *_ = probe
    kinds = jnp.array([[1.0], [0.0]])  # terminates, never does
    seen = trudi.normalize(state.statistics, jnp.repeat(kinds, 50, 0))
    action = jnp.tile(jnp.linspace(-0.9, 0.9, 50)[:, None], (2, 1))
    q = np.asarray(trudi.q_value(setup.args, state.learner.critic(seen, action))).reshape(2, 50)
    assert metrics["entropy/alpha"].max() < 0.03
    np.testing.assert_allclose(q.mean(1), [1, 2], atol=0.12)
    np.testing.assert_array_equal(metrics["critic/targets_clipped"], 0)


def test_iterations_count_and_metrics_are_finite(probe):
    setup, state, metrics, *_ = probe
    assert int(state.iteration) == 300
    assert float(state.statistics.count) == 300 * 128
    for name, values in metrics.items():
        assert np.isfinite(values).all(), name
    np.testing.assert_allclose(state.statistics.moments[:, 0], [0.5, 0.25], atol=0.1)  # kinds are coin flips
