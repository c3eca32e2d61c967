"""The processes of trudi_humanoidbench.py that step environments: against plain loops, when they fail, and on which cores."""

import importlib.util
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
from runner import LEAN, PATIENCE, ROOT, STANDINS

import trudi_humanoidbench as trudi


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


def test_an_environment_may_keep_its_action(simulators):
    """As one with a penalty for jerks or with late actuators does; the next one comes in the same memory."""
    envs = simulators("faulty:Remembers-v0", 2, 1)
    envs.reset(1)
    rewards = [envs.step(np.full((2, 1), action))["reward"].tolist() for action in (0.5, -0.5, 0.25)]
    assert rewards == [[0.5] * 2, [1.0] * 2, [0.75] * 2]


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
    path_of = f"{ROOT}:{LEAN}:{STANDINS}"
    return subprocess.run([sys.executable, str(path)], env=os.environ | {"PYTHONPATH": path_of}, capture_output=True, text=True,
                          timeout=60 * PATIENCE)


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


# ------------------------------------------------------------------------------------------------------ cores
def test_without_affinity_of_processes(monkeypatch, capsys):
    """As on macOS: workers for all cores; they cannot be pinned."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sched_setaffinity")
    spec = importlib.util.spec_from_file_location("on_macos", ROOT / "trudi_humanoidbench.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "on_macos", script)
    spec.loader.exec_module(script)
    assert script.num_cores() == os.cpu_count()
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
