# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "flax>=0.12",
#     "gymnasium[mujoco]>=1.0",
#     "imageio-ffmpeg>=0.5",
#     "jax2onnx>=0.17",
#     "jax>=0.10",
#     "optax>=0.2.5",
#     "orbax-checkpoint>=0.11.20",
#     "tensorboard>=2.18",
#     "tensorboardx>=2.6.2",
#     "tyro>=1.0",
#     "wandb>=0.19.10",
# ]
# ///
"""Trust-Region Diffusion Policies (TruDi, arXiv 2606.15260) on HumanoidBench and Gymnasium, in one file.

    python trudi_humanoidbench.py --env-id h1hand-walk-v0             # the paper's settings
    python trudi_humanoidbench.py --env-id Hopper-v5 --preset cpu     # a curve in minutes on two CPU cores

Worker processes simulate; the learner is that of trudi_mjx.py. `# Eq. 181` marks where an equation of the
paper is computed; README.md has their table, benchmark/errata.md the paper's errata, E1 to E19. Axes in
shapes: T steps of a rollout, E environments, B states of a batch, N denoising steps, O entries of an
observation, A action dimensions, H hidden units. Latent actions go from a^N, noise, to a^0; an axis of N
holds n = 1 ... N in order.
"""

import atexit
import contextlib
import dataclasses
import difflib
import faulthandler
import functools
import io
import json
import logging
import math
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module, metadata, util
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import tyro

SCRIPT = pathlib.Path(__file__).stem

# ----------------------------------------------------------------------------------------------- constants
NAMES = (
    "walk run stand crawl hurdle stair slide maze pole sit_simple sit_hard balance_simple balance_hard reach "
    "powerlift truck package cabinet door window room bookshelf_simple bookshelf_hard spoon push basketball "
    "cube insert_normal insert_small kitchen"
).split()
TASKS = [f"h1hand-{name}-v0" for name in NAMES]
ROBOTS = "h1hand h1 h1simplehand h1strong h1touch g1".split()
# All that HumanoidBench registers; some lack a model.
HUMANOID_BENCH = [
    f"{robot}-{name}-v0" for robot in ROBOTS for name in [*NAMES, "highbar_simple", "highbar_hard"]
]
SUITE = {
    "humanoidbench": dict(v_min=-250.0, v_max=250.0),  # Table 5
    "gymnasium": dict(v_min=-500.0, v_max=500.0),
}
PAPER = dict(  # Table 5
    total_timesteps=50_000_000,
    num_envs=128,
    num_steps=128,
    num_epochs=8,
    minibatch_size=2048,
    gamma=0.99,
    hidden_dim=256,
    actor_learning_rate=3e-4,
    critic_learning_rate=3e-4,
    dual_learning_rate=3e-4,
    target_entropy_scale=0.665,
    num_eval_envs=32,
    eval_interval=100,
    checkpoint_interval=20,
)
CPU = PAPER | dict(  # measured on two cores, see benchmark/README.md
    total_timesteps=1_000_000,
    num_envs=64,
    num_steps=64,
    minibatch_size=256,
    hidden_dim=64,
    actor_learning_rate=6e-4,
    critic_learning_rate=6e-4,
    dual_learning_rate=1.2e-3,
    eval_interval=20,
)
PRESET = {"paper": PAPER, "cpu": CPU}

# Clips actions for the simulator and the critic's data; not in the losses, where it would stop gradients.
ACTION_LIMIT = 0.999
STEP_SIZE = 0.125  # delta, the scale of the chain's step sizes
KAPPA_MIN = 1e-3  # floor of their cosine schedule
SCHEDULE_SHIFT = 0.008  # and its offset
TIME_FEATURES = 32
HL_GAUSS_SIGMA = 0.75  # in atom widths
INITIAL_DUAL = 0.01  # alpha and lambda at the start
PRIOR_LOGITS = 40.0  # scale of the critic's output bias at the start, so that Q starts near 0
PATIENCE = 300.0  # seconds after which a worker counts as hanging; HumanoidBench takes a while to load
# What every worker has imported before it starts, together with the module of its task.
PRELOAD = "flax.nnx optax orbax.checkpoint tensorboardX tyro".split()
INSTALL = (
    "git clone https://github.com/carlosferrazza/humanoid-bench && "
    "pip install --no-deps -e ./humanoid-bench && "
    "pip uninstall -y mujoco mujoco-core mujoco-studio && "  # 4.0's plugins would stay
    "pip install mujoco==3.1.6 dm_control==1.0.20 torch opencv-python-headless natsort"
)


# ------------------------------------------------------------------------------------------------ arguments
@dataclasses.dataclass(frozen=True)
class Args:
    """Train a TruDi agent. A flag whose default is None takes the value of --preset or of the suite."""

    # Experiment
    env_id: str = "h1hand-walk-v0"
    """task of HumanoidBench, with any robot, or Gymnasium, or module:id of one that the module registers"""
    exp_name: str = SCRIPT
    """part of the run folder's name"""
    seed: int = 1
    """of everything: networks, noise, environments"""
    preset: Literal["paper", "cpu"] = "paper"
    """sizes: the paper's Table 5, or small ones for two CPU cores"""
    log_dir: str = "runs"
    """parent of the run folders"""

    # Rollouts and updates
    num_envs: int | None = None
    """parallel environments (paper: 128)"""
    num_steps: int | None = None
    """steps of each environment in a rollout (paper: 128)"""
    num_epochs: int | None = None
    """passes over a rollout (paper: 8)"""
    minibatch_size: int | None = None
    """states in a gradient step (paper: 2048)"""
    gamma: float | None = None
    """discount (paper: 0.99)"""
    td_lambda: float = 0.95
    """lambda of the critic's lambda-returns"""
    actor_learning_rate: float | None = None
    """of Adam (paper: 3e-4)"""
    critic_learning_rate: float | None = None
    """of Adam (paper: 3e-4)"""
    dual_learning_rate: float | None = None
    """of Adam, for log alpha and log lambda (paper: 3e-4)"""
    max_grad_norm: float = 0.5
    """global-norm clip, of actor and critic apart"""

    # Policy and critic
    hidden_dim: int | None = None
    """width of actor and critic (paper: 256)"""
    num_diffusion_steps: int = 8
    """denoising steps N"""
    prior_std: float = 2.5
    """standard deviation of the noise a^N"""
    learn_friction: bool = True
    """learn the step sizes, one factor for each action dimension"""
    trust_region_bound: float = 0.1
    """epsilon: nats of trajectory KL that a state may move in an iteration"""
    target_entropy_scale: float | None = None
    """the entropy target is minus this for each action dimension, in nats (the paper is silent; 0.665)"""
    v_min: float | None = None
    """lowest atom of the critic (paper: -250; -500 on Gymnasium's tasks)"""
    v_max: float | None = None
    """highest atom of the critic (paper: 250; 500 on Gymnasium's tasks)"""
    num_atoms: int = 151
    """atoms of the critic"""

    # What may differ when a run is continued or evaluated; MAY_CHANGE lists it
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """where to learn; gpu fails where there is none"""
    num_devices: int = 1
    """local devices over which states are sharded"""
    num_workers: int | None = None
    """processes that step the environments; by default one for each core"""
    pin_workers: bool = False
    """keep every worker on a core of its own (Linux); slower where other work shares them"""
    compilation_cache_dir: str = "~/.cache/trudi_jax"
    """compiled programs are kept here between runs; empty: nowhere"""
    total_timesteps: int | None = None
    """environment steps, over all environments (paper: 50M)"""
    eval_mode: Literal["ode", "sde", "best-of-k"] = "ode"
    """how to act: the probability-flow ODE, a sample, or the best of K samples by Q"""
    ode_score_scale: float = 1.0
    """c of the ODE: 0.5 keeps the marginals, 1 is greedier"""
    best_of_k: int = 10
    """K of best-of-k"""
    eval_interval: int | None = None
    """iterations between evaluations; the last one is always followed by one (--preset paper: 100)"""
    num_eval_envs: int | None = None
    """episodes in an evaluation (--preset paper: 32)"""
    checkpoint_interval: int | None = None
    """iterations between checkpoints; the last one is always followed by one (--preset paper: 20)"""
    capture_video: bool = False
    """write an mp4 of one episode at each evaluation"""
    track: bool = False
    """log to Weights & Biases too"""
    wandb_project_name: str = "trudi"
    """project of Weights & Biases"""
    wandb_entity: str | None = None
    """team of Weights & Biases"""
    resume: str | None = None
    """run folder to continue, with its own arguments"""
    evaluate: str | None = None
    """run folder to evaluate, without training"""
    export: str | None = None
    """with --evaluate: write the policy to this file, as ONNX, in place of evaluating it"""

    # Computed
    batch_size: tyro.conf.Suppress[int] = 0
    """environment steps in an iteration"""
    num_iterations: tyro.conf.Suppress[int] = 0
    """as in CleanRL, steps that do not fill an iteration are left out"""


