"""Run a script where no Vulkan device can be had: ManiSkill's tasks build materials even if nothing is rendered.

    python -m benchmark.without_vulkan trudi_maniskill.py --env-id PushCube-v1 --preset cpu

Physics and rewards are the same; pictures cannot be taken."""

import pathlib
import runpy
import sys


class Unrendered:
    """Takes any arguments and any attributes, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def set_base_color(self, *args):
        """Nothing is coloured."""


def stub_materials():
    """Replace what needs a renderer in sapien and ManiSkill. Call it before a task is made."""
    import sapien.pysapien.render
    import sapien.render
    import sapien.wrapper.urdf_loader

    for module in (sapien.pysapien.render, sapien.render, sapien.wrapper.urdf_loader):
        for name in ("RenderMaterial", "RenderTexture2D"):
            setattr(module, name, Unrendered)


if __name__ == "__main__":
    stub_materials()
    del sys.argv[0]
    sys.path[0] = str(pathlib.Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
