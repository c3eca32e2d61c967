"""trudi_isaaclab.py: its environments, its loop, its command line.

With mjlab, with a stand-in for Isaac Lab 2.3's interface and, if TRUDI_ISAACLAB_PYTHON names an interpreter
that has it, with Isaac Lab 3.0. The learner is test_parity.py's, word by word.
"""

import ast
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mjlab")

from test_maniskill import processes  # noqa: E402

import trudi_isaaclab as trudi  # noqa: E402

ROOT = pathlib.Path(trudi.__file__).parent
TESTS = ROOT / "tests"
CPU = torch.device("cpu")
SIZES = dict(
    preset="cpu",
    num_envs=2,
    num_steps=8,
    minibatch_size=8,
    num_epochs=1,
    hidden_dim=16,
    num_diffusion_steps=2,
    total_timesteps=64,
    eval_interval=2,
    checkpoint_interval=1,
)
PATIENCE = float(os.environ.get("TRUDI_TEST_PATIENCE", "3"))
ISAACLAB = os.environ.get("TRUDI_ISAACLAB_PYTHON")
needs_isaaclab = pytest.mark.skipif(
    not ISAACLAB, reason="TRUDI_ISAACLAB_PYTHON names no interpreter that has Isaac Lab 3.0"
)


# ----------------------------------------------------------------------------------------------- environments
class Fake:
    """Isaac Lab's interface around counters: the i-th terminates after ends[i] steps, and is late after 6.

    It observes the steps of its episode, ten times as much for the critic, and pays the step's number. `kind`
    is the simulator whose habits it has, `reuse` writes into one set of buffers as Isaac Lab does.
    """

    max_episode_length, step_dt, single_action_space = 6, 0.05, SimpleNamespace(shape=(3,))

    def __init__(self, kind="3.0", ends=(3, 99), reuse=True, critic=True):
        self.kind, self.ends, self.reuse, self.critic = kind, torch.tensor(ends), reuse, critic
        self.cfg, self.sim, self.extras = SimpleNamespace(auto_reset=kind != "mjlab"), SimpleNamespace(), {}
        self.episode_length_buf = torch.zeros(len(ends), dtype=torch.long)
        self.buffers, self.actions = {}, []

    def give(self, name, value):
        if not self.reuse:
            return value.clone()
        return self.buffers.setdefault(name, torch.empty_like(value)).copy_(value)

    def observe(self, prefix=""):
        steps = self.episode_length_buf.float()[:, None].repeat(1, 2)
        groups = {"actor" if self.kind == "mjlab" else "policy": steps} | (
            {"critic": 10 * steps[:, :1]} if self.critic else {}
        )
        return {name: self.give(prefix + name, value) for name, value in groups.items()}

    def reset(self, env_ids=None):
        self.episode_length_buf[slice(None) if env_ids is None else env_ids] = 0
        return self.observe(), self.extras

    def step(self, action):
        self.actions.append(action)
        self.episode_length_buf += 1
        steps = self.episode_length_buf
        terminated, late = steps >= self.ends, steps >= self.max_episode_length
        outcome = [
            self.give(*x) for x in (("reward", steps.float()), ("terminated", terminated), ("late", late))
        ]
        ended = terminated | late
        if ended.any():
            mean = self.give("log", steps[ended].float().mean())
            self.extras["log"] = {"Episode_Reward/count": mean, "Curriculum/level": 2.0}
            if self.kind == "3.0":
                self.extras["final_obs"] = self.observe("final ")
            if self.kind != "mjlab":
                self.reset(ended)
        return self.observe(), *outcome, self.extras


def small_args(**changes):
    args = trudi.resolve(trudi.Args(**{**SIZES, "env_id": "Mjlab-Cartpole-Balance", **changes}))
    trudi.check_args(args)
    return args


def prepared(env, **changes):
    """Setup, state and programs around a fake, which has started anywhere in its episodes."""
    sizes = dict(minibatch_size=len(env.ends), total_timesteps=10_000) | changes
    args = small_args(num_envs=len(env.ends), **sizes)
    setup = trudi.setup_for(args, CPU, trudi.IsaacLab(args, env))
    state, programs = trudi.prepare(setup, {})
    setup.env.reset(spread=True)
    return setup, state, programs


