"""benchmark/report.py and curves.py: pages and tables of runs whose numbers are known."""

import importlib
import json
import pathlib
import re
import shutil
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
from sweeps import write_evaluation, write_run

from benchmark import curves, tasks
from benchmark.runs import RETURN, find_runs, read_table, training_times

ROOT = tasks.ROOT
PATIENCE = 150  # seconds that a process may take on a busy machine


def plain(page):
    """A page whose cells are not filled up with blanks."""
    return re.sub(r"\| (?=\|)", "|  ", re.sub(" +", " ", page))


@pytest.fixture
def report(monkeypatch, request):
    """Calls the command and returns the page. Only the first test has pictures, which take most of the time to draw."""
    pytest.importorskip("rliable")
    if request.function is not test_results_page:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: pathlib.Path(path).touch())
    module = importlib.import_module("benchmark.report")
    monkeypatch.setattr("benchmark.statistics.REPETITIONS", 200)
    def page(*sources, out, **options):
        flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        monkeypatch.setattr(sys, "argv", ["report", *map(str, sources), "--out", str(out), *flags])
        module.main()
        return plain((out / "README.md").read_text())
    return page


def table(path):
    return pd.read_csv(path)


def test_results_page(report, tmp_path):
    root, out = tmp_path / "runs", tmp_path / "out"
    for seed, top in ((1, 100.0), (2, 300.0)):
        write_run(root, "CheetahRun", seed, [0, top / 2, top], exp_name="a")
    write_run(root, "CheetahRun", 1, [0, 40.0, 90.0], exp_name="b")
    write_run(root, "WalkerWalk", 1, [[0, 5, 10.0], [0, 5, 30.0]], exp_name="a", seeds=2)
    write_run(root, "WalkerWalk", 3, [7, 8.0], exp_name="a", total=300)
    write_run(root, "CheetahRun", 2, [1.0], exp_name="a", total=300)  # begun anew; the finished one counts
    page = report(root, out=out)
    rows = table(out / "runs.csv")
    assert rows.state.value_counts().to_dict() == dict(finished=5, unfinished=1, superseded=1, missing=60 - 5 + 20 - 1)
    assert rows.query("task == 'WalkerWalk' and seed == 2").final.dropna().tolist() == [30]
    assert rows.query("group == 'b' and state == 'finished'").last_step.tolist() == [300]
    assert "a, MuJoCo Playground, DeepMind Control, unfinished: WalkerWalk (seed 3; at 200)" in page
    assert "HumanoidBench: no run" in page and "| CheetahRun | a | 2 | 200.0 [100.0, 300.0] |" in page
    assert "| CheetahRun | b | 1 | 90.0 |" in page and "| 933.1 |" in page
    curve = table(out / "tasks_dmc.csv").query("task == 'CheetahRun' and group == 'a'")
    assert curve.environment_steps.tolist() == [100, 200, 300] and curve.iqm.tolist() == [0, 100, 200]
    suites = table(out / "suites.csv").query("group == 'a'")  # compared on CheetahRun only, which b has too
    assert suites.iqm.tolist() == [0, 100, 200] and set(suites.tasks) == {1} and "| WalkerWalk |" in page
    probability = table(out / "improvement.csv").iloc[0]
    assert (probability.x, probability.y, probability.probability) == ("a", "b", 1.0)
    profile = table(out / "profiles.csv").query("group == 'a'")
    assert profile.share.iloc[0] == 1 and profile.share.iloc[-1] == 0 and 0.5 in profile.share.tolist()
    for name in ("tasks_dmc", "suites", "profiles", "improvement", "wall_clock"):
        assert (out / f"{name}.png").stat().st_size > 5000 and (out / f"{name}.pdf").read_bytes()[:4] == b"%PDF"
        assert f"({name}.png)" in page


@pytest.mark.parametrize("options", [{}, dict(group_by="folder"), dict(group_by="hidden_dim")], ids=str)
def test_algorithms_are_groups_of_their_own(report, tmp_path, options):
    """Also when their --exp-name, folder or argument is the same."""
    root, out = tmp_path / "runs", tmp_path / "out"
    for script, values in (("trudi_mjx", [0, 30.0]), ("ppo_mjx", [0, 10.0]), ("dppo_mjx", [0, 20.0])):
        write_run(root, "CheetahRun", 1, values, script=script, exp_name="same")
    page = report(root, out=out, **options)
    name = options.get("group_by", "same").replace("folder", "runs").replace("hidden_dim", "4")
    groups = {name: 30.0, f"ppo-{name}": 10.0, f"dppo-{name}": 20.0}
    rows = table(out / "runs.csv").query("state == 'finished'")
    assert dict(zip(rows.group.astype(str), rows.final, strict=True)) == groups
    suites = table(out / "suites.csv")
    assert {group: own.iqm.iloc[-1] for group, own in suites.groupby(suites.group.astype(str))} == groups
    assert set(table(out / "profiles.csv").group.astype(str)) == set(groups)
    assert len(table(out / "improvement.csv")) == 3
    assert all(f"| CheetahRun | {group} | 1 | {value:.1f} |" in page for group, value in groups.items())


