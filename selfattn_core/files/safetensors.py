"""Reading and writing the `.safetensors` format, a JSON header and the tensors behind it, without the library of that name.

Measurements with safetensors 0.8.0 and numpy 2 gave the reasons. The library's numpy side reads no bfloat16 and no 8-bit
floats unless ml_dtypes is installed. It writes the memory of a non-contiguous array in the wrong order. It writes metadata
entries in an order that changes from file to file, so equal weights do not give equal files. Its reader accepts a header
that names a tensor twice, and reports one problem at a time. The tests read our files with the library, and compare the
bytes.

Source: the format as described in the README of huggingface/safetensors.
"""

import io
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from selfattn_core.arrays import Array, contiguous, declared_shape, widen

__all__ = [
    "CODES",
    "DTYPES",
    "LONGEST_HEADER",
    "Header",
    "SafetensorsError",
    "StoredTensor",
    "header_bytes",
    "pieces",
    "read_all",
    "read_header",
    "read_tensor",
    "whole_file",
]


DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn",
    "F4": "float4_e2m1fn",
}
"""The names of dtypes in numpy and ml_dtypes, by their codes in a file."""

CODES = {name: code for code, name in DTYPES.items()}
"""The codes of dtypes, by their names."""

LONGEST_HEADER = 32 * 2**20
"""The most bytes of a header that is parsed. A network of ten thousand tensors needs about one MiB."""

# The dtypes of numpy itself. bfloat16 is widened.
_WRITABLE = (
    *("float64", "float32", "float16", "int64", "int32", "int16", "int8"),
    *("uint64", "uint32", "uint16", "uint8", "bool"),
)


