"""Sizes of the data, the networks and their files, the same in every framework."""

__all__ = ["BATCH", "CLASSES", "LATENT", "SIDE", "WIDTHS"]

SIDE = 8
"""Height and width of an image."""

CLASSES = 10

LATENT = 24
"""The length of the random vector from which an image is generated, besides its class."""

WIDTHS = {"first": 64, "attended": 48, "last": 32}
"""Channels of the generator: at 4×4, at the attention layer, before the last convolution."""

BATCH = 64