def test_baselines_do_not_tell_trudis_cost(tmp_path):
    sizes = dict(num_envs=1024, num_steps=128, hidden_dim=512)
    found = {}
    for script in ("trudi_mjx", "reppo_mjx"):
        folder = write_run(tmp_path / script, "CheetahRun", 1, [0, 1.0], script=script)
        saved = json.loads((folder / "args.json").read_text())
        (folder / "args.json").write_text(json.dumps(saved | {"args": saved["args"] | sizes}))
        found[script] = bool(read_table([folder]).paper_sizes.all())
    assert found == {"trudi_mjx": True, "reppo_mjx": False}


def test_matched_wall_clock(report, tmp_path):
    """The fast one is evaluated after 15, 30, 45 and 60 min, the slow one after 30 and 60, the late one first after 120."""
    root = tmp_path / "runs"
    write_run(root, "CheetahRun", 1, [0, 100, 200, 300.0], exp_name="fast", hours=1.0)
    write_run(root, "CheetahRun", 1, [0, 70, 90, 100.0], exp_name="slow", hours=2.0)
    write_run(root, "CheetahRun", 1, [20.0, 400], exp_name="late", hours=4.0, step=200)
    page = report(root, out=tmp_path / "out")
    assert "| fast | 60.0 ± 0.0 | 0.0 | 300.00 | 300.00 at 60.0 |" in page
    assert "| slow | 120.0 ± 0.0 | 0.0 | 100.00 | 70.00 at 60.0 |" in page
    assert "| late | 240.0 ± 0.0 | 0.0 | 400.00 | none at 60.0 |" in page


def test_evaluations_are_not_in_matched_time(report, tmp_path):
    """Both train for an hour and learn alike; evaluations and checkpoints take one of them half an hour more, at the end."""
    root = tmp_path / "runs"
    write_run(root, "CheetahRun", 1, [0, 100, 200, 300.0], exp_name="quick")
    folder = write_run(root, "CheetahRun", 1, [0, 100, 200, 300.0], exp_name="watched", other_hours=0.5)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    for line, minutes in zip(lines, (15, 30, 45, 90), strict=True):
        line["wall_time"] = 60.0 * minutes
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(root, out=tmp_path / "out")
    assert "| quick | 60.0 ± 0.0 | 0.0 | 300.00 | 300.00 at 60.0 |" in page
    assert "| watched | 60.0 ± 0.0 | 30.0 | 300.00 | 300.00 at 60.0 |" in page
    rows = table(tmp_path / "out" / "runs.csv").query("state == 'finished'").set_index("group")
    assert rows.last_hours.to_dict() == {"quick": 1.0, "watched": 1.0} and rows.other_hours["watched"] == 0.5
    curves = table(tmp_path / "out" / "wall_clock.csv")
    quick, watched = (curves[curves.group == name].iqm.to_numpy() for name in ("quick", "watched"))
    np.testing.assert_allclose(quick, watched)


def test_training_time_of_a_log():
    """Of 100 steps at 50 a second, 100 at 25 and, where an iteration in between was not logged, 200 at 100."""
    log = [{"step": step, "charts/SPS": speed, "wall_time": 99.0} for step, speed in ((100, 50), (200, 25), (400, 100))]
    assert training_times(log) == [2, 6, 8] and training_times([]) == []


def test_training_time_of_a_real_run():
    """A committed one of 39 s with 5 evaluations and checkpoints of 2 to 3 s each."""
    folder = ROOT / "benchmark/results/baselines/curves/CheetahRun__ppo__1__1795439190"
    found, = find_runs([folder])
    assert 0.6 < found.training_seconds() / found.last()["wall_time"] < 0.7


