"""Real scans of handwritten digits. scikit-learn contains them, so nothing is downloaded."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HELD_OUT = 360
"""The number of held-out images among the 1797."""


@dataclass(frozen=True)
class Digits:
    """Images with their labels.

    Args:
        images: (B, 8, 8, 1), float32 from 0 to 1 in steps of 1/16.
        labels: (B,), the digits 0 to 9.
    """

    images: Array
    labels: Array

    def __len__(self) -> int:
        return len(self.labels)


def load() -> tuple[Digits, Digits]:
    """The training images and the held-out images. They are always the same two sets.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = (scans.images[..., None] / 16).astype(np.float32)
    # The file is sorted by writer, so it is shuffled before it is split.
    order = np.random.default_rng(0).permutation(len(images))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[train], scans.target[train]), Digits(images[held_out], scans.target[held_out])


def accuracy(logits: Array, labels: Array) -> float:
    """The share of images whose largest logit is that of the right digit."""
    return float(np.mean(logits.argmax(axis=1) == labels))