class SafetensorsError(ValueError):
    """A file that is not `.safetensors`, or tensors that the format cannot hold."""


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in a file.

    Args:
        code: code of its dtype, one of `DTYPES`.
        shape: stored shape.
        place: position of its first byte in the file.
        size: size in bytes.
    """

    code: str
    shape: tuple[int, ...]
    place: int
    size: int


@dataclass(frozen=True)
class Header:
    """The checked header of a file.

    Args:
        metadata: texts by name.
        tensors: places of the tensors by name, in the order of the header.
    """

    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]


def read_header(file: BinaryIO) -> Header:
    """Read the header of a file. No memory is allocated for tensors.

    Args:
        file: a file open for reading.

    Raises:
        SafetensorsError: if the header is invalid, names a key twice, or does not match the bytes of the file. The message
            lists every wrong tensor, and does not name the file.

    Example:
        >>> content = whole_file({"gamma": np.ones(1, np.float32)}, {"source": "mine"})
        >>> read_header(io.BytesIO(content)).metadata
        {'source': 'mine'}
    """
    end = file.seek(0, io.SEEK_END)
    if end < 8:
        raise SafetensorsError(f"has {end} bytes; a .safetensors file has at least 8: it is truncated.")
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > end - 8:
        raise SafetensorsError(
            f"its header should have {length} bytes and the file has {end}, so it is truncated or no .safetensors file."
        )
    if length > LONGEST_HEADER:
        raise SafetensorsError(f"has a header of {length} bytes; at most {LONGEST_HEADER} are read.")
    rows = _parsed(file.read(length))
    # MLX writes null if there is no metadata.
    metadata = rows.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SafetensorsError("its __metadata__ is not a JSON object of strings.")
    tensors, problems = {}, []
    for key, row in rows.items():
        try:
            tensors[key] = _stored(key, row, 8 + length)
        except SafetensorsError as error:
            problems.append(str(error))
    problems = problems or _gaps(tensors, 8 + length, end)
    if problems:
        raise SafetensorsError("its header is wrong:\n" + "\n".join(f"  {line}" for line in problems[:50]))
    return Header(metadata, tensors)


def read_tensor(file: BinaryIO, stored: StoredTensor) -> Array:
    """Read a tensor's values as a new array. bfloat16 becomes float32, which is exact.

    Args:
        file: the file of the header.
        stored: entry of the header. Its dtype must be a numpy dtype or bfloat16.
    """
    file.seek(stored.place)
    content = file.read(stored.size)
    if DTYPES[stored.code] == "bfloat16":
        halves = np.frombuffer(content, "<u2").astype(np.uint32)
        return (halves << 16).view(np.float32).reshape(stored.shape)
    dtype = np.dtype(DTYPES[stored.code])
    return np.frombuffer(content, dtype.newbyteorder("<")).astype(dtype).reshape(stored.shape)


def read_all(file: BinaryIO) -> tuple[dict[str, str], dict[str, Array]]:
    """The metadata and all tensors of a file.

    Raises:
        SafetensorsError: see `read_header`.
        TypeError: if a tensor has a dtype that numpy lacks.

    Example:
        >>> read_all(io.BytesIO(whole_file({"gamma": np.ones(1, np.float32)})))
        ({}, {'gamma': array([1.], dtype=float32)})
    """
    header = read_header(file)
    return header.metadata, {name: read_tensor(file, stored) for name, stored in header.tensors.items()}


def whole_file(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """A file in one piece. Wider dtypes come first, as in the library, so that every number is aligned.

    Args:
        tensors: tensors by name, see `pieces`.
        metadata: texts by name.

    Raises:
        SafetensorsError: see `pieces`.
    """
    ordered = sorted(tensors, key=lambda name: (-widen(tensors[name]).itemsize, name))
    return b"".join(pieces({name: tensors[name] for name in ordered}, metadata))


def pieces(
    tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """A file in pieces: the header, then one tensor after the other.

    Every tensor is requested twice and released at once, so they do not have to fit into memory together.

    Args:
        tensors: tensors by name, in the order of the file. bfloat16 is widened to float32.
        metadata: texts by name. If there are none, the file has no entry for them.

    Raises:
        SafetensorsError: if the format does not support a dtype, or a tensor has a different size the second time.
    """
    rows: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    place = 0
    for name in tensors:
        made = contiguous(tensors[name])
        if made.dtype.name not in _WRITABLE:
            raise SafetensorsError(
                f"{name}: {made.dtype} has no place in .safetensors; it has {', '.join(_WRITABLE)}."
            )
        offsets = [place, place + made.nbytes]
        rows[name] = {"dtype": CODES[made.dtype.name], "shape": made.shape, "data_offsets": offsets}
        place = offsets[1]
        # Otherwise it would be kept while the next one is made.
        del made
    yield header_bytes(rows)
    for name in tensors:
        made = contiguous(tensors[name])
        if made.nbytes != rows[name]["data_offsets"][1] - rows[name]["data_offsets"][0]:
            raise SafetensorsError(f"{name}: changed while it was written; nothing was written.")
        yield made.data if made.nbytes else b""
        del made


def header_bytes(rows: Mapping[str, Any]) -> bytes:
    """The start of a file: the length of the header, and the header.

    Args:
        rows: the JSON object of the header.

    Example:
        >>> header_bytes({})[8:]
        b'{}      '
    """
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _parsed(content: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1][:10]
            raise SafetensorsError(
                f"holds a key twice: {', '.join(twice)}; which one is meant cannot be known."
            )
        return result

    try:
        header = json.loads(content, object_pairs_hook=unique)
    except SafetensorsError:
        raise
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"is no .safetensors file: its header is not JSON ({error}).") from None
    if not isinstance(header, dict):
        raise SafetensorsError("is no .safetensors file: its header is not a JSON object.")
    return header


def _stored(key: str, row: object, start: int) -> StoredTensor:
    if not isinstance(row, dict) or not {"dtype", "shape", "data_offsets"} <= set(row):
        raise SafetensorsError(f"{key}: expected dtype, shape and data_offsets; got {str(row)[:100]}")
    code, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise SafetensorsError(f"{key}: unknown dtype {str(code)[:40]!r}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list):
        raise SafetensorsError(f"{key}: the shape is {str(shape)[:100]}, not a list")
    axes = declared_shape(shape)
    if axes is None:
        raise SafetensorsError(f"{key}: the shape {str(shape)[:200]} is not one of an array.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(place) is int for place in offsets):
        raise SafetensorsError(f"{key}: data_offsets are {str(offsets)[:100]}, not two integers")
    begin, stop = offsets
    size = (math.prod(axes) * _bits(code) + 7) // 8
    if stop - begin != size or begin < 0:
        raise SafetensorsError(
            f"{key}: {DTYPES[code]} {axes} needs {size} bytes, data_offsets {begin} to {stop} are {stop - begin}"
        )
    return StoredTensor(code, axes, start + begin, size)


def _bits(code: str) -> int:
    """The bits of one number. Every code except BOOL contains them."""
    named = re.search(r"\d+", code)
    return int(named[0]) if named else 8


def _gaps(tensors: Mapping[str, StoredTensor], start: int, end: int) -> list[str]:
    """Check that tensors follow one another without overlap or gap and fill the file, as the format requires."""
    problems, place = [], 0
    for begin, stop, key in sorted(
        (row.place - start, row.place - start + row.size, key) for key, row in tensors.items()
    ):
        if begin != place:
            problems.append(
                f"{key}: begins at byte {begin} of the data, but the tensor before it ends at {place}"
            )
        place = max(place, stop)
    if place > end - start:
        problems.append(
            f"the file is truncated: its header promises {place} bytes of data, and it has {end - start}"
        )
    elif place < end - start:
        problems.append(f"{end - start - place} bytes behind the last tensor belong to no tensor")
    return problems
