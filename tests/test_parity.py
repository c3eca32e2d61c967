"""trudi_mjx.py and trudi_maniskill.py compute the same: with the same weights and noise, to 1e-5 in float32.

The two were written in two frameworks, with two automatic differentiations; other tests look at one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import as_torch

import trudi_mjx as mjx

torch = pytest.importorskip("torch")
maniskill = pytest.importorskip("trudi_maniskill")
B, OBS, A, N = 96, 11, 3, 3
SIZES = dict(
    num_diffusion_steps=N,
    hidden_dim=32,
    v_min=-4.0,
    v_max=5.0,
    gamma=0.97,
    actor_learning_rate=3e-3,
    critic_learning_rate=2e-3,
    dual_learning_rate=1e-2,
    target_entropy_scale=0.665,
)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@functools.cache
def pair(scale=1.0):
    """The same actor and critic twice: in JAX with lively random weights, in PyTorch with a copy of them."""
    args = [dataclasses.replace(script.Args(), **SIZES) for script in (mjx, maniskill)]
    ours, theirs = [], []
    for k, name in enumerate(("Actor", "Critic")):
        network = getattr(mjx, name)(args[0], OBS, A, mjx.nnx.Rngs(k))
        leaves, tree = jax.tree.flatten(network)
        keys = jax.random.split(jax.random.PRNGKey(k), len(leaves))
        leaves = [
            x + scale * jax.random.normal(key, x.shape) / np.sqrt(x.shape[0]) * (0.3 if x.ndim < 2 else 1)
            for key, x in zip(keys, leaves, strict=True)
        ]
        ours.append(jax.tree.unflatten(tree, leaves))
        other = getattr(maniskill, name)(args[1], OBS, A)
        other.load_state_dict(as_torch(ours[-1]))
        theirs.append(other)
    return args, ours, theirs


def batches(seed=0):
    """A minibatch for both frameworks, with rollout chains of an older actor, that actor twice, and noise."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    _, (old, _), (other_old, _) = pair(0.9)
    observation = normal(B, OBS)
    chain = jax.jit(mjx.sample_chain)(old, observation, normal(N + 1, B, A))
    target = 5 * normal(B)  # some of them outside the atoms' range
    action = np.asarray(jnp.clip(chain.action, -0.999, 0.999))
    trajectory = mjx.Trajectory(*map(np.asarray, chain.trajectory))
    ours = mjx.Batch(observation, observation, action, trajectory, target)
    other_trajectory = maniskill.Trajectory(*map(torch.tensor, trajectory))
    theirs = maniskill.Batch(
        *map(torch.tensor, (observation, action)), other_trajectory, torch.tensor(target)
    )
    return ours, theirs, (old, other_old), normal(N + 1, B, A)


def learner_of(networks, old_actor, log_duals=None):
    """A Learner of trudi_maniskill.py that is not updated."""
    return maniskill.Learner(*networks, log_duals, *[None] * 3, old_actor)


def same_gradient(ours, network, gradients):
    names = [name for name, _ in network.named_parameters()]
    expected = as_torch(ours)
    assert set(names) == set(expected)
    for name, gradient in zip(names, gradients, strict=True):
        close(gradient, expected[name], err_msg=name)
        assert gradient.abs().max() > 0, name


def test_chains():
    _, (actor, _), (other, _) = pair()
    ours, _, _, noise = batches()
    expected = jax.jit(mjx.sample_chain)(actor, ours.actor_observation, noise)
    chain = maniskill.sample_chain(other, torch.tensor(ours.actor_observation), torch.tensor(noise))
    close(chain.action.detach(), expected.action)
    close(chain.entropy_bound.detach(), expected.entropy_bound)
    close(chain.trajectory.latents.detach(), expected.trajectory.latents)
    close(chain.trajectory.means.detach(), expected.trajectory.means)
    assert np.abs(expected.entropy_bound).max() > 1


@pytest.mark.parametrize("c", [0.5, 1.0])
def test_probability_flow(c):
    _, (actor, _), (other, _) = pair()
    ours, _, _, noise = batches()
    expected = jax.jit(lambda *x: mjx.ode_action(*x, c))(actor, ours.actor_observation, noise[0])
    found = maniskill.ode_action(other, torch.tensor(ours.actor_observation), torch.tensor(noise[0]), c)
    close(found.detach(), expected)


def test_trajectory_kl():
    _, (actor, _), (other, _) = pair()
    ours, theirs, (old, other_old), _ = batches()
    expected = jax.jit(mjx.trajectory_kl)(actor, old, ours.actor_observation, ours.trajectory)
    kl = maniskill.trajectory_kl(other, other_old, theirs.observation, theirs.trajectory)
    close(kl.detach(), expected)
    assert np.median(expected) > 0.01


def test_hl_gauss_and_q():
    args, (_, critic), (_, other) = pair()
    ours, theirs, _, _ = batches()
    close(maniskill.hl_gauss(args[1], theirs.target), mjx.hl_gauss(args[0], ours.target))
    logits = critic(ours.critic_observation, ours.action)
    q = maniskill.q_value(args[1], other(theirs.observation, theirs.action))
    close(q.detach(), mjx.q_value(args[0], logits))


