"""Tensors into a file of another framework: whole or not at all, and never over what is there unless told."""

import io
import json
import logging
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from selfattn_core.files.writing import check_room, write_atomically, write_folder_atomically
from selfattn_core.installed import imported, require
from selfattn_core.params import widen
from selfattn_core.porting.errors import PortError, target_exists
from selfattn_core.porting.formats import keras, npz, orbax, torch

__all__ = ["WRITABLE", "write_tensors"]

Array = NDArray[Any]


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Array],
    *,
    container: str,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write tensors under these names.

    Args:
        path: the target, a file, or with "orbax" a folder; the folder that it is in must exist.
        tensors: arrays by name, in the target's own layout. For "torch" names are separated by dots, for "keras",
            "msgpack" and "orbax" by slashes: `query/kernel`. bfloat16 is widened to float32, which is exact.
        container: one of `WRITABLE`. "torch" is a state dict for `load_state_dict`, "keras" a `.weights.h5` for
            `load_weights`, "msgpack" what `flax.serialization` restores, "orbax" a checkpoint that Orbax restores.
        metadata: kept with the file: in the header of "safetensors", as a member of "npz", among torch's versions of
            modules, as an attribute of the HDF5 file, as custom metadata of Orbax, and nowhere in "msgpack".
        overwrite: whether an existing target may be replaced.

    Raises:
        PortError: if the target exists and `overwrite` is False, is of another kind (a folder where a file should be), must
            not be written, does not fit on the disk, or its folder is absent. The target is then as it was.
        ModuleNotFoundError: if the format's own library is not installed.

    Example:
        >>> import tempfile
        >>> from selfattn_core.porting import open_tensors
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_tensors(f"{folder}/layer.npz", {"gamma": np.ones(1)}, container="npz", metadata={"source": "mine"})
        ...     with open_tensors(f"{folder}/layer.npz") as written:
        ...         print(written.read("gamma"), written.metadata)
        [1.] {'source': 'mine'}
    """
    target = Path(path)
    if container not in WRITABLE:
        raise PortError(f"{target}: unknown format {container!r}; can be written: {', '.join(WRITABLE)}.")
    _check_target(target, container, overwrite)
    fields = {str(key): str(value) for key, value in (metadata or {}).items()}
    try:
        if container == "safetensors":
            # Piece by piece, since the tensors may be made when they are asked for, and together not fit into memory.
            write_atomically(target, _safetensors(tensors, fields), overwrite=overwrite)
        else:
            arrays = {name: _contiguous(array) for name, array in tensors.items()}
            if container == "orbax":
                _write_orbax(target, arrays, fields, overwrite)
            else:
                write_atomically(target, _BYTES[container](arrays, fields), overwrite=overwrite)
    except FileExistsError:
        raise target_exists(target) from None
    except OSError as error:
        raise PortError(
            f"{target}: cannot be written: {error.strerror or error}. Nothing was written, and what was there is as it was."
        ) from error


def _check_target(target: Path, container: str, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise PortError(f"{target}: there is no folder {target.parent}; nothing was written.")
    if container == "orbax" and target.exists() and not target.is_dir():
        raise PortError(f"{target}: is a file; a checkpoint of Orbax is a folder. Nothing was written.")
    if container != "orbax" and target.is_dir():
        raise PortError(f"{target}: is a folder; name a file in it. Nothing was written.")
    if target.exists() and not overwrite:
        raise target_exists(target)
    if container == "orbax" and target.is_dir() and any(target.iterdir()) and not orbax.is_orbax(target):
        raise PortError(f"{target}: is a folder of something else than a checkpoint, and is not replaced.")


def _contiguous(array: Array) -> Array:
    return np.ascontiguousarray(widen(array)).reshape(np.shape(array))


def _safetensors(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The file in pieces: length of the header, header, then every tensor's bytes, which two passes over them make.

    Source: the format's specification, github.com/huggingface/safetensors.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name in tensors:
        made = _contiguous(tensors[name])
        if made.dtype.name not in _SAFETENSORS:
            raise PortError(
                f"{name}: {made.dtype} has no place in .safetensors; it has {', '.join(_SAFETENSORS)}."
            )
        offsets = [place, place + made.nbytes]
        header[name] = {"dtype": _SAFETENSORS[made.dtype.name], "shape": made.shape, "data_offsets": offsets}
        place = offsets[1]
        # Or it would be held while the next one is made.
        del made
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in tensors:
        made = _contiguous(tensors[name])
        if made.nbytes != header[name]["data_offsets"][1] - header[name]["data_offsets"][0]:
            raise PortError(f"{name}: has changed while it was written; nothing was written.")
        yield made.data if made.nbytes else b""
        del made


def _npz(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, array in tensors.items():
            # A fixed date, so that equal tensors are equal files.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                npy.write_array(member, array, allow_pickle=False)
        if metadata:
            archive.writestr(zipfile.ZipInfo(npz.METADATA), json.dumps(dict(metadata)))
    return content.getvalue()


def _torch(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    require("selfattn_core.porting", ["torch"], "torch")
    import collections

    # By name, for this package imports no framework: the library is that of the format.
    framework = imported("torch")
    state: Any = collections.OrderedDict(
        (name, framework.from_numpy(array)) for name, array in tensors.items()
    )
    if metadata:
        state._metadata = {"": {}, torch.METADATA: dict(metadata)}  # noqa: SLF001 - where torch keeps the like
    content = io.BytesIO()
    framework.save(state, content)
    return content.getvalue()


def _keras(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    require("selfattn_core.porting", ["h5py"], "keras")
    h5py = imported("h5py")
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for name, array in tensors.items():
            layer, _, variable = name.rpartition("/")
            number = variable if variable.isdecimal() else _KERAS_ORDER.get(variable)
            if number is None:
                raise PortError(
                    f"{name}: Keras stores variables by number, and which one {variable!r} has is not known; expected "
                    f"{', '.join(_KERAS_ORDER)} or vars/<number>."
                )
            group = layer.removesuffix("vars").removesuffix("/")
            file[f"{group}/vars/{number}".lstrip("/")] = array
        for key, value in metadata.items():
            # An attribute holds 64 KiB at most.
            for start in range(0, max(1, len(value)), _ATTRIBUTE):
                piece = f"{key}{keras.CONTINUED}{start // _ATTRIBUTE}" if start else key
                file.attrs[piece] = value[start : start + _ATTRIBUTE]
    return content.getvalue()


def _msgpack(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:  # noqa: ARG001 - it has no place for any
    require("selfattn_core.porting", ["flax"], "flax")
    content: bytes = imported("flax.serialization").msgpack_serialize(_tree(tensors))
    return content


def _tree(tensors: Mapping[str, Array]) -> dict[str, Any]:
    """Names with slashes as nested dictionaries."""
    tree: dict[str, Any] = {}
    for name, array in tensors.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = array
    return tree


def _write_orbax(
    target: Path, tensors: Mapping[str, Array], metadata: dict[str, str], overwrite: bool
) -> None:
    require("selfattn_core.porting", ["orbax"], "flax")
    checkpoint = imported("orbax.checkpoint")
    # Not StandardCheckpointer, whose threads (orbax-checkpoint 0.12.8) wait for ever where the first file cannot be made.
    with (
        write_folder_atomically(target, overwrite=overwrite) as place,
        _unlogged("absl"),
        checkpoint.Checkpointer(checkpoint.StandardCheckpointHandler()) as checkpointer,
    ):
        # Its threads show tracebacks of their own where the disk fills up under them.
        check_room(place.parent, 2 * sum(array.nbytes for array in tensors.values()) + _ORBAX_ROOM)
        try:
            checkpointer.save(
                place,
                args=checkpoint.args.StandardSave(_tree(tensors)),
                custom_metadata={orbax.METADATA: metadata},
            )
        except (ValueError, RuntimeError) as error:
            # How TensorStore reports what the system refused.
            number = _SYSTEM_ERROR.search(str(error))
            words = os.strerror(int(number[1])) if number else str(error).split("\n", 1)[0]
            raise OSError(words) from error


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Without the tracebacks that a library logs of what it raises as well."""
    logger = logging.getLogger(name)

    def nothing(_: logging.LogRecord) -> bool:
        return False

    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)


# Bytes beside the arrays, which are written once by each process and once together.
_ORBAX_ROOM = 2**18
_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")
# Characters, of which one can take four bytes.
_ATTRIBUTE = 15_000
_SAFETENSORS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_KERAS_ORDER = {"kernel": "0", "bias": "1", "gamma": "0", "u": "u", "v": "v"}
_BYTES: dict[str, Callable[[Mapping[str, Array], Mapping[str, str]], bytes]] = {
    "npz": _npz,
    "torch": _torch,
    "keras": _keras,
    "msgpack": _msgpack,
}
WRITABLE = ("safetensors", *_BYTES, "orbax")
