"""benchmark/studies/multimodality: rewards at poses worked out by hand, the T's overlap against polygons, initial
states, modes."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
from runner import ROOT, ManiSkillRunner, call_main

pytest.importorskip("mani_skill")

import gymnasium as gym  # noqa: E402
import mani_skill  # noqa: E402
import torch  # noqa: E402
from mani_skill.envs.tasks.tabletop.push_t import PushTEnv  # noqa: E402
from mani_skill.utils.structs import Pose  # noqa: E402
from mani_skill.vector.wrappers.gymnasium import ManiSkillVectorEnv  # noqa: E402

mani_skill.logger.setLevel("ERROR")

import trudi_maniskill  # noqa: E402
from benchmark import without_vulkan  # noqa: E402
from benchmark.studies.multimodality import behavior_entropy, push_t, stack_cube  # noqa: E402

without_vulkan.stub_materials()
trudi_maniskill.leave_table_unpainted()

TASKS = {
    "PushTSymmetric-v1": 35,
    "PushTSymmetricTest-v1": 35,
    "StackCubeSymmetric-v1": 48,
    "StackCubeSymmetricTest-v1": 48,
}
OPTIONS = dict(
    num_envs=1,
    obs_mode="state",
    control_mode="pd_joint_delta_pos",
    sim_backend="physx_cpu",
    render_backend="none",
)


def make(name, reward_mode="dense", **options):
    return gym.make(f"benchmark.studies.multimodality:{name}", reward_mode=reward_mode, **OPTIONS, **options)


@pytest.fixture(scope="module")
def envs():
    """One of each task, reset."""
    made = {name: make(name) for name in TASKS}
    for env in made.values():
        env.reset(seed=0)
    yield {name: env.unwrapped for name, env in made.items()}
    for env in made.values():
        env.close()


# --------------------------------------------------------------------------------------------- all four tasks
@pytest.mark.parametrize("name", TASKS)
def test_observation_horizon_and_normalised_reward(name):
    dense, normalised = make(name), make(name, "normalized_dense")
    largest = 3.0 if name.startswith("PushT") else 8.0
    for env in (dense, normalised):
        observation, _ = env.reset(seed=3)
        assert observation.shape == (1, TASKS[name])
    for _ in range(3):
        action = 2 * torch.rand(1, dense.action_space.shape[-1]) - 1
        one, other = dense.step(action), normalised.step(action)
        assert torch.allclose(one[0], other[0], atol=1e-5)
        assert torch.allclose(one[1], largest * other[1], atol=1e-5) and one[1] > 0
    assert [dense.step(action)[3].item() for _ in range(97)] == [False] * 96 + [True]


@pytest.mark.parametrize("name", TASKS)
def test_observation_layout(envs, name):
    env, (module, bodies) = (
        envs[name],
        {
            "P": (push_t, dict(block="tee", goal="goal_tee")),
            "S": (stack_cube, dict(red="cubeA", blue="cubeB")),
        }[name[0]],
    )
    observation, _ = env.reset(seed=4)
    assert torch.equal(observation[:, module.OBSERVATION["tcp"]], env.agent.tcp.pose.raw_pose)
    for key, body in bodies.items():
        assert torch.equal(observation[:, module.OBSERVATION[key]], getattr(env, body).pose.raw_pose)


@pytest.mark.parametrize("name", TASKS)
def test_only_training_starts_at_random(envs, name):
    first, again, other = (envs[name].reset(seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.allclose(first, other, atol=1e-6) == ("Test" in name)


@pytest.mark.parametrize(
    ("name", "bodies", "parent"),
    [
        ("PushTSymmetric-v1", ("tee", "goal_tee"), PushTEnv),
        ("PushTSymmetricTest-v1", ("tee", "goal_tee"), PushTEnv),
        ("StackCubeSymmetricTest-v1", ("cubeA", "cubeB"), stack_cube.StackCubeEnv),
    ],
)
def test_partial_reset_places_as_many_as_it_was_asked_for(envs, monkeypatch, name, bodies, parent):
    """ManiSkill writes poses to the environments being reset, so there must be one pose for each of those."""
    placed = {}
    monkeypatch.setattr(parent, "_initialize_episode", lambda *_: None)
    for body in bodies:
        recorder = SimpleNamespace(set_pose=lambda pose, body=body: placed.__setitem__(body, pose.raw_pose))
        monkeypatch.setattr(envs[name], body, recorder)
    envs[name]._initialize_episode(torch.tensor([1, 4, 6]), {})
    for body in bodies:
        assert placed[body].shape == (3, 7)
        assert (len(placed[body].unique(dim=0)) == 1) == ("Test" in name)


# ------------------------------------------------------------------------------------------------------ PushT
def polygon(xy, angle, box):
    """Corners of one of the T's boxes, (left, right, bottom, top), as complex numbers, counter-clockwise."""
    left, right, bottom, top = box
    corners = (left + bottom * 1j, right + bottom * 1j, right + top * 1j, left + top * 1j)
    return [complex(*xy) + c * complex(math.cos(angle), math.sin(angle)) for c in corners]


