"""A format of checkpoints as data: how to recognise, read and write it."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from selfattn_core.porting.formats.tensors import Array, Tensors

__all__ = ["Format"]


@dataclass(frozen=True)
class Format:
    """One format: how to recognise, read and write it.

    A format is recognised by `is_at`, `is_archive` or `begins`. It has the one that fits its files or folders.

    Args:
        name: its name in `open_tensors` and `write_tensors`.
        open: lists the tensors of a file of this format.
        title: its name in messages. Empty for a variant of another format.
        is_at: whether a path is one of its folders, or one of several files that belong together.
        is_archive: whether a zip archive with members of these names has this format.
        begins: whether a file that begins with these bytes has this format.
        file: returns the content of a new file, in one piece or in several. None if such files are not written. The tensors
            may be computed at access.
        fill: writes a new folder at a path that does not exist yet. None unless the format is a folder.
    """

    name: str
    open: Callable[[Path], Tensors]
    title: str = ""
    is_at: Callable[[Path], bool] = lambda _: False
    is_archive: Callable[[Collection[str]], bool] = lambda _: False
    begins: Callable[[bytes], bool] = lambda _: False
    file: Callable[[Mapping[str, Array], Mapping[str, str]], bytes | Iterable[bytes | memoryview]] | None = (
        None
    )
    fill: Callable[[Path, Mapping[str, Array], Mapping[str, str]], None] | None = None
