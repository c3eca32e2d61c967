"""benchmark/baselines with arguments of toy size."""

import importlib

from runner import BASELINES

NAMES = sorted(path.stem for path in BASELINES.glob("*_mjx.py"))
SIZES = dict(preset="cpu", num_envs=16, num_steps=8, minibatch_size=64, hidden_dim=16, num_eval_envs=4, total_timesteps=1280)
ALGORITHMS = ("reppo", "dime", "ppo")  # that are there for PyTorch's two simulators
SIMULATORS = ("maniskill", "isaaclab")
PAIRS = [(algorithm, simulator) for algorithm in ALGORITHMS for simulator in SIMULATORS]
TASK = {"maniskill": "PushCube-v1", "isaaclab": "Mjlab-Cartpole-Balance"}


def script_of(algorithm, simulator="maniskill"):
    """A baseline by its algorithm and simulator, or by a name that has both."""
    name = algorithm if "_" in algorithm else f"{algorithm}_{simulator}"
    return importlib.import_module(f"benchmark.baselines.{name}")


def args_of(script, **changes):
    """Resolved arguments; sizes that a script does not have are left out."""
    sizes = {name: value for name, value in SIZES.items() if name in script.Args.__annotations__}
    args = script.resolve(script.Args(**{**sizes, **changes}))
    script.check_args(args)
    return args


def small_args(algorithm, simulator="maniskill", **changes):
    """The same in PyTorch, by algorithm and simulator."""
    return args_of(script_of(algorithm, simulator), **{"env_id": TASK[simulator], "num_epochs": 1, **changes})