def side(a, b, p):
    """Positive to the left of the line from a to b."""
    return ((b - a).conjugate() * (p - a)).imag


def clip(subject, by):
    """Sutherland and Hodgman's: the part of a polygon inside a convex one."""
    for a, b in zip(by, by[1:] + by[:1], strict=True):
        kept = []
        for p, q in zip(subject, subject[1:] + subject[:1], strict=True):
            here, there = side(a, b, p), side(a, b, q)
            kept += [p] if here >= 0 else []
            kept += [p + (q - p) * here / (here - there)] if here * there < 0 else []
        subject = kept
    return subject


def area(corners):
    return sum((p.conjugate() * q).imag for p, q in zip(corners, corners[1:] + corners[:1], strict=True)) / 2


def polygon_share(block, goal):
    """The share of the goal that the block covers, for poses (x, y, angle)."""
    boxes = (-0.1, 0.1, -0.0625, -0.0125), (-0.025, 0.025, -0.0125, 0.1375)
    pairs = [(polygon(block[:2], block[2], a), polygon(goal[:2], goal[2], b)) for a in boxes for b in boxes]
    return sum(area(clip(a, b)) for a, b in pairs) / 0.0175


def overlap(block, goal):
    """push_t.intersection of poses (E, 3)."""
    block, goal = torch.tensor(block), torch.tensor(goal)
    return push_t.intersection(block[:, :2], block[:, 2], goal[:, :2], goal[:, 2])


def test_the_t_is_the_simulators(envs):
    shapes = envs["PushTSymmetric-v1"].tee._bodies[0].collision_shapes
    found = sorted((*shape.local_pose.p[:2].tolist(), *shape.half_size[:2].tolist()) for shape in shapes)
    known = sorted(
        (*centre, *half) for centre, half in zip(push_t.BOX_CENTRES, push_t.BOX_HALF_SIZES, strict=True)
    )
    assert [pytest.approx(row, abs=1e-6) for row in known] == found


def test_intersection_by_hand():
    goal = (-0.1, -0.05, 0.7)
    for angle in (0.0, 1e-6, math.pi / 2, 1.234, math.pi, 5.0):
        assert overlap([(0.03, 0.1, angle)], [(0.03, 0.1, angle)]).item() == pytest.approx(1, abs=1e-6)
        assert overlap([(0.03, 0.1, angle)], [(0.03, 0.1, angle + 2 * math.pi)]).item() == pytest.approx(
            1, abs=1e-5
        )
    # Turned by pi: each stem covers 5 x 5 cm of the other's bar, and the stems 5 x 2.5 cm of each other.
    assert overlap([(-0.1, -0.05, 0.7 + math.pi)], [goal]).item() == pytest.approx(
        (25 + 25 + 12.5) / 175, abs=1e-5
    )
    # Pushed by 5 cm along the bar, 15 of whose 20 cm still overlap; the stems lie side by side.
    assert overlap([(0.05, 0.0, 0.0)], [(0.0, 0.0, 0.0)]).item() == pytest.approx(75 / 175, abs=1e-5)
    assert overlap([(0.3, 0.0, 0.0)], [(0.0, 0.0, 0.0)]).item() == 0


