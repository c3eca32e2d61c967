"""A Markov decision process that can be solved: a corridor of four places, which ends at its right.

An action above 0 is a step to the right, any other one to the left; each place has an action that it likes.
"""

from types import SimpleNamespace

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from probes import Sim

PLACES = 4
TIME_LIMIT = 6
LIKED = np.array([0.5, -0.2, 0.4, 0.7], np.float32)
EXIT = 2.0  # what leaving pays
OBSERVED = (3 + 5 * np.eye(PLACES)).astype(np.float32)  # what is seen at each place; it needs to be standardised
MOMENTS = np.stack([OBSERVED.mean(0), OBSERVED.var(0)])  # mean and variance, all places being as likely


def move(xp, place, action):
    """Where actions (...) lead from places (...), what they pay, and which of them leave; xp is np, jnp or torch."""
    right = action > 0
    leaves = right & (place == PLACES - 1)
    reward = EXIT * leaves - 0.5 * (action - xp.asarray(LIKED)[place]) ** 2
    after = xp.clip(place + xp.where(right, 1, -1), 0, PLACES - 1)
    return after, reward, leaves


def action_value(value, action, gamma, ends):
    """Q (PLACES, M) of actions at every place, where V is `value`; `ends`: leaving ends an episode."""
    after, reward, leaves = move(np, np.arange(PLACES)[:, None], action)
    return reward + gamma * np.where(leaves & ends, 0, value[after])


def policy_value(action, bonus, gamma, ends):
    """V (PLACES,) of a policy, by its samples (PLACES, M) at every place and what else each of them earns."""
    value = np.zeros(PLACES)
    for _ in range(200):
        value = (bonus + action_value(value, action, gamma, ends)).mean(1)
    return value


def expected_return(action, ends):
    """Of an episode that begins anywhere, under a policy with these samples (PLACES, M)."""
    value = np.zeros(PLACES)
    for _ in range(TIME_LIMIT):
        value = action_value(value, action, 1, ends).mean(1)
    return value.mean()


def optimal_return(ends):
    """Of an episode that begins anywhere, under the best of all policies."""
    grid = np.tile(np.linspace(-0.999, 0.999, 2000), (PLACES, 1))
    value = np.zeros(PLACES)
    for _ in range(TIME_LIMIT):
        value = action_value(value, grid, 1, ends).max(1)
    return value.mean()


class Playground:
    """As a task of MuJoCo Playground."""

    action_size = 1

    def reset(self, key):
        zero = jnp.zeros(())
        place = jax.random.randint(key, (), 0, PLACES)
        return Sim(jnp.asarray(OBSERVED)[place], zero, zero, place, zero)

    def step(self, sim, action):
        place, reward, leaves = move(jnp, sim.count, action[0])
        return sim.replace(obs=jnp.asarray(OBSERVED)[place], reward=reward, done=leaves.astype(float), count=place)


class Gymnasium(gym.Env):
    """As a task of Gymnasium."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (PLACES,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.integers(PLACES)
        return OBSERVED[self.place], {}

    def step(self, action):
        self.place, reward, leaves = move(np, self.place, action[0])
        return OBSERVED[self.place], reward, bool(leaves), False, {}


gym.register("Corridor-v0", Gymnasium, max_episode_steps=TIME_LIMIT)


class IsaacLab:
    """As a task of Isaac Lab 3.0, many at once."""

    max_episode_length, step_dt = TIME_LIMIT, 0.05
    single_action_space = SimpleNamespace(shape=(1,))
    cfg = SimpleNamespace(auto_reset=True)

    def __init__(self, num_envs):
        import torch

        self.torch = torch
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long)
        self.place = torch.zeros(num_envs, dtype=torch.long)

    def observe(self):
        return {"policy": self.torch.asarray(OBSERVED)[self.place]}

    def restart(self, which):
        self.place = self.torch.where(which, self.torch.randint(PLACES, which.shape), self.place)
        self.episode_length_buf[which] = 0

    def reset(self):
        self.restart(self.torch.ones_like(self.place, dtype=bool))
        return self.observe(), {}

    def step(self, action):
        self.place, reward, leaves = move(self.torch, self.place, action[:, 0])
        self.episode_length_buf += 1
        late = self.episode_length_buf >= TIME_LIMIT
        extras = {"final_obs": self.observe()}
        self.restart(leaves | late)
        return self.observe(), reward, leaves, late, extras


class ManiSkill:
    """As a task of ManiSkill in which leaving is a success, many in one scene."""

    def __init__(self, num_envs, evaluation):
        import torch

        self.torch, self.num_envs, self.evaluation = torch, num_envs, evaluation
        self.base_env = SimpleNamespace(elapsed_steps=torch.zeros(num_envs, dtype=torch.int32))
        self.place = torch.zeros(num_envs, dtype=torch.long)
        self.total = torch.zeros(num_envs)

    def restart(self, which):
        self.place = self.torch.where(which, self.torch.randint(PLACES, which.shape), self.place)
        self.total[which] = 0
        self.base_env.elapsed_steps[which] = 0

    def observe(self):
        return self.torch.asarray(OBSERVED)[self.place]

    def reset(self, seed):
        assert len(set(seed)) == self.num_envs
        self.restart(self.torch.ones(self.num_envs, dtype=bool))
        return self.observe(), {}

    def step(self, action):
        self.place, reward, leaves = move(self.torch, self.place, action[:, 0])
        self.base_env.elapsed_steps += 1
        self.total += reward
        late = self.base_env.elapsed_steps >= TIME_LIMIT
        success = leaves & (not self.evaluation)
        steps = self.base_env.elapsed_steps.clone()
        info = {"episode": {"return": self.total.clone(), "episode_len": steps}}
        ended = success | late
        if ended.any():
            info = {"final_info": info, "final_observation": self.observe()}
            self.restart(ended)
        return self.observe(), reward, success, late, info
