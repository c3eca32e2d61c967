"""A task for test_isaaclab_runs.py: mjlab's Cartpole-Balance with episodes of 20 steps."""

from mjlab.tasks.cartpole.cartpole_env_cfg import cartpole_balance_env_cfg, cartpole_ppo_runner_cfg
from mjlab.tasks.registry import register_mjlab_task

cfg = cartpole_balance_env_cfg()
cfg.episode_length_s = 1.0
register_mjlab_task("Mjlab-Short-Cartpole", cfg, cfg, cartpole_ppo_runner_cfg())
