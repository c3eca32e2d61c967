"""The critic: HL-Gauss, its loss, its targets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import Counter, setup_for, small_args
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
