"""The learning loop of every script on a task that dynamic programming solves; standins/corridor.py has it."""

import functools
from typing import NamedTuple

import corridor
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import ITERATIONS, SIZES, HumanoidBench, IsaacLab, ManiSkill, Mjx, lively
from runner import BASELINES

GAMMA = SIZES["gamma"]
KINDS = {"trudi_mjx": Mjx, "trudi_humanoidbench": HumanoidBench, "trudi_maniskill": ManiSkill, "trudi_isaaclab": IsaacLab}
MODULES = {name: name for name in KINDS}
MODULES |= {path.stem: f"benchmark.baselines.{path.stem}" for path in BASELINES.glob("*_mjx.py")}


# Where scripts have the same text, which test_form.py and test_baselines_text.py hold, one of them stands for the others.
SIMULATORS = sorted(KINDS)  # collecting and playing is each script's own, but baselines' is their siblings'
EVALUATIONS = "dppo_mjx fpo_mjx ppo_mjx reppo_mjx trudi_maniskill trudi_mjx".split()  # ways to act in one
EPOCHS = "dime_mjx ppo_mjx reppo_mjx trudi_mjx".split()
ROLLOUTS = "dime_mjx dppo_mjx fpo_mjx ppo_mjx reppo_mjx trudi_humanoidbench trudi_mjx".split()


def loop_of(name, frozen=None, **changes):
    return KINDS.get(name, Mjx)(MODULES[name], frozen, **changes)


# ------------------------------------------------------------------------------------------------ a policy that stays
@pytest.fixture(scope="module", params=sorted(MODULES))
def frozen(request):
    """A loop whose policy stays as it is, while its critic learns what it is worth."""
    with pytest.MonkeyPatch.context() as patch:  # which ends here: other tests' loops learn
        loop = loop_of(request.param, patch)
        loop.advance(ITERATIONS)
    return loop


def reward_factor(loop):
    """By which rewards are multiplied in what is learned: FPO's constant, DPPO's running one."""
    if hasattr(loop.state, "reward_scale"):
        return 1 / np.sqrt(loop.state.reward_scale.statistics.moments[1])
    return getattr(loop.setup.args, "reward_scale", 1.0)


def test_the_critic_learns_what_dynamic_programming_finds(frozen):
    """Q with the entropy's bonus, on average over the policy's actions to either side; V for those that learn V."""
    action, bonus = frozen.sample(4000)
    value = corridor.policy_value(action, bonus, GAMMA, frozen.ends)
    if not hasattr(frozen.script, "q_value"):
        np.testing.assert_allclose(frozen.value(action)[:, 0] / reward_factor(frozen), value, atol=0.15)
        return
    expected = corridor.action_value(value, action, GAMMA, frozen.ends)
    for right in (action > 0, action <= 0):
        found = np.average(frozen.value(action), axis=1, weights=right)
        np.testing.assert_allclose(found, np.average(expected, axis=1, weights=right), atol=0.15)


@pytest.mark.parametrize("frozen", EVALUATIONS, indirect=True)
def test_evaluation_plays_the_policy(frozen):
    """In each mode, whose actions are others."""
    returns = []
    for mode in frozen.modes:
        expected = corridor.expected_return(frozen.evaluation_sample(mode, 4000), frozen.ends)
        returns.append(frozen.play(mode))
        np.testing.assert_allclose(returns[-1], expected, atol=0.2)
    assert len(set(returns)) == len(returns)
    if "best-of-k" in frozen.modes:
        best, one = (frozen.value(frozen.evaluation_sample(mode, 1000)).mean() for mode in ("best-of-k", "sde"))
        assert best > one + 0.5


@pytest.mark.parametrize("name", SIMULATORS)
def test_evaluations_observe_as_training_does(name, monkeypatch):
    """A policy that leaves where observations are standardised, and stays where they are raw, which all are positive."""
    loop = loop_of(name, monkeypatch)

    def evaluation_action(setup, learner, seen, *key):
        raw = (getattr(seen, "actor", seen) > 0).all(-1)
        return 0.5 - 1.0 * raw[:, None]

    monkeypatch.setattr(loop.script, "evaluation_action", evaluation_action)
    leaving, staying = (corridor.expected_return(np.full((corridor.PLACES, 1), x), loop.ends) for x in (0.5, -0.5))
    assert leaving > staying + 2
    np.testing.assert_allclose(loop.play(loop.modes[0]), leaving, atol=0.1)


