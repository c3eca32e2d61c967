"""benchmark/baselines in JAX: their policies, losses, targets and learning rates are their papers'."""

import dataclasses

import aim
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import lively_actor, small_args
from scipy.stats import norm
from small_baselines import args_of

import trudi_mjx
from benchmark.baselines import dime_mjx as dime
from benchmark.baselines import dppo_mjx as dppo
from benchmark.baselines import fpo_mjx as fpo
from benchmark.baselines import ppo_mjx as ppo
from benchmark.baselines import reppo_mjx as reppo
from benchmark.baselines import spo_mjx as spo


def normals(seed, *shape):
    return jax.random.normal(jax.random.PRNGKey(seed), shape)


# --------------------------------------------------------------------------------------------------------------- REPPO
MEAN, STD = np.array([[0.3, -1.2], [0.0, 0.5], [2.0, -0.1]]), np.array([[0.5, 1.1], [0.2, 2.0], [0.7, 0.05]])


def gaussian(mean, std):
    """An actor of given Gaussians."""
    return lambda observation: (jnp.asarray(mean), jnp.asarray(std))


def kl_on_a_grid(mean, std, new_mean, new_std):
    """KL (B,) by numerical integration, each action dimension for itself."""
    x = np.linspace(-25, 25, 200_001)[:, None, None]
    log_old, log_new = norm.logpdf(x, mean, std), norm.logpdf(x, new_mean, new_std)
    return (np.exp(log_old) * (log_old - log_new)).sum((0, 2)) * (x[1, 0, 0] - x[0, 0, 0])


def test_reppo_entropy_is_that_of_a_squashed_gaussian():
    """Against scipy's density and the change of variables u = tanh(x), dx/du = 1 / (1 - u^2)."""
    sample = reppo.sample_gaussian(gaussian(MEAN, STD), jnp.zeros((3, 1)), 0.5 * normals(1, 3, 2))
    u = np.asarray(sample.action, np.float64)
    log_density = (norm.logpdf(np.arctanh(u), MEAN, STD) - np.log(1 - u**2)).sum(-1)
    np.testing.assert_allclose(sample.entropy, -log_density, rtol=1e-3)
    mass = np.linspace(-1, 1, 100_003)[1:-1]  # and that density integrates to 1
    assert np.isclose((norm.pdf(np.arctanh(mass), 0.3, 0.5) / (1 - mass**2)).sum() * (mass[1] - mass[0]), 1, atol=1e-4)


def test_reppo_kl():
    new_mean, new_std = MEAN + np.array([[0.1, 0.3]]), STD * np.array([[1.3], [0.6], [1.0]])
    kl = reppo.gaussian_kl(gaussian(new_mean, new_std), jnp.zeros((3, 1)), jnp.asarray(MEAN), jnp.asarray(STD))
    np.testing.assert_allclose(kl, kl_on_a_grid(MEAN, STD, new_mean, new_std), rtol=1e-4)


def test_reppo_split_loss():
    """A violated state has lambda KL, any other -alpha entropy - Q."""
    args = args_of(reppo, v_min=-10.0, v_max=10.0, num_atoms=2)
    noise, shift = normals(2, 3, 2), np.array([[0.0, 0.0], [0.0, 0.0], [0.3, 0.0]])
    zeros = jnp.zeros((3, 1))
    batch = reppo.Batch(zeros, zeros, None, jnp.asarray(MEAN), jnp.asarray(STD), None, None, None)

    def critic(observation, action):  # Q = 4 u_1 of atoms at -10 and 10
        p = 0.5 + 0.2 * action[:, 0]
        return jnp.stack([jnp.zeros_like(p), jnp.log(p / (1 - p))], -1)

    duals = {"log_alpha": jnp.log(0.3), "log_lambda": jnp.log(2.0)}
    u = np.tanh(MEAN + shift + STD * np.asarray(noise))
    entropy = (np.log(STD) + np.log(2 * np.pi) / 2 + np.asarray(noise) ** 2 / 2 + np.log(1 - u**2)).sum(-1)
    better, far = -0.3 * entropy - 4 * u[:, 0], (0.3 / 0.7) ** 2 / 2
    for bound, parts in ((0.05, [better[0], better[1], 2 * far]), (0.2, better)):
        bounded = dataclasses.replace(args, trust_region_bound=bound)
        loss, (entropy_of_loss, kl) = reppo.actor_loss(gaussian(MEAN + shift, STD), bounded, critic, duals, batch, noise)
        np.testing.assert_allclose(kl, [0, 0, far], atol=1e-5)
        np.testing.assert_allclose(entropy_of_loss, entropy, rtol=1e-3)
        np.testing.assert_allclose(loss, np.mean(parts), rtol=1e-4)


