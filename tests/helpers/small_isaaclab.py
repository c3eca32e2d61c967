"""Arguments of toy size for trudi_isaaclab.py, and setups around counters."""

import torch

import trudi_isaaclab as trudi

CPU = torch.device("cpu")
SIZES = dict(
    preset="cpu",
    num_envs=2,
    num_steps=8,
    minibatch_size=8,
    num_epochs=1,
    hidden_dim=16,
    num_diffusion_steps=2,
    total_timesteps=64,
    eval_interval=2,
    checkpoint_interval=1,
)


def small_args(**changes):
    args = trudi.resolve(trudi.Args(**{**SIZES, "env_id": "Mjlab-Cartpole-Balance", **changes}))
    trudi.check_args(args)
    return args


def prepared(env, **changes):
    """Setup, state and programs around a fake, which has started anywhere in its episodes."""
    sizes = dict(minibatch_size=len(env.ends), total_timesteps=10_000) | changes
    args = small_args(num_envs=len(env.ends), **sizes)
    setup = trudi.setup_for(args, CPU, trudi.IsaacLab(args, env))
    state, programs = trudi.prepare(setup, {})
    setup.env.reset(spread=True)
    return setup, state, programs


FLAGS = [x for name, value in SIZES.items() for x in (f"--{name.replace('_', '-')}", str(value))]
CARTPOLE = ("--env-id", "mjlab_tasks:Mjlab-Short-Cartpole")
