"""The command line of trudi_isaaclab.py: runs with mjlab, and with a stand-in for Isaac Lab 2.3's interface. test_isaaclab_3.py
has those with Isaac Lab 3.0 itself."""

import json
import signal
import time

import numpy as np
import onnxruntime
import pytest
from copies import load
from runner import ROOT, STANDINS, IsaacLabRunner, curve, metrics

torch = pytest.importorskip("torch")
pytest.importorskip("mjlab")

from small_isaaclab import CARTPOLE, FLAGS  # noqa: E402

import trudi_isaaclab as trudi  # noqa: E402


def runner_of(folder):
    """For runs of toy size."""
    runner = IsaacLabRunner(folder)
    runner.small = FLAGS
    return runner


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return runner_of(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def cartpole(runner):
    """A finished run, with videos of a few pictures, each of which takes as long as twenty steps."""
    return runner.train(*CARTPOLE, "--capture-video", "--video-length", "4", MUJOCO_GL="egl")


def test_command_line(runner, cartpole, tmp_path):
    """A run, the same again, one with another seed; continued beyond its end, evaluated; its folder."""
    found = metrics(cartpole)
    assert [event["step"] for event in found] == [16, 32, 48, 64]
    assert [event["step"] for event in found if "eval/episodic_return" in event] == [32, 64]
    assert found[-1]["eval/episodic_length"] == 20
    assert 0 < found[-1]["eval/episodic_return"] < 1  # at most 0.05 a step
    assert sorted(path.name for path in (cartpole / "checkpoints").iterdir()) == ["32.pt", "48.pt", "64.pt"]
    assert list(cartpole.glob("events.out.tfevents*"))
    assert json.loads((cartpole / "args.json").read_text())["versions"]["mjlab"]
    assert curve(runner.train_here(*CARTPOLE)) == curve(cartpole)
    other = curve(runner.train_here(*CARTPOLE, "--seed", "2"))
    assert all(a["losses/critic"] != b["losses/critic"] for a, b in zip(other, curve(cartpole), strict=True))
    runner.call("--resume", cartpole, "--no-capture-video", "--total-timesteps", 96)
    assert [event["step"] for event in metrics(cartpole)] == list(range(16, 97, 16))
    assert metrics(cartpole)[:4] == found
    runner.call("--evaluate", cartpole, "--no-capture-video", "--export", tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"))
    facts = session.get_modelmeta().custom_metadata_map
    assert int(facts["iteration"]) * 16 == metrics(cartpole)[-1]["step"]
    assert json.loads(facts["observation_terms"])
    out, _ = runner.call("--evaluate", cartpole, "--no-capture-video", "--eval-mode", "sde", "--num-envs", 3)
    result = next(json.loads(line) for line in out.splitlines() if line.startswith('{"eval'))
    assert set(result) == {"eval/episodic_return", "eval/episodic_return_std", "eval/episodic_length"}


def test_an_interrupted_run_continues(tmp_path):
    """By Ctrl-C; test_maniskill_runs.py has the other signals, to which the same text answers."""
    runner = runner_of(tmp_path)
    process = runner.start(*FLAGS, *CARTPOLE, "--total-timesteps", 100_000, "--eval-interval", 10_000)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and not list(tmp_path.glob("runs/*/checkpoints/[4-9]?.pt")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGINT
    (run,) = (tmp_path / "runs").iterdir()
    newest = max(int(path.stem) for path in (run / "checkpoints").glob("*.pt"))
    assert newest == metrics(run)[-1]["step"]
    runner.call("--resume", run, "--total-timesteps", newest + 32, "--eval-interval", 10_000)
    assert [event["step"] for event in metrics(run)] == list(range(16, newest + 33, 16))


def test_two_processes_train(tmp_path):
    runner = runner_of(tmp_path)
    out, _ = runner.together(2, *FLAGS, *CARTPOLE)
    (run,) = (tmp_path / "runs").iterdir()
    assert str(run) in out
    assert [event["step"] for event in metrics(run)] == [16, 32, 48, 64]
    assert "eval/episodic_return" in metrics(run)[-1]


def test_video(cartpole):
    videos = [cartpole / "videos" / f"iteration_{iteration}.mp4" for iteration in (2, 4)]
    assert all(path.stat().st_size > 1_000 for path in videos)


def test_velocity(runner):
    """A robot, with a group of observations for the critic and terrain to fall on."""
    (found,) = metrics(runner.train_here("--env-id", "Mjlab-Velocity-Flat-Unitree-G1", "--total-timesteps", "16"))
    assert np.isfinite(found["losses/critic"])
    assert found["eval/episodic_length"] < 1000  # it falls


def test_a_copy_of_the_script_has_its_own_name(tmp_path):
    (tmp_path / "my_agent.py").write_text((ROOT / "trudi_isaaclab.py").read_text())
    assert load(tmp_path / "my_agent.py").Args().exp_name == "my_agent"
    assert trudi.Args().exp_name == "trudi_isaaclab"


# ---------------------------------------------------------------------------------- Isaac Lab 2.3's interface
class OldRunner(IsaacLabRunner):
    """With the stand-in for 2.3, which writes a journal of what is called."""

    small, path = FLAGS, (STANDINS / "isaaclab23", STANDINS)

    def start(self, *flags, **environment):
        flags = ("--env-id", "Isaac-Velocity-Flat-G1", "--device", "cpu", *flags)
        return super().start(*flags, JOURNAL=str(self.folder / "journal"), **environment)


def test_kit_starts_before_pytorch_and_is_closed_last(tmp_path):
    """The name of 3.0 is understood, and all is on disk when Kit, closing, ends the process."""
    OldRunner(tmp_path).run(*FLAGS)
    lines = (tmp_path / "journal").read_text().splitlines()
    assert lines[0] == "AppLauncher device=cpu enable_cameras=False headless=True, PyTorch imported: False"
    assert lines[1:3] == ["parse_env_cfg Isaac-Velocity-Flat-G1-v0 device=cpu num_envs=2", "make"]
    assert lines[-2:] == ["env.close", "app.close"]
    (run,) = (tmp_path / "runs").iterdir()
    assert [event["step"] for event in metrics(run)] == [16, 32, 48, 64]
    assert "Episode_Reward/count" in metrics(run)[-1]
    assert (run / "checkpoints" / "64.pt").exists()


def test_kit_does_not_hide_how_a_run_ended(tmp_path):
    """It would end the process with exit code 0 while the error is on its way to the terminal."""
    _, error = OldRunner(tmp_path).run(*FLAGS, code=1, ROBOT="falls")
    assert error.endswith("ZeroDivisionError: the robot fell through the floor\n")
    _, error = OldRunner(tmp_path).run(*FLAGS, "--env-id", "Isaac-Velocity-Flat-G2", code=2)
    assert "the nearest installed are Isaac-Velocity-Flat-G1-v0" in error
    assert "app.close" not in (tmp_path / "journal").read_text()


def test_kit_does_not_start_for_bad_input(tmp_path):
    _, error = OldRunner(tmp_path).run(*FLAGS, "--gamma", "2", code=2)
    assert error.startswith("trudi_isaaclab.py: error: --gamma") and error.count("\n") == 1
    assert not (tmp_path / "journal").exists()
