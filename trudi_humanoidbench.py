# /// script
# requires-python = ">=3.11"
# dependencies = ["flax>=0.12", "gymnasium[mujoco]>=1.0", "imageio-ffmpeg>=0.5", "jax>=0.10", "optax>=0.2.5",
#       "orbax-checkpoint>=0.11.20", "tensorboard>=2.18", "tensorboardx>=2.6.2", "tyro>=1.0", "wandb>=0.19.10"]
# ///
"""Trust-Region Diffusion Policies (TruDi, arXiv 2606.15260) on HumanoidBench and Gymnasium, in one file.

    python trudi_humanoidbench.py --env-id h1hand-walk-v0             # the paper's settings
    python trudi_humanoidbench.py --env-id Hopper-v5 --preset cpu     # a learning curve in minutes on two CPU cores

Worker processes simulate; the learner is that of trudi_mjx.py. `# Eq. 181` marks where an equation of the paper is computed;
README.md has their table and the paper's errata, E1 to E18. Axes: T steps of a rollout, E environments, B states of a batch, N
denoising steps (n = 1 ... N in order, latent actions from a^N, noise, to a^0), A action dimensions."""

import contextlib
import dataclasses
import difflib
import faulthandler
import functools
import itertools
import json
import logging
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from importlib import import_module, metadata, util
from typing import Any, Literal

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorboardX
import tyro
from flax import nnx
from jax import Array, NamedSharding, P

TASKS = [f"h1hand-{name}-v0" for name in ("walk run stand crawl hurdle stair slide maze pole sit_simple sit_hard "
    "balance_simple balance_hard reach powerlift truck package cabinet door window room bookshelf_simple bookshelf_hard spoon "
    "push basketball cube insert_normal insert_small kitchen").split()]
SUITE = {"humanoidbench": dict(v_min=-250.0, v_max=250.0), "gymnasium": dict(v_min=-500.0, v_max=500.0)}  # the former: Table 5
PAPER = dict(total_timesteps=50_000_000, num_envs=128, num_steps=128, num_epochs=8, minibatch_size=2048, hidden_dim=256,
             actor_learning_rate=3e-4, critic_learning_rate=3e-4, dual_learning_rate=3e-4, num_eval_envs=32, eval_interval=100,
             checkpoint_interval=20, target_entropy_scale=0.665, gamma=0.99)  # Table 5
PRESET = {"paper": PAPER, "cpu": PAPER | dict(  # sizes measured on two cores, see README.md
    total_timesteps=1_000_000, num_envs=64, num_steps=64, minibatch_size=256, hidden_dim=64, actor_learning_rate=6e-4,
    critic_learning_rate=6e-4, dual_learning_rate=1.2e-3, eval_interval=20)}
ACTION_LIMIT = 0.999  # clips actions for the simulator and the critic's data; not in the losses, where it'd stop gradients
STEP_SIZE, KAPPA_MIN, SCHEDULE_SHIFT = 0.125, 1e-3, 0.008  # delta, and the cosine schedule's floor and offset
TIME_FEATURES, HL_GAUSS_SIGMA = 32, 0.75  # the latter in atom widths
INITIAL_DUAL, PRIOR_LOGITS = 0.01, 40.0  # alpha and lambda at the start; scale of the critic's bias, so that Q starts near 0
PATIENCE = 300.0  # seconds after which a worker counts as hanging; HumanoidBench takes a while to load
SCRIPT = pathlib.Path(__file__).stem
# ------------------------------------------------------------------------------------------------------- arguments
@dataclasses.dataclass(frozen=True)
class Args:
    """Train a TruDi agent. A flag whose default is None takes the value of --preset or of the task's suite."""
    env_id: str = "h1hand-walk-v0"  # task of HumanoidBench or Gymnasium, or module:id of one that the module registers
    exp_name: str = "trudi_humanoidbench"  # part of the run folder's name
    seed: int = 1  # of everything: networks, noise, environments
    preset: Literal["paper", "cpu"] = "paper"  # sizes: the paper's Table 5, or small ones for two CPU cores
    log_dir: str = "runs"  # parent of the run folders
    num_envs: int | None = None  # parallel environments
    num_steps: int | None = None  # steps of each environment in a rollout
    num_epochs: int | None = None  # passes over a rollout
    minibatch_size: int | None = None  # states in a gradient step
    gamma: float | None = None  # discount
    td_lambda: float = 0.95  # lambda of the critic's lambda-returns
    actor_learning_rate: float | None = None  # of Adam
    critic_learning_rate: float | None = None  # of Adam
    dual_learning_rate: float | None = None  # of Adam, for log alpha and log lambda
    max_grad_norm: float = 0.5  # global-norm clip, of actor and critic apart
    hidden_dim: int | None = None  # width of actor and critic
    num_diffusion_steps: int = 8  # denoising steps N
    prior_std: float = 2.5  # standard deviation of the noise a^N
    learn_friction: bool = True  # learn the step sizes, one factor for each action dimension
    trust_region_bound: float = 0.1  # epsilon: nats of trajectory KL that a state may move in an iteration
    target_entropy_scale: float | None = None  # the target is minus this for each action dimension, in nats
    v_min: float | None = None  # lowest atom of the critic
    v_max: float | None = None  # highest atom of the critic
    num_atoms: int = 151  # atoms of the critic
    # The flags from here on may differ when a run is continued or evaluated.
    device: Literal["auto", "cpu", "gpu"] = "auto"  # where to learn; gpu fails where there is none
    num_devices: int = 1  # local devices over which states are sharded
    num_workers: int = len(os.sched_getaffinity(0))  # processes that step the environments; by default one a core
    compilation_cache_dir: str = "~/.cache/trudi_jax"  # compiled programs are kept here between runs; empty: nowhere
    total_timesteps: int | None = None  # environment steps, over all environments
    eval_mode: Literal["ode", "sde", "best-of-k"] = "ode"  # probability-flow ODE, a sample, or the best of K by Q
    ode_score_scale: float = 1.0  # c of the ODE: 0.5 keeps the marginals, 1 is greedier
    best_of_k: int = 10  # K of best-of-k
    eval_interval: int | None = None  # iterations between evaluations; the last one is always followed by one
    num_eval_envs: int | None = None  # episodes in an evaluation
    checkpoint_interval: int | None = None  # iterations between checkpoints, likewise
    capture_video: bool = False  # write an mp4 of one episode at each evaluation
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "trudi"  # its project
    wandb_entity: str | None = None  # its team
    resume: str | None = None  # run folder to continue, with its own arguments
    evaluate: str | None = None  # run folder to evaluate, without training
    batch_size: tyro.conf.Suppress[int] = 0  # environment steps in an iteration, computed
    num_iterations: tyro.conf.Suppress[int] = 0  # computed; as in CleanRL, steps that do not fill one are left out

