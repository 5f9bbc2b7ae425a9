"""Reads and writes Flax's msgpack files, which are nested maps of arrays. A file is scanned, and arrays are read on access.

The msgpack library unpacks a whole file. Measured with msgpack 1.2 on a file of 400 MiB of which one array is read: it takes
801 MiB, this reader 214 MiB, most of which are pages of the file that the system can take back.

Source: flax/serialization.py for the arrays; the msgpack specification for the rest.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfattn_core.arrays import contiguous
from selfattn_core.installed import imported, require
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.format import Format
from selfattn_core.porting.formats.numbers import bits, stored_bytes
from selfattn_core.porting.formats.tensors import Array, Entry, TensorInfo, Tensors
from selfattn_core.porting.formats.untrusted.file import Source
from selfattn_core.porting.formats.untrusted.limits import MAX_DEPTH, MAX_TENSORS, checked_shape

__all__ = ["FORMATS", "nested", "open_msgpack"]

_ARRAY = 1
_CHUNKED = "__msgpack_chunked_array__"
_MAX_VALUES = 5 * MAX_TENSORS
# How the following number or length is packed, by the first byte.
_NUMBERS = {0xCA: ">f", 0xCB: ">d"} | dict(
    zip(range(0xCC, 0xD4), (">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True)
)
_LENGTHS = {
    0xC4: ("bin", ">B"),
    0xC5: ("bin", ">H"),
    0xC6: ("bin", ">I"),
    0xC7: ("extension", ">B"),
    0xC8: ("extension", ">H"),
    0xC9: ("extension", ">I"),
    0xD9: ("str", ">B"),
    0xDA: ("str", ">H"),
    0xDB: ("str", ">I"),
    0xDC: ("array", ">H"),
    0xDD: ("array", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}
_SHORT = ((0x8F, "map", 15), (0x9F, "array", 15), (0xBF, "str", 31))
_SIMPLE = {0xC0: None, 0xC2: False, 0xC3: True}


@dataclass(frozen=True)
class _Bytes:
    """A run of bytes that stays in the file."""

    place: int
    size: int


@dataclass(frozen=True)
class _Leaf:
    info: TensorInfo
    place: int


def open_msgpack(path: Path) -> Tensors:
    """List the arrays of a file that `flax.serialization.to_bytes` or `msgpack_serialize` wrote.

    Args:
        path: the path of the file.

    Raises:
        PortError: if the file is damaged, truncated or nested more deeply than any checkpoint, or has a key twice.
    """
    source = Source(path)
    try:
        with mmap.mmap(source.file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            scanner = _Scanner(path, view)
            tree = scanner.value(0)
            if scanner.place != source.size:
                raise PortError(f"{path}: {source.size - scanner.place} bytes follow the end of its content.")
        entries = {}
        for name, leaf in _leaves(path, tree, ""):
            if name in entries:
                raise PortError(f"{path}: holds {name} twice, so it is unclear which one counts.")
            entries[name] = _entry(source, name, leaf)
        if not entries:
            raise PortError(f"{path}: holds no arrays. Expected a file of flax.serialization.")
        return Tensors(path, "msgpack", entries, {}, source.close)
    except BaseException:
        source.close()
        raise


class _Scanner:
    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path, self.view, self.place, self.end = path, view, 0, len(view)
        self.count = 0

    def take(self, count: int) -> int:
        """Skip bytes that must exist, and return their place."""
        place = self.place
        if place + count > self.end:
            raise PortError(
                f"{self.path}: is truncated or damaged: it ends at byte {self.end}, inside a value."
            )
        self.place += count
        return place

    def unpack(self, form: str) -> Any:
        place = self.take(struct.calcsize(form))
        return struct.unpack_from(form, self.view, place)[0]

    def value(self, depth: int) -> Any:
        self.count += 1
        if depth > MAX_DEPTH or self.count > _MAX_VALUES:
            raise PortError(f"{self.path}: is nested too deeply or holds too many values for a checkpoint.")
        first = self.view[self.take(1)]
        if first <= 0x7F or first >= 0xE0:
            return first if first <= 0x7F else first - 256
        if first in _SIMPLE:
            return _SIMPLE[first]
        if first in _NUMBERS:
            return self.unpack(_NUMBERS[first])
        kind, length = self.sized(first)
        if kind == "bin":
            return _Bytes(self.take(length), length)
        return self.text(length) if kind == "str" else getattr(self, kind)(length, depth)

    def sized(self, first: int) -> tuple[str, int]:
        """The kind and length of a value whose length varies."""
        for below, kind, mask in _SHORT:
            if first <= below:
                return kind, first & mask
        if 0xD4 <= first <= 0xD8:
            return "extension", 1 << (first - 0xD4)
        if first not in _LENGTHS:
            raise PortError(
                f"{self.path}: is not a msgpack file, or is damaged: byte {self.place - 1} is {first:#x}."
            )
        kind, form = _LENGTHS[first]
        return kind, self.unpack(form)

    def text(self, length: int) -> str:
        place = self.take(length)
        return self.view[place : place + length].decode("utf-8", "replace")

    def array(self, length: int, depth: int) -> list[Any]:
        return [self.value(depth + 1) for _ in range(length)]

    def map(self, length: int, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if not isinstance(key, str | int | bool):
                raise PortError(f"{self.path}: has a key that is not a name: {str(key)[:80]}.")
            if str(key) in result:
                raise PortError(
                    f"{self.path}: holds the key {str(key)[:200]!r} twice, so it is unclear which one counts."
                )
            result[str(key)] = self.value(depth + 1)
        return result

    def extension(self, length: int, depth: int) -> Any:
        kind = self.view[self.take(1)]
        end = self.place + length
        if kind != _ARRAY:
            # A complex number or a scalar is not a tensor.
            self.take(length)
            return None
        content = self.value(depth + 1)
        if self.place != end or not isinstance(content, list) or len(content) != 3:
            raise PortError(f"{self.path}: is damaged: the array at byte {end - length} is malformed.")
        shape, dtype, data = content
        where = f"{self.path}: the array at byte {end - length}"
        if not isinstance(shape, list) or not isinstance(data, _Bytes):
            raise PortError(f"{where} has no shape or no bytes.")
        if not isinstance(dtype, str) or bits(dtype) is None:
            raise PortError(f"{where} has the dtype {str(dtype)[:40]!r}, which cannot be read.")
        info = TensorInfo(checked_shape(where, shape), dtype)
        if stored_bytes(info) != data.size:
            raise PortError(
                f"{where}: {dtype} {info.shape} needs {stored_bytes(info)} bytes, but there are {data.size}."
            )
        return _Leaf(info, data.place)


def _leaves(path: Path, value: Any, prefix: str) -> Iterator[tuple[str, _Leaf | list[_Leaf]]]:
    if isinstance(value, _Leaf):
        yield prefix or "tensor", value
    elif isinstance(value, dict) and _CHUNKED in value:
        yield prefix or "tensor", _chunks(path, prefix, value)
    elif isinstance(value, dict | list):
        children = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in children:
            yield from _leaves(path, child, f"{prefix}/{key}" if prefix else str(key))


def _chunks(path: Path, name: str, value: dict[str, Any]) -> list[_Leaf]:
    """An array of more than 1 GiB, which Flax writes in pieces. The first element describes the whole."""
    shape, chunks = value.get("shape"), value.get("chunks")
    pieces = list(chunks.values()) if isinstance(chunks, dict) else []
    axes = list(shape.values()) if isinstance(shape, dict) else [None]
    if not pieces or not all(isinstance(piece, _Leaf) for piece in pieces):
        raise PortError(f"{path}: {name} is an array in pieces, but a piece is missing.")
    whole = TensorInfo(checked_shape(f"{path}: {name}", axes), pieces[0].info.dtype)
    held = sum(stored_bytes(piece.info) for piece in pieces)
    if held != stored_bytes(whole) or {piece.info.dtype for piece in pieces} != {whole.dtype}:
        raise PortError(
            f"{path}: {name} {whole.shape} needs {stored_bytes(whole)} bytes, but its pieces have {held}."
        )
    return [_Leaf(whole, -1), *pieces]


def _entry(source: Source, name: str, leaf: _Leaf | list[_Leaf]) -> Entry:
    if isinstance(leaf, _Leaf):
        return Entry(leaf.info, lambda: source.array_at(name, leaf.place, leaf.info))

    def read() -> Array:
        array = None
        start = 0
        for piece in leaf[1:]:
            numbers = source.array_at(name, piece.place, piece.info).reshape(-1)
            if array is None:
                array = np.empty(leaf[0].info.shape, numbers.dtype)
            array.reshape(-1)[start : start + numbers.size] = numbers
            start += numbers.size
        assert array is not None  # noqa: S101 - there is at least one piece
        return array

    return Entry(leaf[0].info, read)


def _content(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:  # noqa: ARG001 - the format has no place for metadata
    require("selfattn_core.porting", ["flax"], "flax")
    content: bytes = imported("flax.serialization").msgpack_serialize(nested(tensors))
    return content


def nested(tensors: Mapping[str, Array]) -> dict[str, Any]:
    """Nested dictionaries of contiguous arrays, from names with slashes. Flax and Orbax write such dictionaries.

    Example:
        >>> nested({"query/kernel": np.ones(2), "gamma": np.zeros(1)})
        {'query': {'kernel': array([1., 1.])}, 'gamma': array([0.])}
    """
    tree: dict[str, Any] = {}
    for name, array in tensors.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = contiguous(array)
    return tree


def _begins(start: bytes) -> bool:
    """A map whose first key is a short string."""
    if len(start) < 4:
        return False
    at = 1 if 0x81 <= start[0] <= 0x8F else {0xDE: 3, 0xDF: 5}.get(start[0], 0)
    return bool(at) and (0xA1 <= start[at] <= 0xBF or start[at] == 0xD9)


FORMATS = (Format("msgpack", open_msgpack, "Flax msgpack", begins=_begins, file=_content),)
