"""--impl mujoco: MuJoCo's own engine in place of MJX, against MJX and against itself."""

import itertools
import json
import signal
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco import mjx
from probes import small_args
from runner import ROOT, Runner, curve

import trudi_mjx as trudi
from benchmark.studies import mujoco_agreement

pytest.importorskip("mjbatch")
E = 8


def made(env_id, impl="mujoco", **changes):
    return trudi.make_setup(small_args(env_id=env_id, impl=impl, **changes))


def played(setup, steps):
    """Observations (T, E, .) and rewards (T, E) of random actions, from given seeds."""
    def step(sim, key):
        sim = trudi.over_envs(setup, setup.env.step, sim, jax.random.uniform(key, (E, setup.action_size), minval=-1))
        return sim, (sim.obs, sim.reward)

    def play(key):
        sim = trudi.over_envs(setup, setup.env.reset, jax.random.split(key, E))
        _, (observation, reward) = jax.lax.scan(step, sim, jax.random.split(key, steps))
        return observation, reward

    return jax.tree.map(np.asarray, jax.jit(play)(jax.random.PRNGKey(3)))


# ---------------------------------------------------------------------------------------------------- agreement
@pytest.mark.parametrize(("env_id", "steps"), [("ReacherEasy", 50), ("CheetahRun", 20)])
def test_it_computes_what_mjx_computes(env_id, steps):
    """CheetahRun has contacts, Reacher a target that only resets place."""
    observation, reward = played(made(env_id), steps)
    observation_mjx, reward_mjx = played(made(env_id, "jax"), steps)
    assert observation.std() > 0.1
    np.testing.assert_allclose(observation, observation_mjx, atol=2e-3)
    np.testing.assert_allclose(reward, reward_mjx, atol=2e-3)


# A hopper folded up: its nose is in its thigh and in its calf, 34 and 24 mm deep by MuJoCo's own measure.
FOLDED = [0.133, -0.77, 2.596, -0.552, -2.426, 2.535, -0.788]


@pytest.mark.parametrize("full", [False, True])
def test_playground_has_mjx_leave_out_contacts(full):
    """Which is why HopperHop differs as it is, and agrees in full: benchmark/results/mujoco_agreement.md."""
    env = mujoco_agreement.make("HopperHop", "jax", full).env
    own = mujoco.MjData(env.mj_model)
    own.qpos[:] = FOLDED
    mujoco.mj_forward(env.mj_model, own)
    assert min(own.contact.dist) == pytest.approx(-0.034, abs=1e-3) and [2, 4] in own.contact.geom.tolist()

    data = mjx.make_data(env.mj_model, impl="jax").replace(qpos=jnp.array(FOLDED))
    data = jax.jit(lambda data: mjx.collision(env.mjx_model, mjx.kinematics(env.mjx_model, data)))(data)
    contact = data._impl.contact
    assert ([2, 4] in contact.geom[contact.dist < 0].tolist()) == full


HEIGHTS = " ".join(f"{x:.2f}" for x in np.random.default_rng(0).uniform(size=64))
ASSETS = {"plane": "", "hfield": f'<hfield name="h" nrow="8" ncol="8" size=".2 .2 .1 .1" elevation="{HEIGHTS}"/>'}
FLOOR = {"plane": 'type="plane" size="9 9 9"', "hfield": 'type="hfield" hfield="h"'}


@pytest.mark.parametrize(
    ("geoms", "other"), [("plane box", True), ("plane capsule", False), ("plane sphere", False), ("hfield sphere", True)]
)
def test_where_mjx_finds_other_contacts(geoms, other):
    """A foot 30 degrees askew, deep in the floor: MuJoCo has all four corners of a box, and prisms of a rough ground that MJX
    leaves out. G1's feet are boxes, T1's spheres."""
    floor, foot = geoms.split()
    model = mujoco.MjModel.from_xml_string(f"""<mujoco><asset>{ASSETS[floor]}</asset>
        <worldbody><geom name="floor" {FLOOR[floor]}/>
        <body pos="0 0 {'-.5' if floor == 'plane' else '.1'}"><freejoint/>
        <geom name="foot" type="{foot}" size=".1 .1 .1" euler="30 0 0"/></body></worldbody>
        <contact><pair geom1="floor" geom2="foot"/></contact></mujoco>""")
    assert mujoco_agreement.other_contacts(model) == other
    own = mujoco.MjData(model)
    mujoco.mj_forward(model, own)
    model_mjx = mjx.put_model(model, impl="jax")
    data = mjx.kinematics(model_mjx, mjx.make_data(model, impl="jax"))
    contact = mjx.collision(model_mjx, data)._impl.contact
    assert ((contact.dist < 0).sum() < own.ncon) == other


