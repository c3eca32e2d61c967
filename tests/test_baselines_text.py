"""benchmark/baselines: what they share with their siblings, the scripts of TruDi that they are made of, is the same text. So
what tests find of the siblings need not be tested of each."""

import ast
import dataclasses
import importlib

import pytest
from form import definitions
from runner import BASELINES, ROOT

import trudi_humanoidbench
import trudi_mjx


def script_of(name):
    return importlib.import_module(f"benchmark.baselines.{name}")


def actors(*paths):
    """The code of their actors, without docstrings, which say what a replacement must keep: less than TruDi's, as nothing is
    computed on stored chains."""
    trees = [ast.parse(path.read_text()).body for path in paths]
    found = [next(node for node in nodes if getattr(node, "name", None) == "Actor") for nodes in trees]
    return [ast.unparse(actor.body[1:]) for actor in found]


# ---------------------------------------------------------------------------------------------------------- Playground
# The functions, classes and constants that a baseline has in common with trudi_mjx.py by name, but not by text.
OWN = {
    "reppo_mjx": "PAPER CPU CPU_HUMANOID Args MAY_CHANGE POSITIVE check_numbers Actor Critic Batch critic_loss actor_loss "
                 "update_minibatch update_epochs Transition sample_policy rollout critic_targets update evaluation_action "
                 "check_contract",
    "dime_mjx": "CPU_HUMANOID INITIAL_DUAL Args POSITIVE Actor Learner Batch actor_loss dual_loss update_minibatch "
                "update_epochs Transition init_state rollout update train"}
VALUE_BASED = (
    "SUITE PAPER CPU CPU_HUMANOID Args MAY_CHANGE POSITIVE check_numbers Actor Critic Learner Batch Optimizers make_optimizers "
    "critic_loss actor_loss update_minibatch update_epochs Transition init_state sample_policy rollout update "
    "evaluation_action")
OWN |= dict.fromkeys(("ppo_mjx", "spo_mjx"), VALUE_BASED + " train")
OWN |= {"dppo_mjx": VALUE_BASED + " SCHEDULE_SHIFT Trajectory Chain sample_chain TrainState iterate check_contract",
        "fpo_mjx": VALUE_BASED + " TIME_FEATURES init_statistics iterate train"}
NO_EXPORT = " MAY_CHANGE COMMAND_LINE_ONLY check_args main"  # which trudi_mjx.py alone does
OWN = {name: words + NO_EXPORT for name, words in OWN.items()}
NAMES = sorted(OWN)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_its_own_is_trudis(name):
    """And what is said to be its own differs, so that the list above says how a baseline differs from trudi_mjx.py."""
    trudi, own = (definitions(path) for path in (ROOT / "trudi_mjx.py", BASELINES / f"{name}.py"))
    shared = [x for x in own if x in trudi]
    assert {x for x in shared if own[x] != trudi[x]} == set(OWN[name].split())
    assert shared == [x for x in trudi if x in own]
    assert len(shared) > 60


# What spo_mjx.py, dppo_mjx.py and fpo_mjx.py have in common with ppo_mjx.py by name, but not by text.
OWN_AMONG_VALUE_BASED = {
    "spo_mjx": "Args POSITIVE Learner actor_loss init_state make_optimizers update update_minibatch",
    "dppo_mjx": "PAPER CPU Args POSITIVE check_numbers Actor Critic Learner Batch make_optimizers actor_loss update_minibatch "
                "Transition TrainState init_state sample_policy rollout update iterate evaluation_action train",
    "fpo_mjx": "PAPER CPU Args POSITIVE check_numbers init_statistics Actor Critic Learner Batch make_optimizers Sample "
               "actor_loss update_minibatch Transition init_state sample_policy rollout update iterate evaluation_action"}


@pytest.mark.parametrize("name", OWN_AMONG_VALUE_BASED)
def test_what_is_not_its_own_is_ppos(name):
    """Advantages, epochs and the loss of V among them, of which other tests look at PPO's."""
    ppo, own = (definitions(BASELINES / f"{x}.py") for x in ("ppo_mjx", name))
    shared = own.keys() & ppo.keys()
    assert {x for x in shared if own[x] != ppo[x]} == set(OWN_AMONG_VALUE_BASED[name].split())
    assert {"advantages", "critic_loss", "update_epochs"} <= shared