@pytest.mark.parametrize("kind", ["3.0", "2.3", "mjlab"])
def test_how_episodes_end(kind):
    """Environment 0 terminates at step 3, 1 is late at 6, 2 does both at once, which is no truncation."""
    env = prepared(Fake(kind, ends=(3, 99, 6)))[0].env
    env.reset(spread=False)
    for step in range(1, 13):
        reward, terminated, truncated, after = env.step(torch.zeros(3, 3))
        episode, log = env.ended[-1], env.logs
        env.logs = {}
        now = [(step - 1) % limit + 1 for limit in (3, 6, 6)]
        ends = [now[0] == 3, now[1] == 6, now[2] == 6]
        assert reward.tolist() == now
        assert terminated.tolist() == [ends[0], False, ends[2]]
        assert truncated.tolist() == [False, ends[1], False]
        assert episode.isfinite().all(1).tolist() == episode.isfinite().any(1).tolist() == ends
        assert episode[ends].tolist() == [
            [n * (n + 1) / 2, n] for n, end in zip(now, ends, strict=True) if end
        ]
        # 2.3 does not tell how an episode ended: the last observation before it stands in.
        last = [n - (kind == "2.3" and end) for n, end in zip(now, ends, strict=True)]
        assert after.tolist() == [[n, n, 10 * n] for n in last]
        following = [0 if end else n for n, end in zip(now, ends, strict=True)]
        assert env.observation.tolist() == [[n, n, 10 * n] for n in following]
        assert set(log) == ({"Episode_Reward/count", "Curriculum/level"} if any(ends) else set())


@pytest.mark.parametrize("kind", ["3.0", "2.3", "mjlab"])
def test_reused_buffers_change_nothing(kind):
    """What is learned from, and what is learned, with a simulator that writes into the same tensors."""
    results = []
    for reuse in (True, False):
        torch.manual_seed(1)
        setup, state, programs = prepared(Fake(kind, reuse=reuse), num_steps=12)
        torch.manual_seed(0)
        torch.nn.init.normal_(state.learner.actor.output.weight)
        with torch.no_grad():
            data = trudi.rollout(setup, programs, state.statistics)
        metrics = setup.env.episode_metrics()
        for _ in range(2):
            state, learned = trudi.iterate(setup, programs, state)
        steps = [data.observation, data.action, *data.trajectory, *data[3:]]
        weights = state.learner.actor.parameters()
        results.append([*steps, *metrics.values(), *learned.values(), *weights, setup.env.observation])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert results[0][4].unique().numel() > 3  # the rewards are not all the last one's


@pytest.mark.parametrize("kind", ["3.0", "mjlab"])
def test_a_finite_horizon_is_part_of_the_task(kind):
    """Where a configuration says so, a time-out does not bootstrap."""
    fake = Fake(kind, ends=(3, 99))
    fake.cfg.is_finite_horizon = True
    setup, _, _ = prepared(fake)
    setup.env.reset(spread=False)
    found = [setup.env.step(torch.zeros(2, 3)) for _ in range(6)]
    assert [outcome.terminated.tolist() for outcome in found][-4:] == [[True, False], [False] * 2, [False] * 2, [True] * 2]
    assert not any(outcome.truncated.any() for outcome in found)


def test_gradients_travel_together(monkeypatch):
    """One call for each loss, whatever the number of parameters; as if the other process had twice these."""
    _, state, _ = prepared(Fake())
    calls = []

    def all_reduce(x):
        calls.append(x.numel())
        x *= 3

    monkeypatch.setattr(trudi.dist, "all_reduce", all_reduce)
    parameters = list(state.learner.critic.parameters())
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    expected = [3 * gradient for gradient in gradients]
    found = trudi.add_up(gradients)
    assert len(calls) == 1 and calls[0] == sum(parameter.numel() for parameter in parameters)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("step_dt, steps, fps", [(0.02, [0, 2, 4], 25), (0.05, [0, 1, 2, 3, 4], 20), (0.005, [0], 200 / 7)])