COMPUTED = ("batch_size", "num_iterations")  # from other arguments
COMMAND_LINE_ONLY = ("compilation_cache_dir", "export")  # where code is loaded from, where a file goes
MAY_CHANGE = (
    "device num_devices num_workers pin_workers compilation_cache_dir total_timesteps eval_mode "
    "ode_score_scale best_of_k eval_interval num_eval_envs checkpoint_interval capture_video track "
    "wandb_project_name wandb_entity resume evaluate export batch_size num_iterations"
).split()
EVALUATION_MAY_CHANGE = ("env_id",)  # what a policy plays


def fail(message: str) -> None:
    """Refuse bad input: one line on stderr and exit code 2."""
    line = " ".join(message.split())
    print(f"{SCRIPT}.py: error: {line}", file=sys.stderr)
    sys.exit(2)


def flag(name: str) -> str:
    """A field of Args as it is written on the command line."""
    return "--" + name.replace("_", "-")


def find_module(env_id: str) -> str:
    """The module that registers a task; exits with code 2 if the task is unknown or the module missing."""
    known = [*HUMANOID_BENCH, *gym.registry]
    if ":" not in env_id and env_id not in known:
        near = difflib.get_close_matches(env_id, known, 3, 0.4) or TASKS[:3]
        fail(f"unknown --env-id {env_id}; the nearest are {', '.join(near)}")
    module = env_id.rpartition(":")[0]
    if not module:
        module = "humanoid_bench" if env_id in HUMANOID_BENCH else "gymnasium"
    advice = f"; {INSTALL}" if module == "humanoid_bench" else ""
    if not util.find_spec(module.split(".")[0]):
        missing = f"the module {module}, which is neither installed nor on PYTHONPATH"
        fail(f"--env-id {env_id} needs {missing}{advice}")
    return module


if __name__ == "__main__":  # a wrong flag or task is told before the seconds that these imports take
    given = tyro.cli(Args)
    if not (given.resume or given.evaluate):
        find_module(given.env_id)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorboardX
from flax import nnx
from jax import Array, NamedSharding, P


def resolve(args: Args) -> Args:
    """Fill in what depends on suite and preset; exit with code 2 on what cannot run."""
    suite = "humanoidbench" if find_module(args.env_id) == "humanoid_bench" else "gymnasium"
    if args.pin_workers and not hasattr(os, "sched_setaffinity"):
        fail("--pin-workers needs Linux, whose scheduler can be told to keep a process on a core")
    values = SUITE[suite] | PRESET[args.preset]
    values |= {name: value for name, value in vars(args).items() if value is not None}
    values["batch_size"] = values["num_envs"] * values["num_steps"]
    values["num_iterations"] = values["total_timesteps"] // max(values["batch_size"], 1)
    return dataclasses.replace(args, **values)


def num_cores() -> int:
    """Cores that this process may use: fewer than there are under taskset or SLURM."""
    if hasattr(os, "sched_getaffinity"):  # macOS lacks it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_devices(device: str) -> list[jax.Device]:
    """The local devices of a kind; exits with code 2 where there is none."""
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        return jax.local_devices(backend="gpu" if device == "gpu" else None)
    except RuntimeError as error:
        fail(f"JAX has no {device} device ({error}); install jax[cuda13] or jax[cuda12], or use --device cpu")


# ----------------------------------------------------------------------------------- validation of arguments
POSITIVE = (
    "num_envs num_steps num_epochs minibatch_size actor_learning_rate critic_learning_rate "
    "dual_learning_rate max_grad_norm hidden_dim num_diffusion_steps prior_std trust_region_bound num_atoms "
    "num_devices num_workers total_timesteps best_of_k eval_interval num_eval_envs checkpoint_interval"
).split()


def check_args(args: Args) -> None:
    """Exit with code 2 on flags with which no run can be made."""
    check_numbers(args)
    check_sizes(args)
    if args.export:
        check_export(args)


def check_export(args: Args) -> None:
    """Exit with code 2 where there is no policy to export or nothing to do it with."""
    if not args.evaluate:
        fail(f"--export {args.export} needs --evaluate RUN, whose policy it writes")
    if args.eval_mode == "best-of-k":
        fail("--export writes what --eval-mode ode or sde does; best-of-k would need the critic, too")
    if not util.find_spec("jax2onnx"):
        fail("--export needs jax2onnx; pip install jax2onnx")
    if not pathlib.Path(args.export).resolve().parent.is_dir():
        fail(f"--export {args.export}: there is no such folder")


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
    if not args.ode_score_scale >= 0:
        fail(f"--ode-score-scale must not be negative, as {args.ode_score_scale} is")
    if not 0 <= args.gamma < 1:
        fail(f"--gamma must lie in [0, 1), not be {args.gamma}")
    if not 0 <= args.td_lambda <= 1:
        fail(f"--td-lambda must lie in [0, 1], not be {args.td_lambda}")
    if not args.v_min < args.v_max:
        fail(f"the critic's atoms need --v-min < --v-max, not {args.v_min} and {args.v_max}")
    if args.num_atoms < 2:
        fail(f"the critic needs --num-atoms > 1, not {args.num_atoms}")


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


# ---------------------------------------------------------------------------------------------- environments
class Setup(NamedTuple):
    """What stays constant while training; compiled programs close over it."""

    args: Args
    env: Any  # a Task; the environments themselves are in the workers
    action_size: int
    time_limit: int  # steps after which an episode is truncated
    mesh: jax.sharding.Mesh  # the devices, over which states are sharded


class Task(NamedTuple):
    """What workers, evaluation and videos need of an environment."""

    observation_size: int
    success_bar: float | None  # the return that HumanoidBench counts as a success
    fps: int  # of a video
    action_low: np.ndarray  # (A,), of its own box, which [-1, 1] stands for
    action_high: np.ndarray  # (A,)


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """A Gymnasium environment with observations (O,), actions (A,) in [-1, 1] and a time limit."""
    name = env_id.rpartition(":")[2]
    env = gym.make(f"{find_module(env_id)}:{name}", render_mode=render_mode, disable_env_checker=True)
    env = gym.wrappers.RecordEpisodeStatistics(env)
    own = type(env.unwrapped).__module__.startswith("humanoid_bench")
    if own and render_mode:  # its render() calls an older Gymnasium
        renderer = env.unwrapped.mujoco_renderer
        env.unwrapped.task.render = functools.partial(renderer.render, render_mode)
    box = env.action_space
    bounded = isinstance(box, gym.spaces.Box) and box.low.ndim == 1 and box.is_bounded()
    if not bounded or not env.spec.max_episode_steps:
        raise ValueError("it must have a finite action space Box(A,) and max_episode_steps")
    one = np.ones(box.shape, np.float32)
    if np.any(box.low != -one) or np.any(box.high != one):
        env = gym.wrappers.RescaleAction(env, -one, one)
    if len(env.observation_space.shape or ()) != 1:
        env = gym.wrappers.FlattenObservation(env)
    return env


