# /// script
# requires-python = ">=3.11"
# dependencies = ["flax>=0.12", "imageio-ffmpeg>=0.5", "jax>=0.10", "mediapy>=1.2", "mujoco-mjx[warp]>=3.3", "optax>=0.2.5",
#                 "orbax-checkpoint>=0.11.20", "playground>=0.2.0", "tensorboard>=2.18", "tensorboardx>=2.6.2", "tyro>=1.0",
#                 "wandb>=0.19.10"]
# ///
"""PPO (Proximal Policy Optimization, arXiv 1707.06347) on MuJoCo Playground, made from trudi_mjx.py.

    python benchmark/baselines/ppo_mjx.py --env-id CartpoleBalance --preset cpu

What differs from trudi_mjx.py: the policy is a Gaussian, whose mean and standard deviation a network gives, and simulators get
its samples clipped; the critic is a value V(s), with a squared error; both are MLPs of three layers with ELU (Appendix B.5 and
Table 4 of TruDi's paper, arXiv 2606.15260). Advantages are those of GAE (arXiv 1506.02438, Eq. 16), and the loss is the
clipped one (Eq. 7) with a bonus for entropy. What Table 4 leaves open is as in RSL-RL (arXiv 2509.10771), from which the paper
has its PPO: the learning rate follows the KL, 5 epochs of 4 minibatches, advantages standardised over a rollout. But time-outs
have the value of the true next state, values are not clipped, as Table 4 has "MSE", and gradients are clipped for each network
apart.

E13 is in README.md's table of errata. Axes: T steps of a rollout, E environments, B states of a batch, A action dimensions, K
seeds."""

import dataclasses
import difflib
import functools
import itertools
import json
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from importlib import import_module, metadata, util
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorboardX
import tyro
from flax import nnx
from jax import Array, NamedSharding, P
from jax.experimental import multihost_utils

DMC = ("AcrobotSwingup AcrobotSwingupSparse BallInCup CartpoleBalance CartpoleBalanceSparse CartpoleSwingup CheetahRun "
       "CartpoleSwingupSparse FingerSpin FingerTurnEasy FingerTurnHard FishSwim HopperHop HopperStand PendulumSwingup "
       "ReacherEasy ReacherHard WalkerRun WalkerStand WalkerWalk").split()
HUMANOID = ["G1JoystickFlatTerrain", "G1JoystickRoughTerrain", "T1JoystickFlatTerrain", "T1JoystickRoughTerrain"]
SUITE = {"dmc": dict(gamma=0.99), "humanoid": dict(gamma=0.97)}  # Table 5
PRESET = {  # paper: Tables 4 and 5, and RSL-RL's 5 epochs of 4 minibatches; cpu: for two cores, the networks as TruDi's
    "paper": dict(total_timesteps=50_000_000, num_envs=1024, num_steps=128, num_epochs=5, minibatch_size=32768, hidden_dim=256,
                  num_eval_envs=128, eval_interval=15, checkpoint_interval=15),
    "cpu": dict(total_timesteps=2_000_000, num_envs=512, num_steps=64, num_epochs=5, minibatch_size=1024, hidden_dim=64,
                num_eval_envs=64, eval_interval=3, checkpoint_interval=3)}
