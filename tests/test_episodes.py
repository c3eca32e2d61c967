"""Environments' episodes: how they end and restart, and what rollouts keep of them."""

from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mujoco_playground import State
from probes import Counter, Sim, lively_actor, setup_for, small_args

import trudi_mjx as trudi


def test_a_simulation_that_has_become_nan_pays_nothing_more():
    """But a NaN reward of one that goes on is left for the losses to stop at."""
    zeros = jnp.zeros(4)
    sim = Sim(zeros, jnp.array([2.0, jnp.nan, jnp.nan, 3.0]), jnp.array([0.0, 0.0, 1.0, 1.0]), zeros, zeros)
    stepped = trudi.over_envs(setup_for(Counter(), small_args(), 9), lambda sim: sim, sim)
    np.testing.assert_array_equal(stepped.reward, [2, np.nan, 0, 3])


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


def test_what_is_logged_of_targets_duals_and_episodes(monkeypatch):
    """Episodes of five steps, which pay 1 to 5; the first of an environment does not count if its clock was set."""
    args = small_args(num_steps=16, minibatch_size=256, v_min=-1.0, v_max=1.5, num_diffusion_steps=2)
    setup = setup_for(Counter(), args, 5)
    state = trudi.init_state(setup, jax.random.PRNGKey(0))
    targets = np.linspace(-2, 2, 256, dtype=np.float32)
    monkeypatch.setattr(trudi, "critic_targets", lambda *_: jnp.asarray(targets).reshape(16, 16))
    duals = {"log_alpha": jnp.log(0.02), "log_lambda": jnp.log(0.03)}
    after, found = jax.jit(lambda state: trudi.iterate(setup, state))(
        state._replace(learner=state.learner._replace(duals=duals)))
    learner = after.learner
    assert found["critic/targets_clipped"] == np.mean((targets < -1) | (targets > 1.5))
    np.testing.assert_allclose(found["critic/target"], 0, atol=1e-6)
    np.testing.assert_allclose(found["entropy/alpha"], np.exp(learner.duals["log_alpha"]), rtol=1e-6)
    np.testing.assert_allclose(found["trust_region/lambda"], np.exp(learner.duals["log_lambda"]), rtol=1e-6)
    friction = np.log1p(np.exp(learner.actor.raw_friction[...]))
    np.testing.assert_allclose(found["entropy/friction"], friction.mean(), rtol=1e-6)
    assert found["charts/episodic_return"] == 15 and found["charts/episodic_length"] == 5
    assert found["charts/episodes"] == sum((16 + int(clock)) // 5 - (clock > 0) for clock in state.env_state.clock)


@pytest.mark.parametrize("mode", ["ode", "sde", "best-of-k"])
def test_actor_and_critic_may_see_different_things(mode):
    """As those of the humanoids do."""
    args = small_args(eval_mode=mode)
    setup = setup_for(Counter(), args, 5)
    actor = trudi.Actor(args, 3, 1, trudi.nnx.Rngs(0))
    critic = trudi.Critic(args, 7, 1, trudi.nnx.Rngs(0))
    learner = trudi.Learner(actor, critic, *[None] * 4)
    inputs = trudi.network_inputs({"state": jnp.zeros((4, 3)), "privileged_state": jnp.zeros((4, 7))})
    shape = jax.eval_shape(lambda key: trudi.evaluation_action(setup, learner, inputs, key), jax.random.PRNGKey(0)).shape
    assert shape == (4, 1)
