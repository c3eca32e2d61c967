"""parse_env_cfg, as it is in 2.3: without overrides."""

from types import SimpleNamespace

from isaaclab import write


def parse_env_cfg(task_name, device, num_envs):
    write(f"parse_env_cfg {task_name} device={device} num_envs={num_envs}")
    return SimpleNamespace(num_envs=num_envs)
