"""trudi_maniskill.py on ManiSkill's tasks, and on small variations of one."""

from importlib import import_module

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mani_skill")

from small_maniskill import CPU, prepared, small_args  # noqa: E402

import trudi_maniskill as trudi  # noqa: E402
from benchmark import without_vulkan  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def materials():
    without_vulkan.stub_materials()
    torch.set_num_threads(1)


@pytest.mark.parametrize("env_id", trudi.TASKS)
def test_every_task_trains_and_is_evaluated(env_id, tmp_path):
    setup, state, programs = prepared(env_id=env_id, num_envs=1, num_steps=8, minibatch_size=8, num_eval_envs=1)
    actions = {"TwoRobotPickCube-v1": 16, "TwoRobotStackCube-v1": 16, "PushT-v1": 7}.get(env_id, 8)
    assert len(state.learner.actor.raw_friction) == actions
    for _ in range(2):
        state, metrics = trudi.iterate(setup, programs, state)
    assert trudi.not_finite(trudi.averages(metrics)) == []
    metrics = trudi.averages(trudi.evaluate(setup, state, tmp_path))
    assert metrics["eval/episodic_length"] == setup.env.time_limit
    assert setup.args.gamma == pytest.approx(1 - 10 / setup.env.time_limit)
    assert 0 <= metrics["eval/success_at_end"] <= metrics["eval/success_once"] <= 1
    assert np.isfinite(metrics["eval/episodic_return"])


def test_clocks_start_spread_out_and_time_outs_come_at_the_limit():
    env = prepared(num_envs=6)[0].env
    assert env.time_limit == 50
    clocks = np.array([int(scene.base_env.elapsed_steps) for scene in env.scenes])
    assert len(set(clocks)) > 3
    ends = [env.step(torch.zeros(6, 8)).truncated.numpy() for _ in range(50)]
    np.testing.assert_array_equal(np.argmax(ends, 0), 49 - clocks)
    assert np.sum(ends) == 6


def test_training_ends_at_a_success_and_evaluation_goes_on(monkeypatch):
    setup, _, _ = prepared()
    for env in (setup.env, setup.eval_env):
        monkeypatch.setattr(env.scenes[0].base_env, "evaluate", lambda: {"success": torch.tensor([True])})
    for scene in setup.env.scenes:
        scene.base_env.elapsed_steps.zero_()
    outcome = setup.env.step(torch.zeros(2, 8))
    assert outcome.truncated.tolist() == [True, False]
    assert not outcome.terminated.any()
    setup.eval_env.start(0)
    outcome = setup.eval_env.step(torch.zeros(2, 8))
    assert not outcome.truncated.any()
    assert setup.eval_env.episodes[-1].success_once.tolist() == [True, False]


def test_evaluation_does_not_disturb_training(tmp_path):
    """The same numbers with an evaluation between two iterations as without; other seeds give others."""

    def losses(evaluated, seed=1):
        setup, state, programs = prepared(seed=seed, num_steps=16)
        state, _ = trudi.iterate(setup, programs, state)
        if evaluated:
            trudi.evaluate(setup, state, tmp_path)
        _, metrics = trudi.iterate(setup, programs, state)
        return [float(metrics[name]) for name in trudi.UPDATE_METRICS]

    without = losses(False)
    assert losses(True) == without != losses(False, seed=2)


@pytest.mark.parametrize(
    ("task", "flags", "words"),
    [
        ("DensePush-v0", (), ["NotImplementedError", "--reward-mode, normalized_dense"]),
        ("SparsePush-v0", (), ["Unsupported reward mode", "--reward-mode, normalized_dense"]),
        ("MisshapenPush-v0", (), ["RuntimeError", "size of tensor"]),
        ("EndlessPush-v0", (), ["max_episode_steps"]),
        ("Nothing-v0", (), ["Nothing", "must register the id"]),
    ],
)
def test_what_a_task_lacks_is_told(task, flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        trudi.make_setup(small_args(env_id=f"maniskill_tasks:{task}"), CPU)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("trudi_maniskill.py: error: ")
    assert all(word in line for word in words), line
    assert "Vulkan" not in line


def test_a_task_with_another_reward_is_made_with_it():
    for task, mode in (("DensePush", "dense"), ("SparsePush", "sparse")):
        setup = trudi.make_setup(small_args(env_id=f"maniskill_tasks:{task}-v0", reward_mode=mode), CPU)
        assert setup.action_size == 8


def test_one_environment_is_drawn(monkeypatch):
    """Of those for evaluation, on a GPU in a scene of its own; a video needs no pictures of the others."""
    made = []
    make = import_module("gymnasium").make

    def spy(env_id, render_mode, render_backend, **options):
        made.append((options["num_envs"], render_mode))
        return make(env_id, **options, render_backend="none")

    monkeypatch.setattr("gymnasium.make", spy)
    trudi.make_setup(small_args(capture_video=True, num_eval_envs=3), CPU)
    assert made == [(1, None)] * 2 + [(1, "rgb_array")] + [(1, None)] * 2
    gpu = torch.device("cuda")
    assert trudi.scene_sizes(gpu, 128, video=True) == [1, 127]
    assert trudi.scene_sizes(gpu, 128, video=False) == [128]
    assert trudi.scene_sizes(gpu, 1, video=True) == [1]


def test_a_failure_terminates():
    """And is no success; in evaluations, which are of full length, the episode goes on."""
    setup = trudi.make_setup(small_args(env_id="maniskill_tasks:FailingPush-v0"), CPU)
    setup.env.reset([1, 2])
    found = []
    for _ in range(6):
        outcome = setup.env.step(torch.zeros(2, 8))
        episode = setup.env.episodes[-1]
        found.append([x[0].item() for x in (outcome.terminated, outcome.truncated, episode.ended, episode.success_once)])
    assert found == [[False] * 4, [False] * 4, [True, False, True, False]] * 2
    setup.eval_env.start(0)
    found = [setup.eval_env.step(torch.zeros(2, 8)) for _ in range(5)]
    assert not any(outcome.terminated.any() for outcome in found)
    assert [outcome.truncated.all().item() for outcome in found] == [False] * 4 + [True]
    assert not setup.eval_env.episodes[-1].success_once.any()
