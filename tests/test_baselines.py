"""benchmark/baselines: what they share with trudi_mjx.py is the same text, their losses are their papers', and they run."""

import ast
import dataclasses
import importlib
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import Sim, lively_actor
from probes import small_args as trudi_args
from scipy.stats import norm
from test_runs import CLIFF, Runner, curve, metrics

import trudi_mjx
from benchmark.baselines import dime_mjx as dime
from benchmark.baselines import dppo_mjx as dppo
from benchmark.baselines import fpo_mjx as fpo
from benchmark.baselines import ppo_mjx as ppo
from benchmark.baselines import reppo_mjx as reppo
from benchmark.baselines import spo_mjx as spo

FOLDER = pathlib.Path(reppo.__file__).parent
# The functions, classes and constants that a baseline has in common with trudi_mjx.py by name, but not by text.
OWN = {
    "reppo_mjx": "PAPER CPU CPU_HUMANOID Args MAY_CHANGE POSITIVE check_numbers Actor Critic Batch critic_loss actor_loss "
                 "update_minibatch update_epochs Transition sample_policy rollout critic_targets update evaluation_action "
                 "check_contract",
    "dime_mjx": "CPU_HUMANOID Args POSITIVE Actor Learner Batch actor_loss dual_loss update_minibatch update_epochs Transition "
                "init_state rollout update train"}
VALUE_BASED = (
    "SUITE PAPER CPU CPU_HUMANOID Args MAY_CHANGE POSITIVE check_numbers Actor Critic Learner Batch Optimizers make_optimizers "
    "critic_loss actor_loss update_minibatch update_epochs Transition init_state sample_policy rollout update "
    "evaluation_action")
OWN |= dict.fromkeys(("ppo_mjx", "spo_mjx"), VALUE_BASED + " train")
OWN |= {"dppo_mjx": VALUE_BASED + " Trajectory Chain sample_chain TrainState iterate",
        "fpo_mjx": VALUE_BASED + " TIME_FEATURES init_statistics iterate train"}
NO_EXPORT = " MAY_CHANGE COMMAND_LINE_ONLY check_args main"  # which trudi_mjx.py alone does
OWN = {name: words + NO_EXPORT for name, words in OWN.items()}
NAMES = sorted(OWN)
SIZES = dict(preset="cpu", num_envs=16, num_steps=8, minibatch_size=64, hidden_dim=16, num_eval_envs=4, total_timesteps=1280)


def script_of(name):
    return importlib.import_module(f"benchmark.baselines.{name}")


def small_args(script, **changes):
    args = script.resolve(script.Args(**{**SIZES, **changes}))
    script.check_args(args)
    return args


def normals(seed, *shape):
    return jax.random.normal(jax.random.PRNGKey(seed), shape)


# ---------------------------------------------------------------------------------------------------------- the files
def definitions(path):
    """Functions, classes and constants at a module's top, by name, as they are written, in their order."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_source_segment(source, node)
        if isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.get_source_segment(source, node)
    return found


def test_every_baseline_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*_mjx.py")) == NAMES  # test_baselines_pytorch.py has PyTorch's


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_its_own_is_trudis(name):
    """And what is said to be its own differs, so that the list above says how a baseline differs from trudi_mjx.py."""
    trudi, own = (definitions(path) for path in (pathlib.Path(trudi_mjx.__file__), FOLDER / f"{name}.py"))
    shared = [x for x in own if x in trudi]
    assert {x for x in shared if own[x] != trudi[x]} == set(OWN[name].split())
    assert shared == [x for x in trudi if x in own]
    assert len(shared) > 60


def test_dimes_actor_is_trudis_but_for_its_docstring():
    """Which says what a replacement must keep; less than TruDi's, as nothing is computed on stored chains."""
    actors = []
    for script in (trudi_mjx, dime):
        nodes = ast.parse(pathlib.Path(script.__file__).read_text()).body
        actor = next(node for node in nodes if getattr(node, "name", None) == "Actor")
        actors.append(ast.unparse(actor.body[1:]))
    assert actors[0] == actors[1]


@pytest.mark.parametrize("name", NAMES)
def test_header_and_length(name):
    path = FOLDER / f"{name}.py"
    lines, trudi = path.read_text().splitlines(), pathlib.Path(trudi_mjx.__file__).read_text().splitlines()
    assert len(lines) < len(trudi)
    trudi = [line for line in trudi if "jax2onnx" not in line]  # baselines export nothing
    header = trudi.index("# ///") + 1
    assert lines[:header] == trudi[:header]  # what it requires
    assert f"python benchmark/baselines/{name}.py" in script_of(name).__doc__
    assert "arXiv" in script_of(name).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_common_flags_are_trudis(name):
    """The same names, types, defaults and order; but each has its own exp_name and ways to evaluate."""
    script = script_of(name)
    own, trudi = ({field.name: field for field in dataclasses.fields(x.Args)} for x in (script, trudi_mjx))
    assert list(own)[:6] == list(trudi)[:6]
    names = list(trudi)
    assert list(own)[list(own).index("device"):] == [x for x in names[names.index("device"):] if x in own]
    for x in (own.keys() & trudi.keys()) - {"exp_name", "eval_mode", "target_entropy_scale", "max_grad_norm"}:
        assert (own[x].type, own[x].default) == (trudi[x].type, trudi[x].default), x
    assert own["exp_name"].default == script.SCRIPT == name


# --------------------------------------------------------------------------------------------------------------- REPPO
MEAN, STD = np.array([[0.3, -1.2], [0.0, 0.5], [2.0, -0.1]]), np.array([[0.5, 1.1], [0.2, 2.0], [0.7, 0.05]])


