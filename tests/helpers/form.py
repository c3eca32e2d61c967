"""The scripts as texts: which there are, and what their functions look like."""

import ast
import functools

from runner import BASELINES as BASELINE_FOLDER
from runner import ROOT

SCRIPTS = sorted(ROOT.glob("trudi_*.py"))
BASELINES = sorted(BASELINE_FOLDER.glob("*.py"))
BENCHMARK = sorted(set((ROOT / "benchmark").rglob("*.py")) - set(BASELINES))
NESTING = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def depth(node):
    """The deepest nesting of blocks in a function; functions in it count for themselves."""
    children = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.FunctionDef)]
    return isinstance(node, NESTING) + max(map(depth, children), default=0)


@functools.cache
def definitions(path):
    """Functions, classes and constants at a module's top, by name: lines with decorators and comments, in order."""
    source, found = path.read_text(), {}
    lines = source.splitlines()
    for node in ast.parse(source).body:
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if named or isinstance(node, ast.Assign):
            first = min([node.lineno, *[x.lineno for x in getattr(node, "decorator_list", [])]])
            found[node.name if named else ast.unparse(node.targets[0])] = "\n".join(lines[first - 1:node.end_lineno])
    return found