def test_results_of_other_tasks_are_kept(tmp_path):
    path = tmp_path / "agreement.json"
    assert mujoco_agreement.kept(path, ("A",)) == []
    path.write_text(json.dumps({"tasks": [{"task": "A"}, {"task": "B"}]}))
    assert mujoco_agreement.kept(path, ("A", "C")) == [{"task": "B"}]


@pytest.mark.parametrize(
    ("as_it_is", "in_full", "mujoco_return", "other_contacts", "verdict"),
    [
        (1e-3, 1e-3, 9.0, False, "as it is"),
        (1e-1, 1e-3, 1.2, False, "in full"),
        (1e-1, 1e-3, 1.5, False, "no"),
        (1e-1, 1e-1, 1.2, False, "no"),
        (1e-1, 1e-1, 1.2, True, "in statistics"),
        (1e-1, 1e-1, 1.5, True, "no"),
    ],
)
def test_verdict(as_it_is, in_full, mujoco_return, other_contacts, verdict):
    """Returns of 1.0 and 1.2 are two standard errors of their difference apart, of 1.0 and 1.5 five."""

    def differences(x):
        names = itertools.product(("one step", "50 steps"), ("obs", "reward"))
        return {f"{name}, {what}": x for name, what in names}

    same = {"length, mujoco": [9.0, 0.1], "length, jax": [9.0, 0.1]}
    result = {"as it is": differences(as_it_is), "in full": differences(in_full), "other contacts": other_contacts}
    result["episodes"] = {"return, mujoco": [mujoco_return, 0.06], "return, jax": [1.0, 0.08], **same}
    assert mujoco_agreement.verdict(result) == verdict


def test_only_its_own_task_is_stepped_by_it():
    """Another task of the same process, made before or after, has MJX, with contacts and constraints."""
    before = made("PendulumSwingup", "jax")
    own = made("PendulumSwingup")
    after = made("PendulumSwingup", "jax")
    for setup, has in ((before, True), (own, False), (after, True)):
        sim = jax.eval_shape(setup.env.reset, jax.random.PRNGKey(0))
        sim = jax.eval_shape(setup.env.step, sim, jnp.ones(1))
        assert (sim.data._impl is not None) == has


# --------------------------------------------------------------------------------------------------- repetition
@pytest.fixture(scope="module")
def cheetah():
    """A setup, its compiled step, and states in the middle of a fall."""
    setup = made("CheetahRun", num_workers=2)
    step = jax.jit(jax.vmap(setup.env.step))
    sim = jax.jit(jax.vmap(setup.env.reset))(jax.random.split(jax.random.PRNGKey(0), E))
    for _ in range(3):
        sim = step(sim, jnp.full((E, setup.action_size), 0.5))
    return setup, step, sim


