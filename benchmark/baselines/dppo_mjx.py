# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "flax>=0.12",
#     "imageio-ffmpeg>=0.5",
#     "jax>=0.10",
#     "mediapy>=1.2",
#     "mjbatch==0.1.0",
#     "mujoco-mjx[warp]>=3.3",
#     "optax>=0.2.5",
#     "orbax-checkpoint>=0.11.20",
#     "playground>=0.2.0",
#     "tensorboard>=2.18",
#     "tensorboardx>=2.6.2",
#     "tyro>=1.0",
#     "wandb>=0.19.10",
# ]
# ///
"""DPPO (Diffusion Policy Policy Optimization, arXiv 2409.00588) on MuJoCo Playground, made from trudi_mjx.py.

    python benchmark/baselines/dppo_mjx.py --env-id CartpoleBalance --preset cpu

What differs from trudi_mjx.py: the policy is a DDPM of N = 8 steps with the cosine schedule of Nichol and
Dhariwal (arXiv 2102.09672). A step's standard deviation is at least 0.1, and the last latent is the action,
which simulators get clipped. Each denoising step is an action of its own, with PPO's clipped loss (arXiv
1707.06347, Eq. 7) of its own ratio and an advantage of GAE (arXiv 1506.02438, Eq. 16) with a value V(s).
Log-ratios are means over action dimensions, as in DPPO's code.

Networks are MLPs of three layers with Mish (Table 4 of TruDi's paper, arXiv 2606.15260). What DPPO's code has
where it trains from scratch (cfg/gym/scratch), and not where it fine-tunes, is taken from there: epsilon is
0.1 at every denoising step, all have the same advantage, rewards are divided by the standard deviation of
their running discounted sums, 10 epochs, and learning rates that stay, the critic's higher. Table 4's epsilon
is 0.2, and its text has rates that decay, without saying how. The network predicts the action, which the code
can do as well, and does not by default: of actions that predicted noise stands for, untrained, most lie
outside of [-1, 1], where they are clipped and have no gradient. The code also clips log-densities to
[-5, 2], so that rare latents have no gradient; this file does not. What all leave open is as in ppo_mjx.py.

benchmark/errata.md has a table of TruDi's paper's errata, E1 to E19. Axes in shapes: T steps of a rollout, E
environments, B states of a batch, N denoising steps, A action dimensions, H hidden units, K seeds. Latent
actions go from a^N, noise, to a^0; an axis of N holds n = 1 ... N in order.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import json
import logging
import math
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from importlib import import_module, metadata, util
from typing import Any, Literal, NamedTuple

import tyro

SCRIPT = pathlib.Path(__file__).stem

# ----------------------------------------------------------------------------------------------- constants
DMC = (
    "AcrobotSwingup AcrobotSwingupSparse BallInCup CartpoleBalance CartpoleBalanceSparse CartpoleSwingup "
    "CartpoleSwingupSparse CheetahRun FingerSpin FingerTurnEasy FingerTurnHard FishSwim HopperHop "
    "HopperStand PendulumSwingup ReacherEasy ReacherHard WalkerRun WalkerStand WalkerWalk"
).split()
HUMANOID = "G1JoystickFlatTerrain G1JoystickRoughTerrain T1JoystickFlatTerrain T1JoystickRoughTerrain".split()
SUITE = {"dmc": dict(gamma=0.99), "humanoid": dict(gamma=0.97)}  # Table 5
MJBATCH = "mjbatch==0.1.0 mujoco==3.11.0 mujoco-mjx==3.11.0"  # each version of mjbatch fits one MuJoCo
# Playground pushes the humanoids; REPPO's code, with which the paper compares, does not (E19).
TASK_CONFIG = {task: {"push_config.enable": False} for task in HUMANOID}
PAPER = dict(  # Tables 4 and 5, the critic's rate and epochs of DPPO's code
    total_timesteps=50_000_000,
    num_envs=1024,
    num_steps=128,
    num_epochs=10,
    minibatch_size=8192,
    hidden_dim=256,
    actor_learning_rate=3e-4,
    critic_learning_rate=1e-3,
    num_eval_envs=128,
    eval_interval=15,
)
CPU = PAPER | dict(  # for two cores, the networks as wide as TruDi's
    total_timesteps=2_000_000,
    num_envs=128,
    num_steps=64,
    num_epochs=10,
    minibatch_size=512,
    hidden_dim=64,
    actor_learning_rate=2e-3,
    critic_learning_rate=2e-3,
    num_eval_envs=64,
    eval_interval=3,
)
CPU_HUMANOID = CPU | dict(  # with the sizes of TruDi's
    total_timesteps=6_000_000,
    num_envs=256,
    num_steps=32,
    hidden_dim=128,
    num_eval_envs=16,
    eval_interval=16,
)
PRESET = {"paper": PAPER, "cpu": CPU}

# Clips actions for the simulator; not in the losses, where the latents are.
ACTION_LIMIT = 0.999
SCHEDULE_SHIFT = 0.008  # offset of the cosine schedule
TIME_FEATURES = 32
LEAST_STD = 0.1  # of a denoising step
LARGEST_ACTION = 1.0  # that a step may predict
LARGEST_REWARD = 10.0  # after scaling


# ------------------------------------------------------------------------------------------------ arguments
@dataclasses.dataclass(frozen=True)
class Args:
    """Train a DPPO agent. A flag whose default is None takes the value of --preset or of the suite."""

    # Experiment
    env_id: str = "CartpoleBalance"
    """task of MuJoCo Playground, or module:Class of an MjxEnv of your own"""
    env_config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """key=value (repeatable) or a JSON object that overrides the task's own configuration"""
    episode_length: int | None = None
    """steps after which an episode is truncated; default: the task's"""
    exp_name: str = SCRIPT
    """part of the run folder's name"""
    seed: int = 1
    """seed of the first run; run k has seed + k"""
    num_seeds: int = 1
    """independent runs trained side by side in this process"""
    preset: Literal["paper", "cpu"] = "paper"
    """sizes: the paper's Tables 4 and 5, or small ones for two CPU cores"""
    impl: Literal["jax", "warp", "mujoco"] | None = None
    """MJX, MuJoCo Warp or MuJoCo's C engine; default: warp on a GPU, else mujoco (module:Class: jax)"""
    log_dir: str = "runs"
    """parent of the run folders"""

    # Rollouts and updates
    num_envs: int | None = None
    """parallel environments of each run (paper: 1024)"""
    num_steps: int | None = None
    """steps of each environment in a rollout (paper: 128)"""
    num_epochs: int | None = None
    """passes over a rollout (the paper is silent; DPPO's code: 10)"""
    minibatch_size: int | None = None
    """states in a gradient step (the paper is silent; DPPO's code: a twentieth of a rollout)"""
    gamma: float | None = None
    """discount (paper: 0.99 on DMC, 0.97 on humanoids)"""
    gae_lambda: float = 0.95
    """lambda of the advantages"""
    actor_learning_rate: float | None = None
    """of Adam (paper: 3e-4)"""
    critic_learning_rate: float | None = None
    """of Adam (paper: 3e-4; DPPO's code: 1e-3)"""
    max_grad_norm: float = 1.0
    """global-norm clip, of actor and critic apart"""

    # Policy and critic
    hidden_dim: int | None = None
    """width of actor and critic (paper: 256)"""
    num_diffusion_steps: int = 8
    """denoising steps N"""
    epsilon: float = 0.1
    """how far from 1 a denoising step's ratio is worth moving"""

    # What may differ when a run is continued or evaluated; MAY_CHANGE lists it
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """where to run; gpu fails where there is none"""
    num_workers: int | None = None
    """threads of --impl mujoco; default: one for each core that this process may use"""
    num_devices: int = 1
    """local devices over which the environments are sharded"""
    compilation_cache_dir: str = "~/.cache/trudi_jax"
    """compiled programs are kept here between runs; empty: nowhere"""
    total_timesteps: int | None = None
    """environment steps of each run, over all its environments (paper: 50M)"""
    eval_mode: Literal["ddpm", "sample"] = "ddpm"
    """how to act: with no noise beyond the schedule's, which ends at 0, or as in training"""
    eval_interval: int | None = None
    """iterations between evaluations; the last one is always followed by one (--preset paper: 15)"""
    num_eval_envs: int | None = None
    """episodes in an evaluation (--preset paper: 128)"""
    track: bool = False
    """log to Weights & Biases too"""
    wandb_project_name: str = "trudi"
    """project of Weights & Biases"""
    wandb_entity: str | None = None
    """team of Weights & Biases"""

    # Checkpoints and video
    checkpoint_interval: int | None = None
    """iterations between checkpoints; default: --eval-interval; the last one is always followed by one"""
    capture_video: bool = False
    """write an mp4 of one episode at each evaluation"""
    resume: str | None = None
    """run folder to continue, with its own arguments"""
    evaluate: str | None = None
    """run folder to evaluate, without training"""

    # Computed
    batch_size: tyro.conf.Suppress[int] = 0
    """environment steps in an iteration"""
    num_iterations: tyro.conf.Suppress[int] = 0
    """as in CleanRL, steps that do not fill an iteration are left out"""


def fail(message: str) -> None:
    """Refuse bad input: one line on stderr and exit code 2."""
    line = " ".join(message.split())
    print(f"{SCRIPT}.py: error: {line}", file=sys.stderr)
    sys.exit(2)


def flag(name: str) -> str:
    """A field of Args as it is written on the command line."""
    return "--" + name.replace("_", "-")


