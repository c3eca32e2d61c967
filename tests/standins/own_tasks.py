"""Small tasks of Playground's kind that are no part of it, as `own_tasks:Point` and so on."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from mujoco_playground import MjxEnv, State


def default_config():
    return ConfigDict({"ctrl_dt": 0.1, "sim_dt": 0.1, "episode_length": 20, "reward": {"scale": 1.0}})


class Point(MjxEnv):
    """A point in the plane, pushed by the action; pays for being close to the origin."""

    def __init__(self, config=None, config_overrides=None):
        super().__init__(config or default_config(), config_overrides)

    def reset(self, key):
        position = jax.random.uniform(key, (2,), minval=-1, maxval=1)
        return State(None, position, jnp.zeros(()), jnp.zeros(()), {}, {})

    def step(self, state, action):
        position = jnp.clip(state.obs + self.dt * action, -2, 2)
        reward = self._config.reward.scale * jnp.exp(-(position**2).sum())
        return state.replace(obs=position, reward=reward)

    action_size = 2
    xml_path = mj_model = mjx_model = None


class Cliff(Point):
    """The same on a plate, from which the point may fall; so episodes end in both ways."""

    def step(self, state, action):
        state = super().step(state, 2 * action)
        return state.replace(done=(jnp.abs(state.obs) > 1).any().astype(float))


class NoTask:
    """Not of Playground's kind."""
