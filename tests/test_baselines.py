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
from scipy.stats import norm
from test_runs import Runner, curve, metrics

import trudi_mjx
from benchmark.baselines import reppo_mjx as reppo

FOLDER = pathlib.Path(reppo.__file__).parent
# The functions, classes and constants that a baseline has in common with trudi_mjx.py by name, but not by text.
OWN = {
    "reppo_mjx": "PRESET Args resolve Transition Actor Batch actor_loss update_minibatch learn sample_policy rollout improve "
                 "evaluation_action"}
NAMES = sorted(OWN)
SIZES = dict(preset="cpu", num_envs=16, num_steps=8, minibatch_size=64, hidden_dim=16, num_eval_envs=4, total_timesteps=1280)


def script_of(name):
    return importlib.import_module(f"benchmark.baselines.{name}")


def small_args(script, **changes):
    return script.resolve(script.Args(**{**SIZES, **changes}))


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
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_its_own_is_trudis(name):
    """And what is said to be its own differs, so that the list above says how a baseline differs from trudi_mjx.py."""
    trudi, own = (definitions(path) for path in (pathlib.Path(trudi_mjx.__file__), FOLDER / f"{name}.py"))
    shared = [x for x in own if x in trudi]
    assert {x for x in shared if own[x] != trudi[x]} == set(OWN[name].split())
    assert shared == [x for x in trudi if x in own]
    assert len(shared) > 40


@pytest.mark.parametrize("name", NAMES)
def test_header_and_length(name):
    path = FOLDER / f"{name}.py"
    lines, trudi = path.read_text().splitlines(), pathlib.Path(trudi_mjx.__file__).read_text().splitlines()
    assert len(lines) <= 650
    assert lines[:5] == trudi[:5]  # what it requires
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
    batch = reppo.Batch(jnp.zeros((3, 1)), jnp.zeros((3, 1)), None, jnp.asarray(MEAN), jnp.asarray(STD), None)

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


def test_reppo_starts_as_a_standard_normal():
    args = small_args(reppo)
    mean, std = reppo.Actor(args, 5, 3, reppo.nnx.Rngs(0))(normals(3, 40, 5))
    np.testing.assert_array_equal(mean, np.zeros((40, 3)))
    np.testing.assert_array_equal(std, np.ones((40, 3)))


# ---------------------------------------------------------------------------------------------------------------- runs
SMALL = ("--preset cpu --num-envs 16 --num-steps 8 --num-epochs 1 --minibatch-size 64 --hidden-dim 16 --num-eval-envs 2 "
         "--total-timesteps 384 --eval-interval 20 --checkpoint-interval 1").split()
TWO_DEVICES = dict(XLA_FLAGS="--xla_force_host_platform_device_count=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("baselines")


def runner_of(name, folder):
    runner = Runner(folder)
    runner.script, runner.small = f"benchmark/baselines/{name}.py", SMALL
    return runner


@pytest.mark.parametrize("name", NAMES)
def test_run(name, folder):
    """Two seeds on two devices; continued from the second of three iterations, it is the same; evaluated, as at its end."""
    runner = runner_of(name, folder)
    straight = runner.train("--num-seeds", "2", "--num-devices", "2", **TWO_DEVICES)
    assert straight.name.startswith(f"CartpoleBalance__{name}__1__")
    assert json.loads((straight / "args.json").read_text())["script"] == name
    curves = [curve(straight / f"seed_{seed}") for seed in (1, 2)]
    expected = "losses/actor losses/critic charts/SPS charts/episodes charts/simulator_nans trust_region/kl wall_time".split()
    assert all(x in event for event in metrics(straight / "seed_1") for x in expected)
    for events in curves:
        assert [event["step"] for event in events] == [128, 256, 384]
        assert all(np.isfinite(x) for event in events for x in event.values())
        assert 0 < events[-1]["eval/episodic_return"] <= 1000
    assert curves[0][0]["losses/critic"] != curves[1][0]["losses/critic"]
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