def installed_tasks(suite: str = "*") -> list[str]:
    """Ids of Playground's tasks, or of a suite's, read from its source: to import it takes ten seconds."""
    package = pathlib.Path(util.find_spec("mujoco_playground").origin).parent
    ids = []
    for path in package.glob(f"_src/{suite}/__init__.py"):
        ids += re.findall(r'^ {4}"(\w+)":', path.read_text(), re.MULTILINE)
    return ids


def check_task(env_id: str) -> None:
    """Exit with code 2 on an id that neither Playground nor a module can have."""
    if ":" in env_id or env_id in DMC + HUMANOID:
        return
    known = installed_tasks()
    if env_id not in known:
        near = difflib.get_close_matches(env_id, dict.fromkeys(known), 3, 0.4) or DMC[:3]
        fail(f"unknown --env-id {env_id}; the nearest are {', '.join(near)}")


if __name__ == "__main__":  # a wrong flag or task is told before the seconds that these imports take
    check_task(tyro.cli(Args).env_id)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorboardX
from flax import nnx, traverse_util
from jax import Array, NamedSharding, P
from jax.experimental import multihost_utils
from ml_collections import ConfigDict


def resolve(args: Args) -> Args:
    """Fill in what depends on suite, preset and device; exit with code 2 on what cannot run."""
    if args.capture_video:
        os.environ.setdefault("MUJOCO_GL", "egl")  # read when MuJoCo is imported, which fails without EGL
    devices = find_devices(args.device)
    check_task(args.env_id)
    suite = find_suite(args.env_id)
    values = SUITE[suite] | PRESET[args.preset]
    if (args.preset, suite) == ("cpu", "humanoid"):
        values |= CPU_HUMANOID
    values |= {name: value for name, value in vars(args).items() if value is not None}
    values["impl"] = find_impl(args, devices)
    values["env_config"] = merge_config(args)
    values["batch_size"] = values["num_envs"] * values["num_steps"]
    values["num_iterations"] = values["total_timesteps"] // max(values["batch_size"], 1)
    values.setdefault("checkpoint_interval", values["eval_interval"])
    return dataclasses.replace(args, **values)


def find_suite(env_id: str) -> str:
    """The suite whose discount and atoms suit a task."""
    if env_id in DMC:
        return "dmc"
    if env_id in HUMANOID:
        return "humanoid"
    own = ":" in env_id
    suite = "dmc" if own or env_id in installed_tasks("dm_control_suite") else "humanoid"
    print(f"{env_id} is none of the paper's tasks; unless flags say otherwise it has {SUITE[suite]}")
    return suite


def merge_config(args: Args) -> tuple[str, ...]:
    """--env-config over what this script changes in the task, as key=value, each key once."""
    config = dict(TASK_CONFIG.get(args.env_id, {}))
    for text in args.env_config:
        config |= parse_config(text)
    return tuple(f"{key}={json.dumps(value)}" for key, value in config.items())


def parse_config(text: str) -> dict[str, Any]:
    """Dotted keys and values of key=value, whose value is JSON or a word, or of a JSON object."""
    try:
        if text.startswith("{"):
            return traverse_util.flatten_dict(json.loads(text), sep=".")
    except ValueError as error:
        fail(f"--env-config {text} is not JSON ({error})")
    key, equals, value = text.partition("=")
    if not equals:
        fail(f"--env-config {text} is neither key=value nor a JSON object")
    try:
        return {key: json.loads(value)}
    except ValueError:
        return {key: value}


def find_impl(args: Args, devices: list[jax.Device]) -> str:
    """The simulator, --impl or the fastest; exits with code 2 if it cannot do what is asked of it."""
    own = ":" in args.env_id  # a task that may read what MuJoCo's engine does not return
    fastest = {"gpu": "warp", "cpu": "jax" if own else "mujoco"}  # benchmark/results/mujoco_speed.md
    impl = args.impl or fastest.get(devices[0].platform, "jax")
    if impl != "jax" and args.num_devices * jax.process_count() > 1:
        fail(f"--impl {impl} trains on one device only; several (--num-devices, hosts) need --impl jax")
    if impl == "mujoco":
        try:
            import_module("mjbatch")
        except ImportError as error:  # also where it was built for another MuJoCo
            fail(f"--impl mujoco needs mjbatch ({error}); pip install {MJBATCH}, or use --impl jax")
    return impl


def num_cores() -> int:
    """Cores that this process may use: fewer than there are under taskset or SLURM."""
    if hasattr(os, "sched_getaffinity"):  # macOS lacks it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_devices(device: str) -> list[jax.Device]:
    """The local devices of a kind; exits with code 2 where there is none."""
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")  # MJX puts its constants on the default device
    try:
        return jax.local_devices(backend="gpu" if device == "gpu" else None)
    except RuntimeError as error:
        fail(f"JAX has no {device} device ({error}); install jax[cuda13] or jax[cuda12], or use --device cpu")


# ---------------------------------------------------------------------------------------------- environments
class Setup(NamedTuple):
    """What stays constant while training; compiled programs close over it."""

    args: Args
    env: Any  # the task, an MjxEnv
    action_size: int
    time_limit: int  # steps after which an episode is truncated
    mesh: jax.sharding.Mesh  # the devices, over which environments are sharded


class EnvState(NamedTuple):
    """E environments. `clock` and `length` differ only in an environment's first episode."""

    sim: Any  # Playground's states
    starts: Any  # those that the next episodes start from
    clock: Array  # (E,), steps towards the time limit
    length: Array  # (E,), steps since the episode's start
    total: Array  # (E,), rewards since then


class Outcome(NamedTuple):
    """What comes of a step of E environments."""

    reward: Array  # (E,)
    terminated: Array  # (E,)
    truncated: Array  # (E,), and not terminated
    next_observation: Any  # (E, .), the true one, also where an episode ended
    episode_ended: Array  # (E,), whether one that was seen from its start did
    episode_return: Array  # (E,), so far
    episode_length: Array  # (E,), so far


def import_playground(env_id: str) -> Any:
    """MuJoCo Playground, imported. Exits with code 2 if it lacks the task's meshes and cannot have them."""
    package = pathlib.Path(util.find_spec("mujoco_playground").origin).parent
    meshes = package / "external_deps" / "mujoco_menagerie"
    try:
        if env_id in HUMANOID and not meshes.exists():  # it would clone them, after a long import
            socket.create_connection(("github.com", 443), timeout=2).close()
        playground = import_module("mujoco_playground")
    except (OSError, subprocess.CalledProcessError) as error:
        fail(
            f"{env_id} needs meshes that cannot be downloaded ({error}); in advance, git clone "
            f"https://github.com/google-deepmind/mujoco_menagerie and copy or link it to {meshes}"
        )
    # Playground 0.2.0 compares versions as texts: with MuJoCo 3.10 to 3.17 it calls this by its old name.
    spec = import_module("mujoco").MjSpec
    spec.find_body = spec.body
    return playground


def find_task(args: Args) -> tuple[Callable, Any]:
    """What makes the task, called with config and config_overrides, and its default configuration."""
    if ":" not in args.env_id:
        registry = import_playground(args.env_id).registry
        task = functools.partial(registry.load, args.env_id)
        return task, registry.get_default_config(args.env_id)
    module_name, _, class_name = args.env_id.partition(":")
    try:
        found = util.find_spec(module_name)
    except (ImportError, ValueError):  # of a parent, or of no name
        found = None
    if not found:
        fail(f"--env-id {args.env_id}: no module {module_name} on PYTHONPATH or beside {SCRIPT}.py")
    module = import_module(module_name)
    task = getattr(module, class_name, None)
    base = import_playground(args.env_id).MjxEnv
    if not isinstance(task, type) or not issubclass(task, base):
        fail(f"--env-id {args.env_id} must be a subclass of mujoco_playground.MjxEnv")
    if hasattr(module, "default_config"):  # as Playground's modules have
        return task, module.default_config()
    return lambda **_: task(), ConfigDict()


def check_config(args: Args, config: dict[str, Any]) -> None:
    """Exit with code 2 on settings of the task with which it would not be what they say."""
    repeat = config.get("action_repeat", 1)
    if repeat != 1:
        fail(f"{args.env_id} has action_repeat {repeat}; only --env-config action_repeat=1 can be played")
    if config.get("vision"):
        fail("--env-config vision=true: observations must be vectors, not pictures")
    for name in ("sim_dt", "ctrl_dt"):
        if not config.get(name, 1) > 0:
            fail(f"--env-config {name}={config[name]} must be positive, in seconds")
    if config.get("ctrl_dt", 1) < config.get("sim_dt", 0):
        fail(f"--env-config ctrl_dt={config['ctrl_dt']} must not be less than sim_dt, {config['sim_dt']}")


def make_setup(args: Args) -> Setup:
    """Make the task and lay out the devices; exits with code 2 on a configuration that the task has not."""
    task, config = find_task(args)
    known = traverse_util.flatten_dict(config.to_dict(), sep=".")
    overrides: dict[str, Any] = {}
    for text in args.env_config:
        overrides |= parse_config(text)
    for key in overrides.keys() - known.keys():
        near = difflib.get_close_matches(key, known, 3, 0.4) or sorted(known)[:3]
        fail(f"--env-config {key}: {args.env_id} has no such setting; the nearest are {', '.join(near)}")
    check_config(args, known | overrides)
    if "impl" in known:
        overrides["impl"] = "jax" if args.impl == "mujoco" else args.impl
    if args.impl == "warp" and "naconmax" in known:  # contacts of all environments together
        overrides.setdefault("naconmax", known["naconmax"] * args.num_seeds)
    try:
        env = task(config=config, config_overrides=overrides)
    except (TypeError, ValueError, OSError, subprocess.CalledProcessError) as error:
        if ":" in args.env_id and not args.env_config:
            raise  # its author needs to see where
        fail(f"{args.env_id} cannot be made with {overrides} ({error})")
    if args.impl == "mujoco":
        use_mujoco(env, args)
    time_limit = args.episode_length or config.get("episode_length")
    if not time_limit:
        fail(f"{args.env_id} has no episode_length; give it with --episode-length")
    if time_limit < args.num_steps:
        print("episodes are shorter than rollouts, in which an environment starts them all from one state")
    devices = []
    for index, device in enumerate(jax.devices()):
        if index % jax.local_device_count() < args.num_devices:
            devices.append(device)
    return Setup(args, env, env.action_size, int(time_limit), jax.sharding.Mesh(devices, ("env",)))