# --------------------------------------------------------------------------------------------------- a policy that learns
MISSED = {"ode": 0.08, "sde": 0.15, "best-of-k": 0.08}  # of what there is to learn


@pytest.mark.parametrize("name", SIMULATORS)
def test_the_optimum_is_found(name):
    """But for what the entropy, which is held at its target, costs."""
    loop = loop_of(name)
    optimum = corridor.optimal_return(loop.ends)
    untrained = corridor.expected_return(loop.sample(2000)[0], loop.ends)
    assert untrained < optimum - 2
    loop.advance(100)
    for mode, missed in MISSED.items():
        assert optimum - missed * (optimum - untrained) < loop.play(mode) < optimum + 0.1, mode


# ------------------------------------------------------------------------------------------------------- epochs, with JAX
class Log(NamedTuple):
    """In a learner's place: what the minibatches were given."""

    actor: jax.Array  # how many there have been
    critic: jax.Array  # as often as the learners have them
    rows: jax.Array
    keys: jax.Array
    old_actors: jax.Array


@pytest.mark.parametrize("name", EPOCHS)
def test_every_epoch_goes_over_all_states_anew(name, monkeypatch):
    """In another order, each minibatch with noise of its own and the policy of before the first one."""
    loop = loop_of(name)
    args, script = loop.setup.args, loop.script
    count = args.num_epochs * args.batch_size // args.minibatch_size
    states = jnp.arange(args.batch_size)

    def update_minibatch(setup, log, *inputs):
        i = log.actor
        batch = next(x for x in inputs if isinstance(x, script.Batch))
        key = inputs[-1] if inputs[-1] is not batch else log.keys[i]
        old_actor = inputs[0] if inputs[0] is not batch else 0
        new = Log(i + 1, i, log.rows.at[i].set(batch[0]), log.keys.at[i].set(key), log.old_actors.at[i].set(old_actor))
        return new, {"minibatch": i}

    monkeypatch.setattr(script, "update_minibatch", update_minibatch)
    zero = jnp.zeros((), int)
    keys = jax.random.split(jax.random.PRNGKey(7), count)
    log = Log(zero, zero, jnp.zeros((count, args.minibatch_size), int), keys, jnp.ones(count, int))
    batch = script.Batch(*[states] * len(script.Batch._fields))
    update_epochs = jax.jit(functools.partial(script.update_epochs, loop.setup))
    log, metrics = update_epochs(log, batch, jax.random.PRNGKey(0))
    epochs = np.asarray(log.rows).reshape(args.num_epochs, -1)
    np.testing.assert_array_equal(np.sort(epochs, 1), np.tile(states, (args.num_epochs, 1)))
    assert len(np.unique(epochs, axis=0)) == args.num_epochs
    assert (epochs != states).mean() > 0.9
    assert len(np.unique(log.keys, axis=0)) == count == 8
    np.testing.assert_array_equal(log.old_actors, 0)
    assert metrics["minibatch"] == np.mean([4, 5, 6, 7])  # of the last epoch


# ---------------------------------------------------------------------------------------------------- rollouts, with JAX
def rollout_of(loop):
    """A rollout of the present policy."""
    state = loop.state
    if isinstance(loop, HumanoidBench):
        return loop.script.collect(loop.setup, loop.programs.sample, loop.envs, state)[0]
    rollout = jax.jit(functools.partial(loop.script.rollout, loop.setup))
    return rollout(state.learner.actor, state.statistics, state.env_state, jax.random.PRNGKey(8))[1]