def some_poses(count):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, generator=generator) * torch.tensor([0.4, 0.5, 6.3]) - torch.tensor(
        [0.3, 0.3, 0.0]
    ), generator


@pytest.mark.parametrize("distance", [0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.02, 0.2])
def test_intersection_against_polygons(distance):
    """The block at this distance from the goal in metres, and turned by up to ten times as many radians."""
    goals, generator = some_poses(200)
    blocks = goals + distance * (2 * torch.rand(200, 3, generator=generator) - 1) * torch.tensor(
        [1.0, 1.0, 10.0]
    )
    expected = [polygon_share(*pair) for pair in zip(blocks.tolist(), goals.tolist(), strict=True)]
    assert overlap(blocks.tolist(), goals.tolist()).tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 20 * distance or distance == 0.2 and min(expected) == 0


@pytest.mark.parametrize(
    "shift",
    [
        (0, 0, 0),
        (0.05, 0, 0),
        (0.2, 0, 0),
        (0, 0.05, 0),
        (0, 0.2, 0),
        (0.075, 0, 0),
        (0.1, 0.1, 1),
        (0, 0, 2),
        (0.1, 0, 2),
    ],
)
def test_intersection_where_sides_coincide(shift):
    """Moved, in the goal's own frame, and turned by quarters so that a side lies on a side, from inside or
    from outside."""
    (goals, _), (x, y, quarters) = some_poses(200), shift
    angle = quarters * math.pi / 2
    moved = goals[:, :2] + push_t.rotate(torch.tensor([[x, y]], dtype=torch.float32), goals[:, 2])
    blocks = torch.cat([moved, goals[:, 2:] + angle], 1)
    expected = polygon_share((x, y, angle), (0, 0, 0))
    assert overlap(blocks.tolist(), goals.tolist()).tolist() == pytest.approx([expected] * 200, abs=2e-5)


def test_yaw():
    angles = torch.tensor([0.0, 0.5, 1.6, 3.0, -0.5, -3.0])
    quaternions = torch.stack([(angles / 2).cos(), 0 * angles, 0 * angles, (angles / 2).sin()], -1)
    for sign in (1, -1):
        assert torch.allclose(push_t.yaw(sign * quaternions), angles, atol=1e-6)
    assert push_t.yaw(torch.tensor([1.0000001, 0.0, 0.0, 0.0])).item() == 0


def test_push_t_reward_terms():
    """cos is 1, 1/2, 0 and -1; tanh(5 x 0.1) = 0.462117."""
    angles = torch.tensor([0.0, math.pi / 3, -math.pi / 3, math.pi / 2, math.pi])
    rotation = push_t.rotation_reward(angles + 2.0, torch.tensor(2.0))
    assert rotation.tolist() == pytest.approx([0.5, 0.28125, 0.28125, 0.125, 0.0], abs=1e-6)
    xy = torch.tensor([[0.0, 0.0], [0.06, 0.08], [9.0, 0.0]])
    assert push_t.position_reward(xy - 1, torch.tensor([-1.0, -1.0])).tolist() == pytest.approx(
        [0.5, 0.144659, 0], abs=1e-5
    )
    tcp = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.06, 0.08], [9.0, 0.0, 0.0]])
    assert push_t.guidance_reward(tcp, torch.zeros(3)).tolist() == pytest.approx(
        [0.05, 0.0366703, 0.0], abs=1e-6
    )


