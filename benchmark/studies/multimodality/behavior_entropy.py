"""How many of a task's two solutions a trained agent finds from one fixed initial state (Section 6, Appendix
D.3, Table 1).

    python -m benchmark.studies.multimodality.behavior_entropy runs/benchmark.studies.multimodality:PushTSymmetric-v1__...

Plays full episodes with the newest checkpoint of a run of trudi_maniskill.py, in the test variant of its
task, by the probability-flow ODE, so that nothing but the noise a^N decides between the solutions. Prints how
many episodes ended in each mode, the entropy of that distribution and the mean return, which is of the raw
dense reward over the task's whole horizon, also after a success. Writes them to a JSON file, and a picture of
the trajectories beside it."""

import dataclasses
import json
import math
import pathlib
import sys
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
import tyro
from torch import Tensor

import trudi_maniskill as trudi
from benchmark.studies.multimodality import push_t, stack_cube

# modes 0 and 1 of D.3
MODES = {"PushT": ("counter-clockwise", "clockwise"), "StackCube": ("blue on red", "red on blue")}
NO_MODE = -1
LEAST_TURN = 0.01  # radians; a block that nobody touches turns less as it settles
LEAST_HEIGHT = 0.02  # half a cube, in metres (E16)


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure the behaviour entropy of a trained agent."""

    run_dir: tyro.conf.Positional[str]  # folder of a run of trudi_maniskill.py on one of these tasks
    episodes: int = 200  # a multiple of --num-envs
    num_envs: int = 20  # parallel environments
    seed: int = 0  # of the initial state and of the noise a^N
    env_id: str | None = None  # default: the test variant of the run's task
    device: Literal["auto", "cpu", "gpu"] = "auto"  # where to run
    # the written files' path without .json and .png; default: behavior_entropy in the run folder
    output: str | None = None


# ----------------------------------------------------------------------------------------------------- metric
def turned(yaw: Tensor) -> Tensor:
    """How far the block has turned since the start, in radians, at all steps (T + 1, E) of its yaw (T + 1,
    E): the sum of the steps' turns, each less than half a turn, as the yaw alone does not tell pi from -pi
    (E15)."""
    steps = torch.remainder(yaw.diff(dim=0) + math.pi, 2 * math.pi) - math.pi
    return torch.cat([torch.zeros_like(yaw[:1]), steps.cumsum(0)])


def push_t_modes(turn: Tensor) -> Tensor:
    """Modes (E,) of the turns from start to end, in radians (E,). As in D.3 success is not asked for: only a
    block that was not turned has no mode."""
    return torch.where(turn.abs() < LEAST_TURN, NO_MODE, (turn < 0).long())


def stack_cube_modes(height: Tensor, success: Tensor) -> Tensor:
    """Modes (E,) of how much higher than red's centre blue's is at the end, in metres (E,); none without
    success (E,) then."""
    stacked = success & (height.abs() > LEAST_HEIGHT)
    return torch.where(stacked, (height < 0).long(), NO_MODE)


def count_modes(modes: Tensor) -> list[int]:
    """How many episodes ended in mode 0 and in mode 1; the others are failures."""
    return torch.bincount(modes[modes != NO_MODE], minlength=2).tolist()


def behavior_entropy(counts: list[int]) -> float:
    """Entropy of the modes' distribution to the base of their number: 1 if they are equally frequent, 0 if
    there is but one. As in Section 6 the distribution is over the episodes that have a mode, so failures do
    not count; NaN if none has."""
    total = sum(counts)
    if total == 0:
        return math.nan
    shares = [count / total for count in counts if count > 0]
    return sum(-p * math.log(p, len(counts)) for p in shares)  # Eq. 317


# --------------------------------------------------------------------------------------------------- episodes
def load(args: Args) -> tuple[trudi.Setup, trudi.TrainState, str]:
    """The environments to evaluate in, the run's newest state, and "PushT" or "StackCube"; exits with code 2
    if there is no such run."""
    own = trudi.read_args(args.run_dir)
    env_id = args.env_id or own.env_id.replace("Symmetric-v1", "SymmetricTest-v1")
    task = next((task for task in MODES if env_id.split(":")[-1].startswith(f"{task}Symmetric")), None)
    rules = [
        (task, f"{env_id} is none of benchmark.studies.multimodality's tasks; name one with --env-id"),
        (args.num_envs > 0 and args.episodes > 0, "--episodes and --num-envs must be positive"),
        (args.num_envs > 0 and args.episodes % args.num_envs == 0, "--num-envs does not divide --episodes"),
        (args.device != "gpu" or torch.cuda.is_available(), "PyTorch has no gpu device"),
    ]
    for message in (message for holds, message in rules if not holds):
        trudi.fail(message)
    own = dataclasses.replace(
        own,
        env_id=env_id,
        reward_mode="dense",
        eval_mode="ode",
        device=args.device,
        compile=False,
        num_eval_envs=args.num_envs,
        capture_video=False,
        resume=None,
        evaluate=args.run_dir,
    )
    saved = trudi.read_checkpoint(args.run_dir)
    setup = trudi.make_setup(own, trudi.open_device(own))
    state, _ = trudi.prepare(setup, saved)
    return setup, state, task


@torch.no_grad()
def play(setup: trudi.Setup, state: trudi.TrainState, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """An episode in each environment, all from the same initial state. Returns the observations (T + 1, E,
    .), the episodes' returns (E,) and whether they ended in success (E,)."""
    env = setup.eval_env
    env.reset([seed] * sum(env.sizes))
    if not torch.allclose(env.observation, env.observation[:1].expand_as(env.observation), atol=1e-3):
        # A GPU's environments share one generator, so only a task without randomness starts alike in all.
        trudi.fail(
            f"{setup.args.env_id} starts differently in parallel environments; take a test variant, "
            "or --device cpu"
        )
    trace = [env.observation]
    for _ in range(env.time_limit):
        observation = trudi.normalize(state.statistics, env.observation)
        action = trudi.evaluation_action(setup, state.learner, observation)
        outcome = env.step(action.clamp(-trudi.ACTION_LIMIT, trudi.ACTION_LIMIT))
        trace.append(outcome.next_observation)  # after the last step, env's own is of the next episode
    last = env.episodes[-1]
    return torch.stack(trace), last.total, last.success_at_end.bool()


