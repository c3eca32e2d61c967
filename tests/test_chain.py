"""The diffusion chain: kernels, marginals, entropy bound, probability-flow ODE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import (
    GRID,
    SIGMA,
    Drift,
    Mixture,
    density_after,
    expectation,
    lively_actor,
    schedule,
    small_args,
    squashed_entropy,
)
from scipy.stats import norm

import trudi_mjx as trudi

sample_chain = jax.jit(trudi.sample_chain, static_argnums=0)
ode_action = jax.jit(trudi.ode_action, static_argnums=(0, 3))


def wiggle(xp):
    """A drift that depends on everything, in numpy or jax.numpy."""
    return lambda state, n, a: 3 * xp.sin(a + 0.2 * n) + 0.5 * state


def normals(seed, *shape):
    return jax.random.normal(jax.random.PRNGKey(seed), shape)


def last_latents(chain, noise, h):
    """a^0 (B, A), which float32's tanh forgets where it saturates."""
    return np.asarray(chain.trajectory.means[:, 0] + np.sqrt(2 * h[0]) * noise[0], np.float64)


def test_step_sizes():
    actor = trudi.Actor(small_args(), 3, 2, trudi.nnx.Rngs(0))
    table = [0.00480, 0.01814, 0.03813, 0.06178, 0.08555, 0.10588, 0.11971, 0.12498]  # by hand, n = 1 ... 8
    np.testing.assert_allclose(actor.step_sizes(), np.stack([table, table], -1), atol=6e-6)
    actor.raw_friction[...] = jnp.log(jnp.expm1(jnp.array([2.0, 0.5])))
    np.testing.assert_allclose(actor.step_sizes(), schedule(8, np.array([2.0, 0.5])), rtol=1e-5)


@pytest.mark.parametrize("learn", [True, False])
def test_friction_is_learned_only_if_asked(learn):
    actor = lively_actor(small_args(learn_friction=learn), 3, 2, seed=1)
    graph, params = trudi.nnx.split(actor)
    gradient = jax.grad(lambda p: trudi.sample_chain(trudi.nnx.merge(graph, p), jnp.zeros((4, 3)), normals(0, 9, 4, 2))
                        .entropy_bound.mean())(params)
    assert np.all(np.abs(gradient["raw_friction"][...]) > 1e-3) == learn
    assert np.any(gradient["raw_friction"][...] != 0) == learn


def test_generative_kernels_have_the_stated_mean_and_variance():
    n_steps, draws = 8, 20_000
    h = schedule(n_steps, np.array([1.0, 0.4]))
    state = np.array([[0.7, -1.2]])
    fixed = np.asarray(normals(1, n_steps + 1, 1, 2))
    noise = np.asarray(normals(2, n_steps + 1, n_steps * draws, 2)).copy()
    for n in range(1, n_steps + 1):  # draws in which a^N ... a^n are fixed, a^(n-1) random
        noise[n:, (n - 1) * draws:n * draws] = fixed[n:]
    chain = sample_chain(Drift(wiggle(jnp), h), jnp.asarray(state), jnp.asarray(noise))
    latents = np.concatenate([last_latents(chain, noise, h)[:, None], chain.trajectory.latents], 1)
    latents = latents.reshape(n_steps, draws, n_steps + 1, 2)
    assert np.allclose(np.tanh(latents[:, :, 0]), chain.action.reshape(n_steps, draws, 2), atol=1e-6)
    for n in range(1, n_steps + 1):
        now, later = latents[n - 1, :, n], latents[n - 1, :, n - 1]
        assert np.ptp(now, 0).max() == 0
        mean = now[0] + h[n - 1] * (-now[0] / SIGMA**2 + wiggle(np)(state[0], n, now[0]))
        np.testing.assert_allclose(later.mean(0), mean, atol=4.5 * np.sqrt(2 * h[n - 1].max() / draws))
        np.testing.assert_allclose(later.var(0), 2 * h[n - 1], rtol=4.5 * np.sqrt(2 / draws))
        np.testing.assert_allclose(chain.trajectory.means.reshape(n_steps, draws, n_steps, 2)[n - 1, 0, n - 1], mean, atol=1e-5)


def test_prior_has_the_stated_std():
    for std in (2.5, 0.8):
        chain = sample_chain(Drift(wiggle(jnp), schedule(2), prior_std=std), jnp.zeros(()), normals(3, 3, 40_000, 1))
        first = np.asarray(chain.trajectory.latents[:, -1])
        assert abs(first.mean()) < 4.5 * std / 200
        np.testing.assert_allclose(first.var(), std**2, rtol=4.5 * np.sqrt(2 / 40_000))


