"""What every test shares: JAX on two devices of the CPU, its compiled programs, workers of trudi_humanoidbench.py."""

import os
import subprocess
import sys

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of what tests do. Scripts take one of the devices unless they are told to take both.
FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
FASTER = " --xla_cpu_use_fusion_emitters=false"  # two thirds of the time to compile, in versions that have it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads would wait for each other, there being two processes
COMPILED = "JAX_COMPILATION_CACHE_DIR"
# Files that take over a minute, the longest first: begun last, one of them would keep one process waiting for the other.
LONG = """loop mjx_runs isaaclab_3 baselines_runs humanoidbench_runs mujoco isaaclab_runs benchmark divergence baselines_losses
losses mjx_tasks baselines_pytorch_runs maniskill_runs chain workers baselines_parity bandit export""".split()


def accepted(flags):
    """Whether XLA knows these flags; it ends a process that gives it one that it does not know."""
    probe = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(probe, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True).returncode == 0


if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = FLAGS + FASTER if accepted(FLAGS + FASTER) else FLAGS


def pytest_configure(config):
    """Programs that have been compiled once, by a test or by a process that one starts, are compiled for all, and for the
    next time: they are kept until `--cache-clear`."""
    if COMPILED not in os.environ:
        os.environ[COMPILED] = str(config.cache.mkdir("compiled"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture
def simulators():
    """Starts workers of trudi_humanoidbench.py, and ends them after the test."""
    from small_humanoidbench import setup_for, trudi

    started = []

    def start(env_id, num_envs, num_workers, mode=None, **changes):
        started.append(trudi.Simulators(setup_for(env_id, num_workers=num_workers, **changes), num_envs, mode))
        return started[-1]

    yield start
    for envs in started:
        envs.close()
