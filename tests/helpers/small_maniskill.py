"""Arguments of toy size for trudi_maniskill.py, setups around counters and of real tasks."""

import torch

import trudi_maniskill as trudi

CPU = torch.device("cpu")
SIZES = dict(
    preset="cpu",
    num_envs=2,
    num_steps=8,
    minibatch_size=8,
    num_epochs=1,
    hidden_dim=16,
    num_diffusion_steps=2,
    num_eval_envs=2,
    total_timesteps=128,
    eval_interval=4,
    checkpoint_interval=1,
)


def small_args(**changes):
    args = trudi.resolve(trudi.Args(**{**SIZES, **changes}))
    trudi.check_args(args)
    return args


def counter_setup(args, scenes):
    """Setup, state and programs with counters to train in, which are reset."""
    env = trudi.ManiSkill(args, scenes, time_limit=5, evaluation=False)
    eval_env = trudi.ManiSkill(args, scenes, time_limit=5, evaluation=True)
    env.start(0)
    setup = trudi.Setup(
        args, CPU, env, eval_env, observation_size=2, actor_sees=2, critic_sees=2, action_size=3
    )
    return setup, *trudi.prepare(setup, {})


def random_batch(observation_size, action_size, generator):
    """Eight states, with chains of two steps."""

    def normal(*shape):
        return torch.randn(8, *shape, generator=generator)

    trajectory = trudi.Trajectory(normal(2, action_size), normal(2, action_size))
    return trudi.Batch(normal(observation_size), normal(action_size), trajectory, normal())


def prepared(**changes):
    """Setup, state and programs with ManiSkill's environments, reset."""
    setup = trudi.make_setup(small_args(**changes), CPU)
    setup.env.start(0)
    return setup, *trudi.prepare(setup, {})


FLAGS = [x for name, value in SIZES.items() for x in (f"--{name.replace('_', '-')}", str(value))]
