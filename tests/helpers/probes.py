"""Stand-ins whose right answers are known: actors with given drifts, environments with given values."""

import dataclasses
import json
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm

import trudi_mjx as trudi

SIGMA = 2.5  # the prior's standard deviation


def small_args(**changes):
    """Resolved arguments of a run of toy size, with MJX for the small tasks: its programs are kept, the engine's are not."""
    sizes = dict(num_envs=16, num_steps=8, minibatch_size=64, hidden_dim=16, num_eval_envs=4, total_timesteps=1280)
    if changes.get("env_id", "CartpoleBalance") in trudi.DMC:
        sizes["impl"] = "jax"
    args = trudi.resolve(trudi.Args(**{"preset": "cpu", **sizes, **changes}))
    trudi.check_args(args)
    return args


def saved_run(folder):
    """A run's folder, of which the checkpoint holds something else than a training state."""
    args = dataclasses.asdict(small_args(total_timesteps=128))
    (folder / "args.json").write_text(json.dumps({"args": args, "script": "trudi_mjx"}))
    trudi.save_checkpoint(folder, {"a.b": np.arange(1000.0), "c": np.zeros((20, 30))}, 128, {"wall_time": np.float64(12.5)})
    return folder


# ------------------------------------------------------------------------------------------------------- actors
@dataclasses.dataclass(eq=False)
class Drift:
    """An actor of given step sizes (N, A), and f a function of state, the step's row of `time` and the latents."""

    f: callable
    h: np.ndarray
    time: np.ndarray = None
    prior_std: float = SIGMA

    def step_sizes(self):
        return jnp.asarray(self.h, jnp.float32)

    def embed(self, observation):
        time = np.arange(1.0, len(self.h) + 1)[:, None] if self.time is None else self.time
        return observation, jnp.asarray(time, jnp.float32)

    def __call__(self, observation_part, time_part, latent):
        return self.f(observation_part, time_part, latent)


def schedule(n_steps, friction=1.0):
    """method: h^n for n = 1 ... N with the paper's constants."""
    n = np.arange(1, n_steps + 1)
    kappa = 0.999 * np.cos(np.pi / 2 * (1.008 - n / n_steps) / 1.008) ** 2 + 1e-3
    return 0.125 * kappa[:, None] / np.broadcast_to(friction, np.shape(friction) or (1,))


class Mixture:
    """A 1-D mixture of Gaussians of equal weights, noised by the prior's process for the times t_1 ... t_N."""

    def __init__(self, means, std, times):
        self.times = np.asarray(times)
        decay = np.exp(-self.times / SIGMA**2)[:, None]
        self.means = decay * np.asarray(means)  # (N, M)
        self.variances = decay**2 * std**2 + SIGMA**2 * (1 - decay**2)  # (N, 1)
        self.h = np.diff(self.times, prepend=0.0)[:, None]

    def correction(self, xp, means, variance, a):
        """f: twice the difference of the noised target's score at a (..., 1) from the prior's."""
        logits = -((a - means) ** 2) / (2 * variance)
        weights = xp.exp(logits - logits.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        score = -(weights * (a - means)).sum(-1, keepdims=True) / variance
        return 2 * (score + a / SIGMA**2)

    def actor(self):
        """The policy whose score is exact at every step."""
        def f(state, time, a):
            return self.correction(jnp, time[..., :-1], time[..., -1:], a)

        return Drift(f, self.h, np.concatenate([self.means, self.variances], -1))

    def drift(self, n, a):
        """f at step n = 1 ... N on a grid (G,), in double precision."""
        return self.correction(np, self.means[n - 1], self.variances[n - 1], a[:, None])[:, 0]


GRID = np.linspace(-16, 16, 1601)


def density_after(h, drift):
    """The density of a^0 on GRID, pushed from the prior through the N Gaussian kernels; drift(n, grid) is f."""
    width = GRID[1] - GRID[0]
    density = norm.pdf(GRID, scale=SIGMA)
    for n in range(len(h), 0, -1):
        mean = GRID + h[n - 1] * (-GRID / SIGMA**2 + drift(n, GRID))
        density = norm.pdf(GRID[:, None], mean, np.sqrt(2 * h[n - 1])) @ density * width
    return density


def expectation(density, values):
    """Of values on GRID under a density on GRID; 0 log 0 is 0."""
    return np.sum(np.where(density > 1e-300, density * values, 0.0)) * (GRID[1] - GRID[0])


def squashed_entropy(density):
    """Entropy of tanh(x), x of this density on GRID."""
    log_density = np.log(np.maximum(density, 1e-300))
    return expectation(density, -log_density - 2 * np.log(np.cosh(GRID)))


# ------------------------------------------------------------------------------------------------- environments
class Sim(namedtuple("Sim", "obs reward done count limit")):
    """Simulator states, with a public `replace` and an `info` as Playground's have."""

    info = {}

    def replace(self, **changes):
        return self._replace(**changes)


class Counter:
    """Counts an episode's steps, shows and pays what it has counted, and terminates after `limit` of them."""

    action_size = 1

    def __init__(self, limit=1_000_000):
        self.limit = limit

    def reset(self, key):
        zero = jnp.zeros(())
        return Sim(zero[None], zero, zero, jnp.zeros((), int), jnp.asarray(self.limit))

    def step(self, sim, action):
        count = sim.count + 1
        return sim._replace(obs=count[None].astype(float), reward=count.astype(float), count=count,
                            done=(count >= sim.limit).astype(float))


class EndOrTimeOut:
    """Pays 1 for every step. Half of the episodes terminate at once, worth 1; the others never, worth 1 / (1 - gamma)."""

    action_size = 1

    def reset(self, key):
        ends = jax.random.bernoulli(key).astype(float)
        return Sim(ends[None], jnp.zeros(()), jnp.zeros(()), jnp.zeros((), int), jnp.zeros((), int))

    def step(self, sim, action):
        return sim._replace(reward=jnp.ones(()), done=sim.obs[0])


def setup_for(env, args, time_limit):
    """The Setup of a stand-in environment, built as the script builds its own."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("env",))
    return trudi.Setup(args, env, env.action_size, time_limit, mesh)


def lively_actor(args, observation_size, action_size, seed):
    """A real actor with random weights everywhere, its last layer and step sizes included."""
    actor = trudi.Actor(args, observation_size, action_size, trudi.nnx.Rngs(seed))
    keys = jax.random.split(jax.random.PRNGKey(seed), 2)
    actor.output.kernel[...] = jax.random.normal(keys[0], actor.output.kernel[...].shape) / args.hidden_dim**0.5
    actor.raw_friction[...] += 0.3 * jax.random.normal(keys[1], (action_size,))
    return actor