def test_equal_hours_of_algorithms(report, tmp_path):
    """Figure 5, left: groups of equal hours together, over hours, and not with those of equal steps."""
    root, out = tmp_path / "runs", tmp_path / "out"
    for seed in (1, 2):
        write_run(root, "CheetahRun", seed, [0, 500.0], exp_name="trudi", hours=1.0)
        for script, factor in (("trudi", 1.0), ("reppo", 2.0), ("ppo", 3.0)):
            values = list(np.linspace(0, 100 * factor + seed, 5))
            write_run(root, "CheetahRun", seed, values, script=f"{script}_mjx", exp_name=f"{script}-wall-clock-0.5h",
                      hours=0.51, total=10**6)
    write_run(root, "CheetahRun", 3, [7.0], exp_name="trudi-wall-clock-0.5h", hours=0.2, total=10**6)  # not at its end
    write_run(root, "CheetahRun", 1, [0, 9.0], script="dime_mjx", exp_name="dime-wall-clock-2h", hours=2.1, total=10**6)
    page = report(root, out=out)
    groups = ["trudi-wall-clock-0.5h", "reppo-wall-clock-0.5h", "ppo-wall-clock-0.5h"]
    curves = table(out / "wall_clock_0.5h.csv")
    assert set(curves.group) == set(groups) and curves.hours.max() == pytest.approx(0.51)
    assert curves.groupby("group").iqm.last()[groups].round(6).tolist() == [101.5, 201.5, 301.5]
    assert set(table(out / "wall_clock_2h.csv").group) == {"dime-wall-clock-2h"}
    for name in ("wall_clock", "suites"):
        assert set(table(out / f"{name}.csv").group) == {"trudi"}
    assert "## Wall clock of 0.5 hours each" in page and "Figure 5, left" in page
    assert "| reppo-wall-clock-0.5h | 30.6 ± 0.0 | 0.0 | 201.50 [201.00, 202.00] | 201.50 [201.00, 202.00] at 30.6 |" in page
    assert "trudi-wall-clock-0.5h, MuJoCo Playground, DeepMind Control, unfinished: CheetahRun (seed 3; at 100)" in page
    assert "| CheetahRun | reppo-wall-clock-0.5h | 2 |" not in page  # among those of equal steps


def test_matched_wall_clock_is_of_each_task(report, tmp_path):
    """Walking takes twice the hours of running, and the slow group the double of the fast one's."""
    root = tmp_path / "runs"
    for task, factor in (("CheetahRun", 1.0), ("WalkerWalk", 2.0)):
        write_run(root, task, 1, [0, 100, 200, 300.0], exp_name="fast", hours=factor)
        write_run(root, task, 1, [0, 70, 90, 100.0], exp_name="slow", hours=2 * factor)
    page = report(root, out=tmp_path / "out")
    for row in ("CheetahRun | 60.00 | fast | 300.00", "CheetahRun | 60.00 | slow | 70.00",
                "WalkerWalk | 120.00 | fast | 300.00", "WalkerWalk | 120.00 | slow | 70.00"):
        assert f"| {row} |" in page
    assert "| 70.00 at 60.0 to 120.0 |" in page


def test_equal_steps(report, tmp_path):
    """One of the groups was trained twice as far; wall clock has all of it."""
    root = tmp_path / "runs"
    write_run(root, "CheetahRun", 1, [0, 50, 200, 300.0], exp_name="long", hours=1.0)
    write_run(root, "CheetahRun", 1, [0, 100.0], exp_name="short", hours=1.0)
    whole, cut = (report(root, out=tmp_path / "out", **options) for options in ({}, {"until_steps": 200}))
    assert "| CheetahRun | long | 1 | 300.0 | 400 | 60.0 |" in whole.replace("|  |", "|")
    assert "| CheetahRun | long | 1 | 50.0 | 200 | 30.0 |" in cut.replace("|  |", "|")
    assert "compared after 200 environment steps" in cut
    assert "| long | 60.0 ± 0.0 | 0.0 | 300.00 |" in cut
    assert "| short | 60.0 ± 0.0 | 0.0 | 100.00 |" in cut


def test_returns_of_isaac_lab_are_normalised(report, tmp_path):
    for env_id, scale in (("Isaac-Velocity-Flat-G1-v0", 1), ("Isaac-Reorient-Cube-Shadow-Direct", 1000)):
        for group, share in (("a", 1.0), ("b", 0.5)):
            write_run(tmp_path / "runs", env_id, 1, [0, share * scale], exp_name=group, script="trudi_isaaclab")
    report(tmp_path / "runs", out=tmp_path / "out")
    rows = table(tmp_path / "out" / "suites.csv").query("environment_steps == 200").set_index("group")
    assert rows.iqm.to_dict() == {"a": 1.0, "b": 0.5}


