"""benchmark/baselines in PyTorch compute what those in JAX do."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import as_torch as layers_as_torch
from scipy.stats import norm
from small_baselines import script_of, small_args

from benchmark.baselines import dime_mjx, ppo_mjx, reppo_mjx

torch = pytest.importorskip("torch")
pytest.importorskip("mani_skill")
pytest.importorskip("mjlab")

# --------------------------------------------------------------------------------------------------------------- in JAX
CPU = torch.device("cpu")
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
B, OBS, A, N = 96, 11, 3, 2
NUMBERS = dict(
    num_diffusion_steps=N, hidden_dim=32, v_min=-4.0, v_max=5.0, gamma=0.97, actor_learning_rate=3e-3,
    critic_learning_rate=2e-3, dual_learning_rate=1e-2, target_entropy_scale=0.665, learning_rate=3e-3, desired_kl=0.02,
    entropy_scale=0.1, gae_lambda=0.9)
IN_JAX = {"reppo": reppo_mjx, "dime": dime_mjx, "ppo": ppo_mjx}


def as_torch(algorithm, network):
    """A network in JAX, or a gradient of it, as PyTorch's state_dict."""
    found = layers_as_torch(network)
    if algorithm == "ppo":  # whose layers are not in blocks
        return {re.sub(r"blocks\.(\d)\.\d", lambda x: f"hidden.{2 * int(x[1])}", name): x for name, x in found.items()}
    return found


@functools.cache
def pair(algorithm, seed=1):
    """Arguments, actors and critics, each in JAX and in PyTorch; with the same lively weights."""
    scripts = IN_JAX[algorithm], script_of(algorithm)
    args = [dataclasses.replace(x.Args(), **{name: value for name, value in NUMBERS.items() if hasattr(x.Args(), name)})
            for x in scripts]
    sizes = {"Actor": (OBS, A), "Critic": (OBS,) if algorithm == "ppo" else (OBS, A)}
    found = []
    for k, (name, numbers) in enumerate(sizes.items()):
        network = getattr(scripts[0], name)(args[0], *numbers, scripts[0].nnx.Rngs(k))
        leaves, tree = jax.tree.flatten(network)
        rng = np.random.default_rng([seed, k])
        leaves = [x + 0.3 * rng.normal(size=x.shape).astype(np.float32) / np.sqrt(x.shape[0]) for x in leaves]
        network = jax.tree.unflatten(tree, leaves)
        other = getattr(scripts[1], name)(args[1], *numbers)
        other.load_state_dict(as_torch(algorithm, network))
        found.append((network, other))
    return args, *found


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same_gradient(algorithm, expected, network, loss):
    expected = as_torch(algorithm, expected)
    names, parameters = zip(*network.named_parameters(), strict=True)
    assert set(names) == set(expected)
    for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        close(gradient, expected[name], err_msg=name)
        assert gradient.abs().max() > 0, name


def both(function, *numbers):
    """A function of JAX's and of PyTorch's script on the same numbers."""
    return function[0](*map(jnp.asarray, numbers)), function[1](*map(torch.tensor, numbers))


def learner_of(algorithm, log_duals):
    """A Learner in PyTorch that is not updated."""
    _, (_, actor), (_, critic) = pair(algorithm)
    rest = [None] * (4 if algorithm == "dime" else 3)  # optimizers, DIME's old actor
    return script_of(algorithm).Learner(actor, critic, log_duals, *rest)