def test_videos_are_of_30_frames_a_second_at_most(step_dt, steps, fps, monkeypatch, tmp_path):
    written = []
    setup, state, _ = prepared(Fake(ends=(99, 99)), capture_video=True, video_length=5)
    setup.env.env.step_dt = step_dt
    monkeypatch.setattr(setup.env, "render", lambda: int(setup.env.env.episode_length_buf[0]))
    monkeypatch.setattr("imageio.mimsave", lambda path, frames, fps: written.append((frames, fps)))
    trudi.evaluate(setup, state, tmp_path)
    assert written == [(steps, pytest.approx(fps))]


def test_the_simulator_gets_scaled_actions_of_its_own():
    setup, state, programs = prepared(Fake(), action_scale=2.5)
    with torch.no_grad():
        data = trudi.rollout(setup, programs, state.statistics)
    for sent, kept in zip(setup.env.env.actions, data.action, strict=True):
        torch.testing.assert_close(sent, 2.5 * kept)
        sent.fill_(7)  # the simulator may keep and change it
    assert data.action.abs().max() <= 0.999


def test_rollout_counts_whole_episodes_and_logs_the_simulators_means():
    setup, state, programs = prepared(Fake(ends=(4, 99)), num_steps=14)
    setup.env.env.episode_length_buf.copy_(torch.tensor([2, 0]))
    with torch.no_grad():
        data = trudi.rollout(setup, programs, state.statistics)
    metrics = setup.env.episode_metrics()
    # Environment 0 ends at steps 2, 6, 10, 14 and 1 at 6 and 12; the first ones were begun before.
    assert data.terminated.nonzero().tolist() == [[1, 0], [5, 0], [9, 0], [13, 0]]
    assert data.truncated.nonzero().tolist() == [[5, 1], [11, 1]]
    assert float(metrics["charts/episodes"]) == 4
    assert float(metrics["charts/episodic_return"]) == (3 * 10 + 21) / 4
    assert float(metrics["charts/episodic_length"]) == (3 * 4 + 6) / 4
    assert float(metrics["Curriculum/level"]) == 2
    assert float(metrics["Episode_Reward/count"]) == pytest.approx(4.6)  # of 4, (4 + 6) / 2, 4, 6, 4
    assert data.trajectory.latents.shape == data.trajectory.means.shape == (14, 2, 2, 3)
    trajectory = trudi.Trajectory(*[x.flatten(0, 1) for x in data.trajectory])
    observation = trudi.normalize(state.statistics, data.observation.flatten(0, 1))
    actor = state.learner.actor
    assert trudi.trajectory_kl(actor, actor, observation, trajectory).abs().max() < 1e-5


def test_each_network_sees_its_own_group():
    setup, state, _ = prepared(Fake())
    actor, critic = state.learner[:2]
    assert (setup.actor_sees, setup.critic_sees, setup.observation_size) == (2, 1, 3)
    torch.nn.init.normal_(actor.output.weight)
    seen, noise = torch.randn(4, 3), torch.randn(3, 4, 3)
    for column, (acts, judges) in enumerate([(True, False), (True, False), (False, True)]):
        other = seen.clone()
        other[:, column] += 1
        moved = [
            not torch.equal(f(seen), f(other))
            for f in (
                lambda x: trudi.sample_chain(actor, x, noise).action,
                lambda x: critic(x, torch.zeros(4, 3)),
            )
        ]
        assert moved == [acts, judges]
    setup, _, _ = prepared(Fake(critic=False))
    assert (setup.actor_sees, setup.critic_sees, setup.observation_size) == (2, 2, 2)