def scores_of(report, tmp_path, env_id, curves):
    """Normalised last scores and those at matched time of groups' curves, by group."""
    root, out = tmp_path / "runs", tmp_path / "out"
    shutil.rmtree(root, ignore_errors=True)
    for group, (hours, *seeds) in curves.items():
        for seed, values in enumerate(seeds, 1):
            write_run(root, env_id, seed, values, exp_name=group, script="trudi_isaaclab", hours=hours)
    page = report(root, out=out)
    rows = re.findall(r"^\| Isaac Lab \| (\w+) \| [^|]*± [^|]*\| [^|]*\| (\S+) [^|]*\| (\S+) [^|]*at [^|]*\|", page, re.M)
    last = {group: float(value) for group, value, _ in rows}
    ends = table(out / "suites.csv").groupby("group").iqm.last().round(2).to_dict()
    assert last == ends
    return last, {group: float(value) for group, _, value in rows}


ISAAC = "Isaac-Velocity-Flat-G1-v0"


@pytest.mark.parametrize("shift", [0.0, -1000.0, 1000.0])
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_normalised_scores_do_not_depend_on_where_returns_are(report, tmp_path, shift, factor):
    """0 is the lower of the first evaluations and 1 the higher of the last ones, also of negative returns."""
    curves = {"a": (1.0, [-100, -10.0]), "b": (1.0, [-90, -55.0])}
    moved = {group: (hours, *[[factor * x + shift for x in own] for own in seeds]) for group, (hours, *seeds) in curves.items()}
    assert scores_of(report, tmp_path, ISAAC, moved)[0] == {"a": 1.0, "b": 0.5}


def test_normalised_scores_of_groups_that_do_not_learn(report, tmp_path):
    """Worse than at first is below 0 or between; constant returns are no division by zero."""
    assert scores_of(report, tmp_path, ISAAC, {"a": (1.0, [-10, -30.0]), "b": (1.0, [0, -5.0])})[0] == {"a": -2.0, "b": 0.5}
    assert scores_of(report, tmp_path, ISAAC, {"a": (1.0, [3, 3.0]), "b": (1.0, [3, 3.0])})[0] == {"a": 0.0, "b": 0.0}


def test_scores_at_matched_time_are_normalised(report, tmp_path):
    """The slow one has half of its hours by then, at its second evaluation."""
    curves = {"fast": (1.0, [-100, -60, -20, 100.0]), "slow": (2.0, [-100, 0, 40, 80.0])}
    last, matched = scores_of(report, tmp_path, ISAAC, curves)
    assert last == {"fast": 1.0, "slow": 0.9} and matched == {"fast": 1.0, "slow": 0.5}
    page = plain((tmp_path / "out" / "README.md").read_text())
    assert f"| {ISAAC.removesuffix('-v0')} | 60.00 | slow | 0.50 |" in page
    assert page.count("Returns of Isaac Lab are normalised for each task") == 2


def test_last_evaluation_counts_not_the_best(report, tmp_path):
    root, out = tmp_path / "runs", tmp_path / "out"
    for group, bound, own in (
            ("falls", 0.1, [0, 100, 60.0]), ("falls-epsilon-1", 1.0, [0, 90, 30.0]), ("falls-epsilon-5", 5.0, [0, 80, 20.0]),
            ("falls-wall-clock-0.9h", 0.1, [0, 70, 10.0]), ("rises", 0.1, [0, 40, 80.0])):
        write_run(root, "CheetahRun", 1, own, exp_name=group, trust_region_bound=bound)
    page = report(root, out=out)
    finals = table(out / "runs.csv").query("state == 'finished'").set_index("group").final.to_dict()
    assert finals == {"falls": 60, "falls-epsilon-1": 30, "falls-epsilon-5": 20, "falls-wall-clock-0.9h": 10, "rises": 80}
    assert "| CheetahRun | falls | 1 | 60.0 |" in page and "| falls | 1 of 20 | 1 | 60.0 |" in page
    assert "| falls | 60.0 ± 0.0 | 0.0 | 60.00 | 60.00 at 60.0 |" in page
    assert "| falls-wall-clock-0.9h | 60.0 ± 0.0 | 0.0 | 10.00 | 10.00 at 60.0 |" in page
    assert "\n| 1 | 1 | 30.0 |" in page and "\n| 5 | 1 | 20.0 |" in page
    better = table(out / "improvement.csv").iloc[0]
    assert (better.x, better.y, better.probability) == ("falls", "rises", 0.0)
    profile = table(out / "profiles.csv").query("group == 'falls'")
    assert profile[profile.share == 1].threshold.max() < 60 <= profile[profile.share == 0].threshold.min()


def test_success_is_of_the_last_evaluation(report, tmp_path):
    folder = write_run(tmp_path / "runs", "PushCube-v1", 1, [0, 9, 5.0], script="trudi_maniskill")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    text = (json.dumps(line | {"eval/success_once": share}) + "\n" for line, share in zip(lines, (0, 0.75, 0.25), strict=True))
    (folder / "metrics.jsonl").write_text("".join(text))
    assert "| PushCube-v1 | trudi | 1 | 5.0 | 0.25 |" in report(tmp_path / "runs", out=tmp_path / "out")


