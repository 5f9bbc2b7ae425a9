"""Sizes and hyperparameters of the GAN, the same in every framework.

Source: Zhang et al., "Self-Attention Generative Adversarial Networks", 2018 (hinge loss, spectral norm, Adam without
momentum, a faster discriminator); Mescheder et al., "Which Training Methods for GANs do actually Converge?", 2018 (R1).
"""

__all__ = [
    "BATCH",
    "BETAS",
    "CLASSES",
    "DISCRIMINATOR_RATE",
    "GENERATOR_RATE",
    "LATENT",
    "R1_WEIGHT",
    "SIDE",
    "WIDTHS",
]

SIDE = 8
"""Height and width of an image."""

CLASSES = 10

LATENT = 24
"""Numbers that an image is made from, besides its class."""

WIDTHS = {"first": 64, "attended": 48, "last": 32}
"""Channels of the generator: at 4×4, at the attention layer, before the last convolution."""

BATCH = 64
GENERATOR_RATE = 1e-3
DISCRIMINATOR_RATE = 2e-3
BETAS = (0.0, 0.99)
R1_WEIGHT = 1.0
"""The penalty is this, times half the mean squared norm of the gradient of the scores of real images."""
