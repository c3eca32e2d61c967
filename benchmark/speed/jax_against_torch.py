"""How long does an update take in PyTorch, trudi_maniskill.py, and in JAX, trudi_mjx.py, at equal sizes?

    python -m benchmark.speed.jax_against_torch [--hidden-dim 512 --minibatch-size 2048]

Both run `update_epochs`, one epoch of --num-minibatches gradient steps of critic, actor and duals, on the
same random data, in turn, so that a disturbance of the machine meets both. Medians over --repeats; the ratio
is the median of the pairs' ratios. PyTorch runs as the script has it, on one thread of a CPU (and as often as
asked with --compile); JAX takes all cores. Results are added to benchmark/results/update_time_{device}.json.
"""

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable

import jax
import numpy as np
import torch
import tyro

import trudi_maniskill
import trudi_mjx as trudi
from benchmark.markdown import markdown_table
from benchmark.measurements import RESULTS, cpu_name, measure_in_turn, provenance


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure both scripts' updates."""

    hidden_dim: int = 64  # width of actor and critic
    minibatch_size: int = 256  # states in a gradient step
    num_minibatches: int = 8  # gradient steps in a call
    observation_size: int = 35  # entries of an observation (PushCube's)
    action_size: int = 8  # action dimensions (PushCube's)
    repeats: int = 10  # timed pairs of calls
    compile: bool = False  # torch.compile


def jax_update(options: Options, args: trudi.Args, data: list[np.ndarray]) -> Callable[[], None]:
    """A call of trudi_mjx.py's `update_epochs`, compiled."""
    rngs = trudi.nnx.Rngs(0)
    actor = trudi.Actor(args, options.observation_size, options.action_size, rngs)
    critic = trudi.Critic(args, options.observation_size, options.action_size, rngs)
    duals = {name: jax.numpy.log(trudi.INITIAL_DUAL) for name in ("log_alpha", "log_lambda")}
    optimizers = trudi.make_optimizers(args)
    opt_states = [o.init(p) for o, p in zip(optimizers, (actor, critic, duals), strict=True)]
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("env",))
    setup = trudi.Setup(args, env=None, action_size=options.action_size, time_limit=0, mesh=mesh)
    observation, action, latents, means, target = data
    batch = trudi.Batch(observation, observation, action, trudi.Trajectory(latents, means), target)
    learner, batch = jax.device_put((trudi.Learner(actor, critic, duals, *opt_states), batch))
    update_epochs = jax.jit(functools.partial(trudi.update_epochs, setup))
    return lambda: jax.block_until_ready(update_epochs(learner, batch, jax.random.PRNGKey(0)))


def torch_update(options: Options, args: trudi_maniskill.Args, data: list[np.ndarray]) -> Callable[[], None]:
    """A call of trudi_maniskill.py's `update_epochs`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = options.observation_size
    setup = trudi_maniskill.Setup(
        args,
        device,
        env=None,
        eval_env=None,
        observation_size=size,
        actor_sees=size,
        critic_sees=size,
        action_size=options.action_size,
    )
    learner = trudi_maniskill.init_learner(setup)
    programs = trudi_maniskill.compile_programs(setup, learner)
    observation, action, latents, means, target = (torch.tensor(x, device=device) for x in data)
    trajectory = trudi_maniskill.Trajectory(latents, means)
    batch = trudi_maniskill.Batch(observation, action, trajectory, target)

    def call() -> None:
        learner.old_actor.load_state_dict(learner.actor.state_dict())
        trudi_maniskill.update_epochs(setup, programs, batch)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return call


def make_calls(options: Options) -> dict[str, Callable[[], None]]:
    """Both scripts' updates on the same random data."""
    sizes = dict(
        preset="cpu",
        hidden_dim=options.hidden_dim,
        minibatch_size=options.minibatch_size,
        num_epochs=1,
        num_envs=options.minibatch_size,
        num_steps=options.num_minibatches,
        total_timesteps=options.minibatch_size * options.num_minibatches,
        v_min=-15.0,
        v_max=15.0,
    )
    size = sizes["total_timesteps"]
    chain = (size, trudi.Args.num_diffusion_steps, options.action_size)
    shapes = ((size, options.observation_size), (size, options.action_size), chain, chain, (size,))
    rng = np.random.default_rng(0)
    data = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    torch_args = trudi_maniskill.Args(**sizes, compile=options.compile)
    return {
        "JAX": jax_update(options, trudi.resolve(trudi.Args(**sizes)), data),
        "PyTorch": torch_update(options, trudi_maniskill.resolve(torch_args), data),
    }


def main() -> None:
    """Time the two in turn; print a table, write JSON."""
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    # the first ones compile, or capture a graph
    rounds = measure_in_turn(make_calls(options), options.repeats, warm_up=2)
    seconds = {name: [x / options.num_minibatches for x in times] for name, times in rounds.items()}
    ratios = [b / a for a, b in zip(seconds["JAX"], seconds["PyTorch"], strict=True)]
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else cpu_name()
    columns = {f"{name}, ms": [1e3 * x for x in times] for name, times in seconds.items()}
    rows = [
        [name, f"{statistics.median(x):.2f}", f"{min(x):.2f} to {max(x):.2f}"]
        for name, x in (columns | {"PyTorch / JAX": ratios}).items()
    ]
    title = f"minibatch of {options.minibatch_size}, width {options.hidden_dim}, {device}"
    print(markdown_table([title, "median", "range"], rows))
    path = RESULTS / f"update_time_{'gpu' if gpu else 'cpu'}.json"
    found = json.loads(path.read_text()) if path.exists() else []
    row = {"options": vars(options), "seconds": seconds, "ratio": statistics.median(ratios)}
    path.write_text(json.dumps([*found, {"provenance": provenance(), **row}], indent=1) + "\n")


if __name__ == "__main__":
    main()
