"""Records of a training: the quality of fixed samples, and the generator's attention on one of them."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.digits import data
from examples.gan.pictures import save_map_animation, save_sheet
from examples.gan.quality import Quality, measure
from examples.gan.settings import CLASSES, LATENT
from selfattn_core.files.writing import write_atomically

__all__ = ["FILM", "SHEET", "Watch"]

Array = NDArray[Any]

FILM = "attention.gif"
SHEET = "samples.png"
_FRAMES = "frames.npz"

_PER_CLASS = 40
_DRAWN = 8 * _PER_CLASS
"""The sample whose attention is recorded: the first 8."""


class Watch:
    """Records of one training, always on the same latents.

    Args:
        folder: folder of the run. Earlier records up to `step` are kept.
        seed: seed of the latents.
        step: first step of the training.
    """

    def __init__(self, folder: Path, seed: int, step: int = 0) -> None:
        self._folder = folder
        self._digits, self._held_out = data.load()
        random = np.random.default_rng(seed)
        self.latents: Array = random.standard_normal((CLASSES * _PER_CLASS, LATENT), np.float32)
        self.labels: Array = np.repeat(np.arange(CLASSES), _PER_CLASS)
        self.quality = Quality(0.0, 0.0)
        self._frames: dict[str, list[Any]] = {"steps": [], "images": [], "maps": [], "gammas": []}
        if step:
            with np.load(folder / _FRAMES) as earlier:
                kept = int(np.sum(earlier["steps"] <= step))
                self._frames = {name: list(earlier[name][:kept]) for name in self._frames}

    def recorded(self, step: int) -> bool:
        """Whether the state at this step was recorded before the training was interrupted."""
        return step in self._frames["steps"]

    def record(
        self,
        step: int,
        generate: Callable[[Array, Array], Array],
        attend: Callable[[Array, Array], Array],
        gamma: float,
    ) -> Quality:
        """Record the quality of the samples, draw them, and add a frame to the animation.

        Args:
            step: step of the training.
            generate: maps latents (B, LATENT) and labels (B,) to images (B, 8, 8, 1).
            attend: maps them to the map (B, 8, 8, 8, 8) for these images.
            gamma: gamma of that attention layer.
        """
        images = generate(self.latents, self.labels)
        self.quality = measure(images, self.labels, self._digits, self._held_out)
        save_sheet(self._folder / SHEET, images)
        grid = attend(self.latents[_DRAWN : _DRAWN + 1], self.labels[_DRAWN : _DRAWN + 1])
        frame = {"steps": step, "images": images[_DRAWN, :, :, 0], "maps": grid[0], "gammas": gamma}
        for name, value in frame.items():
            self._frames[name].append(value)
        content = io.BytesIO()
        np.savez(content, **self._frames)
        write_atomically(self._folder / _FRAMES, content.getvalue(), overwrite=True)
        return self.quality

    def save_film(self) -> None:
        """Write the generator's attention over the whole training as an animated GIF."""
        save_map_animation(self._folder / FILM, list(zip(*self._frames.values(), strict=True)))
