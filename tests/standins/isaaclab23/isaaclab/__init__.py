"""A stand-in for Isaac Lab 2.3's interface, as far as trudi_isaaclab.py uses it; it writes what is called to $JOURNAL."""

import os
import pathlib


def write(line):
    with pathlib.Path(os.environ["JOURNAL"]).open("a") as file:
        file.write(line + "\n")
