"""benchmark/: the 73 tasks, sweeps of a stand-in for the scripts, statistics against hand-computed cases, results pages."""

import ast
import dataclasses
import importlib
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import typing

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
from sweeps import SCRIPT, write_evaluation, write_run

from benchmark import local, outcomes, run, sweep, tasks
from benchmark.local import Machine
from benchmark.runs import RETURN, find_runs, furthest, training_times
from benchmark.sweep import Unit

ROOT = pathlib.Path(run.__file__).parent.parent
PATIENCE = 150  # seconds that a process may take on a busy machine
COUNTS = dict(dmc=20, humanoid=4, maniskill=13, humanoidbench=30, isaaclab=6)


# -------------------------------------------------------------------------------------------------------------- tasks
def test_there_are_73_tasks():
    found = tasks.tasks_of(tasks.SUITES)
    assert {suite: sum(task.suite == suite for task in found) for suite in tasks.SUITES} == COUNTS
    assert len({task.env_id for task in found}) == 73


@pytest.mark.parametrize("suite", COUNTS)
def test_ids_are_the_scripts_own(suite):
    script = pytest.importorskip(tasks.SUITES[suite].script)
    own = [env_id for env_id in getattr(script, tasks.SUITES[suite].tasks) if not env_id.startswith("Mjlab-")]
    assert [task.env_id for task in tasks.tasks_of([suite])] == own


def test_ids_are_known_to_playground():
    registry = pytest.importorskip("mujoco_playground").registry
    assert {task.env_id for task in tasks.tasks_of(["dmc", "humanoid"])} <= set(registry.ALL_ENVS)


def test_ids_are_known_to_maniskill():
    pytest.importorskip("mani_skill.envs")
    from mani_skill.utils.registration import REGISTERED_ENVS
    assert {task.env_id for task in tasks.tasks_of(["maniskill"])} <= set(REGISTERED_ENVS)


def test_ids_are_known_to_humanoidbench():
    pytest.importorskip("humanoid_bench")
    import gymnasium
    assert {task.env_id for task in tasks.tasks_of(["humanoidbench"])} <= set(gymnasium.registry)


def test_isaac_lab_ids_of_version_2_are_the_same_tasks():
    assert tasks.task_of("trudi_isaaclab", "Isaac-Repose-Cube-Shadow-Direct-v0").env_id == "Isaac-Reorient-Cube-Shadow-Direct"
    assert tasks.task_of("trudi_isaaclab", "Mjlab-Cartpole-Balance") is None
    assert tasks.task_of("trudi_mjx", "PickCube-v1") is None


@pytest.mark.parametrize(("suite", "number"), [(suite, i) for suite, count in COUNTS.items() for i in range(count)])
def test_scripts_resolve_to_table_5(suite, number, monkeypatch):
    task = tasks.tasks_of([suite])[number]
    script = pytest.importorskip(task.script)
    monkeypatch.setattr(script.util, "find_spec", lambda name: name)  # simulators need not be installed to resolve
    resolved = script.resolve(script.Args(env_id=task.env_id))
    expected = dataclasses.asdict(task.settings)
    if suite == "maniskill":  # the one deviation, which README explains
        assert resolved.gamma in (0.8, 0.875, 0.9, 0.95) and expected.pop("gamma") == 0.99
    assert {name: getattr(resolved, name) for name in expected} == expected
    for preset in ("paper", "cpu"):
        resolved = script.resolve(script.Args(env_id=task.env_id, preset=preset))
        values = tasks.preset_values(task.script, preset, suite)
        assert values["total_timesteps"] == resolved.total_timesteps
        assert values["hidden_dim"] == resolved.hidden_dim


# those that a suite has a script of
BASELINES = {
    "trudi_mjx": tasks.ALGORITHMS[1:], "trudi_maniskill": ("reppo", "dime", "ppo"), "trudi_isaaclab": ("reppo", "dime", "ppo"),
    "trudi_humanoidbench": ("reppo", "dime")}


@pytest.mark.parametrize("script", BASELINES)
def test_algorithms_have_the_tasks_and_sizes_of_trudi(script):
    suites = [name for name, suite in tasks.SUITES.items() if suite.script == script]
    kind = script.removeprefix("trudi_")
    assert sorted(path.stem for path in (ROOT / "benchmark" / "baselines").glob(f"*_{kind}.py")) == sorted(
        f"{algorithm}_{kind}" for algorithm in BASELINES[script])
    assert typing.get_args(run.Options.__annotations__["algorithm"]) == tasks.ALGORITHMS
    trudi = tasks.tasks_of(suites)
    for algorithm in ("trudi", *BASELINES[script]):
        own = tasks.tasks_of(suites, algorithm)
        assert [(task.suite, task.env_id) for task in own] == [(task.suite, task.env_id) for task in trudi]
        assert {task.script for task in own} == {f"{algorithm}_{kind}"}
        assert [tasks.task_of(task.script, task.env_id) for task in own] == trudi
        preset = tasks.constants(f"{algorithm}_{kind}")["PRESET"]["paper"]
        settings = trudi[0].settings
        assert {name: preset[name] for name in ("total_timesteps", "num_envs", "num_steps")} == {
            "total_timesteps": settings.total_timesteps, "num_envs": settings.num_envs, "num_steps": settings.num_steps}


def test_every_baseline_is_an_algorithm_of_a_suite():
    found = {path.stem for path in (ROOT / "benchmark" / "baselines").glob("*.py")}
    assert found == {script.replace("trudi", algorithm) for script, names in BASELINES.items() for algorithm in names}
    assert tasks.task_of("another_mjx", "CheetahRun") is None


@pytest.mark.parametrize("suite", ["dmc", "maniskill", "isaaclab"])
@pytest.mark.parametrize("algorithm", ["reppo", "dime", "ppo"])
def test_baselines_run_the_tasks_of_a_suite(suite, algorithm, tmp_path):
    """Their commands, which are TruDi's but for the script."""
    planned = units(tmp_path, suite=suite, algorithm=algorithm, tasks=(), seeds=2, flags="--preset cpu")
    assert [unit.task.env_id for unit in planned] == 2 * [task.env_id for task in tasks.tasks_of([suite])]
    script = tasks.SUITES[suite].script.replace("trudi", algorithm)
    words = sweep.command(planned[0], None, tmp_path)
    assert str(words[1]).endswith(f"benchmark/baselines/{script}.py")
    assert words[words.index("--env-id") + 1] == planned[0].task.env_id and words[words.index("--exp-name") + 1] == algorithm


def test_listing_tasks_imports_no_framework():
    code = ("import sys; from benchmark import run; "
            "print([x for x in ('jax', 'torch', 'gymnasium', 'mani_skill') if x in sys.modules])")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