@pytest.mark.parametrize("name", ROLLOUTS)
def test_every_step_has_noise_of_its_own(name, monkeypatch):
    """The policy's, and that of the actions at which targets are taken."""
    loop = loop_of(name, monkeypatch)
    script, size = loop.script, loop.setup.args.batch_size
    data = rollout_of(loop)
    drawn = data.trajectory[0] if hasattr(data, "trajectory") else getattr(data, "latent", getattr(data, "action", None))
    drawn = np.ravel(drawn)
    drawn = drawn[np.abs(drawn) != np.float32(0.999)]  # clipped, where it is the actions that are kept
    assert len(np.unique(drawn)) > 0.98 * drawn.size > 0.4 * size
    if not hasattr(script, "critic_targets"):
        return
    same = jnp.ones((*data.reward.shape, corridor.PLACES))
    goes_on = jnp.zeros(data.reward.shape, bool)
    data = data._replace(reward=0 * data.reward, terminated=goes_on, truncated=~goes_on)
    targets = jax.jit(functools.partial(script.critic_targets, loop.setup))
    found = targets(loop.state.learner, data, script.Inputs(same, same), jax.random.PRNGKey(9))
    found = found[0] if isinstance(found, tuple) else found  # REPPO's targets come with features
    assert len(np.unique(found)) > 0.98 * size


# ------------------------------------------------------------------------------------------------- KL of an iteration
# An iteration that moves a policy of large weights by some nats, less than its states differ by; minibatches that tell.
FAR = dict(trust_region_bound=1e3, actor_learning_rate=3e-5, num_epochs=8, num_envs=256, minibatch_size=512)


def log_ratio(script, old_actor, actor, seen, key):
    """Samples (B,) of the log-ratio of old chains under both actors, by the densities of their steps."""
    noise = jax.random.normal(key, (old_actor.num_steps + 1, len(seen), 1))
    chain = script.sample_chain(old_actor, seen, noise)
    latents = chain.trajectory.latents  # a^1 ... a^N
    last = chain.trajectory.means[:, 0] + jnp.sqrt(2 * old_actor.step_sizes()[0]) * noise[0]  # as arctanh(1) is infinite
    reached = jnp.concatenate([last[:, None], latents[:, :-1]], 1)  # a^0 ... a^(N-1)
    total = 0.0
    for sign, network in ((1, old_actor), (-1, actor)):
        observation_part, time_part = network.embed(seen)
        h = network.step_sizes()
        drift = network(observation_part[:, None], time_part, latents) - latents / network.prior_std**2
        total += sign * jax.scipy.stats.norm.logpdf(reached, latents + h * drift, jnp.sqrt(2 * h))
    return total.sum((-2, -1))


@pytest.mark.parametrize("name", ["trudi_mjx"])
def test_logged_kl_is_that_of_the_old_policys_chains(name):
    """Stored and fresh ones, both of the iteration's first policy, at the states of its rollout."""
    loop = loop_of(name, **FAR)
    script = loop.script
    actor = lively(loop.state.learner.actor, 3)
    actor.output.kernel[...] *= 20  # acts otherwise in each state
    statistics = script.Statistics(jnp.float32(1e7), jnp.asarray(corridor.MOMENTS))
    loop.state = loop.state._replace(learner=loop.state.learner._replace(actor=actor), statistics=statistics)
    data = rollout_of(loop)
    seen = script.normalize(loop.state.statistics, data.observation)
    inputs = script.Inputs(seen, seen)
    update = jax.jit(functools.partial(script.update, loop.setup))
    old = loop.state.learner
    new, metrics = update(old, data, inputs, inputs, list(jax.random.split(jax.random.PRNGKey(10), 3)))
    rows = jnp.tile(seen.reshape(-1, corridor.PLACES), (20, 1))
    ratio = jax.jit(functools.partial(log_ratio, script))
    samples = np.asarray(ratio(old.actor, new.actor, rows, jax.random.PRNGKey(11)))
    expected, error = samples.mean(), samples.std() / loop.setup.args.minibatch_size**0.5
    assert expected > 6 * error
    for kind in ("stored", "fresh"):
        np.testing.assert_allclose(metrics[f"trust_region/{kind}_kl"], expected, atol=4 * error)


# -------------------------------------------------------------------------------------------------- the same, with PyTorch
TORCH = ["trudi_maniskill"]


