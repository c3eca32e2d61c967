"""ManiSkillVectorEnv's interface around counters of steps: one in a scene, or several."""

from types import SimpleNamespace

import torch


class Counter:
    """ManiSkillVectorEnv's interface around a counter of steps, which it observes; `limit` succeed."""

    num_envs = 1

    def __init__(self, limit=3, horizon=5):
        self.limit, self.horizon, self.count, self.total = limit, horizon, 0, 0.0
        self.base_env = SimpleNamespace(elapsed_steps=torch.zeros(1, dtype=torch.int32))

    def observation(self):
        return torch.full((1, 2), float(self.count))

    def reset(self, seed):
        self.seed, self.count, self.total = seed, 0, 0.0
        return self.observation(), {}

    def step(self, action):
        assert action.shape == (1, 3)
        self.count += 1
        self.total += self.count
        success, late = self.count >= self.limit, self.count >= self.horizon
        episode = {
            "return": torch.tensor([self.total]),
            "episode_len": torch.tensor([self.count]),
            "success_once": torch.tensor(success),
        }  # some tasks give it without an axis
        info, after = {"episode": episode}, self.observation()
        reward = torch.tensor([float(self.count)])
        if success or late:
            info = {"final_info": info, "final_observation": after}
            self.count, self.total = 0, 0.0
        return self.observation(), reward, torch.tensor([success]), torch.tensor([late]), info


class Several:
    """The same around several in one scene, as on a GPU: one that ends gives all the final observations."""

    def __init__(self, envs):
        self.envs, self.num_envs = envs, len(envs)

    def reset(self, seed):
        return torch.cat([env.reset([one])[0] for env, one in zip(self.envs, seed, strict=True)]), {}

    def step(self, action):
        observation, reward, success, late, info = zip(
            *[env.step(x[None]) for env, x in zip(self.envs, action, strict=True)], strict=True
        )
        finals = [x.get("final_info", x)["episode"] for x in info]
        episode = {
            "episode": {name: torch.stack([x[name].reshape(()) for x in finals]) for name in finals[0]}
        }
        if any("final_info" in x for x in info):
            after = [x.get("final_observation", now) for x, now in zip(info, observation, strict=True)]
            episode = {"final_info": episode, "final_observation": torch.cat(after)}
        return *(torch.cat(x) for x in (observation, reward, success, late)), episode