def load_setup(args: Args) -> Setup:
    """Find out a task's sizes and lay out the devices; exits with code 2 if it cannot be made or drawn."""
    multiprocessing.set_forkserver_preload([*PRELOAD, find_module(args.env_id)])
    # A task that hangs ends here, too, and says where.
    faulthandler.dump_traceback_later(PATIENCE, exit=True, file=sys.__stderr__)
    try:
        env = make_env(args.env_id, find_render_mode(args))
        setup = setup_for(args, env)
        slots = np.zeros(1, slot_type(setup))
        reset_slot(env, slots[0])
        if args.capture_video:
            env.render()
    except Exception as error:  # whatever a simulator, the parts that it lacks or a GL library raise
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        advice = ""
        if args.capture_video:
            advice = "; if OpenGL is missing, MUJOCO_GL=egl (libegl1, libgl1-mesa-dri) or osmesa (libosmesa6)"
        fail(f"--env-id {args.env_id} cannot be made ({reason}){advice}")
    finally:
        faulthandler.cancel_dump_traceback_later()
    return setup


def setup_for(args: Args, env: gym.Env) -> Setup:
    """What stays constant, from the arguments and one of the environments."""
    task = Task(
        observation_size=env.observation_space.shape[0],
        success_bar=getattr(getattr(env.unwrapped, "task", None), "success_bar", None),
        fps=env.metadata.get("render_fps", 30),
        action_low=env.unwrapped.action_space.low,
        action_high=env.unwrapped.action_space.high,
    )
    mesh = jax.sharding.Mesh(jax.local_devices()[: args.num_devices], ("env",))
    return Setup(args, task, env.action_space.shape[0], env.spec.max_episode_steps, mesh)


def find_render_mode(args: Args) -> str | None:
    """Gymnasium's name for pictures (H, W, 3), where a video needs them."""
    return "rgb_array" if args.capture_video else None


# --------------------------------------------------------------------------------------------------- workers
class EnvSlot(NamedTuple):
    """An environment, and where its worker and the learner write what they tell each other of it."""

    env: gym.Env
    slot: np.void  # of slot_type


class Worker(NamedTuple):
    """A process with a slice of the environments."""

    process: Any
    pipe: Any  # takes True to reset, False to step; gives the first environment's picture, or None


def slot_type(setup: Setup) -> np.dtype:
    """The type of a slot; learner and workers share an array of them, (E,)."""
    observation = f"({setup.env.observation_size},)f4"
    fields = {
        # What the learner asks for
        "seed": "u4",
        "spread": "?",  # start the clock anywhere in an episode
        "active": "?",  # take part in steps
        "action": f"({setup.action_size},)f4",
        # What comes of it
        "observation": observation,  # where an episode ended, of the next one
        "next_observation": observation,  # the true one, also where an episode ended
        "reward": "f4",
        "terminated": "?",
        "truncated": "?",  # and not terminated
        "begun": "?",  # the present episode was seen from its start
        "episode_ended": "?",  # one that was did
        "success": "f4",  # the most that the environment said since reset; NaN if it said nothing
        "total": "f8",  # rewards of the last episode that ended
        "length": "f8",  # its steps
    }
    return np.dtype(list(fields.items()), align=True)


def put(slot: np.void, name: str, value: Any, ended: bool = False) -> None:
    """Write an observation or reward to its slot; raises ValueError on a wrong shape and on NaN.

    The observation at which an episode terminated may be NaN: nothing is learned from it.
    """
    if np.shape(value) != slot[name].shape:  # NumPy would broadcast some
        raise ValueError(f"its {name} has shape {np.shape(value)}, not {slot[name].shape}")
    slot[name] = value
    if not (ended or np.isfinite(slot[name]).all()):
        raise ValueError(f"its {name} is not finite")


def reset_slot(env: gym.Env, slot: np.void, seed: int | None = None) -> None:
    """Start an episode, which is the same in whichever worker."""
    random.seed(int(slot["seed"]))
    np.random.seed(slot["seed"])  # some of HumanoidBench's goals come from the process's global generator
    observation, _ = env.reset(seed=seed)
    put(slot, "observation", observation)
    slot["seed"] = np.random.randint(2**32, dtype=np.uint32)  # of the next episode


def reset_slots(envs: list[EnvSlot]) -> None:
    """Start environments; some have their clocks spread, so that time-outs do not coincide."""
    for env, slot in envs:
        seed = int(slot["seed"])
        reset_slot(env, slot, seed)
        slot["begun"] = not slot["spread"]
        if slot["spread"]:
            clock = np.random.default_rng(seed).integers(env.spec.max_episode_steps)
            env.set_wrapper_attr("_elapsed_steps", int(clock))


def step_slots(envs: list[EnvSlot]) -> None:
    """Step the active environments."""
    for env, slot in envs:
        if slot["active"]:
            step_slot(env, slot)


def step_slot(env: gym.Env, slot: np.void) -> None:
    """Step an environment; where its episode ends, the next one starts."""
    observation, reward, terminated, truncated, info = env.step(slot["action"].copy())  # which it may keep
    put(slot, "observation", observation, ended=terminated)
    put(slot, "reward", reward)
    slot["next_observation"] = slot["observation"]
    slot["terminated"] = terminated
    slot["truncated"] = truncated and not terminated
    slot["success"] = np.fmax(slot["success"], info.get("success", np.nan))
    slot["episode_ended"] = slot["begun"] and (terminated or truncated)
    if terminated or truncated:
        slot["begun"] = True
        slot["total"] = info["episode"]["r"]
        slot["length"] = info["episode"]["l"]
        reset_slot(env, slot)


