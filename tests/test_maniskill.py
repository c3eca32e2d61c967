"""trudi_maniskill.py: its environments, its loop, its command line.

test_parity.py compares its losses with trudi_mjx.py's.
"""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mani_skill")

import without_vulkan  # noqa: E402

import trudi_maniskill as trudi  # noqa: E402

ROOT = pathlib.Path(trudi.__file__).parent
CPU = torch.device("cpu")
SIZES = dict(
    preset="cpu",
    num_envs=2,
    num_steps=8,
    minibatch_size=8,
    num_epochs=1,
    hidden_dim=16,
    num_diffusion_steps=2,
    num_eval_envs=2,
    total_timesteps=128,
    eval_interval=4,
    checkpoint_interval=1,
)
PATIENCE = float(os.environ.get("TRUDI_TEST_PATIENCE", "3"))
# The seconds within which bad input is refused on a quiet machine.
REFUSAL_SECONDS = 5


@pytest.fixture(autouse=True, scope="module")
def materials():
    without_vulkan.stub_materials()
    torch.set_num_threads(1)


def small_args(**changes):
    args = trudi.resolve(trudi.Args(**{**SIZES, **changes}))
    trudi.check_args(args)
    return args


# ----------------------------------------------------------------------------------------------- environments
class Fake:
    """ManiSkillVectorEnv's interface around a counter of steps, which it observes; `limit` succeed."""

    num_envs = 1

    def __init__(self, limit=3, horizon=5):
        self.limit, self.horizon, self.count, self.total = limit, horizon, 0, 0.0
        self.base_env = SimpleNamespace(elapsed_steps=torch.zeros(1, dtype=torch.int32))

    def observation(self):
        return torch.full((1, 2), float(self.count))

    def reset(self, seed):
        self.seed, self.count, self.total = seed, 0, 0.0
        return self.observation(), {}

    def step(self, action):
        assert action.shape == (1, 3)
        self.count += 1
        self.total += self.count
        success, late = self.count >= self.limit, self.count >= self.horizon
        episode = {
            "return": torch.tensor([self.total]),
            "episode_len": torch.tensor([self.count]),
            "success_once": torch.tensor(success),
        }  # some tasks give it without an axis
        info, after = {"episode": episode}, self.observation()
        reward = torch.tensor([float(self.count)])
        if success or late:
            info = {"final_info": info, "final_observation": after}
            self.count, self.total = 0, 0.0
        return self.observation(), reward, torch.tensor([success]), torch.tensor([late]), info


def fake_env(*scenes, evaluation=True, **changes):
    """ManiSkill around fakes, reset; those for evaluation have seen their episodes from the start."""
    env = trudi.ManiSkill(small_args(**changes), list(scenes), time_limit=5, evaluation=evaluation)
    env.start(0)
    return env


def test_a_success_and_a_time_out_both_bootstrap():
    env = fake_env(Fake(limit=3), Fake(limit=99))
    for step in range(1, 11):
        outcome = env.step(torch.zeros(2, 3))
        episode = env.episodes[-1]
        in_episode = [(step - 1) % 3 + 1, (step - 1) % 5 + 1]
        assert outcome.reward.tolist() == in_episode
        assert outcome.next_observation[:, 0].tolist() == in_episode  # the true one, not the reset's
        ends = [in_episode[0] == 3, in_episode[1] == 5]
        assert outcome.truncated.tolist() == episode.ended.tolist() == ends
        assert not outcome.terminated.any()
        expected = [0 if end else n for end, n in zip(ends, in_episode, strict=True)]
        assert env.observation[:, 0].tolist() == expected
        assert episode.length.tolist() == in_episode
        assert episode.total.tolist() == [n * (n + 1) / 2 for n in in_episode]
        assert episode.success_once.tolist() == episode.success_at_end.tolist() == [ends[0], False]


