"""benchmark/launch: sweeps of a stand-in for the scripts, on this machine and by Slurm."""

import ast
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
from sweeps import SCRIPT, write_run

from benchmark import tasks
from benchmark.launch import __main__ as launch
from benchmark.launch import local
from benchmark.launch import units as units_module
from benchmark.launch.local import Machine
from benchmark.launch.units import Unit, conflict
from benchmark.runs import Run, find_runs, furthest

ROOT = tasks.ROOT
PATIENCE = 150  # seconds that a process may take on a busy machine


# -------------------------------------------------------------------------------------------------------------- sweeps
@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The stand-in in place of all scripts, and a folder to work in."""
    (tmp_path / "trudi_mjx.py").write_text(SCRIPT)
    monkeypatch.setattr(units_module, "ROOT", tmp_path)
    monkeypatch.setattr(local, "POLL", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def units(folder, *flags, **options):
    return launch.plan(launch.Options(**{"tasks": ("CheetahRun", "WalkerWalk"), "seeds": 2, "log_dir": str(folder / "runs"),
                                   "flags": "--total-timesteps 50", **options}))


def go(folder, planned, **options):
    """Run or continue these units; the exit code."""
    states = launch.remaining(planned, folder / "runs")
    machine = options.pop("machine", Machine([((), {})] * 2))
    return local.run_locally(states, folder / "runs", machine, options.pop("interval", 1000))


def kinds(folder, planned):
    return [state.kind for _, state in launch.remaining(planned, folder / "runs")]


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
    assert "--resume" not in units_module.command(planned[0], find_runs([fake / "runs"])[0], fake)
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


def test_flags_that_are_not_given_again_are_refused(fake, capsys):
    """Other seeds of the sweep would have the defaults instead, under the same name."""
    assert go(fake, units(fake, flags="--total-timesteps 50 --gamma 0.5")) == 0
    for flags in ("--total-timesteps 50", "--total-timesteps 50 --trust-region-bound 0.1"):
        with pytest.raises(SystemExit) as error:
            kinds(fake, units(fake, flags=flags))
        assert error.value.code == 2 and "has gamma 0.5, which was given to it" in capsys.readouterr().err


def test_settings_of_the_task_are_compared():
    unit = Unit(None, "trudi", 1, flags=("--env-config", "a.b=1", '--env-config={"c": {"d": true}}'))
    same = Run(None, "trudi_mjx", {}, "", ("x.py", "--env-config", "a.b=1", "--env-config", "c.d=true"))
    assert conflict(unit, same) is None
    other = Run(None, "trudi_mjx", {}, "", ("x.py", "--env-config", "a.b=2"))
    assert conflict(unit, other).startswith("--env-config {'a.b': '2'}, where")


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
    code = ("import sys, pathlib; from benchmark.launch import __main__ as launch, units, local; "
            "units.ROOT = pathlib.Path.cwd(); local.POLL = 0.02; launch.main()")
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


def test_the_first_seed(fake):
    planned = units(fake, seeds=3, first_seed=11, vmap_seeds=2, tasks=("CheetahRun",))
    assert [(u.seed, u.num_seeds) for u in planned] == [(11, 2), (13, 1)]


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
    monkeypatch.setattr(sys, "argv", ["launch", "--tasks", "CheetahRun", "WalkerWalk", "--seeds", "2",
                                      "--flags=--total-timesteps 50", "--dry-run"])
    capsys.readouterr()
    launch.main()
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
    states = [units_module.State(kind, None, step, seconds) for kind, step, seconds in states]
    states = list(zip(planned, states, strict=True))
    state = local.Sweep(states, pathlib.Path("."), Machine([((), {})]))
    state.waiting.remove(planned[1])
    state.running[planned[1]] = None, state.free.pop()
    assert state.left() == pytest.approx(30 + 2 * 80)
    assert [local.shown_time(x) for x in (None, 5, 120, 7200)] == ["?", "5 s", "2 min", "2.0 h"]


@pytest.mark.parametrize("suite", ["dmc", "maniskill", "isaaclab"])
@pytest.mark.parametrize("algorithm", ["reppo", "dime", "ppo"])
def test_baselines_run_the_tasks_of_a_suite(suite, algorithm, tmp_path):
    """Their commands, which are TruDi's but for the script."""
    planned = units(tmp_path, suite=suite, algorithm=algorithm, tasks=(), seeds=2, flags="--preset cpu")
    assert [unit.task.env_id for unit in planned] == 2 * [task.env_id for task in tasks.tasks_of([suite])]
    script = tasks.SUITES[suite].script.replace("trudi", algorithm)
    words = units_module.command(planned[0], None, tmp_path)
    assert str(words[1]).endswith(f"benchmark/baselines/{script}.py")
    assert words[words.index("--env-id") + 1] == planned[0].task.env_id and words[words.index("--exp-name") + 1] == algorithm


@pytest.mark.parametrize("module", ["launch.__main__", "report", "curves"])
def test_planning_and_reporting_import_no_framework(module):
    code = (f"import sys, benchmark.{module}; "
            "print([x for x in ('jax', 'torch', 'gymnasium', 'mani_skill') if x in sys.modules])")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


