"""A task that reads contacts, which MuJoCo's engine does not hand to JAX: `contact_task:Touching`."""

from mujoco_playground._src.dm_control_suite import cheetah

default_config = cheetah.default_config


class Touching(cheetah.Run):
    """CheetahRun that pays for depth of contact."""

    def step(self, state, action):
        state = super().step(state, action)
        return state.replace(reward=state.data._impl.contact.dist.sum())
