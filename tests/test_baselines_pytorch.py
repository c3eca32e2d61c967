"""benchmark/baselines for ManiSkill and Isaac Lab: what they share with their siblings is the same text, what they compute is
what those for JAX do, and they run."""

import ast
import dataclasses
import functools
import importlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm
from test_parity import as_torch as layers_as_torch

from benchmark.baselines import dime_mjx, ppo_mjx, reppo_mjx

torch = pytest.importorskip("torch")
pytest.importorskip("mani_skill")
pytest.importorskip("mjlab")

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmark" / "baselines"
SIMULATORS = ("maniskill", "isaaclab")
CPU = torch.device("cpu")
# The functions, classes and constants that a baseline has in common with its sibling by name, but not by text; besides those
# of the export, which baselines lack.
EXPORT = {"maniskill": "COMMAND_LINE_ONLY check_args main", "isaaclab": "COMMAND_LINE_ONLY check_args run"}
OWN = {
    "reppo": "PAPER Args MAY_CHANGE POSITIVE check_numbers Actor Critic UPDATE_METRICS Learner Batch init_learner critic_loss "
             "actor_loss update_minibatch take_rows Programs update_epochs Transition empty_rollout sample_policy rollout "
             "critic_targets update iterate evaluation_action warm_up check_contract",
    "dime": "INITIAL_DUAL Args MAY_CHANGE POSITIVE Actor UPDATE_METRICS Learner Batch init_learner actor_loss dual_loss "
            "update_minibatch take_rows Transition empty_rollout rollout update warm_up train",
    "ppo": "PAPER CPU Args MAY_CHANGE POSITIVE check_numbers Actor Critic UPDATE_METRICS Learner Batch init_learner "
           "critic_loss actor_loss update_minibatch take_rows Programs update_epochs Transition empty_rollout sample_policy "
           "rollout update iterate evaluation_action SAVED fill_state changing_tensors warm_up train"}
PPO_ON_ISAAC_LAB = "ACTION_LIMIT resolve"  # RSL-RL's actions are not clipped there, and some settings are a task's
PAIRS = [(algorithm, simulator) for algorithm in OWN for simulator in SIMULATORS]
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def script_of(algorithm, simulator="maniskill"):
    return importlib.import_module(f"benchmark.baselines.{algorithm}_{simulator}")


SIZES = dict(preset="cpu", num_envs=16, num_steps=8, num_epochs=1, minibatch_size=64, hidden_dim=16, total_timesteps=1280)


def small_args(algorithm, simulator="maniskill", **changes):
    script = script_of(algorithm, simulator)
    task = {} if simulator == "maniskill" else dict(env_id="Mjlab-Cartpole-Balance")
    args = script.resolve(script.Args(**{**SIZES, **task, **changes}))
    script.check_args(args)
    return args


# ---------------------------------------------------------------------------------------------------------- the files
@functools.cache
def definitions(path):
    """Functions, classes and constants at a module's top, by name: lines with decorators and comments, in order."""
    source, found = path.read_text(), {}
    lines = source.splitlines()
    for node in ast.parse(source).body:
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if named or isinstance(node, ast.Assign):
            first = min([node.lineno, *[x.lineno for x in getattr(node, "decorator_list", [])]])
            found[node.name if named else ast.unparse(node.targets[0])] = "\n".join(lines[first - 1:node.end_lineno])
    return found


def texts(algorithm, simulator):
    return definitions(FOLDER / f"{algorithm}_{simulator}.py"), definitions(ROOT / f"trudi_{simulator}.py")


@pytest.mark.parametrize(("algorithm", "simulator"), PAIRS)
def test_what_is_not_its_own_is_its_siblings(algorithm, simulator):
    """And what is said to be its own differs, so that the lists above say how a baseline differs from its sibling."""
    own, sibling = texts(algorithm, simulator)
    shared = [name for name in own if name in sibling]
    expected = f"{OWN[algorithm]} {EXPORT[simulator]}"
    if (algorithm, simulator) == ("ppo", "isaaclab"):
        expected = f"{expected} {PPO_ON_ISAAC_LAB}"
    assert {name for name in shared if own[name] != sibling[name]} == set(expected.split())
    assert shared == [name for name in sibling if name in own]
    assert len(shared) > 90


