"""What cannot work is refused before anything is compiled: every number, damaged and foreign runs, missing meshes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from probes import saved_run
from runner import PATIENCE, ROOT, call_main

import trudi_mjx as trudi

SIZES = dict(preset="cpu", num_envs=16, num_steps=8, minibatch_size=64, num_eval_envs=4, total_timesteps=1280)
POSITIVE = ("num_seeds episode_length num_devices total_timesteps num_envs num_steps num_epochs minibatch_size "
            "max_grad_norm hidden_dim "
            "actor_learning_rate critic_learning_rate dual_learning_rate num_diffusion_steps prior_std trust_region_bound "
            "num_atoms best_of_k eval_interval num_eval_envs checkpoint_interval").split()
NAN = float("nan")
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's, of readers that failed


def refusal(stop, error):
    """The one line on stderr of a process or call that ended with exit code 2."""
    assert stop == 2, error[-2000:]
    line, = error.splitlines()
    assert line.startswith("trudi_mjx.py: error: ")
    return line


def refused(*flags):
    """The same of main, called in this process; it must not come to compiling."""
    out, error = call_main(trudi.main, ["trudi_mjx.py", *flags], code=2)
    assert "compiled" not in out
    return refusal(2, error)


def refused_by_a_process(*flags, **environment):
    """The same of the script, started with these flags, within seconds."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, ROOT / "trudi_mjx.py", *map(str, flags)], capture_output=True, text=True,
                          timeout=120, env={**os.environ, **environment})
    assert "compiled" not in done.stdout
    line = refusal(done.returncode, done.stderr)
    assert time.perf_counter() - began < 5 * PATIENCE
    return line


def flag(name):
    return "--" + name.replace("_", "-")


# ------------------------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize("changes", [
    *({name: number} for name in POSITIVE for number in (0, -1)),
    dict(seed=-1), dict(gamma=-0.1), dict(gamma=1.0), dict(gamma=NAN), dict(td_lambda=1.1), dict(ode_score_scale=-1.0),
    dict(prior_std=NAN), dict(trust_region_bound=NAN), dict(actor_learning_rate=NAN), dict(v_min=5.0, v_max=5.0),
    dict(v_min=NAN), dict(v_max=float("inf")), dict(target_entropy_scale=NAN), dict(dual_learning_rate=float("inf")),
    dict(ode_score_scale=NAN), dict(seed=2**31),
    dict(num_atoms=1), dict(total_timesteps=100), dict(minibatch_size=96), dict(env_id="Cartpole"),
    dict(num_devices=3, impl="jax")], ids=str)
def test_values(changes, capsys):
    trudi.check_args(trudi.resolve(trudi.Args(**SIZES)))  # fine as it is
    with pytest.raises(SystemExit) as stop:
        trudi.check_args(trudi.resolve(trudi.Args(**{**SIZES, **changes})))
    line = refusal(stop.value.code, capsys.readouterr().err)
    assert any(flag(name) in line for name in changes) or changes in ({"minibatch_size": 96},)


@pytest.mark.parametrize("changes", [dict(num_envs=15), dict(minibatch_size=33), dict(num_eval_envs=3),
                                     dict(impl="warp")], ids=str)
def test_what_does_not_go_on_two_devices(changes, capsys, monkeypatch):
    devices = trudi.jax.local_devices() * 2
    monkeypatch.setattr(trudi.jax, "local_devices", lambda backend=None: devices)
    trudi.check_args(trudi.resolve(trudi.Args(**SIZES, impl="jax", num_devices=2)))
    with pytest.raises(SystemExit) as stop:
        trudi.check_args(trudi.resolve(trudi.Args(**{**SIZES, "impl": "jax", **changes}, num_devices=2)))
    line = refusal(stop.value.code, capsys.readouterr().err)
    assert any(flag(name) in line for name in changes) or "--num-envs x --num-steps" in line


SCRIPTS = [*sorted(ROOT.glob("trudi_*.py")), *sorted(ROOT.glob("benchmark/baselines/*_mjx.py"))]


