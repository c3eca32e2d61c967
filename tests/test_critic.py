"""Environments' episodes, observation statistics, the critic's targets."""

import dataclasses
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mujoco_playground import State
from probes import Counter, Sim, lively_actor, setup_for, small_args
from scipy.stats import norm

import trudi_mjx as trudi

ENV_IDS = ["CartpoleBalance", "G1JoystickRoughTerrain"]  # one of each suite: atoms on [0, 150] and on [-10, 10]


# ----------------------------------------------------------------------------------------------------- HL-Gauss
@pytest.mark.parametrize("env_id", ENV_IDS)
def test_hl_gauss(env_id):
    args = small_args(env_id=env_id)
    low, high = (0, 150) if env_id == "CartpoleBalance" else (-10, 10)
    width = (high - low) / 150
    returns = np.concatenate([np.random.default_rng(0).uniform(low, high, 50), [low, high, low - 1, high + 1e3, -1e6, 0.0]])
    centre = np.clip(returns, low, high)[:, None]
    atoms = low + width * np.arange(151)
    above, below = norm.cdf(atoms + width / 2, centre, 0.75 * width), norm.cdf(atoms - width / 2, centre, 0.75 * width)
    expected = (above - below) / (above - below).sum(-1, keepdims=True)
    target = np.asarray(trudi.hl_gauss(args, jnp.asarray(returns)))
    np.testing.assert_allclose(target, expected, atol=2e-5)
    np.testing.assert_allclose(target.sum(-1), 1, atol=1e-5)
    inside = np.abs(returns - (low + high) / 2) < (high - low) / 2 - 4 * width
    q = trudi.q_value(args, jnp.log(target + 1e-30))
    np.testing.assert_allclose(q[inside], returns[inside], atol=0.01 * width)
    assert np.all(np.isfinite(q))


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_q_starts_near_zero(env_id):
    for width in (16, 512):
        args = small_args(env_id=env_id, hidden_dim=width)
        critic = trudi.Critic(args, 20, 4, trudi.nnx.Rngs(1))
        keys = jax.random.split(jax.random.PRNGKey(2))
        logits = critic(jax.random.normal(keys[0], (500, 20)), jax.random.uniform(keys[1], (500, 4), minval=-1))
        q = np.asarray(trudi.q_value(args, logits))
        assert np.abs(q).max() < 0.01 * (args.v_max - args.v_min)
        assert q.std() > 0  # it sees its input


def test_critic_descends_to_its_targets():
    """Cross-entropy is least, the targets' entropy, at the targets themselves."""
    args = small_args()
    returns = jnp.array([0.0, 3.3, 77.0, 150.0])
    batch = trudi.Batch(*[None] * 4, target=returns)
    entropy = -(trudi.hl_gauss(args, returns) * jnp.log(trudi.hl_gauss(args, returns) + 1e-30)).sum(-1).mean()

    def loss(logits):
        return trudi.critic_loss(lambda observation, action: logits, args, batch)

    best = jnp.log(trudi.hl_gauss(args, returns) + 1e-30)
    assert np.isclose(loss(best), entropy, rtol=1e-4)
    assert np.abs(jax.grad(loss)(best)).max() < 1e-6
    assert loss(best[::-1]) > entropy + 1


# ------------------------------------------------------------------------------------------------ lambda-returns
def n_step_mixture(args, reward, terminated, truncated, value, bonus):
    """G^lambda (T,) as the weighted sum of n-step soft returns, each summed from its first reward on."""
    steps, gamma, td_lambda = len(reward), args.gamma, args.td_lambda
    target = np.zeros(steps)
    for t in range(steps):
        ends = [k for k in range(t, steps) if terminated[k] or truncated[k] or k == steps - 1]
        longest = ends[0] - t + 1
        for n in range(1, longest + 1):
            last = t + n - 1
            alive = 0.0 if terminated[last] else 1.0
            total = sum(gamma ** (k - t) * reward[k] for k in range(t, last + 1))
            total += sum(gamma ** (k - t + 1) * bonus[k] for k in range(t, last))  # earned by the actions at t + 1 ... last
            total += alive * gamma**n * (bonus[last] + value[last])
            target[t] += total * (td_lambda ** (n - 1) * (1 - td_lambda) if n < longest else td_lambda ** (n - 1))
    return target


