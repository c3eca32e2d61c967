"""A task of the tests' own for Isaac Lab 3.0: a cart pole of boxes, 60 steps an episode, a group for the critic."""

import pathlib
import tempfile

import gymnasium as gym
import isaac_assets as usd
import isaaclab.sim as sim_utils
import torch
from isaaclab.actuators import ImplicitActuatorCfg
from isaaclab.assets import ArticulationCfg
from isaaclab.envs import DirectRLEnv, DirectRLEnvCfg
from isaaclab.scene import InteractiveSceneCfg
from isaaclab.sim import SimulationCfg
from isaaclab.utils import configclass
from isaaclab_newton.physics import MJWarpSolverCfg, NewtonCfg


def body(name, place, sides, mass):
    return usd.prim("Xform", name, usd.transform("double3", "translate", place), f"float physics:mass = {mass}",
                    f"float3 physics:diagonalInertia = {(0.02, 0.02, 0.02)}",
                    usd.prim("Cube", "box", usd.transform("float3", "scale", sides)), apis="PhysicsRigidBodyAPI PhysicsMassAPI")


def joint(kind, name, axis, parent, link, place, limit):
    return usd.prim(kind, name, f"rel physics:body0 = </asset/{parent}>", f"rel physics:body1 = </asset/{link}>",
                    f'uniform token physics:axis = "{axis}"', f"point3f physics:localPos1 = {place}",
                    f"float physics:lowerLimit = {-limit}", f"float physics:upperLimit = {limit}")


def cartpole():
    """A file with a rail, a cart that slides on it and a pole that turns about the cart."""
    path = pathlib.Path(tempfile.mkdtemp()) / "cartpole.usda"
    usd.write(path, [
        body("rail", (0, 0, 0), (0.02, 2, 0.02), 1), body("cart", (0, 0, 0), (0.1, 0.12, 0.1), 1),
        body("pole", (0, 0, 0.5), (0.02, 0.02, 0.5), 0.3),
        usd.prim("PhysicsFixedJoint", "fixed", "rel physics:body1 = </asset/rail>"),
        joint("PhysicsPrismaticJoint", "slider", "Y", "rail", "cart", (0, 0, 0), 4),
        joint("PhysicsRevoluteJoint", "hinge", "X", "cart", "pole", (0, 0, -0.5), 360)], "PhysicsArticulationRootAPI")
    motor = ImplicitActuatorCfg(joint_names_expr=["slider"], joint_effort_limit=100.0, stiffness=0.0, damping=0.5)
    free = ImplicitActuatorCfg(joint_names_expr=["hinge"], joint_effort_limit=100.0, stiffness=0.0, damping=0.0)
    return ArticulationCfg(prim_path="{ENV_REGEX_NS}/Robot", spawn=sim_utils.UsdFileCfg(usd_path=str(path)),
                           actuators={"motor": motor, "free": free})


@configclass
class SceneCfg(InteractiveSceneCfg):
    cartpole: ArticulationCfg = cartpole()


@configclass
class CartpoleCfg(DirectRLEnvCfg):
    decimation, episode_length_s, action_space, observation_space, state_space = 2, 1.2, 1, 4, 0
    sim: SimulationCfg = SimulationCfg(dt=0.01, render_interval=2, physics=NewtonCfg(solver_cfg=MJWarpSolverCfg()))
    scene: SceneCfg = SceneCfg(num_envs=16, env_spacing=4.0)


class Cartpole(DirectRLEnv):
    """Pays a tenth of the cosine of the pole's angle a step; falling beyond a right angle ends the episode."""

    def _pre_physics_step(self, actions):
        self.actions = 20 * actions

    def _apply_action(self):
        self.scene["cartpole"].set_joint_effort_target_index(target=self.actions, joint_ids=torch.tensor([0]))

    def state(self):
        data = self.scene["cartpole"].data
        return data.joint_pos.torch, data.joint_vel.torch

    def _get_observations(self):
        positions, velocities = self.state()
        clock = (self.episode_length_buf / self.max_episode_length)[:, None]
        return {"policy": torch.cat([positions, velocities], -1), "critic": torch.cat([positions, velocities, clock], -1)}

    def _get_rewards(self):
        return 0.1 * torch.cos(self.state()[0][:, 1])

    def _get_dones(self):
        return self.state()[0][:, 1].abs() > torch.pi / 2, self.episode_length_buf >= self.max_episode_length

    def _reset_idx(self, env_ids):
        self.extras.setdefault("log", {})["Metrics/survived"] = self.reset_time_outs[env_ids].float().mean()
        super()._reset_idx(env_ids)
        robot, noise = self.scene["cartpole"], torch.rand(len(env_ids), 2, device=self.device) - 0.5
        robot.write_joint_position_to_sim_index(position=0.2 * noise, env_ids=env_ids)
        robot.write_joint_velocity_to_sim_index(velocity=torch.zeros_like(noise), env_ids=env_ids)


gym.register("Isaac-Test-Cartpole", Cartpole, disable_env_checker=True, kwargs={"env_cfg_entry_point": CartpoleCfg})