def test_pages_of_ablations(report, tmp_path):
    root, out = tmp_path / "runs", tmp_path / "out"
    for value, top in ((0.01, 10.0), (0.1, 30.0), (10, 5.0)):
        for seed in (1, 2):
            write_run(root, "CheetahRun", seed, [0, top + seed], exp_name=f"s-epsilon-{value:g}", trust_region_bound=value)
    write_run(root, "CheetahRun", 1, [3.0], exp_name="s-epsilon-50", total=200)
    for n, hours in ((4, 0.51), (8, 0.52), (16, 0.3)):
        name = f"s-wall-clock-0.5h-denoising-{n}"
        write_run(root, "CheetahRun", 1, [0, 10.0 * n], exp_name=name, total=10**6, hours=hours, num_diffusion_steps=n)
    for seed in (1, 2, 3):
        write_evaluation(root, "CheetahRun", seed, "sde", 10.0 * seed, 200)
        write_evaluation(root, "CheetahRun", seed, "ode-1", 11.0 * seed, 200)
    write_evaluation(root, "CheetahRun", 4, "sde", 1000.0, 200)  # not evaluated by the ODE: does not count
    page = report(root, out=out)
    rows = table(out / "ablation_s_epsilon_dmc.csv").query("environment_steps == 200").set_index("value")
    assert rows.iqm.to_dict() == {0.01: 11.5, 0.1: 31.5, 10: 6.5} and "without a finished run: 50" in page
    timed = table(out / "ablation_s-wall-clock-0.5h_denoising_dmc.csv")
    assert timed.groupby("value").iqm.last().to_dict() == {4: 40.0, 8: 80.0} and "without a finished run: 16" in page
    assert timed.hours.max() == pytest.approx(0.52)
    modes = table(out / "ablation_evaluation.csv").set_index("evaluation")
    assert modes.iqm.to_dict() == {"sde": 20.0, "ode-1": 22.0} and set(modes.incomplete) == {1}
    assert (out / "ablation_evaluation.png").exists() and not (out / "suites.png").exists()


def test_default_is_listed_once(report, tmp_path):
    """N = 8, ε = 0.1 and the sweep itself, which went on for longer, are one experiment."""
    root, out = tmp_path / "runs", tmp_path / "out"
    values = {"s": (8, 0.1, [0, 10, 20.0]), "s-denoising-4": (4, 0.1, [0, 5.0]), "s-denoising-8": (8, 0.1, [0, 10.0]),
              "s-epsilon-0.1": (8, 0.1, [0, 10.0]), "s-epsilon-1": (8, 1.0, [0, 7.0]), "s-epsilon-5": (8, 5.0, [0, 6.0]),
              "before": (8, 0.1, [0, 10.0]), "after": (8, 0.1, [0, 12.0])}  # another text of the script, say
    for name, (n, bound, own) in values.items():
        for seed in (1, 2):
            write_run(root, "CheetahRun", seed, own, exp_name=name, num_diffusion_steps=n, trust_region_bound=bound)
    page = report(root, out=out)
    counts = page.partition("## Tasks")[0]
    listed = re.findall(r"^\| MuJoCo Playground, DeepMind Control \| ([\w.-]+) \| 1 \| 2 \|", counts, re.M)
    assert sorted(listed) == sorted(set(values) - {"s-denoising-8", "s-epsilon-0.1"})
    assert counts.count("the same runs as s's and counted there: CheetahRun (seed 1, 2; at 200)") == 2
    same = table(out / "runs.csv").dropna(subset="same_as")
    assert same.groupby("group").same_as.apply(list).to_dict() == {"s-denoising-8": ["s"] * 2, "s-epsilon-0.1": ["s"] * 2}
    for row in ("8 (= s) | 2 | 10.0", "4 | 2 | 5.0", "0.1 (= s) | 2 | 10.0", "1 | 2 | 7.0"):
        assert f"\n| {row} " in page


def test_ablations_share_their_default(report, tmp_path):
    """Without a sweep as far as they are."""
    root = tmp_path / "runs"
    for name, own in (("s", [0.0]), ("s-denoising-8", [0, 10.0]), ("s-epsilon-0.1", [0, 10.0])):
        write_run(root, "CheetahRun", 1, own, exp_name=name, num_diffusion_steps=8, trust_region_bound=0.1)
    assert "s-epsilon-0.1, MuJoCo Playground, DeepMind Control, the same runs" not in report(root, out=tmp_path / "out")
    shutil.rmtree(next(root.glob("*__s__*")))
    page = report(root, out=tmp_path / "out")
    assert "s-epsilon-0.1, MuJoCo Playground, DeepMind Control, the same runs as s-denoising-8's" in page


