"""One task under its name in 2.3: test_isaaclab.py's counters, without observations of how an episode ended."""

import gymnasium as gym
from isaaclab import write


class Counting(gym.Env):
    """The environment that gym.make gives."""

    action_space = observation_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, cfg, render_mode=None):
        from test_isaaclab import Fake
        write("make")
        self.fake = Fake("2.3", ends=[3, 99][:cfg.num_envs])

    def __getattr__(self, name):
        return getattr(self.__dict__["fake"], name)

    def step(self, action):
        return self.fake.step(action)

    def reset(self, **_):
        return self.fake.reset()

    def close(self):
        write("env.close")


gym.register("Isaac-Velocity-Flat-G1-v0", Counting, disable_env_checker=True)