ACTION_LIMIT = 0.999  # clips actions for the simulator; not in the losses, where the Gaussian's own samples are
LEARNING_RATES = 1e-5, 1e-2  # the lowest and the highest that the KL may set
Pose = namedtuple("Pose", "qpos qvel mocap_pos mocap_quat xfrc_applied")  # what a renderer needs
SCRIPT = pathlib.Path(__file__).stem
# ------------------------------------------------------------------------------------------------------- arguments
@dataclasses.dataclass(frozen=True)
class Args:
    """Train a PPO agent. A flag whose default is None takes the value of --preset or of the task's suite."""
    env_id: str = "CartpoleBalance"  # task of MuJoCo Playground
    exp_name: str = "ppo_mjx"  # part of the run folder's name
    seed: int = 1  # seed of the first run; run k has seed + k
    num_seeds: int = 1  # independent runs trained side by side in this process
    preset: Literal["paper", "cpu"] = "paper"  # sizes: the paper's Table 5, or small ones for two CPU cores
    impl: Literal["jax", "warp"] | None = None  # simulator, MJX or MuJoCo Warp; default: warp on a GPU, jax elsewhere
    log_dir: str = "runs"  # parent of the run folders
    num_envs: int | None = None  # parallel environments of each run
    num_steps: int | None = None  # steps of each environment in a rollout
    num_epochs: int | None = None  # passes over a rollout
    minibatch_size: int | None = None  # states in a gradient step
    gamma: float | None = None  # discount
    gae_lambda: float = 0.95  # lambda of the advantages
    learning_rate: float = 1e-3  # of Adam at the start, of actor and critic; then it follows the KL
    desired_kl: float = 0.01  # the learning rate falls at more than twice it, in nats, and grows at less than half
    max_grad_norm: float = 1.0  # global-norm clip, of actor and critic apart
    hidden_dim: int | None = None  # width of actor and critic
    epsilon: float = 0.2  # how far from 1 the ratio is worth moving
    entropy_scale: float = 0.01  # weight of the policy's entropy in the loss
    # The flags from here on may differ when a run is continued or evaluated.
    device: Literal["auto", "cpu", "gpu"] = "auto"  # where to run; gpu fails where there is none
    num_devices: int = 1  # local devices over which the environments are sharded
    compilation_cache_dir: str = "~/.cache/trudi_jax"  # compiled programs are kept here between runs; empty: nowhere
    total_timesteps: int | None = None  # environment steps of each run, over all its environments
    eval_mode: Literal["mode", "sample"] = "mode"  # the mean, or a sample
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
    """Fill in what depends on suite, preset and device; exit with code 2 on what cannot run."""
    if args.env_id not in DMC + HUMANOID:
        near = difflib.get_close_matches(args.env_id, DMC + HUMANOID, 3, 0.4) or DMC[:3]
        fail(f"unknown --env-id {args.env_id}; the nearest are {', '.join(near)}")
    if args.device == "cpu":
        jax.config.update("jax_platforms", "cpu")  # MJX puts its constants on the default device
    try:
        devices = jax.local_devices(backend="gpu" if args.device == "gpu" else None)
    except RuntimeError as error:
        fail(f"JAX has no {args.device} device ({error}); install jax[cuda13] or jax[cuda12], or use --device cpu")
    values = {"impl": "warp" if devices[0].platform == "gpu" else "jax"} | SUITE["dmc" if args.env_id in DMC else "humanoid"]
    values |= PRESET[args.preset] | {k: v for k, v in vars(args).items() if v is not None}
    size = values["num_envs"] * values["num_steps"]
    args = dataclasses.replace(args, **values | dict(batch_size=size, num_iterations=values["total_timesteps"] // max(size, 1)))
    may_be_zero = ("seed", "num_iterations", "gamma", "gae_lambda", "entropy_scale")
    numbers = {f"--{k}".replace("_", "-"): v for k, v in vars(args).items() if type(v) in (int, float) and k not in may_be_zero}
    shards, split = max(args.num_devices * jax.process_count(), 1), ("--num-envs", "--minibatch-size", "--num-eval-envs")
    rules = [(v > 0, f"{k} must be positive, not {v}") for k, v in numbers.items()] + [
        (args.seed >= 0 and args.entropy_scale >= 0, "--seed and --entropy-scale must not be negative"),
        (0 <= args.gamma < 1 and 0 <= args.gae_lambda <= 1, "--gamma must lie in [0, 1) and --gae-lambda in [0, 1]"),
        (args.num_iterations > 0, f"--total-timesteps {args.total_timesteps} is less than --num-envs x --num-steps"),
        (args.batch_size % max(args.minibatch_size, 1) == 0, f"--minibatch-size {args.minibatch_size} does not divide "
         f"--num-envs x --num-steps = {args.batch_size}"),
        (args.num_devices <= len(devices), f"--num-devices {args.num_devices}, but JAX finds {len(devices)} here; on a CPU, "
         f"XLA_FLAGS=--xla_force_host_platform_device_count={args.num_devices} makes more"),
        (args.impl != "warp" or shards == 1, "--impl warp trains on one device only; use --impl jax"),
        *((numbers[k] % shards == 0, f"{k} {numbers[k]} does not divide over {shards} devices") for k in split)]
    for message in (message for holds, message in rules if not holds):
        fail(message)
    return args
# --------------------------------------------------------------------------- environments and their observations
Agent = namedtuple("Agent", "args env time_limit mesh")  # what stays constant while training; compiled programs close over it
# E environments: Playground's states, those that follow an end, steps towards the time-out, steps and rewards since a reset.
EnvState = namedtuple("EnvState", "sim reset_to clock length total")  # clock and length differ in the first episode only
# A rollout, leaves (T, E, ...): raw observations, actions before they were clipped, means and standard deviations of the policy
# that acted (A,), true next observations, and which episodes seen whole ended here, with their returns and lengths.
Transition = namedtuple("Transition", "observation action mean std reward terminated truncated next_observation episode")

def make_agent(args: Args) -> Agent:
    """Load a Playground task and lay out the devices. Exits with code 2 if the task's meshes can't be had."""
    meshes = pathlib.Path(util.find_spec("mujoco_playground").origin).parent / "external_deps" / "mujoco_menagerie"
    try:
        if args.env_id in HUMANOID and not meshes.exists():  # Playground is slow to import, then clones: can it?
            socket.create_connection(("github.com", 443), timeout=2).close()
        mujoco, registry = import_module("mujoco"), import_module("mujoco_playground").registry
        # Playground 0.2.0 compares versions as texts and takes MuJoCo 3.10 to 3.17 for ones that had this name (Reacher).
        mujoco.MjSpec.find_body = mujoco.MjSpec.body
        env = registry.load(args.env_id, config_overrides={"impl": args.impl})
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"{args.env_id} needs meshes that cannot be downloaded ({error}); in advance, "
             f"git clone https://github.com/google-deepmind/mujoco_menagerie and copy or link it to {meshes}")
    used = [device for i, device in enumerate(jax.devices()) if i % jax.local_device_count() < args.num_devices]
    return Agent(args, env, registry.get_default_config(args.env_id).episode_length, jax.sharding.Mesh(used, ("env",)))

def views(observation: Any) -> tuple[Array, Array]:
    """What actor and critic see; tasks with privileged information keep it from the actor."""
    return (observation["state"], observation["privileged_state"]) if isinstance(observation, dict) else (observation,) * 2

def over_envs(agent: Agent, function: Any, *inputs: Any) -> Any:
    """Call the simulator's reset(keys (E, 2)) or step(states, actions (E, A)); each device computes its own environments."""
    call = jax.vmap(function)
    if agent.mesh.size > 1:  # Warp's programs cannot be mapped over seeds around a shard_map
        call = jax.shard_map(call, mesh=agent.mesh, in_specs=P("env"), out_specs=P("env"), check_vma=False)
    sim = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), call(*inputs))  # never weakly typed, for loops
    return sim.replace(reward=jnp.where((sim.done > 0) & jnp.isnan(sim.reward), 0.0, sim.reward))  # Playground ends what is NaN

