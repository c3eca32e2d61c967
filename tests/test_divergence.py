"""What trudi_mjx.py watches while it trains: metrics that are not finite, and the actor's contract."""

import shutil

import jax
import numpy as np
import pytest
from probes import EndOrTimeOut, lively_actor, setup_for, small_args
from runner import CLIFF, Runner, curve, metrics

import trudi_mjx as trudi


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("divergence"))


# --------------------------------------------------------------------------------------------------- divergence
def diverging(**changes):
    """Setup, a state and metrics of two seeds; the second one has a metric that is not finite."""
    args = small_args(num_seeds=2)
    setup = setup_for(EndOrTimeOut(), args, 3)
    state = jax.jit(jax.vmap(lambda key: trudi.init_state(setup, key)))(jax.random.split(jax.random.PRNGKey(0)))
    names = ("charts/episodes", "charts/episodic_return", "charts/episodic_length")
    found = {name: np.ones(2) for name in (*names, "charts/SPS", "losses/critic")}
    return args, state, found | changes


@pytest.mark.parametrize("name", ["losses/critic", "mine/penalty", "critic/target", "eval/episodic_return"])
def test_any_metric_that_is_not_finite_ends_its_seed(name, tmp_path, capsys):
    args, state, found = diverging(**{name: np.array([1.0, np.inf])})
    healthy = trudi.end_diverged(args, state, found, np.ones(2, bool), tmp_path)
    assert healthy.tolist() == [True, False]
    error = capsys.readouterr().err
    assert f"seed {args.seed + 1}: {name} not finite" in error
    kept = trudi.read_checkpoint(str(tmp_path / f"seed_{args.seed + 1}" / "diverged"))["state"]
    np.testing.assert_array_equal(kept["key"], state.key[1:])
    assert not (tmp_path / f"seed_{args.seed}").exists()


def test_a_seed_that_has_ended_is_not_looked_at_again(tmp_path):
    args, state, found = diverging(**{"losses/critic": np.array([1.0, np.nan])})
    healthy = trudi.end_diverged(args, state, found, np.array([True, False]), tmp_path)
    assert healthy.tolist() == [True, False] and not list(tmp_path.iterdir())


def test_rollouts_without_an_end_have_no_mean_return(tmp_path):
    missing = {f"charts/{name}": np.array([5.0, np.nan]) for name in ("episodic_return", "episodic_length")}
    args, state, found = diverging(**missing, **{"charts/episodes": np.array([3.0, 0.0])})
    assert trudi.end_diverged(args, state, found, np.ones(2, bool), tmp_path).all()
    assert "charts/episodic_return" not in trudi.metrics_of_seed(found, 1)


def test_one_seed_diverges_and_the_other_goes_on(runner):
    """The second seed's critic is spoilt in the checkpoint; the first one's curve is that of a run without it."""
    folder = runner.train_here(*CLIFF, "--num-seeds", "2", "--total-timesteps", "1280", "--eval-interval", "5")
    straight = runner.folder / "straight"
    shutil.copytree(folder, straight)
    runner.call("--resume", straight, "--total-timesteps", "2560")
    saved = trudi.read_checkpoint(str(folder))
    arrays = saved["state"]
    name = next(name for name in arrays if name.startswith("learner.critic.") and name.endswith("kernel.value"))
    arrays[name] = np.array(arrays[name])
    arrays[name][1] = np.nan
    shutil.rmtree(folder / "checkpoints")
    trudi.save_checkpoint(folder, arrays, 1280, {name: saved[name] for name in ("wall_time", "healthy")})
    _, err = runner.call("--resume", folder, "--total-timesteps", "1920", code=1)
    assert "seed 2" in err and "losses/critic" in err
    assert (folder / "seed_2" / "diverged" / "checkpoints" / "1408").is_dir()
    runner.call("--resume", folder, "--total-timesteps", "2560", code=1)  # and again, with one seed ended before
    assert curve(folder / "seed_1") == curve(straight / "seed_1")
    assert [event["step"] for event in metrics(folder / "seed_2")] == [128 * i for i in range(1, 12)]


