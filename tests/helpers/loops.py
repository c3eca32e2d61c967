"""The corridor in every script, behind one interface: iterate, sample, value, evaluate."""

import dataclasses
import functools
import importlib
import math
import pathlib

import corridor
import jax
import jax.numpy as jnp
import numpy as np
import optax

ALPHA = 0.3  # of loops whose policy is frozen
ITERATIONS = 120  # of loops whose policy is frozen
SIZES = dict(preset="cpu", device="cpu", num_envs=64, num_steps=8, num_epochs=2, minibatch_size=128, hidden_dim=32,
             num_diffusion_steps=3, num_eval_envs=1024, total_timesteps=10**6, gamma=0.8, v_min=-10.0, v_max=10.0,
             actor_learning_rate=3e-3, critic_learning_rate=3e-3, learning_rate=3e-3)


def lively(tree, seed):
    """A network whose weights are all a little different, so that its output is not 0."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.PRNGKey(seed), len(leaves))
    moved = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


class Modes:
    """How evaluations act."""

    def in_mode(self, mode):
        return self.setup._replace(args=dataclasses.replace(self.setup.args, eval_mode=mode))

    @property
    def modes(self):
        return self.script.Args.__annotations__["eval_mode"].__args__


class Mjx(Modes):
    """A script with Playground's interface. With `frozen` (pytest's monkeypatch) only the critic learns."""

    ends = True  # leaving ends an episode
    env_id = "CartpoleBalance"  # whose place the corridor takes

    def __init__(self, module="trudi_mjx", frozen=None, **changes):
        self.script = importlib.import_module(module)
        if frozen:
            frozen.setattr(self.script, "make_optimizers", self.optimizers)
        fields = self.script.Args.__annotations__
        given = SIZES | {"env_id": self.env_id} | changes
        given = {name: value for name, value in given.items() if name in fields}
        args = self.script.resolve(self.script.Args(**given))
        self.script.check_args(args)
        mesh = jax.sharding.Mesh(jax.devices()[:1], ("env",))
        self.setup = self.script.Setup(args, self.task(), 1, corridor.TIME_LIMIT, mesh)
        self.state = self.start()
        if frozen:
            self.freeze()
        self.state = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), self.state)  # no weak types

    def task(self):
        return corridor.Playground()

    def start(self):
        return jax.jit(functools.partial(self.script.init_state, self.setup))(jax.random.PRNGKey(1))

    def optimizers(self, args):
        steps = ITERATIONS * args.num_epochs * args.batch_size // args.minibatch_size
        scale = 1 / self.script.LEARNING_RATES[1] if hasattr(self.script, "LEARNING_RATES") else 1  # multiplied by it later
        settling = optax.adam(optax.cosine_decay_schedule(5e-3 * scale, steps))
        made = {"actor": optax.set_to_zero(), "critic": settling, "duals": optax.set_to_zero()}
        fields = self.script.Optimizers._fields
        return self.script.Optimizers(*[made[name] for name in fields])

    def freeze(self):
        """A policy that is not the initial one, noticeable alpha, and statistics that hardly move any more."""
        learner = self.state.learner
        learner = learner._replace(actor=lively(learner.actor, 3))
        if hasattr(learner, "duals"):
            learner = learner._replace(duals=learner.duals | {"log_alpha": jnp.log(ALPHA)})
        statistics = self.script.Statistics(jnp.float32(1e7), jnp.asarray(corridor.MOMENTS))
        self.state = self.state._replace(learner=learner, statistics=statistics, iteration=jnp.ones((), int))

    @functools.cached_property
    def iterations(self):
        def iterations(state, count):
            return jax.lax.fori_loop(0, count, lambda _, state: self.script.iterate(self.setup, state)[0], state)

        return jax.jit(iterations)

    def advance(self, count):
        """So many iterations."""
        self.state = self.iterations(self.state, count)

    def seen(self, count):
        """What the networks see at every place, so often (PLACES * count, .)."""
        observed = jnp.repeat(jnp.asarray(corridor.OBSERVED), count, 0)
        return self.script.normalize(self.state.statistics, observed)

    def sample(self, count):
        """Actions (PLACES, count) of the policy as it trains, and what its entropy is worth."""
        sample_policy = jax.jit(functools.partial(self.script.sample_policy, self.setup))
        sample = sample_policy(self.state.learner.actor, self.seen(count), jax.random.PRNGKey(5))
        entropy = getattr(sample, "entropy_bound", getattr(sample, "entropy", 0.0))
        alpha = np.exp(self.state.learner.duals["log_alpha"]) if hasattr(self.state.learner, "duals") else 0.0
        action = jnp.tanh(sample.latent) if hasattr(sample, "latent") else sample.action
        action = np.clip(action, -0.999, 0.999).reshape(corridor.PLACES, count)
        return action, np.broadcast_to(alpha * entropy, action.size).reshape(action.shape)

    def value(self, action):
        """The critic's Q of actions (PLACES, M), or V if it has no Q."""
        seen = self.seen(action.shape[1])
        critic = self.state.learner.critic
        if hasattr(self.script, "q_value"):
            found = self.script.q_value(self.setup.args, critic(seen, jnp.asarray(action).reshape(-1, 1)))
        else:
            found = critic(seen)
        return np.asarray(found).reshape(action.shape)

    def evaluation_sample(self, mode, count):
        """Actions (PLACES, count) of an evaluation."""
        seen = self.seen(count)
        inputs = self.script.Inputs(seen, seen)
        act = jax.jit(functools.partial(self.script.evaluation_action, self.in_mode(mode)))
        action = act(self.state.learner, inputs, jax.random.PRNGKey(6))
        return np.clip(action, -0.999, 0.999).reshape(corridor.PLACES, count)

    def play(self, mode):
        """The mean return of an evaluation."""
        evaluate = jax.vmap(functools.partial(self.script.evaluate, self.in_mode(mode)), axis_name="seed")
        metrics, _ = jax.jit(evaluate)(jax.tree.map(lambda x: x[None], self.state))
        return float(metrics["eval/episodic_return"][0])


