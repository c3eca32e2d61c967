"""The GPU experiments, in stages of a few minutes each that can be interrupted and given again.

    python -m benchmark.speed.gpu_stages throughput --out OUT          # then humanoid, reppo, dmc, seeds
    python -m benchmark.speed.gpu_stages humanoid --out OUT --rehearse # the same commands at sizes for a CPU

A stage is a list of commands, which are printed and whose output goes to OUT/logs. When --minutes are over,
what still runs gets SIGTERM, at which runs write a checkpoint; the same stage again skips what is finished
and continues the rest, from --log-dir or, where that is gone, from OUT, to which the runs are copied at the
end (of checkpoints the newest). Stages:

* throughput: simulator, rollout, update, iteration, compile, memory and a profile of trudi_mjx.py at the
  paper's sizes, with both simulators, and with float32 matrices multiplied in TF32 and in float32;
* humanoid: G1JoystickRoughTerrain, 50M steps, one seed; reppo: the same with the Gaussian baseline;
* dmc: six hard tasks of DMC, three seeds of each side by side;
* seeds: an iteration of ten seeds side by side, and of one.
"""

import dataclasses
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Literal

import tyro

from benchmark.tasks import ROOT

DMC = "HopperHop FishSwim AcrobotSwingup PendulumSwingup FingerSpin CartpoleSwingupSparse"
# At sizes for a CPU: fewer environments, steps and states, an iteration or two, and nothing that the commands
# do left out.
SMALL = (
    "--preset cpu --num-envs 8 --num-steps 4 --minibatch-size 16 --hidden-dim 16 --num-eval-envs 2 "
    "--num-epochs 1 --checkpoint-interval 1"
)
# seconds from SIGTERM to SIGKILL: an iteration, its checkpoint and an evaluation may lie between
PATIENCE = 90


@dataclasses.dataclass(frozen=True)
class Options:
    """Run one stage of the GPU experiments."""

    stage: tyro.conf.Positional[Literal["throughput", "humanoid", "reppo", "dmc", "seeds"]]  # which
    out: str  # folder for logs, results and copies of the runs
    minutes: float = 9.5  # after which what still runs is stopped
    rehearse: bool = False  # sizes for a CPU
    log_dir: str = "runs/gpu"  # parent of the run folders
    dry_run: bool = False  # print the commands only


# ----------------------------------------------------------------------------------------------------- stages
def throughput_commands(options: Options) -> list[tuple[str, dict[str, str]]]:
    """benchmark/speed/rollout_and_update.py for three tasks, two simulators and two precisions."""
    small, found = f"{SMALL} --repeats 1 --no-starts" if options.rehearse else "--repeats 3", []
    tasks = ("G1JoystickRoughTerrain", "CartpoleBalance", "CheetahRun")
    for task in tasks[1:2] if options.rehearse else tasks:
        for impl, precision in (("warp", "tensorfloat32"), ("jax", "tensorfloat32"), ("warp", "float32")):
            output = f"{options.out}/throughput_{task}_{impl}_{precision}.json"
            flags = f"--env-id {task} --impl {impl} --profile --output {output} {small}"
            found.append(
                (
                    f"-m benchmark.speed.rollout_and_update {flags}",
                    {"JAX_DEFAULT_MATMUL_PRECISION": precision},
                )
            )
    return found


def seeds_commands(options: Options) -> list[tuple[str, dict[str, str]]]:
    """benchmark/speed/rollout_and_update.py for one seed and for ten."""
    small = f"{SMALL} --repeats 1" if options.rehearse else "--repeats 3"
    return [
        (
            f"-m benchmark.speed.rollout_and_update --env-id CheetahRun --num-seeds {k} --no-starts "
            f"--output {options.out}/seeds_{k}.json {small}",
            {},
        )
        for k in (1, 10)
    ]


def training(tasks: str, flags: str = "") -> Callable[[Options], list[tuple[str, dict[str, str]]]]:
    """benchmark.launch for tasks, which continues what it finds in --log-dir."""

    def commands(options: Options) -> list[tuple[str, dict[str, str]]]:
        small = f'--flags="{SMALL} --total-timesteps 128"' if options.rehearse else ""
        sweep = f"--tasks {tasks} {flags} --log-dir {options.log_dir} --status-interval 30 {small}"
        return [(f"-m benchmark.launch {sweep}", {})]

    return commands


STAGES: dict[str, Callable[[Options], list[tuple[str, dict[str, str]]]]] = {
    "throughput": throughput_commands,
    "humanoid": training("G1JoystickRoughTerrain", "--seeds 1"),
    "reppo": training("G1JoystickRoughTerrain", "--seeds 1 --algorithm reppo"),
    "dmc": training(DMC, "--seeds 3 --vmap-seeds 3"),
    "seeds": seeds_commands,
}


# ---------------------------------------------------------------------------------------------------- running
def copy_runs(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy run folders and logs; of the checkpoints, the newest of each run that is not there yet."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        if pathlib.Path(folder).name != "checkpoints":
            return []
        steps = sorted((name for name in names if name.isdigit()), key=int)
        return [name for name in names if name not in steps[-1:]]

    if source.exists():
        shutil.copytree(source, target, ignore=left_out, dirs_exist_ok=True)


def run_command(command: str, variables: dict[str, str], log: pathlib.Path, seconds: float) -> int:
    """Run a command for at most so long, its output in a log; the exit code is negative for a signal."""
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command)],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()


def main() -> None:
    """Bring back what an earlier call copied, run the stage's commands, copy the runs."""
    options = tyro.cli(Options)
    out = pathlib.Path(options.out).resolve()
    options = dataclasses.replace(options, out=str(out), log_dir=str(pathlib.Path(options.log_dir)))
    commands = STAGES[options.stage](options)
    if options.dry_run:
        return print(
            "\n".join(
                " ".join([*(f"{k}={v}" for k, v in more.items()), "python", text]) for text, more in commands
            )
        )
    runs, copy, codes = ROOT / options.log_dir, out / "runs", []
    deadline = time.monotonic() + options.minutes * 60
    (out / "logs").mkdir(parents=True, exist_ok=True)
    if not runs.exists():
        copy_runs(copy, runs)
    for number, (command, variables) in enumerate(commands):
        print("python", command, flush=True)
        left = deadline - time.monotonic()
        log = out / "logs" / f"{options.stage}_{number}.log"
        codes.append(run_command(command, variables, log, left) if left > 0 else None)
        print("not begun: no time is left" if codes[-1] is None else f"exit code {codes[-1]}", flush=True)
    copy_runs(runs, copy)
    return sys.exit(0 if set(codes) == {0} else 1)


if __name__ == "__main__":
    main()
