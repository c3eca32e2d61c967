"""trudi_isaaclab.py with Isaac Lab 3.0 itself, on a CPU, where TRUDI_ISAACLAB_PYTHON is an interpreter with
it."""

import json
import os
import subprocess

import isaac_assets
import numpy as np
import pytest
from runner import HELPERS, ROOT, STANDINS, IsaacLabRunner, curve, metrics
from small_isaaclab import FLAGS

PYTHON = os.environ.get("TRUDI_ISAACLAB_PYTHON")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="TRUDI_ISAACLAB_PYTHON names no interpreter that has Isaac Lab 3.0"
)
CARTPOLE = (
    "--env-id",
    "isaac_tasks:Isaac-Test-Cartpole",
    "--num-envs",
    "4",
    "--num-steps",
    "32",
    "--minibatch-size",
    "64",
    "--total-timesteps",
    "512",
)


class NewtonRunner(IsaacLabRunner):
    """With the interpreter that has Isaac Lab 3.0."""

    small, launch = FLAGS, (PYTHON,)

    def in_turn(self, *lines, **environment):
        """What a process prints that runs the script with one command line after the other."""
        lines = [json.dumps([*map(str, self.complete(line))]) for line in lines]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{STANDINS}", **environment}
        command = [PYTHON, HELPERS / "in_turn.py", *lines]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout


def test_a_task_of_ones_own(tmp_path):
    """Trained, trained again to the same numbers, continued, evaluated; Isaac Lab's own metrics are logged."""
    runner = NewtonRunner(tmp_path)
    run = runner.train(*CARTPOLE)
    found = metrics(run)
    assert [event["step"] for event in found] == [128, 256, 384, 512]
    assert [event["step"] for event in found if "eval/episodic_return" in event] == [256, 512]
    assert 2 < found[-1]["eval/episodic_length"] <= 60
    assert all(0 <= event["Metrics/survived"] <= 1 for event in found if event["charts/episodes"])
    assert any("Metrics/survived" in event for event in found)
    more = ["--resume", run, "--total-timesteps", 768]
    out = runner.in_turn([*FLAGS, *CARTPOLE], more, ["--evaluate", run])
    (again,) = set(run.parent.iterdir()) - {run}
    assert curve(again) == curve(run)[:4]
    assert [event["step"] for event in metrics(run)] == [128, 256, 384, 512, 640, 768]
    result = next(json.loads(line) for line in out.splitlines() if line.startswith('{"eval'))
    assert 2 < result["eval/episodic_length"] <= 60


def test_unknown_tasks_and_engines(tmp_path):
    for flags, answer in (
        (("--env-id", "Isaac-Velocity-Flat-G2"), "Isaac-Velocity-Flat-G1"),
        (("--env-id", "isaac_tasks:Isaac-Cart"), "Isaac-Cartpole"),
        (("--env-id", "Isaac-Velocity-Flat-G1", "--physics", "newtons"), "newton_mjwarp"),
    ):
        _, error = NewtonRunner(tmp_path).run(*flags, "--preset", "cpu", code=2)
        line = error.splitlines()[-1]
        assert line.startswith("trudi_isaaclab.py: error: ") and answer in line


PAPER = [
    "Isaac-Velocity-Flat-G1-v0",
    "Isaac-Velocity-Rough-G1",
    "Isaac-Velocity-Flat-H1",
    "Isaac-Velocity-Rough-H1-v0",
    "Isaac-Repose-Cube-Allegro-Direct-v0",
    "Isaac-Reorient-Cube-Shadow-Direct",
]


@pytest.fixture(scope="module")
def papers_runs(tmp_path_factory):
    """A run of each of the paper's tasks, by names of 2.3 or 3.0, on robots of boxes with the right names. All are made in one
    process, whose start takes longer than a run."""
    root = tmp_path_factory.mktemp("assets")
    isaac_assets.main(root / "Isaac")
    runner = NewtonRunner(tmp_path_factory.mktemp("runs"))
    lines = [[*FLAGS, "--env-id", env_id, "--total-timesteps", "16"] for env_id in PAPER]
    runner.in_turn(*lines, ISAACSIM_ASSET_ROOT=str(root))
    return runner.folder / "runs"


@pytest.mark.parametrize("env_id", PAPER)
def test_the_papers_tasks(env_id, papers_runs):
    """An iteration and, but for the hand that holds what it has, an evaluation."""
    (run,) = papers_runs.glob(f"{env_id}__*")
    (found,) = metrics(run)
    assert all(np.isfinite(value) for value in found.values())
    assert found["eval/episodic_length"] > 1
    assert json.loads((run / "args.json").read_text())["versions"]["isaaclab"] == "3.0.0"


def test_stand_ins_are_not_committed():
    assert not [
        path for path in ROOT.rglob("*.usd*") if ".git" not in path.parts and "venv" not in str(path)
    ]
