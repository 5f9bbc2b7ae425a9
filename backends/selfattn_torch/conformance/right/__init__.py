"""Right implementations that torch differentiates."""

from selfattn_core.conformance.right.implementation import RightImplementation
from selfattn_torch.conformance.right import products, sixteen_bits, softmax

__all__ = ["RIGHT"]

RIGHT: tuple[RightImplementation, ...] = (*softmax.RIGHT, *products.RIGHT, *sixteen_bits.RIGHT)