@pytest.mark.parametrize("algorithm", OWN)
def test_on_both_simulators_it_is_the_same_text(algorithm):
    """What differs is what differs between the siblings."""
    one, other = (texts(algorithm, simulator)[0] for simulator in SIMULATORS)
    named = {name for name in one.keys() & other.keys() if one[name].startswith(("def", "class", "@"))}
    assert {name for name in named if one[name] != other[name]} == {"Args", "resolve", "main"}
    constants = {name for name in one.keys() & other.keys() - named if one[name] != other[name]}
    siblings = [texts(algorithm, simulator)[1] for simulator in SIMULATORS]
    known = {name for name in constants if siblings[0].get(name) != siblings[1].get(name)}
    assert constants - known == ({"ACTION_LIMIT"} if algorithm == "ppo" else set())


@pytest.mark.parametrize("simulator", SIMULATORS)
def test_dimes_actor_is_trudis_but_for_its_docstring(simulator):
    actors = []
    for path in (ROOT / f"trudi_{simulator}.py", FOLDER / f"dime_{simulator}.py"):
        nodes = ast.parse(path.read_text()).body
        actor = next(node for node in nodes if getattr(node, "name", None) == "Actor")
        actors.append(ast.unparse(actor.body[1:]))
    assert actors[0] == actors[1]


@pytest.mark.parametrize(("algorithm", "simulator"), PAIRS)
def test_header_and_length(algorithm, simulator):
    path = FOLDER / f"{algorithm}_{simulator}.py"
    lines, sibling = (x.read_text().splitlines() for x in (path, ROOT / f"trudi_{simulator}.py"))
    assert len(lines) < len(sibling)
    sibling = [line for line in sibling if "onnxscript" not in line]  # baselines export nothing
    header = sibling.index("# ///") + 1
    assert lines[:header] == sibling[:header]  # what it requires
    doc = script_of(algorithm, simulator).__doc__
    assert f"python benchmark/baselines/{path.name}" in doc
    assert f"made from trudi_{simulator}.py" in doc and "arXiv" in doc


@pytest.mark.parametrize(("algorithm", "simulator"), PAIRS)
def test_common_flags_are_its_siblings(algorithm, simulator):
    """The same names, types, defaults and order; but each has its own exp_name and ways to evaluate."""
    script, sibling = script_of(algorithm, simulator), importlib.import_module(f"trudi_{simulator}")
    own, other = ({field.name: field for field in dataclasses.fields(x.Args)} for x in (script, sibling))
    assert list(own)[:6] == list(other)[:6]
    names = list(other)
    assert list(own)[list(own).index("device"):] == [x for x in names[names.index("device"):] if x in own]
    for x in (own.keys() & other.keys()) - {"exp_name", "eval_mode", "target_entropy_scale", "max_grad_norm"}:
        assert (own[x].type, own[x].default) == (other[x].type, other[x].default), x
    assert own["exp_name"].default == script.SCRIPT == f"{algorithm}_{simulator}"
    assert {*script.MAY_CHANGE, *script.POSITIVE, *script.SPLIT, *script.PAPER, *script.CPU} <= own.keys()
    gone = {"export"} | {"reppo": {"num_diffusion_steps", "prior_std", "learn_friction", "ode_score_scale"},
                         "dime": {"trust_region_bound"}}.get(algorithm, set())
    if algorithm != "ppo":
        assert other.keys() - own.keys() == gone


@pytest.mark.parametrize("env_id", ["Isaac-Velocity-Flat-G1", "Isaac-Velocity-Rough-H1-v0", "Mjlab-Cartpole-Balance",
                                    "Isaac-Repose-Cube-Shadow-Direct-v0", "Isaac-Reorient-Cube-Allegro-Direct"])
def test_entropy_and_kl_of_isaac_labs_tasks(env_id, monkeypatch):
    """As in RSL-RL's configurations of them, whose ids differ between versions; the command line is above them."""
    script = script_of("ppo", "isaaclab")
    monkeypatch.setattr(script.util, "find_spec", lambda name: name)  # simulators need not be installed to resolve
    expected = {"G1": (0.008, 0.01), "H1": (0.01, 0.01), "Cube": (0.005, 0.016), "Mjlab": (0.01, 0.01)}
    values = next(values for word, values in expected.items() if word in env_id)
    args = script.resolve(script.Args(env_id=env_id))
    assert (args.entropy_scale, args.desired_kl) == values
    assert script.resolve(script.Args(env_id=env_id, entropy_scale=0.5)).entropy_scale == 0.5
    assert args.minibatch_size * 4 == args.batch_size