def init_pair(algorithm, log_duals=("log_alpha", "log_lambda")):
    """Learners in JAX and in PyTorch of the same networks, and JAX's step."""
    jaxs, script = IN_JAX[algorithm], script_of(algorithm)
    args, (actor, other_actor), (critic, other_critic) = pair(algorithm)
    args = [dataclasses.replace(x, minibatch_size=B, num_envs=B, num_steps=1) for x in args]
    duals = jnp.full((), args[0].learning_rate) if algorithm == "ppo" else {x: jnp.log(jnp.asarray(0.01)) for x in log_duals}
    optimizers = jaxs.make_optimizers(args[0])
    states = [x.init(p) for x, p in zip(optimizers, (actor, critic, duals), strict=False)]
    ours = jaxs.Learner(actor, critic, duals, *states)
    setup = jaxs.Setup(args[0], env=None, action_size=A, time_limit=0, mesh=None)
    theirs = script.init_learner(script.Setup(args[1], CPU, None, None, OBS, OBS, OBS, A))
    theirs.actor.load_state_dict(other_actor.state_dict())
    theirs.critic.load_state_dict(other_critic.state_dict())
    return args[1], ours, theirs, jax.jit(functools.partial(jaxs.update_minibatch, setup))


def same_learner(algorithm, ours, theirs):
    for expected, network in ((ours.actor, theirs.actor), (ours.critic, theirs.critic)):
        for name, x in as_torch(algorithm, expected).items():
            close(network.state_dict()[name], x, atol=1e-4, err_msg=name)


# --------------------------------------------------------------------------------------------------------------- REPPO
def reppo_batches(seed=0):
    """A minibatch in both frameworks, of Gaussians that differ from the actor's, and noise."""
    script = script_of("reppo")
    _, (old, _), _ = pair("reppo", seed=2)
    observation, noise = normals([seed, 1], B, OBS), normals([seed, 2], B, A)
    sample = reppo_mjx.sample_gaussian(old, observation, normals([seed, 3], B, A))
    action = np.asarray(jnp.clip(sample.action, -0.999, 0.999))
    rest = (action, np.asarray(sample.mean), np.asarray(sample.std), 5 * normals([seed, 4], B))
    rest += (normals([seed, 5], B, NUMBERS["hidden_dim"] + 1), np.arange(B) % 5 == 0)
    return reppo_mjx.Batch(observation, observation, *rest), script.Batch(*map(torch.tensor, (observation, *rest))), noise


def test_reppo_samples_and_kl():
    script = script_of("reppo")
    _, (actor, other), _ = pair("reppo")
    ours, theirs, noise = reppo_batches()
    expected = reppo_mjx.sample_gaussian(actor, ours.actor_observation, noise)
    found = script.sample_gaussian(other, theirs.observation, torch.tensor(noise))
    for one, same in zip(found, expected, strict=True):
        close(one.detach(), same)
    kl = reppo_mjx.gaussian_kl(actor, ours.actor_observation, ours.mean, ours.std)
    close(script.gaussian_kl(theirs.mean, theirs.std, found.mean, found.std).detach(), kl)
    assert np.median(kl) > 0.01


@functools.cache
def reppo_loss():
    """Value and gradient in JAX, compiled once for every bound."""
    args = pair("reppo")[0][0]
    duals = {"log_alpha": jnp.log(0.3), "log_lambda": jnp.log(0.7)}

    def loss_of(actor, critic, batch, noise, bound):
        bounded = dataclasses.replace(args, trust_region_bound=bound)
        return reppo_mjx.actor_loss(actor, bounded, critic, duals, batch, noise)

    return jax.jit(jax.value_and_grad(loss_of, has_aux=True))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_reppo_loss_and_gradient(share):
    """With a bound that this share of the states violates."""
    args, (actor, other), (critic, _) = pair("reppo")
    ours, theirs, noise = reppo_batches()
    kl = np.asarray(reppo_mjx.gaussian_kl(actor, ours.actor_observation, ours.mean, ours.std))
    bound = {0.0: 1e9, 0.5: float(np.median(kl)), 1.0: 0.0}[share]
    args = [dataclasses.replace(x, trust_region_bound=bound) for x in args]
    (value, (entropy, kl)), gradient = reppo_loss()(actor, critic, ours, noise, bound)
    duals = {"log_alpha": jnp.log(0.3), "log_lambda": jnp.log(0.7)}
    log_duals = torch.nn.ParameterList(torch.tensor(np.log(x), dtype=torch.float32) for x in (0.3, 0.7))
    script, learner = script_of("reppo"), learner_of("reppo", log_duals)
    loss, (other_entropy, other_kl) = script.actor_loss(learner, args[1], theirs, torch.tensor(noise))
    assert np.isclose(np.mean(np.asarray(kl) > bound), share, atol=0.02)
    close(loss.detach(), value)
    close(other_entropy, entropy)
    close(other_kl, kl)
    same_gradient("reppo", gradient, other, loss)
    dual = torch.autograd.grad(script.dual_loss(log_duals, args[1], other_entropy, other_kl, A), list(log_duals))
    expected = jax.grad(reppo_mjx.dual_loss)(duals, args[0], entropy, kl, A)
    close(dual, [expected["log_alpha"], expected["log_lambda"]])


