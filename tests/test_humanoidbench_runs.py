"""The command line of trudi_humanoidbench.py."""

import json
import os
import pathlib
import shutil
import signal
import time

import onnxruntime
import pytest
from runner import ROOT, TIMES, Runner, assert_close, curve, metrics

SMALL = (
    "--preset cpu --num-envs 8 --num-steps 16 --num-epochs 1 --minibatch-size 64 --hidden-dim 16 "
    "--num-diffusion-steps 2 --num-eval-envs 2 --total-timesteps 1280 --eval-interval 5 "
    "--checkpoint-interval 2"
).split()


def process_is_gone(pid):
    """Ended, whether or not anybody has asked for its exit code."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def descendants(pid):
    """Process ids of a process's children and theirs."""
    found = []
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


class WorkersRunner(Runner):
    """Starts this script, with the misbehaving environments within its reach."""

    script = "trudi_humanoidbench.py"
    small = SMALL

    def signalled(self, send, *flags, iterations=5):
        """Folder and exit code of a run that gets a signal after some iterations; its processes must end."""
        before = set(self.folder.glob("runs/*"))
        process = self.start(*SMALL, *flags, "--total-timesteps", "1000000")
        deadline = time.monotonic() + 300
        folder = None
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
            folder = next(iter(set(self.folder.glob("runs/*")) - before), None)
            if folder and len(metrics(folder)) > iterations:
                break
        others = descendants(process.pid)
        assert len(others) >= 3  # the fork server and, beneath it, workers for training and evaluation
        send(process)
        process.communicate(timeout=60)
        while time.monotonic() < deadline and not all(map(process_is_gone, others)):
            time.sleep(0.05)
        assert all(map(process_is_gone, others))
        return folder, process.returncode


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return WorkersRunner(tmp_path_factory.mktemp("humanoidbench"))


@pytest.fixture(scope="module")
def straight(runner):
    return runner.train("--env-id", "Hopper-v5", "--num-workers", "1")


def test_run_folder(straight):
    assert straight.name.startswith("Hopper-v5__trudi_humanoidbench__1__")
    events = metrics(straight)
    assert [event["step"] for event in events] == [128 * i for i in range(1, 11)]
    expected = (
        "wall_time charts/SPS charts/episodes losses/critic losses/actor trust_region/kl "
        "trust_region/violated trust_region/stored_kl trust_region/fresh_kl trust_region/initial_kl "
        "trust_region/lambda critic/target critic/targets_clipped entropy/alpha entropy/bound "
        "entropy/friction"
    ).split()
    assert all(name in event for event in events for name in expected)
    assert [event["step"] for event in events if "eval/episodic_return" in event] == [640, 1280]
    assert any("charts/episodic_return" in event for event in events)
    saved = json.loads((straight / "args.json").read_text())
    assert saved["args"]["gamma"] == 0.99 and saved["args"]["num_workers"] == 1
    assert {"jax", "flax", "gymnasium"} <= set(saved["versions"])
    assert list(straight.glob("events.out.tfevents*"))
    assert max(int(path.name) for path in (straight / "checkpoints").iterdir()) == 1280


def test_a_copy_writes_its_runs_under_its_own_name(runner):
    copy = shutil.copy(ROOT / "trudi_humanoidbench.py", runner.folder / "my_variant.py")
    mine = WorkersRunner(runner.folder, copy)
    folder = mine.train("--env-id", "Hopper-v5", "--num-workers", "1", "--total-timesteps", "128")
    assert folder.name.startswith("Hopper-v5__my_variant__1__")
    assert json.loads((folder / "args.json").read_text())["script"] == "my_variant"
    _, err = runner.call("--evaluate", folder, code=2)
    assert "it is of my_variant.py" in err