def over_envs(setup: Setup, function: Callable, *inputs: Any) -> Any:
    """Call reset(keys (E, 2)) or step(states, actions (E, A)); each device computes its own environments."""
    call = jax.vmap(function)
    if setup.mesh.size > 1:  # Warp's programs cannot be mapped over seeds around a shard_map
        spec = P("env")
        call = jax.shard_map(call, mesh=setup.mesh, in_specs=spec, out_specs=spec, check_vma=False)
    sim = call(*inputs)
    sim = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), sim)  # loops want no weak types
    failed = (sim.done > 0) & jnp.isnan(sim.reward)  # Playground ends a simulation that has become NaN
    return sim.replace(reward=jnp.where(failed, 0.0, sim.reward))


def env_reset(setup: Setup, key: Array) -> EnvState:
    """Start the training environments, clocks spread over an episode so that time-outs do not coincide."""
    num_envs = setup.args.num_envs
    sim_key, clock_key = jax.random.split(key)
    sim = over_envs(setup, setup.env.reset, jax.random.split(sim_key, num_envs))
    return EnvState(
        sim=sim,
        starts=sim,
        clock=jax.random.randint(clock_key, (num_envs,), 0, setup.time_limit),
        length=jnp.zeros(num_envs, int),
        total=jnp.zeros(num_envs),
    )


def env_step(setup: Setup, env_state: EnvState, action: Array) -> tuple[EnvState, Outcome]:
    """Step, end and restart episodes; actions (E, A)."""
    sim = over_envs(setup, setup.env.step, env_state.sim, action)
    clock = env_state.clock + 1
    length = env_state.length + 1
    total = env_state.total + sim.reward
    terminated = sim.done > 0
    done = terminated | (clock >= setup.time_limit)
    outcome = Outcome(
        reward=sim.reward,
        terminated=terminated,
        truncated=done & ~terminated,
        next_observation=sim.obs,
        episode_ended=done & (length == clock),
        episode_return=total,
        episode_length=length,
    )

    def restart(start: Array, now: Array) -> Array:
        if now.shape[:1] != done.shape:  # some of MuJoCo Warp's buffers are shared between environments
            return now
        mask = done.reshape(-1, *[1] * (now.ndim - 1))
        return jnp.where(mask, start, now)

    restarted = jax.tree.map(restart, env_state.starts, sim)
    if "rng" in sim.info:  # goes on, so that two episodes from one state are not the same
        restarted.info["rng"] = sim.info["rng"]

    after = EnvState(
        sim=restarted,
        starts=env_state.starts,
        clock=jnp.where(done, 0, clock),
        length=jnp.where(done, 0, length),
        total=jnp.where(done, 0, total),
    )
    return after, outcome


def refill_starts(setup: Setup, env_state: EnvState, used: Array, key: Array) -> EnvState:
    """New states for the next episodes of the environments (E,) that used theirs.

    As many batches as it takes, since how many robots fall is not known in advance. One does for a rollout
    with time-outs alone; it is hardly larger, as a reset can cost as much as 200 steps (CheetahRun's does).
    """
    num_envs = setup.args.num_envs
    time_outs = num_envs * setup.args.num_steps / setup.time_limit
    size = min(num_envs, math.ceil(1.25 * time_outs))
    users_first = jnp.argsort(~used)
    num_batches = (used.sum() + size - 1) // size

    def refill(index: Array, starts: Any) -> Any:
        rows = jax.lax.dynamic_slice_in_dim(users_first, index * size, size)  # the last ones overlap
        new = jax.vmap(setup.env.reset)(jax.random.split(jax.random.fold_in(key, index), size))

        def put(start: Array, new: Array) -> Array:
            if start.shape[:1] != (num_envs,):  # a buffer that environments share
                return start
            mask = used[rows].reshape(-1, *[1] * (new.ndim - 1))
            return start.at[rows].set(jnp.where(mask, new, start[rows]))

        return jax.tree.map(put, starts, new)

    starts = jax.lax.fori_loop(0, num_batches, refill, env_state.starts)
    return env_state._replace(starts=starts)


# ------------------------------------------------------------------------------- MuJoCo's engine on CPU cores
# For --impl mujoco; a copy can do without it and the call of `use_mujoco`.
# All that a step depends on: what MuJoCo counts as a simulation's state and inputs.
MUJOCO_INPUTS = (
    "time qpos qvel act history qacc_warmstart ctrl qfrc_applied xfrc_applied eq_active mocap_pos mocap_quat "
    "userdata"
).split()


class MujocoEngine:
    """Steps simulations of a model on CPU threads, as a pure function of MUJOCO_INPUTS."""

    def __init__(self, model: Any, num_threads: int):
        self.model = model
        self.num_threads = num_threads
        self.batches: dict[int, Any] = {}  # by the number of their simulations
        self.lock = threading.Lock()  # a compiled program may make two calls at once

    def find_batch(self, size: int, names: Iterable[str]) -> Any:
        """The batch with so many simulations."""
        if size not in self.batches:
            batch = import_module("mjbatch").Batch(self.model, size, self.num_threads)
            for name in (*names, "warning"):
                batch.bind(name)  # what is bound later is not filled by the first step
            self.batches[size] = batch
        return self.batches[size]

    def simulate(
        self, num_steps: int, like: dict[str, Any], inputs: dict[str, Array]
    ) -> dict[str, np.ndarray]:
        """Fields after so many steps, 0: of the present state. Inputs and outputs (..., .) of simulations."""
        axes = np.shape(inputs["time"])
        with self.lock:
            batch = self.find_batch(math.prod(axes), like)
            for name, value in inputs.items():
                field = batch.bind(name)
                field[:] = np.reshape(value, field.shape)
            if num_steps:
                batch.step(nstep=num_steps)
            else:
                batch.forward()
            fields = {name: batch.bind(name).astype(x.dtype) for name, x in like.items()}
            diverged = self.find_diverged(batch)
        for name in ("qpos", "qvel"):
            fields[name][diverged] = np.nan  # by which Playground ends an episode
        return {name: x.reshape(axes + like[name].shape) for name, x in fields.items()}

    def find_diverged(self, batch: Any) -> np.ndarray:
        """Which simulations of a batch MuJoCo found unstable and started anew, since the last call."""
        kinds = import_module("mujoco").mjtWarning
        bad = [int(kind) for kind in (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC)]
        counts = batch.bind("warning")[..., 1]
        diverged = counts[:, bad].any(1)
        counts[:] = 0
        return diverged

    def advance(self, data: Any, num_steps: int) -> Any:
        """MJX's Data after so many steps, less contacts and constraints, which no Playground task reads."""
        fields = {}
        for field in dataclasses.fields(data):
            if field.name != "_impl":
                value = getattr(data, field.name)
                fields[field.name] = jax.ShapeDtypeStruct(value.shape, value.dtype)
        inputs = {name: getattr(data, name) for name in MUJOCO_INPUTS}
        call = functools.partial(self.simulate, num_steps, fields)
        new = jax.pure_callback(call, fields, inputs, vmap_method="broadcast_all")
        return data.replace(_impl=None, **new)


def use_mujoco(env: Any, args: Args) -> None:
    """Let a task step with MuJoCo's engine: it replaces the two functions through which tasks call MJX.

    Exits with code 2 if the task reads what the engine does not return.
    """
    if env.mj_model is None:
        fail(f"--impl mujoco cannot simulate {args.env_id}, which has no mj_model; use --impl jax")
    mjx = import_module("mujoco.mjx")
    mjx_env = import_module("mujoco_playground._src.mjx_env")
    mjx_forward = mjx.forward
    mjx_step = mjx_env.step

    def forward(model: Any, data: Any) -> Any:
        if model is not env.mjx_model:  # of another task in this process
            return mjx_forward(model, data)
        return engine.advance(data, 0)

    def step(model: Any, data: Any, action: Array, n_substeps: int = 1) -> Any:
        if model is not env.mjx_model:
            return mjx_step(model, data, action, n_substeps)
        return engine.advance(data.replace(ctrl=action), n_substeps)

    mjx.forward = forward
    mjx_env.step = step
    try:
        engine = MujocoEngine(env.mj_model, args.num_workers or num_cores())
        sim = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
        jax.eval_shape(env.step, sim, jnp.zeros(env.action_size))
    except (AttributeError, KeyError) as error:
        fail(f"--impl mujoco cannot simulate {args.env_id} ({error}); use --impl jax")


# ---------------------------------------------------------------------------------------------- observations
class Inputs(NamedTuple):
    """Observations as the two networks get them."""

    actor: Array
    critic: Array


def network_inputs(observation: Any) -> Inputs:
    """What actor and critic see; tasks with privileged information keep it from the actor."""
    if isinstance(observation, dict):
        return Inputs(observation["state"], observation.get("privileged_state", observation["state"]))
    return Inputs(observation, observation)


class Statistics(NamedTuple):
    """Running mean and variance of every entry of an observation."""

    count: Array
    moments: Any  # mean and variance (2, .), a tree like an observation


