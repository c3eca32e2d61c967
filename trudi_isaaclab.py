# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "imageio[ffmpeg]>=2.34",
#     "mjlab==1.6.0",
#     "onnxscript>=0.7",
#     "tensorboard>=2.18",
#     "tensorboardx>=2.6.2",
#     "tensordict>=0.10",
#     "torch==2.13.0",
#     "tyro>=1.0",
#     "wandb>=0.19.10",
# ]
# ///
"""Trust-Region Diffusion Policies (TruDi, arXiv 2606.15260) on Isaac Lab 2.3 and 3.0 and mjlab, in one file.

    python trudi_isaaclab.py --env-id Isaac-Velocity-Rough-G1    # the paper's settings; needs Isaac Lab
    python trudi_isaaclab.py --env-id Mjlab-Cartpole-Balance --preset cpu   # a curve on two CPU cores
    torchrun --nproc-per-node 4 trudi_isaaclab.py --env-id Isaac-Velocity-Flat-H1   # on four GPUs

It has the order and the names of trudi_mjx.py. `# Eq. 181` marks where an equation of the paper is computed;
README.md has their table, benchmark/errata.md the paper's errata, E1 to E19. Axes in shapes: T steps of a
rollout, E environments, B states of a batch, N denoising steps, A action dimensions, O entries of an
observation, H hidden units. Latent actions go from a^N, noise, to a^0; an axis of N holds n = 1 ... N in
order.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from importlib import import_module, metadata, util
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro

SCRIPT = pathlib.Path(__file__).stem
RANK = int(os.environ.get("RANK", "0"))  # torchrun's number of this process
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # and how many it has started

# ----------------------------------------------------------------------------------------------- constants
TASKS = (
    "Isaac-Velocity-Flat-G1 Isaac-Velocity-Rough-G1 Isaac-Velocity-Flat-H1 Isaac-Velocity-Rough-H1 "
    "Isaac-Reorient-Cube-Allegro-Direct Isaac-Reorient-Cube-Shadow-Direct"
).split()
PAPER = dict(  # Table 5
    total_timesteps=300_000_000,
    num_envs=4096,
    num_steps=64,
    num_epochs=8,
    minibatch_size=2048,
    hidden_dim=512,
    actor_learning_rate=3e-4,
    critic_learning_rate=3e-4,
    dual_learning_rate=3e-4,
    target_entropy_scale=0.665,
    gamma=0.97,
    v_min=-10.0,
    v_max=10.0,
    eval_interval=50,
    checkpoint_interval=20,
)
CPU = PAPER | dict(  # measured on two cores, see benchmark/README.md
    total_timesteps=200_000,
    num_envs=32,
    minibatch_size=256,
    hidden_dim=64,
    actor_learning_rate=6e-4,
    critic_learning_rate=6e-4,
    dual_learning_rate=1.2e-3,
    eval_interval=10,
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
CALLS_BEFORE_GRAPH = 5  # of a program, before its CUDA graph is captured


# ------------------------------------------------------------------------------------------------ arguments
@dataclasses.dataclass(frozen=True)
class Args:
    """Train a TruDi agent. A flag whose default is None takes the value of --preset."""

    # Experiment
    env_id: str = "Isaac-Velocity-Rough-G1"
    """task of Isaac Lab or mjlab, or module:id of one that the module registers"""
    exp_name: str = SCRIPT
    """part of the run folder's name"""
    seed: int = 1
    """of everything: networks, noise, environments"""
    preset: Literal["paper", "cpu"] = "paper"
    """sizes: the paper's Table 5, or small ones for two CPU cores"""
    action_scale: float = 1.0
    """the simulator's boxes are unbounded, it gets [-this, this]; see benchmark/troubleshooting.md"""
    log_dir: str = "runs"
    """parent of the run folders"""

    # Rollouts and updates
    num_envs: int | None = None
    """parallel environments, over all processes (paper: 4096)"""
    num_steps: int | None = None
    """steps of each environment in a rollout (paper: 64)"""
    num_epochs: int | None = None
    """passes over a rollout (paper: 8)"""
    minibatch_size: int | None = None
    """states in a gradient step, over all processes (paper: 2048)"""
    gamma: float | None = None
    """discount (paper: 0.97)"""
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
    """width of actor and critic (paper: 512)"""
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
    """lowest atom of the critic (paper: -10)"""
    v_max: float | None = None
    """highest atom of the critic (paper: 10)"""
    num_atoms: int = 151
    """atoms of the critic"""

    # What may differ when a run is continued or evaluated; MAY_CHANGE lists it
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """where to run; gpu fails where there is none"""
    physics: str | None = None
    """engine of Isaac Lab 3.0, such as isaacsim_physx; default: the task's, mostly newton_mjwarp"""
    compile: bool | None = None
    """torch.compile and CUDA graphs; default: on a GPU only"""
    total_timesteps: int | None = None
    """environment steps, over all environments (paper: 300M)"""
    eval_mode: Literal["ode", "sde", "best-of-k"] = "ode"
    """how to act: the probability-flow ODE, a sample, or the best of K samples by Q"""
    ode_score_scale: float = 1.0
    """c of the ODE: 0.5 keeps the marginals, 1 is greedier"""
    best_of_k: int = 10
    """K of best-of-k"""
    eval_interval: int | None = None
    """iterations between evaluations; the last one is always followed by one (--preset paper: 50)"""
    checkpoint_interval: int | None = None
    """iterations between checkpoints; the last one is always followed by one (--preset paper: 20)"""
    video_length: int = 300
    """steps of a video"""
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
COMMAND_LINE_ONLY = ("export",)  # what a run's folder does not decide
MAY_CHANGE = (
    "device physics compile total_timesteps eval_mode ode_score_scale best_of_k eval_interval "
    "checkpoint_interval capture_video video_length track wandb_project_name wandb_entity resume evaluate "
    "export batch_size num_iterations"
).split()
EVALUATION_MAY_CHANGE = ("env_id", "num_envs")  # what a policy plays, and how often


def resolve(args: Args) -> Args:
    """Fill in what depends on the preset; exit with code 2 on what cannot run."""
    check_simulator(args.env_id)
    if args.physics and of_mjlab(args.env_id):
        fail(f"--physics {args.physics} is Isaac Lab's; mjlab's tasks have one engine")
    values = dict(PRESET[args.preset])
    values |= {name: value for name, value in vars(args).items() if value is not None}
    values["batch_size"] = values["num_envs"] * values["num_steps"]
    values["num_iterations"] = values["total_timesteps"] // max(values["batch_size"], 1)
    return dataclasses.replace(args, **values)


# ----------------------------------------------------------------------------------- validation of arguments
POSITIVE = (
    "action_scale num_envs num_steps num_epochs minibatch_size actor_learning_rate critic_learning_rate "
    "dual_learning_rate max_grad_norm hidden_dim num_diffusion_steps prior_std trust_region_bound num_atoms "
    "total_timesteps best_of_k eval_interval checkpoint_interval video_length"
).split()
SPLIT = "num_envs minibatch_size".split()  # over the processes


def of_mjlab(env_id: str) -> bool:
    """Whether a task is mjlab's and not Isaac Lab's."""
    return "Mjlab-" in env_id


def check_simulator(env_id: str) -> None:
    """Exit with code 2 on an id of no simulator, or of one that is not installed."""
    module, colon, name = env_id.rpartition(":")
    if not colon and not name.startswith(("Isaac-", "Mjlab-")):
        near = difflib.get_close_matches(name, TASKS, 3, 0.4) or TASKS[:3]
        fail(f"unknown --env-id {name}; the nearest are {', '.join(near)}")
    if of_mjlab(env_id) and not util.find_spec("mjlab"):
        fail(f"--env-id {env_id} needs mjlab; pip install mjlab==1.6.0")
    if not of_mjlab(env_id) and not util.find_spec("isaaclab"):
        fail(f"--env-id {env_id} needs isaaclab; pip install isaaclab==3.0.0, on Python 3.12 only")
    package = module.split(".")[0]
    if colon and not (package and util.find_spec(package)):
        fail(f"--env-id {env_id}: no module {package} on PYTHONPATH or beside {SCRIPT}.py")


