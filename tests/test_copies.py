"""What those meet who copy trudi_mjx.py or bring a task: names, what can go, what is watched, what must stay, tasks."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from probes import EndOrTimeOut, lively_actor, setup_for, small_args
from test_runs import CLIFF, Runner, curve, meshes, metrics

import trudi_mjx as trudi

ROOT = pathlib.Path(trudi.__file__).parent
TESTS = pathlib.Path(__file__).parent


def load(path):
    """A script, imported from a file of any name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("copies"))


# ------------------------------------------------------------------------------------------------------ copies
def test_runs_of_a_copy_bear_its_name(tmp_path):
    shutil.copy(ROOT / "trudi_mjx.py", tmp_path / "my_method.py")
    assert load(tmp_path / "my_method.py").Args().exp_name == "my_method"
    assert trudi.Args().exp_name == "trudi_mjx"


def test_a_flag_that_a_copy_adds_cannot_change_on_resume(tmp_path, capsys, monkeypatch):
    """Wherever it stands: what may change is a list of names."""
    text = (ROOT / "trudi_mjx.py").read_text()
    marker = "    # Computed\n"
    assert marker in text
    (tmp_path / "flags.py").write_text(text.replace(marker, "    wings: int = 2\n\n" + marker))
    script = load(tmp_path / "flags.py")
    args = dataclasses.asdict(script.resolve(script.Args(preset="cpu")))
    (tmp_path / "args.json").write_text(json.dumps({"args": args, "script": "flags"}))
    monkeypatch.setattr(sys, "argv", ["flags.py", "--resume", str(tmp_path), "--wings", "3"])
    with pytest.raises(SystemExit) as stop:
        script.parse()
    assert stop.value.code == 2 and "--wings cannot change" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["flags.py", "--resume", str(tmp_path), "--eval-interval", "7"])
    assert script.parse().eval_interval == 7


def between(text, start, end):
    """The part of a text from `start` up to `end`."""
    first = text.index(start)
    return text[first : text.index(end, first)]


def without_infrastructure(text):
    """trudi_mjx.py without checks of flags, video, checkpoints, a run's provenance and several hosts; in how many cuts."""
    interval = '    values.setdefault("checkpoint_interval", values["eval_interval"])\n'
    cuts = [
        (between(text, "# " + 81 * "-" + " what a copy", "# " + 88 * "-" + " run folder"), ""),
        (between(text, "    # Checkpoints and video\n", "    # Computed\n"), ""),
        (between(text, "    if args.capture_video:\n        os.environ", "    devices = find_devices"), ""),
        (interval, ""),
        (between(text, "        film = now.film\n", "        return Evaluation("), ""),
        (between(text, "    if setup.args.capture_video:\n        film = jax.tree.map(lambda x", "    start = Eval"), ""),
        (between(text, "    if setup.args.capture_video and", "    return metrics\n\n\ndef check_contract"), ""),
        (between(text, '    path = folder / "args.json"', "    if args.track"), ""),
        (between(text, "    if args.resume:", "def seed_folders"), "    return name_folder(args, make_folder(args))\n\n\n"),
        (between(text, "    if saved:\n", "    options = {"), ""),
        (between(text, "    if setup.args.evaluate:\n", "    learn = jax.vmap"), ""),
        (between(text, "        kept = seed_folders", "    return still"), "        print(where, bad, file=sys.stderr)\n"),
        (between(text, "        stop = largest(", "    print(folder)"),
         "        stop = received[0] if received else 0\n"),
        (between(text, "    join_hosts()\n", "    if args.compilation_cache_dir"),
         "    args = resolve(tyro.cli(Args))\n    saved = {}\n"),
        (between(text, "    if args.export:\n        export_first", "    programs = compile"), ""),
        (between(text, "    if args.evaluate:\n", "    sys.exit(train("), ""),
    ]
    for old, new in cuts:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text, len(cuts)


def test_a_copy_without_infrastructure_trains(runner):
    text, cuts = without_infrastructure((ROOT / "trudi_mjx.py").read_text())
    assert cuts <= 16
    for word in "check_numbers ocp. capture_video git_commit multihost_utils. args.resume".split():
        assert word not in text, word
    copy = runner.folder / "stripped.py"
    copy.write_text(text)
    sizes = "--preset cpu --num-envs 16 --num-steps 8 --minibatch-size 64 --num-eval-envs 2 --total-timesteps 512"
    flags = ["--env-id", "own_tasks:Point", "--device", "cpu", *sizes.split(), "--log-dir", str(runner.folder / "runs")]
    command = [sys.executable, str(copy), *flags, "--compilation-cache-dir", str(runner.folder / "cache")]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS / 'lean'}:{TESTS}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [event["step"] for event in metrics(done.stdout.splitlines()[-1])] == [128, 256, 384, 512]