def work(
    pipe: Any,
    memory: Any,
    dtype: np.dtype,
    rows: list,
    env_id: str,
    mode: str | None,
    core: int | None,
    patience: float,
) -> None:
    """A worker process, until its pipe closes. An exception, which it tells of, a crash or a hang ends it."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which may reach all processes, are for the learner
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.setitimer(signal.ITIMER_REAL, patience)
    envs: list[EnvSlot] = []
    try:
        if core is not None:
            os.sched_setaffinity(0, {core})
        slots = np.frombuffer(memory, dtype)
        envs = [EnvSlot(make_env(env_id, mode), slots[i]) for i in rows]
        while True:
            signal.setitimer(signal.ITIMER_REAL, 0)
            advance = reset_slots if pipe.recv() else step_slots
            signal.setitimer(signal.ITIMER_REAL, patience)
            advance(envs)
            pipe.send(envs[0].env.render() if mode and envs[0].slot["active"] else None)
    except (EOFError, ConnectionError):  # the learner has gone
        return
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        where = f"\n{traceback.format_exc()}" if envs else ""  # a constructor's takes no more than a line
        pipe.send(WorkerError(f"{multiprocessing.current_process().name}: {reason}{where}"))


class WorkerError(RuntimeError):
    """A worker has ended; the message is for the user."""


def end_of(worker: Worker) -> WorkerError:
    """What a worker that has ended said last, or its exit code."""
    with contextlib.suppress(EOFError, ConnectionError):
        if worker.pipe.poll():
            return worker.pipe.recv()
    worker.process.join(5)
    return WorkerError(f"{worker.process.name} ended with code {worker.process.exitcode}; see above")


class Simulators:
    """E environments in worker processes, which share `slots` (E,) with the learner."""

    def __init__(self, setup: Setup, num_envs: int, mode: str | None = None):
        dtype = slot_type(setup)
        self.env_id = setup.args.env_id
        self.frame: np.ndarray | None = None  # the first environment's picture
        self.context = multiprocessing.get_context("forkserver")
        self.memory = self.context.RawArray("b", num_envs * dtype.itemsize)
        self.slots = np.frombuffer(self.memory, dtype)
        num_workers = min(setup.args.num_workers or num_cores(), num_envs)
        self.workers: list[Worker] = []
        atexit.register(self.close)  # before multiprocessing's own, which waits for them without an end
        cores = sorted(os.sched_getaffinity(0)) if setup.args.pin_workers else [None]
        for i, rows in enumerate(np.array_split(range(num_envs), num_workers)):
            self.workers.append(self.start(rows, mode, cores[i % len(cores)]))
            mode = None  # the first worker draws

    def start(self, rows: np.ndarray, mode: str | None, core: int | None) -> Worker:
        """Start the worker of some environments."""
        pipe, other = self.context.Pipe()
        process = self.context.Process(
            target=work,
            args=(other, self.memory, self.slots.dtype, rows, self.env_id, mode, core, PATIENCE),
            name=f"the worker of environments {rows[0]} to {rows[-1]} of {self.env_id}",
            daemon=True,
        )
        process.start()
        other.close()
        return Worker(process, pipe)

    def request(self, reset: bool) -> None:
        """Have the environments reset, or the active ones stepped."""
        answers = []
        try:
            for worker in self.workers:
                worker.pipe.send(reset)
            for worker in self.workers:
                answers.append(worker.pipe.recv())
        except (EOFError, ConnectionError):
            raise end_of(worker) from None
        for answer in answers:
            if isinstance(answer, WorkerError):
                raise answer
        self.frame = answers[0]

    def check(self) -> None:
        """Raise WorkerError if an idle worker has ended, or the fork server (code 255)."""
        for worker in self.workers:
            if not worker.process.is_alive():
                raise end_of(worker)

    def close(self) -> None:
        """End the workers: each as soon as it has nothing to do, or after two seconds."""
        for worker in self.workers:
            worker.pipe.close()
        deadline = time.monotonic() + 2
        for worker in self.workers:
            worker.process.join(max(0, deadline - time.monotonic()))
            worker.process.kill()

    def reset(self, *numbers: int, spread: bool = False) -> None:
        """Start all environments, with seeds that are made of these numbers, clocks spread if so asked."""
        self.slots["active"] = True
        self.slots["spread"] = spread
        self.slots["success"] = np.nan
        self.slots["seed"] = np.random.SeedSequence(numbers).generate_state(len(self.slots))
        self.request(reset=True)

    def step(self, action: Array) -> np.ndarray:
        """Step the active environments with actions (E, A), clipped; the next step overwrites the slots."""
        self.slots["action"] = np.clip(action, -ACTION_LIMIT, ACTION_LIMIT)
        self.request(reset=False)
        return self.slots


# ---------------------------------------------------------------------------------------------- observations
class Inputs(NamedTuple):
    """Observations as the two networks get them."""

    actor: Array
    critic: Array


def same_inputs(observation: Array) -> Inputs:
    """What actor and critic see: here both see all of it."""
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
class Actor(nnx.Module):
    """The network f_theta(a^n, s, n), twice the correction to the prior's score, and the step sizes h^n.

    What a replacement must keep: `prior_std`, `raw_friction`, `step_sizes`, `embed` and `__call__`; that f
    depends on no latent action but a^n, since `trajectory_kl` asks for all steps of a stored chain at once;
    and an output layer that starts at zero, since the first rollout is normalised for the updates with
    statistics that the actor had not when it acted. The first iterations of a run check the last two.

    Every array in the module is a weight and is trained: constants are made where they are used, as in
    `embed`. There is no state for dropout or batch normalisation.
    """

    def __init__(self, args: Args, observation_size: int, action_size: int, rngs: nnx.Rngs):
        self.num_steps = args.num_diffusion_steps
        self.prior_std = args.prior_std
        self.learn_friction = args.learn_friction
        width = args.hidden_dim
        linear = functools.partial(nnx.Linear, rngs=rngs)
        norm = functools.partial(nnx.LayerNorm, epsilon=1e-6, rngs=rngs)
        self.time_mlp = nnx.List([linear(TIME_FEATURES, TIME_FEATURES) for _ in range(2)])
        self.input = linear(observation_size + action_size + TIME_FEATURES, width)
        self.norms = nnx.List([norm(width) for _ in range(3)])
        self.hidden = nnx.List([linear(width, width) for _ in range(3)])
        self.output = linear(width, action_size, kernel_init=nnx.initializers.zeros)
        self.raw_friction = nnx.Param(jnp.full(action_size, np.log(np.e - 1)))  # softplus makes it 1

    def step_sizes(self) -> Array:
        """h^n for n = 1 ... N, (N, A): a cosine schedule divided by the friction b of each action."""
        n = jnp.arange(1, self.num_steps + 1)[:, None] / self.num_steps
        cosine = jnp.cos(jnp.pi / 2 * (1 + SCHEDULE_SHIFT - n) / (1 + SCHEDULE_SHIFT)) ** 2
        kappa = (1 - KAPPA_MIN) * cosine + KAPPA_MIN
        raw_friction = self.raw_friction[...]
        if not self.learn_friction:
            raw_friction = jax.lax.stop_gradient(raw_friction)
        return STEP_SIZE * kappa / nnx.softplus(raw_friction)

    def split_first_layer(self) -> list[Array]:
        """The kernel that acts on concat(s, a^n, time), as a kernel for each of the three."""
        kernel = self.input.kernel[...]
        time_start = kernel.shape[0] - TIME_FEATURES
        latent_start = time_start - self.raw_friction.shape[0]
        return jnp.split(kernel, [latent_start, time_start])

    def embed(self, observation: Array) -> tuple[Array, Array]:
        """What stays the same along a chain: the first layer on observations, (B, H), and on n, (N, H)."""
        n = jnp.arange(1, self.num_steps + 1)[:, None]
        frequency = 10000.0 ** -jnp.arange(0, 1, 2 / TIME_FEATURES)
        angle = n * frequency
        features = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
        features = nnx.gelu(self.time_mlp[0](features))
        features = self.time_mlp[1](features)
        observation_kernel, _, time_kernel = self.split_first_layer()
        return observation @ observation_kernel + self.input.bias[...], features @ time_kernel

    def __call__(self, observation_part: Array, time_part: Array, latent: Array) -> Array:
        """f_theta at latents (..., A), with what `embed` returned, broadcast to (..., H)."""
        _, latent_kernel, _ = self.split_first_layer()
        x = observation_part + time_part + latent @ latent_kernel
        for norm, hidden in zip(self.norms, self.hidden, strict=True):
            x = x + nnx.gelu(hidden(norm(x)))
        return self.output(x)


class Critic(nnx.Module):
    """Categorical distributions of the return, whose mean is Q(s, u)."""

    def __init__(self, args: Args, observation_size: int, action_size: int, rngs: nnx.Rngs):
        width = args.hidden_dim
        sizes = [observation_size + action_size, width, width]
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


# ------------------------------------------------------------------------------------------- diffusion chain
class Trajectory(NamedTuple):
    """What the trust region needs of a chain: the latents a policy went through, and where it aimed."""

    latents: Array  # (B, N, A), a^1 ... a^N
    means: Array  # (B, N, A), of a^0 ... a^(N-1)


class Chain(NamedTuple):
    """A sample of the policy at B states."""

    action: Array  # (B, A), u = tanh(a^0)
    entropy_bound: Array  # (B,), a sample of l(s)
    trajectory: Trajectory


def sample_chain(actor: Actor, observation: Array, noise: Array, unroll: bool = False) -> Chain:
    """Sample the policy, reparameterised: observations (B, .), normals (N + 1, B, A), noise[n] for a^n."""
    observation_part, time_part = actor.embed(observation)
    h = actor.step_sizes()[:, None]  # (N, 1, A)
    prior_std = actor.prior_std

    def denoise(latent: Array, step: tuple) -> tuple[Array, tuple]:
        h_n, time_n, noise_n = step
        drift = actor(observation_part, time_n, latent) - latent / prior_std**2
        mean = latent + h_n * drift  # Eq. 186, discretising Eq. 5
        return mean + jnp.sqrt(2 * h_n) * noise_n, (latent, mean)  # Eq. 31

    start = prior_std * noise[-1]
    steps = (h, time_part, noise[:-1])
    last, (latents, means) = jax.lax.scan(denoise, start, steps, reverse=True, unroll=unroll)

    # Twice the log-densities of a^(n-1) given a^n and of a^n given a^(n-1), less the normaliser of both.
    log_generative = -(noise[:-1] ** 2)
    earlier = jnp.concatenate([last[None], latents[:-1]])  # a^0 ... a^(N-1)
    residual = latents - earlier * (1 - h / prior_std**2)
    log_noising = -(residual**2) / (2 * h)  # Eq. 6, discretising Eq. 4
    log_ratio = 0.5 * (log_noising - log_generative).sum(0)
    log_prior = -0.5 * noise[-1] ** 2 - jnp.log(prior_std * jnp.sqrt(2 * jnp.pi))
    # Of 1 - tanh^2, in a form that is finite where tanh rounds to 1.
    tanh_log_det = 2 * (jnp.log(2.0) - last - nnx.softplus(-2 * last))
    entropy_bound = log_ratio - log_prior + tanh_log_det  # Eq. 117, Eq. 180 (E1: its sign)
    trajectory = Trajectory(jnp.moveaxis(latents, 0, 1), jnp.moveaxis(means, 0, 1))
    return Chain(jnp.tanh(last), entropy_bound.sum(-1), trajectory)


def ode_action(actor: Actor, observation: Array, noise: Array, score_scale: float) -> Array:
    """Actions (B, A) of the probability-flow ODE with scaled score, from standard normals (B, A)."""
    observation_part, time_part = actor.embed(observation)
    variance = actor.prior_std**2

    def flow(latent: Array, step: tuple) -> tuple[Array, None]:
        h_n, time_n = step
        score = -latent / variance + actor(observation_part, time_n, latent) / 2
        return latent + h_n * (latent / variance + 2 * score_scale * score), None  # Eq. 185, Eq. 187

    start = actor.prior_std * noise
    last, _ = jax.lax.scan(flow, start, (actor.step_sizes(), time_part), reverse=True)
    return jnp.tanh(last)


def trajectory_kl(actor: Actor, old_actor: Actor, observation: Array, trajectory: Trajectory) -> Array:
    """c(s), (B,): KL of the old actor's trajectories from the actor's, in closed form at each step.

    `trajectory` holds chains of the old actor at these observations. Any other trust region can take this
    function's place, if it is 0 between equal actors; it may use both.
    """
    latents, means = trajectory
    observation_part, time_part = actor.embed(observation)
    h = actor.step_sizes()
    old_h = old_actor.step_sizes()
    drift = actor(observation_part[:, None], time_part, latents) - latents / actor.prior_std**2
    new_means = latents + h * drift
    # Of Gaussians with variances 2 old_h and 2 h. The prior's KL is 0, and tanh changes nothing.
    kl = 0.5 * (old_h / h - 1 - jnp.log(old_h / h) + (means - new_means) ** 2 / (2 * h))
    return kl.sum((-2, -1))  # Eq. 178, which by Eq. 135 and Eq. 152 bounds Eq. 57


# ---------------------------------------------------------------------------------------- critic and targets
def hl_gauss(args: Args, returns: Array) -> Array:
    """Targets (..., atoms) of returns (...), clipped to the atoms' range: a Gaussian's mass per atom."""
    width = (args.v_max - args.v_min) / (args.num_atoms - 1)
    edges = jnp.linspace(args.v_min - width / 2, args.v_max + width / 2, args.num_atoms + 1)
    clipped = jnp.clip(returns, args.v_min, args.v_max)[..., None]
    cdf = jax.scipy.special.ndtr((edges - clipped) / (HL_GAUSS_SIGMA * width))
    return jnp.diff(cdf) / (cdf[..., -1:] - cdf[..., :1])


def q_value(args: Args, logits: Array) -> Array:
    """Q (...) of the critic's logits (..., atoms)."""
    atoms = jnp.linspace(args.v_min, args.v_max, args.num_atoms)
    return nnx.softmax(logits) @ atoms


