"""The attention maps of some held-out digits as a picture."""

from pathlib import Path

import numpy as np

from examples.digits.data import Digits
from examples.digits.numpy_model import Classifier
from selfattn_core.maps import unflatten
from selfattn_core.viz import draw_attention, save_figure

DRAWN = (3, 5, 8)
"""The digits to draw. The first held-out image of each is used."""

POINTS = ((1, 4), (4, 3), (6, 4))
"""Pixels (y, x) to attend from: in the upper, middle and lower stroke of most digits."""


def draw(model: Classifier, held_out: Digits, path: Path) -> None:
    """Write one row for each digit: the image, and what each point attends to.

    Args:
        model: the trained classifier.
        held_out: images to choose from.
        path: path of the picture, which is replaced if it exists.
    """
    from matplotlib.figure import Figure

    chosen = [int(np.flatnonzero(held_out.labels == digit)[0]) for digit in DRAWN]
    images = held_out.images[chosen]
    grids = unflatten(model.attention_map(images), *images.shape[1:3], kv_pool=model.config.kv_pool)
    figure = Figure(figsize=(8, 9), dpi=110, layout="constrained")
    for row, image, grid, digit in zip(figure.subfigures(len(DRAWN), 1), images, grids, DRAWN, strict=True):
        draw_attention(
            row,
            image,
            grid,
            POINTS,
            kv_pool=model.config.kv_pool,
            gamma=float(model.gamma[0]),
            title=f"a held-out {digit}",
        )
    save_figure(figure, path, overwrite=True)
