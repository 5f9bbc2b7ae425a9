"""The classifier in Flax Linen. As a program, it scores the held-out images."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from numpy.typing import NDArray

from examples.digits import files
from selfattn_flax import linen

Array = NDArray[Any]


class Classifier(nn.Module):
    """The classifier around an attention layer, whose variables are named "attention" in the tree.

    Args:
        attention: the layer.
    """

    attention: linen.SelfAttention2D

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (B, 10) of images (B, 8, 8, 1)."""
        x = nn.relu(nn.Conv(16, (3, 3), name="conv1")(images))
        x = nn.relu(nn.Conv(32, (3, 3), name="conv2")(x))
        x = nn.relu(self.attention(x))
        return nn.Dense(10, name="dense")(x.max(axis=(1, 2)))


def load(folder: Path) -> tuple[Classifier, dict[str, Any]]:
    """The classifier and its variables, with the weights that were trained in PyTorch."""
    attention, variables = linen.load(folder / files.ATTENTION)
    network = {name: jnp.asarray(array) for name, array in files.load_network(folder).items()}
    params = traverse_util.unflatten_dict(network, sep=".") | {"attention": variables["params"]}
    return Classifier(attention), {"params": params}


def logits(model: Classifier, variables: dict[str, Any], images: Array) -> jax.Array:
    """Logits (B, 10) of images (B, 8, 8, 1)."""
    return jax.jit(model.apply)(variables, images)


if __name__ == "__main__":
    files.answer(lambda folder, images: logits(*load(folder), images))
