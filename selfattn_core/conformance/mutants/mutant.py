"""A mutant: a deliberately broken implementation that the kit must catch."""

from collections.abc import Callable
from dataclasses import dataclass

from selfattn_core.conformance.cases.families import FamilyName
from selfattn_core.conformance.mutants.edits import edited_spec
from selfattn_core.conformance.protocol import Backend
from selfattn_core.conformance.reference import Reference

__all__ = ["Mutant", "edited"]


@dataclass(frozen=True)
class Mutant:
    """One broken implementation.

    Args:
        name: the name of the bug.
        family: the family whose cases must catch it.
        make: returns a backend with the bug.
        seen_in: where the bug was published or is common. Empty if it is only one edit away.
        raises: whether the bug is an exception. The cases must show a wrong answer for all other bugs.
    """

    name: str
    family: FamilyName
    make: Callable[[], Backend]
    seen_in: str = ""
    raises: bool = False


def edited(
    name: str, family: FamilyName, *edits: tuple[str, str], seen_in: str = "", raises: bool = False
) -> Mutant:
    """A mutant from the source of the spec with some text replaced.

    Args:
        name: the name of the bug.
        family: the family whose cases must catch it.
        edits: (text that `selfattn_core/spec.py` contains exactly once, its replacement).
        seen_in: where the bug was published.
        raises: as for `Mutant`.

    Example:
        >>> mutant = edited("residual dropped", "forward", ("layer.gamma * layer.z + layer.x", "layer.gamma * layer.z"))
        >>> mutant.make().name
        'residual dropped'
    """

    def make() -> Backend:
        backend = Reference(edited_spec(name, edits))
        backend.name = name
        return backend

    return Mutant(name, family, make, seen_in, raises)
