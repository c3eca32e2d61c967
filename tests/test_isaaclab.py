"""trudi_isaaclab.py around a counter with the simulators' interface: its environments, its loop, its checkpoints. The learner
is test_parity.py's, word by word."""

import dataclasses
import pathlib
import signal

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mjlab")

from isaaclab_counters import Counters  # noqa: E402
from small_isaaclab import prepared  # noqa: E402

import trudi_isaaclab as trudi  # noqa: E402


@pytest.mark.parametrize("kind", ["3.0", "2.3", "mjlab"])
def test_how_episodes_end(kind):
    """Environment 0 terminates at step 3, 1 is late at 6, 2 does both at once, which is no truncation."""
    env = prepared(Counters(kind, ends=(3, 99, 6)))[0].env
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
        setup, state, programs = prepared(Counters(kind, reuse=reuse), num_steps=12)
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
    fake = Counters(kind, ends=(3, 99))
    fake.cfg.is_finite_horizon = True
    setup, _, _ = prepared(fake)
    setup.env.reset(spread=False)
    found = [setup.env.step(torch.zeros(2, 3)) for _ in range(6)]
    assert [outcome.terminated.tolist() for outcome in found][-4:] == [[True, False], [False] * 2, [False] * 2, [True] * 2]
    assert not any(outcome.truncated.any() for outcome in found)


def test_gradients_travel_together(monkeypatch):
    """One call for each loss, whatever the number of parameters; as if the other process had twice these."""
    _, state, _ = prepared(Counters())
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
    setup, state, _ = prepared(Counters(ends=(99, 99)), capture_video=True, video_length=5)
    setup.env.env.step_dt = step_dt
    monkeypatch.setattr(setup.env, "render", lambda: int(setup.env.env.episode_length_buf[0]))
    monkeypatch.setattr("imageio.mimsave", lambda path, frames, fps: written.append((frames, fps)))
    trudi.evaluate(setup, state, tmp_path)
    assert written == [(steps, pytest.approx(fps))]


def test_later_rollouts_are_learned_from_with_the_statistics_of_their_sampling():
    """As test_maniskill.py has it."""
    setup, state, programs = prepared(Counters())
    torch.manual_seed(0)
    torch.nn.init.normal_(state.learner.actor.output.weight)
    size = setup.observation_size
    statistics = trudi.Statistics(16, torch.full((size,), 5.0), torch.full((size,), 9.0))
    state, metrics = trudi.iterate(setup, programs, state._replace(statistics=statistics, iteration=1))
    assert abs(float(metrics["trust_region/initial_kl"])) < 1e-5
    assert float(metrics["trust_region/stored_kl"]) > 1e-3
    assert state.statistics.count > 16 and state.statistics.mean.sub(5).abs().max() > 0.5


def test_the_simulator_gets_scaled_actions_of_its_own():
    setup, state, programs = prepared(Counters(), action_scale=2.5)
    with torch.no_grad():
        data = trudi.rollout(setup, programs, state.statistics)
    for sent, kept in zip(setup.env.env.actions, data.action, strict=True):
        torch.testing.assert_close(sent, 2.5 * kept)
        sent.fill_(7)  # the simulator may keep and change it
    assert data.action.abs().max() <= 0.999


def test_rollout_counts_whole_episodes_and_logs_the_simulators_means():
    setup, state, programs = prepared(Counters(ends=(4, 99)), num_steps=14)
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
    setup, state, _ = prepared(Counters())
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
    setup, _, _ = prepared(Counters(critic=False))
    assert (setup.actor_sees, setup.critic_sees, setup.observation_size) == (2, 2, 2)


def test_evaluation_counts_the_first_episode_of_each(tmp_path):
    setup, state, _ = prepared(Counters(ends=(2, 99, 4)))
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
    setup, state, _ = prepared(Counters(ends=(2, 3)))
    trudi.evaluate(setup, state, tmp_path)
    assert len(setup.env.env.actions) == 3  # all have ended


def test_an_episode_without_end_is_evaluated_up_to_the_time_limit(tmp_path):
    """Some tasks have no time-out, some set the clock back at each success."""
    fake = Counters(ends=(2, 99))
    fake.late_after = 99
    setup, state, _ = prepared(fake)
    metrics = trudi.averages(trudi.evaluate(setup, state, tmp_path))
    assert metrics["eval/episodic_return"] == (3 + 21) / 2
    assert metrics["eval/episodic_length"] == (2 + 6) / 2


