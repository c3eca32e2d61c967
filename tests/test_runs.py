"""The command line as a user runs it: whole runs, interruptions, devices, seeds, bad input. Each run is a process."""

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

import numpy as np
import onnxruntime
import pytest

import trudi_mjx as trudi

TESTS = pathlib.Path(__file__).parent
ROOT = pathlib.Path(trudi.__file__).parent
SMALL = ("--preset cpu --num-envs 16 --num-steps 8 --num-epochs 1 --minibatch-size 64 --hidden-dim 16 --num-diffusion-steps 2 "
         "--num-eval-envs 2 --total-timesteps 5120 --eval-interval 20 --checkpoint-interval 2").split()
CLIFF = ("--env-id", "own_tasks:Cliff")  # starts in half the time of a task with physics, and its episodes are short
TIMES = ("wall_time", "charts/SPS")


class Runner:
    """Starts a script with one folder for runs and one cache of compiled programs."""

    script, small = "trudi_mjx.py", SMALL

    def __init__(self, folder):
        self.folder = folder

    def start(self, *flags, **environment):
        """A started process; programs are compiled without optimisation, which takes a third of the time."""
        if {"--resume", "--evaluate"} & set(flags):
            flags = [*flags, *own_task(flags[1])]
        else:
            flags = [*flags, "--log-dir", str(self.folder / "runs")]
        flags += ["--compilation-cache-dir", str(self.folder / "cache")]
        xla = f"--xla_backend_optimization_level=0 {environment.pop('XLA_FLAGS', '')}"
        environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla, "PYTHONPATH": f"{TESTS / 'lean'}:{TESTS}", **environment}
        return subprocess.Popen([sys.executable, str(ROOT / self.script), *flags], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, cwd=self.folder, start_new_session=True,
                                env={**os.environ, **environment})

    def run(self, *flags, code=0, **environment):
        """(stdout, stderr) of a process that must end with an exit code."""
        process = self.start(*flags, **environment)
        out, err = process.communicate(timeout=1500)
        assert process.returncode == code, f"exit code {process.returncode}\n{out[-2000:]}\n{err[-3000:]}"
        return out, err

    def train(self, *flags, **environment):
        """The folder of a finished run."""
        out, _ = self.run(*self.small, *flags, **environment)
        return pathlib.Path(out.splitlines()[-1])

    def interrupt(self, number, *flags):
        """The folder and exit code of a run that gets a signal after its fifth iteration."""
        before = set((self.folder / "runs").iterdir())
        process = self.start(*SMALL, *flags)
        deadline = time.monotonic() + 300
        folder = None
        while time.monotonic() < deadline and process.poll() is None and not (folder and len(metrics(folder)) > 5):
            time.sleep(0.002)
            folder = next(iter(set((self.folder / "runs").iterdir()) - before), None)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert len(metrics(folder)) < 40, "it ended before the signal came"
        return folder, process.returncode


