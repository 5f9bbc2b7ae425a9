"""Which reader a file is for: its content says so, not its name."""

import os
from collections.abc import Callable
from pathlib import Path

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.keras import open_h5, open_keras
from selfattn_core.porting.formats.msgpack import looks_like_msgpack, open_msgpack
from selfattn_core.porting.formats.not_read import unread_archive, unread_file, unread_folder
from selfattn_core.porting.formats.npz import open_npz
from selfattn_core.porting.formats.orbax import is_orbax, open_orbax, steps_in
from selfattn_core.porting.formats.safetensors import open_safetensors
from selfattn_core.porting.formats.sharded import index_in, open_index
from selfattn_core.porting.formats.tensorflow import checkpoint_prefix, open_tensorflow
from selfattn_core.porting.formats.tensors import Tensors
from selfattn_core.porting.formats.torch import open_torch, open_torch_legacy
from selfattn_core.porting.formats.untrusted.file import Source, unreadable
from selfattn_core.porting.formats.untrusted.zip import Archive

__all__ = ["CONTAINERS", "open_tensors"]

_READERS: dict[str, Callable[[Path], Tensors]] = {
    "safetensors": open_safetensors,
    "npz": open_npz,
    "torch": open_torch,
    "torch-legacy": open_torch_legacy,
    "pickle": open_torch_legacy,
    "keras": open_keras,
    "h5": open_h5,
    "msgpack": open_msgpack,
    "orbax": open_orbax,
    "tensorflow": open_tensorflow,
    "index": lambda path: open_index(path, open_tensors),
}
CONTAINERS = tuple(_READERS)
_SHOWN = ".safetensors, .npz, PyTorch, .keras, .h5, Flax msgpack, an Orbax folder, a TensorFlow checkpoint"


_SIGNS: dict[str, Callable[[bytes], bool]] = {
    "h5": lambda start: start.startswith(b"\x89HDF\r\n\x1a\n"),
    "safetensors": lambda start: start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**40,
    "msgpack": looks_like_msgpack,
    # Every pickle since protocol 2 begins so, and torch has never written an older one.
    "torch-legacy": lambda start: len(start) > 1 and start[0] == 0x80 and start[1] <= 5,
}


def open_tensors(path: str | os.PathLike[str], *, layout: str | None = None) -> Tensors:
    """The tensors of a checkpoint, listed; values are read one by one.

    Args:
        path: a file, the folder that some formats are, or the common beginning of the names of TensorFlow's files.
        layout: the format, one of `CONTAINERS`; by default the content says which it is.

    Returns:
        A context manager, to be used in a `with` block.

    Raises:
        PortError: if there is no such file, it cannot be read, is of no known format, damaged or made to deceive. The
            message says which, and nothing has been executed.
        ModuleNotFoundError: if TensorStore, Orbax' own library, is not installed; no other format needs one.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/layer.npz", gamma=np.ones(1))
        ...     with open_tensors(f"{folder}/layer.npz") as tensors:
        ...         print(tensors.container, tensors["gamma"], tensors.read("gamma"))
        npz TensorInfo(shape=(1,), dtype='float64') [1.]
    """
    if not os.fspath(path):
        raise PortError("the path is empty; name a file.")
    path = Path(path)
    if layout is not None and layout not in _READERS:
        raise PortError(f"{path}: unknown format {layout!r}; known are {', '.join(CONTAINERS)}.")
    try:
        if layout is None and path.is_dir() and not is_orbax(path) and (inside := index_in(path)):
            path = inside
        return _READERS[layout or _layout(path)](path)
    except OSError as error:
        raise unreadable(path, error) from error


def _layout(path: Path) -> str:
    if path.is_dir():
        return _folder_layout(path)
    if checkpoint_prefix(path):
        return "tensorflow"
    source = Source(path)
    try:
        start = source.bytes_at(0, min(source.size, 600))
        if start.startswith(b"PK"):
            return _zip_layout(source)
    finally:
        source.close()
    if start.lstrip()[:1] == b"{":
        return "index"
    for layout, fits in _SIGNS.items():
        if fits(start):
            return layout
    if start[257:262] == b"ustar":
        raise PortError(
            f"{path}: is a tar archive; unpack it, or, if torch before 0.1.10 wrote it, load it there and save it again."
        )
    if known := unread_file(path, start):
        raise PortError(f"{path}: {known}.")
    raise PortError(
        f"{path}: is of no known format (it begins with {start[:8].hex(' ')}); expected {_SHOWN}."
    )


def _folder_layout(path: Path) -> str:
    names = sorted(child.name for child in path.iterdir())
    if is_orbax(path):
        return "orbax"
    if checkpoint_prefix(path):
        return "tensorflow"
    if known := unread_folder(path, steps_in(path)):
        raise PortError(f"{path}: {known}.")
    raise PortError(
        f"{path}: is a folder, and neither a checkpoint of Orbax nor of TensorFlow; it holds {', '.join(names[:6]) or 'nothing'}."
    )


def _zip_layout(source: Source) -> str:
    members = Archive(source).members
    if any(name.rpartition("/")[2] == "data.pkl" for name in members):
        return "torch"
    if "config.json" in members or any(name.endswith(".h5") for name in members):
        return "keras"
    if any(name.endswith(".npy") for name in members) or not members:
        return "npz"
    if known := unread_archive(members):
        raise PortError(f"{source.path}: {known}.")
    raise PortError(
        f"{source.path}: is a zip archive of no known format; it holds {', '.join(list(members)[:6])}; expected {_SHOWN}."
    )
