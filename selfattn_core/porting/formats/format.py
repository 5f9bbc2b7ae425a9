"""A format of checkpoints as data: how it is recognised, read and written."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from selfattn_core.porting.formats.tensors import Array, Tensors

__all__ = ["Format"]


@dataclass(frozen=True)
class Format:
    """How one format is recognised, read and written.

    The three signs look at different things. A format has the one that fits how it lies on the disk.

    Args:
        name: what `open_tensors` and `write_tensors` call it.
        open: lists the tensors of a file of this format.
        title: what messages call it; empty for a variant of another format.
        is_at: whether a path is one of its folders, or one of several files that belong together.
        is_archive: whether a zip archive with members of these names is of this format.
        begins: whether a file that begins with these bytes is of this format.
        file: the content of a new file, in one piece or in several; absent if no file of this format is written. The
            tensors may be made when they are asked for.
        fill: writes a new folder at a path that does not exist yet; absent unless the format is a folder.
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