def fail(message: str) -> None:
    """Refuse bad input: one line on stderr and exit code 2."""
    print(f"{SCRIPT}.py: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)

def resolve(args: Args) -> Args:
    """Fill in what depends on suite, preset and machine; exit with code 2 on what cannot run."""
    if ":" not in args.env_id and args.env_id not in [*TASKS, *gym.registry]:
        near = difflib.get_close_matches(args.env_id, [*TASKS, *gym.registry], 3, 0.4) or TASKS[:3]
        fail(f"unknown --env-id {args.env_id}; the nearest are {', '.join(near)}")
    module = "humanoid_bench" if args.env_id in TASKS else args.env_id.rpartition(":")[0] or "gymnasium"
    if not util.find_spec(module.split(".")[0]):
        fail(f"--env-id {args.env_id} needs the module {module}, which is neither installed nor on PYTHONPATH" + (
            "; git clone https://github.com/carlosferrazza/humanoid-bench && pip install --no-deps -e ./humanoid-bench && pip "
            "install mujoco==3.1.6 dm_control==1.0.20 torch opencv-python-headless natsort" if args.env_id in TASKS else ""))
    multiprocessing.set_forkserver_preload(["flax.nnx", "optax", "orbax.checkpoint", "tensorboardX", "tyro", module])
    jax.config.update("jax_platforms", "cpu" if args.device == "cpu" else jax.config.jax_platforms)
    devices = [device for device in jax.local_devices() if args.device in ("auto", device.platform)]
    values = SUITE["humanoidbench" if args.env_id in TASKS else "gymnasium"] | PRESET[args.preset]
    values |= {k: v for k, v in vars(args).items() if v is not None}
    size = values["num_envs"] * values["num_steps"]
    args = dataclasses.replace(args, **values | dict(batch_size=size, num_iterations=values["total_timesteps"] // max(size, 1)))
    may_be_zero = ("seed", "num_iterations", "gamma", "td_lambda", "ode_score_scale", "v_min", "v_max", "target_entropy_scale")
    numbers = {f"--{k}".replace("_", "-"): v for k, v in vars(args).items() if type(v) in (int, float) and k not in may_be_zero}
    shards, split = max(args.num_devices, 1), ("--num-envs", "--minibatch-size", "--num-eval-envs")
    rules = [(v > 0, f"{k} must be positive, not {v}") for k, v in numbers.items()] + [
        (devices, f"JAX has no {args.device} device; install jax[cuda13] or jax[cuda12], or use --device cpu"),
        (args.seed >= 0 and args.ode_score_scale >= 0, "--seed and --ode-score-scale must not be negative"),
        (0 <= args.gamma < 1 and 0 <= args.td_lambda <= 1, "--gamma must lie in [0, 1) and --td-lambda in [0, 1]"),
        (args.v_min < args.v_max and args.num_atoms > 1, "the critic needs --v-min < --v-max and --num-atoms > 1"),
        (args.num_iterations > 0, f"--total-timesteps {args.total_timesteps} is less than --num-envs x --num-steps"),
        (args.batch_size % max(args.minibatch_size, 1) == 0, "--minibatch-size must divide --num-envs x --num-steps"),
        (args.num_devices <= len(devices), f"--num-devices {args.num_devices}, but JAX finds {len(devices)} here"),
        *((numbers[k] % shards == 0, f"{k} {numbers[k]} does not divide over {shards} devices") for k in split)]
    for message in (message for holds, message in rules if not holds):
        fail(message)
    return args
# ---------------------------------------------------------------------------------------- environments and workers
Agent = namedtuple("Agent", "args env mesh")  # what stays constant while training; compiled programs close over it
Task = namedtuple("Task", "observation_size action_size time_limit success_bar fps")
# A rollout, (T, E, ...): raw observations, a^1 ... a^N and means of a^0 ... a^(N-1) as sampled (N, A), clipped actions (A,).
Transition = namedtuple("Transition", "observation latents means action reward terminated truncated next_observation")
def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """A Gymnasium environment with observations (O,), actions (A,) in [-1, 1] and a time limit."""
    name = f"humanoid_bench:{env_id}" if env_id in TASKS else env_id
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(name, render_mode=render_mode, disable_env_checker=True))
    if env_id in TASKS and render_mode:  # its own render() calls an older Gymnasium
        env.unwrapped.task.render = functools.partial(env.unwrapped.mujoco_renderer.render, render_mode)
    box, one = env.action_space, np.ones(env.action_space.shape, np.float32)
    if not isinstance(box, gym.spaces.Box) or box.low.ndim != 1 or not box.is_bounded() or not env.spec.max_episode_steps:
        raise ValueError("it must have a finite action space Box(A,) and max_episode_steps")
    env = env if np.all(box.low == -one) and np.all(box.high == one) else gym.wrappers.RescaleAction(env, -one, one)
    return env if len(env.observation_space.shape or ()) == 1 else gym.wrappers.FlattenObservation(env)

def load_agent(args: Args) -> Agent:
    """Find out a task's sizes and lay out the devices. Exits with code 2 if the task can't be made or, for a video, drawn."""
    try:
        env = make_env(args.env_id, "rgb_array" if args.capture_video else None)
        env.reset()
        if args.capture_video:
            env.render()
    except Exception as error:  # whatever a simulator, the parts that it lacks or a GL library raise
        advice = "; to draw, set MUJOCO_GL to egl (libegl1, libgl1-mesa-dri) or osmesa (libosmesa6)" * args.capture_video
        fail(f"--env-id {args.env_id} cannot be made ({type(error).__name__}: {str(error)[:300]}){advice}")
    sizes, bar = (env.observation_space.shape[0], env.action_space.shape[0]), getattr(env.unwrapped, "task", None)
    task = Task(*sizes, env.spec.max_episode_steps, getattr(bar, "success_bar", None), env.metadata.get("render_fps", 30))
    return Agent(args, task, jax.sharding.Mesh(jax.local_devices()[:args.num_devices], ("env",)))

def reset_slots(envs: list[tuple[gym.Env, np.void]]) -> None:
    """Start environments; `spread` starts a clock anywhere in an episode, so that time-outs do not coincide."""
    for env, slot in envs:
        seed = int(slot["seed"])
        random.seed(seed)
        np.random.seed(seed)  # some of HumanoidBench's goals come from the process's global generator
        slot["observation"], _ = env.reset(seed=seed)
        if slot["spread"]:
            env.set_wrapper_attr("_elapsed_steps", int(np.random.default_rng(seed).integers(env.spec.max_episode_steps)))

def step_slots(envs: list[tuple[gym.Env, np.void]]) -> None:
    """Step the active environments; where an episode ends, the true next observation stays beside that of the next one."""
    for env, slot in ((env, slot) for env, slot in envs if slot["active"]):
        slot["observation"], slot["reward"], terminated, truncated, info = env.step(slot["action"])
        slot["terminated"], slot["truncated"] = terminated, truncated and not terminated
        slot["next_observation"], slot["success"] = slot["observation"], np.fmax(slot["success"], info.get("success", np.nan))
        if terminated or truncated:
            slot["total"], slot["length"] = info["episode"]["r"], info["episode"]["l"]
            slot["observation"], _ = env.reset()

def work(pipe: Any, memory: Any, dtype: np.dtype, rows: list, env_id: str, render_mode: str | None, patience: float) -> None:
    """A worker process, until the pipe closes. An exception, crash or hang of an environment ends it, with a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the learner decides
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.setitimer(signal.ITIMER_REAL, patience)
    envs = [(make_env(env_id, render_mode), np.frombuffer(memory, dtype)[i]) for i in rows]
    with contextlib.suppress(EOFError, ConnectionError):  # the learner has gone
        while True:
            signal.setitimer(signal.ITIMER_REAL, 0)
            advance = reset_slots if pipe.recv() else step_slots
            signal.setitimer(signal.ITIMER_REAL, patience)
            advance(envs)
            pipe.send(envs[0][0].render() if render_mode else None)

class Simulators:
    """E environments, a slice in each of several worker processes; they share `slots` (E,), what is asked and comes of each."""
    def __init__(self, env_id: str, task: Task, num_envs: int, num_workers: int, render_mode: str | None = None):
        fields = {f"({task.observation_size},)f4": "observation next_observation", f"({task.action_size},)f4": "action",
                  "f4": "reward success", "f8": "total length", "u4": "seed", "?": "active spread terminated truncated"}
        dtype = np.dtype([(name, kind) for kind, names in fields.items() for name in names.split()], align=True)
        context, self.workers = multiprocessing.get_context("forkserver"), []
        memory = context.RawArray("b", num_envs * dtype.itemsize)
        self.slots, cores = np.frombuffer(memory, dtype), sorted(os.sched_getaffinity(0))
        for k, rows in enumerate(np.array_split(range(num_envs), min(num_workers, num_envs))):
            (pipe, other), mode = context.Pipe(), render_mode if 0 in rows else None
            worker = context.Process(target=work, args=(other, memory, dtype, rows, env_id, mode, PATIENCE), daemon=True,
                                     name=f"the worker of environments {rows[0]} to {rows[-1]} of {env_id}")
            worker.start()
            os.sched_setaffinity(worker.pid, {cores[k]} if num_workers == len(cores) else cores)
            other.close()
            self.workers.append((worker, pipe))
    def request(self, start: bool) -> None:
        """Have the active environments started or stepped; `frame` is then the first one's picture (H, W, 3), or None."""
        try:
            for _, pipe in self.workers:
                pipe.send(start)
            self.frame, *_ = [pipe.recv() for _, pipe in self.workers]
        except (EOFError, ConnectionError):
            multiprocessing.connection.wait([worker.sentinel for worker, _ in self.workers], 5)
            dead = next(worker for worker, _ in self.workers if worker.exitcode is not None)
            raise RuntimeError(f"{dead.name} ended with code {dead.exitcode}; the lines above say why") from None
    def reset(self, *numbers: int, spread: bool = False) -> None:
        """Start all environments, with seeds that are made of these numbers; see reset_slots for `spread`."""
        self.slots["active"], self.slots["spread"], self.slots["success"] = True, spread, np.nan
        self.slots["seed"] = np.random.SeedSequence(numbers).generate_state(len(self.slots))
        self.request(start=True)
    def step(self, action: Array) -> np.ndarray:
        """Step the active environments with actions (E, A), clipped; returns the slots, which the next step overwrites."""
        self.slots["action"] = np.clip(action, -ACTION_LIMIT, ACTION_LIMIT)
        self.request(start=False)
        return self.slots

Statistics = namedtuple("Statistics", "count moments")  # moments: mean and variance (2, .) of every entry
def update_statistics(statistics: Statistics, observations: Any) -> Statistics:
    """Merge observations, leaves (T, E, .), into the moments: Welford's update for batches (Chan et al., 1979)."""
    n, m = statistics.count, np.prod(jax.tree.leaves(observations)[0].shape[:2])
    def merge(x: Array, old: Array) -> Array:
        delta, weight = x.mean((0, 1)) - old[0], m / (n + m)
        return jnp.stack([old[0] + weight * delta, (1 - weight) * (old[1] + weight * delta**2) + weight * x.var((0, 1))])
    return Statistics(n + m, jax.tree.map(merge, observations, statistics.moments))

def normalize(statistics: Statistics, observation: Any) -> Any:
    """Standardise an observation, clipped at 10; the 1e-2 keeps entries that hardly vary from blowing up."""
    return jax.tree.map(lambda x, s: jnp.clip((x - s[0]) / jnp.sqrt(s[1] + 1e-2), -10, 10), observation, statistics.moments)
# -------------------------------------------------------------------------------------------------------- networks
class Actor(nnx.Module):
    """The network f_theta(a^n, s, n), twice the correction to the prior's score, and the step sizes h^n."""
    def __init__(self, args: Args, observation_size: int, action_size: int, rngs: nnx.Rngs):
        self.num_steps, self.prior_std, self.learn_friction = args.num_diffusion_steps, args.prior_std, args.learn_friction
        linear, width = functools.partial(nnx.Linear, rngs=rngs), args.hidden_dim
        self.time_mlp = nnx.List([linear(TIME_FEATURES, TIME_FEATURES) for _ in range(2)])
        self.input = linear(observation_size + action_size + TIME_FEATURES, width)
        self.norms = nnx.List([nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs) for _ in range(3)])
        self.hidden = nnx.List([linear(width, width) for _ in range(3)])
        self.output = linear(width, action_size, kernel_init=nnx.initializers.zeros)  # untrained: the prior's own process
        self.raw_friction = nnx.Param(jnp.full(action_size, np.log(np.e - 1)))  # softplus makes it 1
    def step_sizes(self) -> Array:
        """h^n for n = 1 ... N, (N, A): a cosine schedule divided by the friction b of each action dimension."""
        n = jnp.arange(1, self.num_steps + 1)[:, None] / self.num_steps
        cosine = jnp.cos(jnp.pi / 2 * (1 + SCHEDULE_SHIFT - n) / (1 + SCHEDULE_SHIFT)) ** 2
        raw = self.raw_friction[...] if self.learn_friction else jax.lax.stop_gradient(self.raw_friction[...])
        return STEP_SIZE * ((1 - KAPPA_MIN) * cosine + KAPPA_MIN) / nnx.softplus(raw)
    def embed(self, observation: Array) -> tuple[Array, Array]:
        """The first layer acts on concat(s, a, time): its parts that stay the same along a chain, (B, H) and (N, H)."""
        angle = jnp.arange(1, self.num_steps + 1)[:, None] * 10000.0 ** -jnp.arange(0, 1, 2 / TIME_FEATURES)
        hidden = nnx.gelu(self.time_mlp[0](jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)))
        time, kernel = self.time_mlp[1](hidden), self.input.kernel[...]
        return observation @ kernel[:observation.shape[-1]] + self.input.bias[...], time @ kernel[-TIME_FEATURES:]
    def __call__(self, state: Array, time: Array, latent: Array) -> Array:
        """f_theta at latents (..., A), with the parts that `embed` returned, which broadcast to (..., H)."""
        x = state + time + latent @ self.input.kernel[-TIME_FEATURES - latent.shape[-1]:-TIME_FEATURES]
        for norm, hidden in zip(self.norms, self.hidden, strict=True):
            x = x + nnx.gelu(hidden(norm(x)))
        return self.output(x)

