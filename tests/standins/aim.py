"""A task that is learned in seconds: it pays least for actions far from half of what is observed; episodes are of one step."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import torch
from probes import Sim


class Playground:
    """With the interface of a task of MuJoCo Playground."""

    action_size = 1

    def reset(self, key):
        zero, now = jnp.zeros(()), jnp.zeros((), int)
        return Sim(jax.random.uniform(key, (1,), minval=-1.0), zero, zero, now, now)

    def step(self, sim, action):
        return sim._replace(reward=-4 * (action[0] - sim.obs[0] / 2) ** 2, done=jnp.ones(()))


class Aim:
    """E environments, which see the same numbers after every reset, and again after 16 steps."""

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.numbers = torch.rand(16, num_envs, 1, generator=torch.Generator().manual_seed(num_envs)) * 2 - 1
        self.count = 0

    @property
    def seen(self):
        return self.numbers[self.count % 16]

    def pay(self, action):
        reward = -4 * (action[:, 0] - self.seen[:, 0] / 2) ** 2
        before = self.seen
        self.count += 1
        return reward, before


class ManiSkill(Aim):
    """With ManiSkillVectorEnv's interface."""

    def __init__(self, num_envs):
        super().__init__(num_envs)
        self.base_env = SimpleNamespace(elapsed_steps=torch.zeros(num_envs, dtype=torch.int32))

    def reset(self, seed):
        self.count = 0
        return self.seen, {}

    def step(self, action):
        reward, before = self.pay(action)
        late = torch.ones(self.num_envs, dtype=torch.bool)
        episode = {"return": reward, "episode_len": late.int()}
        return self.seen, reward, ~late, late, {"final_info": {"episode": episode}, "final_observation": before}


class IsaacLab(Aim):
    """With Isaac Lab's interface."""

    max_episode_length, step_dt, single_action_space, cfg = 1, 0.05, SimpleNamespace(shape=(1,)), SimpleNamespace()

    def __init__(self, num_envs):
        super().__init__(num_envs)
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long)

    def reset(self):
        self.count = 0
        return {"policy": self.seen}, {}

    def step(self, action):
        reward, before = self.pay(action)
        late = torch.ones(self.num_envs, dtype=torch.bool)
        return {"policy": self.seen}, reward, ~late, late, {"final_obs": {"policy": before}}

    def close(self):
        pass