def test_evaluation_counts_the_first_episode_of_each(tmp_path):
    setup, state, _ = prepared(Fake(ends=(2, 99, 4)))
    setup.env.observation.fill_(5)
    metrics = trudi.averages(trudi.evaluate(setup, state, tmp_path))
    returns = [3, 21, 10]
    assert metrics["eval/episodic_return"] == pytest.approx(np.mean(returns))
    assert metrics["eval/episodic_return_std"] == pytest.approx(np.std(returns))
    assert metrics["eval/episodic_length"] == 4
    assert len(setup.env.env.actions) == 6
    assert setup.env.episode.isnan().all()  # training goes on with new episodes, cut from their beginnings
    assert setup.env.ended == [] and setup.env.logs == {}  # without the evaluation's episodes
    assert setup.env.observation.tolist() == [[0, 0, 0]] * 3
    setup, state, _ = prepared(Fake(ends=(2, 3)))
    trudi.evaluate(setup, state, tmp_path)
    assert len(setup.env.env.actions) == 3  # all have ended


def test_clocks_start_spread_out():
    env = Fake(ends=[99] * 60)
    setup, _, _ = prepared(env)
    assert set(env.episode_length_buf.tolist()) == set(range(6))
    setup.env.reset(spread=False)
    assert not env.episode_length_buf.any()
    assert not setup.env.episode.any()


def test_it_learns_from_termination():
    """A step costs 1 and an action beyond 0.5 ends the episode, which must be worth it."""

    class Costly(Fake):
        def step(self, action):
            self.episode_length_buf += 1
            terminated = action[:, 0] > 0.5
            late = self.episode_length_buf >= self.max_episode_length
            groups = self.observe("final ")
            self.extras["final_obs"] = groups
            self.reset(terminated | late)
            return self.observe(), -torch.ones(len(action)), terminated, late, self.extras

    torch.manual_seed(0)
    sizes = dict(num_steps=16, minibatch_size=128, num_epochs=4, hidden_dim=32, num_diffusion_steps=4)
    setup, state, programs = prepared(Costly(ends=[99] * 32), **sizes, total_timesteps=512 * 30)
    shares = []
    for _ in range(30):
        state, metrics = trudi.iterate(setup, programs, state)
        shares.append(float(metrics["charts/episodic_length"]))
    assert np.mean(shares[-3:]) < 1.3 < np.mean(shares[:2])


# ---------------------------------------------------------------------------------------- command line, mjlab
FLAGS = [x for name, value in SIZES.items() for x in (f"--{name.replace('_', '-')}", str(value))]


def start(*flags, python=sys.executable, **environment):
    command = [python, ROOT / "trudi_isaaclab.py", *map(str, flags)]
    path = f"{environment.pop('path', TESTS)}"
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=900)
    assert process.returncode == code, (process.returncode, out[-2000:], err[-3000:])
    return out, err


def train(*flags, **options):
    """The folder of a finished run, which its last lines name."""
    out, _ = finish(start(*FLAGS, *flags, **options))
    return pathlib.Path(next(line for line in reversed(out.splitlines()) if "__trudi_isaaclab__" in line))


