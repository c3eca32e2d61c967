"""Small Gymnasium environments that misbehave or whose episodes are known, as `faulty:Raises-v0` and so on."""

import multiprocessing
import os
import time

import gymnasium as gym
import numpy as np


class Counter(gym.Env):
    """Observes (step, episode), pays its action each step; an episode terminates after `ends`[episode % len] steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, ends=(1000,), success=None, bar=None, render_mode=None):
        self.ends, self.success, self.episode, self.render_mode = ends, success, -1, render_mode
        self.task = type("Task", (), {"success_bar": bar})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now, self.episode = 0, self.episode + 1
        return np.array([0.0, self.episode]), {}

    def step(self, action):
        self.now += 1
        info = {} if self.success is None else {"success": self.now == self.success}
        return (np.array([self.now, self.episode]), float(action[0]), self.now == self.ends[self.episode % len(self.ends)],
                False, info)


class Raises(Counter):
    """Raises an exception at its third step."""

    def step(self, action):
        if self.now == 2:
            raise ZeroDivisionError("the robot fell through the floor")
        return super().step(action)


class Dies(Counter):
    """Ends its process at its third step, as a crash in a simulator's library does."""

    def step(self, action):
        if self.now == 2:
            os._exit(7)
        return super().step(action)


class Hangs(Counter):
    """Never returns from its third step."""

    def step(self, action):
        while self.now == 2:
            time.sleep(0.1)
        return super().step(action)


class Misshapen(Counter):
    """Observes one number less from its third step on."""

    def step(self, action):
        observation, *rest = super().step(action)
        return observation[: 1 if self.now == 3 else 2], *rest


class Paying(Counter):
    """Pays an array from its third step on."""

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, np.array([reward]) if self.now == 3 else reward, *rest


class Draws(Counter):
    """Observes two numbers of NumPy's global generator, drawn at every reset, as goals of HumanoidBench are."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.random.rand(2), {}


class Redraws(Draws):
    """The same, in episodes of three and five steps."""

    def __init__(self, render_mode=None):
        super().__init__(ends=(3, 5), render_mode=render_mode)


class Narrow(Counter):
    """Observes one number less than its space has, which NumPy would broadcast, in its first observation."""

    def reset(self, *, seed=None, options=None):
        return super().reset()[0][:1], {}


class Narrowing(Counter):
    """The same, but in that of its second episode only, which begins after the third step."""

    def __init__(self, render_mode=None):
        super().__init__(ends=(3,), render_mode=render_mode)

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset()
        return observation[: 2 - self.episode], info


class Blurred(Counter):
    """Observes NaN from its third step on."""

    def step(self, action):
        observation, *rest = super().step(action)
        return observation if self.now < 3 else observation * np.nan, *rest


class Fallen(Blurred):
    """The same, at the end of an episode."""

    def __init__(self, render_mode=None):
        super().__init__(ends=(3,), render_mode=render_mode)


class Bankrupt(Counter):
    """Pays NaN from its third step on."""

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, reward if self.now < 3 else np.nan, *rest


class Deaf(Counter):
    """Closes all files of its process at its third step, its pipe to the learner among them, and goes on."""

    def step(self, action):
        if self.now == 2:
            os.closerange(3, 256)
            time.sleep(60)
        return super().step(action)


class Late(Counter):
    """Cannot be made in a worker."""

    def __init__(self, render_mode=None):
        if multiprocessing.parent_process():
            raise OSError("no such mesh:\nhand.stl")
        super().__init__()


class Sleeper(Counter):
    """Never returns from its reset."""

    def reset(self, *, seed=None, options=None):
        time.sleep(1000)


class Impatient(Counter):
    """Truncates itself after five steps, long before its time limit."""

    def step(self, action):
        observation, reward, terminated, _, info = super().step(action)
        return observation, reward, terminated, self.now == 5, info


class Filmed(Counter):
    """Draws how often it has drawn."""

    drawn = 0

    def render(self):
        self.drawn += 1
        return np.full((2, 2, 3), self.drawn, np.uint8)


class Remembers(Counter):
    """Pays how far its action is from the last one, which it keeps as it was given."""

    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    last = np.zeros(1)

    def step(self, action):
        observation, _, *rest = super().step(action)
        moved, self.last = float(abs(action - self.last)[0]), action
        return observation, moved, *rest


KINDS = (Counter, Raises, Dies, Hangs, Misshapen, Paying, Draws, Redraws, Narrow, Narrowing, Blurred, Fallen, Bankrupt, Deaf,
         Late, Sleeper, Impatient, Filmed, Remembers)
for kind in KINDS:
    gym.register(f"{kind.__name__}-v0", kind, max_episode_steps=20)
gym.register("Discrete-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=20)
gym.register("Endless-v0", Counter)
gym.register("ShortCheetah-v0", "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv", max_episode_steps=50)
gym.register("Successful-v0", Counter, kwargs=dict(success=3, bar=100.0), max_episode_steps=20)
gym.register("Barred-v0", Counter, kwargs=dict(ends=(5, 10), bar=4.0), max_episode_steps=20)