@pytest.mark.parametrize("kind", ["3.0", "mjlab"])
def test_curricula_judge_no_episode_that_is_broken_off(kind, tmp_path):
    """Terrains would get easier with every evaluation, for robots that had no time to walk."""
    fake = Counters(kind, ends=(2, 3))
    setup, state, _ = prepared(fake)
    assert fake.judged == [None]  # the start
    trudi.evaluate(setup, state, tmp_path)
    assert len(fake.judged) == 3 and not any(ids is None for ids in fake.judged[1:])  # at steps 2 and 3
    fake.reset()
    assert len(fake.judged) == 4  # as before


def test_clocks_start_spread_out():
    env = Counters(ends=[99] * 60)
    setup, _, _ = prepared(env)
    assert set(env.episode_length_buf.tolist()) == set(range(6))
    setup.env.reset(spread=False)
    assert not env.episode_length_buf.any()
    assert not setup.env.episode.any()


def test_it_learns_from_termination():
    """A step costs 1 and an action beyond 0.5 ends the episode, which must be worth it."""

    class Costly(Counters):
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


def test_a_checkpoint_restores_everything_but_the_simulator(tmp_path):
    setup, state, programs = prepared(Counters())
    for _ in range(2):
        state, _ = trudi.iterate(setup, programs, state)
    trudi.save_checkpoint(tmp_path, state, 32, 1.5)
    saved = trudi.read_checkpoint(str(tmp_path))
    assert saved["wall_time"] == 1.5
    other_setup, _, _ = prepared(Counters())
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
    setup, state, programs = prepared(Counters(), log_dir=str(tmp_path))
    state.learner.actor.input.weight.data.fill_(float("nan"))
    assert trudi.train(setup, programs, state, {}) == 1
    out, err = capsys.readouterr()
    run = pathlib.Path(out.splitlines()[-1])
    assert "iteration 1: losses/critic, losses/actor" in err
    assert list((run / "diverged" / "checkpoints").glob("*.pt"))
    assert not (run / "checkpoints").exists()


def test_a_signal_during_an_evaluation_ends_the_run_after_it(tmp_path, monkeypatch):
    setup, state, programs = prepared(Counters(), log_dir=str(tmp_path), checkpoint_interval=50)
    whole = trudi.evaluate

    def interrupted(*inputs):
        signal.raise_signal(signal.SIGTERM)
        return whole(*inputs)

    monkeypatch.setattr(trudi, "evaluate", interrupted)
    assert trudi.train(setup, programs, state, {}) == 128 + signal.SIGTERM
    (path,) = tmp_path.glob("*/checkpoints/*.pt")
    assert path.stem == "32"  # of two iterations, the interval of evaluations


def test_checkpoints_are_those_named_by_steps(tmp_path):
    _, state, _ = prepared(Counters())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.pt").write_text("a user's copy")
    for step in range(16, 96, 16):
        trudi.save_checkpoint(tmp_path, state, step, 0.0)
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == ["48.pt", "64.pt", "80.pt", "best.pt"]
    assert trudi.read_checkpoint(str(tmp_path))["iteration"] == 0


def test_metrics_of_any_name_are_watched():
    assert trudi.not_finite({"losses/critic": 1.0, "mine/number": float("nan")}) == ["mine/number"]


def test_an_actor_that_breaks_the_contract_ends_the_run(tmp_path):
    setup, state, programs = prepared(Counters(), log_dir=str(tmp_path))
    torch.nn.init.normal_(state.learner.actor.output.weight)
    with pytest.raises(SystemExit) as stop:
        trudi.train(setup, programs, state, {})
    assert "output layer has to start at zero" in str(stop.value.code)


def test_what_may_change_are_flags():
    names = {field.name for field in dataclasses.fields(trudi.Args)}
    assert {*trudi.MAY_CHANGE, *trudi.POSITIVE, *trudi.SPLIT} <= names
    assert "physics" in trudi.MAY_CHANGE and "action_scale" not in trudi.MAY_CHANGE