def events(run):
    lines = (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def curve(run):
    return [
        {name: x for name, x in event.items() if name not in ("wall_time", "charts/SPS")}
        for event in events(run)
    ]


CARTPOLE = ("--env-id", "mjlab_tasks:Mjlab-Short-Cartpole")


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    return train(*CARTPOLE, "--log-dir", tmp_path_factory.mktemp("runs"))


def test_command_line(cartpole, tmp_path):
    """A run, the same again, one with another seed; continued beyond its end, evaluated; its folder."""
    found = events(cartpole)
    assert [event["step"] for event in found] == [16, 32, 48, 64]
    assert [event["step"] for event in found if "eval/episodic_return" in event] == [32, 64]
    assert found[-1]["eval/episodic_length"] == 20
    assert 0 < found[-1]["eval/episodic_return"] < 1  # at most 0.05 a step
    assert sorted(path.name for path in (cartpole / "checkpoints").iterdir()) == ["32.pt", "48.pt", "64.pt"]
    assert list(cartpole.glob("events.out.tfevents*"))
    assert json.loads((cartpole / "args.json").read_text())["versions"]["mjlab"]
    assert curve(train(*CARTPOLE, "--log-dir", tmp_path)) == curve(cartpole)
    other = curve(train(*CARTPOLE, "--log-dir", tmp_path, "--seed", "2"))
    assert all(a["losses/critic"] != b["losses/critic"] for a, b in zip(other, curve(cartpole), strict=True))
    finish(start("--resume", cartpole, *CARTPOLE, "--total-timesteps", 96))
    assert [event["step"] for event in events(cartpole)] == list(range(16, 97, 16))
    assert events(cartpole)[:4] == found
    finish(start("--evaluate", cartpole, *CARTPOLE, "--export", tmp_path / "policy.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"))
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["step"] == str(events(cartpole)[-1]["step"])
    assert json.loads(facts["observation_terms"])
    out, _ = finish(start("--evaluate", cartpole, *CARTPOLE, "--eval-mode", "sde"))
    result = next(json.loads(line) for line in out.splitlines() if line.startswith('{"eval'))
    assert set(result) == {"eval/episodic_return", "eval/episodic_return_std", "eval/episodic_length"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_runs_continue(number, tmp_path):
    process = start(
        *FLAGS, *CARTPOLE, "--total-timesteps", 100_000, "--eval-interval", 10_000, "--log-dir", tmp_path
    )
    deadline = time.monotonic() + 300
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
    assert newest >= events(run)[-1]["step"] - 16  # at most an interval is lost
    finish(start("--resume", run, *CARTPOLE, "--total-timesteps", newest + 32, "--eval-interval", 10_000))
    assert [event["step"] for event in events(run)] == list(range(16, newest + 33, 16))


def test_two_processes_train(tmp_path):
    out, _ = processes([str(ROOT / "trudi_isaaclab.py")], 2, *FLAGS, *CARTPOLE, "--log-dir", tmp_path)
    (run,) = tmp_path.iterdir()
    assert str(run) in out
    assert [event["step"] for event in events(run)] == [16, 32, 48, 64]
    assert "eval/episodic_return" in events(run)[-1]


def test_video(tmp_path):
    run = train(
        *CARTPOLE, "--log-dir", tmp_path, "--capture-video", "--total-timesteps", "16", MUJOCO_GL="egl"
    )
    video = run / "videos" / "step_16.mp4"
    assert video.stat().st_size > 5_000


def test_velocity(tmp_path):
    """A robot, with a group of observations for the critic and terrain to fall on."""
    (found,) = events(
        train("--env-id", "Mjlab-Velocity-Flat-Unitree-G1", "--log-dir", tmp_path, "--total-timesteps", "16")
    )
    assert np.isfinite(found["losses/critic"])
    assert found["eval/episodic_length"] < 1000  # it falls


# -------------------------------------------------------------------------------------------------- bad input
def refusal(code, error):
    assert code == 2, error[-2000:]
    line = error.splitlines()[-1]
    assert line.startswith("trudi_isaaclab.py: error: ")
    return line


def refused(*flags, **environment):
    began = time.perf_counter()
    process = start(*flags, **environment)
    _, error = process.communicate(timeout=100)
    assert time.perf_counter() - began < 5 * PATIENCE
    return refusal(process.returncode, error)


POSITIVE = (
    "total_timesteps num_envs num_steps num_epochs minibatch_size max_grad_norm hidden_dim num_atoms "
    "actor_learning_rate critic_learning_rate dual_learning_rate num_diffusion_steps prior_std best_of_k "
    "trust_region_bound eval_interval checkpoint_interval action_scale"
).split()


@pytest.mark.parametrize(
    "changes",
    [
        *({name: number} for name in POSITIVE for number in (0, -1)),
        dict(seed=-1),
        dict(gamma=1.0),
        dict(td_lambda=1.1),
        dict(ode_score_scale=-1.0),
        dict(v_min=10.0),
        dict(num_atoms=1),
        dict(total_timesteps=10),
        dict(minibatch_size=6),
    ],
    ids=str,
)
def test_values(changes, capsys):
    with pytest.raises(SystemExit) as stop:
        small_args(**changes)
    line = refusal(stop.value.code, capsys.readouterr().err)
    assert any(f"--{name.replace('_', '-')}" in line for name in changes)


def test_unknown_tasks():
    assert "Mjlab-Cartpole-Balance" in refused("--env-id", "Mjlab-Cartpole-Balanc", *FLAGS)
    assert "Mjlab-Short-Cartpole" in refused("--env-id", "mjlab_tasks:Mjlab-Shrt-Cartpole", *FLAGS)
    assert "Isaac-Velocity-Rough-G1" in refused("--env-id", "Velocity-Rough-G1", *FLAGS)
    assert "no_such_module" in refused("--env-id", "no_such_module:Mjlab-Task", *FLAGS)


def test_missing_simulators(monkeypatch, capsys):
    monkeypatch.setattr(trudi.util, "find_spec", lambda name: None)
    for env_id, package in (
        ("Isaac-Velocity-Rough-G1", "isaaclab==3.0.0"),
        ("Mjlab-Cartpole-Balance", "mjlab==1.6.0"),
    ):
        with pytest.raises(SystemExit) as stop:
            small_args(env_id=env_id)
        assert f"pip install {package}" in refusal(stop.value.code, capsys.readouterr().err)


def test_missing_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "--device cpu" in refused(*CARTPOLE, "--device", "gpu")


@pytest.mark.parametrize("damage", ["truncated", "emptied", "pickle", "no checkpoint", "other sizes"])
def test_damaged_checkpoints(damage, tmp_path, capsys):
    setup, state, _ = prepared(Fake())
    trudi.save_checkpoint(tmp_path, state, 16, 0.0)
    path = tmp_path / "checkpoints" / "16.pt"
    if damage == "pickle":
        torch.save({"actor": SimpleNamespace(), "wall_time": 1.0}, path)
    elif damage == "no checkpoint":
        path.unlink()
    elif damage != "other sizes":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "truncated" else 0])
    with pytest.raises(SystemExit) as stop:
        other = trudi.setup_for(setup.args, CPU, trudi.IsaacLab(setup.args, Fake(critic=False)))
        trudi.prepare(other, trudi.read_checkpoint(str(tmp_path)))
    line = refusal(stop.value.code, capsys.readouterr().err)
    assert "not of this run" in line if damage == "other sizes" else str(tmp_path) in line