# ------------------------------------------------------------------------------------------------------------- sweeps
@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The stand-in in place of all scripts, and a folder to work in."""
    (tmp_path / "trudi_mjx.py").write_text(SCRIPT)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.setattr(local, "POLL", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def units(folder, *flags, **options):
    return run.plan(run.Options(**{"tasks": ("CheetahRun", "WalkerWalk"), "seeds": 2, "log_dir": str(folder / "runs"),
                                   "flags": "--total-timesteps 50", **options}))


def go(folder, planned, **options):
    """Run or continue these units; the exit code."""
    states = run.remaining(planned, folder / "runs")
    machine = options.pop("machine", Machine([((), {})] * 2))
    return local.run_locally(states, folder / "runs", machine, options.pop("interval", 1000))


def kinds(folder, planned):
    return [state.kind for _, state in run.remaining(planned, folder / "runs")]


def logs(folder):
    return {path.stem: path.read_text() for path in (folder / "runs" / "logs").iterdir()}


def test_sweep_runs_everything_once(fake, capsys):
    planned = units(fake)
    wanted = [("CheetahRun", 1), ("WalkerWalk", 1), ("CheetahRun", 2), ("WalkerWalk", 2)]  # all tasks before second seeds
    assert [(u.task.env_id, u.seed) for u in planned] == wanted
    assert go(fake, planned) == 0
    found = find_runs([fake / "runs"])
    assert sorted((r.args["env_id"], r.args["seed"]) for r in found) == sorted(wanted)
    assert {r.args["exp_name"] for r in found} == {"trudi"}
    assert "4 of 4 finished" in capsys.readouterr().out
    before = logs(fake)
    assert go(fake, planned) == 0 and logs(fake) == before and len(find_runs([fake / "runs"])) == 4


def test_algorithms_are_told_apart(fake):
    """A baseline's sweep beside TruDi's, with and without a name that both have, in one folder."""
    (fake / "benchmark" / "baselines").mkdir(parents=True)
    (fake / "benchmark" / "baselines" / "reppo_mjx.py").write_text(SCRIPT)
    sweeps = [units(fake, algorithm=algorithm, name=name) for algorithm in ("trudi", "reppo") for name in (None, "mine")]
    for planned in sweeps:
        assert kinds(fake, planned) == ["waiting"] * 4
        assert go(fake, planned) == 0
        assert kinds(fake, planned) == ["finished"] * 4
    assert {(r.script, r.args["exp_name"]) for r in find_runs([fake / "runs"])} == {
        ("trudi_mjx", "trudi"), ("trudi_mjx", "mine"), ("reppo_mjx", "reppo"), ("reppo_mjx", "reppo-mine")}
    text = logs(fake)["CheetahRun__reppo__1"]
    assert "benchmark/baselines/reppo_mjx.py --env-id CheetahRun --exp-name reppo" in text


def test_interrupted_runs_are_continued(fake):
    planned = units(fake, seeds=1, tasks=("CheetahRun",))
    assert go(fake, planned) == 0
    folder = find_runs([fake / "runs"])[0].folder
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:9])  # as killed in its fourth iteration
    for step in (40, 50):
        (folder / "checkpoints" / str(step)).rmdir()
    assert kinds(fake, planned) == ["waiting"]
    assert go(fake, planned) == 0
    text = logs(fake)["CheetahRun__trudi__1"]
    assert f"--resume {os.path.relpath(folder)}" in text and "from 20" in text and len(find_runs([fake / "runs"])) == 1


def test_run_without_an_evaluation_at_its_end_is_not_finished(fake):
    planned = units(fake, seeds=1, tasks=("CheetahRun",))
    write_run(fake / "runs", "CheetahRun", 1, [1.0] * 5, step=10)
    assert kinds(fake, planned) == ["finished"]
    path = next((fake / "runs").glob("*/metrics.jsonl"))
    path.write_text("".join(line.replace("eval/episodic_return", "other") for line in path.open()))
    assert kinds(fake, planned) == ["waiting"]


def test_more_steps_continue_a_finished_run(fake):
    assert go(fake, units(fake)) == 0
    longer = units(fake, flags="--total-timesteps 70")
    assert kinds(fake, longer) == ["waiting"] * 4
    assert go(fake, longer) == 0 and all("from 50" in text for text in logs(fake).values())


def test_run_without_checkpoint_is_started_anew(fake):
    folder = write_run(fake / "runs", "CheetahRun", 1, [1.0], step=10, total=50)
    planned = units(fake, seeds=1, tasks=("CheetahRun",))
    assert "--resume" not in sweep.command(planned[0], find_runs([fake / "runs"])[0], fake)
    assert go(fake, planned) == 0 and kinds(fake, planned) == ["finished"]
    assert furthest(find_runs([fake / "runs"])).folder != folder


def test_failures_are_listed_with_their_last_lines(fake, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_FAIL_AT", "30")
    planned = units(fake)
    assert go(fake, planned) == 1
    out = capsys.readouterr().out
    assert "2 of 4 finished" in out and "2 failed" in out
    assert "CheetahRun__trudi__2: exit code 1 at step 20" in out and "    ValueError: the fake fails" in out
    monkeypatch.delenv("FAKE_FAIL_AT")
    assert go(fake, planned) == 0


def test_diverged_runs_are_listed_and_not_tried_again(fake, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_DIVERGE_AT", "30")
    planned = units(fake, seeds=1)
    assert go(fake, planned) == 1 and kinds(fake, planned) == ["diverged"] * 2
    before = logs(fake)
    monkeypatch.delenv("FAKE_DIVERGE_AT")
    assert go(fake, planned) == 1 and logs(fake) == before
    assert "CheetahRun__trudi__1: a metric was not finite" in capsys.readouterr().out


def test_other_flags_are_refused(fake, capsys):
    assert go(fake, units(fake)) == 0
    assert kinds(fake, units(fake, flags="--total-timesteps=50 --gamma 0.90")) == ["finished"] * 4
    with pytest.raises(SystemExit) as error:
        kinds(fake, units(fake, flags="--total-timesteps 50 --gamma 0.95"))
    err = capsys.readouterr().err
    assert error.value.code == 2 and "has gamma 0.9, where this sweep has 0.95" in err and err.count("\n") == 1


def test_runs_of_other_sweeps_are_not_taken(fake):
    write_run(fake / "runs", "CheetahRun", 1, [1.0] * 5, step=10, exp_name="other")
    write_run(fake / "runs", "CheetahRun", 1, [1.0] * 5, step=10, script="trudi_maniskill")
    write_run(fake / "runs", "CheetahRun", 1, [[1.0] * 5, [1.0] * 5], step=10, seeds=2)
    folder = write_run(fake / "runs", "WalkerWalk", 1, [1.0] * 5, step=10)
    folder.rename(folder.with_name("renamed"))
    (fake / "runs" / "broken").mkdir()
    (fake / "runs" / "broken" / "args.json").write_text("{")
    assert kinds(fake, units(fake, seeds=1)) == ["waiting", "finished"]


def start(folder, *flags, **environment):
    """A sweep in a process of its own, with the stand-in instead of the scripts."""
    code = ("import sys, pathlib; from benchmark import run, sweep, local; sweep.ROOT = pathlib.Path.cwd(); local.POLL = 0.02; "
            "run.main()")
    words = [sys.executable, "-c", code, "--tasks", "CheetahRun", "WalkerWalk", "--flags=--total-timesteps 500", *flags]
    return subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0,
                            env={**os.environ, "PYTHONPATH": str(ROOT), "FAKE_PAUSE": "0.2", **environment})


def wait_for_metrics(folder, count):
    """Wait until so many runs have two events."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if sum(len(path.read_text().splitlines()) > 1 for path in folder.glob("runs/*/metrics.jsonl")) >= count:
            return
        time.sleep(0.02)
    raise AssertionError("the runs did not start")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_lets_runs_write_checkpoints(fake, number):
    process = start(fake, "--seeds", "2", "--workers", "2")
    wait_for_metrics(fake, 2)
    os.killpg(process.pid, number)  # as Ctrl-C in a terminal reaches the whole group
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number and out.count("stopped; the next call continues it") == 2
    found = find_runs([fake / "runs"])
    assert len(found) == 2 and all(0 < r.last()["step"] == r.checkpoint < 500 for r in found)
    process = start(fake, "--seeds", "2", "--workers", "2", FAKE_PAUSE="0")
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "4 of 4 finished" in out and len(find_runs([fake / "runs"])) == 4


def test_killed_sweep_does_not_start_its_orphans_again(fake):
    process = start(fake, "--seeds", "1", "--workers", "2", FAKE_PAUSE="1")  # so that the orphans live for 50 s
    wait_for_metrics(fake, 2)
    process.kill()
    process.communicate(timeout=PATIENCE)
    again = start(fake, "--seeds", "1", "--workers", "2")
    out, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 1 and out.count("another process is doing it") == 2
    for text in logs(fake).values():
        os.kill(int(text.split("pid ")[1].split()[0]), signal.SIGKILL)
    last = start(fake, "--seeds", "1", "--workers", "2", FAKE_PAUSE="0")
    out, _ = last.communicate(timeout=PATIENCE)
    assert last.returncode == 0 and len(find_runs([fake / "runs"])) == 2, out


def test_seeds_side_by_side(fake):
    planned = units(fake, seeds=5, vmap_seeds=2, tasks=("CheetahRun",))
    assert [(u.seed, u.num_seeds) for u in planned] == [(1, 2), (3, 2), (5, 1)]
    assert go(fake, planned) == 0 and kinds(fake, planned) == ["finished"] * 3
    path = next((fake / "runs").glob("*__3__*/seed_4/metrics.jsonl"))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert kinds(fake, planned) == ["finished", "waiting", "finished"]


