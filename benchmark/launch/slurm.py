"""Submits the units of a sweep as a Slurm job array through submitit. A job that is preempted or runs out of
time writes a checkpoint and is requeued, and then continues its run."""

import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from importlib import import_module, util
from typing import Any

from benchmark.launch.units import STOPPED, Process, State, Unit, fail, last_lines

POLL = 0.5  # seconds between looks at the process
NOTICE = 300  # seconds before the time limit at which a run is told to write its checkpoint
GRACE = 600.0  # seconds to wait for Slurm to take the job away once it has ended the run itself


@dataclasses.dataclass
class Job:
    """What a job does; submitit pickles it, and what `checkpoint` returns when it requeues the job."""

    unit: Unit
    log_dir: pathlib.Path
    process: Process | None = None

    def __call__(self) -> str:
        """Do the unit. Raises RuntimeError, which marks the job as failed, if it does not finish."""
        self.process = Process(self.unit, self.log_dir)
        while self.process.poll() is None:
            time.sleep(POLL)
        error = self.process.judge()
        if error and not self.process.told and self.process.child.returncode in STOPPED:
            # a preemption that signals all processes: the run has its checkpoint, Slurm requeues the job
            time.sleep(GRACE)
        if error:
            raise RuntimeError(
                "\n".join([f"{self.unit.name}: {error}", *last_lines(self.unit, self.log_dir)])
            )
        return f"{self.unit.name}: finished"

    def checkpoint(self) -> Any:
        """Called by submitit in a signal handler before it requeues the job: the run writes a checkpoint."""
        if self.process:
            self.process.stop()
            # __call__ may hold Popen's lock where the signal interrupted it: wait without lock and exit code.
            os.waitid(os.P_PID, self.process.child.pid, os.WEXITED | os.WNOWAIT)
        return import_module("submitit").helpers.DelayedSubmission(Job(self.unit, self.log_dir))


def array_executor(
    folder: pathlib.Path, hours: float, gpus: int, cpus: int, parallel: int | None, sbatch: dict[str, str]
) -> Any:
    """submitit's executor of a job array. Exits with code 2 where there is no Slurm."""
    if not shutil.which("sbatch"):
        fail("--slurm needs sbatch, which is not on this machine")
    executor = import_module("submitit").AutoExecutor(
        folder=folder, cluster="slurm", slurm_max_num_timeout=100
    )
    executor.update_parameters(
        name="trudi",
        timeout_min=int(hours * 60),
        cpus_per_task=cpus,
        slurm_array_parallelism=parallel or 1000,
        slurm_signal_delay_s=NOTICE,
        slurm_additional_parameters={"requeue": True, **sbatch},
        **({"gpus_per_node": gpus} if gpus else {}),
    )
    return executor


def submit(states: list[tuple[Unit, State]], log_dir: pathlib.Path, make_executor: Callable) -> list[Any]:
    """Submit what remains; returns submitit's jobs."""
    if not util.find_spec("submitit"):
        fail("--slurm needs submitit; pip install -r benchmark/requirements.txt")
    log_dir = log_dir.absolute()
    jobs = [Job(unit, log_dir) for unit, state in states if state.kind == "waiting"]
    if not jobs:
        print("nothing remains")
        return []
    executor = make_executor(log_dir / "slurm")
    with executor.batch():
        submitted = [executor.submit(job) for job in jobs]
    print(
        f"submitted {len(submitted)} jobs, {submitted[0].job_id} to {submitted[-1].job_id}; logs of the "
        f"runs are in {log_dir}/logs, of the jobs in {log_dir}/slurm; the same command with --dry-run "
        "tells what remains"
    )
    return submitted