def test_reppo_auxiliary_loss():
    """And its gradient; a state at which the episode terminated has none."""
    args = [dataclasses.replace(x, aux_loss_scale=0.7) for x in pair("reppo")[0]]
    ours, theirs, _ = reppo_batches()
    critic = reppo_mjx.Critic(args[0], OBS, A, reppo_mjx.nnx.Rngs(3))
    other = script_of("reppo").Critic(args[1], OBS, A)
    named = {"prediction_hidden": "prediction.0.0", "prediction_norm": "prediction.0.1", "prediction_output": "prediction.1"}

    def renamed(network):
        found = as_torch("reppo", network)
        return {next((x.replace(a, b) for a, b in named.items() if x.startswith(a)), x): v for x, v in found.items()}

    other.load_state_dict(renamed(critic))
    value, gradient = jax.value_and_grad(reppo_mjx.critic_loss)(critic, args[0], ours)
    loss = script_of("reppo").critic_loss(other, args[1], theirs)
    close(loss.detach(), value)
    names, parameters = zip(*other.named_parameters(), strict=True)
    expected = renamed(gradient)
    for name, found in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        close(found, expected[name], err_msg=name)
        assert found.abs().max() > 0, name
    theirs.following[::5] = torch.nan  # those that terminated
    close(script_of("reppo").critic_loss(other, args[1], theirs).detach(), value)


def test_reppo_updates():
    """Clipping and Adam too: after five minibatches the weights are the same."""
    script = script_of("reppo")
    args, ours, theirs, step = init_pair("reppo")
    for k in range(5):
        batch, other_batch, _ = reppo_batches(k)
        key = jax.random.PRNGKey(k)
        ours, metrics = step(ours, batch, key)
        noise = np.array(jax.random.normal(key, (B, A)))  # what update_minibatch draws
        found = script.update_minibatch(args, theirs, other_batch, torch.tensor(noise))
        close(found, [metrics[name] for name in script.UPDATE_METRICS], rtol=1e-4)
    same_learner("reppo", ours, theirs)
    close([x.detach() for x in theirs.log_duals], [ours.duals["log_alpha"], ours.duals["log_lambda"]])


@pytest.mark.parametrize("algorithm", ["reppo", "ppo"])
def test_untrained_policies_are_standard_normals(algorithm):
    script = script_of(algorithm)
    mean, std = script.Actor(small_args(algorithm), 5, 3)(torch.randn(40, 5))
    assert not mean.any() and (std == 1).all()


# ---------------------------------------------------------------------------------------------------------------- DIME
def dime_batches(seed=0):
    observation, noise = normals([seed, 1], B, OBS), normals([seed, 2], N + 1, B, A)
    rest = (np.tanh(normals([seed, 3], B, A)), 5 * normals([seed, 4], B))
    ours = dime_mjx.Batch(observation, observation, *rest)
    return ours, script_of("dime").Batch(*map(torch.tensor, (observation, *rest))), noise