def test_push_t_reward_is_each_environments_own():
    """Three environments with goals of their own; turned by 0, pi / 2 and pi, moved by 0, 0.1 and 0 m."""
    goal_xy, goal_yaw = torch.tensor([[0.0, 0.0], [0.1, 0.2], [-0.2, 0.1]]), torch.tensor([1.0, 2.0, 3.0])
    block_xy = goal_xy + torch.tensor([[0.0, 0.0], [0.0, 0.1], [0.0, 0.0]])
    block = push_t.planar_pose(block_xy, goal_yaw + torch.tensor([0.0, math.pi / 2, math.pi]), 0.02)
    tee, goal = (SimpleNamespace(pose=pose) for pose in (block, push_t.planar_pose(goal_xy, goal_yaw, 0.0)))
    env = SimpleNamespace(tee=tee, goal_tee=goal, agent=SimpleNamespace(tcp=tee))
    assert push_t.PushTSymmetricEnv.pseudo_render_intersection(env).tolist() == pytest.approx(
        [1, polygon_share((0, 0.1, math.pi / 2 + 2), (0, 0, 2)), 62.5 / 175], abs=1e-5
    )
    reward = push_t.PushTSymmetricEnv.compute_dense_reward(
        env, None, None, {"success": torch.tensor([True, False, False])}
    )
    assert reward.tolist() == pytest.approx([3, 0.125 + 0.144659 + 0.05, 0 + 0.5 + 0.05], abs=1e-5)


def test_push_t_success(envs):
    env = envs["PushTSymmetricTest-v1"]
    _, info = env.reset(seed=0)
    distance = (env.agent.tcp.pose.p - env.tee.pose.p).norm().item()
    start = 0.5 + math.sqrt(1 - math.tanh(5 * distance)) / 20
    assert not info["success"] and env.compute_dense_reward(None, None, info).item() == pytest.approx(
        start, abs=1e-5
    )
    # Moved by 5 mm along the bar: 19.5 of its 20 cm and 4.5 of the stem's 5 cm, 0.929; by 10 mm, 0.857.
    for shift, success in ((0.0, True), (0.005, True), (0.01, False)):
        env.tee.set_pose(push_t.planar_pose(torch.tensor([[-0.1 + shift, -0.05]]), torch.zeros(1), 0.021))
        info = env.evaluate()
        assert info["success"].item() == success
        assert (env.compute_dense_reward(None, None, info).item() == 3) == success
        assert (env.compute_normalized_dense_reward(None, None, info).item() == 1) == success


def test_push_t_starts(envs):
    (goal_xy, goal_yaw), (block_xy, block_yaw) = envs["PushTSymmetricTest-v1"].start(2)
    for xy in (goal_xy, block_xy):
        assert torch.allclose(xy, torch.tensor([[-0.1, -0.05]] * 2))
    assert goal_yaw.tolist() == [0, 0] and block_yaw.tolist() == pytest.approx([math.pi] * 2)
    for xy, angle in envs["PushTSymmetric-v1"].start(4000):
        low, high = xy.amin(0), xy.amax(0)
        assert low.tolist() == pytest.approx([-0.3, -0.3], abs=0.005) and high.tolist() == pytest.approx(
            [0.1, 0.2], abs=0.005
        )
        assert angle.min() >= 0 and angle.min() < 0.05 and angle.max() > 2 * math.pi - 0.05
        assert low[0] >= -0.3 and low[1] >= -0.3 and high[0] <= 0.1 and high[1] <= 0.2
    goal, block = envs["PushTSymmetric-v1"].start(4000)
    columns = torch.cat([goal[0], goal[1][:, None], block[0], block[1][:, None]], 1)
    assert (torch.corrcoef(columns.T) - torch.eye(6)).abs().max() < 0.08  # independent of each other


def test_push_t_goal_moves_between_episodes(envs):
    env = envs["PushTSymmetric-v1"]
    goals = []
    for seed in (1, 2):
        env.reset(seed=seed)
        goals.append(env.goal_tee.pose.raw_pose.clone())
        env.tee.set_pose(push_t.planar_pose(goals[-1][:, :2], push_t.yaw(goals[-1][:, 3:]), 0.021))
        assert env.evaluate()["success"]
    assert (goals[0] - goals[1])[:, :2].norm() > 0.01


# -------------------------------------------------------------------------------------------------- StackCube
def place(env, red, blue):
    """Put the cubes' centres there, at rest."""
    for cube, position in ((env.cubeA, red), (env.cubeB, blue)):
        cube.set_pose(Pose.create_from_pq(torch.as_tensor(position, dtype=torch.float32)[None]))
        cube.set_linear_velocity(torch.zeros(1, 3))
        cube.set_angular_velocity(torch.zeros(1, 3))


