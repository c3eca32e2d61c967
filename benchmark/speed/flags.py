"""`trudi_mjx.Args` as a base of the flags of measurements."""

import dataclasses
import sys
from typing import Any

import tyro

import trudi_mjx as trudi
from benchmark.tasks import ROOT


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


def shown_args(args: trudi.Args) -> dict[str, Any]:
    """Arguments for a results file: all but the folders."""
    return {name: value for name, value in vars(args).items() if not name.endswith("_dir")}
