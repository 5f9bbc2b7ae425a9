"""Pictures of a training: a sheet of samples, and an animation of the generator's attention."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.gan.settings import CLASSES
from selfattn_core.files.writing import write_atomically
from selfattn_core.viz import save_animation

__all__ = ["POINTS", "Snapshot", "save_map_animation", "save_sheet"]

Array = NDArray[Any]

POINTS = ((1, 3), (4, 2), (6, 5))
"""The query points of the animation, pixels (y, x)."""

_ROWS = 8
_ENLARGED = 6

Snapshot = tuple[int, Array, Array, float]
"""Step, image (8, 8), map (8, 8, 8, 8), gamma."""


def save_sheet(path: Path, images: Array) -> None:
    """Write the first images of each digit, one column for each digit.

    Args:
        path: path of the .png file, which is replaced if it exists.
        images: (B, 8, 8, 1), sorted by class, with the same number of each.
    """
    from PIL import Image

    columns = images.reshape(CLASSES, -1, *images.shape[1:3])[:, :_ROWS]  # (10, rows, 8, 8)
    padded = np.pad(columns, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=0.35)
    sheet = padded.transpose(1, 2, 0, 3).reshape(padded.shape[1] * padded.shape[2], -1)
    enlarged = (sheet * 255).round().astype(np.uint8).repeat(_ENLARGED, axis=0).repeat(_ENLARGED, axis=1)
    content = io.BytesIO()
    Image.fromarray(enlarged).save(content, format="PNG")
    write_atomically(path, content.getvalue(), overwrite=True)


def save_map_animation(path: Path, snapshots: Sequence[Snapshot]) -> None:
    """Write the generator's attention over the training as an animated GIF."""
    save_animation(
        path,
        [image for _, image, _, _ in snapshots],
        [grid for _, _, grid, _ in snapshots],
        POINTS,
        titles=[f"step {step}" for step, _, _, _ in snapshots],
        gammas=[gamma for _, _, _, gamma in snapshots],
        overwrite=True,
    )
