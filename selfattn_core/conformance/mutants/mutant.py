"""What a mutant is: a broken implementation that the kit has to catch."""

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
        name: of the bug.
        family: the cases that have to see it.
        make: a backend with the bug.
        seen_in: where the bug was published or is habit; empty if it is merely one edit away.
        raises: whether the bug is an exception; the others have to give a wrong answer.
    """

    name: str
    family: FamilyName
    make: Callable[[], Backend]
    seen_in: str = ""
    raises: bool = False


def edited(
    name: str, family: FamilyName, *edits: tuple[str, str], seen_in: str = "", raises: bool = False
) -> Mutant:
    """A mutant that is the spec with some of its text replaced.

    Args:
        name: of the bug.
        family: the cases that have to see it.
        edits: (what stands in `selfattn_core/spec.py` exactly once, what shall stand there).
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
