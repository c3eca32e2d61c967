"""How long does a robot wait for an action? An exported policy in onnxruntime, one observation, on one core.

    python -m benchmark.speed.action [--num-diffusion-steps 1 2 4 8 16]

The policy is untrained and of the paper's width, with the sizes of G1JoystickRoughTerrain's observation and action;
neither decides the time. Medians and 99th percentiles over --calls calls in a row, after some that are not counted.
Results go to benchmark/results/action_time.json and .md.
"""

import dataclasses
import itertools
import pathlib
import tempfile
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnxruntime
import tyro

import trudi_mjx as trudi
from benchmark.markdown import markdown_table
from benchmark.measurements import RESULTS, cpu_name, write_json


@dataclasses.dataclass(frozen=True)
class Options:
    """Time an exported policy."""

    observation_size: int = 103
    action_size: int = 29
    hidden_dim: int = 512
    num_diffusion_steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    calls: int = 2000
    output: str = str(RESULTS / "action_time")  # results, without .json and .md


def export(options: Options, mode: str, num_diffusion_steps: int, path: pathlib.Path) -> list[int]:
    """Write an untrained policy; returns the shape of the noise that it wants."""
    sizes = dict(hidden_dim=options.hidden_dim, num_diffusion_steps=num_diffusion_steps)
    args = trudi.Args(eval_mode=mode, export=str(path), **sizes)
    actor = trudi.Actor(args, options.observation_size, options.action_size, trudi.nnx.Rngs(0))
    moments = jnp.stack([jnp.zeros(options.observation_size), jnp.ones(options.observation_size)])
    policy = trudi.deployed_policy(args, actor, moments)
    trudi.write_policy(args, policy, (options.observation_size, options.action_size), {})
    return [1, options.action_size] if mode == "ode" else [1, num_diffusion_steps + 1, options.action_size]


def time_calls(path: pathlib.Path, noise_shape: list[int], options: Options) -> np.ndarray:
    """Milliseconds of each call."""
    one_thread = onnxruntime.SessionOptions()
    one_thread.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), one_thread)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(options.calls + options.calls // 10):
        observation = rng.standard_normal((1, options.observation_size), np.float32)
        noise = rng.standard_normal(noise_shape, np.float32)
        began = time.perf_counter()
        session.run(["action"], {"observation": observation, "noise": noise})
        found.append(1e3 * (time.perf_counter() - began))
    return np.array(found[options.calls // 10 :])


def time_policy(options: Options, steps: int, mode: str) -> dict[str, Any]:
    """A row of the results: an exported policy's median and 99th percentile."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "policy.onnx")
        times = time_calls(path, export(options, mode, steps, path), options)
    median, slow = (float(np.percentile(times, q)) for q in (50, 99))
    return {"steps": steps, "mode": mode, "median_ms": median, "percentile_99_ms": slow}


def main() -> None:
    """Export, time, and write the table."""
    options = tyro.cli(Options)
    rows = [
        time_policy(options, steps, mode)
        for steps, mode in itertools.product(options.num_diffusion_steps, ("ode", "sde"))
    ]
    shown = {name: value for name, value in vars(options).items() if name != "output"}
    output = pathlib.Path(options.output)
    write_json(output.with_suffix(".json"), {"options": shown, "rows": rows})
    cells = [(x["steps"], x["mode"], f"{x['median_ms']:.2f}", f"{x['percentile_99_ms']:.2f}") for x in rows]
    text = markdown_table(("denoising steps N", "acts by", "median, ms", "99th percentile, ms"), cells)
    text += (
        f"\nOne core of {cpu_name()}, width {options.hidden_dim}, onnxruntime {onnxruntime.__version__}.\n"
    )
    output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
