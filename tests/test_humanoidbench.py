"""The workers that step environments, against plain loops, and the command line of trudi_humanoidbench.py."""

import itertools
import json
import multiprocessing.forkserver
import os
import pathlib
import signal
import sys
import time

import faulty  # noqa: F401, its environments
import gymnasium as gym
import jax
import numpy as np
import pytest
from test_runs import TIMES, Runner, assert_close, curve, metrics

import trudi_humanoidbench as trudi

ROOT = pathlib.Path(trudi.__file__).parent
SMALL = ("--preset cpu --num-envs 8 --num-steps 16 --num-epochs 1 --minibatch-size 64 --hidden-dim 16 --num-diffusion-steps 2 "
         "--num-eval-envs 2 --total-timesteps 1280 --eval-interval 5 --checkpoint-interval 2").split()
PATH = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])


def agent_for(env_id, **changes):
    sizes = dict(preset="cpu", num_envs=4, num_steps=8, minibatch_size=16, num_eval_envs=3, num_diffusion_steps=2, hidden_dim=8)
    return trudi.load_agent(trudi.resolve(trudi.Args(env_id=env_id, device="cpu", **sizes | changes)))


@pytest.fixture
def simulators():
    """Starts workers, and ends them after the test."""
    started = []
    def start(env_id, num_envs, num_workers, **options):
        started.append(trudi.Simulators(env_id, agent_for(env_id).env, num_envs, num_workers, **options))
        return started[-1]
    yield start
    for worker, _ in itertools.chain.from_iterable(envs.workers for envs in started):
        worker.terminate()
        worker.join()