def test_dimes_actor_is_trudis_but_for_its_docstring():
    one, other = actors(ROOT / "trudi_mjx.py", BASELINES / "dime_mjx.py")
    assert one == other


@pytest.mark.parametrize("name", NAMES)
def test_header_and_length(name):
    path = BASELINES / f"{name}.py"
    lines, trudi = path.read_text().splitlines(), (ROOT / "trudi_mjx.py").read_text().splitlines()
    assert len(lines) < len(trudi)
    trudi = [line for line in trudi if "jax2onnx" not in line]  # baselines export nothing
    header = trudi.index("# ///") + 1
    assert lines[:header] == trudi[:header]  # what it requires
    assert f"python benchmark/baselines/{name}.py" in script_of(name).__doc__
    assert "arXiv" in script_of(name).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_common_flags_are_trudis(name):
    """The same names, types, defaults and order; but each has its own exp_name and ways to evaluate."""
    script = script_of(name)
    own, trudi = ({field.name: field for field in dataclasses.fields(x.Args)} for x in (script, trudi_mjx))
    assert list(own)[:6] == list(trudi)[:6]
    names = list(trudi)
    assert list(own)[list(own).index("device"):] == [x for x in names[names.index("device"):] if x in own]
    for x in (own.keys() & trudi.keys()) - {"exp_name", "eval_mode", "target_entropy_scale", "max_grad_norm"}:
        assert (own[x].type, own[x].default) == (trudi[x].type, trudi[x].default), x
    assert own["exp_name"].default == script.SCRIPT == name


# ------------------------------------------------------------------------------------------------ HumanoidBench, Gymnasium
# What a baseline has in common with trudi_humanoidbench.py by name, but not by text.
OWN_IN_GYMNASIUM = {
    "reppo": "PAPER COMMAND_LINE_ONLY MAY_CHANGE Args POSITIVE check_args check_numbers Actor Critic Batch critic_loss "
             "actor_loss update_minibatch update_epochs Transition sample_policy collect make_transition critic_targets update "
             "evaluation_action Compiled make_programs check_contract run",
    "dime": "COMMAND_LINE_ONLY MAY_CHANGE Args POSITIVE INITIAL_DUAL check_args Actor Learner Batch actor_loss dual_loss "
            "update_minibatch update_epochs Transition new_state collect make_transition update run_training run"}
# Besides the arguments and the main loop, in which trudi_mjx.py and trudi_humanoidbench.py differ, too.
ALGORITHM = {"reppo": "Actor Critic Batch critic_loss actor_loss update_minibatch update_epochs Transition sample_policy "
                      "critic_targets update evaluation_action Sample sample_gaussian gaussian_kl check_contract check_numbers",
             "dime": "INITIAL_DUAL Actor Learner Batch actor_loss dual_loss update_minibatch update_epochs Transition update"}
ALGORITHMS = pytest.mark.parametrize("algorithm", OWN_IN_GYMNASIUM)


def three_texts(algorithm):
    """Definitions of the baseline, of its sibling and of the baseline for Playground."""
    paths = (BASELINES / f"{algorithm}_humanoidbench.py", ROOT / "trudi_humanoidbench.py", BASELINES / f"{algorithm}_mjx.py")
    return [definitions(path) for path in paths]


@ALGORITHMS
def test_in_gymnasium_what_is_not_its_own_is_its_siblings(algorithm):
    """And what is said to be its own differs, so that the list above says how a baseline differs from its sibling."""
    own, sibling, _ = three_texts(algorithm)
    shared = [name for name in own if name in sibling]
    assert {name for name in shared if own[name] != sibling[name]} == set(OWN_IN_GYMNASIUM[algorithm].split())
    assert shared == [name for name in sibling if name in own]
    assert len(shared) > 90


