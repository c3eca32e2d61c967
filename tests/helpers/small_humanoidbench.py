"""A setup of toy size for trudi_humanoidbench.py; the environments of standins/faulty.py are at hand."""

import faulty  # noqa: F401

import trudi_humanoidbench as trudi


def setup_for(env_id, **changes):
    sizes = dict(preset="cpu", device="cpu", num_envs=4, num_steps=8, minibatch_size=16, num_eval_envs=3)
    small = dict(num_diffusion_steps=2, hidden_dim=8)
    args = trudi.Args(env_id=env_id, **sizes | small | changes)
    return trudi.load_setup(trudi.resolve(args))