def assert_same(a, b):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def test_a_step_depends_on_nothing_but_its_state(cheetah):
    """Not on what was simulated before, nor on the number of threads, nor on the neighbours; so resumed runs are exact."""
    setup, step, sim = cheetah
    action = jnp.full((E, setup.action_size), -0.3)
    first = step(sim, action)
    step(first, -action)
    assert_same(step(sim, action), first)
    other = made("CheetahRun", num_workers=1)
    assert_same(jax.jit(jax.vmap(other.env.step))(sim, action), first)
    half = jax.tree.map(lambda x: x[: E // 2], (sim, action))
    assert_same(step(*half), jax.tree.map(lambda x: x[: E // 2], first))
    assert_same(jax.jit(setup.env.step)(*jax.tree.map(lambda x: x[2], (sim, action))), jax.tree.map(lambda x: x[2], first))


def test_the_first_call_of_a_batch_fills_everything(cheetah):
    setup, _, sim = cheetah
    for size in (5, 6):
        some = jax.tree.map(lambda x, size=size: x[:size], sim)
        after = jax.jit(jax.vmap(setup.env.step))(some, jnp.zeros((size, setup.action_size)))
        assert np.abs(after.data.xpos - some.data.xpos).max() < 0.5 and np.abs(after.data.xpos).max() > 0.1


def test_seeds_in_front(cheetah):
    setup, step, sim = cheetah
    action = jnp.full((E, setup.action_size), 0.2)
    two = jax.tree.map(lambda x: x.reshape(2, E // 2, *x.shape[1:]), (sim, action))
    after = jax.jit(jax.vmap(jax.vmap(setup.env.step)))(*two)
    assert_same(jax.tree.map(lambda x: x.reshape(E, *x.shape[2:]), after), step(sim, action))


# ------------------------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize("speed", [1e8, np.nan])
def test_a_simulation_that_diverges_ends_alone(cheetah, speed):
    setup, step, sim = cheetah
    action = jnp.zeros((E, setup.action_size))
    spoilt = sim.replace(data=sim.data.replace(qvel=sim.data.qvel.at[3].set(speed)))
    after = jax.jit(lambda sim: trudi.over_envs(setup, setup.env.step, sim, action))(spoilt)
    assert np.flatnonzero(after.done).tolist() == [3]
    assert after.reward[3] == 0
    np.testing.assert_array_equal(np.delete(after.obs, 3, 0), np.delete(step(sim, action).obs, 3, 0))


def refusal(capsys, call, *inputs, **options):
    with pytest.raises(SystemExit) as stop:
        call(*inputs, **options)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1, line
    return line


def test_a_task_that_reads_contacts_is_refused(capsys):
    made("contact_task:Touching", "jax")
    assert "--impl mujoco cannot simulate contact_task:Touching" in refusal(capsys, made, "contact_task:Touching")
    assert "--impl mujoco cannot simulate own_tasks:Point" in refusal(capsys, made, "own_tasks:Point")


@pytest.mark.parametrize("env_id", ["CartpoleBalance", "G1JoystickRoughTerrain"])
def test_without_mjbatch(env_id, capsys, monkeypatch):
    """The same where it is built for another MuJoCo, since its library is not found then."""
    monkeypatch.setitem(sys.modules, "mjbatch", None)
    line = refusal(capsys, small_args, env_id=env_id, impl="mujoco")
    assert f"pip install {trudi.MJBATCH}" in line and "--impl jax" in line
    assert small_args(env_id=env_id, impl="jax").impl == "jax"


def test_the_advice_is_what_requirements_say():
    text = (ROOT / "requirements.txt").read_text()
    assert trudi.MJBATCH.split()[0] in text.split()


def test_what_does_not_go_with_it(capsys):
    assert "one device" in refusal(capsys, small_args, impl="mujoco", num_devices=2)
    assert "--num-workers must be positive" in refusal(capsys, small_args, impl="mujoco", num_workers=-1)


def test_who_has_it_by_default():
    """Playground's tasks on a CPU; a task of one's own may read what the engine does not return."""
    tasks = {"CartpoleBalance": "mujoco", "T1JoystickFlatTerrain": "mujoco", "own_tasks:Point": "jax"}
    for env_id, impl in tasks.items():
        assert trudi.resolve(trudi.Args(env_id=env_id, device="cpu")).impl == impl
        assert trudi.resolve(trudi.Args(env_id=env_id, device="cpu", impl="warp")).impl == "warp"
    for platform, impl in {"gpu": "warp", "tpu": "jax"}.items():
        assert trudi.find_impl(trudi.Args(), [SimpleNamespace(platform=platform)]) == impl


# --------------------------------------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("mujoco"))


def test_video_and_resume_after_a_kill(runner):
    """A run that was killed goes on as it would have."""
    flags = ["--impl", "mujoco", "--episode-length", "20", "--eval-interval", "40"]
    straight = runner.train_here(*flags)
    folder, code = runner.interrupt(signal.SIGKILL, *flags)
    assert code == -9
    runner.run("--resume", folder, "--num-workers", "1", "--capture-video")
    assert [path.name for path in (folder / "videos").iterdir()] == ["step_5120.mp4"]
    assert curve(folder) == curve(straight)
    assert json.loads((folder / "args.json").read_text())["args"]["impl"] == "mujoco"
