"""What trudi_maniskill.py refuses in a line."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from runner import PATIENCE, ROOT, call_main

torch = pytest.importorskip("torch")
pytest.importorskip("mani_skill")

from maniskill_counters import Counter  # noqa: E402
from small_maniskill import FLAGS, counter_setup, small_args  # noqa: E402

import trudi_maniskill as trudi  # noqa: E402
from benchmark import without_vulkan  # noqa: E402

REFUSAL_SECONDS = 5  # within which bad input is refused on a quiet machine


@pytest.fixture(autouse=True, scope="module")
def materials():
    without_vulkan.stub_materials()
    torch.set_num_threads(1)


def refusal(code, error):
    assert code == 2, error[-2000:]
    (line,) = error.splitlines()
    assert line.startswith("trudi_maniskill.py: error: ")
    return line


def refused(*flags):
    """The line with which main, called in this process, refuses these flags."""
    _, error = call_main(trudi.main, ["trudi_maniskill.py", *flags], code=2)
    return refusal(2, error)


POSITIVE = (
    "total_timesteps num_envs num_steps num_epochs minibatch_size max_grad_norm hidden_dim num_atoms "
    "actor_learning_rate critic_learning_rate dual_learning_rate num_diffusion_steps prior_std best_of_k "
    "trust_region_bound eval_interval num_eval_envs checkpoint_interval"
).split()
NAN = float("nan")


@pytest.mark.parametrize(
    "changes",
    [
        *({name: number} for name in POSITIVE for number in (0, -1)),
        dict(seed=-1),
        dict(gamma=-0.1),
        dict(gamma=1.0),
        dict(gamma=NAN),
        dict(td_lambda=1.1),
        dict(ode_score_scale=-1.0),
        dict(prior_std=NAN),
        dict(trust_region_bound=NAN),
        dict(v_min=5.0, v_max=5.0),
        dict(v_min=NAN),
        dict(num_atoms=1),
        dict(total_timesteps=10),
        dict(minibatch_size=6),
        dict(env_id="PushCub"),
    ],
    ids=str,
)
def test_values(changes, capsys):
    small_args()
    with pytest.raises(SystemExit) as stop:
        small_args(**changes)
    line = refusal(stop.value.code, capsys.readouterr().err)
    assert any(f"--{name.replace('_', '-')}" in line for name in changes) or changes == {"minibatch_size": 6}


def test_two_processes_need_sizes_that_divide(capsys, monkeypatch):
    monkeypatch.setattr(trudi, "WORLD", 2)
    small_args()
    for changes in (dict(num_envs=1, num_steps=16), dict(minibatch_size=1), dict(num_eval_envs=3)):
        with pytest.raises(SystemExit):
            small_args(**changes)
        assert "2 processes" in capsys.readouterr().err


def test_unknown_tasks():
    """Within seconds, of which a process spends none on the simulator."""
    began = time.perf_counter()
    command = [sys.executable, ROOT / "trudi_maniskill.py", "--env-id", "PushCubes-v1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "PushCube-v1" in refusal(done.returncode, done.stderr)
    assert time.perf_counter() - began < REFUSAL_SECONDS * PATIENCE
    assert "no_such_module" in refused("--env-id", "no_such_module:Task-v1", *FLAGS)


def test_rewards_that_a_task_lacks():
    flags = [*FLAGS, "--env-id", "PlugCharger-v1", "--reward-mode", "dense"]
    assert "reward mode" in refused(*flags)


def test_missing_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "--device cpu" in refused("--device", "gpu")


def test_no_vulkan():
    """The loader's own variables hide what drivers there are."""
    done = subprocess.run(
        [sys.executable, ROOT / "trudi_maniskill.py", *FLAGS],
        capture_output=True,
        text=True,
        env={**os.environ, "VK_DRIVER_FILES": "/nonexistent", "VK_ICD_FILENAMES": "/nonexistent"},
    )
    assert done.returncode == 2
    assert "mesa-vulkan-drivers" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "pickle", "no checkpoint", "other sizes"])
def test_damaged_checkpoints(damage, tmp_path, capsys, monkeypatch):
    args = small_args(total_timesteps=16)
    (tmp_path / "args.json").write_text(
        json.dumps({"args": dataclasses.asdict(args), "script": "trudi_maniskill"})
    )
    _, state, _ = counter_setup(args, [Counter(), Counter()])
    trudi.save_checkpoint(tmp_path, state, 16, 0.0)
    path = tmp_path / "checkpoints" / "16.pt"
    if damage == "pickle":
        torch.save({"actor": SimpleNamespace(), "wall_time": 1.0}, path)
    elif damage == "no checkpoint":
        path.unlink()
    elif damage != "other sizes":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "truncated" else 0])
    monkeypatch.setattr(sys, "argv", ["trudi_maniskill.py", "--resume", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        trudi.main()
    line = refusal(stop.value.code, capsys.readouterr().err)
    assert "not of this run" in line if damage == "other sizes" else str(tmp_path) in line


@pytest.mark.parametrize("content", ["", "[]", '{"args": {}, "script": "trudi_mjx"}'])
def test_foreign_runs(content, tmp_path):
    (tmp_path / "args.json").write_text(content)
    assert str(tmp_path) in refused("--resume", tmp_path)