# --------------------------------------------------------------------------------------------------------------- in JAX
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


# ---------------------------------------------------------------------------------------------------------------- runs
class Aim:
    """Pays least for actions far from half of what is observed; episodes are of one step. E environments see the same
    numbers after every reset, and again after 16 steps."""

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.numbers = torch.rand(16, num_envs, 1, generator=torch.Generator().manual_seed(num_envs)) * 2 - 1
        self.count = 0

    @property
    def seen(self):
        return self.numbers[self.count % 16]

    def pay(self, action):
        reward = -4 * (action[:, 0] - self.seen[:, 0] / 2) ** 2
        before = self.seen
        self.count += 1
        return reward, before


class AimScene(Aim):
    """With ManiSkillVectorEnv's interface."""

    def __init__(self, num_envs):
        super().__init__(num_envs)
        self.base_env = SimpleNamespace(elapsed_steps=torch.zeros(num_envs, dtype=torch.int32))

    def reset(self, seed):
        self.count = 0
        return self.seen, {}

    def step(self, action):
        reward, before = self.pay(action)
        late = torch.ones(self.num_envs, dtype=torch.bool)
        episode = {"return": reward, "episode_len": late.int()}
        return self.seen, reward, ~late, late, {"final_info": {"episode": episode}, "final_observation": before}


class AimSimulator(Aim):
    """With Isaac Lab's interface."""

    max_episode_length, step_dt, single_action_space, cfg = 1, 0.05, SimpleNamespace(shape=(1,)), SimpleNamespace()

    def __init__(self, num_envs):
        super().__init__(num_envs)
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long)

    def reset(self):
        self.count = 0
        return {"policy": self.seen}, {}

    def step(self, action):
        reward, before = self.pay(action)
        late = torch.ones(self.num_envs, dtype=torch.bool)
        return {"policy": self.seen}, reward, ~late, late, {"final_obs": {"policy": before}}

    def close(self):
        pass


LEARNING = dict(
    preset="cpu", num_envs=64, num_steps=16, minibatch_size=256, num_epochs=4, hidden_dim=32, total_timesteps=1024 * 12,
    gamma=0.5, num_diffusion_steps=2, num_eval_envs=16, eval_interval=4, checkpoint_interval=1, learning_rate=3e-3,
    actor_learning_rate=5e-3, critic_learning_rate=5e-3, device="cpu")