def lambda_returns(
    args: Args, reward: Array, terminated: Array, truncated: Array, value: Array, bonus: Array
) -> Array:
    """Soft lambda-returns, everything (T, E); `value` is Q and `bonus` alpha l at next_observation."""
    bootstrap = truncated.at[-1].set(True)  # at a time-out and where the rollout ends

    def step(later: Array, now: tuple) -> tuple[Array, Array]:
        reward, terminated, bootstrap, value, bonus = now
        mixture = (1 - args.td_lambda) * value + args.td_lambda * later
        mixture = jnp.where(bootstrap, value, mixture)
        # Chosen, not multiplied by 0: a simulation that has become NaN ends, and its last value is NaN.
        future = jnp.where(terminated, 0.0, bonus + mixture)
        target = reward + args.gamma * future  # Eq. 118, Eq. 179 (E2, E12)
        return target, target

    steps = (reward, terminated, bootstrap, value, bonus)
    _, targets = jax.lax.scan(step, jnp.zeros_like(value[-1]), steps, reverse=True)
    return targets


# ---------------------------------------------------------------------------------------- losses and updates
Metrics = dict[str, Array]  # by the names under which they are logged


class Learner(NamedTuple):
    """All that learns. Networks are pytrees of their weights."""

    actor: Actor
    critic: Critic
    duals: dict[str, Array]  # log_alpha and log_lambda
    actor_opt_state: Any
    critic_opt_state: Any
    dual_opt_state: Any


class Batch(NamedTuple):
    """B states of a rollout."""

    actor_observation: Array  # (B, .), normalised
    critic_observation: Array  # (B, .), normalised
    action: Array  # (B, A), clipped
    trajectory: Trajectory  # of the old actor
    target: Array  # (B,), lambda-returns


class Optimizers(NamedTuple):
    """Of the learner's three parts."""

    actor: optax.GradientTransformation
    critic: optax.GradientTransformation
    duals: optax.GradientTransformation


def make_optimizers(args: Args) -> Optimizers:
    """Adam for all; gradients of actor and critic are clipped by their own global norm."""
    clip = optax.clip_by_global_norm(args.max_grad_norm)
    return Optimizers(
        actor=optax.chain(clip, optax.adam(args.actor_learning_rate)),
        critic=optax.chain(clip, optax.adam(args.critic_learning_rate)),
        duals=optax.adam(args.dual_learning_rate),
    )


def critic_loss(critic: Critic, args: Args, batch: Batch) -> Array:
    """Cross-entropy from the HL-Gauss targets to the critic's distribution."""
    logits = critic(batch.critic_observation, batch.action)
    return optax.softmax_cross_entropy(logits, hl_gauss(args, batch.target)).mean()


def actor_loss(
    actor: Actor,
    args: Args,
    old_actor: Actor,
    critic: Critic,
    duals: dict[str, Array],
    batch: Batch,
    noise: Array,
) -> tuple[Array, tuple[Array, Array]]:
    """The split loss, and l and c of every state (B,); noise is (N + 1, B, A)."""
    alpha = jnp.exp(duals["log_alpha"])
    lambda_ = jnp.exp(duals["log_lambda"])
    # Unrolled, as a loop is 19% slower at width 256.
    chain = sample_chain(actor, batch.actor_observation, noise, unroll=True)
    q = q_value(args, critic(batch.critic_observation, chain.action))
    soft_q_loss = -alpha * chain.entropy_bound - q  # Eq. 182, which descends Eq. 161, a bound by Eq. 92
    kl = trajectory_kl(actor, old_actor, batch.actor_observation, batch.trajectory)
    inside = kl <= args.trust_region_bound
    loss = jnp.where(inside, soft_q_loss, lambda_ * kl)  # Eq. 181: one of two losses per state
    return loss.mean(), (chain.entropy_bound, kl)


def dual_loss(
    duals: dict[str, Array], args: Args, entropy_bound: Array, kl: Array, action_size: int
) -> Array:
    """Alpha falls while the policy is noisier than its target; lambda grows while the region is violated."""
    target_entropy = -args.target_entropy_scale * action_size
    surplus = entropy_bound.mean() - target_entropy
    excess = kl.mean() - args.trust_region_bound
    alpha_loss = jnp.exp(duals["log_alpha"]) * surplus  # Eq. 183
    lambda_loss = -jnp.exp(duals["log_lambda"]) * excess  # Eq. 184 (E4)
    return alpha_loss + lambda_loss


