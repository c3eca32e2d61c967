"""Evaluation: its three ways to act, its episodes, its videos."""

import functools
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import SIGMA, Counter, EndOrTimeOut, schedule, setup_for, small_args

import trudi_mjx as trudi

STATES = 3000


def critic(observation, action):
    """Logits of a critic with atoms at -1 and 1 whose expectation is the action itself."""
    p = (jnp.clip(action[:, 0], -0.999, 0.999) + 1) / 2
    return jnp.stack([jnp.zeros_like(p), jnp.log(p / (1 - p))], -1)


def actions(**changes):
    """Of the untrained policy, which is symmetric, in as many states."""
    args = small_args(num_atoms=2, v_min=-1.0, v_max=1.0, **changes)
    learner = trudi.Learner(trudi.Actor(args, 1, 1, trudi.nnx.Rngs(0)), critic, *[None] * 4)
    setup = setup_for(Counter(), args, 3)
    seen = jnp.zeros((STATES, 1))
    return np.asarray(jax.jit(lambda key: trudi.evaluation_action(setup, learner, trudi.Inputs(seen, seen), key))(
        jax.random.PRNGKey(1)))


@pytest.mark.parametrize("k", [1, 2, 10])
def test_best_of_k_has_the_largest_q(k):
    """The best of K symmetric draws is negative in one case of 2^K."""
    u = actions(eval_mode="best-of-k", best_of_k=k)
    assert u.shape == (STATES, 1)
    np.testing.assert_allclose(np.mean(u < 0), 0.5**k, atol=4 * np.sqrt(0.25 / STATES) if k < 10 else 0.005)


def test_sde_is_one_sample():
    np.testing.assert_allclose(np.mean(actions(eval_mode="sde", best_of_k=10) < 0), 0.5, atol=4 * np.sqrt(0.25 / STATES))


@pytest.mark.parametrize("c", [0.5, 1.0])
def test_ode_scales_the_noise(c):
    """With f = 0 by the product of 1 + (1 - 2c) h / s^2."""
    scale = SIGMA * np.prod(1 + (1 - 2 * c) * schedule(8) / SIGMA**2)
    median = np.median(np.abs(np.arctanh(np.clip(actions(ode_score_scale=c), -0.99999, 0.99999))))
    np.testing.assert_allclose(median, 0.6745 * scale, rtol=0.05)


@pytest.fixture(scope="module")
def evaluated():
    """Of 64 episodes: half terminate after one step, the others last until the time limit of three; 1 is paid a step."""
    args = small_args(num_eval_envs=64, num_diffusion_steps=2)
    setup = setup_for(EndOrTimeOut(), args, 3)
    state = jax.jit(lambda key: trudi.init_state(setup, key))(jax.random.PRNGKey(0))
    evaluate = jax.vmap(functools.partial(trudi.evaluate, setup), axis_name="seed")
    metrics, _ = jax.jit(evaluate)(jax.tree.map(lambda x: x[None], state))
    names = {*metrics, *jax.eval_shape(lambda: trudi.iterate(setup, state))[1]}
    return {name: float(x[0]) for name, x in metrics.items()}, names


def test_episodes_count_up_to_their_end(evaluated):
    metrics, _ = evaluated
    long = (metrics["eval/episodic_length"] - 1) / 2  # the share of those that last three steps
    assert 0.3 < long < 0.7
    assert np.isclose(long * 64, round(long * 64), atol=1e-4)
    assert np.isclose(metrics["eval/episodic_return"], 1 + 2 * long)
    assert np.isclose(metrics["eval/episodic_return_std"], 2 * np.sqrt(long * (1 - long)))


def test_readme_names_metrics_that_are_logged(evaluated):
    root = pathlib.Path(trudi.__file__).parent
    pages = ["README.md", *(f"benchmark/{name}.md" for name in ("README", "errata", "troubleshooting", "copying"))]
    text = "\n".join((root / page).read_text() for page in pages)
    others = [(root / name).read_text() for name in ("trudi_maniskill.py", "trudi_humanoidbench.py")]
    named = set(re.findall(r"`((?:charts|losses|eval|trust_region|entropy|critic)/\w+)`", text))
    assert named
    unknown = named - evaluated[1] - {"charts/SPS"}
    assert all(any(f'"{name}"' in script for script in others) for name in unknown), unknown


@pytest.mark.parametrize("flags, name", [((), None), (("--capture-video",), "egl")])
def test_egl_is_needed_for_video_only(monkeypatch, flags, name):
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr("sys.argv", ["trudi_mjx.py", "--env-id", "CartpoleBalance", *flags])
    trudi.parse()
    assert os.environ.get("MUJOCO_GL") == name


def test_video_is_seen_by_the_camera_that_follows(monkeypatch, tmp_path):
    """Playground draws from one fixed place by default, which robots leave."""
    seen, written = [], []
    setup = trudi.make_setup(small_args(env_id="CheetahRun"))
    monkeypatch.setattr(setup.env, "render", lambda drawn, camera: seen.append(camera) or drawn)
    monkeypatch.setattr("mediapy.write_video", lambda path, pictures, fps: written.append((len(pictures), fps)))
    poses = trudi.Pose(*(np.zeros((1, 1000)) for _ in trudi.Pose._fields))
    trudi.write_video(setup, (poses, np.array([90])), tmp_path / "videos" / "one.mp4")
    assert seen == ["side"] and setup.env.dt == 0.01
    assert written == [(23, 25.0)]