def facts(**true):
    """Information of StackCube in which all but the named facts is false."""
    names = [f"is_cube{a}_{what}" for a, b in ("AB", "BA") for what in ("grasped", "static", f"on_cube{b}")]
    return {name: torch.tensor([bool(true.get(name))]) for name in (*names, "success")}


@pytest.fixture
def stack(envs):
    env = envs["StackCubeSymmetric-v1"]
    env.reset(seed=0)
    return env


def test_reaching_is_for_the_nearer_cube(stack):
    tcp = stack.agent.tcp.pose.p[0]
    near, far = tcp + torch.tensor([0.06, 0.0, 0.08]), tcp + torch.tensor([0.0, 0.3, 0.0])
    for red, blue in ((near, far), (far, near)):
        place(stack, red, blue)
        assert stack.compute_dense_reward(None, None, facts()).item() == pytest.approx(
            2 * (1 - 0.462117), abs=1e-5
        )


@pytest.mark.parametrize("order", ["AB", "BA"])
def test_later_stages(stack, order):
    """The upper cube 0.1 m from its place, then in it; fingers 2 of at most 4 cm open."""
    upper, lower = order
    below = torch.tensor([0.0, 0.1, 0.02])

    def reward(above, **true):
        place(stack, *((above, below) if order == "AB" else (below, above)))
        return stack.compute_dense_reward(None, None, facts(**true)).item()

    grasped, stacked = f"is_cube{upper}_grasped", f"is_cube{upper}_on_cube{lower}"
    away, top = below + torch.tensor([0.06, 0.08, 0.04]), below + torch.tensor([0.0, 0.0, 0.04])
    assert reward(away, **{grasped: True}) == pytest.approx(4 + 1 - 0.462117, abs=1e-5)
    assert reward(top, **{grasped: True}) == pytest.approx(5, abs=1e-5)
    assert reward(top, **{stacked: True}) == pytest.approx(6 + (1 + 1) / 2, abs=1e-5)
    qpos = stack.agent.robot.get_qpos().clone()
    qpos[:, -2:] = 0.02
    stack.agent.robot.set_qpos(qpos)
    assert reward(top, **{stacked: True, grasped: True}) == pytest.approx(6 + (0.5 + 1) / 2, abs=1e-5)
    assert reward(top, **{stacked: True, "success": True}) == 8


def test_stack_moving_at_the_top_pays_less(stack):
    place(stack, [0.0, 0.1, 0.02], [0.0, 0.1, 0.06])
    stack.cubeB.set_linear_velocity(torch.tensor([[0.03, 0.0, 0.04]]))
    stack.cubeB.set_angular_velocity(torch.tensor([[0.0, 0.0, 0.5]]))
    reward = stack.compute_dense_reward(None, None, facts(is_cubeB_on_cubeA=True)).item()
    assert reward == pytest.approx(6 + (1 + 1 - math.tanh(0.05 * 10 + 0.5)) / 2, abs=1e-5)


def test_success_in_either_order(stack):
    low, high = [0.0, 0.1, 0.02], [0.0, 0.1, 0.06]
    for red, blue, upper, lower in ((high, low, "A", "B"), (low, high, "B", "A")):
        place(stack, red, blue)
        info = stack.evaluate()
        assert info["success"].tolist() == [True] and info["success"].dtype == torch.bool
        assert info[f"is_cube{upper}_on_cube{lower}"] and not info[f"is_cube{lower}_on_cube{upper}"]
        assert stack.compute_dense_reward(None, None, info).item() == 8
    place(stack, low, [0.0, -0.1, 0.02])
    assert not stack.evaluate()["success"]