def init_statistics(observation: Any) -> Statistics:
    """Of no observation yet; `observation` has leaves (E, .)."""
    return Statistics(jnp.zeros(()), jax.tree.map(lambda x: jnp.zeros((2, x.shape[-1])), observation))


def update_statistics(statistics: Statistics, observation: Any) -> Statistics:
    """Merge observations, leaves (T, E, .): Welford's update for batches (Chan et al., 1979)."""
    size = np.prod(jax.tree.leaves(observation)[0].shape[:2])
    count = statistics.count + size
    weight = size / count

    def merge(x: Array, old: Array) -> Array:
        mean, variance = old
        delta = x.mean((0, 1)) - mean
        merged = (1 - weight) * (variance + weight * delta**2) + weight * x.var((0, 1))
        return jnp.stack([mean + weight * delta, merged])

    return Statistics(count, jax.tree.map(merge, observation, statistics.moments))


def normalize(statistics: Statistics, observation: Any) -> Any:
    """Standardise an observation, clipped at 10; the 1e-2 keeps entries that hardly vary from blowing up."""

    def standardize(x: Array, moments: Array) -> Array:
        mean, variance = moments
        return jnp.clip((x - mean) / jnp.sqrt(variance + 1e-2), -10, 10)

    return jax.tree.map(standardize, observation, statistics.moments)


# -------------------------------------------------------------------------------------------------- networks
def mish(x: Array) -> Array:
    """The activation Mish (arXiv 1908.08681)."""
    return x * jnp.tanh(nnx.softplus(x))


class Actor(nnx.Module):
    """The network that predicts the action that a latent comes from.

    What a replacement must keep: `num_steps`, `embed` and `__call__`; that its output depends on no latent
    but a^n, since `step_deviations` asks for all steps of a stored chain at once; and an output layer that
    starts at zero, since `iterate` normalises the first rollout with statistics that the actor had not when
    it acted. The first iterations of a run check the last two.
    """

    def __init__(self, args: Args, observation_size: int, action_size: int, rngs: nnx.Rngs):
        self.num_steps = args.num_diffusion_steps
        self.action_size = action_size
        width = args.hidden_dim
        linear = functools.partial(nnx.Linear, rngs=rngs)
        first = linear(TIME_FEATURES, 2 * TIME_FEATURES)
        second = linear(2 * TIME_FEATURES, TIME_FEATURES)
        self.time_mlp = nnx.List([first, second])
        self.input = linear(observation_size + action_size + TIME_FEATURES, width)
        self.hidden = nnx.List([linear(width, width) for _ in range(2)])
        self.output = linear(width, action_size, kernel_init=nnx.initializers.zeros)

    def split_first_layer(self) -> list[Array]:
        """The kernel that acts on concat(s, a^n, time), as a kernel for each of the three."""
        kernel = self.input.kernel[...]
        time_start = kernel.shape[0] - TIME_FEATURES
        latent_start = time_start - self.action_size
        return jnp.split(kernel, [latent_start, time_start])

    def embed(self, observation: Array) -> tuple[Array, Array]:
        """What stays the same along a chain: the first layer on observations, (B, H), and on n, (N, H)."""
        n = jnp.arange(1, self.num_steps + 1)[:, None]
        frequency = 10000.0 ** -jnp.arange(0, 1, 2 / TIME_FEATURES)
        angle = n * frequency
        features = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
        features = mish(self.time_mlp[0](features))
        features = self.time_mlp[1](features)
        observation_kernel, _, time_kernel = self.split_first_layer()
        return observation @ observation_kernel + self.input.bias[...], features @ time_kernel

    def __call__(self, observation_part: Array, time_part: Array, latent: Array) -> Array:
        """Actions of latents (..., A), with what `embed` returned, broadcast to (..., H)."""
        _, latent_kernel, _ = self.split_first_layer()
        x = mish(observation_part + time_part + latent @ latent_kernel)
        for hidden in self.hidden:
            x = mish(hidden(x))
        return self.output(x)


class Critic(nnx.Module):
    """The value V(s)."""

    def __init__(self, args: Args, observation_size: int, rngs: nnx.Rngs):
        width = args.hidden_dim
        sizes = [observation_size, width, width]
        self.hidden = nnx.List([nnx.Linear(size, width, rngs=rngs) for size in sizes])
        self.output = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, observation: Array) -> Array:
        """Values (B,)."""
        x = observation
        for hidden in self.hidden:
            x = mish(hidden(x))
        return self.output(x)[..., 0]


# ------------------------------------------------------------------------------------------------------ DDPM
class Schedule(NamedTuple):
    """The DDPM's constants for n = 1 ... N; a step's mean is from_action * action + from_latent * a^n."""

    from_action: Array  # (N, 1), weight of the predicted action in the mean of a^(n-1)
    from_latent: Array  # (N, 1), weight of a^n in it
    std: Array  # (N, 1), standard deviation of a^(n-1)


def make_schedule(num_steps: int) -> Schedule:
    """The cosine schedule (Eq. 17 of arXiv 2102.09672); posteriors of a^(n-1) given a^n and the action."""
    n = np.arange(num_steps + 1)[:, None] / num_steps
    cosine = np.cos(np.pi / 2 * (n + SCHEDULE_SHIFT) / (1 + SCHEDULE_SHIFT)) ** 2
    beta = np.clip(1 - cosine[1:] / cosine[:-1], 0, 0.999)
    alpha_bar = np.cumprod(1 - beta)[:, None]  # at n
    before = np.concatenate([[[1.0]], alpha_bar[:-1]])  # at n - 1
    schedule = Schedule(
        from_action=np.sqrt(before) * beta / (1 - alpha_bar),
        from_latent=np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar),
        std=np.sqrt(beta * (1 - before) / (1 - alpha_bar)),
    )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), schedule)


def denoised_mean(
    actor: Actor, schedule: Schedule, observation_part: Array, time_part: Array, latent: Array
) -> Array:
    """Means (..., A) of a^(n-1) given a^n; `schedule` is of these n, the rest is what the actor takes."""
    action = actor(observation_part, time_part, latent)
    action = jnp.clip(action, -LARGEST_ACTION, LARGEST_ACTION)
    return schedule.from_action * action + schedule.from_latent * latent


class Trajectory(NamedTuple):
    """What the loss needs of a chain: the latents a policy went through, and where it aimed."""

    latents: Array  # (B, N + 1, A), a^0 ... a^N
    means: Array  # (B, N, A), of a^0 ... a^(N-1)


class Chain(NamedTuple):
    """A sample of the policy at B states."""

    action: Array  # (B, A), a^0
    trajectory: Trajectory


def sample_chain(actor: Actor, observation: Array, noise: Array, least_std: float) -> Chain:
    """Sample the policy: observations (B, .), standard normals (N + 1, B, A), noise[n] for a^n."""
    observation_part, time_part = actor.embed(observation)
    schedule = make_schedule(actor.num_steps)

    def denoise(latent: Array, step: tuple) -> tuple[Array, tuple]:
        schedule_n, time_n, noise_n = step
        mean = denoised_mean(actor, schedule_n, observation_part, time_n, latent)
        std = jnp.maximum(schedule_n.std, least_std)
        return mean + std * noise_n, (latent, mean)

    steps = (schedule, time_part, noise[:-1])
    last, (latents, means) = jax.lax.scan(denoise, noise[-1], steps, reverse=True)
    latents = jnp.concatenate([last[None], latents])
    return Chain(last, Trajectory(jnp.moveaxis(latents, 0, 1), jnp.moveaxis(means, 0, 1)))


class Deviations(NamedTuple):
    """Differences at every denoising step of a chain, in its standard deviations."""

    old: Array  # (B, N, A), of the latent from the mean of the policy that acted
    new: Array  # (B, N, A), of the latent from the actor's mean
    moved: Array  # (B, N, A), of the actor's mean from that of the policy that acted


def step_deviations(actor: Actor, observation: Array, trajectory: Trajectory) -> Deviations:
    """What ratios and KL of an actor are computed from, on chains at these observations (B, .)."""
    latents, means = trajectory
    observation_part, time_part = actor.embed(observation)
    schedule = make_schedule(actor.num_steps)
    std = jnp.maximum(schedule.std, LEAST_STD)
    earlier = latents[:, :-1]  # a^0 ... a^(N-1)
    later = latents[:, 1:]  # a^1 ... a^N
    new_means = denoised_mean(actor, schedule, observation_part[:, None], time_part, later)
    return Deviations(
        old=(earlier - means) / std, new=(earlier - new_means) / std, moved=(new_means - means) / std
    )


# ------------------------------------------------------------------------------------------------ advantages
def advantages(
    args: Args, reward: Array, terminated: Array, truncated: Array, value: Array, next_value: Array
) -> Array:
    """GAE, everything (T, E); `value` is V at the observations, `next_value` V at the true next ones."""

    def step(later: Array, now: tuple) -> tuple[Array, Array]:
        reward, terminated, truncated, value, next_value = now
        # Chosen, not multiplied by 0: a simulation that has become NaN ends, and its last value is NaN.
        future = jnp.where(terminated, 0.0, next_value)
        error = reward + args.gamma * future - value
        later = jnp.where(terminated | truncated, 0.0, later)
        advantage = error + args.gamma * args.gae_lambda * later  # Eq. 16 of GAE's paper
        return advantage, advantage

    steps = (reward, terminated, truncated, value, next_value)
    _, found = jax.lax.scan(step, jnp.zeros_like(value[-1]), steps, reverse=True)
    return found


# ---------------------------------------------------------------------------------------- losses and updates
Metrics = dict[str, Array]  # by the names under which they are logged


class Learner(NamedTuple):
    """All that learns. Networks are pytrees of their weights."""

    actor: Actor
    critic: Critic
    actor_opt_state: Any
    critic_opt_state: Any


