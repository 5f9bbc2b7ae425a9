"""Right implementations: other correct ways to compute the layer. The kit must not fail them, at any seed."""

from selfattn_core.conformance.right import derivatives, sixteen_bits, sums
from selfattn_core.conformance.right.implementation import RightImplementation, edited

__all__ = ["RIGHT", "RightImplementation", "edited"]

RIGHT: tuple[RightImplementation, ...] = (*sums.RIGHT, *derivatives.RIGHT, *sixteen_bits.RIGHT)
