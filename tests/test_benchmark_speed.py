"""benchmark/speed: counted operations, stages on a GPU, the time of an action."""

import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from benchmark import tasks
from benchmark.speed import iteration

ROOT = tasks.ROOT
PATIENCE = 150  # seconds that a process may take on a busy machine


# ----------------------------------------------------------------------------------------------------------- estimates
@pytest.fixture
def in_benchmark(monkeypatch):
    """Scripts of benchmark/ import what they share as `common`."""
    monkeypatch.syspath_prepend(str(tasks.ROOT / "benchmark"))
    return importlib.import_module


@pytest.mark.parametrize("width", [64, 256])
def test_counted_operations(width):
    """XLA's count against that of the matrix products alone, by hand: a multiplication is two, gradients are twice as many."""
    estimate = importlib.import_module("benchmark.speed.estimates")
    args = estimate.trudi.Args(num_envs=32, num_steps=8, minibatch_size=64, num_epochs=2, hidden_dim=width, total_timesteps=256)
    args = estimate.trudi.resolve(dataclasses.replace(args, env_id="CartpoleBalance"))
    seen, critics, action, steps, atoms = 40, 50, 6, args.num_diffusion_steps, args.num_atoms
    costs = estimate.learner_costs(args, seen, critics, action)
    latent = 2 * (action * width + 3 * width**2 + width * action)  # a state's network at a denoising step
    chain = 2 * seen * width + steps * latent
    critic = 2 * ((critics + action) * width + 2 * width**2 + width * atoms)
    expected = 2 * (3 * chain + 3 * chain + 3 * critic + 2 * critic) + 2 * chain + critic  # 2 epochs, rollout, targets
    assert expected < costs["flop_per_step"] < (1.6 if width == 64 else 1.25) * expected
    parameters = (seen + action + 32) * width + 3 * width**2 + width * action
    parameters += (critics + action) * width + 2 * width**2 + width * atoms
    assert parameters < costs["parameters"] < parameters + 20 * width + 4000
    assert costs["learner_bytes"] > 3 * 4 * parameters  # Adam has two moments for each
    assert costs["rollout_bytes"] > 4 * 256 * (2 * (seen + critics) + 2 * steps * action)


# ----------------------------------------------------------------------------------------------------- stages on a GPU
@pytest.mark.parametrize("stage", ["throughput", "humanoid", "reppo", "dmc", "seeds"])
@pytest.mark.parametrize("rehearse", [False, True])
def test_stages_are_commands_that_exist(stage, rehearse, tmp_path):
    from benchmark.speed import gpu_stages as gpu
    commands = gpu.STAGES[stage](gpu.Options(stage=stage, out=str(tmp_path), rehearse=rehearse))
    for command, _ in commands:
        words = shlex.split(command)
        assert words[0] == "-m" and importlib.util.find_spec(words[1])
        if words[1] == "benchmark.launch":
            result = subprocess.run([sys.executable, *words, "--dry-run"], cwd=tasks.ROOT, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            assert ("--num-envs 8" in result.stdout) == rehearse


def test_stages_are_continued_elsewhere(tmp_path, monkeypatch):
    """A command that is stopped in time, and whose runs are brought back where they are gone, with the newest checkpoint."""
    from benchmark.speed import gpu_stages as gpu
    script = tmp_path / "script.py"
    script.write_text("import pathlib, signal, sys, time\n"
                      "run = pathlib.Path('runs/gpu/run'); run.mkdir(parents=True, exist_ok=True)\n"
                      "for k in (1, 2):\n    (run / 'checkpoints' / str(k)).mkdir(parents=True, exist_ok=True)\n"
                      "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
                      "print('begun', flush=True)\ntime.sleep(60)\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "STAGES", {"humanoid": lambda options: [(str(script), {}), (str(script), {})]})
    monkeypatch.setattr(sys, "argv", ["gpu_stages", "humanoid", "--out", str(tmp_path / "out"), "--minutes", "0.05"])
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            gpu.main()
        assert stop.value.code == 1
        assert [x.name for x in (tmp_path / "out" / "runs" / "run" / "checkpoints").iterdir()] == ["2"]
        shutil.rmtree(tmp_path / "runs")
    assert (tmp_path / "out" / "logs" / "humanoid_0.log").read_text().count("begun") == 2
    gpu.copy_runs(tmp_path / "out" / "runs", tmp_path / "runs" / "gpu")
    assert (tmp_path / "runs" / "gpu" / "run" / "checkpoints" / "2").is_dir()


def test_time_of_an_action(tmp_path):
    flags = "--observation-size 4 --action-size 2 --hidden-dim 8 --num-diffusion-steps 1 3 --calls 20 --output".split()
    command = [sys.executable, "-m", "benchmark.speed.action", *flags, tmp_path / "time"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "time.json").read_text())["rows"]
    assert [(row["steps"], row["mode"]) for row in rows] == [(1, "ode"), (1, "sde"), (3, "ode"), (3, "sde")]
    assert all(0 < row["median_ms"] <= row["percentile_99_ms"] for row in rows)
    assert (tmp_path / "time.md").read_text().count("\n| ") == 4


def test_whole_iterations_are_compared_round_by_round():
    seconds = {"TruDi": [2.0, 6.0, 9.0], "REPPO": [1.0, 2.0, 9.0]}  # ratios 2, 3, 1
    profiles = {"TruDi": [("gemm", 1.5, 8), ("tanh", 0.25, 2)], "REPPO": [("gemm", 0.5, 4)]}
    text = " ".join(iteration.report_whole(64, seconds, profiles, "a card").split())
    assert "| iteration | 6.000 | 2.000 | 2.00 |" in text
    assert "TruDi; all add up to 1.750 s" in text and "| gemm | 0.5000 | 4 |" in text
