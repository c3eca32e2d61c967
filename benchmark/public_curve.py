"""Returns of runs beside REPPO's public curve at the same environment steps.

    python benchmark/public_curve.py benchmark/results/humanoids

Arguments are run folders, or folders that are searched for them. Prints a Markdown table with a row for each
run: its evaluations at the three early steps that benchmark/anchors/reppo_returns.csv has, its last and its
best one, and its minutes, evaluations included and compilation not. A row above each task's runs has the mean
of REPPO's. What a run has not reached is left empty. `mean of the last` is over the evaluations of the last
half million steps, since one evaluation of few episodes is noise.
"""

import dataclasses
import pathlib
import sys

import numpy as np
import pandas as pd
import tyro
from tables import markdown_table

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.runs import RETURN, Run, events, find_runs  # noqa: E402

STEPS = {"2.49M": 2_490_368, "4.98M": 4_980_736, "9.96M": 9_961_472}
LAST = 500_000  # steps over which the last evaluations are averaged


@dataclasses.dataclass(frozen=True)
class Options:
    """Print a table of runs beside REPPO's public curve."""

    sources: tyro.conf.Positional[tuple[str, ...]]  # run folders, or folders that are searched for them


def read_returns(path: pathlib.Path) -> pd.Series:
    """A log's evaluations, indexed by environment steps."""
    evaluated = [event for event in events(path) if RETURN in event]
    return pd.Series([event[RETURN] for event in evaluated], [event["step"] for event in evaluated], dtype=float)


def shown(x: float) -> str:
    """A return, or nothing where there is none."""
    return "" if np.isnan(x) else f"{x:.1f}"


def run_rows(run: Run) -> list[tuple[str, ...]]:
    """A row for each seed of a run."""
    rows = []
    for seed, path in run.logs.items():
        log, returns = events(path), read_returns(path)
        early = [shown(returns.get(step, np.nan)) for step in STEPS.values()]
        last = returns[returns.index > returns.index[-1] - LAST].mean()
        end = f"{log[-1]['step']:,}", f"{log[-1]['wall_time'] / 60:.0f}"
        name = f"{run.args['exp_name']}, seed {seed}"
        rows.append((name, *early, shown(returns.iloc[-1]), shown(last), shown(returns.max()), *end))
    return rows


def public_row(env_id: str, public: pd.DataFrame) -> tuple[str, ...]:
    """REPPO's published means, at the early steps and at 50M."""
    mean = public.loc[env_id]
    early = [shown(mean[f"reppo_large_at_{name}"]) for name in STEPS]
    return (f"**{env_id}**: REPPO, public", *early, shown(mean.reppo_large_final_50M), "", "", "50,000,000", "")


def main() -> None:
    """Print the table."""
    public = pd.read_csv(ROOT / "benchmark" / "anchors" / "reppo_returns.csv", index_col="env")
    runs = find_runs(tyro.cli(Options).sources)
    rows = []
    for env_id in sorted({run.args["env_id"] for run in runs}):
        rows.append(public_row(env_id, public))
        own = [run for run in runs if run.args["env_id"] == env_id]
        for run in sorted(own, key=lambda run: (run.args["exp_name"], run.args["seed"])):
            rows += run_rows(run)
    header = ("run", *(f"at {name}" for name in STEPS), "last", "mean of the last", "best", "steps", "minutes")
    print(markdown_table(header, rows), end="")


if __name__ == "__main__":
    main()