@pytest.mark.parametrize("td_lambda", [0.0, 0.7, 0.95, 1.0])
def test_lambda_returns_are_the_n_step_mixture(td_lambda):
    """With a termination, a time-out or both at every one of twelve steps, and at random everywhere."""
    steps, rng = 12, np.random.default_rng(1)
    single = np.eye(steps, dtype=bool)
    none = np.zeros_like(single)
    chance = rng.random((2, 200, steps)) < np.array([0.15, 0.2])[:, None, None]
    terminated = np.concatenate([none[:1], single, none, single, chance[0]])
    truncated = np.concatenate([none[:1], none, single, single, chance[1]])
    reward, value, bonus = rng.normal(size=(3, *terminated.shape))
    args = dataclasses.replace(small_args(), td_lambda=td_lambda, gamma=0.9)
    given = [x.T for x in (reward, terminated, truncated, value, bonus)]
    target = np.asarray(trudi.lambda_returns(args, *map(jnp.asarray, given))).T
    expected = [n_step_mixture(args, *row) for row in zip(reward, terminated, truncated, value, bonus, strict=True)]
    np.testing.assert_allclose(target, expected, atol=2e-5)


def test_a_termination_cuts_off_what_is_not_finite():
    """Of a simulation that diverged, the value after its end is NaN."""
    args, zeros = small_args(), jnp.zeros((3, 1))
    terminated = jnp.array([[False], [True], [False]])
    values = jnp.where(terminated, jnp.nan, 1.0)
    target = trudi.lambda_returns(args, zeros + 1, terminated, terminated & False, values, values)
    assert np.isfinite(target).all()
    assert target[1, 0] == 1


def test_a_simulation_that_has_become_nan_pays_nothing_more():
    """But a NaN reward of one that goes on is left for the losses to stop at."""
    zeros = jnp.zeros(4)
    sim = Sim(zeros, jnp.array([2.0, jnp.nan, jnp.nan, 3.0]), jnp.array([0.0, 0.0, 1.0, 1.0]), zeros, zeros)
    stepped = trudi.over_envs(setup_for(Counter(), small_args(), 9), lambda sim: sim, sim)
    np.testing.assert_array_equal(stepped.reward, [2, np.nan, 0, 3])


@pytest.mark.parametrize("limit", ["termination", "time-out"])
def test_values_of_a_constant_reward(limit):
    """Tabular evaluation, through env_step and lambda_returns, of five-step episodes that pay 1 a step.

    A termination after five steps makes the k-th state worth (1 - 0.9^(5 - k)) / 0.1; a time-out leaves it worth 10.
    """
    args = dataclasses.replace(small_args(num_envs=32), gamma=0.9, td_lambda=0.6)
    setup = setup_for(Counter(5 if limit == "termination" else 1000), args, 5 if limit == "time-out" else 1000)
    env = trudi.env_reset(setup, jax.random.PRNGKey(0))

    def step(env, _):
        after, outcome = trudi.env_step(setup, env, jnp.zeros((32, 1)))
        before, later = (x[:, 0].astype(int) for x in (env.sim.obs, outcome.next_observation))
        return after, (before, outcome.terminated, outcome.truncated, later)

    _, (state, terminated, truncated, after) = jax.lax.scan(step, env, None, 40)
    assert {int(x) for x in np.unique(after)} == {1, 2, 3, 4, 5}
    ones, acted_in = jnp.ones(state.shape), state == jnp.arange(5)[:, None, None]

    def improve(values, _):
        values = jnp.append(values, values[4] if limit == "time-out" else 0.0)  # nobody acts in the last state
        target = trudi.lambda_returns(args, ones, terminated, truncated, values[after], 0 * ones)
        return jnp.sum(target * acted_in, (1, 2)) / acted_in.sum((1, 2)), None

    values, _ = jax.lax.scan(improve, jnp.zeros(5), None, 80)
    expected = (1 - 0.9 ** np.arange(5, 0, -1)) / 0.1 if limit == "termination" else np.full(5, 10.0)
    np.testing.assert_allclose(values, expected, atol=0.02)


# -------------------------------------------------------------------------------------------------------- episodes
def play(setup, env, steps):
    """The last state, and the outcomes of every step."""
    return jax.lax.scan(lambda env, _: trudi.env_step(setup, env, jnp.zeros((setup.args.num_envs, 1))), env, None, steps)