def test_dime_loss_and_gradient():
    args, (actor, other), (critic, _) = pair("dime")
    ours, theirs, noise = dime_batches()
    duals = {"log_alpha": jnp.log(0.3)}

    def loss_of(actor):
        return dime_mjx.actor_loss(actor, args[0], critic, duals, ours, noise)

    (value, bound), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(actor)
    log_duals = torch.nn.ParameterList([torch.tensor(np.log(0.3), dtype=torch.float32)])
    script, learner = script_of("dime"), learner_of("dime", log_duals)
    loss, other_bound = script.actor_loss(learner, args[1], theirs, torch.tensor(noise))
    close(loss.detach(), value)
    close(other_bound, bound)
    same_gradient("dime", gradient, other, loss)
    dual = torch.autograd.grad(script.dual_loss(log_duals, args[1], other_bound, A), list(log_duals))
    close(dual[0], jax.grad(dime_mjx.dual_loss)(duals, args[0], bound, A)["log_alpha"])


def test_dime_updates():
    script = script_of("dime")
    args, ours, theirs, step = init_pair("dime", ["log_alpha"])
    for k in range(5):
        batch, other_batch, _ = dime_batches(k)
        key = jax.random.PRNGKey(k)
        ours, metrics = step(ours, batch, key)
        noise = np.array(jax.random.normal(key, (N + 1, B, A)))  # what update_minibatch draws
        found = script.update_minibatch(args, theirs, other_batch, torch.tensor(noise))
        close(found, [metrics[name] for name in script.UPDATE_METRICS], rtol=1e-4)
    same_learner("dime", ours, theirs)
    close([x.detach() for x in theirs.log_duals], [ours.duals["log_alpha"]])


# ----------------------------------------------------------------------------------------------------------------- PPO
def ppo_batches(seed=0):
    """A minibatch in both frameworks, of samples of an older actor."""
    _, (old, _), _ = pair("ppo", seed=2)
    observation = normals([seed, 1], B, OBS)
    mean, std = map(np.asarray, old(observation))
    rest = (mean + std * normals([seed, 2], B, A), mean, std, normals([seed, 3], B), 2 * normals([seed, 4], B))
    ours = ppo_mjx.Batch(observation, observation, *rest)
    return ours, script_of("ppo").Batch(*map(torch.tensor, (observation, *rest)))


def test_ppo_densities_and_kl():
    script, (action, mean, new_mean) = script_of("ppo"), normals(1, 3, B, A)
    std, new_std = np.exp(0.5 * normals(2, 2, B, A))
    expected, found = both((ppo_mjx.log_density, script.log_density), action, mean, std)
    close(found, expected)
    close(found, norm.logpdf(action, mean, std).sum(-1), rtol=1e-4)
    expected, found = both((ppo_mjx.gaussian_kl, script.gaussian_kl), mean, std, new_mean, new_std)
    close(found, expected)


def test_ppo_advantages():
    """With terminations, after which there may be a NaN, and time-outs at random."""
    script, (reward, value, next_value) = script_of("ppo"), normals(1, 3, 40, 16)
    terminated, truncated = np.random.default_rng(2).random((2, 40, 16)) < 0.1
    truncated &= ~terminated
    next_value[terminated] = np.nan
    args = pair("ppo")[0]
    functions = [functools.partial(x.advantages, own) for x, own in zip((ppo_mjx, script), args, strict=True)]
    expected, found = both(functions, reward, terminated, truncated, value, next_value)
    close(found, expected)
    assert np.isfinite(np.asarray(found)).all()
    standard = script.standardize(found).numpy()
    assert abs(standard.mean()) < 1e-6 and np.isclose(standard.std(), 1, atol=1e-5)