class HumanoidBench(Mjx):
    """trudi_humanoidbench.py, with its environments in this process."""

    env_id = "corridor:Corridor-v0"

    def task(self):
        one = np.ones(1, np.float32)
        return self.script.Task(corridor.PLACES, None, 30, -one, one)

    def start(self):
        self.envs = self.simulators(self.setup.args.num_envs)
        self.envs.reset(1, 0, 0, spread=True)
        self.programs = self.script.make_programs(self.setup)
        return self.script.make_state(self.setup, {})

    def simulators(self, num_envs):
        script = self.script
        slots = np.zeros(num_envs, script.slot_type(self.setup))
        envs = [script.EnvSlot(script.make_env("corridor:Corridor-v0"), slots[i]) for i in range(num_envs)]
        here = object.__new__(script.Simulators)
        here.slots = slots
        here.frame = None
        here.request = lambda reset: (script.reset_slots if reset else script.step_slots)(envs)
        return here

    def advance(self, count):
        for _ in range(count):
            data, _ = self.script.collect(self.setup, self.programs.sample, self.envs, self.state)
            self.state, _ = self.programs.update(self.state, data)

    def play(self, mode):
        setup = self.in_mode(mode)
        choose = self.script.make_programs(setup).choose
        envs = self.simulators(setup.args.num_eval_envs)
        return self.script.play(setup, choose, envs, self.state, pathlib.Path())["eval/episodic_return"]


