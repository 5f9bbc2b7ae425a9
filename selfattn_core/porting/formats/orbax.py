"""Reads and writes Orbax checkpoints, which are folders. Reading needs TensorStore, Orbax' own storage, but not JAX.

Source: orbax/checkpoint/_src/metadata/tree.py and serialization/tensorstore_utils.py for the layout.
"""

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from selfattn_core.arrays import contiguous, widen
from selfattn_core.files.writing import check_room
from selfattn_core.installed import imported, require
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.format import Format
from selfattn_core.porting.formats.msgpack import nested
from selfattn_core.porting.formats.numbers import bits, stored_bytes
from selfattn_core.porting.formats.tensors import Array, Entry, TensorInfo, Tensors
from selfattn_core.porting.formats.untrusted.file import Source
from selfattn_core.porting.formats.untrusted.limits import (
    MAX_DEPTH,
    MAX_EXPANSION,
    MAX_HEADER,
    MAX_TENSORS,
    SMALL,
    checked_shape,
)

__all__ = ["FORMATS", "is_orbax", "open_orbax", "steps_in"]

# The key of our writer's metadata in Orbax' custom metadata.
_METADATA = "selfattn"
_TREE = "_METADATA"
_MANIFEST = "manifest.ocdbt"
_ARRAYS = {"jax.Array", "np.ndarray", "scalar"}
_TIMEOUT = 60
# The bytes of a checkpoint beside the arrays. Each process writes its arrays, and then Orbax writes them once more together.
_ROOM = 2**18
_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")
_CACHE = {"cache_pool": {"total_bytes_limit": 2**24}}


def is_orbax(folder: Path) -> bool:
    """Whether a folder is a checkpoint of Orbax, or a step of its manager that contains one.

    Example:
        >>> is_orbax(Path("there-is-no-such-folder"))
        False
    """
    return bool(_items(folder))


def steps_in(folder: Path) -> list[Path]:
    """The steps in a folder of Orbax' manager. The latest is last.

    Example:
        >>> steps_in(Path("there-is-no-such-folder"))
        []
    """
    try:
        found = [child for child in folder.iterdir() if child.is_dir() and is_orbax(child)]
    except OSError:
        return []

    def order(child: Path) -> tuple[int, str]:
        number = re.search(r"\d+$", child.name)
        return (int(number[0]) if number and len(number[0]) < 20 else -1, child.name)

    return sorted(found, key=order)


def open_orbax(path: Path) -> Tensors:
    """List the arrays of an Orbax checkpoint. Their names do not contain the level `value` of NNX variables.

    Args:
        path: the checkpoint's folder.

    Raises:
        PortError: if the checkpoint is unfinished or damaged, if one of its files is a link, or if an array is larger than the
            folder.
        ModuleNotFoundError: if tensorstore is not installed.
    """
    items = _items(path)
    if len(items) != 1:
        found = (
            f"it holds {', '.join(str(item) for item in items)}: name one" if items else f"it has no {_TREE}"
        )
        raise PortError(f"{path}: is not one checkpoint of Orbax; {found}.")
    (folder,) = items
    require("selfattn_core.porting", ["tensorstore"], "flax")
    tensorstore = imported("tensorstore")
    size = _size(folder)
    tree = _json(folder / _TREE)
    rows = _rows(folder, tree)
    context = tensorstore.Context(_CACHE)
    opened = {}
    problems = []
    for keys in rows:
        try:
            opened[keys] = tensorstore.open(
                _spec(folder, tree, ".".join(keys)), context=context, read=True, open=True
            )
        except (ValueError, TypeError, OSError, RuntimeError, OverflowError) as error:
            problems.append(f"{'/'.join(keys)}: {_first_line(error)}")
    entries = {}
    for keys, future in opened.items():
        name = "/".join(_shown(keys, rows))
        try:
            entries[name] = _entry(path, name, future.result(timeout=_TIMEOUT), size)
        except PortError as error:
            problems.append(str(error))
        except (ValueError, TypeError, OSError, RuntimeError, OverflowError) as error:
            problems.append(f"{name}: {_first_line(error)}")
    if problems:
        raise PortError(
            f"{path}: arrays cannot be read:\n" + "\n".join(f"  {line}" for line in problems[:50])
        )
    if not entries:
        raise PortError(f"{path}: holds no arrays.")
    return Tensors(path, "orbax", entries, _metadata(folder))


def _items(folder: Path) -> list[Path]:
    if (folder / _TREE).is_file():
        return [folder]
    try:
        return sorted(child for child in folder.iterdir() if (child / _TREE).is_file())
    except OSError:
        return []


def _size(folder: Path) -> int:
    """Bytes of all files of the checkpoint.

    Raises:
        PortError: if one is a link, which could point anywhere.
    """
    total = count = 0
    for root, folders, files in os.walk(folder, followlinks=False):
        for name in (*folders, *files):
            path = Path(root) / name
            count += 1
            if path.is_symlink():
                raise PortError(
                    f"{folder}: {path.relative_to(folder)} is a symbolic link; links are not followed."
                )
            if count > MAX_TENSORS:
                raise PortError(f"{folder}: holds more than {MAX_TENSORS} files.")
            total += path.stat().st_size
    return total


def _json(path: Path) -> dict[str, Any]:
    source = Source(path)
    try:
        if source.size > MAX_HEADER:
            raise PortError(f"{path}: has {source.size} bytes; at most {MAX_HEADER} are read.")
        content = json.loads(source.bytes_at(0, source.size))
    except PortError:
        raise
    except (ValueError, RecursionError) as error:
        raise PortError(f"{path}: is damaged: it is not JSON ({error}).") from None
    finally:
        source.close()
    if not isinstance(content, dict):
        raise PortError(f"{path}: is damaged: it is not a JSON object.")
    return content


