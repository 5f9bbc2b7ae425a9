"""Broken versions of the spec, made of its own text."""

import inspect
from types import ModuleType

from selfattn_core import spec

__all__ = ["edited_spec"]


def edited_spec(name: str, edits: tuple[tuple[str, str], ...]) -> ModuleType:
    """The spec with some of its text replaced, as a module.

    Args:
        name: of what is made, for messages.
        edits: (what stands in `selfattn_core/spec.py` exactly once, what shall stand there).

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
                f"edit {name!r}: {old!r} stands {source.count(old)} times in the spec; expected once: "
                "the spec has changed, and the edit is to follow."
            )
        source = source.replace(old, new)
    module = ModuleType(spec.__name__)
    # The source is this package's own, with the replacements of the table.
    exec(compile(source, f"<{name}>", "exec"), module.__dict__)  # noqa: S102
    return module