class IsaacLab(Modes):
    """trudi_isaaclab.py."""

    ends = True
    env_id = "Mjlab-Cartpole-Balance"

    def __init__(self, module="trudi_isaaclab", frozen=None, **changes):
        self.torch = importlib.import_module("torch")
        self.script = importlib.import_module(module)
        fields = self.script.Args.__annotations__
        given = SIZES | {"env_id": self.env_id} | changes
        given = {name: value for name, value in given.items() if name in fields}
        args = self.script.resolve(self.script.Args(**given))
        self.script.check_args(args)
        self.torch.manual_seed(0)
        self.setup = self.make_setup(args)
        self.state, self.programs = self.script.prepare(self.setup, {})
        self.frozen = frozen is not None
        if self.frozen:
            self.freeze()

    def make_setup(self, args):
        env = self.script.IsaacLab(args, corridor.IsaacLab(args.num_envs))
        env.reset(spread=True)
        return self.script.setup_for(args, self.torch.device("cpu"), env)

    def freeze(self):
        """As in Mjx."""
        learner = self.state.learner
        with self.torch.no_grad():
            for parameter in learner.actor.parameters():
                parameter += 0.05 * self.torch.randn(parameter.shape)
            learner.log_duals[0].fill_(math.log(ALPHA))
        for optimizer in (learner.actor_optimizer, learner.dual_optimizer):
            optimizer.param_groups[0]["lr"] = 0.0
        moments = [self.torch.asarray(x) for x in corridor.MOMENTS]
        statistics = self.script.Statistics(10**7, *moments)
        self.state = self.state._replace(statistics=statistics, iteration=1)

    def advance(self, count):
        for iteration in range(count):
            if self.frozen:
                settling = 5e-3 * (1 + math.cos(math.pi * iteration / count)) / 2
                self.state.learner.critic_optimizer.param_groups[0]["lr"] = settling
            self.state, _ = self.script.iterate(self.setup, self.programs, self.state)

    def seen(self, count):
        observed = self.torch.asarray(corridor.OBSERVED).repeat_interleave(count, 0)
        return self.script.normalize(self.state.statistics, observed)

    def sample(self, count):
        self.torch.manual_seed(5)
        learner = self.state.learner
        with self.torch.no_grad():
            chain = self.script.sample_policy(self.setup.args, learner.actor, self.seen(count))
            bonus = learner.log_duals[0].exp() * chain.entropy_bound
        action = chain.action.clamp(-0.999, 0.999)
        return [x.reshape(corridor.PLACES, count).numpy() for x in (action, bonus)]

    def value(self, action):
        actions = self.torch.asarray(action, dtype=self.torch.float32).reshape(-1, 1)
        with self.torch.no_grad():
            logits = self.state.learner.critic(self.seen(action.shape[1]), actions)
            return self.script.q_value(self.setup.args, logits).reshape(action.shape).numpy()

    def evaluation_sample(self, mode, count):
        self.torch.manual_seed(6)
        with self.torch.no_grad():
            action = self.script.evaluation_action(self.in_mode(mode), self.state.learner, self.seen(count))
        return action.clamp(-0.999, 0.999).reshape(corridor.PLACES, count).numpy()

    def play(self, mode):
        setup = self.in_mode(mode)
        returns = []
        for iteration in range(1024 // self.setup.args.num_envs):
            state = self.state._replace(iteration=iteration)
            returns.append(self.script.evaluate(setup, state, pathlib.Path())["eval/episodic_return"])
        return float(np.mean(returns))


class ManiSkill(IsaacLab):
    """trudi_maniskill.py, to which leaving is a success, no termination."""

    ends = False
    env_id = "PushCube-v1"

    def make_setup(self, args):
        scene, eval_scene = (corridor.ManiSkill(n, evaluation) for n, evaluation in
                             ((args.num_envs, False), (args.num_eval_envs, True)))
        env = self.script.ManiSkill(args, [scene], corridor.TIME_LIMIT, evaluation=False)
        eval_env = self.script.ManiSkill(args, [eval_scene], corridor.TIME_LIMIT, evaluation=True)
        env.start(0)
        sees = corridor.PLACES
        return self.script.Setup(args, self.torch.device("cpu"), env, eval_env, sees, sees, sees, action_size=1)
