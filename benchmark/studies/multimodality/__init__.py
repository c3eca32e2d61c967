"""The paper's two tasks with two equivalent solutions each (Section 6, Appendix D), for ManiSkill3.

    python trudi_maniskill.py --env-id benchmark.studies.multimodality:PushTSymmetric-v1
    python -m benchmark.studies.multimodality.behavior_entropy runs/...

Importing this package registers PushTSymmetric-v1 and StackCubeSymmetric-v1, which start at random, and
PushTSymmetricTest-v1 and StackCubeSymmetricTest-v1, whose one initial state lies between the solutions."""

from . import push_t, stack_cube

__all__ = ["push_t", "stack_cube"]
