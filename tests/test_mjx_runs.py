"""The command line of trudi_mjx.py as a user runs it: whole runs, interruptions, devices, seeds. Each run is a process."""

import dataclasses
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import onnxruntime
import pytest
from probes import small_args
from runner import CLIFF, ROOT, SMALL, Runner, assert_close, curve, meshes, metrics

import trudi_mjx as trudi

PENDULUM = ("--env-id", "PendulumSwingup", "--episode-length", "100")


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def cliff(runner):
    """A run of 40 iterations that nothing interrupts, on a task without physics whose episodes end often, in both ways."""
    folder = runner.train_here(*CLIFF)
    assert sum(event["charts/episodes"] for event in metrics(folder)) > 100
    return folder


def test_run_folder(runner):
    straight = runner.train(*PENDULUM)
    assert straight.name.startswith("PendulumSwingup__trudi_mjx__1__")
    events = metrics(straight)
    assert [event["step"] for event in events] == [128 * i for i in range(1, 41)]
    expected = ("charts/SPS losses/critic losses/actor trust_region/kl trust_region/violated trust_region/fresh_kl wall_time "
                "trust_region/stored_kl trust_region/lambda critic/targets_clipped entropy/alpha entropy/bound").split()
    assert all(name in event for event in events for name in expected)
    assert [event["step"] for event in events if "eval/episodic_return" in event] == [2560, 5120]
    assert all(("charts/episodic_return" in event) == (event["charts/episodes"] > 0) for event in events)
    saved = json.loads((straight / "args.json").read_text())
    assert saved["args"]["gamma"] == 0.99 and saved["args"]["v_max"] == 150 and saved["args"]["impl"] == "jax"
    assert {"jax", "flax", "playground"} <= set(saved["versions"]) and saved["device"] and "git_commit" in saved
    assert list(straight.glob("events.out.tfevents*"))
    assert max(int(path.name) for path in (straight / "checkpoints").iterdir()) == 5120


def newest_checkpoint(folder):
    return max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_killed_run_goes_on_bit_for_bit(runner, cliff):
    """Before the signal, too: the same seed has the same numbers."""
    folder, code = runner.interrupt(signal.SIGKILL, *CLIFF)
    assert code == -signal.SIGKILL
    assert newest_checkpoint(folder) >= metrics(folder)[-1]["step"] - 2 * 128
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99999999, "half a li')
    out, _ = runner.call("--resume", folder)
    assert out.splitlines()[-1] == str(folder)
    assert curve(folder) == curve(cliff)
    a, b = (trudi.read_checkpoint(str(path))["state"] for path in (folder, cliff))
    assert a.keys() == b.keys() and len(a) > 50
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_physics_go_on_bit_for_bit(tmp_path):
    """From a checkpoint come exactly the numbers that went into it, all of MJX's."""
    setup = trudi.make_setup(small_args(env_id="PendulumSwingup", impl="jax"))
    state, _ = trudi.prepare(setup, {})
    rng = np.random.default_rng(0)

    def noise(x):
        return rng.normal(size=x.shape).astype(x.dtype) if np.issubdtype(x.dtype, np.floating) else np.asarray(x)

    state = jax.tree.map(noise, state)
    assert len(jax.tree.leaves(state.env_state.sim.data)) > 50
    trudi.save_checkpoint(tmp_path, state, 128, {})
    (tmp_path / "args.json").write_text(json.dumps({"args": dataclasses.asdict(setup.args), "script": "trudi_mjx"}))
    again, _ = trudi.prepare(setup, trudi.read_checkpoint(str(tmp_path)))
    assert_same(again, state)
    # Another simulator, as on a laptop what a GPU has trained: the policy, in new episodes.
    elsewhere = dataclasses.replace(setup.args, impl="mujoco", evaluate=str(tmp_path))
    policy, _ = trudi.prepare(trudi.make_setup(elsewhere), trudi.read_checkpoint(str(tmp_path)))
    assert_same(policy, state._replace(env_state=()))