def run(monkeypatch, algorithm, simulator, *flags):
    """A script's main function on that task, with these flags; its exit code."""
    script = script_of(algorithm, simulator)

    def make_setup(args, device):
        scenes = [[AimScene(number)] for number in (args.num_envs, args.num_eval_envs)]
        envs = [script.ManiSkill(args, scene, 1, evaluation) for scene, evaluation in zip(scenes, (False, True), strict=True)]
        return script.Setup(args, device, *envs, observation_size=1, actor_sees=1, critic_sees=1, action_size=1)

    def make_mjlab(args, device, seed, stack):
        return AimSimulator(args.num_envs)

    name, stand_in = ("make_setup", make_setup) if simulator == "maniskill" else ("make_mjlab", make_mjlab)
    monkeypatch.setattr(script, name, stand_in)
    monkeypatch.setattr(sys, "argv", [f"{algorithm}_{simulator}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        script.main(*(() if simulator == "maniskill" else script.launch()))
    return stop.value.code


def flags_of(algorithm, simulator, log_dir):
    values = {name: x for name, x in LEARNING.items() if name in script_of(algorithm, simulator).Args.__annotations__}
    task = ["--env-id", "Mjlab-Cartpole-Balance"] if simulator == "isaaclab" else []
    return [*task, "--log-dir", log_dir, *(y for name, x in values.items() for y in ("--" + name.replace("_", "-"), x))]


def curve(folder):
    """What a run has logged of its learning; episodes under way are lost with a simulator, and so are not looked at."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lost = ("wall_time", "charts/SPS", "charts/success_once")
    return [{name: x for name, x in row.items() if name not in lost and "charts/epi" not in name} for row in rows]


@pytest.mark.parametrize(("algorithm", "simulator"), PAIRS)
def test_it_learns_and_continues_bit_for_bit(algorithm, simulator, tmp_path, monkeypatch, capsys):
    """And is evaluated, each way by one of its own."""
    assert run(monkeypatch, algorithm, simulator, *flags_of(algorithm, simulator, tmp_path)) == 0
    straight, = tmp_path.iterdir()
    assert straight.name.startswith({"maniskill": "PushCube-v1", "isaaclab": "Mjlab-Cartpole-Balance"}[simulator])
    assert f"__{algorithm}_{simulator}__1__" in straight.name
    found = curve(straight)
    assert [row["step"] for row in found] == [1024 * k for k in range(1, 13)]
    returns = [row["eval/episodic_return"] for row in found if "eval/episodic_return" in row]
    assert len(returns) == 3 and returns[-1] > -0.1  # an action of 0 has -1/3
    assert all(np.isfinite(x) for row in found for x in row.values())
    if algorithm == "reppo":
        assert found[0]["trust_region/initial_kl"] < 1e-6 < found[1]["trust_region/stored_kl"]
    other = tmp_path / "continued"
    shutil.copytree(straight, other)
    for path in sorted((other / "checkpoints").iterdir(), key=lambda path: int(path.stem))[1:]:
        path.unlink()
    assert run(monkeypatch, algorithm, simulator, "--resume", other) == 0
    assert curve(other) == found
    capsys.readouterr()
    evaluated = set()
    modes = script_of(algorithm, simulator).Args.__annotations__["eval_mode"].__args__
    for mode in modes:
        assert run(monkeypatch, algorithm, simulator, "--evaluate", straight, "--eval-mode", mode) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('{"eval'))
        evaluated.add(json.loads(line)["eval/episodic_return"])
    assert len(evaluated) == len(modes) and returns[-1] in evaluated


@pytest.mark.parametrize(("algorithm", "simulator"), PAIRS)
def test_warming_up_changes_nothing_in_a_learner(algorithm, simulator):
    """Nor where its tensors lie, as CUDA graphs remember that; the learning rate, if it changes, is one of them."""
    script = script_of(algorithm, simulator)
    args = small_args(algorithm, simulator)
    env = SimpleNamespace(observation=torch.zeros(16, 5))
    setup = script.Setup(args, CPU, env, env, 5, 5, 5, 2)
    state, programs = script.prepare(setup, {})
    before = [x.clone() for x in script.changing_tensors(state.learner)]
    script.warm_up(setup, programs, state.learner)
    after = script.changing_tensors(state.learner)
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=False)) and len(after) > len(before)
    assert not any(x.any() for x in after[len(before):])
    addresses = [x.data_ptr() for x in after]
    script.warm_up(setup, programs, state.learner)
    assert [x.data_ptr() for x in script.changing_tensors(state.learner)] == addresses


def test_reppo_predicts_what_follows(monkeypatch):
    """Features of the true next observations and of the actions that the targets are of, and rewards, in their states' rows."""
    script, args = script_of("reppo"), small_args("reppo", aux_loss_scale=1.0)
    env = script.ManiSkill(args, [AimScene(16)], 1, True)
    env.start(0)
    state, programs = script.prepare(script.Setup(args, CPU, env, env, 1, 1, 1, 1), {})
    setup = script.Setup(args, CPU, env, env, 1, 1, 1, 1)
    seen, actions = [], []

    def sample_policy(observation, sample=programs.sample_policy):
        found = sample(observation)
        actions.append(found.action)
        return found

    monkeypatch.setattr(script, "update_epochs", lambda setup, programs, batch: seen.append(batch) or {})
    with torch.no_grad():
        data = script.rollout(setup, programs, state.statistics)
        script.update(setup, programs._replace(sample_policy=sample_policy), state.learner, data, data.observation,
                      data.next_observation)
        features = state.learner.critic.features(data.next_observation, torch.stack(actions))
    batch, = seen
    assert batch.following.shape == (128, 17)
    close(batch.following[:, :-1], features.swapaxes(0, 1).reshape(128, 16))
    close(batch.following[:, -1], data.reward.T.flatten())
    assert torch.equal(batch.terminated, data.terminated.T.flatten())
    script.warm_up(setup, script.prepare(setup, {})[1], state.learner)


@pytest.mark.parametrize("simulator", SIMULATORS)
def test_reppos_contract(simulator):
    script = script_of("reppo", simulator)
    script.check_contract({"trust_region/initial_kl": 1e-5})
    with pytest.raises(SystemExit, match="output layer has to start at zero"):
        script.check_contract({"trust_region/initial_kl": 0.1})


def test_actions_of_ppo_are_clipped_on_maniskill_alone():
    """What is stored is not; the simulators get numbers of their own."""
    sent = {}
    for simulator in SIMULATORS:
        script, args = script_of("ppo", simulator), small_args("ppo", simulator)
        scene = AimScene(16) if simulator == "maniskill" else AimSimulator(16)
        pay, sent[simulator] = scene.pay, []
        scene.pay = lambda action, pay=pay, kept=sent[simulator]: [kept.append(action.clone()), pay(action)][1]
        env = script.ManiSkill(args, [scene], 1, True) if simulator == "maniskill" else script.IsaacLab(args, scene)
        env.start(0) if simulator == "maniskill" else env.reset(spread=False)
        setup = script.Setup(args, CPU, env, env, 1, 1, 1, 1)
        state, programs = script.prepare(setup, {})
        torch.manual_seed(0)
        with torch.no_grad():
            data = script.rollout(setup, programs, state.statistics)
        assert data.action.abs().max() > 1.5
        limit = 0.999 if simulator == "maniskill" else np.inf
        close(torch.stack(sent[simulator]), data.action.clamp(-limit, limit))


def test_a_real_task(tmp_path):
    """PushCube, from the command line."""
    launch = [ROOT / "tests" / "without_vulkan.py", FOLDER / "ppo_maniskill.py"]
    flags = [x for name, x in SIZES.items() for x in ("--" + name.replace("_", "-"), str(x))]
    flags += ["--num-envs", "2", "--minibatch-size", "8", "--total-timesteps", "32", "--num-eval-envs", "1"]
    done = subprocess.run([sys.executable, *map(str, launch), *flags, "--log-dir", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = curve(pathlib.Path(done.stdout.splitlines()[-1]))
    assert [row["step"] for row in rows] == [16, 32] and 0 <= rows[-1]["eval/success_once"] <= 1


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(("algorithm", "simulator"), PAIRS)
def test_values(algorithm, simulator, capsys):
    small_args(algorithm, simulator)  # fine as it is
    special = {"reppo": [dict(trust_region_bound=0.0), dict(aux_loss_scale=-1.0)], "dime": [dict(ode_score_scale=-1.0)],
               "ppo": [dict(entropy_scale=-1.0), dict(gae_lambda=1.1), dict(desired_kl=0.0), dict(epsilon=0.0)]}[algorithm]
    common = [dict(env_id="Cub"), dict(num_envs=0), dict(seed=-1), dict(gamma=1.0), dict(max_grad_norm=float("nan")),
              dict(minibatch_size=96), dict(total_timesteps=100)]
    for changes in common + special:
        with pytest.raises(SystemExit) as stop:
            small_args(algorithm, simulator, **changes)
        line, = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith(f"{algorithm}_{simulator}.py: error: ")
        assert any("--" + x.replace("_", "-") in line for x in changes)


@pytest.mark.parametrize(("algorithm", "simulator"), PAIRS)
def test_runs_of_other_scripts(algorithm, simulator, tmp_path, capsys, monkeypatch):
    """A run of TruDi is not continued by a baseline."""
    (tmp_path / "args.json").write_text(json.dumps({"args": {}, "script": f"trudi_{simulator}"}))
    monkeypatch.setattr(sys, "argv", [f"{algorithm}_{simulator}.py", "--resume", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        script_of(algorithm, simulator).parse()
    assert stop.value.code == 2 and f"it is of trudi_{simulator}.py" in capsys.readouterr().err
