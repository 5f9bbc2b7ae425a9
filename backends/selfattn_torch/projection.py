"""The 1×1 convolutions of the layer, with the layer's way of drawing their parameters."""

from torch import nn

__all__ = ["Projection"]


class Projection(nn.Conv2d):
    """`nn.Conv2d` whose `reset_parameters` draws a Glorot-uniform kernel and a zero bias.

    A model made on the meta device is filled by calling `reset_parameters` of each of its `modules()`, children after
    their parents: a plain convolution would then replace the layer's initial parameters with its own.

    Example:
        >>> projection = Projection(16, 2, 1)
        >>> projection.bias.detach()
        tensor([0., 0.])
    """

    def reset_parameters(self) -> None:
        """Draw new parameters."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