def test_noising_kernels_have_the_stated_mean_and_variance():
    """Weighted by noising over generative density, a^(n-1) given a^n is normal with k = 1 - h / s^2, mean a^n / k, variance
    2h / k^2.
    The weights' mean is 1 / k. A bound of one step is their logarithm plus terms known exactly.
    """
    draws = 200_000
    for h in (schedule(8)[-1:], np.array([[0.6]])):
        noise = np.asarray(normals(4, 2, draws, 1)).copy()
        noise[1] = 0.5
        chain = sample_chain(Drift(lambda state, n, a: 0 * a + 0.6, h), jnp.zeros(()), jnp.asarray(noise))
        now, x = SIGMA * 0.5, last_latents(chain, noise, h)[:, 0]
        log_weight = np.asarray(chain.entropy_bound, np.float64) + norm.logpdf(now, 0, SIGMA) + 2 * np.log(np.cosh(x))
        weight, k = np.exp(log_weight), 1 - h[0, 0] / SIGMA**2
        assert np.isclose(weight.mean(), 1 / k, rtol=0.01)
        mean = np.average(x, weights=weight)
        assert np.isclose(mean, now / k, atol=0.012)
        assert np.isclose(np.average((x - mean) ** 2, weights=weight), 2 * h[0, 0] / k**2, rtol=0.03)


@pytest.mark.parametrize("n_steps", [1, 2, 8])
def test_bound_is_the_log_ratio_of_the_two_processes(n_steps):
    """Eq. 117 chain by chain, with scipy's densities in double precision."""
    h, noise, state = schedule(n_steps, np.array([1.0, 0.3])), np.asarray(normals(5, n_steps + 1, 64, 2)), np.ones((64, 2))
    chain = sample_chain(Drift(wiggle(jnp), h), jnp.asarray(state), jnp.asarray(noise))
    latents = [last_latents(chain, noise, h), *np.moveaxis(np.asarray(chain.trajectory.latents, np.float64), 1, 0)]
    bound = -norm.logpdf(latents[n_steps], 0, SIGMA).sum(-1) - 2 * np.log(np.cosh(latents[0])).sum(-1)
    for n in range(1, n_steps + 1):
        std = np.sqrt(2 * h[n - 1])
        bound += norm.logpdf(latents[n], latents[n - 1] * (1 - h[n - 1] / SIGMA**2), std).sum(-1)
        mean = latents[n] + h[n - 1] * (-latents[n] / SIGMA**2 + wiggle(np)(state, n, latents[n]))
        bound -= norm.logpdf(latents[n - 1], mean, std).sum(-1)
    np.testing.assert_allclose(chain.entropy_bound, bound, atol=2e-4)


def test_unrolled_chain_is_the_same():
    h, noise = schedule(8), normals(6, 9, 32, 2)
    loop, unrolled = (trudi.sample_chain(Drift(wiggle(jnp), h), jnp.zeros((32, 2)), noise, unroll=u) for u in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), loop, unrolled)


def test_untrained_policy_is_the_prior():
    """With f = 0 the variance grows by h^2 / s^2 a step, 0.0086 of 6.25 in all, and the mean stays 0."""
    draws = 60_000
    actor, noise = trudi.Actor(small_args(), 3, 2, trudi.nnx.Rngs(0)), normals(7, 9, draws, 2)
    chain = trudi.sample_chain(actor, normals(8, draws, 3), noise)
    marginals = [last_latents(chain, noise, schedule(8)), *np.moveaxis(np.asarray(chain.trajectory.latents, np.float64), 1, 0)]
    for latent in marginals:
        np.testing.assert_allclose(latent.mean(0), 0, atol=4.5 * SIGMA / np.sqrt(draws))
        np.testing.assert_allclose(latent.var(0), SIGMA**2, atol=4.5 * SIGMA**2 * np.sqrt(2 / draws) + 0.01)
        assert abs(np.corrcoef(latent.T)[0, 1]) < 4.5 / np.sqrt(draws)
    entropy = squashed_entropy(norm.pdf(GRID, scale=SIGMA))
    np.testing.assert_allclose(chain.entropy_bound.mean() / 2, entropy, atol=0.02)


@pytest.mark.parametrize(("means", "std"), [([0.5], 0.6), ([-0.9, 0.9], 0.4)])
def test_bound_is_below_the_entropy_and_approaches_it(means, std):
    """The true entropy of u: the prior's density pushed through the kernels on a grid."""
    gaps, draws = [], 20_000
    for n_steps in (6, 12, 48):
        target = Mixture(means, std, 16 * (np.arange(1, n_steps + 1) / n_steps) ** 2)
        density = density_after(target.h[:, 0], target.drift)
        assert np.isclose(expectation(density, np.ones_like(GRID)), 1, atol=1e-5)
        bound = sample_chain(target.actor(), jnp.zeros(()), normals(n_steps, n_steps + 1, draws, 1)).entropy_bound
        gaps.append(squashed_entropy(density) - np.mean(bound))
        assert gaps[-1] > -4 * np.std(bound) / np.sqrt(draws)
    assert gaps[0] > 1.3 * gaps[1] > 1.3 * 2 * gaps[2]
    assert gaps[2] < 0.12


