"""The command line of trudi_maniskill.py, on PushCube."""

import json
import pathlib
import signal
import time

import onnxruntime
import pytest
from copies import load
from runner import ROOT, ManiSkillRunner, metrics

torch = pytest.importorskip("torch")
pytest.importorskip("mani_skill")

from small_maniskill import FLAGS  # noqa: E402

import trudi_maniskill as trudi  # noqa: E402
from benchmark import without_vulkan  # noqa: E402


@pytest.fixture
def runner(tmp_path):
    runner = ManiSkillRunner(tmp_path)
    runner.small = FLAGS
    return runner


@pytest.fixture(autouse=True, scope="module")
def materials():
    without_vulkan.stub_materials()


def test_two_processes_train(runner):
    out, silent = runner.together(2, *FLAGS)
    assert silent == ""
    run = pathlib.Path(out.splitlines()[-1])
    assert [event["step"] for event in metrics(run)] == list(range(16, 129, 16))
    assert "eval/success_once" in metrics(run)[-1]


def test_command_line(runner, tmp_path):
    """A run, continued beyond its end, evaluated; its folder."""
    out, _ = runner.run(*FLAGS)
    run = pathlib.Path(out.splitlines()[-1])
    assert run.parent == tmp_path / "runs"
    assert run.name.startswith("PushCube-v1__trudi_maniskill__1__")
    found = metrics(run)
    assert [event["step"] for event in found] == list(range(16, 129, 16))
    assert [event["step"] for event in found if "eval/success_once" in event] == [64, 128]
    times = [event["wall_time"] for event in found]
    assert times == sorted(times)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["112.pt", "128.pt", "96.pt"]
    assert list(run.glob("events.out.tfevents*"))
    saved = json.loads((run / "args.json").read_text())
    assert saved["versions"]["torch"]
    assert saved["args"]["num_iterations"] == 8
    runner.call("--resume", run, "--total-timesteps", 160)
    assert [event["step"] for event in metrics(run)] == list(range(16, 161, 16))
    assert metrics(run)[:8] == found
    before = sorted(path.name for path in run.iterdir())
    runner.call("--evaluate", run, "--export", tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"))
    facts = session.get_modelmeta().custom_metadata_map
    assert int(facts["iteration"]) * 16 == metrics(run)[-1]["step"]
    out, _ = runner.call("--evaluate", run, "--eval-mode", "sde", "--num-eval-envs", 4, "--reward-mode", "sparse")
    assert set(json.loads(out.splitlines()[-1])) >= {"eval/success_once", "eval/success_at_end", "eval/episodic_return"}
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_runs_continue(number, runner, tmp_path):
    """test_isaaclab_runs.py has Ctrl-C."""
    process = runner.start(*FLAGS, "--total-timesteps", 100_000)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None and not list(tmp_path.glob("runs/*/checkpoints/[4-9]?.pt")):
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=100)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    (run,) = (tmp_path / "runs").iterdir()
    newest = max(int(path.stem) for path in (run / "checkpoints").glob("*.pt"))
    assert newest >= metrics(run)[-1]["step"] - 16  # at most an interval is lost
    runner.call("--resume", run, "--total-timesteps", newest + 32)
    assert [event["step"] for event in metrics(run)] == list(range(16, newest + 33, 16))


def test_a_copy_of_the_script_has_its_own_name(tmp_path):
    (tmp_path / "my_agent.py").write_text((ROOT / "trudi_maniskill.py").read_text())
    assert load(tmp_path / "my_agent.py").Args().exp_name == "my_agent"
    assert trudi.Args().exp_name == "trudi_maniskill"