def test_episodes_end_and_restart():
    """Environment e terminates after 3, 4, ... steps, the time limit is 6; clocks start at 0."""
    args = small_args(num_envs=8, num_eval_envs=8)
    setup = setup_for(Counter(), args, 6)
    start = trudi.env_reset(setup, jax.random.PRNGKey(0))
    limits = jnp.arange(3, 11)
    sim = start.sim._replace(limit=limits)
    after, (reward, terminated, truncated, observation, ended, total, length) = play(
        setup, start._replace(sim=sim, starts=sim, clock=jnp.zeros(8, int)), 13)
    for e, limit in enumerate(range(3, 11)):
        period = min(limit, 6)
        step = 1 + np.arange(13) % period  # of the present episode, after stepping
        np.testing.assert_array_equal(reward[:, e], step)
        np.testing.assert_array_equal(observation[:, e, 0], step)  # the last one too, not the reset's
        np.testing.assert_array_equal(terminated[:, e], (step == period) & (limit <= 6))
        np.testing.assert_array_equal(truncated[:, e], (step == period) & (limit > 6))
        np.testing.assert_array_equal(ended[:, e], step == period)
        np.testing.assert_array_equal(length[ended[:, e], e], period)
        np.testing.assert_array_equal(total[ended[:, e], e], period * (period + 1) / 2)
        now = 13 % period
        assert (int(after.sim.count[e]), int(after.clock[e]), int(after.length[e])) == (now, now, now)
        assert float(after.sim.obs[e, 0]) == now
        assert float(after.total[e]) == now * (now + 1) / 2
        assert int(after.sim.limit[e]) == limit
    assert after.clock.dtype == start.clock.dtype


def test_buffers_shared_by_all_environments_are_not_reset(monkeypatch):
    """As MuJoCo Warp has them: without an axis of environments."""
    sim = {"own": jnp.ones((2, 3)), "shared": jnp.ones(5)}
    fake = namedtuple("Fake", "data reward done obs info")
    sims = [fake({k: scale * v for k, v in sim.items()}, *[jnp.array([0.0, scale])] * 3, {}) for scale in (1.0, 0.0)]
    monkeypatch.setattr(trudi, "over_envs", lambda setup, step, sim, action: sim)
    zeros = jnp.zeros(2, int)
    after, _ = trudi.env_step(setup_for(Counter(), small_args(), 9), trudi.EnvState(*sims, zeros, zeros, jnp.zeros(2)), None)
    np.testing.assert_array_equal(after.sim.data["own"], [[1] * 3, [0] * 3])
    np.testing.assert_array_equal(after.sim.data["shared"], 1)


def test_clocks_start_spread_out_and_first_episodes_are_not_counted():
    args = small_args(num_envs=512, num_steps=1, minibatch_size=512)
    setup = setup_for(Counter(), args, 20)
    start = trudi.env_reset(setup, jax.random.PRNGKey(3))
    counts = np.bincount(start.clock, minlength=20)
    assert len(counts) == 20
    assert counts.min() > 5
    assert counts.max() < 60
    np.testing.assert_array_equal(start.length, 0)
    after, (_, terminated, truncated, _, ended, _, length) = play(setup, start, 40)
    assert not terminated.any()
    np.testing.assert_array_equal(truncated.sum(0), 2)  # the one begun in the middle, and a whole one
    np.testing.assert_array_equal(ended[:20].sum(0), start.clock == 0)
    np.testing.assert_array_equal(ended.sum(0), 1 + (np.asarray(start.clock) == 0))
    np.testing.assert_array_equal(length[ended], 20)


def play_policy(setup, env, key):
    """A rollout of the untrained policy: the environments afterwards, and its transitions."""
    statistics = trudi.Statistics(jnp.zeros(()), jnp.stack([jnp.zeros(1), jnp.ones(1)]))
    actor = trudi.Actor(setup.args, 1, 1, trudi.nnx.Rngs(0))
    return jax.jit(lambda env, key: trudi.rollout(setup, actor, statistics, env, key))(env, key)


@pytest.mark.parametrize("ending", [0, 1, 11, 16])
@pytest.mark.parametrize("time_limit", [9, 64, 10**6])
def test_episodes_start_from_fresh_states(ending, time_limit):
    """Some of 16 environments end an episode once within 8 steps: just they have new states to start from."""
    class Draws(Counter):
        def reset(self, key):
            return super().reset(key)._replace(obs=jax.random.uniform(key, (1,)))

    setup = setup_for(Draws(), small_args(), time_limit)
    env = trudi.env_reset(setup, jax.random.PRNGKey(0))
    order = np.random.default_rng(0).permutation(16)
    limits = jnp.where(order < ending, 1 + jnp.arange(16) % 8, 10**6)
    env = env._replace(sim=env.sim._replace(limit=limits), clock=jnp.zeros(16, int))
    after, data = play_policy(setup, env, jax.random.PRNGKey(1))
    np.testing.assert_array_equal((data.terminated | data.truncated).sum(0), order < ending)
    before, now = env.starts.obs[:, 0], after.starts.obs[:, 0]
    np.testing.assert_array_equal(before != now, order < ending)
    assert len(np.unique(np.concatenate([before, now]))) == 16 + ending


