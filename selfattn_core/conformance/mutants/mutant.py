"""A mutant: a deliberately broken implementation that the kit must catch."""

from collections.abc import Callable
from dataclasses import dataclass

from selfattn_core.conformance.cases.families import FamilyName
from selfattn_core.conformance.mutants.edits import edited_spec
from selfattn_core.conformance.protocol import Backend
from selfattn_core.conformance.reference import Reference

__all__ = ["Mutant", "edited", "named"]


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


def named(
    name: str, family: FamilyName, make: Callable[[], Reference], *, seen_in: str = "", raises: bool = False
) -> Mutant:
    """A mutant whose backend has the name of its bug.

    Args:
        name: the name of the bug.
        family: as for `Mutant`.
        make: makes the backend, such as its class.
        seen_in: where the bug was published.
        raises: as for `Mutant`.

    Example:
        >>> named("none", "forward", Reference).make().name
        'none'
    """

    def make_named() -> Backend:
        backend = make()
        backend.name = name
        return backend

    return Mutant(name, family, make_named, seen_in, raises)


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
    return named(name, family, lambda: Reference(edited_spec(name, edits)), seen_in=seen_in, raises=raises)