def test_dry_run_prints_commands_to_paste(fake, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    go(fake, units(fake, tasks=("WalkerWalk",)), machine=Machine([((), {})]))
    monkeypatch.setattr(sys, "argv", ["run", "--tasks", "CheetahRun", "WalkerWalk", "--seeds", "2",
                                      "--flags=--total-timesteps 50", "--dry-run"])
    capsys.readouterr()
    run.main()
    lines = capsys.readouterr().out.splitlines()
    words = f"{sys.executable} trudi_mjx.py --env-id CheetahRun --exp-name trudi --seed"
    assert lines == [f"CUDA_VISIBLE_DEVICES=3 {words} 1 --total-timesteps 50 --log-dir runs",
                     f"CUDA_VISIBLE_DEVICES=5 {words} 2 --total-timesteps 50 --log-dir runs", "# 2 of 4 remain"]
    assert len(find_runs([fake / "runs"])) == 2
    assert subprocess.run(lines[0], shell=True, cwd=fake).returncode == 0
    assert kinds(fake, units(fake)) == ["finished", "finished", "waiting", "finished"]


def test_processes_are_spread_over_gpus_and_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert Machine.here(None).slots == [((), {"CUDA_VISIBLE_DEVICES": "0"}), ((), {"CUDA_VISIBLE_DEVICES": "1"})]
    shared = Machine.here(3).slots
    assert [slot[1]["CUDA_VISIBLE_DEVICES"] for slot in shared] == ["0", "1", "0"]
    assert {slot[1]["XLA_PYTHON_CLIENT_MEM_FRACTION"] for slot in shared} == {"0.45"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7})
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert Machine.here(None).slots == [((), {})]
    assert [slot[0][-1] for slot in Machine.here(2).slots] == ["4,6", "5,7"]


def test_time_left():
    """One of 4 runs finished in 100 s, one is half done after 30 s, two wait: on one slot 30 + 2 * mean(100, 60) s."""
    planned = [Unit(task, "x", 1, flags=("--total-timesteps", "100")) for task in tasks.tasks_of(["dmc"])[:4]]
    states = [("finished", 100, 100.0), ("waiting", 50, 30.0), ("waiting", 0, 0.0), ("waiting", 0, 0.0)]
    states = [(u, sweep.State(kind, None, step, seconds)) for u, (kind, step, seconds) in zip(planned, states, strict=True)]
    state = local.Sweep(states, pathlib.Path("."), Machine([((), {})]))
    state.waiting.remove(planned[1])
    state.running[planned[1]] = None, state.free.pop()
    assert state.left() == pytest.approx(30 + 2 * 80)
    assert [local.shown_time(x) for x in (None, 5, 120, 7200)] == ["?", "5 s", "2 min", "2.0 h"]


# ---------------------------------------------------------------------------------------------------------- ablations
def test_ablations_are_sweeps(fake):
    planned = units(fake, ablation="epsilon", tasks=("CheetahRun",), seeds=1, values=("0.01", "50"))
    assert [u.exp_name for u in planned] == ["trudi-epsilon-0.01", "trudi-epsilon-50"]
    assert go(fake, planned) == 0
    assert {r.args["trust_region_bound"] for r in find_runs([fake / "runs"])} == {0.01, 50.0}
    everything = [run.plan(run.Options(ablation=name, seeds=1)) for name in run.ABLATIONS]
    assert [len(x) for x in everything] == [6 * 9, 4 * 8, 4 * 5]
    assert {u.flags for u in everything[2]} == {("--num-diffusion-steps", n) for n in ("1", "4", "8", "16", "32")}


def test_evaluations_of_finished_runs(fake, monkeypatch, capsys):
    values = ("sde", "ode-0.5", "best-of-20")
    planned = units(fake, ablation="evaluation", tasks=("CheetahRun",), seeds=2, values=values, vmap_seeds=2)
    assert go(fake, planned) == 1
    assert capsys.readouterr().out.count("there is no finished run to evaluate") == 3
    assert go(fake, units(fake, tasks=("CheetahRun",), seeds=2, vmap_seeds=2)) == 0
    assert go(fake, planned) == 0 and kinds(fake, planned) == ["finished"] * 3
    found = {p.stem: json.loads(p.read_text()) for p in (fake / "runs" / "evaluations").iterdir()}
    assert {name.split("__")[-1]: saved["results"]["eval/episodic_return"] for name, saved in found.items()} == {
        "sde": [1.0, 1.0], "ode-0.5": [2.5, 2.5], "best-of-20": [20.0, 20.0]}
    assert all(saved["step"] == 50 and saved["num_seeds"] == 2 for saved in found.values())
    go(fake, units(fake, tasks=("CheetahRun",), seeds=2, vmap_seeds=2, flags="--total-timesteps 70"))
    longer = units(fake, ablation="evaluation", tasks=("CheetahRun",), seeds=2, values=values, vmap_seeds=2,
                   flags="--total-timesteps 70")
    assert kinds(fake, longer) == ["waiting"] * 3


@pytest.mark.parametrize("algorithm", ["trudi", "reppo"])
def test_runs_stop_when_their_hours_are_over(fake, monkeypatch, algorithm):
    """An iteration is a second of training and, with evaluations, ten of the clock."""
    (fake / "benchmark" / "baselines").mkdir(parents=True)
    (fake / "benchmark" / "baselines" / "reppo_mjx.py").write_text(SCRIPT)
    monkeypatch.setenv("FAKE_PAUSE", "0.05")
    monkeypatch.setenv("FAKE_WALL", "10")
    planned = units(fake, algorithm=algorithm, tasks=("CheetahRun",), seeds=1, hours=5 / 3600, flags="--preset cpu")
    assert planned[0].flags[-2:] == ("--total-timesteps", "2000000000")
    assert go(fake, planned) == 0 and kinds(fake, planned) == ["finished"]
    found, = find_runs([fake / "runs"])
    assert 50 <= found.last()["step"] == found.checkpoint < 1000
    assert found.args["exp_name"] == f"{algorithm}-wall-clock-0.00138889h"
    longer = units(fake, algorithm=algorithm, tasks=("CheetahRun",), seeds=1, hours=1.0, flags="--preset cpu")
    assert kinds(fake, longer) == ["waiting"]  # not these runs


def test_ablations_and_evaluations_take_hours_too(fake):
    chosen = dict(tasks=("CheetahRun",), seeds=1, hours=0.5, flags="--preset cpu")
    unit, = units(fake, ablation="denoising", values=("4",), **chosen)
    assert (unit.exp_name, unit.hours) == ("trudi-wall-clock-0.5h-denoising-4", 0.5)
    unit, = units(fake, ablation="evaluation", values=("sde",), **chosen)
    assert (unit.exp_name, unit.hours) == ("trudi-wall-clock-0.5h", 0.5) and "--total-timesteps" not in unit.flags