def test_a_checkpoint_restores_everything_but_the_simulator(tmp_path):
    setup, state, programs = prepared(Fake())
    for _ in range(2):
        state, _ = trudi.iterate(setup, programs, state)
    trudi.save_checkpoint(tmp_path, state, 32, 1.5)
    saved = trudi.read_checkpoint(str(tmp_path))
    assert saved["wall_time"] == 1.5
    other_setup, _, _ = prepared(Fake())
    other, other_programs = trudi.prepare(other_setup, saved)
    assert other.iteration == 2
    assert torch.equal(other.statistics.mean, state.statistics.mean)
    assert torch.equal(other.statistics.variance, state.statistics.variance)
    assert list(other.learner.log_duals) == list(state.learner.log_duals)
    results = []
    for run in ((setup, programs, state), (other_setup, other_programs, other)):  # Adam's moments too
        run[0].env.reset(spread=False)
        results.append(trudi.iterate(*run)[1])
    assert results[0] == results[1]


def test_a_metric_that_is_not_finite_ends_the_run(tmp_path, capsys):
    setup, state, programs = prepared(Fake(), log_dir=str(tmp_path))
    state.learner.actor.input.weight.data.fill_(float("nan"))
    assert trudi.train(setup, programs, state, {}) == 1
    out, err = capsys.readouterr()
    run = pathlib.Path(out.splitlines()[-1])
    assert "iteration 1: losses/critic, losses/actor" in err
    assert list((run / "diverged" / "checkpoints").glob("*.pt"))
    assert not (run / "checkpoints").exists()


def test_metrics_of_any_name_are_watched():
    assert trudi.not_finite({"losses/critic": 1.0, "mine/number": float("nan")}) == ["mine/number"]


