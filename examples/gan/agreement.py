"""Comparison of the images and scores of networks that were moved to another framework."""

from dataclasses import dataclass

import numpy as np

from examples.gan.files import Samples

__all__ = ["Agreement", "compare", "compare_images"]

ALLOWED = 64.0
"""The allowed difference in units in the last place (float32) of the largest number. The networks add thousands of products."""


@dataclass(frozen=True)
class Agreement:
    """The largest differences, in units in the last place of the largest number.

    Args:
        images: the largest difference of all pixels.
        scores: the largest difference of the discriminator's scores, or None without a discriminator.
    """

    images: float
    scores: float | None

    @property
    def agrees(self) -> bool:
        """Whether both differences are rounding errors."""
        return all(difference <= ALLOWED for difference in (self.images, self.scores or 0.0))

    def __str__(self) -> str:
        scores = "" if self.scores is None else f", of a score {self.scores:.1f}"
        return (
            f"largest difference of a pixel {self.images:.1f}{scores} units in the last place of float32 "
            f"(allowed: {ALLOWED:g}): {'the same' if self.agrees else 'NOT the same'}"
        )


def compare(got: Samples, want: Samples) -> Agreement:
    """The differences between an answer and the one stored with the checkpoint."""
    return Agreement(_difference(got.images, want.images), _difference(got.scores, want.scores))


def compare_images(got: np.ndarray, want: Samples) -> Agreement:
    """The differences of images alone, without a discriminator."""
    return Agreement(_difference(got, want.images), None)


def _difference(got: np.ndarray, want: np.ndarray) -> float:
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - want).max() / (np.finfo(np.float32).eps * np.abs(want).max()))