def classify(task: str, trace: Tensor, success: Tensor) -> tuple[Tensor, Tensor]:
    """Modes (E,) of observations (T + 1, E, .), and what they were decided by, at all steps (T + 1, E)."""
    if task == "PushT":
        turn = turned(push_t.yaw(trace[..., push_t.OBSERVATION["block"]][..., 3:]))
        return push_t_modes(turn[-1]), turn
    blue, red = (trace[..., stack_cube.OBSERVATION[name]][..., 2] for name in ("blue", "red"))
    return stack_cube_modes((blue - red)[-1], success), blue - red


# ---------------------------------------------------------------------------------------------------- results
def summarize(task: str, modes: Tensor, total: Tensor, success: Tensor) -> dict[str, Any]:
    """The numbers of the report, from modes, returns and successes (E,). An entropy over no episodes is None.

    D.3 classifies PushT's failures too, so that a block which is merely nudged either way scores an entropy
    of 1; Section 6 speaks of successful behaviours. Hence both, for all episodes with a mode and for the
    successful ones."""
    counts, successful = count_modes(modes), count_modes(modes[success])
    entropies = (behavior_entropy(x) for x in (counts, successful))
    entropy, entropy_of_successes = (None if math.isnan(x) else x for x in entropies)
    return {
        "episodes": len(modes),
        "successes_at_end": int(success.sum()),
        "no_mode": len(modes) - sum(counts),
        "mode_counts": dict(zip(MODES[task], counts, strict=True)),
        "entropy": entropy,
        "mode_counts_of_successes": dict(zip(MODES[task], successful, strict=True)),
        "entropy_of_successes": entropy_of_successes,
        "return_mean": total.mean().item(),
        "return_std": total.std(correction=0).item(),
    }


def draw(task: str, trace: Tensor, decided_by: Tensor, modes: Tensor, path: str) -> None:
    """Picture of all episodes: the tool's way seen from above, and what the mode is decided by over time,
    coloured by mode."""
    tool = trace[..., {"PushT": push_t, "StackCube": stack_cube}[task].OBSERVATION["tcp"]][..., :2]
    figure, (above, over_time) = plt.subplots(1, 2, figsize=(10, 4.5), constrained_layout=True)
    kinds = ((0, MODES[task][0], "C0"), (1, MODES[task][1], "C3"), (NO_MODE, "neither", "0.6"))
    for mode, name, colour in kinds:
        style = dict(color=colour, linewidth=0.7, alpha=0.5)
        above.plot(*tool[:, modes == mode].unbind(-1), **style)
        over_time.plot(decided_by[:, modes == mode], **style)
        over_time.plot([], [], color=colour, label=f"{name}: {int((modes == mode).sum())}")
    above.set(xlabel="x of the tool [m]", ylabel="y of the tool [m]", aspect="equal", adjustable="datalim")
    label = {"PushT": "turn of the block [rad]", "StackCube": "height of blue over red [m]"}[task]
    over_time.set(xlabel="step", ylabel=label)
    over_time.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Play, classify, print, write."""
    args = tyro.cli(Args)
    if args.device == "cpu" or not torch.cuda.is_available():
        torch.set_num_threads(1)
    setup, state, task = load(args)
    torch.manual_seed(args.seed)
    rounds = [play(setup, state, args.seed) for _ in range(args.episodes // args.num_envs)]
    traces, totals, successes = zip(*rounds, strict=True)
    trace = torch.cat(traces, 1).cpu()
    total = torch.cat(totals).cpu()
    success = torch.cat(successes).cpu()
    modes, decided_by = classify(task, trace, success)
    results = summarize(task, modes, total, success)
    output = args.output or str(pathlib.Path(args.run_dir, "behavior_entropy"))
    settings = {
        "env_id": setup.args.env_id,
        "horizon": setup.eval_env.time_limit,
        "iteration": state.iteration,
        "seed": args.seed,
    }
    run = json.loads(pathlib.Path(args.run_dir, "args.json").read_text())
    del run["args"]
    content = {"run": run, "command": sys.argv, **settings, **results}
    pathlib.Path(f"{output}.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(task, trace, decided_by, modes, f"{output}.png")
    print("\n".join(f"{name}: {value}" for name, value in (settings | results).items()))
    print(f"{output}.json\n{output}.png")


if __name__ == "__main__":
    main()