class Several:
    """The same around several in one scene, as on a GPU: one that ends gives all the final observations."""

    def __init__(self, envs):
        self.envs, self.num_envs = envs, len(envs)

    def reset(self, seed):
        return torch.cat([env.reset([one])[0] for env, one in zip(self.envs, seed, strict=True)]), {}

    def step(self, action):
        observation, reward, success, late, info = zip(
            *[env.step(x[None]) for env, x in zip(self.envs, action, strict=True)], strict=True
        )
        finals = [x.get("final_info", x)["episode"] for x in info]
        episode = {
            "episode": {name: torch.stack([x[name].reshape(()) for x in finals]) for name in finals[0]}
        }
        if any("final_info" in x for x in info):
            after = [x.get("final_observation", now) for x, now in zip(info, observation, strict=True)]
            episode = {"final_info": episode, "final_observation": torch.cat(after)}
        return *(torch.cat(x) for x in (observation, reward, success, late)), episode


def test_one_scene_of_three_is_three_of_one():
    kinds = [dict(limit=3), dict(limit=99), dict(limit=5, horizon=4)]
    one = fake_env(Several([Fake(**kind) for kind in kinds]))
    three = fake_env(*[Fake(**kind) for kind in kinds])
    assert torch.equal(one.observation, three.observation)
    assert [env.seed for env in one.scenes[0].envs] == [scene.seed for scene in three.scenes]
    for _ in range(12):
        outcomes = [env.step(torch.zeros(3, 3)) for env in (one, three)]
        assert torch.equal(one.observation, three.observation)
        for a, b in zip(*outcomes, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(one.episodes[-1], three.episodes[-1], strict=True):
            assert torch.equal(a, b)


def test_environments_are_seeded_apart():
    env = fake_env(*[Fake() for _ in range(4)])
    training = fake_env(*[Fake() for _ in range(4)], evaluation=False)

    def seeds(env, iteration):
        env.start(iteration)
        return [scene.seed[0] for scene in env.scenes]

    first = seeds(env, 0)
    assert len({*first, *seeds(env, 1), *seeds(training, 0)}) == 12
    assert seeds(env, 0) == first


def fake_setup(args, scenes):
    """Setup, state and programs with fakes to train in, which are reset."""
    env = trudi.ManiSkill(args, scenes, time_limit=5, evaluation=False)
    eval_env = trudi.ManiSkill(args, scenes, time_limit=5, evaluation=True)
    env.start(0)
    setup = trudi.Setup(
        args, CPU, env, eval_env, observation_size=2, actor_sees=2, critic_sees=2, action_size=3
    )
    return setup, *trudi.prepare(setup, {})


def test_rollout_keeps_what_acted_and_counts_whole_episodes_only():
    args = small_args(num_envs=2, num_steps=12)
    setup, state, programs = fake_setup(args, [Fake(limit=99), Fake(limit=3)])
    actor = state.learner.actor
    torch.nn.init.normal_(actor.output.weight)
    statistics = trudi.Statistics(1, torch.tensor([1.0, 1.0]), torch.tensor([4.0, 4.0]))
    with torch.no_grad():
        data = trudi.rollout(setup, programs, statistics)
    assert data.trajectory.latents.shape == data.trajectory.means.shape == (12, 2, 2, 3)
    assert data.action.abs().max() <= torch.tensor(0.999)
    # The first of each is taken for one begun in its middle.
    assert sum(episode.ended.int() for episode in setup.env.episodes).tolist() == [1, 3]
    assert int(setup.env.episode_metrics()["charts/episodes"]) == 4
    assert setup.env.episodes == []
    going_on = ~data.truncated[:-1]
    assert (data.next_observation[:-1][going_on] == data.observation[1:][going_on]).all()
    trajectory = trudi.Trajectory(*[x.flatten(0, 1) for x in data.trajectory])
    observation = trudi.normalize(statistics, data.observation.flatten(0, 1))
    assert trudi.trajectory_kl(actor, actor, observation, trajectory).abs().max() < 1e-5
    assert trudi.trajectory_kl(actor, actor, observation + 1, trajectory).abs().max() > 1e-3


def test_first_minibatch_is_on_policy_and_the_iteration_learns():
    args = small_args(num_envs=4, num_steps=16, minibatch_size=64)
    setup, state, programs = fake_setup(args, [Fake(limit=99) for _ in range(4)])
    before = {name: x.clone() for name, x in state.learner.actor.state_dict().items()}
    state, metrics = trudi.iterate(setup, programs, state)
    assert abs(float(metrics["trust_region/kl"])) < 1e-5  # one minibatch an iteration: the data is its own
    assert float(metrics["trust_region/violated"]) == 0
    assert any((x != before[name]).any() for name, x in state.learner.actor.state_dict().items())
    assert all(torch.equal(x, before[name]) for name, x in state.learner.old_actor.state_dict().items())
    assert float(metrics["charts/episodes"]) > 0
    assert float(metrics["charts/episodic_return"]) == 15
    assert float(metrics["charts/episodic_length"]) == 5
    assert float(metrics["charts/success_once"]) == 0
    state, metrics = trudi.iterate(setup, programs, state)
    assert state.iteration == 2
    assert all(np.isfinite(float(x)) for x in metrics.values())


@pytest.mark.parametrize("k", [1, 2, 10])
def test_best_of_k_has_the_largest_q(k, monkeypatch):
    """The best of K symmetric draws is negative in one case of 2^K."""
    states = 3000
    args = small_args(eval_mode="best-of-k", best_of_k=k)
    setup, state, _ = fake_setup(args, [Fake()])
    monkeypatch.setattr(trudi, "q_value", lambda args, logits: logits)
    learner = state.learner._replace(critic=lambda observation, action: action[:, 0])
    torch.manual_seed(0)
    with torch.no_grad():
        action = trudi.evaluation_action(setup, learner, torch.zeros(states, 2))
    assert action.shape == (states, 3)
    tolerance = 4 * np.sqrt(0.25 / states) if k < 10 else 0.005
    np.testing.assert_allclose((action[:, 0] < 0).float().mean(), 0.5**k, atol=tolerance)


def random_batch(observation_size, action_size, generator):
    """Eight states, with chains of two steps."""

    def normal(*shape):
        return torch.randn(8, *shape, generator=generator)

    trajectory = trudi.Trajectory(normal(2, action_size), normal(2, action_size))
    return trudi.Batch(normal(observation_size), normal(action_size), trajectory, normal())


def test_compiled_updates_are_the_same():
    """Traced as for a GPU, without generating code, which takes a minute."""
    results = []
    for compiled in (False, True):
        _, state, programs = fake_setup(small_args(), [Fake(), Fake()])
        learner = state.learner
        torch.manual_seed(0)
        torch.nn.init.normal_(learner.actor.output.weight)
        learn = programs.update_minibatch
        learn = torch.compile(learn, backend="aot_eager") if compiled else learn
        rng = torch.Generator().manual_seed(0)
        batch = random_batch(2, 3, rng)
        metrics = []
        for _ in range(3):  # as in three iterations, each with an old actor of its own
            learner.old_actor.load_state_dict(learner.actor.state_dict())
            metrics.append(learn(batch, torch.randn(3, 8, 3, generator=rng)))
        results.append(torch.cat([*metrics, *(p.detach().flatten() for p in learner.actor.parameters())]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("iterations", [0, 2])
def test_warming_up_changes_nothing_in_a_learner(iterations):
    """Nor where its tensors lie, as CUDA graphs remember that."""
    setup, state, programs = fake_setup(small_args(), [Fake(), Fake()])
    for _ in range(iterations):
        state, _ = trudi.iterate(setup, programs, state)
    learner = state.learner
    before = [x.clone() for x in trudi.changing_tensors(learner)]
    trudi.warm_up(setup, programs, learner)
    after = trudi.changing_tensors(learner)
    addresses = [x.data_ptr() for x in after]
    parameters = len(before) if iterations else len(after) // 4  # each has a step and two moments of Adam
    assert len(before) == parameters
    for x, y in zip(after, before, strict=False):
        assert torch.equal(x, y)
    assert not any(x.any() for x in after[parameters:])
    trudi.iterate(setup, programs, state)
    assert [x.data_ptr() for x in trudi.changing_tensors(learner)] == addresses


def test_wall_time_is_without_compiling(tmp_path):
    """With programs whose first calls take long: numbers of two iterations, which are those without."""
    rows = []
    for delay in (0, 2):
        args = small_args(log_dir=str(tmp_path / str(delay)), total_timesteps=32, eval_interval=9)
        setup, state, programs = fake_setup(args, [Fake(), Fake()])
        calls = []

        def learn(*inputs, calls=calls, delay=delay, programs=programs):
            calls.append(time.sleep(0 if calls else delay))
            return programs.update_minibatch(*inputs)

        assert trudi.train(setup, programs._replace(update_minibatch=learn), state, {}) == 0
        path, = tmp_path.glob(f"{delay}/*/metrics.jsonl")
        rows.append([json.loads(line) for line in path.read_text().splitlines()])
    for plain, slow in zip(*rows, strict=True):
        assert slow["wall_time"] < 2
        for row in (plain, slow):
            del row["wall_time"], row["charts/SPS"]
        assert plain == slow


# ------------------------------------------------------------------------------------------------- real tasks
def prepared(**changes):
    """Setup, state and programs with ManiSkill's environments, reset."""
    setup = trudi.make_setup(small_args(**changes), CPU)
    setup.env.start(0)
    return setup, *trudi.prepare(setup, {})


@pytest.mark.parametrize("env_id", trudi.TASKS)
def test_every_task_trains_and_is_evaluated(env_id, tmp_path):
    setup, state, programs = prepared(env_id=env_id, num_envs=2, num_steps=4, minibatch_size=8)
    actions = {"TwoRobotPickCube-v1": 16, "TwoRobotStackCube-v1": 16, "PushT-v1": 7}.get(env_id, 8)
    assert len(state.learner.actor.raw_friction) == actions
    for _ in range(2):
        state, metrics = trudi.iterate(setup, programs, state)
    assert trudi.not_finite(trudi.averages(metrics)) == []
    metrics = trudi.averages(trudi.evaluate(setup, state, tmp_path))
    assert metrics["eval/episodic_length"] == setup.env.time_limit
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

    assert losses(True) == losses(False)
    assert losses(False) != losses(False, seed=2)


# ------------------------------------------------------------------------------------------ several processes
JOINT = """
import dataclasses, sys, numpy as np, torch, torch.distributed as dist
import trudi_maniskill as trudi
args = dataclasses.replace(
    trudi.Args(), preset="cpu", hidden_dim=16, v_min=-3.0, v_max=3.0, actor_learning_rate=1e-2,
    critic_learning_rate=1e-2, dual_learning_rate=1e-2, target_entropy_scale=0.665, num_atoms=21)
if trudi.WORLD > 1:
    dist.init_process_group("gloo")
rng = np.random.default_rng(0)
setup = trudi.Setup(args, torch.device("cpu"), None, None, 5, 5, 5, 2)
learner = trudi.init_learner(setup)
torch.manual_seed(0)
torch.nn.init.normal_(learner.actor.output.weight)
rows = slice(trudi.RANK * 32 // trudi.WORLD, (trudi.RANK + 1) * 32 // trudi.WORLD)
def normal(*shape, axis=0):
    x = torch.tensor(rng.normal(size=shape).astype(np.float32))
    return x[rows] if axis == 0 else x[:, rows]
found = []
for _ in range(4):
    learner.old_actor.load_state_dict(learner.actor.state_dict())
    observation, action = normal(32, 5), normal(32, 2).tanh()
    trajectory = trudi.Trajectory(normal(32, 8, 2), normal(32, 8, 2))
    batch = trudi.Batch(observation, action, trajectory, normal(32))
    metrics = trudi.update_minibatch(args, learner, batch, normal(9, 32, 2, axis=1))
    found.append(trudi.everywhere(metrics[None]).mean(0))
statistics = trudi.init_statistics(setup)
for scale in (1, 3):
    statistics = trudi.update_statistics(statistics, scale * normal(32, 4, 5).transpose(0, 1))
found += [torch.stack(list(learner.log_duals)).detach(), statistics.mean, statistics.variance,
          learner.actor.output.weight.detach().flatten(), learner.critic.output.bias.detach(),
          torch.tensor([float(statistics.count)])]
if trudi.RANK == 0:
    np.save(sys.argv[1], torch.cat(found).numpy())
"""


def processes(script, world, *flags):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, *script, *map(str, flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    ended = [process.communicate(timeout=600) for process in started]
    assert all(process.returncode == 0 for process in started), [err[-2000:] for _, err in ended]
    return [out for out, _ in ended]


def test_two_processes_are_one_on_the_joint_batch(tmp_path):
    """Losses, weights, duals, statistics after four minibatches, half of each in either of two processes."""
    script = tmp_path / "joint.py"
    script.write_text(JOINT)
    for world in (1, 2):
        processes([script], world, tmp_path / f"{world}.npy")
    one, two = (np.load(tmp_path / f"{world}.npy") for world in (1, 2))
    print("largest difference:", np.abs(one - two).max())
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------- command line
FLAGS = [x for name, value in SIZES.items() for x in (f"--{name.replace('_', '-')}", str(value))]
LAUNCH = [str(ROOT / "tests" / "without_vulkan.py"), str(ROOT / "trudi_maniskill.py")]


def start(*flags):
    command = [sys.executable, *LAUNCH, *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, (process.returncode, err[-3000:])
    return out, err


def events(run):
    return [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train(tmp_path):
    out, silent = processes(LAUNCH, 2, *FLAGS, "--log-dir", tmp_path)
    assert silent == ""
    run = pathlib.Path(out.splitlines()[-1])
    assert [event["step"] for event in events(run)] == list(range(16, 129, 16))
    assert "eval/success_once" in events(run)[-1]


def test_command_line(tmp_path):
    """A run, continued beyond its end, evaluated; its folder."""
    out, _ = finish(start(*FLAGS, "--log-dir", tmp_path))
    run = pathlib.Path(out.splitlines()[-1])
    assert run.parent == tmp_path
    assert run.name.startswith("PushCube-v1__trudi_maniskill__1__")
    found = events(run)
    assert [event["step"] for event in found] == list(range(16, 129, 16))
    assert [event["step"] for event in found if "eval/success_once" in event] == [64, 128]
    times = [event["wall_time"] for event in found]
    assert times == sorted(times)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["112.pt", "128.pt", "96.pt"]
    assert list(run.glob("events.out.tfevents*"))
    saved = json.loads((run / "args.json").read_text())
    assert saved["versions"]["torch"]
    assert saved["args"]["num_iterations"] == 8
    finish(start("--resume", run, "--total-timesteps", 160))
    assert [event["step"] for event in events(run)] == list(range(16, 161, 16))
    assert events(run)[:8] == found
    before = sorted(path.name for path in run.iterdir())
    finish(start("--evaluate", run, "--export", tmp_path / "policy.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"))
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["step"] == str(events(run)[-1]["step"])
    out, _ = finish(start("--evaluate", run, "--eval-mode", "sde", "--num-eval-envs", 4))
    assert set(json.loads(out.splitlines()[-1])) >= {
        "eval/success_once",
        "eval/success_at_end",
        "eval/episodic_return",
    }
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_runs_continue(number, tmp_path):
    process = start(*FLAGS, "--total-timesteps", 100_000, "--log-dir", tmp_path)
    deadline = time.monotonic() + 200
    while (
        time.monotonic() < deadline
        and process.poll() is None
        and not list(tmp_path.glob("*/checkpoints/[4-9]?.pt"))
    ):
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=100)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    (run,) = tmp_path.iterdir()
    newest = max(int(path.stem) for path in (run / "checkpoints").glob("*.pt"))
    steps = [
        json.loads(line)["step"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]
    assert newest >= steps[-1] - 16  # at most an interval is lost
    finish(start("--resume", run, "--total-timesteps", newest + 32))
    assert [event["step"] for event in events(run)] == list(range(16, newest + 33, 16))


def test_a_checkpoint_restores_everything_but_the_simulator(tmp_path):
    setup, state, programs = prepared()
    for _ in range(2):
        state, _ = trudi.iterate(setup, programs, state)
    trudi.save_checkpoint(tmp_path, state, 32, 1.5)
    saved = trudi.read_checkpoint(str(tmp_path))
    assert saved["wall_time"] == 1.5
    other, _ = trudi.prepare(setup, saved)
    assert other.iteration == 2
    assert torch.equal(other.statistics.mean, state.statistics.mean)
    assert torch.equal(other.statistics.variance, state.statistics.variance)
    assert list(other.learner.log_duals) == list(state.learner.log_duals)
    batch = random_batch(35, 8, torch.Generator().manual_seed(0))
    noise = torch.randn(3, 8, 8)
    for _ in range(2):  # Adam's moments too
        results = []
        for learner in (state.learner, other.learner):
            learner.old_actor.load_state_dict(learner.actor.state_dict())  # as every iteration does
            results.append(trudi.update_minibatch(setup.args, learner, batch, noise))
        assert torch.equal(*results)


# -------------------------------------------------------------------------------------------------- bad input
def refusal(code, error):
    assert code == 2, error[-2000:]
    (line,) = error.splitlines()
    assert line.startswith("trudi_maniskill.py: error: ")
    return line


def refused(*flags):
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, ROOT / "trudi_maniskill.py", *map(str, flags)], capture_output=True, text=True
    )
    assert time.perf_counter() - began < REFUSAL_SECONDS * PATIENCE
    return refusal(done.returncode, done.stderr)


POSITIVE = (
    "total_timesteps num_envs num_steps num_epochs minibatch_size max_grad_norm hidden_dim num_atoms "
    "actor_learning_rate critic_learning_rate dual_learning_rate num_diffusion_steps prior_std best_of_k "
    "trust_region_bound eval_interval num_eval_envs checkpoint_interval"
).split()
NAN = float("nan")


@pytest.mark.parametrize(
    "changes",
    [
        *({name: number} for name in POSITIVE for number in (0, -1)),
        dict(seed=-1),
        dict(gamma=-0.1),
        dict(gamma=1.0),
        dict(gamma=NAN),
        dict(td_lambda=1.1),
        dict(ode_score_scale=-1.0),
        dict(prior_std=NAN),
        dict(trust_region_bound=NAN),
        dict(v_min=5.0, v_max=5.0),
        dict(v_min=NAN),
        dict(num_atoms=1),
        dict(total_timesteps=10),
        dict(minibatch_size=6),
        dict(env_id="PushCub"),
    ],
    ids=str,
)
def test_values(changes, capsys):
    small_args()
    with pytest.raises(SystemExit) as stop:
        small_args(**changes)
    line = refusal(stop.value.code, capsys.readouterr().err)
    assert any(f"--{name.replace('_', '-')}" in line for name in changes) or changes == {"minibatch_size": 6}


def test_two_processes_need_sizes_that_divide(capsys, monkeypatch):
    monkeypatch.setattr(trudi, "WORLD", 2)
    small_args()
    for changes in (dict(num_envs=1, num_steps=16), dict(minibatch_size=1), dict(num_eval_envs=3)):
        with pytest.raises(SystemExit):
            small_args(**changes)
        assert "2 processes" in capsys.readouterr().err


def test_unknown_tasks():
    assert "PushCube-v1" in refused("--env-id", "PushCubes-v1")
    assert "no_such_module" in refused("--env-id", "no_such_module:Task-v1", *FLAGS)


def test_rewards_that_a_task_lacks():
    done = subprocess.run(
        [sys.executable, *LAUNCH, *FLAGS, "--env-id", "PlugCharger-v1", "--reward-mode", "dense"],
        capture_output=True,
        text=True,
    )
    assert "reward mode" in refusal(done.returncode, done.stderr.splitlines()[-1])


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
    line = refusal(stop.value.code, capsys.readouterr().err)
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


def test_missing_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "--device cpu" in refused("--device", "gpu")


def test_no_vulkan():
    """The loader's own variables hide what drivers there are."""
    done = subprocess.run(
        [sys.executable, ROOT / "trudi_maniskill.py", *FLAGS],
        capture_output=True,
        text=True,
        env={**os.environ, "VK_DRIVER_FILES": "/nonexistent", "VK_ICD_FILENAMES": "/nonexistent"},
    )
    assert done.returncode == 2
    assert "mesa-vulkan-drivers" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "pickle", "no checkpoint", "other sizes"])
def test_damaged_checkpoints(damage, tmp_path, capsys, monkeypatch):
    args = small_args(total_timesteps=16)
    (tmp_path / "args.json").write_text(
        json.dumps({"args": dataclasses.asdict(args), "script": "trudi_maniskill"})
    )
    _, state, _ = fake_setup(args, [Fake(), Fake()])
    trudi.save_checkpoint(tmp_path, state, 16, 0.0)
    path = tmp_path / "checkpoints" / "16.pt"
    if damage == "pickle":
        torch.save({"actor": SimpleNamespace(), "wall_time": 1.0}, path)
    elif damage == "no checkpoint":
        path.unlink()
    elif damage != "other sizes":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "truncated" else 0])
    monkeypatch.setattr(sys, "argv", ["trudi_maniskill.py", "--resume", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        trudi.main()
    line = refusal(stop.value.code, capsys.readouterr().err)
    assert "not of this run" in line if damage == "other sizes" else str(tmp_path) in line


@pytest.mark.parametrize("content", ["", "[]", '{"args": {}, "script": "trudi_mjx"}'])
def test_foreign_runs(content, tmp_path):
    (tmp_path / "args.json").write_text(content)
    assert str(tmp_path) in refused("--resume", tmp_path)


# ------------------------------------------------------------------------------------------- what ends a run
def test_a_metric_that_is_not_finite_ends_the_run(tmp_path, capsys):
    setup, state, programs = fake_setup(small_args(log_dir=str(tmp_path)), [Fake(), Fake()])
    state.learner.actor.input.weight.data.fill_(float("nan"))
    assert trudi.train(setup, programs, state, {}) == 1
    out, err = capsys.readouterr()
    run = pathlib.Path(out.splitlines()[-1])
    assert (
        "iteration 1: losses/critic, losses/actor" in err
        and f"not finite; the state is in {run}/diverged" in err
    )
    assert list((run / "diverged" / "checkpoints").glob("*.pt"))
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metrics_of_any_name_are_watched(value, tmp_path, capsys, monkeypatch):
    """Those that a copy of the script adds, too, and those of an evaluation."""
    assert trudi.not_finite({"losses/critic": 1.0, "mine/number": value, "charts/SPS": 2.0}) == [
        "mine/number"
    ]
    args = small_args(log_dir=str(tmp_path), eval_interval=1)
    setup, state, programs = fake_setup(args, [Fake(), Fake()])
    monkeypatch.setattr(trudi, "evaluate", lambda *_: {"eval/mine": torch.tensor(value)})
    assert trudi.train(setup, programs, state, {}) == 1
    out, err = capsys.readouterr()
    assert "iteration 1: eval/mine not finite" in err
    assert list((pathlib.Path(out.splitlines()[-1]) / "diverged" / "checkpoints").glob("16.pt"))


def test_an_actor_that_breaks_the_contract_ends_the_run(tmp_path):
    setup, state, programs = fake_setup(small_args(log_dir=str(tmp_path)), [Fake(), Fake()])
    torch.nn.init.normal_(state.learner.actor.output.weight)
    with pytest.raises(SystemExit) as stop:
        trudi.train(setup, programs, state, {})
    assert "output layer has to start at zero" in str(stop.value.code)


def test_later_iterations_begin_at_the_policy_that_acted():
    setup, state, programs = fake_setup(small_args(), [Fake(), Fake()])
    for _ in range(3):
        state, metrics = trudi.iterate(setup, programs, state)
        assert abs(float(metrics["trust_region/initial_kl"])) < 1e-5
    assert float(metrics["trust_region/stored_kl"]) > 1e-5


def test_a_copy_of_the_script_has_its_own_name(tmp_path):
    copy = tmp_path / "my_agent.py"
    copy.write_text((ROOT / "trudi_maniskill.py").read_text())
    code = "import my_agent; print(my_agent.Args().exp_name)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["my_agent"]
    assert trudi.Args().exp_name == "trudi_maniskill"


def test_what_may_change_are_flags():
    names = {field.name for field in dataclasses.fields(trudi.Args)}
    assert {*trudi.MAY_CHANGE, *trudi.POSITIVE, *trudi.SPLIT} <= names
    assert "gamma" not in trudi.MAY_CHANGE
