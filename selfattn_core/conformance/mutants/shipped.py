"""Mutants of the family shipped: layers that round more than the default products of their framework."""

from selfattn_core.arrays import Array
from selfattn_core.conformance.mutants.mutant import Mutant
from selfattn_core.conformance.protocol import Backend
from selfattn_core.conformance.reference import LayerReference
from selfattn_core.conformance.verdicts.product_formats import kept_bits, rounding_layer

__all__ = ["MUTANTS", "RoundsOperands"]


class RoundsOperands(LayerReference):
    """The spec with its products in one format, in a framework whose default products have another format.

    Args:
        computes: the format of the layer, one of `FORMATS`.
        default: the default format of the framework, one of `FORMATS`.
    """

    def __init__(self, computes: str, default: str) -> None:
        super().__init__(rounding_layer(computes))
        self.default = default

    def default_products(self, left: Array, right: Array) -> dict[str, Array]:
        """The matrix product of numpy with rounded operands."""
        return {"matrix product": kept_bits(left, self.default) @ kept_bits(right, self.default)}


def _mutant(computes: str, default: str) -> Mutant:
    def make() -> Backend:
        return RoundsOperands(computes, default)

    return Mutant(f"products in {computes} where {default} is the default", "shipped", make)


MUTANTS: tuple[Mutant, ...] = (
    _mutant("tf32", "float32"),
    _mutant("bf16", "float32"),
    _mutant("bf16", "tf32"),
)