def test_default_of_an_ablation_is_read_from_the_sweep(report, tmp_path):
    """Until the step at which the others end; not where the ablation has runs of its own with that value."""
    root, out = tmp_path / "runs", tmp_path / "out"
    write_run(root, "CheetahRun", 1, [0, 10, 70.0], exp_name="s", trust_region_bound=0.1, num_diffusion_steps=8)
    write_run(root, "WalkerWalk", 1, [0, 500.0], exp_name="s", trust_region_bound=0.1, num_diffusion_steps=8)
    for value in (0.05, 5):
        name = f"s-epsilon-{value:g}"
        write_run(root, "CheetahRun", 1, [0, 100 * value], exp_name=name, trust_region_bound=value, num_diffusion_steps=8)
    report(root, out=out)
    rows = table(out / "ablation_s_epsilon_dmc.csv")
    assert rows.groupby("value").iqm.last().to_dict() == {0.05: 5, 0.1: 10, 5: 500} and rows.environment_steps.max() == 200
    write_run(root, "CheetahRun", 1, [0, 11.0], exp_name="s-epsilon-0.1", trust_region_bound=0.1, num_diffusion_steps=8)
    report(root, out=out)
    assert table(out / "ablation_s_epsilon_dmc.csv").groupby("value").iqm.last().to_dict() == {0.05: 5, 0.1: 11, 5: 500}


def test_page_of_the_sweep_has_every_experiment_once():
    page = plain((ROOT / "benchmark/results/sweep/README.md").read_text()).partition("## Tasks")[0]
    rows = re.findall(r"^\| MuJoCo Playground, DeepMind Control \| ([\w.-]+) \|", page, re.M)
    assert "trudi" in rows and not {"trudi-denoising-8", "trudi-epsilon-0.1"} & set(rows) and len(rows) == 9


def test_page_of_behavior_entropy(report, tmp_path):
    root, out = tmp_path / "runs", tmp_path / "out"
    folder = write_run(root, "benchmark.studies.multimodality:PushTSymmetric-v1", 1, [0, 1.0], script="trudi_maniskill")
    saved = dict(env_id="benchmark.studies.multimodality:PushTSymmetricTest-v1", entropy=0.25, entropy_of_successes=None,
                 episodes=200, successes_at_end=7, return_mean=160.0)
    (folder / "behavior_entropy.json").write_text(json.dumps(saved))
    page = report(root, out=out)
    assert f"| PushT | {folder.name} | 200 | 7 | 0.25 |  | 160 |" in page
    assert table(out / "behavior_entropy.csv").entropy.tolist() == [0.25]


def test_a_diverged_seed_leaves_those_beside_it(report, tmp_path):
    """Seeds 1 to 3 of one process, of which 2 ended at step 100; and a single run that ended before any evaluation."""
    root = tmp_path / "runs"
    folder = write_run(root, "CheetahRun", 1, [[0, 10.0], [3.0, 0], [0, 30.0]], exp_name="a", seeds=3)
    log = folder / "seed_2" / "metrics.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    (folder / "seed_2" / "diverged").mkdir()
    (write_run(root, "WalkerRun", 4, [], exp_name="a", total=300) / "diverged").mkdir()
    (write_run(root, "WalkerWalk", 4, [0, 1.0, float("nan")], exp_name="a") / "diverged").mkdir()
    report(root, out=tmp_path / "out")
    rows = table(tmp_path / "out" / "runs.csv").query("state != 'missing'")
    assert rows.state.tolist() == ["finished", "diverged", "finished", "diverged", "diverged"]
    (run,) = find_runs([folder])
    assert run.finished() and not run.diverged and run.dead == {2} and run.training_seconds() == pytest.approx(3600)


def test_a_seed_counts_once_however_many_were_beside_it(report, tmp_path):
    root = tmp_path / "runs"
    write_run(root, "CheetahRun", 1, [[0, 10.0], [0, 20.0]], exp_name="a", seeds=2)
    write_run(root, "CheetahRun", 2, [40.0], exp_name="a", total=300)
    report(root, out=tmp_path / "out")
    rows = table(tmp_path / "out" / "runs.csv").query("task == 'CheetahRun' and state != 'missing'")
    assert sorted(zip(rows.seed, rows.state, strict=True)) == [(1, "finished"), (2, "finished"), (2, "superseded")]