@pytest.mark.parametrize("flags", [["--env-id", "Nosuch"], ["--num-envz", "3"]], ids=["task", "flag"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_mistyped_words_are_refused_before_slow_imports(script, flags, tmp_path):
    for name in ("jax", "torch", "flax", "mujoco_playground", "tensorboardX", "mani_skill"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2, done.stderr
    assert flags[-1 if "--env-id" in flags else 0] in done.stderr


# -------------------------------------------------------------------------------------------------------------- runs
@pytest.fixture
def run(tmp_path):
    return saved_run(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"args": {}, "script": "another"}',
                                     '{"args": {"env_id": "CartpoleBalance", "wings": 2}, "script": "trudi_mjx"}'])
@pytest.mark.parametrize("way", ["--resume", "--evaluate"])
def test_foreign_arguments(content, way, tmp_path, capsys, monkeypatch):
    (tmp_path / "args.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["trudi_mjx.py", way, str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        trudi.parse()
    assert str(tmp_path) in refusal(stop.value.code, capsys.readouterr().err)


@pytest.mark.parametrize("damage", ["all truncated", "arrays truncated", "arrays emptied", "no checkpoint", "no folder"])
def test_damaged_checkpoints(damage, run, capsys, monkeypatch):
    if damage.startswith("no"):
        shutil.rmtree(run / "checkpoints" / ("128" if damage == "no checkpoint" else ""))
    for path in (run / "checkpoints").rglob("*"):
        if path.is_file() and (damage == "all truncated" or "d" in path.relative_to(run).parts):
            path.write_bytes(path.read_bytes()[:0 if damage == "arrays emptied" else path.stat().st_size // 2])
    monkeypatch.setattr(sys, "argv", ["trudi_mjx.py", "--resume", str(run)])
    with pytest.raises(SystemExit) as stop:
        trudi.main()
    assert str(run) in refusal(stop.value.code, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["gamma", "seed", "num_envs", "hidden_dim", "prior_std", "env_id", "impl"])
def test_what_a_run_was_started_with_cannot_change(name, run, capsys, monkeypatch):
    other = dict(env_id="CartpoleSwingup", impl="warp", gamma="0.5").get(name, "32")
    monkeypatch.setattr(sys, "argv", ["trudi_mjx.py", "--resume", str(run), flag(name), other])
    with pytest.raises(SystemExit) as stop:
        trudi.parse()
    assert f"{flag(name)} cannot change" in refusal(stop.value.code, capsys.readouterr().err)


def test_what_a_run_may_change(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trudi_mjx.py", "--resume", str(run), "--total-timesteps", "384", "--eval-mode", "sde"])
    args = trudi.parse()
    saved = trudi.read_checkpoint(args.resume)
    assert (args.total_timesteps, args.num_iterations, args.eval_mode, args.hidden_dim) == (384, 3, "sde", 16)
    assert set(saved["state"]) == {"a.b", "c"}
    assert parse(monkeypatch, "--evaluate", run, "--impl", "mujoco").impl == "mujoco"  # test_mjx_runs.py: with what state


def test_a_checkpoint_of_something_else(run):
    """Found out before minutes are spent on compiling for it."""
    assert "not of this run" in refused("--resume", run)


def test_missing_meshes(tmp_path):
    """With a stand-in for Playground that cannot clone them, whether or not this machine reaches GitHub."""
    package = tmp_path / "mujoco_playground"
    package.mkdir()
    (package / "__init__.py").write_text("import subprocess\nraise subprocess.CalledProcessError(128, ['git', 'clone'])\n")
    line = refused_by_a_process("--env-id", "G1JoystickRoughTerrain", "--preset", "cpu", PYTHONPATH=str(tmp_path))
    assert "git clone https://github.com/google-deepmind/mujoco_menagerie" in line
    assert str(package / "external_deps" / "mujoco_menagerie") in line


def parse(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["trudi_mjx.py", *map(str, flags)])
    return trudi.parse()


def change(run, **values):
    """Other arguments in a run's args.json."""
    path = run / "args.json"
    saved = json.loads(path.read_text())
    saved["args"] |= values
    path.write_text(json.dumps(saved))


@pytest.mark.parametrize("values", [
    dict(hidden_dim="wide"), dict(hidden_dim=16.5), dict(eval_mode="nonsense"), dict(prior_std=None),
    dict(capture_video="yes"), dict(num_seeds=True), dict(gamma=[0.9, 0.8]), dict(seed={})], ids=str)
def test_a_folders_arguments_are_checked_as_flags_are(values, run, capsys, monkeypatch):
    change(run, **values)
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, "--evaluate", run)
    assert str(run) in refusal(stop.value.code, capsys.readouterr().err)


def test_arguments_are_read_as_they_were(run, monkeypatch):
    given = parse(monkeypatch, "--env-id", "CartpoleBalance", "--preset", "cpu", "--env-config", "ctrl_dt=0.02", "--env-config",
                  '{"sim_dt": 0.01}', "--prior-std", "1e-3", "--no-learn-friction", "--track", "--wandb-entity", "a b",
                  "--exp-name=--evaluate")
    assert given.exp_name == "--evaluate" and given.env_config == ("ctrl_dt=0.02", "sim_dt=0.01")
    change(run, **vars(given))
    assert parse(monkeypatch, "--resume", run) == dataclasses.replace(given, resume=str(run))


def test_code_that_a_folder_names_is_not_run(run, capsys, monkeypatch, tmp_path):
    """Neither a task's module nor programs that were compiled before, unless the command line names them too."""
    own = str(tmp_path / "mine")
    assert parse(monkeypatch, "--evaluate", run, "--compilation-cache-dir", own).compilation_cache_dir == own
    change(run, compilation_cache_dir=str(run / "cache"), export=str(tmp_path / "overwritten"))
    assert parse(monkeypatch, "--evaluate", run).compilation_cache_dir == trudi.Args().compilation_cache_dir
    assert parse(monkeypatch, "--evaluate", run).export is None
    change(run, env_id="own_tasks:Point")
    for flags in (["--evaluate", run], ["--resume", run, "--env-id", "own_tasks:Cliff"]):
        with pytest.raises(SystemExit) as stop:
            parse(monkeypatch, *flags)
        assert "own_tasks:Point; give that flag too" in refusal(stop.value.code, capsys.readouterr().err)
    for env_id in ("own_tasks:Point", "ReacherEasy"):
        assert parse(monkeypatch, "--evaluate", run, "--env-id", env_id).env_id == env_id
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--resume", run, "--env-id", "ReacherEasy")


@pytest.mark.parametrize("flags, message", [
    (["--export", "p.onnx"], "needs --evaluate"),
    (["--evaluate", "RUN", "--export", "p.onnx", "--eval-mode", "best-of-k"], "--eval-mode ode or sde"),
    (["--evaluate", "RUN", "--export", "nosuch/p.onnx"], "no such folder")], ids=["run", "mode", "folder"])
def test_what_cannot_be_exported(flags, message, run, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, *[run if word == "RUN" else word for word in flags])
    assert message in refusal(stop.value.code, capsys.readouterr().err)


@pytest.mark.parametrize("way", [["--export", "p.onnx"], []], ids=["export", "evaluate"])
@pytest.mark.parametrize("other", ["trudi_humanoidbench", "reppo_mjx"])
def test_a_run_of_another_script(other, way, run, capsys, monkeypatch, tmp_path):
    path = run / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"script": other}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, "--evaluate", run, *way)
    assert f"it is of {other}.py" in refusal(stop.value.code, capsys.readouterr().err)
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, "--evaluate", tmp_path / "nosuch", *way)
    assert "is no run folder" in refusal(stop.value.code, capsys.readouterr().err)


def test_export_without_its_exporter(run, capsys, monkeypatch):
    monkeypatch.setattr(trudi.util, "find_spec", lambda name: None if name == "jax2onnx" else name)
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, "--evaluate", run, "--export", "p.onnx")
    assert "pip install jax2onnx" in refusal(stop.value.code, capsys.readouterr().err)


