"""benchmark/baselines in JAX, on Playground's and on Gymnasium's tasks: they learn, run, continue, and refuse bad input."""

import dataclasses
import json
import shutil
import sys

import aim
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runner import CLIFF, Runner, curve, metrics
from small_baselines import NAMES, args_of, script_of

from benchmark.baselines import dppo_mjx as dppo
from benchmark.baselines import reppo_mjx as reppo


# ------------------------------------------------------------------------------------------------------------ learning
@pytest.mark.parametrize("name", NAMES)
def test_learns_to_aim(name):
    """By iterations as a run has them; and each way to evaluate is one of its own."""
    script, steps = script_of(name), 20
    denoising = 2 if name == "dime_mjx" else 4  # each is compiled
    given = dict(env_id="G1JoystickRoughTerrain", preset="cpu", num_envs=64, num_steps=16, minibatch_size=256, num_epochs=4,
                 hidden_dim=32, num_eval_envs=4, total_timesteps=1024 * steps, gamma=0.5, num_diffusion_steps=denoising,
                 epsilon=0.1,
                 **dict.fromkeys(("learning_rate", "actor_learning_rate", "critic_learning_rate"), 3e-3))
    args = script.resolve(script.Args(**{x: v for x, v in given.items() if x in script.Args.__annotations__}))
    setup = script.Setup(args, aim.Playground(), 1, 1, jax.sharding.Mesh(jax.devices()[:1], ("env",)))
    start = jax.jit(lambda key: script.init_state(setup, key))(jax.random.PRNGKey(1))
    end, metrics = jax.jit(lambda state: jax.lax.scan(lambda x, _: script.iterate(setup, x), state, None, steps))(start)
    seen = jnp.tile(jnp.linspace(-1, 1, 41), 20)[:, None]

    def error(state, mode):
        normal = script.normalize(state.statistics, seen)
        own = setup._replace(args=dataclasses.replace(args, eval_mode=mode))
        inputs = script.Inputs(normal, normal)
        action = script.evaluation_action(own, state.learner, inputs, jax.random.PRNGKey(2))
        return float(((action - seen / 2) ** 2).mean())

    modes = script.Args.__annotations__["eval_mode"].__args__
    errors = [error(end, mode) for mode in modes]
    assert len(set(errors)) == len(modes)
    assert errors[0] < 0.3 * error(start, modes[0]), (errors, error(start, modes[0]))
    for values in (x for key, x in metrics.items() if not key.startswith("charts/episodic")):
        assert np.isfinite(values).all()
    for key in metrics.keys() & {"trust_region/stored_kl", "trust_region/fresh_kl"}:
        assert metrics[key].min() >= 0 < metrics[key].max()
    if "trust_region/initial_kl" in metrics:  # what check_contract asks of a run's first iteration
        assert metrics["trust_region/initial_kl"][0] < 1e-6


@pytest.mark.parametrize("script", [reppo, dppo])
def test_an_actor_that_sees_before_it_learns_ends_the_run(script):
    """The first rollout was normalised with other statistics, so that what it stored is not of the actor."""
    args = args_of(script)
    setup = script.Setup(args, aim.Playground(), 1, 1, jax.sharding.Mesh(jax.devices()[:1], ("env",)))
    state = jax.jit(lambda key: script.init_state(setup, key))(jax.random.PRNGKey(1))
    iterate = jax.jit(jax.vmap(lambda state: script.iterate(setup, state)))
    seeds = jax.tree.map(lambda x: x[None], state)
    script.check_contract(iterate(seeds)[1], 1)
    seeds.learner.actor.output.kernel[...] += 0.1
    with pytest.raises(SystemExit, match="output layer has to start at zero"):
        script.check_contract(iterate(seeds)[1], 1)


# ---------------------------------------------------------------------------------------------------------------- runs
SMALL = ("--preset cpu --num-envs 16 --num-steps 8 --num-epochs 1 --minibatch-size 64 --hidden-dim 16 --num-eval-envs 2 "
         "--total-timesteps 384 --eval-interval 20 --checkpoint-interval 1").split()
TWO_DEVICES = ("--num-devices", "2")
RESUMED = "ppo_mjx"  # its learner has what no other's has, a learning rate; checkpoints are the same text in all
GYMNASIUM = (
    "--preset cpu --num-envs 8 --num-steps 16 --num-epochs 1 --minibatch-size 64 --hidden-dim 16 --num-eval-envs 2 "
    "--total-timesteps 384 --eval-interval 3 --checkpoint-interval 1 --num-workers 1 --env-id Hopper-v5").split()


def runner_of(name, folder, small):
    runner = Runner(folder, f"benchmark/baselines/{name}.py")
    runner.small = small
    return runner