def test_numbers_depend_on_the_seed_but_not_on_workers_or_devices(runner, straight):
    few = ("--env-id", "Hopper-v5", "--total-timesteps", "640")
    assert curve(runner.train_here(*few, "--num-workers", "2")) == curve(straight)[:5]
    two = runner.train_here(*few, "--num-devices", "2")
    assert_close(curve(two), curve(straight), events=2)
    other = runner.train_here(*few, "--seed", "2")
    for one, another in zip(curve(straight)[:5], curve(other), strict=True):
        assert one["losses/critic"] != another["losses/critic"]


def test_half_cheetah_with_a_video(runner):
    folder = runner.train("--env-id", "faulty:ShortCheetah-v0", "--capture-video")
    videos = sorted(folder.glob("videos/*.mp4"))
    assert [path.name for path in videos] == ["step_1280.mp4", "step_640.mp4"]
    assert videos[0].stat().st_size > 2000


def test_ctrl_c_saves_and_a_killed_run_goes_on(runner):
    def press(process):
        os.killpg(process.pid, signal.SIGINT)

    def preempt(process):
        """As SLURM, systemd and containers do, and a launcher that passes the signal on."""
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)

    folder, code = runner.signalled(preempt, "--env-id", "Hopper-v5")
    assert code == 143
    assert max(int(path.name) for path in (folder / "checkpoints").iterdir()) == 128 * len(metrics(folder))
    folder, code = runner.signalled(press, "--env-id", "Hopper-v5")
    assert code == 130
    saved = len(metrics(folder))
    assert max(int(path.name) for path in (folder / "checkpoints").iterdir()) == 128 * saved
    killed, code = runner.signalled(lambda process: process.kill(), "--env-id", "Hopper-v5")
    assert code == -9
    newest = max(int(path.name) for path in (killed / "checkpoints").iterdir() if path.name.isdigit())
    assert len(metrics(killed)) - newest // 128 <= 2  # one checkpoint interval
    runner.call("--resume", folder, "--total-timesteps", 128 * (saved + 5))
    events = metrics(folder)
    assert [event["step"] for event in events] == [128 * i for i in range(1, saved + 6)]
    times = [event["wall_time"] for event in events]
    assert times == sorted(times) and all(name in events[-1] for name in TIMES)
    out, _ = runner.call("--evaluate", folder, "--eval-mode", "sde")
    assert json.loads(out.splitlines()[-1])["eval/episodic_length"] > 0
    runner.call("--evaluate", folder, "--export", runner.folder / "policy.onnx")
    session = onnxruntime.InferenceSession(str(runner.folder / "policy.onnx"))
    assert int(session.get_modelmeta().custom_metadata_map["iteration"]) * 128 == events[-1]["step"]


def test_a_failing_environment_ends_the_run_but_not_its_checkpoints(runner):
    sizes = "--num-steps 2 --minibatch-size 16 --total-timesteps 160 --checkpoint-interval 1".split()
    process = runner.start(*SMALL, "--env-id", "faulty:Dies-v0", *sizes)
    started = set()
    while process.poll() is None:
        started |= set(descendants(process.pid))
        time.sleep(0.05)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "ended with code 7" in err.splitlines()[-1] and "Traceback" not in err
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not all(map(process_is_gone, started)):
        time.sleep(0.05)
    assert len(started) >= 3 and all(map(process_is_gone, started))
    (folder,) = runner.folder.glob("runs/faulty:Dies*")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["16"]


# ---------------------------------------------------------------------------------------------- HumanoidBench
@pytest.mark.parametrize("env_id", ["h1hand-stand-v0", "h1hand-push-v0"])
def test_humanoid_bench(env_id, runner):
    """One task with a success bar only, one that tells successes."""
    pytest.importorskip("humanoid_bench")
    sizes = "--num-envs 2 --num-steps 8 --minibatch-size 16 --total-timesteps 32 --eval-interval 2".split()
    folder = runner.train("--env-id", env_id, *sizes)
    last = metrics(folder)[-1]
    assert last["eval/success"] == 0 and last["eval/success_bar"] in (800, 700)