def test_seeds_beside_each_other_cost_one_device(report, tmp_path):
    """Four seeds of 250 steps a second each are 1000 of the device."""
    folder = write_run(tmp_path / "runs", "CheetahRun", 1, [[0, 1.0]] * 4, seeds=4, hours=200 / 3600 / 250)
    saved = json.loads((folder / "args.json").read_text())
    saved["args"] |= dict(num_envs=1024, num_steps=128, hidden_dim=512)
    (folder / "args.json").write_text(json.dumps(saved))
    page = report(tmp_path / "runs", out=tmp_path / "out")
    assert "| MuJoCo Playground, DeepMind Control | 20 | 50,000,000 | 1,000 | 1 x test | 2,778 |" in page


def test_cost_counts_only_the_papers_sizes(report, tmp_path):
    """A run of the paper's sizes at 1000 steps a second: 20 tasks x 10 seeds x 50M steps take 2778 hours."""
    root = tmp_path / "runs"
    write_run(root, "CheetahRun", 1, [0, 1.0], hours=200 / 3600 / 5)
    folder = write_run(root, "CheetahRun", 2, [0, 1.0], hours=200 / 3600 / 1000)
    saved = json.loads((folder / "args.json").read_text())
    saved["args"] |= dict(num_envs=1024, num_steps=128, hidden_dim=512)
    (folder / "args.json").write_text(json.dumps(saved))
    page = report(root, out=tmp_path / "out")
    assert "| MuJoCo Playground, DeepMind Control | 20 | 50,000,000 | 1,000 | 1 x test | 2,778 |" in page
    assert "| Isaac Lab | 6 | 300,000,000 | not measured |" in page
    assert "forty of TruDi's are 78 hours" in page  # 40 x 1.95
    # A run's learner does 0.95 of a humanoid's operations: 200 x 1.95 x 0.95 hours.
    assert re.search(r"all would take 1,5\d\d hours of such a GPU: MuJoCo Playground, DeepMind Control 37\d,", page)


@pytest.mark.parametrize(("sources", "message"), [(["nowhere"], "there is no nowhere"), (["empty"], "no run in empty")])
def test_nothing_to_analyse_is_refused_in_one_line(report, tmp_path, monkeypatch, capsys, sources, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        report(*sources, out=tmp_path / "out")
    err = capsys.readouterr().err
    assert error.value.code == 2 and err.count("\n") == 1 and message in err


def test_hours_of_the_paper_are_cited(report, tmp_path):
    """Table 2: of the four methods, in the table of the wall clock, in the text of the cost, and among the estimates."""
    write_run(tmp_path / "runs", "G1JoystickFlatTerrain", 1, [0, 5.0])
    page = report(tmp_path / "runs", out=tmp_path / "out")
    rows = {"TruDi": "117 ± 28 |  | 34.8 ± 3.0", "REPPO": "64 ± 21 |  | 29.6 ± 7.2", "DIME": "83 ± 22 |  | 15.6 ± 9.4",
            "PPO": "57 ± 21 |  | 0.1 ± 3.7"}
    for method, row in rows.items():
        assert f"| MuJoCo Playground, humanoids | {method} (cited) | {row} |  | A100 or H100 |" in page
    assert "1.95 for TruDi, 1.07 for REPPO, 1.38 for DIME, 0.95 for PPO" in page
    cited = plain(importlib.import_module("benchmark.speed.estimates").cited_table())
    assert "| PPO | 0.95 ± 0.35 | 0.1 ± 3.7 | 38 |" in cited and "| DIME | 1.38 ± 0.36 | 15.6 ± 9.4 | 55 |" in cited
    assert cited in plain((ROOT / "benchmark/results/estimates.md").read_text())


def test_cited_hours_are_those_of_the_paper():
    source = ROOT.parent / "shared" / "paper" / "trudi.txt"
    if not source.exists():
        pytest.skip("the paper is not here")
    text = source.read_text().partition("Episode Return (IQM)")[2].partition("#####")[0]
    words = re.split(r"(REPPO|PPO|DIME|TruDi)(?: \(Ours\))?", text)
    printed = dict(zip(words[1::2], words[2::2], strict=True))
    own = pd.read_csv(ROOT / "benchmark/anchors/humanoids.csv")
    assert sorted(own.method) == sorted(printed)
    for row in own.itertuples():
        assert printed[row.method].startswith(f"{row.hours}±{row.hours_spread}{row.hours}"), row.method
        assert f"{row.iqm}±{row.iqm_spread}" in printed[row.method], row.method


def test_cited_returns_are_those_of_the_source():
    source = ROOT.parent / "shared" / "anchors" / "reppo_returns.csv"
    if not source.exists():
        pytest.skip("the source is not here")
    own, cited = (pd.read_csv(path, index_col="env") for path in (ROOT / "benchmark/anchors/reppo_returns.csv", source))
    pd.testing.assert_frame_equal(own, cited[own.columns])


def test_runs_stand_beside_the_public_curve(tmp_path, monkeypatch, capsys):
    """At the very steps, and empty where there is nothing."""
    args = dict(env_id="T1JoystickFlatTerrain", seed=3, batch_size=8192, total_timesteps=6_000_000)
    folder = tmp_path / "mine" / "run"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"script": "trudi_mjx", "args": args | {"exp_name": "trudi_mjx"}}))
    logged = [(8192, None), (2_490_368, 5.0), (4_980_736, 11.25), (5_505_024, 20.0), (5_996_544, 15.0)]
    lines = [{"step": step, "wall_time": step / 1000, "charts/SPS": 1000.0} | ({RETURN: x} if x else {}) for step, x in logged]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path), "--public"])
    curves.main()
    out = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out[2:]]
    assert cells[0][:5] == ["**T1JoystickFlatTerrain**: REPPO, public", "1.1", "11.2", "24.2", "34.8"]
    assert cells[1] == ["mine, seed 3", "5.0", "11.2", "", "15.0", "17.5", "20.0", "5,996,544", "100"]