def test_stack_cube_is_symmetric(stack):
    """Exchanging the cubes changes neither reward nor success, and exchanges none of the bodies."""
    red, blue = stack.cubeA, stack.cubeB
    generator, rewards = torch.Generator().manual_seed(0), []
    for _ in range(20):
        one, other = torch.rand(2, 3, generator=generator) * torch.tensor([0.1, 0.1, 0.2])
        one, other = torch.stack([one, other]) + stack.agent.tcp.pose.p - torch.tensor([0.05, 0.05, 0.1])
        found = []
        for pair in ((one, other), (other, one)):
            place(stack, *pair)
            info = stack.evaluate()
            found.append((stack.compute_dense_reward(None, None, info).item(), info["success"].item()))
        assert found[0] == pytest.approx(found[1], abs=1e-6)
        rewards.append(found[0][0])
    assert len(set(rewards)) == 20
    assert stack.cubeA is red and stack.cubeB is blue


def test_stack_cube_test_start(envs):
    env = envs["StackCubeSymmetricTest-v1"]
    env.reset(seed=5)
    assert env.cubeA.pose.p[0].tolist() == pytest.approx([0, -0.35, 0.02])
    assert env.cubeB.pose.p[0].tolist() == pytest.approx([0, 0.35, 0.02])
    distances = [(env.agent.tcp.pose.p - cube.pose.p).norm().item() for cube in (env.cubeA, env.cubeB)]
    assert distances[0] == pytest.approx(distances[1], abs=1e-3)  # neither is nearer
    reaching = 2 * (1 - math.tanh(5 * distances[0]))
    assert env.compute_dense_reward(None, None, env.evaluate()).item() == pytest.approx(reaching, abs=1e-3)


# ------------------------------------------------------------------------------------------ behaviour entropy
def test_modes_of_push_t():
    """From pi to 0 either way, in steps that pass the jump of the yaw; there and back; hardly touched."""
    way = torch.linspace(0, math.pi, 30)
    paths = torch.stack(
        [
            math.pi + way,
            math.pi - way,
            math.pi + torch.cat([way[:15], way[:15].flip(0)]) * 0.9,
            math.pi + 1e-4 * way,
        ],
        1,
    )
    measured = push_t.yaw(torch.stack([(paths / 2).cos(), 0 * paths, 0 * paths, (paths / 2).sin()], -1))
    assert measured[-1, :2].tolist() == pytest.approx([0, 0], abs=1e-5)  # the same final yaw
    turn = behavior_entropy.turned(measured)
    assert turn.shape == measured.shape and turn[0].tolist() == [0] * 4
    assert turn[-1].tolist() == pytest.approx([math.pi, -math.pi, 0, math.pi * 1e-4], abs=1e-4)
    assert behavior_entropy.push_t_modes(turn[-1]).tolist() == [0, 1, -1, -1]
    assert behavior_entropy.MODES["PushT"] == ("counter-clockwise", "clockwise")


def test_modes_of_stack_cube():
    height = torch.tensor([0.04, -0.04, 0.0399, 0.01, -0.01, 0.04])
    success = torch.tensor([True, True, True, True, True, False])
    assert behavior_entropy.stack_cube_modes(height, success).tolist() == [0, 1, 0, -1, -1, -1]
    trace = torch.zeros(2, 2, 48)
    trace[1, 0, 34], trace[1, 1, 27] = 0.06, 0.06  # blue's z in the first episode, red's in the second
    modes, decided_by = behavior_entropy.classify("StackCube", trace, torch.ones(2, dtype=torch.bool))
    assert modes.tolist() == [0, 1] and decided_by[-1].tolist() == pytest.approx([0.06, -0.06])
    assert behavior_entropy.MODES["StackCube"] == ("blue on red", "red on blue")


def test_entropy():
    entropy = behavior_entropy.behavior_entropy
    assert entropy([100, 100]) == pytest.approx(1) and entropy([200, 0]) == 0 and entropy([0, 7]) == 0
    assert entropy([150, 50]) == pytest.approx(0.8112781) == entropy([3, 9])
    assert entropy([5, 5, 5]) == pytest.approx(1) and math.isnan(entropy([0, 0]))
    assert behavior_entropy.count_modes(torch.tensor([0, 1, -1, 1, -1])) == [1, 2]