def gaussian(mean, std):
    """An actor of given Gaussians."""
    return lambda observation: (jnp.asarray(mean), jnp.asarray(std))


def kl_on_a_grid(mean, std, new_mean, new_std):
    """KL (B,) by numerical integration, each action dimension for itself."""
    x = np.linspace(-25, 25, 200_001)[:, None, None]
    log_old, log_new = norm.logpdf(x, mean, std), norm.logpdf(x, new_mean, new_std)
    return (np.exp(log_old) * (log_old - log_new)).sum((0, 2)) * (x[1, 0, 0] - x[0, 0, 0])


def test_reppo_entropy_is_that_of_a_squashed_gaussian():
    """Against scipy's density and the change of variables u = tanh(x), dx/du = 1 / (1 - u^2)."""
    sample = reppo.sample_gaussian(gaussian(MEAN, STD), jnp.zeros((3, 1)), 0.5 * normals(1, 3, 2))
    u = np.asarray(sample.action, np.float64)
    log_density = (norm.logpdf(np.arctanh(u), MEAN, STD) - np.log(1 - u**2)).sum(-1)
    np.testing.assert_allclose(sample.entropy, -log_density, rtol=1e-3)
    mass = np.linspace(-1, 1, 100_003)[1:-1]  # and that density integrates to 1
    assert np.isclose((norm.pdf(np.arctanh(mass), 0.3, 0.5) / (1 - mass**2)).sum() * (mass[1] - mass[0]), 1, atol=1e-4)


def test_reppo_kl():
    new_mean, new_std = MEAN + np.array([[0.1, 0.3]]), STD * np.array([[1.3], [0.6], [1.0]])
    kl = reppo.gaussian_kl(gaussian(new_mean, new_std), jnp.zeros((3, 1)), jnp.asarray(MEAN), jnp.asarray(STD))
    np.testing.assert_allclose(kl, kl_on_a_grid(MEAN, STD, new_mean, new_std), rtol=1e-4)


def test_reppo_split_loss():
    """A violated state has lambda KL, any other -alpha entropy - Q."""
    args = small_args(reppo, v_min=-10.0, v_max=10.0, num_atoms=2)
    noise, shift = normals(2, 3, 2), np.array([[0.0, 0.0], [0.0, 0.0], [0.3, 0.0]])
    zeros = jnp.zeros((3, 1))
    batch = reppo.Batch(zeros, zeros, None, jnp.asarray(MEAN), jnp.asarray(STD), None, None, None)

    def critic(observation, action):  # Q = 4 u_1 of atoms at -10 and 10
        p = 0.5 + 0.2 * action[:, 0]
        return jnp.stack([jnp.zeros_like(p), jnp.log(p / (1 - p))], -1)

    duals = {"log_alpha": jnp.log(0.3), "log_lambda": jnp.log(2.0)}
    u = np.tanh(MEAN + shift + STD * np.asarray(noise))
    entropy = (np.log(STD) + np.log(2 * np.pi) / 2 + np.asarray(noise) ** 2 / 2 + np.log(1 - u**2)).sum(-1)
    better, far = -0.3 * entropy - 4 * u[:, 0], (0.3 / 0.7) ** 2 / 2
    for bound, parts in ((0.05, [better[0], better[1], 2 * far]), (0.2, better)):
        bounded = dataclasses.replace(args, trust_region_bound=bound)
        loss, (entropy_of_loss, kl) = reppo.actor_loss(gaussian(MEAN + shift, STD), bounded, critic, duals, batch, noise)
        np.testing.assert_allclose(kl, [0, 0, far], atol=1e-5)
        np.testing.assert_allclose(entropy_of_loss, entropy, rtol=1e-3)
        np.testing.assert_allclose(loss, np.mean(parts), rtol=1e-4)


def test_reppo_critic_is_trudis():
    """With the same weights, at the same inputs."""
    args, shape = small_args(reppo), (5, 2)
    own, trudi = (script.Critic(args, *shape, script.nnx.Rngs(0)) for script in (reppo, trudi_mjx))
    seen, action = normals(4, 30, 5), normals(5, 30, 2)
    np.testing.assert_allclose(own(seen, action), trudi(seen, action), rtol=1e-5)


def test_reppo_auxiliary_loss():
    """Squared errors of features and reward that follow, unless the episode terminated; weighed, and off by default."""
    seen, action, following = normals(4, 6, 5), normals(5, 6, 2), normals(6, 6, 17)
    terminated = jnp.arange(6) == 4
    batch = reppo.Batch(None, seen, action, None, None, jnp.ones(6), following.at[4].set(jnp.nan), terminated)
    args = small_args(reppo, aux_loss_scale=0.7)
    critic = reppo.Critic(args, 5, 2, reppo.nnx.Rngs(0))
    without = dataclasses.replace(args, aux_loss_scale=0.0)
    assert reppo.critic_loss(critic, small_args(reppo), batch) == reppo.critic_loss(critic, without, batch)
    error = np.asarray(critic.predict(seen, action) - following) ** 2
    extra = reppo.critic_loss(critic, args, batch) - reppo.critic_loss(critic, without, batch)
    np.testing.assert_allclose(extra, 0.7 * np.delete(error, 4, 0).mean(-1).sum() / 6, rtol=1e-3)
    assert not hasattr(reppo.Critic(without, 5, 2, reppo.nnx.Rngs(0)), "prediction_output")


