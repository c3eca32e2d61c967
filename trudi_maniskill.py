# /// script
# requires-python = ">=3.11"
# dependencies = ["mani-skill==3.0.1", "tensorboard>=2.18", "tensorboardx>=2.6.2", "tensordict>=0.10", "torch==2.13.0",
#                 "tyro>=1.0", "wandb>=0.19.10"]
# ///
"""Trust-Region Diffusion Policies (TruDi, arXiv 2606.15260) on ManiSkill3, in one file.

    python trudi_maniskill.py --env-id PickCube-v1                # the paper's settings, for a GPU
    python trudi_maniskill.py --env-id PushCube-v1 --preset cpu   # a learning curve on two CPU cores
    torchrun --nproc-per-node 4 trudi_maniskill.py --env-id PickCube-v1   # four GPUs share environments and minibatches

Read it from top to bottom, or beside trudi_mjx.py: order and names are the same. `# Eq. 181` marks where an equation of the
paper is computed; README.md has their table and the paper's errata, E1 to E18. Axes: T steps of a rollout, E environments, B
states of a batch, N denoising steps (n = 1 ... N in order, latent actions from a^N, noise, to a^0), A action dimensions."""

import dataclasses
import difflib
import functools
import itertools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from importlib import import_module, metadata, util
from typing import Any, Literal

import numpy as np
import tensorboardX
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

TASKS = tuple(f"{name}-v1" for name in (
    "PickCube StackCube PokeCube PullCube PushCube RollBall LiftPegUpright PlaceSphere PlugCharger PushT PullCubeTool "
    "TwoRobotPickCube TwoRobotStackCube").split())
# Table 5, but for gamma: its 0.99 makes returns of up to 100, of which these atoms hold 15 (README.md).
PAPER = dict(  # gamma is, as in REPPO's code, 1 - 10 / time limit: 50 steps for most tasks, and supposed for other modules'
    total_timesteps=50_000_000, num_envs=1024, num_steps=128, num_epochs=8, minibatch_size=2048, hidden_dim=512,
    actor_learning_rate=3e-4, critic_learning_rate=3e-4, dual_learning_rate=3e-4, num_eval_envs=128, eval_interval=15,
    checkpoint_interval=15, target_entropy_scale=0.665, gamma=0.8, v_min=-15.0, v_max=15.0, reward_mode="normalized_dense")
SPECIAL = {"RollBall-v1": dict(gamma=0.875), "PlugCharger-v1": dict(gamma=0.95, reward_mode="sparse")} | dict.fromkeys(
    ("PushT-v1", "PullCubeTool-v1", "TwoRobotPickCube-v1", "TwoRobotStackCube-v1"), dict(gamma=0.9))
PRESET = {"paper": PAPER, "cpu": PAPER | dict(  # sizes measured on two cores, see README.md
    total_timesteps=300_000, num_envs=32, num_steps=64, minibatch_size=256, hidden_dim=64, actor_learning_rate=6e-4,
    critic_learning_rate=6e-4, dual_learning_rate=1.2e-3, num_eval_envs=32, eval_interval=20, checkpoint_interval=20)}