def process_is_gone(pid):
    """Ended, whether or not anybody has asked for its exit code."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def descendants(pid):
    """Process ids of a process's children and theirs."""
    children = [int(x) for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children") for x in path.read_text().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


# ------------------------------------------------------------------------------------------------- against plain loops
@pytest.mark.parametrize(("env_id", "steps", "scale"), [
    ("Hopper-v5", 150, 1.0), ("faulty:ShortCheetah-v0", 160, 1.0), ("Pendulum-v1", 420, 2.0)])
def test_workers_do_what_a_plain_loop_does(env_id, steps, scale, simulators):
    """Hopper terminates, the short HalfCheetah runs out of time, Pendulum's actions are rescaled."""
    count = 5
    envs, plain = simulators(env_id, count, 2), [gym.make(env_id) for _ in range(count)]
    envs.reset(3, 1)
    seeds = np.random.SeedSequence((3, 1)).generate_state(count).tolist()
    now = [env.reset(seed=seed)[0] for env, seed in zip(plain, seeds, strict=True)]
    rng, ends, total, length = np.random.default_rng(0), 0, np.zeros(count), np.zeros(count)
    for _ in range(steps):
        np.testing.assert_array_equal(envs.slots["observation"], np.asarray(now, np.float32))
        action = rng.uniform(-1, 1, (count, plain[0].action_space.shape[0])).astype(np.float32)
        action = action.clip(-trudi.ACTION_LIMIT, trudi.ACTION_LIMIT)  # as they do themselves
        slots = envs.step(action)
        for i, env in enumerate(plain):
            after, reward, terminated, truncated, _ = env.step(action[i] * np.float32(scale))
            total[i], length[i] = total[i] + reward, length[i] + 1
            np.testing.assert_allclose(slots["next_observation"][i], after, rtol=1e-5, atol=1e-5)
            assert slots["reward"][i] == pytest.approx(reward, rel=1e-5, abs=1e-5)
            assert (slots["terminated"][i], slots["truncated"][i]) == (terminated, truncated and not terminated)
            now[i] = after
            if terminated or truncated:
                assert (slots["total"][i], slots["length"][i]) == (pytest.approx(total[i], rel=1e-4), length[i])
                ends, now[i], total[i], length[i] = ends + 1, env.reset()[0], 0, 0
    assert ends >= 9


def test_clocks_are_spread_once(simulators):
    envs, ends = simulators("faulty:Counter-v0", 6, 2), []
    envs.reset(1, spread=True)
    for _ in range(60):
        ends.append(envs.step(np.zeros((6, 1)))["truncated"].copy())
    first = np.argmax(ends, 0)
    assert len(set(first)) > 3 and (first < 20).all()
    assert np.array_equal(np.where(np.array(ends).T)[1].reshape(6, -1)[:, :3], first[:, None] + [[0, 20, 40]][:3])


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
    """Environments differ, workers differ even in what comes from NumPy's global generator, and all of it can be repeated."""
    for env_id in ("Hopper-v5", "faulty:Draws-v0"):
        envs, seen = simulators(env_id, 4, 2), []
        for numbers in ((1, 2), (1, 3), (1, 2)):
            envs.reset(*numbers)
            seen.append(envs.slots["observation"].copy())
        assert np.array_equal(seen[0], seen[2]) and not np.array_equal(seen[0], seen[1])
        assert len({tuple(x) for x in seen[0]}) == 4


# ------------------------------------------------------------------------------------------------------------ failures
@pytest.mark.parametrize(("env_id", "words"), [
    ("faulty:Raises-v0", ["with code 1;", "ZeroDivisionError", "fell through the floor", "faulty.py"]),
    ("faulty:Dies-v0", ["with code 7;"]), ("faulty:Hangs-v0", [f"with code {-signal.SIGALRM};", "faulty.py", "in step"])])
def test_a_worker_that_fails(env_id, words, simulators, monkeypatch, capfd):
    """Environments 2 and 3 do; the error says so, the lines before it where."""
    monkeypatch.setattr(trudi, "PATIENCE", 10)
    multiprocessing.forkserver._forkserver._stop()  # it may be of an earlier test, with that one's stderr
    envs = simulators(env_id, 4, 2)
    envs.reset(1)
    envs.slots["active"] = [False, False, True, True]
    for _ in range(2):
        envs.step(np.zeros((4, 1)))
    with pytest.raises(RuntimeError) as error:
        envs.step(np.zeros((4, 1)))
    assert f"environments 2 to 3 of {env_id}" in str(error.value)
    said = capfd.readouterr().err + str(error.value)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(("env_id", "words"), [
    ("Hoper-v5", ["unknown --env-id", "Hopper-v5"]), ("h1hand-wlak-v0", ["h1hand-walk-v0"]),
    ("no_such_module:Thing-v0", ["no_such_module", "neither installed"]), ("faulty:Nothing-v0", ["cannot be made", "Nothing"]),
    ("faulty:Discrete-v0", ["Box(A,)"]), ("faulty:Endless-v0", ["max_episode_steps"])])
def test_tasks_that_cannot_run_are_refused(env_id, words, capsys):
    with pytest.raises(SystemExit) as stop:
        agent_for(env_id)
    error, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and all(word in error for word in words), error


def test_humanoid_bench_is_needed_for_its_own_tasks_only(capsys, monkeypatch):
    find = trudi.util.find_spec
    monkeypatch.setattr(trudi.util, "find_spec", lambda name: None if name == "humanoid_bench" else find(name))
    with pytest.raises(SystemExit) as stop:
        agent_for("h1hand-walk-v0")
    assert stop.value.code == 2 and "pip install --no-deps -e ./humanoid-bench" in capsys.readouterr().err
    agent_for("Hopper-v5")
    assert "humanoid_bench" not in sys.modules


# ---------------------------------------------------------------------------------------------- rollout and evaluation
def fixed_policy(number):
    """To collect and play with: one action for all, and chains that tell the step's observations."""
    def act(actor, statistics, observation, key):
        return trudi.Chain(np.full((len(observation), 1), number), None, observation[:, None], observation[:, None])
    return act, lambda learner, statistics, observation, key: np.full((len(observation), 1), number)


def test_rollouts_hold_what_belongs_together(simulators):
    agent = agent_for("faulty:Counter-v0", num_steps=44)
    state = trudi.new_state(agent, jax.random.PRNGKey(0))
    envs = simulators("faulty:Counter-v0", 4, 2)
    envs.reset(5, spread=True)
    data, episodes = trudi.collect(agent, fixed_policy(0.25)[0], envs, state)
    data = jax.device_get(data)
    assert data.observation.shape == (44, 4, 2) and data.latents.shape == (44, 4, 1, 2) and data.action.shape == (44, 4, 1)
    assert np.array_equal(data.latents[:, :, 0], data.observation)
    assert np.array_equal(data.next_observation[..., 0], data.observation[..., 0] + 1)
    assert (data.reward == 0.5).all() and not data.terminated.any()  # the action's box is [-2, 2]
    after = np.where(data.truncated[:-1, :, None], [0, 1] + data.observation[:-1] * [0, 1], data.next_observation[:-1])
    assert np.array_equal(data.observation[1:], after)
    # Two or three time-outs each, the first of an episode whose clock did not start at 0.
    assert episodes["charts/episodes"] == data.truncated.sum() - 4
    assert episodes["charts/episodic_return"] == 10 and episodes["charts/episodic_length"] == 20


@pytest.mark.parametrize(("env_id", "expected"), [
    ("faulty:Counter-v0", {"episodic_return": 20, "episodic_return_std": 0, "episodic_length": 20}),
    ("faulty:Barred-v0", {"episodic_return": 5, "episodic_length": 5, "success_bar": 4, "success": 1}),
    ("faulty:Successful-v0", {"episodic_return": 20, "success_bar": 100, "success": 1})])
def test_evaluation(env_id, expected, simulators):
    """One episode an environment; success is the environment's word for it, or a return at the task's bar."""
    agent = agent_for(env_id)
    state = trudi.new_state(agent, jax.random.PRNGKey(0))
    found = trudi.play(agent, fixed_policy(0.5)[1], simulators(env_id, 3, 2), state, "")
    assert {f"eval/{name}": x for name, x in expected.items()}.items() <= found.items()
    assert ("eval/success" in found) == ("success" in expected)
    low = trudi.play(agent, fixed_policy(0.1)[1], simulators(env_id, 3, 2), state, "")
    assert low.get("eval/success") == {"faulty:Barred-v0": 0, "faulty:Successful-v0": 1}.get(env_id)


# -------------------------------------------------------------------------------------------------------- command line
class WorkersRunner(Runner):
    """Starts this script, with the misbehaving environments within its reach."""

    script, small = "trudi_humanoidbench.py", SMALL

    def start(self, *flags, **environment):
        return super().start(*flags, PYTHONPATH=PATH, **environment)

    def signalled(self, send, *flags, iterations=5):
        """The folder and exit code of a run that gets a signal after some iterations; all its processes must end."""
        before = set(self.folder.glob("runs/*"))
        process = self.start(*SMALL, *flags, "--total-timesteps", "1000000")
        deadline, folder = time.monotonic() + 300, None
        while time.monotonic() < deadline and process.poll() is None and not (folder and len(metrics(folder)) > iterations):
            time.sleep(0.01)
            folder = next(iter(set(self.folder.glob("runs/*")) - before), None)
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
    expected = ("charts/SPS losses/critic losses/actor trust_region/kl trust_region/violated trust_region/fresh_kl wall_time "
                "trust_region/stored_kl trust_region/lambda critic/targets_clipped entropy/alpha entropy/bound").split()
    assert all(name in event for event in events for name in expected)
    assert [event["step"] for event in events if "eval/episodic_return" in event] == [640, 1280]
    assert any("charts/episodic_return" in event for event in events)
    saved = json.loads((straight / "args.json").read_text())
    assert saved["args"]["gamma"] == 0.99 and saved["args"]["num_workers"] == 1
    assert {"jax", "flax", "gymnasium"} <= set(saved["versions"])
    assert list(straight.glob("events.out.tfevents*"))
    assert max(int(path.name) for path in (straight / "checkpoints").iterdir()) == 1280


def test_numbers_depend_on_the_seed_but_not_on_workers_or_devices(runner, straight):
    assert curve(runner.train("--env-id", "Hopper-v5", "--num-workers", "2")) == curve(straight)
    two = runner.train("--env-id", "Hopper-v5", "--num-devices", "2", XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert_close(curve(two), curve(straight), events=2)
    other = runner.train("--env-id", "Hopper-v5", "--seed", "2")
    assert all(a["losses/critic"] != b["losses/critic"] for a, b in zip(curve(other), curve(straight), strict=True))


def test_half_cheetah_with_a_video(runner):
    folder = runner.train("--env-id", "faulty:ShortCheetah-v0", "--capture-video")
    videos = sorted(folder.glob("videos/*.mp4"))
    assert [path.name for path in videos] == ["step_1280.mp4", "step_640.mp4"] and videos[0].stat().st_size > 2000


def test_ctrl_c_saves_and_a_killed_run_goes_on(runner):
    folder, code = runner.signalled(lambda process: os.killpg(process.pid, signal.SIGINT), "--env-id", "Hopper-v5")
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


def test_a_failing_environment_ends_the_run_but_not_its_checkpoints(runner):
    process = runner.start("--env-id", "faulty:Dies-v0", *SMALL, "--num-steps", "2", "--minibatch-size", "16",
                           "--total-timesteps", "160", "--checkpoint-interval", "1")
    started = set()
    while process.poll() is None:
        started |= set(descendants(process.pid))
        time.sleep(0.05)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "ended with code 7" in err.splitlines()[-1]
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not all(map(process_is_gone, started)):
        time.sleep(0.05)
    assert len(started) >= 3 and all(map(process_is_gone, started))
    folder, = runner.folder.glob("runs/faulty:Dies*")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["16"]


# -------------------------------------------------------------------------------------------------------- HumanoidBench
@pytest.mark.parametrize("env_id", ["h1hand-stand-v0", "h1hand-push-v0"])
def test_humanoid_bench(env_id, runner):
    """One task with a success bar only, one that tells successes."""
    pytest.importorskip("humanoid_bench")
    folder = runner.train("--env-id", env_id, "--num-envs", "2", "--num-steps", "8", "--minibatch-size", "16",
                          "--total-timesteps", "32", "--eval-interval", "2")
    last = metrics(folder)[-1]
    assert last["eval/success"] == 0 and last["eval/success_bar"] in (800, 700)
