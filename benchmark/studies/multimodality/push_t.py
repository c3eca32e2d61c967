"""PushT with a goal of its own in each environment, and with two ways round to it (Appendix D.1).

Lengths in metres, angles in radians about the upward z axis. A pose in the plane is a position xy (E, 2) and
a yaw (E,)."""

import math

import torch
from mani_skill.envs.tasks.tabletop.push_t import PushTEnv
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs import Pose
from torch import Tensor

HORIZON = 100  # stock PushT's, and Table 1's 155 to 172 are less than 3 a step for it (E17)
WORKSPACE = ((-0.3, -0.3), (0.1, 0.2))  # of the block's and the goal's origins: lowest and highest x, y
SUCCESS_REWARD = 3.0  # E10
GOAL_HEIGHT, BLOCK_HEIGHT = 1e-3, 0.021  # of their centres, as in stock PushT: both 1 mm above the table
# The T is two boxes, its bar and its stem, in a frame whose origin is near its centre of mass.
BOX_CENTRES = ((0.0, -0.0375), (0.0, 0.0625))
BOX_HALF_SIZES = ((0.1, 0.025), (0.025, 0.075))
AREA = sum(4 * x * y for x, y in BOX_HALF_SIZES)
# By which the goal is grown: far more than float64's rounding, so that of two sides that coincide, as they do
# when the block is at the goal, one is clearly the outer one.
MARGIN = 1.2e-9
# After qpos and qvel: xyz and a quaternion each.
OBSERVATION = dict(tcp=slice(14, 21), block=slice(21, 28), goal=slice(28, 35))


def yaw(quaternion: Tensor) -> Tensor:
    """Rotation about z (...,), in [-pi, pi], of quaternions w, x, y, z (..., 4). With atan2, for which they
    need no unit norm: the acos of a w that rounding left above 1 is NaN."""
    w, x, y, z = quaternion.unbind(-1)
    return torch.atan2(2 * (w * z + x * y), w**2 + x**2 - y**2 - z**2)


def rotate(points: Tensor, angle: Tensor) -> Tensor:
    """Points (..., 2), turned by angles that broadcast to (...). Not a matrix product, which a GPU may round
    to TF32."""
    (x, y), cos, sin = points.unbind(-1), angle.cos(), angle.sin()
    return torch.stack([cos * x - sin * y, sin * x + cos * y], -1)


def boxes(device: torch.device, grow: float) -> tuple[Tensor, Tensor]:
    """Centres and half sizes of the T's boxes in its own frame, (2 boxes, 1, 2) each, grown by this on all
    sides."""
    centres = torch.tensor(BOX_CENTRES, device=device, dtype=torch.float64)
    half_sizes = torch.tensor(BOX_HALF_SIZES, device=device, dtype=torch.float64)
    return centres[:, None], half_sizes[:, None] + grow


def box_corners(device: torch.device, grow: float) -> Tensor:
    """Corners of those boxes, counter-clockwise, (2 boxes, 4, 2)."""
    centres, half_sizes = boxes(device, grow)
    return centres + half_sizes * torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], device=device)


def edges_inside(corners: Tensor, grow: float) -> Tensor:
    """How much of the edges of boxes with these corners (E, 2 boxes, 4, 2), in the T's frame, lies in the T's
    boxes: (E, 2, 4), 0 to 1 for each of the T's two. The Liang-Barsky algorithm: an edge is inside while it
    is between both pairs of sides."""
    centres, half_sizes = boxes(corners.device, grow)
    start = corners[:, :, None] - centres  # (E, 2 boxes, 2 of the T, 4, 2)
    along = (corners.roll(-1, -2) - corners)[:, :, None]
    along = torch.where(along.abs() < 1e-20, 1e-20, along)  # parallel to a side: crosses it far away
    crossings = torch.stack([(-half_sizes - start) / along, (half_sizes - start) / along])
    enter, leave = crossings.amin(0).amax(-1).clamp(0, 1), crossings.amax(0).amin(-1).clamp(0, 1)
    return (leave - enter).clamp(min=0).sum(2)


def intersection(block_xy: Tensor, block_yaw: Tensor, goal_xy: Tensor, goal_yaw: Tensor) -> Tensor:
    """Exact share (E,), 0 to 1, of the goal's footprint that the block covers, for poses (E, 2) and (E,).

    By Green's theorem the common area of two boxes is half the sum of start x end along its boundary, which
    consists of those parts of either's edges that lie in the other; the boxes of one T do not overlap, so the
    four pairs add up. In float64, as a sum in which rounding has let one of two sides that coincide go
    missing is far off. Stock PushT's 64 x 64 picture finds 0.948 for identical poses."""
    block_xy, block_yaw, goal_xy, goal_yaw = (x.double() for x in (block_xy, block_yaw, goal_xy, goal_yaw))
    device, turn = block_xy.device, (block_yaw - goal_yaw)[:, None, None]
    offset = rotate(block_xy - goal_xy, -goal_yaw)[:, None, None]
    block = rotate(box_corners(device, 0.0), turn) + offset  # both in the goal's frame, (E, 2, 4, 2)
    goal = box_corners(device, MARGIN).expand_as(block)
    inside = edges_inside(block, MARGIN), edges_inside(rotate(goal - offset, -turn), 0.0)
    area = torch.zeros_like(block_yaw)
    for start, share in zip((block, goal), inside, strict=True):
        end = start.roll(-1, -2)
        area = area + ((start[..., 0] * end[..., 1] - start[..., 1] * end[..., 0]) * share).sum((-2, -1)) / 2
    return (area / AREA).float()