@pytest.mark.parametrize("name", TORCH)
def test_pytorchs_epochs_go_over_all_states_anew(name):
    loop = loop_of(name)
    torch, args = loop.torch, loop.setup.args
    states = torch.arange(args.batch_size)
    given = []

    def update_minibatch(batch, noise):
        given.append((batch, noise))
        return torch.full((len(loop.script.UPDATE_METRICS),), float(len(given)))

    batch = loop.script.Batch(states, states, loop.script.Trajectory(states, states), states)
    metrics = loop.script.update_epochs(loop.setup, loop.programs._replace(update_minibatch=update_minibatch), batch)
    assert all((x == batch.target).all() for batch, _ in given for x in (*batch[:2], *batch.trajectory))
    epochs = np.stack([batch.target.numpy() for batch, _ in given]).reshape(args.num_epochs, -1)
    np.testing.assert_array_equal(np.sort(epochs, 1), np.tile(states, (args.num_epochs, 1)))
    assert len(np.unique(epochs, axis=0)) == args.num_epochs
    assert (epochs != states.numpy()).mean() > 0.9
    noise = np.stack([noise.numpy() for _, noise in given])
    assert len(noise) == 8 and len(np.unique(noise)) > 0.99 * noise.size
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.05)
    assert {float(x) for x in metrics.values()} == {6.5}  # of the last epoch


@pytest.mark.parametrize("name", TORCH)
def test_every_step_has_pytorchs_noise_of_its_own(name):
    loop = loop_of(name, frozen=True)
    script, torch = loop.script, loop.torch
    with torch.no_grad():
        data = script.rollout(loop.setup, loop.programs, loop.state.statistics)
        assert len(data.trajectory.latents.unique()) > 0.98 * data.trajectory.latents.numel()
        goes_on = torch.zeros_like(data.terminated)
        data = data._replace(reward=0 * data.reward, terminated=goes_on, truncated=~goes_on)
        same = torch.ones_like(data.observation)
        targets = script.critic_targets(loop.setup, loop.programs, loop.state.learner, data, same)
    assert len(targets.unique()) > 0.98 * targets.numel()


@pytest.mark.parametrize("name", TORCH)
def test_pytorchs_kl_is_that_of_the_old_policys_chains(name):
    loop = loop_of(name, **FAR)
    script, torch = loop.script, loop.torch
    learner = loop.state.learner
    for parameter in learner.actor.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    learner.actor.output.weight.data *= 20  # acts otherwise in each state
    moments = [torch.asarray(x) for x in corridor.MOMENTS]
    loop.state = loop.state._replace(statistics=script.Statistics(10**7, *moments))
    learner.old_actor.load_state_dict(learner.actor.state_dict())
    with torch.no_grad():
        data = script.rollout(loop.setup, loop.programs, loop.state.statistics)
        seen = script.normalize(loop.state.statistics, data.observation)
        metrics = script.update(loop.setup, loop.programs, learner, data, seen, seen)
        seen = script.flatten_rollout(seen).repeat(20, 1)
        noise = torch.randn(loop.setup.args.num_diffusion_steps + 1, len(seen), 1)
        chain = script.sample_chain(learner.old_actor, seen, noise)
        latents = chain.trajectory.latents
        h = learner.old_actor.step_sizes()
        last = chain.trajectory.means[:, :1] + (2 * h[0]).sqrt() * noise[0][:, None]
        reached = torch.cat([last, latents[:, :-1]], 1)
        ratio = 0.0
        for sign, network in ((1, learner.old_actor), (-1, learner.actor)):
            observation_part, time_part = network.embed(seen)
            h = network.step_sizes()
            drift = network(observation_part[:, None], time_part, latents) - latents / network.prior_std**2
            density = torch.distributions.Normal(latents + h * drift, (2 * h).sqrt())
            ratio = ratio + sign * density.log_prob(reached).sum((-2, -1))
    expected, error = float(ratio.mean()), float(ratio.std()) / loop.setup.args.minibatch_size**0.5
    assert expected > 6 * error
    for kind in ("stored", "fresh"):
        np.testing.assert_allclose(metrics[f"trust_region/{kind}_kl"], expected, atol=4 * error)


# --------------------------------------------------------------------------------------------------------------- seeds
@pytest.mark.parametrize("num_seeds", [1, 2])
def test_a_seed_alone_multiplies_plain_matrices(num_seeds):
    """Not batches of one, which slow a CPU by half; test_mjx_runs.py compares the curves of both."""
    loop = loop_of("trudi_mjx", num_seeds=num_seeds)
    state = jax.tree.map(lambda x: jnp.stack([x] * num_seeds), loop.state)
    text = jax.jit(loop.script.over_seeds(loop.setup, loop.script.iterate)).lower(state).as_text()
    assert text.count("dot_general") > 100 and ("batching_dims" in text) == (num_seeds > 1)