# ---------------------------------------------------------------------------------------------------- command lines
BAD = {
    "--env-id CartpoleBalanc": "CartpoleBalance,",
    "--minibatch-size 500": "--minibatch-size 500 does not divide",
    "--num-envs 0": "--num-envs must be positive",
    "--num-steps -3": "--num-steps must be positive",
    "--gamma 1.5": "--gamma must lie in",
    "--v-min 3 --v-max 2": "--v-min < --v-max",
    "--total-timesteps 100": "is less than",
    "--device gpu": "no gpu device",
    "--impl jax --num-devices 3 --num-envs 18 --num-steps 32 --minibatch-size 96 --num-eval-envs 3": "JAX finds 2",
    "--resume nowhere": "no run folder",
    "--env-id :Point": "no module on PYTHONPATH or beside trudi_mjx.py",
    "--exp-name " + 250 * "x": "too long for the name of a folder",
    "--env-config ctrl_dt=0": "ctrl_dt=0 must be positive",
    "--env-config sim_dt=0": "sim_dt=0 must be positive",
    "--env-config ctrl_dt=0.001": "must not be less than sim_dt",
    "--env-config vision=true": "vectors, not pictures",
    "--env-config action_repeat=2": "action_repeat 2",
}


def test_a_place_where_no_runs_can_be(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "unmounted" / "scratch")
    for name in ("file", "link"):
        assert f"--log-dir {tmp_path / name} is no folder" in refused("--preset", "cpu", "--log-dir", str(tmp_path / name))


def test_a_run_is_continued_or_evaluated(run):
    assert "give one of them" in refused("--resume", str(run), "--evaluate", str(run))


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_refused_in_one_line(flags):
    assert BAD[flags] in refused("--preset", "cpu", *flags.split())


def test_a_process_refuses_within_seconds(run):
    """What is found out last: no such device, and no checkpoint in a folder with arguments."""
    assert "no gpu device" in refused_by_a_process("--preset", "cpu", "--device", "gpu")
    shutil.rmtree(run / "checkpoints" / "128")
    assert "no readable checkpoint" in refused_by_a_process("--resume", run)
