"""trudi_maniskill.py around counters with ManiSkill's interface: its environments, its loop, its checkpoints. test_parity.py
compares its losses with trudi_mjx.py's."""

import dataclasses
import itertools
import json
import math
import pathlib
import sys

import numpy as np
import pytest
from runner import metrics as curve
from runner import together

torch = pytest.importorskip("torch")
pytest.importorskip("mani_skill")

from maniskill_counters import Counter, Several  # noqa: E402
from small_maniskill import counter_setup, random_batch, small_args  # noqa: E402

import trudi_maniskill as trudi  # noqa: E402


def counter_env(*scenes, evaluation=True, **changes):
    """ManiSkill around counters, reset; those for evaluation have seen their episodes from the start."""
    env = trudi.ManiSkill(small_args(**changes), list(scenes), time_limit=5, evaluation=evaluation)
    env.start(0)
    return env


def test_a_success_and_a_time_out_both_bootstrap():
    env = counter_env(Counter(limit=3), Counter(limit=99))
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


def test_one_scene_of_three_is_three_of_one():
    kinds = [dict(limit=3), dict(limit=99), dict(limit=5, horizon=4)]
    one = counter_env(Several([Counter(**kind) for kind in kinds]))
    three = counter_env(*[Counter(**kind) for kind in kinds])
    assert torch.equal(one.observation, three.observation)
    assert [env.seed for env in one.scenes[0].envs] == [scene.seed for scene in three.scenes]
    for _ in range(12):
        outcomes = [env.step(torch.zeros(3, 3)) for env in (one, three)]
        assert torch.equal(one.observation, three.observation)
        for a, b in zip(*outcomes, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(one.episodes[-1], three.episodes[-1], strict=True):
            assert torch.equal(a, b)


def test_environments_are_seeded_apart(monkeypatch):
    env = counter_env(*[Counter() for _ in range(4)])
    training = counter_env(*[Counter() for _ in range(4)], evaluation=False)

    def seeds(env, iteration):
        env.start(iteration)
        return [scene.seed[0] for scene in env.scenes]

    first = seeds(env, 0)
    assert len({*first, *seeds(env, 1), *seeds(training, 0)}) == 12
    assert seeds(env, 0) == first
    monkeypatch.setattr(trudi, "RANK", 1)
    assert not {*seeds(env, 0)} & {*first}


def test_processes_draw_noise_of_their_own(monkeypatch):
    def noise(rank, *numbers):
        monkeypatch.setattr(trudi, "RANK", rank)
        trudi.seed_noise(small_args(), *numbers)
        return float(torch.randn(()))

    drawn = [noise(0, 5), noise(1, 5), noise(0, 6), noise(0, 5, 1)]
    assert len(set(drawn)) == 4 and noise(0, 5) == drawn[0]


def test_rollout_keeps_what_acted_and_counts_whole_episodes_only():
    args = small_args(num_envs=2, num_steps=12)
    setup, state, programs = counter_setup(args, [Counter(limit=99), Counter(limit=3)])
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
    setup, state, programs = counter_setup(args, [Counter(limit=99) for _ in range(4)])
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


class Passing(Counter):
    """Succeeds on its way, not at its end."""

    def step(self, action):
        *found, info = super().step(action)
        facts = info.get("final_info", info)["episode"]
        facts |= {"success_once": torch.tensor([True]), "success_at_end": torch.tensor([False])}
        return *found, info


def test_success_once_is_not_success_at_the_end(tmp_path):
    env = counter_env(Passing(limit=99), Counter(limit=99))
    found = trudi.averages(env.play(lambda observation: torch.zeros(2, 3), 0, tmp_path))
    assert found == {
        "eval/episodic_return": 15,
        "eval/episodic_return_std": 0,
        "eval/episodic_length": 5,
        "eval/success_once": 0.5,
        "eval/success_at_end": 0,
    }


def test_what_is_logged_of_targets_and_duals(monkeypatch):
    args = small_args(v_min=-1.0, v_max=1.5)
    setup, state, programs = counter_setup(args, [Counter(), Counter()])
    targets = torch.linspace(-2, 2, 16)
    monkeypatch.setattr(trudi, "critic_targets", lambda *_: targets.reshape(8, 2))
    state.learner.actor.raw_friction.data = torch.tensor([0.0, 1.0, 2.0])
    state.learner.log_duals[0].data += 1
    state, metrics = trudi.iterate(setup, programs, state)
    learner = state.learner
    friction = np.log1p(np.exp(learner.actor.raw_friction.detach().numpy())).mean()
    alpha, lambda_ = (math.exp(x.item()) for x in learner.log_duals)
    found = {name: float(x) for name, x in metrics.items()}
    assert found["critic/targets_clipped"] == np.mean([not -1 <= x <= 1.5 for x in targets])
    assert found["critic/target"] == pytest.approx(0, abs=1e-6)
    assert found["entropy/alpha"] == pytest.approx(alpha)
    assert found["trust_region/lambda"] == pytest.approx(lambda_)
    assert found["entropy/friction"] == pytest.approx(float(friction))


def test_time_goes_on_where_a_run_is_continued(tmp_path):
    args = small_args(log_dir=str(tmp_path), total_timesteps=16)
    setup, state, programs = counter_setup(args, [Counter(), Counter()])
    assert trudi.train(setup, programs, state, {"wall_time": 1000.0}) == 0
    (folder,) = tmp_path.iterdir()
    assert 1000 <= curve(folder)[0]["wall_time"] < 1100


@pytest.mark.parametrize("k", [1, 2, 10])
def test_best_of_k_has_the_largest_q(k, monkeypatch):
    """The best of K symmetric draws is negative in one case of 2^K."""
    states = 3000
    args = small_args(eval_mode="best-of-k", best_of_k=k)
    setup, state, _ = counter_setup(args, [Counter()])
    monkeypatch.setattr(trudi, "q_value", lambda args, logits: logits)
    learner = state.learner._replace(critic=lambda observation, action: action[:, 0])
    torch.manual_seed(0)
    with torch.no_grad():
        action = trudi.evaluation_action(setup, learner, torch.zeros(states, 2))
    assert action.shape == (states, 3)
    tolerance = 4 * np.sqrt(0.25 / states) if k < 10 else 0.005
    np.testing.assert_allclose((action[:, 0] < 0).float().mean(), 0.5**k, atol=tolerance)


def test_compiled_updates_are_the_same():
    """Traced as for a GPU, without generating code, which takes a minute."""
    results = []
    for compiled in (False, True):
        _, state, programs = counter_setup(small_args(), [Counter(), Counter()])
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
    setup, state, programs = counter_setup(small_args(), [Counter(), Counter()])
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


def test_wall_time_is_without_compiling(tmp_path, monkeypatch):
    """With programs whose first calls take long, by a clock of the test's own: numbers of two iterations, which are those
    without."""
    clock = itertools.count()
    late = []
    monkeypatch.setattr(trudi.time, "perf_counter", lambda: 0.01 * next(clock) + sum(late))
    rows = []
    for delay in (0, 2):
        args = small_args(log_dir=str(tmp_path / str(delay)), total_timesteps=32, eval_interval=9)
        setup, state, programs = counter_setup(args, [Counter(), Counter()])
        calls = []

        def learn(*inputs, calls=calls, delay=delay, programs=programs):
            late.append(0 if calls else delay)
            calls.append(inputs)
            return programs.update_minibatch(*inputs)

        assert trudi.train(setup, programs._replace(update_minibatch=learn), state, {}) == 0
        path, = tmp_path.glob(f"{delay}/*/metrics.jsonl")
        rows.append([json.loads(line) for line in path.read_text().splitlines()])
    assert sum(late) == 2
    for plain, slow in zip(*rows, strict=True):
        assert slow["wall_time"] < 2
        for row in (plain, slow):
            del row["wall_time"], row["charts/SPS"]
        assert plain == slow


def test_a_checkpoint_restores_everything_but_the_simulator(tmp_path):
    setup, state, programs = counter_setup(small_args(), [Counter(), Counter()])
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
    batch = random_batch(2, 3, torch.Generator().manual_seed(0))
    noise = torch.randn(3, 8, 3)
    for _ in range(2):  # Adam's moments too
        results = []
        for learner in (state.learner, other.learner):
            learner.old_actor.load_state_dict(learner.actor.state_dict())  # as every iteration does
            results.append(trudi.update_minibatch(setup.args, learner, batch, noise))
        assert torch.equal(*results)


def test_a_metric_that_is_not_finite_ends_the_run(tmp_path, capsys):
    setup, state, programs = counter_setup(small_args(log_dir=str(tmp_path)), [Counter(), Counter()])
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
    setup, state, programs = counter_setup(args, [Counter(), Counter()])
    monkeypatch.setattr(trudi, "evaluate", lambda *_: {"eval/mine": torch.tensor(value)})
    assert trudi.train(setup, programs, state, {}) == 1
    out, err = capsys.readouterr()
    assert "iteration 1: eval/mine not finite" in err
    assert list((pathlib.Path(out.splitlines()[-1]) / "diverged" / "checkpoints").glob("16.pt"))


def test_an_actor_that_breaks_the_contract_ends_the_run(tmp_path):
    setup, state, programs = counter_setup(small_args(log_dir=str(tmp_path)), [Counter(), Counter()])
    torch.nn.init.normal_(state.learner.actor.output.weight)
    with pytest.raises(SystemExit) as stop:
        trudi.train(setup, programs, state, {})
    assert "output layer has to start at zero" in str(stop.value.code)


def test_later_rollouts_are_learned_from_with_the_statistics_of_their_sampling():
    """However much these move: here the observations' mean by half, of an actor that sees the difference."""
    setup, state, programs = counter_setup(small_args(), [Counter(), Counter()])
    torch.manual_seed(0)
    torch.nn.init.normal_(state.learner.actor.output.weight)
    statistics = trudi.Statistics(16, torch.full((2,), 5.0), torch.full((2,), 9.0))
    state, metrics = trudi.iterate(setup, programs, state._replace(statistics=statistics, iteration=1))
    assert abs(float(metrics["trust_region/initial_kl"])) < 1e-5
    assert float(metrics["trust_region/stored_kl"]) > 1e-3
    assert state.statistics.count == 32 and state.statistics.mean.sub(5).abs().min() > 0.5


def test_what_may_change_are_flags():
    names = {field.name for field in dataclasses.fields(trudi.Args)}
    assert {*trudi.MAY_CHANGE, *trudi.POSITIVE, *trudi.SPLIT} <= names
    assert "gamma" not in trudi.MAY_CHANGE


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


def test_two_processes_are_one_on_the_joint_batch(tmp_path):
    """Losses, weights, duals, statistics after four minibatches, half of each in either of two processes."""
    script = tmp_path / "joint.py"
    script.write_text(JOINT)
    for world in (1, 2):
        together([sys.executable, script], world, tmp_path / f"{world}.npy")
    one, two = (np.load(tmp_path / f"{world}.npy") for world in (1, 2))
    print("largest difference:", np.abs(one - two).max())
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
