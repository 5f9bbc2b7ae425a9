"""The batches of a training: real images and random numbers, the same in every framework and after a resumption."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from examples.digits.data import Digits
from examples.gan.settings import BATCH, CLASSES, LATENT

__all__ = ["Batch", "draw"]

Array = NDArray[Any]


class Batch(NamedTuple):
    """The batch for one step of both networks.

    Args:
        real: (B, 8, 8, 1), float32.
        labels: (B,), int64, the classes of the real images, and of the images generated beside them.
        latents: (B, LATENT), float32, for the images generated beside the real ones.
        new_latents: (B, LATENT), float32, for the step of the generator.
        new_labels: (B,), int64, for the step of the generator.
    """

    real: Array
    labels: Array
    latents: Array
    new_latents: Array
    new_labels: Array


def draw(digits: Digits, seed: int, step: int) -> Batch:
    """The batch of a step.

    It depends only on the seed and the step, so a checkpoint needs no state of a random generator.
    """
    random = np.random.default_rng((seed, step))
    chosen = random.integers(len(digits), size=BATCH)
    return Batch(
        digits.images[chosen],
        digits.labels[chosen],
        random.standard_normal((BATCH, LATENT), np.float32),
        random.standard_normal((BATCH, LATENT), np.float32),
        random.integers(CLASSES, size=BATCH),
    )