def env_reset(agent: Agent, key: Array) -> EnvState:
    """Start the training environments, their clocks spread over an episode so that time-outs do not coincide."""
    (sim_key, clock_key), zeros = jax.random.split(key), jnp.zeros(agent.args.num_envs)
    sim = over_envs(agent, agent.env.reset, jax.random.split(sim_key, zeros.size))
    return EnvState(sim, sim, jax.random.randint(clock_key, zeros.shape, 0, agent.time_limit), zeros.astype(int), zeros)

def env_step(agent: Agent, env: EnvState, action: Array) -> tuple[EnvState, tuple]:
    """Step, end and restart episodes; returns the new state and Transition's fields from reward on."""
    sim = over_envs(agent, agent.env.step, env.sim, action)
    clock, length, total, terminated = env.clock + 1, env.length + 1, env.total + sim.reward, sim.done > 0
    done = terminated | (clock >= agent.time_limit)
    def restart(initial: Array, now: Array) -> Array:  # some of MuJoCo Warp's buffers are shared between environments
        return now if now.shape[:1] != done.shape else jnp.where(done.reshape(-1, *[1] * (now.ndim - 1)), initial, now)
    outcome = (sim.reward, terminated, done & ~terminated, sim.obs, (done & (length == clock), total, length))
    sim, counters = jax.tree.map(restart, env.reset_to, sim), (jnp.where(done, 0, x) for x in (clock, length, total))
    return EnvState(sim, env.reset_to, *counters), outcome

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
    """The mean and the standard deviation of a Gaussian."""
    def __init__(self, args: Args, observation_size: int, action_size: int, rngs: nnx.Rngs):
        sizes, width = [observation_size] + [args.hidden_dim] * 2, args.hidden_dim
        self.hidden = nnx.List([nnx.Linear(size, width, rngs=rngs) for size in sizes])
        self.output = nnx.Linear(width, 2 * action_size, kernel_init=nnx.initializers.zeros, rngs=rngs)  # a standard normal
    def __call__(self, observation: Array) -> tuple[Array, Array]:
        """Mean and standard deviation, both (B, A), at observations (B, .)."""
        for hidden in self.hidden:
            observation = nnx.elu(hidden(observation))
        mean, log_std = jnp.split(self.output(observation), 2, -1)
        return mean, jnp.exp(log_std)

