"""Other places at which a layer may round to 16 bits: those of fused kernels."""

from selfattn_core.conformance.mutants.edits import edited_spec
from selfattn_core.conformance.mutants.sixteen_bits import InBfloat16
from selfattn_core.conformance.protocol import Backend
from selfattn_core.conformance.reference import Reference
from selfattn_core.conformance.right.implementation import RightImplementation

__all__ = ["RIGHT"]

_D = ("return _rowsum(self.A * dA)", "return _rowsum(G * self.o)")
_AVERAGE = ("self.o = self.store(self.A @ self.v)", "self.o = self.store(self.store(self.A) @ self.v)")
_DV = (
    '"value": layer.pool.scatter(_transpose(layer.A) @ self.G, layer.value_winners),',
    '"value": layer.pool.scatter(_transpose(layer.store(layer.A)) @ self.G, layer.value_winners),',
)
_DA = ("self.dA = self.G @ _transpose(layer.v)", "self.dA = layer.store(self.G @ _transpose(layer.v))")
_DS = (
    "self.dS = layer.A * (self.dA - self.D)",
    "self.dS = layer.store(layer.A * (self.dA - self.D))",
)
_G = (
    "self.G = layer.gamma * layer.back_through_out(self.g)",
    "self.G = layer.store(layer.gamma * layer.back_through_out(self.g))",
)

_ROUNDED: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("map rounded for its products", "Kernels multiply 16-bit numbers.", (_AVERAGE, _DV)),
    ("D from the stored output", "The output is what a kernel stores.", (_D,)),
    ("map rounded, and D from the output", "Both of the above.", (_AVERAGE, _DV, _D)),
    (
        "gradients of map and scores rounded",
        "The framework casts them, as it casts their values.",
        (_AVERAGE, _DV, _DA, _DS),
    ),
    ("gradient of the map rounded, and D from the output", "Both casts occur.", (_AVERAGE, _DV, _DA, _D)),
    (
        "every factor rounded",
        "Each product is of 16-bit numbers, and sums in float32.",
        (_AVERAGE, _DV, _D, _DS, _G),
    ),
)


class _InFloat16(Reference):
    """The edited spec in float16 only. In the other dtypes, nothing is rounded."""

    def __init__(self, *edits: tuple[str, str]) -> None:
        super().__init__(edited_spec("float16", edits))

    def dtypes(self) -> tuple[str, ...]:
        """Only float16."""
        return ("float16",)


def _rounded(
    kind: type[Reference], name: str, why: str, edits: tuple[tuple[str, str], ...]
) -> RightImplementation:
    def make() -> Backend:
        backend = kind(*edits)  # type: ignore[arg-type]
        backend.name = name
        return backend

    return RightImplementation(name, why, make)


RIGHT: tuple[RightImplementation, ...] = tuple(
    _rounded(kind, f"{name}, in {dtype}", why, edits)
    for name, why, edits in _ROUNDED
    for kind, dtype in ((InBfloat16, "bfloat16"), (_InFloat16, "float16"))
)
