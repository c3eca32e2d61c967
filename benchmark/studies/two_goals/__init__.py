"""A point between equal goals: the smallest task in which a policy may keep several solutions.

    python trudi_mjx.py --env-id benchmark.studies.two_goals:TwoGoals      # or FourGoals, and any of benchmark/baselines

Small beside the paper's PushT and StackCube (its Figure 1 and Table 1), which want ManiSkill and a GPU: a
minute on a CPU core. `python -m benchmark.studies.two_goals.paths RUN ...` plays what was trained from the one place
that is as far from every goal, where training never began on purpose.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from mujoco_playground import MjxEnv, State

RADIUS = 0.7  # of the circle on which the goals lie
WIDTH = 0.5  # distance from a goal at which a step pays 1 / e of what it does on it


def default_config() -> ConfigDict:
    """The clock, as Playground's tasks have it: 40 steps of 0.1 s."""
    return ConfigDict({"ctrl_dt": 0.1, "sim_dt": 0.1, "episode_length": 40})


class TwoGoals(MjxEnv):
    """A point in the plane, whose velocity is the action, and goals to its right and left.

    It starts anywhere in a square. A step pays exp(-(d / WIDTH)^2), d being the distance to the nearest goal.
    """

    action_size = 2
    num_goals = 2
    turned = 0.0  # of the first goal about the origin, in radians
    xml_path = mj_model = mjx_model = None

    def __init__(self, config: ConfigDict | None = None, config_overrides: dict | None = None):
        super().__init__(config or default_config(), config_overrides)

    @property
    def goals(self) -> jax.Array:
        """Their places (G, 2)."""
        angle = self.turned + 2 * jnp.pi * jnp.arange(self.num_goals) / self.num_goals
        return RADIUS * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)

    def reset(self, rng: jax.Array) -> State:
        """Anywhere in [-1, 1]^2."""
        position = jax.random.uniform(rng, (2,), minval=-1, maxval=1)
        return State(None, position, jnp.zeros(()), jnp.zeros(()), {}, {})

    def step(self, state: State, action: jax.Array) -> State:
        """Move by action (2,) times the step's time; the observation is the place."""
        position = jnp.clip(state.obs + self.dt * action, -1, 1)
        distance = jnp.linalg.norm(position - self.goals, axis=-1).min()
        return state.replace(obs=position, reward=jnp.exp(-((distance / WIDTH) ** 2)))


class FourGoals(TwoGoals):
    """The same with a goal towards each corner."""

    num_goals = 4
    turned = jnp.pi / 4