# ----------------------------------------------------------------------------------------------------------- ablations
def test_ablations_are_sweeps(fake):
    planned = units(fake, ablation="epsilon", tasks=("CheetahRun",), seeds=1, values=("0.01", "50"))
    assert [u.exp_name for u in planned] == ["trudi-epsilon-0.01", "trudi-epsilon-50"]
    assert go(fake, planned) == 0
    assert {r.args["trust_region_bound"] for r in find_runs([fake / "runs"])} == {0.01, 50.0}
    everything = [launch.plan(launch.Options(ablation=name, seeds=1)) for name in launch.ABLATIONS]
    assert [len(x) for x in everything] == [6 * 9, 4 * 8, 4 * 5]
    assert {u.flags for u in everything[2]} == {(), *(("--num-diffusion-steps", n) for n in ("1", "4", "16", "32"))}


def test_default_of_an_ablation_is_the_sweep(fake):
    """Its runs are taken, also if they are longer; without a sweep they are made, under its name."""
    for name, default in (("epsilon", "0.1"), ("denoising", "8")):
        assert launch.ABLATIONS[name].default == default
        for script in sorted(ROOT.glob("trudi_*.py")):
            field = launch.ABLATIONS[name].flag.removeprefix("--").replace("-", "_")
            assert re.search(rf"^    {field}: \w+ = {default}$", script.read_text(), re.M), script.name
    assert go(fake, units(fake, tasks=("CheetahRun",), flags="--total-timesteps 70")) == 0
    chosen = dict(ablation="epsilon", values=("0.1", "5"), seeds=3, tasks=("CheetahRun",))
    planned = units(fake, **chosen)
    assert [u.exp_name for u in planned] == 3 * ["trudi", "trudi-epsilon-5"]
    assert kinds(fake, planned) == ["finished", "waiting"] * 2 + ["waiting"] * 2
    assert go(fake, planned) == 0
    assert {(r.args["exp_name"], r.args["seed"]): r.last()["step"] for r in find_runs([fake / "runs"])} == {
        ("trudi", 1): 70, ("trudi", 2): 70, ("trudi", 3): 50, **{("trudi-epsilon-5", seed): 50 for seed in (1, 2, 3)}}


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
    state = units_module.State("waiting", None, 10, wall_time=3600.0, training_seconds=900.0)
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
    monkeypatch.setattr(sys, "argv", ["launch", *flags.split(), "--log-dir", str(tmp_path)])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as error:
        launch.main()
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


# --------------------------------------------------------------------------------------------------------------- slurm
@pytest.fixture
def slurm():
    pytest.importorskip("submitit")
    return importlib.import_module("benchmark.launch.slurm")


def test_job_runs_in_process(fake, slurm):
    import submitit
    planned = units(fake, seeds=1)
    jobs = slurm.submit(launch.remaining(planned, fake / "runs"), fake / "runs",
                        lambda folder: submitit.AutoExecutor(folder, cluster="debug"))
    assert [job.result() for job in jobs] == ["CheetahRun__trudi__1: finished", "WalkerWalk__trudi__1: finished"]
    assert kinds(fake, planned) == ["finished"] * 2
    assert slurm.submit(launch.remaining(planned, fake / "runs"), fake / "runs", None) == []


def test_job_that_fails_says_why(fake, slurm, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL_AT", "30")
    with pytest.raises(RuntimeError, match="exit code 1 at step 20\n(.*\n)*ValueError: the fake fails"):
        slurm.Job(units(fake)[2], fake / "runs")()


def test_submitits_signal_does_not_end_a_run(fake, slurm, monkeypatch):
    monkeypatch.setenv("FAKE_PAUSE", "0.1")
    process = units_module.Process(units(fake)[0], fake / "runs")
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
    stand_in = "import pathlib\nfrom benchmark.launch import units\nunits.ROOT = pathlib.Path.cwd()\n"
    (fake / "sitecustomize.py").write_text(stand_in)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(fake), str(ROOT)]))
    def executor(folder):
        made = submitit.LocalExecutor(folder, max_num_timeout=PATIENCE)
        made.update_parameters(timeout_min=30 / 60, signal_delay_s=22)
        return made
    job, = slurm.submit(launch.remaining(planned, fake / "runs"), fake / "runs", executor)
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
    monkeypatch.setattr(sys, "argv", ["launch", *"--tasks CheetahRun WalkerWalk --seeds 2 --slurm --slurm-hours 3 "
                                      "--slurm-cpus 6 --slurm-sbatch partition=gpu account=me --workers 3".split()])
    launch.main()
    lines = (fake / "submitted.sh").read_text().splitlines()
    wanted = ("array=0-3%3 time=180 gpus-per-node=1 cpus-per-task=6 partition=gpu account=me signal=USR2@300 job-name=trudi "
              "open-mode=append").split()
    assert {f"#SBATCH --{x}" for x in wanted} <= set(lines) and "#SBATCH --requeue" in lines
    assert sum(f"-m submitit.core._submit {fake}/runs/slurm" in line for line in lines) == 1
    assert "submitted 4 jobs, 12_0 to 12_3" in capsys.readouterr().out
    assert len(list((fake / "runs" / "slurm").glob("12_*_submitted.pkl"))) == 4


