"""Generator and discriminator in Flax NNX, and the checkpoint of the training in PyTorch read into them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from numpy.typing import NDArray

import selfattn_flax
from examples.gan import files
from examples.gan.settings import CLASSES, LATENT, WIDTHS
from examples.gan_flax.spectral import SpectralConv, SpectralLinear
from selfattn_core import save_blocks
from selfattn_flax import SelfAttention2D

__all__ = ["Discriminator", "Generator", "answer", "load", "save"]

Array = NDArray[Any]


class Generator(nnx.Module):
    """A latent and a class to an image.

    Args:
        attention: the attention layer.
        rngs: where the weights of the other layers come from.
    """

    def __init__(self, attention: SelfAttention2D, *, rngs: nnx.Rngs) -> None:
        first, attended, last = WIDTHS["first"], WIDTHS["attended"], WIDTHS["last"]
        self.dense = nnx.Linear(LATENT + CLASSES, 4 * 4 * first, rngs=rngs)
        self.conv1 = nnx.Conv(first, attended, (3, 3), rngs=rngs)
        self.attention = attention
        self.conv2 = nnx.Conv(attended, last, (3, 3), rngs=rngs)
        self.conv3 = nnx.Conv(last, 1, (3, 3), rngs=rngs)

    def __call__(self, latents: jax.Array, labels: jax.Array) -> jax.Array:
        """Images (B, 8, 8, 1) of latents (B, LATENT) and labels (B,)."""
        x = self.dense(jnp.concatenate([latents, jax.nn.one_hot(labels, CLASSES)], axis=1))
        x = nnx.relu(x.reshape(len(x), 4, 4, -1)).repeat(2, axis=1).repeat(2, axis=2)
        x = self.attention(nnx.relu(self.conv1(x)))
        return nnx.sigmoid(self.conv3(nnx.relu(self.conv2(x))))


class Discriminator(nnx.Module):
    """An image and a class to a score.

    Args:
        attention: the attention layer.
        rngs: where the weights of the other layers come from.
    """

    def __init__(self, attention: SelfAttention2D, *, rngs: nnx.Rngs) -> None:
        self.conv1 = SpectralConv(1, 32, rngs=rngs)
        self.attention = attention
        self.conv2 = SpectralConv(32, 64, stride=2, rngs=rngs)
        self.conv3 = SpectralConv(64, 64, stride=2, rngs=rngs)
        self.dense = SpectralLinear(64, 1 + CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array, labels: jax.Array) -> jax.Array:
        """Scores (B,) of images (B, 8, 8, 1) as images of these classes."""
        x = nnx.leaky_relu(self.conv1(images), 0.2)
        x = nnx.leaky_relu(self.conv2(self.attention(x)), 0.2)
        x = nnx.leaky_relu(self.conv3(x), 0.2).sum(axis=(1, 2))
        scores = self.dense(x)
        return scores[:, 0] + jnp.take_along_axis(scores[:, 1:], labels[:, None], axis=1)[:, 0]


def load(folder: Path) -> tuple[Generator, Discriminator]:
    """The networks of a checkpoint, whichever framework wrote it."""
    attention = [selfattn_flax.load(folder / files.ATTENTION, block=block) for block in files.BLOCKS]
    generator = Generator(attention[0], rngs=nnx.Rngs(0))
    discriminator = Discriminator(attention[1], rngs=nnx.Rngs(0))
    arrays = {name: jnp.asarray(array) for name, array in files.load_networks(folder).items()}
    trees = traverse_util.unflatten_dict(arrays, sep=".")
    for block, network in zip(files.BLOCKS, (generator, discriminator), strict=True):
        nnx.update(network, trees[block])
    return generator, discriminator


def save(generator: Generator, discriminator: Discriminator, folder: Path, *, source: str) -> None:
    """Write a checkpoint that `load`, and that of `examples.gan_torch`, reads; replaces that of an earlier run."""
    networks = dict(zip(files.BLOCKS, (generator, discriminator), strict=True))
    blocks = {
        name: (network.attention.config, selfattn_flax.to_canonical(network.attention))
        for name, network in networks.items()
    }
    save_blocks(folder / files.ATTENTION, blocks, overwrite=True, source=source)
    trees = {name: nnx.to_pure_dict(nnx.state(network)) for name, network in networks.items()}
    flat = traverse_util.flatten_dict(trees, sep=".")
    files.save_networks(folder, {name: jax.device_get(flat[name]) for name in files.NETWORKS})


def answer(
    generator: Generator, discriminator: Discriminator, latents: Array, labels: Array
) -> files.Samples:
    """What the networks, in evaluation mode, make of latents and labels."""
    generator.eval()
    discriminator.eval()
    images, scores = _answer(generator, discriminator, latents, labels)
    generator.train()
    discriminator.train()
    return files.Samples(latents, labels, jax.device_get(images), jax.device_get(scores))


@nnx.jit
def _answer(
    generator: Generator, discriminator: Discriminator, latents: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    images = generator(latents, labels)
    return images, discriminator(images, labels)
