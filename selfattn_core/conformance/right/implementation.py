"""A right implementation: another correct way to compute the layer, which the kit must not fail."""

from collections.abc import Callable
from dataclasses import dataclass

from selfattn_core.conformance.mutants.edits import edited_spec
from selfattn_core.conformance.protocol import Backend
from selfattn_core.conformance.reference import Reference

__all__ = ["RightImplementation", "edited"]


@dataclass(frozen=True)
class RightImplementation:
    """One right implementation.

    Args:
        name: how it computes.
        why: why this is the function of the definition.
        make: returns the backend.
    """

    name: str
    why: str
    make: Callable[[], Backend]


def edited(name: str, why: str, *edits: tuple[str, str]) -> RightImplementation:
    """A right implementation from the source of the spec with some text replaced.

    Args:
        name: how it computes.
        why: why this is the function of the definition.
        edits: (text that `selfattn_core/spec.py` contains exactly once, its replacement).

    Example:
        >>> right = edited("residual first", "A sum has no order.", ("layer.gamma * layer.z + layer.x", "layer.x + layer.gamma * layer.z"))
        >>> right.make().name
        'residual first'
    """

    def make() -> Backend:
        backend = Reference(edited_spec(name, edits))
        backend.name = name
        return backend

    return RightImplementation(name, why, make)