class Critic(nnx.Module):
    """Categorical distributions of the return, whose mean is Q(s, u)."""
    def __init__(self, args: Args, observation_size: int, action_size: int, rngs: nnx.Rngs):
        sizes, width = [observation_size + action_size] + [args.hidden_dim] * 2, args.hidden_dim
        self.hidden = nnx.List([nnx.Linear(size, width, rngs=rngs) for size in sizes])
        self.norms = nnx.List([nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs) for _ in sizes])
        self.output = nnx.Linear(width, args.num_atoms, rngs=rngs)
        self.output.bias[...] = PRIOR_LOGITS * hl_gauss(args, jnp.zeros(()))
    def __call__(self, observation: Array, action: Array) -> Array:
        """Logits (B, atoms)."""
        x = jnp.concatenate([observation, action], -1)
        for hidden, norm in zip(self.hidden, self.norms, strict=True):
            x = nnx.silu(norm(hidden(x)))
        return self.output(x)
# ------------------------------------------------------------------------------------------------- diffusion chain
# Chains for B states: u = tanh(a^0) (B, A), a sample of l (B,), a^1 ... a^N and the means of a^0 ... a^(N-1) (B, N, A).
Chain = namedtuple("Chain", "action entropy_bound latents means")
def sample_chain(actor: Actor, observation: Array, noise: Array, unroll: bool = False) -> Chain:
    """Sample the policy, reparameterised: observations (B, .), standard normals (N + 1, B, A), noise[n] for a^n."""
    (state, time), h, prior_std = actor.embed(observation), actor.step_sizes()[:, None], actor.prior_std
    def denoise(latent: Array, step: tuple) -> tuple[Array, tuple]:
        h, time_n, xi = step
        mean = latent + h * (actor(state, time_n, latent) - latent / prior_std**2)  # Eq. 186, discretising Eq. 5
        return mean + jnp.sqrt(2 * h) * xi, (latent, mean)  # Eq. 31
    last, (latents, means) = jax.lax.scan(denoise, prior_std * noise[-1], (h, time, noise[:-1]), reverse=True, unroll=unroll)
    # Densities of a^n under the noising and of a^(n-1) under the generative kernel; equal variances, so normalisers cancel.
    later = jnp.concatenate([last[None], latents[:-1]])
    noising = (latents - later * (1 - h / prior_std**2)) ** 2 / (2 * h)  # Eq. 6, discretising Eq. 4
    log_ratio = 0.5 * (noise[:-1] ** 2 - noising).sum(0)
    prior = -0.5 * noise[-1] ** 2 - jnp.log(prior_std * jnp.sqrt(2 * jnp.pi))
    tanh_log_det = 2 * (jnp.log(2.0) - last - nnx.softplus(-2 * last))  # of 1 - tanh^2; finite where tanh rounds to 1
    bound = log_ratio - prior + tanh_log_det  # Eq. 117, Eq. 180 (E1: its sign)
    return Chain(jnp.tanh(last), bound.sum(-1), jnp.moveaxis(latents, 0, 1), jnp.moveaxis(means, 0, 1))

