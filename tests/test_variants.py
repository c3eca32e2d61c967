"""benchmark/studies/variants.py: what each variant of trudi_mjx.py computes."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from probes import Counter, lively_actor, setup_for, small_args

import trudi_mjx as trudi
from benchmark.studies import variants


@pytest.mark.parametrize("count", [1, 2])
def test_some_steps_have_the_kl_of_all_in_the_mean(count, monkeypatch):
    args = small_args(num_diffusion_steps=4)
    old, new = (lively_actor(args, 3, 2, seed=seed) for seed in (1, 2))
    observation = jax.random.normal(jax.random.PRNGKey(0), (16, 3))
    noise = jax.random.normal(jax.random.PRNGKey(1), (5, 16, 2))
    trajectory = trudi.sample_chain(old, observation, noise).trajectory
    whole = trudi.trajectory_kl(new, old, observation, trajectory)

    found = []
    for steps in itertools.combinations(range(4), count):
        monkeypatch.setattr(jax.random, "choice", lambda *_, steps=steps, **__: jnp.array(steps))
        found.append(variants.partial_kl(count, new, old, observation, trajectory))
    assert np.std(found, 0).min() > 1e-3  # the steps' shares differ
    np.testing.assert_allclose(np.mean(found, 0), whole, rtol=1e-4)


def test_other_states_have_other_steps():
    args = small_args(num_diffusion_steps=4)
    old, new = (lively_actor(args, 3, 2, seed=seed) for seed in (1, 2))
    observation = jnp.ones((1, 3))
    shares = set()
    for seed in range(20):  # the same state and chain but for a first number that hardly matters
        latents = jnp.ones((1, 4, 2)).at[0, 0, 0].add(seed * 1e-6)
        kl = variants.partial_kl(1, new, old, observation, trudi.Trajectory(latents, latents))
        shares.add(round(float(kl[0]), 2))
    assert len(shares) == 4


def test_the_actor_steps_at_every_second_minibatch():
    args = small_args(num_steps=16, num_epochs=2, num_diffusion_steps=2)
    setup = setup_for(Counter(), args, 5)
    learner = trudi.init_state(setup, jax.random.PRNGKey(0)).learner
    column = jnp.zeros((256, 1))
    chains = jnp.zeros((256, 2, 1))
    batch = trudi.Batch(column, column, column, trudi.Trajectory(chains, chains), column[:, 0])
    with variants.varied("actor-2"):
        learner, _ = jax.jit(functools.partial(trudi.update_epochs, setup))(learner, batch, jax.random.PRNGKey(1))
    minibatches = 2 * 256 // args.minibatch_size

    def count(state):
        return int(optax.tree_utils.tree_get(state, "count"))

    assert count(learner.critic_opt_state) == minibatches
    assert count(learner.actor_opt_state) == count(learner.dual_opt_state) == minibatches / 2


def test_an_odd_number_of_minibatches_is_refused(capsys):
    setup = trudi.make_setup(small_args(num_steps=12))  # 3 of 64 states
    with pytest.raises(SystemExit) as end:
        variants.update_in_pairs(setup, None, None, None)
    assert end.value.code == 2 and "--minibatch-size" in capsys.readouterr().err


@pytest.mark.parametrize("n_steps", [4, 8, 16])
def test_unit_time(n_steps):
    actor = lively_actor(small_args(num_diffusion_steps=n_steps), 3, 2, seed=1)
    own = actor.step_sizes()
    with variants.varied("unit-time"):
        np.testing.assert_allclose(actor.step_sizes() / own, 8 / n_steps, rtol=1e-6)
    np.testing.assert_array_equal(actor.step_sizes(), own)


def test_the_run_is_named_after_its_variant(monkeypatch):
    given = []
    monkeypatch.setattr(trudi, "main", lambda: given.append(sys.argv[1:]))
    for flags in (["--seed", "2"], ["--resume", "runs/x"]):
        monkeypatch.setattr(sys, "argv", ["variants", "kl-2", *flags])
        variants.main()
    assert given == [["--exp-name", "kl-2", "--seed", "2"], ["--resume", "runs/x"]]


def test_an_unknown_variant_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["variants", "--env-id", "CheetahRun"])
    with pytest.raises(SystemExit) as end:
        variants.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and len(error.splitlines()) == 1 and "kl-2, kl-4, actor-2, unit-time" in error