def test_reppo_critic_is_trudis():
    """With the same weights, at the same inputs."""
    args, shape = args_of(reppo), (5, 2)
    own, trudi = (script.Critic(args, *shape, script.nnx.Rngs(0)) for script in (reppo, trudi_mjx))
    seen, action = normals(4, 30, 5), normals(5, 30, 2)
    np.testing.assert_allclose(own(seen, action), trudi(seen, action), rtol=1e-5)


def test_reppo_auxiliary_loss():
    """Squared errors of features and reward that follow, unless the episode terminated; weighed, and off by default."""
    seen, action, following = normals(4, 6, 5), normals(5, 6, 2), normals(6, 6, 17)
    terminated = jnp.arange(6) == 4
    batch = reppo.Batch(None, seen, action, None, None, jnp.ones(6), following.at[4].set(jnp.nan), terminated)
    args = args_of(reppo, aux_loss_scale=0.7)
    critic = reppo.Critic(args, 5, 2, reppo.nnx.Rngs(0))
    without = dataclasses.replace(args, aux_loss_scale=0.0)
    assert reppo.critic_loss(critic, args_of(reppo), batch) == reppo.critic_loss(critic, without, batch)
    error = np.asarray(critic.predict(seen, action) - following) ** 2
    extra = reppo.critic_loss(critic, args, batch) - reppo.critic_loss(critic, without, batch)
    np.testing.assert_allclose(extra, 0.7 * np.delete(error, 4, 0).mean(-1).sum() / 6, rtol=1e-3)
    gradients = reppo.nnx.grad(lambda critic: reppo.critic_loss(critic, args, batch))(critic)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients))  # though what followed one was NaN
    assert not hasattr(reppo.Critic(without, 5, 2, reppo.nnx.Rngs(0)), "prediction_output")


