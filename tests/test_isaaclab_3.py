"""trudi_isaaclab.py with Isaac Lab 3.0 itself, on a CPU, where TRUDI_ISAACLAB_PYTHON is an interpreter with
it."""

import json
import os

import isaac_assets
import numpy as np
import pytest
from runner import ROOT, IsaacLabRunner, curve, metrics
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


def test_a_task_of_ones_own(tmp_path):
    """Trained, trained again to the same numbers, continued, evaluated; Isaac Lab's own metrics are logged."""
    runner = NewtonRunner(tmp_path)
    run, again = (runner.train(*CARTPOLE) for _ in range(2))
    found = metrics(run)
    assert [event["step"] for event in found] == [128, 256, 384, 512]
    assert [event["step"] for event in found if "eval/episodic_return" in event] == [256, 512]
    assert curve(run) == curve(again)
    assert 2 < found[-1]["eval/episodic_length"] <= 60
    assert all(0 <= event["Metrics/survived"] <= 1 for event in found if event["charts/episodes"])
    assert any("Metrics/survived" in event for event in found)
    runner.run("--resume", run, "--total-timesteps", 768)
    assert [event["step"] for event in metrics(run)] == [128, 256, 384, 512, 640, 768]
    out, _ = runner.run("--evaluate", run)
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


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Robots of boxes, with the right names."""
    root = tmp_path_factory.mktemp("assets")
    isaac_assets.main(root / "Isaac")
    return str(root)


@pytest.mark.parametrize(
    "env_id",
    [
        "Isaac-Velocity-Flat-G1-v0",
        "Isaac-Velocity-Rough-G1",
        "Isaac-Velocity-Flat-H1",
        "Isaac-Velocity-Rough-H1-v0",
        "Isaac-Repose-Cube-Allegro-Direct-v0",
        "Isaac-Reorient-Cube-Shadow-Direct",
    ],
)
def test_the_papers_tasks(env_id, tmp_path, assets):
    """An iteration and, but for the hand that holds what it has, an evaluation; by names of 2.3 or 3.0."""
    run = NewtonRunner(tmp_path).train("--env-id", env_id, "--total-timesteps", "16", ISAACSIM_ASSET_ROOT=assets)
    (found,) = metrics(run)
    assert all(np.isfinite(value) for value in found.values())
    assert found["eval/episodic_length"] > 1
    assert json.loads((run / "args.json").read_text())["versions"]["isaaclab"] == "3.0.0"


def test_stand_ins_are_not_committed():
    assert not [
        path for path in ROOT.rglob("*.usd*") if ".git" not in path.parts and "venv" not in str(path)
    ]