class Dice:
    """An episode of one step, which pays what the environment's own key has drawn."""

    action_size = 1

    def reset(self, key):
        zero = jnp.zeros(())
        return State(None, zero[None], zero, zero, {}, {"rng": key})

    def step(self, sim, action):
        rng, key = jax.random.split(sim.info["rng"])
        return sim.replace(reward=jax.random.uniform(key), done=jnp.ones(()), info={"rng": rng})


def test_no_episode_repeats_anothers_randomness():
    """Though all eight of a rollout begin in the same state."""
    setup = setup_for(Dice(), small_args(), 1000)
    env = trudi.env_reset(setup, jax.random.PRNGKey(0))
    after, first = play_policy(setup, env, jax.random.PRNGKey(1))
    _, second = play_policy(setup, after, jax.random.PRNGKey(2))
    assert len(np.unique(np.concatenate([first.reward, second.reward]))) == 2 * first.reward.size


def test_rollout_keeps_what_acted():
    """Chains at the normalised observation, clipped actions, and observations that follow each other."""
    args = small_args()
    setup = setup_for(Counter(), args, 5)
    env = trudi.env_reset(setup, jax.random.PRNGKey(0))
    statistics = trudi.Statistics(jnp.ones(()), jnp.array([[2.0], [3.99]]))
    actor = lively_actor(args, 1, 1, seed=0)
    _, data = jax.jit(lambda env, key: trudi.rollout(setup, actor, statistics, env, key))(env, jax.random.PRNGKey(1))
    assert data.trajectory.latents.shape == data.trajectory.means.shape == (8, 16, 8, 1)
    assert np.abs(data.action).max() == np.float32(0.999)
    going_on = ~np.asarray(data.terminated | data.truncated)[:-1]
    np.testing.assert_array_equal(data.next_observation[:-1][going_on], data.observation[1:][going_on])
    np.testing.assert_array_equal(data.observation[1:][~going_on], 0)
    steps, last = actor.step_sizes(), jnp.arctanh(data.action)
    rows = jax.tree.map(lambda x: x.reshape(128, -1, 1), data.trajectory)
    for offset, largest in ((2, 1e-5), (0, np.inf)):
        kl = trudi.trajectory_kl(actor, actor, (data.observation.reshape(128, 1) - offset) / 2, rows)
        assert 0 <= np.abs(kl).max() < largest
    assert np.abs(kl).max() > 1e-3  # it matters what the actor saw
    inside = np.abs(data.action) < 0.99
    deviation = np.asarray((last - data.trajectory.means[:, :, 0]) / np.sqrt(2 * steps[0]))[inside]
    assert 0.5 < deviation.std() < 1.5  # a^0 was drawn around the first mean


# ------------------------------------------------------------------------------------------------------ statistics
def test_statistics_of_batches_are_those_of_their_union():
    rng = np.random.default_rng(2)
    kinds = ((5, 1, 8), (-3, 10, 1), (100, 0.1, 30), (0, 2, 4))
    batches = [rng.normal(loc, scale, (steps, 16, 3)) for loc, scale, steps in kinds]
    statistics = trudi.init_statistics({"state": jnp.zeros((16, 3)), "privileged_state": jnp.zeros((16, 2))})
    for batch in batches:
        observations = {"state": jnp.asarray(batch), "privileged_state": jnp.asarray(2 * batch[..., :2])}
        statistics = trudi.update_statistics(statistics, observations)
    union = np.concatenate([batch.reshape(-1, 3) for batch in batches])
    assert statistics.count == len(union)
    moments = np.stack([union.mean(0), union.var(0)])
    np.testing.assert_allclose(statistics.moments["state"], moments, rtol=1e-4)
    np.testing.assert_allclose(statistics.moments["privileged_state"], [2 * moments[0, :2], 4 * moments[1, :2]], rtol=1e-4)


def test_normalized_observations():
    statistics = trudi.Statistics(jnp.ones(()), jnp.array([[1.0, 0.0, 5.0], [3.99, 0.0, 1.0]]))
    observation = jnp.array([[3.0, 0.05, 1e6], [1.0, -0.1, -1e6]])
    np.testing.assert_allclose(trudi.normalize(statistics, observation), [[1, 0.5, 10], [0, -1, -10]], rtol=1e-5)


def test_privileged_observations_are_the_critics():
    seen = trudi.network_inputs({"state": jnp.zeros((2, 3)), "privileged_state": jnp.ones((2, 5))})
    assert [x.shape for x in seen] == [(2, 3), (2, 5)]
    assert [x.shape for x in trudi.network_inputs(jnp.zeros((2, 4)))] == [(2, 4), (2, 4)]
