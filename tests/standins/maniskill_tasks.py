"""Small variations of a task of ManiSkill, as `maniskill_tasks:FailingPush-v0` and so on."""

import torch
from mani_skill.envs.tasks.tabletop.push_cube import PushCubeEnv
from mani_skill.utils.registration import register_env


@register_env("FailingPush-v0", max_episode_steps=5)
class Failing(PushCubeEnv):
    """Fails at its third step."""

    def evaluate(self):
        return {"success": torch.zeros(self.num_envs, dtype=torch.bool), "fail": self.elapsed_steps >= 3}


@register_env("DensePush-v0", max_episode_steps=5)
class DenseOnly(PushCubeEnv):
    """Has no normalised reward, and does not say so."""

    def compute_normalized_dense_reward(self, obs, action, info):
        raise NotImplementedError()


@register_env("SparsePush-v0", max_episode_steps=5)
class SparseOnly(PushCubeEnv):
    """Says which reward it has."""

    SUPPORTED_REWARD_MODES = ("sparse", "none")


@register_env("MisshapenPush-v0", max_episode_steps=5)
class Misshapen(PushCubeEnv):
    """Computes a reward of tensors that do not fit."""

    def compute_normalized_dense_reward(self, obs, action, info):
        return torch.zeros(3) + torch.zeros(4)


@register_env("EndlessPush-v0")
class Endless(PushCubeEnv):
    """Is registered without a time limit."""
