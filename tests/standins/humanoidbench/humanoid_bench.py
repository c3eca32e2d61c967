"""What trudi_humanoidbench.py relies on in HumanoidBench: ids, and a render() that calls Gymnasium before 1.0."""

import gymnasium as gym
import numpy as np


class Renderer:
    """Takes what MujocoRenderer takes since Gymnasium 1.0."""

    def render(self, render_mode):
        return np.zeros((32, 32, 3), np.uint8)


class Task:
    """Draws its goal from NumPy's global generator."""

    success_bar = 800

    def __init__(self, env):
        self.env = env

    def render(self):
        return self.env.mujoco_renderer.render(self.env.render_mode, None, "cam_default")


class HumanoidEnv(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(self, robot, task, render_mode="rgb_array"):
        self.render_mode, self.mujoco_renderer, self.task = render_mode, Renderer(), Task(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.random.rand(2), {}

    def step(self, action):
        return np.zeros(2), 1.0, False, False, {}

    def render(self):
        return self.task.render()


for robot in ("h1", "h1hand", "g1"):
    for task in ("stand", "highbar_hard"):
        gym.register(f"{robot}-{task}-v0", HumanoidEnv, max_episode_steps=20, kwargs=dict(robot=robot, task=task))
