"""trudi_humanoidbench.py with environments whose episodes are known: its tasks, rollouts, evaluations, what ends a run."""

import multiprocessing.forkserver
import os
import signal
import sys
import time

import gymnasium as gym
import jax
import numpy as np
import pytest
from runner import STANDINS, metrics
from small_humanoidbench import setup_for

import trudi_humanoidbench as trudi

REFUSED = {
    "Hoper-v5": ["unknown --env-id", "Hopper-v5"],
    "h1hand-wlak-v0": ["h1hand-walk-v0"],
    "no_such_module:Thing-v0": ["no_such_module", "neither installed"],
    "faulty:Nothing-v0": ["cannot be made", "Nothing"],
    "faulty:Discrete-v0": ["Box(A,)"],
    "faulty:Endless-v0": ["max_episode_steps"],
    "faulty:Narrow-v0": ["cannot be made", "its observation has shape (1,), not (2,)"],
    "h1-wlak-v0": ["unknown --env-id", "h1-walk-v0"],
}


@pytest.mark.parametrize(("env_id", "words"), REFUSED.items())
def test_tasks_that_cannot_run_are_refused(env_id, words, capsys):
    with pytest.raises(SystemExit) as stop:
        setup_for(env_id)
    (error,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and all(word in error for word in words), error


def test_humanoid_bench_is_needed_for_its_own_tasks_only(capsys, monkeypatch):
    find = trudi.util.find_spec

    def find_others(name):
        return None if name == "humanoid_bench" else find(name)

    monkeypatch.setattr(trudi.util, "find_spec", find_others)
    with pytest.raises(SystemExit) as stop:
        setup_for("h1hand-walk-v0")
    assert stop.value.code == 2 and "pip install --no-deps -e ./humanoid-bench" in capsys.readouterr().err
    setup_for("Hopper-v5")
    assert "humanoid_bench" not in sys.modules


@pytest.fixture
def standin(monkeypatch):
    """A module humanoid_bench with ids and rendering as HumanoidBench has them, for a test."""
    before = dict(gym.registry)
    monkeypatch.delitem(sys.modules, "humanoid_bench", raising=False)
    monkeypatch.syspath_prepend(STANDINS / "humanoidbench")
    yield
    sys.modules.pop("humanoid_bench", None)
    gym.registry.clear()
    gym.registry.update(before)


@pytest.mark.parametrize("env_id", ["h1hand-stand-v0", "h1-stand-v0", "humanoid_bench:h1-stand-v0", "g1-highbar_hard-v0"])
def test_every_robot_of_humanoid_bench(env_id, standin, simulators):
    """With its atoms, success bar and pictures, by its own id and with the module before it."""
    setup = setup_for(env_id, capture_video=True)
    assert (setup.args.v_min, setup.args.v_max, setup.env.success_bar) == (-250, 250, 800)
    envs = simulators(env_id, 2, 2, "rgb_array")
    envs.reset(1)
    assert envs.frame.shape == (32, 32, 3)


def test_an_id_without_a_model_is_refused(standin, capsys):
    """The stand-in has fewer robots than HumanoidBench."""
    assert "h1strong-walk-v0" in trudi.HUMANOID_BENCH
    with pytest.raises(SystemExit) as stop:
        setup_for("h1strong-walk-v0")
    (error,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "h1strong-walk-v0 cannot be made" in error


# ------------------------------------------------------------------------------------- rollout and evaluation
def fixed_policy(number):
    """To collect and play with: one action for all, and chains that tell the step's observations."""

    def sample(actor, statistics, observation, key):
        trajectory = trudi.Trajectory(observation[:, None], observation[:, None])
        return trudi.Chain(np.full((len(observation), 1), number), None, trajectory)

    def choose(learner, statistics, observation, key):
        return np.full((len(observation), 1), number)

    return sample, choose


def test_rollouts_hold_what_belongs_together(simulators):
    setup = setup_for("faulty:Counter-v0", num_steps=44)
    state = trudi.new_state(setup, jax.random.PRNGKey(0))
    envs = simulators("faulty:Counter-v0", 4, 2)
    envs.reset(5, spread=True)
    data, episodes = trudi.collect(setup, fixed_policy(0.25)[0], envs, state)
    data = jax.device_get(data)
    latents, means = data.trajectory
    assert data.observation.shape == (44, 4, 2)
    assert latents.shape == means.shape == (44, 4, 1, 2)
    assert data.action.shape == (44, 4, 1)
    assert np.array_equal(latents[:, :, 0], data.observation)
    assert np.array_equal(data.next_observation[..., 0], data.observation[..., 0] + 1)
    assert (data.reward == 0.5).all() and not data.terminated.any()  # the action's box is [-2, 2]
    following = [0, 1] + data.observation[:-1] * [0, 1]
    after = np.where(data.truncated[:-1, :, None], following, data.next_observation[:-1])
    assert np.array_equal(data.observation[1:], after)
    # Two or three time-outs each, the first of an episode whose clock was set.
    assert episodes["charts/episodes"] == data.truncated.sum() - 4
    assert episodes["charts/episodic_return"] == 10 and episodes["charts/episodic_length"] == 20


def test_first_episodes_whose_clocks_are_set_are_not_counted(simulators):
    """Nor are those of them that terminate early, which would be counted without those that are cut short."""
    setup = setup_for("faulty:Barred-v0", num_envs=16, minibatch_size=16, num_steps=60)
    state = trudi.new_state(setup, jax.random.PRNGKey(0))
    envs = simulators("faulty:Barred-v0", 16, 2)
    for again in range(2):  # as after a run has been continued
        envs.reset(5, again, spread=True)
        data, episodes = trudi.collect(setup, fixed_policy(0.5)[0], envs, state)
        ended = np.asarray(data.terminated | data.truncated)
        first = ended.cumsum(0) == 1
        assert 0 < (data.truncated & first).sum() < 16
        np.testing.assert_array_equal(data.episode_ended, ended & ~first)
        assert episodes["charts/episodes"] == ended.sum() - 16
        assert set(np.unique(data.episode_length[ended & ~first])) == {5, 10}


def test_episodes_that_truncate_themselves_are_counted(simulators):
    setup = setup_for("faulty:Impatient-v0", num_steps=25)
    state = trudi.new_state(setup, jax.random.PRNGKey(0))
    envs = simulators("faulty:Impatient-v0", 4, 2)
    envs.reset(5)
    data, episodes = trudi.collect(setup, fixed_policy(0.5)[0], envs, state)
    assert data.truncated.sum() == episodes["charts/episodes"] == 20
    assert episodes["charts/episodic_return"] == episodes["charts/episodic_length"] == 5


EPISODES = {
    "faulty:Counter-v0": {"episodic_return": 20, "episodic_return_std": 0, "episodic_length": 20},
    "faulty:Barred-v0": {"episodic_return": 5, "episodic_length": 5, "success_bar": 4, "success": 1},
    "faulty:Successful-v0": {"episodic_return": 20, "success_bar": 100, "success": 1},
}


@pytest.mark.parametrize("env_id", EPISODES)
def test_evaluation(env_id, simulators, tmp_path):
    """One episode an environment; success is the environment's word for it, or a return at the task's bar."""
    expected = EPISODES[env_id]
    setup = setup_for(env_id)
    state = trudi.new_state(setup, jax.random.PRNGKey(0))
    keys = []

    def choose(learner, statistics, observation, key):
        keys.append(tuple(np.asarray(key)))
        return fixed_policy(0.5)[1](learner, statistics, observation, key)

    found = trudi.play(setup, choose, simulators(env_id, 3, 2), state, tmp_path)
    assert len(set(keys)) == len(keys) > 4  # each step has noise of its own
    assert {f"eval/{name}": x for name, x in expected.items()}.items() <= found.items()
    assert ("eval/success" in found) == ("success" in expected)
    low = trudi.play(setup, fixed_policy(0.1)[1], simulators(env_id, 3, 2), state, tmp_path)
    assert low.get("eval/success") == {"faulty:Barred-v0": 0, "faulty:Successful-v0": 1}.get(env_id)


# -------------------------------------------------------------------------------------------- what ends a run
def run_with(metrics, simulators, tmp_path, monkeypatch, happen=lambda what: None, received=(), eval_id="faulty:Counter-v0"):
    """The exit code of a run, and its folder, whose updates do nothing but return these metrics; `happen` is called before
    each update and evaluation step."""
    setup = setup_for("faulty:Counter-v0", total_timesteps=320, log_dir=str(tmp_path))
    monkeypatch.setattr(trudi, "catch_signals", lambda: received)  # pytest keeps its own handlers
    sample, act = fixed_policy(0.5)

    def choose(*inputs):
        happen("choose")
        return act(*inputs)

    def update(state, data):
        happen("update")
        return state._replace(iteration=state.iteration + 1), metrics

    programs = trudi.Compiled(sample, choose, update)
    state = trudi.new_state(setup, jax.random.PRNGKey(0))
    envs = simulators("faulty:Counter-v0", 4, 1)
    eval_envs = simulators(eval_id, 3, 1)
    code = trudi.run_training(setup, programs, envs, eval_envs, state, {})
    (folder,) = tmp_path.iterdir()
    return code, folder


FINE = {"trust_region/initial_kl": np.zeros(())}


def checkpoints(folder):
    return [path.name for path in (folder / "checkpoints").iterdir()]


def test_an_evaluation_that_fails_loses_neither_log_nor_checkpoint(simulators, tmp_path, monkeypatch):
    with pytest.raises(trudi.WorkerError, match="the robot fell through the floor"):
        run_with(FINE, simulators, tmp_path, monkeypatch, eval_id="faulty:Raises-v0")
    (folder,) = tmp_path.iterdir()
    assert [event["step"] for event in metrics(folder)] == [32 * i for i in range(1, 11)]
    assert not any(name.startswith("eval/") for name in metrics(folder)[-1]) and checkpoints(folder) == ["320"]


def test_a_signal_ends_an_evaluation(simulators, tmp_path, monkeypatch):
    received, steps = [], []

    def stop(what):
        steps.append(what)
        if what == "choose":
            received.append(signal.SIGTERM)

    code, folder = run_with(FINE, simulators, tmp_path, monkeypatch, stop, received)
    assert code == 143 and steps == ["update"] * 10 + ["choose"]
    assert metrics(folder)[-1]["step"] == 320 and checkpoints(folder) == ["320"]


def test_a_worker_of_the_next_evaluation_that_dies_ends_the_run(simulators, tmp_path, monkeypatch):
    """After the iteration in which it does, not when it is asked."""

    def kill(what):
        updates.append(what)
        if len(updates) == 2:
            victim = max(multiprocessing.active_children(), key=lambda process: process._identity)  # started last
            victim.kill()
            victim.join()

    updates = []
    with pytest.raises(trudi.WorkerError, match="environments 0 to 2 of faulty:Counter-v0 ended with code -9;"):
        run_with(FINE, simulators, tmp_path, monkeypatch, kill)
    (folder,) = tmp_path.iterdir()
    assert len(updates) == 2 and checkpoints(folder) == ["64"] and metrics(folder)[-1]["step"] == 64


def test_a_signal_to_the_fork_server_too_is_no_failure(simulators, tmp_path, monkeypatch):
    """As one to the whole process group is."""
    received = []

    def stop(what):
        os.kill(multiprocessing.forkserver._forkserver._forkserver_pid, signal.SIGTERM)
        time.sleep(0.5)
        received.append(signal.SIGTERM)

    code, folder = run_with(FINE, simulators, tmp_path, monkeypatch, stop, received)
    assert code == 143 and checkpoints(folder) == ["32"] and len(metrics(folder)) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_any_metric_that_is_not_finite_ends_the_run(value, simulators, tmp_path, monkeypatch, capsys):
    """Its name need not be known. The state that it came of is kept, but not to go on from."""
    fine = {"trust_region/initial_kl": np.zeros(()), "losses/actor": np.ones(())}
    bad = {"mine/new_metric": np.full((), value)}
    code, folder = run_with(fine | bad, simulators, tmp_path, monkeypatch)
    assert code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"iteration 1: mine/new_metric not finite; the state is in {folder / 'diverged'}"
    assert [path.name for path in (folder / "diverged" / "checkpoints").iterdir()] == ["32"]
    assert not (folder / "checkpoints").exists()
    (event,) = metrics(folder)
    assert event["step"] == 32 and not any(name.startswith("eval/") for name in event)


def test_finite_metrics_end_no_run(simulators, tmp_path, monkeypatch, capsys):
    """Nor does a rollout in which no episode ended, which has no mean return."""
    code, folder = run_with({"trust_region/initial_kl": np.zeros(())}, simulators, tmp_path, monkeypatch)
    assert code == 0 and capsys.readouterr().err == ""
    events = metrics(folder)
    assert len(events) == 10 and "eval/episodic_return" in events[-1]
    without = [event for event in events if event["charts/episodes"] == 0]
    assert without and not any("charts/episodic_return" in event for event in without)
    assert (folder / "checkpoints").exists()


def test_an_actor_that_breaks_its_contract_ends_the_run(simulators):
    """Its output layer must start at 0, as the first rollout is learned from with other statistics; later ones are learned
    from with those that they were sampled with, however much they move."""
    setup = setup_for("Hopper-v5")
    programs = trudi.make_programs(setup)
    envs = simulators("Hopper-v5", 4, 1)

    def learn(state, iteration):
        envs.reset(1)
        data, _ = trudi.collect(setup, programs.sample, envs, state)
        after, found = programs.update(state, data)
        found = jax.device_get(found)
        trudi.check_contract(found, iteration)
        return after, float(found["trust_region/initial_kl"])

    assert learn(trudi.make_state(setup, {}), 1)[1] < 1e-6
    def lively():
        state = trudi.make_state(setup, {})
        output = state.learner.actor.output
        output.kernel[...] = jax.random.normal(jax.random.PRNGKey(1), output.kernel.shape)
        return state

    with pytest.raises(SystemExit) as stop:
        learn(lively(), 1)
    assert "nats" in stop.value.code and "output layer has to start at zero" in stop.value.code

    later = lively()
    statistics = later.statistics
    moments = statistics.moments + np.array([[5.0], [9.0]])
    later = later._replace(statistics=trudi.Statistics(statistics.count + 32, moments), iteration=later.iteration + 1)
    after, kl = learn(later, 2)
    assert abs(kl) < 1e-5
    assert float(after.statistics.count) == 64
    assert np.abs(after.statistics.moments[0] - 5).max() > 1


@pytest.mark.parametrize(("kl", "last"), [([0.1], 1), ([0, 0.1], 2), ([0, 0, 0.1], None)])
def test_training_checks_the_contract(kl, last, simulators, tmp_path, monkeypatch):
    """In the first two iterations."""
    found = {"trust_region/initial_kl": np.zeros(())}
    left = [*kl, *[0] * 10]

    def happen(what):
        found["trust_region/initial_kl"] = np.asarray(left.pop(0) if what == "update" else 0.0)

    if last is None:
        assert run_with(found, simulators, tmp_path, monkeypatch, happen)[0] == 0
    else:
        with pytest.raises(SystemExit, match=f"iteration {last} began 0.1 nats"):
            run_with(found, simulators, tmp_path, monkeypatch, happen)