def test_reppo_predicts_what_follows():
    """Features of the true next observations and fresh actions there, and rewards, in the rows of their states."""
    args = small_args(reppo, aux_loss_scale=1.0, num_epochs=1, minibatch_size=128)
    setup = reppo.Setup(args, Aim(), 1, 1, jax.sharding.Mesh(jax.devices()[:1], ("env",)))
    state = jax.jit(lambda key: reppo.init_state(setup, key))(jax.random.PRNGKey(1))
    _, data = reppo.rollout(setup, state.learner.actor, state.statistics, state.env_state, jax.random.PRNGKey(2))
    inputs, next_inputs = (reppo.network_inputs(x) for x in (data.observation, data.next_observation))
    _, features = reppo.critic_targets(setup, state.learner, data, next_inputs, jax.random.PRNGKey(3))
    keys = jax.random.split(jax.random.PRNGKey(3), args.num_steps)
    action = jax.vmap(lambda x, key: reppo.sample_policy(setup, state.learner.actor, x, key).action)(next_inputs.actor, keys)
    np.testing.assert_allclose(features, state.learner.critic.features(next_inputs.critic, action), rtol=1e-4, atol=1e-5)
    seen = []
    learn = jax.tree_util.Partial(lambda *x: seen.append(x[2]) or (x[1], {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reppo, "update_epochs", learn)
        reppo.update(setup, state.learner, data, inputs, next_inputs, list(jax.random.split(jax.random.PRNGKey(4), 3)))
    np.testing.assert_allclose(seen[0].following[:, -1], data.reward.swapaxes(0, 1).ravel(), rtol=1e-5)
    np.testing.assert_array_equal(seen[0].terminated, data.terminated.swapaxes(0, 1).ravel())
    assert seen[0].following.shape == (128, args.hidden_dim + 1)


def test_reppo_starts_as_a_standard_normal():
    args = small_args(reppo)
    mean, std = reppo.Actor(args, 5, 3, reppo.nnx.Rngs(0))(normals(3, 40, 5))
    np.testing.assert_array_equal(mean, np.zeros((40, 3)))
    np.testing.assert_array_equal(std, np.ones((40, 3)))


# --------------------------------------------------------------------------------------------------------- PPO and SPO
def test_gaussian_log_density_and_kl():
    action = MEAN + np.array([[0.2, -0.7]])
    expected = norm.logpdf(action, MEAN, STD).sum(-1)
    new_mean, new_std = MEAN + np.array([[0.1, 0.3]]), STD * np.array([[1.3], [0.6], [1.0]])
    for script in (ppo, spo):
        np.testing.assert_allclose(script.log_density(*map(jnp.asarray, (action, MEAN, STD))), expected, rtol=1e-4)
        kl = script.gaussian_kl(*map(jnp.asarray, (MEAN, STD, new_mean, new_std)))
        np.testing.assert_allclose(kl, kl_on_a_grid(MEAN, STD, new_mean, new_std), rtol=1e-4)


@pytest.mark.parametrize("script", [ppo, spo, dppo, fpo])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_advantages_are_sums_of_errors(script, gae_lambda):
    """With a termination, a time-out or neither at every step, and at random everywhere."""
    steps, rng = 9, np.random.default_rng(1)
    chance = rng.random((2, 100, steps)) < np.array([0.15, 0.2])[:, None, None]
    single, none = np.eye(steps, dtype=bool), np.zeros((steps, steps), bool)
    terminated, truncated = (np.concatenate(x) for x in (([none, single, none, chance[0]]), ([none, none, single, chance[1]])))
    truncated &= ~terminated
    reward, value, next_value = rng.normal(size=(3, *terminated.shape))
    args = dataclasses.replace(small_args(script), gamma=0.9, gae_lambda=gae_lambda)
    found = script.advantages(args, *(jnp.asarray(x.T) for x in (reward, terminated, truncated, value, next_value)))
    expected = np.zeros_like(reward)
    for i, t in np.ndindex(*reward.shape):
        for k in range(t, steps):
            error = reward[i, k] + 0.9 * (0 if terminated[i, k] else next_value[i, k]) - value[i, k]
            expected[i, t] += (0.9 * gae_lambda) ** (k - t) * error
            if terminated[i, k] or truncated[i, k]:
                break
    np.testing.assert_allclose(np.asarray(found).T, expected, atol=2e-5)


@pytest.mark.parametrize("script", [ppo, spo, dppo, fpo])
def test_a_termination_cuts_off_what_is_not_finite(script):
    """Of a simulation that diverged, the value after its end is NaN."""
    terminated, ones = jnp.array([[False], [True], [False]]), jnp.ones((3, 1))
    found = script.advantages(small_args(script), ones, terminated, terminated & False, 0 * ones,
                              jnp.where(terminated, jnp.nan, 1.0))
    assert np.isfinite(found).all()
    assert found[1, 0] == 1


def slopes(script, ratios, advantage, z=3.0, **changes):
    """The loss, and its slopes in the means of standard normals, moved until the ratios of an action z are these."""
    args = small_args(script, **{"entropy_scale": 0.0, **changes})
    moved = z - np.sqrt(z**2 - 2 * np.log(ratios))  # log r = d z - d^2 / 2
    zeros, ones = jnp.zeros((len(ratios), 1)), jnp.ones((len(ratios), 1))
    batch = script.Batch(zeros, zeros, z * ones, zeros, ones, jnp.asarray(advantage), None)
    def loss(d):
        return script.actor_loss(lambda observation: (d, ones), args, batch)
    value, slope = jax.value_and_grad(lambda d: loss(d)[0])(jnp.asarray(moved)[:, None])
    np.testing.assert_allclose(loss(jnp.asarray(moved)[:, None])[1][0], ratios, rtol=1e-4)
    return float(value), np.asarray(slope)[:, 0] * len(ratios), ratios * (z - moved)


def test_clipped_loss():
    """Its gradient is that of r A, but 0 where r is beyond 1 +- epsilon on the side to which A pulls."""
    ratios, advantage = np.tile([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0], 2), np.repeat([1.5, -0.5], 7)
    value, slope, unit = slopes(ppo, ratios, advantage)
    clipped = np.clip(ratios, 0.8, 1.2)
    np.testing.assert_allclose(value, -np.minimum(ratios * advantage, clipped * advantage).mean(), rtol=1e-4)
    stopped = np.where(advantage > 0, ratios > 1.2, ratios < 0.8)
    assert stopped.sum() == 4
    np.testing.assert_allclose(slope, np.where(stopped, 0, -advantage * unit), atol=1e-4)


def test_penalised_loss():
    """It is best at r = 1 + epsilon sign(A), and its gradient leads back from beyond."""
    advantage = np.array([1.5, -0.5])
    for epsilon in (0.2, 0.1):
        best = 1 + epsilon * np.sign(advantage)
        value, slope, _ = slopes(spo, best, advantage, epsilon=epsilon)
        np.testing.assert_allclose(slope, 0, atol=1e-4)
        np.testing.assert_allclose(value, -(advantage + np.abs(advantage) * epsilon / 2).mean(), rtol=1e-4)
        for ratios in (best * 1.05, best * 0.95):
            more, slope, unit = slopes(spo, ratios, advantage, epsilon=epsilon)
            assert more > value
            np.testing.assert_allclose(slope, -unit * (advantage - np.abs(advantage) / epsilon * (ratios - 1)), atol=1e-4)
            assert np.all(np.sign(slope) == np.sign(ratios - best))


@pytest.mark.parametrize("script", [ppo, spo])
def test_entropy_is_rewarded(script):
    args, advantage = small_args(script, entropy_scale=0.3), jnp.array([1.0, -2.0, 0.5])
    batch = script.Batch(jnp.zeros((3, 1)), None, jnp.asarray(MEAN), jnp.asarray(MEAN), jnp.asarray(STD), advantage, None)
    loss, (ratio, entropy, kl) = script.actor_loss(gaussian(MEAN, STD), args, batch)
    expected = norm.entropy(0, STD).sum(-1)
    np.testing.assert_allclose(entropy, expected, rtol=1e-4)
    np.testing.assert_allclose(loss, -(np.asarray(advantage) + 0.3 * expected).mean(), rtol=1e-4)
    np.testing.assert_allclose(ratio, 1, rtol=1e-6)
    np.testing.assert_allclose(kl, 0, atol=1e-6)


@pytest.mark.parametrize("script", [ppo, spo, dppo, fpo])
def test_value_loss(script):
    given = dict(critic_observation=jnp.array([[1.0], [4.0]]), target=jnp.array([2.0, 0.0]))
    batch = script.Batch(**dict.fromkeys(script.Batch._fields) | given)
    assert script.critic_loss(lambda observation: observation[:, 0], small_args(script), batch) == (1 + 16) / 2
    assert script.Critic(small_args(script), 5, script.nnx.Rngs(0))(normals(1, 7, 5)).shape == (7,)


def test_ppos_learning_rate_follows_the_kl():
    args = small_args(ppo, desired_kl=0.01)
    for rate, kl, expected in ((1e-3, 0.021, 1e-3 / 1.5), (1e-3, 0.019, 1e-3), (1e-3, 0.006, 1e-3), (1e-3, 0.004, 1.5e-3),
                               (1.2e-5, 1.0, 1e-5), (9e-3, 0.0, 1e-2)):
        np.testing.assert_allclose(ppo.adapt(jnp.asarray(rate), args, jnp.asarray(kl)), expected, rtol=1e-5)


@pytest.mark.parametrize("script, network, rate", [
    (spo, "actor", "learning_rate"), (spo, "critic", "learning_rate"), (fpo, "actor", "learning_rate"),
    (dppo, "actor", "actor_learning_rate"), (dppo, "critic", "critic_learning_rate")])
def test_learning_rates_stay(script, network, rate):
    """Adam's steps are of the rate itself while gradients are alike, whatever the number of steps to come."""
    for steps in (1280, 12800):
        args = small_args(script, max_grad_norm=1e3, total_timesteps=steps, **{rate: 7e-4})
        optimizer = getattr(script.make_optimizers(args), network)

        def step(state, _, optimizer=optimizer):
            update, state = optimizer.update(jnp.ones(()), state)
            return state, -update

        _, sizes = jax.lax.scan(step, optimizer.init(jnp.zeros(())), None, 100)
        np.testing.assert_allclose(sizes, 7e-4, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------- DIME
def test_dime_has_trudis_loss_without_its_trust_region():
    """Value and gradient of TruDi's with no state violated; with all violated, TruDi's is another."""
    args = trudi_args(num_diffusion_steps=2, num_atoms=2, v_min=-10.0, v_max=10.0)
    old, actor = lively_actor(args, 3, 2, seed=3), lively_actor(args, 3, 2, seed=4)
    graph, params = trudi_mjx.nnx.split(actor)
    seen, noise = normals(5, 24, 3), normals(6, 3, 24, 2)
    chain = trudi_mjx.sample_chain(old, seen, normals(7, 3, 24, 2))
    duals = {"log_alpha": jnp.log(0.3), "log_lambda": jnp.log(2.0)}

    def critic(observation, action):  # Q = 2 (u_1 + u_2) of atoms at -10 and 10
        p = 0.5 + 0.1 * action.sum(-1)
        return jnp.stack([jnp.zeros_like(p), jnp.log(p / (1 - p))], -1)

    def trudis(params, bound):
        batch = trudi_mjx.Batch(seen, seen, None, chain.trajectory, None)
        bounded = dataclasses.replace(args, trust_region_bound=bound)
        actor = trudi_mjx.nnx.merge(graph, params)
        return trudi_mjx.actor_loss(actor, bounded, old, critic, duals, batch, noise)[0]

    def dimes(params):
        batch = dime.Batch(seen, seen, None, None)
        own = small_args(dime, num_diffusion_steps=2, num_atoms=2, v_min=-10.0, v_max=10.0)
        return dime.actor_loss(trudi_mjx.nnx.merge(graph, params), own, critic, {"log_alpha": jnp.log(0.3)}, batch, noise)[0]

    value, gradient = jax.value_and_grad(dimes)(params)
    free, violated = (jax.value_and_grad(trudis)(params, bound) for bound in (np.inf, 0.0))
    assert value == free[0] != violated[0]
    for own, same, other in zip(*map(jax.tree.leaves, (gradient, free[1], violated[1])), strict=True):
        np.testing.assert_allclose(own, same, atol=1e-6)
        assert np.abs(own - other).max() > 1e-3


def test_dime_alpha():
    """It falls iff the policy is noisier than its target; and there is no other dual, nor a flag of a trust region."""
    args = small_args(dime, target_entropy_scale=0.7)
    for surplus in (-0.4, 0.4):
        gradient = jax.grad(dime.dual_loss)({"log_alpha": jnp.log(0.5)}, args, -2.1 + surplus + jnp.array([-1.0, 1.0]), 3)
        np.testing.assert_allclose(gradient["log_alpha"], 0.5 * surplus, rtol=1e-4)
    assert {field.name for field in dataclasses.fields(trudi_mjx.Args)} - set(vars(args)) == {"trust_region_bound", "export"}


# ---------------------------------------------------------------------------------------------------------------- DPPO
@dataclasses.dataclass(eq=False)
class Predictor:
    """An actor of DPPO that predicts a given function of state, step and latents."""

    f: callable
    num_steps: int = 4

    def embed(self, observation):
        return observation, jnp.arange(1.0, self.num_steps + 1)[:, None]

    def __call__(self, observation_part, time_part, latent):
        return self.f(observation_part, time_part, latent)


def dppo_mean(f, plan, state, n, latent):
    """The mean of a^(n-1) in double precision."""
    k = n - 1
    return plan.from_action[k] * np.clip(f(np, state, n, latent), -1, 1) + plan.from_latent[k] * latent


def wiggle(xp, state, n, a):
    return xp.sin(2 * a + 0.3 * n) + 0.2 * state


def wobble(xp, state, n, a):
    return xp.sin(2 * a + 0.4 * n) + 0.1 * state


def old_chains(n_steps=4, least_std=0.1):
    """Observations, chains of `wiggle` and their noise, NumPy's schedule."""
    seen, noise = normals(8, 50, 1), normals(9, n_steps + 1, 50, 2)
    chain = dppo.sample_chain(Predictor(lambda *x: wiggle(jnp, *x), n_steps), seen, noise, least_std)
    return seen, noise, chain, dppo.Schedule(*(np.asarray(x, np.float64) for x in dppo.make_schedule(n_steps)))


@pytest.mark.parametrize("n_steps", [1, 4, 8])
def test_dppo_schedule_is_the_posterior(n_steps):
    """Of a^(n-1), by completing the square: of its density given the action, times that of a^n given a^(n-1)."""
    plan = dppo.Schedule(*(np.asarray(x, np.float64)[:, 0] for x in dppo.make_schedule(n_steps)))
    before = (np.cos(np.pi / 2 * (np.arange(n_steps) / n_steps + 0.008) / 1.008) / np.cos(np.pi / 2 * 0.008 / 1.008)) ** 2
    step = np.append(before[1:] / before[:-1], 0.001)  # 1 - beta, of which the last would be 0
    for n in range(1, n_steps):  # where the variance is not 0
        precision = 1 / (1 - before[n]) + step[n] / (1 - step[n])
        np.testing.assert_allclose(plan.std[n] ** 2, 1 / precision, rtol=1e-3)
        np.testing.assert_allclose(plan.from_action[n], np.sqrt(before[n]) / (1 - before[n]) / precision, rtol=1e-3)
        np.testing.assert_allclose(plan.from_latent[n], np.sqrt(step[n]) / (1 - step[n]) / precision, rtol=1e-3)
    np.testing.assert_allclose([plan.from_action[0], plan.from_latent[0], plan.std[0]], [1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("least_std", [0.1, 0.0])
def test_dppo_chain(least_std):
    seen, noise, chain, plan = old_chains(least_std=least_std)
    latents, means = (np.asarray(x, np.float64) for x in chain.trajectory)
    noise = np.asarray(noise)
    np.testing.assert_array_equal(latents[:, 4], noise[4])
    np.testing.assert_array_equal(chain.action, latents[:, 0])
    for n in range(1, 5):
        mean = dppo_mean(wiggle, plan, np.asarray(seen), n, latents[:, n])
        np.testing.assert_allclose(means[:, n - 1], mean, atol=1e-4)
        np.testing.assert_allclose(latents[:, n - 1], mean + np.maximum(plan.std[n - 1], least_std) * noise[n - 1], atol=1e-4)
    assert np.allclose(chain.action, means[:, 0]) == (least_std == 0)


@pytest.mark.parametrize("n_steps", [1, 4])
def test_dppo_loss_of_every_denoising_step(n_steps):
    """Against scipy's densities of each step, summed up in NumPy."""
    seen, _, chain, plan = old_chains(n_steps)
    args, advantage = small_args(dppo, num_diffusion_steps=n_steps, epsilon=0.03), np.asarray(normals(10, 50))
    batch = dppo.Batch(seen, None, chain.trajectory, jnp.asarray(advantage), None)
    loss, (outside, kl) = dppo.actor_loss(Predictor(lambda *x: wobble(jnp, *x), n_steps), args, batch)
    latents, total, distance, beyond = np.asarray(chain.trajectory.latents, np.float64), 0.0, 0.0, []
    for n in range(1, n_steps + 1):
        std = np.maximum(plan.std[n - 1], 0.1)
        means = [dppo_mean(f, plan, np.asarray(seen), n, latents[:, n]) for f in (wiggle, wobble)]
        old, new = (norm.logpdf(latents[:, n - 1], mean, std) for mean in means)
        ratio = np.exp((new - old).mean(-1))
        total -= np.minimum(ratio * advantage, np.clip(ratio, 0.97, 1.03) * advantage).mean() / n_steps
        distance = distance + ((means[0] - means[1]) ** 2 / (2 * std**2)).sum(-1)
        beyond.append(np.abs(ratio - 1) > 0.03)
    np.testing.assert_allclose(loss, total, rtol=2e-3)
    np.testing.assert_allclose(kl, distance, rtol=2e-3, atol=1e-4)
    assert (np.asarray(outside) != np.stack(beyond, -1)).mean() < 0.02  # rounding
    assert 0.1 < np.mean(beyond) < 1 or n_steps == 1
    same, (outside, kl) = dppo.actor_loss(Predictor(lambda *x: wiggle(jnp, *x), n_steps), args, batch)
    np.testing.assert_allclose(same, -advantage.mean(), atol=1e-3)
    np.testing.assert_allclose(kl, 0, atol=1e-5)


def test_dppo_rewards_are_scaled():
    """By the standard deviation of all discounted sums so far, here summed up in NumPy; no larger than 10."""
    args, rng = small_args(dppo, gamma=0.9), np.random.default_rng(3)
    sizes = (3, 40, 5)  # rollouts, steps, environments
    reward, ended = rng.normal(2, 5, sizes), rng.random(sizes) < 0.1
    reward[0, 0, 0] = 1e4  # in one sum of 200, and so 14 of their deviations
    ended[0, 0, 0] = True
    scale = dppo.RewardScale(dppo.init_statistics(jnp.zeros((5, 1))), jnp.zeros(5))
    sums, now = [], np.zeros(5)
    for k in range(3):
        for t in range(40):
            now = 0.9 * now + reward[k, t]
            sums.append(now)
            now = np.where(ended[k, t], 0, now)
        scale, scaled = dppo.scale_rewards(args, scale, jnp.asarray(reward[k]), jnp.asarray(ended[k]))
        np.testing.assert_allclose(scaled, np.clip(reward[k] / np.std(sums), -10, 10), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(scale.total, now, rtol=1e-4, atol=1e-3)
        assert (np.abs(scaled).max() == 10) == (k == 0)  # of the one large reward


# ----------------------------------------------------------------------------------------------------------------- FPO
def draws(count=30):
    """Latents, draws of noise and of time."""
    time = jax.random.uniform(jax.random.PRNGKey(13), (count, 8, 1), minval=0.01)
    return normals(11, count, 2), normals(12, count, 8, 2), time


def test_matching_loss_of_known_velocities():
    latent, noise, time = draws()
    right = fpo.matching_loss(lambda seen, x, t: (x - latent[:, None]) / t, jnp.zeros((30, 1)), latent, noise, time)
    np.testing.assert_allclose(right, 0, atol=1e-5)
    still = fpo.matching_loss(lambda seen, x, t: 0 * x, jnp.zeros((30, 1)), latent, noise, time)
    expected = ((1 - time) * (noise - latent[:, None])) ** 2
    np.testing.assert_allclose(still, expected.mean((1, 2)), rtol=1e-4)
    seen = fpo.matching_loss(lambda seen, x, t: seen[..., :1] + 0 * x, latent, latent, noise, time)
    expected = (1 - time) ** 2 * (noise - latent[:, None] - latent[:, None, :1]) ** 2
    np.testing.assert_allclose(seen, expected.mean((1, 2)), rtol=1e-4)


def test_flow_is_integrated():
    class Velocity:
        num_steps = 10

        def __init__(self, f):
            self.f = f

        def __call__(self, seen, latent, time):
            return self.f(latent, time)

    noise = normals(14, 20, 2)
    for f, end in ((lambda x, t: 0 * x + 0.7, noise - 0.7), (lambda x, t: 0.5 * x, noise * 0.95**10),
                   (lambda x, t: 0 * x + t, noise - 0.55)):  # times 1, 0.9 ... 0.1
        np.testing.assert_allclose(fpo.integrate(Velocity(f), jnp.zeros((20, 1)), noise), end, atol=1e-5)


def test_flow_starts_unlike_zero_and_draws_its_own_times():
    """The untrained actor's output depends on what it sees; times are those of the Euler steps, all equally often."""
    args = small_args(fpo, num_flow_steps=5)
    actor = fpo.Actor(args, 3, 2, fpo.nnx.Rngs(0))
    assert len(actor.hidden) == 4
    sample = fpo.sample_policy(fpo.Setup(args, None, 2, 1, None), actor, normals(15, 4000, 3), jax.random.PRNGKey(16))
    times, counts = np.unique(np.round(sample.time, 6), return_counts=True)
    np.testing.assert_allclose(times, [0.2, 0.4, 0.6, 0.8, 1.0], atol=1e-5)
    np.testing.assert_allclose(counts / counts.sum(), 0.2, atol=0.01)
    seen = jnp.stack([jnp.zeros(3), jnp.ones(3)])
    velocity = actor(seen, jnp.zeros((2, 2)), jnp.ones((2, 1)))
    assert np.abs(velocity[0] - velocity[1]).max() > 1e-3


def test_flow_standardises_after_the_first_rollout():
    """Before there is any observation, normalising changes none; what was stored is of the statistics it was taken with."""
    seen = normals(17, 6, 3) + 3
    np.testing.assert_allclose(fpo.normalize(fpo.init_statistics(seen), seen), seen, rtol=0.01)
    args = small_args(fpo, max_grad_norm=1e-9)
    setup = fpo.Setup(args, Aim(), 1, 1, jax.sharding.Mesh(jax.devices()[:1], ("env",)))
    state = jax.jit(lambda key: fpo.init_state(setup, key))(jax.random.PRNGKey(1))
    key = jax.random.split(state.key, 5)[0]  # iterate's own
    _, data = fpo.rollout(setup, state.learner.actor, state.statistics, state.env_state, key)
    inputs = fpo.network_inputs(fpo.normalize(state.statistics, data.observation))
    again = jax.vmap(lambda *x: fpo.matching_loss(state.learner.actor, *x))(inputs.actor, data.latent, data.noise, data.time)
    np.testing.assert_allclose(again, data.loss, rtol=1e-3)
    end, metrics = jax.jit(lambda state: fpo.iterate(setup, state))(state)
    assert metrics["trust_region/outside"] == 0
    np.testing.assert_allclose(end.statistics.moments[:, 0], [data.observation.mean(), data.observation.var()], atol=1e-4)


def test_flow_is_paid_ten_times():
    """What the critic is to learn is of rewards times --reward-scale, and nothing else is."""
    targets = []
    for scale in (1.0, 10.0):
        args = small_args(fpo, reward_scale=scale, gamma=0.0)
        setup = fpo.Setup(args, Aim(), 1, 1, jax.sharding.Mesh(jax.devices()[:1], ("env",)))
        state = jax.jit(lambda key, setup=setup: fpo.init_state(setup, key))(jax.random.PRNGKey(1))
        _, metrics = jax.jit(lambda state, setup=setup: fpo.iterate(setup, state))(state)
        targets.append(metrics["critic/target"])
        returns = metrics["charts/episodic_return"]
    np.testing.assert_allclose(targets[1], 10 * targets[0], rtol=1e-4)
    np.testing.assert_allclose(targets[0], returns, rtol=1e-3)


def test_flow_loss_is_clipped():
    """In ratios of matching losses; a velocity of 0 but for a shift, on latents and noise whose losses are known."""
    args, (latent, noise, time) = small_args(fpo, epsilon=0.2), draws(60)
    still = ((1 - time) * (noise - latent[:, None])) ** 2
    old = np.asarray(still.mean((1, 2))) + np.tile([-0.3, -0.1, 0.0, 0.1, 0.3], 12)
    advantage = np.repeat([1.5, -0.5], 30)
    batch = fpo.Batch(jnp.zeros((60, 1)), None, latent, noise, time, jnp.asarray(old), jnp.asarray(advantage), None)

    def loss(shift):
        return fpo.actor_loss(lambda seen, x, t: 0 * x + shift[:, None, None], args, batch)

    (value, ratio), slope = jax.value_and_grad(loss, has_aux=True)(jnp.zeros(60))
    expected = np.tile(np.exp([-0.3, -0.1, 0.0, 0.1, 0.3]), 12)
    np.testing.assert_allclose(ratio, expected, rtol=1e-3)
    clipped = np.clip(expected, 0.8, 1.2)
    np.testing.assert_allclose(value, -np.minimum(expected * advantage, clipped * advantage).mean(), rtol=1e-3)
    stopped = np.where(advantage > 0, expected > 1.2, expected < 0.8)
    assert stopped.sum() == 12
    towards = 2 * np.asarray(((1 - time) ** 2 * (noise - latent[:, None])).mean((1, 2)))  # minus the matching loss's slope
    np.testing.assert_allclose(slope * 60, np.where(stopped, 0, -advantage * expected * towards), atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ learning
class Aim:
    """Pays least for actions far from half of what is observed; episodes are of one step."""

    action_size = 1

    def reset(self, key):
        zero, now = jnp.zeros(()), jnp.zeros((), int)
        return Sim(jax.random.uniform(key, (1,), minval=-1.0), zero, zero, now, now)

    def step(self, sim, action):
        return sim._replace(reward=-4 * (action[0] - sim.obs[0] / 2) ** 2, done=jnp.ones(()))


@pytest.mark.parametrize("name", NAMES)
def test_learns_to_aim(name):
    """By iterations as a run has them; and each way to evaluate is one of its own."""
    script, steps = script_of(name), 20
    given = dict(env_id="G1JoystickRoughTerrain", preset="cpu", num_envs=64, num_steps=16, minibatch_size=256, num_epochs=4,
                 hidden_dim=32, num_eval_envs=4, total_timesteps=1024 * steps, gamma=0.5, num_diffusion_steps=4, epsilon=0.1,
                 **dict.fromkeys(("learning_rate", "actor_learning_rate", "critic_learning_rate"), 3e-3))
    args = script.resolve(script.Args(**{x: v for x, v in given.items() if x in script.Args.__annotations__}))
    setup = script.Setup(args, Aim(), 1, 1, jax.sharding.Mesh(jax.devices()[:1], ("env",)))
    start = jax.jit(lambda key: script.init_state(setup, key))(jax.random.PRNGKey(1))
    end, metrics = jax.jit(lambda state: jax.lax.scan(lambda x, _: script.iterate(setup, x), state, None, steps))(start)
    seen = jnp.tile(jnp.linspace(-1, 1, 41), 20)[:, None]

    def error(state, mode):
        normal = script.normalize(state.statistics, seen)
        own = setup._replace(args=dataclasses.replace(args, eval_mode=mode))
        inputs = script.Inputs(normal, normal)
        action = script.evaluation_action(own, state.learner, inputs, jax.random.PRNGKey(2))
        return float(((action - seen / 2) ** 2).mean())

    modes = script.Args.__annotations__["eval_mode"].__args__
    errors = [error(end, mode) for mode in modes]
    assert len(set(errors)) == len(modes)
    assert errors[0] < 0.3 * error(start, modes[0]), (errors, error(start, modes[0]))
    for values in (x for key, x in metrics.items() if not key.startswith("charts/episodic")):
        assert np.isfinite(values).all()
    for key in metrics.keys() & {"trust_region/stored_kl", "trust_region/fresh_kl"}:
        assert metrics[key].min() >= 0 < metrics[key].max()
    if "trust_region/initial_kl" in metrics:  # what check_contract asks of a run's first iteration
        assert metrics["trust_region/initial_kl"][0] < 1e-6


@pytest.mark.parametrize("script", [reppo, dppo])
def test_an_actor_that_sees_before_it_learns_ends_the_run(script):
    """The first rollout was normalised with other statistics, so that what it stored is not of the actor."""
    args = small_args(script)
    setup = script.Setup(args, Aim(), 1, 1, jax.sharding.Mesh(jax.devices()[:1], ("env",)))
    state = jax.jit(lambda key: script.init_state(setup, key))(jax.random.PRNGKey(1))
    iterate = jax.jit(jax.vmap(lambda state: script.iterate(setup, state)))
    seeds = jax.tree.map(lambda x: x[None], state)
    script.check_contract(iterate(seeds)[1])
    seeds.learner.actor.output.kernel[...] += 0.1
    with pytest.raises(SystemExit, match="output layer has to start at zero"):
        script.check_contract(iterate(seeds)[1])


# ---------------------------------------------------------------------------------------------------------------- runs
SMALL = ("--preset cpu --num-envs 16 --num-steps 8 --num-epochs 1 --minibatch-size 64 --hidden-dim 16 --num-eval-envs 2 "
         "--total-timesteps 384 --eval-interval 20 --checkpoint-interval 1").split()
TWO_DEVICES = dict(XLA_FLAGS="--xla_force_host_platform_device_count=2")
RESUMED = "ppo_mjx"  # its learner has what no other's has, a learning rate; checkpoints are the same text in all


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("baselines")


def runner_of(name, folder):
    runner = Runner(folder)
    runner.script, runner.small = f"benchmark/baselines/{name}.py", SMALL
    return runner


@pytest.mark.parametrize("name", NAMES)
def test_run(name, folder):
    """Two seeds on two devices. One of the baselines, with physics, is continued from the second of three iterations, and
    evaluated."""
    runner = runner_of(name, folder)
    task = () if name == RESUMED else CLIFF
    straight = runner.train(*task, "--num-seeds", "2", "--num-devices", "2", **TWO_DEVICES)
    assert straight.name.startswith(f"{'own_tasks:Cliff' if task else 'CartpoleBalance'}__{name}__1__")
    assert json.loads((straight / "args.json").read_text())["script"] == name
    curves = [curve(straight / f"seed_{seed}") for seed in (1, 2)]
    expected = "losses/actor losses/critic charts/SPS charts/episodes charts/simulator_nans critic/target wall_time".split()
    assert all(x in event for event in metrics(straight / "seed_1") for x in expected)
    for events in curves:
        assert [event["step"] for event in events] == [128, 256, 384]
        assert all(np.isfinite(x) for event in events for x in event.values())
        assert 0 < events[-1]["eval/episodic_return"] <= 1000
    assert curves[0][0]["losses/critic"] != curves[1][0]["losses/critic"]
    if name != RESUMED:
        return
    other = folder / f"{name}_continued"
    shutil.copytree(straight, other)
    shutil.rmtree(other / "checkpoints" / "384")
    runner.run("--resume", str(other), **TWO_DEVICES)
    assert [curve(other / f"seed_{seed}") for seed in (1, 2)] == curves
    out, _ = runner.run("--evaluate", str(straight), **TWO_DEVICES)
    evaluated = json.loads(out.splitlines()[-1])["eval/episodic_return"]
    np.testing.assert_allclose(evaluated, [events[-1]["eval/episodic_return"] for events in curves], rtol=1e-3)


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changes", [dict(env_id="Cartpole"), dict(num_envs=0), dict(seed=-1), dict(gamma=1.0),
                                     dict(max_grad_norm=float("nan")), dict(minibatch_size=96), dict(total_timesteps=100),
                                     dict(num_devices=2)], ids=str)
def test_values(name, changes, capsys):
    script = script_of(name)
    small_args(script)  # fine as it is
    with pytest.raises(SystemExit) as stop:
        small_args(script, **changes)
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.startswith(f"{name}.py: error: ")
    assert any("--" + x.replace("_", "-") in line for x in changes)


@pytest.mark.parametrize("name", NAMES)
def test_runs_of_other_scripts(name, tmp_path, capsys, monkeypatch):
    """A run of TruDi is not continued by a baseline."""
    (tmp_path / "args.json").write_text(json.dumps({"args": {}, "script": "trudi_mjx"}))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--resume", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        script_of(name).parse()
    assert stop.value.code == 2
    assert "it is of trudi_mjx.py" in capsys.readouterr().err