def fail(message: str) -> None:
    """Refuse bad input: one line on stderr and exit code 2."""
    line = " ".join(message.split())
    print(f"{SCRIPT}.py: error: {line}", file=sys.stderr)
    sys.exit(2)


def flag(name: str) -> str:
    """A field of Args as it is written on the command line."""
    return "--" + name.replace("_", "-")


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
    if WORLD > 1:
        fail(f"--export is for one process, not {WORLD}")
    if not util.find_spec("onnxscript"):
        fail("--export needs onnxscript; pip install onnxscript")
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
    """Exit with code 2 on sizes that do not fill an iteration or do not divide over the processes."""
    if args.num_iterations == 0:
        fail(f"--total-timesteps {args.total_timesteps} is less than --num-envs x --num-steps")
    if not args.evaluate and args.batch_size % args.minibatch_size:
        sizes = f"--num-envs x --num-steps = {args.batch_size}"
        fail(f"--minibatch-size {args.minibatch_size} does not divide {sizes}")
    for name in SPLIT:
        value = getattr(args, name)
        if value % WORLD:
            fail(f"{flag(name)} {value} does not divide over {WORLD} processes")


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


def name_folder(args: Args, second: int) -> pathlib.Path:
    """The folder of a run that began in this second of Unix time."""
    return pathlib.Path(args.log_dir, f"{args.env_id}__{args.exp_name}__{args.seed}__{second}")


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


# ---------------------------------------------------------------------------------------------------- launch
def launch() -> tuple[Args, Any]:
    """Arguments and, with Isaac Lab 2.3, its app: Kit, which must start before PyTorch is imported."""
    args = parse()
    if of_mjlab(args.env_id):
        return args, None
    app = import_module("isaaclab.app")
    if hasattr(app, "launch_simulation"):  # 3.0, which launches in make_isaaclab
        return args, None
    device = "cpu" if args.device == "cpu" else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    launcher = app.AppLauncher(headless=True, device=device, enable_cameras=args.capture_video)
    return args, launcher.app


STARTED = launch() if __name__ == "__main__" else None

import tensorboardX
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------- environments
Metrics = dict[str, Tensor]  # by the names under which they are logged


class Setup(NamedTuple):
    """What stays constant while training."""

    args: Args
    device: torch.device
    env: Any  # E environments
    eval_env: Any  # those for evaluation
    observation_size: int  # O
    actor_sees: int  # so many columns of an observation, the first ones
    critic_sees: int  # so many, the last ones
    action_size: int


class Outcome(NamedTuple):
    """What comes of a step of E environments."""

    reward: Tensor  # (E,)
    terminated: Tensor  # (E,)
    truncated: Tensor  # (E,), and not terminated
    next_observation: Tensor  # (E, O), the true one, also where an episode ended


class IsaacLab:
    """E environments of Isaac Lab or mjlab, which write into the same tensors at every step."""

    def __init__(self, args: Args, env: Any):
        groups, _ = env.reset()
        for x in groups.values():
            if not isinstance(x, Tensor) or x.ndim != 2:
                fail(f"{args.env_id} must have vectors for observation groups")
        space = getattr(env, "single_action_space", None)  # which several agents have not
        if len(getattr(space, "shape", None) or ()) != 1 or hasattr(space, "nvec"):  # numbers of choices
            fail(f"{args.env_id} must have continuous actions, a vector of them")
        self.args = args
        self.env = env
        self.time_limit = env.max_episode_length
        self.finite_horizon = getattr(env.cfg, "is_finite_horizon", False)  # time-outs belong to the task
        self.groups = [name for name in ("policy", "actor", "critic") if name in groups]
        if not self.groups:
            fail(f"{args.env_id} must have an observation group policy or actor, not {', '.join(groups)}")
        self.actor_sees = groups[self.groups[0]].shape[-1]
        self.critic_sees = groups[self.groups[-1]].shape[-1]  # the same group if there is but one
        self.observation = self.observe(groups)  # (E, O), to act on next

    def observe(self, groups: dict[str, Tensor]) -> Tensor:
        """Observations (E, O) of both networks: the actor's group and, if there is one, the critic's."""
        return torch.cat([groups[name] for name in self.groups], -1)

    def observation_terms(self) -> list[str]:
        """The terms of the actor's observation in order, with their sizes; none if the task does not tell."""
        manager = getattr(self.env.unwrapped, "observation_manager", None)
        if manager is None:
            return []
        group = self.groups[0]
        pairs = zip(manager.active_terms[group], manager.group_obs_term_dim[group], strict=True)
        return [f"{name}: {math.prod(shape)}" for name, shape in pairs]

    def reset(self, spread: bool) -> None:
        """Start all episodes; `spread` starts clocks anywhere in one, so that time-outs do not coincide."""
        with self.keep_curriculum():
            groups, _ = self.env.reset()
        self.observation = self.observe(groups)
        # (E, 2), return and length so far; NaN in an episode that was not seen from its start.
        self.episode = self.observation.new_full((len(self.observation), 2), torch.nan if spread else 0.0)
        self.ended: list[Tensor] = []  # (E, 2) a step, the episodes that ended; NaN where none did
        self.logs: dict[str, list[Tensor]] = {}  # the simulator's own metrics of them
        self.env.episode_length_buf.random_(self.time_limit if spread else 1)

    @contextlib.contextmanager
    def keep_curriculum(self) -> Iterator[None]:
        """Resets in it change no curriculum, which would take broken-off episodes for whole ones."""
        manager = getattr(self.env, "curriculum_manager", None)
        if manager is None:
            yield
            return
        compute = manager.compute
        manager.compute = lambda *_, **__: None
        yield
        manager.compute = compute

    def step(self, action: Tensor) -> Outcome:
        """Step, end and restart episodes; actions (E, A)."""
        before = self.observation
        groups, reward, terminated, late, extras = self.env.step(self.args.action_scale * action)
        reward = reward.clone()
        ended = terminated | late
        terminated = ended if self.finite_horizon else terminated.clone()
        after = self.observe(groups)
        self.observation = after.clone()
        self.episode = self.episode + torch.stack([reward, torch.ones_like(reward)], -1)
        self.ended.append(torch.where(ended[:, None], self.episode, torch.nan))
        if bool(ended.any()):  # a read from the device; mjlab takes another to restart episodes
            after = self.restart_ended(ended, before, after, extras)
            self.log(extras.get("log", {}))  # which mjlab fills in as it restarts them
        return Outcome(reward, terminated, ended & ~terminated, after)

    def restart_ended(self, ended: Tensor, before: Tensor, after: Tensor, extras: dict[str, Any]) -> Tensor:
        """Go on with new episodes where one ended (E,); returns `after` with their true last observations."""
        self.episode[ended] = 0.0
        if not getattr(self.env.cfg, "auto_reset", True):  # mjlab
            groups, _ = self.env.reset(env_ids=ended.nonzero()[:, 0])
            self.observation = torch.where(ended[:, None], self.observe(groups), self.observation)
            return after
        # Isaac Lab 2.3 does not tell how an episode ended: a time-out bootstraps from the state before.
        last = self.observe(extras["final_obs"]) if "final_obs" in extras else before
        return torch.where(ended[:, None], last, after)

    def log(self, metrics: dict[str, Any]) -> None:
        """Keep the simulator's own metrics of the episodes that ended at a step."""
        for name, value in metrics.items():
            value = value.float().mean() if isinstance(value, Tensor) else float(value)
            self.logs.setdefault(name, []).append(value)

    def episode_metrics(self) -> Metrics:
        """Of all episodes that ended since the last call; without any there are no means."""
        metrics = {}
        for name, values in self.logs.items():
            mean = torch.stack(values).mean() if isinstance(values[0], Tensor) else np.mean(values)
            metrics[name] = torch.as_tensor(mean, dtype=torch.float32, device=self.observation.device)
        episodes = everywhere(torch.stack(self.ended, 1))  # (E, T, 2)
        whole = episodes[..., 1].isfinite()
        metrics["charts/episodes"] = whole.sum()
        if whole.any():
            mean = episodes[whole].mean(0)
            metrics["charts/episodic_return"] = mean[0]
            metrics["charts/episodic_length"] = mean[1]
        self.ended = []
        self.logs = {}
        return metrics

    def play(self, policy: Callable, iteration: int, folder: pathlib.Path) -> Metrics:
        """Metrics of an episode of each environment; films one. Training's episodes end."""
        film = self.args.capture_video and RANK == 0
        stride = math.ceil(1 / (30 * self.env.step_dt))  # at most 30 frames a second
        frames = []
        self.reset(spread=False)
        first = torch.full_like(self.episode, torch.nan)
        for step in range(self.time_limit):
            action = policy(self.observation)
            if film and step < self.args.video_length and step % stride == 0:
                frames.append(self.render())
                print(f"video: step {step} of at most {self.args.video_length}", flush=True)
            self.step(action)
            first = torch.where(first[:, 1:].isnan(), self.ended[-1], first)
            if first[:, 1].isfinite().all():
                break
        first = torch.where(first[:, 1:].isnan(), self.episode, first)  # that go on beyond the time limit
        if film:
            path = folder / "videos" / f"iteration_{iteration}.mp4"
            path.parent.mkdir(exist_ok=True)
            import_module("imageio").mimsave(path, frames, fps=1 / (stride * self.env.step_dt))
        self.reset(spread=True)
        episodes = everywhere(first)
        total = episodes[:, 0]
        return {
            "eval/episodic_return": total.mean(),
            "eval/episodic_return_std": total.std(correction=0),
            "eval/episodic_length": episodes[:, 1].mean(),
        }

    def render(self) -> np.ndarray:
        """A picture, of Isaac Lab 3.0's viewer where there is one."""
        viewers = getattr(self.env.sim, "visualizers", None)
        return viewers[0].render_rgb_array() if viewers else self.env.render()


