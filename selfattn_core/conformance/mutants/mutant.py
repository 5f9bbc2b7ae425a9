"""What a mutant is: a broken implementation that the kit has to catch."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from selfattn_core import spec
from selfattn_core.conformance.backend import Backend
from selfattn_core.conformance.cases import Family
from selfattn_core.conformance.reference import Reference

__all__ = ["Mutant", "edited", "edited_spec"]


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
    family: Family
    make: Callable[[], Backend]
    seen_in: str = ""
    raises: bool = False


def edited(
    name: str, family: Family, *edits: tuple[str, str], seen_in: str = "", raises: bool = False
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


def edited_spec(name: str, edits: tuple[tuple[str, str], ...]) -> ModuleType:
    """The spec with some of its text replaced, as a module.

    Args:
        name: of the bug, for messages.
        edits: as for `edited`.

    Raises:
        ValueError: if what is to be replaced does not stand in the spec exactly once.

    Example:
        >>> edited_spec("negated", (("layer.gamma * layer.z + layer.x", "-layer.x"),)).VERSION
        1
    """
    source = inspect.getsource(spec)
    for old, new in edits:
        if source.count(old) != 1:
            raise ValueError(
                f"mutant {name!r}: {old!r} stands {source.count(old)} times in the spec; expected once: "
                "the spec has changed, and the mutant is to follow."
            )
        source = source.replace(old, new)
    module = ModuleType(spec.__name__)
    # The source is this package's own, with the replacements of the table.
    exec(compile(source, f"<{name}>", "exec"), module.__dict__)  # noqa: S102
    return module