def rotation_reward(block_yaw: Tensor, goal_yaw: Tensor) -> Tensor:
    """r_rot (E,), in [0, 0.5]. Even in the angle: turning the block either way pays the same."""
    return ((torch.cos(block_yaw - goal_yaw) + 1) / 2) ** 2 / 2  # Eq. 312


def position_reward(block_xy: Tensor, goal_xy: Tensor) -> Tensor:
    """r_pos (E,), in [0, 0.5], of positions (E, 2)."""
    return (1 - torch.tanh(5 * torch.linalg.norm(block_xy - goal_xy, dim=-1))) ** 2 / 2  # Eq. 313


def guidance_reward(tcp: Tensor, block: Tensor) -> Tensor:
    """r_tcp (E,), in [0, 0.05], of positions (E, 3). The paper says of Eq. 313 alone that its positions are
    in the plane; here, as in stock PushT, height counts too, or a stick held above the block would be paid
    for."""
    return torch.sqrt(1 - torch.tanh(5 * torch.linalg.norm(tcp - block, dim=-1))) / 20  # Eq. 314


def planar_pose(xy: Tensor, angle: Tensor, height: float) -> Pose:
    """ManiSkill's pose of E bodies lying on the table."""
    zero = torch.zeros_like(angle)
    position = torch.cat([xy, torch.full_like(xy[:, :1], height)], -1)
    return Pose.create_from_pq(position, torch.stack([(angle / 2).cos(), zero, zero, (angle / 2).sin()], -1))


@register_env("PushTSymmetric-v1", max_episode_steps=HORIZON)
class PushTSymmetricEnv(PushTEnv):
    """PushT-Train: push a T onto a goal; both are anywhere in the workspace, turned anyhow, independently.

    Reward "dense": r_rot + r_pos + r_tcp, and 3 on success (E10), when the block covers at least 90 % of the
    goal; "normalized_dense": a third of it. Observations have the goal's pose where stock PushT has its
    position, 35 numbers. Nothing is remembered about the goal but its body's pose, so a partial reset
    concerns the environments in env_idx alone. A block that starts under the stick's tip is pushed aside in
    the first steps."""

    def start(self, count: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Initial poses in the plane of `count` goals, then of as many blocks."""
        low, high = torch.tensor(WORKSPACE)
        xy, angle = low + (high - low) * torch.rand(2, count, 2), 2 * math.pi * torch.rand(2, count)
        return (xy[0], angle[0]), (xy[1], angle[1])

    def _initialize_episode(self, env_idx: Tensor, options: dict) -> None:
        super()._initialize_episode(env_idx, options)
        with torch.device(self.device):
            goal, block = self.start(len(env_idx))
            self.goal_tee.set_pose(planar_pose(*goal, GOAL_HEIGHT))
            self.tee.set_pose(planar_pose(*block, BLOCK_HEIGHT))

    def _get_obs_extra(self, info: dict) -> dict[str, Tensor]:
        observation = super()._get_obs_extra(info)
        if observation.pop("goal_pos", None) is not None:
            observation["goal_pose"] = self.goal_tee.pose.raw_pose
        return observation

    def pseudo_render_intersection(self) -> Tensor:
        """What stock PushT's `evaluate` calls: the share of the goal that is covered, (E,)."""
        block, goal = self.tee.pose, self.goal_tee.pose
        return intersection(block.p[:, :2], yaw(block.q), goal.p[:, :2], yaw(goal.q))

    def compute_dense_reward(self, obs: Tensor, action: Tensor, info: dict) -> Tensor:
        """Reward (E,), at most 3."""
        block, goal = self.tee.pose, self.goal_tee.pose
        reward = rotation_reward(yaw(block.q), yaw(goal.q)) + position_reward(block.p[:, :2], goal.p[:, :2])
        reward = reward + guidance_reward(self.agent.tcp.pose.p, block.p)
        return torch.where(info["success"], SUCCESS_REWARD, reward)


@register_env("PushTSymmetricTest-v1", max_episode_steps=HORIZON)
class PushTSymmetricTestEnv(PushTSymmetricEnv):
    """PushT-Test: the goal at the workspace's centre, unturned; the block there too, but turned by pi. The
    robot has none of stock PushT's noise in its pose, so that there is one initial state whatever the seed.
    """

    def __init__(self, *args, robot_init_qpos_noise: float = 0.0, **kwargs):
        super().__init__(*args, robot_init_qpos_noise=robot_init_qpos_noise, **kwargs)

    def start(self, count: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """As of the parent."""
        centre = torch.tensor(WORKSPACE).mean(0).expand(count, 2)
        return (centre, torch.zeros(count)), (centre, torch.full((count,), math.pi))
