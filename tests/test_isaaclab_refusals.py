"""What trudi_isaaclab.py refuses in a line."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from runner import PATIENCE, ROOT, call_main

torch = pytest.importorskip("torch")
pytest.importorskip("mjlab")

from isaaclab_counters import Counters  # noqa: E402
from small_isaaclab import CARTPOLE, CPU, FLAGS, prepared, small_args  # noqa: E402

import trudi_isaaclab as trudi  # noqa: E402


def refusal(code, error):
    assert code == 2, error[-2000:]
    line = error.splitlines()[-1]
    assert line.startswith("trudi_isaaclab.py: error: ")
    return line


def refused(*flags):
    """The line with which main, called in this process, refuses these flags."""
    _, error = call_main(lambda: trudi.main(*trudi.launch()), ["trudi_isaaclab.py", *flags], code=2)
    return refusal(2, error)


POSITIVE = (
    "total_timesteps num_envs num_steps num_epochs minibatch_size max_grad_norm hidden_dim num_atoms "
    "actor_learning_rate critic_learning_rate dual_learning_rate num_diffusion_steps prior_std best_of_k "
    "trust_region_bound eval_interval checkpoint_interval action_scale"
).split()


@pytest.mark.parametrize(
    "changes",
    [
        *({name: number} for name in POSITIVE for number in (0, -1)),
        dict(seed=-1),
        dict(gamma=1.0),
        dict(td_lambda=1.1),
        dict(ode_score_scale=-1.0),
        dict(v_min=10.0),
        dict(num_atoms=1),
        dict(total_timesteps=10),
        dict(minibatch_size=6),
    ],
    ids=str,
)
def test_values(changes, capsys):
    with pytest.raises(SystemExit) as stop:
        small_args(**changes)
    line = refusal(stop.value.code, capsys.readouterr().err)
    assert any(f"--{name.replace('_', '-')}" in line for name in changes)


def test_unknown_tasks():
    """Within seconds, of which a process spends none on a simulator."""
    began = time.perf_counter()
    command = [sys.executable, ROOT / "trudi_isaaclab.py", "--env-id", "Velocity-Rough-G1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Isaac-Velocity-Rough-G1" in refusal(done.returncode, done.stderr)
    assert time.perf_counter() - began < 5 * PATIENCE
    assert "Mjlab-Cartpole-Balance" in refused("--env-id", "Mjlab-Cartpole-Balanc", *FLAGS)
    assert "Mjlab-Short-Cartpole" in refused("--env-id", "mjlab_tasks:Mjlab-Shrt-Cartpole", *FLAGS)
    assert "no_such_module" in refused("--env-id", "no_such_module:Mjlab-Task", *FLAGS)
    assert "cannot be imported" in refused("--env-id", "json.no_such:Mjlab-Task", *FLAGS)


def test_mjlab_has_one_engine():
    assert "mjlab's tasks have one engine" in refused(*CARTPOLE, "--physics", "newton_mjwarp", *FLAGS)


def test_missing_simulators(monkeypatch, capsys):
    monkeypatch.setattr(trudi.util, "find_spec", lambda name: None)
    for env_id, package in (
        ("Isaac-Velocity-Rough-G1", "isaaclab==3.0.0"),
        ("Mjlab-Cartpole-Balance", "mjlab==1.6.0"),
    ):
        with pytest.raises(SystemExit) as stop:
            small_args(env_id=env_id)
        assert f"pip install {package}" in refusal(stop.value.code, capsys.readouterr().err)


def test_missing_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "--device cpu" in refused(*CARTPOLE, "--device", "gpu")


@pytest.mark.parametrize("damage", ["truncated", "emptied", "pickle", "no checkpoint", "other sizes"])
def test_damaged_checkpoints(damage, tmp_path, capsys):
    setup, state, _ = prepared(Counters())
    trudi.save_checkpoint(tmp_path, state, 16, 0.0)
    path = tmp_path / "checkpoints" / "16.pt"
    if damage == "pickle":
        torch.save({"actor": SimpleNamespace(), "wall_time": 1.0}, path)
    elif damage == "no checkpoint":
        path.unlink()
    elif damage != "other sizes":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "truncated" else 0])
    with pytest.raises(SystemExit) as stop:
        other = trudi.setup_for(setup.args, CPU, trudi.IsaacLab(setup.args, Counters(critic=False)))
        trudi.prepare(other, trudi.read_checkpoint(str(tmp_path)))
    line = refusal(stop.value.code, capsys.readouterr().err)
    assert "not of this run" in line if damage == "other sizes" else str(tmp_path) in line


@pytest.mark.parametrize(
    "space", [dict(shape=()), dict(shape=(2,), nvec=[3, 3]), dict(shape=None), dict(shape=(2, 2)), dict()], ids=str
)
def test_actions_that_are_no_vectors(space, capsys):
    fake = Counters()
    fake.single_action_space = SimpleNamespace(**space) if space else None  # as if there were several agents
    with pytest.raises(SystemExit) as stop:
        prepared(fake)
    assert "continuous actions" in refusal(stop.value.code, capsys.readouterr().err)


def test_groups_that_are_no_vectors(capsys):
    env = Counters()
    env.observe = lambda prefix="": {"policy": {"joints": torch.zeros(2, 3)}}
    with pytest.raises(SystemExit) as stop:
        prepared(env)
    assert "vectors" in refusal(stop.value.code, capsys.readouterr().err)


def test_groups_of_other_names(capsys):
    env = Counters()
    env.observe = lambda prefix="": {"vision": torch.zeros(2, 3)}
    with pytest.raises(SystemExit) as stop:
        prepared(env)
    assert "policy or actor, not vision" in refusal(stop.value.code, capsys.readouterr().err)