def test_ppo_losses_and_gradients():
    args, (actor, other), (critic, other_critic) = pair("ppo")
    ours, theirs = ppo_batches()
    loss_of = jax.jit(jax.value_and_grad(lambda actor: ppo_mjx.actor_loss(actor, args[0], ours), has_aux=True))
    (value, facts), gradient = loss_of(actor)
    script = script_of("ppo")
    loss, found = script.actor_loss(other, args[1], theirs)
    close(loss.detach(), value)
    for one, same in zip(found, facts, strict=True):
        close(one, same, rtol=1e-4)
    outside, better = np.abs(np.asarray(facts[0]) - 1) > args[0].epsilon, ours.advantage > 0
    assert all((outside & better).any() for better in (better, ~better)) and not outside.all()
    same_gradient("ppo", gradient, other, loss)
    value, gradient = jax.value_and_grad(lambda critic: ppo_mjx.critic_loss(critic, args[0], ours))(critic)
    loss = script.critic_loss(other_critic, args[1], theirs)
    close(loss.detach(), value)
    same_gradient("ppo", gradient, other_critic, loss)


def test_ppo_updates():
    """The learning rate too, which falls at first, as the actor is far from the one that acted."""
    script = script_of("ppo")
    args, ours, theirs, step = init_pair("ppo")
    rates = []
    for k in range(8):
        batch, other_batch = ppo_batches(k)
        if k > 3:  # of the actor itself, so that the rate grows again
            mean, std = map(np.asarray, ours.actor(batch.actor_observation))
            batch = batch._replace(mean=mean, std=std)
            other_batch = other_batch._replace(mean=torch.tensor(mean), std=torch.tensor(std))
        ours, metrics = step(ours, batch)
        found = script.update_minibatch(args, theirs, other_batch)
        close(found, [metrics[name] for name in script.UPDATE_METRICS], rtol=1e-4)
        rates.append([float(x) for x in (ours.learning_rate, *script.learning_rates(theirs))])
    same_learner("ppo", ours, theirs)
    rates = np.array(rates)
    close(rates[:, 1:], rates[:, :1].repeat(2, 1))
    assert rates[0, 0] > rates[3, 0] < rates[7, 0]


def test_ppo_learning_rate_follows_the_kl():
    args, script = small_args("ppo", desired_kl=0.01), script_of("ppo")
    for rate, kl, expected in ((1e-3, 0.021, 1e-3 / 1.5), (1e-3, 0.019, 1e-3), (1e-3, 0.006, 1e-3), (1e-3, 0.004, 1.5e-3),
                               (1.2e-5, 1.0, 1e-5), (9e-3, 0.0, 1e-2)):
        close(script.adapt(torch.tensor(rate), args, torch.tensor(kl)), expected, atol=0)


def test_ppo_of_several_processes_has_one_learning_rate(monkeypatch):
    """Made by the KL of all of them, as advantages are standardised over all; the other process has what is here given."""
    script = script_of("ppo")
    args, _, learner, _ = init_pair("ppo")
    _, batch = ppo_batches()
    near, before = batch._replace(), float(script.learning_rates(learner)[0])
    mean, std = learner.actor(batch.observation)
    near = batch._replace(mean=mean.detach(), std=std.detach())  # a KL of 0, at which it would grow
    monkeypatch.setattr(script, "everywhere", lambda x: torch.cat([x, torch.ones_like(x)]))
    script.update_minibatch(args, learner, near)
    close([float(x) for x in script.learning_rates(learner)], before / 1.5)
    advantage = torch.tensor(normals(5, 4, 8))
    joint = torch.cat([advantage.flatten(), torch.ones(32)])
    close(script.standardize(advantage), (advantage - joint.mean()) / joint.std(correction=0))


def test_ppos_compiled_updates_are_the_same():
    """With a learning rate that changes in place; traced as for a GPU, without generating code."""
    script, results = script_of("ppo"), []
    for compiled in (False, True):
        args, _, learner, _ = init_pair("ppo")
        learn = functools.partial(script.update_minibatch, args, learner)
        learn = torch.compile(learn, backend="aot_eager") if compiled else learn
        metrics = [learn(ppo_batches(k)[1]) for k in range(3)]
        results.append(torch.cat([*metrics, *(x.detach().flatten() for x in script.changing_tensors(learner))]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