@ALGORITHMS
def test_its_algorithm_is_that_of_playground(algorithm):
    own, sibling, playground = three_texts(algorithm)
    names = ALGORITHM[algorithm].split()
    assert all(own[name] == playground[name] for name in names)
    # All that is the baseline's own there, and nothing that is here as the sibling has it.
    known = set(OWN[f"{algorithm}_mjx"].split()) & sibling.keys()
    loop = {"PAPER", "CPU", "Args", "POSITIVE", "MAY_CHANGE", "COMMAND_LINE_ONLY", "check_args", "main"}
    assert known - loop <= set(names)


@ALGORITHMS
def test_in_gymnasium_header_length_and_flags(algorithm):
    """What it requires, and the names, types, defaults and order of flags, are its sibling's."""
    path, script = BASELINES / f"{algorithm}_humanoidbench.py", script_of(f"{algorithm}_humanoidbench")
    lines, sibling = (x.read_text().splitlines() for x in (path, ROOT / "trudi_humanoidbench.py"))
    assert len(lines) < len(sibling)
    sibling = [line for line in sibling if "jax2onnx" not in line]  # baselines export nothing
    header = sibling.index("# ///") + 1
    assert lines[:header] == sibling[:header]
    assert f"python benchmark/baselines/{path.name}" in script.__doc__ and "arXiv" in script.__doc__
    own, other = ({field.name: field for field in dataclasses.fields(x.Args)} for x in (script, trudi_humanoidbench))
    assert [name for name in own if name in other] == [name for name in other if name in own]
    for name in (own.keys() & other.keys()) - {"exp_name", "eval_mode", "target_entropy_scale"}:
        assert (own[name].type, own[name].default) == (other[name].type, other[name].default), name
    gone = {"reppo": {"num_diffusion_steps", "prior_std", "learn_friction", "ode_score_scale"}, "dime": {"trust_region_bound"}}
    assert other.keys() - own.keys() == gone[algorithm] | {"export"}
    assert own["exp_name"].default == script.SCRIPT == f"{algorithm}_humanoidbench"
    assert {*script.MAY_CHANGE, *script.POSITIVE, *script.PAPER, *script.CPU} <= own.keys()


# --------------------------------------------------------------------------------------------------- ManiSkill, Isaac Lab
# The functions, classes and constants that a baseline has in common with its sibling by name, but not by text; besides those
# of the export, which baselines lack.
EXPORT = {"maniskill": "COMMAND_LINE_ONLY check_args main", "isaaclab": "COMMAND_LINE_ONLY check_args run"}
OWN_IN_PYTORCH = {
    "reppo": "PAPER Args MAY_CHANGE POSITIVE check_numbers Actor Critic UPDATE_METRICS Learner Batch init_learner critic_loss "
             "actor_loss update_minibatch take_rows Programs update_epochs Transition empty_rollout sample_policy rollout "
             "critic_targets update iterate evaluation_action warm_up check_contract",
    "dime": "INITIAL_DUAL Args MAY_CHANGE POSITIVE Actor UPDATE_METRICS Learner Batch init_learner actor_loss dual_loss "
            "update_minibatch take_rows Transition empty_rollout rollout update warm_up train",
    "ppo": "PAPER CPU Args MAY_CHANGE POSITIVE check_numbers Actor Critic UPDATE_METRICS Learner Batch init_learner "
           "critic_loss actor_loss update_minibatch take_rows Programs update_epochs Transition empty_rollout sample_policy "
           "rollout update iterate evaluation_action SAVED fill_state changing_tensors warm_up train"}
PPO_ON_ISAAC_LAB = "ACTION_LIMIT resolve"  # RSL-RL's actions are not clipped there, and some settings are a task's
SIMULATORS = ("maniskill", "isaaclab")
PAIRS = [(algorithm, simulator) for algorithm in OWN_IN_PYTORCH for simulator in SIMULATORS]


def texts(algorithm, simulator):
    return definitions(BASELINES / f"{algorithm}_{simulator}.py"), definitions(ROOT / f"trudi_{simulator}.py")


