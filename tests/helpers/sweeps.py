"""A stand-in for the training scripts, and run folders, for tests of benchmark/."""

import json
import pathlib

SCRIPT = '''
import argparse, json, os, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
for name in ("env-id", "exp-name", "log-dir", "resume", "evaluate", "eval-mode", "preset"):
    parser.add_argument(f"--{name}")
parser.add_argument("--ode-score-scale", type=float, default=1.0)
parser.add_argument("--best-of-k", type=int, default=10)
parser.add_argument("--gamma", type=float, default=0.9)
parser.add_argument("--seed", type=int)
parser.add_argument("--num-seeds", type=int, default=1)
parser.add_argument("--total-timesteps", type=int, default=50)
parser.add_argument("--trust-region-bound", type=float, default=0.1)
parser.add_argument("--num-diffusion-steps", type=int, default=8)
given = parser.parse_args()
received = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, _: (received.append(n), signal.signal(n, signal.SIG_DFL)))
if given.evaluate:
    saved = json.loads(pathlib.Path(given.evaluate, "args.json").read_text())["args"]
    value = {"sde": 1.0, "ode": 2.0 + given.ode_score_scale, "best-of-k": float(given.best_of_k)}[given.eval_mode]
    print("evaluating")
    print(json.dumps({"eval/episodic_return": [value] * saved["num_seeds"]}))
    sys.exit()
folder = pathlib.Path(given.resume or f"{given.log_dir}/{given.env_id}__{given.exp_name}__{given.seed}__{time.time_ns()}")
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
done = max([int(path.name) for path in (folder / "checkpoints").iterdir()], default=0)
args = dict(env_id=given.env_id, exp_name=given.exp_name, seed=given.seed, num_seeds=given.num_seeds, gamma=given.gamma,
            trust_region_bound=given.trust_region_bound, num_diffusion_steps=given.num_diffusion_steps, num_envs=2, num_steps=5,
            hidden_dim=3, device="auto", total_timesteps=given.total_timesteps, batch_size=10)
saved = {"args": args, "script": pathlib.Path(__file__).stem, "device": "none", "command": sys.argv}
(folder / "args.json").write_text(json.dumps(saved))
seeds = range(given.seed, given.seed + given.num_seeds)
folders = [folder / f"seed_{seed}" for seed in seeds] if len(seeds) > 1 else [folder]
print(f"pid {os.getpid()} from {done}", flush=True)
while done < given.total_timesteps // 10 * 10 and not received:
    time.sleep(float(os.environ.get("FAKE_PAUSE", "0")))
    done += 10
    if done == int(os.environ.get("FAKE_FAIL_AT", "-1")) and given.seed == 2:
        print("first line\\nValueError: the fake fails", file=sys.stderr)
        sys.exit(1)
    if done == int(os.environ.get("FAKE_DIVERGE_AT", "-1")):
        (folder / "diverged").mkdir()
        sys.exit(1)
    for path in folders:
        path.mkdir(exist_ok=True)
        # a second of training for each iteration, and more where evaluations take time
        event = {"step": done, "wall_time": done / 10.0 * float(os.environ.get("FAKE_WALL", "1")), "charts/SPS": 10.0}
        if done >= given.total_timesteps // 10 * 10:
            event["eval/episodic_return"] = float(done)
        with (path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\\n")
    if received or done % 20 == 0 or done >= given.total_timesteps // 10 * 10:
        (folder / "checkpoints" / str(done)).mkdir(exist_ok=True)
sys.exit(128 + received[0] if received else 0)
'''


def write_run(root, env_id, seed, values, *, script="trudi_mjx", exp_name="trudi", total=None, step=100, hours=1.0, seeds=1,
              other_hours=0.0, **args):
    """A run folder with evaluations `values` at multiples of `step`, or for several seeds a list of such lists; trained for
    `hours`, to which evaluations and checkpoints add `other_hours`."""
    folder = pathlib.Path(root, f"{env_id}__{exp_name}__{seed}__{len(list(pathlib.Path(root).glob('*')))}")
    lists = values if seeds > 1 else [values]
    end = step * len(lists[0])
    args = dict(env_id=env_id, exp_name=exp_name, seed=seed, num_seeds=seeds, num_envs=10, num_steps=10, hidden_dim=4,
                **args, device="cpu", total_timesteps=total or end, batch_size=step)
    for k, own in enumerate(lists):
        path = folder / (f"seed_{seed + k}" if seeds > 1 else "")
        path.mkdir(parents=True, exist_ok=True)
        seconds = 3600 * (hours + other_hours)
        rows = [{"step": step * (i + 1), "wall_time": (i + 1) / len(own) * seconds, "charts/SPS": end / (hours * 3600),
                 "eval/episodic_return": float(value)} for i, value in enumerate(own)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "args.json").write_text(json.dumps({"args": args, "script": script, "device": "1 x test"}))
    return folder


def write_evaluation(root, env_id, seed, evaluation, value, step, exp_name="trudi"):
    """What benchmark.launch keeps of an evaluation."""
    path = pathlib.Path(root, "evaluations", f"{env_id}__{exp_name}__{seed}__{evaluation}.json")
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(dict(script="trudi_mjx", env_id=env_id, exp_name=exp_name, seed=seed, num_seeds=1, step=step,
                                    evaluation=evaluation, results={"eval/episodic_return": [value]})))