def test_run_with_hours_and_steps_ends_at_the_first_of_them(fake):
    planned = units(fake, tasks=("CheetahRun",), seeds=1, hours=1.0)
    assert go(fake, planned) == 0 and kinds(fake, planned) == ["finished"]
    assert find_runs([fake / "runs"])[0].last()["step"] == 50


def test_progress_in_hours_is_of_training():
    unit = Unit(tasks.tasks_of(["dmc"])[0], "x", 1, hours=1.0)
    state = sweep.State("waiting", None, 10, wall_time=3600.0, training_seconds=900.0)
    assert local.progress(unit, state) == 0.25 and local.seconds_left(unit, state) == 3 * 3600


BAD = {
    "": "name a --suite",
    "--suite dmc --seeds 0": "--seeds and --vmap-seeds must be positive",
    "--tasks CheetahRu": "the nearest are CheetahRun",
    "--suite maniskill --tasks CheetahRun": "none of the tasks of --suite maniskill",
    "--suite maniskill --vmap-seeds 2": "--vmap-seeds is for trudi_mjx.py",
    "--suite all --algorithm ppo": "--algorithm ppo has no script for HumanoidBench",
    "--suite isaaclab --algorithm fpo": "--algorithm fpo has no script for Isaac Lab",
    "--suite isaaclab --algorithm ppo --vmap-seeds 2": "--vmap-seeds is for trudi_mjx.py",
    "--ablation epsilon --tasks CheetahRun --algorithm reppo": "--ablation is of TruDi",
    "--suite dmc --values 1": "--values needs an --ablation",
    "--suite dmc --hours 0": "--hours and --slurm-hours must be positive",
    "--suite dmc --ablation epsilon --values x": "are numbers, not x",
    "--suite dmc --ablation evaluation --values best-of-x": "are sde, ode-C or best-of-K",
    "--suite dmc --flags=--preset=tiny": "there is no --preset tiny",
    "--suite dmc --flags=--seed=3": "--flags must not have --seed",
    "--suite dmc --python mjx=python": "--python mjx: there is no such suite",
    "--suite dmc --python python": "takes NAME=VALUE",
    "--suite dmc --slurm": "needs sbatch",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_refused_in_one_line(flags, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run", *flags.split(), "--log-dir", str(tmp_path)])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as error:
        run.main()
    err = capsys.readouterr().err
    assert error.value.code == 2 and err.startswith("benchmark.launch: error: ") and err.count("\n") == 1 and BAD[flags] in err


def test_flags_that_sweeps_use_exist_in_the_scripts():
    used = set("env_id exp_name seed log_dir resume evaluate eval_mode ode_score_scale best_of_k trust_region_bound "
               "num_diffusion_steps total_timesteps preset".split())
    for script in {suite.script for suite in tasks.SUITES.values()}:
        tree = ast.parse((ROOT / f"{script}.py").read_text())
        args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
        names = [node.target.id for node in args.body if isinstance(node, ast.AnnAssign)]
        assert used <= set(names) and ("num_seeds" in names) == (script == "trudi_mjx"), script
        assert names.index("gamma") < names.index("device") < names.index("total_timesteps")  # what `conflict` relies on


def test_real_run_folders_are_understood():
    found = find_runs([ROOT / "benchmark" / "results" / "curves"])
    assert {r.folder.parent.name for r in found if r.finished()} == {
        "CartpoleBalance", "CheetahRun", "ReacherEasy", "PushCube", "HalfCheetah", "Hopper", "Mjlab-Cartpole-Balance",
        "Isaac-Test-Cartpole"}
    assert {r.folder.parent.name for r in found if not r.finished()} == {"PickCube", "h1hand-stand"}
    assert all(r.end(10 * r.args["batch_size"] + 1) == 10 * r.args["batch_size"] for r in found)


# -------------------------------------------------------------------------------------------------------------- slurm
@pytest.fixture
def slurm():
    pytest.importorskip("submitit")
    return importlib.import_module("benchmark.slurm")


def test_job_runs_in_process(fake, slurm):
    import submitit
    planned = units(fake, seeds=1)
    jobs = slurm.submit(run.remaining(planned, fake / "runs"), fake / "runs",
                        lambda folder: submitit.AutoExecutor(folder, cluster="debug"))
    assert [job.result() for job in jobs] == ["CheetahRun__trudi__1: finished", "WalkerWalk__trudi__1: finished"]
    assert kinds(fake, planned) == ["finished"] * 2
    assert slurm.submit(run.remaining(planned, fake / "runs"), fake / "runs", None) == []


def test_job_that_fails_says_why(fake, slurm, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL_AT", "30")
    with pytest.raises(RuntimeError, match="exit code 1 at step 20\n(.*\n)*ValueError: the fake fails"):
        slurm.Job(units(fake)[2], fake / "runs")()


def test_submitits_signal_does_not_end_a_run(fake, slurm, monkeypatch):
    monkeypatch.setenv("FAKE_PAUSE", "0.1")
    process = sweep.Process(units(fake)[0], fake / "runs")
    wait_for_metrics(fake, 1)
    os.kill(process.child.pid, signal.SIGUSR2)
    assert os.getsid(process.child.pid) == process.child.pid  # Ctrl-C in a terminal does not reach it
    assert process.child.wait(PATIENCE) == 0 and process.judge() is None


def test_job_out_of_time_is_requeued_and_continues(fake, slurm, monkeypatch):
    """submitit's local executor signals as Slurm does before the time limit, and starts a requeued job again. The stand-in does
    40 iterations in 10 s, of which a job has 8."""
    import submitit
    monkeypatch.setenv("FAKE_PAUSE", "0.25")
    planned = units(fake, seeds=1, tasks=("CheetahRun",), flags="--total-timesteps 400")
    (fake / "sitecustomize.py").write_text("import pathlib, benchmark.sweep\nbenchmark.sweep.ROOT = pathlib.Path.cwd()\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(fake), str(ROOT)]))
    def executor(folder):
        made = submitit.LocalExecutor(folder, max_num_timeout=PATIENCE)
        made.update_parameters(timeout_min=30 / 60, signal_delay_s=22)
        return made
    job, = slurm.submit(run.remaining(planned, fake / "runs"), fake / "runs", executor)
    assert job.result() == "CheetahRun__trudi__1: finished"
    text = logs(fake)["CheetahRun__trudi__1"]
    starts = [int(line.split("from ")[1]) for line in text.splitlines() if line.startswith("pid ")]
    assert len(starts) > 1 and starts[0] == 0 < starts[1] < 400 and len(find_runs([fake / "runs"])) == 1, text
    steps = [json.loads(line)["step"] for line in next((fake / "runs").glob("*/metrics.jsonl")).open()]
    assert steps == list(range(10, 401, 10))


def test_sbatch_file(fake, slurm, monkeypatch, capsys):
    sbatch = fake / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/sh\ncp \"$1\" {fake}/submitted.sh\necho Submitted batch job 12\n")
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    (fake / "bin" / "srun").symlink_to(sbatch)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "argv", ["run", *"--tasks CheetahRun WalkerWalk --seeds 2 --slurm --slurm-hours 3 --slurm-cpus 6 "
                                      "--slurm-sbatch partition=gpu account=me --workers 3".split()])
    run.main()
    lines = (fake / "submitted.sh").read_text().splitlines()
    wanted = ("array=0-3%3 time=180 gpus-per-node=1 cpus-per-task=6 partition=gpu account=me signal=USR2@300 job-name=trudi "
              "open-mode=append").split()
    assert {f"#SBATCH --{x}" for x in wanted} <= set(lines) and "#SBATCH --requeue" in lines
    assert sum(f"-m submitit.core._submit {fake}/runs/slurm" in line for line in lines) == 1
    assert "submitted 4 jobs, 12_0 to 12_3" in capsys.readouterr().out
    assert len(list((fake / "runs" / "slurm").glob("12_*_submitted.pkl"))) == 4


# --------------------------------------------------------------------------------------------------------- statistics
@pytest.fixture
def aggregates(monkeypatch):
    pytest.importorskip("rliable")
    module = importlib.import_module("benchmark.aggregates")
    monkeypatch.setattr(module, "REPETITIONS", 200)
    return module


def test_interquartile_mean(aggregates):
    """Of 1 ... 8 the quarters {1, 2} and {7, 8} are cut off; of three scores none is."""
    import scipy.stats
    from rliable import metrics
    assert aggregates.iqm(np.array([[1.0, 8], [7, 2], [3, 6], [4, 5.4]])) == pytest.approx((3 + 4 + 5.4 + 6) / 4)
    assert aggregates.iqm(np.array([[1.0], [2], [9]])) == pytest.approx(4)
    ragged = aggregates.stack([[1, 2, 3, 100], [4, 5], [6, -100]])
    assert ragged.shape == (4, 3) and np.isnan(ragged).sum() == 4
    assert aggregates.iqm(ragged) == pytest.approx((2 + 3 + 4 + 5) / 4)
    scores = np.random.default_rng(0).normal(size=(10, 7))
    assert aggregates.iqm(scores) == pytest.approx(metrics.aggregate_iqm(scores))
    assert aggregates.iqm(scores) == pytest.approx(scipy.stats.trim_mean(scores.ravel(), 0.25))
    curves = np.stack([scores, 2 * scores + 1], -1)
    np.testing.assert_allclose(aggregates.iqm(curves), [aggregates.iqm(scores)[0], 2 * aggregates.iqm(scores)[0] + 1])


def test_interval_is_rliables(aggregates, monkeypatch):
    from rliable import library, metrics
    monkeypatch.setattr(aggregates, "REPETITIONS", 4000)
    scores = np.random.default_rng(1).normal(size=(10, 5)) + np.arange(5)
    ours = aggregates.interval(scores, aggregates.iqm)[:, 0]
    np.random.seed(0)
    theirs = library.get_interval_estimates({"x": scores}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=4000)[1]["x"]
    np.testing.assert_allclose(ours[1:], theirs[:, 0], atol=0.03)
    assert ours[1] < ours[0] < ours[2] and ours[2] - ours[1] > 0.3
    np.testing.assert_array_equal(ours, aggregates.interval(scores, aggregates.iqm)[:, 0])


def test_bootstrap_draws_within_tasks_and_keeps_what_is_missing(aggregates):
    scores = aggregates.stack([[0, 1, 2, 3], [10, 11], [20, 21, 22]])
    samples = [sample[0][0] for sample in aggregates.Bootstrap(scores).bootstrap(300)]
    for task, runs in enumerate((4, 2, 3)):
        column = np.stack([sample[:, task] for sample in samples])
        assert np.isnan(column[:, runs:]).all() and not np.isnan(column[:, :runs]).any()
        assert set(np.unique(column[:, :runs])) == set(scores[:runs, task])
    whole = np.random.default_rng(0).normal(size=(4, 3, 5))  # curves are drawn whole
    sample = next(aggregates.Bootstrap(whole).bootstrap(1))[0][0]
    assert all(any((sample[r, t] == whole[k, t]).all() for k in range(4)) for r, t in itertools.product(range(4), range(3)))


def test_interval_of_means_is_the_standard_error(aggregates, monkeypatch):
    monkeypatch.setattr(aggregates, "REPETITIONS", 4000)
    scores = np.random.default_rng(2).normal(size=(50, 1))
    _, low, high = aggregates.interval(scores, lambda x: np.array([np.nanmean(x)]))[:, 0]
    error = scores.std() / 50**0.5
    np.testing.assert_allclose([low, high], [scores.mean() - 1.96 * error, scores.mean() + 1.96 * error], atol=0.15 * error)


def test_a_single_run_has_no_interval(aggregates):
    estimate, low, high = aggregates.interval(aggregates.stack([[1, 2], [3]]), aggregates.iqm)[:, 0]
    assert estimate == 2 and np.isnan([low, high]).all()
    assert np.isnan(aggregates.improvement_interval(np.array([[1.0]]), np.array([[0.0], [0.0]]))[1:]).all()


def test_probability_of_improvement(aggregates):
    """Task one: 1 of {1, 3} x {2, 2, 3} wins twice, one tie: 2.5 of 6. Task two: always better."""
    import scipy.stats
    from rliable import metrics
    x, y = aggregates.stack([[1, 3], [9, 9]]), aggregates.stack([[2, 2, 3], [1, 2]])
    assert aggregates.improvement(x, y) == pytest.approx((2.5 / 6 + 1) / 2)
    assert aggregates.improvement(y, x) == pytest.approx(1 - (2.5 / 6 + 1) / 2)
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(8, 4)).round(1) + 1, rng.normal(size=(5, 4)).round(1)
    assert aggregates.improvement(a, b) == pytest.approx(metrics.probability_of_improvement(a, b))
    u = [scipy.stats.mannwhitneyu(a[:, t], b[:, t]).statistic / 40 for t in range(4)]
    assert aggregates.improvement(a, b) == pytest.approx(np.mean(u))
    p, low, high = aggregates.improvement_interval(a, b)
    assert 0.5 < low < p < high <= 1 and p == aggregates.improvement(a, b)


def test_performance_profile(aggregates):
    from rliable import library
    scores = aggregates.stack([[1, 2, 3], [4]])
    np.testing.assert_allclose(aggregates.profile(scores, np.array([0, 1, 2.5, 4])), [1, 0.75, 0.5, 0])
    full, taus = np.random.default_rng(4).normal(size=(6, 3)), np.linspace(-2, 2, 9)
    np.testing.assert_allclose(aggregates.profile(full, taus), library.score_distributions(full, taus))


# -------------------------------------------------------------------------------------------------------------- pages
@pytest.fixture
def analyze(aggregates, monkeypatch):
    module = importlib.import_module("benchmark.analyze")
    def page(*sources, out, **options):
        flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        monkeypatch.setattr(sys, "argv", ["analyze", *map(str, sources), "--out", str(out), *flags])
        module.main()
        return (out / "README.md").read_text()
    return page


def table(path):
    import pandas as pd
    return pd.read_csv(path)


def test_results_page(analyze, tmp_path):
    root, out = tmp_path / "runs", tmp_path / "out"
    for seed, top in ((1, 100.0), (2, 300.0)):
        write_run(root, "CheetahRun", seed, [0, top / 2, top], exp_name="a")
    write_run(root, "CheetahRun", 1, [0, 40.0, 90.0], exp_name="b")
    write_run(root, "WalkerWalk", 1, [[0, 5, 10.0], [0, 5, 30.0]], exp_name="a", seeds=2)
    write_run(root, "WalkerWalk", 3, [7, 8.0], exp_name="a", total=300)
    write_run(root, "CheetahRun", 2, [1.0], exp_name="a", total=300)  # begun anew; the finished one counts
    page = analyze(root, out=out)
    rows = table(out / "runs.csv")
    assert rows.state.value_counts().to_dict() == dict(finished=5, unfinished=1, superseded=1, missing=60 - 5 + 20 - 1)
    assert rows.query("env_id == 'WalkerWalk' and seed == 2").final.dropna().tolist() == [30]
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
def test_algorithms_are_groups_of_their_own(analyze, tmp_path, options):
    """Also when their --exp-name, folder or argument is the same."""
    root, out = tmp_path / "runs", tmp_path / "out"
    for script, values in (("trudi_mjx", [0, 30.0]), ("ppo_mjx", [0, 10.0]), ("dppo_mjx", [0, 20.0])):
        write_run(root, "CheetahRun", 1, values, script=script, exp_name="same")
    page = analyze(root, out=out, **options)
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
        outcome, = outcomes.read_outcomes([folder], "eval/episodic_return", "exp_name")
        found[script] = outcome.paper_sizes
    assert found == {"trudi_mjx": True, "reppo_mjx": False}


def test_matched_wall_clock(analyze, tmp_path):
    """The fast one is evaluated after 15, 30, 45 and 60 min, the slow one after 30 and 60, the late one first after 120."""
    root = tmp_path / "runs"
    write_run(root, "CheetahRun", 1, [0, 100, 200, 300.0], exp_name="fast", hours=1.0)
    write_run(root, "CheetahRun", 1, [0, 70, 90, 100.0], exp_name="slow", hours=2.0)
    write_run(root, "CheetahRun", 1, [20.0, 400], exp_name="late", hours=4.0, step=200)
    page = analyze(root, out=tmp_path / "out")
    assert "| fast | 60.0 ± 0.0 | 0.0 | 300.00 | 300.00 at 60.0 |" in page
    assert "| slow | 120.0 ± 0.0 | 0.0 | 100.00 | 70.00 at 60.0 |" in page
    assert "| late | 240.0 ± 0.0 | 0.0 | 400.00 | none at 60.0 |" in page


def test_evaluations_are_not_in_matched_time(analyze, tmp_path):
    """Both train for an hour and learn alike; evaluations and checkpoints take one of them half an hour more, at the end."""
    root = tmp_path / "runs"
    write_run(root, "CheetahRun", 1, [0, 100, 200, 300.0], exp_name="quick")
    folder = write_run(root, "CheetahRun", 1, [0, 100, 200, 300.0], exp_name="watched", other_hours=0.5)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    for line, minutes in zip(lines, (15, 30, 45, 90), strict=True):
        line["wall_time"] = 60.0 * minutes
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = analyze(root, out=tmp_path / "out")
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


def test_equal_hours_of_algorithms(analyze, tmp_path):
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
    page = analyze(root, out=out)
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


def test_matched_wall_clock_is_of_each_task(analyze, tmp_path):
    """Walking takes twice the hours of running, and the slow group the double of the fast one's."""
    root = tmp_path / "runs"
    for task, factor in (("CheetahRun", 1.0), ("WalkerWalk", 2.0)):
        write_run(root, task, 1, [0, 100, 200, 300.0], exp_name="fast", hours=factor)
        write_run(root, task, 1, [0, 70, 90, 100.0], exp_name="slow", hours=2 * factor)
    page = analyze(root, out=tmp_path / "out")
    for row in ("CheetahRun | 60.00 | fast | 300.00", "CheetahRun | 60.00 | slow | 70.00",
                "WalkerWalk | 120.00 | fast | 300.00", "WalkerWalk | 120.00 | slow | 70.00"):
        assert f"| {row} |" in page
    assert "| 70.00 at 60.0 to 120.0 |" in page


def test_equal_steps(analyze, tmp_path):
    """One of the groups was trained twice as far; wall clock has all of it."""
    root = tmp_path / "runs"
    write_run(root, "CheetahRun", 1, [0, 50, 200, 300.0], exp_name="long", hours=1.0)
    write_run(root, "CheetahRun", 1, [0, 100.0], exp_name="short", hours=1.0)
    whole, cut = (analyze(root, out=tmp_path / "out", **options) for options in ({}, {"until_steps": 200}))
    assert "| CheetahRun | long | 1 | 300.0 | 400 | 60.0 |" in whole.replace("|  |", "|")
    assert "| CheetahRun | long | 1 | 50.0 | 200 | 30.0 |" in cut.replace("|  |", "|")
    assert "compared after 200 environment steps" in cut
    assert "| long | 60.0 ± 0.0 | 0.0 | 300.00 |" in cut
    assert "| short | 60.0 ± 0.0 | 0.0 | 100.00 |" in cut


def test_returns_of_isaac_lab_are_normalised(analyze, tmp_path):
    for env_id, scale in (("Isaac-Velocity-Flat-G1-v0", 1), ("Isaac-Reorient-Cube-Shadow-Direct", 1000)):
        for group, share in (("a", 1.0), ("b", 0.5)):
            write_run(tmp_path / "runs", env_id, 1, [0, share * scale], exp_name=group, script="trudi_isaaclab")
    analyze(tmp_path / "runs", out=tmp_path / "out")
    rows = table(tmp_path / "out" / "suites.csv").query("environment_steps == 200").set_index("group")
    assert rows.iqm.to_dict() == {"a": 1.0, "b": 0.5}


def scores_of(analyze, tmp_path, env_id, curves):
    """Normalised last scores and those at matched time of groups' curves, by group."""
    root, out = tmp_path / "runs", tmp_path / "out"
    shutil.rmtree(root, ignore_errors=True)
    for group, (hours, *seeds) in curves.items():
        for seed, values in enumerate(seeds, 1):
            write_run(root, env_id, seed, values, exp_name=group, script="trudi_isaaclab", hours=hours)
    page = analyze(root, out=out)
    rows = re.findall(r"^\| Isaac Lab \| (\w+) \| [^|]*± [^|]*\| [^|]*\| (\S+) [^|]*\| (\S+) [^|]*at [^|]*\|", page, re.M)
    last = {group: float(value) for group, value, _ in rows}
    ends = table(out / "suites.csv").groupby("group").iqm.last().round(2).to_dict()
    assert last == ends
    return last, {group: float(value) for group, _, value in rows}


ISAAC = "Isaac-Velocity-Flat-G1-v0"


@pytest.mark.parametrize("shift", [0.0, -1000.0, 1000.0])
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_normalised_scores_do_not_depend_on_where_returns_are(analyze, tmp_path, shift, factor):
    """0 is the lower of the first evaluations and 1 the higher of the last ones, also of negative returns."""
    curves = {"a": (1.0, [-100, -10.0]), "b": (1.0, [-90, -55.0])}
    moved = {group: (hours, *[[factor * x + shift for x in own] for own in seeds]) for group, (hours, *seeds) in curves.items()}
    assert scores_of(analyze, tmp_path, ISAAC, moved)[0] == {"a": 1.0, "b": 0.5}


def test_normalised_scores_of_groups_that_do_not_learn(analyze, tmp_path):
    """Worse than at first is below 0 or between; constant returns are no division by zero."""
    assert scores_of(analyze, tmp_path, ISAAC, {"a": (1.0, [-10, -30.0]), "b": (1.0, [0, -5.0])})[0] == {"a": -2.0, "b": 0.5}
    assert scores_of(analyze, tmp_path, ISAAC, {"a": (1.0, [3, 3.0]), "b": (1.0, [3, 3.0])})[0] == {"a": 0.0, "b": 0.0}


def test_scores_at_matched_time_are_normalised(analyze, tmp_path):
    """The slow one has half of its hours by then, at its second evaluation."""
    curves = {"fast": (1.0, [-100, -60, -20, 100.0]), "slow": (2.0, [-100, 0, 40, 80.0])}
    last, matched = scores_of(analyze, tmp_path, ISAAC, curves)
    assert last == {"fast": 1.0, "slow": 0.9} and matched == {"fast": 1.0, "slow": 0.5}
    page = (tmp_path / "out" / "README.md").read_text()
    assert f"| {ISAAC.removesuffix('-v0')} | 60.00 | slow | 0.50 |" in page
    assert page.count("Returns of Isaac Lab are normalised for each task") == 2


def test_last_evaluation_counts_not_the_best(analyze, tmp_path):
    root, out = tmp_path / "runs", tmp_path / "out"
    for group, bound, own in (
            ("falls", 0.1, [0, 100, 60.0]), ("falls-epsilon-1", 1.0, [0, 90, 30.0]), ("falls-epsilon-5", 5.0, [0, 80, 20.0]),
            ("falls-wall-clock-0.9h", 0.1, [0, 70, 10.0]), ("rises", 0.1, [0, 40, 80.0])):
        write_run(root, "CheetahRun", 1, own, exp_name=group, trust_region_bound=bound)
    page = analyze(root, out=out)
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


def test_success_is_of_the_last_evaluation(analyze, tmp_path):
    folder = write_run(tmp_path / "runs", "PushCube-v1", 1, [0, 9, 5.0], script="trudi_maniskill")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    text = (json.dumps(line | {"eval/success_once": share}) + "\n" for line, share in zip(lines, (0, 0.75, 0.25), strict=True))
    (folder / "metrics.jsonl").write_text("".join(text))
    assert "| PushCube-v1 | trudi | 1 | 5.0 | 0.25 |" in analyze(tmp_path / "runs", out=tmp_path / "out")


def test_pages_of_ablations(analyze, tmp_path):
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
    page = analyze(root, out=out)
    rows = table(out / "ablation_s_epsilon_dmc.csv").query("environment_steps == 200").set_index("value")
    assert rows.iqm.to_dict() == {0.01: 11.5, 0.1: 31.5, 10: 6.5} and "without a finished run: 50" in page
    timed = table(out / "ablation_s-wall-clock-0.5h_denoising_dmc.csv")
    assert timed.groupby("value").iqm.last().to_dict() == {4: 40.0, 8: 80.0} and "without a finished run: 16" in page
    assert timed.hours.max() == pytest.approx(0.52)
    modes = table(out / "ablation_evaluation.csv").set_index("evaluation")
    assert modes.iqm.to_dict() == {"sde": 20.0, "ode-1": 22.0} and set(modes.incomplete) == {1}
    assert (out / "ablation_evaluation.png").exists() and not (out / "suites.png").exists()


def test_default_is_listed_once(analyze, tmp_path):
    """N = 8, ε = 0.1 and the sweep itself, which went on for longer, are one experiment."""
    root, out = tmp_path / "runs", tmp_path / "out"
    values = {"s": (8, 0.1, [0, 10, 20.0]), "s-denoising-4": (4, 0.1, [0, 5.0]), "s-denoising-8": (8, 0.1, [0, 10.0]),
              "s-epsilon-0.1": (8, 0.1, [0, 10.0]), "s-epsilon-1": (8, 1.0, [0, 7.0]), "s-epsilon-5": (8, 5.0, [0, 6.0]),
              "before": (8, 0.1, [0, 10.0]), "after": (8, 0.1, [0, 12.0])}  # another text of the script, say
    for name, (n, bound, own) in values.items():
        for seed in (1, 2):
            write_run(root, "CheetahRun", seed, own, exp_name=name, num_diffusion_steps=n, trust_region_bound=bound)
    page = analyze(root, out=out)
    counts = page.partition("## Tasks")[0]
    listed = re.findall(r"^\| MuJoCo Playground, DeepMind Control \| ([\w.-]+) \| 1 \| 2 \|", counts, re.M)
    assert sorted(listed) == sorted(set(values) - {"s-denoising-8", "s-epsilon-0.1"})
    assert counts.count("the same runs as s's and counted there: CheetahRun (seed 1, 2; at 200)") == 2
    same = table(out / "runs.csv").dropna(subset="same_as")
    assert same.groupby("group").same_as.apply(list).to_dict() == {"s-denoising-8": ["s"] * 2, "s-epsilon-0.1": ["s"] * 2}
    for row in ("8 (= s) | 2 | 10.0", "4 | 2 | 5.0", "0.1 (= s) | 2 | 10.0", "1 | 2 | 7.0"):
        assert f"\n| {row} " in page


def test_ablations_share_their_default(analyze, tmp_path):
    """Without a sweep as far as they are."""
    root = tmp_path / "runs"
    for name, own in (("s", [0.0]), ("s-denoising-8", [0, 10.0]), ("s-epsilon-0.1", [0, 10.0])):
        write_run(root, "CheetahRun", 1, own, exp_name=name, num_diffusion_steps=8, trust_region_bound=0.1)
    assert "s-epsilon-0.1, MuJoCo Playground, DeepMind Control, the same runs" not in analyze(root, out=tmp_path / "out")
    shutil.rmtree(next(root.glob("*__s__*")))
    page = analyze(root, out=tmp_path / "out")
    assert "s-epsilon-0.1, MuJoCo Playground, DeepMind Control, the same runs as s-denoising-8's" in page


def test_page_of_the_sweep_has_every_experiment_once():
    page = (ROOT / "benchmark/results/sweep/README.md").read_text().partition("## Tasks")[0]
    rows = re.findall(r"^\| MuJoCo Playground, DeepMind Control \| ([\w.-]+) \|", page, re.M)
    assert "trudi" in rows and not {"trudi-denoising-8", "trudi-epsilon-0.1"} & set(rows) and len(rows) == 9


def test_page_of_behavior_entropy(analyze, tmp_path):
    root, out = tmp_path / "runs", tmp_path / "out"
    folder = write_run(root, "benchmark.studies.multimodality:PushTSymmetric-v1", 1, [0, 1.0], script="trudi_maniskill")
    saved = dict(env_id="benchmark.studies.multimodality:PushTSymmetricTest-v1", entropy=0.25, entropy_of_successes=None,
                 episodes=200, successes_at_end=7, return_mean=160.0)
    (folder / "behavior_entropy.json").write_text(json.dumps(saved))
    page = analyze(root, out=out)
    assert f"| PushT | {folder.name} | 200 | 7 | 0.25 |  | 160 |" in page
    assert table(out / "behavior_entropy.csv").entropy.tolist() == [0.25]


def test_cost_counts_only_the_papers_sizes(analyze, tmp_path):
    """A run of the paper's sizes at 1000 steps a second: 20 tasks x 10 seeds x 50M steps take 2778 hours."""
    root = tmp_path / "runs"
    write_run(root, "CheetahRun", 1, [0, 1.0], hours=200 / 3600 / 5)
    folder = write_run(root, "CheetahRun", 2, [0, 1.0], hours=200 / 3600 / 1000)
    saved = json.loads((folder / "args.json").read_text())
    saved["args"] |= dict(num_envs=1024, num_steps=128, hidden_dim=512)
    (folder / "args.json").write_text(json.dumps(saved))
    page = analyze(root, out=tmp_path / "out")
    assert "| MuJoCo Playground, DeepMind Control | 20 | 50,000,000 | 1,000 | 1 x test | 2,778 |" in page
    assert "| Isaac Lab | 6 | 300,000,000 | not measured |" in page
    assert "forty of TruDi's are 78 hours" in page  # 40 x 1.95
    # A run's learner does 0.95 of a humanoid's operations: 200 x 1.95 x 0.95 hours.
    assert re.search(r"all would take 1,5\d\d hours of such a GPU: MuJoCo Playground, DeepMind Control 37\d,", page)


@pytest.mark.parametrize(("sources", "message"), [(["nowhere"], "there is no nowhere"), (["empty"], "no run in empty")])
def test_nothing_to_analyse_is_refused_in_one_line(analyze, tmp_path, monkeypatch, capsys, sources, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        analyze(*sources, out=tmp_path / "out")
    err = capsys.readouterr().err
    assert error.value.code == 2 and err.count("\n") == 1 and message in err


def test_hours_of_the_paper_are_cited(analyze, tmp_path, in_benchmark):
    """Table 2: of the four methods, in the table of the wall clock, in the text of the cost, and among the estimates."""
    write_run(tmp_path / "runs", "G1JoystickFlatTerrain", 1, [0, 5.0])
    page = analyze(tmp_path / "runs", out=tmp_path / "out")
    rows = {"TruDi": "117 ± 28 |  | 34.8 ± 3.0", "REPPO": "64 ± 21 |  | 29.6 ± 7.2", "DIME": "83 ± 22 |  | 15.6 ± 9.4",
            "PPO": "57 ± 21 |  | 0.1 ± 3.7"}
    for method, row in rows.items():
        assert f"| MuJoCo Playground, humanoids | {method} (cited) | {row} |  | A100 or H100 |" in page
    assert "1.95 for TruDi, 1.07 for REPPO, 1.38 for DIME, 0.95 for PPO" in page
    cited = in_benchmark("estimate").cited_table()
    assert "| PPO | 0.95 ± 0.35 | 0.1 ± 3.7 | 38 |" in cited and "| DIME | 1.38 ± 0.36 | 15.6 ± 9.4 | 55 |" in cited
    assert cited in (ROOT / "benchmark/results/estimates.md").read_text()


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


def test_runs_stand_beside_the_public_curve(tmp_path, capsys):
    """At the very steps, and empty where there is nothing."""
    args = dict(env_id="T1JoystickFlatTerrain", seed=3, batch_size=8192, total_timesteps=6_000_000)
    (tmp_path / "args.json").write_text(json.dumps({"script": "trudi_mjx", "args": args | {"exp_name": "trudi_mjx"}}))
    logged = [(8192, None), (2_490_368, 5.0), (4_980_736, 11.25), (5_505_024, 20.0), (5_996_544, 15.0)]
    lines = [{"step": step, "wall_time": step / 1000} | ({RETURN: x} if x else {}) for step, x in logged]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, str(ROOT / "benchmark/public_curve.py"), str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out[2:]]
    assert cells[0][:5] == ["**T1JoystickFlatTerrain**: REPPO, public", "1.1", "11.2", "24.2", "34.8"]
    assert cells[1] == ["trudi_mjx, seed 3", "5.0", "11.2", "", "15.0", "17.5", "20.0", "5,996,544", "100"]


def test_strip_of_a_video(tmp_path):
    """Frames from the first to the last, their middles side by side."""
    greys = np.linspace(10, 240, 30).round().astype(np.uint8)
    frames = np.broadcast_to(greys[:, None, None, None], (30, 48, 64, 3)).copy()
    frames[:, :, :8] = 255
    iio.imwrite(tmp_path / "video.mp4", frames, fps=10)
    command = [sys.executable, ROOT / "benchmark/strip.py", tmp_path / "video.mp4", "--output", tmp_path / "strip.png"]
    subprocess.run([*command, "--frames", "3", "--width", "32", "--until", "2"], check=True)
    strip = iio.imread(tmp_path / "strip.png").astype(int)
    assert strip.shape == (48, 96, 3)
    for shown, expected in zip(np.split(strip, 3, axis=1), greys[[0, 10, 19]], strict=True):
        np.testing.assert_allclose(shown[:, :, 0], expected, atol=6)


# --------------------------------------------------------------------------------------------------------------- form
@pytest.mark.parametrize("name", "tasks runs sweep local slurm run outcomes aggregates figures analyze tables".split())
def test_form(name):
    from test_readme import depth, functions
    path = ROOT / "benchmark" / f"{name}.py"
    for function in functions(path):
        assert function.end_lineno - function.lineno < 60, f"{function.name} is too long"
        assert depth(function) <= 2, f"{function.name} nests too deep"
        assert ast.get_docstring(function) or function.name.startswith("<"), f"{function.name} has no docstring"


# --------------------------------------------------------------------------------------------------------- estimates
@pytest.fixture
def in_benchmark(monkeypatch):
    """Scripts of benchmark/ import what they share as `common`."""
    monkeypatch.syspath_prepend(str(tasks.ROOT / "benchmark"))
    return importlib.import_module


@pytest.mark.parametrize("width", [64, 256])
def test_counted_operations(in_benchmark, width):
    """XLA's count against that of the matrix products alone, by hand: a multiplication is two, gradients are twice as many."""
    estimate = in_benchmark("estimate")
    args = estimate.trudi.Args(num_envs=32, num_steps=8, minibatch_size=64, num_epochs=2, hidden_dim=width, total_timesteps=256)
    args = estimate.trudi.resolve(dataclasses.replace(args, env_id="CartpoleBalance"))
    seen, critics, action, steps, atoms = 40, 50, 6, args.num_diffusion_steps, args.num_atoms
    costs = estimate.learner_costs(args, seen, critics, action)
    latent = 2 * (action * width + 3 * width**2 + width * action)  # a state's network at a denoising step
    chain = 2 * seen * width + steps * latent
    critic = 2 * ((critics + action) * width + 2 * width**2 + width * atoms)
    expected = 2 * (3 * chain + 3 * chain + 3 * critic + 2 * critic) + 2 * chain + critic  # 2 epochs, rollout, targets
    assert expected < costs["flop_per_step"] < (1.6 if width == 64 else 1.25) * expected
    parameters = (seen + action + 32) * width + 3 * width**2 + width * action
    parameters += (critics + action) * width + 2 * width**2 + width * atoms
    assert parameters < costs["parameters"] < parameters + 20 * width + 4000
    assert costs["learner_bytes"] > 3 * 4 * parameters  # Adam has two moments for each
    assert costs["rollout_bytes"] > 4 * 256 * (2 * (seen + critics) + 2 * steps * action)


# ----------------------------------------------------------------------------------------------- stages on a GPU
@pytest.mark.parametrize("stage", ["throughput", "humanoid", "reppo", "dmc", "seeds"])
@pytest.mark.parametrize("rehearse", [False, True])
def test_stages_are_commands_that_exist(stage, rehearse, tmp_path):
    from benchmark import gpu
    commands = gpu.STAGES[stage](gpu.Options(stage=stage, out=str(tmp_path), rehearse=rehearse))
    for command, _ in commands:
        words = shlex.split(command)
        assert (tasks.ROOT / words[0]).exists() or words[:2] == ["-m", "benchmark.run"]
        if words[0] == "-m":
            result = subprocess.run([sys.executable, *words, "--dry-run"], cwd=tasks.ROOT, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            assert ("--num-envs 8" in result.stdout) == rehearse


def test_stages_are_continued_elsewhere(tmp_path, monkeypatch):
    """A command that is stopped in time, and whose runs are brought back where they are gone, with the newest checkpoint."""
    from benchmark import gpu
    script = tmp_path / "script.py"
    script.write_text("import pathlib, signal, sys, time\n"
                      "run = pathlib.Path('runs/gpu/run'); run.mkdir(parents=True, exist_ok=True)\n"
                      "for k in (1, 2):\n    (run / 'checkpoints' / str(k)).mkdir(parents=True, exist_ok=True)\n"
                      "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
                      "print('begun', flush=True)\ntime.sleep(60)\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "STAGES", {"humanoid": lambda options: [(str(script), {}), (str(script), {})]})
    monkeypatch.setattr(sys, "argv", ["gpu", "humanoid", "--out", str(tmp_path / "out"), "--minutes", "0.05"])
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            gpu.main()
        assert stop.value.code == 1
        assert [x.name for x in (tmp_path / "out" / "runs" / "run" / "checkpoints").iterdir()] == ["2"]
        shutil.rmtree(tmp_path / "runs")
    assert (tmp_path / "out" / "logs" / "humanoid_0.log").read_text().count("begun") == 2
    gpu.copy_runs(tmp_path / "out" / "runs", tmp_path / "runs" / "gpu")
    assert (tmp_path / "runs" / "gpu" / "run" / "checkpoints" / "2").is_dir()


def test_time_of_an_action(tmp_path):
    flags = "--observation-size 4 --action-size 2 --hidden-dim 8 --num-diffusion-steps 1 3 --calls 20 --output".split()
    command = [sys.executable, ROOT / "benchmark/action_time.py", *flags, tmp_path / "time"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "time.json").read_text())["rows"]
    assert [(row["steps"], row["mode"]) for row in rows] == [(1, "ode"), (1, "sde"), (3, "ode"), (3, "sde")]
    assert all(0 < row["median_ms"] <= row["percentile_99_ms"] for row in rows)
    assert (tmp_path / "time.md").read_text().count("\n| ") >= 5
