"""Starts scripts as a user does, and reads what their runs wrote."""

import atexit
import contextlib
import importlib
import importlib.util
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import numpy as np

TESTS = pathlib.Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
STANDINS = TESTS / "standins"
BASELINES = ROOT / "benchmark" / "baselines"
HELPERS = TESTS / "helpers"
LEAN = HELPERS / "lean"
PATIENCE = float(os.environ.get("TRUDI_TEST_PATIENCE", "3"))  # times as long as on a quiet machine
SMALL = ("--preset cpu --num-envs 16 --num-steps 8 --num-epochs 1 --minibatch-size 64 --hidden-dim 16 --num-diffusion-steps 2 "
         "--num-eval-envs 2 --total-timesteps 5120 --eval-interval 20 --checkpoint-interval 2 --impl jax").split()
CLIFF = ("--env-id", "own_tasks:Cliff")  # starts in half the time of a task with physics, and its episodes are short
TIMES = ("wall_time", "charts/SPS")


class Runner:
    """Starts a script, with one folder for its runs. Compiled programs are kept for the whole session, as conftest.py says."""

    script, small, path = "trudi_mjx.py", SMALL, (LEAN, STANDINS)
    launch = (sys.executable,)  # what starts a script

    def __init__(self, folder, script=None):
        self.folder, self.script = folder, script or self.script

    def complete(self, flags):
        """Flags with what every start needs besides its own."""
        if {"--resume", "--evaluate"} & set(flags):
            return [*flags, *own_task(flags[1]), *self.compiled()]
        return ["--log-dir", self.folder / "runs", *flags, *self.compiled()]

    def compiled(self):
        """The flag that says where compiled programs are."""
        return ["--compilation-cache-dir", os.environ["JAX_COMPILATION_CACHE_DIR"]]

    def start(self, *flags, **environment):
        """A started process."""
        environment = {"PYTHONPATH": os.pathsep.join(map(str, self.path)), **environment}
        command = [*self.launch, ROOT / self.script, *self.complete(flags)]
        return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                cwd=self.folder, start_new_session=True, env={**os.environ, **environment})

    def run(self, *flags, code=0, **environment):
        """(stdout, stderr) of a process that must end with an exit code."""
        process = self.start(*flags, **environment)
        out, err = process.communicate(timeout=1500)
        assert process.returncode == code, f"exit code {process.returncode}\n{out[-2000:]}\n{err[-3000:]}"
        return out, err

    def call(self, *flags, code=0):
        """The same of the script's main function, in this process, which spares the imports."""
        name = ".".join(pathlib.Path(self.script).with_suffix("").parts)
        return call_main(self.main(importlib.import_module(name)), [self.script, *self.complete(flags)], code)

    def main(self, script):
        """What a script does when it is started."""
        return script.main

    def train(self, *flags, **environment):
        """The folder of a finished run."""
        return self.folder_in(self.run(*self.small, *flags, **environment))

    def train_here(self, *flags):
        """The same, in this process."""
        return self.folder_in(self.call(*self.small, *flags))

    def folder_in(self, said):
        """A run's folder by what it has printed, at its end."""
        name = f"__{pathlib.Path(self.script).stem}__"
        return pathlib.Path(next(line for line in reversed(said[0].splitlines()) if name in line))

    def interrupt(self, number, *flags):
        """The folder and exit code of a run that gets a signal after its fifth iteration."""
        before = set((self.folder / "runs").iterdir())
        process = self.start(*self.small, *flags)
        deadline = time.monotonic() + 300
        folder = None
        while time.monotonic() < deadline and process.poll() is None and not (folder and len(metrics(folder)) > 5):
            time.sleep(0.002)
            folder = next(iter(set((self.folder / "runs").iterdir()) - before), None)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert len(metrics(folder)) < 40, "it ended before the signal came"
        return folder, process.returncode


class TorchRunner(Runner):
    """The same of a script in PyTorch."""

    small, path = (), (ROOT, STANDINS)

    def compiled(self):
        return []

    def together(self, world, *flags):
        """What `world` processes that train together have printed, as torchrun starts them."""
        return together([*self.launch, ROOT / self.script], world, *self.complete(flags))


class ManiSkillRunner(TorchRunner):
    """Of trudi_maniskill.py, without Vulkan."""

    script, launch = "trudi_maniskill.py", (sys.executable, "-m", "benchmark.without_vulkan")


class IsaacLabRunner(TorchRunner):
    """Of trudi_isaaclab.py."""

    script = "trudi_isaaclab.py"

    def main(self, script):
        return lambda: script.main(*script.launch())


def together(command, world, *flags):
    """What `world` processes that train together have printed, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = dict(PYTHONPATH=f"{ROOT}:{STANDINS}", WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=port)
    command = [*map(str, [*command, *flags])]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, **shared, **rank}) for rank in ranks]
    ended = [process.communicate(timeout=600) for process in started]
    assert all(process.returncode == 0 for process in started), [err[-2000:] for _, err in ended]
    return [out for out, _ in ended]


@contextlib.contextmanager
def end_of_process():
    """What a script leaves to the end of its process ends with this block: the workers of trudi_humanoidbench.py, which would
    keep the fork server from ending when a later test stops it."""
    register, left = atexit.register, []

    def registered(function, *args, **kwargs):
        if type(getattr(function, "__self__", None)).__name__ != "Simulators":
            return register(function, *args, **kwargs)
        left.append(function)
        return function

    try:
        with mock.patch("atexit.register", registered):
            yield
    finally:
        for close in reversed(left):
            close()


def call_main(main, argv, code=0):
    """(stdout, stderr) of a main function with these arguments, which must end with an exit code. What it changes in the
    process is put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    kept, hook = sys.argv, threading.excepthook
    sys.argv, ended = [*map(str, argv)], 0
    out, err = io.StringIO(), io.StringIO()
    try:
        with end_of_process(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        ended = stop.code or 0
    finally:
        sys.argv, threading.excepthook = kept, hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended == code, f"exit code {ended}\n{out.getvalue()[-2000:]}\n{err.getvalue()[-3000:]}"
    return out.getvalue(), err.getvalue()


def metrics(folder):
    """A run's events so far, whole lines only."""
    path = pathlib.Path(folder, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def own_task(folder):
    """The flag without which the module of a run's own task is not imported."""
    path = pathlib.Path(folder, "args.json")
    env_id = json.loads(path.read_text())["args"]["env_id"] if path.exists() else ""
    return ["--env-id", env_id] if ":" in env_id else []


def curve(folder):
    """A run's events without the times."""
    return [{name: x for name, x in event.items() if name not in TIMES} for event in metrics(folder)]


def assert_close(a, b, events=3, rtol=2e-3):
    """The first events of two runs agree up to rounding, which a learner amplifies soon."""
    assert len(a) >= events and len(b) >= events
    for one, other in zip(a[:events], b[:events], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=rtol, atol=1e-4, err_msg=f"{name} at {one['step']}")


def meshes():
    """Where Playground keeps the meshes of its robots."""
    package = pathlib.Path(importlib.util.find_spec("mujoco_playground").origin).parent
    return package / "external_deps" / "mujoco_menagerie"


