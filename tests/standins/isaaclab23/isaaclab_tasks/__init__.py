"""One task under its name in 2.3: isaaclab_counters.py's, without observations of how an episode ended."""

import os

import gymnasium as gym
from isaaclab import write


class Counting(gym.Env):
    """The environment that gym.make gives."""

    action_space = observation_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, cfg, render_mode=None):
        from isaaclab_counters import Counters
        write("make")
        self.fake = Counters("2.3", ends=[3, 99][:cfg.num_envs])

    def __getattr__(self, name):
        return getattr(self.__dict__["fake"], name)

    def step(self, action):
        if os.environ.get("ROBOT") == "falls":
            raise ZeroDivisionError("the robot fell through the floor")
        return self.fake.step(action)

    def reset(self, **_):
        return self.fake.reset()

    def close(self):
        write("env.close")


gym.register("Isaac-Velocity-Flat-G1-v0", Counting, disable_env_checker=True)