def find_task(env_id: str, registered: Callable) -> str:
    """A task's name in what is installed, after its module is imported; exits with code 2 without one."""
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            import_module(module)
        except ImportError as error:
            fail(f"--env-id {env_id}: {module} cannot be imported ({error})")
    new_name = name.removesuffix("-v0").replace("Repose", "Reorient")  # in Isaac Lab 3.0
    old_name = name.replace("Reorient", "Repose") + "-v0"  # in 2.3
    tasks = registered()
    for found in (name, new_name, old_name):
        if found in tasks:
            return found
    near = difflib.get_close_matches(name, tasks, 3, 0.4)
    return fail(f"unknown --env-id {env_id}; the nearest installed are {', '.join(near) or 'none'}")


def make_mjlab(args: Args, device: str, seed: int, stack: ExitStack) -> Any:
    """This process's environments of mjlab; the stack closes them. Exits with code 2 if there are none."""
    registry = import_module("mjlab.tasks.registry")
    envs = import_module("mjlab.envs")
    import_module("mjlab.tasks")
    cfg = registry.load_env_cfg(find_task(args.env_id, registry.list_tasks))
    cfg.scene.num_envs = args.num_envs // WORLD
    cfg.seed = seed
    cfg.auto_reset = False  # only so does it say how episodes end
    try:
        env = envs.ManagerBasedRlEnv(cfg, device, "rgb_array" if args.capture_video else None)
    except OSError as error:  # some want a file, of motions for instance
        fail(f"--env-id {args.env_id} cannot be made ({type(error).__name__}: {error})")
    return stack.enter_context(closing(env))