def update_minibatch(
    setup: Setup, learner: Learner, old_actor: Actor, batch: Batch, key: Array
) -> tuple[Learner, Metrics]:
    """One gradient step each of critic, actor and duals."""
    args = setup.args
    optimizers = make_optimizers(args)

    value, gradient = jax.value_and_grad(critic_loss)(learner.critic, args, batch)
    step, critic_opt_state = optimizers.critic.update(gradient, learner.critic_opt_state)
    critic = optax.apply_updates(learner.critic, step)

    # The actor climbs the critic that has just been updated.
    noise = jax.random.normal(key, (args.num_diffusion_steps + 1, *batch.action.shape))
    actor_gradient = jax.value_and_grad(actor_loss, has_aux=True)
    (loss, (entropy_bound, kl)), gradient = actor_gradient(
        learner.actor, args, old_actor, critic, learner.duals, batch, noise
    )
    step, actor_opt_state = optimizers.actor.update(gradient, learner.actor_opt_state)
    actor = optax.apply_updates(learner.actor, step)

    gradient = jax.grad(dual_loss)(learner.duals, args, entropy_bound, kl, setup.action_size)
    step, dual_opt_state = optimizers.duals.update(gradient, learner.dual_opt_state)
    duals = optax.apply_updates(learner.duals, step)

    metrics = {
        "losses/critic": value,
        "losses/actor": loss,
        "entropy/bound": entropy_bound.mean(),
        "trust_region/kl": kl.mean(),
        "trust_region/violated": (kl > args.trust_region_bound).mean(),
    }
    return Learner(actor, critic, duals, actor_opt_state, critic_opt_state, dual_opt_state), metrics


def update_epochs(setup: Setup, learner: Learner, data: Batch, key: Array) -> tuple[Learner, Metrics]:
    """All epochs of shuffled minibatches of a rollout (E * T, ...); metrics are means over the last epoch."""
    args = setup.args
    old_actor = learner.actor
    order_key, noise_key = jax.random.split(key)
    order_keys = jax.random.split(order_key, args.num_epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, args.batch_size))(order_keys)
    order = order.reshape(-1, args.minibatch_size)  # a row for each minibatch
    noise_keys = jax.random.split(noise_key, len(order))
    sharding = NamedSharding(setup.mesh, P("env"))

    def step(learner: Learner, minibatch: tuple[Array, Array]) -> tuple[Learner, Metrics]:
        rows, key = minibatch
        batch = jax.tree.map(lambda x: x[rows], data)
        batch = jax.lax.with_sharding_constraint(batch, sharding)
        return update_minibatch(setup, learner, old_actor, batch, key)

    learner, metrics = jax.lax.scan(step, learner, (order, noise_keys))
    minibatches_per_epoch = args.batch_size // args.minibatch_size
    return learner, jax.tree.map(lambda x: x[-minibatches_per_epoch:].mean(0), metrics)


# ------------------------------------------------------------------------------------------------- iteration
EnvState = tuple[()]  # a checkpoint holds nothing of the workers' environments: they start anew


class Transition(NamedTuple):
    """A rollout; leaves (T, E, ...)."""

    observation: Any  # raw
    action: Array  # clipped
    trajectory: Trajectory  # of the policy that acted
    reward: Array
    terminated: Array
    truncated: Array
    next_observation: Any  # raw; the true one, also where an episode ended
    episode_ended: Array  # whether an episode that was seen from its start ended here
    episode_return: Array
    episode_length: Array


class TrainState(NamedTuple):
    """Everything that a checkpoint holds of one run."""

    learner: Learner
    statistics: Statistics
    env_state: EnvState
    key: Array
    iteration: Array


def new_state(setup: Setup, key: Array) -> TrainState:
    """Networks, duals, Adam and statistics, from the seed's key."""
    args = setup.args
    observation_size = setup.env.observation_size
    actor_key, critic_key, key = jax.random.split(key, 3)
    actor = Actor(args, observation_size, setup.action_size, nnx.Rngs(actor_key))
    critic = Critic(args, observation_size, setup.action_size, nnx.Rngs(critic_key))
    duals = {"log_alpha": jnp.log(INITIAL_DUAL), "log_lambda": jnp.log(INITIAL_DUAL)}
    optimizers = make_optimizers(args)
    learner = Learner(
        actor=actor,
        critic=critic,
        duals=duals,
        actor_opt_state=optimizers.actor.init(actor),
        critic_opt_state=optimizers.critic.init(critic),
        dual_opt_state=optimizers.duals.init(duals),
    )
    statistics = init_statistics(jnp.zeros((1, observation_size)))
    return TrainState(learner, statistics, (), key, jnp.zeros((), int))


def sample_policy(setup: Setup, actor: Actor, observation: Array, key: Array) -> Chain:
    """Chains of the actor at normalised observations (B, .)."""
    shape = (setup.args.num_diffusion_steps + 1, len(observation), setup.action_size)
    return sample_chain(actor, observation, jax.random.normal(key, shape))


def collect(
    setup: Setup, sample: Callable, envs: Simulators, state: TrainState
) -> tuple[Transition, dict[str, np.ndarray]]:
    """A rollout with samples of the policy; mean return and length of the episodes seen from their start."""
    rollout_key = jax.random.split(state.key, 5)[0]
    steps = []
    for key in np.asarray(jax.random.split(rollout_key, setup.args.num_steps)):
        observation = envs.slots["observation"].copy()
        chain = sample(state.learner.actor, state.statistics, observation, key)
        slots = envs.step(chain.action).copy()
        steps.append(make_transition(observation, chain.trajectory, slots))
    data = jax.tree.map(lambda *x: np.stack(x), *steps)

    ended = data.episode_ended
    episodes = {"charts/episodes": ended.sum()}
    if ended.any():  # else the rollout has no mean return or length
        episodes["charts/episodic_return"] = data.episode_return[ended].mean()
        episodes["charts/episodic_length"] = data.episode_length[ended].mean()
    return jax.device_put(data, NamedSharding(setup.mesh, P(None, "env"))), episodes


def make_transition(observation: np.ndarray, trajectory: Trajectory, slots: np.ndarray) -> Transition:
    """A step of a rollout, leaves (E, ...)."""
    return Transition(
        observation=observation,
        action=slots["action"],
        trajectory=trajectory,
        reward=slots["reward"],
        terminated=slots["terminated"],
        truncated=slots["truncated"],
        next_observation=slots["next_observation"],
        episode_ended=slots["episode_ended"],
        episode_return=slots["total"],
        episode_length=slots["length"],
    )


def critic_targets(
    setup: Setup, learner: Learner, data: Transition, next_inputs: Inputs, key: Array
) -> Array:
    """Soft lambda-returns (T, E), with a fresh action at every true next observation, which is normalised."""
    alpha = jnp.exp(learner.duals["log_alpha"])

    def next_value(step: tuple[Inputs, Array]) -> tuple[Array, Array]:
        inputs, key = step
        chain = sample_policy(setup, learner.actor, inputs.actor, key)
        value = q_value(setup.args, learner.critic(inputs.critic, chain.action))
        return value, alpha * chain.entropy_bound

    keys = jax.random.split(key, setup.args.num_steps)
    value, bonus = jax.lax.map(next_value, (next_inputs, keys))
    return lambda_returns(setup.args, data.reward, data.terminated, data.truncated, value, bonus)


