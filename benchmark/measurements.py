"""What all measurements share: timing, and what a results file says of how it came about."""

import itertools
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

import trudi_mjx as trudi
from benchmark.tasks import ROOT

RESULTS = ROOT / "benchmark" / "results"
# Prefixes of the names of those whose versions matter.
PACKAGES = (
    "flax",
    "jax",
    "mani",
    "mujoco",
    "numpy",
    "nvidia-c",
    "optax",
    "orbax",
    "playground",
    "torch",
    "warp-lang",
)


def without_folders(argument: str) -> str:
    """An argument as it is recorded: of an absolute path, or of --flag=path, only the path's last part."""
    name, equals, value = argument.rpartition("=")
    return name + equals + pathlib.PurePath(value).name if value.startswith(("/", "~")) else argument


def cpu_name() -> str:
    """The processor's name."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def provenance() -> dict[str, Any]:
    """`trudi_mjx.provenance` of the benchmark that runs: its command, the commit, the hardware and the
    versions that matter."""
    found = trudi.provenance()
    script = pathlib.Path(sys.argv[0]).resolve()
    module = ".".join(script.relative_to(ROOT).with_suffix("").parts)
    command = ["python", "-m", module, *map(without_folders, sys.argv[1:])]
    versions = {
        name: version for name, version in found["versions"].items() if name.lower().startswith(PACKAGES)
    }
    return found | {
        "script": script.stem,
        "command": command,
        "cpu": cpu_name(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Write results, with their provenance first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"provenance": provenance(), **content}, indent=1) + "\n")


def measure(program: Callable, arguments: tuple, repeats: int) -> list[float]:
    """Seconds of several calls, waiting for results; a first one, which may compile, is not counted."""
    jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - began)
    return seconds


def measure_in_turn(
    calls: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call in each of several rounds, so that a disturbance of the machine meets all of them; the
    rounds in which they compile are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(warm_up + repeats), calls.items()):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds[name].append(time.perf_counter() - began)
    return {name: times[warm_up:] for name, times in seconds.items()}