def test_reppo_predicts_what_follows():
    """Features of the true next observations and fresh actions there, and rewards, in the rows of their states."""
    args = args_of(reppo, aux_loss_scale=1.0, num_epochs=1, minibatch_size=128)
    setup = reppo.Setup(args, aim.Playground(), 1, 1, jax.sharding.Mesh(jax.devices()[:1], ("env",)))
    state = jax.jit(lambda key: reppo.init_state(setup, key))(jax.random.PRNGKey(1))
    _, data = reppo.rollout(setup, state.learner.actor, state.statistics, state.env_state, jax.random.PRNGKey(2))
    inputs, next_inputs = (reppo.network_inputs(x) for x in (data.observation, data.next_observation))
    _, features = reppo.critic_targets(setup, state.learner, data, next_inputs, jax.random.PRNGKey(3))
    keys = jax.random.split(jax.random.PRNGKey(3), args.num_steps)
    action = jax.vmap(lambda x, key: reppo.sample_policy(setup, state.learner.actor, x, key).action)(next_inputs.actor, keys)
    np.testing.assert_allclose(features, state.learner.critic.features(next_inputs.critic, action), rtol=1e-4, atol=1e-5)
    seen = []
    learn = jax.tree_util.Partial(lambda *x: seen.append(x[2]) or (x[1], {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reppo, "update_epochs", learn)
        reppo.update(setup, state.learner, data, inputs, next_inputs, list(jax.random.split(jax.random.PRNGKey(4), 3)))
    np.testing.assert_allclose(seen[0].following[:, -1], data.reward.swapaxes(0, 1).ravel(), rtol=1e-5)
    np.testing.assert_array_equal(seen[0].terminated, data.terminated.swapaxes(0, 1).ravel())
    assert seen[0].following.shape == (128, args.hidden_dim + 1)


def test_reppo_starts_as_a_standard_normal():
    args = args_of(reppo)
    mean, std = reppo.Actor(args, 5, 3, reppo.nnx.Rngs(0))(normals(3, 40, 5))
    np.testing.assert_array_equal(mean, np.zeros((40, 3)))
    np.testing.assert_array_equal(std, np.ones((40, 3)))


# --------------------------------------------------------------------------------------------------------- PPO and SPO
def test_gaussian_log_density_and_kl():
    action = MEAN + np.array([[0.2, -0.7]])
    expected = norm.logpdf(action, MEAN, STD).sum(-1)
    new_mean, new_std = MEAN + np.array([[0.1, 0.3]]), STD * np.array([[1.3], [0.6], [1.0]])
    for script in (ppo, spo):
        np.testing.assert_allclose(script.log_density(*map(jnp.asarray, (action, MEAN, STD))), expected, rtol=1e-4)
        kl = script.gaussian_kl(*map(jnp.asarray, (MEAN, STD, new_mean, new_std)))
        np.testing.assert_allclose(kl, kl_on_a_grid(MEAN, STD, new_mean, new_std), rtol=1e-4)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_advantages_are_sums_of_errors(gae_lambda):
    """PPO's, whose text SPO, DPPO and FPO have too; with a termination, a time-out or neither at every step, and at random
    everywhere."""
    steps, rng = 9, np.random.default_rng(1)
    chance = rng.random((2, 100, steps)) < np.array([0.15, 0.2])[:, None, None]
    single, none = np.eye(steps, dtype=bool), np.zeros((steps, steps), bool)
    terminated, truncated = (np.concatenate(x) for x in (([none, single, none, chance[0]]), ([none, none, single, chance[1]])))
    truncated &= ~terminated
    reward, value, next_value = rng.normal(size=(3, *terminated.shape))
    args = dataclasses.replace(args_of(ppo), gamma=0.9, gae_lambda=gae_lambda)
    found = ppo.advantages(args, *(jnp.asarray(x.T) for x in (reward, terminated, truncated, value, next_value)))
    expected = np.zeros_like(reward)
    for i, t in np.ndindex(*reward.shape):
        for k in range(t, steps):
            error = reward[i, k] + 0.9 * (0 if terminated[i, k] else next_value[i, k]) - value[i, k]
            expected[i, t] += (0.9 * gae_lambda) ** (k - t) * error
            if terminated[i, k] or truncated[i, k]:
                break
    np.testing.assert_allclose(np.asarray(found).T, expected, atol=2e-5)


def test_a_termination_cuts_off_what_is_not_finite():
    """Of a simulation that diverged, the value after its end is NaN."""
    terminated, ones = jnp.array([[False], [True], [False]]), jnp.ones((3, 1))
    found = ppo.advantages(args_of(ppo), ones, terminated, terminated & False, 0 * ones,
                           jnp.where(terminated, jnp.nan, 1.0))
    assert np.isfinite(found).all()
    assert found[1, 0] == 1


def slopes(script, ratios, advantage, z=3.0, **changes):
    """The loss, and its slopes in the means of standard normals, moved until the ratios of an action z are these."""
    args = args_of(script, **{"entropy_scale": 0.0, **changes})
    moved = z - np.sqrt(z**2 - 2 * np.log(ratios))  # log r = d z - d^2 / 2
    zeros, ones = jnp.zeros((len(ratios), 1)), jnp.ones((len(ratios), 1))
    batch = script.Batch(zeros, zeros, z * ones, zeros, ones, jnp.asarray(advantage), None)
    def loss(d):
        return script.actor_loss(lambda observation: (d, ones), args, batch)
    value, slope = jax.value_and_grad(lambda d: loss(d)[0])(jnp.asarray(moved)[:, None])
    np.testing.assert_allclose(loss(jnp.asarray(moved)[:, None])[1][0], ratios, rtol=1e-4)
    return float(value), np.asarray(slope)[:, 0] * len(ratios), ratios * (z - moved)


def test_clipped_loss():
    """Its gradient is that of r A, but 0 where r is beyond 1 +- epsilon on the side to which A pulls."""
    ratios, advantage = np.tile([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0], 2), np.repeat([1.5, -0.5], 7)
    value, slope, unit = slopes(ppo, ratios, advantage)
    clipped = np.clip(ratios, 0.8, 1.2)
    np.testing.assert_allclose(value, -np.minimum(ratios * advantage, clipped * advantage).mean(), rtol=1e-4)
    stopped = np.where(advantage > 0, ratios > 1.2, ratios < 0.8)
    assert stopped.sum() == 4
    np.testing.assert_allclose(slope, np.where(stopped, 0, -advantage * unit), atol=1e-4)


def test_penalised_loss():
    """It is best at r = 1 + epsilon sign(A), and its gradient leads back from beyond."""
    advantage = np.array([1.5, -0.5])
    for epsilon in (0.2, 0.1):
        best = 1 + epsilon * np.sign(advantage)
        value, slope, _ = slopes(spo, best, advantage, epsilon=epsilon)
        np.testing.assert_allclose(slope, 0, atol=1e-4)
        np.testing.assert_allclose(value, -(advantage + np.abs(advantage) * epsilon / 2).mean(), rtol=1e-4)
        for ratios in (best * 1.05, best * 0.95):
            more, slope, unit = slopes(spo, ratios, advantage, epsilon=epsilon)
            assert more > value
            np.testing.assert_allclose(slope, -unit * (advantage - np.abs(advantage) / epsilon * (ratios - 1)), atol=1e-4)
            assert np.all(np.sign(slope) == np.sign(ratios - best))


@pytest.mark.parametrize("script", [ppo, spo])
def test_entropy_is_rewarded(script):
    args, advantage = args_of(script, entropy_scale=0.3), jnp.array([1.0, -2.0, 0.5])
    batch = script.Batch(jnp.zeros((3, 1)), None, jnp.asarray(MEAN), jnp.asarray(MEAN), jnp.asarray(STD), advantage, None)
    loss, (ratio, entropy, kl) = script.actor_loss(gaussian(MEAN, STD), args, batch)
    expected = norm.entropy(0, STD).sum(-1)
    np.testing.assert_allclose(entropy, expected, rtol=1e-4)
    np.testing.assert_allclose(loss, -(np.asarray(advantage) + 0.3 * expected).mean(), rtol=1e-4)
    np.testing.assert_allclose(ratio, 1, rtol=1e-6)
    np.testing.assert_allclose(kl, 0, atol=1e-6)


@pytest.mark.parametrize("script", [ppo, spo, dppo, fpo])
def test_value_loss(script):
    given = dict(critic_observation=jnp.array([[1.0], [4.0]]), target=jnp.array([2.0, 0.0]))
    batch = script.Batch(**dict.fromkeys(script.Batch._fields) | given)
    assert script.critic_loss(lambda observation: observation[:, 0], args_of(script), batch) == (1 + 16) / 2
    assert script.Critic(args_of(script), 5, script.nnx.Rngs(0))(normals(1, 7, 5)).shape == (7,)


def test_ppos_learning_rate_follows_the_kl():
    args = args_of(ppo, desired_kl=0.01)
    for rate, kl, expected in ((1e-3, 0.021, 1e-3 / 1.5), (1e-3, 0.019, 1e-3), (1e-3, 0.006, 1e-3), (1e-3, 0.004, 1.5e-3),
                               (1.2e-5, 1.0, 1e-5), (9e-3, 0.0, 1e-2)):
        np.testing.assert_allclose(ppo.adapt(jnp.asarray(rate), args, jnp.asarray(kl)), expected, rtol=1e-5)


@pytest.mark.parametrize("script, network, rate", [
    (spo, "actor", "learning_rate"), (spo, "critic", "learning_rate"), (fpo, "actor", "learning_rate"),
    (dppo, "actor", "actor_learning_rate"), (dppo, "critic", "critic_learning_rate")])
def test_learning_rates_stay(script, network, rate):
    """Adam's steps are of the rate itself while gradients are alike, whatever the number of steps to come."""
    for steps in (1280, 12800):
        args = args_of(script, max_grad_norm=1e3, total_timesteps=steps, **{rate: 7e-4})
        optimizer = getattr(script.make_optimizers(args), network)

        def step(state, _, optimizer=optimizer):
            update, state = optimizer.update(jnp.ones(()), state)
            return state, -update

        _, sizes = jax.lax.scan(step, optimizer.init(jnp.zeros(())), None, 100)
        np.testing.assert_allclose(sizes, 7e-4, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------- DIME
def test_dime_has_trudis_loss_without_its_trust_region():
    """Value and gradient of TruDi's with no state violated; with all violated, TruDi's is another."""
    args = small_args(num_diffusion_steps=2, num_atoms=2, v_min=-10.0, v_max=10.0)
    old, actor = lively_actor(args, 3, 2, seed=3), lively_actor(args, 3, 2, seed=4)
    graph, params = trudi_mjx.nnx.split(actor)
    seen, noise = normals(5, 24, 3), normals(6, 3, 24, 2)
    chain = trudi_mjx.sample_chain(old, seen, normals(7, 3, 24, 2))
    duals = {"log_alpha": jnp.log(0.3), "log_lambda": jnp.log(2.0)}

    def critic(observation, action):  # Q = 2 (u_1 + u_2) of atoms at -10 and 10
        p = 0.5 + 0.1 * action.sum(-1)
        return jnp.stack([jnp.zeros_like(p), jnp.log(p / (1 - p))], -1)

    @jax.jit
    @jax.value_and_grad
    def trudis(params, bound):
        batch = trudi_mjx.Batch(seen, seen, None, chain.trajectory, None)
        bounded = dataclasses.replace(args, trust_region_bound=bound)
        actor = trudi_mjx.nnx.merge(graph, params)
        return trudi_mjx.actor_loss(actor, bounded, old, critic, duals, batch, noise)[0]

    @jax.jit
    @jax.value_and_grad
    def dimes(params):
        batch = dime.Batch(seen, seen, None, None)
        own = args_of(dime, num_diffusion_steps=2, num_atoms=2, v_min=-10.0, v_max=10.0)
        return dime.actor_loss(trudi_mjx.nnx.merge(graph, params), own, critic, {"log_alpha": jnp.log(0.3)}, batch, noise)[0]

    value, gradient = dimes(params)
    free, violated = (trudis(params, bound) for bound in (np.inf, 0.0))
    assert value == free[0] != violated[0]
    for own, same, other in zip(*map(jax.tree.leaves, (gradient, free[1], violated[1])), strict=True):
        np.testing.assert_allclose(own, same, atol=1e-6)
        assert np.abs(own - other).max() > 1e-3


def test_dime_alpha():
    """It falls iff the policy is noisier than its target; and there is no other dual, nor a flag of a trust region."""
    args = args_of(dime, target_entropy_scale=0.7)
    for surplus in (-0.4, 0.4):
        gradient = jax.grad(dime.dual_loss)({"log_alpha": jnp.log(0.5)}, args, -2.1 + surplus + jnp.array([-1.0, 1.0]), 3)
        np.testing.assert_allclose(gradient["log_alpha"], 0.5 * surplus, rtol=1e-4)
    assert {field.name for field in dataclasses.fields(trudi_mjx.Args)} - set(vars(args)) == {"trust_region_bound", "export"}


# ---------------------------------------------------------------------------------------------------------------- DPPO
@dataclasses.dataclass(eq=False)
class Predictor:
    """An actor of DPPO that predicts a given function of state, step and latents."""

    f: callable
    num_steps: int = 4

    def embed(self, observation):
        return observation, jnp.arange(1.0, self.num_steps + 1)[:, None]

    def __call__(self, observation_part, time_part, latent):
        return self.f(observation_part, time_part, latent)


def dppo_mean(f, plan, state, n, latent):
    """The mean of a^(n-1) in double precision."""
    k = n - 1
    return plan.from_action[k] * np.clip(f(np, state, n, latent), -1, 1) + plan.from_latent[k] * latent


def wiggle(xp, state, n, a):
    return xp.sin(2 * a + 0.3 * n) + 0.2 * state


def wobble(xp, state, n, a):
    return xp.sin(2 * a + 0.4 * n) + 0.1 * state


def old_chains(n_steps=4, least_std=0.1):
    """Observations, chains of `wiggle` and their noise, NumPy's schedule."""
    seen, noise = normals(8, 50, 1), normals(9, n_steps + 1, 50, 2)
    chain = dppo.sample_chain(Predictor(lambda *x: wiggle(jnp, *x), n_steps), seen, noise, least_std)
    return seen, noise, chain, dppo.Schedule(*(np.asarray(x, np.float64) for x in dppo.make_schedule(n_steps)))


@pytest.mark.parametrize("n_steps", [1, 4, 8])
def test_dppo_schedule_is_the_posterior(n_steps):
    """Of a^(n-1), by completing the square: of its density given the action, times that of a^n given a^(n-1)."""
    plan = dppo.Schedule(*(np.asarray(x, np.float64)[:, 0] for x in dppo.make_schedule(n_steps)))
    before = (np.cos(np.pi / 2 * (np.arange(n_steps) / n_steps + 0.008) / 1.008) / np.cos(np.pi / 2 * 0.008 / 1.008)) ** 2
    step = np.append(before[1:] / before[:-1], 0.001)  # 1 - beta, of which the last would be 0
    for n in range(1, n_steps):  # where the variance is not 0
        precision = 1 / (1 - before[n]) + step[n] / (1 - step[n])
        np.testing.assert_allclose(plan.std[n] ** 2, 1 / precision, rtol=1e-3)
        np.testing.assert_allclose(plan.from_action[n], np.sqrt(before[n]) / (1 - before[n]) / precision, rtol=1e-3)
        np.testing.assert_allclose(plan.from_latent[n], np.sqrt(step[n]) / (1 - step[n]) / precision, rtol=1e-3)
    np.testing.assert_allclose([plan.from_action[0], plan.from_latent[0], plan.std[0]], [1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("least_std", [0.1, 0.0])
def test_dppo_chain(least_std):
    seen, noise, chain, plan = old_chains(least_std=least_std)
    latents, means = (np.asarray(x, np.float64) for x in chain.trajectory)
    noise = np.asarray(noise)
    np.testing.assert_array_equal(latents[:, 4], noise[4])
    np.testing.assert_array_equal(chain.action, latents[:, 0])
    for n in range(1, 5):
        mean = dppo_mean(wiggle, plan, np.asarray(seen), n, latents[:, n])
        np.testing.assert_allclose(means[:, n - 1], mean, atol=1e-4)
        np.testing.assert_allclose(latents[:, n - 1], mean + np.maximum(plan.std[n - 1], least_std) * noise[n - 1], atol=1e-4)
    assert np.allclose(chain.action, means[:, 0]) == (least_std == 0)


@pytest.mark.parametrize("n_steps", [1, 4])
def test_dppo_loss_of_every_denoising_step(n_steps):
    """Against scipy's densities of each step, summed up in NumPy."""
    seen, _, chain, plan = old_chains(n_steps)
    args, advantage = args_of(dppo, num_diffusion_steps=n_steps, epsilon=0.03), np.asarray(normals(10, 50))
    batch = dppo.Batch(seen, None, chain.trajectory, jnp.asarray(advantage), None)
    loss, (outside, kl) = dppo.actor_loss(Predictor(lambda *x: wobble(jnp, *x), n_steps), args, batch)
    latents, total, distance, beyond = np.asarray(chain.trajectory.latents, np.float64), 0.0, 0.0, []
    for n in range(1, n_steps + 1):
        std = np.maximum(plan.std[n - 1], 0.1)
        means = [dppo_mean(f, plan, np.asarray(seen), n, latents[:, n]) for f in (wiggle, wobble)]
        old, new = (norm.logpdf(latents[:, n - 1], mean, std) for mean in means)
        ratio = np.exp((new - old).mean(-1))
        total -= np.minimum(ratio * advantage, np.clip(ratio, 0.97, 1.03) * advantage).mean() / n_steps
        distance = distance + ((means[0] - means[1]) ** 2 / (2 * std**2)).sum(-1)
        beyond.append(np.abs(ratio - 1) > 0.03)
    np.testing.assert_allclose(loss, total, rtol=2e-3)
    np.testing.assert_allclose(kl, distance, rtol=2e-3, atol=1e-4)
    assert (np.asarray(outside) != np.stack(beyond, -1)).mean() < 0.02  # rounding
    assert 0.1 < np.mean(beyond) < 1 or n_steps == 1
    same, (outside, kl) = dppo.actor_loss(Predictor(lambda *x: wiggle(jnp, *x), n_steps), args, batch)
    np.testing.assert_allclose(same, -advantage.mean(), atol=1e-3)
    np.testing.assert_allclose(kl, 0, atol=1e-5)


def test_dppo_rewards_are_scaled():
    """By the standard deviation of all discounted sums so far, here summed up in NumPy; no larger than 10."""
    args, rng = args_of(dppo, gamma=0.9), np.random.default_rng(3)
    sizes = (3, 40, 5)  # rollouts, steps, environments
    reward, ended = rng.normal(2, 5, sizes), rng.random(sizes) < 0.1
    reward[0, 0, 0] = 1e4  # in one sum of 200, and so 14 of their deviations
    ended[0, 0, 0] = True
    scale = dppo.RewardScale(dppo.init_statistics(jnp.zeros((5, 1))), jnp.zeros(5))
    sums, now = [], np.zeros(5)
    for k in range(3):
        for t in range(40):
            now = 0.9 * now + reward[k, t]
            sums.append(now)
            now = np.where(ended[k, t], 0, now)
        scale, scaled = dppo.scale_rewards(args, scale, jnp.asarray(reward[k]), jnp.asarray(ended[k]))
        np.testing.assert_allclose(scaled, np.clip(reward[k] / np.std(sums), -10, 10), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(scale.total, now, rtol=1e-4, atol=1e-3)
        assert (np.abs(scaled).max() == 10) == (k == 0)  # of the one large reward


# ----------------------------------------------------------------------------------------------------------------- FPO
def draws(count=30):
    """Latents, draws of noise and of time."""
    time = jax.random.uniform(jax.random.PRNGKey(13), (count, 8, 1), minval=0.01)
    return normals(11, count, 2), normals(12, count, 8, 2), time


def test_matching_loss_of_known_velocities():
    latent, noise, time = draws()
    right = fpo.matching_loss(lambda seen, x, t: (x - latent[:, None]) / t, jnp.zeros((30, 1)), latent, noise, time)
    np.testing.assert_allclose(right, 0, atol=1e-5)
    still = fpo.matching_loss(lambda seen, x, t: 0 * x, jnp.zeros((30, 1)), latent, noise, time)
    expected = ((1 - time) * (noise - latent[:, None])) ** 2
    np.testing.assert_allclose(still, expected.mean((1, 2)), rtol=1e-4)
    seen = fpo.matching_loss(lambda seen, x, t: seen[..., :1] + 0 * x, latent, latent, noise, time)
    expected = (1 - time) ** 2 * (noise - latent[:, None] - latent[:, None, :1]) ** 2
    np.testing.assert_allclose(seen, expected.mean((1, 2)), rtol=1e-4)


def test_flow_is_integrated():
    class Velocity:
        num_steps = 10

        def __init__(self, f):
            self.f = f

        def __call__(self, seen, latent, time):
            return self.f(latent, time)

    noise = normals(14, 20, 2)
    for f, end in ((lambda x, t: 0 * x + 0.7, noise - 0.7), (lambda x, t: 0.5 * x, noise * 0.95**10),
                   (lambda x, t: 0 * x + t, noise - 0.55)):  # times 1, 0.9 ... 0.1
        np.testing.assert_allclose(fpo.integrate(Velocity(f), jnp.zeros((20, 1)), noise), end, atol=1e-5)


def test_flow_starts_unlike_zero_and_draws_its_own_times():
    """The untrained actor's output depends on what it sees; times are those of the Euler steps, all equally often."""
    args = args_of(fpo, num_flow_steps=5)
    actor = fpo.Actor(args, 3, 2, fpo.nnx.Rngs(0))
    assert len(actor.hidden) == 4
    sample = fpo.sample_policy(fpo.Setup(args, None, 2, 1, None), actor, normals(15, 4000, 3), jax.random.PRNGKey(16))
    times, counts = np.unique(np.round(sample.time, 6), return_counts=True)
    np.testing.assert_allclose(times, [0.2, 0.4, 0.6, 0.8, 1.0], atol=1e-5)
    np.testing.assert_allclose(counts / counts.sum(), 0.2, atol=0.01)
    seen = jnp.stack([jnp.zeros(3), jnp.ones(3)])
    velocity = actor(seen, jnp.zeros((2, 2)), jnp.ones((2, 1)))
    assert np.abs(velocity[0] - velocity[1]).max() > 1e-3


def test_flow_standardises_after_the_first_rollout():
    """Before there is any observation, normalising changes none; what was stored is of the statistics it was taken with."""
    seen = normals(17, 6, 3) + 3
    np.testing.assert_allclose(fpo.normalize(fpo.init_statistics(seen), seen), seen, rtol=0.01)
    args = args_of(fpo, max_grad_norm=1e-9)
    setup = fpo.Setup(args, aim.Playground(), 1, 1, jax.sharding.Mesh(jax.devices()[:1], ("env",)))
    state = jax.jit(lambda key: fpo.init_state(setup, key))(jax.random.PRNGKey(1))
    key = jax.random.split(state.key, 5)[0]  # iterate's own
    _, data = fpo.rollout(setup, state.learner.actor, state.statistics, state.env_state, key)
    inputs = fpo.network_inputs(fpo.normalize(state.statistics, data.observation))
    again = jax.vmap(lambda *x: fpo.matching_loss(state.learner.actor, *x))(inputs.actor, data.latent, data.noise, data.time)
    np.testing.assert_allclose(again, data.loss, rtol=1e-3)
    end, metrics = jax.jit(lambda state: fpo.iterate(setup, state))(state)
    assert metrics["trust_region/outside"] == 0
    np.testing.assert_allclose(end.statistics.moments[:, 0], [data.observation.mean(), data.observation.var()], atol=1e-4)


def test_flow_is_paid_ten_times():
    """What the critic is to learn is of rewards times --reward-scale, and nothing else is."""
    targets = []
    for scale in (1.0, 10.0):
        args = args_of(fpo, reward_scale=scale, gamma=0.0)
        setup = fpo.Setup(args, aim.Playground(), 1, 1, jax.sharding.Mesh(jax.devices()[:1], ("env",)))
        state = jax.jit(lambda key, setup=setup: fpo.init_state(setup, key))(jax.random.PRNGKey(1))
        _, metrics = jax.jit(lambda state, setup=setup: fpo.iterate(setup, state))(state)
        targets.append(metrics["critic/target"])
        returns = metrics["charts/episodic_return"]
    np.testing.assert_allclose(targets[1], 10 * targets[0], rtol=1e-4)
    np.testing.assert_allclose(targets[0], returns, rtol=1e-3)


def test_flow_loss_is_clipped():
    """In ratios of matching losses; a velocity of 0 but for a shift, on latents and noise whose losses are known."""
    args, (latent, noise, time) = args_of(fpo, epsilon=0.2), draws(60)
    still = ((1 - time) * (noise - latent[:, None])) ** 2
    old = np.asarray(still.mean((1, 2))) + np.tile([-0.3, -0.1, 0.0, 0.1, 0.3], 12)
    advantage = np.repeat([1.5, -0.5], 30)
    batch = fpo.Batch(jnp.zeros((60, 1)), None, latent, noise, time, jnp.asarray(old), jnp.asarray(advantage), None)

    def loss(shift):
        return fpo.actor_loss(lambda seen, x, t: 0 * x + shift[:, None, None], args, batch)

    (value, ratio), slope = jax.value_and_grad(loss, has_aux=True)(jnp.zeros(60))
    expected = np.tile(np.exp([-0.3, -0.1, 0.0, 0.1, 0.3]), 12)
    np.testing.assert_allclose(ratio, expected, rtol=1e-3)
    clipped = np.clip(expected, 0.8, 1.2)
    np.testing.assert_allclose(value, -np.minimum(expected * advantage, clipped * advantage).mean(), rtol=1e-3)
    stopped = np.where(advantage > 0, expected > 1.2, expected < 0.8)
    assert stopped.sum() == 12
    towards = 2 * np.asarray(((1 - time) ** 2 * (noise - latent[:, None])).mean((1, 2)))  # minus the matching loss's slope
    np.testing.assert_allclose(slope * 60, np.where(stopped, 0, -advantage * expected * towards), atol=1e-3)