ACTION_LIMIT = 0.999  # clips actions for the simulator and the critic's data; not in the losses, where it'd stop gradients
STEP_SIZE, KAPPA_MIN, SCHEDULE_SHIFT = 0.125, 1e-3, 0.008  # delta, and the cosine schedule's floor and offset
TIME_FEATURES, HL_GAUSS_SIGMA = 32, 0.75  # the latter in atom widths
INITIAL_DUAL, PRIOR_LOGITS = 0.01, 40.0  # alpha and lambda at the start; scale of the critic's bias, so that Q starts near 0
SCRIPT = pathlib.Path(__file__).stem
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's: this process, all of them
# ------------------------------------------------------------------------------------------------------- arguments
@dataclasses.dataclass(frozen=True)
class Args:
    """Train a TruDi agent. A flag whose default is None takes the value of --preset or of the task."""
    env_id: str = "PushCube-v1"  # task of ManiSkill3, or module:id of one that the module registers
    exp_name: str = "trudi_maniskill"  # part of the run folder's name
    seed: int = 1  # of everything: networks, noise, environments
    preset: Literal["paper", "cpu"] = "paper"  # sizes: the paper's Table 5, or small ones for two CPU cores
    reward_mode: Literal["normalized_dense", "dense", "sparse"] | None = None  # default: normalized_dense if the task has it
    log_dir: str = "runs"  # parent of the run folders
    num_envs: int | None = None  # parallel environments, over all processes
    num_steps: int | None = None  # steps of each environment in a rollout
    num_epochs: int | None = None  # passes over a rollout
    minibatch_size: int | None = None  # states in a gradient step, over all processes
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
    device: Literal["auto", "cpu", "gpu"] = "auto"  # where to run; gpu fails where there is none
    compile: bool | None = None  # torch.compile and CUDA graphs; default: on a GPU only
    total_timesteps: int | None = None  # environment steps, over all environments
    eval_mode: Literal["ode", "sde", "best-of-k"] = "ode"  # probability-flow ODE, a sample, or the best of K by Q
    ode_score_scale: float = 1.0  # c of the ODE: 0.5 keeps the marginals, 1 is greedier
    best_of_k: int = 10  # K of best-of-k
    eval_interval: int | None = None  # iterations between evaluations; the last one is always followed by one
    num_eval_envs: int | None = None  # episodes in an evaluation, over all processes
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
    """Fill in what depends on task, preset and device; exit with code 2 on what cannot run."""
    if args.env_id not in TASKS and ":" not in args.env_id:
        near = difflib.get_close_matches(args.env_id, TASKS, 3, 0.4) or TASKS[:3]
        fail(f"unknown --env-id {args.env_id}; the nearest are {', '.join(near)}")
    if ":" in args.env_id and not util.find_spec(args.env_id.split(":")[0].split(".")[0]):
        fail(f"unknown --env-id {args.env_id}: there is no such module on PYTHONPATH or beside {SCRIPT}.py")
    if args.device == "gpu" and not torch.cuda.is_available():
        fail("PyTorch has no gpu device; install a CUDA build of it and NVIDIA's driver, or use --device cpu")
    values = PRESET[args.preset] | SPECIAL.get(args.env_id, {}) | {k: v for k, v in vars(args).items() if v is not None}
    size = values["num_envs"] * values["num_steps"]
    args = dataclasses.replace(args, **values | dict(batch_size=size, num_iterations=values["total_timesteps"] // max(size, 1)))
    may_be_zero = ("seed", "num_iterations", "gamma", "td_lambda", "ode_score_scale", "v_min", "v_max", "target_entropy_scale")
    numbers = {f"--{k}".replace("_", "-"): v for k, v in vars(args).items() if type(v) in (int, float) and k not in may_be_zero}
    split = ("--num-envs", "--minibatch-size", "--num-eval-envs")
    rules = [(v > 0, f"{k} must be positive, not {v}") for k, v in numbers.items()] + [
        (args.seed >= 0 and args.ode_score_scale >= 0, "--seed and --ode-score-scale must not be negative"),
        (0 <= args.gamma < 1 and 0 <= args.td_lambda <= 1, "--gamma must lie in [0, 1) and --td-lambda in [0, 1]"),
        (args.v_min < args.v_max and args.num_atoms > 1, "the critic needs --v-min < --v-max and --num-atoms > 1"),
        (args.num_iterations > 0, f"--total-timesteps {args.total_timesteps} is less than --num-envs x --num-steps"),
        (args.batch_size % max(args.minibatch_size, 1) == 0, "--minibatch-size must divide --num-envs x --num-steps"),
        (math.gcd(*(numbers[k] for k in split)) % WORLD == 0, f"each of {', '.join(split)} must divide by {WORLD} processes")]
    for message in (message for holds, message in rules if not holds):
        fail(message)
    return args
# ----------------------------------------------------------------------------------------------------- environment
# `envs`: one ManiSkillVectorEnv on a GPU, E of size 1 on a CPU, whose PhysX has one in a scene; the last two may be compiled.
Agent = namedtuple("Agent", "args device envs eval_envs time_limit sample update")
# A rollout, (T, E, ...): raw observations, clipped actions (A,), latents a^1 ... a^N and means of a^0 ... a^(N-1) of the policy
# that acted (N, A), true next observations, and which episodes seen whole ended here, with return, length and success.
Transition = namedtuple("Transition", "observation action latents means reward terminated truncated next_observation episode")

def make_envs(args: Args, device: torch.device, num_envs: int, evaluation: bool) -> list[Any]:
    """This process's environments; those for evaluation go on after a success. Exits with code 2 if they can't be made."""
    gym, wrap, vector = map(import_module, ("gymnasium", "mani_skill.utils.wrappers", "mani_skill.vector.wrappers.gymnasium"))
    import_module("mani_skill").logger.setLevel("ERROR")
    gpu, video = device.type == "cuda", evaluation and args.capture_video and RANK == 0
    options = dict(num_envs=num_envs if gpu else 1, obs_mode="state", control_mode="pd_joint_delta_pos",
                   reward_mode=args.reward_mode, sim_backend=str(device), render_mode="rgb_array" if video else None,
                   render_backend=str(device) if video else "none")
    try:
        import_module("mani_skill.envs")
        envs = [gym.make(args.env_id, **options) for _ in range(1 if gpu else num_envs)]
    except (gym.error.Error, ImportError, NotImplementedError) as error:  # the last of an unsupported reward
        fail(f"--env-id {args.env_id} cannot be made: {error}; the module in module:id must register the id")
    except RuntimeError as error:
        fail(f"ManiSkill cannot make {args.env_id} ({error}); it needs Vulkan even if nothing is drawn: install NVIDIA's "
             "driver with its Vulkan part, or libvulkan1 and mesa-vulkan-drivers 25 or newer; vulkaninfo tells if it is found")
    if isinstance(envs[0].unwrapped.single_action_space, gym.spaces.Dict):  # of several robots
        envs = [wrap.FlattenActionSpaceWrapper(env) for env in envs]
    return [vector.ManiSkillVectorEnv(env, ignore_terminations=evaluation, record_metrics=True) for env in envs]

def env_reset(envs: list[Any], *seeds: int) -> Tensor:
    """Reset all environments, from numbers of which every process and each of its environments makes seeds of its own."""
    seeds = iter(np.random.SeedSequence([*seeds, RANK]).generate_state(sum(env.num_envs for env in envs)).tolist())
    return torch.cat([env.reset(seed=list(itertools.islice(seeds, env.num_envs)))[0] for env in envs])

def env_step(envs: list[Any], action: Tensor) -> tuple[Tensor, tuple]:
    """Step, end and restart episodes; returns the observations to act on next and Transition's fields from reward on. A success
    ends an episode but is no termination: the rewards that it cuts off would be missed, so it bootstraps like a time-out."""
    outcomes = []
    for env, part in zip(envs, action.split([env.num_envs for env in envs]), strict=True):
        observation, reward, success, late, info = env.step(part)
        episode = dict.fromkeys(("success_once", "success_at_end"), success) | info.get("final_info", info)["episode"]
        numbers = [episode[name].expand(len(part)) for name in ("return", "episode_len", "success_once", "success_at_end")]
        outcomes.append((observation, reward.float(), success | late, info.get("final_observation", observation), *numbers))
    observation, reward, truncated, after, *numbers = (torch.cat(x) for x in zip(*outcomes, strict=True))
    return observation, (reward, torch.zeros_like(truncated), truncated, after, (truncated, *numbers))

def everywhere(x: Tensor) -> Tensor:
    """A tensor of every process, one after the other along the first axis."""
    return torch.cat(import_module("torch.distributed.nn").all_gather(x.contiguous())) if WORLD > 1 else x

Statistics = namedtuple("Statistics", "count moments")  # moments: mean and variance (2, .) of every entry
def update_statistics(statistics: Statistics, observations: Tensor) -> Statistics:
    """Merge observations (T, E, .) of all processes into the moments: Welford's update for batches (Chan et al., 1979)."""
    x = everywhere(observations.flatten(0, 1))
    n, m, old = statistics.count, len(x), statistics.moments
    delta, weight = x.mean(0) - old[0], m / (n + m)
    variance = (1 - weight) * (old[1] + weight * delta**2) + weight * x.var(0, correction=0)
    return Statistics(n + m, torch.stack([old[0] + weight * delta, variance]))

def normalize(statistics: Statistics, observation: Tensor) -> Tensor:
    """Standardise an observation, clipped at 10; the 1e-2 keeps entries that hardly vary from blowing up."""
    return ((observation - statistics.moments[0]) / torch.sqrt(statistics.moments[1] + 1e-2)).clamp(-10, 10)
# -------------------------------------------------------------------------------------------------------- networks
class Actor(nn.Module):
    """The network f_theta(a^n, s, n), twice the correction to the prior's score, and the step sizes h^n."""
    def __init__(self, args: Args, observation_size: int, action_size: int):
        super().__init__()
        width, self.prior_std, self.observation_size = args.hidden_dim, args.prior_std, observation_size
        self.register_buffer("n", torch.arange(1, args.num_diffusion_steps + 1)[:, None], persistent=False)
        gelu = nn.GELU("tanh")  # JAX's form of it
        self.time_mlp = nn.Sequential(linear(TIME_FEATURES, TIME_FEATURES), gelu, linear(TIME_FEATURES, TIME_FEATURES))
        self.input = linear(observation_size + action_size + TIME_FEATURES, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width, 1e-6), linear(width, width), gelu) for _ in range(3))
        self.output = linear(width, action_size)
        nn.init.zeros_(self.output.weight)  # so that the untrained policy is the prior's own process whatever it observes
        self.raw_friction = nn.Parameter(torch.full((action_size,), math.log(math.e - 1)), args.learn_friction)  # of softplus 1
    def step_sizes(self) -> Tensor:
        """h^n for n = 1 ... N, (N, A): a cosine schedule divided by the friction b of each action dimension."""
        cosine = torch.cos(math.pi / 2 * (1 + SCHEDULE_SHIFT - self.n / len(self.n)) / (1 + SCHEDULE_SHIFT)) ** 2
        return STEP_SIZE * ((1 - KAPPA_MIN) * cosine + KAPPA_MIN) / F.softplus(self.raw_friction)
    def embed(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer acts on concat(s, a, time): its parts that stay the same along a chain, (B, H) and (N, H)."""
        angle = self.n * 10000.0 ** (-torch.arange(TIME_FEATURES // 2, device=self.n.device) / (TIME_FEATURES // 2))
        time = self.time_mlp(torch.cat([angle.sin(), angle.cos()], -1))
        weight, bias, seen = self.input.weight, self.input.bias, observation[..., :self.observation_size]  # the first are its
        return F.linear(seen, weight[:, :self.observation_size], bias), F.linear(time, weight[:, -TIME_FEATURES:])
    def forward(self, state: Tensor, time: Tensor, latent: Tensor) -> Tensor:
        """f_theta at latents (..., A), with the parts that `embed` returned, which broadcast to (..., H)."""
        x = state + time + F.linear(latent, self.input.weight[:, -TIME_FEATURES - latent.shape[-1]:-TIME_FEATURES])
        for block in self.blocks:
            x = x + block(x)
        return self.output(x)

class Critic(nn.Sequential):
    """Categorical distributions of the return, whose mean is Q(s, u)."""
    def __init__(self, args: Args, observation_size: int, action_size: int):
        sizes, width = [observation_size + action_size] + [args.hidden_dim] * 2, args.hidden_dim
        hidden = [(linear(size, width), nn.LayerNorm(width, 1e-6), nn.SiLU()) for size in sizes]
        super().__init__(*itertools.chain(*hidden), linear(width, args.num_atoms))
        self.observation_size = observation_size  # the critic sees the last columns of an observation
        self[-1].bias.data = PRIOR_LOGITS * hl_gauss(args, torch.zeros(()))
    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Logits (B, atoms)."""
        return super().forward(torch.cat([observation[..., -self.observation_size:], action], -1))

def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer as flax makes it: weights of variance 1 / inputs, cut at two standard deviations, and no bias."""
    layer, std = nn.Linear(inputs, outputs), inputs**-0.5 / 0.87962566  # of the normal that has unit variance once it is cut
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)
    return layer
# ------------------------------------------------------------------------------------------------- diffusion chain
# Chains for B states: u = tanh(a^0) (B, A), a sample of l (B,), a^1 ... a^N and the means of a^0 ... a^(N-1) (B, N, A).
Chain = namedtuple("Chain", "action entropy_bound latents means")
def sample_chain(actor: Actor, observation: Tensor, noise: Tensor) -> Chain:
    """Sample the policy, reparameterised: observations (B, .), standard normals (N + 1, B, A), noise[n] for a^n."""
    (state, time), h, variance = actor.embed(observation), actor.step_sizes()[:, None], actor.prior_std**2
    latents, means = [actor.prior_std * noise[-1]], []
    for h_n, std, time_n, xi in reversed(list(zip(h, torch.sqrt(2 * h), time, noise[:-1], strict=True))):
        latent = latents[-1]
        means.append(latent + h_n * (actor(state, time_n, latent) - latent / variance))  # Eq. 186, discretising Eq. 5
        latents.append(means[-1] + std * xi)  # Eq. 31
    means, latents = torch.stack(means[::-1]), torch.stack(latents[::-1])
    # Densities of a^n under the noising and of a^(n-1) under the generative kernel; equal variances, so normalisers cancel.
    noising = (latents[1:] - latents[:-1] * (1 - h / variance)) ** 2 / (2 * h)  # Eq. 6, discretising Eq. 4
    log_ratio = 0.5 * (noise[:-1] ** 2 - noising).sum(0)
    prior = -0.5 * noise[-1] ** 2 - math.log(actor.prior_std * math.sqrt(2 * math.pi))
    tanh_log_det = 2 * (math.log(2.0) - latents[0] - F.softplus(-2 * latents[0]))  # of 1 - tanh^2; finite where tanh is 1
    bound = log_ratio - prior + tanh_log_det  # Eq. 117, Eq. 180 (E1: its sign)
    return Chain(torch.tanh(latents[0]), bound.sum(-1), latents[1:].transpose(0, 1), means.transpose(0, 1))

def ode_action(actor: Actor, observation: Tensor, noise: Tensor, score_scale: float) -> Tensor:
    """Actions (B, A) of the probability-flow ODE with scaled score, from standard normals (B, A)."""
    (state, time), latent = actor.embed(observation), actor.prior_std * noise
    for h, time_n in reversed(list(zip(actor.step_sizes(), time, strict=True))):
        score = -latent / actor.prior_std**2 + actor(state, time_n, latent) / 2
        latent = latent + h * (latent / actor.prior_std**2 + 2 * score_scale * score)  # Eq. 185, Eq. 187
    return torch.tanh(latent)

def trajectory_kl(actor: Actor, observation: Tensor, latents: Tensor, means: Tensor, old_h: Tensor) -> Tensor:
    """c(s), (B,): closed-form KL of old trajectories from the actor's, on old chains (B, N, A) with step sizes old_h (N, A)."""
    (state, time), h = actor.embed(observation), actor.step_sizes()  # the prior's KL is 0, and tanh changes nothing
    new_means = latents + h * (actor(state[:, None], time, latents) - latents / actor.prior_std**2)
    kl = 0.5 * (old_h / h - 1 - torch.log(old_h / h) + (means - new_means) ** 2 / (2 * h))
    return kl.sum((-2, -1))  # Eq. 178, which by Eq. 135 and Eq. 152 bounds Eq. 57
# ---------------------------------------------------------------------------------------------- critic and targets
def hl_gauss(args: Args, returns: Tensor) -> Tensor:
    """Categorical targets (..., atoms) for returns (...): clipped to the atoms' range, then a Gaussian's mass per atom."""
    width = (args.v_max - args.v_min) / (args.num_atoms - 1)
    edges = torch.linspace(args.v_min - width / 2, args.v_max + width / 2, args.num_atoms + 1, device=returns.device)
    cdf = torch.special.ndtr((edges - returns.clamp(args.v_min, args.v_max)[..., None]) / (HL_GAUSS_SIGMA * width))
    return torch.diff(cdf) / (cdf[..., -1:] - cdf[..., :1])

def q_value(args: Args, logits: Tensor) -> Tensor:
    """Q (...) of the critic's logits (..., atoms)."""
    return torch.softmax(logits, -1) @ torch.linspace(args.v_min, args.v_max, args.num_atoms, device=logits.device)

def lambda_returns(args: Args, reward: Tensor, terminated: Tensor, truncated: Tensor, value: Tensor, bonus: Tensor) -> Tensor:
    """Soft lambda-returns, everything (T, E); `value` is Q and `bonus` alpha l at the true next observations."""
    targets, later = torch.empty_like(reward), value[-1]  # bootstrapped where the rollout ends
    for t in reversed(range(len(reward))):
        mixture = torch.where(truncated[t], value[t], (1 - args.td_lambda) * value[t] + args.td_lambda * later)
        # Eq. 118, Eq. 179 (E2, E12); chosen, not multiplied by 0: what follows a termination may be NaN.
        targets[t] = later = reward[t] + args.gamma * torch.where(terminated[t], 0.0, bonus[t] + mixture)
    return targets
# ------------------------------------------------------------------------------------------------ losses, learning
# All that learns: actor, critic, logarithms of the duals alpha and lambda (a ParameterList), and Adam for the three.
Learner = namedtuple("Learner", "actor critic log_duals actor_opt critic_opt dual_opt")
# B states: normalised observations, and from the rollout actions, old chains and lambda-returns.
Batch = namedtuple("Batch", "observation action latents means target")
UPDATE_METRICS = ("losses/critic", "losses/actor", "entropy/bound", "trust_region/kl", "trust_region/violated")
def critic_loss(critic: Critic, args: Args, batch: Batch) -> Tensor:
    """Cross-entropy from the HL-Gauss targets to the critic's distribution."""
    return F.cross_entropy(critic(batch.observation, batch.action), hl_gauss(args, batch.target))

def actor_loss(learner: Learner, args: Args, batch: Batch, old_h: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The split loss, and l and c of every state (B,); noise is (N + 1, B, A), old_h the old step sizes."""
    alpha, lambda_ = (x.detach().exp() for x in learner.log_duals)
    chain = sample_chain(learner.actor, batch.observation, noise)
    q = q_value(args, learner.critic(batch.observation, chain.action))
    improve = -alpha * chain.entropy_bound - q  # Eq. 182, which descends Eq. 161, a bound by Eq. 92
    kl = trajectory_kl(learner.actor, batch.observation, batch.latents, batch.means, old_h)
    loss = torch.where(kl <= args.trust_region_bound, improve, lambda_ * kl)  # Eq. 181: one of two losses per state
    return loss.mean(), chain.entropy_bound.detach(), kl.detach()

def dual_loss(log_duals: nn.ParameterList, args: Args, bound: Tensor, kl: Tensor, action_size: int) -> Tensor:
    """Alpha falls while the policy is noisier than its target; lambda grows while the region is violated."""
    surplus, excess = bound.mean() + args.target_entropy_scale * action_size, kl.mean() - args.trust_region_bound
    return log_duals[0].exp() * surplus - log_duals[1].exp() * excess  # Eq. 183, Eq. 184 (E4)

def descend(optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float = math.inf) -> None:
    """One step down a loss's gradient, which is averaged over the processes and cut at a global norm."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss / WORLD, parameters), strict=True):
        parameter.grad = gradient.contiguous()
        if WORLD > 1:
            dist.all_reduce(parameter.grad)
    nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()

def update_minibatch(learner: Learner, args: Args, batch: Batch, old_h: Tensor, noise: Tensor) -> Tensor:
    """One gradient step each of critic, actor and duals; returns numbers of UPDATE_METRICS."""
    value = critic_loss(learner.critic, args, batch)
    descend(learner.critic_opt, value, args.max_grad_norm)
    loss, bound, kl = actor_loss(learner, args, batch, old_h, noise)
    descend(learner.actor_opt, loss, args.max_grad_norm)
    descend(learner.dual_opt, dual_loss(learner.log_duals, args, bound, kl, batch.action.shape[-1]))
    return torch.stack([value.detach(), loss.detach(), bound.mean(), kl.mean(), (kl > args.trust_region_bound).float().mean()])

@torch.enable_grad()
def learn(agent: Agent, learner: Learner, data: Batch, old_h: Tensor) -> dict[str, Tensor]:
    """All epochs of shuffled minibatches; metrics are means over the last epoch."""
    args, size, metrics = agent.args, len(data.action), []
    order = torch.cat([torch.randperm(size, device=agent.device) for _ in range(args.num_epochs)])
    for rows in order.split(args.minibatch_size // WORLD):
        noise = torch.randn(args.num_diffusion_steps + 1, len(rows), data.action.shape[-1], device=agent.device)
        metrics.append(agent.update(Batch(*(x[rows] for x in data)), old_h, noise))
    return dict(zip(UPDATE_METRICS, torch.stack(metrics[-len(metrics) // args.num_epochs:]).mean(0), strict=True))
# ------------------------------------------------------------------------------------------------------- iteration
# What a checkpoint holds, then the environments' observations (E, .) and whether they have begun an episode in this process.
TrainState = namedtuple("TrainState", "learner statistics iteration observation begun")
def init_learner(args: Args, device: torch.device, actor_sees: int, critic_sees: int, action_size: int) -> Learner:
    """Networks that see so many columns of an observation, duals and Adam, from the seed; the same in every process."""
    torch.manual_seed(args.seed)
    actor, critic = Actor(args, actor_sees, action_size).to(device), Critic(args, critic_sees, action_size).to(device)
    log_duals = nn.ParameterList(torch.full((), math.log(INITIAL_DUAL), device=device) for _ in range(2))
    adam = functools.partial(torch.optim.Adam, fused=True, capturable=True)  # the second for CUDA graphs; fused, it's the same
    return Learner(actor, critic, log_duals, adam([p for p in actor.parameters() if p.requires_grad], args.actor_learning_rate),
                   adam(critic.parameters(), args.critic_learning_rate), adam(log_duals.parameters(), args.dual_learning_rate))

def sample_policy(args: Args, actor: Actor, moments: Tensor, observation: Tensor) -> tuple[Chain, Tensor]:
    """Chains of the actor at raw observations, and the normalised ones."""
    seen = normalize(Statistics(None, moments), observation)
    noise = torch.randn(args.num_diffusion_steps + 1, len(seen), actor.raw_friction.numel(), device=seen.device)
    return sample_chain(actor, seen, noise), seen

def rollout(agent: Agent, state: TrainState) -> tuple[Transition, dict[str, Tensor]]:
    """Act for T steps with samples of the policy, keeping their chains; returns metrics of the episodes that ended, too."""
    steps = []
    for _ in range(agent.args.num_steps):
        observation = state.observation.clone()
        chain, _ = agent.sample(state.statistics.moments, observation)
        action = chain.action.clamp(-ACTION_LIMIT, ACTION_LIMIT)
        after, (*outcome, (ended, *numbers)) = env_step(agent.envs, action)
        steps.append((observation, action, chain.latents, chain.means, *outcome, ended & state.begun, *numbers))
        state.begun.logical_or_(ended)
        state.observation.copy_(after)
    stacked = [torch.stack(x) for x in zip(*steps, strict=True)]
    data = Transition(*stacked[:8], tuple(stacked[8:]))
    ended, *numbers = (everywhere(x.T) for x in data.episode)
    metrics = {"charts/episodes": ended.sum()}
    names = ("charts/episodic_return", "charts/episodic_length", "charts/success_once")
    if ended.any():  # else the rollout has no mean return
        metrics |= {name: (x * ended).sum() / ended.sum() for name, x in zip(names, numbers, strict=False)}
    return data, metrics

def critic_targets(agent: Agent, learner: Learner, statistics: Statistics, data: Transition) -> Tensor:
    """Soft lambda-returns (T, E), with a fresh action at every true next observation."""
    value, bonus = [], []
    for chain, seen in (agent.sample(statistics.moments, observation) for observation in data.next_observation):
        value.append(q_value(agent.args, learner.critic(seen, chain.action)))
        bonus.append(learner.log_duals[0].exp() * chain.entropy_bound)
    return lambda_returns(agent.args, data.reward, data.terminated, data.truncated, torch.stack(value), torch.stack(bonus))

@torch.no_grad()
def iterate(agent: Agent, state: TrainState, act: Callable) -> tuple[TrainState, dict[str, Tensor]]:
    """One iteration: the rollout that `act` makes, then targets, epochs of updates and observation statistics."""
    # Noise from seed, process and iteration: evaluations don't disturb it, and a run that is continued needs no other state.
    torch.manual_seed(int(np.random.SeedSequence([agent.args.seed, RANK, state.iteration]).generate_state(1)[0]))
    learner, (data, episodes) = state.learner, act(agent, state)
    # The untrained actor ignores what it observes, its last layer being 0, so the first rollout may seed the statistics
    # that it is learned from with. Later ones take effect in the next rollout: stored means belong to these (E13).
    merged = update_statistics(state.statistics, data.observation)
    statistics = state.statistics if state.statistics.count else merged
    target = critic_targets(agent, learner, statistics, data)
    batch = Batch(normalize(statistics, data.observation), data.action, data.latents, data.means, target)
    batch = Batch(*(x.swapaxes(0, 1).flatten(0, 1) for x in batch))
    # For the KL of the whole iteration, on as many states as a minibatch has: stored chains, and fresh ones of this actor.
    rows = torch.randperm(len(batch.action), device=agent.device)[:agent.args.minibatch_size // WORLD]
    old_h, some = learner.actor.step_sizes(), Batch(*(x[rows] for x in batch))
    fresh, _ = sample_policy(agent.args, learner.actor, statistics.moments, data.observation.swapaxes(0, 1).flatten(0, 1)[rows])
    metrics = episodes | learn(agent, learner, batch, old_h)
    metrics |= {f"trust_region/{name}_kl": trajectory_kl(learner.actor, some.observation, x.latents, x.means, old_h).mean()
                for name, x in (("stored", some), ("fresh", fresh))}
    return state._replace(statistics=merged, iteration=state.iteration + 1), metrics | {
        "entropy/alpha": learner.log_duals[0].exp(), "trust_region/lambda": learner.log_duals[1].exp(),
        "entropy/friction": F.softplus(learner.actor.raw_friction).mean(), "critic/target": target.mean(),
        "critic/targets_clipped": ((target < agent.args.v_min) | (target > agent.args.v_max)).float().mean()}
# ------------------------------------------------------------------------------------------------------ evaluation
def evaluation_action(agent: Agent, learner: Learner, statistics: Statistics, observation: Tensor) -> Tensor:
    """Actions (B, A) at raw observations, as --eval-mode says."""
    args, seen = agent.args, normalize(statistics, observation)
    if args.eval_mode == "ode":
        noise = torch.randn(len(seen), learner.actor.raw_friction.numel(), device=agent.device)
        return ode_action(learner.actor, seen, noise, args.ode_score_scale)
    count = args.best_of_k if args.eval_mode == "best-of-k" else 1
    actions = torch.stack([sample_policy(args, learner.actor, statistics.moments, observation)[0].action for _ in range(count)])
    q = torch.stack([q_value(args, learner.critic(seen, action)) for action in actions])
    return actions[q.argmax(0), torch.arange(len(seen), device=agent.device)]

@torch.no_grad()
def evaluate(agent: Agent, state: TrainState, folder: str | pathlib.Path) -> dict[str, Tensor]:
    """Metrics of an episode of full length, successful or not, in each evaluation environment; --capture-video films one."""
    torch.manual_seed(int(np.random.SeedSequence([agent.args.seed, RANK, state.iteration, 1]).generate_state(1)[0]))
    observation, frames = env_reset(agent.eval_envs, agent.args.seed, state.iteration, 1), []
    for _ in range(agent.time_limit):
        action = evaluation_action(agent, state.learner, state.statistics, observation)
        if agent.args.capture_video and RANK == 0:
            frames.append(agent.eval_envs[0].render()[0].cpu().numpy())
        observation, outcome = env_step(agent.eval_envs, action.clamp(-ACTION_LIMIT, ACTION_LIMIT))
    if frames:
        write, fps = import_module("mani_skill.utils.visualization").images_to_video, agent.eval_envs[0].base_env.control_freq
        write(frames, f"{folder}/videos", f"step_{state.iteration * agent.args.batch_size}", fps=fps, verbose=False)
    _, total, length, once, at_end = (everywhere(x).float() for x in outcome[-1])
    return {"eval/episodic_return": total.mean(), "eval/episodic_return_std": total.std(correction=0),
            "eval/episodic_length": length.mean(), "eval/success_once": once.mean(), "eval/success_at_end": at_end.mean()}
# -------------------------------------------------------------------------------------- run folder and checkpoints
def save_checkpoint(run: pathlib.Path, state: TrainState, step: int, wall_time: float) -> None:
    """Write all that training continues from but the simulator's own state, and the seconds it took; keep the last three."""
    folder, content = run / "checkpoints", {name: part.state_dict() for name, part in state.learner._asdict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    content |= dict(state.statistics._asdict(), iteration=state.iteration, wall_time=wall_time)
    torch.save(content, folder / "unfinished")
    (folder / "unfinished").replace(folder / f"{step}.pt")  # so that a file of this name is complete
    for path in sorted(folder.glob("*.pt"), key=lambda path: int(path.stem))[:-3]:
        path.unlink()

def read_checkpoint(run: str) -> dict[str, Any]:
    """What a run's newest checkpoint was given; exits with code 2 if it cannot be read. Nothing in it is executed."""
    try:
        newest = max(pathlib.Path(run, "checkpoints").glob("*.pt"), key=lambda path: int(path.stem))
        return torch.load(newest, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a missing, damaged or foreign file makes of the reader
        fail(f"no readable checkpoint in {run}, which should be a run's folder ({type(error).__name__}: {str(error)[:200]})")

def fill_state(state: TrainState, saved: dict[str, Any]) -> TrainState:
    """A training state with a checkpoint's content; exits with code 2 if it is not of this run."""
    try:
        for name, part in state.learner._asdict().items():
            part.load_state_dict(saved[name])
        moments = state.statistics.moments.copy_(saved["moments"])
        return state._replace(statistics=Statistics(saved["count"], moments), iteration=saved["iteration"])
    except (KeyError, ValueError, RuntimeError) as error:
        fail(f"the checkpoint is not of this run: {str(error)[:300]}")

def open_run(folder: pathlib.Path, args: Args, step: int) -> Callable:
    """Write args.json, all that decides a run's numbers, and go on with metrics after this step; returns their logger."""
    folder.mkdir(parents=True, exist_ok=True)
    git = ["git", "-C", str(pathlib.Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()  # empty outside a clone
    device = f"{WORLD} x {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}, {os.cpu_count()} cores"
    about = {"script": SCRIPT, "command": sys.argv, "git_commit": commit, "device": device, "python": sys.version,
             "versions": {package.name: package.version for package in metadata.distributions()}}
    (folder / "args.json").write_text(json.dumps({"args": vars(args), **about}, indent=1) + "\n")
    if args.track:
        import_module("wandb").init(project=args.wandb_project_name, entity=args.wandb_entity, config=vars(args),
                                    name=folder.name, dir=str(folder), sync_tensorboard=True)
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

def open_device(args: Args) -> torch.device:
    """This process's device, set up; processes that torchrun started join, and only the first of them prints."""
    gpu = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if gpu else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True  # TF32 on GPUs that have it, JAX's default there
    torch.set_num_threads(1)  # small networks and, without a GPU, a simulator that runs on one thread: more would only wait
    if gpu:
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group("nccl" if gpu else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device

def compiled(args: Args, device: torch.device, learner: Learner) -> list[Callable]:
    """sample_policy and update_minibatch, with --compile compiled and on a GPU made CUDA graphs."""
    functions = [functools.partial(sample_policy, args, learner.actor), functools.partial(update_minibatch, learner, args)]
    gpu = device.type == "cuda"
    if args.compile or (args.compile is None and gpu):
        functions = [torch.compile(function) for function in functions]
        if gpu and WORLD == 1:  # over several processes the gradients' average is no part of a graph
            functions = [import_module("tensordict.nn").CudaGraphModule(function, warmup=5) for function in functions]
    return functions

def prepare(args: Args, device: torch.device, saved: dict[str, Any]) -> tuple[Agent, TrainState]:
    """Environments, and a training state, new or a checkpoint's."""
    envs = [] if args.evaluate else make_envs(args, device, args.num_envs // WORLD, evaluation=False)
    eval_envs = make_envs(args, device, args.num_eval_envs // WORLD, evaluation=True)
    time_limit = import_module("mani_skill.utils.gym_utils").find_max_episode_steps_value(eval_envs[0])
    size = eval_envs[0].single_observation_space.shape[0]
    learner = init_learner(args, device, size, size, eval_envs[0].single_action_space.shape[0])
    statistics = Statistics(0, torch.zeros(2, size, device=device))
    state = TrainState(learner, statistics, 0, None, torch.zeros(args.num_envs // WORLD, dtype=torch.bool, device=device))
    state = fill_state(state, saved) if saved else state
    if envs:
        state = state._replace(observation=env_reset(envs, args.seed, state.iteration, 0))
        rng = np.random.default_rng([args.seed, RANK, state.iteration])
        for env in envs:  # clocks start spread over an episode, so that time-outs do not coincide
            env.base_env.elapsed_steps.copy_(torch.tensor(rng.integers(time_limit, size=env.num_envs)))
    return Agent(args, device, envs, eval_envs, time_limit, *compiled(args, device, learner)), state

def averages(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Means over the processes, of each number over those that have it; the device is read from once."""
    everyone: list[Any] = [dict(zip(metrics, torch.stack([x.float() for x in metrics.values()]).tolist(), strict=True))] * WORLD
    if WORLD > 1:
        dist.all_gather_object(everyone, everyone[0])
    return {name: float(np.mean([x[name] for x in everyone if name in x])) for name in functools.reduce(dict.__or__, everyone)}

def train(agent: Agent, state: TrainState, wall_time: float, act: Callable, evaluate: Callable) -> int:
    """The training loop; returns the process's exit code."""
    args, code, received, started = agent.args, 0, {}, time.perf_counter() - wall_time
    for number in (signal.SIGINT, signal.SIGTERM):  # finish the iteration, checkpoint, stop; a second signal kills
        signal.signal(number, lambda n, _: (received.update(signal=n), signal.signal(n, signal.SIG_DFL)))
    folder = pathlib.Path(args.resume or f"{args.log_dir}/{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    log = open_run(folder, args, state.iteration * args.batch_size) if RANK == 0 else lambda *_: None
    while state.iteration < args.num_iterations and not code:
        began = time.perf_counter()
        state, metrics = iterate(agent, state, act)
        done, step = state.iteration, state.iteration * args.batch_size
        metrics = averages(metrics | {name: torch.tensor(n, device=agent.device) for name, n in received.items()})
        metrics["charts/SPS"] = args.batch_size / (time.perf_counter() - began)
        finite = all(math.isfinite(x) for name, x in metrics.items() if name.startswith(("losses", "trust")))
        code = 1 if not finite else 128 + int(metrics.pop("signal")) if "signal" in metrics else 0
        if not code and (done == args.num_iterations or done % args.eval_interval == 0):
            metrics |= {name: float(x) for name, x in evaluate(agent, state, folder).items()}
        log(step, time.perf_counter() - started, metrics)
        eta = (time.perf_counter() - started) / 60 / done * (args.num_iterations - done)
        print(f"step {step:,}  SPS {metrics['charts/SPS']:,.0f}  ETA {eta:.1f} min",
              *(f"{name} {x:.2f}" for name, x in metrics.items() if name.startswith("eval/")), sep="  ", flush=True)
        if not finite and RANK == 0:
            print(f"iteration {done}: a loss is not finite; the state is in {folder}/diverged", file=sys.stderr)
        if RANK == 0 and (code or done == args.num_iterations or done % args.checkpoint_interval == 0):
            save_checkpoint(folder if finite else folder / "diverged", state, step, time.perf_counter() - started)
    print(folder, flush=True)
    return code

def main() -> None:
    """Parse, make the environments, then train, resume or evaluate."""
    args = parse()
    run = args.resume or args.evaluate
    saved, device = read_checkpoint(run) if run else {}, open_device(args)
    print("\n".join(f"{name}: {value}" for name, value in vars(args).items()), flush=True)
    agent, state = prepare(args, device, saved)
    if args.evaluate:
        print(json.dumps({name: float(x) for name, x in evaluate(agent, state, args.evaluate).items()}))
    code = 0 if args.evaluate else train(agent, state, float(saved.get("wall_time", 0.0)), rollout, evaluate)
    if WORLD > 1:
        dist.barrier()  # torchrun ends all processes with the first that a signal stopped, and one is still saving
        dist.destroy_process_group()
    sys.exit(code)

if __name__ == "__main__":
    main()