def update(
    setup: Setup, old: Learner, data: Transition, inputs: Inputs, next_inputs: Inputs, keys: list[Array]
) -> tuple[Learner, Metrics]:
    """Learn from a rollout, whose observations and true next ones are given normalised."""
    args = setup.args
    target_key, epochs_key, check_key = keys
    target = critic_targets(setup, old, data, next_inputs, target_key)
    batch = Batch(inputs.actor, inputs.critic, data.action, data.trajectory, target)
    batch = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), batch)  # (E * T, ...)
    learner, metrics = update_epochs(setup, old, batch, epochs_key)

    # KL of the whole iteration, on as many states as a minibatch has: on stored chains, and on fresh ones.
    row_key, noise_key = jax.random.split(check_key)
    rows = jax.random.permutation(row_key, args.batch_size)[: args.minibatch_size]
    some = jax.tree.map(lambda x: x[rows], batch)
    observation = some.actor_observation
    fresh = sample_policy(setup, old.actor, observation, noise_key)
    stored_kl = trajectory_kl(learner.actor, old.actor, observation, some.trajectory)
    fresh_kl = trajectory_kl(learner.actor, old.actor, observation, fresh.trajectory)
    initial_kl = trajectory_kl(old.actor, old.actor, observation, some.trajectory)  # 0: see check_contract
    metrics |= {
        "trust_region/stored_kl": stored_kl.mean(),
        "trust_region/fresh_kl": fresh_kl.mean(),
        "trust_region/initial_kl": initial_kl.mean(),
        "trust_region/lambda": jnp.exp(learner.duals["log_lambda"]),
        "entropy/alpha": jnp.exp(learner.duals["log_alpha"]),
        "entropy/friction": nnx.softplus(learner.actor.raw_friction[...]).mean(),
        "critic/target": target.mean(),
        "critic/targets_clipped": ((target < args.v_min) | (target > args.v_max)).mean(),
    }
    return learner, metrics


def update_state(setup: Setup, state: TrainState, data: Transition) -> tuple[TrainState, Metrics]:
    """What follows a rollout: targets, epochs of updates, observation statistics."""
    _, target_key, epochs_key, check_key, key = jax.random.split(state.key, 5)  # `collect` uses the first

    # The untrained actor ignores what it observes, its output layer being 0, so the first rollout may seed
    # the statistics that it is learned from with. Later ones take effect in the next rollout: stored means
    # belong to the present ones (E13).
    merged = update_statistics(state.statistics, data.observation)
    first = state.iteration == 0
    statistics = jax.tree.map(lambda new, now: jnp.where(first, new, now), merged, state.statistics)

    inputs = same_inputs(normalize(statistics, data.observation))
    next_inputs = same_inputs(normalize(statistics, data.next_observation))
    keys = [target_key, epochs_key, check_key]
    learner, metrics = update(setup, state.learner, data, inputs, next_inputs, keys)
    return TrainState(learner, merged, state.env_state, key, state.iteration + 1), metrics


# ------------------------------------------------------------------------------------------------ evaluation
def evaluation_action(setup: Setup, learner: Learner, inputs: Inputs, key: Array) -> Array:
    """Actions (B, A) as --eval-mode says, at normalised observations."""
    args = setup.args
    actor = learner.actor
    if args.eval_mode == "ode":
        noise = jax.random.normal(key, (len(inputs.actor), setup.action_size))
        return ode_action(actor, inputs.actor, noise, args.ode_score_scale)
    count = args.best_of_k if args.eval_mode == "best-of-k" else 1
    keys = jax.random.split(key, count)
    actions = jax.vmap(lambda key: sample_policy(setup, actor, inputs.actor, key).action)(keys)
    q = jax.vmap(lambda action: q_value(args, learner.critic(inputs.critic, action)))(actions)
    best = q.argmax(0)[None, :, None]
    return jnp.take_along_axis(actions, best, 0)[0]


def play(
    setup: Setup,
    choose: Callable,
    envs: Simulators,
    state: TrainState,
    folder: pathlib.Path,
    received: Sequence[int] = (),
) -> dict[str, float]:
    """An episode in each evaluation environment: metrics and, with --capture-video, an mp4 of the first.

    Once a signal has been received there are neither.
    """
    args = setup.args
    iteration = int(state.iteration)
    slots = envs.slots
    envs.reset(args.seed, iteration, 1)
    frames = []
    action_key = jax.random.fold_in(state.key, 2**31)  # training folds in none
    for key in np.asarray(jax.random.split(action_key, setup.time_limit)):
        if received:
            return {}
        if args.capture_video and slots["active"][0]:
            frames.append(envs.frame)
        envs.step(choose(state.learner, state.statistics, slots["observation"].copy(), key))
        slots["active"] &= ~(slots["terminated"] | slots["truncated"])
        if not slots["active"].any():
            break
    if frames:
        save_video(setup, frames, folder / "videos" / f"step_{iteration * args.batch_size}.mp4")
    return evaluation_metrics(setup, slots)


def evaluation_metrics(setup: Setup, slots: np.ndarray) -> dict[str, float]:
    """Metrics of the episodes that ended in all slots."""
    total = slots["total"]
    metrics = {
        "eval/episodic_return": float(total.mean()),
        "eval/episodic_return_std": float(total.std()),
        "eval/episodic_length": float(slots["length"].mean()),
    }
    bar = setup.env.success_bar
    if bar is not None:  # what counts is the environment's word for a success, if it has one
        success = np.where(np.isnan(slots["success"]), total >= bar, slots["success"] > 0)
        metrics["eval/success_bar"] = bar
        metrics["eval/success"] = float(success.mean())
    return metrics


def save_video(setup: Setup, frames: list[np.ndarray], path: pathlib.Path) -> None:
    """Write pictures (H, W, 3) to an mp4."""
    path.parent.mkdir(exist_ok=True)
    import_module("imageio").mimsave(path, frames, fps=setup.env.fps)


# ----------------------------------------------------------------------------------------------- checkpoints
def deployed_policy(args: Args, actor: Actor, moments: Array) -> Callable:
    """The policy of --eval-mode as a function of raw observations (B, O) and standard normals.

    These are (B, A) for ode and (B, N + 1, A) for sde; moments (2, O) are those of the observations.
    """
    statistics = Statistics(jnp.zeros(()), moments)

    def policy(observation: Array, noise: Array) -> Array:
        observation = normalize(statistics, observation)
        if args.eval_mode == "ode":
            action = ode_action(actor, observation, noise, args.ode_score_scale)
        else:
            action = sample_chain(actor, observation, jnp.moveaxis(noise, 1, 0)).action
        return jnp.clip(action, -ACTION_LIMIT, ACTION_LIMIT)

    return policy


def write_policy(args: Args, policy: Callable, sizes: tuple[int, int], facts: dict[str, Any]) -> None:
    """Write a policy of O and A numbers to --export, with these facts and the run's as metadata."""
    observation_size, action_size = sizes
    noise = [action_size]
    if args.eval_mode == "sde":
        noise = [args.num_diffusion_steps + 1, action_size]
    with jax.disable_jit():  # unrolls the chain: a scan from N to 1 has no counterpart in ONNX
        model = import_module("jax2onnx").to_onnx(
            policy,
            inputs=[("B", observation_size), ("B", *noise)],
            input_names=["observation", "noise"],
            output_names=["action"],
        )
    for name in ("env_id", "eval_mode", "ode_score_scale", "num_diffusion_steps"):
        facts[name] = getattr(args, name)
    facts["script"] = SCRIPT
    facts["git_commit"] = git_commit()
    texts = {name: str(value) for name, value in facts.items()}
    onnx = import_module("onnx")
    onnx.helper.set_model_props(model, texts)
    try:
        onnx.save(model, args.export)
    except OSError as error:
        fail(f"--export {args.export} cannot be written ({error})")
    print(f"{args.export}: {texts}")


def export_policy(setup: Setup, state: TrainState) -> None:
    """Write the policy to --export, with actions as the environment's own box has them."""
    task = setup.env
    moments = state.statistics.moments
    policy = deployed_policy(setup.args, state.learner.actor, moments)
    half = (task.action_high - task.action_low) / 2
    middle = task.action_low + half

    def rescaled(observation: Array, noise: Array) -> Array:
        return middle + half * policy(observation, noise)

    facts = {
        "iteration": int(state.iteration),
        "action_low": task.action_low.tolist(),
        "action_high": task.action_high.tolist(),
    }
    write_policy(setup.args, rescaled, (task.observation_size, setup.action_size), facts)