def test_bound_is_differentiated_through_everything():
    """Its gradient on a fixed chain's noise against central differences, in directions that touch all parameters."""
    actor = lively_actor(small_args(), 3, 2, seed=2)
    graph, params = trudi.nnx.split(actor)
    noise, observation = normals(9, 9, 256, 2), normals(10, 256, 3)
    bound = jax.jit(lambda p: trudi.sample_chain(trudi.nnx.merge(graph, p), observation, noise).entropy_bound.mean())
    gradient = jax.grad(bound)(params)
    for seed in range(3):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.PRNGKey(seed), len(leaves))
        towards = jax.tree.unflatten(tree, [jax.random.normal(k, x.shape) / 30 for k, x in zip(keys, leaves, strict=True)])
        up, down = (bound(jax.tree.map(lambda p, d, s=s: p + s * d, params, towards)) for s in (0.05, -0.05))
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, towards)))
        assert np.isclose(slope, (up - down) / 0.1, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("c", [0.5, 0.75, 1.0])
def test_ode_of_a_gaussian_target(c):
    """Deviations shrink by (v_0 / v_T)^c exp((1 - 2c) T / s^2): c = 1/2 keeps the marginals, c = 1 sharpens them."""
    n_steps, total = 1000, 16
    target = Mixture([0.5], 0.6, total * (np.arange(1, n_steps + 1) / n_steps) ** 2)
    x = np.arctanh(np.asarray(ode_action(target.actor(), jnp.zeros(()), normals(11, 20_000, 1), c), np.float64))
    end = target.variances[-1, 0]
    shrinkage = (0.36 / end) ** c * np.exp((1 - 2 * c) * total / SIGMA**2)
    np.testing.assert_allclose(x.std(), SIGMA * shrinkage, rtol=0.03)
    np.testing.assert_allclose(x.mean(), 0.5, atol=0.06)
    if c == 0.5:
        np.testing.assert_allclose(x.var(), 0.36, rtol=0.05)
        noise = normals(12, n_steps + 1, 20_000, 1)
        samples = last_latents(sample_chain(target.actor(), jnp.zeros(()), noise), noise, target.h)
        np.testing.assert_allclose(x.var(), samples.var(), rtol=0.06)
        np.testing.assert_allclose(x.mean(), samples.mean(), atol=0.06)
    if c == 1:
        assert x.var() < 0.1 * 0.36


def test_ode_at_score_scale_one_is_the_sde_without_its_noise():
    """And at any other it takes a^n + h ((1 - 2c) a^n / s^2 + c f), here in one step."""
    h, first = np.array([[0.3]]), normals(13, 50, 1)
    actor, a = Drift(wiggle(jnp), h), SIGMA * np.asarray(first, np.float64)
    for c in (0.0, 0.5, 1.0, 1.7):
        expected = np.tanh(a + 0.3 * ((1 - 2 * c) * a / SIGMA**2 + c * wiggle(np)(0.0, 1, a)))
        np.testing.assert_allclose(trudi.ode_action(actor, jnp.zeros(()), first, c), expected, atol=1e-5)
    many = Drift(wiggle(jnp), schedule(8))
    noiseless = trudi.sample_chain(many, jnp.zeros(()), jnp.zeros((9, 50, 1)).at[-1].set(first)).action
    np.testing.assert_allclose(trudi.ode_action(many, jnp.zeros(()), first, 1.0), noiseless, atol=1e-5)


def test_tanh_log_det_is_finite_and_right():
    """One step that changes nothing, so that a^0 = a^1 = x and the rest of the bound is known."""
    x, h = np.array([[-20.0], [-3.0], [-1e-3], [0.0], [0.7], [20.0], [400.0]]), 0.3
    actor = Drift(lambda state, n, a: a / SIGMA**2, np.array([[h]]))
    def bound(x):
        noise = jnp.stack([jnp.zeros_like(x), x / SIGMA])
        return trudi.sample_chain(actor, jnp.zeros((len(x), 1)), noise).entropy_bound
    log_det = -2 * np.logaddexp(x, -x) + 2 * np.log(2)  # log(1 / cosh^2 x)
    rest = (x / SIGMA) ** 2 / 2 + np.log(SIGMA * np.sqrt(2 * np.pi)) - h * x**2 / (4 * SIGMA**4)
    np.testing.assert_allclose(bound(jnp.asarray(x)), (log_det + rest)[:, 0], rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda x: bound(x).sum())(jnp.asarray(x))
    np.testing.assert_allclose(slope, -2 * np.tanh(x) + x / SIGMA**2 - h * x / (2 * SIGMA**4), rtol=1e-5, atol=1e-6)