@pytest.mark.parametrize("name", NAMES)
def test_run(name, tmp_path):
    """Two seeds on two devices. One of the baselines is continued from the second of three iterations, and evaluated."""
    runner = runner_of(name, tmp_path, SMALL)
    straight = runner.train_here(*CLIFF, "--num-seeds", "2", *TWO_DEVICES)
    assert straight.name.startswith(f"own_tasks:Cliff__{name}__1__")
    assert json.loads((straight / "args.json").read_text())["script"] == name
    curves = [curve(straight / f"seed_{seed}") for seed in (1, 2)]
    expected = "losses/actor losses/critic charts/SPS charts/episodes charts/simulator_nans critic/target wall_time".split()
    assert all(x in event for event in metrics(straight / "seed_1") for x in expected)
    for events in curves:
        assert [event["step"] for event in events] == [128, 256, 384]
        assert all(np.isfinite(x) for event in events for x in event.values())
        assert 0 < events[-1]["eval/episodic_return"] <= 20
    assert curves[0][0]["losses/critic"] != curves[1][0]["losses/critic"]
    if name != RESUMED:
        return
    other = tmp_path / "continued"
    shutil.copytree(straight, other)
    shutil.rmtree(other / "checkpoints" / "384")
    runner.call("--resume", other)
    assert [curve(other / f"seed_{seed}") for seed in (1, 2)] == curves
    out, _ = runner.call("--evaluate", straight)
    evaluated = json.loads(out.splitlines()[-1])["eval/episodic_return"]
    np.testing.assert_allclose(evaluated, [events[-1]["eval/episodic_return"] for events in curves], rtol=1e-3)


@pytest.mark.parametrize("algorithm", ["reppo", "dime"])
def test_run_in_gymnasium(algorithm, tmp_path):
    """Three iterations; continued from the second, and evaluated."""
    runner = runner_of(f"{algorithm}_humanoidbench", tmp_path, GYMNASIUM)
    straight = runner.train_here()
    assert straight.name.startswith(f"Hopper-v5__{algorithm}_humanoidbench__1__")
    found = metrics(straight)
    assert [row["step"] for row in found] == [128, 256, 384] and found[-1]["eval/episodic_return"] > 0
    assert all(np.isfinite(x) for row in found for x in row.values())
    policy = {"reppo": "entropy/sample", "dime": "entropy/bound"}[algorithm]
    assert all(name in row for row in found for name in (policy, "losses/actor", "losses/critic", "critic/target"))
    if algorithm == "reppo":
        assert found[0]["trust_region/initial_kl"] < 1e-6 < found[1]["trust_region/stored_kl"]
    other = tmp_path / "continued"
    shutil.copytree(straight, other)
    for step in ("256", "384"):
        shutil.rmtree(other / "checkpoints" / step)
    runner.call("--resume", other)
    assert [row["step"] for row in curve(other)] == [128, 256, 384]
    # Episodes under way are lost with the workers, so what follows is another rollout by the same learner.
    assert curve(other)[0] == curve(straight)[0] and metrics(other)[1]["critic/target"] != found[1]["critic/target"]
    out, _ = runner.call("--evaluate", straight)
    evaluated = json.loads(out.splitlines()[-1])["eval/episodic_return"]
    np.testing.assert_allclose(evaluated, found[-1]["eval/episodic_return"], rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------ refusals
BAD = (dict(env_id="Cartpole"), dict(num_envs=0), dict(seed=-1), dict(gamma=1.0), dict(max_grad_norm=float("nan")),
       dict(minibatch_size=96), dict(total_timesteps=100), dict(num_devices=3))
BAD_IN_GYMNASIUM = {
    "reppo_humanoidbench": (*BAD, dict(env_id="Hoper-v5"), dict(aux_loss_scale=-1.0)),
    "dime_humanoidbench": (*BAD, dict(env_id="Hoper-v5"), dict(ode_score_scale=-1.0))}


@pytest.mark.parametrize("name", [*NAMES, *BAD_IN_GYMNASIUM])
def test_values(name, capsys):
    script = script_of(name)
    task = {"env_id": "Hopper-v5"} if name in BAD_IN_GYMNASIUM else {}
    args_of(script, **task)  # fine as it is
    for changes in BAD_IN_GYMNASIUM.get(name, BAD):
        with pytest.raises(SystemExit) as stop:
            args_of(script, **task | changes)
        line, = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert line.startswith(f"{name}.py: error: ")
        assert any("--" + x.replace("_", "-") in line for x in changes)


@pytest.mark.parametrize("name", [*NAMES, *BAD_IN_GYMNASIUM])
def test_runs_of_other_scripts(name, tmp_path, capsys, monkeypatch):
    """A run of TruDi is not continued by a baseline."""
    trudi = f"trudi_{name.split('_')[1]}"
    (tmp_path / "args.json").write_text(json.dumps({"args": {}, "script": trudi}))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--resume", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        script_of(name).parse()
    assert stop.value.code == 2
    assert f"it is of {trudi}.py" in capsys.readouterr().err
