"""Reads the run folders that the scripts write: args.json, metrics.jsonl (in seed_*/ where seeds were trained
side by side), checkpoints."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

RETURN = "eval/episodic_return"
NOT_SEARCHED = ("checkpoints", "videos", "wandb", "diverged", "logs", "slurm")  # many files, and no runs
TAIL = 65536  # bytes from a log's end in which its last line lies

@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder, of one seed or of several trained side by side."""

    folder: pathlib.Path
    script: str  # without .py
    args: dict[str, Any]  # resolved, as args.json has them
    device: str  # as args.json describes it

    @property
    def identity(self) -> tuple[str, str, str, int, int]:
        """What no two runs of a sweep share: script, exp_name, env_id, first seed and number of seeds."""
        args = self.args
        return self.script, args["exp_name"], args["env_id"], args["seed"], args.get("num_seeds", 1)

    @property
    def logs(self) -> dict[int, pathlib.Path]:
        """Each seed's metrics.jsonl, whether it exists or not."""
        seeds = range(self.args["seed"], self.args["seed"] + self.args.get("num_seeds", 1))
        return {seed: self.folder / (f"seed_{seed}" if len(seeds) > 1 else "") / "metrics.jsonl"
                for seed in seeds}

    @property
    def checkpoint(self) -> int:
        """Environment steps of the newest checkpoint; -1 without one."""
        names = (path.stem for path in self.folder.glob("checkpoints/*"))
        return max((int(name) for name in names if name.isdigit()), default=-1)

    @property
    def diverged(self) -> bool:
        """Whether a loss was not finite, which stops a run."""
        return (self.folder / "diverged").exists()

    def last(self) -> dict[str, Any]:
        """The last event of the seed that is least far, with step 0 and wall_time 0 before the first one."""
        return min((last_event(path) for path in self.logs.values()), key=lambda event: event["step"])

    def training_seconds(self) -> float:
        """Seconds of training so far of the seed that is least far."""
        return min(training_seconds(path, path.stat().st_mtime_ns) if path.exists() else 0.0
                   for path in self.logs.values())

    def end(self, total_timesteps: int | None = None) -> int:
        """The step at which a run of so many environment steps ends; default: of its arguments' number."""
        total = self.args["total_timesteps"] if total_timesteps is None else total_timesteps
        # steps that do not fill an iteration are left out
        return total // self.args["batch_size"] * self.args["batch_size"]

    def finished(self, total_timesteps: int | None = None) -> bool:
        """Whether every seed has reached the end and was evaluated there."""
        event = self.last()
        return event["step"] >= self.end(total_timesteps) and RETURN in event

@functools.cache
def read_args(path: pathlib.Path, _changed: int) -> Run | None:
    """The run of an args.json, read again only if it has changed; None, and a word on stderr, if not ours."""
    try:
        saved = json.loads(path.read_text())
        run = Run(path.parent, saved["script"], saved["args"], saved.get("device", ""))
        return run if run.identity and run.args["batch_size"] > 0 else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"left out: {path} is not of a run ({type(error).__name__}: {error})", file=sys.stderr)
        return None

def find_runs(sources: Iterable[str | pathlib.Path]) -> list[Run]:
    """All runs in these folders and below, each once, in the order of their paths."""
    found = set()
    for source in sources:
        for folder, below, files in os.walk(source):
            below[:] = [name for name in below if name not in NOT_SEARCHED]
            found |= {pathlib.Path(folder, "args.json").resolve()} if "args.json" in files else set()
    runs = (read_args(path, path.stat().st_mtime_ns) for path in sorted(found))
    return [run for run in runs if run]

def furthest(runs: Iterable[Run]) -> Run | None:
    """Of runs with one identity the one to go on with: finished, or else with the newest checkpoint."""
    return max(runs, key=lambda run: (run.finished(), run.checkpoint, run.last()["step"]), default=None)

def events(path: pathlib.Path) -> list[dict[str, Any]]:
    """All events of a metrics.jsonl; without the last line that a killed run may have half written."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]

def training_times(log: list[dict[str, Any]]) -> list[float]:
    """Seconds of training until each event: environment steps over charts/SPS, their speed, which is that of
    iterations alone, where wall_time has evaluations and checkpoints too. Compilation is in neither."""
    steps = [0, *(event["step"] for event in log)]
    return list(itertools.accumulate((step - before) / event["charts/SPS"]
                                     for before, step, event in zip(steps, steps[1:], log, strict=False)))

@functools.cache
def training_seconds(path: pathlib.Path, _changed: int) -> float:
    """Seconds of training in a metrics.jsonl, read again only if it has changed."""
    return max(training_times(events(path)), default=0.0)

def last_event(path: pathlib.Path) -> dict[str, Any]:
    """The last whole event of a metrics.jsonl, read from its end."""
    nothing = {"step": 0, "wall_time": 0.0}
    if not path.exists():
        return nothing
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL, 0))
        lines = [line for line in file.read().split(b"\n")[:-1] if line]
    return json.loads(lines[-1]) if lines else nothing