def test_what_may_change_is_a_flag():
    assert set(trudi.MAY_CHANGE) <= {field.name for field in dataclasses.fields(trudi.Args)}


# --------------------------------------------------------------------------------------------------- divergence
def diverging(**changes):
    """Setup, a state and metrics of two seeds; the second one has a metric that is not finite."""
    args = small_args(num_seeds=2)
    setup = setup_for(EndOrTimeOut(), args, 3)
    state = jax.jit(jax.vmap(lambda key: trudi.init_state(setup, key)))(jax.random.split(jax.random.PRNGKey(0)))
    names = ("charts/episodes", "charts/episodic_return", "charts/episodic_length")
    found = {name: np.ones(2) for name in (*names, "charts/SPS", "losses/critic")}
    return args, state, found | changes


@pytest.mark.parametrize("name", ["losses/critic", "mine/penalty", "critic/target", "eval/episodic_return"])
def test_any_metric_that_is_not_finite_ends_its_seed(name, tmp_path, capsys):
    args, state, found = diverging(**{name: np.array([1.0, np.inf])})
    healthy = trudi.end_diverged(args, state, found, np.ones(2, bool), tmp_path)
    assert healthy.tolist() == [True, False]
    error = capsys.readouterr().err
    assert f"seed {args.seed + 1}: {name} not finite" in error
    kept = trudi.read_checkpoint(str(tmp_path / f"seed_{args.seed + 1}" / "diverged"))["state"]
    np.testing.assert_array_equal(kept["key"], state.key[1:])
    assert not (tmp_path / f"seed_{args.seed}").exists()


def test_a_seed_that_has_ended_is_not_looked_at_again(tmp_path):
    args, state, found = diverging(**{"losses/critic": np.array([1.0, np.nan])})
    healthy = trudi.end_diverged(args, state, found, np.array([True, False]), tmp_path)
    assert healthy.tolist() == [True, False] and not list(tmp_path.iterdir())


def test_rollouts_without_an_end_have_no_mean_return(tmp_path):
    missing = {f"charts/{name}": np.array([5.0, np.nan]) for name in ("episodic_return", "episodic_length")}
    args, state, found = diverging(**missing, **{"charts/episodes": np.array([3.0, 0.0])})
    assert trudi.end_diverged(args, state, found, np.ones(2, bool), tmp_path).all()
    assert "charts/episodic_return" not in trudi.metrics_of_seed(found, 1)


def test_one_seed_diverges_and_the_other_goes_on(runner):
    """The second seed's critic is spoilt in the checkpoint; the first one's curve is that of a run without it."""
    folder = runner.train(*CLIFF, "--num-seeds", "2", "--total-timesteps", "1280", "--eval-interval", "5")
    straight = runner.folder / "straight"
    shutil.copytree(folder, straight)
    runner.run("--resume", str(straight), "--total-timesteps", "2560")
    saved = trudi.read_checkpoint(str(folder))
    arrays = saved["state"]
    name = next(name for name in arrays if name.startswith("learner.critic.") and name.endswith("kernel.value"))
    arrays[name] = np.array(arrays[name])
    arrays[name][1] = np.nan
    shutil.rmtree(folder / "checkpoints")
    trudi.save_checkpoint(folder, arrays, 1280, {name: saved[name] for name in ("wall_time", "healthy")})
    _, err = runner.run("--resume", str(folder), "--total-timesteps", "1920", code=1)
    assert "seed 2" in err and "losses/critic" in err
    assert (folder / "seed_2" / "diverged" / "checkpoints" / "1408").is_dir()
    runner.run("--resume", str(folder), "--total-timesteps", "2560", code=1)  # and again, with one seed ended before
    assert curve(folder / "seed_1") == curve(straight / "seed_1")
    assert [event["step"] for event in metrics(folder / "seed_2")] == [128 * i for i in range(1, 12)]


# ------------------------------------------------------------------------------------------- the actor's contract
def first_iteration(actor=None):
    """Metrics (1, ...) of a run's first iteration, on observations whose statistics are not those of nothing."""
    args = small_args(num_diffusion_steps=2)
    setup = setup_for(EndOrTimeOut(), args, 3)
    state = jax.jit(lambda key: trudi.init_state(setup, key))(jax.random.PRNGKey(0))
    if actor:
        learner = state.learner._replace(actor=actor(args))
        state = state._replace(learner=learner)
    _, found = jax.jit(lambda state: trudi.iterate(setup, state))(state)
    return {name: np.asarray(x)[None] for name, x in found.items()}


