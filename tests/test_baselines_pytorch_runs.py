"""benchmark/baselines in PyTorch, for ManiSkill and Isaac Lab: they learn, run, continue, and refuse bad input."""

import functools
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from runner import ManiSkillRunner
from small_baselines import PAIRS, SIMULATORS, SIZES, script_of, small_args

torch = pytest.importorskip("torch")
pytest.importorskip("mani_skill")
pytest.importorskip("mjlab")
import aim  # noqa: E402

CPU = torch.device("cpu")
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


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


LEARNING = dict(
    preset="cpu", num_envs=64, num_steps=16, minibatch_size=256, num_epochs=4, hidden_dim=32, total_timesteps=1024 * 12,
    gamma=0.5, num_diffusion_steps=2, num_eval_envs=16, eval_interval=4, checkpoint_interval=1, learning_rate=3e-3,
    actor_learning_rate=5e-3, critic_learning_rate=5e-3, device="cpu")


def run(monkeypatch, algorithm, simulator, *flags):
    """A script's main function on that task, with these flags; its exit code."""
    script = script_of(algorithm, simulator)

    def make_setup(args, device):
        scenes = [[aim.ManiSkill(number)] for number in (args.num_envs, args.num_eval_envs)]
        envs = [script.ManiSkill(args, scene, 1, evaluation) for scene, evaluation in zip(scenes, (False, True), strict=True)]
        return script.Setup(args, device, *envs, observation_size=1, actor_sees=1, critic_sees=1, action_size=1)

    def make_mjlab(args, device, seed, stack):
        return aim.IsaacLab(args.num_envs)

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
    env = script.ManiSkill(args, [aim.ManiSkill(16)], 1, True)
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
    script.check_contract({"trust_region/initial_kl": 1e-5}, 1)
    with pytest.raises(SystemExit, match="output layer has to start at zero"):
        script.check_contract({"trust_region/initial_kl": 0.1}, 1)


def test_actions_of_ppo_are_clipped_on_maniskill_alone():
    """What is stored is not; the simulators get numbers of their own."""
    sent = {}
    for simulator in SIMULATORS:
        script, args = script_of("ppo", simulator), small_args("ppo", simulator)
        scene = aim.ManiSkill(16) if simulator == "maniskill" else aim.IsaacLab(16)
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
    sizes = SIZES | dict(num_envs=2, minibatch_size=8, num_epochs=1, total_timesteps=32, num_eval_envs=1)
    flags = [x for name, value in sizes.items() for x in ("--" + name.replace("_", "-"), value)]
    rows = curve(ManiSkillRunner(tmp_path, "benchmark/baselines/ppo_maniskill.py").train(*flags))
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