class Critic(nnx.Module):
    """The value V(s)."""
    def __init__(self, args: Args, observation_size: int, action_size: int, rngs: nnx.Rngs):
        sizes, width = [observation_size] + [args.hidden_dim] * 2, args.hidden_dim
        self.hidden = nnx.List([nnx.Linear(size, width, rngs=rngs) for size in sizes])
        self.output = nnx.Linear(width, 1, rngs=rngs)
    def __call__(self, observation: Array) -> Array:
        """Values (B,)."""
        for hidden in self.hidden:
            observation = nnx.elu(hidden(observation))
        return self.output(observation)[..., 0]
# -------------------------------------------------------------------------------------------------- Gaussian policy
Sample = namedtuple("Sample", "action mean std")  # a sample and the Gaussian that it is of, all (B, A)
def log_density(action: Array, mean: Array, std: Array) -> Array:
    """Of diagonal Gaussians, everything (B, A), at actions: (B,)."""
    return -(0.5 * ((action - mean) / std) ** 2 + jnp.log(std * jnp.sqrt(2 * jnp.pi))).sum(-1)

def gaussian_kl(mean: Array, std: Array, new_mean: Array, new_std: Array) -> Array:
    """KL (B,) of Gaussians from new ones, of these means and standard deviations (B, A)."""
    ratio = (std / new_std) ** 2
    return 0.5 * (ratio - 1 - jnp.log(ratio) + ((mean - new_mean) / new_std) ** 2).sum(-1)
# ------------------------------------------------------------------------------------------------------ advantages
def advantages(args: Args, reward: Array, terminated: Array, truncated: Array, value: Array, next_value: Array) -> Array:
    """GAE, everything (T, E); `value` is V where an action was taken, `next_value` V at the true next observations."""
    def step(later: Array, now: tuple) -> tuple[Array, Array]:
        reward, terminated, truncated, value, next_value = now
        # Chosen, not multiplied by 0: a simulation that has become NaN ends, and its last value is NaN.
        error = reward + args.gamma * jnp.where(terminated, 0.0, next_value) - value
        advantage = error + args.gamma * args.gae_lambda * jnp.where(terminated | truncated, 0.0, later)
        return advantage, advantage
    return jax.lax.scan(step, jnp.zeros_like(value[-1]), (reward, terminated, truncated, value, next_value), reverse=True)[1]
# ------------------------------------------------------------------------------------------------ losses, learning
Learner = namedtuple("Learner", "actor critic learning_rate actor_opt critic_opt")  # all that learns; networks are pytrees
# B states: normalised observations of both networks, and from the rollout actions, old policies, advantages and returns.
Batch = namedtuple("Batch", "seen_by_actor seen_by_critic action mean std advantage target")
def optimizers(args: Args) -> list[optax.GradientTransformation]:
    """Adam for actor and critic, whose gradients' global norms it clips apart; its steps are yet to take the learning rate."""
    return [optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(), optax.scale(-1))] * 2

def critic_loss(critic: Critic, args: Args, batch: Batch) -> Array:
    """The squared error of the critic's values."""
    return ((critic(batch.seen_by_critic) - batch.target) ** 2).mean()

