"""The formats of float32 products, a measurement of the format, and the spec's layer with its products in a format.

Accelerators round the operands of float32 products, some by default and some on request. TF32 keeps 10 bits of the
fraction, bfloat16 keeps 7, and sums of three bfloat16 products keep about 15. Some round to the nearest number. Others
drop the remaining bits, which doubles the error and biases it to one side. The sums themselves are in float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.spec import Layer

__all__ = ["FORMATS", "Format", "coarsest", "kept_bits", "measured", "rounding_layer"]


@dataclass(frozen=True)
class Format:
    """How the operands of a product are rounded.

    Args:
        bits: the number of bits of the fraction that remain.
        nearest: whether operands are rounded to the nearest number. Otherwise they are rounded towards zero.
    """

    bits: int
    nearest: bool = True

    @property
    def eps(self) -> float:
        """The distance from 1 to the next number."""
        return 2.0**-self.bits

    @property
    def most(self) -> float:
        """The largest relative error of a number times one. It is 0 in float32."""
        if self.bits == 23:
            return 0.0
        return self.eps / 2 if self.nearest else self.eps


FORMATS: Mapping[str, Format] = {
    "float32": Format(23),
    "bf16x3": Format(15),
    "tf32": Format(10),
    "tf32 truncated": Format(10, nearest=False),
    "bf16": Format(7),
    "bf16 truncated": Format(7, nearest=False),
}
"""The formats by name, from the finest to the coarsest."""

_SIDE = 64


def kept_bits(array: Array, label: str) -> Array:
    """The operand of a product, rounded to a format.

    Args:
        array: float32.
        label: one of `FORMATS`.

    Example:
        >>> kept_bits(np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32), "bf16")
        array([1.      , 1.015625], dtype=float32)
    """
    format_ = FORMATS[label]
    dropped = np.uint32(23 - format_.bits)
    if not dropped:
        return array
    raw = np.ascontiguousarray(array, np.float32).view(np.uint32)
    if format_.nearest:
        # Ties go to even. An overflow of the fraction carries into the exponent.
        raw = raw + ((np.uint32(1) << (dropped - 1)) - 1) + ((raw >> dropped) & 1)
    kept = (raw >> dropped) << dropped
    return np.where(np.isfinite(array), kept.view(np.float32).reshape(array.shape), array)


def measured(products: Callable[[Array, Array], Mapping[str, Array]]) -> dict[str, str]:
    """The format of each of a backend's default products.

    The measurement multiplies numbers that use all bits of the fraction by one, from either side. The result shows how the
    product rounds its operands. The format is the finest one whose rounding explains the error.

    Args:
        products: computes the product of two float32 matrices, by name of the operation.

    Raises:
        ValueError: if a product has another shape, or is less precise than every format.

    Example:
        >>> measured(lambda left, right: {"matmul": left @ right})
        {'matmul': 'float32'}
        >>> measured(lambda left, right: {"matmul": kept_bits(left, "tf32") @ kept_bits(right, "tf32")})
        {'matmul': 'tf32'}
    """
    generator = np.random.default_rng(32)
    one = np.eye(_SIDE, dtype=np.float32)
    dense = generator.uniform(1, 2, (_SIDE, _SIDE)).astype(np.float32)
    worst: dict[str, float] = {}
    for left, right in ((dense, one), (one, dense)):
        for name, product in products(left, right).items():
            if product.shape != dense.shape:
                raise ValueError(f"{name}: got a product of shape {product.shape}, expected {dense.shape}")
            error = float(np.nan_to_num(np.abs(product.astype(np.float64) / dense - 1), nan=np.inf).max())
            worst[name] = max(error, worst.get(name, error))
    found = {}
    for name, error in worst.items():
        fits = [label for label, format_ in FORMATS.items() if error <= format_.most]
        if not fits:
            raise ValueError(
                f"{name}: a number times one has a relative error of {error:.2g}, "
                "which is coarser than any format that the kit knows"
            )
        found[name] = fits[0]
    return found


def coarsest(precisions: Mapping[str, str]) -> str:
    """The coarsest of the formats of several products. Without products it is float32.

    Example:
        >>> coarsest({"matrix product": "float32", "convolution": "tf32"})
        'tf32'
    """
    return max(precisions.values(), key=list(FORMATS).index, default="float32")


@cache
def rounding_layer(label: str) -> type[Layer]:
    """The spec's layer with the operands of every matrix product rounded to a format.

    At least one operand of each product in the spec is an `Operand` here. The tests prove this. They compare this layer
    with a spec in which every `@` of the syntax tree is replaced.

    Args:
        label: one of `FORMATS`.
    """

    class Operand(np.ndarray[Any, Any]):
        def __matmul__(self, right: Array) -> Array:  # type: ignore[override]
            return self._product(self, right)

        def __rmatmul__(self, left: Array) -> Array:  # type: ignore[override]
            return self._product(left, self)

        @staticmethod
        def _product(left: Array, right: Array) -> Array:
            rounded = kept_bits(np.asarray(left), label) @ kept_bits(np.asarray(right), label)
            return rounded.view(Operand)

    class RoundingLayer(Layer):
        def flatten(self, maps: Array) -> Array:
            return super().flatten(maps).view(Operand)

        def attend(self, config: SelfAttentionConfig) -> None:
            self.k, self.v = self.k.view(Operand), self.v.view(Operand)
            super().attend(config)
            self.A = self.A.view(Operand)

        def kernel(self, name: str) -> Array:
            return super().kernel(name).view(Operand)

    return RoundingLayer
