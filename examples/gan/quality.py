"""The quality of generated images, measured by comparison with real images, without another trained network."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.digits.data import Digits

__all__ = ["Quality", "measure"]

Array = NDArray[Any]

NEIGHBOURS = 5


@dataclass(frozen=True)
class Quality:
    """Two shares, each 1 at best.

    Args:
        recognised: share of the images whose nearest real image has the intended class. Real held-out images reach 0.98.
        coverage: share of the held-out real images that have a generated image as near as their fifth-nearest real one. It
            is low if the generator makes only a few different images.
    """

    recognised: float
    coverage: float

    def __str__(self) -> str:
        return f"recognised {self.recognised:.0%}, coverage {self.coverage:.0%}"


def measure(images: Array, labels: Array, training: Digits, held_out: Digits) -> Quality:
    """Compare images with the real ones.

    Args:
        images: (B, 8, 8, 1).
        labels: (B,), the intended classes.
        training: real images to recognise by.
        held_out: real images to be covered.

    Source: Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", 2020, for the coverage.
    """
    nearest = _distances(images, training.images).argmin(axis=1)
    radii = np.partition(_distances(held_out.images, training.images), NEIGHBOURS - 1, axis=1)[
        :, NEIGHBOURS - 1
    ]
    covered = _distances(held_out.images, images).min(axis=1) <= radii
    return Quality(float(np.mean(training.labels[nearest] == labels)), float(np.mean(covered)))


def _distances(first: Array, second: Array) -> Array:
    """Squared distances, (first, second)."""
    a, b = (images.reshape(len(images), -1).astype(np.float64) for images in (first, second))
    return (a * a).sum(axis=1)[:, None] - 2 * a @ b.T + (b * b).sum(axis=1)