class Batch(NamedTuple):
    """B states of a rollout."""

    actor_observation: Array  # (B, .), normalised
    critic_observation: Array  # (B, .), normalised
    trajectory: Trajectory  # of the policy that acted
    advantage: Array  # (B,), standardised
    target: Array  # (B,), lambda-returns


class Optimizers(NamedTuple):
    """Of the two networks."""

    actor: optax.GradientTransformation
    critic: optax.GradientTransformation


def make_optimizers(args: Args) -> Optimizers:
    """Adam for both, with gradients clipped by their own global norm."""
    clip = optax.clip_by_global_norm(args.max_grad_norm)
    return Optimizers(
        actor=optax.chain(clip, optax.adam(args.actor_learning_rate)),
        critic=optax.chain(clip, optax.adam(args.critic_learning_rate)),
    )


def critic_loss(critic: Critic, args: Args, batch: Batch) -> Array:
    """The squared error of the critic's values."""
    value = critic(batch.critic_observation)
    return ((value - batch.target) ** 2).mean()


def actor_loss(actor: Actor, args: Args, batch: Batch) -> tuple[Array, tuple[Array, Array]]:
    """The clipped loss, which steps' ratios are outside of the clip (B, N), and the KL of chains (B,)."""
    deviations = step_deviations(actor, batch.actor_observation, batch.trajectory)
    # Equal variances, so normalisers cancel.
    ratio = jnp.exp(0.5 * (deviations.old**2 - deviations.new**2).mean(-1))
    advantage = batch.advantage[:, None]
    clipped = jnp.clip(ratio, 1 - args.epsilon, 1 + args.epsilon)
    gain = jnp.minimum(ratio * advantage, clipped * advantage)  # Eq. 7 of PPO's paper
    kl = 0.5 * (deviations.moved**2).sum((-2, -1))
    return -gain.mean(), (jnp.abs(ratio - 1) > args.epsilon, kl)


def update_minibatch(setup: Setup, learner: Learner, batch: Batch) -> tuple[Learner, Metrics]:
    """One gradient step each of critic and actor."""
    args = setup.args
    optimizers = make_optimizers(args)

    value, gradient = jax.value_and_grad(critic_loss)(learner.critic, args, batch)
    step, critic_opt_state = optimizers.critic.update(gradient, learner.critic_opt_state)
    critic = optax.apply_updates(learner.critic, step)

    actor_gradient = jax.value_and_grad(actor_loss, has_aux=True)
    (loss, (outside, kl)), gradient = actor_gradient(learner.actor, args, batch)
    step, actor_opt_state = optimizers.actor.update(gradient, learner.actor_opt_state)
    actor = optax.apply_updates(learner.actor, step)

    metrics = {
        "losses/critic": value,
        "losses/actor": loss,
        "trust_region/kl": kl.mean(),
        "trust_region/outside": outside.mean(),
    }
    return Learner(actor, critic, actor_opt_state, critic_opt_state), metrics


def update_epochs(setup: Setup, learner: Learner, data: Batch, key: Array) -> tuple[Learner, Metrics]:
    """All epochs of shuffled minibatches of a rollout (E * T, ...); metrics are means over the last epoch."""
    args = setup.args
    order_keys = jax.random.split(key, args.num_epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, args.batch_size))(order_keys)
    order = order.reshape(-1, args.minibatch_size)  # a row for each minibatch
    sharding = NamedSharding(setup.mesh, P("env"))

    def step(learner: Learner, rows: Array) -> tuple[Learner, Metrics]:
        batch = jax.tree.map(lambda x: x[rows], data)
        batch = jax.lax.with_sharding_constraint(batch, sharding)
        return update_minibatch(setup, learner, batch)

    learner, metrics = jax.lax.scan(step, learner, order)
    minibatches_per_epoch = args.batch_size // args.minibatch_size
    return learner, jax.tree.map(lambda x: x[-minibatches_per_epoch:].mean(0), metrics)


# ------------------------------------------------------------------------------------------------- iteration
class Transition(NamedTuple):
    """A rollout; leaves (T, E, ...)."""

    observation: Any  # raw
    trajectory: Trajectory  # of the policy that acted
    reward: Array
    terminated: Array
    truncated: Array
    next_observation: Any  # raw; the true one, also where an episode ended
    episode_ended: Array  # whether an episode that was seen from its start ended here
    episode_return: Array
    episode_length: Array


class RewardScale(NamedTuple):
    """What rewards are divided by: the standard deviation of their discounted sums."""

    statistics: Statistics  # of the sums, one entry
    total: Array  # (E,), the sum in each environment's episode so far


def scale_rewards(args: Args, scale: RewardScale, reward: Array, ended: Array) -> tuple[RewardScale, Array]:
    """The scale after a rollout, and its rewards by this scale; reward and ended (T, E)."""

    def step(total: Array, now: tuple) -> tuple[Array, Array]:
        reward, ended = now
        total = args.gamma * total + reward
        return jnp.where(ended, 0.0, total), total

    total, totals = jax.lax.scan(step, scale.total, (reward, ended))
    statistics = update_statistics(scale.statistics, totals[..., None])
    _, variance = statistics.moments
    scaled = reward / jnp.sqrt(variance + 1e-8)
    return RewardScale(statistics, total), jnp.clip(scaled, -LARGEST_REWARD, LARGEST_REWARD)


class TrainState(NamedTuple):
    """Everything that a checkpoint holds of one run."""

    learner: Learner
    statistics: Statistics
    reward_scale: RewardScale
    env_state: EnvState
    key: Array
    iteration: Array


def init_state(setup: Setup, key: Array) -> TrainState:
    """Networks, Adam, statistics and environments of one run, from its seed's key."""
    actor_key, critic_key, env_key, key = jax.random.split(key, 4)
    env_state = env_reset(setup, env_key)
    observation = env_state.sim.obs
    inputs = network_inputs(observation)
    actor = Actor(setup.args, inputs.actor.shape[-1], setup.action_size, nnx.Rngs(actor_key))
    critic = Critic(setup.args, inputs.critic.shape[-1], nnx.Rngs(critic_key))
    optimizers = make_optimizers(setup.args)
    learner = Learner(
        actor=actor,
        critic=critic,
        actor_opt_state=optimizers.actor.init(actor),
        critic_opt_state=optimizers.critic.init(critic),
    )
    total = jnp.zeros(setup.args.num_envs)
    reward_scale = RewardScale(init_statistics(total[:, None]), total)
    return TrainState(
        learner=learner,
        statistics=init_statistics(observation),
        reward_scale=reward_scale,
        env_state=env_state,
        key=key,
        iteration=jnp.zeros((), int),
    )


def sample_policy(
    setup: Setup, actor: Actor, observation: Array, key: Array, least_std: float = LEAST_STD
) -> Chain:
    """Chains of the actor at normalised observations (B, .)."""
    shape = (setup.args.num_diffusion_steps + 1, len(observation), setup.action_size)
    return sample_chain(actor, observation, jax.random.normal(key, shape), least_std)


def rollout(
    setup: Setup, actor: Actor, statistics: Statistics, env_state: EnvState, key: Array
) -> tuple[EnvState, Transition]:
    """Act for T steps with samples of the policy, keeping their trajectories."""
    step_key, reset_key = jax.random.split(key)

    def step(env_state: EnvState, key: Array) -> tuple[EnvState, Transition]:
        observation = env_state.sim.obs
        inputs = network_inputs(normalize(statistics, observation))
        chain = sample_policy(setup, actor, inputs.actor, key)
        action = jnp.clip(chain.action, -ACTION_LIMIT, ACTION_LIMIT)
        env_state, outcome = env_step(setup, env_state, action)
        return env_state, Transition(observation, chain.trajectory, **outcome._asdict())

    env_state, data = jax.lax.scan(step, env_state, jax.random.split(step_key, setup.args.num_steps))
    ended = data.terminated | data.truncated
    return refill_starts(setup, env_state, ended.any(0), reset_key), data


def update(
    setup: Setup, old: Learner, data: Transition, inputs: Inputs, next_inputs: Inputs, keys: list[Array]
) -> tuple[Learner, Metrics]:
    """Learn from a rollout, whose observations and true next ones are given normalised."""
    args = setup.args
    epochs_key, row_key, *_ = keys
    value = jax.lax.map(old.critic, inputs.critic)
    next_value = jax.lax.map(old.critic, next_inputs.critic)
    advantage = advantages(args, data.reward, data.terminated, data.truncated, value, next_value)
    target = advantage + value
    standard = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    batch = Batch(inputs.actor, inputs.critic, data.trajectory, standard, target)
    batch = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), batch)  # (E * T, ...)
    learner, metrics = update_epochs(setup, old, batch, epochs_key)

    # KL of the whole iteration, on as many states as a minibatch has.
    rows = jax.random.permutation(row_key, args.batch_size)[: args.minibatch_size]
    some = jax.tree.map(lambda x: x[rows], batch)
    _, (_, stored_kl) = actor_loss(learner.actor, args, some)
    _, (_, initial_kl) = actor_loss(old.actor, args, some)  # 0 in iteration 1: see check_contract
    metrics |= {
        "trust_region/stored_kl": stored_kl.mean(),
        "trust_region/initial_kl": initial_kl.mean(),
        "critic/target": target.mean(),
    }
    return learner, metrics


