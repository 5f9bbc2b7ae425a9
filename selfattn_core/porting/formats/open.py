"""Opens a checkpoint. Its content determines the format, not its name."""

import os
from collections.abc import Callable, Collection
from pathlib import Path

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.format import Format
from selfattn_core.porting.formats.not_read import unread_archive, unread_file, unread_folder
from selfattn_core.porting.formats.orbax import steps_in
from selfattn_core.porting.formats.sharded import index_in, looks_like_index, open_index
from selfattn_core.porting.formats.table import FORMATS
from selfattn_core.porting.formats.tensors import Tensors
from selfattn_core.porting.formats.untrusted.file import Source, unreadable
from selfattn_core.porting.formats.untrusted.zip import Archive

__all__ = ["READABLE", "open_tensors"]

_INDEX = Format("index", lambda path: open_index(path, open_tensors), begins=looks_like_index)
_FORMATS = {each.name: each for each in (*FORMATS, _INDEX)}
READABLE = tuple(_FORMATS)
"""The names of the formats, and "index" for the index of a checkpoint in several files."""
_TITLES = ", ".join(each.title for each in FORMATS if each.title)


def open_tensors(path: str | os.PathLike[str], *, format: str | None = None) -> Tensors:
    """List the tensors of a checkpoint. Values are read one by one.

    Args:
        path: a file, the folder of a format that is a folder, or the common beginning of the names of TensorFlow's files.
        format: one of `READABLE`. By default the content determines it.

    Returns:
        A context manager. Use it in a `with` block.

    Raises:
        PortError: if the file is missing, cannot be read, has an unknown format, is damaged or is deceptive. The message has
            the reason, and nothing was executed.
        ModuleNotFoundError: if TensorStore, Orbax' own library, is not installed. No other format needs a library.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/layer.npz", gamma=np.ones(1))
        ...     with open_tensors(f"{folder}/layer.npz") as tensors:
        ...         print(tensors.format, tensors["gamma"], tensors.read("gamma"))
        npz TensorInfo(shape=(1,), dtype='float64') [1.]
    """
    if not os.fspath(path):
        raise PortError("the path is empty. Name a file.")
    path = Path(path)
    if format is not None and format not in _FORMATS:
        raise PortError(f"{path}: unknown format {format!r}; known are {', '.join(READABLE)}.")
    try:
        if format is not None:
            return _FORMATS[format].open(path)
        if path.is_dir() and not _FORMATS["orbax"].is_at(path):
            path = index_in(path) or path
        return _recognised(path).open(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _recognised(path: Path) -> Format:
    if found := _first(lambda each: each.is_at(path)):
        return found
    if path.is_dir():
        raise PortError(f"{path}: {unread_folder(path, steps_in(path)) or _unknown_folder(path)}.")
    source = Source(path)
    try:
        start = source.bytes_at(0, min(source.size, 600))
        if start.startswith(b"PK"):
            return _recognised_archive(path, Archive(source).members)
    finally:
        source.close()
    if found := _first(lambda each: each.begins(start)):
        return found
    raise PortError(f"{path}: {unread_file(path, start) or _unknown_file(start)}.")


def _recognised_archive(path: Path, members: Collection[str]) -> Format:
    if found := _first(lambda each: each.is_archive(members)):
        return found
    unknown = (
        f"is a zip archive of an unknown format. It holds {', '.join(list(members)[:6])}. Expected {_TITLES}"
    )
    raise PortError(f"{path}: {unread_archive(members) or unknown}.")


def _first(fits: Callable[[Format], bool]) -> Format | None:
    return next((each for each in _FORMATS.values() if fits(each)), None)


def _unknown_folder(path: Path) -> str:
    names = sorted(child.name for child in path.iterdir())
    return (
        "is a folder, and neither a checkpoint of Orbax nor of TensorFlow. It holds "
        f"{', '.join(names[:6]) or 'nothing'}"
    )


def _unknown_file(start: bytes) -> str:
    return f"has an unknown format (it begins with {start[:8].hex(' ')}). Expected {_TITLES}"
