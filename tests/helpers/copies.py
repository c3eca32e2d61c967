"""Copies of the scripts."""

import importlib.util
import sys


def load(path):
    """A script, imported from a file of any name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
