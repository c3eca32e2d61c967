"""What every test shares: JAX on the CPU, the repository on the path, small resolved arguments."""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiling is most of what tests do
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads would wait for each other, there being two processes
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
