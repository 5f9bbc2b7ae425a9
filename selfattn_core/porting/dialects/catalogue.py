"""Finds a dialect by name: a built-in one, or a file of your own."""

import difflib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from selfattn_core.files.text import read_text
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.dialects.parse import parse_dialect
from selfattn_core.porting.errors import PortError

__all__ = ["dialect", "dialect_names"]

# In bytes. A dialect has a few thousand.
_LARGEST_FILE = 2**20


def dialect_names() -> list[str]:
    """Every built-in dialect, ours first.

    Example:
        >>> dialect_names()[:4]
        ['canonical', 'torch', 'keras', 'flax']
    """
    ours = ["canonical", "torch", "keras", "flax"]
    names = [path.name.removesuffix(".toml") for path in _data().iterdir() if path.name.endswith(".toml")]
    return ours + sorted(set(names) - set(ours))


def dialect(name: str) -> Dialect:
    """A built-in dialect by its name, or your own from a TOML file.

    Args:
        name: a name from `dialect_names`, or a path that ends in ".toml".

    Raises:
        PortError: if there is no such dialect, or if the file is incomplete or inconsistent (with every problem).

    Example:
        >>> dialect("deoldify").variants[0].roles["query"]
        'key'
        >>> dialect("fastia")
        Traceback (most recent call last):
        ...
        selfattn_core.porting.errors.PortError: dialect 'fastia' is unknown; did you mean fastai or fastai-1? `selfattn dialects` lists all. A file of your own ends in .toml.
    """
    if name.endswith(".toml"):
        return parse_dialect(_read(Path(name)), name)
    known = dialect_names()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise PortError(
            f"dialect {name!r} is unknown; {hint}`selfattn dialects` lists all. A file of your own ends in .toml.",
            kind="unknown_dialect",
            names=near,
        )
    return _built_in(name)


@cache
def _built_in(name: str) -> Dialect:
    return parse_dialect((_data() / f"{name}.toml").read_text(encoding="utf-8"), name)


def _data() -> Any:
    return resources.files("selfattn_core.porting.dialects") / "data"


def _read(path: Path) -> str:
    if path.is_dir():
        raise PortError(f"{path}: cannot be read as a dialect: it is a folder.")
    if not path.exists():
        raise PortError(f"{path}: cannot be read as a dialect: no such file.")
    try:
        return read_text(path, most=_LARGEST_FILE)
    except (OSError, ValueError) as error:
        raise PortError(
            f"cannot be read as a dialect: {error} (a dialect has a few thousand bytes of TOML in UTF-8)"
        ) from error