def assert_same(tree, other):
    for (path, x), y in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def test_stopped_run_goes_on_and_further(runner, cliff):
    folder, code = runner.interrupt(signal.SIGTERM, *CLIFF)
    assert code == 128 + signal.SIGTERM
    assert newest_checkpoint(folder) == metrics(folder)[-1]["step"]
    runner.call("--resume", folder, "--total-timesteps", "5376")
    assert curve(folder)[:40] == curve(cliff)
    assert [event["step"] for event in curve(folder)[40:]] == [5248, 5376] and newest_checkpoint(folder) == 5376


@pytest.mark.parametrize("mode", ["ode", "sde", "best-of-k"])
def test_evaluate(runner, cliff, mode):
    before = sorted(cliff.rglob("*"))
    out, _ = runner.call("--evaluate", cliff, "--eval-mode", mode, "--best-of-k", "3")
    result = json.loads(out.splitlines()[-1])
    assert 0 < result["eval/episodic_return"][0] <= 20 and 0 < result["eval/episodic_length"][0] <= 20
    if mode == "ode":  # the same episodes as the run's own last evaluation
        np.testing.assert_allclose(result["eval/episodic_return"][0], metrics(cliff)[-1]["eval/episodic_return"], rtol=1e-4)
    assert sorted(cliff.rglob("*")) == before


