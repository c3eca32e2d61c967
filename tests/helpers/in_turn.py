"""Runs trudi_isaaclab.py with several command lines, JSON lists of flags, one after the other in one process: Isaac Lab 3.0
takes longer to import than to be trained with. Ends with the first exit code that is not 0."""

import json
import sys

import trudi_isaaclab

for line in sys.argv[1:]:
    sys.argv = ["trudi_isaaclab.py", *json.loads(line)]
    try:
        trudi_isaaclab.main(*trudi_isaaclab.launch())
    except SystemExit as stop:
        if stop.code:
            raise
