"""What the benchmarks share: provenance, timing, tables, and `trudi_mjx.Args` as a base of their own."""

import dataclasses
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import tyro

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
sys.path.insert(0, str(ROOT))
import trudi_mjx as trudi  # noqa: E402
from benchmark.tables import markdown_table  # noqa: E402, F401, which the others take from here

# Prefixes of the names of those whose versions matter.
PACKAGES = ("flax", "jax", "mani", "mujoco", "numpy", "nvidia-c", "optax", "orbax", "playground", "torch",
            "warp-lang")

@dataclasses.dataclass(frozen=True)
class Sizes(trudi.Args):
    """The flags of trudi_mjx.py without those that a benchmark sets itself or has no use for."""

    total_timesteps: tyro.conf.Suppress[int | None] = None
    log_dir: tyro.conf.Suppress[str] = "runs"
    compilation_cache_dir: tyro.conf.Suppress[str] = ""
    track: tyro.conf.Suppress[bool] = False
    wandb_project_name: tyro.conf.Suppress[str] = "trudi"
    wandb_entity: tyro.conf.Suppress[str | None] = None
    resume: tyro.conf.Suppress[str | None] = None
    evaluate: tyro.conf.Suppress[str | None] = None
    export: tyro.conf.Suppress[str | None] = None
    capture_video: tyro.conf.Suppress[bool] = False

    def training_args(self, **changes: Any) -> trudi.Args:
        """The arguments of trudi_mjx.py among these, changed as said."""
        return trudi.Args(**{f.name: getattr(self, f.name) for f in dataclasses.fields(trudi.Args)} | changes)

def training_command(args: trudi.Args) -> list[str]:
    """The command that trains with these unresolved arguments, naming those that are not defaults."""
    command = [sys.executable, str(ROOT / "trudi_mjx.py")]
    for field in dataclasses.fields(trudi.Args):
        value, name = getattr(args, field.name), trudi.flag(field.name)
        if value == field.default:
            continue
        if field.type is bool:
            command.append(name if value else name.replace("--", "--no-", 1))
            continue
        for one in value if isinstance(value, tuple) else (value,):  # a flag that is given several times
            command += [name, str(one)]
    return command

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
    place = script.relative_to(ROOT) if script.is_relative_to(ROOT) else f"benchmark/{script.name}"
    command = ["python", str(place), *map(without_folders, sys.argv[1:])]
    versions = {name: version
                for name, version in found["versions"].items() if name.lower().startswith(PACKAGES)}
    return found | {"script": script.stem, "command": command, "cpu": cpu_name(), "versions": versions,
                    "date": time.strftime("%Y-%m-%d", time.gmtime())}

def shown_args(args: trudi.Args) -> dict[str, Any]:
    """Arguments for a results file: all but the folders."""
    return {name: value for name, value in vars(args).items() if not name.endswith("_dir")}

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