def named_leaves(tree: Any) -> dict[str, Any]:
    """A tree's leaves by dotted names; without the empty ones, which Orbax refuses."""
    leaves = jax.tree.leaves_with_path(tree)
    return {leaf_name(path): leaf for path, leaf in leaves if leaf.size}


def leaf_name(path: Any) -> str:
    """Dotted name of a leaf, like learner.actor.input.kernel.value."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


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


# ------------------------------------------------------------------------------------------------ run folder
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


def find_folder(args: Args) -> pathlib.Path:
    """The folder of a new run, which is made, or of the one that is continued."""
    if args.resume:
        return pathlib.Path(args.resume)
    return name_folder(args, make_folder(args))


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


# -------------------------------------------------------------------------------------------------- training
class Compiled(NamedTuple):
    """Compiled functions. The first two take networks, statistics, raw observations (E, O) and a key."""

    sample: Callable  # chains of an actor, for a rollout
    choose: Callable  # actions (E, A) of a learner, for an evaluation
    update: Callable  # update_state, of a training state, which it takes over, and a rollout


def make_programs(setup: Setup) -> Compiled:
    """The functions that are compiled, as they are called first."""
    everywhere = NamedSharding(setup.mesh, P())
    sharded = NamedSharding(setup.mesh, P("env"))
    shardings = (everywhere, everywhere, sharded, everywhere)

    def sample(actor: Actor, statistics: Statistics, observation: Array, key: Array) -> Chain:
        return sample_policy(setup, actor, normalize(statistics, observation), key)

    def choose(learner: Learner, statistics: Statistics, observation: Array, key: Array) -> Array:
        inputs = same_inputs(normalize(statistics, observation))
        return evaluation_action(setup, learner, inputs, key)

    update_program = functools.partial(update_state, setup)
    return Compiled(
        sample=jax.jit(sample, in_shardings=shardings),
        choose=jax.jit(choose, in_shardings=shardings),
        update=jax.jit(update_program, out_shardings=everywhere, donate_argnums=0),
    )


def compile_all(
    setup: Setup, programs: Compiled, envs: Simulators, eval_envs: Simulators, state: TrainState
) -> Compiled:
    """Compile in advance what training uses. Environments that have not been reset stay idle meanwhile."""
    programs.choose(state.learner, state.statistics, eval_envs.slots["observation"], state.key)
    data, _ = collect(setup, programs.sample, envs, state)
    return programs._replace(update=programs.update.lower(state, data).compile())


def make_state(setup: Setup, saved: dict[str, Any]) -> TrainState:
    """The training state, new or a checkpoint's, on all devices."""
    init = functools.partial(new_state, setup)
    key = jax.random.PRNGKey(setup.args.seed)
    if saved:
        shapes = jax.eval_shape(init, key)
        state = fill_state(shapes, saved["state"])
    else:
        state = jax.jit(init)(key)
    return jax.device_put(state, NamedSharding(setup.mesh, P()))


def check_contract(metrics: dict[str, np.ndarray], done: int) -> None:
    """End a run whose rollout holds other chains than its actor has; Actor says what it must keep.

    In its first two iterations: while the output layer is 0, an actor ignores every latent.
    """
    kl = float(metrics["trust_region/initial_kl"].max())
    if kl > 1e-3:
        sys.exit(
            f"{SCRIPT}.py: iteration {done} began {kl:.3g} nats from the policy that made its rollout, "
            "not 0. The actor's output layer has to start at zero, its output may depend on no latent but "
            "a^n, and trajectory_kl of an actor from itself has to be 0."
        )


def not_finite(metrics: dict[str, float]) -> list[str]:
    """The names of the metrics that are not finite."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]


def keep_diverged(args: Args, state: TrainState, bad: list[str], done: int, folder: pathlib.Path) -> None:
    """Save the state of a run that cannot go on, and say which metrics are not finite."""
    kept = folder / "diverged"
    save_checkpoint(kept, jax.device_get(state), done * args.batch_size, {})
    print(f"iteration {done}: {', '.join(bad)} not finite; the state is in {kept}", file=sys.stderr)


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


def print_line(args: Args, metrics: dict[str, float], done: int, wall_time: float) -> None:
    """One line on stdout for an iteration."""
    eta = wall_time / 60 / done * (args.num_iterations - done)
    found = [f"{name} {value:.2f}" for name, value in metrics.items() if name.startswith("eval/")]
    line = f"step {done * args.batch_size:,}  SPS {metrics['charts/SPS']:,.0f}  ETA {eta:.1f} min"
    print(line, *found, sep="  ", flush=True)


def run_training(
    setup: Setup, programs: Compiled, envs: Simulators, eval_envs: Simulators, state: TrainState, saved: dict
) -> int:
    """The training loop; returns the process's exit code."""
    args = setup.args
    received = catch_signals()
    done = int(state.iteration)
    envs.reset(args.seed, done, 0, spread=True)
    folder = find_folder(args)
    open_run(folder, args)
    log = open_log(folder, done * args.batch_size)
    stop = 0
    bad: list[str] = []  # metrics that are not finite
    failure: Exception | None = None  # of a worker or an evaluation
    started = time.perf_counter() - float(saved.get("wall_time", 0.0))
    while done < args.num_iterations and not (bad or stop or failure):
        began = time.perf_counter()
        data, episodes = collect(setup, programs.sample, envs, state)
        state, updated = programs.update(state, data)
        updated = jax.device_get(updated)
        metrics = {name: float(value) for name, value in (updated | episodes).items()}
        metrics["charts/SPS"] = args.batch_size / (time.perf_counter() - began)
        done += 1
        step = done * args.batch_size
        last = done == args.num_iterations
        if done < 3:
            check_contract(updated, done)
        due = (last or done % args.eval_interval == 0) and not not_finite(metrics)
        try:
            envs.check()
            eval_envs.check()
            metrics |= play(setup, programs.choose, eval_envs, state, folder, received) if due else {}
        except Exception as error:  # raised once this iteration is logged and saved
            failure = error
        bad = not_finite(metrics)
        wall_time = time.perf_counter() - started
        log(step, wall_time, metrics)
        print_line(args, metrics, done, wall_time)

        stop = received[0] if received else 0
        if not bad and (last or stop or failure or done % args.checkpoint_interval == 0):
            wall_time = time.perf_counter() - started
            save_checkpoint(folder, jax.device_get(state), step, {"wall_time": np.float64(wall_time)})
    print(folder)
    if bad:
        keep_diverged(args, state, bad, done, folder)
        return 1
    if failure and not stop:  # a signal to the whole group ends the fork server, too
        raise failure
    return 128 + stop if stop else 0


def main() -> None:
    """Run; what a worker fails with is told without a traceback of this process."""
    try:
        code = run()
    except WorkerError as error:
        sys.exit(f"{SCRIPT}.py: error: {error}")
    sys.exit(code)


def run() -> int:
    """Parse, start workers, compile, then train, resume or evaluate; returns the process's exit code."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's messages; its errors are raised
    args = parse()
    folder = args.resume or args.evaluate
    saved = read_checkpoint(folder) if folder else {}
    if args.compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(args.compilation_cache_dir))
    if args.capture_video:
        os.environ.setdefault("MUJOCO_GL", "egl")
    for name, value in vars(args).items():
        print(f"{name}: {value}", flush=True)
    setup = load_setup(args)
    state = make_state(setup, saved)
    if args.export:
        export_policy(setup, state)
        return 0
    programs = make_programs(setup)
    eval_envs = Simulators(setup, args.num_eval_envs, find_render_mode(args))
    if args.evaluate:
        metrics = play(setup, programs.choose, eval_envs, state, pathlib.Path(args.evaluate))
        print(json.dumps(metrics))
        return 0
    began = time.perf_counter()
    envs = Simulators(setup, args.num_envs)
    programs = compile_all(setup, programs, envs, eval_envs, state)
    print(f"workers started, programs compiled in {time.perf_counter() - began:.1f} s", flush=True)
    return run_training(setup, programs, envs, eval_envs, state, saved)


if __name__ == "__main__":
    main()
