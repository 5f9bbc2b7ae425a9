"""Broken versions of the spec, made by replacing text in its source."""

import inspect
from types import ModuleType

from selfattn_core import spec

__all__ = ["edited_spec"]


def edited_spec(name: str, edits: tuple[tuple[str, str], ...]) -> ModuleType:
    """A module with the source of the spec, in which some text is replaced.

    Args:
        name: the name of the module, for messages.
        edits: (text that `selfattn_core/spec.py` contains exactly once, its replacement).

    Raises:
        ValueError: if the spec does not contain a text exactly once.

    Example:
        >>> edited_spec("negated", (("layer.gamma * layer.z + layer.x", "-layer.x"),)).VERSION
        1
    """
    source = inspect.getsource(spec)
    for old, new in edits:
        if source.count(old) != 1:
            raise ValueError(
                f"edit {name!r}: got {source.count(old)} places with {old!r} in the spec, expected one: "
                "the spec has changed, so change the edit too."
            )
        source = source.replace(old, new)
    module = ModuleType(spec.__name__)
    # The source belongs to this package. The replacements come from the tables of mutants.
    exec(compile(source, f"<{name}>", "exec"), module.__dict__)  # noqa: S102
    return module