def metrics(folder):
    """A run's events so far, whole lines only."""
    path = pathlib.Path(folder, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def own_task(folder):
    """The flag without which the module of a run's own task is not imported."""
    path = pathlib.Path(folder, "args.json")
    env_id = json.loads(path.read_text())["args"]["env_id"] if path.exists() else ""
    return ["--env-id", env_id] if ":" in env_id else []


def curve(folder):
    """A run's events without the times."""
    return [{name: x for name, x in event.items() if name not in TIMES} for event in metrics(folder)]


def assert_close(a, b, events=3, rtol=2e-3):
    """The first events of two runs agree up to rounding, which a learner amplifies soon."""
    assert len(a) >= events and len(b) >= events
    for one, other in zip(a[:events], b[:events], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=rtol, atol=1e-4, err_msg=f"{name} at {one['step']}")


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def straight(runner):
    """A run of 40 iterations that nothing interrupts."""
    return runner.train()


@pytest.fixture(scope="session")
def cliff(runner):
    """The same on a task whose episodes end often, in both ways."""
    folder = runner.train(*CLIFF)
    assert sum(event["charts/episodes"] for event in metrics(folder)) > 100
    return folder


def test_run_folder(straight):
    assert straight.name.startswith("CartpoleBalance__trudi_mjx__1__")
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


def test_killed_run_goes_on_bit_for_bit(runner, straight):
    """Before the signal, too: the same seed has the same numbers."""
    folder, code = runner.interrupt(signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert newest_checkpoint(folder) >= metrics(folder)[-1]["step"] - 2 * 128
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99999999, "half a li')
    out, _ = runner.run("--resume", str(folder))
    assert out.splitlines()[-1] == str(folder)
    assert curve(folder) == curve(straight)
    a, b = (trudi.read_checkpoint(str(path))["state"] for path in (folder, straight))
    assert a.keys() == b.keys() and len(a) > 50
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_stopped_run_goes_on_and_further(runner, cliff):
    folder, code = runner.interrupt(signal.SIGTERM, *CLIFF)
    assert code == 128 + signal.SIGTERM
    assert newest_checkpoint(folder) == metrics(folder)[-1]["step"]
    runner.run("--resume", str(folder), "--total-timesteps", "5376")
    assert curve(folder)[:40] == curve(cliff)
    assert [event["step"] for event in curve(folder)[40:]] == [5248, 5376] and newest_checkpoint(folder) == 5376


@pytest.mark.parametrize("mode", ["ode", "sde", "best-of-k"])
def test_evaluate(runner, cliff, mode):
    before = sorted(cliff.rglob("*"))
    out, _ = runner.run("--evaluate", str(cliff), "--eval-mode", mode, "--best-of-k", "3")
    result = json.loads(out.splitlines()[-1])
    assert 0 < result["eval/episodic_return"][0] <= 20 and 0 < result["eval/episodic_length"][0] <= 20
    if mode == "ode":  # the same episodes as the run's own last evaluation
        np.testing.assert_allclose(result["eval/episodic_return"][0], metrics(cliff)[-1]["eval/episodic_return"], rtol=1e-4)
    assert sorted(cliff.rglob("*")) == before


def test_export(runner, cliff, tmp_path):
    before = sorted(cliff.rglob("*"))
    runner.run("--evaluate", str(cliff), "--export", str(tmp_path / "policy.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"))
    assert session.get_modelmeta().custom_metadata_map["step"] == str(metrics(cliff)[-1]["step"])
    assert [x.name for x in session.get_inputs()] == ["observation", "noise"]
    assert sorted(cliff.rglob("*")) == before


def test_seeds_side_by_side_are_the_single_runs(runner, cliff):
    folder = runner.train(*CLIFF, "--num-seeds", "2")
    assert_close(curve(folder / "seed_1"), curve(cliff))
    a, b = curve(folder / "seed_1"), curve(folder / "seed_2")
    assert len(b) == 40 and all(one["losses/critic"] != other["losses/critic"] for one, other in zip(a, b, strict=True))


def test_two_devices_are_one_device(runner, cliff):
    folder = runner.train(*CLIFF, "--num-devices", "2", XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert_close(curve(folder), curve(cliff))


def test_two_processes_are_one(runner, straight):
    """As on two hosts: each holds half of the environments, and the first one writes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [runner.start(*SMALL, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(rank))
                 for rank in range(2)]
    ends = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    first, second = (out.splitlines()[-1] for out, _ in ends)
    assert first == second
    assert_close(curve(pathlib.Path(first)), curve(straight))


def test_loss_that_is_not_finite_stops_the_run(runner, cliff):
    folder = runner.folder / "nan"
    shutil.copytree(cliff, folder)
    saved = trudi.read_checkpoint(str(cliff))
    arrays = saved["state"]
    name = next(name for name in arrays if name.startswith("learner.critic.") and name.endswith("kernel.value"))
    arrays[name] = np.full_like(arrays[name], np.nan)
    shutil.rmtree(folder / "checkpoints")
    trudi.save_checkpoint(folder, arrays, 5120, {"wall_time": saved["wall_time"]})
    _, err = runner.run("--resume", str(folder), "--total-timesteps", "5376", code=1)
    assert "iteration 41" in err and "losses/critic" in err and "not finite" in err
    assert (folder / "diverged" / "checkpoints" / "5248").is_dir() and not (folder / "checkpoints" / "5248").exists()


def test_offline_wandb(runner, monkeypatch):
    pytest.importorskip("wandb")
    folder = runner.train(*CLIFF, "--track", "--total-timesteps", "256", WANDB_MODE="offline", WANDB_SILENT="true")
    assert list(folder.glob("wandb/offline-run-*"))


def copy_of(runner, run, name):
    folder = runner.folder / name
    shutil.copytree(run, folder)
    return folder


def truncated(runner, run):
    folder = copy_of(runner, run, "truncated")
    for path in (folder / "checkpoints").rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            path.write_bytes(path.read_bytes()[:100])
    return ["--resume", str(folder)]


def foreign(runner, run):
    folder = copy_of(runner, run, "foreign")
    saved = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(saved | {"script": "trudi_maniskill"}))
    return ["--evaluate", str(folder)]


def misfit(runner, run):
    folder = copy_of(runner, run, "misfit")
    saved = json.loads((folder / "args.json").read_text())
    saved["args"]["hidden_dim"] = 8
    (folder / "args.json").write_text(json.dumps(saved))
    return ["--resume", str(folder)]


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
    runner.run("--resume", str(folder), "--total-timesteps", str(step + 256))
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


BAD = {
    "--env-id CartpoleBalanc": "CartpoleBalance,",
    "--minibatch-size 500": "--minibatch-size 500 does not divide",
    "--num-envs 0": "--num-envs must be positive",
    "--num-steps -3": "--num-steps must be positive",
    "--gamma 1.5": "--gamma must lie in",
    "--v-min 3 --v-max 2": "--v-min < --v-max",
    "--total-timesteps 100": "is less than",
    "--device gpu": "no gpu device",
    "--num-devices 3 --num-envs 18 --num-steps 32 --minibatch-size 96 --num-eval-envs 3": "JAX finds 1",
    "--resume nowhere": "no run folder",
}


def assert_refused(runner, flags, message):
    began = time.monotonic()
    out, err = runner.run(*flags, code=2)
    assert time.monotonic() - began < 5 * float(os.environ.get("TRUDI_TEST_PATIENCE", "3"))  # test machines are slow at times
    assert "compiled" not in out
    assert err.startswith("trudi_mjx.py: error: ") and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_refused_in_one_line(runner, flags):
    assert_refused(runner, ["--preset", "cpu", *flags.split()], BAD[flags])


@pytest.mark.parametrize(("make", "message"), [(truncated, "no readable checkpoint"), (foreign, "trudi_maniskill.py")])
def test_bad_checkpoint_is_refused_in_one_line(runner, cliff, make, message):
    assert_refused(runner, make(runner, cliff), message)


def test_checkpoint_of_other_sizes_is_refused(runner, cliff):
    _, err = runner.run(*misfit(runner, cliff), code=2)
    assert err.count("\n") == 1 and "the checkpoint is not of this run" in err


def test_changed_argument_is_refused_on_resume(runner, cliff):
    assert_refused(runner, ["--resume", str(cliff), "--gamma", "0.9"], "--gamma cannot change")


def meshes():
    import importlib.util
    package = pathlib.Path(importlib.util.find_spec("mujoco_playground").origin).parent
    return package / "external_deps" / "mujoco_menagerie"


def test_missing_meshes_are_refused_in_one_line(runner):
    if meshes().exists():
        pytest.skip("the meshes are here")
    try:
        assert_refused(runner, ["--env-id", "G1JoystickRoughTerrain"], "git clone")
    except AssertionError:
        import socket
        try:
            socket.create_connection(("github.com", 443), timeout=2).close()
        except OSError:
            raise
        pytest.skip("GitHub can be reached")


def test_humanoid(runner):
    if not meshes().exists():
        pytest.skip(f"G1's meshes are not in {meshes()}")
    out, _ = runner.run("--env-id", "G1JoystickRoughTerrain", *SMALL, "--num-envs", "2", "--num-steps", "2", "--minibatch-size",
                        "4", "--total-timesteps", "8", "--num-eval-envs", "1")
    events = metrics(out.splitlines()[-1])
    assert [event["step"] for event in events] == [4, 8] and "eval/episodic_return" in events[-1]
    arrays = trudi.read_checkpoint(out.splitlines()[-1])["state"]
    assert arrays["statistics.moments.state"].shape == (1, 2, 103)
    assert arrays["statistics.moments.privileged_state"].shape == (1, 2, 216)
    assert arrays["learner.actor.input.kernel.value"].shape[1] == 103 + 29 + trudi.TIME_FEATURES
    assert arrays["learner.critic.hidden.0.kernel.value"].shape[1] == 216 + 29