def ode_action(actor: Actor, observation: Array, noise: Array, score_scale: float) -> Array:
    """Actions (B, A) of the probability-flow ODE with scaled score, from standard normals (B, A)."""
    state, time = actor.embed(observation)
    def flow(latent: Array, step: tuple) -> tuple[Array, None]:
        h, time_n = step
        score = -latent / actor.prior_std**2 + actor(state, time_n, latent) / 2
        return latent + h * (latent / actor.prior_std**2 + 2 * score_scale * score), None  # Eq. 185, Eq. 187
    return jnp.tanh(jax.lax.scan(flow, actor.prior_std * noise, (actor.step_sizes(), time), reverse=True)[0])

def trajectory_kl(actor: Actor, observation: Array, latents: Array, means: Array, old_h: Array) -> Array:
    """c(s), (B,): closed-form KL of old trajectories from the actor's, on old chains (B, N, A) with step sizes old_h (N, A)."""
    (state, time), h = actor.embed(observation), actor.step_sizes()  # the prior's KL is 0, and tanh changes nothing
    new_means = latents + h * (actor(state[:, None], time, latents) - latents / actor.prior_std**2)
    kl = 0.5 * (old_h / h - 1 - jnp.log(old_h / h) + (means - new_means) ** 2 / (2 * h))
    return kl.sum((-2, -1))  # Eq. 178, which by Eq. 135 and Eq. 152 bounds Eq. 57
