"""benchmark/tasks.py: the paper's 73 tasks and their settings."""

import dataclasses
import typing

import pytest

from benchmark import tasks
from benchmark.launch import __main__ as launch

ROOT = tasks.ROOT
PATIENCE = 150  # seconds that a process may take on a busy machine


COUNTS = dict(dmc=20, humanoid=4, maniskill=13, humanoidbench=30, isaaclab=6)


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


# Of Tables 3 to 5, the same for all suites; the entropy target is what the paper's equation 183 leaves open.
EVERYWHERE = dict(
    num_epochs=8, minibatch_size=2048, actor_learning_rate=3e-4, critic_learning_rate=3e-4, dual_learning_rate=3e-4,
    td_lambda=0.95, max_grad_norm=0.5, num_diffusion_steps=8, prior_std=2.5, trust_region_bound=0.1, num_atoms=151,
    target_entropy_scale=0.665)


@pytest.mark.parametrize(("suite", "number"), [(suite, i) for suite, count in COUNTS.items() for i in range(count)])
def test_scripts_resolve_to_table_5(suite, number, monkeypatch):
    task = tasks.tasks_of([suite])[number]
    script = pytest.importorskip(task.script)
    monkeypatch.setattr(script.util, "find_spec", lambda name: name)  # simulators need not be installed to resolve
    resolved = script.resolve(script.Args(env_id=task.env_id))
    expected = dataclasses.asdict(task.settings)
    if suite == "maniskill":  # the one deviation, which README explains
        assert resolved.gamma in (0.8, 0.875, 0.9, 0.95) and expected.pop("gamma") == 0.99
    expected |= EVERYWHERE
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
    assert typing.get_args(launch.Options.__annotations__["algorithm"]) == tasks.ALGORITHMS
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
