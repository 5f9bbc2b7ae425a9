"""What is recorded while the networks train: the quality of fixed samples, and the generator's attention on one of them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from examples.digits.data import Digits
from examples.gan.pictures import Snapshot
from examples.gan.quality import Quality, measure
from examples.gan.settings import CLASSES, LATENT, SIDE
from examples.gan_torch.checkpoint import answer
from examples.gan_torch.networks import Discriminator, Generator

__all__ = ["Watch"]

Array = NDArray[Any]

_PER_CLASS = 40
_DRAWN = 8 * _PER_CLASS
"""The sample whose attention is recorded: the first 8."""


class Watch:
    """Records of one training, on the same latents throughout.

    Args:
        generator: that trains.
        discriminator: that trains.
        training: real images.
        held_out: real images that the training never sees.
        seed: of the latents.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        training: Digits,
        held_out: Digits,
        seed: int,
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.training, self.held_out = training, held_out
        shape = (CLASSES * _PER_CLASS, LATENT)
        self.latents: Array = np.random.default_rng(seed).standard_normal(shape, np.float32)
        self.labels: Array = np.repeat(np.arange(CLASSES), _PER_CLASS)
        self.snapshots: list[Snapshot] = []
        self.quality = Quality(0.0, 0.0)

    def __call__(self, step: int) -> str:
        """Record; returns one line that says what the state is."""
        self.samples = answer(self.generator, self.discriminator, self.latents, self.labels)
        self.quality = measure(self.samples.images, self.labels, self.training, self.held_out)
        gains = [network.attention.gamma.item() for network in (self.generator, self.discriminator)]
        image = self.samples.images[_DRAWN, :, :, 0]
        self.snapshots.append((step, image, self._map(), gains[0]))
        return f"{self.quality}; gamma {gains[0]:+.3f} in the generator, {gains[1]:+.3f} in the discriminator"

    @torch.no_grad()
    def _map(self) -> Array:
        """The generator's attention map on the drawn sample, (8, 8, 8, 8)."""
        chosen = slice(_DRAWN, _DRAWN + 1)
        latents, labels = torch.from_numpy(self.latents[chosen]), torch.from_numpy(self.labels[chosen])
        self.generator.eval()
        _, attention = self.generator.attention(self.generator.features(latents, labels), need_weights=True)
        self.generator.train()
        return attention.view(SIDE, SIDE, SIDE, SIDE).numpy()