# ---------------------------------------------------------------------------------------------- critic and targets
def hl_gauss(args: Args, returns: Array) -> Array:
    """Categorical targets (..., atoms) for returns (...): clipped to the atoms' range, then a Gaussian's mass per atom."""
    width = (args.v_max - args.v_min) / (args.num_atoms - 1)
    edges = jnp.linspace(args.v_min - width / 2, args.v_max + width / 2, args.num_atoms + 1)
    cdf = jax.scipy.special.ndtr((edges - jnp.clip(returns, args.v_min, args.v_max)[..., None]) / (HL_GAUSS_SIGMA * width))
    return jnp.diff(cdf) / (cdf[..., -1:] - cdf[..., :1])

def q_value(args: Args, logits: Array) -> Array:
    """Q (...) of the critic's logits (..., atoms)."""
    return nnx.softmax(logits) @ jnp.linspace(args.v_min, args.v_max, args.num_atoms)

def lambda_returns(args: Args, reward: Array, terminated: Array, truncated: Array, value: Array, bonus: Array) -> Array:
    """Soft lambda-returns, everything (T, E); `value` is Q and `bonus` alpha l at the true next observations."""
    bootstrap = truncated.at[-1].set(True)  # at a time-out and where the rollout ends
    def step(later: Array, now: tuple) -> tuple[Array, Array]:
        reward, terminated, bootstrap, value, bonus = now
        mixture = jnp.where(bootstrap, value, (1 - args.td_lambda) * value + args.td_lambda * later)
        # Chosen, not multiplied by 0: a simulation that has become NaN ends, and its last value is NaN.
        target = reward + args.gamma * jnp.where(terminated, 0.0, bonus + mixture)  # Eq. 118, Eq. 179 (E2, E12)
        return target, target
    return jax.lax.scan(step, jnp.zeros_like(value[-1]), (reward, terminated, bootstrap, value, bonus), reverse=True)[1]
# ------------------------------------------------------------------------------------------------ losses, learning
Learner = namedtuple("Learner", "actor critic duals actor_opt critic_opt dual_opt")  # all that learns; networks are pytrees
# B states: normalised observations of both networks, and from the rollout actions, old chains and lambda-returns.
Batch = namedtuple("Batch", "seen_by_actor seen_by_critic action latents means target")
def optimizers(args: Args) -> list[optax.GradientTransformation]:
    """Adam for actor, critic and duals; the first two clip their gradients' global norms."""
    rates, clip = (args.actor_learning_rate, args.critic_learning_rate), optax.clip_by_global_norm(args.max_grad_norm)
    return [*(optax.chain(clip, optax.adam(rate)) for rate in rates), optax.adam(args.dual_learning_rate)]

def critic_loss(critic: Critic, args: Args, batch: Batch) -> Array:
    """Cross-entropy from the HL-Gauss targets to the critic's distribution."""
    return optax.softmax_cross_entropy(critic(batch.seen_by_critic, batch.action), hl_gauss(args, batch.target)).mean()

def actor_loss(actor: Actor, args: Args, critic: Critic, duals: dict, batch: Batch, old_h: Array, noise: Array) -> tuple:
    """The split loss, and l and c of every state (B,); noise is (N + 1, B, A), old_h the old step sizes."""
    chain = sample_chain(actor, batch.seen_by_actor, noise, unroll=True)  # a loop is 19% slower at width 256
    q = q_value(args, critic(batch.seen_by_critic, chain.action))
    improve = -jnp.exp(duals["log_alpha"]) * chain.entropy_bound - q  # Eq. 182, which descends Eq. 161, a bound by Eq. 92
    kl = trajectory_kl(actor, batch.seen_by_actor, batch.latents, batch.means, old_h)
    loss = jnp.where(kl <= args.trust_region_bound, improve, jnp.exp(duals["log_lambda"]) * kl)  # Eq. 181, for each state
    return loss.mean(), (chain.entropy_bound, kl)

def dual_loss(duals: dict, args: Args, bound: Array, kl: Array, action_size: int) -> Array:
    """Alpha falls while the policy is noisier than its target; lambda grows while the region is violated."""
    surplus, excess = bound.mean() + args.target_entropy_scale * action_size, kl.mean() - args.trust_region_bound
    return jnp.exp(duals["log_alpha"]) * surplus - jnp.exp(duals["log_lambda"]) * excess  # Eq. 183, Eq. 184 (E4)