def _rows(folder: Path, tree: dict[str, Any]) -> list[tuple[str, ...]]:
    """The keys on the way to each array."""
    metadata = tree.get("tree_metadata")
    rows = []
    if isinstance(metadata, dict):
        for row in metadata.values():
            try:
                keys = tuple(str(level["key"]) for level in row["key_metadata"])
                kind = row["value_metadata"]["value_type"]
            except (KeyError, TypeError):
                raise PortError(
                    f"{folder / _TREE}: is damaged: {str(row)[:100]} is no row of a tree."
                ) from None
            name = ".".join(keys)
            if (
                not keys
                or len(keys) > MAX_DEPTH
                or "/" in name
                or "\\" in name
                or "\0" in name
                or ".." in keys
            ):
                raise PortError(
                    f"{folder / _TREE}: the key {name[:200]!r} is a path that leads elsewhere, or none."
                )
            if kind in _ARRAYS:
                rows.append(keys)
    if not rows:
        raise PortError(f"{folder / _TREE}: lists no arrays.")
    if len({".".join(keys) for keys in rows}) < len(rows):
        raise PortError(f"{folder / _TREE}: lists an array twice, so it is unclear which one counts.")
    return rows


def _shown(keys: tuple[str, ...], rows: list[tuple[str, ...]]) -> tuple[str, ...]:
    """NNX saves a variable as a tree with the one key `value`."""
    if (
        len(keys) > 1
        and keys[-1] == "value"
        and not any(row[:-1] == keys[:-1] and row != keys for row in rows)
    ):
        return keys[:-1]
    return keys


def _spec(folder: Path, tree: dict[str, Any], name: str) -> dict[str, Any]:
    base: dict[str, Any] = {"driver": "file", "path": f"{folder.resolve()}/"}
    kvstore = (
        {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        if (folder / _MANIFEST).exists()
        else {**base, "path": f"{base['path']}{name}/"}
    )
    spec: dict[str, Any] = {
        "driver": "zarr3" if tree.get("use_zarr3") is True else "zarr",
        "kvstore": kvstore,
    }
    if tree.get("store_array_data_equal_to_fill_value") is True:
        # Then an absent piece is missing data, not a piece of zeros.
        spec["fill_missing_data_reads"] = False
    return spec


def _entry(path: Path, name: str, store: Any, size: int) -> Entry:
    dtype = store.dtype.name
    if bits(dtype) is None:
        raise PortError(f"{name}: has the dtype {dtype}, which cannot be read")
    info = TensorInfo(checked_shape(name, store.shape), dtype)
    chunk = store.chunk_layout.read_chunk.shape or ()
    grown = max(stored_bytes(info), math.prod(chunk) * (bits(dtype) or 8) // 8)
    if grown > max(SMALL, MAX_EXPANSION * size):
        raise PortError(f"{name}: {dtype} {info.shape} would need {grown} bytes; the whole folder has {size}")

    def read() -> Array:
        try:
            array: Array = np.asarray(store.read().result(timeout=_TIMEOUT + grown / 2**20))
        except (ValueError, OSError, RuntimeError, TimeoutError) as error:
            raise PortError(f"{path}: {name} is damaged or missing ({_first_line(error)}).") from None
        return widen(array) if array.dtype.kind != "V" else array.astype(np.float32)

    return Entry(info, read)


def _metadata(folder: Path) -> dict[str, str]:
    for place in (folder / "_CHECKPOINT_METADATA", folder.parent / "_CHECKPOINT_METADATA"):
        if place.is_file() and not place.is_symlink():
            custom = _json(place).get("custom_metadata")
            own = custom.get(_METADATA) if isinstance(custom, dict) else None
            return {str(key): str(value) for key, value in own.items()} if isinstance(own, dict) else {}
    return {}


def _first_line(error: BaseException) -> str:
    return str(error).split(" [source locations", maxsplit=1)[0].split("\n", 1)[0][:300]


def _fill(place: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    require("selfattn_core.porting", ["orbax"], "flax")
    checkpoint = imported("orbax.checkpoint")
    arrays = {name: contiguous(array) for name, array in tensors.items()}
    # Not StandardCheckpointer: its threads (orbax-checkpoint 0.12.8) wait for ever if the first file cannot be created.
    with (
        _unlogged("absl"),
        checkpoint.Checkpointer(checkpoint.StandardCheckpointHandler()) as checkpointer,
    ):
        # If the disk fills up later, its threads print tracebacks of their own.
        check_room(place.parent, 2 * sum(array.nbytes for array in arrays.values()) + _ROOM)
        try:
            checkpointer.save(
                place,
                args=checkpoint.args.StandardSave(nested(arrays)),
                custom_metadata={_METADATA: dict(metadata)},
            )
        except (ValueError, RuntimeError) as error:
            # TensorStore reports an error of the system in this form.
            number = _SYSTEM_ERROR.search(str(error))
            words = os.strerror(int(number[1])) if number else str(error).split("\n", 1)[0]
            raise OSError(words) from error


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Suppress the tracebacks that a library logs for errors that it also raises."""
    logger = logging.getLogger(name)

    def nothing(_: logging.LogRecord) -> bool:
        return False

    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)


FORMATS = (
    Format(
        "orbax",
        open_orbax,
        "a checkpoint of Orbax",
        is_at=lambda path: path.is_dir() and is_orbax(path),
        fill=_fill,
    ),
)
