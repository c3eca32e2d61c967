"""Learning curves of trudi_mjx.py from metrics.jsonl files: a mean line per group over its seeds' thin ones.

    python benchmark/plot_curves.py \
        benchmark/results/curves/CartpoleBalance benchmark/results/curves/CheetahRun \
        --output benchmark/results/curves.png [--metric eval/episodic_return] [--label-by env_id]

Every argument is a metrics.jsonl, a folder that is searched for them, or a quoted glob of either. A group is
what has the same label: the name of the folder two levels above the file, as in
curves/<group>/<run>/metrics.jsonl, or with --label-by the value of an argument that the args.json beside the
file, or one folder above, records. Nothing is smoothed. The mean is drawn as far as all seeds of the group
go, over the steps at which any of them was evaluated, by interpolation where one was not.
"""

import dataclasses
import glob
import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np
import tyro

COLOURS = ("#2a6f97", "#d1495b", "#4c956c", "#e09f3e", "#6d597a", "#00798c", "#8d5a3b", "#5c677d")
FOLDER = "folder"

@dataclasses.dataclass(frozen=True)
class Curve:
    """One seed's values of a metric (n,), their steps, and seconds and steps at the end of the log."""

    steps: np.ndarray
    values: np.ndarray
    seconds: float
    last_step: int

@dataclasses.dataclass(frozen=True)
class Options:
    """Draw learning curves."""

    sources: tyro.conf.Positional[tuple[str, ...]]  # metrics.jsonl files, folders or globs
    output: str  # the image to write
    metric: str = "eval/episodic_return"  # what to draw
    label_by: str = FOLDER  # "folder", or an argument's name in args.json, such as env_id
    title: str = ""  # above the axes
    ylabel: str | None = None  # of the vertical axis; default: the metric's name
    ymin: float | None = None  # lower end of the vertical axis
    ymax: float | None = None  # upper end of the vertical axis

def find_logs(sources: tuple[str, ...]) -> list[pathlib.Path]:
    """All metrics.jsonl that files, folders or globs name, sorted, each once."""
    found = {path for source in sources for path in map(pathlib.Path, glob.glob(source, recursive=True))}
    files = {file.resolve() for path in found
             for file in (path.rglob("metrics.jsonl") if path.is_dir() else [path])}
    return sorted(files)

def label_of(path: pathlib.Path, label_by: str) -> str:
    """The group that a metrics.jsonl belongs to."""
    if label_by == FOLDER:
        return path.parent.parent.name
    args = next((folder / "args.json" for folder in path.parents[:2] if (folder / "args.json").exists()),
                None)
    if args is None:
        raise SystemExit(f"--label-by {label_by} needs an args.json beside {path}")
    return str(json.loads(args.read_text())["args"][label_by])

def read_curve(path: pathlib.Path, metric: str, until: float) -> Curve:
    """Read a metrics.jsonl up to a step, of a run in progress too; lines without the metric count for length
    only."""
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    lines = [line for line in lines if line["step"] <= until]
    own = [line for line in lines if metric in line]
    if not own:
        raise SystemExit(f"{path} has no {metric}")
    steps, values = (np.array([line[name] for line in own], float) for name in ("step", metric))
    return Curve(steps, values, lines[-1]["wall_time"], lines[-1]["step"])

def read_groups(sources: tuple[str, ...], metric: str, label_by: str = FOLDER,
                until: float = np.inf) -> dict[str, list[Curve]]:
    """The curves of every group, in the order of their names."""
    groups = {}
    for path in find_logs(sources):
        groups.setdefault(label_of(path, label_by), []).append(read_curve(path, metric, until))
    if not groups:
        raise SystemExit(f"no metrics.jsonl in {' '.join(sources)}")
    return groups

def mean_curve(curves: list[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and mean over curves, on all steps that lie within each of them."""
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    low, high = max(curve.steps[0] for curve in curves), min(curve.steps[-1] for curve in curves)
    steps = steps[(steps >= low) & (steps <= high)]
    return steps, np.mean([np.interp(steps, curve.steps, curve.values) for curve in curves], axis=0)

def spread_labels(heights: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Heights moved as little as needed for labels to be at least gap apart within [low, high]."""
    order, placed = np.argsort(heights), np.array(heights, float)
    for below, above in zip(order[:-1], order[1:], strict=True):
        placed[above] = max(placed[above], placed[below] + gap)
    if len(placed) and placed[order[-1]] > high:
        placed[order[-1]] = high
        for below, above in zip(order[-2::-1], order[:0:-1], strict=True):
            placed[below] = min(placed[below], placed[above] - gap)
    return np.maximum(placed, low)

def note(groups: dict[str, list[Curve]]) -> str:
    """What thick and thin lines are."""
    fewest, most = (f(map(len, groups.values())) for f in (min, max))
    count = most if fewest == most else f"{fewest} to {most}"
    return f"thick: mean of {count} seeds; thin: each of them" if most > 1 else ""

def draw(groups: dict[str, list[Curve]], options: Options) -> None:
    """Draw all groups in one frame, each labelled where its mean ends."""
    plt.rcParams.update({"font.size": 12, "axes.edgecolor": "0.6", "xtick.color": "0.35",
                         "ytick.color": "0.35", "axes.labelcolor": "0.25"})
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    million = max(curve.last_step for curves in groups.values() for curve in curves) >= 1e6
    unit, ends = 1e6 if million else 1e3, []
    for number, (label, curves) in enumerate(groups.items()):
        colour = COLOURS[number % len(COLOURS)]
        for curve in curves if len(curves) > 1 else []:
            axes.plot(curve.steps / unit, curve.values, color=colour, linewidth=0.8, alpha=0.4)
        steps, mean = mean_curve(curves)
        axes.plot(steps / unit, mean, color=colour, linewidth=2.4, solid_capstyle="round")
        ends.append((steps[-1] / unit, mean[-1], label, colour))
    longest = max(curve.steps[-1] for curves in groups.values() for curve in curves)
    axes.set(xlim=(0, longest / unit), xlabel=f"environment steps ({'millions' if million else 'thousands'})",
             ylabel=options.ylabel or options.metric.split("/")[-1].replace("_", " "))
    axes.set_ylim(options.ymin, options.ymax)
    axes.set_title(options.title, loc="left", fontsize=13)
    axes.set_title(note(groups), loc="right", fontsize=10, color="0.45")
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = axes.get_ylim()
    heights = spread_labels(np.array([end[1] for end in ends]), (high - low) * 0.06, low, high)
    for (x, _, label, colour), height in zip(ends, heights, strict=True):
        axes.annotate(label, (x, height), (8, 0), textcoords="offset points", color=colour, va="center",
                      annotation_clip=False)
    figure.savefig(options.output, dpi=200)

if __name__ == "__main__":
    OPTIONS = tyro.cli(Options)
    pathlib.Path(OPTIONS.output).parent.mkdir(parents=True, exist_ok=True)
    draw(read_groups(OPTIONS.sources, OPTIONS.metric, OPTIONS.label_by), OPTIONS)
