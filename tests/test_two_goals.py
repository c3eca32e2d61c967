"""benchmark/studies/two_goals: what the task pays, what counts as a goal that was found, and how paths are measured."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trudi_mjx
from benchmark.studies.two_goals import RADIUS, WIDTH, FourGoals, TwoGoals, paths


@pytest.mark.parametrize("task", [TwoGoals, FourGoals])
def test_goals_are_equal(task):
    """As far from the middle and from their neighbours, and each pays 1 on it and 1 / e at WIDTH from it."""
    env = task()
    goals = np.asarray(env.goals)
    assert len(goals) == task.num_goals
    np.testing.assert_allclose(np.linalg.norm(goals, axis=1), RADIUS, rtol=1e-6)
    gaps = np.linalg.norm(goals - np.roll(goals, 1, 0), axis=1)
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-5)
    state = env.reset(jax.random.PRNGKey(0))

    def paid(place):
        return float(env.step(state.replace(obs=jnp.asarray(place)), jnp.zeros(2)).reward)

    for goal in goals:
        np.testing.assert_allclose(paid(goal), 1, atol=1e-6)
        np.testing.assert_allclose(paid(goal * (1 - WIDTH / RADIUS)), np.exp(-1), rtol=1e-4)
    assert paid(np.zeros(2)) == pytest.approx(np.exp(-((RADIUS / WIDTH) ** 2)), rel=1e-5)


def test_actions_are_velocities_and_the_square_has_walls():
    env = TwoGoals()
    state = env.reset(jax.random.PRNGKey(0)).replace(obs=jnp.array([0.95, 0.0]))
    np.testing.assert_allclose(env.step(state, jnp.array([1.0, -0.5])).obs, [1.0, -0.05], atol=1e-6)
    starts = jax.vmap(env.reset)(jax.random.split(jax.random.PRNGKey(1), 2000)).obs
    np.testing.assert_allclose(starts.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(starts.std(0), 1 / 3**0.5, atol=0.03)


@pytest.mark.parametrize(("counts", "entropy"), [
    ([100, 100], 1), ([200, 0], 0), ([0, 3], 0), ([50] * 4, 1), ([9, 9, 0, 0], 0.5), ([1, 3], 0.811278), ([0, 0], np.nan)])
def test_behaviour_entropy(counts, entropy):
    np.testing.assert_allclose(paths.behaviour_entropy(counts), entropy, atol=1e-6)


def test_a_goal_is_found_where_the_episode_ends():
    ends = np.array([[0.7, 0.1], [-0.7, 0.0], [-0.55, 0.1], [0.0, 0.0], [0.7, 0.21]])
    places = np.stack([np.tile([0.7, 0.0], (5, 1)), ends])  # all were at the first one before
    assert paths.found_goals(places, np.array([[0.7, 0.0], [-0.7, 0.0]])) == [1, 2]


def test_a_run_is_played_from_the_middle(tmp_path):
    """By a policy that goes where its noise says: to the right or to the left, along the line of the goals."""
    args = trudi_mjx.resolve(trudi_mjx.Args(env_id="benchmark.studies.two_goals:TwoGoals", preset="cpu", device="cpu"))
    setup = trudi_mjx.make_setup(args)

    def evaluation_action(setup, learner, inputs, key):
        side = jnp.sign(jax.random.normal(jax.random.PRNGKey(3), (len(inputs.actor), 1)))
        speed = 0.175 if setup.args.eval_mode == "sde" else 0.0  # in 40 steps of 0.1 s to the goal
        return jnp.concatenate([speed * side, 0 * side], 1)

    script = SimpleNamespace(**{**vars(trudi_mjx), "evaluation_action": evaluation_action})
    state = SimpleNamespace(learner=(), statistics=trudi_mjx.Statistics(jnp.ones(1), jnp.ones((1, 2, 2))))
    options = paths.Options(runs=(), episodes=50)
    places, rewards = paths.play(script, setup, state, dict(eval_mode="sde"), options)
    assert places.shape == (40, 50, 2) and rewards.shape == (40, 50)
    np.testing.assert_allclose(np.abs(places[0]), [[0.0175, 0]] * 50, atol=1e-6)
    counts = paths.found_goals(places, np.asarray(setup.env.goals))
    assert sum(counts) == 50 and min(counts) > 10
    places, _ = paths.play(script, setup, state, dict(eval_mode="ode"), options)
    assert (places == 0).all() and paths.found_goals(places, np.asarray(setup.env.goals)) == [0, 0]


def test_what_the_critic_prefers():
    """Of Q = 3 u_x + u_y and alpha = 0.5, steps to the right and to the left are 2 * 3 / 0.5 nats apart."""
    setup = SimpleNamespace(env=FourGoals(), args=None)
    statistics = trudi_mjx.Statistics(jnp.ones(1), jnp.ones((1, 2, 2)))

    def script(q_value):
        return SimpleNamespace(ACTION_LIMIT=1.0, normalize=lambda _, place: place, **q_value)

    class Critic:
        def __call__(self, place, action):
            assert not place.any()
            return action

    jax.tree_util.register_static(Critic)
    learner = {"critic": Critic(), "duals": {"log_alpha": jnp.log(jnp.array([0.5]))}}
    Learner = trudi_mjx.Learner(**dict.fromkeys(trudi_mjx.Learner._fields) | learner)
    state = SimpleNamespace(learner=Learner, statistics=statistics)
    q_value = dict(q_value=lambda _, action: 3 * action[:, 0] + action[:, 1])
    assert paths.preference(script(q_value), setup, state) == pytest.approx(16, rel=1e-5)
    setup.env = TwoGoals()
    assert paths.preference(script(q_value), setup, state) == pytest.approx(12, rel=1e-5)
    assert np.isnan(paths.preference(script({}), setup, state))


def test_table_and_picture(tmp_path):
    same = {"task": "TwoGoals", "return": 2.0, "found": 1.0, "goals": [1, 1], "critic_prefers": 0.5}
    rows = [same | dict(algorithm=name, seed=seed, acts=mode, entropy=float(seed))
            for name in ("a", "b") for seed in (0, 1) for mode in ("mode", "sample")]
    table = paths.pd.DataFrame(rows)
    rows = [" ".join(line.split()) for line in paths.as_markdown(table).splitlines()]  # without the columns' padding
    assert "| TwoGoals | a | sample | 2 | 2.00 | 1.00 | 0.50 | 0.00, 1.00 | 0.50, 0.50 |" in rows
    found = {"goals": np.eye(2), "mode": np.zeros((4, 3, 2)), "sample": np.ones((4, 3, 2))}
    paths.draw(table, {("TwoGoals", name): [found, found] for name in ("a", "b")}, tmp_path / "paths.png")
    assert (tmp_path / "paths.png").stat().st_size > 1000