def test_table_and_picture_of_curves(tmp_path, monkeypatch, capsys):
    """Two seeds, of which one falls below 20 in the last quarter of its 800 steps, and one that never reaches 25."""
    write_run(tmp_path / "high", "CheetahRun", 1, [0, 10, 30, 40, 50, 60, 19, 40.0], hours=0.5)
    write_run(tmp_path / "high", "CheetahRun", 2, [0, 25, 30, 40, 50, 60, 70, 60.0], hours=1.0)
    write_run(tmp_path / "low", "WalkerWalk", 1, [5, 20.0], hours=0.1)
    flags = ["--threshold", "25", "--until", "800", "--output", str(tmp_path / "new" / "curves.png")]
    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path), *flags])
    curves.main()
    rows = plain(capsys.readouterr().out).splitlines()
    assert rows[0] == ("| group | seeds | final | mean | best | stays up | first reaches 25 (steps) | minutes | steps |")
    assert rows[2:] == ["| high | 2 | 40.0, 60.0 | 50.0 | 70.0 | 19.0 | 300, 200 | 60.0 | 800 |",
                        "| low | 1 | 20.0 | 20.0 | 20.0 | 20.0 | never | 6.0 | 200 |"]
    assert (tmp_path / "new" / "curves.png").stat().st_size > 5000
    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path), "--metric", "eval/success"])
    with pytest.raises(SystemExit) as error:
        curves.main()
    assert error.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_curves_of_runs_that_have_just_begun(tmp_path, monkeypatch, capsys):
    """One without an evaluation is left out; one with a first one only ends the mean."""
    for seed, values in enumerate([[0, 10, 30, 40.0], [5.0], []], 1):
        write_run(tmp_path / "new", "CheetahRun", seed, values, total=400)
    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path), "--output", str(tmp_path / "curves.png")])
    curves.main()
    assert "| new | 2 | 40.0, 5.0 | 22.5 |" in plain(capsys.readouterr().out)
    write_run(tmp_path / "other", "Pendulum-v1", 1, [1.0])
    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path / "other"), "--public"])
    with pytest.raises(SystemExit) as error:
        curves.main()
    assert error.value.code == 2 and "no runs of Pendulum-v1" in capsys.readouterr().err


def test_labels_of_curves_do_not_overlap():
    placed = curves.spread_labels(np.array([5.0, 5.5, 9.9, 0.0]), 1.0, 0.0, 10.0)
    assert (np.diff(np.sort(placed)) >= 1).all() and placed.min() >= 0 and placed.max() <= 10
    np.testing.assert_array_equal(curves.spread_labels(np.array([2.0, 8.0]), 1.0, 0.0, 10.0), [2, 8])


def test_strip_of_a_video(tmp_path):
    """Frames from the first to the last, their middles side by side."""
    greys = np.linspace(10, 240, 30).round().astype(np.uint8)
    frames = np.broadcast_to(greys[:, None, None, None], (30, 48, 64, 3)).copy()
    frames[:, :, :8] = 255
    iio.imwrite(tmp_path / "video.mp4", frames, fps=10)
    command = [sys.executable, "-m", "benchmark.video_strip", tmp_path / "video.mp4", "--output", tmp_path / "strip.png"]
    subprocess.run([*command, "--frames", "3", "--width", "32", "--until", "2"], check=True, cwd=ROOT)
    strip = iio.imread(tmp_path / "strip.png").astype(int)
    assert strip.shape == (48, 96, 3)
    for shown, expected in zip(np.split(strip, 3, axis=1), greys[[0, 10, 19]], strict=True):
        np.testing.assert_allclose(shown[:, :, 0], expected, atol=6)