def actor_loss(actor: Actor, args: Args, batch: Batch) -> tuple:
    """The clipped loss, and ratio, entropy and KL from the old policy of every state (B,)."""
    mean, std = actor(batch.seen_by_actor)
    ratio = jnp.exp(log_density(batch.action, mean, std) - log_density(batch.action, batch.mean, batch.std))
    clipped = jnp.clip(ratio, 1 - args.epsilon, 1 + args.epsilon)
    gain = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)  # Eq. 7 of PPO's paper
    entropy = jnp.log(std * jnp.sqrt(2 * jnp.pi * jnp.e)).sum(-1)
    return -(gain + args.entropy_scale * entropy).mean(), (ratio, entropy, gaussian_kl(batch.mean, batch.std, mean, std))

def adapt(learning_rate: Array, args: Args, kl: Array) -> Array:
    """The next learning rate: RSL-RL's rule, which keeps a step's KL near the desired one."""
    factor = jnp.where(kl > 2 * args.desired_kl, 1 / 1.5, jnp.where(kl < args.desired_kl / 2, 1.5, 1.0))
    return jnp.clip(learning_rate * factor, *LEARNING_RATES)

def update_minibatch(agent: Agent, learner: Learner, batch: Batch) -> tuple[Learner, dict]:
    """One gradient step each of critic and actor."""
    args, (actor_opt, critic_opt) = agent.args, optimizers(agent.args)
    value, gradient = jax.value_and_grad(critic_loss)(learner.critic, args, batch)
    (loss, (ratio, entropy, kl)), actor_gradient = jax.value_and_grad(actor_loss, has_aux=True)(learner.actor, args, batch)
    rate = adapt(learner.learning_rate, args, kl.mean())
    def descend(optimizer: Any, moments: Any, gradient: Any, parameters: Any) -> tuple:
        update, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(parameters, jax.tree.map(lambda x: rate * x, update)), moments
    critic, critic_opt = descend(critic_opt, learner.critic_opt, gradient, learner.critic)
    actor, actor_opt = descend(actor_opt, learner.actor_opt, actor_gradient, learner.actor)
    metrics = {"losses/critic": value, "losses/actor": loss, "entropy/gaussian": entropy.mean(), "trust_region/kl": kl.mean(),
               "trust_region/outside": (jnp.abs(ratio - 1) > args.epsilon).mean()}
    return Learner(actor, critic, rate, actor_opt, critic_opt), metrics