def test_an_output_layer_that_starts_at_zero_is_what_it_takes():
    found = first_iteration()
    assert abs(found["trust_region/initial_kl"][0]) < 1e-6
    trudi.check_contract(found)


def test_another_output_layer_ends_the_first_iteration():
    found = first_iteration(lambda args: lively_actor(args, 1, 1, seed=1))
    with pytest.raises(SystemExit) as stop:
        trudi.check_contract(found)
    assert "output layer has to start at zero" in stop.value.code


# -------------------------------------------------------------------------------------------------- own tasks
def made(env_id, *config, **changes):
    return trudi.make_setup(small_args(env_id=env_id, env_config=config, **changes))


@pytest.fixture(autouse=True)
def tasks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(TESTS)


def test_a_task_of_ones_own():
    setup = made("own_tasks:Point")
    assert (setup.action_size, setup.time_limit, setup.args.gamma) == (2, 20, trudi.SUITE["dmc"]["gamma"])
    assert made("own_tasks:Point", episode_length=7).time_limit == 7
    assert made("endless_task:Endless", episode_length=7).time_limit == 7


def test_which_numbers_an_unknown_task_gets_is_said(capsys):
    for env_id, suite in (("own_tasks:Point", "dmc"), ("PointMass", "dmc"), ("Go1JoystickFlatTerrain", "humanoid")):
        args = small_args(env_id=env_id)
        line = capsys.readouterr().out
        assert env_id in line and str(trudi.SUITE[suite]) in line
        assert (args.gamma, args.v_max) == (trudi.SUITE[suite]["gamma"], trudi.SUITE[suite]["v_max"])
    small_args(env_id="CheetahRun")
    assert not capsys.readouterr().out


def test_a_task_of_ones_own_trains(runner):
    folder = runner.train("--env-id", "own_tasks:Point", "--env-config", "reward.scale=0.5", "--env-config",
                          '{"episode_length": 8}', "--total-timesteps", "512")
    saved = json.loads((folder / "args.json").read_text())["args"]
    assert saved["env_config"] == ["reward.scale=0.5", "episode_length=8"]
    events = metrics(folder)
    assert [event["step"] for event in events] == [128, 256, 384, 512]
    assert 0 < events[-1]["eval/episodic_return"] <= 8 * 0.5
    assert events[-1]["eval/episodic_length"] == 8
    same = ["--env-config", "reward.scale=0.5"]  # as whoever gives a command again does
    runner.run("--resume", str(folder), *same, "--total-timesteps", "640")
    assert metrics(folder)[-1]["step"] == 640
    _, err = runner.run("--resume", str(folder), "--env-config", "reward.scale=1", code=2)
    assert "--env-config cannot change" in err


@pytest.mark.parametrize(("env_id", "config", "message"), [
    ("own_tasks:Nothing", (), "not an importable module:Class"),
    ("no_such_module:Point", (), "not an importable module:Class"),
    ("own_tasks:NoTask", (), "must be a subclass"),
    ("endless_task:Endless", (), "--episode-length"),
    ("own_tasks:Point", ("reward.scales=2",), "own_tasks:Point has no such setting; the nearest are reward.scale"),
    ("own_tasks:Point", ("reward.scale=big",), "cannot be made"),
    ("own_tasks:Point", ("reward.scale",), "neither key=value"),
    ("own_tasks:Point", ('{"reward.scale": ',), "not JSON"),
    ("CartpoleBalance", ("push_config.enable=false",), "has no such setting"),
])
def test_what_cannot_be_made_is_refused(env_id, config, message, capsys):
    with pytest.raises(SystemExit) as stop:
        made(env_id, *config)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and message in line and line.count("\n") == 1, line


def test_settings_are_overridden():
    setup = made("own_tasks:Point", "reward.scale=0.5", '{"reward": {"scale": 0.25}, "episode_length": 5}')
    assert (setup.env._config.reward.scale, setup.time_limit) == (0.25, 5)


@pytest.mark.parametrize("env_id", trudi.HUMANOID)
def test_humanoids_are_not_pushed_unless_asked(env_id):
    """E19."""
    if not meshes().exists():
        pytest.skip(f"the robots' meshes are not in {meshes()}")
    assert made(env_id).env._config.push_config.enable is False
    assert made(env_id, "push_config.enable=true").env._config.push_config.enable is True


def test_settings_of_a_run_stay(tmp_path):
    """What was resolved once resolves to itself, as it must when a run is continued."""
    args = small_args(env_id="G1JoystickRoughTerrain", env_config=('{"push_config": {"enable": true}}', "action_scale=0.4"))
    assert args.env_config == ("push_config.enable=true", "action_scale=0.4")
    assert trudi.resolve(args) == args
