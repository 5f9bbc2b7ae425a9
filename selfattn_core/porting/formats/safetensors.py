"""`.safetensors`: a JSON header, checked here before anything is allocated, and the tensors behind it.

Read without the safetensors library, whose numpy side has no bfloat16 and no 8-bit floats without ml_dtypes.

Source: the format as described in the README of huggingface/safetensors.
"""

import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.format import Format
from selfattn_core.porting.formats.numbers import contiguous, stored_bytes
from selfattn_core.porting.formats.tensors import Array, Entry, TensorInfo, Tensors
from selfattn_core.porting.formats.untrusted.file import Source
from selfattn_core.porting.formats.untrusted.limits import MAX_HEADER, checked_shape

__all__ = ["DTYPES", "FORMATS", "open_safetensors"]

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

_CODES = {
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


def open_safetensors(path: Path) -> Tensors:
    """The tensors of a `.safetensors` file.

    Args:
        path: of the file.

    Raises:
        PortError: if the header is not one, names a key twice, or promises other bytes than the file holds; lists every
            tensor that is wrong.
    """
    source = Source(path)
    try:
        return _open(source)
    except BaseException:
        source.close()
        raise


def _open(source: Source) -> Tensors:
    path = source.path
    if source.size < 8:
        raise PortError(
            f"{path}: has {source.size} bytes; a .safetensors file has at least 8: it is truncated."
        )
    length = int.from_bytes(source.bytes_at(0, 8), "little")
    if length > source.size - 8:
        raise PortError(
            f"{path}: is truncated or no .safetensors file: its header should have {length} bytes, "
            f"the file has {source.size}."
        )
    if length > MAX_HEADER:
        raise PortError(f"{path}: has a header of {length} bytes; at most {MAX_HEADER} are read.")
    header = _parse(path, source.bytes_at(8, length))
    # MLX writes null where there is none.
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise PortError(f"{path}: its __metadata__ is not a JSON object of strings.")
    start, end = 8 + length, source.size
    entries, places, problems = {}, [], []
    for key, row in header.items():
        try:
            info, begin, stop = _row(key, row)
        except PortError as error:
            problems.append(str(error))
            continue
        places.append((begin, stop, key))
        offset = start + begin
        entries[key] = Entry(info, lambda k=key, o=offset, i=info: source.array_at(k, o, i))  # type: ignore[misc]
    problems += _gaps(sorted(places), end - start) if not problems else []
    if problems:
        raise PortError(f"{path}: its header is wrong:\n" + "\n".join(f"  {line}" for line in problems[:50]))
    return Tensors(path, "safetensors", entries, metadata, source.close)


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1][:10]
            raise PortError(
                f"{path}: holds a key twice: {', '.join(twice)}; which one is meant cannot be known."
            )
        return result

    try:
        header = json.loads(content, object_pairs_hook=unique)
    except PortError:
        raise
    except (ValueError, RecursionError) as error:
        raise PortError(f"{path}: is no .safetensors file: its header is not JSON ({error}).") from None
    if not isinstance(header, dict):
        raise PortError(f"{path}: is no .safetensors file: its header is not a JSON object.")
    return header


def _row(key: str, row: object) -> tuple[TensorInfo, int, int]:
    if not isinstance(row, dict) or not {"dtype", "shape", "data_offsets"} <= set(row):
        raise PortError(f"{key}: expected dtype, shape and data_offsets; got {str(row)[:100]}")
    if row["dtype"] not in DTYPES:
        raise PortError(f"{key}: unknown dtype {str(row['dtype'])[:40]!r}; known are {', '.join(DTYPES)}")
    if not isinstance(row["shape"], list):
        raise PortError(f"{key}: the shape is {str(row['shape'])[:100]}, not a list")
    info = TensorInfo(checked_shape(key, row["shape"]), DTYPES[row["dtype"]])
    offsets = row["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(place) is int for place in offsets):
        raise PortError(f"{key}: data_offsets are {str(offsets)[:100]}, not two integers")
    begin, stop = offsets
    if stop - begin != stored_bytes(info) or begin < 0:
        raise PortError(
            f"{key}: {info.dtype} {info.shape} needs {stored_bytes(info)} bytes, data_offsets {begin} to {stop} are {stop - begin}"
        )
    return info, begin, stop


def _gaps(places: list[tuple[int, int, str]], size: int) -> list[str]:
    """Tensors must follow one another without overlap or gap and fill the file, as the format demands."""
    problems, place = [], 0
    for begin, stop, key in places:
        if begin != place:
            problems.append(
                f"{key}: begins at byte {begin} of the data, the tensor before it ends at {place}"
            )
        place = max(place, stop)
    if place > size:
        problems.append(f"the file is truncated: {place} bytes of data are promised, {size} are there")
    elif place < size:
        problems.append(f"{size - place} bytes behind the last tensor belong to none")
    return problems


def _content(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The file in pieces: length of the header, header, then every tensor's bytes, which two passes over them make.

    Source: the format's specification, github.com/huggingface/safetensors.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name in tensors:
        made = contiguous(tensors[name])
        if made.dtype.name not in _CODES:
            raise PortError(f"{name}: {made.dtype} has no place in .safetensors; it has {', '.join(_CODES)}.")
        offsets = [place, place + made.nbytes]
        header[name] = {"dtype": _CODES[made.dtype.name], "shape": made.shape, "data_offsets": offsets}
        place = offsets[1]
        # Or it would be held while the next one is made.
        del made
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in tensors:
        made = contiguous(tensors[name])
        if made.nbytes != header[name]["data_offsets"][1] - header[name]["data_offsets"][0]:
            raise PortError(f"{name}: has changed while it was written; nothing was written.")
        yield made.data if made.nbytes else b""
        del made


def _begins(start: bytes) -> bool:
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**40


FORMATS = (Format("safetensors", open_safetensors, ".safetensors", begins=_begins, file=_content),)