def learn(agent: Agent, learner: Learner, data: Batch, key: Array) -> tuple[Learner, dict[str, Array]]:
    """All epochs of shuffled minibatches; metrics are means over the last epoch."""
    args, sharding = agent.args, NamedSharding(agent.mesh, P("env"))
    def minibatch(learner: Learner, rows: Array) -> tuple[Learner, dict]:
        batch = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x[rows], sharding), data)
        return update_minibatch(agent, learner, batch)
    shuffle = jax.vmap(lambda key: jax.random.permutation(key, args.batch_size))
    order = shuffle(jax.random.split(key, args.num_epochs)).reshape(-1, args.minibatch_size)
    learner, metrics = jax.lax.scan(minibatch, learner, order)
    return learner, jax.tree.map(lambda x: x[-len(order) // args.num_epochs:].mean(), metrics)
# ---------------------------------------------------------------------------------------- iteration and evaluation
TrainState = namedtuple("TrainState", "learner statistics env key iteration")  # everything that a checkpoint holds
def init_state(agent: Agent, key: Array) -> TrainState:
    """Networks, Adam, statistics and environments of one run, from its seed's key."""
    actor_key, critic_key, env_key, key = jax.random.split(key, 4)
    env = env_reset(agent, env_key)
    actor, critic = (kind(agent.args, seen.shape[-1], agent.env.action_size, nnx.Rngs(k))
                     for kind, seen, k in zip((Actor, Critic), views(env.sim.obs), (actor_key, critic_key), strict=True))
    moments = [o.init(p) for o, p in zip(optimizers(agent.args), (actor, critic), strict=True)]
    statistics = Statistics(jnp.zeros(()), jax.tree.map(lambda x: jnp.zeros((2, x.shape[-1])), env.sim.obs))
    learner = Learner(actor, critic, jnp.full((), agent.args.learning_rate), *moments)
    return TrainState(learner, statistics, env, key, jnp.zeros((), int))

def sample_policy(agent: Agent, actor: Actor, observation: Array, key: Array) -> Sample:
    """Samples of the actor at normalised observations (B, .)."""
    mean, std = actor(observation)
    return Sample(mean + std * jax.random.normal(key, (len(observation), agent.env.action_size)), mean, std)

def rollout(agent: Agent, actor: Actor, statistics: Statistics, env: EnvState, key: Array) -> tuple[EnvState, Transition]:
    """Act for T steps with samples of the policy, keeping Gaussians. Episodes start from a queue of states, into which as
    many new ones are shifted as a rollout's time-outs take out: a reset can cost as much as 200 steps (CheetahRun's does)."""
    num_envs, key, reset_key = agent.args.num_envs, *jax.random.split(key)
    count = min(num_envs, -(-num_envs * agent.args.num_steps // agent.time_limit))
    new = jax.vmap(agent.env.reset)(jax.random.split(reset_key, count))
    queue = jax.tree.map(lambda x, y: jnp.concatenate([x[count:], y]) if x.shape[:1] == (num_envs,) else x, env.reset_to, new)
    def step(env: EnvState, key: Array) -> tuple[EnvState, Transition]:
        sample = sample_policy(agent, actor, views(normalize(statistics, env.sim.obs))[0], key)
        after, outcome = env_step(agent, env, jnp.clip(sample.action, -ACTION_LIMIT, ACTION_LIMIT))
        return after, Transition(env.sim.obs, *sample, *outcome)
    return jax.lax.scan(step, env._replace(reset_to=queue), jax.random.split(key, agent.args.num_steps))

def improve(agent: Agent, old: Learner, data: Transition, seen: tuple, next_seen: tuple, keys: Array) -> tuple[Learner, dict]:
    """Learn from a rollout, whose observations and true next ones are given as both networks see them, normalised."""
    args, (learn_key, check_key, _) = agent.args, keys
    value, next_value = (jax.lax.map(old.critic, x[1]) for x in (seen, next_seen))
    advantage = advantages(args, data.reward, data.terminated, data.truncated, value, next_value)
    target, standard = advantage + value, (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    batch = (*seen, data.action, data.mean, data.std, standard, target)
    batch = Batch(*(x.swapaxes(0, 1).reshape(-1, *x.shape[2:]) for x in batch))
    learner, metrics = learn(agent, old, batch, learn_key)
    some = jax.tree.map(lambda x: x[jax.random.permutation(check_key, args.batch_size)[:args.minibatch_size]], batch)
    kl = gaussian_kl(some.mean, some.std, *learner.actor(some.seen_by_actor))  # of the whole iteration
    return learner, metrics | {"trust_region/stored_kl": kl.mean(), "entropy/std": data.std.mean(),
                               "critic/target": target.mean(), "charts/learning_rate": learner.learning_rate}

def iterate(agent: Agent, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
    """One iteration: rollout, targets, epochs of updates, observation statistics."""
    rollout_key, *keys, key = jax.random.split(state.key, 5)
    env, data = rollout(agent, state.learner.actor, state.statistics, state.env, rollout_key)
    # The untrained actor ignores what it observes, its last layer being 0, so the first rollout may seed the statistics that
    # it is learned from with. Later ones take effect in the next rollout: stored means belong to the present ones (E13).
    merged = update_statistics(state.statistics, data.observation)
    statistics = jax.tree.map(lambda new, now: jnp.where(state.iteration == 0, new, now), merged, state.statistics)
    seen, next_seen = (views(normalize(statistics, x)) for x in (data.observation, data.next_observation))
    learner, metrics = improve(agent, state.learner, data, seen, next_seen, keys)
    ended, total, length = data.episode
    metrics |= {"charts/simulator_nans": jnp.isnan(next_seen[0]).any(-1).sum(), "charts/episodes": ended.sum(),
                "charts/episodic_return": total.mean(where=ended), "charts/episodic_length": length.mean(where=ended)}
    return TrainState(learner, merged, env, key, state.iteration + 1), metrics

def evaluation_action(agent: Agent, learner: Learner, seen: tuple[Array, Array], key: Array) -> Array:
    """Actions (B, A) as --eval-mode says, at normalised observations as actor and critic see them."""
    sample = sample_policy(agent, learner.actor, seen[0], key)
    return sample.mean if agent.args.eval_mode == "mode" else sample.action

def evaluate(agent: Agent, state: TrainState) -> tuple[dict, tuple]:
    """An episode in each evaluation environment: metrics and, for a video, the first one's poses and if it went on (T, ...)."""
    reset_key, key = jax.random.split(jax.random.fold_in(state.key, 2**31))  # training never folds in so large a number
    def step(carry: tuple, key: Array) -> tuple[tuple, tuple]:
        sim, alive, total, length = carry
        action = evaluation_action(agent, state.learner, views(normalize(state.statistics, sim.obs)), key)
        sim = over_envs(agent, agent.env.step, sim, jnp.clip(action, -ACTION_LIMIT, ACTION_LIMIT))
        pose = Pose(*(getattr(sim.data, name)[0] for name in Pose._fields)) if agent.args.capture_video else None
        return (sim, alive & (sim.done == 0), total + jnp.where(alive, sim.reward, 0), length + alive), (pose, alive[0])
    zeros = jnp.zeros(agent.args.num_eval_envs)
    sim = over_envs(agent, agent.env.reset, jax.random.split(reset_key, zeros.size))
    (_, _, total, length), frames = jax.lax.scan(step, (sim, zeros == 0, zeros, zeros), jax.random.split(key, agent.time_limit))
    return {"eval/episodic_return": total.mean(), "eval/episodic_return_std": total.std(),
            "eval/episodic_length": length.mean()}, frames
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

def check_renderer() -> None:
    """Exit with code 2 where MuJoCo cannot draw; it draws through EGL unless MUJOCO_GL says otherwise."""
    try:
        mujoco = import_module("mujoco")
        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>")).close()
    except Exception as error:  # each GL library has its own, some while mujoco is imported
        fail(f"--capture-video cannot draw ({error}); set MUJOCO_GL to egl (libegl1, libgl1-mesa-dri) or osmesa (libosmesa6)")

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

def prepare(agent: Agent, saved: dict[str, Any]) -> tuple[TrainState, Any, Any]:
    """The training state of all seeds, new or a checkpoint's, laid out on the devices; `iterate` and `evaluate` compiled."""
    whole, split = NamedSharding(agent.mesh, P()), NamedSharding(agent.mesh, P(None, "env"))
    init, run, judge = (jax.vmap(functools.partial(f, agent)) for f in (init_state, iterate, evaluate))
    keys = np.stack([jax.random.PRNGKey(agent.args.seed + k) for k in range(agent.args.num_seeds)])
    shapes = jax.eval_shape(init, keys)
    env = jax.tree.map(lambda x: split if x.shape[1:2] == (agent.args.num_envs,) else whole, shapes.env)
    shardings = jax.tree.map(lambda _: whole, shapes)._replace(env=env)
    init = jax.jit(init, out_shardings=shardings, compiler_options={"xla_backend_optimization_level": 0})  # it runs only once
    state = jax.device_put(fill_state(shapes, saved["state"]), shardings) if saved else init(keys)
    judge = jax.jit(judge, out_shardings=whole).lower(state).compile()
    run = jax.jit(run, out_shardings=(shardings, whole), donate_argnums=0)
    return state, None if agent.args.evaluate else run.lower(state).compile(), judge

def run_evaluation(agent: Agent, judge: Any, state: TrainState, folder: str | pathlib.Path) -> dict:
    """Evaluate every seed; with --capture-video, draw the first one's episode to an mp4 of at most 30 frames a second."""
    metrics, (poses, alive) = jax.device_get(judge(state))
    if agent.args.capture_video and jax.process_index() == 0:
        mediapy, ffmpeg = import_module("mediapy"), import_module("imageio_ffmpeg")
        mediapy.set_ffmpeg(ffmpeg.get_ffmpeg_exe())
        stride, frame = int(np.ceil(1 / (30 * agent.env.dt))), namedtuple("Frame", "data")
        states = [frame(Pose(*(x[0, t] for x in poses))) for t in range(0, int(alive[0].sum()), stride)]
        path = pathlib.Path(folder, "videos", f"step_{int(jax.device_get(state.iteration)[0]) * agent.args.batch_size}.mp4")
        path.parent.mkdir(exist_ok=True)
        mediapy.write_video(path, agent.env.render(states), fps=1 / (stride * agent.env.dt))
    return metrics

def train(agent: Agent, iterate: Any, judge: Any, state: TrainState, wall_time: float) -> int:
    """The training loop; returns the process's exit code."""
    args, received = agent.args, []
    for number in (signal.SIGINT, signal.SIGTERM):  # finish the iteration, checkpoint, stop; a second signal kills
        signal.signal(number, lambda n, _: (received.append(n), signal.signal(n, signal.SIG_DFL)))
    done, now = int(jax.device_get(state.iteration)[0]), int(multihost_utils.broadcast_one_to_all(np.int32(time.time())))
    folder = pathlib.Path(args.resume or f"{args.log_dir}/{args.env_id}__{args.exp_name}__{args.seed}__{now}")
    folders = [folder / f"seed_{args.seed + k}" for k in range(args.num_seeds)] if args.num_seeds > 1 else [folder]
    if first := jax.process_index() == 0:
        open_run(folder, args)
    logs = [open_log(path, done * args.batch_size) for path in folders if first]
    started, code = time.perf_counter() - wall_time, 0
    while done < args.num_iterations and not code:
        began = time.perf_counter()
        state, metrics = iterate(state)
        metrics = jax.device_get(metrics)
        metrics["charts/SPS"] = np.full(args.num_seeds, args.batch_size / (time.perf_counter() - began))
        done, step = done + 1, (done + 1) * args.batch_size
        finite = all(np.isfinite(x).all() for name, x in metrics.items() if name.startswith(("losses", "trust")))
        if finite and (done == args.num_iterations or done % args.eval_interval == 0):
            metrics |= run_evaluation(agent, judge, state, folder)
        for k, log in enumerate(logs):  # a rollout in which no episode ended has no mean return or length
            log(step, time.perf_counter() - started, {name: float(x[k]) for name, x in metrics.items()
                if metrics["charts/episodes"][k] > 0 or not name.startswith("charts/episodic")})
        eta = (time.perf_counter() - started) / 60 / done * (args.num_iterations - done)
        print(f"step {step:,}  SPS {metrics['charts/SPS'][0]:,.0f}  ETA {eta:.1f} min",
              *metrics.get("eval/episodic_return", ()), sep="  ", flush=True)
        code = int(multihost_utils.process_allgather(np.int32(128 + received[0] if received else 0)).max()) if finite else 1
        if not finite:
            print(f"iteration {done}: a loss is not finite; the state is in {folder}/diverged", file=sys.stderr)
        if code or done == args.num_iterations or done % args.checkpoint_interval == 0:
            whole = multihost_utils.process_allgather(state, tiled=True)
            save_checkpoint(folder if finite else folder / "diverged", whole, step, time.perf_counter() - started)
    print(folder)
    return code

def main() -> None:
    """Parse, compile, then train, resume or evaluate."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax says much that is not for the user; its errors are raised
    if "JAX_COORDINATOR_ADDRESS" in os.environ:  # the only one of its variables that JAX itself reads outside of a cluster
        jax.distributed.initialize(**{x: int(os.environ[f"JAX_{x.upper()}"]) for x in ("num_processes", "process_id")})
        # MJX would put its constants on the first host's device, where the others cannot read them.
        import_module("mujoco.mjx._src.io")._resolve_device = lambda impl: jax.local_devices()[0]
    args = parse()
    saved = read_checkpoint(args.resume or args.evaluate) if args.resume or args.evaluate else {}
    if args.compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(args.compilation_cache_dir))
    if args.capture_video:
        check_renderer()
    print("\n".join(f"{name}: {value}" for name, value in vars(args).items()), flush=True)
    agent, began = make_agent(args), time.perf_counter()
    state, iterate, judge = prepare(agent, saved)
    print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)
    if not args.evaluate:
        sys.exit(train(agent, iterate, judge, state, float(saved.get("wall_time", 0.0))))
    print(json.dumps({name: x.tolist() for name, x in run_evaluation(agent, judge, state, args.evaluate).items()}))

if __name__ == "__main__":
    main()
