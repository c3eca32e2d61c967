"""Observation statistics, and what the networks see."""


import jax.numpy as jnp
import numpy as np

import trudi_mjx as trudi


def test_statistics_of_batches_are_those_of_their_union():
    rng = np.random.default_rng(2)
    kinds = ((5, 1, 8), (-3, 10, 1), (100, 0.1, 30), (0, 2, 4))
    batches = [rng.normal(loc, scale, (steps, 16, 3)) for loc, scale, steps in kinds]
    statistics = trudi.init_statistics({"state": jnp.zeros((16, 3)), "privileged_state": jnp.zeros((16, 2))})
    for batch in batches:
        observations = {"state": jnp.asarray(batch), "privileged_state": jnp.asarray(2 * batch[..., :2])}
        statistics = trudi.update_statistics(statistics, observations)
    union = np.concatenate([batch.reshape(-1, 3) for batch in batches])
    assert statistics.count == len(union)
    moments = np.stack([union.mean(0), union.var(0)])
    np.testing.assert_allclose(statistics.moments["state"], moments, rtol=1e-4)
    np.testing.assert_allclose(statistics.moments["privileged_state"], [2 * moments[0, :2], 4 * moments[1, :2]], rtol=1e-4)


def test_normalized_observations():
    statistics = trudi.Statistics(jnp.ones(()), jnp.array([[1.0, 0.0, 5.0], [3.99, 0.0, 1.0]]))
    observation = jnp.array([[3.0, 0.05, 1e6], [1.0, -0.1, -1e6]])
    np.testing.assert_allclose(trudi.normalize(statistics, observation), [[1, 0.5, 10], [0, -1, -10]], rtol=1e-5)


def test_privileged_observations_are_the_critics():
    seen = trudi.network_inputs({"state": jnp.zeros((2, 3)), "privileged_state": jnp.ones((2, 5))})
    assert [x.shape for x in seen] == [(2, 3), (2, 5)]
    assert [x.shape for x in trudi.network_inputs(jnp.zeros((2, 4)))] == [(2, 4), (2, 4)]