def make_isaaclab(args: Args, device: str, seed: int, kit: Any, stack: ExitStack) -> Any:
    """This process's environments of Isaac Lab; the stack closes them, and 3.0's simulator."""
    gym = import_module("gymnasium")
    tasks = import_module("isaaclab_tasks.utils")
    name = find_task(args.env_id, gym.registry.keys)
    engine = {"overrides": [f"physics={args.physics}"]} if args.physics else {}
    try:
        cfg = tasks.parse_env_cfg(name, device=device, num_envs=args.num_envs // WORLD, **engine)
    except (TypeError, ValueError) as error:  # the former of 2.3, which has one engine
        what = f"--physics {args.physics}" if args.physics else "its configuration"
        fail(f"{name} cannot be made, for {what} ({error})")
    cfg.seed = seed
    cfg.compute_final_obs = True  # unread by 2.3
    if args.capture_video and not kit:
        viewer = import_module("isaaclab_visualizers.newton").NewtonGLVisualizerCfg
        cfg.sim.visualizer_cfgs = [viewer(headless=True, window_width=640, window_height=480)]
    if not kit:
        launch_simulation = import_module("isaaclab.app").launch_simulation
        stack.enter_context(launch_simulation(cfg, {"device": device}))
    env = gym.make(name, cfg=cfg, render_mode="rgb_array" if kit and args.capture_video else None)
    return stack.enter_context(closing(env)).unwrapped


def setup_for(args: Args, device: torch.device, env: IsaacLab) -> Setup:
    """Environments that are trained and evaluated in, in turn."""
    return Setup(
        args=args,
        device=device,
        env=env,
        eval_env=env,
        observation_size=env.observation.shape[-1],
        actor_sees=env.actor_sees,
        critic_sees=env.critic_sees,
        action_size=env.env.single_action_space.shape[-1],
    )


# ---------------------------------------------------------------------------------------------- observations
class Statistics(NamedTuple):
    """Running mean and variance of every entry of an observation."""

    count: int
    mean: Tensor  # (O,)
    variance: Tensor  # (O,)


def init_statistics(setup: Setup) -> Statistics:
    """Of no observation yet."""
    zeros = torch.zeros(setup.observation_size, device=setup.device)
    return Statistics(0, zeros, zeros.clone())


def update_statistics(statistics: Statistics, observation: Tensor) -> Statistics:
    """Merge observations (T, E, O) of all processes: Welford's update for batches (Chan et al., 1979)."""
    x = everywhere(observation.flatten(0, 1))
    count = statistics.count + len(x)
    weight = len(x) / count
    delta = x.mean(0) - statistics.mean
    variance = (1 - weight) * (statistics.variance + weight * delta**2) + weight * x.var(0, correction=0)
    return Statistics(count, statistics.mean + weight * delta, variance)


def normalize(statistics: Statistics, observation: Tensor) -> Tensor:
    """Standardise an observation, clipped at 10; the 1e-2 keeps entries that hardly vary from blowing up."""
    centered = observation - statistics.mean
    return (centered / torch.sqrt(statistics.variance + 1e-2)).clamp(-10, 10)


# -------------------------------------------------------------------------------------------------- networks
def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer as flax makes it: normal weights of variance 1 / inputs, cut at two deviations."""
    layer = nn.Linear(inputs, outputs)
    std = inputs**-0.5 / 0.87962566  # of the normal that has variance 1 / inputs once it is cut
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)
    return layer


class Actor(nn.Module):
    """The network f_theta(a^n, s, n), twice the correction to the prior's score, and the step sizes h^n.

    What a replacement must keep: `prior_std`, `step_sizes`, `embed` and `forward`; `raw_friction`, whose size
    is that of an action; that f depends on no latent action but a^n, since `trajectory_kl` asks for all steps
    of a stored chain at once; and an output layer that starts at zero, since `iterate` normalises the first
    rollout with statistics that the actor had not when it acted. The first iterations of a run check the
    last two.

    Observations come whole, and the actor sees their first columns. Every parameter must be used, or the
    gradients' call fails; nothing switches between training and evaluation, as dropout would need.
    """

    def __init__(self, args: Args, observation_size: int, action_size: int):
        super().__init__()
        self.prior_std = args.prior_std
        self.parts = [observation_size, action_size, TIME_FEATURES]  # of the first layer's input
        self.register_buffer("n", torch.arange(1, args.num_diffusion_steps + 1)[:, None], persistent=False)
        width = args.hidden_dim
        gelu = nn.GELU("tanh")  # JAX's form of it
        layers = [linear(TIME_FEATURES, TIME_FEATURES), gelu, linear(TIME_FEATURES, TIME_FEATURES)]
        self.time_mlp = nn.Sequential(*layers)
        self.input = linear(sum(self.parts), width)
        self.blocks = nn.ModuleList()
        for _ in range(3):
            self.blocks.append(nn.Sequential(nn.LayerNorm(width, 1e-6), linear(width, width), gelu))
        self.output = linear(width, action_size)
        nn.init.zeros_(self.output.weight)
        raw_friction = torch.full((action_size,), math.log(math.e - 1))  # softplus makes it 1
        self.raw_friction = nn.Parameter(raw_friction, requires_grad=args.learn_friction)

    def step_sizes(self) -> Tensor:
        """h^n for n = 1 ... N, (N, A): a cosine schedule divided by the friction b of each action."""
        n = self.n / len(self.n)
        cosine = torch.cos(math.pi / 2 * (1 + SCHEDULE_SHIFT - n) / (1 + SCHEDULE_SHIFT)) ** 2
        kappa = (1 - KAPPA_MIN) * cosine + KAPPA_MIN
        return STEP_SIZE * kappa / F.softplus(self.raw_friction)

    def split_first_layer(self) -> tuple[Tensor, ...]:
        """The weight that acts on concat(s, a^n, time), as a weight for each of the three."""
        return self.input.weight.split(self.parts, 1)

    def embed(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """What stays the same along a chain: the first layer on observations, (B, H), and on n, (N, H)."""
        half = TIME_FEATURES // 2
        angle = self.n * 10000.0 ** (-torch.arange(half, device=self.n.device) / half)
        features = self.time_mlp(torch.cat([angle.sin(), angle.cos()], -1))
        observation_weight, _, time_weight = self.split_first_layer()
        own = observation[..., : self.parts[0]]  # the actor sees the first columns of an observation
        return F.linear(own, observation_weight, self.input.bias), F.linear(features, time_weight)

    def forward(self, observation_part: Tensor, time_part: Tensor, latent: Tensor) -> Tensor:
        """f_theta at latents (..., A), with what `embed` returned, broadcast to (..., H)."""
        _, latent_weight, _ = self.split_first_layer()
        x = observation_part + time_part + F.linear(latent, latent_weight)
        for block in self.blocks:
            x = x + block(x)
        return self.output(x)


class Critic(nn.Module):
    """Categorical distributions of the return, whose mean is Q(s, u)."""

    def __init__(self, args: Args, observation_size: int, action_size: int):
        super().__init__()
        self.observation_size = observation_size
        width = args.hidden_dim
        self.blocks = nn.ModuleList()
        for size in (observation_size + action_size, width, width):
            self.blocks.append(nn.Sequential(linear(size, width), nn.LayerNorm(width, 1e-6), nn.SiLU()))
        self.output = linear(width, args.num_atoms)
        self.output.bias.data = PRIOR_LOGITS * hl_gauss(args, torch.zeros(()))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Logits (B, atoms)."""
        own = observation[..., -self.observation_size :]  # the critic sees the last columns
        x = torch.cat([own, action], -1)
        for block in self.blocks:
            x = block(x)
        return self.output(x)


# ------------------------------------------------------------------------------------------- diffusion chain
class Trajectory(NamedTuple):
    """What the trust region needs of a chain: the latents a policy went through, and where it aimed."""

    latents: Tensor  # (B, N, A), a^1 ... a^N
    means: Tensor  # (B, N, A), of a^0 ... a^(N-1)


class Chain(NamedTuple):
    """A sample of the policy at B states."""

    action: Tensor  # (B, A), u = tanh(a^0)
    entropy_bound: Tensor  # (B,), a sample of l(s)
    trajectory: Trajectory


def sample_chain(actor: Actor, observation: Tensor, noise: Tensor) -> Chain:
    """Sample the policy, reparameterised: observations (B, O), normals (N + 1, B, A), noise[n] for a^n."""
    observation_part, time_part = actor.embed(observation)
    h = actor.step_sizes()[:, None]  # (N, 1, A)
    std = torch.sqrt(2 * h)
    prior_std = actor.prior_std

    latents = [prior_std * noise[-1]]  # a^N ... a^0
    means = []
    steps = list(zip(h, std, time_part, noise[:-1], strict=True))
    for h_n, std_n, time_n, noise_n in reversed(steps):
        latent = latents[-1]
        drift = actor(observation_part, time_n, latent) - latent / prior_std**2
        mean = latent + h_n * drift  # Eq. 186, discretising Eq. 5
        means.append(mean)
        latents.append(mean + std_n * noise_n)  # Eq. 31
    latents = torch.stack(latents[::-1])  # a^0 ... a^N
    means = torch.stack(means[::-1])

    # Twice the log-densities of a^(n-1) given a^n and of a^n given a^(n-1), less the normaliser of both.
    log_generative = -(noise[:-1] ** 2)
    residual = latents[1:] - latents[:-1] * (1 - h / prior_std**2)
    log_noising = -(residual**2) / (2 * h)  # Eq. 6, discretising Eq. 4
    log_ratio = 0.5 * (log_noising - log_generative).sum(0)
    log_prior = -0.5 * noise[-1] ** 2 - math.log(prior_std * math.sqrt(2 * math.pi))
    # Of 1 - tanh^2, in a form that is finite where tanh rounds to 1.
    last = latents[0]
    tanh_log_det = 2 * (math.log(2.0) - last - F.softplus(-2 * last))
    entropy_bound = log_ratio - log_prior + tanh_log_det  # Eq. 117, Eq. 180 (E1: its sign)
    trajectory = Trajectory(latents[1:].transpose(0, 1), means.transpose(0, 1))
    return Chain(torch.tanh(last), entropy_bound.sum(-1), trajectory)


def ode_action(actor: Actor, observation: Tensor, noise: Tensor, score_scale: float) -> Tensor:
    """Actions (B, A) of the probability-flow ODE with scaled score, from standard normals (B, A)."""
    observation_part, time_part = actor.embed(observation)
    variance = actor.prior_std**2
    latent = actor.prior_std * noise
    steps = list(zip(actor.step_sizes(), time_part, strict=True))
    for h_n, time_n in reversed(steps):
        score = -latent / variance + actor(observation_part, time_n, latent) / 2
        latent = latent + h_n * (latent / variance + 2 * score_scale * score)  # Eq. 185, Eq. 187
    return torch.tanh(latent)


def trajectory_kl(actor: Actor, old_actor: Actor, observation: Tensor, trajectory: Trajectory) -> Tensor:
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
    kl = 0.5 * (old_h / h - 1 - torch.log(old_h / h) + (means - new_means) ** 2 / (2 * h))
    return kl.sum((-2, -1))  # Eq. 178, which by Eq. 135 and Eq. 152 bounds Eq. 57


# ---------------------------------------------------------------------------------------- critic and targets
def hl_gauss(args: Args, returns: Tensor) -> Tensor:
    """Targets (..., atoms) of returns (...), clipped to the atoms' range: a Gaussian's mass per atom."""
    width = (args.v_max - args.v_min) / (args.num_atoms - 1)
    lowest = args.v_min - width / 2
    highest = args.v_max + width / 2
    edges = torch.linspace(lowest, highest, args.num_atoms + 1, device=returns.device)
    clipped = returns.clamp(args.v_min, args.v_max)[..., None]
    cdf = torch.special.ndtr((edges - clipped) / (HL_GAUSS_SIGMA * width))
    return torch.diff(cdf) / (cdf[..., -1:] - cdf[..., :1])


def q_value(args: Args, logits: Tensor) -> Tensor:
    """Q (...) of the critic's logits (..., atoms)."""
    atoms = torch.linspace(args.v_min, args.v_max, args.num_atoms, device=logits.device)
    return torch.softmax(logits, -1) @ atoms


def lambda_returns(
    args: Args, reward: Tensor, terminated: Tensor, truncated: Tensor, value: Tensor, bonus: Tensor
) -> Tensor:
    """Soft lambda-returns, everything (T, E); `value` is Q and `bonus` alpha l at next_observation."""
    targets = torch.empty_like(reward)
    later = value[-1]  # it bootstraps where the rollout ends
    for t in reversed(range(len(reward))):
        mixture = (1 - args.td_lambda) * value[t] + args.td_lambda * later
        mixture = torch.where(truncated[t], value[t], mixture)
        # Chosen, not multiplied by 0: what follows a termination may be NaN.
        future = torch.where(terminated[t], 0.0, bonus[t] + mixture)
        later = reward[t] + args.gamma * future  # Eq. 118, Eq. 179 (E2, E12)
        targets[t] = later
    return targets


# ---------------------------------------------------------------------------------------- losses and updates
UPDATE_METRICS = "losses/critic losses/actor entropy/bound trust_region/kl trust_region/violated".split()


class Learner(NamedTuple):
    """All that learns, which updates change in place, and the actor of the rollout that it learns from."""

    actor: Actor
    critic: Critic
    log_duals: nn.ParameterList  # log alpha and log lambda
    actor_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    dual_optimizer: torch.optim.Optimizer
    old_actor: Actor  # a copy of `actor` that every iteration makes anew; checkpoints are without it


class Batch(NamedTuple):
    """B states of a rollout."""

    observation: Tensor  # (B, O), normalised
    action: Tensor  # (B, A), clipped
    trajectory: Trajectory  # of the old actor
    target: Tensor  # (B,), lambda-returns


def init_learner(setup: Setup) -> Learner:
    """Networks, duals and Adam from the seed, the same in every process."""
    args = setup.args
    torch.manual_seed(args.seed)
    actor = Actor(args, setup.actor_sees, setup.action_size).to(setup.device)
    critic = Critic(args, setup.critic_sees, setup.action_size).to(setup.device)
    log_dual = torch.full((), math.log(INITIAL_DUAL), device=setup.device)
    log_duals = nn.ParameterList([log_dual.clone(), log_dual.clone()])
    learned = [parameter for parameter in actor.parameters() if parameter.requires_grad]
    adam = functools.partial(torch.optim.Adam, fused=True, capturable=True)  # capturable by CUDA graphs
    return Learner(
        actor=actor,
        critic=critic,
        log_duals=log_duals,
        actor_optimizer=adam(learned, args.actor_learning_rate),
        critic_optimizer=adam(critic.parameters(), args.critic_learning_rate),
        dual_optimizer=adam(log_duals.parameters(), args.dual_learning_rate),
        old_actor=copy.deepcopy(actor).requires_grad_(False),
    )


def critic_loss(critic: Critic, args: Args, batch: Batch) -> Tensor:
    """Cross-entropy from the HL-Gauss targets to the critic's distribution."""
    logits = critic(batch.observation, batch.action)
    return F.cross_entropy(logits, hl_gauss(args, batch.target))


def actor_loss(
    learner: Learner, args: Args, batch: Batch, noise: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The split loss, and l and c of every state (B,); noise is (N + 1, B, A)."""
    actor = learner.actor
    alpha = learner.log_duals[0].detach().exp()
    lambda_ = learner.log_duals[1].detach().exp()
    chain = sample_chain(actor, batch.observation, noise)
    q = q_value(args, learner.critic(batch.observation, chain.action))
    soft_q_loss = -alpha * chain.entropy_bound - q  # Eq. 182, which descends Eq. 161, a bound by Eq. 92
    kl = trajectory_kl(actor, learner.old_actor, batch.observation, batch.trajectory)
    inside = kl <= args.trust_region_bound
    loss = torch.where(inside, soft_q_loss, lambda_ * kl)  # Eq. 181: one of two losses per state
    return loss.mean(), (chain.entropy_bound.detach(), kl.detach())


def dual_loss(
    log_duals: nn.ParameterList, args: Args, entropy_bound: Tensor, kl: Tensor, action_size: int
) -> Tensor:
    """Alpha falls while the policy is noisier than its target; lambda grows while the region is violated."""
    target_entropy = -args.target_entropy_scale * action_size
    surplus = entropy_bound.mean() - target_entropy
    excess = kl.mean() - args.trust_region_bound
    alpha_loss = log_duals[0].exp() * surplus  # Eq. 183
    lambda_loss = -log_duals[1].exp() * excess  # Eq. 184 (E4)
    return alpha_loss + lambda_loss


def add_up(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The sums of all processes' gradients, which travel together: calls cost more than numbers."""
    flat = nn.utils.parameters_to_vector(gradients)
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float = math.inf) -> None:
    """One step down a loss's gradient, averaged over the processes and clipped by its global norm."""
    parameters = optimizer.param_groups[0]["params"]
    gradients = torch.autograd.grad(loss / WORLD, parameters)
    if WORLD > 1:
        gradients = add_up(gradients)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.contiguous()
    nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()


def update_minibatch(args: Args, learner: Learner, batch: Batch, noise: Tensor) -> Tensor:
    """One gradient step each of critic, actor and duals; returns the numbers of UPDATE_METRICS."""
    value = critic_loss(learner.critic, args, batch)
    descend(learner.critic_optimizer, value, args.max_grad_norm)

    # The actor climbs the critic that has just been updated.
    loss, (entropy_bound, kl) = actor_loss(learner, args, batch, noise)
    descend(learner.actor_optimizer, loss, args.max_grad_norm)

    action_size = batch.action.shape[-1]
    descend(learner.dual_optimizer, dual_loss(learner.log_duals, args, entropy_bound, kl, action_size))

    violated = (kl > args.trust_region_bound).float()
    return torch.stack([value.detach(), loss.detach(), entropy_bound.mean(), kl.mean(), violated.mean()])


def take_rows(batch: Batch, rows: Tensor) -> Batch:
    """The states of a batch that have these numbers."""
    return Batch(
        observation=batch.observation[rows],
        action=batch.action[rows],
        trajectory=Trajectory(*(x[rows] for x in batch.trajectory)),
        target=batch.target[rows],
    )


class Programs(NamedTuple):
    """The two functions that take the time, bound to a learner and, with --compile, compiled."""

    sample_policy: Callable  # of normalised observations (B, O)
    update_minibatch: Callable  # of a Batch and noise (N + 1, B, A)


@torch.enable_grad()
def update_epochs(setup: Setup, programs: Programs, data: Batch) -> Metrics:
    """All epochs of shuffled minibatches of a rollout (E * T, ...); metrics are means over the last epoch."""
    args = setup.args
    size = len(data.action)
    order = torch.cat([torch.randperm(size, device=setup.device) for _ in range(args.num_epochs)])
    minibatches = order.split(args.minibatch_size // WORLD)
    found = []
    for rows in minibatches:
        shape = (args.num_diffusion_steps + 1, len(rows), setup.action_size)
        noise = torch.randn(shape, device=setup.device)
        found.append(programs.update_minibatch(take_rows(data, rows), noise))
    minibatches_per_epoch = len(minibatches) // args.num_epochs
    means = torch.stack(found[-minibatches_per_epoch:]).mean(0)
    return dict(zip(UPDATE_METRICS, means, strict=True))


# ------------------------------------------------------------------------------------------------- iteration
class Transition(NamedTuple):
    """A rollout."""

    observation: Tensor  # (T, E, O), raw
    action: Tensor  # (T, E, A), clipped
    trajectory: Trajectory  # (T, E, N, A), of the policy that acted
    reward: Tensor  # (T, E)
    terminated: Tensor  # (T, E)
    truncated: Tensor  # (T, E)
    next_observation: Tensor  # (T, E, O), raw; the true one, also where an episode ended


class TrainState(NamedTuple):
    """What a checkpoint holds; simulators cannot be saved."""

    learner: Learner
    statistics: Statistics
    iteration: int


def empty_trajectory(setup: Setup, *axes: int) -> Trajectory:
    """Storage of chains at states (*axes), as one sample of the policy fills it."""
    chain = (*axes, setup.args.num_diffusion_steps, setup.action_size)
    return Trajectory(torch.zeros(chain, device=setup.device), torch.zeros(chain, device=setup.device))


def empty_rollout(setup: Setup) -> Transition:
    """Storage of a rollout."""
    args = setup.args
    size = (args.num_steps, *setup.env.observation.shape)
    steps = size[:2]
    empty = functools.partial(torch.empty, device=setup.device)
    return Transition(
        observation=empty(size),
        action=empty(*steps, setup.action_size),
        trajectory=empty_trajectory(setup, *steps),
        reward=empty(steps),
        terminated=empty(steps, dtype=torch.bool),
        truncated=empty(steps, dtype=torch.bool),
        next_observation=empty(size),
    )


def sample_policy(args: Args, actor: Actor, observation: Tensor) -> Chain:
    """Chains of the actor at normalised observations (B, O)."""
    shape = (args.num_diffusion_steps + 1, len(observation), actor.raw_friction.numel())
    return sample_chain(actor, observation, torch.randn(shape, device=observation.device))


def rollout(setup: Setup, programs: Programs, statistics: Statistics) -> Transition:
    """Act for T steps with samples of the policy, keeping their trajectories."""
    data = empty_rollout(setup)
    for t in range(setup.args.num_steps):
        observation = setup.env.observation
        chain = programs.sample_policy(normalize(statistics, observation))
        action = chain.action.clamp(-ACTION_LIMIT, ACTION_LIMIT)
        data.observation[t] = observation
        data.action[t] = action
        for storage, x in zip(data.trajectory, chain.trajectory, strict=True):
            storage[t] = x

        outcome = setup.env.step(action)
        data.reward[t] = outcome.reward
        data.terminated[t] = outcome.terminated
        data.truncated[t] = outcome.truncated
        data.next_observation[t] = outcome.next_observation
    return data


def critic_targets(
    setup: Setup, programs: Programs, learner: Learner, data: Transition, next_observation: Tensor
) -> Tensor:
    """Soft lambda-returns (T, E), with a fresh action at every true next observation, which is normalised."""
    alpha = learner.log_duals[0].exp()
    value = torch.empty_like(data.reward)
    bonus = torch.empty_like(data.reward)
    for t, observation in enumerate(next_observation):
        chain = programs.sample_policy(observation)
        value[t] = q_value(setup.args, learner.critic(observation, chain.action))
        bonus[t] = alpha * chain.entropy_bound
    return lambda_returns(setup.args, data.reward, data.terminated, data.truncated, value, bonus)


def flatten_rollout(x: Tensor) -> Tensor:
    """(T, E, ...) as (E * T, ...)."""
    return x.swapaxes(0, 1).flatten(0, 1)


def update(
    setup: Setup,
    programs: Programs,
    learner: Learner,
    data: Transition,
    observation: Tensor,
    next_observation: Tensor,
) -> Metrics:
    """Learn from a rollout, whose observations and true next ones (T, E, O) are given normalised."""
    args = setup.args
    actor = learner.actor
    old_actor = learner.old_actor
    target = critic_targets(setup, programs, learner, data, next_observation)
    batch = Batch(
        observation=flatten_rollout(observation),
        action=flatten_rollout(data.action),
        trajectory=Trajectory(*map(flatten_rollout, data.trajectory)),
        target=flatten_rollout(target),
    )

    # KL of the whole iteration, on as many states as a minibatch has: on stored chains, and on fresh ones.
    order = torch.randperm(len(batch.action), device=setup.device)
    some = take_rows(batch, order[: args.minibatch_size // WORLD])
    fresh = sample_policy(args, old_actor, some.observation)
    metrics = update_epochs(setup, programs, batch)
    stored_kl = trajectory_kl(actor, old_actor, some.observation, some.trajectory)
    fresh_kl = trajectory_kl(actor, old_actor, some.observation, fresh.trajectory)
    initial_kl = trajectory_kl(old_actor, old_actor, some.observation, some.trajectory)
    return metrics | {
        "trust_region/stored_kl": stored_kl.mean(),
        "trust_region/fresh_kl": fresh_kl.mean(),
        "trust_region/initial_kl": initial_kl.mean(),  # 0: see check_contract
        "trust_region/lambda": learner.log_duals[1].exp(),
        "entropy/alpha": learner.log_duals[0].exp(),
        "entropy/friction": F.softplus(actor.raw_friction).mean(),
        "critic/target": target.mean(),
        "critic/targets_clipped": ((target < args.v_min) | (target > args.v_max)).float().mean(),
    }


def seed_noise(args: Args, *numbers: int) -> None:
    """Seed PyTorch's noise from the run's seed, this process and more, such as the iteration.

    So evaluations do not disturb it, and a run that is continued needs no other state.
    """
    sequence = np.random.SeedSequence([args.seed, RANK, *numbers])
    torch.manual_seed(int(sequence.generate_state(1)[0]))


@torch.no_grad()
def iterate(setup: Setup, programs: Programs, state: TrainState) -> tuple[TrainState, Metrics]:
    """One iteration: rollout, targets, epochs of updates, observation statistics."""
    seed_noise(setup.args, state.iteration)
    learner = state.learner
    learner.old_actor.load_state_dict(learner.actor.state_dict())
    data = rollout(setup, programs, state.statistics)

    # The untrained actor ignores what it observes, its output layer being 0, so the first rollout may seed
    # the statistics that it is learned from with. Later ones take effect in the next rollout: stored means
    # belong to the present ones (E13).
    merged = update_statistics(state.statistics, data.observation)
    statistics = merged if state.iteration == 0 else state.statistics

    observation = normalize(statistics, data.observation)
    next_observation = normalize(statistics, data.next_observation)
    metrics = update(setup, programs, learner, data, observation, next_observation)
    metrics |= setup.env.episode_metrics()
    return TrainState(learner, merged, state.iteration + 1), metrics


# ------------------------------------------------------------------------------------------------ evaluation
def evaluation_action(setup: Setup, learner: Learner, observation: Tensor) -> Tensor:
    """Actions (B, A) as --eval-mode says, at normalised observations (B, O)."""
    args = setup.args
    actor = learner.actor
    if args.eval_mode == "ode":
        noise = torch.randn(len(observation), setup.action_size, device=setup.device)
        return ode_action(actor, observation, noise, args.ode_score_scale)
    count = args.best_of_k if args.eval_mode == "best-of-k" else 1
    actions = torch.stack([sample_policy(args, actor, observation).action for _ in range(count)])
    q = torch.stack([q_value(args, learner.critic(observation, action)) for action in actions])
    best = q.argmax(0)
    return actions[best, torch.arange(len(observation), device=setup.device)]


@torch.no_grad()
def evaluate(setup: Setup, state: TrainState, folder: pathlib.Path) -> Metrics:
    """Metrics of an episode of each environment for it; --capture-video films one into the run's folder."""
    seed_noise(setup.args, state.iteration, 1)

    def policy(observation: Tensor) -> Tensor:
        action = evaluation_action(setup, state.learner, normalize(state.statistics, observation))
        return action.clamp(-ACTION_LIMIT, ACTION_LIMIT)

    return setup.eval_env.play(policy, state.iteration, folder)


# ---------------------------------------------------------------------------------------------------- export
class DeployedPolicy(nn.Module):
    """The policy of --eval-mode as a function of raw observations (B, O) and standard normals.

    These are (B, A) for ode and (B, N + 1, A) for sde. Of the observations it wants what the actor sees.
    """

    def __init__(self, args: Args, actor: Actor, statistics: Statistics, action_scale: float):
        super().__init__()
        self.args = args
        self.actor = actor
        self.statistics = statistics
        self.action_scale = action_scale

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Actions (B, A) as the environment takes them."""
        observation = normalize(self.statistics, observation)
        if self.args.eval_mode == "ode":
            action = ode_action(self.actor, observation, noise, self.args.ode_score_scale)
        else:
            action = sample_chain(self.actor, observation, noise.movedim(1, 0)).action
        return self.action_scale * action.clamp(-ACTION_LIMIT, ACTION_LIMIT)


def deployed_policy(setup: Setup, state: TrainState, action_scale: float) -> DeployedPolicy:
    """The policy alone, on the CPU."""
    mean = state.statistics.mean[: setup.actor_sees].cpu()
    variance = state.statistics.variance[: setup.actor_sees].cpu()
    actor = copy.deepcopy(state.learner.actor).cpu()
    return DeployedPolicy(setup.args, actor, Statistics(state.statistics.count, mean, variance), action_scale)


@torch.no_grad()
def export_policy(setup: Setup, state: TrainState, action_scale: float, terms: Sequence[str]) -> None:
    """Write the policy to --export as ONNX; what it is, and its observation's terms, as metadata."""
    args = setup.args
    noise = [setup.action_size]
    if args.eval_mode == "sde":
        noise = [args.num_diffusion_steps + 1, setup.action_size]
    size = torch.export.Dim("B")
    program = torch.onnx.export(
        deployed_policy(setup, state, action_scale).eval(),
        (torch.zeros(2, setup.actor_sees), torch.zeros(2, *noise)),
        input_names=["observation", "noise"],
        output_names=["action"],
        dynamic_shapes=({0: size}, {0: size}),
        dynamo=True,
        verbose=False,
    )
    facts = {
        "iteration": state.iteration,
        "action_scale": action_scale,
        "observation_terms": json.dumps(terms),
        "script": SCRIPT,
        "git_commit": git_commit(),
    }
    for name in ("env_id", "eval_mode", "ode_score_scale", "num_diffusion_steps"):
        facts[name] = getattr(args, name)
    texts = {name: str(value) for name, value in facts.items()}
    program.model.metadata_props.update(texts)
    try:
        program.save(args.export)
    except OSError as error:
        fail(f"--export {args.export} cannot be written ({error})")
    print(f"{args.export}: {texts}", flush=True)


# ----------------------------------------------------------------------------------------------- checkpoints
SAVED = "actor critic log_duals actor_optimizer critic_optimizer dual_optimizer".split()  # of a Learner


def checkpoints(run: str | pathlib.Path) -> list[pathlib.Path]:
    """A run's checkpoints, the newest last."""
    paths = [path for path in pathlib.Path(run, "checkpoints").glob("*.pt") if path.stem.isdigit()]
    return sorted(paths, key=lambda path: int(path.stem))


def end_unwritten(run: pathlib.Path, error: BaseException) -> None:
    """End a run that cannot write, as on a full disk: one line on stderr and exit code 1."""
    kept = checkpoints(run)
    last = f"its last whole checkpoint is of step {kept[-1].stem}" if kept else "it has no checkpoint"
    reason = " ".join(f"{type(error).__name__}: {error}"[:300].split())
    print(f"{SCRIPT}.py: error: cannot write to {run} ({reason}); {last}", file=sys.__stderr__, flush=True)
    os._exit(1)  # without waiting for threads that cannot write either


def save_checkpoint(run: pathlib.Path, state: TrainState, step: int, wall_time: float) -> None:
    """Write the training state and the seconds it took; keep the last three."""
    content = {name: getattr(state.learner, name).state_dict() for name in SAVED}
    content |= state.statistics._asdict()
    content |= {"iteration": state.iteration, "wall_time": wall_time}
    folder = run / "checkpoints"
    unfinished = folder / "unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(content, unfinished)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        end_unwritten(run, error)
    unfinished.replace(folder / f"{step}.pt")  # so that a file of this name is complete
    for path in checkpoints(run)[:-3]:
        path.unlink()


def read_checkpoint(run: str) -> dict[str, Any]:
    """What a run's newest checkpoint was given; exits with code 2 if it cannot be read."""
    try:
        newest = checkpoints(run)[-1]
        return torch.load(newest, map_location="cpu", weights_only=True)  # nothing in it is executed
    except Exception as error:  # whatever a missing, damaged or foreign file makes of the reader
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        fail(f"no readable checkpoint in {run}, which should be a run's folder ({reason})")


def fill_state(state: TrainState, saved: dict[str, Any]) -> TrainState:
    """A training state with a checkpoint's content; exits with code 2 if it is not of this run."""
    try:
        for name in SAVED:
            getattr(state.learner, name).load_state_dict(saved[name])
        mean = state.statistics.mean.copy_(saved["mean"])
        variance = state.statistics.variance.copy_(saved["variance"])
        return TrainState(state.learner, Statistics(saved["count"], mean, variance), saved["iteration"])
    except (KeyError, ValueError, RuntimeError) as error:
        fail(f"the checkpoint is not of this run: {str(error)[:300]}")


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
    """What else decides a run's numbers: command, commit, device and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "script": SCRIPT,
        "command": sys.argv,
        "git_commit": git_commit(),
        "device": f"{WORLD} x {device}, {os.cpu_count()} cores",
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
    """The folder of a new run, which is made, or of the one that is continued; the same in all processes."""
    if args.resume:
        return pathlib.Path(args.resume)
    second = make_folder(args) if RANK == 0 else 0
    return name_folder(args, largest(second))


def open_logs(args: Args, folder: pathlib.Path, done: int) -> Callable:
    """Open the run and its log, to go on after so many iterations; the first process writes them."""
    if RANK > 0:
        return lambda *_: None
    open_run(folder, args)
    return open_log(folder, done * args.batch_size)


# ----------------------------------------------------------------------------------------- several processes
def check_device(device: str) -> None:
    """Exit with code 2 where a GPU is asked for and there is none."""
    if device == "gpu" and not torch.cuda.is_available():
        fail("PyTorch has no gpu device; install a CUDA build of it and NVIDIA's driver, or use --device cpu")


def open_device(args: Args) -> torch.device:
    """This process's device, set up."""
    torch.backends.cuda.matmul.allow_tf32 = True  # JAX's default on GPUs that have it
    # Small networks and, without a GPU, a simulator that runs on one thread: more threads would only wait.
    torch.set_num_threads(1)
    if args.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if index >= count:
        fail(f"torchrun's --nproc-per-node is more than the {count} GPUs of this machine")
    device = torch.device(f"cuda:{index}")
    torch.cuda.set_device(device)
    return device


def join_processes(device: torch.device) -> None:
    """Connect the processes that torchrun started; only the first of them prints."""
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def leave_processes() -> None:
    """Wait for the other processes: torchrun ends all with the first, and one may still be saving."""
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


def everywhere(x: Tensor) -> Tensor:
    """A tensor of every process, one after the other along the first axis."""
    if WORLD == 1:
        return x
    return torch.cat(import_module("torch.distributed.nn").all_gather(x.contiguous()))


def gather(value: Any) -> list[Any]:
    """A Python object of every process."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def largest(number: int) -> int:
    """The largest of the numbers that the processes have."""
    return max(gather(number))


def averages(metrics: Metrics) -> dict[str, float]:
    """Means over the processes, of each metric over those that have it."""
    values = torch.stack([value.float() for value in metrics.values()]).tolist()  # one read from the device
    found: dict[str, list[float]] = {}
    for row in gather(dict(zip(metrics, values, strict=True))):
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


# -------------------------------------------------------------------------------------------------- training
def compile_programs(setup: Setup, learner: Learner) -> Programs:
    """What changes this learner and acts with it; with --compile compiled and on a GPU made CUDA graphs."""
    args = setup.args
    gpu = setup.device.type == "cuda"
    sample = functools.partial(sample_policy, args, learner.actor)
    learn = functools.partial(update_minibatch, args, learner)
    if args.compile or (args.compile is None and gpu):
        sample = torch.compile(sample)
        learn = torch.compile(learn)
        if gpu and WORLD == 1:  # over several processes the gradients' average is no part of a graph
            graph = import_module("tensordict.nn").CudaGraphModule
            sample = graph(sample, warmup=CALLS_BEFORE_GRAPH)
            learn = graph(learn, warmup=CALLS_BEFORE_GRAPH)
    return Programs(sample, learn)


def prepare(setup: Setup, saved: dict[str, Any]) -> tuple[TrainState, Programs]:
    """The training state, new or a checkpoint's, and what is done with it."""
    learner = init_learner(setup)
    state = TrainState(learner, init_statistics(setup), 0)
    if saved:
        state = fill_state(state, saved)
    return state, compile_programs(setup, learner)


def changing_tensors(learner: Learner) -> list[Tensor]:
    """What updates change: the parameters, then Adam's moments, of which a new Adam has none yet."""
    found = [*learner.actor.parameters(), *learner.critic.parameters(), *learner.log_duals]
    for optimizer in (learner.actor_optimizer, learner.critic_optimizer, learner.dual_optimizer):
        for moments in optimizer.state.values():
            found += moments.values()
    return found


@torch.no_grad()
def warm_up(setup: Setup, programs: Programs, learner: Learner) -> None:
    """Compile the programs and capture their CUDA graphs on zeros; the learner is left as it was."""
    args = setup.args
    began = time.perf_counter()
    kept = [x.clone() for x in changing_tensors(learner)]
    size = args.minibatch_size // WORLD
    zeros = functools.partial(torch.zeros, device=setup.device)
    batch = Batch(
        observation=zeros(size, setup.observation_size),
        action=zeros(size, setup.action_size),
        trajectory=empty_trajectory(setup, size),
        target=zeros(size),
    )
    for _ in range(CALLS_BEFORE_GRAPH + 2):
        programs.sample_policy(torch.zeros_like(setup.env.observation))
        noise = zeros(args.num_diffusion_steps + 1, size, setup.action_size)
        with torch.enable_grad():  # as in update_epochs
            programs.update_minibatch(batch, noise)
    # In place, as graphs remember where tensors lie.
    changed = changing_tensors(learner)
    for x in changed:
        x.zero_()
    for x, value in zip(changed, kept, strict=False):  # a new Adam's moments are not kept: they are zeros
        x.copy_(value)
    print(f"warmed up in {time.perf_counter() - began:.1f} s", flush=True)


def check_contract(metrics: dict[str, float], done: int) -> None:
    """End a run whose rollout holds other chains than its actor has; Actor says what it must keep.

    In its first two iterations: while the output layer is 0, an actor ignores every latent.
    """
    kl = metrics["trust_region/initial_kl"]
    if kl > 1e-3:
        sys.exit(
            f"{SCRIPT}.py: iteration {done} began {kl:.3g} nats from the policy that made its rollout, "
            "not 0. The actor's output layer has to start at zero, its output may depend on no latent but "
            "a^n, and trajectory_kl of an actor from itself has to be 0."
        )


def not_finite(metrics: dict[str, float]) -> list[str]:
    """Names of the metrics that are not finite, any of which ends a run."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]


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


def print_progress(args: Args, metrics: dict[str, float], done: int, wall_time: float) -> None:
    """One line on stdout for an iteration."""
    eta = wall_time / 60 / done * (args.num_iterations - done)
    line = f"step {done * args.batch_size:,}  SPS {metrics['charts/SPS']:,.0f}  ETA {eta:.1f} min"
    for name, value in metrics.items():
        if name.startswith("eval/"):
            line += f"  {name} {value:.2f}"
    print(line, flush=True)


def train(setup: Setup, programs: Programs, state: TrainState, saved: dict[str, Any]) -> int:
    """The training loop; returns the process's exit code."""
    args = setup.args
    warm_up(setup, programs, state.learner)
    folder = run_folder(args)
    log = open_logs(args, folder, state.iteration)
    received = catch_signals()
    stop = 0
    bad: list[str] = []
    started = time.perf_counter() - float(saved.get("wall_time", 0.0))
    while state.iteration < args.num_iterations and not stop and not bad:
        began = time.perf_counter()
        state, metrics = iterate(setup, programs, state)
        metrics = averages(metrics)
        metrics["charts/SPS"] = args.batch_size / (time.perf_counter() - began)
        done = state.iteration
        step = done * args.batch_size
        last = done == args.num_iterations
        if done < 3:
            check_contract(metrics, done)
        stop = largest(received[0] if received else 0)
        bad = not_finite(metrics)
        if not bad and not stop and (last or done % args.eval_interval == 0):
            metrics |= averages(evaluate(setup, state, folder))
            bad = not_finite(metrics)
            stop = largest(received[0] if received else 0)
        wall_time = time.perf_counter() - started
        log(step, wall_time, metrics)
        print_progress(args, metrics, done, wall_time)

        if bad and RANK == 0:
            kept = folder / "diverged"
            print(f"iteration {done}: {', '.join(bad)} not finite; the state is in {kept}", file=sys.stderr)
            save_checkpoint(kept, state, step, wall_time)
        if RANK == 0 and not bad and (last or stop or done % args.checkpoint_interval == 0):
            save_checkpoint(folder, state, step, time.perf_counter() - started)
    print(folder, flush=True)
    if bad:
        return 1
    return 128 + stop if stop else 0


def run(args: Args, kit: Any, stack: ExitStack) -> int:
    """Make the environments, then train, resume or evaluate; returns the process's exit code."""
    folder = args.resume or args.evaluate
    saved = read_checkpoint(folder) if folder else {}
    device = open_device(args)
    join_processes(device)
    for name, value in vars(args).items():
        print(f"{name}: {value}", flush=True)
    numbers = [args.seed, RANK, saved.get("iteration", 0)]
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)
    if of_mjlab(args.env_id):
        env = IsaacLab(args, make_mjlab(args, str(device), seed, stack))
    else:
        env = IsaacLab(args, make_isaaclab(args, str(device), seed, kit, stack))
    setup = setup_for(args, device, env)
    state, programs = prepare(setup, saved)
    torch.manual_seed(args.seed + RANK)  # processes draw clocks of their own
    env.reset(spread=True)
    code = 0
    if args.export:
        export_policy(setup, state, args.action_scale, env.observation_terms())
    elif args.evaluate:
        print(json.dumps(averages(evaluate(setup, state, pathlib.Path(args.evaluate)))), flush=True)
    else:
        code = train(setup, programs, state, saved)
    leave_processes()
    return code


def end_with_kit(kit: Any, code: int) -> None:
    """End the process. Kit would do so when it is closed, with exit code 0 whatever has happened."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    kit.close()


def tell(error: BaseException) -> int:
    """Print what ended a run, as Python would at its end; returns the exit code."""
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
        return 1
    if isinstance(error.code, str):
        print(error.code, file=sys.stderr)
        return 1
    return error.code or 0


def main(args: Args, kit: Any) -> None:
    """Run, then close the environments and their simulator."""
    check_device(args.device)
    try:
        with ExitStack() as stack:
            code = run(args, kit, stack)
    except BaseException as error:
        if not kit:
            raise
        code = tell(error)
    if args.track and RANK == 0:
        import_module("wandb").finish()
    if kit:
        end_with_kit(kit, code)
    sys.exit(code)


if __name__ == "__main__":
    main(*STARTED)
