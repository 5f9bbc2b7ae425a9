"""Writes tensors to a file of another framework. The file appears complete or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path

from selfattn_core.files.writing import write_atomically, write_folder_atomically
from selfattn_core.porting.errors import PortError, target_exists
from selfattn_core.porting.formats.format import Format
from selfattn_core.porting.formats.table import FORMATS
from selfattn_core.porting.formats.tensors import Array

__all__ = ["WRITABLE", "write_tensors"]

_FORMATS = {each.name: each for each in FORMATS if each.file or each.fill}
WRITABLE = tuple(_FORMATS)
"""The names of the formats that can be written."""


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Array],
    *,
    format: str,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write tensors under these names.

    Args:
        path: the target: a file, or a folder for "orbax". Its own folder must exist.
        tensors: arrays by name, in the target's own layout. Names have dots for "torch", and slashes for "keras", "msgpack"
            and "orbax": `query/kernel`. bfloat16 is widened to float32, which is exact.
        format: one of `WRITABLE`. "torch" is a state dict for `load_state_dict`, "keras" a `.weights.h5` for
            `load_weights`, "msgpack" a file for `flax.serialization`, "orbax" a checkpoint that Orbax restores.
        metadata: text to store in the header of "safetensors", as a member of "npz", among PyTorch's versions of modules, as
            attributes of the HDF5 file, or as custom metadata of Orbax. "msgpack" has no place for it.
        overwrite: whether an existing target may be replaced.

    Raises:
        PortError: if the target exists and `overwrite` is False, if it is a folder instead of a file or the reverse, if it
            cannot be written, if the disk is full, or if its folder is missing. The target is then unchanged.
        ModuleNotFoundError: if the format's own library is not installed.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from selfattn_core.porting import open_tensors
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_tensors(f"{folder}/layer.npz", {"gamma": np.ones(1)}, format="npz", metadata={"source": "mine"})
        ...     with open_tensors(f"{folder}/layer.npz") as written:
        ...         print(written.read("gamma"), written.metadata)
        [1.] {'source': 'mine'}
    """
    target = Path(path)
    if format not in _FORMATS:
        raise PortError(f"{target}: unknown format {format!r}; can be written: {', '.join(WRITABLE)}.")
    chosen = _FORMATS[format]
    _check_target(target, chosen, overwrite)
    fields = {str(key): str(value) for key, value in (metadata or {}).items()}
    try:
        if chosen.file:
            write_atomically(target, chosen.file(tensors, fields), overwrite=overwrite)
        elif chosen.fill:
            with write_folder_atomically(target, overwrite=overwrite) as place:
                chosen.fill(place, tensors, fields)
    except FileExistsError:
        raise target_exists(target) from None
    except OSError as error:
        raise PortError(
            f"{target}: cannot be written: {error.strerror or error}. Nothing was written or replaced."
        ) from error


def _check_target(target: Path, chosen: Format, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise PortError(f"{target}: there is no folder {target.parent}. Nothing was written.")
    if chosen.fill and target.exists() and not target.is_dir():
        raise PortError(f"{target}: is a file; {chosen.title} is a folder. Nothing was written.")
    if chosen.file and target.is_dir():
        raise PortError(f"{target}: is a folder; name a file in it. Nothing was written.")
    if target.exists() and not overwrite:
        raise target_exists(target)
    if chosen.fill and target.is_dir() and any(target.iterdir()) and not chosen.is_at(target):
        raise PortError(f"{target}: is a folder that is not a checkpoint. It was not replaced.")
