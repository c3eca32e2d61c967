"""Isaac Lab's interface around counters of steps, with the habits of 3.0, of 2.3 or of mjlab."""

from types import SimpleNamespace

import torch


class Counters:
    """Isaac Lab's interface around counters: the i-th terminates after ends[i] steps, and is late after 6.

    It observes the steps of its episode, ten times as much for the critic, and pays the step's number. `kind`
    is the simulator whose habits it has, `reuse` writes into one set of buffers as Isaac Lab does. Resets have
    the curriculum judge the episodes that they end.
    """

    max_episode_length, step_dt, single_action_space = 6, 0.05, SimpleNamespace(shape=(3,))

    def __init__(self, kind="3.0", ends=(3, 99), reuse=True, critic=True):
        self.kind, self.ends, self.reuse, self.critic = kind, torch.tensor(ends), reuse, critic
        self.cfg, self.sim, self.extras = SimpleNamespace(auto_reset=kind != "mjlab"), SimpleNamespace(), {}
        self.episode_length_buf = torch.zeros(len(ends), dtype=torch.long)
        self.buffers, self.actions, self.judged, self.late_after = {}, [], [], self.max_episode_length
        self.curriculum_manager = SimpleNamespace(compute=lambda env_ids: self.judged.append(env_ids))
        self.unwrapped = self

    def give(self, name, value):
        if not self.reuse:
            return value.clone()
        return self.buffers.setdefault(name, torch.empty_like(value)).copy_(value)

    def observe(self, prefix=""):
        steps = self.episode_length_buf.float()[:, None].repeat(1, 2)
        groups = {"actor" if self.kind == "mjlab" else "policy": steps} | (
            {"critic": 10 * steps[:, :1]} if self.critic else {}
        )
        return {name: self.give(prefix + name, value) for name, value in groups.items()}

    def reset(self, env_ids=None):
        self.curriculum_manager.compute(env_ids=env_ids)
        self.episode_length_buf[slice(None) if env_ids is None else env_ids] = 0
        return self.observe(), self.extras

    def step(self, action):
        self.actions.append(action)
        self.episode_length_buf += 1
        steps = self.episode_length_buf
        terminated, late = steps >= self.ends, steps >= self.late_after
        outcome = [
            self.give(*x) for x in (("reward", steps.float()), ("terminated", terminated), ("late", late))
        ]
        ended = terminated | late
        if ended.any():
            mean = self.give("log", steps[ended].float().mean())
            self.extras["log"] = {"Episode_Reward/count": mean, "Curriculum/level": 2.0}
            if self.kind == "3.0":
                self.extras["final_obs"] = self.observe("final ")
            if self.kind != "mjlab":
                self.reset(ended)
        return self.observe(), *outcome, self.extras
