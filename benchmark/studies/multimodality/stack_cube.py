"""StackCube where either cube may go on the other (Appendix D.2). ManiSkill's cube A is the red one, its cube
B here blue."""

import contextlib
from collections.abc import Iterator

import sapien
import torch
from mani_skill.envs.tasks.tabletop.stack_cube import StackCubeEnv
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs import Pose
from torch import Tensor

HORIZON = 100  # twice stock StackCube's, as the test's cubes are 0.7 m apart
RED_START, BLUE_START = (0.0, -0.35, 0.02), (0.0, 0.35, 0.02)  # of the test, in metres
BLUE = (0.0, 0.0, 1.0, 1.0)
# After qpos and qvel: xyz and a quaternion each.
OBSERVATION = dict(tcp=slice(18, 25), red=slice(25, 32), blue=slice(32, 39))


def other_order(info: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same facts with the cubes' names exchanged."""
    names = {name: name.translate(str.maketrans("AB", "BA")) for name in info}
    return {names[name]: fact for name, fact in info.items()}


@register_env("StackCubeSymmetric-v1", max_episode_steps=HORIZON)
class StackCubeSymmetricEnv(StackCubeEnv):
    """StackCube-Train: stack one cube on the other, either; both start as in stock StackCube, at random
    within |x| <= 0.2 m and |y| <= 0.3 m.

    Everything is computed for both orders, by stock StackCube with the cubes exchanged for the second.
    Success is either's. Reward "dense" is the larger (E11), at most 8: 2 (1 - tanh(5 d)) for reaching, of
    which the larger is the nearer cube's, 4 to 5 for bringing a grasped cube to the other's top, 6 to 7 for
    letting go of it there, 8 on success; "normalized_dense": an eighth of it."""

    def _load_scene(self, options: dict) -> None:
        super()._load_scene(options)
        for body in self.cubeB._objs:
            drawn = body.find_component_by_type(sapien.render.RenderBodyComponent)
            for part in (part for shape in (drawn.render_shapes if drawn else ()) for part in shape.parts):
                part.material.set_base_color(BLUE)

    @contextlib.contextmanager
    def cubes_exchanged(self) -> Iterator[None]:
        """Within it cube A is the blue one and cube B the red one."""
        self.cubeA, self.cubeB = self.cubeB, self.cubeA
        try:
            yield
        finally:
            self.cubeA, self.cubeB = self.cubeB, self.cubeA

    def evaluate(self) -> dict[str, Tensor]:
        """Stock StackCube's facts (E,), of both orders: is_cubeB_on_cubeA as well as is_cubeA_on_cubeB, and
        so on."""
        red_on_blue = super().evaluate()
        with self.cubes_exchanged():
            blue_on_red = super().evaluate()
        either = red_on_blue["success"] | blue_on_red["success"]
        return red_on_blue | other_order(blue_on_red) | {"success": either}

    def compute_dense_reward(self, obs: Tensor, action: Tensor, info: dict) -> Tensor:
        """Reward (E,), the larger of both orders'."""
        red_on_blue = super().compute_dense_reward(obs, action, info)
        with self.cubes_exchanged():
            blue_on_red = super().compute_dense_reward(obs, action, other_order(info))
        return torch.maximum(red_on_blue, blue_on_red)  # Eq. 315, Eq. 316


@register_env("StackCubeSymmetricTest-v1", max_episode_steps=HORIZON)
class StackCubeSymmetricTestEnv(StackCubeSymmetricEnv):
    """StackCube-Test: red at y = -0.35 m and blue at y = 0.35 m, further out than any of training's cubes.
    The paper does not say at which x, nor how they are turned: here at 0, as the gripper, and along the axes.
    The robot has none of stock StackCube's noise in its pose, so that there is one initial state whatever the
    seed."""

    def __init__(self, *args, robot_init_qpos_noise: float = 0.0, **kwargs):
        super().__init__(*args, robot_init_qpos_noise=robot_init_qpos_noise, **kwargs)

    def _initialize_episode(self, env_idx: Tensor, options: dict) -> None:
        super()._initialize_episode(env_idx, options)
        with torch.device(self.device):
            for cube, start in ((self.cubeA, RED_START), (self.cubeB, BLUE_START)):
                cube.set_pose(Pose.create_from_pq(torch.tensor(start).expand(len(env_idx), 3)))
