"""Networks of the scripts in JAX as those in PyTorch have them."""

import jax
import numpy as np
import torch


def as_torch(network):
    """A network of trudi_mjx.py or of a baseline, or a gradient of it, as PyTorch's state_dict, whose layers are in blocks."""
    critic = type(network).__name__ == "Critic"
    found, numbers = {}, {"time_mlp.1": "time_mlp.2"}
    for i in range(3):
        numbers |= {f"hidden.{i}": f"blocks.{i}.{int(not critic)}", f"norms.{i}": f"blocks.{i}.{int(critic)}"}
    for path, x in jax.tree.leaves_with_path(network):
        *names, last = [
            str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))))
            for key in path
            if str(getattr(key, "key", getattr(key, "name", ""))) != "value"
        ]
        last = {"kernel": "weight", "scale": "weight"}.get(last, last)
        layer = ".".join(names)
        name = f"{numbers.get(layer, layer)}.{last}".lstrip(".")
        found[name] = torch.tensor(np.asarray(x).T if x.ndim == 2 else np.asarray(x))
    return found
