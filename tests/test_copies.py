"""What those meet who copy trudi_mjx.py: names, flags, what can go."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys

import pytest
from copies import load
from runner import ROOT, Runner, call_main, metrics

import trudi_mjx as trudi


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("copies"))


def test_runs_of_a_copy_bear_its_name(tmp_path):
    shutil.copy(ROOT / "trudi_mjx.py", tmp_path / "my_method.py")
    assert load(tmp_path / "my_method.py").Args().exp_name == "my_method"
    assert trudi.Args().exp_name == "trudi_mjx"


@pytest.mark.parametrize("name", ["trudi_mjx", "trudi_humanoidbench", "trudi_maniskill", "trudi_isaaclab"])
def test_the_commit_of_a_copy_says_whether_it_holds_it(name, tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True)

    script = importlib.import_module(name)
    copy = tmp_path / "my_method.py"
    copy.write_text("x = 1")
    monkeypatch.setattr(script, "__file__", str(copy))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert script.git_commit() == ""
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert re.fullmatch("[0-9a-f]{40}-untracked", script.git_commit())
    git("add", copy)
    git("commit", "-m", "second")
    assert re.fullmatch("[0-9a-f]{40}", script.git_commit())
    copy.write_text("x = 2")
    assert re.fullmatch("[0-9a-f]{40}-dirty", script.git_commit())


def test_a_flag_that_a_copy_adds_cannot_change_on_resume(tmp_path, capsys, monkeypatch):
    """Wherever it stands: what may change is a list of names."""
    text = (ROOT / "trudi_mjx.py").read_text()
    marker = "    # Computed\n"
    assert marker in text
    (tmp_path / "flags.py").write_text(text.replace(marker, "    wings: int = 2\n\n" + marker))
    script = load(tmp_path / "flags.py")
    args = dataclasses.asdict(script.resolve(script.Args(preset="cpu")))
    (tmp_path / "args.json").write_text(json.dumps({"args": args, "script": "flags"}))
    monkeypatch.setattr(sys, "argv", ["flags.py", "--resume", str(tmp_path), "--wings", "3"])
    with pytest.raises(SystemExit) as stop:
        script.parse()
    assert stop.value.code == 2 and "--wings cannot change" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["flags.py", "--resume", str(tmp_path), "--eval-interval", "7"])
    assert script.parse().eval_interval == 7


def between(text, start, end):
    """The part of a text from `start` up to `end`."""
    first = text.index(start)
    return text[first : text.index(end, first)]


def without_infrastructure(text):
    """trudi_mjx.py without checks of flags, video, checkpoints, a run's provenance and several hosts; in how many cuts."""
    interval = '    values.setdefault("checkpoint_interval", values["eval_interval"])\n'
    cuts = [
        (between(text, "# " + 81 * "-" + " what a copy", "# " + 88 * "-" + " run folder"), ""),
        (between(text, "    # Checkpoints and video\n", "    # Computed\n"), ""),
        (between(text, "    if args.capture_video:\n        os.environ", "    devices = find_devices"), ""),
        (interval, ""),
        (between(text, "        film = now.film\n", "        return Evaluation("), ""),
        (between(text, "    if setup.args.capture_video:\n        film = jax.tree.map(lambda x", "    start = Eval"), ""),
        (between(text, "    if setup.args.capture_video and", "    return metrics\n\n\ndef check_contract"), ""),
        (between(text, '    path = folder / "args.json"', "    if args.track"), ""),
        (between(text, "    if args.resume:", "def seed_folders"), "    return name_folder(args, make_folder(args))\n\n\n"),
        (between(text, "    if saved:\n", "    options = {"), ""),
        (between(text, "    if setup.args.evaluate:\n", "    learn = over_seeds"), ""),
        (between(text, "        kept = seed_folders", "    return still"), "        print(where, bad, file=sys.stderr)\n"),
        (between(text, "        stop = largest(", "    print(folder)"),
         "        stop = received[0] if received else 0\n"),
        (between(text, "    join_hosts()\n", "    if args.compilation_cache_dir"),
         "    args = resolve(tyro.cli(Args))\n    saved = {}\n"),
        (between(text, "    if args.export:\n        export_first", "    programs = compile"), ""),
        (between(text, "    if args.evaluate:\n", "    sys.exit(train("), ""),
    ]
    for old, new in cuts:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text, len(cuts)


def test_a_copy_without_infrastructure_trains(runner):
    text, cuts = without_infrastructure((ROOT / "trudi_mjx.py").read_text())
    assert cuts <= 16
    for word in "check_numbers ocp. capture_video git_commit multihost_utils. args.resume".split():
        assert word not in text, word
    copy = runner.folder / "stripped.py"
    copy.write_text(text)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", copy]
    assert subprocess.run(ruff, capture_output=True).returncode == 0  # no name that has gone is used
    sizes = ("--preset cpu --num-envs 16 --num-steps 8 --minibatch-size 64 --num-epochs 1 --hidden-dim 16 "
             "--num-diffusion-steps 2 --num-eval-envs 2 --total-timesteps 512")
    flags = ["--env-id", "own_tasks:Point", "--device", "cpu", *sizes.split(), *runner.complete([])]
    out, _ = call_main(load(copy).main, ["stripped.py", *flags])
    run = out.splitlines()[-1]
    assert [event["step"] for event in metrics(run)] == [128, 256, 384, 512]


def test_what_may_change_is_a_flag():
    assert set(trudi.MAY_CHANGE) <= {field.name for field in dataclasses.fields(trudi.Args)}
