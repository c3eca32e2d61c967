"""The workers that step environments, against plain loops, and the command line of trudi_humanoidbench.py."""

import importlib.util
import json
import multiprocessing.forkserver
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import faulty  # noqa: F401, its environments
import gymnasium as gym
import jax
import numpy as np
import onnxruntime
import pytest
from test_runs import TIMES, Runner, assert_close, curve, metrics

import trudi_humanoidbench as trudi

ROOT = pathlib.Path(trudi.__file__).parent
SMALL = (
    "--preset cpu --num-envs 8 --num-steps 16 --num-epochs 1 --minibatch-size 64 --hidden-dim 16 "
    "--num-diffusion-steps 2 --num-eval-envs 2 --total-timesteps 1280 --eval-interval 5 "
    "--checkpoint-interval 2"
).split()
PATH = os.pathsep.join([str(ROOT / "tests" / "lean"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])


def setup_for(env_id, **changes):
    sizes = dict(preset="cpu", device="cpu", num_envs=4, num_steps=8, minibatch_size=16, num_eval_envs=3)
    small = dict(num_diffusion_steps=2, hidden_dim=8)
    args = trudi.Args(env_id=env_id, **sizes | small | changes)
    return trudi.load_setup(trudi.resolve(args))


@pytest.fixture
def simulators():
    """Starts workers, and ends them after the test."""
    started = []

    def start(env_id, num_envs, num_workers, mode=None, **changes):
        started.append(trudi.Simulators(setup_for(env_id, num_workers=num_workers, **changes), num_envs, mode))
        return started[-1]

    yield start
    for envs in started:
        envs.close()


def process_is_gone(pid):
    """Ended, whether or not anybody has asked for its exit code."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def descendants(pid):
    """Process ids of a process's children and theirs."""
    found = []
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


# ---------------------------------------------------------------------------------------- against plain loops
@pytest.mark.parametrize(
    ("env_id", "steps", "scale"),
    [("Hopper-v5", 150, 1.0), ("faulty:ShortCheetah-v0", 160, 1.0), ("Pendulum-v1", 420, 2.0)],
)
def test_workers_do_what_a_plain_loop_does(env_id, steps, scale, simulators):
    """Hopper terminates, the short HalfCheetah runs out of time, Pendulum's actions are rescaled."""
    count = 5
    envs = simulators(env_id, count, 2)
    plain = [gym.make(env_id) for _ in range(count)]
    envs.reset(3, 1)
    seeds = np.random.SeedSequence((3, 1)).generate_state(count).tolist()
    now = [env.reset(seed=seed)[0] for env, seed in zip(plain, seeds, strict=True)]
    rng = np.random.default_rng(0)
    ends = 0
    total = np.zeros(count)
    length = np.zeros(count)
    for _ in range(steps):
        np.testing.assert_array_equal(envs.slots["observation"], np.asarray(now, np.float32))
        action = rng.uniform(-1, 1, (count, plain[0].action_space.shape[0])).astype(np.float32)
        action = action.clip(-trudi.ACTION_LIMIT, trudi.ACTION_LIMIT)  # as they do themselves
        for i, slot in enumerate(envs.step(action)):
            now[i], reward, terminated, truncated, _ = plain[i].step(action[i] * np.float32(scale))
            total[i] += reward
            length[i] += 1
            np.testing.assert_allclose(slot["next_observation"], now[i], rtol=1e-5, atol=1e-5)
            assert slot["reward"] == pytest.approx(reward, rel=1e-5, abs=1e-5)
            assert slot["terminated"] == terminated
            assert slot["truncated"] == (truncated and not terminated)
            if terminated or truncated:
                assert slot["total"] == pytest.approx(total[i], rel=1e-4)
                assert slot["length"] == length[i]
                ends += 1
                now[i], _ = plain[i].reset()
                total[i] = 0
                length[i] = 0
    assert ends >= 9


def test_clocks_are_spread_once(simulators):
    envs = simulators("faulty:Counter-v0", 6, 2)
    envs.reset(1, spread=True)
    ends = np.array([envs.step(np.zeros((6, 1)))["truncated"].copy() for _ in range(60)])
    first = ends.argmax(0)
    assert len(set(first)) > 3 and (first < 20).all()
    steps = np.where(ends.T)[1].reshape(6, 3)
    assert np.array_equal(steps, first[:, None] + [0, 20, 40])


def test_inactive_environments_stay_as_they_are(simulators):
    envs = simulators("faulty:Counter-v0", 4, 2)
    envs.reset(1)
    envs.slots["active"] = [True, False, True, False]
    for _ in range(3):
        envs.step(np.ones((4, 1)))
    assert envs.slots["observation"][:, 0].tolist() == [3, 0, 3, 0]
    envs.reset(2)
    assert envs.slots["observation"].tolist() == [[0, 1]] * 4 and envs.slots["active"].all()


def test_seeds(simulators):
    """Environments differ, even in what comes from NumPy's global generator, and can be repeated."""
    for env_id in ("Hopper-v5", "faulty:Draws-v0"):
        envs = simulators(env_id, 4, 2)
        seen = []
        for numbers in ((1, 2), (1, 3), (1, 2)):
            envs.reset(*numbers)
            seen.append(envs.slots["observation"].copy())
        assert np.array_equal(seen[0], seen[2]) and not np.array_equal(seen[0], seen[1])
        assert len({tuple(x) for x in seen[0]}) == 4


def test_goals_do_not_depend_on_the_number_of_workers(simulators):
    """Though they come from the global generator of a process, which its environments share."""
    seen = []
    for num_workers in (1, 2, 4):
        envs = simulators("faulty:Redraws-v0", 4, num_workers)
        envs.reset(1)
        seen.append([envs.step(np.zeros((4, 1)))["observation"].copy() for _ in range(20)])
        assert len(np.unique(np.ravel(seen[-1]) % 1)) > 4 * 2 * 4  # four resets or more, each with goals of its own
    np.testing.assert_array_equal(seen[1], seen[0])
    np.testing.assert_array_equal(seen[2], seen[0])


def test_nothing_is_drawn_of_an_episode_that_has_ended(simulators):
    envs = simulators("faulty:Filmed-v0", 2, 1, "rgb_array")
    envs.reset(1)
    for drawn in (2, 3, None, None):
        envs.slots["active"][0] = drawn is not None
        envs.step(np.zeros((2, 1)))
        assert envs.frame is None if drawn is None else (envs.frame == drawn).all()
    envs.reset(2)
    assert (envs.frame == 4).all()


# --------------------------------------------------------------------------------------------------- failures
FAILURES = {
    "faulty:Raises-v0": ["v0: ZeroDivisionError: the robot fell through the floor\n", "faulty.py"],
    "faulty:Dies-v0": ["with code 7;"],
    "faulty:Hangs-v0": [f"with code {-signal.SIGALRM};", "faulty.py", "in step"],
    "faulty:Misshapen-v0": ["v0: ValueError: its observation has shape (1,), not (2,)\n"],
    "faulty:Paying-v0": ["v0: ValueError: its reward has shape (1,), not ()\n"],
    "faulty:Narrowing-v0": ["v0: ValueError: its observation has shape (1,), not (2,)\n", "in reset_slot"],
    "faulty:Blurred-v0": ["v0: ValueError: its observation is not finite\n"],
    "faulty:Bankrupt-v0": ["v0: ValueError: its reward is not finite\n"],
    "faulty:Deaf-v0": ["with code None;"],
}


@pytest.mark.parametrize(("env_id", "words"), FAILURES.items())
def test_a_worker_that_fails(env_id, words, simulators, monkeypatch, capfd):
    """Environments 2 and 3 do; the error says so, the lines before it where."""
    monkeypatch.setattr(trudi, "PATIENCE", 10)
    multiprocessing.forkserver._forkserver._stop()  # it may be of an earlier test, with that one's stderr
    envs = simulators(env_id, 4, 2)
    envs.reset(1)
    envs.slots["active"] = [False, False, True, True]
    for _ in range(2):
        envs.step(np.zeros((4, 1)))
    with pytest.raises(trudi.WorkerError) as error:
        envs.step(np.zeros((4, 1)))
    assert f"environments 2 to 3 of {env_id}" in str(error.value)
    said = capfd.readouterr().err + str(error.value)
    assert all(word in said for word in words), said


def test_a_simulation_may_end_in_an_observation_that_is_not_finite(simulators):
    envs = simulators("faulty:Fallen-v0", 2, 1)
    envs.reset(1)
    for _ in range(3):
        slots = envs.step(np.zeros((2, 1)))
    assert np.isnan(slots["next_observation"]).all() and slots["terminated"].all()
    assert slots["observation"].tolist() == [[0, 1]] * 2


def test_a_task_that_only_workers_cannot_make(simulators):
    """The cause is told in a line, also where the worker was gone before it was asked."""
    for seconds in (0, 3):
        envs = simulators("faulty:Late-v0", 4, 2)
        time.sleep(seconds)
        with pytest.raises(trudi.WorkerError) as error:
            envs.reset(1)
        assert str(error.value) == "the worker of environments 0 to 1 of faulty:Late-v0: OSError: no such mesh: hand.stl"


def test_the_death_of_an_idle_worker_or_the_fork_server_is_noticed(simulators):
    envs = simulators("faulty:Counter-v0", 4, 2)
    envs.reset(1)
    envs.check()
    os.kill(envs.workers[1].process.pid, signal.SIGKILL)
    envs.workers[1].process.join()
    with pytest.raises(trudi.WorkerError, match="environments 2 to 3 of faulty:Counter-v0 ended with code -9;"):
        envs.check()
    envs = simulators("faulty:Counter-v0", 4, 2)
    envs.reset(1)
    os.kill(multiprocessing.forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    envs.workers[0].process.join()
    with pytest.raises(trudi.WorkerError, match="ended with code 255;"):
        envs.check()


def in_a_process(tmp_path, *lines):
    """A finished process of lines that follow the script's import; it must take no more than a minute on idle cores."""
    path = tmp_path / "lines.py"
    path.write_text("\n".join(["import trudi_humanoidbench as trudi", "if __name__ == '__main__':", *lines]))
    return subprocess.run([sys.executable, str(path)], env=os.environ | {"PYTHONPATH": PATH}, capture_output=True, text=True,
                          timeout=60 * float(os.environ.get("TRUDI_TEST_PATIENCE", 1)))


def test_a_first_reset_that_hangs_is_told(tmp_path):
    args = "    trudi.load_setup(trudi.resolve(trudi.Args('faulty:Sleeper-v0', device='cpu')))"
    done = in_a_process(tmp_path, "    trudi.PATIENCE = 3", args)
    assert done.returncode == 1 and "faulty.py" in done.stderr and "in reset\n" in done.stderr, done.stderr


def test_a_process_that_fails_while_it_starts_workers_ends(tmp_path):
    """They ignore the SIGTERM by which multiprocessing ends what is left at the end, and then waits."""
    done = in_a_process(
        tmp_path,
        "    args = trudi.Args('faulty:Counter-v0', preset='cpu', device='cpu', num_workers=2)",
        "    start = trudi.Simulators.start",
        "    def second_fails(self, rows, *rest):",
        "        if rows[0] == 0:",
        "            return start(self, rows, *rest)",
        "        self.request(True)",  # the first has started to ignore signals when it answers
        "        raise ZeroDivisionError",
        "    trudi.Simulators.start = second_fails",
        "    trudi.Simulators(trudi.load_setup(trudi.resolve(args)), 4)",
    )
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


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
    monkeypatch.syspath_prepend(ROOT / "tests" / "humanoid_standin")
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


# ------------------------------------------------------------------------------------------------------ cores
def test_without_affinity_of_processes(monkeypatch, capsys):
    """As on macOS: workers for all cores; they cannot be pinned."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sched_setaffinity")
    spec = importlib.util.spec_from_file_location("on_macos", ROOT / "trudi_humanoidbench.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "on_macos", script)
    spec.loader.exec_module(script)
    assert script.resolve(script.Args("Hopper-v5")).num_workers == os.cpu_count()
    with pytest.raises(SystemExit) as stop:
        script.resolve(script.Args("Hopper-v5", pin_workers=True))
    assert stop.value.code == 2 and "--pin-workers needs Linux" in capsys.readouterr().err


def test_workers_are_pinned_only_if_so_asked(monkeypatch, simulators):
    cores = os.sched_getaffinity(0)
    for pinned in (False, True):
        envs = simulators("faulty:Counter-v0", len(cores), len(cores), pin_workers=pinned)
        envs.reset(1)
        found = [os.sched_getaffinity(worker.process.pid) for worker in envs.workers]
        assert found == ([{core} for core in sorted(cores)] if pinned else [cores] * len(cores))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {99_999})  # where cores were taken away
    envs = simulators("faulty:Counter-v0", 1, 1, pin_workers=True)
    with pytest.raises(trudi.WorkerError, match="of environments 0 to 0 of faulty:Counter-v0: OSError: "):
        envs.reset(1)


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
    found = trudi.play(setup, fixed_policy(0.5)[1], simulators(env_id, 3, 2), state, tmp_path)
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
    """Its output layer must start at 0, as the first rollout is learned from with other statistics."""
    setup = setup_for("Hopper-v5")
    programs = trudi.make_programs(setup)
    envs = simulators("Hopper-v5", 4, 1)
    envs.reset(1)
    kept = trudi.make_state(setup, {})
    data, _ = trudi.collect(setup, programs.sample, envs, kept)
    _, found = programs.update(kept, data)
    assert float(found["trust_region/initial_kl"]) < 1e-6
    trudi.check_contract(jax.device_get(found))

    broken = trudi.make_state(setup, {})
    output = broken.learner.actor.output
    output.kernel[...] = jax.random.normal(jax.random.PRNGKey(1), output.kernel.shape)
    envs.reset(1)
    data, _ = trudi.collect(setup, programs.sample, envs, broken)
    _, found = programs.update(broken, data)
    with pytest.raises(SystemExit) as stop:
        trudi.check_contract(jax.device_get(found))
    assert "nats" in stop.value.code and "output layer has to start at zero" in stop.value.code


# ----------------------------------------------------------------------------------------------- command line
class WorkersRunner(Runner):
    """Starts this script, with the misbehaving environments within its reach."""

    script = "trudi_humanoidbench.py"
    small = SMALL

    def start(self, *flags, **environment):
        return super().start(*flags, PYTHONPATH=PATH, **environment)

    def signalled(self, send, *flags, iterations=5):
        """Folder and exit code of a run that gets a signal after some iterations; its processes must end."""
        before = set(self.folder.glob("runs/*"))
        process = self.start(*SMALL, *flags, "--total-timesteps", "1000000")
        deadline = time.monotonic() + 300
        folder = None
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
            folder = next(iter(set(self.folder.glob("runs/*")) - before), None)
            if folder and len(metrics(folder)) > iterations:
                break
        others = descendants(process.pid)
        assert len(others) >= 3  # the fork server and, beneath it, workers for training and evaluation
        send(process)
        process.communicate(timeout=60)
        while time.monotonic() < deadline and not all(map(process_is_gone, others)):
            time.sleep(0.05)
        assert all(map(process_is_gone, others))
        return folder, process.returncode


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return WorkersRunner(tmp_path_factory.mktemp("humanoidbench"))


@pytest.fixture(scope="module")
def straight(runner):
    return runner.train("--env-id", "Hopper-v5", "--num-workers", "1")


def test_run_folder(straight):
    assert straight.name.startswith("Hopper-v5__trudi_humanoidbench__1__")
    events = metrics(straight)
    assert [event["step"] for event in events] == [128 * i for i in range(1, 11)]
    expected = (
        "wall_time charts/SPS charts/episodes losses/critic losses/actor trust_region/kl "
        "trust_region/violated trust_region/stored_kl trust_region/fresh_kl trust_region/initial_kl "
        "trust_region/lambda critic/target critic/targets_clipped entropy/alpha entropy/bound "
        "entropy/friction"
    ).split()
    assert all(name in event for event in events for name in expected)
    assert [event["step"] for event in events if "eval/episodic_return" in event] == [640, 1280]
    assert any("charts/episodic_return" in event for event in events)
    saved = json.loads((straight / "args.json").read_text())
    assert saved["args"]["gamma"] == 0.99 and saved["args"]["num_workers"] == 1
    assert {"jax", "flax", "gymnasium"} <= set(saved["versions"])
    assert list(straight.glob("events.out.tfevents*"))
    assert max(int(path.name) for path in (straight / "checkpoints").iterdir()) == 1280


def test_a_copy_writes_its_runs_under_its_own_name(runner):
    copy = shutil.copy(ROOT / "trudi_humanoidbench.py", runner.folder / "my_variant.py")
    mine = WorkersRunner(runner.folder)
    mine.script = copy
    folder = mine.train("--env-id", "Hopper-v5", "--num-workers", "1", "--total-timesteps", "128")
    assert folder.name.startswith("Hopper-v5__my_variant__1__")
    assert json.loads((folder / "args.json").read_text())["script"] == "my_variant"
    _, err = runner.run("--evaluate", str(folder), code=2)
    assert "it is of my_variant.py" in err


def test_numbers_depend_on_the_seed_but_not_on_workers_or_devices(runner, straight):
    assert curve(runner.train("--env-id", "Hopper-v5", "--num-workers", "2")) == curve(straight)
    on_cpu = "--xla_force_host_platform_device_count=2"
    two = runner.train("--env-id", "Hopper-v5", "--num-devices", "2", XLA_FLAGS=on_cpu)
    assert_close(curve(two), curve(straight), events=2)
    other = runner.train("--env-id", "Hopper-v5", "--seed", "2")
    for one, another in zip(curve(straight), curve(other), strict=True):
        assert one["losses/critic"] != another["losses/critic"]


def test_half_cheetah_with_a_video(runner):
    folder = runner.train("--env-id", "faulty:ShortCheetah-v0", "--capture-video")
    videos = sorted(folder.glob("videos/*.mp4"))
    assert [path.name for path in videos] == ["step_1280.mp4", "step_640.mp4"]
    assert videos[0].stat().st_size > 2000


def test_ctrl_c_saves_and_a_killed_run_goes_on(runner):
    def press(process):
        os.killpg(process.pid, signal.SIGINT)

    def preempt(process):
        """As SLURM, systemd and containers do, and a launcher that passes the signal on."""
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)

    folder, code = runner.signalled(preempt, "--env-id", "Hopper-v5")
    assert code == 143
    assert max(int(path.name) for path in (folder / "checkpoints").iterdir()) == 128 * len(metrics(folder))
    folder, code = runner.signalled(press, "--env-id", "Hopper-v5")
    assert code == 130
    saved = len(metrics(folder))
    assert max(int(path.name) for path in (folder / "checkpoints").iterdir()) == 128 * saved
    killed, code = runner.signalled(lambda process: process.kill(), "--env-id", "Hopper-v5")
    assert code == -9
    newest = max(int(path.name) for path in (killed / "checkpoints").iterdir() if path.name.isdigit())
    assert len(metrics(killed)) - newest // 128 <= 2  # one checkpoint interval
    runner.run("--resume", str(folder), "--total-timesteps", str(128 * (saved + 5)))
    events = metrics(folder)
    assert [event["step"] for event in events] == [128 * i for i in range(1, saved + 6)]
    times = [event["wall_time"] for event in events]
    assert times == sorted(times) and all(name in events[-1] for name in TIMES)
    out, _ = runner.run("--evaluate", str(folder), "--eval-mode", "sde")
    assert json.loads(out.splitlines()[-1])["eval/episodic_length"] > 0
    runner.run("--evaluate", str(folder), "--export", str(runner.folder / "policy.onnx"))
    session = onnxruntime.InferenceSession(str(runner.folder / "policy.onnx"))
    assert session.get_modelmeta().custom_metadata_map["step"] == str(events[-1]["step"])


def test_a_failing_environment_ends_the_run_but_not_its_checkpoints(runner):
    sizes = "--num-steps 2 --minibatch-size 16 --total-timesteps 160 --checkpoint-interval 1".split()
    process = runner.start(*SMALL, "--env-id", "faulty:Dies-v0", *sizes)
    started = set()
    while process.poll() is None:
        started |= set(descendants(process.pid))
        time.sleep(0.05)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "ended with code 7" in err.splitlines()[-1] and "Traceback" not in err
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not all(map(process_is_gone, started)):
        time.sleep(0.05)
    assert len(started) >= 3 and all(map(process_is_gone, started))
    (folder,) = runner.folder.glob("runs/faulty:Dies*")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["16"]


# ---------------------------------------------------------------------------------------------- HumanoidBench
@pytest.mark.parametrize("env_id", ["h1hand-stand-v0", "h1hand-push-v0"])
def test_humanoid_bench(env_id, runner):
    """One task with a success bar only, one that tells successes."""
    pytest.importorskip("humanoid_bench")
    sizes = "--num-envs 2 --num-steps 8 --minibatch-size 16 --total-timesteps 32 --eval-interval 2".split()
    folder = runner.train("--env-id", env_id, *sizes)
    last = metrics(folder)[-1]
    assert last["eval/success"] == 0 and last["eval/success_bar"] in (800, 700)
