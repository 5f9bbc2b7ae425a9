"""The classifier in Flax NNX. As a program, it scores the held-out images."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from numpy.typing import NDArray

import selfattn_flax
from examples.digits import files
from selfattn_flax import SelfAttention2D

Array = NDArray[Any]


class Classifier(nnx.Module):
    """The classifier around an attention layer.

    Args:
        attention: the layer, for 32 channels.
        rngs: source of the other layers' weights.
    """

    def __init__(self, attention: SelfAttention2D, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.attention = attention
        self.dense = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (B, 10) of images (B, 8, 8, 1)."""
        x = nnx.relu(self.conv1(images))
        x = nnx.relu(self.conv2(x))
        x = nnx.relu(self.attention(x))
        return self.dense(x.max(axis=(1, 2)))


def load(folder: Path) -> Classifier:
    """The classifier with the weights that were trained in PyTorch."""
    model = Classifier(selfattn_flax.load(folder / files.ATTENTION), rngs=nnx.Rngs(0))
    network = {name: jnp.asarray(array) for name, array in files.load_network(folder).items()}
    nnx.update(model, traverse_util.unflatten_dict(network, sep="."))
    return model


@nnx.jit
def logits(model: Classifier, images: Array) -> jax.Array:
    """Logits (B, 10) of images (B, 8, 8, 1)."""
    return model(images)


if __name__ == "__main__":
    files.answer(lambda folder, images: logits(load(folder), images))