def update_minibatch(agent: Agent, learner: Learner, batch: Batch, old_h: Array, key: Array) -> tuple[Learner, dict]:
    """One gradient step each of critic, actor and duals."""
    args, (actor_opt, critic_opt, dual_opt) = agent.args, optimizers(agent.args)
    noise = jax.random.normal(key, (args.num_diffusion_steps + 1, *batch.action.shape))
    def descend(optimizer: Any, moments: Any, loss: Callable, parameters: Any, *inputs: Any, has_aux: bool = False) -> tuple:
        value, gradient = jax.value_and_grad(loss, has_aux=has_aux)(parameters, args, *inputs)
        update, moments = optimizer.update(gradient, moments)
        return value, optax.apply_updates(parameters, update), moments
    value, critic, critic_opt = descend(critic_opt, learner.critic_opt, critic_loss, learner.critic, batch)
    (loss, (bound, kl)), actor, actor_opt = descend(
        actor_opt, learner.actor_opt, actor_loss, learner.actor, critic, learner.duals, batch, old_h, noise, has_aux=True)
    _, duals, dual_opt = descend(dual_opt, learner.dual_opt, dual_loss, learner.duals, bound, kl, batch.action.shape[-1])
    metrics = {"losses/critic": value, "losses/actor": loss, "entropy/bound": bound.mean(), "trust_region/kl": kl.mean(),
               "trust_region/violated": (kl > args.trust_region_bound).mean()}
    return Learner(actor, critic, duals, actor_opt, critic_opt, dual_opt), metrics