@pytest.mark.parametrize(("algorithm", "simulator"), PAIRS)
def test_in_pytorch_what_is_not_its_own_is_its_siblings(algorithm, simulator):
    """And what is said to be its own differs, so that the lists above say how a baseline differs from its sibling."""
    own, sibling = texts(algorithm, simulator)
    shared = [name for name in own if name in sibling]
    expected = f"{OWN_IN_PYTORCH[algorithm]} {EXPORT[simulator]}"
    if (algorithm, simulator) == ("ppo", "isaaclab"):
        expected = f"{expected} {PPO_ON_ISAAC_LAB}"
    assert {name for name in shared if own[name] != sibling[name]} == set(expected.split())
    assert shared == [name for name in sibling if name in own]
    assert len(shared) > 90


@pytest.mark.parametrize("algorithm", OWN_IN_PYTORCH)
def test_on_both_simulators_it_is_the_same_text(algorithm):
    """What differs is what differs between the siblings."""
    one, other = (texts(algorithm, simulator)[0] for simulator in SIMULATORS)
    named = {name for name in one.keys() & other.keys() if one[name].startswith(("def", "class", "@"))}
    assert {name for name in named if one[name] != other[name]} == {"Args", "resolve", "main"}
    constants = {name for name in one.keys() & other.keys() - named if one[name] != other[name]}
    siblings = [texts(algorithm, simulator)[1] for simulator in SIMULATORS]
    known = {name for name in constants if siblings[0].get(name) != siblings[1].get(name)}
    assert constants - known == ({"ACTION_LIMIT"} if algorithm == "ppo" else set())


@pytest.mark.parametrize("simulator", SIMULATORS)
def test_in_pytorch_dimes_actor_is_trudis_but_for_its_docstring(simulator):
    one, other = actors(ROOT / f"trudi_{simulator}.py", BASELINES / f"dime_{simulator}.py")
    assert one == other


@pytest.mark.parametrize(("algorithm", "simulator"), PAIRS)
def test_in_pytorch_header_and_length(algorithm, simulator):
    path = BASELINES / f"{algorithm}_{simulator}.py"
    lines, sibling = (x.read_text().splitlines() for x in (path, ROOT / f"trudi_{simulator}.py"))
    assert len(lines) < len(sibling)
    sibling = [line for line in sibling if "onnxscript" not in line]  # baselines export nothing
    header = sibling.index("# ///") + 1
    assert lines[:header] == sibling[:header]  # what it requires
    doc = script_of(f"{algorithm}_{simulator}").__doc__
    assert f"python benchmark/baselines/{path.name}" in doc
    assert f"made from trudi_{simulator}.py" in doc and "arXiv" in doc


@pytest.mark.parametrize(("algorithm", "simulator"), PAIRS)
def test_in_pytorch_common_flags_are_its_siblings(algorithm, simulator):
    """The same names, types, defaults and order; but each has its own exp_name and ways to evaluate."""
    script, sibling = script_of(f"{algorithm}_{simulator}"), importlib.import_module(f"trudi_{simulator}")
    own, other = ({field.name: field for field in dataclasses.fields(x.Args)} for x in (script, sibling))
    assert list(own)[:6] == list(other)[:6]
    names = list(other)
    assert list(own)[list(own).index("device"):] == [x for x in names[names.index("device"):] if x in own]
    for x in (own.keys() & other.keys()) - {"exp_name", "eval_mode", "target_entropy_scale", "max_grad_norm"}:
        assert (own[x].type, own[x].default) == (other[x].type, other[x].default), x
    assert own["exp_name"].default == script.SCRIPT == f"{algorithm}_{simulator}"
    assert {*script.MAY_CHANGE, *script.POSITIVE, *script.SPLIT, *script.PAPER, *script.CPU} <= own.keys()
    gone = {"export"} | {"reppo": {"num_diffusion_steps", "prior_std", "learn_friction", "ode_score_scale"},
                         "dime": {"trust_region_bound"}}.get(algorithm, set())
    if algorithm != "ppo":
        assert other.keys() - own.keys() == gone


# ------------------------------------------------------------------------------------------------------------------ all
def test_every_baseline_is_tested():
    known = {*NAMES, *(f"{x}_humanoidbench" for x in OWN_IN_GYMNASIUM), *(f"{x}_{simulator}" for x, simulator in PAIRS)}
    assert {path.stem for path in BASELINES.glob("*.py")} == known
