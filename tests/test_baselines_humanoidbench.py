"""benchmark/baselines for HumanoidBench and Gymnasium: their text is that of their sibling and of the baselines for
Playground, whose losses test_baselines.py checks; and they run."""

import dataclasses
import importlib
import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest
from test_baselines import OWN as OWN_IN_PLAYGROUND
from test_baselines import definitions
from test_runs import Runner, curve, metrics

import trudi_humanoidbench as trudi

ROOT = pathlib.Path(trudi.__file__).parent
FOLDER = ROOT / "benchmark" / "baselines"
# What a baseline has in common with trudi_humanoidbench.py by name, but not by text.
OWN = {
    "reppo": "PAPER COMMAND_LINE_ONLY MAY_CHANGE Args POSITIVE check_args check_numbers Actor Critic Batch critic_loss "
             "actor_loss update_minibatch update_epochs Transition sample_policy collect make_transition critic_targets update "
             "evaluation_action Compiled make_programs check_contract run",
    "dime": "COMMAND_LINE_ONLY MAY_CHANGE Args POSITIVE check_args Actor Learner Batch actor_loss dual_loss update_minibatch "
            "update_epochs Transition new_state collect make_transition update run_training run"}
# Besides the arguments and the main loop, in which trudi_mjx.py and trudi_humanoidbench.py differ, too.
ALGORITHM = {"reppo": "Actor Critic Batch critic_loss actor_loss update_minibatch update_epochs Transition sample_policy "
                      "critic_targets update evaluation_action Sample sample_gaussian gaussian_kl check_contract check_numbers",
             "dime": "Actor Learner Batch actor_loss dual_loss update_minibatch update_epochs Transition update"}
ALGORITHMS = pytest.mark.parametrize("algorithm", OWN)
SMALL = (
    "--preset cpu --num-envs 8 --num-steps 16 --num-epochs 1 --minibatch-size 64 --hidden-dim 16 --num-eval-envs 2 "
    "--total-timesteps 384 --eval-interval 3 --checkpoint-interval 1 --num-workers 1 --env-id Hopper-v5").split()


def script_of(algorithm):
    return importlib.import_module(f"benchmark.baselines.{algorithm}_humanoidbench")


def texts(algorithm):
    """Definitions of the baseline, of its sibling and of the baseline for Playground."""
    paths = (FOLDER / f"{algorithm}_humanoidbench.py", ROOT / "trudi_humanoidbench.py", FOLDER / f"{algorithm}_mjx.py")
    return [definitions(path) for path in paths]


@ALGORITHMS
def test_what_is_not_its_own_is_its_siblings(algorithm):
    """And what is said to be its own differs, so that the list above says how a baseline differs from its sibling."""
    own, sibling, _ = texts(algorithm)
    shared = [name for name in own if name in sibling]
    assert {name for name in shared if own[name] != sibling[name]} == set(OWN[algorithm].split())
    assert shared == [name for name in sibling if name in own]
    assert len(shared) > 90


@ALGORITHMS
def test_its_algorithm_is_that_of_playground(algorithm):
    own, sibling, playground = texts(algorithm)
    names = ALGORITHM[algorithm].split()
    assert all(own[name] == playground[name] for name in names)
    # All that is the baseline's own there, and nothing that is here as the sibling has it.
    known = set(OWN_IN_PLAYGROUND[f"{algorithm}_mjx"].split()) & sibling.keys()
    loop = {"PAPER", "CPU", "Args", "POSITIVE", "MAY_CHANGE", "COMMAND_LINE_ONLY", "check_args", "main"}
    assert known - loop <= set(names)


@ALGORITHMS
def test_header_length_and_flags(algorithm):
    """What it requires, and the names, types, defaults and order of flags, are its sibling's."""
    path, script = FOLDER / f"{algorithm}_humanoidbench.py", script_of(algorithm)
    lines, sibling = (x.read_text().splitlines() for x in (path, ROOT / "trudi_humanoidbench.py"))
    assert len(lines) < len(sibling)
    sibling = [line for line in sibling if "jax2onnx" not in line]  # baselines export nothing
    header = sibling.index("# ///") + 1
    assert lines[:header] == sibling[:header]
    assert f"python benchmark/baselines/{path.name}" in script.__doc__ and "arXiv" in script.__doc__
    own, other = ({field.name: field for field in dataclasses.fields(x.Args)} for x in (script, trudi))
    assert [name for name in own if name in other] == [name for name in other if name in own]
    for name in (own.keys() & other.keys()) - {"exp_name", "eval_mode", "target_entropy_scale"}:
        assert (own[name].type, own[name].default) == (other[name].type, other[name].default), name
    gone = {"reppo": {"num_diffusion_steps", "prior_std", "learn_friction", "ode_score_scale"}, "dime": {"trust_region_bound"}}
    assert other.keys() - own.keys() == gone[algorithm] | {"export"}
    assert own["exp_name"].default == script.SCRIPT == f"{algorithm}_humanoidbench"
    assert {*script.MAY_CHANGE, *script.POSITIVE, *script.PAPER, *script.CPU} <= own.keys()


@ALGORITHMS
def test_run(algorithm, tmp_path):
    """Three iterations; continued from the second, and evaluated."""
    runner = Runner(tmp_path)
    runner.script, runner.small = f"benchmark/baselines/{algorithm}_humanoidbench.py", SMALL
    straight = runner.train()
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
    runner.run("--resume", str(other))
    assert [row["step"] for row in curve(other)] == [128, 256, 384]
    # Episodes under way are lost with the workers, so what follows is another rollout by the same learner.
    assert curve(other)[0] == curve(straight)[0] and metrics(other)[1]["critic/target"] != found[1]["critic/target"]
    out, _ = runner.run("--evaluate", str(straight))
    evaluated = json.loads(out.splitlines()[-1])["eval/episodic_return"]
    np.testing.assert_allclose(evaluated, found[-1]["eval/episodic_return"], rtol=1e-4)


@ALGORITHMS
def test_values(algorithm, capsys):
    script = script_of(algorithm)
    sizes = dict(env_id="Hopper-v5", preset="cpu", num_envs=16, num_steps=8, minibatch_size=64, total_timesteps=1280)
    script.check_args(script.resolve(script.Args(**sizes)))  # fine as it is
    special = {"reppo": dict(aux_loss_scale=-1.0), "dime": dict(ode_score_scale=-1.0)}[algorithm]
    common = [dict(env_id="Hoper-v5"), dict(num_envs=0), dict(seed=-1), dict(gamma=1.0), dict(minibatch_size=96)]
    for changes in [*common, special]:
        with pytest.raises(SystemExit) as stop:
            script.check_args(script.resolve(script.Args(**sizes | changes)))
        line, = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith(f"{algorithm}_humanoidbench.py: error: ")
        assert any("--" + name.replace("_", "-") in line for name in changes)


@ALGORITHMS
def test_runs_of_other_scripts(algorithm, tmp_path, capsys, monkeypatch):
    """A run of TruDi is not continued by a baseline."""
    (tmp_path / "args.json").write_text(json.dumps({"args": {}, "script": "trudi_humanoidbench"}))
    monkeypatch.setattr(sys, "argv", [f"{algorithm}_humanoidbench.py", "--resume", os.fspath(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        script_of(algorithm).parse()
    assert stop.value.code == 2 and "it is of trudi_humanoidbench.py" in capsys.readouterr().err
