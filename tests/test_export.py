"""Policies exported to ONNX act as the scripts' evaluations do."""

import importlib
import json
import pathlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from loops import lively

torch = pytest.importorskip("torch")

SIZES = dict(preset="cpu", hidden_dim=16, num_diffusion_steps=3, ode_score_scale=0.7)
SEEN, ACTIONS, STATES = 5, 3, 7  # numbers of an observation, of an action; observations
LOW, HIGH = np.float32([-2, -1, 0]), np.float32([2, 1, 10])
MODES = pytest.mark.parametrize("mode", ["ode", "sde"])


def act(path, observation, noise):
    """Actions of an ONNX file, run on one core, and what it says of itself."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    feeds = {"observation": np.asarray(observation, np.float32), "noise": np.asarray(noise, np.float32)}
    return session.run(["action"], feeds)[0], session.get_modelmeta().custom_metadata_map


def resolved(script, path, mode, env_id):
    return script.resolve(script.Args(env_id=env_id, eval_mode=mode, evaluate="runs/RUN", export=str(path), **SIZES))


def check(path, observation, noise, expected, facts):
    """For all observations, and for one alone: the batch's size is free."""
    for rows in (slice(None), slice(2, 3)):
        action, found = act(path, observation[rows], noise[rows])
        np.testing.assert_allclose(action, expected[rows], rtol=1e-5, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 0.5  # the observation matters
    for name, value in facts.items():
        assert found[name] == str(value)
    onnx.checker.check_model(str(path))


def check_lines(path, observation, monkeypatch):
    """The lines of Python in copying.md act with a file as `act` does."""
    page = (pathlib.Path(__file__).parent.parent / "benchmark" / "copying.md").read_text()
    (lines,) = [text for text in re.findall("```python\n(.*?)```", page, re.S) if "onnxruntime" in text]
    noises, actions = [], []

    def normal(shape, draw=np.random.standard_normal):
        noises.append(draw(shape))
        return noises[-1]

    def move(action):
        actions.append(action)
        if len(actions) == 3:
            raise EOFError

    monkeypatch.setattr(np.random, "standard_normal", normal)
    monkeypatch.chdir(path.parent)
    with pytest.raises(EOFError):
        exec(lines, {"read_sensors": lambda: observation, "move": move})
    for noise, action in zip(noises, actions, strict=True):
        np.testing.assert_allclose(act(path, observation, noise)[0][0], action, rtol=1e-5, atol=1e-5)


@MODES
@pytest.mark.parametrize("name", ["trudi_mjx", "trudi_humanoidbench"])
def test_jax(name, mode, tmp_path, monkeypatch):
    script = importlib.import_module(name)
    path = tmp_path / "policy.onnx"
    args = resolved(script, path, mode, "CartpoleBalance" if name == "trudi_mjx" else "Hopper-v5")
    actor = lively(script.Actor(args, SEEN, ACTIONS, script.nnx.Rngs(0)), 3)
    actor.output.kernel[...] *= 20
    rng = np.random.default_rng(0)
    moments = jnp.asarray([rng.normal(size=SEEN), rng.uniform(1, 4, SEEN)], jnp.float32)
    observation = rng.normal(2, 3, (STATES, SEEN)).astype(np.float32)

    box = script.Task(SEEN, None, 30, LOW, HIGH) if name == "trudi_humanoidbench" else None
    setup = SimpleNamespace(args=args, action_size=ACTIONS, env=box)
    state = SimpleNamespace(
        learner=SimpleNamespace(actor=actor, critic=lambda *_: jnp.zeros((STATES, args.num_atoms))),
        statistics=script.Statistics(jnp.float32(9), moments), iteration=jnp.int32(4),
    )
    seen = script.normalize(state.statistics, observation)
    if not box:  # the critic sees something else
        both = {"state": moments, "privileged_state": jnp.ones((2, SEEN + 2))}
        state.statistics = script.Statistics(jnp.float32(9), both)
    key = jax.random.PRNGKey(1)
    expected = script.evaluation_action(setup, state.learner, script.Inputs(seen, seen), key)
    expected = np.clip(expected, -script.ACTION_LIMIT, script.ACTION_LIMIT)
    facts = dict(env_id=args.env_id, script=name, eval_mode=mode, ode_score_scale=0.7, num_diffusion_steps=3,
                 iteration=4)
    if box:
        expected = LOW + (expected + 1) / 2 * (HIGH - LOW)
        facts |= {"action_low": LOW.tolist(), "action_high": HIGH.tolist()}
    else:  # the first of two seeds
        facts |= {"action_scale": 1.0}
        state.learner = script.Learner(**{**dict.fromkeys(script.Learner._fields), "actor": actor})
        state = SimpleNamespace(**jax.tree.map(lambda x: jnp.stack([x, x + 1]), vars(state)))
    if mode == "ode":
        noise = jax.random.normal(key, (STATES, ACTIONS))
    else:
        one, = jax.random.split(key, 1)
        noise = jax.random.normal(one, (4, STATES, ACTIONS)).swapaxes(0, 1)
    export = script.export_policy if box else script.export_first_seed
    export(setup, state)
    check(path, observation, noise, expected, facts)
    if mode == "ode":
        check_lines(path, observation[:1], monkeypatch)


@MODES
@pytest.mark.parametrize("name", ["trudi_maniskill", "trudi_isaaclab"])
def test_pytorch(name, mode, tmp_path):
    if name == "trudi_maniskill":
        pytest.importorskip("mani_skill")
    script = importlib.import_module(name)
    path = tmp_path / "policy.onnx"
    args = resolved(script, path, mode, "PushCube-v1" if name == "trudi_maniskill" else "Mjlab-Cartpole-Balance")
    generator = torch.Generator().manual_seed(0)
    actor = script.Actor(args, SEEN, ACTIONS)
    for parameter in actor.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    actor.output.weight.data *= 2
    observation = 2 + 3 * torch.randn(STATES, SEEN, generator=generator)
    privileged = torch.randn(STATES, 2, generator=generator)  # which the critic alone sees

    statistics = script.Statistics(9, torch.randn(SEEN + 2, generator=generator), torch.full((SEEN + 2,), 2.0))
    setup = SimpleNamespace(args=args, action_size=ACTIONS, actor_sees=SEEN, device=torch.device("cpu"))
    state = SimpleNamespace(learner=SimpleNamespace(actor=actor, critic=lambda *_: torch.zeros(STATES, args.num_atoms)),
                            statistics=statistics, iteration=4)
    seen = script.normalize(statistics, torch.cat([observation, privileged], -1))
    torch.manual_seed(1)
    with torch.no_grad():
        expected = script.evaluation_action(setup, state.learner, seen)
    expected = 0.5 * expected.clamp(-script.ACTION_LIMIT, script.ACTION_LIMIT)
    torch.manual_seed(1)
    noise = torch.randn(STATES, ACTIONS) if mode == "ode" else torch.randn(4, STATES, ACTIONS).movedim(0, 1)
    terms = ["base: 3", "joints: 2"]
    script.export_policy(setup, state, 0.5, terms)
    facts = dict(env_id=args.env_id, script=name, eval_mode=mode, num_diffusion_steps=3, action_scale=0.5,
                 iteration=4, observation_terms=json.dumps(terms))
    check(path, observation, noise, np.asarray(expected), facts)