def test_export(runner, cliff, tmp_path):
    before = sorted(cliff.rglob("*"))
    runner.call("--evaluate", cliff, "--export", tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"))
    assert int(session.get_modelmeta().custom_metadata_map["iteration"]) * 128 == metrics(cliff)[-1]["step"]
    assert [x.name for x in session.get_inputs()] == ["observation", "noise"]
    assert sorted(cliff.rglob("*")) == before


# Of two runs the first three events are compared.
FEW = ("--total-timesteps", "640")


def test_seeds_side_by_side_are_the_single_runs(runner, cliff):
    folder = runner.train_here(*CLIFF, *FEW, "--num-seeds", "2")
    assert_close(curve(folder / "seed_1"), curve(cliff))
    a, b = curve(folder / "seed_1"), curve(folder / "seed_2")
    assert len(b) == 5 and all(one["losses/critic"] != other["losses/critic"] for one, other in zip(a, b, strict=True))


def test_two_devices_are_one_device(runner, cliff):
    folder = runner.train_here(*CLIFF, *FEW, "--num-devices", "2")
    assert_close(curve(folder), curve(cliff))


def test_two_processes_are_one(runner, cliff):
    """As on two hosts: each holds half of the environments, and the first one writes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("count=2", "count=1")
    hosts = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", XLA_FLAGS=flags)
    processes = [runner.start(*SMALL, *CLIFF, *FEW, **hosts, JAX_PROCESS_ID=str(rank)) for rank in range(2)]
    ends = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    first, second = (out.splitlines()[-1] for out, _ in ends)
    assert first == second
    assert_close(curve(pathlib.Path(first)), curve(cliff))


def copy_of(runner, run, name):
    folder = runner.folder / name
    shutil.copytree(run, folder)
    return folder


def test_loss_that_is_not_finite_stops_the_run(runner, cliff):
    folder = copy_of(runner, cliff, "nan")
    saved = trudi.read_checkpoint(str(cliff))
    arrays = saved["state"]
    name = next(name for name in arrays if name.startswith("learner.critic.") and name.endswith("kernel.value"))
    arrays[name] = np.full_like(arrays[name], np.nan)
    shutil.rmtree(folder / "checkpoints")
    trudi.save_checkpoint(folder, arrays, 5120, {"wall_time": saved["wall_time"]})
    _, err = runner.call("--resume", folder, "--total-timesteps", "5376", code=1)
    assert "iteration 41" in err and "losses/critic" in err and "not finite" in err
    assert (folder / "diverged" / "checkpoints" / "5248").is_dir() and not (folder / "checkpoints" / "5248").exists()


def test_offline_wandb(runner):
    pytest.importorskip("wandb")
    folder = runner.train(*CLIFF, "--track", "--total-timesteps", "256", WANDB_MODE="offline", WANDB_SILENT="true")
    assert list(folder.glob("wandb/offline-run-*"))


def test_checkpoint_of_other_sizes_is_refused(runner, cliff):
    folder = copy_of(runner, cliff, "misfit")
    saved = json.loads((folder / "args.json").read_text())
    saved["args"]["hidden_dim"] = 8
    (folder / "args.json").write_text(json.dumps(saved))
    _, err = runner.call("--resume", folder, code=2)
    assert err.count("\n") == 1 and "the checkpoint is not of this run" in err


def test_a_disk_that_is_full_ends_a_run_in_one_line(runner, cliff):
    """Here no file may grow any more. What was written stays whole, and the run goes on when there is room again."""
    folder = copy_of(runner, cliff, "full")
    process = runner.start("--resume", str(folder), "--total-timesteps", "1000000")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and len(metrics(folder)) < 50:
        time.sleep(0.01)
    size = (folder / "metrics.jsonl").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size + 10, size + 10))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.count("\n") == 1, err
    line = err
    step = newest_checkpoint(folder)
    assert f"cannot write to {folder} (" in line and f"its last whole checkpoint is of step {step}" in line
    assert (folder / "metrics.jsonl").read_text().endswith("}\n")
    runner.call("--resume", folder, "--total-timesteps", step + 256)
    assert [event["step"] for event in metrics(folder)] == list(range(128, step + 257, 128))


FULL = """
import logging, pathlib, resource, sys
import numpy as np
logging.getLogger("absl").setLevel(logging.CRITICAL)  # as main has it
import {script} as trudi
{save}
run = pathlib.Path(sys.argv[1])
save(run, 1000, 128)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
save(run, 100_000, 256)
"""


@pytest.mark.parametrize("script, save", [
    ("trudi_mjx", "save = lambda run, size, step: trudi.save_checkpoint(run, {'x': np.arange(size)}, step, {})"),
    ("trudi_maniskill", """
from types import SimpleNamespace
import torch
def save(run, size, step):
    part = SimpleNamespace(state_dict=lambda: {'x': torch.arange(size)})
    learner = SimpleNamespace(**dict.fromkeys(trudi.SAVED, part))
    trudi.save_checkpoint(run, trudi.TrainState(learner, trudi.Statistics(1, 2, 3), 1), step, 0.0)""")])
def test_a_checkpoint_that_does_not_fit_is_told_in_one_line(script, save, tmp_path):
    command = [sys.executable, "-c", FULL.format(script=script, save=save), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "its last whole checkpoint is of step 128" in done.stderr
    assert not list((tmp_path / "checkpoints").glob("256*[!p]"))  # Orbax's unfinished one is called tmp
    read = __import__(script).read_checkpoint(str(tmp_path))
    assert "state" in read or "actor" in read


def test_humanoid(runner):
    if not meshes().exists():
        pytest.skip(f"G1's meshes are not in {meshes()}")
    sizes = "--num-envs 2 --num-steps 2 --minibatch-size 4 --total-timesteps 8 --num-eval-envs 1".split()
    folder = runner.train_here("--env-id", "G1JoystickRoughTerrain", "--impl", "mujoco", *sizes)
    events = metrics(folder)
    assert [event["step"] for event in events] == [4, 8] and "eval/episodic_return" in events[-1]
    arrays = trudi.read_checkpoint(str(folder))["state"]
    assert arrays["statistics.moments.state"].shape == (1, 2, 103)
    assert arrays["statistics.moments.privileged_state"].shape == (1, 2, 216)
    assert arrays["learner.actor.input.kernel.value"].shape[1] == 103 + 29 + trudi.TIME_FEATURES
    assert arrays["learner.critic.hidden.0.kernel.value"].shape[1] == 216 + 29