def learn(agent: Agent, learner: Learner, data: Batch, old_h: Array, key: Array) -> tuple[Learner, dict[str, Array]]:
    """All epochs of shuffled minibatches; metrics are means over the last epoch."""
    args, sharding = agent.args, NamedSharding(agent.mesh, P("env"))
    def minibatch(learner: Learner, step: tuple[Array, Array]) -> tuple[Learner, dict]:
        batch = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x[step[0]], sharding), data)
        return update_minibatch(agent, learner, batch, old_h, step[1])
    order_key, noise_key = jax.random.split(key)
    shuffle = jax.vmap(lambda key: jax.random.permutation(key, args.batch_size))
    order = shuffle(jax.random.split(order_key, args.num_epochs)).reshape(-1, args.minibatch_size)
    learner, metrics = jax.lax.scan(minibatch, learner, (order, jax.random.split(noise_key, len(order))))
    return learner, jax.tree.map(lambda x: x[-len(order) // args.num_epochs:].mean(), metrics)
# ---------------------------------------------------------------------------------------- iteration and evaluation
TrainState = namedtuple("TrainState", "learner statistics key iteration")  # everything that a checkpoint holds
def new_state(agent: Agent, key: Array) -> TrainState:
    """Networks, duals, Adam and statistics from the seed's key."""
    actor_key, critic_key, key = jax.random.split(key, 3)
    actor, critic = (kind(agent.args, *agent.env[:2], nnx.Rngs(k)) for kind, k in ((Actor, actor_key), (Critic, critic_key)))
    duals = {name: jnp.log(INITIAL_DUAL) for name in ("log_alpha", "log_lambda")}
    moments = [o.init(p) for o, p in zip(optimizers(agent.args), (actor, critic, duals), strict=True)]
    statistics = Statistics(jnp.zeros(()), jnp.zeros((2, agent.env.observation_size)))
    return TrainState(Learner(actor, critic, duals, *moments), statistics, key, jnp.zeros((), int))

def sample_policy(agent: Agent, actor: Actor, observation: Array, key: Array) -> Chain:
    """Chains of the actor at normalised observations (B, .)."""
    shape = (agent.args.num_diffusion_steps + 1, len(observation), agent.env.action_size)
    return sample_chain(actor, observation, jax.random.normal(key, shape))

def collect(agent: Agent, act: Callable, envs: Simulators, state: TrainState) -> tuple[Transition, dict[str, np.ndarray]]:
    """A rollout of T steps with samples of the policy, and the mean return and length of the episodes seen whole."""
    rows = []
    for key in np.asarray(jax.random.split(jax.random.split(state.key, 5)[0], agent.args.num_steps)):
        observation = envs.slots["observation"].copy()
        chain = act(state.learner.actor, state.statistics, observation, key)
        rows.append((observation, chain.latents, chain.means, envs.step(chain.action).copy()))
    *before, after = map(np.stack, zip(*rows, strict=True))
    data = Transition(*before, *(after[name] for name in Transition._fields[3:]))
    ended = after[after["terminated"] | (after["truncated"] & (after["length"] == agent.env.time_limit))]  # clocks begin spread
    episodes = {"charts/episodes": len(ended)}
    if len(ended):  # else the rollout has no mean return
        episodes |= {"charts/episodic_return": ended["total"].mean(), "charts/episodic_length": ended["length"].mean()}
    return jax.device_put(data, NamedSharding(agent.mesh, P(None, "env"))), episodes

def critic_targets(agent: Agent, learner: Learner, data: Transition, next_seen: tuple[Array, Array], key: Array) -> Array:
    """Soft lambda-returns (T, E), with a fresh action at every true next observation, normalised for both networks."""
    def next_value(step: tuple) -> tuple[Array, Array]:
        (seen_by_actor, seen_by_critic), key = step
        action, bound, *_ = sample_policy(agent, learner.actor, seen_by_actor, key)
        return q_value(agent.args, learner.critic(seen_by_critic, action)), jnp.exp(learner.duals["log_alpha"]) * bound
    value, bonus = jax.lax.map(next_value, (next_seen, jax.random.split(key, agent.args.num_steps)))
    return lambda_returns(agent.args, data.reward, data.terminated, data.truncated, value, bonus)

def improve(agent: Agent, old: Learner, data: Transition, seen: tuple, next_seen: tuple, keys: Array) -> tuple[Learner, dict]:
    """Learn from a rollout, whose observations and true next ones are given as both networks see them, normalised."""
    args, old_h, (target_key, learn_key, check_key) = agent.args, old.actor.step_sizes(), keys
    target = critic_targets(agent, old, data, next_seen, target_key)
    batch = Batch(*(x.swapaxes(0, 1).reshape(-1, *x.shape[2:]) for x in (*seen, data.action, data.latents, data.means, target)))
    learner, metrics = learn(agent, old, batch, old_h, learn_key)
    # The KL of the whole iteration on as many states as a minibatch has: on stored chains, and on fresh ones of the old policy.
    row_key, noise_key = jax.random.split(check_key)
    some = jax.tree.map(lambda x: x[jax.random.permutation(row_key, args.batch_size)[:args.minibatch_size]], batch)
    for name, x in (("stored", some), ("fresh", sample_policy(agent, old.actor, some.seen_by_actor, noise_key))):
        metrics[f"trust_region/{name}_kl"] = trajectory_kl(learner.actor, some.seen_by_actor, x.latents, x.means, old_h).mean()
    alpha, lambda_ = jnp.exp(learner.duals["log_alpha"]), jnp.exp(learner.duals["log_lambda"])
    return learner, metrics | {"entropy/alpha": alpha, "trust_region/lambda": lambda_, "critic/target": target.mean(),
                               "entropy/friction": nnx.softplus(learner.actor.raw_friction[...]).mean(),
                               "critic/targets_clipped": ((target < args.v_min) | (target > args.v_max)).mean()}

def update(agent: Agent, state: TrainState, data: Transition) -> tuple[TrainState, dict[str, Array]]:
    """What follows a rollout: targets, epochs of updates, observation statistics."""
    _, *keys, key = jax.random.split(state.key, 5)
    # The untrained actor ignores what it observes, its last layer being 0, so the first rollout may seed the statistics that
    # it is learned from with. Later ones take effect in the next rollout: stored means belong to the present ones (E13).
    merged = update_statistics(state.statistics, data.observation)
    statistics = jax.tree.map(lambda new, now: jnp.where(state.iteration == 0, new, now), merged, state.statistics)
    seen, next_seen = ((normalize(statistics, x),) * 2 for x in (data.observation, data.next_observation))
    learner, metrics = improve(agent, state.learner, data, seen, next_seen, keys)
    return TrainState(learner, merged, key, state.iteration + 1), metrics

def evaluation_action(agent: Agent, learner: Learner, seen: tuple[Array, Array], key: Array) -> Array:
    """Actions (B, A) as --eval-mode says, at normalised observations as actor and critic see them."""
    if agent.args.eval_mode == "ode":
        noise = jax.random.normal(key, (len(seen[0]), agent.env.action_size))
        return ode_action(learner.actor, seen[0], noise, agent.args.ode_score_scale)
    keys = jax.random.split(key, agent.args.best_of_k if agent.args.eval_mode == "best-of-k" else 1)
    actions = jax.vmap(lambda key: sample_policy(agent, learner.actor, seen[0], key).action)(keys)
    q = jax.vmap(lambda action: q_value(agent.args, learner.critic(seen[1], action)))(actions)
    return jnp.take_along_axis(actions, q.argmax(0)[None, :, None], 0)[0]

def play(agent: Agent, decide: Callable, envs: Simulators, state: TrainState, folder: str | pathlib.Path) -> dict[str, float]:
    """An episode in each of --num-eval-envs environments: metrics and, with --capture-video, an mp4 of the first one's."""
    iteration, slots, frames = int(state.iteration), envs.slots, []
    envs.reset(agent.args.seed, iteration, 1)
    keys = jax.random.split(jax.random.fold_in(state.key, 2**31), agent.env.time_limit)  # training folds in no such number
    for key in itertools.takewhile(lambda _: slots["active"].any(), np.asarray(keys)):
        frames += [envs.frame] if slots["active"][0] and agent.args.capture_video else []
        envs.step(decide(state.learner, state.statistics, slots["observation"].copy(), key))
        slots["active"] &= ~(slots["terminated"] | slots["truncated"])
    if frames:
        path = pathlib.Path(folder, "videos", f"step_{iteration * agent.args.batch_size}.mp4")
        path.parent.mkdir(exist_ok=True)
        import_module("imageio").mimsave(path, frames, fps=agent.env.fps)
    total, success, bar = slots["total"], slots["success"], agent.env.success_bar
    metrics = {"eval/episodic_return": total.mean(), "eval/episodic_return_std": total.std(),
               "eval/episodic_length": slots["length"].mean()}
    return metrics if bar is None else metrics | {
        "eval/success_bar": bar, "eval/success": np.where(np.isnan(success), total >= bar, success > 0).mean()}
# -------------------------------------------------------------------------------------- run folder and checkpoints
def named_leaves(tree: Any) -> dict[str, Any]:
    """A tree's leaves by dotted names; without the empty ones, which Orbax refuses."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(tree) if x.size}

def save_checkpoint(run: pathlib.Path, state: TrainState, step: int, wall_time: float) -> None:
    """Write the whole training state, in NumPy arrays, and the seconds that it took; keep the last three."""
    options = ocp.CheckpointManagerOptions(max_to_keep=3, enable_async_checkpointing=False)
    with ocp.CheckpointManager(run.resolve() / "checkpoints", options=options) as manager:  # it never reads unfinished ones
        manager.save(step, args=ocp.args.PyTreeSave({"state": named_leaves(state), "wall_time": np.float64(wall_time)}))

def read_checkpoint(run: str) -> dict[str, Any]:
    """What a run's newest checkpoint was given; exits with code 2 if it cannot be read."""
    try:
        options = ocp.CheckpointManagerOptions(read_only=True)  # a run that still goes on is left alone
        with ocp.CheckpointManager(pathlib.Path(run, "checkpoints").resolve(strict=True), options=options) as manager:
            return manager.restore(manager.latest_step(), args=ocp.args.PyTreeRestore())
    except Exception as error:  # whatever a missing, damaged or foreign file makes of the reader
        fail(f"no readable checkpoint in {run}, which should be a run's folder ({type(error).__name__}: {str(error)[:200]})")

def fill_state(shapes: TrainState, arrays: dict[str, np.ndarray]) -> TrainState:
    """A training state of a checkpoint's arrays; exits with code 2 if they are not those of this run's state."""
    expected, found = ({name: (x.shape, x.dtype) for name, x in d.items()} for d in (named_leaves(shapes), arrays))
    if wrong := sorted(dict(found.items() ^ expected.items())):
        fail(f"the checkpoint is not of this run: {wrong[0]} is {found.get(wrong[0])}, expected {expected.get(wrong[0])}")
    content = iter([arrays[name] for name in expected])
    return jax.tree.map(lambda x: next(content) if x.size else np.zeros(x.shape, x.dtype), shapes)

def provenance() -> dict[str, Any]:
    """What else decides a run's numbers: command, commit, device and versions."""
    git = ["git", "-C", str(pathlib.Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()  # empty outside a clone
    device = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}, {os.cpu_count()} cores"
    return {"script": SCRIPT, "command": sys.argv, "git_commit": commit, "device": device, "python": sys.version,
            "versions": {d.name: d.version for d in metadata.distributions()}}

def open_run(folder: pathlib.Path, args: Args) -> None:
    """Make the run's folder with args.json in it; start Weights & Biases, which copies what TensorBoard gets."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "args.json").write_text(json.dumps({"args": vars(args), **provenance()}, indent=1) + "\n")
    if args.track:
        import_module("wandb").init(project=args.wandb_project_name, entity=args.wandb_entity, config=vars(args),
                                    name=folder.name, dir=str(folder), sync_tensorboard=True)

def open_log(folder: pathlib.Path, step: int) -> Callable:
    """Open metrics.jsonl and TensorBoard in a folder, to go on after this step; returns their logger."""
    path, writer = folder / "metrics.jsonl", tensorboardX.SummaryWriter(str(folder), purge_step=step + 1)
    path.touch()  # a killed run may have logged beyond its checkpoint, the last line by half: those steps come again
    lines = [x for x in path.read_text().splitlines(keepends=True) if x.endswith("\n") and json.loads(x)["step"] <= step]
    os.truncate(path, sum(map(len, lines)))
    def log(step: int, wall_time: float, metrics: dict[str, float]) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "wall_time": round(wall_time, 3), **metrics}) + "\n")
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()
    return log
# -------------------------------------------------------------------------------------------------------- training
def parse() -> Args:
    """Resolved arguments of the command line; with --resume or --evaluate, they start from those of that run."""
    args = tyro.cli(Args)
    run = args.resume or args.evaluate
    if not run:
        return resolve(args)
    try:
        saved = json.loads(pathlib.Path(run, "args.json").read_text())
        if saved["script"] != SCRIPT:
            raise ValueError(f"it is of {saved['script']}.py")
        own = Args(**saved["args"] | {"resume": None, "evaluate": None})
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{run} is no run folder of this script, with args.json and checkpoints ({error})")
    args = tyro.cli(Args, default=own)
    for name, value in itertools.takewhile(lambda item: item[0] != "device", vars(own).items()):
        if getattr(args, name) != value:
            fail(f"--{name.replace('_', '-')} cannot change in a run that exists; it is {value}")
    return resolve(args)

def main() -> None:
    """Parse, start the simulators, compile, then train, resume or evaluate."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax says much that is not for the user; its errors are raised
    args = parse()
    saved = read_checkpoint(args.resume or args.evaluate) if args.resume or args.evaluate else {}
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(args.compilation_cache_dir) or None)
    if args.capture_video:
        os.environ.setdefault("MUJOCO_GL", "egl")
    print("\n".join(f"{name}: {value}" for name, value in vars(args).items()), flush=True)
    agent, render_mode, received = load_agent(args), "rgb_array" if args.capture_video else None, []
    whole, split = NamedSharding(agent.mesh, P()), NamedSharding(agent.mesh, P("env"))
    init, key = functools.partial(new_state, agent), jax.random.PRNGKey(args.seed)
    state = jax.device_put(fill_state(jax.eval_shape(init, key), saved["state"]) if saved else jax.jit(init)(key), whole)
    compiled = functools.partial(jax.jit, in_shardings=(whole, whole, split, whole))
    sample = compiled(lambda actor, moments, x, key: sample_policy(agent, actor, normalize(moments, x), key))
    choose = compiled(lambda learner, moments, x, key: evaluation_action(agent, learner, (normalize(moments, x),) * 2, key))
    eval_envs = Simulators(args.env_id, agent.env, args.num_eval_envs, args.num_workers, render_mode)
    if args.evaluate:
        print(json.dumps(play(agent, choose, eval_envs, state, args.evaluate)))
        return
    envs, began = Simulators(args.env_id, agent.env, args.num_envs, args.num_workers), time.perf_counter()
    choose(state.learner, state.statistics, eval_envs.slots["observation"], key)
    data, _ = collect(agent, sample, envs, state)  # environments that have not been reset stay idle: this only compiles
    learn_from = jax.jit(functools.partial(update, agent), out_shardings=whole, donate_argnums=0).lower(state, data).compile()
    print(f"workers started, programs compiled in {time.perf_counter() - began:.1f} s", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # finish the iteration, checkpoint, stop; a second signal kills
        signal.signal(number, lambda n, _: (received.append(n), signal.signal(n, signal.SIG_DFL)))
    done = int(state.iteration)
    envs.reset(args.seed, done, 0, spread=True)
    folder = pathlib.Path(args.resume or f"{args.log_dir}/{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    open_run(folder, args)
    log = open_log(folder, done * args.batch_size)
    started, code = time.perf_counter() - float(saved.get("wall_time", 0.0)), 0
    while done < args.num_iterations and not code:
        began = time.perf_counter()
        data, episodes = collect(agent, sample, envs, state)
        state, metrics = learn_from(state, data)
        metrics = {name: float(x) for name, x in (jax.device_get(metrics) | episodes).items()}
        metrics["charts/SPS"] = args.batch_size / (time.perf_counter() - began)
        done, step = done + 1, (done + 1) * args.batch_size
        finite = all(np.isfinite(x) for name, x in metrics.items() if name.startswith(("losses", "trust")))
        if finite and (done == args.num_iterations or done % args.eval_interval == 0):
            metrics |= play(agent, choose, eval_envs, state, folder)
        log(step, time.perf_counter() - started, metrics)
        eta = (time.perf_counter() - started) / 60 / done * (args.num_iterations - done)
        print(f"step {step:,}  SPS {metrics['charts/SPS']:,.0f}  ETA {eta:.1f} min",
              *(f"{name} {x:.2f}" for name, x in metrics.items() if name.startswith("eval/")), sep="  ", flush=True)
        code = (128 + received[0] if received else 0) if finite else 1
        if not finite:
            print(f"iteration {done}: a loss is not finite; the state is in {folder}/diverged", file=sys.stderr)
        if code or done == args.num_iterations or done % args.checkpoint_interval == 0:
            save_checkpoint(folder / ("" if finite else "diverged"), jax.device_get(state), step, time.perf_counter() - started)
    print(folder)
    sys.exit(code)

if __name__ == "__main__":
    main()