def test_lambda_returns():
    rng = np.random.default_rng(1)
    args, _, _ = pair()
    reward, value, bonus = rng.normal(size=(3, 40, 16)).astype(np.float32)
    ends = rng.random((2, 40, 16)) < 0.1
    terminated, truncated = ends[0], ends[1] & ~ends[0]
    numbers = (reward, terminated, truncated, value, bonus)
    expected = mjx.lambda_returns(args[0], *map(jnp.asarray, numbers))
    close(maniskill.lambda_returns(args[1], *map(torch.tensor, numbers)), expected)


def test_critic_loss_and_gradient():
    args, (_, critic), (_, other) = pair()
    ours, theirs, _, _ = batches()
    value, gradient = jax.jit(jax.value_and_grad(lambda critic: mjx.critic_loss(critic, args[0], ours)))(
        critic
    )
    loss = maniskill.critic_loss(other, args[1], theirs)
    close(loss.detach(), value)
    same_gradient(gradient, other, torch.autograd.grad(loss, list(other.parameters())))


@pytest.mark.parametrize("bound", [0.0, 0.1, 1e9], ids=["all violated", "some violated", "none violated"])
def test_actor_loss_and_gradient(bound):
    args, (actor, critic), (other, other_critic) = pair()
    args = [dataclasses.replace(x, trust_region_bound=bound) for x in args]
    ours, theirs, (old, other_old), noise = batches()
    if bound == 0.1:  # the median, so that both branches are taken
        kl = mjx.trajectory_kl(actor, old, ours.actor_observation, ours.trajectory)
        args = [dataclasses.replace(x, trust_region_bound=float(np.median(kl))) for x in args]
    duals = {"log_alpha": jnp.log(0.3), "log_lambda": jnp.log(0.7)}
    log_duals = torch.nn.ParameterList(torch.tensor(np.log(x), dtype=torch.float32) for x in (0.3, 0.7))
    function = jax.jit(
        jax.value_and_grad(
            lambda actor: mjx.actor_loss(actor, args[0], old, critic, duals, ours, noise), has_aux=True
        )
    )
    (value, (l_bound, kl)), gradient = function(actor)
    learner = learner_of((other, other_critic), other_old, log_duals)
    loss, (other_bound, other_kl) = maniskill.actor_loss(learner, args[1], theirs, torch.tensor(noise))
    close(loss.detach(), value)
    close(other_bound, l_bound)
    close(other_kl, kl)
    same = torch.autograd.grad(loss, list(other.parameters()))
    same_gradient(gradient, other, same)
    ours_dual = jax.grad(mjx.dual_loss)(duals, args[0], l_bound, kl, A)
    dual = torch.autograd.grad(
        maniskill.dual_loss(log_duals, args[1], other_bound, other_kl, A), list(log_duals)
    )
    close(dual, [ours_dual["log_alpha"], ours_dual["log_lambda"]])


def test_updates():
    """Clipping and Adam too: after five minibatches the weights are the same."""
    args, networks, others = pair()
    args = [dataclasses.replace(x, minibatch_size=B, num_envs=B, num_steps=1) for x in args]
    setup = mjx.Setup(args[0], env=None, action_size=A, time_limit=0, mesh=None)
    duals = {name: jnp.log(jnp.asarray(0.01)) for name in ("log_alpha", "log_lambda")}
    optimizers = mjx.make_optimizers(args[0])
    opt_states = [o.init(p) for o, p in zip(optimizers, (*networks, duals), strict=True)]
    learner = mjx.Learner(*networks, duals, *opt_states)
    other = maniskill.init_learner(
        maniskill.Setup(args[1], torch.device("cpu"), None, None, OBS, OBS, OBS, A)
    )
    for network, source in zip(other[:2], others, strict=True):
        network.load_state_dict(source.state_dict())
    step = jax.jit(functools.partial(mjx.update_minibatch, setup))
    for k in range(5):
        ours, theirs, (old, other_old), _ = batches(k)
        other.old_actor.load_state_dict(other_old.state_dict())
        key = jax.random.PRNGKey(k)
        noise = np.array(jax.random.normal(key, (N + 1, B, A)))  # what update_minibatch draws
        learner, metrics = step(learner, old, ours, key)
        values = maniskill.update_minibatch(args[1], other, theirs, torch.tensor(noise))
        close(values, [metrics[name] for name in maniskill.UPDATE_METRICS], rtol=1e-4)
    for network, expected in zip(other[:2], (learner.actor, learner.critic), strict=True):
        for name, x in as_torch(expected).items():
            close(network.state_dict()[name], x, atol=1e-4, err_msg=name)
    close([x.detach() for x in other.log_duals], [learner.duals["log_alpha"], learner.duals["log_lambda"]])


def test_statistics():
    rng = np.random.default_rng(3)
    ours = mjx.init_statistics(jnp.zeros((7, OBS)))
    theirs = maniskill.init_statistics(
        maniskill.Setup(None, torch.device("cpu"), None, None, OBS, OBS, OBS, A)
    )
    for k in range(3):
        x = (rng.normal(size=(5, 7, OBS)) * (k + 1) + k).astype(np.float32)
        ours, theirs = mjx.update_statistics(ours, x), maniskill.update_statistics(theirs, torch.tensor(x))
    close(theirs.mean, ours.moments[0])
    close(theirs.variance, ours.moments[1])
    assert theirs.count == ours.count
    close(maniskill.normalize(theirs, torch.tensor(x)), mjx.normalize(ours, x))