def test_an_actor_that_breaks_the_contract_ends_the_run(tmp_path):
    setup, state, programs = prepared(Fake(), log_dir=str(tmp_path))
    torch.nn.init.normal_(state.learner.actor.output.weight)
    with pytest.raises(SystemExit) as stop:
        trudi.train(setup, programs, state, {})
    assert "output layer has to start at zero" in str(stop.value.code)


@pytest.mark.parametrize(
    "space", [dict(shape=()), dict(shape=(2,), nvec=[3, 3]), dict(shape=None), dict(shape=(2, 2))], ids=str
)
def test_actions_that_are_no_vectors(space, capsys):
    fake = Fake()
    fake.single_action_space = SimpleNamespace(**space)
    with pytest.raises(SystemExit) as stop:
        prepared(fake)
    assert "continuous actions" in refusal(stop.value.code, capsys.readouterr().err)


def test_groups_that_are_no_vectors(capsys):
    env = Fake()
    env.observe = lambda prefix="": {"policy": {"joints": torch.zeros(2, 3)}}
    with pytest.raises(SystemExit) as stop:
        prepared(env)
    assert "vectors" in refusal(stop.value.code, capsys.readouterr().err)


def test_what_may_change_are_flags():
    names = {field.name for field in dataclasses.fields(trudi.Args)}
    assert {*trudi.MAY_CHANGE, *trudi.POSITIVE, *trudi.SPLIT} <= names
    assert "physics" in trudi.MAY_CHANGE and "action_scale" not in trudi.MAY_CHANGE


def test_what_is_repeated_has_not_drifted_but_for_the_simulator():
    """Functions and classes that both PyTorch scripts have are the same text."""

    def texts(name):
        tree = ast.parse((ROOT / name).read_text())
        return {x.name: ast.unparse(x) for x in tree.body if isinstance(x, ast.FunctionDef | ast.ClassDef)}

    one, other = texts("trudi_maniskill.py"), texts("trudi_isaaclab.py")
    differ = {name for name in one.keys() & other.keys() if one[name] != other[name]}
    assert differ == {"Args", "resolve", "main"}


def test_a_copy_of_the_script_has_its_own_name(tmp_path):
    (tmp_path / "my_agent.py").write_text((ROOT / "trudi_isaaclab.py").read_text())
    code = "import my_agent; print(my_agent.Args().exp_name)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["my_agent"]
    assert trudi.Args().exp_name == "trudi_isaaclab"


# ---------------------------------------------------------------------------------- Isaac Lab 2.3's interface
def start_old(tmp_path, *flags):
    """A run with the stand-in for 2.3, which writes a journal of what is called."""
    flags = (
        *FLAGS,
        "--env-id",
        "Isaac-Velocity-Flat-G1",
        "--device",
        "cpu",
        "--log-dir",
        tmp_path / "runs",
        *flags,
    )
    return start(*flags, path=f"{TESTS / 'isaaclab23'}:{TESTS}", JOURNAL=str(tmp_path / "journal"))


def test_kit_starts_before_pytorch_and_is_closed_last(tmp_path):
    """The name of 3.0 is understood, and all is on disk when Kit, closing, ends the process."""
    finish(start_old(tmp_path))
    lines = (tmp_path / "journal").read_text().splitlines()
    assert lines[0] == "AppLauncher device=cpu enable_cameras=False headless=True, PyTorch imported: False"
    assert lines[1:3] == ["parse_env_cfg Isaac-Velocity-Flat-G1-v0 device=cpu num_envs=2", "make"]
    assert lines[-2:] == ["env.close", "app.close"]
    (run,) = (tmp_path / "runs").iterdir()
    assert [event["step"] for event in events(run)] == [16, 32, 48, 64]
    assert "Episode_Reward/count" in events(run)[-1]
    assert (run / "checkpoints" / "64.pt").exists()


def test_kit_does_not_start_for_bad_input(tmp_path):
    process = start_old(tmp_path, "--gamma", "2")
    _, error = process.communicate(timeout=60)
    assert "--gamma" in refusal(process.returncode, error)
    assert not (tmp_path / "journal").exists()
