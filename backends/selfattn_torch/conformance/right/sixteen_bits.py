"""Other places at which a layer may round to 16 bits, differentiated by torch."""

from collections.abc import Mapping

import torch

from selfattn_core import SelfAttentionConfig
from selfattn_core.conformance.cases.case import SIXTEEN_BITS
from selfattn_core.conformance.right.implementation import RightImplementation
from selfattn_torch.conformance.right.backend import differentiated
from selfattn_torch.conformance.right.layer import PlainLayer

__all__ = ["RIGHT"]


class RoundedMap(PlainLayer):
    """The map is rounded to 16 bits, and its gradient passes through the cast."""

    dtypes = SIXTEEN_BITS

    def average(self, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The average o, from 16-bit factors."""
        return self.probabilities(scores).to(v.dtype) @ v


class RoundedWeights(PlainLayer):
    """The exponentials are rounded to 16 bits for the product with v, and divided by their exact sum afterwards."""

    dtypes = SIXTEEN_BITS

    def average(self, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The average o."""
        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach())
        attended = self.wide(weights.to(v.dtype) @ v)
        return (attended / weights.sum(dim=-1, keepdim=True)).to(v.dtype)


class RoundedOnce(PlainLayer):
    """Everything in float32, rounded to 16 bits at the end only."""

    dtypes = SIXTEEN_BITS

    def __init__(self, config: SelfAttentionConfig, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, {name: self.wide(tensor) for name, tensor in weights.items()})

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """The output y."""
        return super().output(self.wide(x)).to(x.dtype)

    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """A."""
        return super().attention_map(self.wide(x)).to(x.dtype)


class GainInFloat32(PlainLayer):
    """The out projection, gamma and the residual in float32."""

    dtypes = SIXTEEN_BITS

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """The output y."""
        z = self.attended(x)
        return (
            (self.wide(self.weights["gamma"]) * self.wide(z)).reshape(x.shape).add(self.wide(x)).to(x.dtype)
        )


RIGHT: tuple[RightImplementation, ...] = (
    differentiated(
        "map rounded to 16 bits", "Fused kernels multiply 16-bit weights with 16-bit values.", RoundedMap
    ),
    differentiated(
        "exponentials rounded to 16 bits",
        "Flash attention does, with the row sum in float32.",
        RoundedWeights,
    ),
    differentiated("rounded once", "More digits are no error.", RoundedOnce),
    differentiated("gain in float32", "More digits are no error.", GainInFloat32),
)