def iterate(setup: Setup, state: TrainState) -> tuple[TrainState, Metrics]:
    """One iteration: rollout, targets, epochs of updates, observation statistics."""
    rollout_key, target_key, epochs_key, check_key, key = jax.random.split(state.key, 5)
    actor = state.learner.actor
    env_state, data = rollout(setup, actor, state.statistics, state.env_state, rollout_key)
    ended = data.terminated | data.truncated
    reward_scale, reward = scale_rewards(setup.args, state.reward_scale, data.reward, ended)
    data = data._replace(reward=reward)

    # The untrained actor ignores what it observes, its output layer being 0, so the first rollout may seed
    # the statistics that it is learned from with. Later ones take effect in the next rollout: stored means
    # belong to the present ones (E13).
    merged = update_statistics(state.statistics, data.observation)
    first = state.iteration == 0
    statistics = jax.tree.map(lambda new, now: jnp.where(first, new, now), merged, state.statistics)

    inputs = network_inputs(normalize(statistics, data.observation))
    next_inputs = network_inputs(normalize(statistics, data.next_observation))
    keys = [target_key, epochs_key, check_key]
    learner, metrics = update(setup, state.learner, data, inputs, next_inputs, keys)
    ended = data.episode_ended
    metrics |= {
        "charts/simulator_nans": jnp.isnan(next_inputs.actor).any(-1).sum(),
        "charts/episodes": ended.sum(),
        "charts/episodic_return": data.episode_return.mean(where=ended),
        "charts/episodic_length": data.episode_length.mean(where=ended),
    }
    return TrainState(learner, merged, reward_scale, env_state, key, state.iteration + 1), metrics


# ------------------------------------------------------------------------------------------------ evaluation
def evaluation_action(setup: Setup, learner: Learner, inputs: Inputs, key: Array) -> Array:
    """Actions (B, A) as --eval-mode says, at normalised observations."""
    least_std = 0.0 if setup.args.eval_mode == "ddpm" else LEAST_STD
    return sample_policy(setup, learner.actor, inputs.actor, key, least_std).action


class Evaluation(NamedTuple):
    """E episodes that have begun together."""

    sim: Any  # Playground's states
    time: Array  # steps so far
    alive: Array  # (E,)
    total: Array  # (E,), rewards so far
    length: Array  # (E,), steps so far
    film: Any  # with --capture-video the first one's poses (T, .)


def evaluate(setup: Setup, state: TrainState) -> tuple[Metrics, Any]:
    """An episode in each environment: metrics, and the first one's poses (T, .), for a video, and length."""
    num_envs = setup.args.num_eval_envs
    reset_key, action_key = jax.random.split(jax.random.fold_in(state.key, 2**31))  # training folds in none
    action_keys = jax.random.split(action_key, setup.time_limit)

    def step(now: Evaluation) -> Evaluation:
        inputs = network_inputs(normalize(state.statistics, now.sim.obs))
        action = evaluation_action(setup, state.learner, inputs, action_keys[now.time])
        sim = over_envs(setup, setup.env.step, now.sim, jnp.clip(action, -ACTION_LIMIT, ACTION_LIMIT))
        film = now.film
        if setup.args.capture_video:
            film = jax.tree.map(lambda film, x: film.at[now.time].set(x), film, first_pose(sim))
        return Evaluation(
            sim=sim,
            time=now.time + 1,
            alive=now.alive & (sim.done == 0),
            total=now.total + jnp.where(now.alive, sim.reward, 0),
            length=now.length + now.alive,
            film=film,
        )

    def goes_on(now: Evaluation) -> Array:
        alive = jax.lax.psum(now.alive.sum(), "seed")  # seeds end together: Warp's data cannot be selected
        return (alive > 0) & (now.time < setup.time_limit)

    sim = over_envs(setup, setup.env.reset, jax.random.split(reset_key, num_envs))
    film = ()
    if setup.args.capture_video:
        film = jax.tree.map(lambda x: jnp.zeros((setup.time_limit, *x.shape)), first_pose(sim))
    start = Evaluation(
        sim=sim,
        time=jnp.zeros((), int),
        alive=jnp.ones(num_envs, bool),
        total=jnp.zeros(num_envs),
        length=jnp.zeros(num_envs),
        film=film,
    )
    end = jax.lax.while_loop(goes_on, step, start)
    metrics = {
        "eval/episodic_return": end.total.mean(),
        "eval/episodic_return_std": end.total.std(),
        "eval/episodic_length": end.length.mean(),
    }
    return metrics, (end.film, end.length[0])


# --------------------------------------------------------------------------------- what a copy can do without
# Checks of flags, video, checkpoints, continuing a run, its provenance, several hosts.
# benchmark/copying.md lists the calls that go with them.
POSITIVE = (
    "num_seeds episode_length num_envs num_steps num_epochs minibatch_size actor_learning_rate "
    "critic_learning_rate max_grad_norm hidden_dim num_diffusion_steps epsilon num_workers num_devices "
    "total_timesteps eval_interval num_eval_envs checkpoint_interval"
).split()


def check_args(args: Args) -> None:
    """Exit with code 2 on flags with which no run can be made."""
    check_numbers(args)
    check_sizes(args)


def check_numbers(args: Args) -> None:
    """Exit with code 2 on a number out of its range."""
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not value > 0:
            fail(f"{flag(name)} must be positive, not {value}")
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            fail(f"{flag(name)} must be finite, not {value}")
    if not 0 <= args.seed < 2**31:
        fail(f"--seed must lie in [0, 2^31), not be {args.seed}")
    if not 0 <= args.gamma < 1:
        fail(f"--gamma must lie in [0, 1), not be {args.gamma}")
    if not 0 <= args.gae_lambda <= 1:
        fail(f"--gae-lambda must lie in [0, 1], not be {args.gae_lambda}")


def check_sizes(args: Args) -> None:
    """Exit with code 2 on sizes that do not fill an iteration or do not go on the devices."""
    if args.num_iterations == 0:
        fail(f"--total-timesteps {args.total_timesteps} is less than --num-envs x --num-steps")
    if args.batch_size % args.minibatch_size:
        sizes = f"--num-envs x --num-steps = {args.batch_size}"
        fail(f"--minibatch-size {args.minibatch_size} does not divide {sizes}")
    devices = find_devices(args.device)
    if args.num_devices > len(devices):
        advice = f"XLA_FLAGS=--xla_force_host_platform_device_count={args.num_devices} makes more on a CPU"
        fail(f"--num-devices {args.num_devices}, but JAX finds {len(devices)} here; {advice}")
    num_devices = args.num_devices * jax.process_count()
    for name in ("num_envs", "minibatch_size", "num_eval_envs"):
        value = getattr(args, name)
        if value % num_devices:
            fail(f"{flag(name)} {value} does not divide over {num_devices} devices")


class Pose(NamedTuple):
    """What a renderer needs of a simulation."""

    qpos: Array
    qvel: Array
    mocap_pos: Array
    mocap_quat: Array
    xfrc_applied: Array


def first_pose(sim: Any) -> Pose:
    """The pose of the first of several simulations."""
    return Pose(*(getattr(sim.data, name)[0] for name in Pose._fields))


def check_renderer() -> None:
    """Exit with code 2 where MuJoCo cannot draw; it draws through EGL unless MUJOCO_GL says otherwise."""
    try:
        mujoco = import_module("mujoco")
        model = mujoco.MjModel.from_xml_string("<mujoco/>")
        mujoco.Renderer(model).close()
    except Exception as error:  # each GL library has its own, some while mujoco is imported
        advice = "set MUJOCO_GL to egl (libegl1, libgl1-mesa-dri) or osmesa (libosmesa6)"
        fail(f"--capture-video cannot draw ({error}); {advice}")


def write_video(setup: Setup, frames: tuple, path: pathlib.Path) -> None:
    """Draw the first seed's evaluation episode to an mp4 of at most 30 frames a second."""

    class Frame(NamedTuple):
        data: Pose

    poses, length = frames
    mediapy = import_module("mediapy")
    mediapy.set_ffmpeg(import_module("imageio_ffmpeg").get_ffmpeg_exe())
    stride = math.ceil(1 / (30 * setup.env.dt))
    times = range(0, int(length[0]), stride)
    drawn = [Frame(Pose(*(x[0, t] for x in poses))) for t in times]
    model = setup.env.mj_model
    camera = model.camera(0).name if model.ncam else None  # Playground's first one follows the robot
    pictures = setup.env.render(drawn, camera=camera)
    path.parent.mkdir(exist_ok=True)
    mediapy.write_video(path, pictures, fps=1 / (stride * setup.env.dt))


def named_leaves(tree: Any) -> dict[str, Any]:
    """A tree's leaves by dotted names; without the empty ones, which Orbax refuses."""
    leaves = jax.tree.leaves_with_path(tree)
    return {leaf_name(path): leaf for path, leaf in leaves if leaf.size}


def leaf_name(path: Any) -> str:
    """Dotted name of a leaf, like learner.actor.input.kernel.value."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def write_arrays(folder: pathlib.Path, content: dict[str, Any], step: int) -> None:
    """Write a checkpoint and keep the last three; Orbax never reads unfinished ones."""
    options = ocp.CheckpointManagerOptions(max_to_keep=3, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder, options=options) as manager:
        if step in manager.all_steps():  # a continued run has diverged here again
            manager.delete(step)
        if not manager.save(step, args=ocp.args.PyTreeSave(content), force=True):
            raise OSError(f"Orbax has left out the checkpoint of step {step}")


def save_checkpoint(run: pathlib.Path, state: TrainState, step: int, progress: dict[str, Any]) -> None:
    """Write the training state and what else a continued run needs, as NumPy arrays."""
    content = {"state": named_leaves(state), **progress}
    with contextlib.redirect_stderr(io.StringIO()):  # for tracebacks of threads, whose errors come here too
        try:
            write_arrays(run.resolve() / "checkpoints", content, step)
        except Exception as error:  # Orbax and TensorStore have kinds of their own
            end_unwritten(run, error)


def read_checkpoint(run: str) -> dict[str, Any]:
    """What a run's newest checkpoint was given; exits with code 2 if it cannot be read."""
    try:
        folder = pathlib.Path(run, "checkpoints").resolve(strict=True)
        options = ocp.CheckpointManagerOptions(read_only=True)  # a run that still goes on is left alone
        with ocp.CheckpointManager(folder, options=options) as manager:
            return manager.restore(manager.latest_step(), args=ocp.args.PyTreeRestore())
    except Exception as error:  # whatever a missing, damaged or foreign file makes of the reader
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        fail(f"no readable checkpoint in {run}, which should be a run's folder ({reason})")


