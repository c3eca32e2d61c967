"""Runs a sweep's units on this machine: a process on each GPU or on cores of its own, a table, clean ends."""

import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections import deque
from typing import Any

from benchmark.launch.units import Process, Refused, State, Unit, last_lines
from benchmark.runs import RETURN

POLL = 0.5  # seconds between looks at the processes
Slot = tuple[tuple[str, ...], dict[str, str]]  # words before a command, and its environment


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where processes run: slots in turn, each with a GPU, or with cores of its own."""

    slots: list[Slot]

    @classmethod
    def here(cls, workers: int | None) -> "Machine":
        """This machine with so many slots; default: one for each GPU, or one."""
        gpus = visible_gpus()
        count = workers or max(len(gpus), 1)
        if gpus:
            each = -(-count // len(gpus))  # on one GPU; JAX would take 75% of its memory for the first
            memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / each:.2f}"} if each > 1 else {}
            return cls([((), {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)], **memory}) for i in range(count)])
        cores = sorted(os.sched_getaffinity(0)) if shutil.which("taskset") else []
        if count == 1 or len(cores) < count:
            return cls([((), {})] * count)
        return cls([(("taskset", "-c", ",".join(map(str, cores[i::count]))), {}) for i in range(count)])


def visible_gpus() -> list[str]:
    """Numbers of the GPUs that CUDA_VISIBLE_DEVICES leaves, or of all that nvidia-smi lists."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [x for x in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if x]
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()


def columns(rows: list[list[str]]) -> str:
    """Rows as lines, the first column aligned to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            word.rjust(width) if i else word.ljust(width)
            for i, (word, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def shown_time(seconds: float | None) -> str:
    """A duration for a person."""
    if seconds is None:
        return "?"
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def progress(unit: Unit, state: State) -> float:
    """The share of a unit that is done, in [0, 1]; an evaluation's is not known before it ends."""
    done = state.step / max(unit.total_timesteps, 1)
    if unit.hours is not None:
        done = state.training_seconds / (unit.hours * 3600)
    return 1.0 if state.kind == "finished" else 0.0 if unit.evaluation else min(done, 1.0)


def seconds_left(unit: Unit, state: State) -> float | None:
    """Seconds that a run that goes on as it did still takes; None before its first iteration."""
    done = progress(unit, state)
    return state.wall_time / done * (1 - done) if done > 0 else None


class Sweep:
    """The state of a sweep on this machine: what waits, runs, is finished, failed."""

    def __init__(self, states: list[tuple[Unit, State]], log_dir: pathlib.Path, machine: Machine) -> None:
        """Of units and how far they are."""
        self.log_dir, self.began = log_dir, time.monotonic()
        self.states = dict(states)
        self.waiting = deque(unit for unit, state in states if state.kind == "waiting")
        self.failed = {
            unit: "a metric was not finite; remove the run's folder diverged/ to try again from its "
            "checkpoint"
            for unit, state in states
            if state.kind == "diverged"
        }
        # of each running unit: its process and slot
        self.free, self.running = list(reversed(machine.slots)), {}
        self.received: list[int] = []  # signals

    def hear(self, number: int, _: Any) -> None:
        """On the first signal let every run write a checkpoint and end, on the second kill them."""
        self.received.append(number)
        self.waiting.clear()
        for process, _ in self.running.values():
            process.stop() if len(self.received) == 1 else process.kill()
        print(
            "\nwaiting for the checkpoints of what runs; once more to kill it"
            if len(self.received) == 1
            else "\nkilled",
            flush=True,
        )

    def launch(self) -> None:
        """Start the next unit in a free slot."""
        unit, slot = self.waiting.popleft(), self.free.pop()
        try:
            process = Process(unit, self.log_dir, slot[0], **slot[1])
            self.running[unit] = process, slot
            if self.received:  # while it was being started, so that it was not told
                process.stop()
        except Refused as error:
            self.failed[unit] = str(error)
            self.free.append(slot)

    def collect(self) -> bool:
        """Take in what has ended; whether anything has."""
        ended = [unit for unit, (process, _) in self.running.items() if process.poll() is not None]
        for unit in ended:
            process, slot = self.running.pop(unit)
            self.free.append(slot)
            self.states[unit] = process.state()
            if error := process.judge():
                self.failed[unit] = error
            self.states[unit] = process.state()
        return bool(ended)

    def left(self) -> float | None:
        """Seconds that the sweep still takes: what is left of all units, at the pace of those of the same
        task or, where there is none yet, of any, shared by the slots."""
        seconds = {
            unit: seconds_left(unit, state) for unit, state in self.states.items() if unit in self.running
        }
        paces = {
            unit: state.wall_time / progress(unit, state)
            for unit, state in self.states.items()
            if state.wall_time > 0 and progress(unit, state) > 0 and not unit.evaluation
        }
        if not paces or any(x is None for x in seconds.values()):
            return None
        mean = sum(paces.values()) / len(paces)
        for unit in self.waiting:
            same = [pace for other, pace in paces.items() if other.task == unit.task]
            pace = sum(same) / len(same) if same else mean
            seconds[unit] = pace * (1 - progress(unit, self.states[unit]))
        slots = max(len(self.running) + len(self.free), 1)
        return max([sum(seconds.values()) / slots, *(seconds[unit] for unit in self.running)])

    def table(self) -> str:
        """Counts, time left, and a line for each running unit."""
        self.states |= {unit: process.state() for unit, (process, _) in self.running.items()}
        rows = [["run", "on", "steps", "done", "steps/s", "last return", "left"]]
        for unit, (_, slot) in self.running.items():
            state = self.states[unit]
            where = slot[1].get("CUDA_VISIBLE_DEVICES", slot[0][-1] if slot[0] else "")
            event = state.run.last() if state.run else {}
            sps = event.get("charts/SPS", 0) * unit.num_seeds
            rows.append(
                [
                    unit.name,
                    where,
                    f"{state.step:,}",
                    f"{progress(unit, state):.0%}",
                    f"{sps:,.0f}",
                    f"{event[RETURN]:.1f}" if RETURN in event else "",
                    shown_time(seconds_left(unit, state)),
                ]
            )
        finished = sum(state.kind == "finished" for state in self.states.values())
        time_left = f", {shown_time(self.left())} left" if self.running else ""
        counts = (
            f"{finished} of {len(self.states)} finished, {len(self.running)} running, "
            f"{len(self.waiting)} waiting, {len(self.failed)} failed{time_left}"
        )
        return f"{counts}\n{columns(rows)}\n" if self.running else f"{counts}\n"

    def failures(self) -> str:
        """What failed, with the last lines of its log."""
        parts = []
        for unit, error in self.failed.items():
            parts += [f"{unit.name}: {error}", *(f"    {line}" for line in last_lines(unit, self.log_dir))]
        return "\n".join(parts)


def run_locally(
    states: list[tuple[Unit, State]], log_dir: pathlib.Path, machine: Machine, interval: float
) -> int:
    """Run what is not finished; the exit code: 0 if all is finished, 1 if anything failed, 128 + a signal."""
    sweep, shown = Sweep(states, log_dir, machine), -1e9
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, sweep.hear)
    while sweep.waiting or sweep.running:
        while sweep.waiting and sweep.free:
            sweep.launch()
        if sweep.collect() or time.monotonic() - shown > interval:
            print(sweep.table(), flush=True)
            shown = time.monotonic()
        time.sleep(POLL)
    print(sweep.table() + sweep.failures(), flush=True)
    return 128 + sweep.received[0] if sweep.received else int(bool(sweep.failed))
