"""trudi_isaaclab.py with Isaac Lab 3.0 itself, on a CPU, where TRUDI_ISAACLAB_PYTHON is an interpreter with
it."""

import json
import os

import isaac_standins
import numpy as np
import pytest
from test_isaaclab import TESTS, curve, events, finish, refusal, start, train

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


def test_a_task_of_ones_own(tmp_path):
    """Trained, trained again to the same numbers, continued, evaluated; Isaac Lab's own metrics are logged.
    """
    run, again = (train(*CARTPOLE, "--log-dir", tmp_path, python=PYTHON) for _ in range(2))
    found = events(run)
    assert [event["step"] for event in found] == [128, 256, 384, 512]
    assert [event["step"] for event in found if "eval/episodic_return" in event] == [256, 512]
    assert curve(run) == curve(again)
    assert 2 < found[-1]["eval/episodic_length"] <= 60
    assert all(0 <= event["Metrics/survived"] <= 1 for event in found if event["charts/episodes"])
    assert any("Metrics/survived" in event for event in found)
    finish(start("--resume", run, *CARTPOLE[:2], "--total-timesteps", 768, python=PYTHON))
    assert [event["step"] for event in events(run)] == [128, 256, 384, 512, 640, 768]
    out, _ = finish(start("--evaluate", run, *CARTPOLE[:2], python=PYTHON))
    result = next(json.loads(line) for line in out.splitlines() if line.startswith('{"eval'))
    assert 2 < result["eval/episodic_length"] <= 60


def test_unknown_tasks_and_engines():
    for flags, answer in (
        (("--env-id", "Isaac-Velocity-Flat-G2"), "Isaac-Velocity-Flat-G1"),
        (("--env-id", "isaac_tasks:Isaac-Cart"), "Isaac-Cartpole"),
        (("--env-id", "Isaac-Velocity-Flat-G1", "--physics", "newtons"), "newton_mjwarp"),
    ):
        process = start(*flags, "--preset", "cpu", python=PYTHON)
        _, error = process.communicate(timeout=100)
        assert answer in refusal(process.returncode, error)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Robots of boxes, with the right names."""
    root = tmp_path_factory.mktemp("assets")
    isaac_standins.main(root / "Isaac")
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
    run = train(
        "--env-id",
        env_id,
        "--total-timesteps",
        "16",
        "--log-dir",
        tmp_path,
        python=PYTHON,
        ISAACSIM_ASSET_ROOT=assets,
    )
    (found,) = events(run)
    assert all(np.isfinite(value) for value in found.values())
    assert found["eval/episodic_length"] > 1
    assert json.loads((run / "args.json").read_text())["versions"]["isaaclab"] == "3.0.0"


def test_stand_ins_are_not_committed():
    assert not [
        path for path in TESTS.parent.rglob("*.usd*") if ".git" not in path.parts and "venv" not in str(path)
    ]
