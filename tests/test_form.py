"""The scripts keep their form: what they require, what --help says, what is repeated, how dense and how long they are."""


import ast
import dataclasses
import importlib
import io
import itertools
import os
import re
import subprocess
import sys
import tokenize
import tomllib

import pytest
from form import BASELINES, BENCHMARK, SCRIPTS, depth, functions
from runner import ROOT


def test_requirements_agree_with_the_scripts():
    found = set()
    for path in SCRIPTS:
        header = re.search(r"# /// script\n(.*?)# ///", path.read_text(), re.S)[1]
        header = tomllib.loads("\n".join(line[2:] for line in header.splitlines()))
        assert header["dependencies"] == sorted(header["dependencies"]), path.name
        assert header["requires-python"] == ">=3.11", path.name
        found |= set(header["dependencies"])
    assert sorted(found) == (ROOT / "requirements.txt").read_text().splitlines()


FORMATTED = [*SCRIPTS, *BASELINES, *BENCHMARK]


@pytest.mark.parametrize("command", [["check", ROOT], ["format", "--check", *FORMATTED]], ids=lambda x: x[0])
def test_ruff(command):
    ruff = [sys.executable, "-m", "ruff", *map(str, command)]
    result = subprocess.run(ruff, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", SCRIPTS + BASELINES, ids=lambda path: path.name)
def test_help_documents_every_flag(path):
    out = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True,
                         env={"COLUMNS": "200", "PATH": os.environ["PATH"]}).stdout
    rows = re.split(r"\n. (?=-)", out)  # one for each flag, however many lines
    for field in dataclasses.fields(importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)).Args):
        names = re.compile(rf"--{field.name.replace('_', '-')}\b[^a-z]")
        row = next((row for row in rows if names.match(row)), None)
        computed = field.name in ("batch_size", "num_iterations")
        words = re.findall(r"[a-z]{2,}", row.split("(default")[0]) if row else []
        assert computed if row is None else len(words) > len(re.findall("[a-z]{2,}", field.name)), field.name


def framework(path):
    return "torch" if "\nimport torch\n" in path.read_text() else "jax"


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SCRIPTS, 2)), ids=lambda path: path.stem)
def test_what_is_repeated_has_not_drifted(one, other):
    """Functions of one name in two scripts are the same text: those that every framework shares always, else within it. A
    script's own are its flags, what these default to, and the order in which it starts things."""
    bodies = [{node.name: ast.unparse(node) for node in ast.parse(path.read_text()).body
               if isinstance(node, ast.FunctionDef | ast.ClassDef)} for path in (one, other)]
    shared = set(bodies[0]) & set(bodies[1])
    anywhere = {"fail", "flag", "read_args", "parse"}
    assert anywhere <= shared
    for name in shared - {"Args", "resolve", "main"} if framework(one) == framework(other) else anywhere:
        assert bodies[0][name] == bodies[1][name], name


def density(source):
    """Characters a line that is not blank, and tokens a line of code, on average."""
    lines = [line for line in source.splitlines() if line.strip()]
    layout = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER}
    tokens = [x for x in tokenize.generate_tokens(io.StringIO(source).readline) if x.type not in layout]
    return sum(map(len, lines)) / len(lines), len(tokens) / len({token.start[0] for token in tokens})


def test_density():
    characters, tokens = density("# a comment of 22 chars\n\nx = (\n    1,\n)\n")
    assert (characters, tokens) == ((23 + 5 + 6 + 1) / 4, 6 / 3)


@pytest.mark.parametrize("path", SCRIPTS + BASELINES, ids=lambda path: path.name)
def test_one_idea_a_line(path):
    characters, tokens = density(path.read_text())
    assert characters <= 60
    assert tokens <= 10.5
    assert max(map(len, path.read_text().splitlines())) <= 110
    for node in ast.walk(ast.parse(path.read_text())):
        several = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
        assert not several, f"line {node.lineno} assigns several values"


@pytest.mark.parametrize("path", SCRIPTS + BASELINES + BENCHMARK, ids=lambda path: str(path.relative_to(ROOT)))
def test_form(path):
    for function in functions(path):
        assert function.end_lineno - function.lineno < 60, f"{function.name} is too long"
        assert depth(function) <= 2, f"{function.name} nests too deep"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("path", SCRIPTS + BASELINES, ids=lambda path: path.name)
def test_every_flag_is_read(path):
    source = path.read_text()
    args = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    for field in [node.target.id for node in args.body if isinstance(node, ast.AnnAssign)]:
        assert re.search(rf"\bargs\.{field}\b", source), field


def paper_numbers(path):
    """What --help calls the paper's, by flag: 1024, 50M, or of several suites, "0.99 on DMC, 0.97 on humanoids"."""
    args = next(node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == "Args")
    for field, text in itertools.pairwise(args.body):
        said = isinstance(text, ast.Expr) and re.search(r"paper:? (-?\d[^;)]*)", text.value.value)
        if said:
            yield field.target.id, said[1]


# That hang on the task, which test_benchmark_tasks.py has, or are its own authors' for a baseline.
OTHERS = {"maniskill": ["gamma"], "humanoidbench": ["v_min", "v_max"]}
OF_AUTHORS = {"dppo_mjx": ["critic_learning_rate"]}


@pytest.mark.parametrize("path", SCRIPTS + BASELINES, ids=lambda path: path.name)
def test_help_has_the_numbers_of_the_presets(path):
    script = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    suites = list(getattr(script, "SUITE", {"": {}}).values())
    differ = []
    for name, text in paper_numbers(path):
        said = [float(x) * (1e6 if unit else 1) for x, unit in re.findall(r"(-?\d[\d.]*(?:e-?\d+)?)(M?)", text)]
        values = [(vars(script.Args()) | suite | script.PAPER)[name] for suite in suites]
        if None in values or list(dict.fromkeys(map(float, values))) != said:
            differ.append(name)
    simulator = path.stem.rpartition("_")[2]
    assert differ == OTHERS.get(simulator, OF_AUTHORS.get(path.stem, []))
