"""Tasks of trudi_mjx.py: Playground's, and one's own."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from probes import small_args
from runner import Runner, meshes, metrics

import trudi_mjx as trudi


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("tasks"))


# ----------------------------------------------------------------------------------------- Playground's tasks
def test_dmc_tasks_can_be_made():
    """With the MuJoCo that is installed; Playground's two Reachers want one whose version is not 3.10 to 3.17, or our help."""
    for env_id in trudi.DMC:
        setup = trudi.make_setup(small_args(env_id=env_id))
        assert setup.time_limit == 1000 and setup.action_size > 0


def test_presets_are_flags():
    """What SUITE and PRESET set are arguments that wait for them."""
    waiting = {field.name for field in dataclasses.fields(trudi.Args) if field.default is None}
    for table in (*trudi.SUITE.values(), *trudi.PRESET.values(), trudi.CPU_HUMANOID):
        assert set(table) <= waiting


def test_warp_is_of_the_version_that_mjx_wants():
    """With another one MJX says nothing until a task is made with --impl warp, the default on a GPU."""
    types = pytest.importorskip("mujoco.mjx.warp.types")
    assert hasattr(types.GraphMode, "WARP")


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_warp_can_be_traced(num_seeds, monkeypatch):
    """All that is compiled with --impl warp, the default on a GPU, short of Warp's own kernels. Warp's data can be mapped over
    seeds, but not selected between."""
    monkeypatch.setattr("warp._src.context.Module.load", lambda *_, **__: None)
    setup = trudi.make_setup(small_args(env_id="HopperHop", impl="warp", num_seeds=num_seeds))
    key = jax.ShapeDtypeStruct((num_seeds, 2), np.uint32)
    state = jax.eval_shape(trudi.over_seeds(setup, trudi.init_state), key)
    new_state, metrics = jax.eval_shape(trudi.over_seeds(setup, trudi.iterate), state)
    assert [x.shape for x in jax.tree.leaves(new_state)] == [x.shape for x in jax.tree.leaves(state)]
    found, _ = jax.eval_shape(jax.vmap(functools.partial(trudi.evaluate, setup), axis_name="seed"), state)
    assert metrics["losses/actor"].shape == found["eval/episodic_return"].shape == (num_seeds,)


def test_seeds_side_by_side_have_room_for_their_contacts(monkeypatch):
    """Warp's limit is of all environments together, and beyond it contacts are left out."""
    monkeypatch.setattr("warp._src.context.Module.load", lambda *_, **__: None)
    rooms = [trudi.make_setup(small_args(env_id="HopperHop", impl="warp", num_seeds=k)).env._config.naconmax for k in (1, 3)]
    assert rooms[1] == 3 * rooms[0] > 0


def test_privileged_observations_are_not_needed():
    both = trudi.network_inputs({"state": np.ones(2)})
    assert both.actor is both.critic


@pytest.mark.parametrize("env_id", ["CartpoleBalence", "cartpolebalance", "CartpoleBalance1"])
def test_the_nearest_tasks_are_offered(env_id, capsys):
    with pytest.raises(SystemExit):
        trudi.resolve(trudi.Args(env_id=env_id))
    assert "CartpoleBalance" in capsys.readouterr().err.replace(env_id, "")


def test_tasks_are_those_that_are_registered():
    registry = trudi.import_playground("CartpoleBalance").registry
    assert set(trudi.installed_tasks()) == set(registry.ALL_ENVS)
    assert set(trudi.installed_tasks("dm_control_suite")) == set(registry.dm_control_suite.ALL_ENVS)


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


# ------------------------------------------------------------------------------------------------- own tasks
def made(env_id, *config, **changes):
    return trudi.make_setup(small_args(env_id=env_id, env_config=config, **changes))


def test_a_task_of_ones_own():
    setup = made("own_tasks:Point")
    assert (setup.action_size, setup.time_limit, setup.args.gamma) == (2, 20, trudi.SUITE["dmc"]["gamma"])
    assert made("own_tasks:Point", episode_length=7).time_limit == 7
    assert made("endless_task:Endless", episode_length=7).time_limit == 7


@pytest.mark.parametrize("fault, error", [("import no_such_module", ModuleNotFoundError), ("x = len(3)", TypeError)])
def test_a_fault_of_ones_own_is_shown_where_it_is(fault, error, tmp_path, monkeypatch):
    """In the module, or where the class is made: a traceback, as Python has it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"faulty_{error.__name__}.py").write_text(fault)
    with pytest.raises(error):
        made(f"faulty_{error.__name__}:Task")
    (tmp_path / f"late_{error.__name__}.py").write_text(
        "import own_tasks\nclass Task(own_tasks.Point):\n    def __init__(self, **_):\n        len(3)\n")
    with pytest.raises(TypeError):
        made(f"late_{error.__name__}:Task")


def test_episodes_shorter_than_a_rollout_are_told_of(capsys):
    for steps, words in ((20, 0), (21, 1)):
        trudi.make_setup(small_args(env_id="own_tasks:Point", num_steps=steps, minibatch_size=16))
        assert capsys.readouterr().out.count("shorter than rollouts") == words


def test_run_k_has_seed_plus_k():
    sizes = dict(env_id="own_tasks:Point", hidden_dim=4, num_envs=4, num_steps=16)
    two, one = (trudi.prepare(trudi.make_setup(small_args(**sizes, seed=seed, num_seeds=count)), {})[0]
                for seed, count in ((3, 2), (4, 1)))
    for both, alone in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(both[1], alone[0], rtol=1e-6, atol=1e-6)


def test_which_numbers_an_unknown_task_gets_is_said(capsys):
    for env_id, suite in (("own_tasks:Point", "dmc"), ("PointMass", "dmc"), ("Go1JoystickFlatTerrain", "humanoid")):
        args = small_args(env_id=env_id)
        line = capsys.readouterr().out
        assert env_id in line and str(trudi.SUITE[suite]) in line
        assert (args.gamma, args.v_max) == (trudi.SUITE[suite]["gamma"], trudi.SUITE[suite]["v_max"])
    small_args(env_id="CheetahRun")
    assert not capsys.readouterr().out


def test_a_task_of_ones_own_trains(runner):
    folder = runner.train_here("--env-id", "own_tasks:Point", "--env-config", "reward.scale=0.5", "--env-config",
                          '{"episode_length": 8}', "--total-timesteps", "512")
    saved = json.loads((folder / "args.json").read_text())["args"]
    assert saved["env_config"] == ["reward.scale=0.5", "episode_length=8"]
    events = metrics(folder)
    assert [event["step"] for event in events] == [128, 256, 384, 512]
    assert 0 < events[-1]["eval/episodic_return"] <= 8 * 0.5
    assert events[-1]["eval/episodic_length"] == 8
    same = ["--env-config", "reward.scale=0.5"]  # as whoever gives a command again does
    runner.call("--resume", folder, *same, "--total-timesteps", "640")
    assert metrics(folder)[-1]["step"] == 640
    _, err = runner.call("--resume", folder, "--env-config", "reward.scale=1", code=2)
    assert "--env-config cannot change" in err


@pytest.mark.parametrize(("env_id", "config", "message"), [
    ("own_tasks:Nothing", (), "must be a subclass"),
    ("no_such_module:Point", (), "no module no_such_module on PYTHONPATH"),
    ("no_such_module.part:Point", (), "no module no_such_module.part on PYTHONPATH"),
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