def test_summary_counts_failures_apart():
    modes, success = torch.tensor([0, 0, 1, -1]), torch.tensor([True, False, True, False])
    found = behavior_entropy.summarize("PushT", modes, torch.tensor([1.0, 2.0, 3.0, 6.0]), success)
    assert found["mode_counts"] == {"counter-clockwise": 2, "clockwise": 1} and found["no_mode"] == 1
    assert found["entropy"] == pytest.approx(0.9182958) and found["entropy_of_successes"] == pytest.approx(1)
    assert (
        found["successes_at_end"] == 2
        and found["return_mean"] == 3
        and found["return_std"] == pytest.approx(math.sqrt(3.5))
    )
    assert behavior_entropy.summarize("PushT", modes[3:], torch.ones(1), success[3:])["entropy"] is None


def test_episodes_start_alike_and_end_before_the_reset(monkeypatch):
    """In training's task too, which otherwise starts at random; the last observation is the episode's own."""
    singles = [make("StackCubeSymmetric-v1", max_episode_steps=5) for _ in range(2)]
    vector = [ManiSkillVectorEnv(env, ignore_terminations=True, record_metrics=True) for env in singles]
    trudi = behavior_entropy.trudi
    args = trudi.Args(env_id="StackCubeSymmetric-v1")
    env = trudi.ManiSkill(args, vector, time_limit=5, evaluation=True)
    setup = trudi.Setup(args, torch.device("cpu"), None, env, 48, 48, 48, 8)
    actions = torch.tensor([[1.0] + [0.0] * 7, [-1.0] + [0.0] * 7])
    monkeypatch.setattr(trudi, "evaluation_action", lambda *_: actions)
    state = trudi.TrainState(None, trudi.init_statistics(setup), 0)
    trace, total, success = behavior_entropy.play(setup, state, seed=3)
    assert trace.shape == (6, 2, 48) and torch.equal(trace[0, 0], trace[0, 1])
    left, right = trace[:, :, 19].T  # y of the tool, as the base turns one way and the other
    assert (left.diff() > 0).all() and (right.diff() < 0).all()
    distance = [(trace[..., 18:21] - trace[..., start : start + 3]).norm(dim=-1)[1:] for start in (25, 32)]
    reaching = 2 * (1 - torch.tanh(5 * torch.minimum(*distance)))
    assert torch.allclose(total, reaching.sum(0), atol=1e-4) and success.tolist() == [False, False]
    again, _, _ = behavior_entropy.play(setup, state, seed=3)
    assert torch.allclose(trace, again, atol=1e-5)


def test_trains_and_is_evaluated(tmp_path):
    sizes = (
        "--preset cpu --device cpu --num-envs 2 --num-steps 4 --total-timesteps 8 --num-epochs 1 "
        "--minibatch-size 4 "
        "--hidden-dim 8 --num-diffusion-steps 2 --num-eval-envs 1"
    ).split()
    env_id = "benchmark.studies.multimodality:PushTSymmetric-v1"
    runner = ManiSkillRunner(tmp_path)
    runner.call("--env-id", env_id, *sizes)
    (run,) = tmp_path.glob("runs/*PushTSymmetric-v1*")

    def measured(*words, code=0):
        return call_main(behavior_entropy.main, ["behavior_entropy.py", *words], code)

    out, _ = measured(run, "--episodes", 2, "--num-envs", 2, "--device", "cpu", "--output", tmp_path / "found")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["env_id"] == "benchmark.studies.multimodality:PushTSymmetricTest-v1" and found["horizon"] == 100
    assert found["episodes"] == 2 == found["no_mode"] + sum(found["mode_counts"].values())
    assert 30 < found["return_mean"] <= 105  # of the raw reward: 100 steps near 0.5
    assert f"return_mean: {found['return_mean']}" in out and (tmp_path / "found.png").stat().st_size > 1000
    _, err = measured(run, "--episodes", 3, "--num-envs", 2, code=2)
    assert "does not divide" in err and len(err.strip().splitlines()[-1]) < 400


def test_a_folder_without_a_run_is_refused(tmp_path):
    command = [sys.executable, "-m", "benchmark.studies.multimodality.behavior_entropy", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "no run folder" in done.stderr
    assert len(done.stderr.strip().splitlines()[-1]) < 400
