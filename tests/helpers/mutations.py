"""Faults that tests must catch: each is put into a copy of a script, and the tests that should fail are run.

    python tests/helpers/mutations.py                       # all; about a minute each
    python tests/helpers/mutations.py --only humanoidbench  # those whose script or name has this in it

Prints a table and ends with code 1 if a fault survives. tests/test_mutations.py holds that each can still be put in.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

import tyro

ROOT = pathlib.Path(__file__).resolve().parents[2]
PARTS = ("*.py", "pyproject.toml", "tests", "benchmark/*.py", "benchmark/baselines")  # what tests of a copy need


class Mutation(NamedTuple):
    """A fault in a script: text that stands in it once, and what takes its place."""

    script: str
    fault: str
    old: str
    new: str
    tests: str  # of tests/, and as pytest's -k has it which of them


# Where scripts have the same text, which test_form.py holds, the fault is put into one of them.
SHARED = [  # with trudi_humanoidbench.py
    ("the same minibatch always", "learner, (order, noise_keys))", "learner, (order[:1] + 0 * order, noise_keys))",
     "test_loop.py::every_epoch"),
    ("the same permutation every epoch", "order_keys = jax.random.split(order_key, args.num_epochs)",
     "order_keys = jnp.stack([order_key] * args.num_epochs)", "test_loop.py::every_epoch"),
    ("one noise for all minibatches", "noise_keys = jax.random.split(noise_key, len(order))",
     "noise_keys = jnp.stack([noise_key] * len(order))", "test_loop.py::every_epoch"),
    ("metrics of the first epoch", "x[-minibatches_per_epoch:]", "x[:minibatches_per_epoch]", "test_loop.py::every_epoch"),
    ("the old actor moves along", "return update_minibatch(setup, learner, old_actor, batch, key)",
     "return update_minibatch(setup, learner, learner.actor, batch, key)", "test_loop.py::every_epoch"),
    ("V at s in place of s'", "value, bonus = jax.lax.map(next_value, (next_inputs, keys))",
     "value, bonus = jax.lax.map(next_value, (jax.tree.map(lambda x: jnp.roll(x, 1, 0), next_inputs), keys))",
     "test_loop.py::dynamic"),
    ("the bonus's sign", "return value, alpha * chain.entropy_bound", "return value, -alpha * chain.entropy_bound",
     "test_loop.py::dynamic"),
    ("log alpha in place of alpha", 'alpha = jnp.exp(learner.duals["log_alpha"])', 'alpha = learner.duals["log_alpha"]',
     "test_loop.py::dynamic"),
    ("one key for all t in the targets", "keys = jax.random.split(key, setup.args.num_steps)\n",
     "keys = jnp.stack([key] * setup.args.num_steps)\n", "test_loop.py::every_step"),
    ("the action of V' is 0", "learner.critic(inputs.critic, chain.action))\n        return",
     "learner.critic(inputs.critic, 0 * chain.action))\n        return", "test_loop.py::dynamic"),
    ("fresh KL from the new actor's chains", "fresh = sample_policy(setup, old.actor,",
     "fresh = sample_policy(setup, learner.actor,", "test_loop.py::logged_kl"),
    ("KL the other way round", "fresh_kl = trajectory_kl(learner.actor, old.actor,",
     "fresh_kl = trajectory_kl(old.actor, learner.actor,", "test_loop.py::logged_kl"),
    ("stored KL of other states", "stored_kl = trajectory_kl(learner.actor, old.actor, observation, some",
     "stored_kl = trajectory_kl(learner.actor, old.actor, observation[::-1], some", "test_loop.py::logged_kl"),
    ("time-outs end", "bootstrap, value, mixture)", "bootstrap, 0 * value, mixture)", "test_loop.py::dynamic"),
    ("terminations bootstrap", "jnp.where(terminated, 0.0, bonus + mixture)", "bonus + mixture", "test_loop.py::dynamic"),
    ("the mode is ignored", 'if args.eval_mode == "ode":\n        noise', "if True:\n        noise",
     "test_loop.py::evaluation_plays"),
    ("the worst of K", "best = q.argmax(0)", "best = q.argmin(0)", "test_loop.py::evaluation_plays"),
    ("targets are clipped at both ends or not at all", "(target < args.v_min) | (target", "(target < args.v_min) & (target",
     "test_episodes.py::what_is_logged"),
]
MJX = [
    ("evaluation on raw observations", "inputs = network_inputs(normalize(state.statistics, now.sim.obs))",
     "inputs = network_inputs(now.sim.obs)", "test_loop.py::observe_as"),
    ("rollout noise constant over T", "jax.random.split(step_key, setup.args.num_steps)",
     "jnp.stack([step_key] * setup.args.num_steps)", "test_loop.py::every_step"),
    ("next observations for observations", "next_inputs = network_inputs(normalize(statistics, data.next_observation))",
     "next_inputs = inputs", "test_loop.py::dynamic"),
    ("rewards go on after the end", "total=now.total + jnp.where(now.alive, sim.reward, 0)", "total=now.total + sim.reward",
     "test_loop.py::evaluation_plays"),
    ("episodes that ended go on", "mask = done.reshape(-1,", "mask = (done & False).reshape(-1,", "test_episodes.py::restart"),
    ("no new starts", "return refill_starts(setup, env_state, ended.any(0), reset_key), data", "return env_state, data",
     "test_episodes.py::fresh_states"),
    ("statistics take effect at once", "jnp.where(first, new, now), merged", "new, merged", "test_losses.py::move"),
    ("lambda is alpha", '"trust_region/lambda": jnp.exp(learner.duals["log_lambda"])',
     '"trust_region/lambda": jnp.exp(learner.duals["log_alpha"])', "test_episodes.py::what_is_logged"),
    ("returns of all environments", "data.episode_return.mean(where=ended)", "data.episode_return.mean()",
     "test_episodes.py::what_is_logged"),
    ("the actor's observation for the critic", "q_value(args, learner.critic(inputs.critic, action))",
     "q_value(args, learner.critic(inputs.actor, action))", "test_episodes.py::different_things"),
    ("run k has seed + 7 k", "jax.random.PRNGKey(args.seed + k)", "jax.random.PRNGKey(args.seed + 7 * k)",
     "test_mjx_tasks.py::run_k"),
    ("one iteration's contract is checked", "if done < 3:", "if done < 2:", "test_divergence.py::training_checks"),
    ("time starts anew", '- float(saved.get("wall_time", 0.0))', "- 0.0", "test_divergence.py::training_checks"),
    ("the last seed is exported", "jax.tree.map(lambda x: x[0], (state.learner", "jax.tree.map(lambda x: x[-1], (state.learner",
     "test_export.py::jax and mjx"),
    ("the critic's observations are exported", "network_inputs(statistics.moments).actor",
     "network_inputs(statistics.moments).critic", "test_export.py::jax and mjx"),
]
GYM = [
    ("evaluation on raw observations", "inputs = same_inputs(normalize(statistics, observation))\n        return",
     "inputs = same_inputs(observation)\n        return", "test_loop.py::observe_as"),
    ("rollout noise constant over T", "np.asarray(jax.random.split(rollout_key, setup.args.num_steps))",
     "[np.asarray(rollout_key)] * setup.args.num_steps", "test_loop.py::every_step"),
    ("next observations for observations", "next_inputs = same_inputs(normalize(statistics, data.next_observation))",
     "next_inputs = inputs", "test_loop.py::dynamic"),
    ("the next episode's observation for the true one", 'next_observation=slots["next_observation"]',
     'next_observation=slots["observation"]', "test_loop.py::dynamic"),
    ("statistics take effect at once", "jnp.where(first, new, now), merged", "new, merged", "test_humanoidbench.py::breaks"),
    ("statistics stop", "return TrainState(learner, merged,", "return TrainState(learner, statistics,",
     "test_humanoidbench.py::breaks"),
    ("evaluation noise constant over T", "np.asarray(jax.random.split(action_key, setup.time_limit))",
     "[np.asarray(action_key)] * setup.time_limit", "test_humanoidbench.py::evaluation"),
    ("one iteration's contract is checked", "if done < 3:", "if done < 2:", "test_humanoidbench.py::training_checks"),
]
TORCH = [  # with trudi_isaaclab.py
    ("the same minibatch always", "for rows in minibatches:", "for rows in minibatches[:1] * len(minibatches):",
     "test_loop.py::pytorchs_epochs"),
    ("the same permutation every epoch",
     "torch.cat([torch.randperm(size, device=setup.device) for _ in range(args.num_epochs)])",
     "torch.cat([torch.randperm(size, device=setup.device)] * args.num_epochs)", "test_loop.py::pytorchs_epochs"),
    ("no noise in the updates", "noise = torch.randn(shape, device=setup.device)\n        found",
     "noise = torch.zeros(shape, device=setup.device)\n        found", "test_loop.py::pytorchs_epochs"),
    ("metrics of the first epoch", "found[-minibatches_per_epoch:]", "found[:minibatches_per_epoch]",
     "test_loop.py::pytorchs_epochs"),
    ("V at s in place of s'", "update(setup, programs, learner, data, observation, next_observation)",
     "update(setup, programs, learner, data, observation, observation)", "test_loop.py::dynamic"),
    ("the bonus's sign", "bonus[t] = alpha * chain.entropy_bound", "bonus[t] = -alpha * chain.entropy_bound",
     "test_loop.py::dynamic"),
    ("the action of V' is 0", "learner.critic(observation, chain.action))\n        bonus",
     "learner.critic(observation, 0 * chain.action))\n        bonus", "test_loop.py::dynamic"),
    ("one action for all t in the targets", "for t, observation in enumerate(next_observation):\n        chain",
     "for t, observation in enumerate(next_observation):\n        torch.manual_seed(0)\n        chain",
     "test_loop.py::pytorchs_noise"),
    ("rollout noise constant over T", "chain = programs.sample_policy(normalize(statistics, observation))",
     "torch.manual_seed(0)\n        chain = programs.sample_policy(normalize(statistics, observation))",
     "test_loop.py::pytorchs_noise"),
    ("fresh KL from the new actor's chains",
     "fresh = sample_policy(args, old_actor, some.observation)\n    metrics = update_epochs(setup, programs, batch)",
     "metrics = update_epochs(setup, programs, batch)\n    fresh = sample_policy(args, actor, some.observation)",
     "test_loop.py::pytorchs_kl"),
    ("stored KL of other states", "trajectory_kl(actor, old_actor, some.observation, some.trajectory)",
     "trajectory_kl(actor, old_actor, some.observation.flip(0), some.trajectory)", "test_loop.py::pytorchs_kl"),
    ("time-outs end", "(truncated[t], value[t], mixture)", "(truncated[t], 0 * value[t], mixture)", "test_loop.py::dynamic"),
    ("evaluation on raw observations", "evaluation_action(setup, state.learner, normalize(state.statistics, observation))",
     "evaluation_action(setup, state.learner, observation)", "test_loop.py::observe_as"),
    ("the mode is ignored", 'if args.eval_mode == "ode":', "if True:", "test_loop.py::evaluation_plays"),
    ("the worst of K", "best = q.argmax(0)", "best = q.argmin(0)", "test_loop.py::evaluation_plays"),
]
MANISKILL = [
    ("warming up trains", "    for x, value in zip(changed, kept, strict=False):", "    for x, value in ():",
     "test_maniskill.py::warming_up"),
    ("Adam keeps the moments of warming up", "        x.zero_()\n", "        x.mul_(1)\n", "test_maniskill.py::warming_up"),
    ("wall_time includes compiling", "    warm_up(setup, programs, state.learner)\n    folder", "    folder",
     "test_maniskill.py::wall_time"),
    ("statistics take effect at once", "statistics = merged if state.iteration == 0 else state.statistics",
     "statistics = merged", "test_maniskill.py::later_rollouts"),
    ("statistics stop", "return TrainState(learner, merged,", "return TrainState(learner, state.statistics,",
     "test_maniskill.py::later_rollouts"),
    ("two processes simulate the same", "iteration, int(self.evaluation), RANK]", "iteration, int(self.evaluation)]",
     "test_maniskill.py::seeded_apart"),
    ("two processes draw the same", "SeedSequence([args.seed, RANK, *numbers])", "SeedSequence([args.seed, *numbers])",
     "test_maniskill.py::noise_of"),
    ("success at the end for success", "everywhere(last.success_once)", "everywhere(last.success_at_end)",
     "test_maniskill.py::success_once"),
    ("targets are clipped at both ends or not at all", "(target < args.v_min) | (target", "(target < args.v_min) & (target",
     "test_maniskill.py::what_is_logged"),
    ("time starts anew", '- float(saved.get("wall_time", 0.0))', "- 0.0", "test_maniskill.py::time_goes"),
]
ISAACLAB = [
    ("statistics take effect at once", "statistics = merged if state.iteration == 0 else state.statistics",
     "statistics = merged", "test_isaaclab.py::later_rollouts"),
    ("statistics stop", "return TrainState(learner, merged,", "return TrainState(learner, state.statistics,",
     "test_isaaclab.py::later_rollouts"),
]
MUTATIONS = [Mutation(script, *rest) for script, lists in {
    "trudi_mjx": SHARED + MJX, "trudi_humanoidbench": GYM, "trudi_maniskill": TORCH + MANISKILL,
    "trudi_isaaclab": ISAACLAB}.items() for rest in lists]


def copy_project(folder):
    """What tests need, in a folder of its own."""
    for pattern in PARTS:
        for path in ROOT.glob(pattern):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copy)(path, target)


def survives(mutation, folder):
    """Whether the tests pass on the copy in a folder with this fault in it; it is taken out again."""
    path = folder / f"{mutation.script}.py"
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new))
    file, _, words = mutation.tests.partition("::")
    which = f"{words} and {mutation.script}" if file == "test_loop.py" else words
    command = [sys.executable, "-m", "pytest", "-n0", "-x", f"tests/{file}", "-k", which]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    path.write_text(text)
    if done.returncode not in (0, 1):  # 1: a test failed
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.returncode == 0


def main(only: str = ""):
    """Put in each fault whose script or name has `only` in it, and print which of them tests catch."""
    survivors = 0
    print("| script | fault | tests | |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copy_project(pathlib.Path(folder))
        for mutation in MUTATIONS:
            if only not in f"{mutation.script} {mutation.fault}":
                continue
            alive = survives(mutation, pathlib.Path(folder))
            survivors += alive
            row = [mutation.script, mutation.fault, mutation.tests, "SURVIVES" if alive else "caught"]
            print("|", " | ".join(row), "|", flush=True)
    return survivors > 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