# ------------------------------------------------------------------------------------------- the actor's contract
def first_iteration(actor=None):
    """Metrics (1, ...) of a run's first iteration, on observations whose statistics are not those of nothing."""
    args = small_args(num_diffusion_steps=2)
    setup = setup_for(EndOrTimeOut(), args, 3)
    state = jax.jit(lambda key: trudi.init_state(setup, key))(jax.random.PRNGKey(0))
    if actor:
        learner = state.learner._replace(actor=actor(args))
        state = state._replace(learner=learner)
    _, found = jax.jit(lambda state: trudi.iterate(setup, state))(state)
    return {name: np.asarray(x)[None] for name, x in found.items()}


def test_an_output_layer_that_starts_at_zero_is_what_it_takes():
    found = first_iteration()
    assert abs(found["trust_region/initial_kl"][0]) < 1e-6
    trudi.check_contract(found, 1)


def test_another_output_layer_ends_the_first_iteration():
    found = first_iteration(lambda args: lively_actor(args, 1, 1, seed=1))
    with pytest.raises(SystemExit) as stop:
        trudi.check_contract(found, 1)
    assert "iteration 1 " in stop.value.code and "output layer has to start at zero" in stop.value.code


class Mixing(trudi.Actor):
    """Asked for all steps of a stored chain at once, it lets them see each other."""

    def __call__(self, observation_part, time_part, latent):
        return super().__call__(observation_part, time_part, latent[:, ::-1] if latent.ndim == 3 else latent)


@pytest.mark.parametrize(
    ("kind", "trained", "mixes"), [(Mixing, True, True), (Mixing, False, False), (trudi.Actor, True, False)])
def test_an_actor_that_sees_other_latents_is_found_once_it_is_trained(kind, trained, mixes, monkeypatch):
    """While its output layer is 0 it sees none."""
    monkeypatch.setattr(trudi, "Actor", kind)
    args = small_args(num_diffusion_steps=2)
    actor = lively_actor(args, 1, 1, seed=1) if trained else kind(args, 1, 1, trudi.nnx.Rngs(1))
    observation = jax.random.normal(jax.random.PRNGKey(1), (64, 1))
    chain = trudi.sample_chain(actor, observation, jax.random.normal(jax.random.PRNGKey(2), (3, 64, 1)))
    kl = trudi.trajectory_kl(actor, actor, observation, chain.trajectory).mean()
    found = {"trust_region/initial_kl": np.asarray(kl)[None]}
    if not mixes:
        trudi.check_contract(found, 2)
        return
    with pytest.raises(SystemExit) as stop:
        trudi.check_contract(found, 2)
    assert "iteration 2 " in stop.value.code and "no latent but a^n" in stop.value.code


@pytest.mark.parametrize(("kl", "last"), [([0.1], 1), ([0, 0.1], 2), ([0, 0, 0.1], None)])
def test_training_checks_the_contract(kl, last, tmp_path, monkeypatch):
    """In the first two iterations. Here they do nothing but count."""
    args = small_args(log_dir=str(tmp_path), total_timesteps=3 * 128, eval_interval=9, checkpoint_interval=9)
    setup = setup_for(EndOrTimeOut(), args, 3)
    state = jax.vmap(lambda key: trudi.init_state(setup, key))(jax.random.PRNGKey(0)[None])
    kls = iter(kl)

    def iterate(state):
        zeros = dict.fromkeys(("charts/episodes", "charts/episodic_return", "charts/episodic_length"), np.zeros(1))
        return state._replace(iteration=state.iteration + 1), zeros | {"trust_region/initial_kl": np.array([next(kls)])}

    monkeypatch.setattr(trudi, "catch_signals", list)
    monkeypatch.setattr(trudi, "run_evaluation", lambda *_: {})
    programs = trudi.Programs(iterate, None)
    if last is None:
        assert trudi.train(setup, programs, state, {"wall_time": np.float64(1000)}) == 0
        (folder,) = tmp_path.iterdir()
        assert 1000 <= metrics(folder)[0]["wall_time"] < 1100  # goes on where a run is continued
    else:
        with pytest.raises(SystemExit, match=f"iteration {last} began 0.1 nats"):
            trudi.train(setup, programs, state, {})