def fill_state(shapes: TrainState, arrays: dict[str, np.ndarray]) -> TrainState:
    """A training state of a checkpoint's arrays; exits with code 2 if they are not those of this run."""
    expected = {name: (x.shape, x.dtype) for name, x in named_leaves(shapes).items()}
    found = {name: (x.shape, x.dtype) for name, x in arrays.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            what = f"{name} is {found.get(name)}, expected {expected.get(name)}"
            fail(f"the checkpoint is not of this run: {what}")

    def fill(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        return arrays[leaf_name(path)] if shape.size else np.zeros(shape.shape, shape.dtype)

    return jax.tree.map_with_path(fill, shapes)


COMPUTED = ("batch_size", "num_iterations")  # from other arguments
COMMAND_LINE_ONLY = ("compilation_cache_dir",)  # code is loaded from there
MAY_CHANGE = (
    "device num_workers num_devices compilation_cache_dir total_timesteps eval_mode eval_interval "
    "num_eval_envs checkpoint_interval capture_video track wandb_project_name wandb_entity resume evaluate "
    "batch_size num_iterations"
).split()
EVALUATION_MAY_CHANGE = ("env_id", "env_config", "episode_length", "impl")  # what a policy plays


def command_line(values: dict[str, Any]) -> list[str]:
    """The words of a command line that gives these values, by which they are checked as a user's are."""
    words = []
    for field in dataclasses.fields(Args):
        value = values.pop(field.name, field.default)
        if field.name in COMPUTED:
            continue
        if field.type is bool and isinstance(value, bool):
            words.append(flag(field.name) if value else flag(f"no_{field.name}"))
            continue
        repeated = isinstance(field.default, tuple) and isinstance(value, list)
        for one in value if repeated else [value]:
            words.append(f"{flag(field.name)}={one}")
    if values:
        raise ValueError(f"there is no argument {', '.join(values)}")
    return words


def read_args(run: str) -> Args:
    """The arguments that a run was started with; exits with code 2 if it is not a run of this script."""
    try:
        saved = json.loads(pathlib.Path(run, "args.json").read_text())
        if saved["script"] != SCRIPT:
            raise ValueError(f"it is of {saved['script']}.py")
        words = command_line(dict(saved["args"], resume=None, evaluate=None))
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(Args, args=words)
    except SystemExit:
        fail(f"{run}/args.json holds a value that its flag cannot have")
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{run} is no run folder of this script, with args.json and checkpoints ({error})")


def make_log_dir(args: Args) -> None:
    """Make the parent of the run folders; exits with code 2 if there can be none."""
    try:
        pathlib.Path(args.log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--log-dir {args.log_dir} is no folder and cannot be made one ({error})")
    if not os.access(args.log_dir, os.W_OK):
        fail(f"--log-dir {args.log_dir} cannot be written to")
    if len(os.fsencode(name_folder(args, int(time.time())).name)) > 255:
        fail("--exp-name and --env-id are too long for the name of a folder, which they are part of")


def parse() -> Args:
    """Resolved arguments of the command line; with --resume or --evaluate, over those of that run."""
    given = tyro.cli(Args)
    if given.resume and given.evaluate:
        fail("--resume trains a run further, --evaluate does not train; give one of them")
    run = given.resume or given.evaluate
    if not run:
        args = resolve(given)
        check_args(args)
        make_log_dir(args)
        return args
    own = read_args(run)
    # What makes code run is the user's to say, not the folder's, which may be a stranger's.
    elsewhere = given.evaluate and given.env_id != Args.env_id  # on a task that the command line names
    if ":" in own.env_id and given.env_id != own.env_id and not elsewhere:
        fail(f"{run} would import the module of --env-id {own.env_id}; give that flag too if you trust it")
    own = dataclasses.replace(own, **{name: getattr(given, name) for name in COMMAND_LINE_ONLY})
    args = resolve(tyro.cli(Args, default=own))
    may_change = [*MAY_CHANGE, *EVALUATION_MAY_CHANGE] if args.evaluate else MAY_CHANGE
    for name, value in vars(own).items():
        if name not in may_change and getattr(args, name) != value:
            fail(f"{flag(name)} cannot change in a run that exists; it is {value}")
    check_args(args)
    return args


def git_commit() -> str:
    """This file's commit, with -dirty or -untracked where that does not hold it; empty outside a clone."""
    path = pathlib.Path(__file__).resolve()
    git = functools.partial(subprocess.run, cwd=path.parent, capture_output=True, text=True, check=False)
    commit = git("git describe --always --dirty --abbrev=40".split()).stdout.strip()
    if commit and git(["git", "ls-files", "--error-unmatch", path.name]).returncode:
        commit += "-untracked"
    return commit


def provenance() -> dict[str, Any]:
    """What else decides a run's numbers: command, commit, device, XLA's flags and versions."""
    device = jax.local_devices()[0].device_kind
    return {
        "script": SCRIPT,
        "command": sys.argv,
        "git_commit": git_commit(),
        "device": f"{jax.local_device_count()} x {device}, {os.cpu_count()} cores",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "python": sys.version,
        "versions": {package.name: package.version for package in metadata.distributions()},
    }


def join_hosts() -> None:
    """Connect the processes of several hosts, if JAX_COORDINATOR_ADDRESS says that there are some."""
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return
    jax.distributed.initialize(  # outside of a cluster JAX itself reads the address only
        num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
        process_id=int(os.environ["JAX_PROCESS_ID"]),
    )
    # MJX would put its constants on the first host's device, where the others cannot read them.
    import_module("mujoco.mjx._src.io")._resolve_device = lambda impl: jax.local_devices()[0]


def largest(number: int) -> int:
    """The largest of the numbers that the hosts have."""
    return int(multihost_utils.process_allgather(np.int32(number)).max())


# ---------------------------------------------------------------------------------------- run folder and logs
def open_run(folder: pathlib.Path, args: Args) -> None:
    """Write the run's args.json; start Weights & Biases, which copies what TensorBoard gets."""
    path = folder / "args.json"
    earlier = []  # what it said each time that the run was started before
    if path.exists():
        last = json.loads(path.read_text())
        earlier = [*last.pop("earlier_starts", []), last]
    about = {"args": vars(args), **provenance(), "earlier_starts": earlier}
    unfinished = folder / "args.json.unfinished"
    try:
        unfinished.write_text(json.dumps(about, indent=1) + "\n")
    except OSError as error:
        end_unwritten(folder, error)
    unfinished.replace(path)
    if args.track:
        import_module("wandb").init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            config=vars(args),
            name=folder.name,
            dir=str(folder),
            sync_tensorboard=True,
        )


def end_unwritten(run: pathlib.Path, error: BaseException) -> None:
    """End a run that cannot write, as on a full disk: one line on stderr and exit code 1."""
    steps = []
    for folder in (run, run.parent):  # a seed's checkpoints are its run's
        paths = (folder / "checkpoints").glob("*")
        steps += [int(path.name) for path in paths if path.name.isdigit()]
    last = f"its last whole checkpoint is of step {max(steps)}" if steps else "it has no checkpoint"
    reason = " ".join(f"{type(error).__name__}: {error}"[:300].split())
    print(f"{SCRIPT}.py: error: cannot write to {run} ({reason}); {last}", file=sys.__stderr__, flush=True)
    os._exit(1)  # without waiting for threads that cannot write either


def append(path: pathlib.Path, line: str) -> None:
    """Add a line to a run's file, whole or not at all."""
    size = path.stat().st_size
    try:
        with path.open("a") as file:
            file.write(line)
    except OSError as error:
        os.truncate(path, size)
        end_unwritten(path.parent, error)


def open_log(folder: pathlib.Path, step: int) -> Callable:
    """Open metrics.jsonl and TensorBoard in a folder, to go on after this step; returns their logger."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.touch()
    # A killed run may have logged beyond its checkpoint, the last line by half: those steps come again.
    kept = b""
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n") and json.loads(line)["step"] <= step:
            kept += line
    os.truncate(path, len(kept))
    writer = tensorboardX.SummaryWriter(str(folder), purge_step=step + 1)

    def end_with_thread(failure: Any) -> None:
        if isinstance(failure.exc_value, OSError):
            end_unwritten(folder, failure.exc_value)
        threading.__excepthook__(failure)

    threading.excepthook = end_with_thread  # else who waits for a writer that could not write waits for ever

    def log(step: int, wall_time: float, metrics: dict[str, float]) -> None:
        row = {"step": step, "wall_time": round(wall_time, 3), **metrics}
        append(path, json.dumps(row) + "\n")
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def name_folder(args: Args, second: int) -> pathlib.Path:
    """The folder of a run that began in this second of Unix time."""
    return pathlib.Path(args.log_dir, f"{args.env_id}__{args.exp_name}__{args.seed}__{second}")


def make_folder(args: Args) -> int:
    """Make the folder of a new run, which no other run has; returns the second in its name."""
    second = int(time.time())
    while True:
        try:
            name_folder(args, second).mkdir(parents=True)
            return second
        except FileExistsError:
            second += 1


def run_folder(args: Args) -> pathlib.Path:
    """The folder of a new run, which is made, or of the one that is continued; the same on all hosts."""
    if args.resume:
        return pathlib.Path(args.resume)
    second = make_folder(args) if jax.process_index() == 0 else 0
    return name_folder(args, largest(second))


def seed_folders(args: Args, folder: pathlib.Path) -> list[pathlib.Path]:
    """Where each seed's metrics go."""
    if args.num_seeds == 1:
        return [folder]
    return [folder / f"seed_{args.seed + k}" for k in range(args.num_seeds)]


def open_logs(args: Args, folder: pathlib.Path, done: int) -> Callable:
    """Open the run and every seed's log, to go on after so many iterations; the first host writes them."""
    if jax.process_index() > 0:
        return lambda *_: None
    open_run(folder, args)
    logs = [open_log(path, done * args.batch_size) for path in seed_folders(args, folder)]

    def log(step: int, wall_time: float, metrics: dict[str, np.ndarray], healthy: np.ndarray) -> None:
        for k in np.flatnonzero(healthy):
            logs[k](step, wall_time, metrics_of_seed(metrics, k))

    return log


# -------------------------------------------------------------------------------------------------- training
class Programs(NamedTuple):
    """Compiled functions of the training state of all seeds."""

    iterate: Callable | None
    evaluate: Callable


def over_seeds(setup: Setup, function: Callable) -> Callable:
    """function(setup, *inputs) of one seed as a function of the inputs of all seeds (K, ...)."""
    one_seed = functools.partial(function, setup)
    if setup.args.num_seeds > 1:
        return jax.vmap(one_seed)

    def only_seed(*inputs: Any) -> Any:
        """Without an axis of one before every matrix product, for which a CPU takes 1.6 times as long."""
        result = one_seed(*jax.tree.map(lambda x: x[0], inputs))
        return jax.tree.map(lambda x: x[None], result)

    return only_seed


def prepare(setup: Setup, saved: dict[str, Any]) -> tuple[TrainState, Any]:
    """The training state of all seeds (K, ...), new or a checkpoint's, and how it lies on the devices."""
    args = setup.args
    everywhere = NamedSharding(setup.mesh, P())
    sharded = NamedSharding(setup.mesh, P(None, "env"))
    keys = np.stack([jax.random.PRNGKey(args.seed + k) for k in range(args.num_seeds)])
    init = over_seeds(setup, init_state)
    shapes = jax.eval_shape(init, keys)

    def place(shape: jax.ShapeDtypeStruct) -> NamedSharding:
        return sharded if shape.shape[1:2] == (args.num_envs,) else everywhere

    shardings = jax.tree.map(lambda _: everywhere, shapes)
    shardings = shardings._replace(env_state=jax.tree.map(place, shapes.env_state))
    if saved:
        arrays = saved["state"]
        if args.evaluate:  # in new episodes, perhaps of another simulator
            shapes = shapes._replace(env_state=())
            shardings = shardings._replace(env_state=())
            arrays = {name: x for name, x in arrays.items() if not name.startswith("env_state.")}
        return jax.device_put(fill_state(shapes, arrays), shardings), shardings
    options = {"xla_backend_optimization_level": 0}  # it runs only once: compiling it well would take longer
    return jax.jit(init, out_shardings=shardings, compiler_options=options)(keys), shardings


def compile_programs(setup: Setup, state: TrainState, shardings: Any) -> Programs:
    """Compile what is done with the training state of all seeds."""
    everywhere = NamedSharding(setup.mesh, P())
    play = jax.vmap(functools.partial(evaluate, setup), axis_name="seed")
    play = jax.jit(play, out_shardings=everywhere)
    play = play.lower(state).compile()
    if setup.args.evaluate:
        return Programs(None, play)
    learn = over_seeds(setup, iterate)
    learn = jax.jit(learn, out_shardings=(shardings, everywhere), donate_argnums=0)
    return Programs(learn.lower(state).compile(), play)


def run_evaluation(
    setup: Setup, programs: Programs, state: TrainState, folder: pathlib.Path
) -> dict[str, np.ndarray]:
    """Evaluate every seed: metrics (K,), and with --capture-video a video in the run's folder."""
    metrics, frames = jax.device_get(programs.evaluate(state))
    if setup.args.capture_video and jax.process_index() == 0:
        step = int(jax.device_get(state.iteration)[0]) * setup.args.batch_size
        write_video(setup, frames, folder / "videos" / f"step_{step}.mp4")
    return metrics


def check_contract(metrics: dict[str, np.ndarray], done: int) -> None:
    """End a run whose rollout holds other chains than its actor has; Actor says what it must keep.

    In its first two iterations: while the output layer is 0, an actor ignores every latent.
    """
    kl = float(metrics["trust_region/initial_kl"].max())
    if kl > 1e-3:
        sys.exit(
            f"{SCRIPT}.py: iteration {done} began {kl:.3g} nats from the policy that made its rollout, "
            "not 0. The actor's output layer has to start at zero, and its output may depend on no latent "
            "but a^n."
        )


def metrics_of_seed(metrics: dict[str, np.ndarray], k: int) -> dict[str, float]:
    """One seed's metrics; a rollout in which no episode ended has no mean return or length."""
    row = {name: float(x[k]) for name, x in metrics.items()}
    if row["charts/episodes"] == 0:
        del row["charts/episodic_return"], row["charts/episodic_length"]
    return row


def catch_signals() -> list[int]:
    """The signals received, filled later: the first ends the run after its iteration, a later one kills."""
    received: list[int] = []
    times: list[float] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        times.append(time.monotonic())
        if times[-1] - times[0] > 3:  # sooner it may be the same one, passed on by a launcher
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGINT, receive)
    signal.signal(signal.SIGTERM, receive)
    return received


def print_progress(args: Args, metrics: dict[str, np.ndarray], done: int, wall_time: float) -> None:
    """One line on stdout for an iteration."""
    eta = wall_time / 60 / done * (args.num_iterations - done)
    returns = metrics.get("eval/episodic_return", ())
    line = f"step {done * args.batch_size:,}  SPS {metrics['charts/SPS'][0]:,.0f}  ETA {eta:.1f} min"
    print(line, *returns, sep="  ", flush=True)


def end_diverged(
    args: Args, state: TrainState, metrics: dict[str, np.ndarray], healthy: np.ndarray, folder: pathlib.Path
) -> np.ndarray:
    """Which seeds go on, (K,); one with a metric that is not finite is named, and its state kept as it is."""
    step = int(jax.device_get(state.iteration)[0]) * args.batch_size
    still = healthy.copy()
    for k in np.flatnonzero(healthy):
        row = metrics_of_seed(metrics, k)
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if not bad:
            continue
        still[k] = False
        where = f"iteration {step // args.batch_size} of seed {args.seed + k}"
        kept = seed_folders(args, folder)[k] / "diverged"
        print(f"{where}: {', '.join(bad)} not finite; the state is in {kept}", file=sys.stderr)
        whole = multihost_utils.process_allgather(state, tiled=True)
        own = jax.tree.map(lambda x, k=k: x[k : k + 1], whole)
        save_checkpoint(kept, own, step, {})
    return still


def train(setup: Setup, programs: Programs, state: TrainState, saved: dict[str, Any]) -> int:
    """The training loop; returns the process's exit code."""
    args = setup.args
    done = int(jax.device_get(state.iteration)[0])
    healthy = np.array(saved.get("healthy", np.ones(args.num_seeds, bool)))
    folder = run_folder(args)
    log = open_logs(args, folder, done)
    received = catch_signals()
    stop = 0
    started = time.perf_counter() - float(saved.get("wall_time", 0.0))
    while done < args.num_iterations and healthy.any() and not stop:
        began = time.perf_counter()
        state, metrics = programs.iterate(state)
        metrics = jax.device_get(metrics)
        metrics["charts/SPS"] = np.full(args.num_seeds, args.batch_size / (time.perf_counter() - began))
        done += 1
        step = done * args.batch_size
        last = done == args.num_iterations
        if done < 3:
            check_contract(metrics, done)
        if last or done % args.eval_interval == 0:
            metrics |= run_evaluation(setup, programs, state, folder)
        wall_time = time.perf_counter() - started
        log(step, wall_time, metrics, healthy)
        print_progress(args, metrics, done, wall_time)

        healthy = end_diverged(args, state, metrics, healthy, folder)
        stop = largest(received[0] if received else 0)
        if healthy.any() and (last or stop or done % args.checkpoint_interval == 0):
            whole = multihost_utils.process_allgather(state, tiled=True)
            wall_time = time.perf_counter() - started
            save_checkpoint(folder, whole, step, {"wall_time": np.float64(wall_time), "healthy": healthy})
    print(folder)
    if not healthy.all():
        return 1
    return 128 + stop if stop else 0


def main() -> None:
    """Parse, compile, then train, resume or evaluate."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's messages; its errors are raised
    join_hosts()
    args = parse()
    run = args.resume or args.evaluate
    saved = read_checkpoint(run) if run else {}
    if args.capture_video:
        check_renderer()
    if args.compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(args.compilation_cache_dir))
    for name, value in vars(args).items():
        print(f"{name}: {value}", flush=True)
    setup = make_setup(args)
    began = time.perf_counter()
    state, shardings = prepare(setup, saved)
    programs = compile_programs(setup, state, shardings)
    print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)
    if args.evaluate:
        metrics = run_evaluation(setup, programs, state, pathlib.Path(args.evaluate))
        print(json.dumps({name: x.tolist() for name, x in metrics.items()}))
        return
    sys.exit(train(setup, programs, state, saved))


if __name__ == "__main__":
    main()
